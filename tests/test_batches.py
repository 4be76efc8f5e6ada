from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tpvprune as tp
from tpvprune.batches import (
    device_of,
    evaluation_mode,
    inputs_of,
    labels_of,
    length_of,
    model_inputs,
    repeatable,
    single_tensor,
)

X, Y = torch.ones(3, 2), torch.tensor([0, 1, 2])


@pytest.mark.parametrize("batch", [X, (X,), (X, Y), [X, Y], {"image": X, "label": Y}])
def test_inputs_come_first(batch: object) -> None:
    assert inputs_of(batch) is X


def test_inputs_may_be_named() -> None:
    assert inputs_of({"label": Y, "image": X}, "image") is X
    with pytest.raises(tp.DataError, match="no item 'x'; it has 'label'"):
        inputs_of({"label": Y}, "x")


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], {"image": X, "label": Y}])
def test_labels_come_second(batch: object) -> None:
    assert labels_of(batch) is Y


@pytest.mark.parametrize("batch", [X, (X,), {"image": X}, (X, "cat"), (X, None)])
def test_batches_without_labels(batch: object) -> None:
    assert labels_of(batch) is None


def test_length_is_told_where_it_is_known() -> None:
    assert length_of([X, X]) == 2
    assert length_of(DataLoader(TensorDataset(X), batch_size=2)) == 2
    assert length_of(iter([X])) is None


def test_one_shot_iterators_are_told_from_the_rest() -> None:
    repeatable([X], "why")
    repeatable(DataLoader(TensorDataset(X)), "why")
    for one_shot in (iter([X]), (x for x in [X]), map(abs, [X])):
        with pytest.raises(tp.DataError, match="once only, and why"):
            repeatable(one_shot, "why")


def test_an_empty_iterable_is_refused_at_its_end() -> None:
    with pytest.raises(tp.DataError, match="stage: there is no batch"):
        list(model_inputs(nn.Linear(2, 2), [], "stage"))


def test_the_device_is_that_of_the_first_tensor() -> None:
    assert device_of(nn.Linear(2, 2)) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(nn.ReLU()) == torch.device("cpu")


@pytest.mark.parametrize("output", [None, (X,), Y, torch.tensor(1.0), {"logits": X}])
def test_outputs_are_one_floating_tensor(output: object) -> None:
    with pytest.raises(tp.ModelError, match=r"ReLU returns a .* wrap it in a module"):
        single_tensor(output, nn.ReLU())
    assert single_tensor(X, nn.ReLU()) is X


def test_modes_come_back_module_by_module() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    model[1].eval()

    def fails() -> None:
        with evaluation_mode(model):
            assert not any(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [m.training for m in model.modules()] == [True, True, False]
