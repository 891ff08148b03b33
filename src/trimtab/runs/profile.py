"""Where the seconds of a turn go: a few turns of a run, measured phase by phase, held against the machine."""

from __future__ import annotations

import math
import shlex
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from trimtab.core.batch import Batch
from trimtab.core.disk import size_words
from trimtab.core.errors import MethodError
from trimtab.core.loop import Step, run
from trimtab.core.method import Method
from trimtab.core.stopwatch import Span, Stopwatch, measuring
from trimtab.runs.commands import options
from trimtab.runs.meters import Products, beside, machine_rates, machine_words, peak_since
from trimtab.runs.request import Request, settle
from trimtab.runs.worlds import Experiment, build, world_of

# What the seconds of a phase are called that fell outside the phases inside it.
REST = {"sample": "decode", "update": "optimizer"}


# A turn of a control method may be one step: it is warmed up, and measured, for so many seconds.
WARM, LONG, MANY = 0.3, 2.0, 10_000


def profile(request: Request, turns: int | None = None) -> dict[str, Any]:
    """Run one turn to warm up, one under a counter of products, and `turns` that are measured.

    They are the first turns of the run that was asked for; nothing is evaluated, saved or written. turns: by default 3,
    and of a control method as many as take two seconds, whose products are counted over as many turns as its tracks
    need to have learned once.

    Returns the phases of an average turn, its tokens, the machine's own rates, and whether other work disturbed it.
    A phase's flops are those of the counted turn, times the ratio of the measured turns' response tokens to its own.
    Raises MethodError for turns < 1, and what building the request raises.
    """
    if turns is not None and turns < 1:
        raise MethodError(f"turns={turns} must be at least 1: how many turns are measured")
    made = build(settle(request))
    try:
        with beside() as others:
            found = _profiled(made, turns)
    finally:
        made.close()
    return {**found, "beside": others, "busy": others["busy"]}


def _profiled(made: Experiment, asked: int | None) -> dict[str, Any]:
    request, budget = made.request, made.request.budget
    acts = world_of(request.method) == "control"
    rates = machine_rates(made.numbers, made.device)
    turns = asked or 3
    if budget.get("turns", turns + 2) < turns + 2:
        raise MethodError(f"steps={budget['turns']} leave no room for {turns} measured turns after two; ask for more")
    loop = run(made.method, made.environment, made.models, until=budget, state=made.begin(), memory=request.memory)
    _next(loop)  # the first turn pays for what later ones find ready
    warmed, whole = 1, period(made.method) if acts else 1
    for _ in _until(WARM if acts else 0.0, _left(budget, warmed, turns + whole)):
        _next(loop)
        warmed += 1
    products = Products()
    with measuring(products.meters(), gauge=peak_since if acts else None) as counted, products:
        ones = [_turn(loop, counted) for _ in range(whole)]
    before = ones[-1].state.clock.decisions
    with measuring(gauge=None if acts else peak_since) as watch:  # a gauge is slower than many a step
        steps = [_turn(loop, watch) for _ in range(turns)]
        if acts and asked is None:
            steps += [_turn(loop, watch) for _ in _until(LONG, _left(budget, warmed + whole + turns, 0))]
    turns = len(steps)
    tokens = [tokens_of(step.batch) for step in steps]
    mean = {name: statistics.fmean(t[name] for t in tokens) for name in tokens[0]}
    decoded = (steps[-1].state.clock.decisions - before) / turns  # more than learned from, where rows were dropped
    sampled = {"decode": decoded, "prefill": mean["prompt"] * decoded / max(1.0, mean["response"])}
    sampled |= dict.fromkeys(("act", "environment"), decoded)
    scale = mean["response"] / max(1, sum(tokens_of(one.batch)["response"] for one in ones))
    lines = phases(watch.root.parts["turn"], counted.root.parts["turn"], turns, scale, sampled)
    return {
        "method": made.method.name,
        "policy": made.describe()["policy"],
        "environment": request.env,
        "command": shlex.join(["trimtab", "profile", request.method, *options(replace(request, out=""))]),
        "turns": turns,
        "seconds_a_turn": lines[0]["seconds"],
        "world": world_of(request.method),
        "tokens_a_turn": {**mean, "made": decoded},
        "peak_bytes": lines[0]["peak_bytes"],
        "phases": lines,
        "machine": {**machine_words(torch.get_num_threads()), **rates},
    }


def period(method: Method) -> int:
    """Turns after which a method does the same again: its tracks learn each so often, or wait for so many turns."""
    every = [track.every for one in (method, *(p.method for p in method.phases)) for track in one.tracks]
    waits = [p.options["turns"] for one in (method, *(p.method for p in method.phases)) for track in one.tracks
             for p in track.update.walk() if p.name == "waiting"]  # fmt: skip
    return math.lcm(*every, *waits)


def _left(budget: Mapping[str, int], made: int, needed: int) -> int:
    """Turns that a budget of turns still has to spare."""
    return budget["turns"] - made - needed if "turns" in budget else MANY


def _until(seconds: float, most: int) -> Iterator[int]:
    """Count until so many seconds are over, at most to `most`."""
    began = time.perf_counter()
    for k in range(most):
        if time.perf_counter() - began >= seconds:
            return
        yield k


def _turn(loop: Iterator[Step], watch: Stopwatch) -> Step:
    with watch.phase("turn"):
        return _next(loop)


def _next(loop: Iterator[Step]) -> Step:
    step = next(loop, None)
    if step is None:
        raise MethodError("the budget of decisions was reached before all turns were measured; ask for more")
    return step


def tokens_of(batch: Batch) -> dict[str, int]:
    """Tokens of a batch: `prompt`, once for each group (else each row); `response`, the decisions; and `rows`."""
    prompt = 0
    if "prompt_mask" in batch:
        lengths = batch.prompt_mask.sum(1)
        if "group" in batch:
            _, first = batch.group.unique(return_inverse=True)
            seen = torch.zeros(int(first.max()) + 1, dtype=lengths.dtype)
            lengths = seen.index_copy(0, first.cpu(), lengths.cpu())
        prompt = int(lengths.sum())
    return {"prompt": prompt, "response": int(batch["mask"].sum()), "rows": len(batch)}


def phases(turn: Span, counted: Span, turns: int, scale: float, sampled: Mapping[str, float]) -> list[dict[str, Any]]:
    """The lines of a profile, each of an average turn, parents before what is inside them.

    turn: a watch's span of `turns` turns. counted: the same of one turn whose products were counted; `scale` turns them
    into those of an average turn. sampled: tokens of `prefill` and `decode`. What fell outside the phases inside one is
    a line of its own, without calls and peak. A line: path, seconds, share of the turn, calls, tokens (None where none
    are known), flops and bytes of products (None where there are none), their rates, peak_bytes.
    """

    def below(path: tuple[str, ...], span: Span, twin: Span, tokens: Mapping[str, float]) -> Iterator[dict[str, Any]]:
        said = span.counts.get("decisions", tokens.get(path[-1], 0.0) * turns) / turns or None
        products = {meter: twin.totals.get(meter, 0.0) * scale for meter in ("flops", "bytes")}
        shared: dict[str, Any] = {"share": span.seconds / turn.seconds, "calls": span.calls / turns}
        shared["peak_bytes"] = max(span.peak, twin.peak) or None  # of those turns that had a gauge
        yield _line(path, span.seconds / turns, said, products, **shared)
        inside = dict(tokens)
        if "forward" in span.parts:  # a backward is over the rows of the forward before it
            inside["backward"] = span.parts["forward"].counts.get("decisions", 0.0) / turns
        for name, part in span.parts.items():
            yield from below((*path, name), part, twin.parts.get(name, Span()), inside)
        if span.parts:
            name = REST.get(path[-1], "other")
            products = {meter: twin.rest(meter) * scale for meter in products}
            left = {"share": span.rest() / turn.seconds, "calls": None, "peak_bytes": None}
            yield _line((*path, name), span.rest() / turns, tokens.get(name), products, **left)

    return list(below(("turn",), turn, counted, sampled))


def _line(
    path: tuple[str, ...], seconds: float, tokens: float | None, products: Mapping[str, float], **shared: Any
) -> dict[str, Any]:
    def rate(amount: float | None, unit: float = 1.0) -> float | None:
        return None if not amount or seconds <= 0 else amount / seconds / unit

    flops, moved = products["flops"], products["bytes"]
    return {
        "path": list(path),
        "seconds": seconds,
        **shared,
        "tokens": tokens,
        "tokens_per_second": rate(tokens),
        "flops": flops or None,
        "gflops": rate(flops, 1e9),
        "bytes": moved or None,
        "gbps": rate(moved, 1e9),
    }


# -- words ---------------------------------------------------------------------------------------------------------
HEADS = ("phase", "seconds a turn", "share", "tokens/s", "GFLOP/s", "GB/s", "peak memory")


def heads(found: Mapping[str, Any]) -> tuple[str, ...]:
    """What stands above the columns of `lines`: a decision is a token where text is written."""
    return tuple("decisions/s" if h == "tokens/s" and found["world"] == "control" else h for h in HEADS)


def lines(found: Mapping[str, Any]) -> list[list[str]]:
    """The lines of a profile as text, under `heads`."""
    return [
        [
            "  " * (len(line["path"]) - 1) + line["path"][-1],
            f"{line['seconds']:.{4 if found['phases'][0]['seconds'] > 0.1 else 6}f}",
            f"{line['share']:.1%}",
            *[_said(line[name]) for name in ("tokens_per_second", "gflops", "gbps")],
            size_words(line["peak_bytes"]) if line["peak_bytes"] else "-",
        ]
        for line in found["phases"]
    ]


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know: tokens, the machine's own rates, and whether it was quiet."""
    tokens, machine, others = found["tokens_a_turn"], found["machine"], found["beside"]
    first = (
        f"A turn has {tokens['rows']:.0f} rows, {tokens['prompt']:.0f} prompt tokens (of a group once) and "
        f"{tokens['response']:.0f} response tokens; tokens/s are of prompts for prefill, of responses elsewhere."
    )
    if found["world"] == "control":
        first = (
            f"A turn makes {tokens['made']:.4g} decisions and learns from a batch of {tokens['rows']:.0f}; decisions/s "
            "are of those made in act and environment, of those learned from elsewhere. environment: stepping it, with "
            "resets; replay: drawing from what is kept; copies: target networks, and whatever else follows a network."
        )
    said = [
        first,
        f"This machine, {machine['threads']} threads: {machine['gflops']:.0f} GFLOP/s in a large "
        f"{found['policy']['compute']} product, {machine['gbps']:.0f} GB/s in a large copy.",
        "GFLOP/s and GB/s are those of torch's products and attention; kernels and element-wise work are not counted.",
    ]
    if found["busy"]:
        said.append(
            f"Other work kept {others['before']:.1f} cores busy before and {others['after']:.1f} after: these times "
            f"are not those of a quiet machine."
        )
    return said
