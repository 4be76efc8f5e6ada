from __future__ import annotations

import pytest
import torch

import tpvprune as tp
from tests import reference, tolerances
from tpvprune.scoring.heads import HEADS, Head, head_named
from tpvprune.scoring.probing import drift_slope

LOGITS = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
OTHERS = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BOTH = {"a": LOGITS, "b": OTHERS, "unused": LOGITS}
SEVERAL = tp.Several({"a": "softmax", "b": tp.Cosine()})


@pytest.mark.parametrize("name", sorted(HEADS))
def test_the_reference_metrics_are_those_of_what_is_measured(name: str) -> None:
    found = torch.stack([reference.metric_by_autograd(row, name) for row in LOGITS])
    torch.testing.assert_close(reference.metric(LOGITS, name), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_exact_cotangents_sum_to_the_metric(name: str) -> None:
    us = torch.stack(list(HEADS[name]().exact(LOGITS)))
    assert us.shape == (5, 3, 5)
    found = torch.einsum("nbk,nbl->bkl", us, us)
    torch.testing.assert_close(found, reference.metric(LOGITS, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_random_cotangents_have_the_metric_as_second_moment(name: str) -> None:
    count, generator = 4000, torch.Generator().manual_seed(3)
    output = LOGITS.repeat_interleave(count, 0)
    u = HEADS[name]().cotangent(output, generator).reshape(3, count, 5)
    products = u.unsqueeze(3) * u.unsqueeze(2)
    error = products.std(1) / count**0.5
    distance = (products.mean(1) - reference.metric(LOGITS, name)).abs()
    assert bool((distance <= tolerances.STDERRS * error + 1e-12).all())


@pytest.mark.parametrize("name", sorted(HEADS))
def test_samples_are_independent(name: str) -> None:
    count, generator = 4000, torch.Generator().manual_seed(4)
    draws = HEADS[name]().cotangent(LOGITS[:2].repeat(count, 1), generator).reshape(count, 2, 5)
    products = draws[:, 0, :, None] * draws[:, 1, None, :]
    assert bool((products.mean(0).abs() <= tolerances.STDERRS * products.std(0) / count**0.5).all())


def test_logits_take_outputs_of_any_shape() -> None:
    output = torch.zeros(2, 3, 4)
    us = torch.stack(list(tp.Logits().exact(output))).flatten(2)
    assert torch.equal(us[:, 0], torch.eye(12))
    assert set(tp.Logits().cotangent(output, torch.Generator()).unique().tolist()) <= {-1.0, 1.0}


@pytest.mark.parametrize("head", [tp.Logits(), tp.Cosine(), tp.Function(lambda o: 3 * o)])
@pytest.mark.parametrize("shape", [(3,), (3, 2, 2)])
def test_heads_of_any_output_take_any_number_of_dimensions(head: Head, shape: tuple[int, ...]) -> None:
    output = 1 + torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    flat = output.reshape(3, -1)
    assert head.cotangent(output, torch.Generator()).shape == shape
    us = torch.stack(list(head.exact(output))).reshape(-1, *flat.shape)
    wanted = reference.metric(flat, "cosine" if isinstance(head, tp.Cosine) else "logits")
    wanted = 9 * wanted if isinstance(head, tp.Function) else wanted
    torch.testing.assert_close(torch.einsum("nbk,nbl->bkl", us, us), wanted)


@pytest.mark.parametrize("head", [tp.Softmax(), tp.Probabilities(), tp.Margin()])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1), (2,)])
def test_heads_of_classes_refuse_outputs_that_are_no_logits(head: Head, shape: tuple[int, ...]) -> None:
    told = rf"the {type(head).__name__.lower()} head needs .*\({', '.join(map(str, shape))},?\).*head='logits'"
    for call in (lambda o: head.cotangent(o, torch.Generator()), lambda o: list(head.exact(o))):
        with pytest.raises(tp.ModelError, match=told):
            call(torch.zeros(shape))


@pytest.mark.parametrize("head", [tp.Softmax(), tp.Probabilities(), tp.Margin(), tp.Logits(), tp.Cosine()])
def test_heads_of_one_output_refuse_several(head: Head) -> None:
    lost = rf"{type(head).__name__.lower()} head needs one tensor, the model returns 'a', 'b', 'unused'; .*output='key'"
    for call in (lambda o: head.cotangent(o, torch.Generator()), lambda o: list(head.exact(o))):
        with pytest.raises(tp.ModelError, match=lost):
            call(BOTH)


def test_two_classes_have_one_runner_up() -> None:
    u = tp.Margin().cotangent(torch.tensor([[3.0, -1.0], [0.0, 800.0]]), torch.Generator().manual_seed(0))
    assert torch.equal(u.abs(), torch.ones(2, 2))
    assert torch.equal(u.sum(1), torch.zeros(2))


def test_the_runner_up_is_drawn_among_classes_of_any_probability() -> None:
    # All but the top and class 1 underflow to nothing.
    output = torch.tensor([[900.0, 0.0, -900.0, -900.0]]).expand(500, 4)
    u = tp.Margin().cotangent(output, torch.Generator().manual_seed(0))
    assert torch.equal(u[:, 0], -u[:, 1])
    assert torch.equal(u[:, 2:], torch.zeros(500, 2))
    assert set(u[:, 0].tolist()) == {-1.0, 1.0}


def test_an_embedding_of_length_zero_has_no_direction() -> None:
    with pytest.raises(tp.ModelError, match="embedding of length zero; use head='logits'"):
        list(tp.Cosine().exact(torch.zeros(2, 3)))


def product(output: torch.Tensor) -> torch.Tensor:
    return torch.stack([output[:, 0] * output[:, 1], output.sum(1).sin(), output[:, 2] ** 3], 1)


def of_both(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return product(outputs["a"]) + outputs["b"][:, :3] * outputs["a"][:, :3]


def blocks(us: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Outer products of what is said of all outputs side by side, summed."""
    flat = torch.stack([torch.cat(list(u.values()), 1) for u in us])
    return torch.einsum("nbk,nbl->bkl", flat, flat)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_function_pulls_the_metric_back(name: str) -> None:
    jacobian = torch.stack([torch.func.jacrev(lambda o: product(o[None])[0])(row) for row in LOGITS])
    wanted = jacobian.mT @ reference.metric(product(LOGITS), name) @ jacobian
    with torch.no_grad():
        us = torch.stack(list(tp.Function(product, name).exact(LOGITS)))
        found = torch.einsum("nbk,nbl->bkl", us, us)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
        one = tp.Function(product, name).cotangent(LOGITS, torch.Generator().manual_seed(1))
    inner = HEADS[name]().cotangent(product(LOGITS), torch.Generator().manual_seed(1))
    torch.testing.assert_close(one, torch.einsum("bnk,bn->bk", jacobian, inner))
    assert not one.requires_grad


def test_a_function_of_several_outputs_pulls_the_metric_back() -> None:
    def whole(row: torch.Tensor) -> torch.Tensor:
        return of_both({"a": row[None, :5], "b": row[None, 5:9]})[0]

    jacobian = torch.stack([torch.func.jacrev(whole)(row) for row in torch.cat([*BOTH.values()], 1)])
    wanted = jacobian.mT @ reference.metric(of_both(BOTH), "softmax") @ jacobian
    us = list(tp.Function(of_both, "softmax").exact(BOTH))
    assert all(list(u) == list(BOTH) for u in us)
    torch.testing.assert_close(blocks(us), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "function",
    [lambda o: o.argmax(1), lambda o: o.detach(), lambda o: o.sum(), lambda o: o[:2], lambda o: (o,), lambda o: 1.0],
)
def test_a_function_must_be_differentiable_sample_by_sample(function) -> None:
    with pytest.raises(tp.ModelError, match="must give a differentiable tensor with a row a sample"):
        next(tp.Function(function).exact(LOGITS))


def test_several_heads_make_a_block_diagonal_metric() -> None:
    wanted = torch.zeros(3, 14, 14, dtype=torch.float64)
    wanted[:, :5, :5] = reference.metric(LOGITS, "softmax")
    wanted[:, 5:9, 5:9] = reference.metric(OTHERS, "cosine")
    torch.testing.assert_close(blocks(list(SEVERAL.exact(BOTH))), wanted, rtol=0, atol=1e-12)
    count = 2000
    many = {name: value.repeat_interleave(count, 0) for name, value in BOTH.items()}
    u = torch.cat(list(SEVERAL.cotangent(many, torch.Generator().manual_seed(0)).values()), 1).reshape(3, count, 14)
    products = u.unsqueeze(3) * u.unsqueeze(2)
    distance = (products.mean(1) - wanted).abs()
    assert bool((distance <= tolerances.STDERRS * products.std(1) / count**0.5 + 1e-12).all())
    across = u[0].unsqueeze(2) * u[1].unsqueeze(1)
    assert bool((across.mean(0).abs() <= tolerances.STDERRS * across.std(0) / count**0.5 + 1e-12).all())


@pytest.mark.parametrize(
    ("heads", "output", "match"),
    [
        ({"a": "softmax", "c": "logits", "d": "logits"}, BOTH, "names 'c', 'd'; the model returns 'a', 'b', 'unused'"),
        ({}, BOTH, "names no output"),
        ({"a": "softmax"}, LOGITS, "several outputs by name; this one returns one"),
        ({"a": "hinge"}, BOTH, "no head 'hinge'"),
    ],
)
def test_several_names_outputs_that_are_there(heads, output, match: str) -> None:
    with pytest.raises(tp.ModelError, match=match):
        tp.Several(heads).cotangent(output, torch.Generator())
    with pytest.raises(tp.ModelError, match=match):
        list(tp.Several(heads).exact(output))


HALVED = {name: (head(), LOGITS) for name, head in HEADS.items()} | {
    "several": (SEVERAL, BOTH),
    "function": (tp.Function(product, "margin"), LOGITS),
    "function of both": (tp.Function(of_both, "softmax"), BOTH),
    "margin in several": (tp.Several({"b": "margin", "a": "probabilities"}), BOTH),
}


@pytest.mark.parametrize("which", HALVED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_batch_in_parts_gets_the_same_cotangents(which: str, dtype: torch.dtype) -> None:
    head, output = HALVED[which]
    named = {n: v.to(dtype) for n, v in (output if isinstance(output, dict) else {"": output}).items()}

    def drawn(part: slice, generator: torch.Generator) -> torch.Tensor:
        cut = {name: value[part] for name, value in named.items()}
        u = head.cotangent(cut if isinstance(output, dict) else cut[""], generator)
        return torch.cat(list(u.values()), 1) if isinstance(u, dict) else u

    for start in (1, 2):
        generator, again = (torch.Generator().manual_seed(7) for _ in range(2))
        parts = [drawn(slice(start), generator), drawn(slice(start, None), generator)]
        torch.testing.assert_close(torch.cat(parts), drawn(slice(None), again))
        # What is drawn next, for another probe, is the same too.
        assert torch.equal(generator.get_state(), again.get_state())


def test_slopes_are_gradients_of_half_the_drift() -> None:
    fixed = torch.roll(LOGITS, 1, 0)
    moving = LOGITS.clone().requires_grad_(True)
    half = {
        "softmax": (fixed.softmax(1) * (fixed.log_softmax(1) - moving.log_softmax(1))).sum(),
        "logits": (moving - fixed).square().sum() / 2,
    }
    for name, value in half.items():
        (wanted,) = torch.autograd.grad(value, moving)
        torch.testing.assert_close(drift_slope(HEADS[name](), LOGITS, fixed), wanted)


@pytest.mark.parametrize("name", ["cosine", "margin", "probabilities"])
def test_without_a_slope_of_its_own_it_is_the_metric_times_the_difference(name: str) -> None:
    fixed = LOGITS + 0.1
    fixed[:, 1] -= 0.5
    wanted = torch.einsum("bkl,bl->bk", reference.metric(LOGITS, name), LOGITS - fixed)
    torch.testing.assert_close(drift_slope(HEADS[name](), LOGITS, fixed), wanted)


def test_the_slope_of_several_outputs_is_that_of_each() -> None:
    fixed = {name: torch.roll(value, 1, 0) for name, value in BOTH.items()}
    found = drift_slope(SEVERAL, BOTH, fixed)
    for name, head in (("a", "softmax"), ("b", "cosine")):
        wanted = torch.einsum("bkl,bl->bk", reference.metric(BOTH[name], head), BOTH[name] - fixed[name])
        torch.testing.assert_close(found[name], wanted)
    assert not found["unused"].any()


def test_heads_are_found_by_name_or_taken_as_they_are() -> None:
    assert head_named("softmax") == tp.Softmax()
    own = tp.Logits()
    assert head_named(own) is own
    assert all(isinstance(head(), Head) for head in HEADS.values())
    with pytest.raises(tp.ModelError, match="choose one of cosine, features, logits, margin, probabilities, softmax"):
        head_named("hinge")


def test_a_head_of_ones_own_is_used(mlp) -> None:
    class First:
        """Only the first output counts."""

        def cotangent(self, output, generator):
            return next(self.exact(output))

        def exact(self, output):
            u = torch.zeros_like(output)
            u[:, 0] = 1
            yield u

    exact = tp.score(mlp.model, [mlp.inputs], mlp.graph, tp.TPV(head=First(), probes="exact"))
    jacobian = reference.jacobians(mlp.model, mlp.inputs, ["4.weight"])["4.weight"][:, 0]
    wanted = (jacobian * mlp.model[4].weight).sum(1).square().mean(0).detach()
    torch.testing.assert_close(exact.values["2"], wanted, rtol=tolerances.EXACT, atol=0)
    assert exact.criterion == "tpv(head=first, over=consume)"
