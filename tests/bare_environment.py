"""`python bare_environment.py MODULE ARGUMENTS` runs a module as where there are but the package, its needs and pytest.

What else is installed cannot be imported, and none of pytest's plugins is loaded.
"""

import importlib.metadata
import os
import re
import runpy
import sys
from importlib.abc import MetaPathFinder

from packaging.requirements import Requirement

WANTED = ("bt-fast", "pytest")


class Refusing(MetaPathFinder):
    """Refuses what no wanted distribution holds."""

    def __init__(self):
        wanted, owners = with_dependencies(WANTED), importlib.metadata.packages_distributions()
        self.refused = {name for name, of in owners.items() if not {plain(one) for one in of} & wanted}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.refused:
            raise ModuleNotFoundError(f"No module named {name!r} in a bare environment", name=name)
        return None


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def with_dependencies(requirements):
    """The names of the installed distributions that these requirements bring."""
    found, left = set(), [Requirement(r) for r in requirements]
    while left:
        requirement = left.pop()
        name, marker = plain(requirement.name), requirement.marker
        if name in found or (marker and not marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        left += map(Requirement, importlib.metadata.requires(name) or ())
    return found


if __name__ == "__main__":
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.meta_path.insert(0, Refusing())
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
