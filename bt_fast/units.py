"""Warns of sizes that are probably in other units: for example ε = 8 instead of 8/255 for pixels in [0, 1]."""

from __future__ import annotations

import math

from bt_fast.warning import warn_caller

_warned: set[tuple[object, ...]] = set()


def warn_of_units(
    epsilon: float,
    norm: str = "l_inf",
    bounds: tuple[float, float] = (0.0, 1.0),
    step_size: float | None = None,
    pixels: int = 1,
    of: str | None = None,
) -> None:
    """Warns, once for the same numbers, if ε covers the whole range of a pixel or a step is longer than the ball.

    An ε of 0 is none. `pixels` is the number of values of an image, over which an l_2 ball extends. `of` is what the
    numbers are of, where they may be others in each minibatch: then once for all of these.
    """
    lower, upper = bounds
    whole = (upper - lower) * (math.sqrt(pixels) if norm == "l_2" else 1.0)
    of_bytes = upper - lower <= 1.0
    if epsilon >= whole and (norm == "l_inf" or pixels > 1):
        likely = f"one below {whole:g}"
        if of_bytes and epsilon / 255 < whole:
            likely = f"epsilon={epsilon:g}/255, if it is meant in steps of 8-bit images"
            if step_size is not None and step_size > 2 * epsilon / 255:
                likely += f", and step_size={step_size:g}/255"
        numbers: tuple[object, ...] = ("epsilon", epsilon, norm, bounds)
        message = f"epsilon={epsilon:g} covers the whole range [{lower:g}, {upper:g}] of the pixels: write {likely}"
    elif step_size is not None and step_size > 2 * epsilon > 0:
        likely = f"{step_size:g}/255" if of_bytes and step_size / 255 <= 2 * epsilon else f"{epsilon / 4:g}"
        numbers = ("step_size", step_size, epsilon)
        message = (
            f"step_size={step_size:g} is more than twice epsilon={epsilon:g}, so that each step crosses the whole "
            f"ball: write step_size={likely}"
        )
    else:
        return
    numbers = numbers if of is None else (numbers[0], of)
    if numbers not in _warned:
        _warned.add(numbers)
        warn_caller(message if of is None else f"{of}: {message}")
