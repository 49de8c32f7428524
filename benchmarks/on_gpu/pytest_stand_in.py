"""A pytest plugin for rehearsals: collects the tests that need a GPU without one, and runs them on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import nn

from bt_fast.lab.models import build_model
from bt_fast.ops import availability

_there_is_one = ExitStack()


def pytest_configure() -> None:
    """Pretends that there is a GPU while tests are collected."""
    _there_is_one.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=True))


def pytest_collection_finish() -> None:
    """Ends the pretence after collection."""
    _there_is_one.close()


def tiny_model(name: str, *, in_channels: int, num_classes: int, **_: object) -> nn.Module:
    """Replaces a network that takes an emulated device more than a second."""
    if name == "small-cnn":  # a test looks at its last layer and dropout
        return build_model(name, in_channels=in_channels, image_size=16, num_classes=num_classes)
    body = [nn.Conv2d(in_channels, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(4, num_classes))


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest) -> Iterator[None]:
    """Sets the module's device to the CPU; except in kernel tests, emulates streams and graphs on tiny networks."""
    given = {
        "DEVICE": lambda device: type(device)("cpu"),
        "build_model": lambda build: tiny_model,
    }
    with ExitStack() as stack:
        # the kernels' tests check that kernels ran, which cannot hold on the CPU
        stack.enter_context(mock.patch.object(availability, "why_plain", return_value=None))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=0))
        for name, instead in given.items():
            if hasattr(request.module, name):
                stack.enter_context(mock.patch.object(request.module, name, instead(getattr(request.module, name))))
        if "kernels" not in request.path.parts:
            from emulated_device import EmulatedDevice

            stack.enter_context(EmulatedDevice())
        yield
