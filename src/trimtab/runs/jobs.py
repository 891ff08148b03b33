"""Carry out the runs of a comparison: one after the other in this process, or several at once as processes."""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from trimtab.core.errors import TrimtabError
from trimtab.report.words import count, duration, percent
from trimtab.runs.commands import command
from trimtab.runs.experiment import resume, train
from trimtab.runs.interrupt import interruptible
from trimtab.runs.request import Request

if TYPE_CHECKING:
    from trimtab.runs.comparison import Job

_LOOK = 0.2  # seconds between looks at the processes
_QUIET = 60.0  # and between lines on how far they are


@dataclass
class Progress:
    """Which run, of how many, and the time left at the pace of the runs so far."""

    total: int
    at_once: int
    say: Callable[[str], None]
    done: int = 0
    took: list[float] = field(default_factory=list)

    def begins(self, job: Job, running: int = 0) -> None:
        self.say(f"run {self.done + running + 1} of {self.total}: {job.name}{self._left()}")

    def ends(self, job: Job, seconds: float, failure: str = "") -> None:
        """A run came to its end. seconds: 0 for one that never began, which says nothing about the pace."""
        self.done += 1
        self.took += [seconds] if seconds else []
        if failure:
            self.say(f"{job.name} failed: {failure}")
        elif self.at_once > 1:
            self.say(f"{job.name} is finished after {duration(seconds)}{self._left()}")

    def goes_on(self, running: list[Child]) -> None:
        """How far the runs are that run right now."""
        shares = {child.job: child.share() for child in running}
        now = time.monotonic()
        made = [(now - child.began, shares[child.job] - child.had) for child in running]
        pace = [seconds / share for seconds, share in made if share > 0.05]
        said = ", ".join(f"{job.name}: {percent(share)}" for job, share in shares.items())
        self.say(f"{said}{self._left(sum(shares.values()), pace)}")

    def _left(self, begun: float = 0.0, pace: list[float] | None = None) -> str:
        """begun: runs that are made already, in parts; pace: seconds that those under way will take in all."""
        known, left = self.took + (pace or []), self.total - self.done - begun
        if not known or left <= 0:
            return ""
        return f" (about {duration(left * sum(known) / len(known) / min(self.at_once, math.ceil(left)))} left)"


def work(every: list[Job], jobs: int, mode: str) -> tuple[dict[Job, str], bool]:
    """Run everything that is not finished: the failures, and whether it was stopped by Ctrl-C."""
    console = Console()

    def say(text: str) -> None:
        if mode != "silent":
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    waiting = [job for job in every if not job.finished()]
    total = len(every)
    progress = Progress(total, jobs, say, done=total - len(waiting))
    if progress.done:
        say(f"{count(progress.done, 'run')} of {total} finished before")
    failures: dict[Job, str] = {}
    if jobs == 1:
        return failures, _here(waiting, failures, progress, mode)
    return failures, _beside(waiting, failures, progress, jobs)


def _ready(waiting: list[Job], failures: dict[Job, str], progress: Progress) -> Job | None:
    """The next run whose budget is known; those that can never have one are failures."""
    for job in list(waiting):
        if job.request() is not None:
            waiting.remove(job)
            return job
        if job.first in failures:
            waiting.remove(job)
            failures[job] = f"it has no budget, because {job.first.name} failed"
            progress.ends(job, 0.0, failures[job])
    return None


def _here(waiting: list[Job], failures: dict[Job, str], progress: Progress, mode: str) -> bool:
    """One after the other; whether it was stopped."""
    while (job := _ready(waiting, failures, progress)) is not None:
        progress.begins(job)
        began, failure = time.monotonic(), ""
        try:
            if job.folder.holds_run():
                ended = resume(job.folder.path, mode=mode)["finished"]
            else:
                ended = train(_needed(job), mode=mode)["finished"]
        except (TrimtabError, OSError) as error:
            failure = failures[job] = str(error)
        except KeyboardInterrupt:
            return True
        else:
            if not ended:
                return True
        progress.ends(job, time.monotonic() - began, failure)
    return False


def _needed(job: Job) -> Request:
    request = job.request()
    assert request is not None  # `_ready` gives only such
    return request


# -- processes ---------------------------------------------------------------------------------------------------


@dataclass
class Child:
    """A run in a process of its own, and where its words go."""

    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    began: float
    had: float = 0.0  # the share of its budget that was used before

    def share(self) -> float:
        """How much of its budget is used, in [0, 1]."""
        records = self.job.folder.metrics()
        ((unit, n),) = _needed(self.job).budget.items()
        return min(1.0, records[-1]["turn" if unit == "turns" else unit] / n) if records else 0.0


def _beside(waiting: list[Job], failures: dict[Job, str], progress: Progress, jobs: int) -> bool:
    """Several at once; whether it was stopped. Ctrl-C asks every run to finish its turn and save."""
    running: list[Child] = []
    asked, said = False, time.monotonic()
    try:
        with interruptible() as interrupted:
            while True:
                if interrupted() and not asked:
                    asked = True
                    progress.say("stopping: every run finishes its turn and saves; again Ctrl-C to stop at once")
                    _signal(running, signal.SIGINT)
                while not asked and len(running) < jobs and (job := _ready(waiting, failures, progress)) is not None:
                    progress.begins(job, len(running))
                    running.append(_start(job))
                if not running:
                    return asked
                if time.monotonic() - said > _QUIET:
                    said = time.monotonic()
                    progress.goes_on(running)
                time.sleep(_LOOK)
                for child in [c for c in running if c.process.poll() is not None]:
                    running.remove(child)
                    _ended(child, failures, progress, asked)
    except KeyboardInterrupt:
        return True
    finally:
        _signal(running, signal.SIGTERM)
        for child in running:
            child.process.wait()


def _signal(running: list[Child], number: signal.Signals) -> None:
    for child in running:
        if child.process.poll() is None:
            child.process.send_signal(number)


def _start(job: Job) -> Child:
    if job.folder.holds_run():
        words = ["resume", str(job.folder.path)]
    else:
        words = shlex.split(command(replace(_needed(job), threads=1)))[1:]
    log = job.folder.path.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "trimtab.cli", *words, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TRIMTAB_THREADS": "1"},
            start_new_session=True,  # a Ctrl-C at the terminal reaches it through us, once
        )
    child = Child(job, process, log, time.monotonic())
    return replace(child, had=child.share())


def _ended(child: Child, failures: dict[Job, str], progress: Progress, asked: bool) -> None:
    failure = ""
    if not child.job.finished() and not (asked and child.process.returncode in (0, 130, -signal.SIGINT)):
        lines = [x for x in child.log.read_text(errors="replace").splitlines() if x.strip()]
        own = next((x for x in lines if x.startswith("trimtab: ")), "").removeprefix("trimtab: ")
        ending = f"its process ended with code {child.process.returncode}" + (f": {lines[-1].strip()}" if lines else "")
        failure = failures[child.job] = own or ending
    if child.job.finished() or failure:
        progress.ends(child.job, time.monotonic() - child.began, failure)
