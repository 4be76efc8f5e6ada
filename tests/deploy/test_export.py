"""Files for other runtimes: what they compute, what is refused, what is left behind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests.helpers import NAMES, assert_same_state, built, outputs, plan_without, random_gone
from tpvprune.deploy import export as exporting
from tpvprune.deploy import runtime
from tpvprune.zoo.models import load_weights

FILES = {"onnx": "model.onnx", "torch-export": "model.pt2", "timm-state-dict": "model.safetensors"}


SINGLE = 1e-5
"""Relative to the largest output: float32 sums in another order."""


def pruned(name: str) -> nn.Module:
    """In float32, as onnxruntime has no float64 kernel for most operators."""
    b = built(name)
    return tp.apply(b.model, plan_without(b.graph, random_gone(b.graph, 0))).float()


def run_again(kind: str, file: Path, model: nn.Module, inputs: Tensor) -> Tensor:
    """What a file gives, read without anything of `deploy`."""
    if kind == "onnx":
        ort = pytest.importorskip("onnxruntime")
        session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
    if kind == "torch-export":
        return torch.export.load(file).module()(inputs)
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data.fill_(0.5)
    load_weights(twin, file)
    return outputs(twin, inputs)


@pytest.mark.parametrize("kind", list(FILES))
@pytest.mark.parametrize("name", ["mlp", "conv_bn"])
def test_a_file_gives_what_the_model_gives_at_any_batch(name: str, kind: str, tmp_path: Path) -> None:
    b, small = built(name), pruned(name)
    before = copy.deepcopy(small.state_dict())
    small.train()
    told = tp.export(small, tmp_path / FILES[kind], b.inputs[:1].float(), dense=copy.deepcopy(b.model).float())
    assert all(module.training for module in small.modules())
    assert_same_state(small.state_dict(), before)
    assert told.format == kind
    assert told.difference <= SINGLE * told.largest
    assert told.bytes == (tmp_path / FILES[kind]).stat().st_size
    assert told.params == sum(p.numel() for p in small.parameters())
    assert told.dense_params == sum(p.numel() for p in b.model.parameters()) > told.params
    if kind == "timm-state-dict":  # the other files of nets this small hold little but their headers
        assert told.dense_bytes > told.bytes
    assert [p.name for p in tmp_path.iterdir()] == [FILES[kind]]
    small.eval()
    for count in (1, 3, 4):
        inputs = torch.randn(count, *b.inputs.shape[1:], dtype=torch.float32)
        torch.testing.assert_close(
            run_again(kind, tmp_path / FILES[kind], small, inputs), outputs(small, inputs), rtol=SINGLE, atol=SINGLE
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(FILES))
@pytest.mark.parametrize("name", NAMES)
def test_all_kinds_of_networks(name: str, kind: str, tmp_path: Path) -> None:
    told = tp.export(pruned(name), tmp_path / FILES[kind], built(name).inputs.float())
    assert told.difference <= SINGLE * told.largest


class Altered(nn.Module):
    """Leaves a trace of which outputs are whose."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"a": self.inner(x) * scale, "b": self.inner(x) + 1}


@pytest.mark.parametrize("kind", list(FILES))
def test_several_inputs_and_outputs(kind: str, tmp_path: Path) -> None:
    b = built("mlp")
    inputs, scale = b.inputs.float(), torch.rand(len(b.inputs), 1)
    for example in ((inputs, scale), {"x": inputs, "scale": scale}):
        told = tp.export(Altered(copy.deepcopy(b.model).float()), tmp_path / FILES[kind], example)
        assert told.difference <= SINGLE * told.largest


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    b = built("mlp")
    (tmp_path / "model.pt2").write_text("before")
    whole = exporting._write

    def wrong(kind, model, arguments, file):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[4].bias[0] += amount
        whole(kind, other, arguments, file)

    monkeypatch.setattr(exporting, "_write", wrong)
    for change in (1e-2, torch.nan):
        amount = change
        with pytest.raises(tp.ExportError, match=r"differ from the model's by up to .*was not written"):
            tp.export(b.model, tmp_path / "model.pt2", b.inputs)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("model.pt2", "before")]
    amount = 1e-2
    assert tp.export(b.model, tmp_path / "model.pt2", b.inputs, tolerance=0.1).difference == pytest.approx(1e-2)


class Shape(nn.Module):
    """Looks at how many rows there are."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) if len(x) > 3 else x.flatten(1)[:, 0] * 2


def test_what_cannot_be_exported_says_so_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(tp.ModelError, match="Shape cannot be written as torch-export with a free batch"):
        tp.export(Shape(), tmp_path / "model.pt2", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", list(FILES))
def test_a_model_that_does_not_run_on_the_example_is_told_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    model, x = copy.deepcopy(built("mlp").model).float(), built("mlp").inputs.float()
    with pytest.raises(tp.ModelError, match=r"Sequential does not run on .*\(1, 6\) and \(1,\).*give the images alone"):
        tp.export(model, tmp_path / FILES[kind], (x, torch.zeros(len(x))))
    with pytest.raises(tp.ModelError, match=r"does not run on .*same dtype.*check the input size, channels and dtype$"):
        tp.export(model, tmp_path / FILES[kind], x.double())
    assert not list(tmp_path.iterdir())


class Number(nn.Module):
    """Gives what no file can be compared by."""

    def __init__(self, empty: bool) -> None:
        super().__init__()
        self.fc, self.empty = nn.Linear(3, 2), empty

    def forward(self, x: Tensor) -> float | Tensor:
        return self.fc(x)[:, :0] if self.empty else 3.0


@pytest.mark.parametrize("kind", list(FILES))
def test_a_model_that_gives_no_tensor_is_told(kind: str, tmp_path: Path) -> None:
    for empty, told in ((False, "Number returns a float, "), (True, "Number returns a Tensor, ")):
        with pytest.raises(tp.ModelError, match=f"{told}in which there is no tensor .*wrap it in a module"):
            tp.export(Number(empty), tmp_path / FILES[kind], torch.randn(2, 3))


class Counted(nn.Module):
    """Gives a number beside its tensor, which ONNX has no place for."""

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"y": x * 2, "n": 3}


def test_exporters_are_told_by_their_innermost_cause(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(tp.ModelError, match=r"Counted cannot be .* onnx .*: AttributeError: 'int' object") as told:
        tp.export(Counted(), tmp_path / "model.onnx", torch.randn(2, 4))
    assert "\x1b" not in str(told.value)


def test_what_an_exporter_says_is_plain() -> None:
    outer = RuntimeError("step 1/3")
    outer.__cause__ = ValueError("\n  \x1b[96mno such\x1b[0m operator\nmore")
    assert runtime.said_by(outer) == "ValueError: no such operator"
    assert runtime.said_by(KeyError()) == "KeyError"
    assert runtime.said_by(tp.ModelError("a sentence")) == "a sentence"


def test_an_operator_that_onnxruntime_lacks_is_named(tmp_path: Path) -> None:
    b = built("mlp")
    with pytest.raises(tp.ModelError, match=r"onnxruntime cannot run .*Erf.*\.float\(\)"):
        tp.export(b.model, tmp_path / "model.onnx", b.inputs)
    assert not list(tmp_path.iterdir())


def test_formats_are_named_or_told_by_the_suffix(tmp_path: Path) -> None:
    b = built("mlp")
    with pytest.raises(tp.InputError, match=r"'.bin' is no format; give format= one of onnx, torch-export"):
        tp.export(b.model, tmp_path / "model.bin", b.inputs)
    assert tp.export(b.model, tmp_path / "model.bin", b.inputs, format="timm-state-dict").bytes > 0


def test_missing_packages_are_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = runtime.find_spec
    monkeypatch.setattr(runtime, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(tp.InputError, match=r"ONNX needs onnxruntime; python -m pip install 'tpvprune\[export\]'"):
        tp.export(built("mlp").model, tmp_path / "model.onnx", built("mlp").inputs)
    assert not list(tmp_path.iterdir())


def test_rows_are_made_unlike_each_other() -> None:
    (rows,), named = exporting.rows_of(((torch.arange(6.0).reshape(2, 3),), {"n": 3}), 5)
    assert named == {"n": 3}
    assert rows.tolist() == [[0, 1, 2], [3, 4, 5], [2, 0, 1], [5, 3, 4], [1, 2, 0]]
    with pytest.raises(tp.ModelError, match="holds no row"):
        exporting.rows_of(((torch.zeros(0, 3),), {}), 2)


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_half_precision_is_compared_by_its_own_roundings(kind: str, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    small, inputs = pruned("conv_bn").half(), built("conv_bn").inputs.half()
    told = tp.export(small, tmp_path / FILES[kind], inputs)
    assert told.tolerance == 4 * torch.finfo(torch.float16).eps
    assert told.difference <= told.tolerance * told.largest
