"""A pruned model in a format that others run: ONNX, `torch.export`, or weights as timm reads them.

A file is written only after it was read again and run: at other batch sizes than the one it was made with, it must
give what the PyTorch model gives.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tpvprune.calls import Arguments, arguments_of, check_rows, running
from tpvprune.copies import copied
from tpvprune.deploy import runtime
from tpvprune.errors import ExportError, InputError, ModelError, TpvpruneError
from tpvprune.files import write_bytes
from tpvprune.kinds import as_verb
from tpvprune.zoo.models import load_weights

Format = Literal["onnx", "torch-export", "timm-state-dict"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "timm-state-dict": ".safetensors"}
CHECKED = (1, 2, 5)  # batch sizes: the smallest, the one that is exported, another
TOLERANCE, ROUNDINGS = 1e-4, 4  # of the largest output; of its type, where that is less fine
"""Largest difference, as a share of the largest output. Measured on timm's CNNs and ViTs: at most 3e-6."""
Runner = Callable[[Arguments], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, and how it was checked.

    Attributes:
        path: the file.
        format: of the file.
        bytes: its size.
        params: parameters of the model in it.
        difference: largest absolute difference of any output from the PyTorch model's.
        largest: largest absolute output of the PyTorch model in the check.
        tolerance: what `difference / largest` had to stay within.
        batches: batch sizes that were run.
        dense_bytes: size of the dense model's file, written the same way; None where no dense model was given.
        dense_params: parameters of the dense model; None likewise.
        seconds: wall-clock seconds for writing and checking the file.
    """

    path: str
    format: Format
    bytes: int
    params: int
    difference: float
    largest: float
    tolerance: float
    batches: tuple[int, ...]
    dense_bytes: int | None
    dense_params: int | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


@as_verb
def export(
    model: nn.Module,
    path: str | PathLike[str],
    example: Any,
    *,
    format: Format | None = None,
    tolerance: float | None = None,
    dense: nn.Module | None = None,
) -> Exported:
    """Write a model for another runtime, with a free batch dimension, once what was written gives the same outputs.

    Args:
        model: pruned or not; it is left as it was, on its device.
        path: the file; replaced if it is there.
        example: one batch as the model takes it, with the batch first in every tensor: a tensor `(batch, ...)`, a
            tuple of positional or a dict of keyword arguments: no labels. The check runs its rows too.
        format: `onnx` (needs the `export` extra; run by onnxruntime in the check), `torch-export` (loaded by
            `torch.export.load`), or `timm-state-dict` (safetensors under timm's names, in the pruned shapes; loaded
            by timm into what `tpvprune.apply` cuts). By the suffix of `path` if left out: .onnx, .pt2, .safetensors.
        tolerance: largest difference, as a share of the largest output; 1e-4 by default, and 4e-3 where outputs are in
            half precision.
        dense: the original, whose file is written and measured too, and not kept.

    Returns:
        Sizes, and the largest difference found.

    Raises:
        InputError: no such format, the suffix is another one's, a package is missing, or the file cannot be written.
        ModelError: the model does not run on the example or gives no tensor, or the exporter cannot take it.
        ExportError: what was written does not give the model's outputs; nothing is left at `path`.
    """
    target = Path(path)
    kind = _format_of(target, format)
    if kind == "onnx":
        runtime.check_installed()
    start = time.perf_counter()
    twin = _on_cpu(model)
    batches = [rows_of(arguments_of(example, torch.device("cpu")), count) for count in CHECKED]
    wanted = [_answers(twin, arguments) for arguments in batches]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"model{SUFFIXES[kind]}"
        _write(kind, twin, batches[1], file)
        difference, largest = _compare(wanted, [*map(_runner(kind, twin, file), batches)])
        if tolerance is None:
            kinds = {answer.dtype for answers in wanted for answer in answers if answer.is_floating_point()}
            tolerance = max([TOLERANCE, *(ROUNDINGS * torch.finfo(kind).eps for kind in kinds)])
        if not difference <= tolerance * largest:  # NaN is no agreement
            raise ExportError(
                f"the {kind} file's outputs differ from the model's by up to {difference:.3g} (its largest output is "
                f"{largest:.3g}; at most {tolerance:g} of that is allowed); {target} was not written"
            )
        data = file.read_bytes()
        seconds = time.perf_counter() - start
        dense_bytes = None
        if dense is not None:
            beside = Path(folder) / f"dense{SUFFIXES[kind]}"
            _write(kind, _on_cpu(dense), batches[1], beside)
            dense_bytes = beside.stat().st_size
    try:
        write_bytes(target, data)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}; choose another place") from error
    return Exported(
        path=str(target),
        format=kind,
        bytes=len(data),
        params=_count(model),
        difference=difference,
        largest=largest,
        tolerance=tolerance,
        batches=CHECKED,
        dense_bytes=dense_bytes,
        dense_params=None if dense is None else _count(dense),
        seconds=round(seconds, 2),
    )


def rows_of(arguments: Arguments, count: int) -> Arguments:
    """The same arguments with `count` rows: the ones there are, then copies moved along, so that no two are alike."""
    check_rows(arguments)

    def resized(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        rows = [value[i % len(value)] for i in range(count)]
        shifts = [i // len(value) for i in range(count)]
        return torch.stack([row.roll(shift, -1) if row.ndim else row for row, shift in zip(rows, shifts, strict=True)])

    positional, by_name = arguments
    return tuple(map(resized, positional)), {name: resized(value) for name, value in by_name.items()}


def _format_of(path: Path, named: Format | None) -> Format:
    by_suffix = {suffix: kind for kind, suffix in SUFFIXES.items()}
    kind = named or by_suffix.get(path.suffix)
    if kind not in SUFFIXES:
        raise InputError(
            f"{named or path.suffix or path.name!r} is no format; give format= one of {', '.join(SUFFIXES)}, or a file "
            f"that ends in {', '.join(by_suffix)}"
        )
    other = by_suffix.get(path.suffix, kind)
    if other != kind:
        raise InputError(
            f"{path.name} ends as a file of {other} does, and {kind} is asked for; name one that ends in "
            f"{SUFFIXES[kind]}"
        )
    return kind


def _on_cpu(model: nn.Module) -> nn.Module:
    return copied(model).cpu().eval()


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def _write(kind: Format, model: nn.Module, arguments: Arguments, file: Path) -> None:
    try:
        if kind == "onnx":
            runtime.write_onnx(model, arguments, file)
        elif kind == "torch-export":
            positional, by_name = arguments
            with runtime.quietly():
                program = torch.export.export(model, positional, by_name, dynamic_shapes=runtime.free_batch(arguments))
                torch.export.save(program, file)
        else:
            tensors = {name: t.detach().contiguous().clone() for name, t in model.state_dict().items()}
            file.write_bytes(save_tensors(tensors, metadata={"format": "pt"}))
    except TpvpruneError:
        raise
    except Exception as error:  # exporters raise whatever they meet
        raise ModelError(
            f"{type(model).__name__} cannot be written as {kind} with a free batch: {runtime.said_by(error)}; "
            "try another format, or an example of another shape"
        ) from error


def _runner(kind: Format, model: nn.Module, file: Path) -> Runner:
    """What runs the file, without anything of the model but its architecture."""
    if kind == "onnx":
        return runtime.session(file)
    if kind == "torch-export":
        with runtime.quietly():
            loaded: nn.Module = torch.export.load(file).module()
    else:
        loaded = copied(model)
        with torch.no_grad():
            for tensor in loaded.state_dict().values():
                tensor.fill_(1)  # so that a tensor which the file lacks is seen
        load_weights(loaded, file)
    return torch.no_grad()(lambda arguments: _tensors(loaded(*arguments[0], **arguments[1])))


@torch.no_grad()
def _answers(model: nn.Module, arguments: Arguments) -> list[Tensor]:
    """What a model gives, as tensors.

    Raises:
        ModelError: it does not run on the arguments, or there is no number in what it gives.
    """
    with running(model, arguments):
        output = model(*arguments[0], **arguments[1])
    found = _tensors(output)
    if not any(tensor.numel() for tensor in found):
        raise ModelError(
            f"{type(model).__name__} returns a {type(output).__name__}, in which there is no tensor to check a "
            "file by; wrap it in a module that returns tensors"
        )
    return found


def _compare(wanted: Sequence[list[Tensor]], got: Sequence[list[Tensor]]) -> tuple[float, float]:
    """Largest absolute difference, and largest absolute output, over several batches."""
    gaps, sizes = [], []
    for mine, theirs in zip(wanted, got, strict=True):
        if [t.shape for t in mine] != [t.shape for t in theirs]:
            raise ExportError(
                f"the file gives outputs of shapes {[tuple(t.shape) for t in theirs]}, the model "
                f"{[tuple(t.shape) for t in mine]}; nothing was written"
            )
        gaps += [(one.double() - other.double()).abs().flatten() for one, other in zip(mine, theirs, strict=True)]
        sizes += [one.double().abs().flatten() for one in mine]
    return float(torch.cat(gaps).max()), float(torch.cat(sizes).max())  # NaN stays NaN


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
