"""The Gauss-Newton refit against dense Jacobians and a dense solve."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tpvprune as tp
from tests import tolerances
from tests.cases import randomise
from tests.helpers import assert_same_state, gap, plan_without
from tests.recovery.test_reconstruct import cut, data
from tpvprune.batches import evaluation_mode, plain_attention
from tpvprune.plan import plan_of
from tpvprune.recovery.gaussnewton import _conjugate_gradients
from tpvprune.recovery.matching import Task, _spread


class Attention(nn.Module):
    """Two heads on a stream; three layers read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.norm = nn.Linear(5, 6), nn.LayerNorm(6)
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.last, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(F.gelu(self.last(x)).mean(1))


class Convolutions(nn.Module):
    """A stream with a residual sum, a norm, a depthwise layer and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.inner, self.depth = nn.Conv2d(6, 8, 3, padding=1, stride=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.outer = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.read(x)))
        x = x + self.outer(F.silu(self.depth(self.inner(x))))
        return self.fc(x.mean((2, 3)))


class Again(nn.Module):
    """A branch that runs twice with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.up, self.down, self.head = (nn.Linear(*s) for s in ((5, 6), (6, 9), (9, 6), (6, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x).tanh()
        for _ in range(2):
            x = x + self.down(self.up(x).tanh())
        return self.head(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, list[int]]]] = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)),
        (30, 5),
        {"0": [1, 4], "2": [0, 3]},
    ),
    "convolutions": (Convolutions, (6, 3, 5, 5), {"inner": [0, 5], "read": [2]}),
    "attention": (Attention, (10, 4, 5), {"up": [0, 2, 3]}),
    "again": (Again, (30, 5), {"up": [0, 2, 3]}),
}


def built(name: str) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    make, shape, gone = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make())
    batches = data(*shape, batches=3)
    return model, cut(model, batches[0], gone), batches


def read_by(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """Inputs of layers by name, and outputs by name and an arrow; `@1` behind either is the second call."""
    held: dict[str, Tensor] = {}

    def hook(name: str, value: Tensor, output: Tensor) -> None:
        again = "@1" if name in held else ""
        held.update({name + again: value, f"{name}>{again}": output})

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [m.register_forward_hook(lambda _, args, output, n=n: hook(n, args[0], output)) for n, m in layers]
    run()
    for handle in handles:
        handle.remove()
    return held


# What is compared, each tensor once (an output is what a classifier's input is pooled from), and what is left of it, as
# the plans above say.
COMPARED = {
    "perceptron": {"2": [0, 2, 3, 5, 6, 7], "4": [1, 2, 4, 5, 6]},
    "convolutions": {
        "inner": [0, 1, 3, 4, 5],
        "depth": [1, 2, 3, 4, 6, 7],
        "outer": [1, 2, 3, 4, 6, 7],
        "outer>": [0, 1, 3, 4, 5],
    },
    "attention": {"q": None, "out": None, "up": None, "down": [1, 4, 5, 6, 7, 8], "last": None, "last>": None},
    "again": {"up": None, "up@1": None, "down": [1, 4, 5, 6, 7, 8], "down@1": [1, 4, 5, 6, 7, 8], "head": None},
}


def reference(name: str, model: nn.Module, small: nn.Module, batches: list[Tensor]) -> Callable[[dict], Tensor]:
    """All residuals, each over the standard deviation and the root of the count, as one vector of the parameters."""
    x, kept = torch.cat(batches), COMPARED[name]

    def rows(value: Tensor, layer: str) -> Tensor:
        if kept[layer] is None:
            return value
        linear = isinstance(model.get_submodule(layer.split("@")[0].rstrip(">")), nn.Linear)
        return value[..., kept[layer]] if linear else value[:, kept[layer]]

    dense = read_by(model, lambda: model(x))
    wanted = {layer: rows(dense[layer], layer).detach() for layer in kept}

    def residuals(theta: dict[str, Tensor]) -> Tensor:
        held = read_by(small, lambda: functional_call(small, theta, (x,)))
        parts = [(held[n] - wanted[n]) / (wanted[n].var(correction=0) * wanted[n].numel()).sqrt() for n in kept]
        return torch.cat([p.flatten() for p in parts])

    return residuals


def dense(jacobian: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([jacobian[n].flatten(1) for n in names], 1)


@pytest.mark.parametrize("name", list(MODELS))
def test_loss_gradient_and_curvature_are_those_of_dense_jacobians(name: str) -> None:
    model, small, batches = built(name)
    plan = plan_of(small)
    assert plan is not None
    with evaluation_mode(small, model), plain_attention(), torch.no_grad():
        task = Task(small, model, plan, batches, tp.GaussNewton(), None, 0)
        places = [p.module + ">" * p.output + "@1" * p.call for p in (point.place for point in task.points)]
        assert places == list(COMPARED[name])
        loss, gradient = task.gradient(task.start)
        vector = {n: torch.randn(p.shape, dtype=p.dtype) for n, p in task.start.items()}
        image = task.curved(task.start, vector)
    residuals = reference(name, model, small, batches)
    at = {n: p.detach() for n, p in small.named_parameters()}
    with plain_attention():
        found, jacobian = residuals(at), jacrev(residuals)(at)
    moved = [n for n in at if float(jacobian[n].abs().max()) > 0]
    assert set(moved) <= set(task.start)
    j = dense(jacobian, moved)
    assert loss == pytest.approx(float(found.square().sum()), rel=tolerances.EXACT)
    assert float(task.loss(task.start)) == pytest.approx(loss, rel=tolerances.EXACT)

    def flat(v: dict[str, Tensor]) -> Tensor:
        return torch.cat([v[n].flatten() for n in moved])

    for mine, wanted in ((flat(gradient), j.T @ found), (flat(image), j.T @ (j @ flat(vector)))):
        torch.testing.assert_close(mine, wanted.detach(), rtol=0, atol=tolerances.EXACT * float(wanted.abs().max()))


def test_many_iterations_solve_the_damped_problem() -> None:
    model, small, batches = built("perceptron")
    plan = plan_of(small)
    assert plan is not None
    settings = tp.GaussNewton(damping=1e-2)
    with torch.no_grad():
        task = Task(small, model, plan, batches, settings, None, 0)
        loss, gradient = task.gradient(task.start)
        factors = task.factors(task.start)
        right = {n: -g for n, g in gradient.items()}
        found = _conjugate_gradients(lambda v: task.curved(task.start, v), right, factors, 300)
    residuals = reference("perceptron", model, small, batches)
    at = {n: p.detach() for n, p in small.named_parameters()}
    names = list(task.start)
    j = dense(jacrev(residuals)(at), names)
    damping = torch.cat([torch.full((at[n].numel(),), factors._damping[n], dtype=torch.float64) for n in names])
    assert float(damping.min()) > 0
    wanted = torch.linalg.solve(j.T @ j + damping.diag(), -j.T @ residuals(at))
    mine = torch.cat([found[n].flatten() for n in names])
    torch.testing.assert_close(mine, wanted, rtol=0, atol=tolerances.SOLVE * float(wanted.abs().max()))
    assert loss > 0


def test_damping_is_a_share_of_the_mean_curvature() -> None:
    """Many draws of signs, against the diagonal of a dense Jacobian."""
    model, small, _ = built("perceptron")
    plan = plan_of(small)
    assert plan is not None
    many = data(10, 5, batches=50)
    with torch.no_grad():
        task = Task(small, model, plan, many, tp.GaussNewton(damping=0.5), None, 0)
        found = task.factors(task.start)._damping
    at = {n: p.detach() for n, p in small.named_parameters()}
    jacobian = jacrev(reference("perceptron", model, small, many))(at)
    for name in ("0.bias", "2.bias"):
        wanted = 0.5 * float(jacobian[name].square().sum(0).mean())
        assert found[name] == pytest.approx(
            wanted, rel=0.25
        )  # of 50 squares; the standard error of a mean is 20 % less


def test_parameters_that_nothing_depends_on_stay() -> None:
    """A key's bias adds the same to all of a query's products, which softmax takes out."""
    model, small, batches = built("attention")
    found = tp.refine(small, batches, model)
    assert torch.equal(found.k.bias, small.k.bias)
    assert gap(found.q.bias, small.q.bias) > 1e-6


@pytest.mark.parametrize("name", list(MODELS))
def test_what_layers_read_and_the_outputs_come_closer(name: str) -> None:
    model, small, batches = built(name)
    before, told, seen = copy.deepcopy(small), [], []
    small = tp.reconstruct(small, batches, model)
    kept = copy.deepcopy(small.state_dict())
    found = tp.refine(
        small,
        batches,
        model,
        tp.GaussNewton(steps=3, iterations=20),
        progress=lambda *passes: seen.append(passes),
        log=told.append,
    )
    assert_same_state(small.state_dict(), kept)
    (cost,) = told
    assert cost["samples"] == sum(map(len, batches))
    assert cost["after"] < 0.8 * cost["before"]
    residuals = reference(name, model, before, batches)
    losses = [float(residuals({n: p.detach() for n, p in m.named_parameters()}).square().sum()) for m in (small, found)]
    count = len(COMPARED[name])
    assert [cost["before"], cost["after"]] == pytest.approx([loss / count for loss in losses], rel=1e-6)
    stages, done, most = zip(*seen, strict=True)
    assert set(stages) == {"refine"}
    assert list(done) == sorted(set(done))
    assert max(done) <= most[0]
    assert len(set(most)) == 1


def test_a_classifier_and_statistics_stay() -> None:
    model, small, batches = built("convolutions")
    found = tp.refine(small, batches, model, tp.GaussNewton(steps=1))
    assert_same_state(found.fc.state_dict(), small.fc.state_dict())
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(found.norm, name), getattr(small.norm, name))
    assert gap(found.inner.weight, small.inner.weight) > 1e-3
    assert plan_of(found) is not None


def test_masked_weights_stay_zero() -> None:
    model, _, batches = built("convolutions")
    graph = tp.weight_graph(model)
    small = tp.apply(model, tp.sparsify(tp.score(model, batches, graph, tp.L1()), graph, 0.6))
    told: list[dict[str, float]] = []
    found = tp.refine(small, batches, model, log=told.append)
    assert told[0]["after"] < told[0]["before"]
    for name, mask in plan_of(small).weight_masks().items():
        weight = found.get_parameter(name)
        assert not bool(weight[~mask].any())
        if name != "fc.weight":  # nothing that is compared follows it
            assert gap(weight[mask], small.get_parameter(name)[mask]) > 1e-4


class Pooled(nn.Module):
    """Tokens, and a classifier of what becomes of them."""

    def __init__(self, pool: Callable[[Tensor], Tensor], norm: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.pool = nn.Linear(5, 8), nn.Linear(8, 6), pool
        self.norm = nn.LayerNorm(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.pool(self.down(F.gelu(self.up(x))))))


@pytest.mark.parametrize(
    ("pool", "norm", "compared"),
    [
        (lambda x: x.mean(1), False, True),
        (lambda x: x.mean(1), True, True),
        (lambda x: x.relu().mean(1), False, True),
        (lambda x: x[:, 0], False, False),
        (lambda x: x[:, 1:].mean(1), False, False),
    ],
)
def test_what_a_classifier_reads_is_compared_before_it_is_pooled_from_all_positions(
    pool: Callable[[Tensor], Tensor], norm: bool, compared: bool
) -> None:
    torch.manual_seed(0)
    model = randomise(Pooled(pool, norm))
    batches = data(6, 4, 5, batches=2)
    small = cut(model, batches[0], {"up": [1, 2]})
    with torch.no_grad():
        task = Task(small, model, plan_of(small), batches, tp.GaussNewton(), None, 0)
    places = [tuple(point.place) for point in task.points]
    assert places == [("down", False, 0)] + [("down", True, 0)] * compared


def test_each_step_reads_the_batches_again() -> None:
    model, small, batches = built("perceptron")

    class Varied:
        reads = 0

        def __len__(self) -> int:
            return len(batches)

        def __iter__(self):
            self.reads += 1
            yield from [batch + 0.1 * self.reads for batch in batches]

    varied = Varied()
    found = tp.refine(small, varied, model, tp.GaussNewton(steps=2))
    assert varied.reads == 2
    first = tp.refine(small, [b + 0.1 for b in batches], model, tp.GaussNewton(steps=1))
    second = tp.refine(first, [b + 0.2 for b in batches], model, tp.GaussNewton(steps=1))
    assert_same_state(found.state_dict(), second.state_dict())


def test_the_same_images_give_the_same_weights() -> None:
    model, small, batches = built("convolutions")
    torch.manual_seed(1)
    one = tp.refine(small, batches, model)
    torch.manual_seed(2)
    assert_same_state(tp.refine(small, batches, model).state_dict(), one.state_dict())


def test_batches_are_taken_evenly_spaced() -> None:
    inputs = [torch.full((1,), float(i)) for i in range(10)]
    assert [int(t) for t in _spread(inputs, 5)] == [0, 2, 4, 6, 8]
    assert [int(t) for t in _spread(inputs, 3)] == [0, 3, 6]
    assert len(_spread(inputs, 99)) == 10


OTHERS = [pytest.param(f"test_{kind}", marks=pytest.mark.slow) for kind in ("convnext", "efficientnet", "mambaout")]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", *OTHERS])
def test_timm_models_come_closer(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    side = 160 if name == "test_vit" else 64
    batches = [torch.randn(4, 3, side, side) for _ in range(4)]
    settings = tp.GaussNewton(steps=1, iterations=3)
    found = tp.prune(model, batches, tp.Budget(macs=0.6), refine_with=settings)
    told: list[dict[str, float]] = []
    small = tp.apply(model, found.plan)
    again = tp.recover(small, batches, teacher=model, refine_with=settings, finetune_with=None, log=told.append)
    assert told[-1]["after"] < told[-1]["before"]
    assert_same_state(again.state_dict(), found.model.state_dict())


def test_errors_name_what_is_wrong() -> None:
    model, small, batches = built("perceptron")
    with pytest.raises(tp.PlanError, match="refine needs a model that apply"):
        tp.refine(model, batches, model)
    with pytest.raises(tp.DataError, match="every step reads them"):
        tp.refine(small, iter(batches), model)
    with pytest.raises(tp.DataError, match="refine: there is no batch"):
        tp.refine(small, [], model)
    with pytest.raises(tp.NonFiniteError, match="not finite"):
        tp.refine(small, [b * float("inf") for b in batches], model)
    flat = randomise(nn.Sequential(nn.Linear(5, 4)))
    with pytest.raises(tp.ModelError, match="leave it out"):
        tp.refine(tp.apply(flat, tp.Plan({}, tp.trace(flat, batches[0]))), batches, flat)
    for settings in ({"steps": 0}, {"iterations": 0}, {"positions": 0}, {"damping": 0.0}):
        ((key, value),) = settings.items()
        with pytest.raises(tp.InputError, match=f"{key}={value}"):
            tp.GaussNewton(**settings)


class Checkpointed(nn.Module):
    def __init__(self, switch: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.switch = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 4), switch
        self.grad_checkpointing = switch == "its own"

    def part(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.tanh(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        again = self.grad_checkpointing or self.switch == "none"
        return self.c(checkpoint(self.part, x, use_reentrant=False) if again else self.part(x))


def test_checkpointing_is_off_during_the_refit_alone() -> None:
    found = []
    for switch in ("never", "its own"):
        model = randomise(Checkpointed(switch))
        small = cut(model, data(20, 5)[0], {"a": [1, 4]})
        refined = tp.refine(small, data(20, 5), model, tp.GaussNewton(steps=1, iterations=3))
        assert refined.grad_checkpointing == model.grad_checkpointing == (switch == "its own")
        found.append(refined)
    for one, other in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)
    model = randomise(Checkpointed("none"))
    with pytest.raises(tp.ModelError, match="switch that off for the refit"):
        tp.refine(cut(model, data(20, 5)[0], {"a": [1, 4]}), data(20, 5), model)


def bent(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """A network whose inputs differ little, so that their second moments are singular but for the damping."""
    torch.manual_seed(0)
    layers = [nn.Linear(400, 12), nn.Tanh(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4)]
    model = nn.Sequential(*layers).eval().to(dtype)
    batches = [(1 + 0.3 * torch.randn(32, 400)).to(dtype) for _ in range(2)]
    return model, tp.apply(model, plan_without(tp.trace(model, batches[0]), {"0": [0, 3, 5]})), batches


def test_second_moments_of_half_precision_are_taken_in_single() -> None:
    model, small, batches = bent(torch.bfloat16)
    told: list[dict[str, float]] = []
    found = tp.refine(small, batches, model, tp.GaussNewton(steps=1, iterations=3), log=told.append)
    assert found[0].weight.dtype == torch.bfloat16
    assert told[0]["after"] < told[0]["before"]


def test_a_damping_that_bears_nothing_up_is_told() -> None:
    model, small, batches = bent(torch.float32)
    with pytest.raises(tp.InputError, match=r"layer '0' cannot be inverted with damping=1e-40; give a larger damping"):
        tp.refine(small, batches, model, tp.GaussNewton(steps=1, iterations=3, damping=1e-40))
