import pytest
import torch
from small_models import batch, build
from torch import nn

from bt_fast.attack.forward import clean_logits, eval_mode, logits_of, modes_restored


def mixed():
    """Returns a model with modules in different modes."""
    model = build("conv_bn")
    model[1].eval()
    model[3].eval()
    return model


def modes(model):
    return [m.training for m in model.modules()]


@pytest.mark.parametrize("context", [modes_restored, eval_mode])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_every_module_gets_its_own_mode_back(context, error):
    model = mixed()
    result = modes(model)
    try:
        with context(model):
            model.train()
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert modes(model) == result


def test_eval_mode_is_for_every_module():
    model = mixed()
    with eval_mode(model):
        assert not any(modes(model))


def test_clean_logits_have_no_gradient():
    model, (x, _) = build("conv_bn"), batch()
    assert not clean_logits(model, x).requires_grad
    assert torch.equal(clean_logits(model.eval(), x), model(x))


class Returns(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ((torch.zeros(8, 5),), TypeError, "model.*tensor of logits.*tuple"),
        (torch.zeros(8, 5, dtype=torch.int64), TypeError, "model.*floating-point.*int64"),
        (torch.zeros(8), ValueError, r"model.*\[8, K\].*\[8\]"),
        (torch.zeros(7, 5), ValueError, r"model.*\[8, K\].*\[7, 5\]"),
        (torch.zeros(8, 5, 1), ValueError, r"model.*\[8, K\].*\[8, 5, 1\]"),
        (torch.zeros(8, 1), ValueError, r"model.*K >= 2.*\[8, 1\]"),
    ],
)
def test_a_model_that_does_not_return_logits(output, error, message):
    with pytest.raises(error, match=message):
        logits_of(Returns(output), batch()[0])


class Merging(nn.Linear):
    """Changes its weight on the way to eval mode and undoes it on the way back, like low-rank adapters."""

    merged = False

    def train(self, mode=True):
        super().train(mode)
        self.merged = not mode
        return self


def test_modules_that_work_in_train_come_back_consistent():
    model = nn.Sequential(Merging(2, 2), nn.Sequential(Merging(2, 2), nn.Dropout()))
    model[1][0].eval()
    with eval_mode(model):
        assert all(m.merged for m in model.modules() if isinstance(m, Merging))
    assert (model[0].merged, model[0].training) == (False, True)
    assert (model[1][0].merged, model[1][0].training) == (True, False)
    assert model[1][1].training
