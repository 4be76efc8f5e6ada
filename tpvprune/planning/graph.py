"""Trace a network into a `Graph` through torch-pruning's dependency graph.

torch-pruning (Fang 2023, arXiv 2301.12900) finds which layers' channels are tied together by
walking the autograd graph. This file is the only one that knows it: what comes out is our own
`Graph`, checked entry by entry, in which every group can be removed without tracing again. A group
whose index mapping does not add up is listed in `Graph.skipped`, never guessed at.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from tpvprune.batches import Progress, arguments_of, device_of, evaluation_mode
from tpvprune.errors import ModelError
from tpvprune.planning.attention import AttentionBlock, attention_blocks, unknown_attention
from tpvprune.planning.blocks import block_group, residual_blocks
from tpvprune.planning.bundles import Item, Unbundled, bundle_group, is_grouped, joined
from tpvprune.planning.cost import Usage, tensors_of
from tpvprune.planning.verify import is_rearranged, strays
from tpvprune.types import REST, WORK, Graph, Group, Member, Role, fingerprint

ROOTS = (_ConvNd, nn.Linear, nn.Embedding)
OUTPUT_REASON = "its outputs are the model's outputs"


class _Unprunable(Exception):
    """Internal: a group cannot be expressed; carries the reason."""


def trace(
    model: nn.Module,
    example: Any,
    *,
    depth: bool = False,
    bundles: bool = False,
    progress: Progress | None = None,
) -> Graph:
    """Find which units can only leave a network together, and what each tensor costs.

    The model is copied; neither it nor its hooks, modes and gradients are touched.

    Args:
        model: any module whose forward pass is differentiable.
        example: one input batch: a tensor `(batch, ...)`, a tuple of positional or a dict of keyword
            arguments. Multiply-adds are counted per example of it.
        depth: whether residual blocks that can be skipped as a whole are groups too, of kind "block". Takes a few
            forward passes more.
        bundles: whether the units around a grouped convolution are its groups, of kind "bundle", instead of one
            channel of each group. Where its groups cannot leave as a whole, `Graph.skipped` says why, and units are
            channels.
        progress: called as `progress("trace", groups_done, groups_to_do)`.

    Raises:
        ModelError: the model cannot be run on `example`, or not traced.
    """
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if not parameter.is_floating_point():
            raise ModelError(f"parameter {name!r} is {parameter.dtype}; only floating models can be traced")
    args, kwargs = arguments_of(example, device_of(model))
    with evaluation_mode(twin):
        # torch's FLOP counter fails where a module is handed a parameter that wants a gradient.
        usage = Usage(twin.requires_grad_(False), args, kwargs)
        twin.requires_grad_(True)
        blocks = list(attention_blocks(twin))
        walker = _Walker(twin, blocks, args, kwargs, usage.widest)
    builder = _Builder(twin, walker, usage, blocks, bundles)
    groups = builder.groups(progress)
    shapes = {name: tuple(p.shape) for name, p in twin.named_parameters()}
    with evaluation_mode(twin):
        for group in [g for g in groups if g.kind in ("channel", "bundle") and is_rearranged(g, shapes)]:
            layer = strays(twin, group, lambda: twin(*args, **kwargs))
            if layer is not None:
                groups.remove(group)
                reason = f"its channels reach {layer!r} in an order that cannot be followed"
                builder.skipped |= {m.layer: reason for m in group.of_role("produce") if m.layer}
    reuse = dict(usage.reuse)
    for block in blocks:
        work = f"{block.name}{WORK}attention"
        if any(group.id == block.name for group in groups) and block.name in usage.tokens:
            shapes[work], reuse[work] = (block.width,), block.work(usage.tokens[block.name])
    if depth:
        with evaluation_mode(twin):
            names, held = residual_blocks(twin, args, kwargs)
        groups += [block_group(twin, name, usage, shapes, reuse) for name in names]
        groups.sort(key=lambda g: usage.order[f"{g.id}.qkv" if g.kind == "head" else g.id])
        builder.skipped |= held
    stats = {m.param for g in groups for m in g.of_role("stat")}
    shapes |= {name: tuple(buffer.shape) for name, buffer in twin.named_buffers() if name in stats}
    itemsize = {name: tensor.element_size() for name, tensor in _tensors(twin) if name in shapes}
    other = sum(tensor.nbytes for name, tensor in _tensors(twin) if name not in shapes)
    rest = usage.total - sum(times * math.prod(shapes[name]) for name, times in reuse.items())
    if rest:
        shapes[REST], reuse[REST] = (), rest
    if other:
        shapes[REST], itemsize[REST] = (), other
    return Graph(
        groups=tuple(groups),
        shapes=shapes,
        reuse=reuse,
        model_id=model_id(model),
        skipped=builder.skipped,
        itemsize=itemsize,
    )


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def model_id(model: nn.Module) -> str:
    """Fingerprint of a model's architecture, see `types.fingerprint`."""
    return fingerprint((name, tuple(tensor.shape)) for name, tensor in _tensors(model))


@dataclass
class _Limits:
    """How far the walk for one root may go before its channels count as beyond following.

    Attributes:
        entries: no more belong to a group than the widest activation of one example has.
        work: entries mapped on the way; DenseNet-121, whose channels are joined most often, takes 17,408 a root.
        done: entries mapped in the current walk.
    """

    entries: int
    work: int = 2_000_000
    done: int = 0


class _Bounded(list[Any]):
    """Index mappings that stop a walk which goes around in circles, or in which indices multiply."""

    def __init__(self, mappings: list[Any], limits: _Limits) -> None:
        super().__init__(mappings)
        self.limits = limits

    def __iter__(self) -> Iterator[Any]:
        return (mapping and partial(self._checked, mapping) for mapping in super().__iter__())

    def _checked(self, mapping: Any, entries: Any) -> Any:
        mapped = mapping(entries)
        self.limits.done += len(mapped)
        if len(mapped) > self.limits.entries or self.limits.done > self.limits.work:
            raise OverflowError("indices multiply")
        return mapped


class _Walker:
    """torch-pruning's dependency graph of a model, with attention blocks cut open."""

    def __init__(
        self,
        model: nn.Module,
        blocks: list[AttentionBlock],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        widest: int,
    ) -> None:
        cut: list[Tensor] = []
        self.inputs: list[nn.Parameter] = []
        self.output_nodes: set[Any] = set()
        args = tuple(self._as_parameter(a) for a in args)
        kwargs = {key: self._as_parameter(value) for key, value in kwargs.items()}

        def run(model: nn.Module, _: Any) -> list[Tensor]:
            outputs = [o for o in tensors_of(model(*args, **kwargs)) if o.grad_fn is not None]
            if not outputs:
                raise ModelError(f"{type(model).__name__} returns no differentiable tensor; it cannot be traced")
            self.output_nodes.update(o.grad_fn for o in outputs)
            return [*outputs, *cut]

        for block in blocks:
            block.module.forward = block.cut_open(cut)
        self.graph = torch_pruning.DependencyGraph()
        try:
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                self.graph.build_dependency(
                    model,
                    example_inputs=None,
                    forward_fn=run,
                    unwrapped_parameters=[(p, p.ndim - 1) for p in self.inputs],
                    verbose=False,
                )
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} cannot be traced ({type(error).__name__}: {error}); "
                "its control flow or reshapes are beyond the dependency graph"
            ) from error
        finally:
            for block in blocks:
                del block.module.forward
        self.limits = _Limits(widest)
        for node in self.graph.module2node.values():
            for dependency in node.dependencies:
                dependency.index_mapping = _Bounded(dependency.index_mapping, self.limits)

    def _as_parameter(self, value: Any) -> Any:
        """A floating input as a leaf the walker recognises, so that channels tied to the input are seen."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        lifted = value.clone()
        added = 0
        while lifted.ndim < 4:  # torch-pruning reads a 3-D parameter as a position embedding
            lifted, added = lifted.unsqueeze(0), added + 1
        leaf = nn.Parameter(lifted)
        self.inputs.append(leaf)
        return leaf[(0,) * added] if added else leaf.clone()

    def items(self, root: nn.Module, side: str = "out") -> list[Item]:
        """(module or parameter, "in" or "out", its entries, the root's units they belong to)."""
        pruner = self.graph.get_pruner_of_module(root)
        width = getattr(pruner, f"get_{side}_channels")(root)
        self.limits.done = 0
        group = self.graph.get_pruning_group(root, getattr(pruner, f"prune_{side}_channels"), list(range(width)))
        return [
            (
                item.dep.target,
                "out" if item.dep.handler.__name__ == "prune_out_channels" else "in",
                list(item.idxs),
                list(item.root_idxs),
            )
            for item in group
        ]


class _Builder:
    """Turns torch-pruning's groups into ours, one root layer at a time."""

    def __init__(
        self, model: nn.Module, walker: _Walker, usage: Usage, blocks: list[AttentionBlock], bundles: bool
    ) -> None:
        self.model, self.walker, self.usage, self.blocks, self.bundles = model, walker, usage, blocks, bundles
        self.skipped: dict[str, str] = {}
        self.modules: dict[int, str] = {}
        for name, module in model.named_modules():
            self.modules.setdefault(id(module), name)
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.owners = {f"{n}.{k}" if n else k: m for n, m in model.named_modules() for k in m._parameters}
        everywhere = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self.tied = {self.parameters[i] for i, count in everywhere.items() if count > 1}
        self.roots = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, ROOTS) and id(module) in self.modules and self.modules[id(module)] == name
        }
        self.blocked = {f"{b.name}.qkv": b.reason for b in blocks if not hasattr(b.module, "attn_dim")}
        self.fixed = set(unknown_attention(model))
        self.taken: set[tuple[str, int | None, int]] = set()

    def groups(self, progress: Progress | None) -> list[Group]:
        inside = {f"{b.name}.{side}" for b in self.blocks for side in ("qkv", "gate")}
        found: list[tuple[int, Group]] = []
        for block in self.blocks:
            order = self.usage.order.get(f"{block.name}.qkv", -1)
            if block.reason:
                self.skipped[block.name] = block.reason
            elif order < 0:
                self.skipped[block.name] = "it is not used in the forward pass"
            else:
                found.append((order, block.group()))
        seen: set[int] = set()
        roots = sorted(self.roots.items(), key=lambda item: self.usage.order.get(item[0], math.inf))
        for done, (name, module) in enumerate(roots, 1):
            if progress:
                progress("trace", done, len(roots))
            if name in inside or id(module) in seen:
                continue
            if name not in self.usage.order or module not in self.walker.graph.module2node:
                self.skipped[name] = "it is not used in the forward pass"
                continue
            try:
                items = self.walker.items(module)
            except Exception as error:  # torch-pruning's own failure must not take the other groups along
                self.skipped[name] = f"the dependency graph cannot map its channels ({type(error).__name__})"
                continue
            writers = [t.module for t, side, _, _ in items if side == "out" and isinstance(t.module, ROOTS)]
            seen.update(id(m) for m in writers)
            bundle = self._bundle(name, items, seen) if self.bundles else None
            if bundle is not None:
                found.append((self.usage.order[name], bundle))
                continue
            try:
                found.append((self.usage.order[name], self._group(name, module, items)))
            except _Unprunable as why:
                for writer in writers:
                    self.skipped.setdefault(self.modules[id(writer)], str(why))
        return [group for _, group in sorted(found, key=lambda pair: pair[0])]

    def _bundle(self, name: str, items: list[Item], seen: set[int]) -> Group | None:
        """The group whose units are groups of grouped convolutions; None where there are none, or they must stay."""
        convs = [self.modules[id(node.module)] for node, _, _, _ in items if is_grouped(node.module)]
        if not convs:
            return None
        try:
            parts = joined(items, self.walker.items)
            shapes = {n: tuple(t.shape) for n, t in (*self.model.named_parameters(), *self.model.named_buffers())}
            group = bundle_group(name, parts, self._checked, shapes.__getitem__)
            claims = {(m.param, m.dim, e) for m in group.members for e in m.entries(group.units).flatten().tolist()}
            if claims & self.taken:
                raise Unbundled("some of its entries already belong to another group")
        except (_Unprunable, Unbundled) as why:
            self.skipped |= dict.fromkeys(convs, f"its groups cannot leave as a whole: {why}")
            return None
        self.taken |= claims
        seen.update(id(n.module) for part in parts for n, side, _, _ in part if side == "out")
        return group

    def _checked(self, item: Item) -> tuple[list[tuple[str, int, Role]], int, bool] | None:
        """`_sides` of an item of the dependency graph; None for what holds no weights."""
        node, side, entries, units = item
        module = node.module
        if len(entries) != len(units) or any(u is None for u in units):
            raise _Unprunable("the dependency graph loses track of its channels")
        if isinstance(module, torch_pruning.ops._OutputOp) or (
            node.grad_fn in self.walker.output_nodes and side == "out" and not isinstance(module, nn.Parameter)
        ):
            raise _Unprunable(OUTPUT_REASON)
        known = isinstance(module, nn.Parameter) or id(module) in self.modules
        return self._sides(module, side, node) if known else None

    def _group(self, name: str, root: nn.Module, items: list[Item]) -> Group:
        width = self.walker.graph.get_pruner_of_module(root).get_out_channels(root)
        bundles, exact, parts, kinds = 1, True, [], []
        for item in items:
            (node, _, entries, units), sides = item, self._checked(item)
            module = node.module
            if sides is not None:
                tensors, share, pools = sides
                if share > 1:
                    if bundles not in (1, share) or entries != units or len(units) != width:
                        raise _Unprunable("its channels run through differently grouped layers")
                    bundles = share
                exact = exact and not pools
                parts += [(param, dim, role, entries, units) for param, dim, role in tensors]
                kinds += [f"{type(module).__name__}:{role}:{dim}" for _, dim, role in tensors]
        if width // bundles < 2:
            raise _Unprunable("it has a single unit")
        members = tuple(self._member(param, dim, role, e, u, width, bundles) for param, dim, role, e, u in parts)
        if not any(m.role == "consume" for m in members):
            raise _Unprunable("no convolution or linear layer consumes its outputs")
        claims = {(m.param, m.dim, e) for m in members for e in m.entries(width // bundles).flatten().tolist()}
        if claims & self.taken:
            raise _Unprunable("some of its entries already belong to another group")
        self.taken |= claims
        return Group(name, "channel", width // bundles, members, exact, "|".join(sorted(kinds)))

    def _sides(self, module: Any, side: str, node: Any) -> tuple[list[tuple[str, int, Role]], int, bool]:
        """Tensors a layer loses entries of, the channel groups it imposes, and whether it pools over channels."""
        loose = isinstance(module, nn.Parameter)
        name = self.parameters.get(id(module), "") if loose else self.modules[id(module)]
        owner = name.rpartition(".")[0]
        if owner in self.fixed:
            raise _Unprunable(
                f"{owner!r} is attention of a kind not known yet ({type(self.model.get_submodule(owner)).__name__})"
            )
        if loose:
            return self._loose(module, node)
        if name in self.blocked:
            raise _Unprunable(self.blocked[name])
        own = [k for k, p in module.named_parameters(recurse=False) if p is not None]
        if any(self.parameters[id(getattr(module, k))] in self.tied for k in own):
            raise _Unprunable(f"{name!r} shares a parameter with another layer")
        if isinstance(module, _ConvNd):
            depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
            if depthwise:
                return [(f"{name}.{k}", 0, "affine") for k in own], 1, False
            if module.transposed and module.groups > 1:
                raise _Unprunable(f"{name!r} is a grouped transposed convolution")
            out_dim, in_dim = (1, 0) if module.transposed else (0, 1)
            if side == "in":
                return [(f"{name}.weight", in_dim, "consume")], module.groups, False
            return [(f"{name}.{k}", out_dim if k == "weight" else 0, "produce") for k in own], module.groups, False
        if isinstance(module, nn.Linear):
            if side == "in":
                return [(f"{name}.weight", 1, "consume")], 1, False
            return [(f"{name}.{k}", 0, "produce") for k in own], 1, False
        if isinstance(module, nn.Embedding):
            return [(f"{name}.weight", 1, "produce")], 1, False
        if isinstance(module, (_BatchNorm, _InstanceNorm)):
            stats = [k for k in ("running_mean", "running_var") if getattr(module, k, None) is not None]
            sides: list[tuple[str, int, Role]] = [(f"{name}.{k}", 0, "affine") for k in own]
            return sides + [(f"{name}.{k}", 0, "stat") for k in stats], 1, False
        if isinstance(module, nn.LayerNorm):
            if len(module.normalized_shape) != 1:
                raise _Unprunable(f"{name!r} normalises over several dimensions")
            return [(f"{name}.{k}", 0, "affine") for k in own], 1, True
        if isinstance(module, nn.GroupNorm):
            return [(f"{name}.{k}", 0, "affine") for k in own], module.num_groups, True
        if isinstance(module, nn.PReLU):
            return [(f"{name}.weight", 0, "affine")] if module.num_parameters > 1 else [], 1, False
        raise _Unprunable(f"{name!r} is a {type(module).__name__}, which cannot be sliced yet")

    def _loose(self, parameter: nn.Parameter, node: Any) -> tuple[list[tuple[str, int, Role]], int, bool]:
        """A parameter used outside any known layer: a position embedding, a layer scale, a custom norm's gain."""
        if any(parameter is leaf for leaf in self.walker.inputs):
            raise _Unprunable("its channels are added to the model's input")
        name = self.parameters[id(parameter)]
        if name in self.tied:
            raise _Unprunable(f"parameter {name!r} is shared by several layers")
        scales = any("Mul" in str(getattr(out.module, "_grad_fn", "")) for out in node.outputs)
        pools = "norm" in type(self.owners[name]).__name__.lower()
        return [(name, node.pruning_dim, "affine" if scales or pools else "produce")], 1, pools

    def _member(
        self, param: str, dim: int, role: Role, entries: list[int], units: list[int], width: int, bundles: int
    ) -> Member:
        """The index of one tensor side, `(units, entries)`, or the reason why there is none."""
        layer, _, key = param.rpartition(".")
        tensor_size = int(getattr(self.model.get_submodule(layer), key).shape[dim])
        per_bundle = width // bundles
        table: list[set[int]] = [set() for _ in range(per_bundle)]
        # The weight of a grouped convolution holds the in-channels of one group only.
        folds = bundles > 1 and role == "consume" and tensor_size == per_bundle
        for entry, unit in zip(entries, units, strict=True):
            if not 0 <= unit < width:
                raise _Unprunable("the dependency graph loses track of its channels")
            table[unit % per_bundle].add(entry % per_bundle if folds else entry)
        sizes = {len(row) for row in table}
        if len(sizes) != 1 or 0 in sizes:
            raise _Unprunable(f"only part of its channels reach {param!r}")
        index = torch.tensor([sorted(row) for row in table], dtype=torch.int64)
        if int(index.max()) >= tensor_size or index.unique().numel() != index.numel():
            raise _Unprunable(f"its channels cannot be mapped to entries of {param!r}")
        identity = index.shape[1] == 1 and torch.equal(index.flatten(), torch.arange(tensor_size))
        return Member(param, dim, None if identity else index, role)
