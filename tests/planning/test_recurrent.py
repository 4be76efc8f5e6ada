"""Recurrent layers are counted and keep their units; what they read, and the rest of a network, is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tests.helpers import assert_scores_close, gap, plan_without

STEPS, GIVEN, HIDDEN = 7, 5, 6
GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)


class Net(nn.Module):
    """A layer before a recurrent one, and two behind it."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.before, self.r = nn.Linear(3, GIVEN), recurrent
        self.after, self.fc = nn.Linear(width, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if isinstance(self.r, CELLS):
            given = self.r(x[:, 0])
            x = given[0] if isinstance(given, tuple) else given
        else:
            x = self.r(x)[0][:, -1]
        return self.fc(self.after(x).relu())


def made(kind: type[nn.Module], layers: int = 1, both: bool = False) -> tuple[nn.Module, int]:
    """A network in single precision, in which there are fused kernels, and the multiply-adds of its recurrent layer."""
    width = HIDDEN * (2 if both else 1)
    if kind in CELLS:
        recurrent, products = kind(GIVEN, HIDDEN), HIDDEN * (GIVEN + HIDDEN)
    else:
        recurrent = kind(GIVEN, HIDDEN, layers, batch_first=True, bidirectional=both)
        products = sum(width * ((width if layer else GIVEN) + HIDDEN) for layer in range(layers)) * STEPS
    return randomise(Net(recurrent, width)).float(), GATES[kind] * products


@pytest.mark.parametrize(
    ("kind", "layers", "both"),
    [(k, *how) for k in (nn.LSTM, nn.GRU, nn.RNN) for how in ((1, False), (2, True))] + [(k, 1, False) for k in CELLS],
)
def test_all_steps_are_counted_and_what_is_read_is_cut(kind: type[nn.Module], layers: int, both: bool) -> None:
    model, products = made(kind, layers, both)
    inputs = torch.randn(2, STEPS, 3)
    kernels = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    graph = tp.trace(model, inputs)
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == kernels
    width = HIDDEN * (2 if both else 1)
    assert graph.macs() == products + STEPS * 3 * GIVEN + width * 8 + 8 * 2
    assert {group.id: group.units for group in graph.groups} == {"before": GIVEN, "after": 8}
    assert graph.skipped["r"] == "the units of recurrent layers stay"
    plan = plan_without(graph, {"after": [1, 4, 6], "before": [0, 3]})
    steps = 1 if kind in CELLS else STEPS
    assert graph.macs() - plan.macs == 3 * (width + 2) + 2 * (STEPS * 3 + steps * GATES[kind] * width)
    small = tp.apply(model, plan)
    assert small.r.input_size == GIVEN - 2
    assert gap(small(inputs), tp.mask(model, plan)(inputs)) < tolerances.SAME_IN_FLOAT32
    scores = tp.score(model, [inputs], graph, tp.TPV(compensated=True))
    assert set(scores.values) == {"before", "after"}
    assert all(bool(value.isfinite().all()) for value in scores.values.values())


def test_a_layer_as_wide_as_what_it_reads_is_told_apart_from_it() -> None:
    model = Net(nn.GRU(GIVEN, GIVEN, batch_first=True), GIVEN).eval()
    assert [group.id for group in tp.trace(model, torch.randn(2, STEPS, 3)).groups] == ["before", "after"]


def test_what_a_cell_reads_is_scored_as_what_a_linear_layer_reads() -> None:
    model, inputs = randomise(Net(nn.RNNCell(GIVEN, HIDDEN), HIDDEN)), example(40, 1, 3)

    class Plain(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.after(self.r(self.before(x[:, 0])).tanh()).relu())

    plain = randomise(Plain(nn.Linear(GIVEN, HIDDEN), HIDDEN))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("r.")}, strict=False)
    with torch.no_grad():
        plain.r.weight.copy_(model.r.weight_ih)
        plain.r.bias.copy_(model.r.bias_ih + model.r.bias_hh)
    criterion = tp.TPV(compensated=True)
    one, other = (tp.score(m, [inputs], tp.trace(m, inputs), criterion).values for m in (model, plain))
    assert_scores_close(one, {name: other[name] for name in ("before", "after")}, tolerances.EXACT)
