"""Scoring that stops once the ranking is settled."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests.helpers import built, gap


class Counted(nn.Module):
    """Two linear layers whose hidden units matter by `scale` each, and the number of its calls."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.up, self.down, self.calls = nn.Linear(6, len(scale)), nn.Linear(len(scale), 4), 0
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            self.up.bias.fill_(3.0)  # every unit is on for nearly every sample
            # Each unit reads and is read alike, but for its scale.
            self.up.weight.copy_(self.up.weight[:1].expand_as(self.up.weight))
            self.down.weight.copy_(self.down.weight[:, :1] * scale)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += len(x) != 3  # so many are run to see where samples lie
        return self.down(self.up(x).relu())


def easy() -> Counted:
    return Counted(torch.cat([torch.linspace(0.1, 0.3, 10), torch.linspace(1.0, 2.0, 10)]))


def hard() -> Counted:
    """Every unit is as good as any other: what is seen of their scores is noise."""
    model = Counted(torch.ones(20))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for weight in (model.up.weight, model.down.weight):
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return model


def data(count: int = 40, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def scored(model: Counted, **kwargs: object) -> tp.Scores:
    graph = tp.trace(model, torch.zeros(1, 6, dtype=torch.float64))
    model.calls = 0
    return tp.score(
        model, kwargs.pop("batches", data()), graph, kwargs.pop("criterion", tp.TPV(head="logits")), **kwargs
    )


@pytest.mark.parametrize(
    "criterion", [tp.TPV(head="logits"), tp.TPV(probes="exact"), tp.TPV(engine="batched"), tp.JBR(confidence=0.01)]
)
def test_easy_rankings_stop_early_and_hard_ones_do_not(criterion) -> None:
    model = easy()
    scores = scored(model, criterion=criterion, until=tp.Settled(least=64))
    assert 64 <= scores.samples < 640
    assert model.calls == scores.samples // 16 == scores.manifest["batches"]
    assert scores.summary()["settled"]
    # What was seen is what is scored: no more, no less.
    plain = scored(model, criterion=criterion, batches=data()[: scores.samples // 16])
    for group, value in plain.values.items():
        assert gap(scores.values[group], value) == 0
        assert gap(scores.stderr[group], plain.stderr[group]) == 0
    assert scores.manifest == plain.manifest
    # And it stopped at the first batch at which it could.
    before = scored(model, criterion=criterion, batches=data()[: scores.samples // 16 - 1])
    assert scores.samples == 64 or not before.summary()["settled"]
    model = hard()
    assert scored(model, criterion=criterion, until=tp.Settled(least=64)).samples == 640
    assert model.calls == 40


def test_a_smaller_share_takes_longer() -> None:
    seen = [scored(hard(), until=tp.Settled(share=share, least=16)).samples for share in (0.4, 0.2, 0.1, 1e-9)]
    assert seen == sorted(seen)
    assert seen[0] < seen[2] <= seen[3] == 640


@pytest.mark.parametrize("least", [16, 100, 128, 1000])
def test_as_many_samples_as_asked_are_seen_in_any_case(least: int) -> None:
    scores = scored(easy(), until=tp.Settled(share=0.4, least=least))
    assert scores.samples == min(-(-least // 16) * 16, 640)


def test_the_cut_is_what_has_to_be_clear() -> None:
    # Half of the units are far from the other half; within a half they are close.
    clear = scored(easy(), until=tp.Settled(cut=0.5, least=32)).samples
    close = scored(easy(), until=tp.Settled(cut=0.25, least=32)).samples
    assert clear < close


@pytest.mark.parametrize("criterion", [tp.Variance(), tp.Wanda(), tp.TPV(engine="factored")], ids=lambda c: c.label)
def test_scores_without_an_error_are_not_waited_for(criterion, tmp_path) -> None:
    # The variance of an activation is no mean over samples, and has no standard error.
    model = easy()
    graph = tp.trace(model, torch.zeros(1, 6, dtype=torch.float64))
    graph = tp.weight_graph(model) if criterion == tp.TPV(engine="factored") else graph
    for least in (1, 10**6):
        model.calls = 0
        with pytest.raises(tp.InputError, match=r"has no standard errors.*leave it out"):
            tp.score(model, itertools.cycle(data()), graph, criterion, until=tp.Settled(share=0.5, least=least))
        assert model.calls <= 2
    tp.score(model, data(3), graph, criterion, save=tmp_path / "s")
    with pytest.raises(tp.InputError, match="has no standard errors"):
        tp.score(model, data(), graph, criterion, until=tp.Settled(), save=tmp_path / "s")
    assert not tp.Settled().reached(tp.Scores({"a": torch.ones(3)}, None, "", 999, 1, 0, ""))


def test_settled_scores_are_not_gone_on_with(tmp_path) -> None:
    model, until = easy(), tp.Settled(least=64)
    first = scored(model, until=until, save=tmp_path / "s")
    assert 0 < model.calls < 40
    again = scored(model, until=until, save=tmp_path / "s")
    assert model.calls == 0
    assert again.samples == first.samples
    assert scored(model, until=until, start=first).samples == first.samples
    assert model.calls == 0
    harder = scored(model, until=tp.Settled(least=160), save=tmp_path / "s")
    assert harder.samples == 160
    assert model.calls == (160 - first.samples) // 16
    assert scored(model, save=tmp_path / "s").samples == 640


def test_a_stopped_scoring_settles_where_an_undisturbed_one_does(tmp_path) -> None:
    until = tp.Settled(share=0.1, least=16)
    whole = scored(hard(), until=until)
    assert 32 < whole.samples < 640
    count = whole.samples // 16

    def stopped(after: int):
        yield from data()[:after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(hard(), until=until, batches=stopped(count - 1), save=tmp_path / "s")
    model = hard()
    found = scored(model, until=until, save=tmp_path / "s")
    assert (found.samples, model.calls) == (whole.samples, 1)
    assert found.tally.to_json() == whole.tally.to_json()
    for group, value in whole.values.items():
        assert gap(found.values[group], value) <= 1e-12 * float(value.max())


def test_unseen_batches_are_not_read() -> None:
    read = []

    def batches():
        for number, batch in enumerate(data()):
            read.append(number)
            yield batch

    scores = scored(easy(), until=tp.Settled(least=64), batches=batches())
    assert len(read) == scores.samples // 16


def test_the_model_is_left_as_it_was() -> None:
    b = built("mlp")
    flags = [p.requires_grad for p in b.model.parameters()]
    tp.score(b.model, [b.inputs] * 3, b.graph, until=tp.Settled(share=0.9, least=5))
    assert [p.requires_grad for p in b.model.parameters()] == flags
    hooks = [h for m in b.model.modules() for h in (*m._forward_pre_hooks, *m._forward_hooks)]
    assert not hooks
