"""On a GPU (`pytest -m cuda`), every runner and the graphed update give the results of the eager loop.

A library may choose another algorithm for another batch size, and graphs pad a prefix to a bucket, so that gradients
differ in their last bits: in float64 that moves next to no sign.
"""

import copy

import ordinary_loops
import pytest
import torch

from bt_fast import RUNNERS, BulletTrain, Frozen, GraphRunner, StreamRunner, Update, mart_loss, pgd_loss, trades_loss
from bt_fast.lab.models import build_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("error:.*runs without graphs:UserWarning"),  # nothing may fall back
]
DEVICE = torch.device("cuda")
M, EPSILON = 24, 0.1
TOLERANCE = 1e-6  # of loss, gradients and buffers, relative to the largest of each tensor


def updates(loss_of, steps=4, bullet=True, **options):
    """Returns losses, gradients and buffers of some updates; the last batch is smaller."""
    torch.manual_seed(0)
    model = build_model("wrn-10-1", in_channels=3, image_size=16, num_classes=10).double().to(DEVICE)
    x, y = torch.rand(M, 3, 16, 16, dtype=torch.float64).to(DEVICE), (torch.arange(M) % 10).to(DEVICE)
    mining = BulletTrain(4, 2, 1).to(DEVICE) if bullet else None
    generator, result = torch.Generator(DEVICE).manual_seed(0), []
    for k in range(steps):
        m = M if k < steps - 1 else M - 5
        given = {"bullet": mining, "generator": generator, "epsilon": EPSILON, "perturb_steps": 4}
        model.zero_grad()
        loss = loss_of(model, x[:m], y[:m], None, 0.02, **given, **options)
        loss.backward()
        result.append([t.detach().clone() for t in (loss, *(p.grad for p in model.parameters()), *model.buffers())])
    return result


def assert_same(result, expected):
    for mine, theirs in zip(result, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            scale = max(1e-3, float(b.abs().max()))
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("frozen", [None, Frozen()], ids=["model", "view"])
@pytest.mark.parametrize("bullet", [True, False], ids=["bullet", "uniform"])
@pytest.mark.parametrize("runner", [GraphRunner, StreamRunner])
def test_a_runner_gives_the_eager_result(runner, bullet, frozen):
    expected = updates(trades_loss, bullet=bullet, frozen=frozen)
    assert_same(updates(trades_loss, bullet=bullet, frozen=frozen, runner=runner()), expected)


@pytest.mark.parametrize("loss_of", [trades_loss, mart_loss, pgd_loss])
def test_the_update_from_graphs_gives_the_eager_result(loss_of):
    expected = updates(loss_of, update=Update())
    assert_same(updates(loss_of, update=Update(graphs=True)), expected)
    assert_same(updates(loss_of, update=Update(graphs=True), runner=GraphRunner()), expected)


def test_the_runner_that_chooses_says_what_it_measured():
    expected = updates(trades_loss)
    assert_same(updates(trades_loss, runner="auto"), expected)
    assert all(name in RUNNERS["auto"].reasons[-1] for name in ("eager", "graphs", "streams"))


def test_an_update_of_a_model_with_dropout_draws_from_graphs_what_it_draws_eagerly():
    torch.manual_seed(0)
    original = build_model("small-cnn", in_channels=1, image_size=16, num_classes=10).double().to(DEVICE)
    torch.nn.init.normal_(original.classifier.fc3.weight)
    x, y = torch.rand(M, 1, 16, 16, dtype=torch.float64).to(DEVICE), (torch.arange(M) % 10).to(DEVICE)
    result = []
    for update in (Update(), Update(graphs=True)):
        model, losses = copy.deepcopy(original), []
        torch.manual_seed(1)
        for _ in range(4):
            loss = trades_loss(model, x, y, None, bullet=BulletTrain(3, 1, 1).to(DEVICE), update=update)
            loss.backward()
            losses.append(loss.detach().clone())
        result.append(torch.stack(losses))
    torch.testing.assert_close(*result, rtol=TOLERANCE, atol=0)


# Like in any script: an earlier loss is alive, a loader pins memory, another capture has broken off


FAST = {
    "graphs": lambda: {"runner": GraphRunner()},
    "streams": lambda: {"runner": StreamRunner()},
    "update": lambda: {"update": Update(channels_last=False, graphs=True)},
    "both": lambda: {"runner": GraphRunner(), "update": Update(channels_last=False, graphs=True)},
}


@pytest.mark.parametrize("fast", FAST.values(), ids=FAST)
def test_in_an_ordinary_loop_with_an_earlier_loss_alive_everything_is_captured(fast):
    expected = ordinary_loops.iterations(DEVICE)
    assert_same(ordinary_loops.iterations(DEVICE, **fast()), expected)


@pytest.mark.parametrize("fast", FAST.values(), ids=FAST)
def test_a_loader_that_pins_memory_breaks_no_capture(fast):
    expected = ordinary_loops.iterations(DEVICE)
    with ordinary_loops.pinning(DEVICE):
        assert_same(ordinary_loops.iterations(DEVICE, **fast()), expected)
        assert_same(ordinary_loops.iterations(DEVICE, ordinary_loops.BesideALoader, **fast()), expected)


@pytest.mark.parametrize("fast", FAST.values(), ids=FAST)
def test_after_a_capture_that_broke_off_numbers_are_drawn_and_the_next_is_captured(fast):
    """The model that cannot be captured goes on eagerly, including its dropout."""
    expected = ordinary_loops.iterations(DEVICE, ordinary_loops.Waiting)
    with pytest.warns(UserWarning, match="runs without graphs: capture failed"):
        assert_same(ordinary_loops.iterations(DEVICE, ordinary_loops.Waiting, **fast()), expected)
    torch.cuda.empty_cache()
    expected = ordinary_loops.iterations(DEVICE)
    assert_same(ordinary_loops.iterations(DEVICE, **fast()), expected)
