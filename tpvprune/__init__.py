"""tpvprune: prune any timm checkpoint or `nn.Module` from unlabeled batches."""

from tpvprune import analysis
from tpvprune.budget import Budget
from tpvprune.checkpoint import load, save
from tpvprune.comparing import compare_criteria
from tpvprune.comparison import ComparedPoint, Comparison
from tpvprune.curves import SensitivityCurve, SensitivityCurves, SensitivityPoint
from tpvprune.deploy.bench import Bench, Timing, bench
from tpvprune.deploy.export import Exported, export
from tpvprune.deploy.page import report_page
from tpvprune.deploy.story import Story
from tpvprune.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    ExportError,
    InputError,
    InternalError,
    ModelError,
    NonFiniteError,
    PlanError,
    RecipeError,
    TpvpruneError,
)
from tpvprune.groupwise import sensitivity
from tpvprune.layers import register_layer
from tpvprune.measures import Measure, Report
from tpvprune.members import Group, Member
from tpvprune.pipeline import Pruned, prune
from tpvprune.plan import Plan
from tpvprune.planning.allocate import allocate
from tpvprune.planning.graph import trace
from tpvprune.planning.inspection import InspectedGroup, Inspection, Unprunable, inspect
from tpvprune.planning.latency import LatencyTable, latency_table
from tpvprune.planning.sparsity import sparsify
from tpvprune.planning.weights import weight_graph
from tpvprune.recovery.batchnorm import reestimate_batchnorm
from tpvprune.recovery.denseinputs import fold_means
from tpvprune.recovery.finetune import Finetune, finetune
from tpvprune.recovery.gaussnewton import refine
from tpvprune.recovery.masks import Masks
from tpvprune.recovery.reconstruct import Reconstruct, reconstruct
from tpvprune.recovery.recover import recover
from tpvprune.recovery.settings import GaussNewton
from tpvprune.schedule import Planning, plan_for
from tpvprune.scores import Scores, Sensitivities, Settled
from tpvprune.scoring.criteria import score
from tpvprune.scoring.heads import Cosine, Function, Logits, Margin, Probabilities, Several, Softmax
from tpvprune.scoring.losses import JBR, Fisher, Jacobian, Taylor
from tpvprune.scoring.magnitude import FPGM, L1, L2, LAMP, WHC, BNScale, Random
from tpvprune.scoring.perturb import Isotropic, Removal, Rounding
from tpvprune.scoring.statistics import Variance, Wanda
from tpvprune.scoring.tpv import TPV
from tpvprune.surgery.masking import mask
from tpvprune.surgery.removal import apply
from tpvprune.surgery.semistructured import to_semi_structured
from tpvprune.timing import measured_latency
from tpvprune.types import Graph
from tpvprune.version import __version__

__all__ = [
    "FPGM",
    "JBR",
    "L1",
    "L2",
    "LAMP",
    "TPV",
    "WHC",
    "BNScale",
    "Bench",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "ComparedPoint",
    "Comparison",
    "Cosine",
    "DataError",
    "ExportError",
    "Exported",
    "Finetune",
    "Fisher",
    "Function",
    "GaussNewton",
    "Graph",
    "Group",
    "InputError",
    "InspectedGroup",
    "Inspection",
    "InternalError",
    "Isotropic",
    "Jacobian",
    "LatencyTable",
    "Logits",
    "Margin",
    "Masks",
    "Measure",
    "Member",
    "ModelError",
    "NonFiniteError",
    "Plan",
    "PlanError",
    "Planning",
    "Probabilities",
    "Pruned",
    "Random",
    "RecipeError",
    "Reconstruct",
    "Removal",
    "Report",
    "Rounding",
    "Scores",
    "Sensitivities",
    "SensitivityCurve",
    "SensitivityCurves",
    "SensitivityPoint",
    "Settled",
    "Several",
    "Softmax",
    "Story",
    "Taylor",
    "Timing",
    "TpvpruneError",
    "Unprunable",
    "Variance",
    "Wanda",
    "__version__",
    "allocate",
    "analysis",
    "apply",
    "bench",
    "compare_criteria",
    "export",
    "finetune",
    "fold_means",
    "inspect",
    "latency_table",
    "load",
    "mask",
    "measured_latency",
    "plan_for",
    "prune",
    "reconstruct",
    "recover",
    "reestimate_batchnorm",
    "refine",
    "register_layer",
    "report_page",
    "save",
    "score",
    "sensitivity",
    "sparsify",
    "to_semi_structured",
    "trace",
    "weight_graph",
]
