"""Our objectives fed by a DataLoader with a worker that dies or hangs: an error within a time limit, not a hang.

In a separate process: torch raises from a signal handler, at any point of the main thread.
"""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from small_models import batch, build, conv_bn
from torch.utils.data import DataLoader, Dataset

from bt_fast import BulletTrain, Guard, trades_loss

LIMIT = 60.0  # seconds; it takes a few, mostly to start


class Samples(Dataset):
    """Sixteen images with their numbers; the worker cannot deliver the eleventh."""

    def __init__(self, fault):
        self.fault = fault
        self.x, self.y = batch(m=16, dtype=torch.float32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if i == 10:
            self.fault()
        return i, self.x[i], self.y[i]


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hanging():
    time.sleep(10 * LIMIT)


def train(fault, timeout):
    """Prints the numbers of the samples it learns from."""
    model, bullet = build(conv_bn, dtype=torch.float32), BulletTrain(2, 1, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = Guard(optimizer, model, bullet, non_finite="skip")
    for indices, x, y in DataLoader(Samples(fault), batch_size=4, num_workers=1, timeout=timeout):
        with guard.minibatch(indices):
            loss = trades_loss(model, x, y, optimizer, epsilon=0.1, bullet=bullet)
            loss.backward()
            guard.step(loss)
        print(*indices.tolist(), flush=True)


@pytest.mark.parametrize(
    ("fault", "timeout", "message"),
    [(killed, 0, r"RuntimeError: DataLoader worker .* (killed|exited)"), (hanging, 1, "RuntimeError: .*timed out")],
)
def test_a_worker_that_dies_or_hangs_is_an_error_within_a_limit(fault, timeout, message):
    arguments = [sys.executable, __file__, fault.__name__, str(timeout)]
    folders = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=LIMIT, env=environment)
    assert done.returncode == 1
    assert re.search(message, done.stderr)
    # a death is reported at once, even if batches were delivered before
    assert [int(i) for i in done.stdout.split()] in ([], [*range(4)], [*range(8)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    train({"killed": killed, "hanging": hanging}[sys.argv[1]], int(sys.argv[2]))
