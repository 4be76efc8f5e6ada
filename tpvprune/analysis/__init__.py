"""Test prediction variance itself: how far any random change of the weights moves the outputs, and what follows."""

from tpvprune.analysis.advice import Advice, GroupAdvice, LayerAdvice, advise
from tpvprune.analysis.empirical import movements
from tpvprune.analysis.energies import Energies, weight_energies
from tpvprune.analysis.estimate import tpv
from tpvprune.analysis.labelnoise import LabelNoise, label_noise_closed, label_noise_movements
from tpvprune.analysis.noises import Finding, Setting
from tpvprune.analysis.perturbations import Diagonal, LowRank, Operator, RandomGrid, Sampler, sgd_noise
from tpvprune.analysis.quantise import quantise
from tpvprune.analysis.rounder import Mix
from tpvprune.analysis.selection import Selection, select
from tpvprune.analysis.sgd import SGD, sgd_movements
from tpvprune.analysis.stability import Stability, StabilityPoint, grid, stability
from tpvprune.analysis.trace import trace_form, trace_heff
from tpvprune.analysis.values import Correlation, Estimate, correlation

__all__ = [
    "SGD",
    "Advice",
    "Correlation",
    "Diagonal",
    "Energies",
    "Estimate",
    "Finding",
    "GroupAdvice",
    "LabelNoise",
    "LayerAdvice",
    "LowRank",
    "Mix",
    "Operator",
    "RandomGrid",
    "Sampler",
    "Selection",
    "Setting",
    "Stability",
    "StabilityPoint",
    "advise",
    "correlation",
    "grid",
    "label_noise_closed",
    "label_noise_movements",
    "movements",
    "quantise",
    "select",
    "sgd_movements",
    "sgd_noise",
    "stability",
    "tpv",
    "trace_form",
    "trace_heff",
    "weight_energies",
]
