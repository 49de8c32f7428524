"""The code that docs/distributed.md shows for Accelerate and Lightning, run verbatim in two processes of torchrun."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
BEFORE = """
import json, os, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from small_models import batch, build
from bt_fast import BulletTrain, trades_loss

torch.set_num_threads(1)
model = build(dtype=torch.float32)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
images, labels = batch(24, dtype=torch.float32)
loader = DataLoader(TensorDataset(images, labels), batch_size=4)
"""
ACCELERATE = """
os.environ["ACCELERATE_USE_CPU"] = "true"
from accelerate import Accelerator
"""
LIGHTNING = "import lightning\n"
FIT = """
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", **quiet)
classifier = RobustClassifier(model)
trainer.fit(classifier, loader)
bullet = classifier.bullet
"""
AFTER = """
parameters = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
bullet.finish()
found = [bullet.group_counts.tolist(), float(bullet.robust_fraction), float(parameters.sum())]
with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
os._exit(0)  # gloo's threads abort now and then while Python ends, without this package too
"""


def shown(name):
    """Returns the page's Python block after the comment of this name."""
    text = PAGE.read_text(encoding="utf-8")
    begin = text.index("```python\n", text.index(f"<!-- {name} -->")) + len("```python\n")
    return text[begin : text.index("```\n", begin)]


SCRIPTS = {
    "accelerate": BEFORE + ACCELERATE + shown("accelerate") + AFTER,
    "lightning": BEFORE + LIGHTNING + shown("lightning") + FIT + AFTER,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_the_readme_shows_trains_on_two_ranks_together(name, tmp_path):
    pytest.importorskip(name)
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\n{SCRIPTS[name]}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    counts, robust_fraction, _ = first
    assert sum(counts) == 24
    assert 0 < robust_fraction < 1
