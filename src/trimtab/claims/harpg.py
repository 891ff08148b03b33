"""N-HARPG on random processes whose gradient is known: does a Hessian-vector product keep momentum up to date?

The problem of `claims/n_pg_igt.py`. N-HARPG plays two episodes a turn, so plain momentum gets two a gradient as well.
"""

from __future__ import annotations

from trimtab.claims.core import Arm, Claim, Part, Study, below, within
from trimtab.claims.n_pg_igt import MANY, STEADY, arm
from trimtab.claims.returns import on_returns
from trimtab.claims.tables import HORIZON, on_tables, tracking
from trimtab.core.method import Method
from trimtab.core.registry import find


def n_harpg(outer: float = 1.0) -> Method:
    made: Method = find("harpg")(on_tables(), preset="normalised", lr=1.0, **({} if outer == 1 else {"outer": outer}))
    return made


ARMS = {
    "n_sgdm": arm("N-SGDM: plain momentum, averaging 2/3, two episodes a gradient",
                  lambda: find("n_sgdm")(on_tables(2), lr=1.0)),
    "same averaging": arm("plain momentum with N-HARPG's averaging, 1, two episodes a gradient",
                          lambda: find("n_sgdm")(on_tables(2), lr=1.0, eta_decay=1.0)),
    "n_harpg": arm("N-HARPG, averaging 1, one episode for the gradient and one for the curvature", n_harpg),
    "no outer product": arm("N-HARPG without the curvature's outer product", lambda: n_harpg(0.0)),
    "released sign": arm("N-HARPG with the outer product as the released code has it: sign flipped, over the horizon",
                         lambda: n_harpg(-1 / HORIZON)),
}  # fmt: skip

ARMS |= {
    "steady plain": arm(f"plain momentum, steps of 0.05, eta 0.05, {2 * MANY} episodes a gradient",
                        lambda: find("n_sgdm")(on_tables(2 * MANY), **STEADY)),
    "steady n_harpg": arm(f"N-HARPG, steps of 0.05, eta 0.05, {MANY} episodes for gradient and curvature each",
                          lambda: find("harpg")(on_tables(MANY), unit=True, count=MANY, **STEADY)),
    "steady n_pg_igt": arm(f"N-PG-IGT, steps of 0.05, eta 0.05, {2 * MANY} episodes a gradient",
                           lambda: find("n_pg_igt")(on_tables(2 * MANY), **STEADY)),
}  # fmt: skip

CLAIM = Claim(
    method="harpg",
    statement="Momentum corrected by one Hessian-vector product at a random point of the last step tracks the gradient "
    "faster than plain momentum, at two episodes a step: its error falls as t^(-1/2) instead of t^(-1/3).",
    mechanism=Study(
        arms=ARMS,
        parts=(
            Part("the slope of log error over log t is 1/6 steeper than N-SGDM's, within 0.06 (-1/2 against -1/3)",
                 "slope", "n_harpg", "n_sgdm", ("same averaging",), within(-1 / 6 - 0.06, -1 / 6 + 0.06)),
            Part("at the same number of episodes, its error around turn 1700 is below N-SGDM's", "error", "n_harpg",
                 "n_sgdm", ("same averaging",), below(1.0), kind="ratio"),
            Part("it is below that of plain momentum with the same averaging: the correction matters, not only "
                 "averaging longer", "error", "n_harpg", "same averaging", ("n_sgdm",), below(1.0), kind="ratio"),
            Part("without the outer product the slope is flatter by more than 0.2", "slope", "n_harpg",
                 "no outer product", ("n_sgdm",), below(-0.2)),
            Part("with the outer product as released the slope is flatter by more than 0.2", "slope", "n_harpg",
                 "released sign", ("n_sgdm",), below(-0.2)),
            Part("where steps do not shrink, and 128 episodes a turn leave little noise, its error is below plain "
                 "momentum's", "error", "steady n_harpg", "steady plain", ("steady n_pg_igt",), below(1.0),
                 kind="ratio"),
        ),
        measure=tracking,
        seeds=10,
    ),
    full=Study(
        arms={
            "gpomdp": Arm("GPOMDP, two episodes a batch, its steps normalised and shrinking alike",
                          lambda seed: find("gpomdp")(count=2, lr=0.3, unit=True, decay=1.0)),
            "n_sgdm": Arm("N-SGDM, two episodes a batch",
                          lambda seed: find("n_sgdm")(find("gpomdp")(count=2), lr=0.3)),
            "n_harpg": Arm("N-HARPG", lambda seed: find("harpg")(preset="normalised", lr=0.3)),
        },
        parts=(
            Part("on CartPole the mean return of the last tenth of training is above N-SGDM's", "return", "n_harpg",
                 "n_sgdm", ("gpomdp",), (0.0, float("inf"))),
        ),
        measure=on_returns,
        seeds=5,
        about="CartPole-v1, 100000 decisions",
    ),
)  # fmt: skip
