"""Law 7: each method agrees over one turn with its literal twin, on random ragged batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.golden import rec_twin, remix_twin, twins
from tests.spikes.chord import chord, d3s
from tests.spikes.tokens import case, graded, token_demonstrations, token_pairs, token_rollouts
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.piece import Piece
from trimtab.core.registry import find
from trimtab.stages.update import sgd

torch.set_num_threads(1)


def toy(method: Method, collect: Piece | None = None) -> Method:
    """On toy tokens, with plain gradient descent."""
    collect = collect or token_rollouts(prompts=3, group=4)
    made = replace(method.swap("collect", collect), explicit=())
    return made.swap("update", sgd(lr=twins.LR))


def stale() -> Method:
    return find("grpo")(passes=twins.PASSES)


BUILT: dict[str, Callable[[], Method]] = {
    "reinforce": lambda: toy(find("reinforce")()),
    "rloo": lambda: toy(find("rloo")()),
    "grpo": lambda: toy(stale()),
    "sft": lambda: toy(find("sft")(), token_demonstrations()),
    "dr_grpo": lambda: toy(find("dr_grpo")(stale(), length=7.0)),
    "gspo": lambda: toy(find("gspo")(stale())),
    "gpg": lambda: toy(find("gpg")()),
    "dapo": lambda: toy(find("dapo")(stale(), buffer=0.5)).set("credit.limit", 4),
    "dpo": lambda: toy(find("dpo")(), token_pairs()),
    "bapo": lambda: find("bapo")(toy(stale())),
    "bnpo": lambda: toy(find("bnpo")(stale())),
    "chord": lambda: chord(toy(stale())),
    "d3s": lambda: d3s(toy(stale()).wrap("collect", graded()), share=twins.SHARE, tokens=twins.TOKENS),
    "remix": lambda: find("remix")(toy(find("grpo")()), passes=remix_twin.PASSES),
    "subnetwork": lambda: toy(find("subnetwork")(stale())),
    "rec": lambda: toy(find("rec")(find("grpo")(passes=rec_twin.PASSES))).set("update.lr", rec_twin.LR),
}


def agree(name: str, method: Method, twin: Callable[..., Any], seed: int, **options: Any) -> None:
    environment, models = case(seed)
    policy = models["policy"]
    assert isinstance(policy.logits, torch.Tensor)
    for _ in range(2):  # the second turn starts from a moved policy
        start = policy.logits.detach().clone()
        step = next(run(method, environment, models, until=10, seed=seed))
        expected = twin(step.batch, start, **options)
        error = float((policy.logits.detach() - expected).abs().max())
        moved = float((expected - start).abs().max())
        assert error < 1e-12, f"{name} is off its twin by {error:.2e}"
        assert moved > 1e-3, f"{name} did not move, so nothing was compared"
        seed += 100


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(BUILT))
def test_method_agrees_with_its_twin(name: str, seed: int) -> None:
    agree(name, BUILT[name](), twins.TWINS[name], seed)


@pytest.mark.parametrize("options", [{"per": "row"}, {"kl": 0.3}, {"per": "row", "kl": 0.1}])
def test_grpo_options_agree_with_the_twin(options: dict[str, Any]) -> None:
    agree("grpo", toy(find("grpo")(passes=twins.PASSES, **options)), twins.grpo, 5, **options)
