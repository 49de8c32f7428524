"""Shares of an iteration are shares of its work: on a GPU, of the time of kernels instead of their launches."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from benchmarks import work_ratio

pytestmark = pytest.mark.any_torch
NAMES = ("part", "whole")
SECONDS = {"part": [1.0, 2.0, 1.0], "whole": [4.0, 4.0, 5.0]}


def of_work(device, kernels):
    """Returns the ratio for pieces that take SECONDS; on a GPU they have these microseconds of kernels each."""
    run = []

    def profiled(activities):
        spent = [SimpleNamespace(self_device_time_total=us, is_user_annotation=False) for us in kernels[len(run)]]
        spent.append(SimpleNamespace(self_device_time_total=1e9, is_user_annotation=True))
        return nullcontext(SimpleNamespace(key_averages=lambda: spent))

    work = {name: lambda name=name: run.append(name) for name in NAMES}
    prepared = mock.Mock()
    with mock.patch.multiple(work_ratio, profile=profiled, synchronize=mock.Mock()):
        result = work_ratio.work_ratio(NAMES, work, prepared, SECONDS, torch.device(device))
    assert [call.args[0] for call in prepared.call_args_list] == run
    return result


def test_on_the_cpu_it_is_the_median_of_the_times():
    assert of_work("cpu", ()) == 0.25


@pytest.mark.parametrize("share", [0.001, 0.5])
def test_on_a_gpu_it_is_the_time_of_the_kernels_whatever_their_launches_take(share):
    assert of_work("cuda", ([2000 * share], [500, 1500])) == pytest.approx(share)
