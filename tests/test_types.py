from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tpvprune as tp
from tests.helpers import NAMES, assert_same_state, built
from tpvprune.members import _pack_index, _unpack_index
from tpvprune.scores import SCORES_FORMAT
from tpvprune.types import fingerprint


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 9), st.booleans(), st.randoms(use_true_random=False))
def test_index_packing_round_trip(units: int, width: int, start: int, plain: bool, random) -> None:
    entries = list(range(start, start + units * width))
    if not plain:
        random.shuffle(entries)
    index = torch.tensor(entries).reshape(units, width)
    packed = json.loads(json.dumps(_pack_index(index)))
    back = _unpack_index(packed)
    assert torch.equal(back, index)
    assert back.dtype == torch.int64
    assert ("start" in packed) == (entries == sorted(entries))


def test_the_identity_packs_to_nothing() -> None:
    assert _pack_index(None) is None
    assert _unpack_index(None) is None


@pytest.mark.parametrize("name", NAMES)
def test_graph_round_trip(name: str, tmp_path) -> None:
    graph = built(name).graph
    graph.save(tmp_path / "graph.json")
    back = tp.Graph.load(tmp_path / "graph.json")
    assert back.to_json() == graph.to_json()
    assert (back.params(), back.macs(), back.model_id) == (graph.params(), graph.macs(), graph.model_id)
    for group, old in zip(back.groups, graph.groups, strict=True):
        for m, o in zip(group.members, old.members, strict=True):
            assert torch.equal(m.entries(group.units), o.entries(old.units))


@pytest.mark.parametrize(
    "change",
    [{"format": 0}, {"format": "1"}, {"groups": None}, {"shapes": []}, {"model_id": ...}, {"inputs": [[3, -1]]}],
)
def test_other_graph_formats_are_refused(mlp, change: dict[str, object]) -> None:
    data = mlp.graph.to_json() | change
    data = {key: value for key, value in data.items() if value is not ...}
    with pytest.raises(tp.PlanError):
        tp.Graph.from_json(data)


def member(
    param: str = "a.weight", dim: int = 0, index: torch.Tensor | None = None, role: str = "produce"
) -> tp.Member:
    return tp.Member(param, dim, index, role)


def of(*members: tp.Member, units: int = 2, id: str = "g") -> tp.Group:
    return tp.Group(id, "channel", units, members, True, "")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: member(role="eat"), "known roles are"),
        (lambda: member(index=torch.arange(3)), "int64 index of shape"),
        (lambda: member(index=torch.zeros(2, 1)), "int64 index of shape"),
        (lambda: tp.Group("g", "stone", 2, (), True, ""), "known kinds are"),
        (lambda: of(units=0), "no units"),
        (lambda: of(member(index=torch.tensor([[0], [1], [2]]))), "speaks of 3 units, the group has 2"),
        (lambda: graph(of(member("b.weight"))), "which the graph lacks"),
        (lambda: graph(of(member(dim=2))), "which the graph lacks"),
        (lambda: graph(of(member(), units=5)), "lie outside"),
        (lambda: graph(of(member(index=torch.tensor([[-1], [0]])))), "lie outside"),
        (lambda: graph(of(member()), of(member())), "share an id"),
        (lambda: graph(of(member()), of(member(), id="h")), "belong to two units"),
        (lambda: graph(of(member(index=torch.tensor([[0], [0]])))), "belong to two units"),
    ],
)
def test_nouns_that_contradict_themselves_are_refused(make, match: str) -> None:
    with pytest.raises(tp.PlanError, match=match):
        make()


def graph(*groups: tp.Group) -> tp.Graph:
    return tp.Graph(groups, {"a.weight": (4, 3)}, {"a.weight": 2}, "id", {})


def test_costs_count_what_is_left() -> None:
    g = graph(of(member(index=torch.tensor([[0, 1], [2, 3]]))), of(member(dim=1), units=3, id="h"))
    assert (g.params(), g.macs(), g.units) == (12, 24, 5)
    keep = {"g": torch.tensor([True, False]), "h": torch.tensor([True, False, True])}
    assert g.sizes(keep) == {"a.weight": (2, 2)}
    assert (g.params(keep), g.macs(keep)) == (4, 8)
    assert "g" in g
    assert "z" not in g
    with pytest.raises(tp.PlanError, match="no group 'z'"):
        g["z"]


def test_layers_of_members() -> None:
    assert member("a.b.weight").layer == "a.b"
    assert member("pos").layer == ""
    assert member("blocks.0.attn#attention").layer == "blocks.0.attn"
    group = of(member("a.weight"), member("a.bias"), member("b.weight", role="consume"))
    assert group.layers == ("a", "b")
    assert [m.param for m in group.of_role("consume")] == ["b.weight"]


def test_fingerprints_depend_on_names_and_shapes_and_not_on_order() -> None:
    a = fingerprint([("x", (1, 2)), ("y", (3,))])
    assert a == fingerprint([("y", (3,)), ("x", (1, 2))])
    assert len({a, fingerprint([("x", (12,)), ("y", (3,))]), fingerprint([("x", (1, 2)), ("z", (3,))])}) == 3


def scores(**change: object) -> tp.Scores:
    values = {"a.b": torch.tensor([1.5, 0.25], dtype=torch.float64), "c": torch.ones(3, dtype=torch.float64)}
    about = {"criterion": "by hand", "samples": 3, "probes": "exact", "seed": 4, "model_id": "abc"}
    stderr = {name: value / 3 for name, value in values.items()}
    return tp.Scores(**({"values": values, "stderr": stderr} | about | change))


@pytest.mark.parametrize("change", [{}, {"stderr": None}, {"probes": 2}])
def test_scores_round_trip(tmp_path, change: dict[str, object]) -> None:
    saved = scores(**change)
    saved.save(tmp_path / "scores.safetensors")
    back = tp.Scores.load(tmp_path / "scores.safetensors")
    assert_same_state(dict(sorted(back.values.items())), dict(sorted(saved.values.items())))
    assert (back.stderr is None) == (saved.stderr is None)
    if saved.stderr:
        assert_same_state(dict(sorted(back.stderr.items())), dict(sorted(saved.stderr.items())))
    for name in ("criterion", "samples", "probes", "seed", "model_id"):
        assert getattr(back, name) == getattr(saved, name)


def test_scores_of_other_formats_are_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(tp.PlanError, match="run the score stage first"):
        tp.Scores.load(tmp_path / "gone")
    (tmp_path / "text").write_text("no scores at all")
    with pytest.raises(tp.PlanError, match="is no scores file"):
        tp.Scores.load(tmp_path / "text")
    save_file({"value/a": torch.ones(1)}, tmp_path / "bare")
    with pytest.raises(tp.PlanError, match="format None"):
        tp.Scores.load(tmp_path / "bare")
    later = SCORES_FORMAT + 1
    save_file({"value/a": torch.ones(1)}, tmp_path / "later", metadata={"tpvprune": json.dumps({"format": later})})
    with pytest.raises(tp.PlanError, match=f"format {later} is not {SCORES_FORMAT}"):
        tp.Scores.load(tmp_path / "later")


@pytest.mark.parametrize("about", [{"format": SCORES_FORMAT}, {"format": SCORES_FORMAT, "criterion": "x", "extra": 2}])
def test_scores_with_a_damaged_header_are_refused(tmp_path, about: dict[str, object]) -> None:
    from safetensors.torch import save_file

    save_file({"value/a": torch.ones(1)}, tmp_path / "bad", metadata={"tpvprune": json.dumps(about)})
    with pytest.raises(tp.PlanError):
        tp.Scores.load(tmp_path / "bad")


@pytest.mark.parametrize("value", [torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf]), torch.ones(2, 2)])
def test_scores_are_finite_vectors(value: torch.Tensor) -> None:
    with pytest.raises(tp.PlanError, match="not finite values"):
        scores(values={"a": value}, stderr=None)
