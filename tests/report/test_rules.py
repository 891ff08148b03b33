"""Every rule of the diagnosis: a series that triggers it and one that does not; and few false alarms."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from trimtab.core.errors import TrimtabError
from trimtab.core.registry import methods, parse
from trimtab.report import rules_policy, rules_steps
from trimtab.report.course import Course, gained, rose, still_rises
from trimtab.report.diagnose import RULES, checked, findings, summary
from trimtab.report.lookout import Lookout
from trimtab.report.words import words_of

ROOT = Path(__file__).parents[2]


def turns(n=40, **columns):
    return [{"turn": t + 1, **{k: f(t) if callable(f) else f for k, f in columns.items()}} for t in range(n)]


def fired(history, kind, evaluations=()):
    """The finding of one rule, or None."""
    return next((f for f in findings(Course.of(history, evaluations)) if f.kind == kind), None)


def rising(t):
    return 0.2 + t / 60


def step(before, after, at=20):
    return lambda t: before if t < at else after


def evaluated(*means, every=10, half=0.05):
    return [{"turn": i * every, "mean": m, "low": m - half, "high": m + half} for i, m in enumerate(means)]


LOST = [{**r, "not_finite": {"loss": "nan"}} if r["turn"] == 7 else r for r in turns(loss=1.0)]
SPLIT = {"dead_right": 0.8, "dead_wrong": 0.05}
# kind: a history that triggers it, one that does not, the turn where it began, words of the sentence
CASES = {
    "not-finite": (LOST, turns(loss=1.0), 7, ("loss was nan in turn 7",)),
    "failures": (turns(failures=lambda t: 2 * (t == 3)), turns(failures=0), 4, ("2 responses",)),
    "gap": (turns(sampler_gap=lambda t: 0.01 * t, sampler_max=3.0), turns(sampler_gap=0.05), 14,
            ("at most by 3", "it grows (0.02 at the start)")),
    "grad-norm": (turns(grad_norm=step(1.0, 11.0, 39)), turns(grad_norm=step(1.0, 9.0, 39)), 40, ("11 times",)),
    "kl": (turns(approx_kl=lambda t: 0.9 * (t == 20)), turns(approx_kl=0.05), 21, ("sampled its batch", "now 0")),
    "noise": (turns(entropy=step(1.0, 4.0), reward=0.1), turns(entropy=step(1.0, 1.9), reward=0.1), 22,
              ("from 1 at the start", "above 2 since")),
    "fell": (turns(reward=lambda t: 0.1 + 0.04 * t if t < 20 else 0.1), turns(reward=rising), None, ("most of what",)),
    "entropy": (turns(entropy=step(2.0, 0.05), reward=rising), turns(entropy=step(2.0, 0.11), reward=rising), 25,
                ("fell below 5% of its start at turn 25", "still rises")),
    "width": (turns(action_width=step(2.0, 0.05), **{"return": lambda t: 10.0 * t}),
              turns(action_width=step(2.0, 0.5), **{"return": lambda t: 10.0 * t}), 25, ("width of the actions fell",)),
    "value": (turns(explained_variance=step(0.5, -0.2)), turns(explained_variance=step(-0.9, 0.3, 10)), 24,
              ("worse than their mean",)),
    "clip": (turns(clip_low=0.4, clip_high=0.2), turns(clip_low=0.2, clip_high=0.2), 5, ("60% of decisions",)),
    "dead": (turns(dead_groups=0.9, **SPLIT), turns(dead_groups=0.7, **SPLIT), 5, ("80% all right, 5% all wrong",)),
    "truncated": (turns(truncated=0.6), turns(truncated=0.4), 5, ("60% of responses",)),
    "one-sided": (turns(clip_low=0.001, clip_high=0.2), turns(clip_low=0.02, clip_high=0.2), None,
                  ("upper bound", "surrogate.bound.high")),
    "never-clipped": (turns(clip_low=0.0, clip_high=0.0, updates=lambda t: 4 * t, reward=0.2),
                      turns(clip_low=0.0, clip_high=0.01, updates=lambda t: 4 * t, reward=0.2), None, ("4 updates",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_a_rule_fires_where_it_should_and_not_where_it_should_not(kind):
    wrong, right, began, words = CASES[kind]
    found = fired(wrong, kind)
    assert found is not None
    assert all(word in found.sentence for word in words), found.sentence
    if began is not None:
        assert found.turn == began
    assert found.sentence.endswith(".")
    assert json.loads(json.dumps(found.record()))["kind"] == kind
    assert fired(right, kind) is None
    assert kind in {rule.kind for rule in checked(Course.of(right))}
    assert findings(Course.of(wrong), mute={f.kind for f in findings(Course.of(wrong))}) == []


def test_every_rule_has_a_case():
    assert {rule.kind for rule in RULES} == CASES.keys() | {"held-out"}


def test_held_out_problems_that_get_worse_while_the_reward_rises():
    history = turns(reward=rising)
    (found,) = [f for f in [fired(history, "held-out", evaluated(0.5, 0.45, 0.4, 0.3, 0.2))] if f]
    assert "from 0.5 at turn 0 to 0.2 at turn 40" in found.sentence
    assert found.numbers == {"before": 0.5, "now": 0.2}
    after_a_best = fired(history, "held-out", evaluated(0.3, 0.6, 0.5, 0.4, 0.35))
    assert after_a_best is not None
    assert after_a_best.turn == 10
    for quiet in (evaluated(0.5, 0.5, 0.46, 0.45), evaluated(0.5, 0.2), evaluated(0.5, 0.3, 0.2, half=0.4)):
        assert fired(history, "held-out", quiet) is None
    assert fired(turns(reward=0.3), "held-out", evaluated(0.5, 0.4, 0.3, 0.2)) is None, "the reward does not rise"
    unknown = [{**e, "low": None} for e in evaluated(0.5, 0.4, 0.2, 0.1)]
    assert fired(history, "held-out", unknown) is None, "nothing is known of the error"


def test_what_was_not_so_at_the_start_has_collapsed():
    def said(**columns):
        return fired(turns(**columns), "dead").sentence

    assert "too hard" in said(dead_groups=1.0, dead_right=0.0, dead_wrong=1.0)
    collapsed = said(dead_groups=step(0.3, 1.0), dead_right=0.0, dead_wrong=step(0.3, 1.0))
    assert "it was not so at the start" in collapsed
    assert "too easy" in said(dead_groups=step(0.3, 1.0), dead_right=step(0.3, 1.0), dead_wrong=0.0)
    assert "larger groups" in said(dead_groups=0.9, dead_right=0.45, dead_wrong=0.45)


def test_entropy_says_which_side_pushed():
    falling = {"entropy": step(2.0, 0.05), "reward": rising}

    def said(positive, negative):
        pushes = {"entropy_push_positive": positive, "entropy_push_negative": negative}
        return fired(turns(**falling, **pushes), "entropy").sentence

    assert "Advantages above 0 pushed it down" in said(-0.2, 0.1)
    assert "Advantages below 0 pushed it down" in said(0.1, -0.2)
    assert "pushed" not in said(0.1, 0.1)
    assert "pushed" not in fired(turns(**falling), "entropy").sentence


def test_entropy_is_no_matter_where_nothing_is_left_to_find():
    solved = turns(entropy=step(2.0, 0.05), reward=lambda t: 0.9 + t / 400)
    assert fired(solved, "entropy") is None
    rewards_above_one = turns(entropy=step(2.0, 0.05), reward=lambda t: 0.9 + t / 20)
    assert fired(rewards_above_one, "entropy") is not None


def test_one_side_alone_is_said_by_its_name():
    lower = fired(turns(clip_low=0.2, clip_high=0.0), "one-sided").sentence
    assert "lower bound" in lower
    assert "bapo" in lower
    assert fired(turns(clip_low=0.02, clip_high=0.0), "one-sided") is None, "too few to compare"


def test_a_bound_that_cannot_be_met_or_need_not_be_is_no_matter():
    inert = {"clip_low": 0.0, "clip_high": 0.0}
    one_update = turns(**inert, updates=lambda t: t, reward=0.2)
    assert fired(one_update, "never-clipped") is None, "the ratio is 1"
    assert "never-clipped" not in {rule.kind for rule in checked(Course.of(one_update))}
    assert fired(turns(**inert, updates=lambda t: 4 * t, reward=rising), "never-clipped") is None, "it learns"
    assert fired(turns(n=19, **inert, updates=lambda t: 4 * t, reward=0.2), "never-clipped") is None


def test_noise_and_wide_actions_are_no_matter_while_something_is_gained():
    assert fired(turns(entropy=step(1.0, 4.0), reward=rising), "noise") is None
    assert fired(turns(entropy=step(0.1, 0.3), reward=0.1), "noise") is None, "less than half a nat"
    wide = {"action_width": step(1.0, 6.0)}
    assert "turns into noise" in fired(turns(**wide, **{"return": 1.0}), "width").sentence
    assert fired(turns(**wide, **{"return": lambda t: float(t)}), "width") is None


def test_what_means_nothing_in_an_environment_is_mute_there():
    mute = words_of("control").mute
    history = turns(entropy=step(1.0, -3.0), sampler_gap=2.0, **{"return": lambda t: float(t)})
    assert findings(Course.of(history), mute) == []
    assert not mute & {rule.kind for rule in checked(Course.of(history), mute)}
    assert mute <= {rule.kind for rule in RULES}


def healthy(seed):
    """A made-up run with noise whose held-out mean does not change."""
    r = random.Random(seed)
    n = r.choice([20, 40, 60, 100])
    slope = r.choice([0.0, 0.5])
    near = r.gauss
    return turns(
        n, reward=lambda t: min(1.0, max(0.0, 0.3 + slope * t / n + near(0, 0.08))), updates=lambda t: 4 * t,
        entropy=lambda t: 1 - 0.7 * t / n + near(0, 0.05), grad_norm=lambda t: r.lognormvariate(0, 0.5),
        clip_low=lambda t: abs(near(0, 0.01)), clip_high=lambda t: abs(near(0, 0.01)), truncated=0.2,
        dead_groups=lambda t: 0.5 + near(0, 0.1), sampler_gap=0.02, approx_kl=0.01,
        explained_variance=lambda t: near(0.4, 0.2), action_width=lambda t: 1 - 0.5 * t / n,
    )  # fmt: skip


def test_healthy_runs_raise_no_alarm():
    courses = [Course.of(healthy(seed)) for seed in range(60)]
    assert [f.sentence for course in courses for f in findings(course)] == []
    assert len(checked(courses[0])) == len(RULES) - 2, "all but failures and held-out"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_published_runs_get_true_sentences(seed):
    folder = ROOT / "docs" / "results" / "main-job" / f"seed{seed}"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (end,) = findings(Course.of(records))
    assert end.kind == "dead"
    assert "too easy" in end.sentence
    on_the_way = [f for n in range(10, 45) for f in findings(Course.of(records[:n])) if f.kind == "entropy"]
    assert on_the_way, "the entropy falls below 5% of its start while the reward still rises"
    assert 15 <= on_the_way[0].turn <= 30


def test_comparisons_of_means():
    assert rose([1, 1, 1], [2, 2, 2])
    assert not rose([1, 3, 2], [2, 3, 2.5])
    assert not rose([1], [2])
    assert still_rises([0.0] * 5) is None
    assert still_rises([*[0.0] * 5, *[1.0] * 5]) == (0.0, 1.0)
    assert gained([0.0, 0.0, 1.0, 1.0])
    assert not gained([1.0])


def test_a_course_of_nothing_and_of_odd_records():
    assert summary(Course()) == {"findings": [], "checked": []}
    odd = Course.of([{}, {"turn": None, "reward": "x", "entropy": None, "failures": {"a": "b"}, "not_finite": 3}])
    assert summary(odd) == {"findings": [], "checked": ["not-finite"]}
    assert Course.of([], [{"mean": None}, {}]).evaluations == []


def test_a_lookout_looks_now_and_then_and_says_each_kind_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("trimtab.report.lookout.time.monotonic", lambda: now[0])
    lookout = Lookout()
    history = turns(dead_groups=0.9)
    assert not any(lookout.add(record) for record in history[:5]), "it looked at the first, which says nothing yet"
    now[0] = 3.0
    assert [f.kind for f in lookout.add(history[5])] == ["dead"]
    now[0] = 6.0
    assert lookout.add(history[6]) == []
    assert [f.kind for f in lookout.now] == ["dead"]
    lookout.course = Course.of(turns(dead_groups=0.1))
    assert lookout.look() == []
    assert lookout.now == []


# -- the document ---------------------------------------------------------------------------------------------------
DOCUMENT = (ROOT / "docs" / "diagnosis.md").read_text()


def test_the_document_has_every_rule_in_order_and_every_threshold():
    rows = re.findall(r"^\| `([\w-]+)` \|", DOCUMENT, re.M)
    assert rows == [rule.kind for rule in RULES]
    stated = {name: float(value) for name, value in re.findall(r"`([A-Z_]+)` = ([\d.]+)", DOCUMENT)}
    inner = {"RECENT", "SURE"}
    held = {
        name: value
        for module in (rules_policy, rules_steps)
        for name, value in vars(module).items()
        if name.isupper() and name not in inner
    }
    assert stated == pytest.approx(held)


def test_settings_named_in_the_document_exist():
    named = set(re.findall(r"`((?:collect|surrogate|update|credit)\.[\w.]+)(?:=[^`]*)?`", DOCUMENT))
    assert len(named) >= 5
    for address in named:
        parse("grpo").get(address)
    for option in ("target_kl=0.02", "scale_reward=True", "value_coef=1.0", "entropy_coef=0.01"):
        parse(f"ppo({option})")
    with pytest.raises(TrimtabError):
        parse("grpo").get("surrogate.bound.hihg")
    assert {"bapo", "aepo", "dapo"} <= methods().keys()
