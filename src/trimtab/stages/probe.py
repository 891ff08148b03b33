"""What is measured while a method runs. A probe only looks: nothing it does changes the run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.piece import piece
from trimtab.evaluation import Evaluator, answer_length, contradiction


@lru_cache(maxsize=8)
def opened(env: str) -> Any:
    """The environment of a specification, made once in a process; an evaluation leaves it as it found it."""
    from trimtab.environments.text import load_environment

    return load_environment(env)


def open_early(kit: Any, options: Mapping[str, Any]) -> None:
    """Make the environment before the first turn, so that a mistake in it is found then; there is nothing to save."""
    if options["env"] is not None:
        opened(options["env"])


def _sane(options: Mapping[str, Any]) -> str | None:
    every, length = options["every"], options["new_tokens"]
    if not (isinstance(every, int) and every >= 1):
        return f"every={every!r} must be a whole number of turns, at least 1"
    if length is not None and length < 1:
        return f"new_tokens={length} must be at least 1, or None for the length of the method's own rollouts"
    return contradiction(*(options[name] for name in ("problems", "temperature", "samples", "k")))


@piece("probe", state={"held_out": open_early}, validate=_sane)
def held_out(
    kit: Kit,
    batch: Batch,
    *,
    every: int = 10,
    problems: int | None = 50,
    env: str | None = None,
    new_tokens: int | None = None,
    temperature: float = 0.0,
    samples: int = 1,
    k: tuple[int, ...] = (),
    seed: int = 0,
) -> Batch:
    """Every so many turns, evaluate the acting policy on held-out problems: `method.then(held_out(every=5))`.

    Logs `held_out`, `held_out_low`, `held_out_high` (the mean and its 95% interval) and `held_out_pass@k`, in those
    turns alone. The parameters, random streams, training problems and failure log of the run are bit for bit those of
    a run without this probe.
    env: another environment, as for `load_environment`, with its own scorer; None is the training one. new_tokens:
    longest answer; None is that of the method's rollouts. The others are those of `Evaluator`.
    """
    if kit.clock.turns % every:
        return batch
    world = kit.environment if env is None else opened(env)
    length = answer_length(kit.method) if new_tokens is None else new_tokens
    evaluator = Evaluator(world, problems, length, temperature, samples, k, seed)
    with kit.aside():
        made = evaluator(kit.actor("policy"))
    for name, value in (("held_out", made.mean), ("held_out_low", made.low), ("held_out_high", made.high)):
        kit.log(name, value)
    for among, (mean, _, _) in made.pass_at.items():
        kit.log(f"held_out_pass@{among}", mean)
    return batch
