"""What a model is called on once: an example's arguments, the rows in them, and what is said where it does not run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.errors import ModelError, TpvpruneError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model is called on: positional and by keyword."""


def arguments_of(example: Any, device: torch.device) -> Arguments:
    """What a model is called on, positional and by keyword, moved to a device.

    Args:
        example: a tensor `(batch, ...)`, a tuple of positional or a dict of keyword arguments.
        device: where tensors go.

    Raises:
        ModelError: the example is none of these.
    """

    def move(value: Any) -> Any:
        return value.detach().to(device) if isinstance(value, Tensor) else value

    if isinstance(example, Mapping):
        return (), {key: move(value) for key, value in example.items()}
    if isinstance(example, Tensor):
        return (move(example),), {}
    if isinstance(example, Sequence) and example and not isinstance(example, str):
        return tuple(map(move, example)), {}
    raise ModelError(
        f"the example input is a {type(example).__name__}; give a tensor, a tuple of arguments or a dict of them"
    )


def check_rows(arguments: Arguments) -> None:
    """Refuse an empty batch, of which nothing can be measured.

    Raises:
        ModelError: a tensor among the arguments holds no row.
    """
    if any(tensor.ndim and not len(tensor) for tensor in _tensors(arguments)):
        raise ModelError("the example input holds no row; give a batch of at least one")


@contextmanager
def on_one_tensor(model: nn.Module) -> Iterator[None]:
    """Outside of inference mode, and with errors of PyTorch that come of the model as it was given in plain words.

    Raises:
        ModelError: the model is not called on one tensor, or its weights were made inside `torch.inference_mode()`.
    """
    try:
        with torch.inference_mode(False):
            yield
    except TypeError as error:
        try:
            inspect.signature(model.forward).bind(None)
        except TypeError as wrong:
            raise ModelError(
                f"{type(model).__name__} is not called on one tensor ({wrong}); wrap it in a module that takes the "
                "input alone and gives the other arguments itself"
            ) from error
        raise
    except RuntimeError as error:
        made = next((name for name, p in [*model.named_parameters(), *model.named_buffers()] if p.is_inference()), None)
        if made is None:
            raise
        raise ModelError(
            f"{made!r} of {type(model).__name__} was made inside torch.inference_mode(), and no gradient goes past "
            "it; make or load the model outside of that"
        ) from error


@contextmanager
def running(model: nn.Module, arguments: Arguments) -> Iterator[None]:
    """Where a model runs on an example: whatever it raises is told with the shapes that it was given.

    Raises:
        ModelError: it does not run on these arguments.
        TpvpruneError: raised inside, and told as it is.
    """
    try:
        yield
    except TpvpruneError:
        raise
    except Exception as error:  # a model raises whatever it meets
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in _tensors(arguments))
        several = "; a tuple is all that the model is called on: of (images, labels), give the images alone"
        told = str(error).rstrip(".")
        raise ModelError(
            f"{type(model).__name__} does not run on an example of shape {shapes}: {told}; check the input size, "
            f"channels and dtype{several if len(arguments[0]) > 1 else ''}"
        ) from error


def _tensors(arguments: Arguments) -> list[Tensor]:
    positional, by_name = arguments
    return [value for value in (*positional, *by_name.values()) if isinstance(value, Tensor)]
