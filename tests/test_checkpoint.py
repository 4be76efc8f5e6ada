from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.cases import CASES
from tests.helpers import NAMES, Versioned, assert_same_state, built, gap, outputs, plan_without, random_gone
from tpvprune.plan import plan_of
from tpvprune.zoo.models import create_model

NEEDED = {"tpvprune.json", "plan.json", "model.safetensors"}
FILES = {*NEEDED, "README.md", "config.json"}


def skeleton(name: str) -> nn.Module:
    """The same architecture with other weights."""
    model = CASES[name]().model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    b = built("conv_bn")
    tp.save(tp.apply(b.model, plan_without(b.graph, random_gone(b.graph, 0))), tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_module_comes_back_with_a_skeleton(name: str, tmp_path: Path) -> None:
    b = built(name)
    small = tp.apply(b.model, plan_without(b.graph, random_gone(b.graph, 0)))
    tp.save(small, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES
    bones = skeleton(name)
    state = {k: v.clone() for k, v in bones.state_dict().items()}
    back = tp.load(tmp_path / "out", skeleton=bones)
    assert_same_state(bones.state_dict(), state)
    assert_same_state(back.state_dict(), small.state_dict())
    assert torch.equal(outputs(back, b.inputs), outputs(small, b.inputs))
    assert plan_of(back).diff(plan_of(small)) == {}
    assert not back.training
    assert tp.apply(back, tp.Plan({}, tp.trace(back, b.inputs)))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("test_resnet", timm.create_model),
        ("test_vit", timm.create_model),
        ("test_resnet", create_model),
        ("test_vit", create_model),
        ("cifar_resnet20", create_model),
    ],
)
def test_a_model_known_by_name_comes_back_by_name(name: str, make: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = make(name, args={"num_classes": 7}) if make is create_model else make(name, num_classes=7).eval()
    side = model.pretrained_cfg["input_size"][1] if "vit" in name else 32
    inputs = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    graph = tp.trace(model, inputs[:1])
    small = tp.apply(model, plan_without(graph, random_gone(graph, 0)))
    tp.save(small, tmp_path)
    back = tp.load(tmp_path)
    assert type(back) is type(model)
    assert_same_state(back.state_dict(), small.state_dict())
    assert gap(outputs(back, inputs), outputs(small, inputs)) < tolerances.FLOAT32
    tp.save(back, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert_same_state(tp.load(tmp_path / "again").state_dict(), small.state_dict())


def test_saving_and_loading_leave_the_stream_of_random_numbers_alone(tmp_path: Path) -> None:
    model = create_model("test_resnet")
    small = tp.apply(model, tp.Plan({}, tp.trace(model, torch.zeros(1, 3, 32, 32))))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    tp.save(small, tmp_path)
    tp.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_composed_plan_is_saved_whole(tmp_path: Path) -> None:
    b = built("residual")
    once = tp.apply(b.model, plan_without(b.graph, {"stem": [0], "a1": [1]}))
    twice = tp.apply(once, plan_without(tp.trace(once, b.inputs), {"stem": [2], "b1": [0]}))
    tp.save(twice, tmp_path)
    back = tp.load(tmp_path, skeleton=skeleton("residual"))
    assert_same_state(back.state_dict(), twice.state_dict())


def test_recovered_models_and_other_precisions_survive(tmp_path: Path) -> None:
    b = built("conv_bn")
    small = tp.apply(b.model, plan_without(b.graph, {"conv1": [0]}))
    for number, model in enumerate((tp.reconstruct(small, [b.inputs], b.model), small.half())):
        tp.save(model, tmp_path / str(number))
        back = tp.load(tmp_path / str(number), skeleton=skeleton("conv_bn"))
        assert_same_state(back.state_dict(), model.state_dict())
        assert [p.dtype for p in back.parameters()] == [p.dtype for p in model.parameters()]


def test_states_of_modules_that_ask_for_a_version_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(Versioned(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    small = tp.apply(model, plan_without(tp.trace(model, torch.randn(2, 4)), {"0": [1, 4]}))
    tp.save(small, tmp_path)
    bones = nn.Sequential(Versioned(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert_same_state(tp.load(tmp_path, skeleton=bones).state_dict(), small.state_dict())


def test_saving_again_replaces(saved: Path) -> None:
    b = built("conv_bn")
    other = tp.apply(b.model, plan_without(b.graph, {"conv2": [4]}))
    tp.save(other, saved)
    assert_same_state(tp.load(saved, skeleton=skeleton("conv_bn")).state_dict(), other.state_dict())
    assert {p.name for p in saved.iterdir()} == FILES


def test_a_model_without_a_plan_is_not_saved(tmp_path: Path, mlp) -> None:
    with pytest.raises(tp.CheckpointError, match="carries no plan"):
        tp.save(mlp.model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, mlp) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(tp.CheckpointError, match="cannot write to"):
        tp.save(tp.apply(mlp.model, tp.Plan({}, mlp.graph)), tmp_path / "file")


def test_a_plain_module_needs_a_skeleton(saved: Path) -> None:
    with pytest.raises(tp.CheckpointError, match=r"ConvBN.*skeleton=make_model\(\)"):
        tp.load(saved)


@pytest.mark.parametrize("other", ["mlp", "residual"])
def test_a_wrong_skeleton_is_refused(saved: Path, other: str) -> None:
    with pytest.raises(tp.InputError, match="does not fit"):
        tp.load(saved, skeleton=skeleton(other))


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "append", "empty"])
def test_tampered_files_are_refused(saved: Path, name: str, how: str) -> None:
    data = bytearray((saved / name).read_bytes())
    if how == "flip":
        data[-3] ^= 1
    elif how == "append":
        data += b" "
    else:
        data = data[: len(data) // 2] if how == "cut" else bytearray()
    (saved / name).write_bytes(data)
    with pytest.raises(tp.CheckpointError, match=f"{name} is not the file that was saved"):
        tp.load(saved, skeleton=skeleton("conv_bn"))


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_missing_files_are_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(tp.CheckpointError, match=name):
        tp.load(saved, skeleton=skeleton("conv_bn"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(tp.CheckpointError, match=r"gone holds no tpvprune\.json"):
        tp.load(tmp_path / "gone")


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Replace a file and its digest, as somebody would who wants to be believed."""
    (folder / name).write_bytes(data)
    about = json.loads((folder / "tpvprune.json").read_text())
    about["digest"][name] = hashlib.sha256(data).hexdigest()
    (folder / "tpvprune.json").write_text(json.dumps(about))


def refused(folder: Path, error: type[Exception] = tp.CheckpointError) -> str:
    bones = skeleton("conv_bn")
    state = {k: v.clone() for k, v in bones.state_dict().items()}
    with pytest.raises(error) as caught:
        tp.load(folder, skeleton=bones)
    assert_same_state(bones.state_dict(), state)
    return str(caught.value)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code from a checkpoint was run')",)


def test_pickles_are_not_unpickled(saved: Path) -> None:
    rewrite(saved, "model.safetensors", pickle.dumps(Bomb()))
    assert "cannot be read" in refused(saved)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_match_the_plan_are_refused(saved: Path, change: str, tmp_path: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    if change == "missing":
        del tensors["fc.bias"]
    elif change == "extra":
        tensors["fc.extra"] = torch.ones(1)
    else:
        tensors["fc.bias"] = torch.ones(5)
    save_file(tensors, tmp_path / "other")
    rewrite(saved, "model.safetensors", (tmp_path / "other").read_bytes())
    message = refused(saved)
    assert "fc." in message
    assert "nothing was loaded" in message


def test_a_plan_that_is_none_is_refused(saved: Path) -> None:
    rewrite(saved, "plan.json", b"{}")
    assert "cannot be read" in refused(saved)
    rewrite(saved, "plan.json", b"\xff")
    assert "cannot be read" in refused(saved)


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"format": None}, {"model": None}, {"model": 3}, {"digest": None}, {"digest": {}}],
    ids=str,
)
def test_a_damaged_description_is_refused(saved: Path, change: dict[str, object]) -> None:
    about = json.loads((saved / "tpvprune.json").read_text())
    (saved / "tpvprune.json").write_text(json.dumps(about | change))
    refused(saved)


@pytest.mark.parametrize("text", ["{", "[]", "null", "\0"])
def test_a_description_that_is_none_is_refused(saved: Path, text: str) -> None:
    (saved / "tpvprune.json").write_text(text)
    refused(saved)


@pytest.mark.parametrize(
    "model",
    [
        {"timm": "no_such_model"},
        {"timm": 3},
        {"timm": "test_resnet", "args": {"nonsense": 1}},
        {"timm": "x", "args": 2},
    ],
)
def test_a_model_name_that_is_none_is_refused(saved: Path, model: dict[str, object]) -> None:
    about = json.loads((saved / "tpvprune.json").read_text())
    (saved / "tpvprune.json").write_text(json.dumps(about | {"model": model}))
    with pytest.raises(tp.InputError):
        tp.load(saved)


class Halves(nn.Module):
    """As many parameters whatever the heads."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.out = num_heads, nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)).mean(1)


def test_a_model_of_equal_shapes_and_other_heads_is_refused(tmp_path: Path) -> None:
    four, two = (nn.Sequential(nn.Linear(5, 8), Halves(heads)).double().eval() for heads in (4, 2))
    graph = tp.trace(four, torch.randn(2, 6, 5, dtype=torch.float64))
    plan = plan_without(graph, {"1": [0, 3]})
    tp.save(tp.apply(four, plan), tmp_path)
    assert tp.load(tmp_path, skeleton=four)[1].num_heads == 2
    told = r"does not fit this Sequential: 1\.num_heads should be 4, it is 2; use the model the plan was traced from"
    for use in (lambda: tp.load(tmp_path, skeleton=two), lambda: tp.apply(two, plan), lambda: tp.mask(two, plan)):
        with pytest.raises(tp.PlanError, match=told):
            use()


class Rotating(nn.Module):
    """Computes a table as it is built, which no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("table", torch.linspace(0, 1, 4), persistent=False)
        self.register_buffer("places", torch.arange(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a((x * self.table)[:, self.places]).relu())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("older", [False, True])
def test_buffers_that_no_file_holds_keep_their_precision(kind: torch.dtype, older: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Rotating().eval().to(kind), torch.randn(5, 4).to(kind)
    small = tp.apply(model, plan_without(tp.trace(model, x), {"a": [0, 3]}))
    tp.save(small, tmp_path)
    if older:
        about = json.loads((tmp_path / "tpvprune.json").read_text())
        del about["dtypes"]
        (tmp_path / "tpvprune.json").write_text(json.dumps(about))
    back = tp.load(tmp_path, skeleton=Rotating())
    assert_same_state(back.state_dict(), small.state_dict())
    assert back.places.dtype == torch.int64
    if older:
        assert back.table.dtype == torch.float32
    else:
        assert back.table.dtype == kind
        assert torch.equal(outputs(back, x), outputs(small, x))


def by_name(**args: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, **args).eval()
    graph = tp.trace(model, torch.zeros(1, 3, 64, 64))
    return tp.apply(model, plan_without(graph, {graph.groups[0].id: [0, 3]}))


def with_gelu(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())
    return model


def test_a_model_that_was_changed_into_another_function_is_not_built_by_its_name(tmp_path: Path, caplog) -> None:
    tp.save(by_name(), tmp_path)
    changed, inputs = with_gelu(tp.load(tmp_path)), torch.randn(2, 3, 64, 64)
    assert gap(changed(inputs), tp.load(tmp_path)(inputs)) > 1e-3
    tp.save(changed, tmp_path)
    assert "test_resnet was changed since it was built" in caplog.text
    with pytest.raises(tp.CheckpointError, match="pass load"):
        tp.load(tmp_path)
    bones = with_gelu(timm.create_model("test_resnet", num_classes=10))
    assert torch.equal(tp.load(tmp_path, skeleton=bones)(inputs), changed(inputs))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_a_model_is_known_by_its_name_in_any_layout_and_precision(kind: torch.dtype, tmp_path: Path) -> None:
    small = by_name().to(kind).to(memory_format=torch.channels_last)
    tp.save(small, tmp_path)
    assert_same_state(tp.load(tmp_path).state_dict(), small.state_dict())
    tp.save(with_gelu(small), tmp_path)
    with pytest.raises(tp.CheckpointError, match="pass load"):
        tp.load(tmp_path)


@pytest.mark.parametrize("change", ["another size", "one more", "one less"])
def test_a_model_of_other_shapes_than_its_plan_leaves_is_not_saved(change: str, tmp_path: Path) -> None:
    tp.save(by_name(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    small = tp.load(tmp_path)
    if change == "another size":
        small.reset_classifier(7)
    elif change == "one more":
        small.adapter = nn.Linear(2, 2)
    else:
        small.fc.bias = None
    name = "adapter.weight" if change == "one more" else "fc.bias" if change == "one less" else "fc.weight"
    with pytest.raises(tp.CheckpointError, match=rf"'{name}' is .* was changed after the cut"):
        tp.save(small, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("rates", [{}, {"drop_rate": 0.1}, {"drop_path_rate": 0.2}])
def test_dropout_that_a_name_does_not_tell_is_warned_of(rates: dict[str, float], tmp_path: Path, caplog) -> None:
    tp.save(by_name(**rates), tmp_path)
    assert ("trains with other dropout" in caplog.text) == bool(rates)
    tp.load(tmp_path)
    caplog.clear()
    model = create_model("test_resnet", args={"num_classes": 10, **rates})
    tp.save(tp.apply(model, tp.Plan({}, tp.trace(model, torch.zeros(1, 3, 64, 64)))), tmp_path)
    assert not caplog.text  # what it was made with is in the folder
