from __future__ import annotations

import io
import re
import sys

import numpy as np
import pytest
from rich.console import Console

from trimtab.report import live
from trimtab.report.course import Course
from trimtab.report.live import LiveView, sparkline
from trimtab.report.watchers import Watchers
from trimtab.report.words import LOSS_SHOULD_FALL, WHY_LOSS_IS_ZERO, about_loss


def plain(**options):
    out = io.StringIO()
    return LiveView(console=Console(file=out, width=100), **options), out


def terminal(width=100, **options):
    out = io.StringIO()
    return LiveView(console=Console(file=out, width=width, force_terminal=True), **options), out


def drawn(view):
    """The panel as it would be drawn now, as lines."""
    console = Console(file=io.StringIO(), width=view._console.width)
    console.print(view._render())
    return console.file.getvalue().splitlines()


@pytest.fixture
def clock(monkeypatch):
    """The time of day, moved by hand."""
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    return now


def drive(view, turns=10, clock=None):
    with view:
        view.evaluated(0.14, 0.07, 0.26, 50)
        for t in range(1, turns + 1):
            if clock:
                clock[0] += 2.5
            logs = {"reward": t / turns, "reward_low": 0.1, "reward_high": 0.9, "entropy": 1.0, "grad_norm": 0.5}
            view.update(
                {**logs, "clip_low": 0.01, "clip_high": 0.02}, {"turn": t, "seconds": 2.0 * t, "decisions": 90 * t}
            )


def test_log_lines(clock):
    view, out = plain(until=100, title="bnpo on sums")
    drive(view, clock=clock)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("bnpo on sums: A policy loss near 0 is normal")
    assert lines[1] == "held-out 14% [7, 26] of 50"
    assert [line.split()[1] for line in lines[2:]] == ["1/100", "6/100", "10/100"]
    assert "reward 60% [10, 90]" in lines[3]
    assert "clipped 1% below, 2% above" in lines[3]
    assert "tokens/s 45" in lines[3]
    assert lines[3].endswith("3 min 55 s left"), "by the time that passed, evaluations and checkpoints included"
    assert "failures" not in lines[3]
    assert "\x1b" not in out.getvalue()


def test_every_k_updates_and_notes():
    view, out = plain(every=4)
    drive(view)
    view.note("saved\nto \x1b[31mdisk")
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("turn")] == ["4", "8", "10"]
    assert lines[-1] == "note: saved to [31mdisk"


def test_panel():
    view, out = terminal(until=10, title="bnpo [red]on sums")
    drive(view)
    text = out.getvalue()
    for part in (
        "A policy loss near 0",
        "turn 10/10",
        "done",
        "100% [10, 90]",
        "14% [7, 26] of 50",
        "bnpo [red]on sums",
        "█",
    ):
        assert part in text
    assert text.endswith("\x1b[?25h")  # the cursor is back


NOW = {
    "reward": 0.5, "reward_low": 0.4, "reward_high": 0.6, "entropy": 1.0, "grad_norm": 123456.0, "clip_low": 0.011,
    "clip_high": 0.022, "dead_groups": 0.3, "age": 2.5, "sampler_gap": 0.0123, "failures": 0, "loss": 0.0,
}  # fmt: skip


def test_eighty_columns_hold_every_number_on_one_line():
    view, _ = terminal(width=80, until=10_000, title="grpo on reasoning-gym:" + "x" * 90)
    with view:
        view.evaluated(0.14, 0.07, 0.26, 50)
        for t in range(1, 40):
            view.update({**NOW, "reward": t % 7 / 7}, {"turns": t, "seconds": 3600.0 * t, "decisions": 10**7 * t})
        lines = drawn(view)
    assert {len(line) for line in lines} == {80}
    assert "…" in lines[0]
    named = ("reward", "held-out", "entropy", "grad norm", "clipped", "dead groups", "age", "sampler gap", "failures")
    for name, value in zip(named, ("57% [40, 60]", "14% [7, 26] of 50", "1", "123,456", "1% below, 2% above", "30%",
                                   "2.5", "0.0123 nats", "0")):  # fmt: skip
        assert any(re.search(rf"\b{name} +{re.escape(value)}", line) for line in lines), name
    assert "left" in "".join(lines)
    assert len(lines) == 10, "two lines on the loss, the bar, five of numbers, and the frame"


def test_a_row_that_was_there_stays():
    view, _ = terminal(until=10)
    with view:
        view.update(NOW, {"turns": 1})
        view.update({"reward": 0.5}, {"turns": 2})  # no group taught anything: no surrogate, so no gap and no clip rate
        text = "\n".join(drawn(view))
    assert re.search(r"sampler gap +- ", text)
    assert re.search(r"clipped +- ", text)


def test_the_panel_shows_a_finding_while_it_lasts():
    view, _ = terminal(until=1000)
    seen = []
    with view:
        for t in range(1, 31):
            view._lookout.soon()
            view.update({"dead_groups": 0.95 if t < 20 else 0.1}, {"turns": t})
            seen.append("of groups got one reward" in "\n".join(drawn(view)))
        assert (seen[0], seen[3], seen[4], seen[18], seen[-1]) == (False, False, True, True, False)
        view.note("checkpoint of another machine")
        view.update({"dead_groups": 0.1}, {"turns": 31})
        assert "checkpoint of another machine" in "\n".join(drawn(view))


def test_findings_are_wrapped_and_not_cut():
    view, _ = terminal(width=60, until=1000)
    bad = {"dead_groups": 0.95, "clip_low": 0.6, "clip_high": 0.3, "truncated": 0.9, "sampler_gap": 2.0}
    with view:
        for t in range(1, 11):
            view._lookout.soon()
            view.update(bad, {"turns": t})
        panel = drawn(view)
    assert {len(line) for line in panel} == {60}
    text = " ".join(line.strip("│ ") for line in panel)
    for finding in view._lookout.now[:2]:
        assert finding.sentence in text
    assert [f.kind for f in view._lookout.now] == ["gap", "clip", "dead", "truncated"]
    assert "and 2 more findings: see the report" in text


def test_a_run_that_goes_on_is_judged_by_its_own_start():
    before = [{"turn": t, "entropy": 2.0, "reward": 0.01 * t} for t in range(1, 21)]
    view, out = plain(every=1000, course=Course.of(before))
    with view:
        for t in range(21, 41):
            view._lookout.soon()
            view.update({"entropy": 0.05, "reward": 0.01 * t}, {"turns": t})
    assert "note: Entropy fell below 5% of its start at turn 25" in out.getvalue()


def test_evaluations_are_looked_at_too():
    view, out = plain(every=1000)
    with view:
        for t in range(41):
            if t % 10 == 0:
                view.evaluated(0.6 - t / 100, 0.5 - t / 100, 0.7 - t / 100, 50)
            view._lookout.soon()
            view.update({"reward": t / 60}, {"turns": t + 1})
    assert out.getvalue().count("note: The mean on held-out problems fell from 0.6 at turn 0 to") == 1
    assert "to 0.2 at turn 40" in view._lookout.now[0].sentence


def test_the_first_line_suits_the_method():
    assert about_loss(["collect", "credit.scale", "credit"]) == WHY_LOSS_IS_ZERO
    assert about_loss(["phase 1 warm / policy:credit"]) == WHY_LOSS_IS_ZERO
    assert about_loss(["collect", "nll", "copy reference"]) == LOSS_SHOULD_FALL
    view, out = plain(until=3, lead=LOSS_SHOULD_FALL)
    with view:
        view.update({"loss": 4.5, "grad_norm": 1.0}, {"turns": 1})
    lines = out.getvalue().splitlines()
    assert lines[0] == LOSS_SHOULD_FALL
    assert "loss 4.5" in lines[1]


def test_several_watchers_are_told_the_same():
    (a, seen_a), (b, seen_b) = plain(until=3), plain(until=3)
    both = Watchers(a)
    both.add(b)
    with both:
        both.update({"reward": 1.0}, {"turns": 1})
        both.evaluated(0.5, 0.4, 0.6, 10)
        both.note("hello")
    assert seen_a.getvalue() == seen_b.getvalue()
    assert "note: hello" in seen_a.getvalue()


def test_silent_writes_nothing():
    view, out = terminal(until=10, mode="silent")
    drive(view)
    assert out.getvalue() == ""


def test_findings_are_said_once():
    view, out = plain(every=1000)
    with view:
        for t in range(30):
            view._lookout.soon()
            view.update({"dead_groups": 0.99, "loss": float("nan")}, {"turn": t})
    notes = [line for line in out.getvalue().splitlines() if line.startswith("note")]
    assert len(notes) == 2
    assert "loss was nan" in notes[0]
    assert "99% of groups" in notes[1]


class Broken(io.StringIO):
    """A terminal that goes away."""

    gone = False

    def write(self, text):
        if self.gone:
            raise BrokenPipeError("gone")
        return super().write(text)


@pytest.mark.parametrize("kind", ["plain", "live"])
def test_a_broken_terminal_is_one_note_and_the_run_goes_on(kind, capfd):
    out = Broken()
    view = LiveView(10, mode=kind, console=Console(file=out, force_terminal=kind == "live"))
    with view:
        view.update({"reward": 1}, {"turn": 1})
        out.gone = True
        view._drawn = float("-inf")
        for t in range(2, 11):
            view.update({"reward": 1}, {"turn": t})
        assert view.mode == "silent"
        view.note("unheard")
    assert capfd.readouterr().err.count("live view stopped (BrokenPipeError: gone)") == 1


@pytest.mark.parametrize("kind", ["plain", "live"])
def test_odd_logs_do_not_raise(kind, capsys):
    view, _ = terminal(until=3, mode=kind)
    with view:
        view.update({"reward": "much", "entropy": None, "x": object(), "failures": {"a": float("nan")}}, {})
        view.update({"reward": np.float32(0.5), "grad_norm": np.array(2.0)}, {"turn": "two"})
        view.update(None, None)  # type: ignore[arg-type]
    assert capsys.readouterr().err.count("live view stopped") == 1


def test_errors_of_the_run_pass():
    for kind in ("plain", "live"):
        view, _ = terminal(until=3, mode=kind)
        with pytest.raises(ZeroDivisionError), view:
            raise ZeroDivisionError
        with pytest.raises(KeyboardInterrupt), view:
            raise KeyboardInterrupt
        view, _ = terminal(until=3, mode=kind)
        view._line = view._draw = lambda *_, **__: sys.exit(3)  # as a signal handler would, in the middle of drawing
        with pytest.raises(SystemExit):
            view.update({"reward": 1}, {"turn": 1})


def test_sparkline():
    assert sparkline([0, 1, 2, 3]) == "▁▃▆█"
    assert sparkline([1, 1]) == "▄▄"
    assert sparkline([1]) == ""
    assert len(sparkline(list(range(1000)))) == 16
