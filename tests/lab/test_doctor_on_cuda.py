"""On a GPU (`pytest -m cuda`) the doctor finds no problem, and the ops run in kernels."""

import pytest
import torch

from bt_fast.lab import doctor


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_everything_runs_fused_and_is_right():
    findings = doctor.examine(None)
    assert not [f for f in findings if f.status == "FAILED"], doctor.lines(findings)
    assert all(f.status == "ok" for f in findings if f.section in doctor.SECTIONS[3:])
