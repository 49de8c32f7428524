"""Triton kernels, one op a file, importing nothing else of ours. Imported as `bt_fast.kernels`."""
