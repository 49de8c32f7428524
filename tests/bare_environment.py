"""`python bare_environment.py MODULE ARGUMENTS` runs a module as where there are but the package, its needs and pytest.

What else is installed cannot be imported, and none of pytest's plugins is loaded.
"""

import importlib.metadata
import os
import re
import runpy
import sys
from importlib.machinery import PathFinder

from packaging.requirements import Requirement

WANTED = ("bt-fast", "pytest", "setuptools")  # triton 3.2 imports the last; it comes with the Pythons of its time


class Bare(PathFinder):
    """Python's own finder, to which what no wanted distribution holds is not there."""

    refused = frozenset()

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in cls.refused else super().find_spec(name, path, target)


def unwanted():
    """The names of the modules and packages that only other distributions hold."""
    names, wanted = {True: set(), False: set()}, with_dependencies(WANTED)
    for installed in importlib.metadata.distributions():
        names[plain(installed.metadata["Name"]) in wanted] |= modules_of(installed)
    return names[False] - names[True]


def modules_of(installed):
    """The names of a distribution's modules and packages. (`packages_distributions` misses most in Python 3.10.)"""
    return {file.parts[0].partition(".")[0] for file in installed.files or () if file.suffix in (".py", ".so")}


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def with_dependencies(requirements):
    """The names of the installed distributions that these requirements bring."""
    result, left = set(), [Requirement(r) for r in requirements]
    while left:
        requirement = left.pop()
        name, marker = plain(requirement.name), requirement.marker
        if name in result or (marker and not marker.evaluate({"extra": ""})):
            continue
        result.add(name)
        left += map(Requirement, importlib.metadata.requires(name) or ())
    return result


if __name__ == "__main__":
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    Bare.refused = unwanted()
    sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
