"""The check before a benchmark holds on a device with its own random numbers, and can fail."""

from functools import partial
from unittest import mock

import pytest
import small_models
import torch

from benchmarks.exactness import check_same
from bt_fast import BulletTrain, mart_loss, pgd_loss, trades_loss
from bt_fast.attack.start import normal_noise
from bt_fast.baselines.mart_reference import mart_reference_loss
from bt_fast.baselines.pgd_reference import pgd_reference_loss
from bt_fast.baselines.trades_reference import trades_reference_loss
from bt_fast.objectives import starts

pytestmark = pytest.mark.any_torch
OPTIONS = {"step_size": 0.02, "epsilon": 0.1, "perturb_steps": 4}
LOSSES = {
    "trades": (trades_reference_loss, trades_loss),
    "mart": (mart_reference_loss, mart_loss),
    "pgd": (pgd_reference_loss, pgd_loss),
}


def batch():
    torch.manual_seed(0)
    return small_models.conv_bn(), torch.rand(4, 1, 6, 6), torch.arange(4)


def drawn_on_the_device():
    """Draws the normal start as on a GPU: from a generator other than the host's, in the images' dtype."""
    device = torch.Generator().manual_seed(7)
    own = mock.Mock(side_effect=lambda x, generator, on_cpu=False: normal_noise(x, device))
    return mock.patch.object(starts, "normal_noise", own)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_authors_loss_and_ours_get_the_same_noise_where_a_device_draws_its_own(loss):
    with drawn_on_the_device():
        check_same(*batch(), LOSSES[loss], OPTIONS)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_that_is_another_is_refused(loss):
    reference, ours = LOSSES[loss]
    with drawn_on_the_device(), pytest.raises(AssertionError, match="not close"):
        check_same(*batch(), [reference, partial(ours, start="uniform" if loss != "pgd" else "normal")], OPTIONS)


def test_ours_with_bullet_train_is_compared_with_itself():
    options = {**OPTIONS, "perturb_steps": 10, "bullet": BulletTrain(4, 2, 0)}
    check_same(*batch(), [trades_loss, trades_loss], options)
    with pytest.raises(AssertionError, match="not close"):
        check_same(*batch(), [trades_loss, partial(trades_loss, start="uniform")], options)
