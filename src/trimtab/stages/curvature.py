"""What a decision's own update would do, to second order, by a model of the last linear layer alone.

Logits are `z = W x`, so the gradient of `c log pi(a)` towards W has one row per token, `g_k = c v_k x` with
`v = e_a - pi`, and everything below is dot products. Shapes: M decisions, K tokens each, H the width of x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Numbers of one temporary, `[m, K, H]`: 64 MiB in float32.
AT_ONCE = 2**24


class Decisions(NamedTuple):
    """c `[M]` the weight of log pi in the objective; v, pi `[M, K]`; ids long `[M, K]` the tokens; x `[M, H]`."""

    c: Tensor
    v: Tensor
    pi: Tensor
    ids: Tensor
    x: Tensor

    def at(self, some: slice | Tensor) -> Decisions:
        return Decisions(*(column[some] for column in self))


class Moments(NamedTuple):
    """Adam's, as the model holds them: of the tokens that were seen, ids long `[R]` ascending, m and s `[R, H]`.

    step: how many updates were made.
    """

    ids: Tensor
    m: Tensor
    s: Tensor
    step: int


class Adam(NamedTuple):
    """The options of the optimiser that is modelled."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def decisions(c: Tensor, top: Tensor, ids: Tensor, action: Tensor, logp: Tensor, x: Tensor) -> Decisions:
    """From the K largest log-probabilities `[M, K]`; an action that is not among them takes the place of the last."""
    missing = ~(ids == action[:, None]).any(1)
    ids = torch.cat([ids[:, :-1], torch.where(missing, action, ids[:, -1])[:, None]], 1)
    top = torch.cat([top[:, :-1], torch.where(missing, logp, top[:, -1])[:, None]], 1)
    pi = top.softmax(-1)
    return Decisions(c, (ids == action[:, None]).to(pi.dtype) - pi, pi, ids, x)


def effect(d: Decisions, moments: Moments | None, adam: Adam) -> Tensor:
    """`u_k = p_k . x`, `[M, K]`: how the logits move, per unit of step, if this decision alone made the update.

    p is g itself without moments (plain gradient steps, and Adam before its first update), else what Adam would make
    of it: `m' / (1 - b1^t) / (sqrt(s' / (1 - b2^t)) + eps)`, t the next step; tokens never seen have m = s = 0.
    """
    if moments is None:
        return (d.c * d.x.square().sum(1))[:, None] * d.v
    (b1, b2), t = adam.betas, moments.step + 1
    made = []
    for part in _parts(d):
        g = (part.c[:, None] * part.v)[..., None] * part.x[:, None]
        m, s = (_held(moments, of, part.ids) for of in (moments.m, moments.s))
        m, s = b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g.square()
        p = m / (1 - b1**t) / ((s / (1 - b2**t)).sqrt() + adam.eps)
        made.append((p @ part.x[..., None]).squeeze(-1))
    return torch.cat(made) if made else d.v


def predicted(d: Decisions, u: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """`(m_F, m_H)`, `[M]`: the change of the policy, `(lr d)^2 / 2`, and that of the objective, with d = v . u.

        m_H = lr c d + lr^2 c (d^2 - Var_pi(u)) / 2

    `lr d` is the first-order change of log pi(a); m_H is the second-order change of `c pi_new(a) / pi_old(a)`.
    """
    change = (d.v * u).sum(1)
    variance = (d.pi * u.square()).sum(1) - (d.pi * u).sum(1).square()
    return (lr * change).square() / 2, lr * d.c * change + lr**2 * d.c * (change.square() - variance) / 2


def learned(moments: Moments | None, d: Decisions, adam: Adam) -> Moments:
    """The moments after an update on these decisions: of each token, by the mean of g where it is among the K.

    A token that no decision has keeps its moments as they were.
    """
    ids, place, count = d.ids.unique(return_inverse=True, return_counts=True)
    mean = d.x.new_zeros(len(ids), d.x.shape[1])
    for part, where in zip(_parts(d), place.split(_step(d))):
        mean.index_add_(0, where.flatten(), ((part.c[:, None] * part.v)[..., None] * part.x[:, None]).flatten(0, 1))
    mean = mean / count[:, None]
    if moments is None:
        moments = Moments(ids[:0], mean[:0], mean[:0], 0)
    both = torch.cat([moments.ids, ids]).unique()
    old, new = torch.searchsorted(both, moments.ids), torch.searchsorted(both, ids)
    made = []
    for held, beta, g in ((moments.m, adam.betas[0], mean), (moments.s, adam.betas[1], mean.square())):
        value = mean.new_zeros(len(both), mean.shape[1]).index_copy(0, old, held)
        made.append(value.index_copy(0, new, beta * value[new] + (1 - beta) * g))
    return Moments(both, made[0], made[1], moments.step + 1)


def _held(moments: Moments, of: Tensor, ids: Tensor) -> Tensor:
    """Rows of a moment `[R, H]` for these tokens `[m, K]`, `[m, K, H]`; 0 where a token was never seen."""
    if not len(moments.ids):
        return of.new_zeros(*ids.shape, of.shape[1])
    place = torch.searchsorted(moments.ids, ids).clamp_max(len(moments.ids) - 1)
    return of[place] * (moments.ids[place] == ids)[..., None]


def _step(d: Decisions) -> int:
    return max(1, AT_ONCE // max(1, d.v.shape[1] * d.x.shape[1]))


def _parts(d: Decisions) -> list[Decisions]:
    return [d.at(slice(i, i + _step(d))) for i in range(0, len(d.c), _step(d))]


def as_state(moments: Moments) -> dict[str, Any]:
    """For the state tree."""
    return moments._asdict()
