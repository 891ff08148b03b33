"""The bases of the language world: `reinforce`, `rloo`, `grpo`, `sft`."""

from __future__ import annotations

from trimtab.core.copies import frozen
from trimtab.core.errors import MethodError, nearest
from trimtab.core.method import Method, Track
from trimtab.core.piece import Schedule
from trimtab.core.registry import Neutral, method
from trimtab.core.schedules import linear
from trimtab.stages.annotate import logp_old, logp_ref
from trimtab.stages.collect import demonstrations, rollouts
from trimtab.stages.credit import group_mean, group_normalised, kl_in_reward, leave_one_out
from trimtab.stages.surrogate import clip, pessimistic, score_function, sequence_ratio, surrogate, token_ratio
from trimtab.stages.terms import kl_penalty, nll
from trimtab.stages.update import adamw

DECAY = linear(3e-5, 0.0)


@method(
    world="language",
    title="REINFORCE with a group-mean baseline",
    aliases=("reinforce_baseline",),
    case="text",
)
def reinforce(*, lr: float | Schedule = DECAY, clip_norm: float | None = 1.0, per: str = "token") -> Method:
    """`loss = -A log pi`, `A_i = R_i - mean_g(R)`; on policy, one update per batch.

    Williams 1992; the baseline is the mean reward of the prompt's own group (verl's `norm_adv_by_std_in_grpo=False`).
    lr: AdamW step size, a number or a schedule; 3e-5 falling to 0 over the run suits models of 100M parameters, 1e-6 is
    usual at 7B. clip_norm: largest gradient norm. per: reduction over tokens (`token`, `row`, `row_sum`, `fixed(L)`).
    """
    return Method(
        "reinforce",
        pieces=(rollouts(), group_mean()),
        tracks=(
            Track("policy", trains="policy", pieces=(surrogate(shape=score_function(), per=per),),
                  update=adamw(lr=lr, clip=clip_norm)),
        ),
    )  # fmt: skip


@method(
    world="language",
    title="Back to Basics: REINFORCE-style optimization with a leave-one-out baseline (RLOO)",
    arxiv="2402.14740",
    base=reinforce,
    case="text",
    neutral=Neutral(
        {"leave_out": False},
        level="exact",
        why="with the row left in its own baseline, n/(n-1) is gone and what remains is reinforce",
    ),
    presets={"trl": {"ratio": "sequence", "kl": 0.05}, "verl": {"ratio": "token", "dual": 3.0}},
)
def rloo(
    base: Method,
    *,
    leave_out: bool = True,
    ratio: str = "none",
    clip_at: float = 0.2,
    dual: float | None = None,
    kl: float = 0.0,
    rows: int | None = None,
    passes: int = 1,
) -> Method:
    """Edits to reinforce: credit `R_i - mean_g(R)` -> `R_i - mean_{j != i}(R_j)`.

    leave_out: keep the row out of its own baseline. ratio: "none" (paper), "token" (verl's PPO loss) or "sequence",
    `exp(sum_t m (logp - logp_old))` with a mean over rows (TRL), both clipped to [1 - clip_at, 1 + clip_at]; they
    matter with several updates per batch (rows, passes). dual: verl's dual clip. kl: the price on the reward,
    `kl sum_t (logp_old - logp_ref)` (TRL has 0.05). TRL and verl disagree in all of these; a preset names each. TRL's
    optional whitening of the advantage is not offered.
    """
    made = base.swap("credit", leave_one_out() if leave_out else group_mean()).but(rows=rows, passes=passes)
    if ratio not in ("none", "token", "sequence"):
        raise MethodError(f"rloo has ratio={ratio!r}. {nearest(ratio, ('none', 'token', 'sequence'))}")
    if ratio != "none":
        taken = token_ratio() if ratio == "token" else sequence_ratio(mean=False)
        per = made.get("surrogate.per") if ratio == "token" else "row_sum"
        shape = pessimistic(dual=dual)
        made = made.swap("surrogate", surrogate(ratio=taken, bound=clip(clip_at, clip_at), shape=shape, per=per))
    if ratio != "none" or kl:
        made = made.then(logp_old(always=bool(kl)))
    if kl:
        made = made.then(logp_ref()).wrap("credit", kl_in_reward(coef=kl))
        made = made.but(copies={"reference": frozen("policy")})
    return made


@method(
    world="language",
    title="DeepSeekMath: Group Relative Policy Optimization (GRPO)",
    arxiv="2402.03300",
    base=reinforce,
    case="text",
    neutral=Neutral(
        {"scale": "none"},
        level="rounding",
        why="undivided credit is reinforce's, and with one update per batch the ratio is 1 and never clipped",
    ),
    presets={
        "paper": {"kl": 0.04, "per": "row"},
        "trl": {"per": "token", "eps": 1e-4},
        "verl": {"per": "token", "eps": 1e-6, "dual": 3.0},
    },
)
def grpo(
    base: Method,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual: float | None = None,
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-4,
    kl: float = 0.0,
    kl_estimator: str = "k3",
    per: str = "token",
    rows: int | None = None,
    passes: int = 1,
) -> Method:
    """Edits to reinforce: credit over the group's std; a clipped ratio to the old policy; optional KL to the start.

    `loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl k(pi, ref)`, `A_i = (R_i - mean_g) / (s_g + eps)`.
    per: "token" (TRL's and verl's default) or "row" (the paper: mean of the rows' token means). ddof: 1 in both
    libraries, the paper does not say. kl: 0 (TRL's default); the paper has 0.04 with k3 in the loss. rows, passes: rows
    per update (None: all) and passes over a batch; with the defaults the ratio is 1, and the bound inert.
    dual: verl's dual clip (3 there, none in TRL and in the paper); it binds only for A < 0 and r > dual.
    """
    shape = pessimistic(dual=dual)
    clipped = surrogate(ratio=token_ratio(), bound=clip(clip_low, clip_high), shape=shape, per=per)
    made = (
        base.swap("credit", group_normalised(scale=scale, ddof=ddof, eps=eps))
        .swap("surrogate", clipped)
        .then(logp_old())
        .but(rows=rows, passes=passes)
    )
    if kl:
        made = made.then(logp_ref(), kl_penalty(coef=kl, estimator=kl_estimator, per=per))
        made = made.but(copies={"reference": frozen("policy")})
    return made


@method(world="language", title="Supervised fine-tuning on reference answers (SFT)", aliases=("nll",), case="text")
def sft(*, lr: float | Schedule = DECAY, clip_norm: float | None = 1.0, prompts: int = 16) -> Method:
    """`loss = -sum(m log pi) / sum(m)` over the response tokens of the environment's reference answers.

    prompts: demonstrations per batch. lr, clip_norm: AdamW step size and largest gradient norm.
    """
    return Method(
        "sft",
        pieces=(demonstrations(prompts=prompts),),
        tracks=(Track("policy", trains="policy", pieces=(nll(),), update=adamw(lr=lr, clip=clip_norm)),),
    )
