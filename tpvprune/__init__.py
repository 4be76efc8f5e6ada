"""tpvprune: prune any timm checkpoint or `nn.Module` from unlabeled batches."""

from tpvprune.budget import Budget
from tpvprune.checkpoint import load, save
from tpvprune.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    InputError,
    InternalError,
    ModelError,
    NonFiniteError,
    PlanError,
    RecipeError,
    TpvpruneError,
)
from tpvprune.pipeline import Pruned, prune
from tpvprune.plan import Plan
from tpvprune.planning.allocate import allocate
from tpvprune.planning.graph import trace
from tpvprune.recovery.batchnorm import reestimate_batchnorm
from tpvprune.recovery.finetune import Finetune, finetune
from tpvprune.recovery.reconstruct import Reconstruct, reconstruct
from tpvprune.recovery.recover import recover
from tpvprune.scores import Scores
from tpvprune.scoring.criteria import TPV, score
from tpvprune.scoring.heads import Logits, Softmax
from tpvprune.surgery.masking import mask
from tpvprune.surgery.removal import apply
from tpvprune.types import Graph, Group, Measure, Member, Report
from tpvprune.version import __version__

__all__ = [
    "TPV",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "DataError",
    "Finetune",
    "Graph",
    "Group",
    "InputError",
    "InternalError",
    "Logits",
    "Measure",
    "Member",
    "ModelError",
    "NonFiniteError",
    "Plan",
    "PlanError",
    "Pruned",
    "RecipeError",
    "Reconstruct",
    "Report",
    "Scores",
    "Softmax",
    "TpvpruneError",
    "__version__",
    "allocate",
    "apply",
    "finetune",
    "load",
    "mask",
    "prune",
    "reconstruct",
    "recover",
    "reestimate_batchnorm",
    "save",
    "score",
    "trace",
]
