"""The environments that the package is held to: `pip install 'nox[uv]'`, then `nox` runs the whole suite in each.

nox -s oldest                     # one of them
nox -s oldest -- tests/attack -x  # with pytest's arguments: a part of the suite, of which no result is kept

A whole run is entered in benchmarks/results/matrix.md: versions, counts, skipped tests with their reasons.
"""

from __future__ import annotations

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = True

ENVIRONMENTS = {
    "oldest": ("3.10", ["torch==2.6.0"]),
    "torch-2.11": ("3.12", ["torch==2.11.0", "triton==3.6.0", "numpy==2.5.2"]),  # what a rented H100 commonly has
    "torch-2.13": ("3.11", ["torch==2.13.0"]),
    "newest": ("3.13", ["torch"]),
}


def whole_suite(session: nox.Session, versions: list[str]) -> None:
    """Install the package with these versions, run its tests, and keep the result if they were all of them."""
    session.install(*versions, "-e", ".[test]")
    if session.posargs:
        session.run("python", "-m", "pytest", *session.posargs)
        return
    results = f"{session.create_tmp()}/results.xml"
    try:
        session.run("python", "-m", "pytest", "-n", "2", "-q", f"--junit-xml={results}")
    finally:
        session.run("python", "-m", "benchmarks.matrix", session.name, results)


for name, (python, versions) in ENVIRONMENTS.items():

    @nox.session(name=name, python=python)
    def environment(session: nox.Session, versions: list[str] = versions) -> None:
        """The whole suite in one environment."""
        whole_suite(session, versions)
