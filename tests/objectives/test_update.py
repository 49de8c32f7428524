"""The update from graphs is the eager one, to the bit, in every order of work that CUDA permits."""

import pytest
import small_models
import torch
from emulated_device import EmulatedDevice

from bt_fast import BulletTrain, Update, trades_loss

EAGER, GRAPHS = Update(channels_last=False), Update(channels_last=False, graphs=True)
BULLETS = {"uniform": lambda: None, "bullet": lambda: BulletTrain(1, 1, 0)}
SIZES = (6, 6, 6, 4, 6, 4, 4, 6)


class Training:
    """Updates on batches whose memory is spoilt afterwards; `found` holds all that they give."""

    def __init__(self, build="conv_bn", bullet=None, seed=0):
        self.model, self.bullet = small_models.build(build, seed), bullet
        self.found, self.given, self.steps = [], [], 0

    def loss(self, update, m=6, **options):
        x, y = small_models.batch(m, seed=self.steps)
        options = {"perturb_steps": 1, "generator": torch.Generator().manual_seed(self.steps), **options}
        self.steps += 1
        loss = trades_loss(self.model, x, y, None, bullet=self.bullet, update=update, **options)
        self.given += [x, y]
        return loss

    def step(self, update, m=6, **options):
        loss = self.loss(update, m, **options)
        loss.backward()
        self.note(loss)
        self.descend()

    def run(self, update, sizes=(6,) * 4, **options):
        for m in sizes:
            self.step(update, m, **options)
        return self.found

    def note(self, *values):
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        state = [] if self.bullet is None else [self.bullet.robust_fraction]
        self.found += [v.detach().clone() for v in (*values, *gradients, *self.model.buffers(), *state)]

    def descend(self):
        for memory in self.given:
            memory.fill_(-1)  # the caller is done with it
        self.given = []
        with torch.no_grad():
            for p in self.model.parameters():
                if p.grad is not None:
                    p.sub_(0.1 * p.grad)
                    p.grad = None


def same(found, expected):
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


NOT_CAPTURED = {
    "cumulative average": "_local_scalar_dense",  # such a norm reads its count
    "tied norm, cumulative average": "_local_scalar_dense",
    "counter replaced": "replaces its parameters or buffers",
}


@pytest.mark.parametrize("bullet", BULLETS)
@pytest.mark.parametrize("model", sorted(small_models.MODELS.keys() - NOT_CAPTURED.keys()))
def test_the_eager_result_in_any_order(model, bullet):
    expected, training = (Training(model, BULLETS[bullet]()) for _ in range(2))
    torch.manual_seed(0)
    expected.run(EAGER, SIZES)
    torch.manual_seed(0)
    with EmulatedDevice() as emulated:
        training.run(GRAPHS, SIZES)
    assert same(training.found, expected.found)
    assert emulated.replays >= 2 * (len(SIZES) - 4)
    for seed in range(3):
        assert same(emulated.shuffled(seed, training.found), expected.found), seed


@pytest.mark.parametrize("bullet", BULLETS)
@pytest.mark.parametrize("model", NOT_CAPTURED)
def test_what_cannot_be_captured_runs_eagerly_says_why_once_and_gives_the_same(model, bullet):
    expected, training = (Training(model, BULLETS[bullet]()) for _ in range(2))
    expected.run(EAGER)
    with EmulatedDevice() as emulated, pytest.warns(UserWarning, match=NOT_CAPTURED[model]) as warned:
        training.run(GRAPHS)
    assert [str(w.message).startswith("the update runs without graphs: ") for w in warned] == [True]
    assert emulated.replays == 0
    assert same(training.found, expected.found)
    for seed in range(20):
        assert same(emulated.shuffled(seed, training.found), expected.found), seed
