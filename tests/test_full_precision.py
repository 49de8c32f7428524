"""A caller's float32 settings are restored, whatever torch reports of them."""

import os
import subprocess
import sys
from pathlib import Path

import float32_settings


def test_whatever_was_set_by_either_api_is_as_it_was_after_full_precision():
    script = Path(float32_settings.__file__)
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.stdout.splitlines() == [f"{way} is as it was" for way in float32_settings.WAYS], run.stderr
