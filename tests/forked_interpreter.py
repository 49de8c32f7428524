"""Runs Python commands under Triton's interpreter, each in a process forked from one that has imported torch once.

    with ForkedInterpreter() as interpreted:
        code, printed = interpreted("-m", "pytest", "test_an_op.py")

A process of its own, since importing triton chooses the interpreter, and a command may die.
"""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback


class ForkedInterpreter:
    """The process that others are forked from; called with a command's arguments, returns its code and output."""

    def __enter__(self):
        paths = [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen([sys.executable, __file__], text=True, env=environment, **pipes)
        return self

    def __exit__(self, *error):
        self._server.communicate()

    def __call__(self, *command):
        print(json.dumps(command), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())


def serve():
    import pytest  # noqa: F401
    import torch
    import triton  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+", errors="replace") as printed:
            child = os.fork()
            if child == 0:
                os._exit(run(json.loads(line), printed.fileno()))
            _, status = os.waitpid(child, 0)
            printed.seek(0)
            print(json.dumps([os.waitstatus_to_exitcode(status), printed.read()]), flush=True)


def run(command, output):
    """Does what `python *command` does, and returns its exit code."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = command[1:] if command[0] == "-m" else command
    sys.path[0] = "" if command[0] == "-m" else os.path.dirname(command[0])
    code = 1
    try:
        if command[0] == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
