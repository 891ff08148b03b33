"""The closure: gradients on any rows at any parameters, for the track's own parameters only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.spikes.bapo import toy_grpo
from tests.spikes.tokens import case
from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.errors import MethodError, NonFiniteError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, collected, run, updates
from trimtab.core.method import Method, Track
from trimtab.core.piece import piece
from trimtab.core.terms import Term
from trimtab.stages.surrogate import scaled
from trimtab.stages.update import adamw, sgd

torch.set_num_threads(1)

N = 6
A = torch.randn(N, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
A = A @ A.transpose(1, 2)
B = torch.randn(N, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Quadratic(nn.Module):
    """`value_i = x' A_i x / 2 + b_i' x`: its gradient and curvature are known."""

    provides = frozenset({"value"})

    def __init__(self, fill: float = 0.3) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(fill, 1.0, 4, dtype=torch.float64))

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        return {"value": 0.5 * torch.einsum("i,nij,j->n", self.x, batch.a, self.x) + batch.b @ self.x}


@piece("collect", writes=("a", "b", "mask", "source"))
def rows(kit: Kit) -> Batch:
    return Batch(
        {"a": A, "b": B, "mask": torch.ones(N, 1, dtype=torch.bool), "source": torch.zeros(N, dtype=torch.long)}
    )


@piece("loss", wants=("value",), reads=("a", "b"), per="row")
def bowl(batch: Batch, now: Mapping[str, Tensor]) -> list[Term]:
    return [Term(now["value"], "bowl"), Term(now["value"].detach() * 100, "height", metric=True)]


def method(*losses: Any, update: Any = None) -> Method:
    track = Track("policy", trains="policy", pieces=losses or (bowl(),), update=update or sgd(lr=0.1))
    return Method("bowl", pieces=(rows(),), tracks=(track,))


def closure(m: Method | None = None, *, memory: int | None = None, debug: bool = False, **models: nn.Module) -> Closure:
    m = m or method()
    named = {"policy": Quadratic(), **models}
    kit = Kit(begin(m, None, named), m, memory, debug)
    batch = collected(kit)
    kit.scope = "policy"
    return Closure(kit, m.tracks[0], batch)


def exact(x: Tensor, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
    a, b = (A, B) if where is None else (A[where], B[where])
    return (0.5 * torch.einsum("i,nij,j->n", x, a, x) + b @ x).mean(), (a @ x + b).mean(0)


@pytest.mark.parametrize("memory", [None, 1, 4])
def test_loss_and_gradient_on_all_rows_and_on_some(memory: int | None) -> None:
    c = closure(memory=memory)
    x = c.params["x"].detach()
    for where in (None, torch.tensor([4, 1]), torch.tensor([True, False, True, True, False, True])):
        loss, grad = exact(x, where)
        made = c(where=where)
        torch.testing.assert_close(made.loss, loss)
        torch.testing.assert_close(made.grads["x"], grad)
        torch.testing.assert_close(made.norm, grad.norm())
        torch.testing.assert_close(made.terms["height"], 100 * loss)
        assert not made.loss.requires_grad
    assert c.params["x"].grad is None, "the closure returns gradients, it leaves none behind"


@pytest.mark.parametrize("memory", [None, 4])
def test_gradient_at_other_parameters(memory: int | None) -> None:
    c = closure(memory=memory)
    before = c.params["x"].detach().clone()
    other = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(c(params={"x": other}).grads["x"], exact(other)[1])
    assert torch.equal(c.params["x"], before)
    assert isinstance(c.params["x"], nn.Parameter)
    assert not other.requires_grad, "what it is given is left as it was"


def test_parameters_come_back_after_an_error() -> None:
    c = closure()
    mine = c.params["x"]
    with pytest.raises(NonFiniteError):
        c(params={"x": torch.full((4,), float("nan"), dtype=torch.float64)})
    assert c.params["x"] is mine
    with pytest.raises(ValueError, match=r"exactly the trained ones; differs in \['y'\]"):
        c(params={"x": mine.detach(), "y": mine.detach()})


@pytest.mark.parametrize("memory", [None, 4])
def test_hessian_vector_product_is_the_matrix(memory: int | None) -> None:
    """What TRPO, HARPG and HNPG need: differentiate the gradient once more, at the parameters and elsewhere."""
    c = closure(memory=memory)
    v = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    for at in (None, {"x": torch.ones(4, dtype=torch.float64).requires_grad_()}):
        made = c(params=at, create_graph=True)
        leaf = c.params["x"] if at is None else at["x"]
        (product,) = torch.autograd.grad((made.grads["x"] * v).sum(), leaf)
        torch.testing.assert_close(product, A.mean(0) @ v)


def test_terms_are_the_loss_undone() -> None:
    c = closure()
    made = c.terms()
    torch.testing.assert_close(made["bowl"].sum(), c().loss)
    assert made["height"].metric
    assert made["bowl"].value.shape == (N,)
    (grad,) = torch.autograd.grad(made["bowl"].sum(), c.params["x"])
    torch.testing.assert_close(grad, c().grads["x"])


class Tied(nn.Module):
    """One parameter under two names: the second use counts as well."""

    provides = frozenset({"value"})

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False).double(), nn.Linear(2, 2, bias=False).double()
        self.second.weight = self.first.weight
        self.still = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        return {"value": self.second(torch.tanh(self.first(batch.b[:, :2]))).sum(1) * self.still.sum()}


def test_tied_weights_move_together_under_other_parameters() -> None:
    model = Tied()
    c = closure(policy=model)
    assert list(c.params) == ["first.weight"], "tied once, frozen not at all"
    other = torch.randn(2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got = c(params={"first.weight": other}).grads["first.weight"]
    assert model.second.weight is model.first.weight
    with torch.no_grad():
        model.first.weight.copy_(other)
    torch.testing.assert_close(got, c().grads["first.weight"])
    leaf = other.clone().requires_grad_()
    value = (torch.tanh(B[:, :2] @ leaf.T) @ leaf.T).sum(1).mean() * 2
    torch.testing.assert_close(got, torch.autograd.grad(value, leaf)[0])


def test_gradients_are_of_the_tracks_own_parameters_only() -> None:
    @piece("loss", wants=("value",), uses=("critic",), reads=("a", "b"), per="row")
    def mixed(kit: Kit, batch: Batch, now: Mapping[str, Tensor]) -> Term:
        critic: Any = kit.models["critic"]
        return Term(now["value"] * critic.evaluate(batch, frozenset())["value"], "mixed")

    critic = Quadratic(-2.0)
    m = method(mixed(), update=adamw(lr=0.1, weight_decay=0.1))
    models = {"policy": Quadratic(), "critic": critic}
    before = critic.x.detach().clone()
    for _ in run(m, None, models, until=3):
        pass
    assert critic.x.grad is None
    assert torch.equal(critic.x, before)
    assert not torch.equal(models["policy"].x, Quadratic().x)
    c = closure(m, critic=critic)
    assert list(c().grads) == ["x"]
    x, y = c.params["x"].detach(), before
    v = [0.5 * torch.einsum("i,nij,j->n", z, A, z) + B @ z for z in (x, y)]
    torch.testing.assert_close(c().grads["x"], ((A @ x + B) * v[1][:, None]).mean(0))


def test_metrics_are_never_summed() -> None:
    plain, loud = closure(), closure(method(bowl()))
    assert torch.equal(plain().loss, loud().loss)
    assert float(plain().terms["bowl"]) == pytest.approx(float(plain().loss))

    @piece("loss", wants=("value",), reads=("a",), per="row")
    def silent(batch: Batch, now: Mapping[str, Tensor]) -> Term:
        return Term(now["value"], "seen", metric=True)  # with a graph, even

    both = closure(method(bowl(), silent()))()
    assert torch.equal(both.loss, plain().loss)
    assert torch.equal(both.grads["x"], plain().grads["x"])
    alone = closure(method(silent()))()
    assert alone.loss == 0
    assert alone.grads["x"].abs().max() == 0


def test_a_parameter_that_no_loss_reads_has_gradient_zero() -> None:
    class Spare(Quadratic):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))

    assert closure(policy=Spare())().grads["spare"].tolist() == [0.0, 0.0]


# -- what a term may be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (N, 3), (3,), (1, 1), (N, 1, 1)])
def test_a_term_that_is_not_one_value_per_decision_or_row_is_refused(shape: tuple[int, ...]) -> None:
    """A term that was reduced already would count once per micro-batch, and depend on how the batch is cut."""

    @piece("loss", wants=("value",), reads=("a",))
    def reduced(batch: Batch, now: Mapping[str, Tensor]) -> Term:
        return Term(now["value"].mean().expand(shape), "reduced")

    with pytest.raises(MethodError, match=r"term 'reduced' has shape .* un-reduced"):
        closure(method(reduced()))()


def test_two_terms_of_one_name_are_refused() -> None:
    @piece("loss", slot="again", wants=("value",), reads=("a",))
    def again(batch: Batch, now: Mapping[str, Tensor]) -> Term:
        return Term(now["value"], "bowl")

    with pytest.raises(MethodError, match="two terms are called 'bowl'"):
        closure(method(bowl(), again()))()


# -- rows that cannot learn --------------------------------------------------------------------------------------


def rows_evaluated(c: Closure, call: bool = False) -> list[int]:
    """Collects how many rows go through the closure's model."""
    seen: list[int] = []
    model: Any = c.model
    evaluate = model.evaluate
    model.evaluate = lambda batch, want: seen.append(len(batch)) or evaluate(batch, want)
    if call:
        c()
    return seen


def surrogate_closures(memory: int | None, m: Method | None = None) -> tuple[Closure, Closure]:
    """The same update with and without skipping idle rows."""
    environment, models = case(0)
    m = (m or toy_grpo()).but(rows=None)
    kit = Kit(begin(m, environment, models), m, memory, False)
    batch = collected(kit)
    dead = torch.arange(len(batch)) % 3 != 0
    batch = batch.put(advantage=batch.advantage.masked_fill(dead[:, None], 0.0))
    kit.scope = "policy"
    one, other = Closure(kit, m.tracks[0], batch), Closure(kit, m.tracks[0], batch)
    other._live = lambda rows: None  # type: ignore[method-assign]
    return one, other


@pytest.mark.parametrize("memory", [None, 1, 5])
def test_skipping_idle_rows_changes_no_gradient(memory: int | None) -> None:
    skipping, whole = surrogate_closures(memory)
    seen = rows_evaluated(skipping)
    fast = skipping()
    assert 0 < sum(seen) <= len(skipping.batch) / 3, "idle rows went through the model"
    slow = whole()
    torch.testing.assert_close(fast.grads["logits"], slow.grads["logits"], rtol=0, atol=1e-15)
    torch.testing.assert_close(fast.loss, slow.loss, rtol=0, atol=1e-15)


def test_with_every_row_idle_the_gradient_is_exactly_zero() -> None:
    skipping, _ = surrogate_closures(None)
    skipping.batch = skipping.batch.put(advantage=torch.zeros_like(skipping.batch.advantage))
    made = skipping()
    assert made.loss == 0
    assert made.grads["logits"].abs().max() == 0
    assert made.norm == 0


def test_rows_are_idle_only_where_the_wraps_are_too() -> None:
    """A wrap that adds a term has a gradient where the surrogate inside has none."""

    @piece("loss")
    def bonus(batch: Batch, now: Mapping[str, Tensor], *, inner: Any) -> list[Term]:
        return [*inner(batch, now), Term(now["logp"], "bonus")]

    skipping, whole = surrogate_closures(None, toy_grpo().wrap("surrogate", bonus()))
    torch.testing.assert_close(skipping().grads["logits"], whole().grads["logits"], rtol=0, atol=1e-15)
    assert len(skipping.batch) == sum(rows_evaluated(skipping, call=True))
    halved, _ = surrogate_closures(None, toy_grpo().wrap("surrogate", scaled(by=0.5)))
    assert sum(rows_evaluated(halved, call=True)) <= len(halved.batch) / 3, "a factor adds nothing"


# -- numbers that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [sgd(lr=0.1), adamw(lr=0.1)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_number_that_is_not_finite_names_the_term_and_changes_nothing(update: Any, kind: str) -> None:
    @piece("loss", wants=("value",), reads=("a",), per="row")
    def sick(kit: Kit, batch: Batch, now: Mapping[str, Tensor]) -> list[Term]:
        value = now["value"]
        if kit.clock.updates == 2:
            bad = {"loss": value * float("inf"), "gradient": (value - value.detach()).abs().sqrt()}[kind]  # 1/sqrt(0)
            value = bad
        return [Term(torch.full_like(value, float("nan")).detach(), "unmeasured", metric=True), Term(value, "sick")]

    m = method(bowl(), sick(), update=update)
    models = {"policy": Quadratic()}
    loop = run(m, None, models, until=9)
    step = next(loop)
    step = next(loop)
    from tests.laws.checks import digest

    before = digest(step.state)
    what = "the value of term 'sick'" if kind == "loss" else r"the gradient of \['bowl', 'sick'\]"
    with pytest.raises(NonFiniteError, match=rf"{what} in track 'policy' is not finite at update 2; no parameter was"):
        next(loop)
    assert digest(step.state) == before


# -- update-scope parts ------------------------------------------------------------------------------------------

SEEN: list[int] = []


@piece("part", at="update", reads=("b",))
def centre(batch: Batch, now: Mapping[str, Tensor]) -> Tensor:
    SEEN.append(len(batch))
    return batch.b.mean() + now["value"].mean()


@piece("loss", slot="centred", wants=("value",), reads=("a", "b"), per="row")
def centred(batch: Batch, now: Mapping[str, Tensor], *, middle: Any) -> Term:
    return Term((now["value"] - middle(batch, now)).square(), "centred")


@pytest.mark.parametrize("memory", [None, 1, 4, 6, 99])
def test_update_scope_parts_see_all_rows_once_and_are_constants(memory: int | None) -> None:
    SEEN.clear()
    c = closure(method(centred(middle=centre())), memory=memory)
    made = [c(), c(), c(where=torch.tensor([0, 1]))]
    assert SEEN == [N]
    x = c.params["x"].detach()
    v = 0.5 * torch.einsum("i,nij,j->n", x, A, x) + B @ x
    d = v - (B.mean() + v.mean())
    g = 2 * d[:, None] * (A @ x + B)
    torch.testing.assert_close(made[0].grads["x"], g.mean(0))
    torch.testing.assert_close(made[1].grads["x"], g.mean(0))
    torch.testing.assert_close(made[2].grads["x"], g[:2].mean(0))


def test_update_scope_parts_are_solved_anew_for_each_update() -> None:
    SEEN.clear()
    m = method(centred(middle=centre()), update=sgd(lr=1e-5)).but(rows=2, passes=2)
    list(run(m, None, {"policy": Quadratic()}, until=2))
    assert SEEN == [2] * 12


@pytest.mark.parametrize("scoped", [False, True])
def test_update_scope_parts_of_a_credit_piece_are_solved_anew_too(scoped: bool) -> None:
    """They must not be remembered from the update before, nor refused because a loss was prepared."""
    seen: list[Tensor] = []

    @piece("part", at="update", reads=("b",))
    def mean_b(batch: Batch) -> Tensor:
        return batch.b.mean()

    @piece("credit", at="update", reads=("b",), writes=("advantage",))
    def against(batch: Batch, now: Any, *, baseline: Any) -> Batch:
        seen.append(baseline(batch) - batch.b.mean())
        return batch.put(advantage=batch.b[:, :1])

    m = method(centred(middle=centre()) if scoped else bowl(), update=sgd(lr=1e-5))
    m = Method("m", pieces=(*m.pieces, against(baseline=mean_b())), tracks=m.tracks, rows=2, passes=2)
    list(run(m, None, {"policy": Quadratic()}, until=2))
    assert len(seen) == 12
    assert all(float(d) == 0 for d in seen)


def test_the_forward_that_prepared_a_part_serves_one_gradient_and_no_other_parameters() -> None:
    c = closure(method(centred(middle=centre())))
    calls: list[int] = []
    model: Any = c.model
    evaluate = model.evaluate
    model.evaluate = lambda batch, want: calls.append(1) or evaluate(batch, want)
    first = c()
    assert calls == [], "the forward was made already"
    second = c()
    assert calls == [1]
    torch.testing.assert_close(first.grads["x"], second.grads["x"])
    c = closure(method(centred(middle=centre())))
    with torch.no_grad():
        c.params["x"].add_(1.0)
    stale = c().grads["x"]
    torch.testing.assert_close(stale, c().grads["x"], msg="the prepared forward was used at other parameters")


def test_a_policy_says_how_many_rows_it_reads_at_once_where_nobody_does() -> None:
    """Unless a forward of all rows is there already."""

    def counted(m: Method | None, memory: int | None) -> tuple[list[int], Tensor]:
        c = closure(m, memory=memory)
        model: Any = c.model
        evaluate, calls = model.evaluate, list[int]()
        model.rows_at_once = lambda batch: 4
        model.evaluate = lambda batch, want: calls.append(len(batch)) or evaluate(batch, want)
        return calls, c().grads["x"]

    whole = exact(Quadratic().x.detach())[1]
    for memory, want in ((None, [4, 2]), (3, [3, 3]), (6, [6])):
        calls, grad = counted(None, memory)
        assert calls == want
        torch.testing.assert_close(grad, whole)
    assert counted(method(centred(middle=centre())), None)[0] == []


def test_updates_run_on_their_own_rows() -> None:
    m = method().but(rows=4)
    state = begin(m, None, {"policy": Quadratic()})
    kit = Kit(state, m, None, False)
    updates(state, kit, collected(kit))
    assert state.clock.updates == 2


@pytest.mark.parametrize("per", ["row", "token"])
def test_shares_of_parts_add_up_to_the_whole(per: str) -> None:
    made = closure(method(bowl(per=per)))
    whole = made()
    parts = [torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([2, 4, 5])]
    shares = [made.share(part) for part in parts]
    loss = sum(share["bowl"].sum() for share in shares)
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(loss, list(made.params.values()))
    torch.testing.assert_close(grad, whole.grads["x"], rtol=1e-12, atol=0)
    height = sum(share["height"].sum() for share in shares) / sum(share["height"].weight.sum() for share in shares)
    torch.testing.assert_close(height, whole.terms["height"], rtol=1e-12, atol=0)
    torch.testing.assert_close(made.share(torch.arange(N))["bowl"].sum(), whole.loss, rtol=1e-12, atol=0)
