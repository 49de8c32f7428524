"""Compiles the stub of NVML, and runs functions in a process whose libnvidia-ml.so.1 it is."""

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

SONAME = "libnvidia-ml.so.1"  # what nvidia-ml-py loads
COMPILER = shutil.which("gcc") or shutil.which("cc")


def compile_stub(folder):
    source = Path(__file__).with_name("nvml_stub.c")
    flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{SONAME}"]
    subprocess.run([COMPILER, *flags, "-o", folder / SONAME, source, "-lpthread"], check=True)


@contextmanager
def process_with_stub(folder):
    """`run(script, function, *args)`: what the module's function returns in the one process that has the stub."""
    compile_stub(folder)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, {"LD_LIBRARY_PATH": path}):
            pool.submit(os.getpid).result(timeout=60)

        def run(script, function, *args, **kwargs):
            return pool.submit(scripted, script, function, args, kwargs).result(timeout=60)

        yield run


def stub():
    """The stub, in its process."""
    return ctypes.CDLL(SONAME)


def scripted(script, function, args, kwargs):
    line = stub().stub_script(script.encode())
    assert line == 0, f"line {line} of the script is no statement: {script}"
    try:
        return function(*args, **kwargs)
    finally:
        assert stub().stub_references() == 0, "nvmlInit and nvmlShutdown are not balanced"
