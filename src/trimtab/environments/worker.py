"""The other side of a scoring process: runs scorers and problem generators that may raise, hang or crash.

It reads one request a line and answers one line (see wire.py). Whatever a scorer prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

from trimtab.core.errors import EnvironmentFailure, nearest
from trimtab.environments import wire
from trimtab.environments.problem import Failure, Problem
from trimtab.environments.rewards import MathVerify, describe_error, guarded

# Problems per reasoning-gym instance: some generators prepare all their items at once.
CHUNK = 512


def find_function(reference: str) -> Callable[[Problem, str], Any]:
    """Import module:function, or say what is wrong: module, import, name or signature (EnvironmentFailure)."""
    module_name, _, path = reference.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise EnvironmentFailure(
                f"The reward {reference!r} names module {error.name!r}, which cannot be found. "
                "It must be installed, or lie in the working folder or on PYTHONPATH."
            ) from None
        raise EnvironmentFailure(
            f"The reward module {module_name!r} cannot be imported ({describe_error(error)})."
        ) from None
    except (Exception, SystemExit) as error:
        raise EnvironmentFailure(
            f"The reward module {module_name!r} cannot be imported ({describe_error(error)})."
        ) from None
    for part in path.split("."):
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n, None))]
            raise EnvironmentFailure(
                f"The reward {reference!r}: {found.__name__!r} has no {part!r}. {nearest(part, names)}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise EnvironmentFailure(
            f"The reward {reference!r} is a {type(found).__name__}, not a function f(problem, text) -> float."
        )
    with contextlib.suppress(ValueError):
        signature = inspect.signature(found)
        try:
            signature.bind(None, None)
        except TypeError:
            raise EnvironmentFailure(
                f"The reward {reference!r} has the signature {signature}; it must accept f(problem, text) and "
                "return a number."
            ) from None
    return found


class Gym:
    """reasoning-gym data sets by name and parameters, cut into chunks of CHUNK problems on one endless line of indices.

    Problem i is the data set's item i for the data set's seed, as the library itself would number it.
    """

    def __init__(self) -> None:
        import reasoning_gym.composite
        from reasoning_gym.factory import DATASETS

        self._known = DATASETS
        self._composite = reasoning_gym.composite
        self._made: dict[str, Any] = {}

    def check(self, name: str, params: dict[str, Any]) -> None:
        """Refuse an unknown data set or parameter, a value of the wrong type, and what the data set itself refuses."""
        if name not in self._known:
            raise EnvironmentFailure(f"reasoning-gym has no data set {name!r}. {nearest(name, self._known)}")
        import typing

        kinds = typing.get_type_hints(self._known[name][1])
        for key, value in params.items():
            if key not in kinds:
                raise EnvironmentFailure(f"reasoning-gym:{name} has no parameter {key!r}. {nearest(key, kinds)}")
            allowed: tuple[Any, ...] = {float: (int, float)}.get(kinds[key], (kinds[key],))
            plain = kinds[key] in (int, float, bool, str)
            if plain and (not isinstance(value, allowed) or (isinstance(value, bool) and kinds[key] is not bool)):
                raise EnvironmentFailure(
                    f"The parameter {key}={value!r} of reasoning-gym:{name} must be {kinds[key].__name__}, not "
                    f"{type(value).__name__}."
                )
        self.chunk(name, params, 0, CHUNK)

    def chunk(self, name: str, params: dict[str, Any], start: int, size: int) -> Any:
        """The library's data set whose first item is problem `start`."""
        key = wire.dumps([name, params, start, size])
        if key not in self._made:
            if len(self._made) >= 4:
                self._made.pop(next(iter(self._made)))
            make, config = self._known[name]
            values = dict(params)
            if name == "composite":
                values["datasets"] = self._parts(values.get("datasets"))
            seeded = {"seed": params.get("seed", 0) + start, "size": params.get("size", size)}
            try:
                made = config(**(values | seeded))
                if hasattr(made, "validate"):
                    made.validate()
                self._made[key] = make(config=made)
            except (Exception, SystemExit) as error:
                reason = " ".join(str(error).split()) or describe_error(error)
                raise EnvironmentFailure(f"reasoning-gym:{name} refuses its parameters {params}: {reason}.") from None
        # Moved to the end: the one unused for longest leaves first.
        self._made[key] = self._made.pop(key)
        return self._made[key]

    def _parts(self, parts: Any) -> list[Any]:
        try:
            made = [self._composite.DatasetSpec(**{"weight": 1.0, "config": {}, **part}) for part in parts]
        except TypeError:
            raise EnvironmentFailure(
                "reasoning-gym:composite needs datasets=[{'name': 'chain_sum', 'weight': 1.0, 'config': {...}}, ...]."
            ) from None
        for part in made:
            self.check(part.name, part.config)
        return made

    def items(self, name: str, params: dict[str, Any], low: int, high: int) -> list[dict[str, Any]]:
        """Problems low..high-1, or {"error": sentence} in place of one the generator could not make."""
        out: list[dict[str, Any]] = []
        for index in range(low, high):
            start = 0 if "size" in params else index // CHUNK * CHUNK
            # A few generators draw from the global stream; seeding it makes every problem a function of its index.
            random.seed(f"trimtab/{index}")
            try:
                out.append(dict(self.chunk(name, params, start, CHUNK)[index - start]))
            except EnvironmentFailure:
                raise
            except (Exception, SystemExit) as error:
                out.append({"error": describe_error(error)})
        return out

    def score(self, name: str, params: dict[str, Any], entry: dict[str, Any], text: str) -> Any:
        """The data set's own score of a response, its ends stripped."""
        return self.chunk(name, params, 0, CHUNK).score_answer(text.strip(), entry)


class Server:
    """Answers requests; libraries are imported when the first request needs them."""

    def __init__(self) -> None:
        self._function: Callable[[Problem, str], Any] | None = None
        self._tools: dict[str, Any] = {}

    def _tool(self, kind: str) -> Any:
        if kind not in self._tools:
            package = {"gym": "reasoning-gym", "math": "math-verify"}[kind]
            try:
                self._tools[kind] = {"gym": Gym, "math": MathVerify}[kind]()
            except ImportError as error:
                raise EnvironmentFailure(
                    f"The package {package!r} is needed and cannot be imported ({error}). pip install {package}"
                ) from None
        return self._tools[kind]

    def answer(self, request: list[Any]) -> Any:
        """One request [operation, arguments...]; an EnvironmentFailure is the caller's to raise."""
        match request:
            case ["open", reference]:
                self._function = find_function(reference)
                return None
            case ["score", problem, text]:
                assert self._function is not None
                return guarded(self._function, _problem(problem), text)
            case ["warm", kind]:
                # Importing takes seconds, which no score's time limit should pay for.
                self._tool(kind)
                return None
            case ["math-score", problem, text]:
                return guarded(self._tool("math"), _problem(problem), text)
            case ["math-gold", answer]:
                return bool(self._tool("math").gold(answer))
            case ["gym-check", name, params]:
                return self._tool("gym").check(name, params)
            case ["gym-items", name, params, low, high]:
                return self._tool("gym").items(name, params, low, high)
            case ["gym-score", name, params, entry, text]:
                gym = self._tool("gym")
                # The problem itself plays no part: the library scores an entry of its own.
                return guarded(lambda _, response: gym.score(name, params, entry, response), _NOBODY, text)
        raise EnvironmentFailure(f"A scoring process does not know the request {request[0]!r}.")


_NOBODY = Problem("", "", "", None, {})


def _problem(fields: list[Any]) -> Problem:
    return Problem(*fields)


def serve(requests: int, replies: int) -> None:
    """Read "seconds payload" lines from one file descriptor and answer on the other until the first is closed."""
    server = Server()
    with os.fdopen(requests, "rb") as incoming, os.fdopen(replies, "wb") as outgoing:
        for line in incoming:
            seconds, _, payload = line.partition(b" ")
            # A backstop for a parent that died: the kernel ends this process even while the interpreter is stuck.
            signal.setitimer(signal.ITIMER_REAL, float(seconds) + 5.0)
            try:
                result = server.answer(wire.loads(payload))
                if isinstance(result, Failure):
                    reply = wire.dumps(["failure", result.kind, result.message])
                else:
                    reply = wire.dumps(["ok", result])
            except EnvironmentFailure as error:
                reply = wire.dumps(["refused", str(error)])
            except Exception as error:
                reply = wire.dumps(["refused", f"A scoring process failed: {describe_error(error)}"])
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            outgoing.write(reply.encode("ascii") + b"\n")
            outgoing.flush()


def main() -> None:
    """Entry of the process: keep the pipe for replies, send ordinary output to standard error."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.dup(1)
    os.dup2(2, 1)
    requests = os.dup(0)
    quiet = os.open(os.devnull, os.O_RDONLY)
    os.dup2(quiet, 0)
    sys.stdout = sys.stderr
    serve(requests, replies)
