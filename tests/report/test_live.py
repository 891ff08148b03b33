from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from rich.console import Console

from trimtab.report.live import LiveView, sparkline


def plain(**options):
    out = io.StringIO()
    return LiveView(console=Console(file=out, width=100), **options), out


def terminal(**options):
    out = io.StringIO()
    return LiveView(console=Console(file=out, width=100, force_terminal=True), **options), out


def drive(view, turns=10):
    with view:
        view.evaluated(0.14, 0.07, 0.26, 50)
        for t in range(1, turns + 1):
            logs = {"reward": t / turns, "reward_low": 0.1, "reward_high": 0.9, "entropy": 1.0, "grad_norm": 0.5}
            view.update(
                {**logs, "clip_low": 0.01, "clip_high": 0.02}, {"turn": t, "seconds": 2.0 * t, "decisions": 90 * t}
            )


def test_log_lines():
    view, out = plain(until=100, title="bnpo on sums")
    drive(view)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("bnpo on sums: A policy loss near 0 is normal")
    assert lines[1] == "held-out 14% [7, 26] of 50"
    assert [line.split()[1] for line in lines[2:]] == ["1/100", "3/100", "5/100", "7/100", "9/100", "10/100"]
    assert "reward 30% [10, 90]" in lines[3]
    assert "clipped 1% below, 2% above" in lines[3]
    assert "tokens/s 45" in lines[3]
    assert lines[3].endswith("3 min 14 s left")
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


def test_silent_writes_nothing():
    view, out = terminal(until=10, mode="silent")
    drive(view)
    assert out.getvalue() == ""


def test_findings_are_said_once():
    view, out = plain(every=1000)
    with view:
        for t in range(30):
            view._diagnosed = float("-inf")
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
