"""`python bare_environment.py MODULE ARGUMENTS` runs a module with only the package, its dependencies and pytest.

Other installed packages cannot be imported, and no plugin of pytest is loaded.
"""

import importlib.metadata
import os
import re
import runpy
import sys
from importlib.machinery import PathFinder

from packaging.requirements import Requirement

WANTED = ("bt-fast", "pytest", "setuptools")  # triton 3.2 imports setuptools, which Pythons of that time include


class Bare(PathFinder):
    """Replaces Python's path finder and hides modules that no wanted distribution contains."""

    refused = frozenset()

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in cls.refused else super().find_spec(name, path, target)


def unwanted():
    """Returns the names of the modules and packages that only unwanted distributions contain."""
    names, wanted = {True: set(), False: set()}, with_dependencies(WANTED)
    for installed in importlib.metadata.distributions():
        names[plain(installed.metadata["Name"]) in wanted] |= modules_of(installed)
    return names[False] - names[True]


def modules_of(installed):
    """Returns the modules and packages of a distribution; `packages_distributions` misses most in Python 3.10."""
    return {file.parts[0].partition(".")[0] for file in installed.files or () if file.suffix in (".py", ".so")}


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def with_dependencies(requirements):
    """Returns the names of the installed distributions that these requirements need, directly or indirectly."""
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
