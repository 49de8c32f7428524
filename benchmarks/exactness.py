"""Checks that losses timed against each other compute the same, on any device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

ITERATIONS = 3  # a graph is captured when its size comes a second time, and replayed afterwards


def check_same(
    model: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    losses: Sequence[Callable[..., torch.Tensor]],
    options: dict[str, Any],
) -> None:
    """Checks in some float64 iterations that all have the first one's loss, gradients and batch norm statistics.

    Raises:
        AssertionError: a variant differs.
    """
    results = []
    for loss_of in losses:
        own_model, own = copy.deepcopy(model).double(), copy.deepcopy(options)
        optimizer = torch.optim.SGD(own_model.parameters(), lr=0.1)
        torch.manual_seed(1)
        result = []
        with same_noise():
            for _ in range(ITERATIONS):
                loss = loss_of(own_model, x.double(), y, optimizer, **own)
                loss.backward()
                gradients = [p.grad for p in own_model.parameters()]
                result += [loss.detach(), *gradients, *(b.clone() for b in own_model.buffers())]
        results.append(result)
    for result in results[1:]:
        for mine, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(mine, first, rtol=0, atol=1e-6)


@contextmanager
def same_noise() -> Iterator[None]:
    """Makes `torch.rand` and `torch.randn` give the same numbers on every device, in every dtype, from every generator.

    The authors' code draws the start of an attack on the host, ours on the images' device.
    """
    host = torch.Generator().manual_seed(1)

    def from_host(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def drawn(*shape: Any, dtype: Any = None, device: Any = None, generator: Any = None) -> torch.Tensor:
            return draw(*shape, generator=host, dtype=torch.float32, device="cpu").to(device=device, dtype=dtype)

        return drawn

    with mock.patch.multiple(torch, rand=from_host(torch.rand), randn=from_host(torch.randn)):
        yield
