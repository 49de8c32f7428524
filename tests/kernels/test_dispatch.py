"""Every op launches its kernels for the inputs they take, and for no others."""

import contextlib
import importlib
import pkgutil
from unittest import mock

import assign_cases
import gather_start_cases
import memory_cases
import pgd_cases
import pytest
import torch

pytest.importorskip("triton")

from bt_fast import kernels, ops
from bt_fast.ops.pgd_l2_step import pgd_l2_step_
from bt_fast.ops.pgd_step import pgd_linf_step_

recall_op, remember_op, SAME = memory_cases.recall_op, memory_cases.remember_op, memory_cases.SHAPES[0]
Z, Y = torch.randn(5, 10), torch.arange(5)
LONG = (3, 96, 96)


def linf(shape):
    return lambda: pgd_cases.case(2, shape, torch.float32, 0).run(pgd_linf_step_)


def l2(shape):
    return lambda: pgd_cases.l2_case(2, shape, torch.float32, 0, seeded=True).run(pgd_l2_step_)


def assign(m):
    return lambda: ops.assign_steps(**assign_cases.case(m, 0))


# the file in `bt_fast/ops` with the condition, a call of the op, and the number of kernels it should launch
OPS = {
    "signed_variance": ("rows", lambda: ops.signed_variance(Z, Y), 1),
    "update_fraction": (
        "rows",
        lambda: ops.update_fraction_(torch.tensor(0.1).double(), torch.tensor(0), Z, Y, 0.8, 0.9),
        1,
    ),
    "ascent_direction": ("rows", lambda: ops.ascent_direction(Z, Z.softmax(dim=1)), 1),
    "assign_steps, one program": ("assign_steps", assign(128), 1),
    "assign_steps, in blocks": ("assign_steps", assign(8193), 6),
    "order_by_steps": ("order_by_steps", lambda: ops.order_by_steps(Y, 5), 1),
    "order_by_steps, in blocks": ("order_by_steps", lambda: ops.order_by_steps(Y.repeat(2000), 5), 2),
    "gather_start": (
        "gather_start",
        lambda: ops.gather_start(**gather_start_cases.case(4, (3, 4, 4), torch.float32, 0).arguments),
        1,
    ),
    "recall": (
        "recall",
        lambda: recall_op._recall(**memory_cases.recall_case(4, SAME, torch.float32, torch.int8, 0).arguments),
        1,
    ),
    "remember": (
        "remember",
        lambda: remember_op._remember(**memory_cases.remember_case(4, SAME, torch.float32, torch.int8, 0).arguments),
        1,
    ),
    "linf": ("pgd_step", linf((3, 32, 32)), 1),
    "linf, long samples": ("pgd_step", linf(LONG), 2),
    "l2": ("pgd_l2_step", l2((3, 32, 32)), 2),
    "l2, long samples": ("pgd_l2_step", l2(LONG), 3),
    "trades_kl": ("divergence", lambda: ops.trades_kl(Z, Z), 1),
    "mart_loss": ("divergence", lambda: ops.mart_loss(Z, Z, Y, 6.0), 1),
    "js_divergence": ("divergence", lambda: ops.js_divergence(Z, Z, Z), 1),
}


@contextlib.contextmanager
def counted_kernels():
    """Yields a list that gets one entry for every kernel launch, and launches nothing."""
    launched = []
    with contextlib.ExitStack() as stack:
        for result in pkgutil.iter_modules(kernels.__path__):
            file = importlib.import_module(f"bt_fast.kernels.{result.name}")
            for name in [name for name in vars(file) if name.endswith("_kernel")]:
                stand_in = mock.MagicMock()
                stand_in.__getitem__.return_value = lambda *_, name=name, **__: launched.append(name)
                stack.enter_context(mock.patch.object(file, name, stand_in))
        yield launched


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("taken", [False, True])
def test_an_op_launches_its_kernels_where_they_take_its_input(name, taken):
    file, call, launches = OPS[name]
    condition = importlib.import_module(f"bt_fast.ops.{file}")
    attribute = "kernel_takes" if hasattr(condition, "kernel_takes") else "_kernel_takes"
    with mock.patch.object(condition, attribute, return_value=taken), counted_kernels() as launched:
        call()
    assert len(launched) == (launches if taken else 0)
