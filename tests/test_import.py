import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PLAIN = """
import json, os, sys, time
import torch
before, environment, start = set(sys.modules), dict(os.environ), time.perf_counter()
import bt_fast
seconds = time.perf_counter() - start
print(json.dumps({
    "new": sorted(set(sys.modules) - before),
    "environment": environment == dict(os.environ),
    "cuda": torch.cuda.is_initialized(),
    "seconds": seconds,
}))
"""

WITHOUT_EXTRAS = """
import sys
for name in ("triton", "click", "rich", "matplotlib", "pynvml"):
    sys.modules[name] = None
import torch
import bt_fast
model = torch.nn.Linear(4, 3)
for loss_of in (bt_fast.trades_loss, bt_fast.mart_loss, bt_fast.pgd_loss):
    loss_of(model, torch.rand(2, 4), torch.tensor([0, 2]), None, bullet=bt_fast.BulletTrain()).backward()
"""


def run(code):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def imported():
    return json.loads(run(PLAIN))


def test_import_takes_nothing_that_it_does_not_need(imported):
    new = {name.split(".")[0] for name in imported["new"]}
    assert not new & {"triton", "click", "rich", "matplotlib", "jinja2", "pynvml"}
    assert not [name for name in imported["new"] if f"{name}.".startswith(("bt_fast.lab.", "bt_fast.kernels."))]


def test_import_changes_nothing(imported):
    assert imported["environment"]
    assert not imported["cuda"]


def test_import_is_quick(imported):
    assert imported["seconds"] < 1.0


def test_works_without_triton_and_the_extras():
    run(WITHOUT_EXTRAS)


# Imports go one way: a module may import from its own layer and the ones below it


LAYERS = [
    ["bt_fast.floors"],
    [
        "bt_fast.kernels",
        "bt_fast.deprecated",
        "bt_fast.device",
        "bt_fast.full_precision",
        "bt_fast.ranks",
        "bt_fast.ranges",
        "bt_fast.units",
        "bt_fast.untraced",
        "bt_fast.warning",
    ],
    [
        "bt_fast.ops",
        "bt_fast.faults",
        "bt_fast.labels",
        "bt_fast.validation",
        "bt_fast.engine",
        "bt_fast.speedup",
        "bt_fast.power",
        "bt_fast.power_device",
        "bt_fast.power_samples",
    ],
    ["bt_fast.allocation", "bt_fast.placement", "bt_fast.plan"],
    ["bt_fast.robust_half", "bt_fast.shares"],
    ["bt_fast.deciding", "bt_fast.minibatch"],
    ["bt_fast.mining"],
    ["bt_fast.attack", "bt_fast.augment", "bt_fast.guard"],
    [
        "bt_fast.memory",
        "bt_fast.memory_arguments",
        "bt_fast.memory_file",
        "bt_fast.memory_rows",
        "bt_fast.recalled",
        "bt_fast.remembered",
    ],
    ["bt_fast.objectives"],
    ["bt_fast.baselines"],
    ["bt_fast"],
    ["bt_fast.lab"],
    ["bt_fast.__main__"],
]


def layer(module):
    """Returns the layer with the longest prefix of the module's name."""
    result = [(len(p), i) for i, names in enumerate(LAYERS) for p in names if f"{module}.".startswith(f"{p}.")]
    return max(result)[1]


def imports_of(path, module):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = ROOT / (f"{base}.{alias.name}".replace(".", "/"))
                yield f"{base}.{alias.name}" if inner.is_dir() or inner.with_suffix(".py").is_file() else base


def modules():
    for folder, package in ((ROOT / "bt_fast", "bt_fast"), (ROOT / "kernels", "bt_fast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            name = ".".join([package, *path.relative_to(folder).with_suffix("").parts])
            yield path, name.removesuffix(".__init__")


@pytest.mark.parametrize(("path", "module"), [pytest.param(*m, id=m[1]) for m in modules()])
def test_imports_go_one_way(path, module):
    ours = [name for name in imports_of(path, module) if name.split(".")[0] in ("bt_fast", "kernels")]
    if module.startswith("bt_fast.kernels"):
        assert set(ours) <= {"bt_fast.kernels.shared"}
    if not f"{module}.".startswith(("bt_fast.lab.", "bt_fast.__main__.")):
        assert not [name for name in ours if f"{name}.".startswith("bt_fast.lab.")]
    above = [name for name in ours if name != "bt_fast" and layer(name) > layer(module)]
    assert not above, f"{module} imports {above}"
    if layer(module) < layer("bt_fast"):
        assert "bt_fast" not in ours, f"{module} imports the package itself"
