"""A pytest plugin for rehearsals: tests that need a GPU are collected without one, and run on the CPU instead."""

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
    """While tests are collected there is a GPU."""
    _there_is_one.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=True))


def pytest_collection_finish() -> None:
    """From then on there is none again."""
    _there_is_one.close()


def tiny_model(name: str, *, in_channels: int, num_classes: int, **_: object) -> nn.Module:
    """In the place of a network: what an emulated device takes a second for."""
    if name == "small-cnn":  # whose last layer and dropout a test looks at
        return build_model(name, in_channels=in_channels, image_size=16, num_classes=num_classes)
    body = [nn.Conv2d(in_channels, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(4, num_classes))


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest) -> Iterator[None]:
    """The module's device is the CPU; outside the kernels' tests its streams and graphs are emulated, networks tiny."""
    given = {
        "DEVICE": lambda device: type(device)("cpu"),
        "build_model": lambda build: tiny_model,
    }
    with ExitStack() as stack:
        # the kernels' tests make sure that it was kernels that ran, which on the CPU it is not
        stack.enter_context(mock.patch.object(availability, "why_plain", return_value=None))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=0))
        for name, instead in given.items():
            if hasattr(request.module, name):
                stack.enter_context(mock.patch.object(request.module, name, instead(getattr(request.module, name))))
        if "kernels" not in request.path.parts:
            from emulated_device import EmulatedDevice

            stack.enter_context(EmulatedDevice())
        yield
