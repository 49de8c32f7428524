"""The paper's tables and figures as studies, each run by `bt-fast study NAME`."""
