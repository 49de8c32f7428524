"""Engines by name, by option and on a command line."""

import pytest

from bt_fast import Engine
from bt_fast.engine import ENGINES


def test_names():
    assert Engine.of("exact") == Engine()
    assert Engine.of("fast") == Engine(fold=True, channels_last=True, graphs=True, streams=True)
    assert Engine.of("bf16").precision == "bf16"
    mine = Engine(graphs=True)
    assert Engine.of(mine) is mine
    assert [Engine.of(name).name for name in ENGINES] == list(ENGINES)
    assert mine.name == "Engine(graphs=True)"
    assert eval(repr(Engine.of("bf16"))) == Engine.of("bf16")
    assert len({Engine(), Engine.of("exact"), mine}) == 2


def test_options_behind_a_name():
    assert Engine.parse("fast") == Engine.of("fast")
    assert Engine.parse("exact,fold=on,graphs=on") == Engine(fold=True, graphs=True)
    assert Engine.parse("fast,streams=off").streams is False
    assert Engine.parse("fast,graphs=off") == Engine(fold=True, channels_last=True)  # streams need graphs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quick", "engine must be one of exact, fast, bf16, got 'quick': write engine='exact'"),
        ("fast,speed=on", "engine 'fast,speed=on': expected NAME=on or NAME=off, NAME one of fold, .*got 'speed=on'"),
        ("fast,graphs", "got 'graphs'"),
        ("fast,graphs=yes", "got 'graphs=yes'"),
        ("exact,streams=on", "streams need graphs"),
    ],
)
def test_what_is_none_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        Engine.parse(text)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "fp8"}, ValueError, "precision must be 'bf16' or None, got 'fp8'"),
        ({"streams": True}, ValueError, "streams need graphs, of which their chains are made"),
        ({"graphs": 1}, TypeError, "graphs must be True or False, got 1"),
    ],
)
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        Engine(**options)
