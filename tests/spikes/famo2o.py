"""FamO2O on a toy: five learners whose order within one update is the method (Wang et al. 2023, arXiv 2310.17966).

One update, all with the target critic as it was: value, balance, temperature, policy, critic; then the target moves.
The inverse temperature `beta` of advantage-weighted regression becomes an input of the policy, chosen per state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.spikes.famo2o_toy import F64, FIELDS, affine, case, squashed
from trimtab.core.batch import Batch
from trimtab.core.copies import polyak
from trimtab.core.kit import Kit
from trimtab.core.method import Method, Phase, Track
from trimtab.core.phases import phased
from trimtab.core.piece import piece
from trimtab.core.registry import Neutral, method
from trimtab.core.terms import SOURCES, Term
from trimtab.stages.update import adamw

Now = Mapping[str, Tensor]


# -- experience --------------------------------------------------------------------------------------------------


def whole_data(kit: Kit, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """One buffer for the run: it starts with the whole data set."""
    return dict(kit.environment.data)


_COLUMNS = (*FIELDS, "mask", "source")


def drawn(kit: Kit, rows: int) -> Batch:
    """`rows` transitions, uniformly with replacement."""
    buffer = kit.state["replay"]
    index = torch.randint(len(buffer["obs"]), (rows,), generator=kit.rng("replay"))
    source = torch.full((rows,), SOURCES.index("replay"))
    mask = torch.ones(rows, 1, dtype=torch.bool)
    return Batch({**{name: buffer[name][index] for name in FIELDS}, "mask": mask, "source": source})


@piece("collect", state={"replay": whole_data}, writes=_COLUMNS)
def offline(kit: Kit, *, rows: int = 16) -> Batch:
    """Transitions of the data set, T = 1."""
    return drawn(kit, rows)


@piece("collect", state={"replay": whole_data}, writes=_COLUMNS)
def online(kit: Kit, *, rows: int = 16) -> Batch:
    """One decision of the policy, appended to the buffer; then transitions of the buffer."""
    action, _ = kit.actor("policy").act(kit.environment.obs, None, kit.rng("act"))
    new = kit.environment.step(action, kit.rng("environment"))
    kit.state["replay"] = {name: torch.cat([x, new[name]]) for name, x in kit.state["replay"].items()}
    kit.log("reward", new["reward"].mean())
    return drawn(kit, rows)


# -- IQL ---------------------------------------------------------------------------------------------------------


@piece("annotate", at="update", reads=("obs", "action"), writes=("target_value",), uses=("critic_target",))
def target_value(kit: Kit, batch: Batch, now: Now) -> Batch:
    """`min_i Q_i(s, a)` of the target critic at the start of the update, `[N, T]`."""
    return batch.put(target_value=kit.evaluate("critic_target", batch, {"value"})["value"].amin(-1))


@piece("loss", reads=("target_value",), wants=("value",), rows=None)
def expectile(batch: Batch, now: Now, *, tau: float = 0.7) -> Term:
    """`|tau - 1[d <= 0]| d^2`, `d = min_i Q_i(s, a) - V(s)` (IQL, eq. 5)."""
    d = batch.target_value - now["value"]
    return Term((tau - (d <= 0).to(d.dtype)).abs() * d.square(), "expectile")


@piece("credit", at="update", reads=("obs", "target_value"), writes=("advantage",), uses=("value",), rows=None)
def over_value(kit: Kit, batch: Batch, now: Now) -> Batch:
    """`A = min_i Q_i(s, a) - V(s)`, with V as it is when this track's turn comes: already updated."""
    return batch.put(advantage=batch.target_value - kit.evaluate("value", batch, {"value"})["value"])


@piece("part")
def constant(batch: Batch, *, value: float = 10.0) -> float:
    """One inverse temperature for all states."""
    return value


@piece("loss", reads=("action", "advantage"), wants=("logp",), rows=None)
def awr(batch: Batch, now: Now, *, strength: Callable[[Batch], float | Tensor], cap: float = 100.0) -> Term:
    """`-min(exp(beta A), cap) log pi(a | s)`, the weight a constant; `beta` from `strength`."""
    weight = (strength(batch) * batch.advantage).exp().clamp(max=cap)
    return Term(-weight * now["logp"], "awr")


@piece("annotate", at="update", reads=("next_obs", "reward", "terminated"), writes=("target",), uses=("value",))
def bootstrap(kit: Kit, batch: Batch, now: Now, *, gamma: float = 0.99) -> Batch:
    """`y = r + gamma (1 - terminated) V(s')`, with the updated V."""
    v_tp1 = kit.evaluate("value", Batch({"obs": batch.next_obs}), {"value"})["value"]
    return batch.put(target=batch.reward + gamma * v_tp1.masked_fill(batch.terminated, 0.0))


@piece("loss", reads=("target",), wants=("value",), rows=None)
def twin_error(batch: Batch, now: Now) -> Term:
    """`(Q_1 - y)^2 + (Q_2 - y)^2`."""
    return Term((now["value"] - batch.target[..., None]).square().sum(-1), "twin_error")


@method(world="control", title="Implicit Q-learning, offline to online", case="contexts", register=False)
def iql(*, beta: float = 10.0, tau: float = 0.7, lr: float = 3e-3, rows: int = 16, offline_turns: int = 12,
        online_turns: int = 12) -> Method:  # fmt: skip
    """Value by expectile regression, policy by advantage-weighted regression, twin critic; two phases of one buffer."""
    made = Method(
        "iql",
        pieces=(offline(rows=rows), target_value()),
        tracks=(
            Track("value", "value", (expectile(tau=tau),), adamw(lr=lr)),
            Track("policy", "policy", (over_value(), awr(strength=constant(beta))), adamw(lr=lr)),
            Track("critic", "critic", (bootstrap(), twin_error()), adamw(lr=lr)),
        ),
        copies={"critic_target": polyak("critic", 0.005)},
    )
    until = {"turns": offline_turns}, {"turns": online_turns}
    methods = made, made.swap("collect", online(rows=rows))
    return phased("iql", [Phase(n, m, u) for n, m, u in zip(("offline", "online"), methods, until)])


# -- FamO2O ------------------------------------------------------------------------------------------------------


def _ordered(options: Mapping[str, Any]) -> str | None:
    return None if options["lo"] <= options["hi"] else f"lo={options['lo']} is above hi={options['hi']}"


@piece("annotate", slot="balance", at="update", reads=("mask",), writes=("balance",), validate=_ordered)
def uniform_balance(kit: Kit, batch: Batch, now: Now, *, lo: float, hi: float) -> Batch:
    """`beta ~ U[lo, hi]` per decision: the whole family is trained."""
    u = 2 * torch.rand(batch.mask.shape, generator=kit.rng("balance"), dtype=F64) - 1
    return batch.put(balance=affine(u, lo, hi))


@piece("annotate", slot="balance", at="update", reads=("obs", "mask"), writes=("balance",), uses=("balance",),
       validate=_ordered)  # fmt: skip
def learned_balance(kit: Kit, batch: Batch, now: Now, *, lo: float, hi: float) -> Batch:
    """`beta` from the balance policy as it is before this update's balance step; a constant for the policy loss."""
    made = kit.evaluate("balance", batch, {"mean", "std"})
    u, _ = squashed(made["mean"], made["std"], torch.randn(batch.mask.shape, generator=kit.rng("balance"), dtype=F64))
    return batch.put(balance=affine(u, lo, hi))


_SAMPLE = ("balance_noise", "action_noise", "balance_logp")


@piece("annotate", at="update", reads=("obs", "action", "mask"), writes=_SAMPLE, uses=("balance",))
def balance_sample(kit: Kit, batch: Batch, now: Now) -> Batch:
    """The noise of the balance step, `[N, T]` and `[N, T, A]`, and the log-density of its own sample."""
    noise = torch.randn(batch.mask.shape, generator=kit.rng("balance_noise"), dtype=F64)
    action_noise = torch.randn(batch.action.shape, generator=kit.rng("action_noise"), dtype=F64)
    made = kit.evaluate("balance", batch, {"mean", "std"})
    _, logp = squashed(made["mean"], made["std"], noise)
    return batch.put(balance_noise=noise, action_noise=action_noise, balance_logp=logp)


@piece("loss", reads=("obs", "balance_noise", "action_noise"), wants=("mean", "std"),
       uses=("policy", "critic_target", "temperature"), validate=_ordered, rows=None)  # fmt: skip
def improve(kit: Kit, batch: Batch, now: Now, *, lo: float, hi: float) -> Term:
    """`T log pi_b(u|s) - min_i Q_i(s, a)`, `a ~ pi_u(.|s, e(beta(u)))`; the gradient reaches `u` through a and e."""
    u, logp = squashed(now["mean"], now["std"], batch.balance_noise)
    policy, critic, temperature = (kit.models[n] for n in ("policy", "critic_target", "temperature"))
    family = policy.evaluate(Batch({"obs": batch.obs, "balance": affine(u, lo, hi)}), frozenset({"mean", "std"}))
    action = family["mean"] + family["std"] * batch.action_noise
    q = critic.evaluate(Batch({"obs": batch.obs, "action": action}), frozenset({"value"}))["value"].amin(-1)
    return Term(temperature.log.exp().detach() * logp - q, "improve")


@piece("loss", reads=("balance_logp",), wants=("temperature",), rows=None)
def hold_entropy(batch: Batch, now: Now, *, target: float = -0.5) -> Term:
    """`T (H - target)`, `H = -log pi_b(u|s)` of the balance step's sample, a constant."""
    return Term(now["temperature"] * (-batch.balance_logp - target), "hold_entropy")


@piece("part", reads=("balance",))
def chosen(batch: Batch) -> Tensor:
    """The inverse temperature of each decision, from the column `balance`."""
    return batch.balance


class ByBalance:
    """The universal policy at the `beta` that the balance policy's mean gives."""

    def __init__(self, policy: Any, balance: nn.Module, lo: float, hi: float) -> None:
        self.policy, self.balance, self.lo, self.hi = policy, balance, lo, hi

    def act(self, obs: Tensor, carry: Any, rng: torch.Generator) -> tuple[Tensor, Any]:
        mean = self.balance.evaluate(Batch({"obs": obs}), frozenset({"mean"}))["mean"]
        return self.policy.act(obs, carry, rng, balance=affine(mean.tanh(), self.lo, self.hi))


@piece("act", uses=("balance",), validate=_ordered)
def act_by_balance(kit: Kit, policy: Any, *, lo: float, hi: float) -> ByBalance:
    """`beta = affine(tanh(mean of pi_b))`, then the policy's own sampling."""
    return ByBalance(policy, kit.models["balance"], lo, hi)


@method(
    world="control",
    title="Train once, get a family (FamO2O)",
    arxiv="2310.17966",
    case="contexts",
    base=iql,
    neutral=Neutral({"lo": 10.0, "hi": 10.0}, level="exact", why="a degenerate range is IQL with one constant input"),
    register=False,
)
def famo2o(base: Method, *, lo: float = 8.0, hi: float = 14.0, target: float = -0.5, every: int = 1,
           lr: float = 3e-3) -> Method:  # fmt: skip
    """Edits to IQL, in both phases: the strength of the regression is the column `balance`, an input of the policy;
    a balance policy and its temperature learn between value and policy. Offline `balance` is uniform in [lo, hi];
    online it is sampled from the balance policy, which also acts. every: balance and temperature on each k-th update.
    """

    def edit(phase: str, one: Method) -> Method:
        source = uniform_balance(lo=lo, hi=hi) if phase == "offline" else learned_balance(lo=lo, hi=hi)
        made = one.swap("policy:awr.strength", chosen()).then(source, balance_sample())
        if phase == "online":
            made = made.then(act_by_balance(lo=lo, hi=hi))
        balance = Track("balance", "balance", (improve(lo=lo, hi=hi),), adamw(lr=lr), every=every)
        temperature = Track("temperature", "temperature", (hold_entropy(target),), adamw(lr=lr), every=every)
        return made.but(track=balance, before="policy").but(track=temperature, before="policy")

    return base.each(edit)


CASES = {"iql": (iql, case), "famo2o": (famo2o, case)}
