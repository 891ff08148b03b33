from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from trimtab.report import plots
from trimtab.report.compare import CompareError, curve, mean_curve, overlay
from trimtab.report.folder import RunFolder, RunFolderError
from trimtab.report.html import write_report
from trimtab.report.intervals import wilson
from trimtab.report.story import tell
from trimtab.report.style import DARK, LIGHT

EVIL = "<script>alert(1)</script> \x1b[31m\x00 \ud83d \" ' &amp; </pre><img onerror=alert(2)>"
CONFIG = {
    "method": "bnpo", "policy": {"name": "nano"}, "environment": "reasoning-gym:chain_sum", "seed": 0, "until": 60,
    "command": ["trimtab", "train", "bnpo", "--env", "chain_sum(min=1, max=2)"], "versions": {"torch": "2"},
}  # fmt: skip


def history(n):
    rng = np.random.default_rng(0)
    return [
        {
            "turn": t, "updates": t, "decisions": 100 * t, "rows": 64 * t, "seconds": 250.0 * t / n, "reward": t / n,
            "reward_low": max(0, t / n - 0.1), "reward_high": min(1, t / n + 0.1), "entropy": math.exp(-t / n),
            "grad_norm": float(rng.lognormal()), "clip_low": 0.01, "clip_high": 0.02, "dead_groups": 0.2, "loss": 0.0,
            "a$b_{": float(rng.normal()), "failures": {"timeout": int(t == 3)},
        }
        for t in range(1, n + 1)
    ]  # fmt: skip


def brief(n):
    """As `history`, with few keys: every picture costs a test some time."""
    return [{k: r[k] for k in ("turn", "seconds", "reward", "entropy", "failures")} for r in history(n)]


def evaluations(*successes):
    out = []
    for i, k in enumerate(successes):
        low, high = wilson(k, 50)
        out.append(
            {"turn": 30 * i, "seconds": 125.0 * i, "mean": k / 50, "low": low, "high": high, "n": 50, "greedy": True}
        )
    return out


def samples():
    held = [
        {
            "turn": turn,
            "split": "eval",
            "stage": stage,
            "prompt": f"problem {i}",
            "answer": "7",
            "response": EVIL,
            "reward": r,
        }
        for stage, turn, rewards in (("before", 0, (0, 1, 0, 1)), ("after", 60, (1, 0, 0, 1)))
        for i, r in enumerate(rewards)
    ]
    group = [
        {
            "turn": 2, "group": 5, "prompt": [{"role": "user", "content": "<b>?"}], "response": "1 <2",
            "reward": float(i % 2), "advantage": i % 2 - 0.5, "tokens": ["1", " <", "2"], "credit": [0.1, -0.5, 0.0],
        }
        for i in range(4)
    ]  # fmt: skip
    group.append(
        {"turn": 2, "group": 5, "prompt": "p", "reward": None, "failure": {"kind": "timeout", "message": "5 s <"}}
    )
    return held + group


def fill(path, metrics=(), evals=(), texts=(), config=CONFIG):
    with RunFolder(path).create(config) as folder:
        for record in metrics:
            folder.write_metrics(record)
        for record in evals:
            folder.write_eval(record)
        folder.write_samples(texts)
    return path


class Page(HTMLParser):
    """Collects tags and text, and insists that tags nest."""

    VOID = frozenset({"meta", "img", "br", "wbr", "link", "input", "hr"})

    def __init__(self, source):
        super().__init__()
        self.tags, self.stack, self.words, self.attributes = [], [], [], []
        self.feed(source)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page(path):
    source = write_report(path).read_text()
    return source, Page(source)


def test_the_whole_page(tmp_path):
    source, seen = page(fill(tmp_path, history(60), evaluations(7, 30, 46), samples()))
    for part in (
        "Greedy accuracy on 50 held-out problems rose from 14% [7, 26] to 92% [81, 97] in 60 turns, 4 min 10 s.",
        "trimtab train bnpo --env 'chain_sum(min=1, max=2)'",
        "A policy loss near 0 is normal",
        "the reward rose on 1, fell on 1, and stayed on 2",
        "advantage +0.50",
        "expected 7",
        "5 responses to one prompt",
        "1 more picture",
        "Show 7 values",
    ):
        assert part in seen.text, part
    assert seen.tags.count("script") == 1  # ours
    assert seen.tags.count("img") == 0
    assert not [a for a in seen.attributes if a[0].startswith("on")]
    assert 'title="credit -0.5"' in source
    assert "prefers-color-scheme:dark" in source
    # Nothing is fetched: the only addresses are those of parts of the pictures.
    links = set(re.findall(r"""\b(?:href|src|url)\s*[=(]\s*["']?([^"')\s>]+)""", source))
    assert {link for link in links if not link.startswith("#")} == set()
    ids = [value for name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert "\x00" not in source
    assert "\x1b" not in source


def grouped(turn, rewards, group=0):
    """A group whose tokens differ in credit."""
    return [
        {"turn": turn, "group": group, "prompt": f"at {turn}", "response": "ab", "reward": r, "advantage": r - 0.5,
         "tokens": ["a", "b"], "credit": [r - 0.5, 2 * r - 1]}
        for r in rewards
    ]  # fmt: skip


def test_a_chooser_of_groups_opens_at_the_latest_that_taught(tmp_path):
    texts = grouped(1, (0.0, 1.0)) + grouped(10, (1.0, 0.0)) + grouped(20, (1.0, 1.0))
    source, seen = page(fill(tmp_path, brief(20), (), texts))
    assert seen.tags.count("select") == 1
    assert seen.tags.count("option") == 3
    assert "turn 20 (all rewards equal)" in seen.text
    assert '<option value="group1" selected>turn 10</option>' in source
    shown = [re.search(rf'<div id="group{i}"( hidden)?>', source)[1] for i in range(3)]
    assert shown == [" hidden", None, " hidden"]
    assert source.count('title="credit -1"') == 2, "each decision has its own credit"
    assert source.count('title="credit -0.5"') == 2
    for turn in (1, 10, 20):
        assert f"at {turn}" in seen.text


def test_many_groups_are_thinned_to_a_few_with_both_ends(tmp_path):
    texts = [sample for t in range(1, 101) for sample in grouped(t, (0.0, 1.0))]
    source, seen = page(fill(tmp_path, brief(3), (), texts))
    assert seen.tags.count("option") == 24
    assert "76 more are in samples.jsonl" in seen.text
    assert ">turn 1</option>" in source
    assert "selected>turn 100</option>" in source


def test_one_group_needs_no_chooser(tmp_path):
    _, seen = page(fill(tmp_path, brief(3), (), grouped(1, (0.0, 1.0))))
    assert "select" not in seen.tags
    assert "2 responses to one prompt" in seen.text


def test_a_method_without_rewards_is_shown_by_its_loss(tmp_path):
    metrics = [{"turn": t, "seconds": t, "loss": 5.0 - t, "nll": 5.0 - t, "grad_norm": 1.0} for t in range(1, 9)]
    config = {**CONFIG, "method": "sft", "resolved": {"collect": "demonstrations", "nll": "nll"}}
    _, seen = page(fill(tmp_path, metrics, evaluations(7, 9), samples()[:8], config))
    assert "should fall from where it starts" in seen.text
    assert "loss near 0 is normal" not in seen.text
    assert "no turn has recorded a reward" not in seen.text
    assert "every response got a reward" not in seen.text
    assert "before" in seen.text


def test_several_updates_and_tracks_are_drawn(tmp_path):
    metrics = [
        {"turn": t, "reward": 0.5, "policy/loss": 0.0, "policy/grad_norm": 1.0, "critic/loss": 2.0,
         "critic/grad_norm": 3.0, "policy/clip_low": 0.01, "policy/clip_high": 0.02} for t in range(1, 6)
    ]  # fmt: skip
    source, seen = page(fill(tmp_path, metrics, evaluations(7)))
    assert "critic/grad_norm" in source
    assert "more picture" not in seen.text, "every number is in a known picture"
    assert "could not be made" not in seen.text


def test_writing_again_gives_the_same_page(tmp_path):
    fill(tmp_path, brief(12), evaluations(7, 9), samples())
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


@pytest.mark.parametrize(
    ("metrics", "evals", "texts", "says"),
    [
        ([], [], [], "recorded nothing yet"),
        ([], evaluations(7), [], "before training. No turn has been recorded yet"),
        (brief(1), [], [], "in its first turn"),
        (brief(23), [], [], "No held-out evaluation was recorded"),
        (brief(23), evaluations(7), [], "not been evaluated since"),
        (brief(23), evaluations(7, 9), samples()[:3], "23 of 60 turns are recorded so far"),
        ([{"turn": 1, "entropy": 1.0}], [], samples()[-1:], "without a reward"),
    ],
)
def test_partial_runs(tmp_path, metrics, evals, texts, says):
    _, seen = page(fill(tmp_path, metrics, evals, texts))
    assert says in seen.text
    assert "could not be made" not in seen.text


def test_a_torn_and_damaged_record(tmp_path):
    fill(tmp_path, brief(5), evaluations(7, 9))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\xfe\n" + path.read_bytes()[:-20])
    _, seen = page(tmp_path)
    assert "1 line of the record could not be read" in seen.text
    assert "could not be made" not in seen.text


@pytest.mark.filterwarnings("ignore:overflow")
def test_odd_data_never_raises(tmp_path):
    odd = [None, True, "x", EVIL, math.nan, math.inf, -1e308, 10**400, [], [1, "a"], {}, {"a": {"b": None}}, [[None]]]
    keys = [
        "turn", "seconds", "reward", "reward_low", "mean", "low", "high", "n", "group", "prompt", "response",
        "advantage", "tokens", "credit", "split", "stage", "failure", "failures", "entropy", "not_finite",
        "answer", "key", "greedy", "measure",
    ]  # fmt: skip
    rng = np.random.default_rng(0)

    def scramble(base):
        record = dict(base)
        for key in rng.choice(keys, 6):
            record[str(key)] = odd[rng.integers(len(odd))]
        return record

    for trial in range(3):
        path = fill(
            tmp_path / str(trial), [scramble(r) for r in brief(6)], [scramble(r) for r in evaluations(1, 2, 3)],
            [scramble(r) for r in samples()], {key: odd[rng.integers(len(odd))] for key in CONFIG},
        )  # fmt: skip
        page(path)
    (tmp_path / "0" / "config.json").write_text("not json")
    _, seen = page(tmp_path / "0")
    assert "cannot be read as JSON" in seen.text


def test_no_folder(tmp_path):
    with pytest.raises(RunFolderError, match="no folder"):
        write_report(tmp_path / "none")


def test_the_headline_does_not_claim_what_the_intervals_do_not_show():
    assert "rose from" in tell({}, [], evaluations(7, 46)).headline
    assert "fell from" in tell({}, [], evaluations(46, 7)).headline
    story = tell({}, [], evaluations(20, 22))
    assert "went from" in story.headline
    assert "too few to tell" in story.remark
    story = tell({}, [], [{"turn": 0, "mean": -3.5}, {"turn": 9, "mean": 2.25}])
    assert story.headline == "Mean reward on held-out problems went from **-3.5** to **2.25** in 9 turns."


def test_the_headline_counts_the_time_of_its_evaluation():
    story = tell({}, history(60), evaluations(7, 20))
    assert "in 30 turns, 2 min 05 s" in story.headline


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pictures_are_valid_and_the_same_each_time(theme):
    svg = plots.reward_figure(history(50), theme=theme)
    assert svg == plots.reward_figure(history(50), theme=theme)
    ElementTree.fromstring(svg)
    assert (DARK if theme == "dark" else LIGHT)["c0"].encode() in svg
    png = plots.eval_figure(evaluations(7, 40), fmt="png", theme=theme)
    assert png.startswith(b"\x89PNG")


def test_a_picture_for_the_page_takes_its_colours_from_it():
    svg = plots.reward_figure(history(50), theme="page").decode()
    ElementTree.fromstring(svg)
    assert svg.startswith("<svg")
    assert f"var(--plot-c0, {LIGHT['c0']})" in svg
    assert set(re.findall(r"#[0-9a-f]{6}\b(?!\))", svg)) <= {"#000000"}


def test_every_panel_has_a_picture():
    pictures = plots.panel_figures([*history(50), {"turn": 51, "grad_norm": 1e6}, {"turn": 52, "lonely": 1}])
    titles = [panel.title for panel, _ in pictures]
    assert titles[:4] == ["Entropy", "Clip rate", "Gradient norm", "Dead groups"]
    assert titles[-2:] == ["A$b {", "Lonely"]
    for _, svg in pictures:
        ElementTree.fromstring(svg)


def test_smoothing_keeps_constants_and_gaps():
    y = np.full(50, 2.0)
    y[10] = np.nan
    out = plots.smooth(y)
    assert np.isnan(out[10])
    assert np.allclose(out[np.arange(50) != 10], 2.0)
    assert len(plots.smooth(np.array([]))) == 0
    assert plots.smooth(np.array([1.0])) == [1.0]


def test_ticks_fit_into_the_margin():
    ticks = [plots._tick(v) for v in (0.0, 0.5, 1234, 0.00015, -0.00015, 1e-8, 250_000, 3e5)]
    assert ticks == ["0", "0.5", "1,234", "1.5e-4", "-1.5e-4", "1e-08", "2.5e5", "3e5"]


def test_long_runs_are_thinned():
    x = np.arange(10_000.0)
    xs, ys = plots._thin(x, np.where(x < 5000, np.nan, 1.0))
    assert len(xs) == 600
    assert np.isnan(ys[0])
    assert ys[-1] == 1.0


def test_curves_and_overlay(tmp_path):
    fill(tmp_path, history(10), evaluations(7, 40))
    x, y = curve(tmp_path)
    assert list(x) == list(range(1, 11))
    assert y[-1] == 1.0
    assert list(curve(tmp_path, "held-out", "seconds")[0]) == [0.0, 125.0]
    assert list(curve(RunFolder(tmp_path), "failures/timeout")[1][:4]) == [0, 0, 1, 0]
    with pytest.raises(CompareError, match="'nothing'"):
        curve(tmp_path, "nothing")
    arms = {"bnpo": [(x, y), (x, y**2)], "grpo": [(x, y / 2)]}
    ElementTree.fromstring(overlay(arms, title="Two arms"))
    assert overlay(arms, title="t", fmt="png", theme="dark", smoothed=True).startswith(b"\x89PNG")
    for bad in ({}, {"a": []}, {str(i): [(x, y)] for i in range(7)}):
        with pytest.raises(CompareError, match="1 to 6"):
            overlay(bad, title="t")


def test_the_mean_curve_ends_with_the_shortest_seed():
    a, b = (np.array([0.0, 1, 2]), np.array([0.0, 1, 2])), (np.array([0.5, 4]), np.array([1.0, 1]))
    x, y = mean_curve([a, b])
    assert (x[0], x[-1]) == (0.5, 2.0)
    assert np.allclose(y, (x + 1) / 2)
    assert np.array_equal(mean_curve([a, a])[0], a[0])
    x, y = mean_curve([a, (np.array([5.0, 6]), np.array([0.0, 0]))])
    assert (x.tolist(), y.tolist()) == ([4.0], [1.0]), "no common span: the mean of their ends"
    ElementTree.fromstring(overlay({"one": [a, (np.array([5.0]), np.array([0.0]))]}, title="t"))


def test_config_is_standard_json(tmp_path):
    fill(tmp_path, config={"lr": math.inf})
    assert json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)["not_finite"] == {"lr": "inf"}


def test_the_headline_pairs_the_same_problems() -> None:
    before = {"turn": 0, "mean": 0.6, "low": 0.3, "high": 0.8, "n": 10, "right": [1] * 6 + [0] * 4}
    more = {**before, "turn": 5, "mean": 1.0, "high": 1.0, "right": [1] * 10}
    story = tell({}, [], [before, more])
    assert "4 turned right and 0 turned wrong" in story.remark
    assert "too few" in story.remark, "4 of 4 gives p = 0.12"
    many = {"turn": 0, "mean": 0.5, "low": 0.4, "high": 0.7, "n": 20, "right": [1] * 10 + [0] * 10}
    after = {**many, "turn": 5, "mean": 0.9, "high": 0.97, "low": 0.6, "right": [1] * 18 + [0] * 2}
    assert " rose from " in tell({}, [], [many, after]).headline, "overlapping intervals, but 8 gained and none lost"


def test_several_answers_a_problem_are_compared_by_how_many_were_right():
    def record(turn, right):
        pass_at = {"4": {"mean": sum(r > 0 for r in right) / len(right), "low": 0.1, "high": 0.9}}
        mean = sum(right) / 4 / len(right)
        return {
            "turn": turn,
            "mean": mean,
            "low": 0.0,
            "high": 1.0,
            "n": len(right),
            "right": right,
            "pass_at": pass_at,
        }

    told = tell({}, [], [record(0, [0, 1, 0, 2, 1, 0, 0]), record(5, [1, 2, 1, 4, 4, 1, 0])])
    assert "6 were right more often and 0 less often (exact sign test, p = 0.031)" in told.remark
    assert "pass@4 43% [10, 90] -> 86% [10, 90]." in told.remark
    assert " rose from" in told.headline
