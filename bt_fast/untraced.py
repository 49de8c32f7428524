"""Keeps dynamo out of the bookkeeping of a loss that is compiled as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from torch._compile import _disable_dynamo  # torch.compiler.disable would import dynamo now, and take a second

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which runs as it is, with all that it calls, where a caller of it is compiled.

    It is for what a loss knows of models: dynamo guards the keys of a weak dictionary, of which some are gone later,
    and traces a trace of a model, in which it raises what no caller expects.
    """
    return cast(Callable[P, R], _disable_dynamo(function))
