"""A rank that dies or hangs is an error on the others within the group's time limit, not a hang."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import RankError, run_ranks
from small_models import batch, build
from torch.nn.parallel import DistributedDataParallel

from bt_fast import BulletTrain, trades_loss

TIMEOUT = timedelta(seconds=2)


def interrupted(how, path):
    """Ends or suspends rank 1 after two iterations; rank 0 writes the error it gets, and after how many seconds."""
    group = dist.new_group(timeout=TIMEOUT)
    model = DistributedDataParallel(build(), process_group=group)
    bullet, (x, y) = BulletTrain(2, 1, 0, process_group=group), batch()
    for step in range(4):
        if step == 2 and dist.get_rank() == 1:
            os._exit(7) if how == "dies" else time.sleep(6)
        start = time.monotonic()
        try:
            trades_loss(model, x, y, None, 0.02, 0.05, bullet=bullet).backward()
        except RuntimeError as error:
            path.write_text(f"{step} {time.monotonic() - start} {error}")
            os._exit(3)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_the_others_are_notified_within_the_limit(how, tmp_path):
    with pytest.raises(RankError):
        run_ranks(2, interrupted, how, tmp_path / "told")
    step, seconds, error = (tmp_path / "told").read_text().split(maxsplit=2)
    assert step == "2"
    assert float(seconds) < TIMEOUT.seconds + 10
    assert any(word in error.lower() for word in ("connection", "timed out", "timeout")), error


def set_later():
    bullet = BulletTrain()
    assert bullet.process_group is None
    bullet.process_group = dist.group.WORLD
    assert bullet.process_group is dist.group.WORLD
    z, y = torch.eye(5) * 3, torch.arange(5)
    bullet.plan(z, y if dist.get_rank() == 0 else y.roll(1))
    bullet.observe(z, y)
    return bullet.group_counts.clone()


def test_a_group_may_be_joined_later():
    for result in run_ranks(2, set_later):
        assert result.tolist() == [5, 5, 0]
