"""This side of a scoring process: start it, ask it, and end it when it does not answer in time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

from trimtab.core.errors import EnvironmentFailure
from trimtab.environments import wire
from trimtab.environments.problem import Failure

START_SECONDS = 120.0
_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from trimtab.environments.worker import main; main()"


class Asked:
    """A process that answers requests, one at a time, from any thread; restarted after a timeout or a crash.

    A thread cannot be stopped and a signal only reaches the main thread, so a scorer that may hang runs in a
    process, which can be killed even while its interpreter is stuck in C code. `opening` is a request repeated at
    every start.
    """

    def __init__(self, opening: list[Any] | None = None) -> None:
        self._opening = opening
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[Any, Asked] | None = None
        self._owner = -1

    def ask(self, request: list[Any], seconds: float) -> Any:
        """The reply to a request, or a Failure ("timeout" after `seconds`, "crashed", or one the scorer earned).

        Raises EnvironmentFailure when the process refuses the request, with its sentence.
        """
        with self._lock:
            try:
                started = self._start()
                return self._exchange(request, seconds) if not isinstance(started, Failure) else started
            except BaseException as error:
                # An interrupted exchange leaves a reply in the pipe that belongs to nobody.
                if not isinstance(error, EnvironmentFailure):
                    self.close()
                raise

    def close(self) -> None:
        """End the process and everything it started; the next request starts a new one."""
        with self._lock:
            if self._stop is not None:
                self._stop()
            self._process = self._stop = None

    def _start(self) -> Failure | None:
        # After a fork the pipe belongs to the parent; sharing it would mix up replies.
        alive = self._process is not None and self._owner == os.getpid() and self._process.poll() is None
        if alive:
            return None
        self.close()
        path = [p or os.getcwd() for p in sys.path]
        path += [os.getcwd()] if os.getcwd() not in path else []
        # A fixed hash seed: some generators iterate over sets of strings.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._owner = os.getpid()
        self._stop = weakref.finalize(self, _end, self._process, self._owner)
        if self._opening is None:
            return None
        try:
            reply = self._exchange(self._opening, START_SECONDS)
        except EnvironmentFailure:
            # Half open it would answer every later request with nonsense.
            self.close()
            raise
        return reply if isinstance(reply, Failure) else None

    def _exchange(self, request: list[Any], seconds: float) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            line = f"{seconds} {wire.dumps(request)}\n".encode("ascii")
        except TypeError as error:
            raise EnvironmentFailure(
                f"The reward cannot be computed in its own process: {error}. Drop that field."
            ) from None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            reply = self._read(process, seconds)
        except BrokenPipeError:
            reply = b""
        if reply is None:
            self.close()
            return Failure("timeout", f"the scorer gave no result within {seconds:g} seconds and was stopped")
        if not reply.endswith(b"\n"):
            self.close()
            return Failure("crashed", f"the scoring process ended by itself ({_ending(process)})")
        return _read_reply(wire.loads(reply))

    def _read(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        waiting = select.poll()
        waiting.register(pipe, select.POLLIN | select.POLLHUP)
        until = time.monotonic() + seconds
        parts: list[bytes] = []
        while True:
            left = until - time.monotonic()
            if left <= 0 or not waiting.poll(left * 1000.0):
                return None
            part = os.read(pipe, 1 << 20)
            parts.append(part)
            if not part or part.endswith(b"\n"):
                return b"".join(parts)


def _read_reply(reply: list[Any]) -> Any:
    match reply:
        case ["ok", result]:
            return result
        case ["failure", kind, message]:
            return Failure(kind, message)
        case ["refused", sentence]:
            raise EnvironmentFailure(sentence)
    raise EnvironmentFailure(f"A scoring process sent an unreadable reply: {str(reply)[:80]!r}.")


def _ending(process: subprocess.Popen[bytes]) -> str:
    code = process.poll()
    if code is None:
        return "unknown cause"
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        # Its own session, so whatever a scorer started ends with it.
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5.0)


_SHARED: dict[str, Asked] = {}
_SHARED_LOCK = threading.Lock()


def shared(kind: str) -> Asked:
    """The process of a library ("gym", "math") that all environments here ask: importing it takes seconds."""
    with _SHARED_LOCK:
        if kind not in _SHARED:
            _SHARED[kind] = Asked(opening=["warm", kind])
        return _SHARED[kind]
