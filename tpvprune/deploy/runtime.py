"""ONNX files: made by torch's current exporter, run by onnxruntime. The only importer of onnxruntime."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.calls import Arguments
from tpvprune.errors import InputError, ModelError, TpvpruneError

NEEDED = ("onnx", "onnxscript", "onnxruntime")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def missing_packages() -> list[str]:
    """Those of the packages for ONNX that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def check_installed() -> None:
    """Refuse to begin what cannot be done.

    Raises:
        InputError: a package for ONNX is missing; names the command that installs it.
    """
    missing = missing_packages()
    if missing:
        raise InputError(f"ONNX needs {', '.join(missing)}; python -m pip install 'tpvprune[export]'")


def versions() -> dict[str, str]:
    """Versions of the packages for ONNX that are installed."""
    return {name: version(name) for name in NEEDED if find_spec(name) is not None}


def free_batch(arguments: Arguments) -> tuple[Any, ...] | dict[str, Any]:
    """Dynamic shapes for `torch.export` and `torch.onnx`: the first dimension of every tensor is the batch."""
    batch = torch.export.Dim("batch")

    def shape(value: Any) -> dict[int, Any] | None:
        return {0: batch} if isinstance(value, Tensor) else None

    positional, by_name = arguments
    if by_name and not positional:
        return {name: shape(value) for name, value in by_name.items()}
    return tuple(map(shape, positional))


@contextmanager
def quietly() -> Iterator[None]:
    """What exporters say on the way concerns them; what fails is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def said_by(error: BaseException) -> str:
    """What went wrong, in a line: the innermost cause, for exporters and compilers wrap it in words of their own."""
    while error.__cause__ is not None and not isinstance(error, TpvpruneError):
        error = error.__cause__
    line = next((line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()), "")
    return line if isinstance(error, TpvpruneError) else f"{type(error).__name__}: {line}".removesuffix(": ")


def write_onnx(model: nn.Module, arguments: Arguments, path: Path) -> None:
    """Write a model in eval mode as one ONNX file whose batch is free; inputs and outputs keep their order.

    Args:
        model: on the CPU.
        arguments: an example of at least two rows: of one, the exporter would make a constant.
        path: where to; its folder exists.

    Raises:
        InputError: a package is missing.
        Exception: whatever the exporter raises.
    """
    check_installed()
    positional, by_name = arguments
    with quietly(), torch.no_grad():
        program = torch.onnx.export(
            model,
            positional,
            kwargs=by_name,
            dynamo=True,
            dynamic_shapes=free_batch(arguments),
            verbose=False,
        )
        assert program is not None  # only the exporter of old returns nothing
        program.save(str(path), external_data=False)


def providers_for(device: torch.device) -> list[str] | None:
    """Execution providers of onnxruntime for a device; None where it has none that computes there."""
    import onnxruntime

    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return None


def session(
    path: Path, *, threads: int | None = None, device: torch.device | None = None
) -> Callable[[Arguments], list[Tensor]]:
    """A function that runs an ONNX file: arguments as the model takes them in, output tensors on the CPU out.

    Args:
        path: from `write_onnx`.
        threads: that one operator may take; onnxruntime's choice if left out.
        device: where it computes; the CPU if left out.

    Raises:
        InputError: a package is missing, or onnxruntime cannot compute on that device.
        ModelError: onnxruntime has no kernel for something in the file.
    """
    check_installed()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    if threads is not None:
        options.intra_op_num_threads = threads
    providers = providers_for(device or torch.device("cpu"))
    if providers is None:
        raise InputError(f"this onnxruntime computes on no {device}; install onnxruntime-gpu for it")
    try:
        opened = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own, that share no base but this one
        raise ModelError(
            f"onnxruntime cannot run what the exporter made of this model: {str(error).strip()}; it knows few "
            "operators in float64 or half precision, so convert the model with .float(), or give another format"
        ) from error
    names = [one.name for one in opened.get_inputs()]

    def run(arguments: Arguments) -> list[Tensor]:
        return [torch.from_numpy(found) for found in opened.run(None, _feed(names, arguments))]

    return run


def _feed(names: Sequence[str], arguments: Arguments) -> Mapping[str, Any]:
    positional, by_name = arguments
    tensors = [value for value in (*positional, *by_name.values()) if isinstance(value, Tensor)]
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
