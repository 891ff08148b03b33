from __future__ import annotations

from trimtab.report.course import Course
from trimtab.report.diagnose import diagnose, findings
from trimtab.report.keys import PANELS, arrange, column, dead_share, failure_kinds, look_up
from trimtab.report.words import duration, interval, number, percent


def turns(n=40, **columns):
    return [{"turn": t + 1, **{k: f(t) if callable(f) else f for k, f in columns.items()}} for t in range(n)]


def kinds(history):
    return [finding.kind for finding in findings(Course.of(history))]


def test_a_healthy_run_and_an_empty_one_get_no_sentence():
    healthy = turns(
        reward=lambda t: t / 40, entropy=lambda t: 1 - t / 80, grad_norm=lambda t: 1 + 0.5 * (t % 3), clip_low=0.02,
        clip_high=0.03, dead_groups=0.3, kl_sampler=0.001, failures=0,
    )  # fmt: skip
    assert diagnose(healthy) == []
    assert diagnose([]) == []
    assert diagnose([{}, {"turn": None, "reward": "x", "entropy": None, "failures": {"a": "b"}}]) == []


def test_entropy_matters_only_while_the_reward_rises():
    falling = {"entropy": lambda t: 2.0 * 0.8**t}
    (sentence,) = diagnose(turns(reward=lambda t: t / 40, **falling))
    assert "% of its start" in sentence
    assert "temperature" in sentence
    assert diagnose(turns(reward=1.0, **falling)) == []
    assert diagnose(turns(n=4, reward=lambda t: t / 40, **falling)) == []


def test_dead_groups_get_the_advice_their_reward_deserves():
    assert "too easy" in diagnose(turns(dead_groups=0.95, reward=0.99))[0]
    assert "too hard" in diagnose(turns(dead_groups=0.95, reward=0.01))[0]
    assert "larger groups" in diagnose(turns(dead_groups=7, groups=8, reward=0.5))[0]
    assert diagnose(turns(dead_groups=0.8, reward=0.5)) == []


def test_gradient_peak_names_turn_and_factor():
    (sentence,) = diagnose(turns(grad_norm=lambda t: 12.0 if t == 30 else 1.0))
    assert "turn 31" in sentence
    assert "12 times" in sentence
    assert diagnose(turns(grad_norm=lambda t: 9.0 if t == 30 else 1.0)) == []
    assert diagnose(turns(grad_norm=lambda t: 12.0 if t == 2 else 1.0)) == []  # no median to speak of yet


def test_gap_failures_clip_and_lost_numbers_in_order_of_gravity():
    history = turns(
        kl_sampler=0.2, failures=lambda t: {"timeout": 1, "raised": 0}, clip_rate=0.6, rows=lambda t: 10 * t + 10
    )
    history[3]["not_finite"] = {"loss": "nan"}
    assert kinds(history) == ["not-finite", "failures", "gap", "clip"]
    said = diagnose(history)
    assert "loss was nan in turn 4" in said[0]
    assert "40 responses" in said[1]
    assert "10%" in said[1]
    assert "timeout 40" in said[1]
    assert "raised" not in said[1]
    assert "0.2 nats" in said[2]
    assert "60%" in said[3]
    assert diagnose(turns(kl_sampler=0.1, clip_low=0.2, clip_high=0.3)) == []
    assert kinds(turns(clip_low=0.3, clip_high=0.3)) == ["clip"]


def test_a_few_turns_are_not_judged():
    bad = {"dead_groups": 1.0, "reward": 0.0, "clip_low": 0.9, "sampler_gap": 1.0}
    assert diagnose(turns(n=4, **bad)) == []
    assert kinds(turns(n=5, **bad)) == ["gap", "clip", "dead"]


def test_the_gap_is_the_mean_difference_of_log_probabilities():
    (sentence,) = diagnose(turns(sampler_gap=0.25))
    assert "0.25 nats a decision" in sentence
    assert "log-probabilities" in sentence
    assert diagnose(turns(sampler_gap=0.03)) == [], "what bfloat16 gives"
    ((panel, keys),) = arrange(turns(sampler_gap=0.25))
    assert "KL" not in panel.title
    assert panel.unit == "nats per decision"
    assert keys == [("sampler_gap", "")]


def test_turns_without_a_gradient_are_not_what_is_usual():
    assert kinds(turns(grad_norm=lambda t: 12.0 if t == 30 else float(t % 4 == 0))) == ["grad-norm"]
    assert diagnose(turns(grad_norm=lambda t: float(t % 4 == 0))) == []


def test_numbers_of_every_track_go_where_they_belong():
    record = {"policy/grad_norm": 1, "critic/grad_norm": 2, "critic/loss": 3, "critic/odd": 4}
    panels = {panel.title: keys for panel, keys in arrange([record])}
    assert panels["Gradient norm"] == [
        ("policy/grad_norm", "policy/grad_norm"), ("critic/grad_norm", "critic/grad_norm"),
    ]  # fmt: skip
    assert panels["Loss"] == [("critic/loss", "critic/loss")]
    assert panels["Critic"] == [("critic/odd", "")]
    assert look_up(record, "grad_norm") == 1


def test_every_number_is_shown_once():
    record = {
        "turn": 1, "seconds": 2.0, "reward": 0.5, "reward_low": 0.4, "reward_high": 0.6, "policy/entropy": 1.0,
        "clip_low": 0, "clip_high": 0, "GradNorm": 1, "grad_norm": 1, "loss": 0, "kl": 0, "kl_ref": 0,
        "sampler_gap": 0, "zeta": 3, "flag": True, "text": "x", "time/sample": 1, "time/update": 2,
        "failures": {"timeout": 1},
    }  # fmt: skip
    panels = arrange([record, {"late": 1}])
    shown = [key for _, keys in panels for key, _ in keys]
    hidden = {"turn", "seconds", "reward", "reward_low", "reward_high", "flag", "text", "failures"}
    assert sorted(shown) == sorted((set(record) - hidden) | {"late", "failures/timeout"})
    titles = [panel.title for panel, _ in panels]
    assert titles[0] == "Entropy"
    assert titles.count("Time") == 1
    assert len({p.title for p in PANELS}) == len(PANELS)


def test_looking_up():
    assert look_up({"probe/entropy": 2}, "entropy") == 2
    assert look_up({"clip_low": 0.1, "clip_high": 0.2}, "clip") == 0.1 + 0.2
    assert look_up({"failures": {"a": 1, "b": 2}}, "failures") == 3
    assert look_up({"entropy": None}, "entropy") is None
    assert failure_kinds({"failures/no-answer": 2}) == {"no-answer": 2}
    assert dead_share({"dead_groups": 3, "groups": 4}) == 0.75
    assert dead_share({"dead_groups": 3}) is None
    assert str(column([{"a": {"b": 1}}, {}], "a/b")) == "[1.0, nan]"


def test_words():
    assert [duration(s) for s in (0.42, 12, 250, 3900, 97000, float("nan"))] == [
        "0.42 s", "12 s", "4 min 10 s", "1 h 05 min", "1 d 02 h", "unknown time",
    ]  # fmt: skip
    assert [percent(x) for x in (0, 0.001, 0.14, 1)] == ["0%", "0.1%", "14%", "100%"]
    assert [number(x) for x in (3.0, 1234567, 0.01234, 1e-6, 1234.5, float("nan"))] == [
        "3", "1.2e+06", "0.0123", "1e-06", "1,234", "nan",
    ]  # fmt: skip
    assert interval(0.07, 0.26, share=True) == "[7, 26]"
    assert interval(None, 0.26) == ""
