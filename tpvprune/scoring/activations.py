"""Per-sample sensitivities from activations: what zeroing each unit does to `u . f(x)`, to first order.

Zeroing the slices that read a channel changes `u . f(x)` by `-sum over positions of x_c * grad_c`, with
`grad` the gradient at that layer's input and through that layer alone. So one forward and one backward
pass give the exact per-sample directional derivative of every unit at once, without any weight
gradient; a block that is skipped is tapped at its output (see `blocks`). (Cross-sample terms vanish when
the cotangents of different samples are independent.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from tpvprune.batches import Outputs, Selector, device_of, evaluation_mode, finite_outputs
from tpvprune.errors import ModelError, PlanError, UnseenError
from tpvprune.members import Group
from tpvprune.patches import channel_axis
from tpvprune.reads import ThroughLayers, read_by
from tpvprune.scoring.layout import Layout, mixed, mixes_samples, without_gradients
from tpvprune.scoring.raw import check_raw, raw_users
from tpvprune.scoring.taps import Map, Sink, Tap
from tpvprune.types import Graph

logger = logging.getLogger(__name__)
IN_PLACE = ("modified by an inplace operation", "is being modified inplace")  # how PyTorch says so


def tensors(outputs: Outputs) -> list[Tensor]:
    """The tensors of a model's outputs."""
    return list(outputs.values()) if isinstance(outputs, dict) else [outputs]


def backward(output: Outputs, cotangent: Outputs, wanted: list[Tensor], keep_graph: bool) -> tuple[Tensor | None, ...]:
    """Gradients of `cotangent . output`, summed over outputs; those that depend on nothing wanted are left out."""
    pairs = [(o, u) for o, u in zip(tensors(output), tensors(cotangent), strict=True) if o.requires_grad]
    ends, seeds = [o for o, _ in pairs], [u for _, u in pairs]
    return torch.autograd.grad(ends, wanted, seeds, retain_graph=keep_graph, allow_unused=True)


_LAYERS = (_ConvNd, nn.Linear, nn.Embedding)


_SCALES = ("LayerScale", "RmsNorm", "RMSNorm", "SimpleNorm", "Affine")


def _scales(module: nn.Module) -> bool:
    """Whether a layer's output is linear in its own parameters, so that output times gradient is their effect.

    It is not where a block scales one of its branches by a parameter of its own and adds the other.
    """
    known = isinstance(module, (_ConvNd, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU))
    alone = next(module.children(), None) is None
    return known or (alone and type(module).__name__.startswith(_SCALES))


def _fused_activation(module: nn.Module) -> nn.Module | None:
    """The first step after the affine part of a norm that carries its own activation (timm's `*Act` norms)."""
    inside = dict(module.named_children())
    return inside.get("drop", inside.get("act"))


class _Part(NamedTuple):
    """A layer's share in the effects of a group.

    Attributes:
        key: of its tap.
        size: how many entries its weight has there.
        times: how often its inputs hold these: a grouped convolution's weight has one group's in-channels.
        entries: which of them a unit has.
    """

    key: str
    size: int
    times: int
    entries: Tensor | None


class Tapped:
    """A model with taps on the layers that a graph's groups touch, for the length of a `with` block.

    Args:
        model: the model; its parameters, gradients, modes and hooks are put back afterwards.
        graph: the graph traced from it.
        over: `consume` taps what reads the units; `all` taps what writes and scales them as well.
        maps: per layer, what its input is turned into before it meets the gradient.

    Raises:
        PlanError: the graph was traced from another model.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        over: str,
        maps: Mapping[str, Map] | None = None,
    ) -> None:
        self.model, self.graph, self.over = model, graph, over
        self.sink = Sink()
        self.sink.maps = {f"in:{layer}": function for layer, function in (maps or {}).items()}
        self.inputs: dict[str, nn.Module] = {}
        self.outputs: dict[str, nn.Module] = {}
        self.left_out: set[str] = set()
        self.whole = False  # whether gradients are wanted of what lies before the first tap as well
        self._copies = self._told = False
        modules = dict(model.named_modules(remove_duplicate=False))
        for member in (m for g in graph.groups for m in g.members if m.role != "work"):
            module = modules.get(member.layer)
            if module is None:
                raise PlanError(f"the graph names layer {member.layer!r}, which the model lacks")
            if member.role == "consume":
                self.inputs[member.layer] = module
            elif over == "all" and member.role in ("produce", "affine"):
                if isinstance(module, _LAYERS) or (member.role == "affine" and _scales(module)):
                    self.outputs[member.layer] = module
                else:
                    self.left_out.add(member.param)
        self._raw = raw_users(model, graph, over)
        self._mixing = mixes_samples(model)
        self.blocks = {g.id: modules[g.id] for g in graph.groups if g.kind == "block"}
        self._modules, self._parameters = list(modules.values()), list(model.parameters())
        device = device_of(model)
        self._parts = {group.id: self._parts_of(group, device) for group in graph.groups}
        self._through, self._by_hand = ThroughLayers(model), True
        self.layout = Layout(model)
        self.sink.axes = self.layout.axes

    @contextmanager
    def __call__(self) -> Iterator[Tapped]:
        """Taps on, parameters without gradients, eval mode; everything is put back at the end."""
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        handles: list[Any] = []
        try:
            # Looking through a model takes as long as many of its layers do.
            with evaluation_mode(self.model) if any(m.training for m in self._modules) else nullcontext():
                for parameter in trained:
                    parameter.requires_grad_(False)
                for name, module in self.inputs.items():
                    tap = self._on_input(f"in:{name}", channel_axis(module))
                    handles.append(module.register_forward_pre_hook(tap, with_kwargs=True))
                for name, module in self.outputs.items():
                    key, fused = f"out:{name}", _fused_activation(module)
                    if fused is not None:
                        tap = self._on_input(key, channel_axis(module), copy=True)
                        handles.append(fused.register_forward_pre_hook(tap, with_kwargs=True))
                    else:
                        tap = self._on_output(key, channel_axis(module))
                        # First: what the hooks of others make of an output is no part of the layer.
                        handles.append(module.register_forward_hook(tap, prepend=True))
                for name, module in self.blocks.items():
                    handles.append(module.register_forward_hook(self._on_block(f"block:{name}")))
                yield self
        finally:
            for handle in handles:
                handle.remove()
            for parameter in trained:
                parameter.requires_grad_(True)

    def run(self, work: Callable[[Tapped], Any], generators: Sequence[torch.Generator] = ()) -> Any:
        """What `work` gives with taps on; once more, on copies, where the model writes into what a tap has seen.

        Args:
            work: a forward pass and backward passes.
            generators: put back before it is tried again.
        """
        states = [generator.get_state() for generator in generators]
        try:
            with self() as taps:
                return work(taps)
        except RuntimeError as error:
            if self._copies or not any(told in str(error) for told in IN_PLACE):
                raise
            error.__traceback__ = None  # its frames hold the graph
        self._copies = True
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        with self() as taps:
            return work(taps)

    def _root(self, key: str, value: Tensor) -> Tensor:
        """The gradient starts at the first tap: nothing before it is worth a backward pass."""
        if not torch.is_grad_enabled():
            self._blind.append(key.partition(":")[2])
            return value
        if value.requires_grad and (self.roots or self.whole):
            return value
        root = value.detach().requires_grad_(True)
        self.roots.append(root)
        return root

    def _on_input(self, key: str, axis: int, copy: bool = False) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = read_by(args, kwargs)
            if self.layout.met(key, value):
                return None
            if self._copies:
                value = value.clone()
            tapped = Tap.apply(self._root(key, value), self.sink, key, axis, copy or self._copies)
            return ((tapped, *args[1:]), kwargs) if args else ((), {**kwargs, "input": tapped})

        return hook

    def _on_output(self, key: str, axis: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if self.layout.met(key, output):
                return output
            root = self._root(key, output)
            # A copy, because an in-place activation may follow.
            tapped: Tensor = Tap.apply(root, self.sink, key, axis, True)
            # The slope of a PReLU acts below zero only.
            return torch.where(args[0] > 0, root, tapped) if isinstance(module, nn.PReLU) else tapped

        return hook

    def _on_block(self, key: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if self.layout.met(key, output):
                return output
            tapped: Tensor = Tap.apply(self._root(key, output), self.sink, key, None, True, args[0].detach())
            return tapped

        return hook

    def forward(self, inputs: Tensor, select: Selector = None, first: int = 0) -> Outputs:
        """Outputs `(batch, ...)` with the graph that `backward` needs.

        Args:
            inputs: `(batch, ...)`.
            select: of the outputs.
            first: number of the first sample, for the maps.

        Raises:
            ModelError: a layer that reads units was not called.
            NonFiniteError: the outputs hold NaN or infinity; names the first module that made them.
        """
        if self._mixing is not None and len(inputs) > 1:
            raise mixed(self._mixing)
        if self._raw:
            check_raw(self, self._raw, inputs[:1], select)
            self._raw = {}
        self.sink.numbers = range(first, first + len(inputs))
        output, idle = self.passed(inputs, select)
        if idle is not None and not self._by_hand:  # this batch goes another way than the first
            self._by_hand = True
            output, idle = self.passed(inputs, select)
        # Watching every function takes time, and few models need it.
        self._by_hand = self._through.led or idle is not None
        if self._blind:
            raise without_gradients(self._blind[0])
        beside = next((name for name, module in self.inputs.items() if module in self._through.beside), None)
        if beside is not None:
            raise UnseenError(
                f"the model multiplies with the weight of {beside!r} without calling it: what it reads is not seen; "
                "score with TPV(engine='batched')"
            )
        if not any(value.requires_grad for value in tensors(output)):
            raise ModelError("no layer of the graph is on the way to the model's output")
        self.layout.end()
        return output

    def passed(self, inputs: Tensor, select: Selector) -> tuple[Outputs, str | None]:
        """Outputs, and the name of a layer that reads units and was not called."""
        self.roots: list[Tensor] = []
        self._blind: list[str] = []
        self.layout.begin(inputs)
        with torch.enable_grad(), self._through if self._by_hand else nullcontext():
            output = finite_outputs(self.model, inputs.detach(), select)
        reached = {key for key, _ in self.layout.shapes}
        return output, next((name for name in self.inputs if f"in:{name}" not in reached), None)

    def backward(self, output: Outputs, cotangent: Outputs, keep_graph: bool) -> dict[str, list[Tensor]]:
        """Per group and member layer, sensitivities `(batch, units)` of `cotangent . output`.

        Returns:
            One entry a group. For `over="consume"` a single tensor, the coherent sum over consumers; for
            `all` one tensor for each layer that writes, scales or reads the units.
        """
        self.sink.sums = {}
        backward(output, cotangent, self.roots, keep_graph)
        lost = sorted({key.partition(":")[2] for key, _ in self.layout.shapes if key not in self.sink.sums})
        if lost and not self._told:
            self._told = True
            logger.warning(
                "the outputs do not depend on what %s read, or a detach() hides it: units there score zero",
                ", ".join(lost),
            )
        zeros = self.roots[0].new_zeros(len(self.sink.numbers), 1)
        return {group.id: self._of_group(group, zeros) for group in self.graph.groups}

    def _parts_of(self, group: Group, device: torch.device) -> list[_Part]:
        """What the effects of a group's units are gathered from."""
        if group.kind == "block":
            return [_Part(f"block:{group.id}", 1, 1, None)]
        found: dict[str, _Part] = {}
        for member in (m for m in group.members if m.role in ("consume", "produce", "affine")):
            key = ("in:" if member.role == "consume" else "out:") + member.layer
            tapped = self.inputs if member.role == "consume" else self.outputs
            if key not in found and member.layer in tapped:
                entries = None if member.index is None else member.index.to(device)
                size, module = self.graph.shapes[member.param][member.axis], tapped[member.layer]
                per_group = member.role == "consume" and isinstance(module, _ConvNd) and not module.transposed
                times = int(getattr(module, "groups", 1)) if per_group else 1
                found[key] = _Part(key, size, times, entries)
        return list(found.values())

    def _of_group(self, group: Group, zeros: Tensor) -> list[Tensor]:
        parts: list[Tensor] = []
        for part in self._parts[group.id]:
            if part.key in self.sink.sums:
                sums = self.sink.sums[part.key]
                if sums.shape[1] != part.size * part.times:
                    name, wanted = part.key.partition(":")[2], part.size * part.times
                    raise UnseenError(
                        f"{name!r} has {wanted} channels, and {sums.shape[1]} lie where layers of its class have them: "
                        "what they do is not seen; score with TPV(engine='batched')"
                    )
                sums = sums.unflatten(1, (part.times, part.size)).sum(1) if part.times > 1 else sums
                parts.append(sums if part.entries is None else sums[:, part.entries].sum(2))
        if not parts:
            return [zeros.expand(-1, group.units)]
        return parts if self.over == "all" else [reduce(torch.add, parts)]
