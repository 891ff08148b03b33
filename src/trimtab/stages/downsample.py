"""Down-sampling: learn from the rows whose advantages vary most and, of these, from the decisions where most is open.

Nothing here knows of text: a row may be a response, a trajectory, or one decision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.method import Method
from trimtab.core.piece import Piece, Schedule, piece
from trimtab.core.terms import Term, fixed, rows_of

SAME = 1e-12  # variances this close are equal, and the lot decides


@piece("annotate", slot="entropy_old", reads=("mask",), writes=("entropy_old",), wants=("entropy",))
def entropy_old(kit: Kit, batch: Batch) -> Batch:
    """`entropy_old` [N, T]: of each decision, nats, under the policy at the start of this batch's updates."""
    return batch.put(entropy_old=kit.evaluate("policy", batch, {"entropy"})["entropy"])


def widest(a: Tensor, n: int, rng: torch.Generator | None = None) -> Tensor:
    """Indices of the `n` values of `a` [m] whose variance is largest: the k smallest and the n - k largest, best k.

    Variance is convex in each value, so the best subset lies at both ends of the sorted list; O(m log m). With `rng`
    equal values, and equally good k, are chosen between by lot; without, the first is taken. D3S, arXiv 2509.22115.
    """
    m = len(a)
    lot = torch.arange(m) if rng is None else torch.randperm(m, generator=rng)
    order = lot[torch.argsort(a.cpu()[lot], stable=True)]
    x = (a - a.mean()).double().cpu()[order]
    first, second = (F.pad(v.cumsum(0), (1, 0)) for v in (x, x.square()))
    low = torch.arange(n + 1)  # how many of the smallest
    high = m - (n - low)
    total, squares = first[low] + first[m] - first[high], second[low] + second[m] - second[high]
    variance = squares / n - (total / n).square()
    best = (variance >= variance.max() - SAME * (1 + variance.max())).nonzero().squeeze(1)
    k = int(best[0 if rng is None else int(torch.randint(len(best), (), generator=rng))])
    return torch.cat([order[:k], order[m - (n - k) :]])


def top_share(key: Tensor, on: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """The `share` of the decisions in `on` [N, T] with the largest `key` [N, T], at least one; ties by lot."""
    places = on.flatten().nonzero().squeeze(1).cpu()
    count = max(1, round(share * len(places)))
    lot = places[torch.randperm(len(places), generator=rng)]
    chosen = lot[torch.argsort(key.flatten().cpu()[lot], descending=True, stable=True)[:count]]
    made = torch.zeros(on.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
    return made.reshape(on.shape).to(on.device) & on


def _sane(options: Mapping[str, Any]) -> str | None:
    for name in ("share", "tokens"):
        value = options[name]
        ends = [getattr(value, end, None) for end in ("start", "end")] if isinstance(value, Schedule) else [value]
        for v in ends:
            if isinstance(v, (int, float)) and not 0 < v <= 1:
                return f"{name}={value} must be in (0, 1]: the part that is kept"
    return None


def _kept(
    kit: Kit, batch: Batch, share: float, tokens: float, choose: Callable[[Tensor, Tensor, torch.Generator], Tensor]
) -> Batch:
    """`keep` shrunk to the rows that `choose(a, rows, rng)` picks out of `rows` [m], then to their top decisions."""
    rng = kit.rng("lots")
    mask, before = batch.mask.bool(), batch.keep.bool()
    a = ((batch.advantage * mask).sum(1) / mask.sum(1).clamp_min(1)).cpu()
    rows = before.any(1).nonzero().squeeze(1).cpu()
    if not len(rows):
        return batch
    chosen = choose(a, rows, rng)
    on = torch.zeros(len(a), dtype=torch.bool).index_fill_(0, chosen, True).to(mask.device)[:, None] & before
    if tokens < 1:
        on = top_share(batch.advantage.abs() * batch.entropy_old, on, tokens, rng)
    kit.log("kept_rows", len(chosen) / len(rows))
    kit.log("kept_decisions", on.sum() / before.sum())
    kit.log("useful_rows", (a[chosen] != 0).double().mean())
    return batch.put(keep=on)


def over_rows(per: Any) -> bool:
    """Whether a reduction divides by the number of rows."""
    return per in ("row", "row_sum") or isinstance(per, fixed)


def mean_over_kept(method: Method, piece: Piece) -> str | None:
    """A `fits`: surrogates that divide by the number of rows divide by those that are kept (`over_kept`)."""
    for _, slot, p in method.places():
        per = p.core.options.get("per") if slot == "surrogate" else None
        if over_rows(per) and not any(q.name == "over_kept" for q in p.stack()):
            return (
                f"{piece.name} drops rows, and per={per!r} of the surrogate, which was given after it, would still "
                f"divide by all of them; give the reduction first"
            )
    return None


@piece("select", slot="down_sample", reads=("advantage", "entropy_old", "mask", "keep"), writes=("keep",),
       validate=_sane, fits=mean_over_kept)  # fmt: skip
def down_sample(kit: Kit, batch: Batch, *, share: float = 0.5, tokens: float = 0.3) -> Batch:
    """Keep the rows of the batch whose advantages have the largest variance, then their decisions of largest |A| H.

    A row's advantage is the mean over its decisions. Kept rows: round(share rows), at least 2; kept decisions:
    round(tokens x decisions of those rows), ranked together, at least 1. Nothing is normalised again. Ties, the normal
    case with rewards of 0 and 1, are decided by lot. share, tokens: in (0, 1], numbers or schedules. Logs `kept_rows`,
    `kept_decisions`, and `useful_rows`, the part of the kept rows with A != 0. D3S, arXiv 2509.22115.
    """

    def choose(a: Tensor, rows: Tensor, rng: torch.Generator) -> Tensor:
        n = min(len(rows), max(2, round(share * len(rows))))
        return rows[widest(a[rows], n, rng)]

    return _kept(kit, batch, share, tokens, choose)


@piece("select", slot="down_sample", reads=("advantage", "entropy_old", "mask", "keep", "group"), writes=("keep",),
       validate=_sane, fits=mean_over_kept)  # fmt: skip
def down_sample_groups(kit: Kit, batch: Batch, *, share: float = 0.5, tokens: float = 0.3) -> Batch:
    """As `down_sample`, but the rows of largest variance are taken from each group by itself (D1S of the paper)."""

    def choose(a: Tensor, rows: Tensor, rng: torch.Generator) -> Tensor:
        group = batch.group.cpu()[rows]
        members = [rows[group == g] for g in torch.unique(group)]
        sizes = [min(len(m), max(2, round(share * len(m)))) for m in members]
        return torch.cat([m[widest(a[m], n, rng)] for m, n in zip(members, sizes)])

    return _kept(kit, batch, share, tokens, choose)


@piece("part", at="update", reads=("keep", "mask"))
def rows_per_kept(batch: Batch) -> Tensor:
    """How many rows with a decision come to one that select kept, at least 1; over all rows of the update."""
    return batch.mask.bool().any(1).sum() / batch.keep.bool().any(1).sum().clamp_min(1)


@piece("loss", idle=lambda batch: rows_of(batch, None))
def over_kept(
    kit: Kit, batch: Batch, now: Mapping[str, Tensor], *, inner: Callable[..., Any], factor: Callable[..., Tensor]
) -> list[Term]:
    """A wrap for reductions that divide by the number of rows: the mean becomes one over the rows that were kept."""
    made = inner(batch, now)
    by = factor(batch)
    return [term * by for term in ([made] if isinstance(made, Term) else made)]
