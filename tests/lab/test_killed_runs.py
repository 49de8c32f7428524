"""A run that is killed while it writes resumes to the same bits. `killed_runs.py` tests 50 random moments."""

import json
import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[1] / "killed_runs.py"
MOMENTS = (
    "write checkpoint.pt",
    "renamed checkpoint.pt",
    "write metrics.jsonl",
)


def test_runs_killed_in_the_middle_of_a_file_operation_resume_to_the_same_bits(tmp_path):
    out = tmp_path / "killed.json"
    only = [argument for moment in MOMENTS for argument in ("--only", moment)]
    command = [sys.executable, TOOL, "--moments", "0", "--operations", "3", "--epochs", "2", *only, "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOL.parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    runs = json.loads(out.read_text())["runs"]
    assert [run["operation"] for run in runs] == list(MOMENTS)
    assert [run["half_written_temporary_file"] for run in runs] == [True, False, False]
    assert all(run["identical"] and run["died"] and run["nothing_left"] for run in runs)
