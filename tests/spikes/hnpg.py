"""HNPG on a small combination lock: a critic on online returns and offline TD, a natural step on both distributions.

Zhou, Sekhari, Song and Sun 2023, arXiv 2311.08384, Algorithms 4 and 5. A row is one transition (T = 1): `turn` is its
step h, so that `where` can pick the rows of one step. Policies and critics of all steps are stacked in one module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.spikes.hnpg_toy import Lock, StackedCritic, StackedPolicy
from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.kit import Kit
from trimtab.core.loop import rows_where
from trimtab.core.method import Method, Track
from trimtab.core.piece import piece
from trimtab.core.registry import Neutral, method
from trimtab.core.terms import SOURCES, Term, rows_of
from trimtab.stages.annotate import logp_old
from trimtab.stages.surrogate import pessimistic, surrogate, token_ratio

Vector = dict[str, Tensor]
Report = tuple[dict[str, float | Tensor], bool]

# -- collect -------------------------------------------------------------------------------------------------------

_COLUMNS = ("obs", "action", "mask", "reward", "next_obs", "terminated", "turn", "episode", "logp_behavior", "source",
            "age")  # fmt: skip


def transitions(made: Mapping[str, Tensor], source: str) -> Batch:
    """`[n, H, ...]` transitions as rows with one decision each, episode by episode."""
    flat = {name: column.flatten(0, 1) for name, column in made.items()}
    n = len(flat["turn"])
    rows = {name: c if name in ("turn", "episode") else c[:, None] for name, c in flat.items()}
    return Batch(
        {
            **rows,
            "mask": torch.ones(n, 1, dtype=torch.bool),
            "source": torch.full((n,), SOURCES.index(source)),
            "age": torch.zeros(n, dtype=torch.long),
        }
    )


@piece("collect", writes=_COLUMNS)
def lock_episodes(kit: Kit, *, episodes: int = 20) -> Batch:
    """`episodes` whole episodes of the policy, one row per step."""
    policy: Any = kit.models["policy"]
    rng = kit.rng("rollout")

    def decide(latent: Tensor, h: int) -> Tensor:
        obs = kit.environment.observe(latent, h)[:, None]
        made: Tensor = policy.sample(obs, torch.full_like(latent, h), rng)
        return made[:, 0]

    batch = transitions(kit.environment.play(decide, episodes, rng), "policy")
    score = batch.reward[:, 0].reshape(episodes, -1)[:, -1]
    kit.log("reward", score.mean())
    kit.log("solved", (score == 1).double().mean())
    return batch.put(logp_behavior=policy.evaluate(batch, {"logp"})["logp"])


@piece("collect", writes=_COLUMNS)
def with_offline(kit: Kit, *, inner: Callable[[], Batch], share: float = 1.0) -> Batch:
    """A wrap: for each step, `share` times as many transitions of that step's offline buffer (source "expert")."""
    online = inner()
    data, horizon = kit.environment.offline, kit.environment.horizon
    n = round(share * len(online) / horizon)
    pick = torch.randint(len(data["turn"]), (n, horizon), generator=kit.rng("offline"))
    made = {name: column[pick, torch.arange(horizon)] for name, column in data.items()}
    made["episode"] = torch.full_like(made["episode"], -1)  # steps are drawn one by one: no episode holds them
    # Behaviour is not known offline; the policy track replaces it together with the actions.
    unknown = torch.full_like(made["reward"], float("nan"))
    return Batch.cat([online, transitions({**made, "logp_behavior": unknown}, "expert")])


# -- returns, values, advantages -------------------------------------------------------------------------------------


def returns_of(reward: Tensor, more: Tensor) -> Tensor:
    """`y_i = r_i + y_{i+1} more_i` over a flat stream of episodes, `[n]`; `more` is 0 at the last step of each."""
    made, after = [], 0.0
    for r, m in zip(reward.flip(0).tolist(), more.flip(0).tolist()):
        after = r + after * m
        made.append(after)
    return reward.new_tensor(made[::-1])


def gae_of(reward: Tensor, value: Tensor, more: Tensor, lam: float) -> Tensor:
    """`A_i = delta_i + lam A_{i+1} more_i`, `delta_i = r_i + V_{i+1} more_i - V_i` (undiscounted), `[n]`."""
    made, after, value_next = [], 0.0, 0.0
    for r, v, m in zip(reward.flip(0).tolist(), value.flip(0).tolist(), more.flip(0).tolist()):
        after = r + value_next * m - v + lam * after * m
        value_next = v
        made.append(after)
    return reward.new_tensor(made[::-1])


def in_order(batch: Batch) -> Tensor:
    """Rows sorted by episode, then by turn: what the recursions walk over."""
    by_turn = torch.argsort(batch.turn, stable=True)
    return by_turn[torch.argsort(batch.episode[by_turn], stable=True)]


@piece("annotate", reads=("reward", "terminated", "turn", "episode"), writes=("outcome",))
def outcomes(batch: Batch) -> Batch:
    """`outcome` [N, 1]: undiscounted reward-to-go of the policy's rows; 0 elsewhere, as a nan reaches the gradient."""
    outcome = torch.zeros_like(batch.reward)
    mine = rows_of(batch, "policy").nonzero().squeeze(1)
    rows = mine[in_order(batch.take(mine))]
    outcome[rows, 0] = returns_of(batch.reward[rows, 0], ~batch.terminated[rows, 0])
    return batch.put(outcome=outcome)


@piece("annotate", reads=("next_obs", "turn"), writes=("next_action",))
def next_actions(kit: Kit, batch: Batch) -> Batch:
    """`next_action` [N, 1]: one sample `a' ~ pi_{h+1}(s')`, drawn once for the whole sweep."""
    policy: Any = kit.models["policy"]
    after = (batch.turn + 1).clamp_max(kit.environment.horizon - 1)
    return batch.put(next_action=policy.sample(batch.next_obs, after, kit.rng("next")))


@piece("annotate", reads=("obs", "action", "turn", "mask"), writes=("value", "logits_old"), uses=("critic",))
def values(kit: Kit, batch: Batch, *, samples: int = 10) -> Batch:
    """`value` [N, 1]: `V_h(s)`, the mean of `f_h(s, a)` over `samples` actions of the policy; and its distribution."""
    policy: Any = kit.models["policy"]
    critic: Any = kit.models["critic"]
    rng, total = kit.rng("value"), torch.zeros(len(batch), 1, dtype=torch.float64)
    for _ in range(samples):
        total += critic.score(batch.obs, batch.turn, policy.sample(batch.obs, batch.turn, rng))
    return batch.put(value=total / samples, logits_old=kit.evaluate("policy", batch, {"logits"})["logits"])


@piece("annotate", reads=("obs", "action", "logp_behavior", "source", "turn", "mask"),
       writes=("action", "logp_behavior"))  # fmt: skip
def resampled(kit: Kit, batch: Batch, *, inner: Callable[[Batch], Batch]) -> Batch:
    """A wrap: the expert's rows get actions of the policy before the piece inside looks at them."""
    policy: Any = kit.models["policy"]
    theirs = rows_of(batch, "expert")
    drawn = policy.sample(batch.obs, batch.turn, kit.rng("resample"))
    fresh = batch.put(action=torch.where(theirs[:, None], drawn, batch.action))
    logp = torch.where(theirs[:, None], kit.evaluate("policy", fresh, {"logp"})["logp"], batch.logp_behavior)
    return inner(fresh.put(logp_behavior=logp))


@piece("credit", reads=("reward", "value", "terminated", "turn", "episode"), writes=("advantage",))
def gae(batch: Batch, *, lam: float = 0.97) -> Batch:
    """`advantage` [N, 1]: generalised advantages along each episode, undiscounted, not normalised."""
    rows = in_order(batch)
    advantage = torch.zeros_like(batch.reward)
    more = ~batch.terminated[rows, 0]
    advantage[rows, 0] = gae_of(batch.reward[rows, 0], batch.value[rows, 0], more, lam)
    return batch.put(advantage=advantage)


@piece("credit", reads=("obs", "action", "value", "turn", "source", "mask"), writes=("advantage",), uses=("critic",))
def by_critic(kit: Kit, batch: Batch, *, inner: Callable[[Batch], Batch]) -> Batch:
    """A wrap: the credit inside for the policy's rows, `f_h(s, a) - V_h(s)` for the expert's."""
    mine = rows_of(batch, "policy")
    critic: Any = kit.models["critic"]
    advantage = critic.score(batch.obs, batch.turn, batch.action) - batch.value
    credited = inner(batch.take(mine))
    return batch.put(advantage=advantage.index_copy(0, mine.nonzero().squeeze(1), credited.advantage))


# -- losses --------------------------------------------------------------------------------------------------------


@piece("loss", reads=("outcome", "mask"), wants=("value",), rows="policy")
def monte_carlo(batch: Batch, now: Mapping[str, Tensor]) -> Term:
    """`(f_h(s, a) - y)^2` on online rows."""
    return Term((now["value"] - batch.outcome).square(), "monte_carlo")


@piece("loss", reads=("reward", "next_action", "next_obs", "terminated", "mask"), wants=("value", "value_next"),
       rows="expert")  # fmt: skip
def temporal_difference(batch: Batch, now: Mapping[str, Tensor]) -> Term:
    """`(f_h(s, a) - r - stopgrad f_{h+1}(s', a'))^2` on offline rows."""
    return Term((now["value"] - batch.reward - now["value_next"].detach()).square(), "temporal_difference")


@piece("loss", slot="kl", reads=("logits_old", "mask"), wants=("logits",))
def kl_from_old(batch: Batch, now: Mapping[str, Tensor]) -> Term:
    """`KL(pi_old || pi)` per decision, exact; a metric, never summed: the update's trust region and its curvature."""
    old = batch.logits_old
    return Term((old.exp() * (old - now["logits"])).sum(-1), "kl", metric=True)


# -- updates -------------------------------------------------------------------------------------------------------


@piece("update", reads=("turn",))
def backward_sweep(kit: Kit, closure: Closure, *, steps: int = 30, lr: float = 3e-4) -> Report:
    """For h = H-1 .. 0: `steps` full-batch Adam steps, of a fresh Adam, on the rows of step h.

    A row of step h reaches no other step's weights (its TD target is a constant), so theirs have a zero gradient and
    a fresh Adam leaves them alone. f_{h+1} is therefore final when it becomes the target of step h.
    """
    logs: dict[str, float | Tensor] = {}
    for h in reversed(range(int(closure.batch.turn.max()) + 1)):
        rows = rows_where(closure.batch, "turn", h)
        optimizer = torch.optim.Adam(closure.params.values(), lr=lr)
        for _ in range(steps):
            made = closure(where=rows)
            for name, parameter in closure.params.items():
                parameter.grad = made.grads[name]
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        logs[f"loss_{h}"] = made.loss
    return logs, False


@piece("update", reads=("turn",))
def natural_gradient(
    kit: Kit,
    closure: Closure,
    *,
    max_kl: float = 0.01,
    damping: float = 0.1,
    iterations: int = 10,
    halvings: int = 10,
    least: float = 0.1,
) -> Report:
    """One trust-region step for every h: conjugate gradient, then a line search that also checks the KL.

    max_kl: bound of the mean KL over the rows of a step. damping: added to the Fisher matrix. least: smallest ratio of
    actual to expected improvement. A zero gradient, or no acceptable point, leaves the policy where it is.
    """
    accepted = []
    for h in range(int(closure.batch.turn.max()) + 1):
        rows = rows_where(closure.batch, "turn", h)
        made = closure(where=rows)
        if not bool(made.norm > 0):
            accepted.append(0.0)
            continue
        fisher = fisher_product(closure, rows, damping)
        minus = {n: -g for n, g in made.grads.items()}
        direction = conjugate_gradient(fisher, minus, iterations)
        step = (max_kl / (0.5 * dot(direction, fisher(direction)))).sqrt()
        full = {n: step * d for n, d in direction.items()}
        limits = {"max_kl": max_kl, "halvings": halvings, "least": least}
        accepted.append(line_search(closure, rows, made.loss, full, dot(minus, full), **limits))
    return {"step": sum(accepted) / len(accepted)}, False


def line_search(
    closure: Closure,
    rows: Tensor,
    loss: Tensor,
    full: Vector,
    expected: Tensor,
    *,
    max_kl: float,
    halvings: int,
    least: float,
) -> float:
    """The largest share 1, 1/2, 1/4 ... of `full` that improves enough and keeps the KL; taken in place, 0 if none."""
    old = {n: p.detach().clone() for n, p in closure.params.items()}
    for k in range(halvings):
        share = 0.5**k
        candidate = {n: p + share * full[n] for n, p in old.items()}
        with torch.no_grad():
            terms = {name: w.sum() for name, w in closure.terms(params=candidate, where=rows).items()}
        gain = loss - terms["surrogate"]
        if bool(gain > 0) and bool(gain > least * share * expected) and bool(terms["kl"] <= max_kl):
            with torch.no_grad():
                for name, parameter in closure.params.items():
                    parameter.copy_(candidate[name])
            return share
    return 0.0


def dot(a: Vector, b: Vector) -> Tensor:
    return torch.stack([(a[n] * b[n]).sum() for n in a]).sum()


def fisher_product(closure: Closure, rows: Tensor, damping: float) -> Callable[[Vector], Vector]:
    """`v -> F v + damping v`, `F` the Hessian of the mean KL at the current parameters."""
    at = {n: p.detach().clone().requires_grad_() for n, p in closure.params.items()}
    kl = closure.terms(params=at, where=rows)["kl"].sum()
    first = dict(zip(at, torch.autograd.grad(kl, list(at.values()), create_graph=True)))

    def product(v: Vector) -> Vector:
        made = torch.autograd.grad(dot(first, v), list(at.values()), retain_graph=True)
        return {n: f + damping * v[n] for n, f in zip(at, made)}

    return product


def conjugate_gradient(
    product: Callable[[Vector], Vector], b: Vector, iterations: int, tolerance: float = 1e-10
) -> Vector:
    """`x` with `product(x) = b`, from 0, stopping once the squared residual is below `tolerance`."""
    x = {n: torch.zeros_like(v) for n, v in b.items()}
    r, p, left = dict(b), dict(b), dot(b, b)
    for _ in range(iterations):
        if bool(left < tolerance):
            break
        ap = product(p)
        alpha = left / dot(p, ap)
        x = {n: v + alpha * p[n] for n, v in x.items()}
        r = {n: v - alpha * ap[n] for n, v in r.items()}
        left, before = dot(r, r), left
        p = {n: v + left / before * p[n] for n, v in r.items()}
    return x


# -- methods -------------------------------------------------------------------------------------------------------


@method(world="control", title="TRPO with a Q critic fitted to returns, per step of a finite horizon", case="lock",
        register=False)  # fmt: skip
def trpo_q(
    *,
    episodes: int = 20,
    lam: float = 0.97,
    samples: int = 10,
    max_kl: float = 0.01,
    damping: float = 0.1,
    steps: int = 30,
    critic_lr: float = 3e-4,
) -> Method:
    """Critic: regression of returns. Policy: a natural step on generalised advantages of the new critic."""
    return Method(
        "trpo_q",
        pieces=(lock_episodes(episodes=episodes),),
        tracks=(
            Track("critic", trains="critic", pieces=(outcomes(), monte_carlo()),
                  update=backward_sweep(steps=steps, lr=critic_lr)),
            Track("policy", trains="policy",
                  pieces=(logp_old(), values(samples=samples), gae(lam=lam),
                          surrogate(ratio=token_ratio(), shape=pessimistic()), kl_from_old()),
                  update=natural_gradient(max_kl=max_kl, damping=damping)),
        ),
    )  # fmt: skip


@method(
    world="control",
    title="Offline Data Enhanced On-Policy Policy Gradient with Provable Guarantees (HNPG)",
    arxiv="2311.08384",
    base=trpo_q,
    case="lock",
    register=False,
    neutral=Neutral({"offline": 0.0}),
)
def hnpg(base: Method, *, offline: float = 1.0) -> Method:
    """Edits to trpo_q: offline rows in the batch; a TD loss on them; their states, with fresh actions, in the step.

    offline: offline transitions per online one, at every step h. The paper takes offline actions into the linear
    critic; the released code resamples them from the policy, which a likelihood ratio needs. We follow the code, and
    re-check the KL in the line search as the paper does.
    """
    both = ("policy", "expert")
    return (
        base.wrap("collect", with_offline(share=offline))
        .on("critic")
        .then(next_actions(), temporal_difference())
        .wrap("policy:logp_old", resampled())
        .swap("policy:credit.rows", both)
        .wrap("policy:credit", by_critic())
        .swap("policy:surrogate.rows", both)
    )


def case(seed: int = 0) -> tuple[Lock, dict[str, nn.Module]]:
    lock = Lock()
    return lock, {"policy": StackedPolicy(lock, 0.1, seed), "critic": StackedCritic(lock, 0.1, seed + 1)}


CASES = {"trpo_q": (trpo_q, case), "hnpg": (hnpg, case)}
