"""Demonstrations beside the policy's own rows: where they come from, and what is learned from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError, nearest
from trimtab.core.kit import Kit
from trimtab.core.piece import Schedule, piece
from trimtab.core.terms import Term, rows_of
from trimtab.stages.around import text_only
from trimtab.stages.collect import expert_rows

# -- where they come from ----------------------------------------------------------------------------------------


def opened(kit: Any, options: Mapping[str, Any]) -> Any:
    """The stream of demonstrations in a file, or None where the environment's own reference answers are shown."""
    from trimtab.environments.experts import Experts
    from trimtab.environments.text import TextEnvironment

    if options["file"] is None:
        shown = kit.environment.peek().answer if isinstance(kit.environment, TextEnvironment) else ""
        if shown is None:
            raise MethodError(
                f"the problems of {kit.environment.name!r} have no reference answers to demonstrate; say where "
                f"demonstrations are: chord(experts='FILE.jsonl')"
            )
        return None
    if not isinstance(kit.environment, TextEnvironment):
        raise MethodError(
            f"experts={options['file']!r} holds prompts with responses, and the environment here is no text "
            f"environment; leave experts out, or swap 'collect.source' for rows that fit it"
        )
    return Experts(options["file"], kit.environment)


def unusable(policy: Any, problem: Any, response: str) -> str | None:
    """Why this demonstration cannot be shown to the policy; None where it can."""
    from trimtab.policies.context import too_long

    where = problem.where or "a problem"
    if not response.strip():
        return f"the response of {where} is empty, so there is nothing to imitate"
    tokens = policy.answer(response)
    read = policy.decode(tokens)
    if "".join(read.split()) != "".join(response.split()):  # white space may be cleaned up in decoding
        return (
            f"the tokenizer cannot reproduce the response of {where}: {response[:60]!r} comes back as {read[:60]!r}. "
            f"Rewrite it in characters that the tokenizer knows, without special tokens, or choose another policy"
        )
    return too_long(policy, problem, len(tokens))


@piece(
    "part",
    state={"experts": opened},
    fits=text_only("prompts and responses of text to show"),
    writes=("prompt", "prompt_mask", "action", "mask", "source", "age", "question", "response", "temperature"),
)
def text_experts(kit: Kit, n: int, *, file: str | None = None) -> Batch:
    """The next `n` demonstrations as rows of source "expert", read at temperature 1; every response token counts.

    file: see `Experts`; None takes reference answers of the environment. One that is empty, that the tokenizer cannot
    reproduce, or that is too long with its prompt is passed over, counted in the log as `unusable_experts`, and named
    in a warning; another takes its place.
    """
    from trimtab.policies.context import that_fit

    policy: Any = kit.models["policy"]
    draw = kit.environment.demonstrations if file is None else kit.state["experts"].draw
    pairs = that_fit(kit, draw, n, lambda pair: unusable(policy, *pair), counted="unusable_experts")
    return expert_rows(policy, pairs).put(temperature=torch.ones(n))


def _share_sane(options: Mapping[str, Any]) -> str | None:
    share = options["share"]
    return None if 0 <= share < 1 else f"share={share} must be in [0, 1): the part of the batch that experts supply"


@piece("collect", writes=("source",), validate=_share_sane, adds_rows=True)
def with_experts(kit: Kit, *, inner: Callable[[], Batch], source: Callable[[int], Batch], share: float = 0.2) -> Batch:
    """A wrap: behind the rows of the collect inside come so many demonstrations that they are `share` of the batch.

    source: `n -> n rows` of source "expert". They have no reward, group or behavior log-probability, and are not
    counted as decisions. share: in [0, 1).
    """
    rows = kit.counted(inner)
    n = round(len(rows) * share / (1 - share))
    return rows if n == 0 else Batch.cat([rows, source(n).to(rows.mask.device)])


# -- what is learned from them -----------------------------------------------------------------------------------

WEIGHTS = ("phi", "probability", "none")


def _imitation_sane(options: Mapping[str, Any]) -> str | None:
    mu, weight, cutoff = options["mu"], options["weight"], options["cutoff"]
    if not isinstance(mu, Schedule) and not 0 <= mu <= 1:
        return f"mu={mu} must be in [0, 1]: the loss is (1 - mu) surrogate + mu imitation"
    if weight not in WEIGHTS:
        return f"weight={weight!r} is not known. {nearest(str(weight), WEIGHTS)}"
    if not 0 < cutoff <= 1:
        return f"cutoff={cutoff} must be in (0, 1], a probability above which a token is learned well enough"
    if cutoff < 1 and weight != "phi":
        return f"cutoff={cutoff} belongs to weight='phi'; weight={weight!r} would ignore it"
    return None


@piece("loss", reads=("mask",), wants=("logp",), rows="expert", validate=_imitation_sane,
       idle=lambda batch: ~rows_of(batch, "expert"))  # fmt: skip
def imitation(
    kit: Kit, batch: Batch, now: Mapping[str, Tensor], *, mu: float = 0.1, weight: str = "phi", cutoff: float = 1.0
) -> list[Term]:
    """`-mu sg(w(p)) log p` on demonstrated tokens, `p` their probability now.

    weight: "phi", `w(p) = p (1 - p)`; "probability", `w(p) = p` (gradient of `-p`); "none", 1. cutoff in (0, 1]: tokens
    above this probability have no gradient (`log p` is held at its logarithm). mu in [0, 1]: a number or a schedule.
    Metrics: `expert_nll` and `expert_weight`. CHORD, arXiv 2508.11408, eq. 4 and 6.
    """
    if not 0 <= mu <= 1:  # a schedule's value is known only now
        raise MethodError(f"imitation: mu={mu} at update {kit.clock.updates} must be in [0, 1]")
    logp = now["logp"]
    p = logp.detach().exp()
    w = {"phi": p * (1 - p), "probability": p, "none": torch.ones_like(p)}[weight]
    held = logp if cutoff == 1 else logp.clamp(max=math.log(cutoff))
    kit.log("mu", mu)
    return [
        Term(-mu * w * held, "imitation"),
        Term(-logp.detach(), "expert_nll", metric=True),
        Term(w, "expert_weight", metric=True),
    ]
