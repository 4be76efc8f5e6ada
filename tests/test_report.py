from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tpvprune as tp
from tests.helpers import built, outputs
from tpvprune import report as reporting
from tpvprune.report import compare, environment
from tpvprune.timing import latencies


@pytest.fixture
def moved(mlp) -> nn.Module:
    model = copy.deepcopy(mlp.model)
    with torch.no_grad():
        model[4].weight.mul_(1.7)
    return model


def test_drift_is_measured_over_all_images(mlp, moved: nn.Module) -> None:
    p, q = outputs(mlp.model, mlp.inputs).log_softmax(1), outputs(moved, mlp.inputs).log_softmax(1)
    for batches in ([mlp.inputs], [mlp.inputs[:1], mlp.inputs[1:]]):
        found, images = compare({"before": mlp.model, "after": moved}, mlp.model, batches)
        assert images == 5
        assert found["before"] == {"kl": 0.0, "agreement": 1.0}
        assert found["after"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-12)
        assert found["after"]["agreement"] == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))


def test_top1_counts_labelled_images_only(mlp) -> None:
    right = outputs(mlp.model, mlp.inputs).argmax(1)
    wrong = right.clone()
    wrong[0] = (wrong[0] + 1) % 4
    batches = [(mlp.inputs, wrong), (mlp.inputs, torch.full((5,), -1)), (mlp.inputs, None)]
    found, images = compare({"before": mlp.model}, mlp.model, batches)
    assert images == 15
    assert found["before"]["top1"] == pytest.approx(4 / 5)
    assert "top1" not in compare({"before": mlp.model}, mlp.model, batches[1:])[0]["before"]


def test_an_image_without_a_label_takes_no_other_from_accuracy(mlp) -> None:
    right = outputs(mlp.model, mlp.inputs).argmax(1)
    labels = right.clone()
    labels[0], labels[1] = -1, (right[1] + 1) % 3
    for batches in ([(mlp.inputs, labels)], list(zip(mlp.inputs.split(2), labels.split(2), strict=True))):
        found, images = compare({"before": mlp.model}, mlp.model, batches)
        assert images == 5
        assert found["before"]["top1"] == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (torch.tensor([0, 1, 2, 3, 4]), "label 4 is none of the model's 4 classes, 0 to 3"),
        (torch.rand(5), "labels are of torch.float32"),
        (torch.tensor([1]), "there are 1 labels for 5 inputs"),
    ],
)
def test_what_is_no_label_gives_no_accuracy(
    mlp, second: torch.Tensor, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    right = outputs(mlp.model, mlp.inputs).argmax(1)
    seen = []
    batches = [(mlp.inputs, right), (mlp.inputs, second)]
    found, _ = compare({"before": mlp.model}, mlp.model, batches, each=lambda *told: seen.append(told[-1]))
    assert found["before"] == {"kl": 0.0, "agreement": 1.0}
    assert why in caplog.text
    assert seen[1] is None
    caplog.clear()
    found, _ = compare({"before": mlp.model}, mlp.model, batches, labelled=False)
    assert found["before"] == {"kl": 0.0, "agreement": 1.0}
    assert caplog.text == ""


def test_measuring_leaves_modes_and_weights(mlp, moved: nn.Module) -> None:
    moved.train()
    state = copy.deepcopy(moved.state_dict())
    compare({"after": moved}, mlp.model, [mlp.inputs])
    assert set(latencies({"a": moved, "b": mlp.model}, mlp.inputs, rounds=3)) == {"a", "b"}
    assert all(m.training for m in moved.modules())
    assert all(torch.equal(t, state[n]) for n, t in moved.state_dict().items())


def test_nan_and_nothing_are_refused(mlp) -> None:
    with pytest.raises(tp.DataError, match="no image to measure on"):
        compare({"before": mlp.model}, mlp.model, [])
    bad = copy.deepcopy(mlp.model)
    with torch.no_grad():
        bad[2].bias.fill_(torch.nan)
    with pytest.raises(tp.NonFiniteError, match=r"first in module 2 \(Linear\)"):
        compare({"bad": bad}, mlp.model, [mlp.inputs])


def test_the_environment_names_versions_and_device() -> None:
    found = environment(8, torch.device("cpu"))
    assert found["versions"]["tpvprune"] == tp.__version__
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["device"].startswith("cpu")
    assert "batch 8" in found["latency"]


def test_a_report_is_json_ready() -> None:
    result = tp.prune(built("mlp").model, [built("mlp").inputs], tp.Budget(macs=0.7))
    data = result.report.to_json()
    assert data["before"]["params"] == built("mlp").graph.params()
    assert set(data) == set(tp.Report.__dataclass_fields__)


@pytest.mark.parametrize("room", [1 << 20, 5 * 8 * 8])
def test_kept_answers_change_nothing_and_spare_the_dense_model_a_pass(monkeypatch, room: int) -> None:
    monkeypatch.setattr(reporting, "KEPT", room)
    torch.manual_seed(0)
    dense, models = nn.Linear(6, 8).double().eval(), [nn.Linear(6, 8).double().eval() for _ in range(3)]
    batches = [torch.randn(5, 6).double() for _ in range(4)]
    passes = list[int]()
    dense.register_forward_hook(lambda *_: passes.append(1))
    kept = reporting.Answers(dense)
    for turn, model in enumerate(models):
        order = batches[turn:] + batches[:turn]  # a loader may shuffle
        found = compare({"now": model}, dense, order, kept=kept)
        told = len(passes)
        assert found == compare({"now": model}, dense, order)
        del passes[told:]
    assert len(passes) == (4 if room > 5 * 8 * 8 else 4 + 2 * 3)  # all are kept, or one of four


def test_equal_numbers_of_another_kind_or_shape_are_other_inputs() -> None:
    kept, ones = reporting.Answers(nn.Identity()), torch.ones(4, 2)
    for other in (ones, ones.double(), ones.reshape(8, 1)):
        assert (kept(other).dtype, kept(other).shape) == (other.dtype, other.shape)
