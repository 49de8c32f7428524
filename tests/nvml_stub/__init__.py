"""Compiles the stub of NVML, and runs functions in a process that loads it as libnvidia-ml.so.1."""

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

SONAME = "libnvidia-ml.so.1"  # the name that nvidia-ml-py loads
COMPILER = shutil.which("gcc") or shutil.which("cc")


def compile_stub(folder):
    source = Path(__file__).with_name("nvml_stub.c")
    flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{SONAME}"]
    subprocess.run([COMPILER, *flags, "-o", folder / SONAME, source, "-lpthread"], check=True)


@contextmanager
def process_with_stub(folder):
    """Yields `run(script, function, *args)`, which calls a function of the module in the one process with the stub."""
    compile_stub(folder)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, {"LD_LIBRARY_PATH": path}):
            pool.submit(os.getpid).result(timeout=60)

        def run(script, function, *args, **kwargs):
            return pool.submit(scripted, script, function, args, kwargs).result(timeout=60)

        yield run


def stub():
    """Returns the stub, in its process."""
    return ctypes.CDLL(SONAME)


def scripted(script, function, args, kwargs):
    line = stub().stub_script(script.encode())
    assert line == 0, f"line {line} of the script is no statement: {script}"
    try:
        return function(*args, **kwargs)
    finally:
        assert stub().stub_references() == 0, "nvmlInit and nvmlShutdown are not balanced"
