"""The soak (`python -m tests.soak`) runs, and distinguishes growing memory from flat memory."""

import pytest
import torch

from tests import soak
from tests.soak import Emulated, Growth, Sample, Training


def growth_of(training, iterations=30):
    samples, _, _ = soak.soak(training, iterations, iterations // 6, monitored=False)
    return Growth.of(samples)


@pytest.mark.parametrize("training", [Training, Emulated])
def test_no_tensor_and_no_object_is_left_behind(training):
    growth = growth_of(training(), 30 if training is Training else 12)
    assert growth.tensors[0] == growth.tensors[1]
    assert growth.objects < 1000  # in a thousand iterations; too few run here to be more exact


def test_a_tensor_that_is_kept_is_not_flat():
    kept = []

    class Keeping(Training):
        def step(self, iteration):
            super().step(iteration)
            kept.append(torch.zeros(1))

    assert not growth_of(Keeping()).flat


def test_the_resident_set_counts():
    def samples(kib):
        return [Sample(n, 1000 + kib * n / 1000 + (500 if n == 700 else 0), 5, 100) for n in range(100, 1001, 50)]

    assert Growth.of(samples(kib=10)).flat  # a single outlier gives no slope
    assert not Growth.of(samples(kib=100)).flat
