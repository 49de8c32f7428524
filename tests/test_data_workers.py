"""Our objectives fed by a DataLoader whose worker dies or hangs: an error within a time limit, not a hang."""

import os
import signal
import time

import pytest
import torch
from small_models import batch, build, conv_bn
from torch.utils.data import DataLoader, Dataset

from bt_fast import BulletTrain, Guard, trades_loss

X, Y = batch(m=16, dtype=torch.float32)
LIMIT = 30.0  # seconds; it takes one or two


class Samples(Dataset):
    """Sixteen images with their numbers, of which the worker cannot deliver the eleventh."""

    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        if i == 10:
            self.fault()
        return i, X[i], Y[i]


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hanging():
    time.sleep(10 * LIMIT)


@pytest.mark.parametrize(
    ("fault", "timeout", "message"), [(killed, 0, r"DataLoader worker .* (killed|exited)"), (hanging, 1, "timed out")]
)
def test_a_worker_that_dies_or_hangs_is_an_error_within_a_limit(fault, timeout, message):
    model, bullet = build(conv_bn, dtype=torch.float32), BulletTrain(2, 1, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard, learnt = Guard(optimizer, model, bullet, non_finite="skip"), []

    def train():
        for indices, x, y in DataLoader(Samples(fault), batch_size=4, num_workers=1, timeout=timeout):
            with guard.minibatch(indices):
                loss = trades_loss(model, x, y, optimizer, epsilon=0.1, bullet=bullet)
                loss.backward()
                guard.step(loss)
            learnt.extend(indices.tolist())

    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        train()
    assert time.monotonic() - start < LIMIT
    assert learnt in ([], [*range(4)], [*range(8)])  # a death is told at once, whatever was delivered before
    assert len(learnt) <= int(bullet.group_counts.sum()) <= 8
