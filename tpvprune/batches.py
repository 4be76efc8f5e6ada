"""What counts as a batch, and the small things every loop over batches needs."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpvprune.errors import DataError, ModelError, NonFiniteError

logger = logging.getLogger(__name__)
_SWITCHES = threading.RLock()
Batch = Any
Progress = Callable[[str, int, "int | None"], None]
"""Called as `progress(stage, done, total)`; total is None where it is not known."""
Selector = str | int | Callable[[Any], Any] | None
"""Which part of what a model returns is meant: a key, attribute or index (`"a.b.0"`), or a function of it."""
Outputs = Tensor | dict[str, Tensor]
_MANY = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
_ANSWERS = ("label", "target")  # in names of what models take to compute a loss by, which is not looked at


def inputs_of(batch: Batch, key: str | None = None) -> Tensor:
    """The input tensor of a batch; anything else in it, labels too, is left unread.

    Args:
        batch: a tensor, or a tuple, list or dict of which the first item (or the item named `key`)
            is the input.
        key: name (dict) of the input.

    Raises:
        DataError: no floating or integer tensor with a batch dimension stands there.
    """
    item = batch
    if isinstance(batch, Mapping):
        if not batch or (key is not None and key not in batch):
            raise DataError(f"batch has no item {key!r}; it has {', '.join(map(repr, batch)) or 'none'}")
        item = batch[key] if key is not None else next(iter(batch.values()))
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        if not batch:
            raise DataError("batch is an empty sequence; its first item should be the input tensor")
        item = batch[0]
    if not isinstance(item, Tensor) or item.ndim == 0:
        raise DataError(
            f"batch is a {type(batch).__name__} whose input is a {type(item).__name__}; give tensors, or tuples "
            "or dicts whose first item is a tensor with the batch along its first dimension"
        )
    return item


def filled_inputs(batch: Batch, number: int, key: str | None = None) -> Tensor:
    """`inputs_of`, of at least one sample.

    Args:
        batch: see `inputs_of`.
        number: of the batch, from 0.
        key: see `inputs_of`.

    Raises:
        DataError: there is no sample in it.
    """
    inputs = inputs_of(batch, key)
    if not len(inputs):
        raise DataError(f"batch {number} (from 0) holds no sample, shape {tuple(inputs.shape)}; leave such batches out")
    return inputs


def labels_of(batch: Batch) -> Tensor | None:
    """The second item of a tuple or dict batch if it is a tensor; None otherwise."""
    items = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(items, Sequence) and len(items) > 1 and isinstance(items[1], Tensor):
        return _plain(items[1])
    return None


def length_of(batches: Iterable[Batch]) -> int | None:
    """Number of batches where the iterable knows it."""
    try:
        return len(batches)  # type: ignore[arg-type]  # a TypeError is the answer None
    except TypeError:
        return None


def repeatable(batches: Iterable[Batch], why: str) -> None:
    """Refuse an iterator that is empty after its first pass.

    Raises:
        DataError: `batches` is a one-shot iterator.
    """
    if iter(batches) is batches:
        raise DataError(f"batches can be read once only, and {why}; give a list or a DataLoader")


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a model without any."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def model_inputs(
    model: nn.Module, batches: Iterable[Batch], stage: str, progress: Progress | None = None, key: str | None = None
) -> Iterator[Tensor]:
    """The inputs of all batches, on the model's device, with progress told and an empty iterable refused.

    Raises:
        DataError: there is no batch.
    """
    return (inputs for inputs, _ in model_batches(model, batches, stage, progress, key))


def _plain(value: Tensor) -> Tensor:
    """A copy that gradients can be taken past, of what was made inside `torch.inference_mode()`."""
    return value.clone() if value.is_inference() else value


def model_batches(
    model: nn.Module, batches: Iterable[Batch], stage: str, progress: Progress | None = None, key: str | None = None
) -> Iterator[tuple[Tensor, Batch]]:
    """`model_inputs`, each with the batch it came from.

    Raises:
        DataError: there is no batch, or a dict of which the model takes another item first.
    """
    device, total, count = device_of(model), length_of(batches), 0
    for batch in batches:
        if key is None and count == 0 and isinstance(batch, Mapping):
            _check_named(model, batch)
        yield _plain(filled_inputs(batch, count, key)).to(device, non_blocking=True), batch
        count += 1
        if progress:
            progress(stage, count, total)
    if count == 0:
        raise DataError(f"{stage}: there is no batch; give at least one")


def _check_named(model: nn.Module, batch: Mapping[Any, Any]) -> None:
    """Refuse a dict whose first item the model takes in another place, and tell of items that it does not get.

    Raises:
        DataError: the model is called on the first item, by place, and takes another one there.
    """
    try:
        takes = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind not in _MANY]
    except (TypeError, ValueError):  # code that tells nothing of what it takes
        return
    kind, names = type(model).__name__, list(batch)
    how = f"wrap the {kind} in a module that takes one tensor and gives the rest by name"
    if names and names[0] in takes[1:]:
        raise DataError(
            f"the first item of a batch is the input, here {names[0]!r}, and {kind} takes {takes[0]!r} first; {how}, "
            "or put the input first"
        )
    more = [name for name in names[1:] if name in takes and not any(part in str(name) for part in _ANSWERS)]
    if more:
        logger.warning(
            "batches hold %s, which %s takes and does not get: models are called on the first item alone, %r; if it "
            "changes the outputs, %s",
            ", ".join(map(repr, more)),
            kind,
            names[0],
            how,
        )


def select_output(output: Any, select: Selector, model: nn.Module) -> Outputs:
    """The part of a model's output that counts: one floating tensor, or several by name.

    Args:
        output: what `model` returned.
        select: a key, attribute or index, dotted for more than one step; a function of the output; None for
            all of it.
        model: named in errors.

    Raises:
        ModelError: there is no such part, or it is no floating tensor (nor a dict of them) with the batch first.
    """
    found = output
    if callable(select):
        found = select(output)
    elif select is not None:
        for part in str(select).split("."):
            try:
                found = _part(found, part)
            except (LookupError, AttributeError, TypeError, ValueError):
                raise ModelError(
                    f"{type(model).__name__} returns {_describe(found)}, in which output={select!r} finds no {part!r}"
                ) from None
    if isinstance(found, Mapping) and found and all(map(_is_output, found.values())):
        return {str(key): value for key, value in found.items()}
    if not _is_output(found):
        raise ModelError(
            f"{type(model).__name__} returns {_describe(found)}, not one floating tensor with the batch first; name "
            "the part that counts with output='key', output=0 or a function, or wrap the model in a module that "
            "returns it"
        )
    return found


def single_tensor(output: Any, model: nn.Module, select: Selector = None) -> Tensor:
    """`select_output` where one tensor is needed.

    Raises:
        ModelError: it is anything else.
    """
    found = select_output(output, select, model)
    if isinstance(found, dict):
        raise ModelError(
            f"{type(model).__name__} returns {_describe(found)}; name the one that counts with output='key'"
        )
    return found


def _part(value: Any, part: str) -> Any:
    if isinstance(value, Mapping):
        return value[part] if part in value else value[int(part)]
    if part.lstrip("-").isdigit() and isinstance(value, Sequence):
        return value[int(part)]
    return getattr(value, part)


def _is_output(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def _describe(value: Any) -> str:
    """What a value is, with the names of its parts."""
    kind = f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        return f"{kind} with {', '.join(map(repr, value)) or 'nothing in it'}"
    if dataclasses.is_dataclass(value):
        return f"{kind} with {', '.join(repr(f.name) for f in dataclasses.fields(value))}"
    if isinstance(value, (list, tuple)):
        return f"{kind} of {len(value)}"
    return f"{kind} of {value.dtype} and shape {tuple(value.shape)}" if isinstance(value, Tensor) else kind


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode and give every module its own mode back."""
    training = [[module for module in model.modules() if module.training] for model in models]
    try:
        for model, modules in zip(models, training, strict=True):
            if modules:
                model.eval()
        yield
    finally:
        for module in itertools.chain(*training):
            module.training = True


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give every buffer back as it was: a forward pass may count in one."""
    before = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
                module._buffers[name] = buffer


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention made of matrix products, as it can be followed, counted and mapped over samples.

    Kernels are chosen for the whole process, so that one thread at a time can.
    """
    with _SWITCHES:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one kernel for a whole layer
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def is_classifier(output: Tensor) -> bool:
    """Whether outputs can be logits, `(batch, 2 classes or more)`; anything else is compared by its squares."""
    return output.ndim == 2 and output.shape[1] > 1


def finite_output(model: nn.Module, inputs: Tensor, select: Selector = None) -> Tensor:
    """One forward pass, `(batch, ...)`.

    Raises:
        ModelError: the output is not one tensor with a row a sample.
        NonFiniteError: it holds NaN or infinity; names the first module that made them.
    """
    return single_tensor(finite_outputs(model, inputs, select), model)


def finite_outputs(model: nn.Module, inputs: Tensor, select: Selector = None) -> Outputs:
    """One forward pass: a tensor `(batch, ...)`, or several by name.

    Raises:
        ModelError: an output has not a row a sample, or is no tensor.
        NonFiniteError: one holds NaN or infinity; names the first module that made them.
    """
    outputs = select_output(model(inputs), select, model)
    for output in outputs.values() if isinstance(outputs, dict) else (outputs,):
        if output.shape[0] != inputs.shape[0]:
            raise ModelError(f"the model gives {output.shape[0]} outputs for {inputs.shape[0]} inputs")
        if not bool(torch.isfinite(output).all()):
            raise NonFiniteError(_first_nonfinite(model, inputs))
    return outputs


def _first_nonfinite(model: nn.Module, inputs: Tensor) -> str:
    """Run once more and say which module first turned finite values into NaN or infinity."""
    if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
        return "the input batch holds NaN or infinity; check the images and their normalisation"
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def check(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and not bool(torch.isfinite(output).all()):
                found.append(f"{name} ({type(module).__name__})")

        return check

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if n]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    where = f"first in module {found[0]}" if found else "outside any module"
    return f"the model's outputs hold NaN or infinity, {where}; check its weights and the input's scale"
