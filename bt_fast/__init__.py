"""BulletTrain: robust training that spends its attack steps on the samples near the decision boundary.

Algorithm and names follow "BulletTrain: Accelerating Robust Neural Network Training via Boundary Example Mining"
(Hua et al., NeurIPS 2021).
"""

from typing import TYPE_CHECKING

from bt_fast import floors  # noqa: F401, first: checks that torch and numpy are new enough
from bt_fast.allocation import METRICS, POLICIES, Gaussian, Judged, Oracle
from bt_fast.attack.apgd import APGD
from bt_fast.attack.auto import RUNNERS, AutoRunner
from bt_fast.attack.balance import Costs
from bt_fast.attack.balanced import Balance
from bt_fast.attack.by_sample import PerSample
from bt_fast.attack.folded import Frozen
from bt_fast.attack.generate import generate
from bt_fast.attack.graphs import GraphRunner
from bt_fast.attack.inner import Rows
from bt_fast.attack.logits import Logits
from bt_fast.attack.pgd import PGD
from bt_fast.attack.pixels import Normalization, Normalize
from bt_fast.attack.streams import StreamRunner
from bt_fast.attack.threat import ThreatModel
from bt_fast.deprecated import renamed
from bt_fast.engine import Engine
from bt_fast.evaluation import evaluate
from bt_fast.faults import NonFiniteError
from bt_fast.guard import Guard, Skipped
from bt_fast.memory import Memory
from bt_fast.mining import BulletTrain
from bt_fast.objectives.augmix import AugMixLoss, augmix_loss
from bt_fast.objectives.awp import AWP
from bt_fast.objectives.extra_term import UpdateBatch
from bt_fast.objectives.loss import AdversarialLoss
from bt_fast.objectives.mart import MARTLoss, mart_loss
from bt_fast.objectives.perturb import perturb
from bt_fast.objectives.pgd import PGDLoss, pgd_loss
from bt_fast.objectives.trades import TRADESLoss, trades_loss
from bt_fast.objectives.update import Update
from bt_fast.placement import Placement
from bt_fast.plan import MinedPlan, Plan
from bt_fast.power import PowerMonitor
from bt_fast.robust_half import HalfDrawn
from bt_fast.speedup import Fractions, theoretical_speedup, theoretical_speedup_augmix

__version__ = "0.1.0"

if not TYPE_CHECKING:  # a type checker should know only the new names
    __getattr__ = renamed(__name__, {"Schedule": "bt_fast.Plan", "Assignment": "bt_fast.MinedPlan"})


__all__ = [
    "APGD",
    "AWP",
    "METRICS",
    "PGD",
    "POLICIES",
    "RUNNERS",
    "AdversarialLoss",
    "AugMixLoss",
    "AutoRunner",
    "Balance",
    "BulletTrain",
    "Costs",
    "Engine",
    "Fractions",
    "Frozen",
    "Gaussian",
    "GraphRunner",
    "Guard",
    "HalfDrawn",
    "Judged",
    "Logits",
    "MARTLoss",
    "Memory",
    "MinedPlan",
    "NonFiniteError",
    "Normalization",
    "Normalize",
    "Oracle",
    "PGDLoss",
    "PerSample",
    "Placement",
    "Plan",
    "PowerMonitor",
    "Rows",
    "Skipped",
    "StreamRunner",
    "TRADESLoss",
    "ThreatModel",
    "Update",
    "UpdateBatch",
    "augmix_loss",
    "evaluate",
    "generate",
    "mart_loss",
    "perturb",
    "pgd_loss",
    "theoretical_speedup",
    "theoretical_speedup_augmix",
    "trades_loss",
]
