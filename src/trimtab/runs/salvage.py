"""What is kept when a run stops: the state before a fault, a whole export or none, and the way on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from trimtab.core.disk import writing
from trimtab.core.errors import DiskError, NonFiniteError
from trimtab.core.loop import Step
from trimtab.core.state import State, checkpoints, save
from trimtab.report.folder import RunFolder
from trimtab.runs.worlds import Experiment


def standing(folder: RunFolder) -> str:
    """Where a run that stopped stands, and how to go on."""
    if not folder.holds_run():
        return f"Nothing was recorded yet; put that right, then start again or go on with: trimtab resume {folder.path}"
    saved = checkpoints(folder.checkpoints)
    where = f"its newest checkpoint is {saved[-1].name}" if saved else "it has no checkpoint yet"
    return f"The run is in {folder.path} and {where}; go on with: trimtab resume {folder.path}"


def saved_if_not_finite(loop: Iterator[Step], state: State, folder: RunFolder, keep: int) -> Iterator[Step]:
    """The turns of a loop; where an update is not finite, the state before it is saved before the run ends."""
    try:
        yield from loop
    except NonFiniteError as error:
        folder.sync()
        save(state, folder.checkpoints, keep=keep)
        error.add_note(
            "The state before that update was saved, and resuming goes on with the next batch. If it happens again, "
            "start a run with a lower learning rate (--set update.lr=...) or look into the reward."
        )
        raise


def export(made: Experiment, folder: RunFolder, state: State) -> None:
    """What was trained, as an ordinary model folder, whole or not at all. Raises DiskError."""
    try:
        with writing(folder.model, sum(t.nbytes for m in made.models.values() for t in m.state_dict().values())):
            made.export(folder.model, state)
    except DiskError:
        shutil.rmtree(folder.model, ignore_errors=True)
        raise
