"""A net that returns something else than logits in train mode only is refused before the attack."""

import copy

import pytest
import torch
from small_models import assert_unchanged, batch, build, conv_bn, snapshot
from torch import nn

from bt_fast import PGD, BulletTrain, Logits, MARTLoss, PGDLoss, TRADESLoss, perturb
from bt_fast.objectives import training_outputs

ATTACK = PGD(0.06, 0.02, 3)
EACH = pytest.mark.parametrize("kind", [TRADESLoss, MARTLoss, PGDLoss])


class Auxiliary(nn.Module):
    """Returns auxiliary logits too in train mode, as Inception does."""

    def __init__(self):
        super().__init__()
        self.body, self.dropped = conv_bn(), nn.Dropout(0.5)
        self.register_buffer("forwards", torch.zeros(()))
        self.rows = []

    def forward(self, x):
        self.rows.append((self.training, len(x)))
        if self.training:
            self.forwards = self.forwards + 1
        return self._outputs(self.body(x))

    def _outputs(self, z):
        return (z, self.dropped(z)) if self.training else z


class ByAFunction(Auxiliary):
    """Its class does not read `training` where one would look first."""

    def _outputs(self, z):
        return super()._outputs(z)


@EACH
@pytest.mark.parametrize("mining", [False, True])
@pytest.mark.parametrize("build_net", [Auxiliary, ByAFunction, lambda: nn.Sequential(Auxiliary())])
def test_it_is_refused_before_the_attack_with_nothing_changed(build_net, mining, kind):
    model, (x, y) = build(build_net), batch()
    before, state = snapshot(model), torch.get_rng_state()
    bullet = BulletTrain(3, 1, 0) if mining else None
    message = (
        r"model must return a .* tensor of logits, got tuple in train mode, in which the update runs: write Logits"
    )
    with pytest.raises(TypeError, match=message):
        kind(ATTACK, mining=bullet)(model, x, y)
    assert_unchanged(before, model)
    assert torch.equal(torch.get_rng_state(), state)
    inner = model[0] if isinstance(model, nn.Sequential) else model
    assert inner.rows == [(True, 2)]


@EACH
def test_with_the_logits_selected_it_is_looked_at_once_for_each_set_of_modes(kind):
    model, (x, y) = build(Auxiliary), batch()
    twin = copy.deepcopy(model)

    def select(output):
        return output[0] if isinstance(output, tuple) else output

    criterion = kind(ATTACK, logits=select, engine="exact")
    torch.manual_seed(0)
    losses = [criterion(model, x, y) for _ in range(3)]
    assert [rows for rows in model.rows if rows[1] == 2 and rows[0]] == [(True, 2)]
    model.body[1].eval()
    for _ in range(2):
        criterion(model, x, y)
    assert [rows for rows in model.rows if rows[1] == 2 and rows[0]] == [(True, 2)] * 2
    torch.manual_seed(0)
    other = Logits(twin, select)
    assert losses[0].item() == kind(ATTACK, engine="exact")(other, x, y).item()


class Plain(nn.Module):
    """Reads nothing of its mode."""

    def __init__(self):
        super().__init__()
        self.body, self.rows = conv_bn(), []

    def forward(self, x):
        self.rows.append(len(x))
        return self.body(x)


def test_a_net_that_reads_nothing_of_its_mode_is_not_looked_at():
    model, (x, y) = build(Plain), batch()
    TRADESLoss(ATTACK, engine="exact")(model, x, y)
    assert model.rows == [8] * 6  # the clean one, three steps, and the update's two


def test_looking_moves_neither_buffers_nor_random_numbers():
    class Reading(Plain):
        def forward(self, x):
            return super().forward(x) + 0.0 * self.training

    model, plain, (x, y) = build(Reading), build(Plain), batch()
    losses, drawn = [], []
    for net in (model, plain):
        torch.manual_seed(0)
        losses.append(TRADESLoss(ATTACK, engine="exact")(net, x, y))
        drawn.append(torch.rand(2))
    assert model.rows[0] == 2
    assert torch.equal(*losses)
    assert torch.equal(*drawn)
    assert all(map(torch.equal, model.buffers(), plain.buffers()))


@pytest.mark.parametrize("build_net", [Plain, Auxiliary])
def test_what_is_known_of_a_model_is_looked_up_before_its_modules_are_scanned(build_net, monkeypatch):
    scanned, reads = [], training_outputs._reads_its_mode
    monkeypatch.setattr(
        training_outputs, "_reads_its_mode", lambda module: bool(scanned.append(module)) or reads(module)
    )
    model, (x, y) = build(build_net), batch()
    criterion = TRADESLoss(ATTACK, logits=lambda output: output[0] if isinstance(output, tuple) else output)
    criterion(model, x, y)
    once = len(scanned)
    for _ in range(3):
        criterion(model, x, y)
    assert len(scanned) == once > 0
    criterion(copy.deepcopy(model), x, y)
    assert len(scanned) == 2 * once


class Configured(Auxiliary):
    """Returns auxiliary logits in train mode if asked."""

    def __init__(self, auxiliary):
        super().__init__()
        self.auxiliary = auxiliary

    def _outputs(self, z):
        return super()._outputs(z) if self.auxiliary else z


def refused(model, x, y):
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"got tuple in train mode, in which the update runs"):
        PGDLoss(ATTACK)(model, x, y)
    assert_unchanged(before, model)


def test_another_configuration_of_a_known_class_or_model_is_looked_at_anew():
    model, (x, y) = build(lambda: Configured(False)), batch()
    PGDLoss(ATTACK)(model, x, y)
    refused(build(lambda: Configured(True)), x, y)
    PGDLoss(ATTACK)(model, x, y)
    model.auxiliary = True
    refused(model, x, y)
    model.auxiliary = False
    PGDLoss(ATTACK)(model, x, y)


@pytest.mark.parametrize("change", ["a module", "a method"])
def test_what_takes_another_part_of_a_known_model_is_looked_at_anew(change):
    model, (x, y) = nn.Sequential(build(Plain)), batch()
    PGDLoss(ATTACK)(model, x, y)
    if change == "a module":
        model[0] = build(Auxiliary)
    else:
        model[0].forward = lambda x, self=model[0]: (self.body(x),) if self.training else self.body(x)
    refused(model, x, y)


def test_a_net_that_sets_its_flags_at_random_is_looked_at_a_limited_number_of_times(monkeypatch):
    monkeypatch.setattr(training_outputs, "MOST_SETTINGS", 3)
    model, (x, y) = build(lambda: Configured(False)), batch()
    for k in range(5):
        model.name = f"forward {k}"
        PGDLoss(ATTACK)(model, x, y)
    assert [rows for rows in model.rows if rows == (True, 2)] == [(True, 2)] * 3


class Choosy(Auxiliary):
    """Raises for two images; what its update's batch gives is its own matter."""

    def forward(self, x):
        if len(x) == 2 and self.training:
            raise RuntimeError("two are no batch")
        return self.body(x)


def test_a_net_that_two_images_do_not_suit_is_left_to_its_update():
    model, (x, y) = build(Choosy), batch()
    TRADESLoss(ATTACK)(model, x, y).backward()


def test_without_an_update_train_mode_does_not_matter():
    model, (x, y) = build(Auxiliary), batch()
    perturb(model, x, y, ATTACK)
    assert not any(training for training, _ in model.rows)


def test_a_select_for_one_mode_only_is_refused_before_the_attack():
    model, (x, y) = build(Auxiliary), batch()
    criterion = TRADESLoss(ATTACK, logits=lambda output: output.flatten(1))
    with pytest.raises(
        TypeError, match=r"in train mode, in which the update runs: select must take .* raised Attribute"
    ):
        criterion(model, x, y)
    assert model.rows == [(True, 2)]
