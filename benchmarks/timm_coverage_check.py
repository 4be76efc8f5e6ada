"""The checks that `timm_coverage.py` runs on one model, in a process of its own.

    python benchmarks/timm_coverage_check.py LIBRARY MODEL FOLDER SECONDS

What is known so far is written to FOLDER/record.json after every check, so that a process that is killed leaves it.
"""

from __future__ import annotations

import copy
import json
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision_coverage_models
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tpvprune as tp
from tpvprune.files import write_text
from tpvprune.planning.widths import widths_of
from tpvprune.zoo.models import create_model

NEEDS = {  # what a check takes from those before; without it, it is not run
    "dense": "name",
    "trace": "model",
    "plan": "graph",
    "apply": "chosen",
    "forward": "small",
    "backward": "small",
    "mask": "graph",
    "save": "pruned",
    "load": "saved",
    "export": "small",
}
CHECKS = tuple(NEEDS)
SHARE = 0.7  # of the multiply-adds
TRACE_LIMIT = 60.0  # seconds
LARGE = 384  # inputs of so many pixels a side, or more, are made smaller where the model takes it
SMALLER = (224, 256, 288)
# Differences are shares of the largest output. Cutting changes nothing but the order of sums in float32: 6e-8 a sum,
# and with the thousands of terms of a layer and all layers of a net at most 9e-7 in the first 30 models. One unit cut
# in the wrong place moved them by 2e-3 and more. Saved and loaded, or exported, a model should differ by less still.
TOLERANCE = 1e-5
TOLERANCE_64 = 1e-10  # of float64, where sums round to 1e-16


class Failed(Exception):
    """A check that came out false, with the reason."""


def brief(error: BaseException | str) -> str:
    """A message on one line, without folders of this machine."""
    text = error if isinstance(error, str | Failed) else f"{type(error).__name__}: {error}"
    text = re.sub(r"(?<![\w.])(/[\w.+-]+)+/", "", " ".join(str(text).split()))
    return text if len(text) <= 300 else text[:297] + "..."


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for v in values for tensor in tensors(v)]


def run(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(inputs))


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference as a share of the largest value of that output; infinite where shapes differ."""
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    return max((float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) for a, b in pairs), default=0.0)


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Random values for all that starts out constant: a scale of zero, or of 1e-6, would hide what is behind it."""
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.numel() == 0 or weight.min() != weight.max():
            continue
        if abs(float(weight.flatten()[0])) > 0.01:
            weight.mul_(torch.empty_like(weight).uniform_(0.5, 1.5))
        elif name.endswith("bias") or weight.numel() > max(weight.shape, default=1):
            weight.normal_(0, 0.02)
        else:
            weight.uniform_(0.05, 0.15)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


def inputs_of(batch: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))


def build_torchvision(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Likewise a model of torchvision.

    Raises:
        Failed: it does not run, or gives what is not finite.
    """
    shape = torchvision_coverage_models.shape_of(name)
    model = torchvision_coverage_models.make(name)
    stir(model)
    return checked_dense(model, shape), {"input": list(shape)}


def checked_dense(model: nn.Module, shape: Sequence[int]) -> nn.Module:
    """The model, if it gives finite numbers.

    Raises:
        Failed: it does not.
    """
    found = run(model, inputs_of(2, shape))
    if not found:
        raise Failed("the dense model's output holds no tensor")
    if not all(bool(output.isfinite().all()) for output in found):
        raise Failed("the dense model's output is not finite on random weights")
    return model


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A dense model that runs, with random weights; and its input's shape, timm's own, and arguments for timm.

    Raises:
        Failed: it runs at no size.
    """
    with torch.device("meta"):
        config = timm.create_model(name).default_cfg
    default = tuple(config["input_size"])
    sizes = SMALLER if max(default[1:]) >= LARGE else ()
    tries = [((default[0], s, s), args) for s in sizes for args in ({"img_size": s}, {})]
    wrong = ""
    for shape, args in [*tries, (default, {})]:
        torch.manual_seed(0)
        try:
            model = create_model(name, args=args)
            stir(model)
            checked_dense(model, shape)
        except Failed:
            raise
        except Exception as error:
            wrong = f"does not run dense at {shape[-1]}: {brief(error)}"
            continue
        return model, {"input": list(shape), "input_of_timm": list(default), "args": args}
    raise Failed(wrong)


def multiply_adds(model: nn.Module, inputs: Tensor) -> int:
    """Counted by torch on one run: a second opinion on what the plan says."""
    counter = FlopCounterMode(display=False)
    still = copy.deepcopy(model).requires_grad_(False)  # the counter fails where a module is handed a parameter
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        still(inputs)
    return int(counter.get_total_flops()) // 2 // inputs.shape[0]


class Checks:
    """The checks of one model, in turn; each fills `record` and leaves what the next ones need."""

    def __init__(self, library: str, name: str, folder: Path) -> None:
        self.library, self.name, self.folder = library, name, folder
        self.record: dict[str, Any] = {"model": name, "checks": {}, "seconds": {}, "differences": {}}

    def all(self) -> None:
        """Run every check that has what it needs."""
        for check in CHECKS:
            if not hasattr(self, NEEDS[check]):
                continue
            self.record["running"] = check
            self._write()
            try:
                note = getattr(self, check)()
                self.record["checks"][check] = {"ok": True} | ({"why": note} if note else {})
            except Exception as error:
                self.record["checks"][check] = {"ok": False, "why": brief(error)}
        del self.record["running"]
        self._write()

    def _write(self) -> None:
        write_text(self.folder / "record.json", json.dumps(self.record))

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.record["seconds"][what] = round(time.perf_counter() - start, 3)

    def dense(self) -> None:
        """The model can be built, and runs."""
        self.model, built = (build_torchvision if self.library == "torchvision" else build)(self.name)
        self.record |= built
        self.one, self.two = inputs_of(1, built["input"]), inputs_of(2, built["input"])
        self.outputs = run(self.model, self.two)
        self.record["params"] = {"before": sum(p.numel() for p in self.model.parameters())}

    def trace(self) -> None:
        """Within the limit on seconds."""
        with self._timed("trace"):
            self.graph = tp.trace(self.model, self.one)
        reasons = Counter(re.sub(r"'[^']*'", "'*'", reason) for reason in self.graph.skipped.values())
        self.record |= {
            "groups": len(self.graph.groups),
            "units": self.graph.units,
            "macs": {"before": self.graph.macs()},
            "skipped": {"layers": len(self.graph.skipped), "reasons": [[n, why] for why, n in reasons.most_common(3)]},
        }
        if self.record["seconds"]["trace"] > TRACE_LIMIT:
            raise Failed(f"took {self.record['seconds']['trace']:.0f} s, more than {TRACE_LIMIT:.0f} s")

    def plan(self) -> None:
        """To the asked share; below the floor halfway to it instead, so that the checks to come have something."""
        macs, share = self.record["macs"], SHARE
        macs["asked"] = tp.Budget(macs=share).bound("macs", macs["before"])
        floor = int(tp.inspect(self.graph).floors["macs"])
        if floor > macs["asked"]:
            macs["got"], share = floor, (1 + floor / macs["before"]) / 2
        if floor < macs["before"]:
            with self._timed("plan"):
                scores = tp.score(self.model, [self.one], self.graph, tp.L2())
                self.chosen = tp.allocate(scores, self.graph, tp.Budget(macs=share))
        if floor > macs["asked"]:
            alone = "" if self.graph.groups else ": nothing can be pruned"
            raise Failed(f"floor {floor / macs['before']:.1%}{alone}")
        macs["got"] = self.chosen.macs
        if macs["got"] > macs["asked"]:
            raise Failed(f"asked for {macs['asked']:,} multiply-adds, got {macs['got']:,}")

    def apply(self) -> None:
        """What is left has as many parameters as the plan says."""
        with self._timed("apply"):
            self.small = tp.apply(self.model, self.chosen)
        left = sum(p.numel() for p in self.small.parameters())
        self.record["params"]["after"] = left
        if left != self.chosen.params:
            raise Failed(f"{left:,} parameters are left, the plan says {self.chosen.params:,}")

    def forward(self) -> None:
        """The shapes as before, all numbers finite."""
        self.pruned = run(self.small, self.two)
        before, after = [tuple(t.shape) for t in self.outputs], [tuple(t.shape) for t in self.pruned]
        if before != after:
            raise Failed(f"outputs {after}, before {before}")
        if not all(bool(output.isfinite().all()) for output in self.pruned):
            raise Failed("outputs are not finite")
        self.record["macs"] |= {"planned": self.chosen.macs, "counted": multiply_adds(self.small, self.one)}

    def backward(self) -> str:
        """A gradient reaches the parameters of the pruned model."""
        self.small.zero_grad()
        loss = torch.stack([output.square().sum() for output in tensors(self.small(self.one))]).sum()
        loss.backward()
        parameters = list(self.small.parameters())
        grads = [p.grad for p in parameters if p.grad is not None]
        self.small.zero_grad()
        if not all(bool(grad.isfinite().all()) for grad in grads):
            raise Failed("gradients are not finite")
        reached = sum(bool(grad.any()) for grad in grads)
        if not reached:
            raise Failed("no gradient reaches a parameter")
        return f"a gradient reaches {reached} of {len(parameters)} parameters"

    def mask(self) -> str | None:
        """About a quarter of the units of every group with an exact mask, at random, cut and masked."""
        generator = torch.Generator().manual_seed(2)
        keep = {}
        for name, widths in widths_of(self.graph, tp.Budget(macs=SHARE)).items():
            group = self.graph[name]
            if group.exact_mask and len(widths) > 1:
                left = min(widths[1:], key=lambda width: abs(width - 0.75 * group.units))
                keep[name] = torch.zeros(group.units, dtype=torch.bool)
                keep[name][torch.randperm(group.units, generator=generator)[:left]] = True
        if not keep:
            return "no group has an exact mask"
        differs = self._masked_and_cut(keep)
        self.record["differences"]["mask"] = differs
        self.record["differences"]["moved"] = difference(self.masked, self.outputs)
        if not differs <= TOLERANCE:  # rounding, perhaps: in float64 it would be gone, a wrong index would not
            self.model, self.two = self.model.double(), self.two.double()
            try:
                differs = self._masked_and_cut(keep)
                self.record["differences"]["mask_float64"] = differs
            except Exception as error:
                said = f"cut and masked differ by {differs:.1e} in float32, and in float64 the model does not run"
                raise Failed(f"{said}: {brief(error)}") from error
            finally:
                self.model, self.two = self.model.float(), self.two.float()
            if differs <= TOLERANCE_64:
                return f"cut and masked differ by {self.record['differences']['mask']:.1e} in float32 alone"
            names = list(keep)
            while len(names) > 1:
                halves = (names[: len(names) // 2], names[len(names) // 2 :])
                wrong = [h for h in halves if not self._masked_and_cut({n: keep[n] for n in h}) <= TOLERANCE]
                if not wrong:
                    break
                names = wrong[0]
            where = f"group {names[0]!r} alone" if len(names) == 1 else f"{len(names)} groups together"
            raise Failed(f"cut and masked differ by {differs:.1e} of the outputs; {where} does it")
        return None

    def _masked_and_cut(self, keep: dict[str, Tensor]) -> float:
        plan = tp.Plan(keep, self.graph)
        self.masked = run(tp.mask(self.model, plan), self.two)
        return difference(run(tp.apply(self.model, plan), self.two), self.masked)

    def save(self) -> None:
        """With what the pruned model gives, for the process that loads it."""
        tp.save(self.small, self.folder / "saved")
        torch.save({"inputs": self.two, "outputs": self.pruned}, self.folder / "expected.pt")
        self.saved = True

    def load(self) -> None:
        """In a fresh process, with the same outputs."""
        command = [sys.executable, __file__, "--load", self.library, self.name, str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise Failed(brief(lines[-1]) if lines else f"the process that loads ended with {done.returncode}")
        self.record["differences"]["load"] = differs = float(done.stdout.split()[-1])
        if not differs <= TOLERANCE:
            raise Failed(f"loaded again, it differs by {differs:.1e} of the outputs")

    def export(self) -> str | None:
        """`torch.export` of the pruned model, wherever the dense one can be exported."""
        differs = self._exported(self.small)
        if isinstance(differs, str):
            dense = self._exported(self.model)
            if not isinstance(dense, str):
                raise Failed(differs)
            return f"the dense model does not export either: {dense}"
        self.record["differences"]["export"] = differs
        if not differs <= TOLERANCE:
            raise Failed(f"exported, it differs by {differs:.1e} of the outputs")
        return None

    def _exported(self, model: nn.Module) -> float | str:
        """How much the exported model differs, or why there is none."""
        try:
            exported = torch.export.export(model, (self.one,))
        except Exception as error:
            return brief(error)
        return difference(run(exported.module(), self.one), run(model, self.one))


def load(library: str, name: str, folder: Path) -> float:
    expected = torch.load(folder / "expected.pt")
    skeleton = torchvision_coverage_models.make(name) if library == "torchvision" else None
    return difference(run(tp.load(folder / "saved", skeleton=skeleton), expected["inputs"]), expected["outputs"])


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments[0] == "--load":
        print(load(arguments[1], arguments[2], Path(arguments[3])))
    else:
        signal.alarm(int(float(arguments[3])) + 10)  # ends the process, should the one that watches it be gone
        Checks(arguments[0], arguments[1], Path(arguments[2])).all()


if __name__ == "__main__":
    main(sys.argv[1:])
