"""Build a model by name, with weights from a file, and remember how it was built."""

from __future__ import annotations

import difflib
import logging
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn

from tpvprune.errors import CheckpointError, ModelError
from tpvprune.files import packaged
from tpvprune.statedicts import fill
from tpvprune.zoo.cifar import CIFAR_RESNETS, CifarResNet

BUILTIN = "builtin:"
FORBIDDEN = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable"}
_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
)
_SOURCE = "_tpvprune_source"


def create_model(
    name: str, checkpoint: str | Path | None = None, args: Mapping[str, Any] | None = None, seed: int = 0
) -> nn.Module:
    """Build a timm model or a CIFAR ResNet (`cifar_resnet20`), in eval mode.

    Args:
        name: a timm model name, or one of the CIFAR ResNets.
        checkpoint: `.safetensors`, `.pth` or `.pth.tar`, read as timm does and without running any code
            from it; `builtin:NAME` for one that ships with the package. None leaves random weights.
        args: further keyword arguments of the model.
        seed: of random weights, which are the same each time; the caller's stream of random numbers stays where it is.

    Raises:
        ModelError: no such model (with near names), or wrong arguments.
        CheckpointError: the weights are missing, corrupt, of another shape, or need code execution.
    """
    args = dict(args or {})
    refused = sorted(FORBIDDEN.intersection(args))
    if refused:
        raise ModelError(f"model argument {refused[0]!r} is not taken; give weights as the checkpoint")
    try:
        with _drawn_from(seed):
            if name in CIFAR_RESNETS:
                model: nn.Module = CifarResNet(CIFAR_RESNETS[name], **args)
            elif is_model(name):
                model = timm.create_model(name, pretrained=False, **args)
            else:
                raise ModelError(f"there is no model {name!r}{near_models(name)}")
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"model {name!r} cannot be built with {args or 'its defaults'}: {error}") from error
    if checkpoint is not None:
        load_weights(model, checkpoint)
    remember_source(model, {"timm" if name not in CIFAR_RESNETS else "tpvprune": name, "args": args})
    return model.eval()


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """Torch's random numbers on the CPU from a seed; afterwards they go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would move those of GPUs too
        yield


def remember_source(model: nn.Module, source: Mapping[str, Any]) -> None:
    """Let a model carry how its dense original is built; copies and pruned copies carry it too."""
    object.__setattr__(model, _SOURCE, dict(source))


def is_model(name: str) -> bool:
    """Whether `create_model` knows a name."""
    return timm.is_model(name) or name in CIFAR_RESNETS


def near_models(name: str) -> str:
    """`; did you mean ...?` with models whose names are like this one."""
    names = [*timm.list_models(), *CIFAR_RESNETS]
    near = difflib.get_close_matches(name, names, n=3) or [n for n in names if name.split("_")[0] in n][:3]
    return f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() names what there is"


def source_of(model: nn.Module) -> dict[str, Any] | None:
    """How to build a model's dense original: what `create_model` was given, or what timm itself recorded.

    None for a module that is neither; such a model needs a skeleton to be loaded again.
    """
    recorded = model.__dict__.get(_SOURCE)
    if isinstance(recorded, dict):
        return dict(recorded)
    config = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if isinstance(config, Mapping) else None
    if not architecture or not timm.is_model(architecture):
        return None
    args = {}
    if getattr(model, "num_classes", config.get("num_classes")) != config.get("num_classes"):  # type: ignore[union-attr]
        args["num_classes"] = model.num_classes
    return {"timm": architecture, "args": args}


def was_recorded(model: nn.Module) -> bool:
    """Whether `source_of` is what the model was built with, and not a guess from what timm remembers."""
    return isinstance(model.__dict__.get(_SOURCE), dict)


def build_source(source: Mapping[str, Any]) -> nn.Module:
    """Build the dense original that `source_of` described, with random weights.

    Raises:
        CheckpointError: the description names no known kind of model.
        ModelError: the model cannot be built.
    """
    name = source.get("timm") or source.get("tpvprune")
    if not isinstance(name, str) or not isinstance(source.get("args", {}), Mapping):
        raise CheckpointError(f"the model description {dict(source)!r} names no model")
    return create_model(name, args=source.get("args"))


def _needs_code(path: Path) -> bool:
    """Whether a refused file is a whole pickle that names things to import, and not just damaged; runs nothing."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
        else:
            data = path.read_bytes()
        return any(op.name in ("GLOBAL", "STACK_GLOBAL", "INST") for op, _, _ in pickletools.genops(data))
    except (ValueError, OSError, StopIteration, zipfile.BadZipFile, IndexError, KeyError, UnicodeDecodeError):
        return False


def checkpoint_path(checkpoint: str | Path) -> Path:
    """The file a checkpoint's name stands for.

    Raises:
        CheckpointError: there is no such file.
    """
    text = str(checkpoint)
    if text.startswith(BUILTIN):
        found = Path(str(packaged("recipes.checkpoints"))) / text[len(BUILTIN) :]
    else:
        found = Path(text).expanduser()
    if not found.is_file():
        raise CheckpointError(f"no checkpoint at {text}; give a .safetensors, .pth or .pth.tar file")
    return found


def load_weights(model: nn.Module, checkpoint: str | Path) -> None:
    """Load weights as timm reads them (EMA first, prefixes stripped), all or nothing.

    Raises:
        CheckpointError: missing or corrupt file, names or shapes that differ, or a pickle that needs code.
    """
    path = checkpoint_path(checkpoint)
    logger = logging.getLogger("timm.models._helpers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old pickle protocols; what matters is raised
            state = timm.models.load_state_dict(str(path), weights_only=True)
    except _UNREADABLE as error:
        if isinstance(error.__cause__ or error, pickle.UnpicklingError) and _needs_code(path):
            raise CheckpointError(
                f"{path} holds pickled objects that would have to run code to load; "
                "save its state dict as .safetensors and give that"
            ) from error
        raise CheckpointError(
            f"{path} cannot be read ({type(error.__cause__ or error).__name__}); the file is damaged or no checkpoint; "
            "give another one, with the model's state dict"
        ) from error
    finally:
        logger.setLevel(level)
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(
            f"{path} holds no state dict of tensors; save model.state_dict(), alone or as 'state_dict', and give that"
        )
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name in state and state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name!r} is {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}; "
                "choose the model or its args (num_classes, in_chans, img_size) to match"
            )
    missing = [n for n in expected if n not in state and not n.endswith("num_batches_tracked")]
    extra = [n for n in state if n not in expected]
    if missing or extra:
        told = [f"lacks {len(missing)} tensors ({', '.join(missing[:3])})"] if missing else []
        told += [f"has {len(extra)} the model does not know ({', '.join(extra[:3])})"] if extra else []
        raise CheckpointError(f"{path} {' and '.join(told)}; is it of another model?")
    fill(model, state, strict=False)
