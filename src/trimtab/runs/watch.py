"""A video of an episode, as the policy of a checkpoint plays it; made without a display, shown in the report."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from trimtab.core.errors import EnvironmentFailure, MethodError, TrimtabError
from trimtab.core.kit import Kit
from trimtab.core.state import checkpoints, load
from trimtab.environments.gym import GymEnvironment
from trimtab.report.folder import RunFolder
from trimtab.report.html import write_report
from trimtab.report.video import VIDEOS
from trimtab.report.words import number
from trimtab.returns import HELD_OUT, current
from trimtab.runs.control import ControlExperiment
from trimtab.runs.export import choose
from trimtab.runs.request import request_of
from trimtab.runs.worlds import build, world_of

# What draws without a display: MuJoCo and pygame read these when they first draw.
OFF_SCREEN = {"MUJOCO_GL": "egl", "SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}
HEIGHT = 240  # pixels at most; a larger picture is thinned to whole steps
FRAMES = 500  # of a video at most; of a longer episode every k-th step is shown


class WatchError(TrimtabError):
    """No video can be made of this run, or here."""


def watch(
    run: str | Path, *, checkpoint: str = "newest", episode: int = 0, steps: int = 1000, kind: str = "mp4"
) -> dict[str, Any]:
    """Play an episode and write `RUN/video.mp4` (or `.gif`), and the report with it; returns what was seen.

    checkpoint: see `export.choose`; a run without one shows its policy before training. episode: which of the held-out
    episodes, numbered as in evaluation. steps: shown at most. The policy's mode decides, where it has one.

    Raises WatchError for a run of another world, for options that cannot be, and where no picture can be made.
    """
    folder = RunFolder(run)
    request = request_of(folder)
    if world_of(request.method) != "control":
        raise WatchError(f"{run} is a run of {request.method}, a language method; there is no episode to look at")
    if f"video.{kind}" not in VIDEOS or episode < 0 or steps < 1:
        raise WatchError(f"kind={kind!r}, episode={episode}, steps={steps}: the kind is mp4 or gif, the others count")
    for name, value in OFF_SCREEN.items():
        os.environ.setdefault(name, value)
    with closing(build(request)) as made:
        assert isinstance(made, ControlExperiment)
        state = made.begin()
        if checkpoints(folder.checkpoints):
            load(state, choose(folder, checkpoint))
        elif checkpoint != "newest":
            raise WatchError(f"{run} has no checkpoint yet, so it has none called {checkpoint!r}")
        kit = Kit(state, current(state, made.method), None, False)
        with kit.aside(), torch.no_grad(), closing(_stage(request.eval_env or request.env, episode)) as stage:
            frames, total, length, ended = _played(kit.actor("policy"), stage, steps)
            speed = stage.frames_per_second
    path = folder.path / f"video.{kind}"
    _write(path, frames, speed)
    end = "" if ended else f", cut after {length} steps"
    told = (
        f"Held-out episode {episode} after {state.clock.turns:,} turns: return {number(total)} in {length} steps{end}."
    )
    (folder.path / "video.txt").write_text(told + "\n")
    report = write_report(folder.path)
    seen = {"episode": episode, "turn": state.clock.turns, "return": total, "length": length}
    return {"run": str(folder.path), "video": str(path), **seen, "bytes": path.stat().st_size, "report": str(report)}


def _stage(spec: str, episode: int) -> GymEnvironment:
    """One environment that makes pictures, at the start of a held-out episode."""
    stage = GymEnvironment(spec, seed=HELD_OUT, render=True, first=episode)
    try:
        stage.start()
        drawn = stage.frame()
    except EnvironmentFailure:
        raise
    except Exception as error:  # a missing display, driver or library: whatever the renderer says
        stage.close()
        raise WatchError(
            f"{spec} cannot be drawn here: {type(error).__name__}: {error}. Drawing without a display needs EGL or "
            "OSMesa: set MUJOCO_GL=egl or MUJOCO_GL=osmesa, and SDL_VIDEODRIVER=dummy for environments that use pygame"
        ) from error
    if drawn is None:
        stage.close()
        raise WatchError(f"{spec} makes no pictures (it has no render mode 'rgb_array')")
    return stage


def _played(actor: Any, stage: GymEnvironment, steps: int) -> tuple[list[Any], float, int, bool]:
    """Frames, return, length, and whether the episode ended."""
    frames, total, rng, carry = [_small(stage.frame())], 0.0, torch.Generator().manual_seed(0), None
    for n in range(1, steps + 1):
        if hasattr(actor, "mode"):
            action = actor.mode(stage.obs)
        else:
            decision, carry = actor.act(stage.obs, carry, rng)
            action = decision.action
        made = stage.step(action)
        total += float(made.reward)
        over = bool(made.terminated | made.truncated)
        if not over:  # an ended environment shows its next episode already
            frames.append(_small(stage.frame()))
        if over or n == steps:
            return frames, total, n, over
    raise MethodError(f"steps={steps} must be at least 1")


def _small(frame: Any) -> Any:
    every = -(-frame.shape[0] // HEIGHT)
    cut = frame[::every, ::every]
    return cut[: cut.shape[0] // 2 * 2, : cut.shape[1] // 2 * 2]  # codecs want even sides


def _write(path: Path, frames: list[Any], speed: float) -> None:
    try:
        import imageio.v3 as imageio
    except ImportError as error:
        raise WatchError("a video needs imageio and imageio-ffmpeg: pip install 'trimtab[control]'") from error
    every = -(-len(frames) // FRAMES)
    options: dict[str, Any] = {"codec": "libx264", "macro_block_size": 1} if path.suffix == ".mp4" else {"loop": 0}
    if path.suffix == ".mp4":
        options |= {"fps": speed, "output_params": ["-crf", "30", "-movflags", "+faststart"], "plugin": "FFMPEG"}
    else:
        options |= {"duration": 1000 / speed}
    try:
        imageio.imwrite(path, frames[::every], **options)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise WatchError(f"{path} cannot be written: {type(error).__name__}: {error}. Try --kind gif") from error
    for name in VIDEOS:
        if name != path.name:
            (path.parent / name).unlink(missing_ok=True)  # one video a run
