from __future__ import annotations

import pytest
import torch

import tpvprune as tp
from tests import reference, tolerances
from tpvprune.scoring.heads import HEADS, Head, head_named

LOGITS = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


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


def test_softmax_refuses_outputs_that_are_no_logits() -> None:
    for call in (lambda o: tp.Softmax().cotangent(o, torch.Generator()), lambda o: list(tp.Softmax().exact(o))):
        with pytest.raises(tp.ModelError, match=r"\(2, 3, 4\).*head='logits'"):
            call(torch.zeros(2, 3, 4))


def test_heads_are_found_by_name_or_taken_as_they_are() -> None:
    assert head_named("softmax") == tp.Softmax()
    own = tp.Logits()
    assert head_named(own) is own
    assert all(isinstance(head(), Head) for head in HEADS.values())
    with pytest.raises(tp.ModelError, match="choose one of logits, softmax"):
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
