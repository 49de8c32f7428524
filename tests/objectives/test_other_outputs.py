"""For a model that returns something other than logits, the error shows a wrapper, and that wrapper works."""

import re
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from small_models import assert_unchanged, batch, conv_bn, snapshot
from torch import nn

from bt_fast import PGD, BulletTrain, Frozen, Logits, TRADESLoss, augmix_loss, mart_loss, pgd_loss, trades_loss
from bt_fast.attack.threat import ThreatModel
from bt_fast.baselines.grad_align import grad_align
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.evaluation import evaluate

Output = namedtuple("Output", ["loss", "logits"])
RETURNS = {
    "a tuple": lambda z: (z, z.sum()),
    "a tuple with features first": lambda z: (z[:, :, None], z),
    "a list": lambda z: [z],
    "a named tuple": lambda z: Output(None, z),
    "a dict": lambda z: {"logits": z},
    "a dict of another key": lambda z: OrderedDict(loss=None, out=z),
    "an object": lambda z: SimpleNamespace(logits=z),
}
CALLS = {
    "trades": lambda m, x, y: trades_loss(m, x, y, None),
    "mart, bullet": lambda m, x, y: mart_loss(m, x, y, None, bullet=BulletTrain(2, 1, 0)),
    "pgd, frozen": lambda m, x, y: pgd_loss(m, x, y, None, frozen=Frozen(channels_last=False)),
    "augmix": augmix_loss,
    "augmix, bullet": lambda m, x, y: augmix_loss(m, x, y, bullet=BulletTrain(1, 0, 0)),
    "yopo": lambda m, x, y: yopo_loss(m, x, y, None, propagations=1, layer_steps=1),
    "grad_align": lambda m, x, y: grad_align(m, x, y, epsilon=0.03),
    "evaluate": lambda m, x, y: evaluate(m, [(x, y)], ThreatModel(0.03), steps=1),
}


class Returning(nn.Module):
    def __init__(self, returns):
        super().__init__()
        self.body, self.returns = conv_bn().double(), returns

    def forward(self, x):
        return self.returns(self.body(x))


@pytest.mark.filterwarnings("ignore:the attack runs on the model as it is")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("returns", RETURNS.values(), ids=RETURNS)
def test_the_wrapper_of_the_message_makes_it_fit(call, returns):
    model, (x, y) = Returning(returns), batch()
    before = snapshot(model)
    with pytest.raises(TypeError, match="model must return a floating-point tensor of logits, got") as reported:
        call(model, x, y)
    assert_unchanged(before, model)
    in_front, of_a_loss = re.search(r"write (Logits\(.*\)), or of a loss logits=(.*)$", str(reported.value)).groups()
    front = eval(in_front, {"Logits": Logits, "model": model})
    assert front(x).shape == (8, 5)
    call(front, x, y)
    TRADESLoss(PGD(0.1, 0.03, 2), logits=eval(of_a_loss))(model, x, y)


@pytest.mark.parametrize("returns", [lambda z: None, lambda z: z.long(), lambda z: 3], ids=["nothing", "integers", "3"])
def test_outputs_that_are_no_logits_are_reported_as_what_they_are(returns):
    with pytest.raises(TypeError, match=r"let its forward return the scores of the classes before any softmax"):
        trades_loss(Returning(returns), *batch(), None)


LABELS = {
    "floats": (lambda x, y: (x, y.double()), r"y must be integers, got torch\.float64: write y\.long\(\)$"),
    "one-hot integers": (lambda x, y: (x, torch.eye(5)[y].long()), r"write y\.argmax\(dim=1\), if they are one-hot$"),
    "a column": (lambda x, y: (x, y[:, None]), r"got \[8, 1\]: write y\.squeeze\(1\)$"),
    "fewer": (lambda x, y: (x, y[:3]), r"got \[3\]: give as many y as images$"),
    "from 1": (
        lambda x, y: (x, torch.arange(8) % 5 + 1),
        r"y must lie in 0\.\.4, .*: let them begin at 0, and the model have a logit",
    ),
    "a list": (lambda x, y: (x, y.tolist()), r"got list: write torch\.as_tensor"),
    "bytes": (lambda x, y: ((x * 255).byte(), y), r"got torch\.uint8: of bytes write x\.float\(\) / 255$"),
}


@pytest.mark.parametrize(("spoilt", "message"), LABELS.values(), ids=LABELS)
def test_images_and_labels_of_another_kind_are_reported_with_what_to_write(spoilt, message):
    x, y = spoilt(*batch())
    with pytest.raises((TypeError, ValueError), match=message):
        trades_loss(conv_bn().double(), x, y, None)


def test_a_loader_of_dicts_is_reported_with_what_to_write():
    x, y = batch()
    with pytest.raises(TypeError, match=r"write \(\(b\['image'\], b\['label'\]\) for b in loader\)"):
        evaluate(conv_bn().double(), [{"image": x, "label": y}], ThreatModel(0.03))


def test_a_function_in_place_of_a_module_is_refused():
    tracked = TRADESLoss(PGD(0.1, 0.03, 2, statistics="tracked"))
    for call in (lambda m, x, y: trades_loss(m, x, y, None), tracked, TRADESLoss(PGD(0.1, 0.03, 2), logits=len)):
        with pytest.raises(TypeError, match=r"got function: of a function make the forward of one$"):
            call(lambda x: x, *batch())
