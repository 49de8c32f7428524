"""A type checker sees the package's types in a user's script: correct uses pass, and wrong ones are errors."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

pytestmark = pytest.mark.any_torch
ROOT = Path(__file__).parents[1]

# a line with `# error: code` must have that error, and other lines none
SCRIPT = """
import torch
from torch import Tensor, nn

import bt_fast
import bt_fast.kernels
from bt_fast import BulletTrain, Frozen, GraphRunner, Plan, PowerMonitor, ThreatModel, Update
from bt_fast import PGD, Rows, augmix_loss, generate, mart_loss, perturb, pgd_loss, trades_loss
from bt_fast.allocation import Judged
from bt_fast.baselines.fast import fast_loss
from bt_fast.baselines.yopo import yopo_loss
from bt_fast.evaluation import Evaluation, evaluate


def policy(judged: Judged) -> Tensor:
    return torch.where(judged.correct, 10, 0)


model = nn.Linear(4, 3)
x, y = torch.rand(2, 4), torch.tensor([0, 1])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
bullet = BulletTrain(10, 2, 0, gamma=0.8, policy=policy)
threat = ThreatModel(8 / 255, "l_2")
loss: Tensor = trades_loss(model, x, y, optimizer, beta=6.0, bullet=bullet, frozen=Frozen(), update=Update())
mart_loss(model, x, y, None, start="uniform", unperturbed="skip", bullet=bullet, runner="auto").backward()
pgd_loss(model, x, y, None, runner=GraphRunner(bucket=16)).backward()
fast_loss(trades_loss, model, x, y, None, epsilon=0.1).backward()
yopo_loss(model, x, y, None, propagations=2, layer_steps=5, objective="trades").backward()
augmix_loss(model, x, y, bullet=BulletTrain(1, 0, 0), jsd=True).backward()
found: Evaluation = evaluate(model, [(x, y)], threat, steps=5, loss="margin")
share: float = found.robust
sizes: tuple[int, int, int] = bullet.plan(model(x), y).group_sizes
def away(outputs: Tensor, rows: Rows) -> Tensor: return (outputs - rows.clean_outputs).square().sum(dim=1)
perturb(model, x, None, PGD(0.1, 0.05, 3, inner=away, start="uniform"))
PGD(0.1, 0.05, 3, inner=lambda outputs, rows: rows.logits)  # error: attr-defined
attacked: Tensor = generate(model, x, x, x, bullet.plan(model(x), y), threat)
with PowerMonitor() as monitor:
    joules: float | None = monitor.joules_per_sample(10)

trades_loss(model, x, y)  # error: call-arg
trades_loss(model, [0.5], y, None)  # error: arg-type
trades_loss(model, x, y, None, bullet=10)  # error: arg-type
trades_loss(model, x, y, None, unperturbed="drop")  # error: arg-type
trades_loss(model, x, y, None, start="anywhere")  # error: arg-type
trades_loss(model, x, y, None, frozen=True)  # error: arg-type
trades_loss(model, x, y, None, runner=lambda: None)  # error: arg-type
trades_loss(model, x, y, None, steps=10)  # error: call-arg
name: str = trades_loss(model, x, y, None)  # error: assignment
BulletTrain("10")  # error: arg-type
BulletTrain(policy=lambda judged: judged.certain)  # error: attr-defined
bullet.plan(model(x), y, 0.1)  # error: call-arg
threat.epsilon = 0.1  # error: misc
evaluate(model, [x], threat)  # error: list-item
found.robust = 0.5  # error: misc
yopo_loss(model, x, y, None, propagations=2, layer_steps=5, objective="yopo")  # error: arg-type
bt_fast.trade_loss  # error: attr-defined
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A Python with the package installed as pyproject.toml specifies."""
    folder = tmp_path_factory.mktemp("user")
    library, python = folder / "library", folder / "venv/bin/python"
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in setuptools["packages"]:
        source = ROOT / setuptools["package-dir"].get(package, package.replace(".", "/"))
        target = library / package.replace(".", "/")
        target.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.py", *setuptools["package-data"].get(package, [])):
            for path in source.glob(pattern):
                shutil.copy(path, target)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
    (Path(packages) / "user.pth").write_text("\n".join([str(library), *(p for p in sys.path if "site-packages" in p)]))
    return folder, python


def test_right_uses_pass_and_wrong_ones_are_errors(environment):
    folder, python = environment
    (folder / "script.py").write_text(SCRIPT)
    # the project's own cache and options: torch is then read once for both, which takes ten seconds
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *options, "--python-executable", str(python), "script.py"]
    reported = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    result = re.findall(r"^script\.py:(\d+): error: .*\[([\w-]+)\]$", reported, flags=re.MULTILINE)
    lines = enumerate(SCRIPT.splitlines(), start=1)
    expected = [(str(n), line.split("# error: ")[1]) for n, line in lines if "# error: " in line]
    assert result == expected, reported
