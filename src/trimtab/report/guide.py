"""How to read a report, in the words of its world."""

from __future__ import annotations

LANGUAGE = (
    (
        "Reward while training",
        "The mean over the rows of a turn, on problems it trains on. The band is the interval of that turn alone.",
    ),
    (
        "Held-out problems",
        "Never trained on, the same each time. This is what the headline is about. Where two intervals overlap, the "
        "difference may be chance: evaluate on more problems.",
    ),
    (
        "Gradient norm and entropy",
        "The gradient says that something is learned; entropy how much is still tried. A run that has stopped "
        "learning has a small gradient, an entropy near 0, or only dead groups.",
    ),
    (
        "Clip rate and dead groups",
        "Both are decisions that teach nothing: clipped ones because the policy has moved far enough, dead ones "
        "because every response of the group got the same reward.",
    ),
)

CONTROL = (
    (
        "Return while training",
        "The mean over the episodes that ended in a turn, with the actions that training drew: exploration is part of "
        "it.",
    ),
    (
        "Held-out episodes",
        "Played in environments of their own from the same starts each time, with the action that the policy prefers. "
        "This is what the headline is about; its interval is over episodes of this one policy, not over seeds: another "
        "seed may come out elsewhere (trimtab compare).",
    ),
    (
        "Gradient norm and entropy",
        "The gradient says that something is learned; entropy how much is still tried. A policy whose entropy is gone "
        "explores no more.",
    ),
    (
        "Clip rate and values",
        "Clipped decisions teach nothing: the policy has moved far enough from where it collected. A value error that "
        "grows without end is the usual sign of a run that diverges.",
    ),
)

GUIDES = {"language": LANGUAGE, "control": CONTROL}
