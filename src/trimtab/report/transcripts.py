"""What the policy wrote, side by side: held-out problems before and after, and the responses of one group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Any

from trimtab.report.words import count, is_number, number

Sample = Mapping[str, Any]
_LONGEST = 6000  # characters of one response shown; the rest stays in samples.jsonl
_PAIRS, _MORE_PAIRS = 6, 24
_CARDS = 16
_GROUPS = 24


@dataclass(frozen=True)
class Pair:
    """One held-out problem and what the policy answered to it before and after training."""

    before: Sample | None
    after: Sample | None

    @property
    def change(self) -> int:
        """What became of the reward: 0 it rose, 1 it fell, 2 the same and not positive, 3 the same, 4 unknown."""
        was, now = (s.get("reward") if s else None for s in (self.before, self.after))
        if not (is_number(was) and is_number(now)):
            return 4
        return 0 if now > was else 1 if now < was else 2 if now <= 0 else 3


def pair_up(samples: Sequence[Sample]) -> list[Pair]:
    """Pair the held-out samples of the first and the last evaluation by problem.

    In order: one that rose, one that fell, one still wrong, one still right, and so on; so that the first few neither
    flatter nor hide.
    """
    held = [s for s in samples if s.get("split") == "eval"]
    before = [s for s in held if s.get("stage") == "before"]
    rest = [s for s in held if s.get("stage") != "before"]
    if not before and rest:
        first = min(_turn(s) for s in rest)
        before, rest = [s for s in rest if _turn(s) == first], [s for s in rest if _turn(s) != first]
    last = max((_turn(s) for s in rest), default=0.0)
    old, new = ({_problem(s): s for s in group} for group in (before, [s for s in rest if _turn(s) == last]))
    pairs = [Pair(old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]
    kinds = [[p for p in pairs if p.change == kind] for kind in range(5)]
    return [p for turn in zip_longest(*kinds) for p in turn if p is not None]


def held_out_html(samples: Sequence[Sample]) -> str:
    """The section's inside; empty when there is nothing to show."""
    pairs = pair_up(samples)
    if not pairs:
        return ""
    both = [p for p in pairs if p.before and p.after]
    better, worse = (sum(p.change == kind for p in both) for kind in (0, 1))
    told = (
        f"Of {count(len(both), 'problem')} shown both times, the reward rose on {better}, fell on {worse}, and stayed "
        f"on {len(both) - better - worse}. The same problems, unseen in training."
        if both
        else "Recorded at one time only; the other half is missing."
    )
    shown = "".join(map(_pair_html, pairs[:_PAIRS]))
    rest = pairs[_PAIRS : _PAIRS + _MORE_PAIRS]
    folded = (
        f"<details><summary>{count(len(rest), 'more problem')}</summary>{''.join(map(_pair_html, rest))}</details>"
        if rest
        else ""
    )
    return f'<p class="lead">{told}</p>{shown}{folded}'


def _pair_html(pair: Pair) -> str:
    known = pair.after or pair.before or {}
    answer = known.get("answer")
    expected = f'<p class="answer">expected <b>{clean(answer)}</b></p>' if answer not in (None, "") else ""
    sides = "".join(
        f'<div class="side"><h4>{name} {_chip(sample)}</h4>{_response(sample)}</div>'
        if sample
        else f'<div class="side"><h4>{name}</h4><p class="none">not recorded</p></div>'
        for name, sample in (("before", pair.before), ("after", pair.after))
    )
    return (
        f'<article class="pair"><div class="ask"><div class="prompt">{_prompt(known)}</div>{expected}</div>'
        f"{sides}</article>"
    )


def group_html(samples: Sequence[Sample]) -> str:
    """The section's inside: a chooser of groups by turn, open at the latest whose rewards differ; empty without any."""
    groups: dict[tuple[float, str], list[Sample]] = {}
    for s in samples:
        if s.get("split") != "eval":
            groups.setdefault((_turn(s), str(s.get("group"))), []).append(s)
    if not groups:
        return ""
    mixed = [key for key, rows in groups.items() if len({str(r.get("reward")) for r in rows}) > 1]
    first = (mixed or list(groups))[-1]
    shown = sorted({*_spread(sorted(groups), _GROUPS), first})
    if len(shown) == 1:
        return _one_group(groups[first])
    options = "".join(
        f'<option value="group{i}"{" selected" if key == first else ""}>{_named(key, shown)}'
        f"{'' if key in mixed else ' (all rewards equal)'}</option>"
        for i, key in enumerate(shown)
    )
    parts = "".join(
        f'<div id="group{i}"{"" if key == first else " hidden"}>{_one_group(groups[key])}</div>'
        for i, key in enumerate(shown)
    )
    left = f" {len(groups) - len(shown)} more are in samples.jsonl." if len(groups) > len(shown) else ""
    return f'<p class="choose"><label>The group of <select data-choose>{options}</select></label>{left}</p>{parts}'


def _spread(keys: list[tuple[float, str]], most: int) -> list[tuple[float, str]]:
    """At most so many of them, evenly, with both ends."""
    if len(keys) <= most:
        return keys
    return [keys[round(i * (len(keys) - 1) / (most - 1))] for i in range(most)]


def _named(key: tuple[float, str], among: Sequence[tuple[float, str]]) -> str:
    several = sum(turn == key[0] for turn, _ in among) > 1
    return f"turn {number(key[0])}{f', group {clean(key[1])}' if several else ''}"


def _one_group(rows: Sequence[Sample]) -> str:
    turn = number(_turn(rows[0]))
    top = max((abs(c) for r in rows for c in _credit(r)), default=0.0)
    ranked = sorted(rows, key=lambda r: -(r["reward"] if is_number(r.get("reward")) else float("-inf")))
    cards = "".join(
        f'<div class="card"><h4>{_chip(row)} {_advantage(row)}</h4>{_response(row, top)}</div>'
        for row in ranked[:_CARDS]
    )
    left = f'<p class="none">{len(rows) - _CARDS} more in samples.jsonl</p>' if len(rows) > _CARDS else ""
    scale = (
        f'<p class="scale"><span class="n" style="--a:.7">pushed down</span><span class="n" style="--a:.3"> </span>'
        f'<span> 0 </span><span class="p" style="--a:.3"> </span><span class="p" style="--a:.7">pushed up</span>'
        f" credit of each decision; strongest colour = {number(top)}. Hover for the number.</p>"
        if top > 0
        else ""
    )
    return (
        f'<p class="lead">Turn {turn}: {count(len(rows), "response")} to one prompt. What is better than the rest of '
        f'its group is made likelier.</p><div class="prompt">{_prompt(rows[0])}</div>{scale}'
        f'<div class="cards">{cards}</div>{left}'
    )


def clean(value: Any) -> str:
    """Text safe inside HTML, whatever the policy wrote: escaped, control characters made visible."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    shown = "".join(
        c if c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0) else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return escape(shown.encode("utf-8", "replace").decode())


def _prompt(sample: Sample) -> str:
    prompt = sample.get("prompt", "")
    if isinstance(prompt, list) and all(isinstance(m, Mapping) for m in prompt):
        return "".join(f"<p><b>{clean(m.get('role', ''))}</b> {_cut(m.get('content', ''))}</p>" for m in prompt)
    return _cut(prompt)


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) <= _LONGEST:
        return clean(text)
    return clean(text[:_LONGEST]) + f"<i> … {len(text):,} characters in all; the rest is in samples.jsonl</i>"


def _response(sample: Sample, top: float = 0.0) -> str:
    credit, tokens = _credit(sample), sample.get("tokens")
    if not credit or not isinstance(tokens, list) or top <= 0:
        text = sample.get("response", "")
        return f'<div class="text">{_cut(text) if text != "" else "<i>(empty)</i>"}</div>'
    spans, length = [], 0
    for token, value in zip(tokens, credit):
        length += len(token)
        if length > _LONGEST:
            spans.append("<i> … the rest is in samples.jsonl</i>")
            break
        side = "p" if value > 0 else "n"
        shade = f' class="{side}" style="--a:{0.72 * abs(value) / top:.2f}"' if value else ""
        spans.append(f'<span{shade} title="credit {value:+.3g}">{clean(token)}</span>')
    return f'<div class="text">{"".join(spans)}</div>'


def _credit(sample: Sample) -> list[float]:
    """Credit per token, if there is one finite number for each token and the tokens are text; else nothing."""
    credit, tokens = sample.get("credit"), sample.get("tokens")
    if not isinstance(credit, list) or not isinstance(tokens, list) or len(credit) != len(tokens):
        return []
    fine = all(map(is_number, credit)) and all(isinstance(t, str) for t in tokens)
    return [float(c) for c in credit] if fine else []


def _chip(sample: Sample) -> str:
    failure = sample.get("failure")
    if isinstance(failure, Mapping):
        return f'<span class="chip bad" title="{clean(failure.get("message", ""))}">{clean(failure.get("kind"))}</span>'
    reward = sample.get("reward")
    if not is_number(reward):
        return '<span class="chip">no reward</span>'
    kind = " good" if reward >= 1 else " bad" if reward <= 0 else ""
    return f'<span class="chip{kind}">reward {number(reward)}</span>'


def _advantage(sample: Sample) -> str:
    value = sample.get("advantage")
    if not is_number(value):
        return ""
    side = "up" if value > 0 else "down" if value < 0 else ""
    return f'<span class="chip {side}">advantage {value:+.2f}</span>'


def _turn(sample: Sample) -> float:
    turn = sample.get("turn")
    return float(turn) if is_number(turn) else 0.0


def _problem(sample: Sample) -> str:
    return str(sample.get("key") or json.dumps(sample.get("prompt"), sort_keys=True, default=str))
