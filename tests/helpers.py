"""What several test files need: cached cases, random plans, comparisons."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import tpvprune as tp
from tests.cases import CASES, Case

NAMES = tuple(CASES)


class Versioned(nn.Linear):
    """A layer that refuses states of versions that it does not know, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state: dict, prefix: str, local_metadata: dict, *rest: object) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError(f"version should be 2 instead of {local_metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


@dataclass(frozen=True)
class Built:
    """A case with its graph. The model is shared between tests: copy it before changing it."""

    case: Case
    graph: tp.Graph

    @property
    def model(self) -> nn.Module:
        return self.case.model

    @property
    def inputs(self) -> Tensor:
        return self.case.example


@cache
def built(name: str) -> Built:
    case = CASES[name]()
    return Built(case, tp.trace(case.model, case.example))


def plan_without(graph: tp.Graph, gone: Mapping[str, list[int]]) -> tp.Plan:
    keep = {}
    for name, units in gone.items():
        mask = torch.ones(graph[name].units, dtype=torch.bool)
        mask[units] = False
        keep[name] = mask
    return tp.Plan(keep, graph)


def random_gone(graph: tp.Graph, seed: int, share: float = 0.5) -> dict[str, list[int]]:
    """Units to remove from every group: at least one goes, at least `least` stay."""
    generator = torch.Generator().manual_seed(seed)
    gone = {}
    for group in graph.groups:
        # With a single channel per group left, a grouped layer would turn into a depthwise one.
        least = 2 if any(m.width() > 1 for m in group.members) else 1
        count = max(1, min(int(group.units * share), group.units - least))
        gone[group.id] = sorted(torch.randperm(group.units, generator=generator)[:count].tolist())
    return gone


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs)


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference."""
    return float((a - b).detach().abs().max())


def assert_scores_close(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], relative: float) -> None:
    """Per group, relative to the group's largest score."""
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, rtol=relative, atol=relative * float(value.max()), msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def launch(script: Path, folder: Path) -> None:
    """Run a script in two processes of a launcher; it leaves what it finds in the folder."""
    root = Path(__file__).parents[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*words, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
