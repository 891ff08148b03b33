"""GoRL: the card's exact checks, what each phase may touch, and resuming inside and between phases."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.spikes.gorl import CASES, case, gorl, latent_penalty, ppo, value_error
from tests.spikes.gorl_toy import F64, Points, Velocity, transport
from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method
from trimtab.core.piece import piece
from trimtab.core.state import State, load, save
from trimtab.core.terms import reduce, weights

torch.set_num_threads(1)
TURNS, ENCODE = 16, (1, 2, 3, 4, 9, 10, 11, 12)  # refine 0: 5-8, refine 1: 13-16
SAVED = (2, 4, 5, 8, 10, 12, 14)  # inside each phase; 4, 8 and 12 are exactly at a boundary


def steps(method: Method, turns: int = TURNS, seed: int = 0, **options: Any) -> Any:
    environment, models = case(seed)
    return run(method, environment, models, until=turns, **options)


def parameters(state: State) -> dict[str, Tensor]:
    return {f"{m}.{k}": v.clone() for m, module in state.lookup().items() for k, v in module.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def in_phase(method: Method, index: int, edit: Callable[[Method], Method]) -> Method:
    """The method with one of its phases edited."""
    phases = list(method.phases)
    phases[index] = replace(phases[index], method=edit(phases[index].method))
    return method.but(phases=tuple(phases))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def random_decoder() -> Velocity:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Velocity()


# -- the card's exact checks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 10])
def test_zero_weights_decode_to_the_latent_itself(k: int) -> None:
    decoder = case()[1]["decoder"]
    z = noise(5, 2)
    assert torch.equal(transport(decoder, noise(5, 2, seed=1), z, k), z)


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_a_constant_target_is_reached_from_every_latent(k: int) -> None:
    target = torch.tensor([0.7, -1.3], dtype=F64)

    def velocity(obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (x - target) / t[..., None]

    landed = transport(velocity, noise(6, 2), 3 * noise(6, 2, seed=1), k)
    torch.testing.assert_close(landed, target.expand(6, 2), atol=1e-14, rtol=0)


def test_decoding_is_deterministic_and_keeps_dimensions() -> None:
    decoder, obs, z = random_decoder(), noise(5, 2), noise(5, 2, seed=1)
    once = transport(decoder, obs, z, 10)
    assert torch.equal(once, transport(decoder, obs, z, 10))
    assert not torch.equal(once, z)
    with pytest.raises(ValueError, match="3 dimensions and the action 2"):
        transport(lambda obs, x, t: x[..., :2], obs, noise(5, 3), 1)


@dataclass
class Turn:
    """What one turn of the recorded run left behind."""

    parameters: dict[str, Tensor]
    frozen: list[str]
    counts: dict[str, int]
    pairs: dict[str, Tensor]

    @classmethod
    def of(cls, state: State) -> Turn:
        optimizers = {k.removesuffix("/optimizer"): v.state for k, v in state.pieces.items() if "optimizer" in k}
        counts = {k: int(next(iter(v.values()))["step"]) if v else 0 for k, v in optimizers.items()}
        return cls(parameters(state), state.phases.frozen, counts, state.pieces["/pairs"])

    def digest(self, model: str) -> str:
        held = [v.numpy().tobytes() for name, v in self.parameters.items() if name.startswith(f"{model}.")]
        return hashlib.sha256(b"".join(held)).hexdigest()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, Turn], dict[int, Path], dict[str, Any]]:
    """One run through two stages: every turn, and checkpoints of some."""
    folder, turns, saved = tmp_path_factory.mktemp("gorl"), {}, {}
    for step in steps(gorl()):
        turns[step.turn] = Turn.of(step.state)
        if step.turn in SAVED:
            saved[step.turn] = save(step.state, folder / str(step.turn))
    return turns, saved, step.state.tree()


def test_each_phase_touches_only_what_it_trains(recorded: Any) -> None:
    turns, _, _ = recorded
    for t in range(2, TURNS + 1):
        names = ("policy", "critic", "decoder", "acting")
        moved = {name for name in names if turns[t].digest(name) != turns[t - 1].digest(name)}
        if t in ENCODE:
            assert moved == {"policy", "critic"} | ({"acting"} if t == 9 else set())  # 9: the new decoder is in force
        else:
            assert moved == {"decoder"}
    assert all(torch.equal(turns[9].parameters[f"acting.{k}"], turns[8].parameters[f"decoder.{k}"])
               for k, _ in case()[1]["decoder"].named_parameters())  # fmt: skip
    assert [turns[t].frozen for t in (1, 5, 9, 13)] == [["decoder"], ["critic", "policy"]] * 2


@piece("update")
def watched(kit: Kit, closure: Closure, *, inner: Any, book: list[Any]) -> Any:
    """A wrap: notes the largest |log ratio| of each update, and that of each turn's first to the sampler's own."""
    logp, rows = kit.evaluate("policy", closure.batch, {"logp"})["logp"], closure.batch
    gaps = [float((logp - rows[name]).abs().max()) for name in ("logp_old", "logp_behavior")]
    book.append((kit.clock.updates, *gaps))
    return inner(closure)


def test_the_ratio_is_one_at_the_first_minibatch_of_every_batch() -> None:
    book: list[Any] = []
    method = gorl()
    for index in (0, 2):
        method = in_phase(method, index, lambda one: one.on("policy").wrap("update", watched(book=book)))
    for _ in steps(method):
        pass
    assert len(book) == 8 * 4  # eight encode turns of 2 passes x 2 parts
    for i, (_, old, behavior) in enumerate(book):
        assert (max(old, behavior) < 1e-12) == (i % 4 == 0)


def rows_of_three() -> tuple[Kit, Batch]:
    environment, models = case()
    state = begin(ppo(), environment, models)
    truncated = torch.tensor([[False, True], [False, False], [True, False]])
    columns = {"mask": torch.ones(3, 2, dtype=torch.bool), "truncated": truncated, "value_target": noise(3, 2)}
    return Kit(state, ppo(), None, False), Batch(columns)


def test_the_penalty_pulls_on_mu_and_sigma() -> None:
    kit, batch = rows_of_three()
    mean, std = noise(3, 2, 2).requires_grad_(), noise(3, 2, 2, seed=1).exp().requires_grad_()
    one = latent_penalty(0.3)
    term = one(kit, batch, {"mean": mean, "std": std})
    loss = reduce(term.value, weights(batch, one.options, F64)[0], "token")
    by_mean, by_std = torch.autograd.grad(loss, (mean, std))
    torch.testing.assert_close(by_mean, 2 * 0.3 * mean.detach() / (3 * 2 * 2))
    torch.testing.assert_close(by_std, 2 * 0.3 * std.detach() / (3 * 2 * 2))


def test_the_value_loss_ignores_cut_steps() -> None:
    kit, batch = rows_of_three()
    value = noise(3, 2, seed=2).requires_grad_()
    one = value_error(0.25)
    loss = reduce(one(kit, batch, {"value": value}).value, weights(batch, one.options, F64)[0], "token")
    (g,) = torch.autograd.grad(loss, value)
    expected = 2 * 0.25 * (value.detach() - batch.value_target) / 6 * ~batch.truncated
    torch.testing.assert_close(g, expected)
    assert (g[batch.truncated] == 0).all()


@pytest.mark.parametrize(("paired", "mean", "std"), [(False, 0.5, 0.3), (True, 0.0, 1.0)])
def test_fresh_noise_consolidates_and_paired_noise_returns_the_old_decoder(
    paired: bool, mean: float, std: float
) -> None:
    """Actions ~ N(0.5, 0.3^2): the fitted decoder maps N(0, 1) onto them; fitted on pairs, onto itself."""
    _, models = case()
    for p in models["policy"].parameters():
        nn.init.zeros_(p)
    with torch.no_grad():
        models["policy"].net[2].bias.copy_(torch.tensor([0.5, 0.5, -1.054, -1.054]))  # softplus(-1.054) + 1e-3 = 0.3
    method = gorl(stages=1, encode=0, wanted=1024, decoder_rows=128, decoder_lr=0.01, steps=10)
    method = in_phase(method, 1, lambda one: one.set("decoder:bridge.paired", True)) if paired else method
    for _ in run(method, Points(64), models, until=40):
        pass
    with torch.no_grad():  # 50 steps: with 10, Euler alone would make even the exact velocity's std 17 % too small
        u = transport(models["decoder"], 2 * noise(2000, 2, seed=1).sigmoid() - 1, noise(2000, 2), 50)
    assert abs(float(u.mean()) - mean) < 0.05
    assert abs(float(u.std(0).mean()) / std - 1) < 0.08


# -- neutral, phases, resume, memory -----------------------------------------------------------------------------


def test_the_zero_decoder_is_ppo_bitwise() -> None:
    *_, a = steps(ppo(), 6)  # 24 updates
    *_, b = steps(gorl(**gorl.neutral.options), 6)
    made = parameters(b.state)
    for name, value in parameters(a.state).items():
        assert torch.equal(value, made[name]), name
    assert same(a.state.environment.state_dict(), b.state.environment.state_dict())


def test_an_encode_phase_starts_from_scratch_and_a_refine_phase_from_new_data(recorded: Any) -> None:
    turns, _, _ = recorded
    assert turns[4].counts["policy"] == 16
    assert turns[8].counts["decoder"] == 12  # 48 pairs in parts of 16, four epochs
    assert turns[9].counts["policy"] == turns[9].counts["critic"] == 4  # one turn after a fresh start
    assert turns[13].counts["decoder"] == 3
    assert turns[4].pairs == {}
    assert all(same(turns[5].pairs, turns[t].pairs) for t in range(6, 13))
    assert not same(turns[5].pairs, turns[13].pairs)
    # The encoder that plays the pairs is the best of its own stage, not of the one before.
    for stage, after in ((range(1, 5), 5), (range(9, 13), 13)):
        best = turns[after].parameters["best.net.0.weight"]
        assert any(torch.equal(best, turns[t].parameters["policy.net.0.weight"]) for t in stage)


@pytest.mark.parametrize("turn", SAVED)
def test_resumes_bitwise(recorded: Any, turn: int) -> None:
    _, saved, tree = recorded
    environment, models = case(5)
    state = begin(gorl(), environment, models, seed=9)
    assert load(state, saved[turn]) == []
    *_, step = run(gorl(), environment, models, until=TURNS, state=state)
    assert same(step.state.tree(), tree)


@pytest.mark.parametrize("memory", [1, 4])
def test_memory_changes_nothing(recorded: Any, memory: int) -> None:
    turns, _, _ = recorded
    until = TURNS if memory > 1 else 10
    *_, step = steps(gorl(), until, memory=memory, debug=memory > 1)
    made = parameters(step.state)
    for name, value in turns[until].parameters.items():
        torch.testing.assert_close(value, made[name], atol=1e-10, rtol=0)


def test_every_case_runs() -> None:
    for builder, models in CASES.values():
        *_, step = run(builder(), *models(0), until=2)
        assert step.turn == 2
