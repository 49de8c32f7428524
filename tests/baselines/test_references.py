import pytest
import torch
from objective_cases import OBJECTIVES
from small_models import batch, build, gradients
from tolerances import assert_near, assert_near_nested

from bt_fast.baselines.mart_reference import mart_reference_loss
from bt_fast.baselines.pgd_reference import pgd_reference_loss
from bt_fast.baselines.trades_reference import trades_reference_loss

YARDSTICKS = {"trades": trades_reference_loss, "mart": mart_reference_loss, "pgd": pgd_reference_loss}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_yardstick_computes_what_the_authors_compute_at_their_cost(objective):
    results, options = [], objective.options("l_inf")
    del options["distance"]
    for loss_of in (YARDSTICKS[objective.name], objective.reference):
        model, (x, y) = build("conv_bn"), batch()
        sizes = []
        model.register_forward_hook(lambda _, args, __, sizes=sizes: sizes.append(len(args[0])))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(3)
        loss = loss_of(
            model, x, y, optimizer, **{k: v for k, v in objective.options("l_inf").items() if k != "distance"}
        )
        loss.backward()
        results.append((loss.detach(), gradients(model), model.state_dict(), sizes))
    (loss, grads, state, sizes), (their_loss, their_grads, their_state, their_sizes) = results
    assert_near(loss, their_loss)
    assert_near_nested(grads, their_grads)
    assert_near_nested(state, their_state)
    assert sizes == their_sizes == [8] * sum(objective.reference_forwards)
