"""Recurrent layers are counted and stay whole; the rest of a network with one is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.cases import randomise
from tests.helpers import gap, plan_without

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
def test_all_steps_are_counted_and_nothing_around_is_cut(kind: type[nn.Module], layers: int, both: bool) -> None:
    model, products = made(kind, layers, both)
    inputs = torch.randn(2, STEPS, 3)
    kernels = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    graph = tp.trace(model, inputs)
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == kernels
    width = HIDDEN * (2 if both else 1)
    assert graph.macs() == products + STEPS * 3 * GIVEN + width * 8 + 8 * 2
    assert [group.id for group in graph.groups] == ["after"]
    assert "recurrent layers stay whole" in graph.skipped["r"]
    assert "recurrent layers stay whole" in graph.skipped["before"]
    plan = plan_without(graph, {"after": [1, 4, 6]})
    assert graph.macs() - plan.macs == 3 * (width + 2)
    small = tp.apply(model, plan)
    assert gap(small(inputs), tp.mask(model, plan)(inputs)) < tolerances.SAME_IN_FLOAT32
    assert set(tp.score(model, [inputs], graph, tp.TPV()).values) == {"after"}
