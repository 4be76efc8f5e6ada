"""Save and load a pruned model without pickled code.

A folder holds `plan.json` (what was removed), `model.safetensors` (what is left) and `tpvprune.json` (how to
build the dense original, versions, digests); for people and hubs also `README.md` (a model card) and `config.json` (as
timm writes it), which loading does not read. Loading builds the original with random weights, removes
the same units, and fills in the weights: all of it, or nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from tpvprune.batches import evaluation_mode
from tpvprune.card import name_of, write_card, write_config
from tpvprune.errors import CheckpointError, ModelError, PlanError
from tpvprune.files import write_bytes, write_text
from tpvprune.kinds import as_verb
from tpvprune.plan import Plan, attach, plan_of
from tpvprune.statedicts import fill
from tpvprune.surgery.removal import apply
from tpvprune.types import read_json
from tpvprune.version import __version__
from tpvprune.zoo.data import input_size
from tpvprune.zoo.models import build_source, remember_source, source_of, was_recorded

logger = logging.getLogger(__name__)
FORMAT = 1
ABOUT, WEIGHTS, PLAN = "tpvprune.json", "model.safetensors", "plan.json"


@as_verb
def save(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Write a pruned model as plan, weights and description; each file appears whole or not at all.

    Args:
        model: from `apply`, `recover` or `load`; carries its plan.
        folder: created if missing; a model saved there before is replaced, and its card, unless somebody took its
            mark out.

    Raises:
        CheckpointError: the model carries no plan, or parameters of other shapes than it leaves; weights that it holds
            at zero are not; or the folder cannot be written.
    """
    plan = plan_of(model)
    if plan is None:
        raise CheckpointError("this model carries no plan; save what apply(), recover() or load() returned")
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    for name, mask in plan.weight_masks().items():
        moved = int((tensors[name][~mask] != 0).sum())
        if moved:
            raise CheckpointError(
                f"{moved} weights of {name!r} are not zero, and the plan holds them at zero; call "
                "tpvprune.Masks(model).weights() after each step of your training, or now"
            )
    _check_shapes(model, plan)
    weights = save_tensors(tensors)
    plan_text = json.dumps(plan.to_json())
    source = _description(model, plan)
    about = {
        "format": FORMAT,
        "model": source,
        "versions": {"tpvprune": __version__, "torch": torch.__version__, "timm": timm.__version__},
        "digest": {WEIGHTS: _digest(weights), PLAN: _digest(plan_text.encode())},
        "params": plan.params,
        "macs": plan.macs,
        "dtypes": {name: str(buffer.dtype).removeprefix("torch.") for name, buffer in _computed(model).items()},
    }
    target = Path(folder)
    try:
        write_bytes(target / WEIGHTS, weights)
        write_bytes(target / PLAN, plan_text.encode())
        write_card(target, plan, source)
        write_config(target, model, source)
        write_text(target / ABOUT, json.dumps(about, indent=2))  # last: it vouches for the weights and the plan
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {error.filename or folder}: {error.strerror or error}; make room there, or choose "
            "another folder"
        ) from error


def _check_shapes(model: nn.Module, plan: Plan) -> None:
    """Refuse a model whose parameters are not those that its plan leaves: nothing could load it.

    Raises:
        CheckpointError: names one that is not.
    """
    left = plan.graph.sizes(plan.keep)
    wanted = {name: left[name] for name in plan.graph.parameters if left[name] != (0,)}
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = next((name for name in {**wanted, **found} if wanted.get(name) != found.get(name)), None)
    if wrong is not None:
        raise CheckpointError(
            f"{wrong!r} is {found.get(wrong, 'missing')} in the model and {wanted.get(wrong, 'unknown')} by its plan: "
            "it was changed after the cut; change the dense model, and plan anew"
        )


def _description(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """How to build the dense original, if that can be done by name; what it looked like, if not."""
    source, unknown = source_of(model), {"class": f"{type(model).__module__}.{type(model).__qualname__}"}
    if source is None:
        return unknown
    try:
        weight = next(model.parameters())
        twin = apply(build_source(source), plan).to(weight.device, weight.dtype)
        # The tensors themselves, and not copies: in another layout half precision rounds otherwise.
        twin.load_state_dict(model.state_dict(), assign=True)
    except (PlanError, ModelError, RuntimeError) as error:
        logger.info("cannot be rebuilt by name: %s", error)
        return unknown
    alike = _answers_alike(model, twin)
    if alike is False:
        logger.warning(
            "%s was changed since it was built, and is no model of that name any more: it takes a skeleton to load",
            name_of(source),
        )
    if not alike and (alike is False or not was_recorded(model)):
        return unknown
    if _drops(twin) != _drops(model):
        logger.warning(
            "%s is built by name when it is loaded, and trains with other dropout then; to train on, give "
            "load(skeleton=) a model with that of this one",
            name_of(source),
        )
    return source


def _drops(model: nn.Module) -> dict[str, float]:
    """Rates of dropout and stochastic depth, which answers in eval mode say nothing of."""
    keys, named = ("p", "drop_prob", "drop_rate"), model.named_modules()
    rates = {f"{name}.{key}": getattr(module, key, None) for name, module in named for key in keys}
    return {name: float(rate) for name, rate in rates.items() if isinstance(rate, (int, float)) and rate}


def image_shape(model: nn.Module) -> tuple[int, ...]:
    """Shape of one input: of what the model's plan was traced on, or `(channels, height, width)` as timm says."""
    plan = plan_of(model)
    return plan.graph.inputs[0] if plan is not None and plan.graph.inputs else input_size(model)


@torch.no_grad()
def _answers_alike(model: nn.Module, twin: nn.Module) -> bool | None:
    """Whether two models are the same function, whose arguments need leave no shape behind; None if nothing tells."""
    weight = next(model.parameters())
    inputs = torch.randn(2, *image_shape(model), generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(weight.device, weight.dtype)
    with evaluation_mode(model, twin):
        try:
            mine, theirs = model(inputs), twin(inputs)
        except RuntimeError as error:  # it does not run here
            logger.info("cannot be compared with what its name builds: %s", error)
            return None
    if not (isinstance(mine, Tensor) and isinstance(theirs, Tensor)):
        return None
    return torch.allclose(mine, theirs, 1e-4, 1e-5, equal_nan=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@as_verb
def load(folder: str | PathLike[str], *, skeleton: nn.Module | None = None) -> nn.Module:
    """Rebuild a saved model, in eval mode on the CPU, without unpickling or importing anything named in it.

    Parameters and buffers have the precision they were saved in, computed buffers that no file holds too.

    Args:
        folder: written by `save`.
        skeleton: the dense original with any weights, for a model that is not known by name. It is left
            as it was.

    Raises:
        CheckpointError: a file is missing, damaged, of another format or version, does not match the
            others, or the skeleton is needed.
        PlanError: the skeleton is not the dense original.
    """
    source = Path(folder)
    about = _about(source)
    contents = {name: _verified(source, name, about) for name in (WEIGHTS, PLAN)}
    try:
        plan = Plan.from_json(json.loads(contents[PLAN]))
        tensors = load_tensors(contents[WEIGHTS])
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    if skeleton is None:
        described = about["model"]
        if "timm" not in described and "tpvprune" not in described:
            raise CheckpointError(
                f"{folder} holds a {described.get('class', 'model')}, which is not known by name; "
                "build the dense original yourself and pass load(folder, skeleton=make_model())"
            )
        skeleton = build_source(described)
    model = apply(skeleton, plan)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = next(n for n in {**expected, **found} if expected.get(n) != found.get(n))
        raise CheckpointError(
            f"{folder}: {wrong!r} is {found.get(wrong, 'missing')} in {WEIGHTS} and {expected.get(wrong, 'unknown')} "
            "in the plan's model; nothing was loaded"
        )
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()} | _dtypes(about, model)
    for module_name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{module_name}.{key}" if module_name else key
            if tensor is not None and tensor.dtype != dtypes.get(name, tensor.dtype):
                tensor.data = tensor.data.to(dtypes[name])
    fill(model, tensors)
    attach(model, plan)
    if "class" not in about["model"]:
        remember_source(model, about["model"])
    return model.eval()


def _computed(model: nn.Module) -> dict[str, Tensor]:
    """Floating buffers that no file holds: the model computes them as it is built, in float32."""
    held = model.state_dict().keys()
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name: buffer for name, buffer in buffers.items() if name not in held and buffer.is_floating_point()}


def _dtypes(about: Mapping[str, Any], model: nn.Module) -> dict[str, torch.dtype]:
    """Of floating buffers that no file holds, the types they had; none in folders that do not say."""
    told = about.get("dtypes") or {}
    found = {name: getattr(torch, str(told[name]), None) for name in _computed(model) if name in told}
    return {name: kind for name, kind in found.items() if isinstance(kind, torch.dtype) and kind.is_floating_point}


def _about(source: Path) -> Mapping[str, Any]:
    if not (source / ABOUT).is_file():
        raise CheckpointError(f"{source} holds no {ABOUT}; give a folder that tpvprune saved")
    try:
        about = read_json(source / ABOUT, "description")
    except PlanError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(about, Mapping) or about.get("format") != FORMAT:
        raise CheckpointError(f"{source / ABOUT} is not of format {FORMAT}, the one this version of tpvprune reads")
    if not isinstance(about.get("model"), Mapping) or not isinstance(about.get("digest"), Mapping):
        raise CheckpointError(f"{source / ABOUT} lacks its model or its digests; save the model again")
    return about


def _verified(source: Path, name: str, about: Mapping[str, Any]) -> bytes:
    try:
        data = (source / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{source / name} cannot be read: {error.strerror or error}") from error
    if _digest(data) != about["digest"].get(name):
        raise CheckpointError(
            f"{source / name} is not the file that was saved (its digest differs); copy or save the folder again"
        )
    return data
