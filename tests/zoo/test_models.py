from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import tpvprune as tp
from tests.helpers import Versioned, assert_same_state
from tpvprune.zoo.cifar import CIFAR_RESNETS
from tpvprune.zoo.models import build_source, create_model, load_weights, source_of


def test_names_build_models_in_eval_mode() -> None:
    for name, kind in (("test_resnet", "ResNet"), ("cifar_resnet20", "CifarResNet")):
        model = create_model(name, args={"num_classes": 5})
        assert type(model).__name__ == kind
        assert not model.training
        assert model.num_classes == 5


@pytest.mark.parametrize("name", ["test_resnet", "cifar_resnet20"])
def test_random_weights_are_those_of_a_seed_and_leave_the_callers_stream_alone(name: str) -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    first = create_model(name)
    assert torch.equal(torch.rand(3), wanted)
    assert_same_state(first.state_dict(), create_model(name).state_dict())
    other = create_model(name, seed=1)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize(("name", "near"), [("test_resnett", "test_resnet"), ("cifar_resnet21", "cifar_resnet20")])
def test_unknown_names_come_with_near_ones(name: str, near: str) -> None:
    with pytest.raises(tp.ModelError, match=f"no model '{name}'; did you mean .*{near}"):
        create_model(name)


@pytest.mark.parametrize("name", ["test_resnet", "cifar_resnet20"])
def test_wrong_arguments_are_told(name: str) -> None:
    with pytest.raises(tp.ModelError, match="cannot be built with"):
        create_model(name, args={"nonsense": 1})


@pytest.mark.parametrize("name", sorted(CIFAR_RESNETS))
def test_cifar_resnets_have_their_depth(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
        weighted = [
            n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in n
        ]
        assert len(weighted) == int(name.removeprefix("cifar_resnet"))
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)


def test_the_source_is_remembered_by_copies_and_pruned_copies() -> None:
    model = create_model("cifar_resnet20", args={"num_classes": 5})
    source = source_of(model)
    assert source == {"tpvprune": "cifar_resnet20", "args": {"num_classes": 5}}
    small = tp.apply(model, tp.Plan({}, tp.trace(model, torch.randn(1, 3, 32, 32))))
    assert source_of(small) == source
    assert build_source(source).num_classes == 5
    assert source_of(timm.create_model("test_resnet", num_classes=9)) == {
        "timm": "test_resnet",
        "args": {"num_classes": 9},
    }
    assert source_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("source", [{}, {"timm": 3}, {"timm": "test_resnet", "args": 4}])
def test_a_source_that_is_none_is_refused(source: dict[str, object]) -> None:
    with pytest.raises(tp.CheckpointError, match="names no model"):
        build_source(source)


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return create_model("test_resnet", args={"num_classes": 5}), create_model("test_resnet", args={"num_classes": 5})


@pytest.mark.parametrize("kind", ["safetensors", "pth", "nested", "ema"])
def test_weights_are_read_as_timm_reads_them(kind: str, tmp_path: Path) -> None:
    model, other = pair()
    state = model.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pth":
        torch.save(state, path)
    elif kind == "nested":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    else:
        torch.save({"state_dict": other.state_dict(), "state_dict_ema": state}, path)
    load_weights(other, path)
    assert_same_state(other.state_dict(), state)


def test_weights_of_modules_that_ask_for_a_version_are_read(tmp_path: Path) -> None:
    model, other = (nn.Sequential(Versioned(3, 2)) for _ in range(2))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert_same_state(other.state_dict(), model.state_dict())


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code from a checkpoint was run')",)


@pytest.mark.parametrize("what", ["missing", "text", "empty", "code", "list", "shape", "lacks", "extra"])
def test_bad_weights_are_refused_and_change_nothing(what: str, tmp_path: Path) -> None:
    model, other = pair()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    path, state = tmp_path / "w.pth", dict(model.state_dict())
    match = {
        "missing": "no checkpoint at",
        "code": "would have to run code",
        "list": "holds no state dict|cannot be read",
    }
    match |= {
        "shape": "'fc.bias' is \\(4,\\)",
        "lacks": "lacks 1 tensors \\(fc.bias\\)",
        "extra": "has 1 the model does not",
    }
    if what == "text":
        path.write_text("not at all")
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "code":
        torch.save({"state_dict": state, "more": Code()}, path)
    elif what == "list":
        torch.save([1, 2], path)
    elif what == "shape":
        torch.save({**state, "fc.bias": torch.ones(4)}, path)
    elif what == "lacks":
        torch.save({k: v for k, v in state.items() if k != "fc.bias"}, path)
    elif what == "extra":
        torch.save({**state, "fc.more": torch.ones(4)}, path)
    with pytest.raises(tp.CheckpointError, match=match.get(what, "cannot be read")):
        load_weights(other, path)
    assert_same_state(other.state_dict(), before)


def test_a_bare_pickle_is_not_unpickled(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Code()))
    with pytest.raises(tp.CheckpointError):
        load_weights(pair()[0], tmp_path / "w.pth")
