"""BAPO on toy tokens with stale data (card `bapo`): what a spike first showed, now on the method itself."""

from __future__ import annotations

from trimtab.core.method import Method
from trimtab.methods.language.bapo import balanced as balanced
from trimtab.methods.language.bapo import bapo as bapo
from trimtab.methods.language.bases import grpo

from .tokens import token_rollouts


def toy_grpo() -> Method:
    """GRPO on toy tokens with stale data: three updates of 8 rows a batch."""
    base = grpo(rows=8, passes=2)
    return base.swap("collect", token_rollouts()).set("update.lr", 0.05)
