"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from trimtab.cli.looking import Diff, Doctor, Explain, Methods, Report
from trimtab.cli.measuring import Claim, Plan, Profile, Sparsity
from trimtab.cli.running import Compare, Eval, Export, Resume, Train, Watch

Command = (
    Annotated[Train, subcommand("train")]
    | Annotated[Resume, subcommand("resume")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Watch, subcommand("watch")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Profile, subcommand("profile")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Sparsity, subcommand("sparsity")]
    | Annotated[Methods, subcommand("methods")]
    | Annotated[Diff, subcommand("diff")]
    | Annotated[Explain, subcommand("explain")]
    | Annotated[Claim, subcommand("claim")]
    | Annotated[Doctor, subcommand("doctor")]
)

_usual = warnings.formatwarning


def _formatted(message: Warning | str, kind: type[Warning], *more: Any) -> str:
    """A warning of ours as one sentence, without the place in our code that gave it."""
    from trimtab.core.errors import TrimtabWarning

    return f"trimtab: {message}\n" if issubclass(kind, TrimtabWarning) else _usual(message, kind, *more)


def main(argv: list[str] | None = None) -> int:
    """Entry point: parse, run, and turn every deliberate refusal into one sentence and exit code 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    command: Any = tyro.cli(
        Command,
        prog="trimtab",
        description="Policy optimization methods as small named changes to one loop.",
        args=argv,
    )
    from trimtab.core.errors import TrimtabError
    from trimtab.machine import keep_freed_memory

    keep_freed_memory()
    warnings.formatwarning = _formatted  # type: ignore[assignment]
    try:
        return int(command())
    except TrimtabError as error:
        print("\n".join([f"trimtab: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a device, a disk or a network that an environment or a policy needs
        said = f"trimtab: {type(error).__name__}: {error}"
        print("\n".join([said, *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("trimtab: stopped at once; what followed the last checkpoint is lost", file=sys.stderr)
        return 130
