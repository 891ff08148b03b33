"""Where experience comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import EnvironmentFailure
from trimtab.core.kit import Kit
from trimtab.core.piece import Schedule, piece
from trimtab.core.stopwatch import phase
from trimtab.core.terms import SOURCES
from trimtab.stages.around import outermost_adds

TEXT_COLUMNS = (
    "prompt", "prompt_mask", "action", "mask", "reward", "terminated", "truncated", "logp_behavior", "temperature",
    "group", "episode", "turn", "source", "age", "question", "response",
)  # fmt: skip


def first_id(kit: Any, options: Mapping[str, Any]) -> dict[str, int]:
    """Where ids start: groups and episodes are numbered once for the whole run."""
    return {"group": 0, "episode": 0}


def left_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids `[N, P]` padded on the left, and their mask."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, r in enumerate(rows):
        ids[i, width - len(r) :] = torch.tensor(r, dtype=torch.long)
        mask[i, width - len(r) :] = True
    return ids, mask


def nothing_solved(kit: Any, options: Mapping[str, Any]) -> dict[str, bool]:
    """Which problems' latest groups were all right: none yet."""
    return {}


def chosen(kit: Kit, n: int, revisit: float) -> list[Any]:
    """The next `n` problems of the environment; one whose latest group was all right is taken with chance `revisit`."""
    if revisit >= 1:
        return list(kit.environment.draw(n))
    solved: dict[str, bool] = kit.state["solved"]
    taken: list[Any] = []
    for _ in range(20):  # an environment that is solved altogether must still be played
        for problem in kit.environment.draw(n - len(taken)):
            if not solved.get(problem.key) or float(torch.rand((), generator=kit.rng("revisit"))) < revisit:
                taken.append(problem)
        if len(taken) == n:
            return taken
    return taken + list(kit.environment.draw(n - len(taken)))


def _sane(options: Mapping[str, Any]) -> str | None:
    if options["prompts"] < 1 or options["group"] < 1:
        return f"prompts={options['prompts']} and group={options['group']} must both be at least 1"
    if not 0 < options["revisit"] <= 1:
        return f"revisit={options['revisit']} must be in (0, 1]"
    from trimtab.policies.sampler import Sampling, SamplingError

    known = {k: options[k] for k in ("new_tokens", "temperature", "top_k", "top_p")}
    try:
        Sampling(**{k: v for k, v in known.items() if not isinstance(v, Schedule)})
    except SamplingError as error:
        return str(error)
    return None


@piece("collect", writes=TEXT_COLUMNS, state={"ids": first_id, "solved": nothing_solved}, validate=_sane)
def rollouts(
    kit: Kit,
    *,
    prompts: int = 32,
    group: int = 8,
    new_tokens: int = 16,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    revisit: float = 1.0,
) -> Batch:
    """`prompts x group` responses of the policy, scored by the environment; N rows, T = the longest response.

    prompts: problems per batch. group: responses per problem. new_tokens: longest response. temperature, top_k, top_p:
    how tokens are drawn; 0 and 1.0 switch the last two off. revisit: chance, in (0, 1], of drawing a problem again
    while its latest group was all right; such a group is mostly all right again, and teaches nothing.

    A problem whose prompt leaves no room for an answer is passed over, counted in the log as `too_long`.
    A response whose reward failed leaves the batch, counted in the log as `failures`: a failure is not a reward of 0.
    Raises EnvironmentFailure when none is left.
    """
    from trimtab.policies.context import that_fit, too_long
    from trimtab.policies.sampler import Sampling

    policy = kit.actor("policy")
    problems = that_fit(kit, lambda n: chosen(kit, n, revisit), prompts, lambda p: too_long(policy, p, new_tokens))
    encoded = [policy.encode(p.prompt) for p in problems]
    seeds = torch.randint(2**62, (prompts * group,), generator=kit.rng("rollout"))
    sampling = Sampling(new_tokens=new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    made = policy.sampler.sample(encoded, group, seeds, sampling).cpu()
    asked = [p for p in problems for _ in range(group)]
    texts = [policy.decode(t[m].tolist()) for t, m in zip(made.tokens, made.mask)]
    with phase("reward"):
        scores = kit.environment.score(asked, texts)
    good = torch.tensor([isinstance(s, float) for s in scores])
    kit.log("failures", (~good).double().sum())
    if not bool(good.any()):
        raise EnvironmentFailure(f"every reward of this batch failed, for example: {scores[0]}")
    score = torch.tensor([s if isinstance(s, float) else float("nan") for s in scores], dtype=made.logp.dtype)
    if revisit < 1:
        best = score.view(prompts, group).amin(1) >= 1  # nan, a failed reward, is not right
        kit.state["solved"] = kit.state["solved"] | {p.key: right for p, right in zip(problems, best.tolist())}
    ids = kit.state["ids"]
    kit.state["ids"] = {"group": ids["group"] + prompts, "episode": ids["episode"] + len(asked)}
    batch = policy_rows([e for e in encoded for _ in range(group)], made, score, temperature).put(
        group=ids["group"] + torch.arange(prompts).repeat_interleave(group),
        episode=ids["episode"] + torch.arange(len(asked)),
        question=[p.question for p in asked],
        response=texts,
    )
    batch = batch if bool(good.all()) else batch.take(good)
    _log(kit, batch)
    return batch.to(policy.device)


def policy_rows(encoded: Sequence[Sequence[int]], made: Any, score: Tensor, temperature: float) -> Batch:
    """Sampled responses to encoded prompts as rows; the score `[N]` is the reward of the last decision."""
    n = len(encoded)
    prompt, prompt_mask = left_padded(encoded)
    last = torch.arange(made.mask.shape[1]) == made.mask.sum(1, keepdim=True) - 1
    return Batch(
        {
            "prompt": prompt,
            "prompt_mask": prompt_mask,
            "action": made.tokens,
            "mask": made.mask,
            "reward": torch.where(last, score[:, None], torch.zeros_like(made.logp)),
            "terminated": made.finished,
            "truncated": ~made.finished,
            "logp_behavior": made.logp,
            "temperature": torch.full((n,), temperature if temperature > 0 else 1.0, dtype=made.logp.dtype),
            "turn": torch.zeros(n, dtype=torch.long),
            "source": torch.full((n,), SOURCES.index("policy")),
            "age": torch.zeros(n, dtype=torch.long),
        }
    )


def _log(kit: Kit, batch: Batch) -> None:
    score, groups = batch.score(), batch.by("group")
    kit.log("reward", score.mean())
    kit.log("reward_std", score.std(correction=0))
    # The mean of -log pi over sampled tokens estimates the entropy without bias, at no cost (temperature 1, no cuts).
    kit.log("entropy", -(batch.logp_behavior * batch.mask).sum() / batch.mask.sum().clamp_min(1))
    dead = groups.same(score)
    for name, which in (("groups", dead), ("right", dead & (score >= 1)), ("wrong", dead & (score <= 0))):
        kit.log(f"dead_{name}", groups.distinct(which.double()).mean())
    kit.log("length", batch.mask.sum(1).double().mean())
    kit.log("truncated", batch.truncated.double().mean())


def _batches_sane(options: Mapping[str, Any]) -> str | None:
    return None if options["batches"] >= 0 else f"batches={options['batches']} must be at least 0"


_CHOOSES = outermost_adds("chooses among the groups of several collects", lambda options: options["batches"] > 0)


@piece("collect", reads=("reward", "mask", "group"), validate=_batches_sane, fits=_CHOOSES)
def dynamic_sampling(kit: Kit, *, inner: Callable[[], Batch], batches: int = 10, strict: bool = False) -> Batch:
    """A wrap: collect again and again until as many groups differ in their rewards as one collect gives groups.

    All-equal groups are dropped, a surplus too; every decision made counts, dropped or not. batches: collects at most;
    0 takes one as it is. When that is not enough, the groups that were found are used (one dead batch, which teaches
    nothing, if there are none), or the run stops with EnvironmentFailure if `strict`, as verl does.
    Yu et al. 2025 (DAPO), arXiv 2503.14476, section 3.2.
    """
    rows = kit.counted(inner)
    if batches == 0:
        return rows
    wanted, made, live = rows.by("group").size, 1, []
    found = 0
    while True:
        group = rows.by("group")
        mixed = ~group.same(rows.score())
        live.append(rows.take(mixed))
        found += len(torch.unique(rows.group[mixed]))
        if found >= wanted or made >= batches:
            break
        rows, made = kit.counted(inner), made + 1
    kit.log("generated_batches", made)
    kit.log("live_groups", min(found, wanted))
    if found < wanted and strict:
        raise EnvironmentFailure(
            f"{made} batches gave {found} groups whose rewards differ, and an update needs {wanted}. The problems are "
            f"too easy or too hard by now: change them, allow more batches, or leave strict off to learn from fewer."
        )
    if not found:
        return rows
    kept = Batch.cat(live)
    return kept.take(kept.by("group").index < wanted)


def _tries_sane(options: Mapping[str, Any]) -> str | None:
    return None if options["tries"] >= 1 else f"tries={options['tries']} must be at least 1"


@piece("collect", reads=("reward", "mask", "group"), writes=("pair", "preferred"), validate=_tries_sane,
       fits=outermost_adds("collects again where no pair is found"))  # fmt: skip
def ranked_pairs(kit: Kit, *, inner: Callable[[], Batch], tries: int = 10) -> Batch:
    """A wrap: the best and the worst response of every group become a preference pair; all-equal groups are left out.

    Writes `pair` [N], the group's id, and `preferred` bool [N]. A batch without any pair is collected again, `tries`
    times at most; then EnvironmentFailure is raised.
    """
    for _ in range(tries):
        rows = kit.counted(inner)
        score, group = rows.score(), rows.by("group")
        rank = group.rank(score)
        best, worst = rank == group.count() - 1, rank == 0
        chosen = (best | worst) & ~group.same(score)
        if bool(chosen.any()):
            kit.log("pairs", chosen.double().sum() / 2)
            return rows.put(pair=rows.group, preferred=best).take(chosen)
    raise EnvironmentFailure(
        f"in {tries} batches every group got one reward for all its responses, so none is preferred to another. Take "
        "more prompts a batch, larger groups, or problems that are sometimes answered right."
    )


@piece(
    "collect",
    writes=("prompt", "prompt_mask", "action", "mask", "pair", "preferred", "episode", "source", "age", "question",
            "response"),
    state={"ids": first_id},
)  # fmt: skip
def preferences(kit: Kit, *, pairs: int = 16) -> Batch:
    """`pairs` preference pairs of the environment, two rows each: the chosen response, then the rejected one.

    `pair` [N] numbers them in the run, `preferred` bool [N]; `source` is expert, every token counts. A problem that is
    too long together with an answer is passed over, counted in the log as `too_long`.
    """
    from trimtab.policies.context import that_fit, too_long

    policy: Any = kit.models["policy"]

    def fault(drawn: tuple[Any, str, str]) -> str | None:
        return too_long(policy, drawn[0], max(len(policy.answer(text)) for text in drawn[1:]))

    drawn = that_fit(kit, kit.environment.preferences, pairs, fault)
    rows = expert_rows(policy, [(p, text) for p, *both in drawn for text in both])
    ids = kit.state["ids"]
    kit.state["ids"] = {**ids, "group": ids["group"] + pairs, "episode": ids["episode"] + 2 * pairs}
    kit.log("length", rows.mask.sum(1).double().mean())
    return rows.put(
        pair=ids["group"] + torch.arange(pairs).repeat_interleave(2),
        preferred=torch.tensor([True, False]).repeat(pairs),
        episode=ids["episode"] + torch.arange(2 * pairs),
    )


@piece(
    "collect",
    writes=("prompt", "prompt_mask", "action", "mask", "episode", "source", "age", "question", "response"),
    state={"ids": first_id},
)
def demonstrations(kit: Kit, *, prompts: int = 16) -> Batch:
    """`prompts` reference answers of the environment as rows to imitate; `source` is expert, every token counts.

    A problem that is too long together with its answer is passed over, counted in the log as `too_long`.
    """
    from trimtab.policies.context import that_fit, too_long

    policy: Any = kit.models["policy"]
    draw = kit.environment.demonstrations
    pairs = that_fit(kit, draw, prompts, lambda pair: too_long(policy, pair[0], len(policy.answer(pair[1]))))
    rows = expert_rows(policy, pairs)
    ids = kit.state["ids"]
    kit.state["ids"] = {**ids, "episode": ids["episode"] + len(pairs)}
    kit.log("length", rows.mask.sum(1).double().mean())
    return rows.put(episode=ids["episode"] + torch.arange(len(pairs)))


def expert_rows(policy: Any, pairs: Sequence[tuple[Any, str]]) -> Batch:
    """(problem, answer) pairs as rows of source "expert"; an answer ends with the end-of-text token."""
    prompt, prompt_mask = left_padded([policy.encode(problem.prompt) for problem, _ in pairs])
    answers = [policy.answer(text) for _, text in pairs]
    width = max(len(a) for a in answers)
    action = torch.tensor([a + [0] * (width - len(a)) for a in answers])
    mask = torch.tensor([[True] * len(a) + [False] * (width - len(a)) for a in answers])
    n = len(pairs)
    return Batch(
        {
            "prompt": prompt,
            "prompt_mask": prompt_mask,
            "action": action,
            "mask": mask,
            "source": torch.full((n,), SOURCES.index("expert")),
            "age": torch.zeros(n, dtype=torch.long),
            "question": [problem.question for problem, _ in pairs],
            "response": [text for _, text in pairs],
        }
    )
