"""Accelerate of a distillation, apart from what the caller does with it: its state is one for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from tpvprune.errors import InputError


@contextmanager
def state_kept() -> Iterator[None]:
    """Put the state that Accelerators share back as it was: the caller may be training with one."""
    kinds = (PartialState, AcceleratorState, GradientState)
    before = [dict(kind._shared_state) for kind in kinds]
    try:
        GradientState._reset_state()
        yield
    finally:
        for kind, state in zip(kinds, before, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)


def accelerator_for(precision: str, device: torch.device) -> Accelerator:
    """A fresh Accelerator: its shared state remembers the precision and device of an earlier one.

    Raises:
        InputError: the device does not do this precision.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return Accelerator(mixed_precision=precision, cpu=device.type == "cpu", device_placement=False)
    except ValueError as error:
        raise InputError(f"finetune: precision={precision!r} cannot be used on {device.type}: {error}") from error
