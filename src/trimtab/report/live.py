"""A run while it runs: one compact panel in a terminal, a line now and then in a log, nothing for `--json`.

Observing never kills training. The view draws only when it is told something (it has no thread), and the first
exception inside it is caught, said in one note on stderr, and turns the view off for good; the run and its record go
on. Only `KeyboardInterrupt` and the like pass, since they are meant for the run.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trimtab.report.course import Course, Finding
from trimtab.report.keys import dead_share, look_up
from trimtab.report.lookout import Lookout
from trimtab.report.words import (
    LANGUAGE,
    WHY_LOSS_IS_ZERO,
    Words,
    count,
    duration,
    interval,
    is_number,
    number,
    percent,
)

Mode = Literal["auto", "live", "plain", "silent"]

_REDRAW = 0.2  # seconds; a faster loop is not slowed down by its own display
_QUIET = 60.0  # a log line at least this often, so that a reader knows that the run is alive
_LINES = 20  # log lines over a whole run, about
_FINDINGS = 2  # shown at once, the gravest
_BARS = "▁▂▃▄▅▆▇█"


class LiveView:
    """Shows a run. Use as a context manager around the loop.

        with LiveView(60, "turns", title="bnpo on chain_sum") as view:
            for step in run(...):
                view.update(step.logs, step.clock)

    until: how much is planned, in `unit` (a key of the clock: `turns, updates, decisions, rows, seconds`); None hides
    the bar and the time left. mode: `auto` is `live` on a terminal and `plain` elsewhere. every: in plain mode, a line
    every so many updates; by default about 20 lines a run, and one a minute. console: where to write (stdout).
    lead: the first line, on how to read the loss (see `words.about_loss`). words: what things
    are called in the world of the run. course: what was recorded of this run before, where it goes on.
    """

    def __init__(
        self,
        until: float | None = None,
        unit: str = "turns",
        *,
        title: str = "",
        mode: Mode = "auto",
        every: int | None = None,
        console: Console | None = None,
        lead: str = WHY_LOSS_IS_ZERO,
        words: Words = LANGUAGE,
        course: Course | None = None,
    ) -> None:
        self._lead, self._words = lead, words
        self._until, self._unit, self._title, self._every = until, unit, _safe(title), every
        self._console = console or Console()
        fancy = self._console.is_terminal and not self._console.is_dumb_terminal
        self.mode: Mode = ("live" if fancy else "plain") if mode == "auto" else mode
        self._live: Live | None = None
        self._logs: dict[str, Any] = {}
        self._clock: dict[str, Any] = {}
        self._lookout = Lookout(words.mute, course)
        self._past: dict[str, list[float]] = {"reward": [], "entropy": []}
        self._pace: deque[tuple[float, float]] = deque(maxlen=20)
        self._evaluation: tuple[float, float | None, float | None, int | None] | None = None
        self._failures = 0.0  # of the whole run
        self._remark = ""  # the last note
        self._shown: set[str] = {"held-out"}
        self._updates = 0
        self._began = time.monotonic()
        self._drawn = float("-inf")
        self._line_at: tuple[float, float] | None = None  # time and progress of the last log line

    # -- what the run calls ---------------------------------------------------------------------------------------
    def update(self, logs: Mapping[str, Any], clock: Mapping[str, Any]) -> None:
        """One turn happened. logs: any numbers (see `keys` for the names that are shown); clock: counts and seconds."""
        self._observe(lambda: self._update(logs, clock))

    def evaluated(self, mean: float, low: float | None = None, high: float | None = None, n: int | None = None) -> None:
        """Held-out problems were evaluated: mean, interval, how many."""
        self._observe(lambda: self._evaluated(mean, low, high, n))

    def note(self, text: str) -> None:
        """Say one sentence: shown in the panel until the next note, or as a line of the log."""
        self._observe(lambda: self._note(text))

    def __enter__(self) -> Self:
        self._observe(self._open)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._observe(self._close)

    # -- never kill the run ---------------------------------------------------------------------------------------
    def _observe(self, action: Callable[[], None]) -> None:
        if self.mode == "silent":
            return
        try:
            action()
        except Exception as error:
            self._off(error)
        except SystemExit as error:
            # rich leaves the program when the reader of stdout is gone (`| head`); any other exit is meant for the run.
            if not isinstance(error.__context__, BrokenPipeError):
                raise
            self._off(error.__context__)

    def _off(self, error: Exception) -> None:
        self.mode = "silent"
        live, self._live = self._live, None
        try:
            if live is not None:
                # Without drawing again: drawing may be what failed. This gives the cursor and stdout back.
                live.update(Text(""), refresh=False)
                live.stop()
        except (Exception, SystemExit):
            with suppress(Exception, SystemExit):
                self._console.show_cursor(True)
        with suppress(Exception):  # without stderr either, there is nobody to tell
            what = f"{type(error).__name__}: {error}"[:200]
            print(f"The live view stopped ({what}). Training goes on, and its record is kept.", file=sys.stderr)

    # -- inside ---------------------------------------------------------------------------------------------------
    def _open(self) -> None:
        self._began = time.monotonic()
        if self.mode == "plain":
            self._line(f"{self._title}: {self._lead}" if self._title else self._lead)
            return
        self._live = Live(self._render(), console=self._console, auto_refresh=False)
        self._live.start()

    def _close(self) -> None:
        self._say(self._lookout.look())
        if self.mode == "plain" and self._clock and (self._line_at is None or self._line_at[1] != self._done()):
            self._line(self._sentence())
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
            self._live.stop()
            self._live = None

    def _update(self, logs: Mapping[str, Any], clock: Mapping[str, Any]) -> None:
        self._logs = {key: _scalar(value) for key, value in logs.items()}
        self._clock = {key: _scalar(value) for key, value in clock.items()}
        self._updates += 1
        self._pace.append((time.monotonic(), self._done()))  # evaluations and checkpoints take time, too
        for name, values in self._past.items():
            value = look_up(self._logs, name)
            if value is not None:
                values.append(value)
        self._failures += look_up(self._logs, "failures") or 0
        record = {**self._logs, **{name: self._count(name) for name in ("turn", "rows", "updates")}}
        lost = {k: str(v) for k, v in self._logs.items() if isinstance(v, float) and not is_number(v)}
        if lost:
            record["not_finite"] = lost
        self._say(self._lookout.add(record))
        if self.mode == "plain":
            if self._due():
                self._line(self._sentence())
                self._line_at = (time.monotonic(), self._done())
        else:
            self._draw()

    def _evaluated(self, mean: float, low: float | None, high: float | None, n: int | None) -> None:
        self._evaluation = (float(mean), low, high, n)
        self._lookout.course.evaluated(self._count("turn"), mean, low, high)
        if self.mode == "plain":
            self._line(f"{self._place()}: held-out {self._held_out()}".lstrip(": "))
        else:
            self._draw(now=True)

    def _note(self, text: str) -> None:
        self._remark = _safe(text)
        if self.mode == "plain":
            self._line(f"note: {self._remark}")
        else:
            self._draw(now=True)

    def _say(self, found: list[Finding]) -> None:
        """A log says each kind once; the panel shows what is wrong while it lasts."""
        if self.mode == "plain":
            for finding in found:
                self._line(f"note: {_safe(finding.sentence)}")

    def _due(self) -> bool:
        if self._every is not None:
            return self._updates % self._every == 0 or self._finished()
        if self._line_at is None or self._finished():
            return True
        waited, gone = time.monotonic() - self._line_at[0], self._done() - self._line_at[1]
        return waited >= _QUIET or (gone >= self._until / _LINES if self._until else waited >= 10)

    def _draw(self, now: bool = False) -> None:
        moment = time.monotonic()
        if self._live is not None and (now or self._finished() or moment - self._drawn >= _REDRAW):
            self._drawn = moment
            self._live.update(self._render(), refresh=True)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    # -- numbers --------------------------------------------------------------------------------------------------
    def _count(self, name: str) -> float | None:
        for key in (name, name + "s", name.rstrip("s")):
            value = self._clock.get(key)
            if is_number(value):
                return value
        return None

    def _done(self) -> float:
        value = self._count(self._unit)
        return float(self._updates if value is None else value)

    def _finished(self) -> bool:
        return self._until is not None and self._done() >= self._until

    def _seconds(self) -> float:
        value = self._clock.get("seconds")
        return float(value) if is_number(value) else time.monotonic() - self._began

    def _left(self) -> float | None:
        """Seconds to go at the pace of the last 20 updates; unknown after one."""
        if self._until is None or len(self._pace) < 2:
            return None
        (t0, d0), (t1, d1) = self._pace[0], self._pace[-1]
        return max(0.0, (self._until - d1) * (t1 - t0) / (d1 - d0)) if d1 > d0 else None

    def _speed(self) -> float | None:
        recorded = look_up(self._logs, "speed")
        if recorded is not None:
            return recorded
        decisions, seconds = self._count("decisions"), self._seconds()
        return decisions / seconds if decisions and seconds > 0 else None

    # -- words ----------------------------------------------------------------------------------------------------
    def _place(self) -> str:
        if not self._clock:
            return ""
        of = f"/{number(self._until)}" if self._until is not None else ""
        unit = self._unit[:-1] if self._unit.endswith("s") and self._unit != "seconds" else self._unit
        return f"{unit} {number(self._done())}{of}"

    def _reward(self) -> str:
        value = look_up(self._logs, "reward")
        if value is None:
            return ""
        share = self._words.shares and all(0 <= v <= 1 for v in self._past["reward"][-50:])
        ends = interval(self._logs.get("reward_low"), self._logs.get("reward_high"), share)
        return f"{percent(value) if share else number(value)} {ends}".rstrip()

    def _held_out(self) -> str:
        if self._evaluation is None:
            return ""
        mean, low, high, n = self._evaluation
        share = self._words.shares and 0 <= mean <= 1
        of = f" of {n}" if n else ""
        return f"{percent(mean) if share else number(mean)} {interval(low, high, share)}".rstrip() + of

    def _clip(self) -> str:
        low, high, both = (look_up(self._logs, name) for name in ("clip_low", "clip_high", "clip"))
        if low is not None and high is not None:
            return f"{percent(low)} below, {percent(high)} above"
        return "" if both is None else percent(both)

    def _values(self) -> list[tuple[str, str, str]]:
        """What is shown: name, value, and the key whose past is drawn beside it."""

        def plain(name: str, say: Callable[[float], str] = number) -> str:
            value = look_up(self._logs, name)
            return "" if value is None else say(value)

        dead, speed = dead_share(self._logs), self._speed()
        rows = [
            (self._words.reward, self._reward(), "reward"),
            ("loss", "" if self._past["reward"] else plain("loss"), ""),
            ("held-out", self._held_out(), ""),
            ("pairs right", plain("preferred", percent), ""),
            ("entropy", plain("entropy"), "entropy"),
            ("grad norm", plain("grad_norm"), ""),
            ("clipped", self._clip(), ""),
            ("dead groups", "" if dead is None else percent(dead), ""),
            ("age", plain("age"), ""),
            ("sampler gap", plain("gap", lambda value: f"{number(value)} nats"), ""),
            ("failures", number(self._failures), ""),
            (f"{self._words.decision}s/s", "" if speed is None else number(float(f"{speed:.3g}")), ""),
        ]
        self._shown |= {name for name, value, _ in rows if value}  # a row that was there stays: the panel holds still
        return [(name, value or "-", key) for name, value, key in rows if name in self._shown]

    def _sentence(self) -> str:
        left = self._left()
        end = f"  {duration(left)} left" if left else ""
        return (
            f"{self._place()}  "
            + "  ".join(f"{name} {value}" for name, value, _ in self._values() if not _dull(name, value))
            + end
        )

    def _render(self) -> RenderableType:
        body: list[RenderableType] = [Text(self._lead, style="dim")]
        if self._until is not None:
            body.append(self._bar())
        table = Table.grid(padding=(0, 1), expand=True)
        for style, ratio in (("dim", None), ("bold", 3), ("dim", None), ("bold", 2)):
            table.add_column(style=style, ratio=ratio, no_wrap=ratio is None)
        cells = [(name, self._cell(value, key)) for name, value, key in self._values()]
        for i in range(0, len(cells), 2):
            pair = cells[i : i + 2]
            table.add_row(*(part for cell in pair for part in cell))
        body.append(
            table if self._updates or self._evaluation else Text("waiting for the first turn", style="italic dim")
        )
        if self._remark:
            body.append(Text(self._remark, style="dim"))
        wrong = self._lookout.now
        body += [Text(_safe(finding.sentence), style="yellow") for finding in wrong[:_FINDINGS]]
        if len(wrong) > _FINDINGS:
            more = count(len(wrong) - _FINDINGS, "more finding")
            body.append(Text(f"and {more}: see the report, or trimtab report", style="yellow"))
        return Panel(
            Group(*body),
            title=Text(self._title or "trimtab", overflow="ellipsis"),
            title_align="left",
            border_style="dim",
            padding=(0, 1),
        )

    def _bar(self) -> RenderableType:
        left = self._left()
        parts = [self._place() or "starting", duration(self._seconds()) if self._clock else ""]
        parts.append("done" if self._finished() else f"{duration(left)} left" if left is not None else "")
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        done = self._done() if self._clock else 0.0
        bar = ProgressBar(total=self._until or 1, completed=min(done, self._until or 1))
        grid.add_row(bar, Text(" · ".join(p for p in parts if p)))
        return grid

    def _cell(self, value: str, key: str) -> Text:
        cell = Text(value)
        if key and not self._console.options.ascii_only:
            cell.append("  " + sparkline(self._past[key]), style="cyan not bold")
        return cell


def sparkline(values: list[float], width: int = 16) -> str:
    """The whole past in at most `width` bars, each the mean of its share; scaled from least to most."""
    if len(values) < 2:
        return ""
    n = min(width, len(values))
    edges = [len(values) * i // n for i in range(n + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    if span <= 0:
        return _BARS[3] * n
    return "".join(_BARS[min(7, int(8 * (m - low) / span))] for m in means)


def _dull(name: str, value: str) -> bool:
    """What a log line need not say: the held-out value has lines of its own, and no failure and no age are usual."""
    return name == "held-out" or value == "-" or (name in ("failures", "age") and value == "0")


def _scalar(value: Any) -> Any:
    """A 0-dimensional tensor or array as a number; everything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _safe(text: str) -> str:
    """One line without control characters, so that a transcript in a note cannot steer the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
