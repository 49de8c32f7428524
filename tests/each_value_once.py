"""Chooses few cases of each test that together have every value of every parameter."""

from collections import Counter, defaultdict


def each_value_once(items):
    """Returns the chosen ones of pytest's items as a set: the next is always the case with most values not yet had.

    What is parametrised together counts as one value, so a plain list of cases stays whole, and only products shrink.
    """
    tests = defaultdict(dict)
    for item in items:
        tests[item.nodeid.partition("[")[0]][item] = _values(item)
    return {case for cases in tests.values() for case in _covering(cases)}


def _values(item):
    """Returns a test's values as a set: for each decorator or fixture with parameters, its names and values."""
    given = dict(item.callspec.params) if hasattr(item, "callspec") else {"": None}
    together = [mark.args[0] for mark in item.iter_markers("parametrize")]
    together = [names.replace(" ", "").split(",") if isinstance(names, str) else names for names in together]
    alone = [[name] for name in given if not any(name in names for names in together)]
    return {(*names, *(id(given[name]) for name in names)) for names in (*together, *alone)}


def _covering(cases):
    """Yields cases until each of their values has been in one; of equal ones that with the values had least often."""
    had, left = Counter(), dict(cases)
    while left:
        chosen = max(left, key=lambda case: (len(cases[case] - had.keys()), -sum(had[v] for v in cases[case])))
        had.update(cases[chosen])
        yield chosen
        left = {case: values for case, values in left.items() if not values <= had.keys()}
