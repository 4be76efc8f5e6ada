"""A pruned model where models are used: pickled, copied, compiled, quantised, averaged, trained by processes."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tpvprune as tp
from tests.helpers import NAMES, assert_same_state, built, gap, outputs, plan_without, random_gone
from tpvprune.plan import plan_of


def pruned(name: str) -> nn.Module:
    b = built(name)
    return tp.apply(b.model, plan_without(b.graph, random_gone(b.graph, 0)))


def assert_same_model(twin: nn.Module, small: nn.Module, inputs: Tensor, place: Path) -> None:
    """In outputs and in plan; and the twin can be saved."""
    assert torch.equal(outputs(twin, inputs), outputs(small, inputs))
    assert plan_of(twin).to_json() == plan_of(small).to_json()
    tp.save(twin, place)


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_is_pickled_and_copied_with_its_plan(name: str, tmp_path: Path) -> None:
    small, inputs = pruned(name), built(name).inputs
    for twin in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert_same_model(twin, small, inputs, tmp_path / "out")
    before = outputs(small, inputs)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert torch.equal(outputs(small, inputs), before), "a copy shares nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv_bn", "vit"])
def test_a_pruned_model_is_compiled_whole(name: str) -> None:
    small, inputs = pruned(name), built(name).inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(copy.deepcopy(small), fullgraph=True)
        found = outputs(compiled, inputs)
    assert gap(found, outputs(small, inputs)) <= 1e-9 * float(outputs(small, inputs).abs().max())


def test_threads_of_a_service_load_and_run_at_once(tmp_path: Path) -> None:
    dense = timm.create_model("test_resnet", num_classes=3).eval()
    graph = tp.trace(dense, torch.zeros(1, 3, 32, 32))
    small = tp.apply(dense, plan_without(graph, random_gone(graph, 0)))
    tp.save(small, tmp_path)
    inputs = torch.randn(2, 3, 32, 32)
    answers: list[Tensor] = []

    def serve() -> None:
        model = tp.load(tmp_path)
        answers.extend(outputs(model, inputs) for _ in range(3))

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 9
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert gap(answers[0], outputs(small, inputs)) == 0


def test_a_moving_average_carries_the_plan(tmp_path: Path) -> None:
    b, small = built("conv_bn"), pruned("conv_bn")
    average = ModelEmaV3(small, decay=0.5)
    start = copy.deepcopy(small.state_dict())
    with torch.no_grad():
        for p in small.parameters():
            p.add_(1)
    average.update(small)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, start[name] + 0.5)
    tp.save(average.module, tmp_path)
    bones = copy.deepcopy(b.model)
    assert_same_state(tp.load(tmp_path, skeleton=bones).state_dict(), average.module.state_dict())


def test_a_pruned_model_is_trained_by_ddp(tmp_path: Path) -> None:
    """One process stands for all: what matters is that wrapping, hooks and gradients take the pruned model."""
    b, small = built("conv_bn"), pruned("conv_bn").train()
    alone = copy.deepcopy(small)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rank'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(small)
        for model in (wrapped, alone):
            steps = torch.optim.SGD(model.parameters(), 0.1)
            model(b.inputs).square().mean().backward()
            steps.step()
        assert_same_state(small.state_dict(), alone.state_dict())
        assert any(float(p.grad.abs().max()) > 0 for p in small.parameters())
        tp.save(wrapped.module, tmp_path / "out")
    finally:
        torch.distributed.destroy_process_group()
    back = tp.load(tmp_path / "out", skeleton=copy.deepcopy(b.model))
    assert_same_state(back.state_dict(), small.state_dict())


WORLD = 2


def batch_of(count: int) -> Tensor:
    like = built("conv_bn").inputs
    return torch.randn(count, *like.shape[1:], generator=torch.Generator().manual_seed(4), dtype=like.dtype)


def steps(model: nn.Module, inputs: Tensor) -> None:
    """Three steps of training on all of a batch; batch norms keep their statistics, which processes do not share."""
    model.eval()
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimiser.zero_grad()
        model(inputs).square().mean().backward()
        optimiser.step()


def train_a_share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = Path(folder)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rank", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    wrapped = DistributedDataParallel(pruned("conv_bn"))
    steps(wrapped, batch_of(8)[rank::WORLD])
    tp.save(wrapped.module, place / f"out{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_a_pruned_model_as_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_a_share, (str(tmp_path),), WORLD)
    alone = pruned("conv_bn")
    before = copy.deepcopy(alone.state_dict())
    steps(alone, batch_of(8))
    moved = max(gap(value, before[name]) for name, value in alone.state_dict().items())
    both = [tp.load(tmp_path / f"out{rank}", skeleton=copy.deepcopy(built("conv_bn").model)) for rank in range(WORLD)]
    assert_same_state(both[0].state_dict(), both[1].state_dict())
    assert plan_of(both[0]).to_json() == plan_of(alone).to_json()
    for name, value in both[0].state_dict().items():
        assert gap(value, alone.state_dict()[name]) <= 1e-12 * max(1.0, moved), name  # the mean of two halves' means
    assert moved > 1e-3


def test_a_pruned_model_is_quantised_by_torchao() -> None:
    """Linear weights in int8: each within half a step of what it was; both models shrink and answer as rounded ones."""
    if find_spec("torchao") is None:
        pytest.skip("torchao is not installed; python -m pip install 'tpvprune[quantize]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces what will change in torch
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        torch.manual_seed(0)
        dense = timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=8).eval()
        images = torch.randn(4, 3, 32, 32)
        graph = tp.trace(dense, images[:1])
        small = tp.apply(dense, tp.allocate(tp.score(dense, [images], graph), graph, tp.Budget(macs=0.5)))
        sizes = {}
        for name, model in (("dense", dense), ("pruned", small)):
            made = copy.deepcopy(model)
            quantize_(made, Int8WeightOnlyConfig())
            sizes[name] = stored(made)
            rounded = copy.deepcopy(model)
            for layer, other in zip(rounded.modules(), made.modules(), strict=True):
                if isinstance(layer, nn.Linear):
                    left = other.weight.dequantize()
                    step = layer.weight.detach().abs().amax(1, keepdim=True) / 127
                    assert bool(((left - layer.weight.detach()).abs() <= step / 2).all())
                    layer.weight.data = left
            assert gap(outputs(made, images), outputs(rounded, images)) < 1e-5 * float(
                outputs(model, images).abs().max()
            )
            kept = [plan_of(m) for m in (made, model)]
            assert kept[0] == kept[1] or kept[0].to_json() == kept[1].to_json()
    assert sizes["pruned"] < 0.7 * sizes["dense"]
    assert sizes["pruned"] < 0.5 * stored(small)


def stored(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return len(buffer.getvalue())


def test_a_pruned_model_is_quantised_to_eight_bits() -> None:
    """Linear layers in int8: smaller again, and its answers drift by little more than the dense model's do."""
    quantised = {}
    torch.manual_seed(0)
    dense = timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=8).eval()
    images = torch.randn(4, 3, 32, 32)
    graph = tp.trace(dense, images[:1])
    small = tp.apply(dense, tp.allocate(tp.score(dense, [images], graph), graph, tp.Budget(macs=0.5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its successor
        for name, model in (("dense", dense), ("pruned", small)):
            made = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
            change = gap(outputs(made, images), outputs(model, images))
            quantised[name] = (len(pickle.dumps(made.state_dict())), change / float(outputs(model, images).abs().max()))
    assert quantised["pruned"][0] < 0.7 * quantised["dense"][0]
    assert quantised["pruned"][0] < 0.5 * sum(t.nbytes for t in small.state_dict().values())
    assert quantised["pruned"][1] < 0.1
