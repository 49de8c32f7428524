import reference_trades
import torch
from small_models import batch, build, gradients
from tolerances import assert_near, assert_near_nested

from bt_fast.baselines.trades_reference import trades_reference_loss


def test_the_yardstick_computes_what_the_authors_compute_at_their_cost():
    results = []
    for loss_of in (trades_reference_loss, reference_trades.trades_loss):
        model, (x, y) = build("conv_bn"), batch()
        sizes = []
        model.register_forward_hook(lambda _, args, __, sizes=sizes: sizes.append(len(args[0])))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(3)
        loss = loss_of(model, x, y, optimizer, step_size=0.007, epsilon=0.031, perturb_steps=10, beta=6.0)
        loss.backward()
        results.append((loss.detach(), gradients(model), model.state_dict(), sizes))
    (loss, grads, state, sizes), (their_loss, their_grads, their_state, their_sizes) = results
    assert_near(loss, their_loss)
    assert_near_nested(grads, their_grads)
    assert_near_nested(state, their_state)
    assert sizes == their_sizes == [8] * 23
