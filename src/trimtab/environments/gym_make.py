"""One Gymnasium environment from a line of text, with spaces that a policy can work with."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
from contextlib import suppress
from typing import Any

from trimtab.core.errors import EnvironmentFailure, nearest
from trimtab.environments.spec import parse_options

VIEWS = ("flat", "image", "words")
NEEDS = "Control environments need Gymnasium: pip install 'trimtab[control]'."


def parse_gym_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Split `"HalfCheetah-v5(ctrl_cost_weight=0.05)"` into the id and its parameters. Raises EnvironmentFailure."""
    given = text.strip()
    name, bracket, inside = given.partition("(")
    if not name:
        raise EnvironmentFailure(f"The environment {text!r} has no id; write a Gymnasium id such as 'Pendulum-v1'.")
    if not bracket:
        return name, {}
    if not inside.endswith(")"):
        raise EnvironmentFailure(f"The parameters of {given!r} must end with ')': write {name}(key=value, ...).")
    options = parse_options(inside[:-1], given)
    if "render_mode" in options:
        raise EnvironmentFailure(f"{given!r} asks for a render_mode; pictures are made by: trimtab watch RUN")
    return name, options


def find_spec(name: str) -> Any:
    """The registered specification of an id. Raises EnvironmentFailure with the nearest ids."""
    gym = gymnasium()
    module, colon, plain = name.rpartition(":")
    if colon:
        try:
            importlib.import_module(module)  # its ids are registered on import
        except Exception as error:  # a module may raise anything while it is imported
            raise EnvironmentFailure(
                f"The environment {name!r} cannot be had: importing {module!r} raised {type(error).__name__}: {error}"
            ) from error
    name = plain
    with suppress(gym.error.Error):
        return gym.spec(name)
    known = list(gym.registry)
    folded = {key.lower(): key for key in known}
    close = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.6)
    versions = [key for key in known if key.lower().rpartition("-v")[0] == name.lower().rpartition("-v")[0] or
                key.lower().rpartition("-v")[0] == name.lower()]  # fmt: skip
    guesses = sorted(versions, reverse=True)[:1] or [folded[key] for key in close]
    guess = f" Did you mean {' or '.join(repr(g) for g in guesses)}?" if guesses else ""
    raise EnvironmentFailure(
        f"There is no Gymnasium environment {name!r} among the {len(known)} registered.{guess} Ids of another package "
        "are written 'module:Id-v0', which imports that module."
    )


def gymnasium() -> Any:
    """The module, with MiniGrid's ids where MiniGrid is installed. Raises EnvironmentFailure when there is none."""
    try:
        import gymnasium as gym
    except ImportError as error:
        raise EnvironmentFailure(NEEDS) from error
    if not any(key.startswith("MiniGrid") for key in gym.registry):
        with suppress(ImportError):
            import minigrid  # noqa: F401  registering happens on import
    return gym


def make_one(text: str, *, render: bool = False) -> tuple[Any, int | None]:
    """The environment of a specification, and its time limit in steps (None: none, or its own).

    The wrappers of `gymnasium.make` that only check or count are left out: we check and count ourselves. Observations
    that are not boxes become one flat box; MiniGrid's become what `observation=` says (`flat`: the symbolic view and
    the direction; `image`: the view alone, unflattened; `words`: the view and the characters of the mission).

    Raises EnvironmentFailure for an unknown id or parameter, a missing dependency and a space that cannot be used.
    """
    gym = gymnasium()
    name, options = parse_gym_spec(text)
    spec = copy.deepcopy(find_spec(name))
    view = options.pop("observation", None)
    limit = options.pop("max_episode_steps", spec.max_episode_steps)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise EnvironmentFailure(f"max_episode_steps={limit!r} of {text!r} must be a whole number of steps, at least 1")
    _check_parameters(spec, options, text)
    spec.order_enforce = False
    if render:
        options["render_mode"] = "rgb_array"
    try:
        env = gym.make(spec, max_episode_steps=-1, disable_env_checker=True, **options)
    except Exception as error:  # whatever its constructor raises is what cannot be had
        raise EnvironmentFailure(_refused(text, spec.id, error)) from error
    return _viewed(env, view, text), limit


def _check_parameters(spec: Any, options: dict[str, Any], text: str) -> None:
    from gymnasium.envs.registration import load_env_creator

    if not options or spec.entry_point is None:
        return
    try:
        make = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
        parameters = inspect.signature(make).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError):
        return  # making it says what is wrong
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    free = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {*named, "max_episode_steps"} - {"self", "render_mode"}
    for key in options:
        if key not in known and not free:
            raise EnvironmentFailure(f"{text!r}: {spec.id} has no parameter {key!r}. {nearest(key, known)}")


def _refused(text: str, name: str, error: Exception) -> str:
    gym = gymnasium()
    said = f"The environment {text!r} cannot be made: {type(error).__name__}: {error}"
    stem, _, version = name.rpartition("-v")
    newer = [k for k in gym.registry if k.rpartition("-v")[0] == stem and int(k.rpartition("-v")[2]) > int(version)]
    if newer:
        return f"{said}. There is a newer version: {max(newer)!r}"
    if isinstance(error, gym.error.DependencyNotInstalled):
        return f"{said}. {NEEDS}"
    return said


def _viewed(env: Any, view: str | None, text: str) -> Any:
    """The environment with a box as observation, and an action space that there are policies for."""
    from gymnasium import spaces, wrappers

    grid = isinstance(env.observation_space, spaces.Dict) and set(env.observation_space) == {
        "image", "direction", "mission",
    }  # fmt: skip
    if view is not None and (not grid or view not in VIEWS):
        raise EnvironmentFailure(
            f"observation={view!r} of {text!r}: this parameter is of MiniGrid environments. {nearest(str(view), VIEWS)}"
        )
    if grid:
        env = _grid_view(env, view)
    space = env.observation_space
    if not isinstance(space, spaces.Box):
        if not _flattens(space):
            raise EnvironmentFailure(
                f"{text!r} has observations of {space}, which is no box of numbers and cannot be flattened into one. "
                "Wrap it in Gymnasium and register the wrapped environment."
            )
        env = wrappers.FlattenObservation(env)
    action = env.action_space
    if not isinstance(action, spaces.Box | spaces.Discrete | spaces.MultiDiscrete):
        raise EnvironmentFailure(
            f"{text!r} has actions of {action}; there are policies for Box, Discrete and MultiDiscrete actions."
        )
    return env


def _grid_view(env: Any, view: str | None) -> Any:
    from gymnasium import wrappers
    from minigrid.wrappers import FlatObsWrapper, ImgObsWrapper

    if view is None:  # a mission that is always the same says nothing
        varies = getattr(env.observation_space["mission"], "ordered_placeholders", None)
        view = "words" if varies else "flat"
    if view == "image":
        return ImgObsWrapper(env)
    return FlatObsWrapper(env) if view == "words" else wrappers.FilterObservation(env, ["image", "direction"])


def _flattens(space: Any) -> bool:
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        inside = space.values() if isinstance(space, spaces.Dict) else space
        return all(_flattens(s) for s in inside)
    return isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary)
