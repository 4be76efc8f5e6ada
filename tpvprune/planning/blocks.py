"""Residual blocks that a network can do without: found by running it, never by the name of a class.

A block is residual if it gives back its own input once all of its parameters are zero: what is left is the path around
its branch. An activation that closes it is no hindrance where it changes nothing of the inputs the block is really
given, as a rectifier behind a rectifier. Such a block can be replaced by the identity, and zeroing its parameters is
the same function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.members import WORK, Group, Member
from tpvprune.planning.cost import Usage, tensors_of
from tpvprune.types import fingerprint

RESIDUAL = "the block is residual"  # begins the reason why a block cannot be skipped


@dataclass
class _Seen:
    """What the calls of one module have shown."""

    calls: int = 0
    alone: bool = True  # a single tensor was all it was given
    changed: bool = False  # it wrote into its input
    shown: bool = False  # with its parameters at zero it gave back its input
    refuted: bool = False  # or did not
    before: Tensor | None = None  # a copy of its input while it runs


def residual_blocks(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[str], dict[str, str]]:
    """Names of the blocks that can be skipped, none within another, and residual ones that cannot, with the reason.

    Where one lies in another, the outer is taken if the inner ones hold less than half of its parameters, so that a
    stage is not taken for a block.

    Args:
        model: in eval mode; its weights are changed and put back.
        args: of one forward pass.
        kwargs: likewise.
    """
    named = {name: m for name, m in model.named_modules() if name and next(m.children(), None) is not None}
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in named.items()}
    named = {name: m for name, m in named.items() if sizes[name]}
    args, kwargs = tuple(map(_filled, args)), {key: _filled(value) for key, value in kwargs.items()}
    seen = _look(named, lambda: model(*args, **kwargs))
    try:  # what is above zero by chance is not when the example is another
        again = _look(named, lambda: model(*map(_another, args), **{k: _another(v) for k, v in kwargs.items()}))
    except Exception:  # nothing is known of what the model takes
        again = {}
    residual = [n for n in named if n in seen and seen[n].shown and not seen[n].refuted]
    residual = [n for n in residual if n not in again or not again[n].refuted]
    chosen, reasons = _outer_or_inner(residual, sizes), dict[str, str]()
    for name in chosen:
        if seen[name].calls > 1:
            reasons[name] = f"{RESIDUAL}, but runs {seen[name].calls} times"
        elif not seen[name].alone:
            reasons[name] = f"{RESIDUAL}, but is called with more than its input"
        elif seen[name].changed:
            reasons[name] = f"{RESIDUAL}, but changes its input in place"
        elif _shared(model, name):
            reasons[name] = f"{RESIDUAL}, but shares a parameter with a layer outside it"
    chosen = [name for name in chosen if name not in reasons]
    if chosen and not _replaceable(model, chosen, args, kwargs):
        alone = [name for name in chosen if _replaceable(model, [name], args, kwargs)]
        left = alone if alone and _replaceable(model, alone, args, kwargs) else []
        why = f"{RESIDUAL}, but the model does not run the same with an identity in its place"
        reasons |= {name: why for name in chosen if name not in left}
        chosen = left
    return chosen, reasons


def _filled(value: Any) -> Any:
    """Noise in place of zeros, which show nothing."""
    empty = isinstance(value, Tensor) and value.is_floating_point() and not bool(value.any())
    return _noise(value, 1) if empty else value


def _another(value: Any) -> Any:
    """Noise less the value, in place of floating values."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return _noise(value, 0) - value


def _noise(value: Tensor, seed: int) -> Tensor:
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value)


@torch.no_grad()
def _look(named: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, _Seen]:
    """Run the model once and, at the end of every module's call, the module alone with its parameters at zero."""
    seen: dict[str, _Seen] = {}
    busy = False

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if busy:
                return
            what = seen.setdefault(name, _Seen())
            what.calls += 1
            what.alone &= len(args) == 1 and not kwargs
            given = args[0] if args else None
            what.before = given.clone() if isinstance(given, Tensor) and given.is_floating_point() else None

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal busy
            if busy:
                return
            what = seen[name]
            given, what.before = what.before, None
            if given is None or not isinstance(output, Tensor) or _kind(output) != _kind(given):
                what.refuted = True
                return
            if not bool(torch.isfinite(given).all()) or not bool(given.any()):  # which shows nothing
                return
            what.changed |= not torch.equal(args[0], given)
            busy = True
            try:
                with _zeroed(module):
                    silent = module(given.clone(), *args[1:], **kwargs)
            finally:
                busy = False
            same = isinstance(silent, Tensor) and torch.equal(silent, given)
            what.shown |= same
            what.refuted |= not same

        return hook

    handles = []
    for name, module in named.items():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _kind(value: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return value.shape, value.dtype, value.device


@contextmanager
def _zeroed(module: nn.Module) -> Iterator[None]:
    """All parameters at zero, and put back."""
    saved = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]
    try:
        for parameter, _ in saved:
            parameter.zero_()
        yield
    finally:
        for parameter, value in saved:
            parameter.copy_(value)


def _shared(model: nn.Module, block: str) -> bool:
    """Whether a parameter of a block stands outside of it too."""
    names = list(model.named_parameters(remove_duplicate=False))
    everywhere = Counter(id(p) for _, p in names)
    own = Counter(id(p) for name, p in names if _holds(block, name))
    return any(everywhere[key] != count for key, count in own.items())


def _holds(block: str, name: str) -> bool:
    return name.startswith(f"{block}.")


def _outer_or_inner(blocks: list[str], sizes: Mapping[str, int]) -> list[str]:
    """Blocks of which none lies in another; `blocks` names what holds something before what it holds."""
    chosen: list[str] = []
    for name in reversed(blocks):
        inner = [one for one in chosen if _holds(name, one)]
        if 2 * sum(sizes[one] for one in inner) < sizes[name]:
            chosen = [one for one in chosen if one not in inner] + [name]
    return [name for name in blocks if name in chosen]


@torch.no_grad()
def _replaceable(model: nn.Module, blocks: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether identities in place of the blocks do what passing each block's input on does."""
    handles = [model.get_submodule(name).register_forward_hook(lambda _, args, output: args[0]) for name in blocks]
    try:
        wanted = tensors_of(model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in blocks]
    saved = [getattr(owner, key) for owner, key in places]
    try:
        for owner, key in places:
            setattr(owner, key, nn.Identity())
        found = tensors_of(model(*args, **kwargs))
    except Exception:  # whatever a model does that misses a part of a block
        return False
    finally:
        for (owner, key), module in zip(places, saved, strict=True):
            setattr(owner, key, module)
    same = (a.shape == b.shape and torch.allclose(a, b, equal_nan=True) for a, b in zip(wanted, found, strict=False))
    return len(wanted) == len(found) and all(same)


def block_group(
    model: nn.Module, name: str, usage: Usage, shapes: dict[str, tuple[int, ...]], reuse: dict[str, int]
) -> Group:
    """One block as a group of one unit that takes all tensors of the block along.

    Args:
        model: the model traced.
        name: of the block.
        usage: from running it.
        shapes: of all parameters and work tensors; what the block computes outside of layers is added.
        reuse: likewise.
    """
    block = model.get_submodule(name)
    parameters = {f"{name}.{key}": tuple(p.shape) for key, p in block.named_parameters()}
    buffers = [f"{name}.{key}" for key, _ in block.named_buffers()]
    works = [key for key in reuse if WORK in key and (_holds(name, key) or key.startswith(f"{name}{WORK}"))]
    rest = usage.spent.get(name, 0) - sum(_macs(key, shapes, reuse) for key in (*parameters, *works))
    if rest:
        works.append(f"{name}{WORK}rest")
        shapes[works[-1]], reuse[works[-1]] = (), rest
    members = [Member(key, None, None, "inside") for key in parameters]
    members += [Member(key, None, None, "stat") for key in buffers]
    members += [Member(key, None, None, "work") for key in works]
    inner = [(key.removeprefix(name), shape) for key, shape in parameters.items()]
    return Group(name, "block", 1, tuple(members), True, f"block:{fingerprint(inner)}")


def _macs(name: str, shapes: Mapping[str, tuple[int, ...]], reuse: Mapping[str, int]) -> int:
    return reuse.get(name, 0) * int(torch.Size(shapes[name]).numel())
