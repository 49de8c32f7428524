"""A pytest plugin for rehearsals: tests that need a GPU are collected without one, and run on the CPU instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from unittest import mock

import pytest
import torch

_there_is_one = ExitStack()


def pytest_configure() -> None:
    """While tests are collected there is a GPU."""
    _there_is_one.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=True))


def pytest_collection_finish() -> None:
    """From then on there is none again."""
    _there_is_one.close()


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest) -> Iterator[None]:
    """The module's DEVICE is the CPU; outside the kernels' tests its streams and graphs are emulated."""
    device = getattr(request.module, "DEVICE", None)
    with ExitStack() as stack:
        if device is not None:
            stack.enter_context(mock.patch.object(request.module, "DEVICE", type(device)("cpu")))
        if "kernels" not in request.path.parts:
            from emulated_device import EmulatedDevice

            stack.enter_context(EmulatedDevice())
        yield
