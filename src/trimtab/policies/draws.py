"""One draw per row and step: an inverse CDF in two levels, one uniform per row from the row's own stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.native.language import Kernels

# Logits are turned into probabilities so many at a time on a CPU (1 MiB in float32): temporaries that stay in the
# second-level cache, and are not returned to the system after every step, make a draw ten times as fast at 64 rows.
LOGITS_AT_ONCE = 2**18
# Tokens whose probabilities are summed before any cumulative sum is taken.
BLOCK = 128


class SamplingError(TrimtabError):
    """A request for samples that cannot be met."""


@dataclass(frozen=True)
class Sampling:
    """How decisions are drawn.

    new_tokens: at most so many tokens a response, >= 1. temperature: logits are divided by it; 0 is greedy.
    top_k: only the k most probable tokens, 0 is all. top_p: the smallest set of most probable tokens that holds
    this much probability, (0, 1]. Temperature first, then top-k, then top-p on what is left, renormalised.
    adapt: a factor on the temperature of each decision, `[m]`, from its logits over the temperature, `[m, V]`; None is
    1. Greedy decisions have no temperature, and so none to adapt.

    Raises `SamplingError` outside these ranges.
    """

    new_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    adapt: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise SamplingError(f"new_tokens={self.new_tokens}, but a response has at least one token; give 1 or more")
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise SamplingError(f"temperature={self.temperature} is not in [0, inf); 0 is greedy, 1 is the policy")
        if self.top_k < 0:
            raise SamplingError(f"top_k={self.top_k} is negative; give 0 to turn it off, or how many tokens to keep")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p={self.top_p} is not in (0, 1]; give 1 to turn it off")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether every token may be drawn, at one temperature."""
        return not self.greedy and self.top_k == 0 and self.top_p == 1 and self.adapt is None


def uniforms(seeds: Tensor, steps: int) -> Tensor:
    """Noise in [0, 1), float64 `[N, steps]`: row `i` depends on `seeds[i]` alone, and is the prefix of a longer one."""
    streams = [np.random.Generator(np.random.Philox(key=int(s) & (2**64 - 1))) for s in seeds.tolist()]
    return torch.from_numpy(np.stack([g.random(steps) for g in streams]))


def draw(logits: Tensor, slot: Tensor, noise: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability, `[n]` each; float32, or float64 for float64 logits.

    logits `[m, V]` of `m` distinct pasts, slot long `[n]` the past of each row, noise uniforms `[n]`. The token is the
    first whose cumulative probability exceeds the uniform (inverse CDF); greedy takes the largest logit, without noise.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    kernels = Kernels.suited(wide, logits.dtype, logits.device) if sampling.plain else None
    if kernels and noise is not None:
        return kernels.draw(logits, slot, noise, sampling.temperature)
    at_once = max(1, LOGITS_AT_ONCE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    token, logp = torch.empty_like(slot), logits.new_empty(len(slot), dtype=wide)
    for first in range(0, len(logits), at_once):
        some = logits[first : first + at_once].to(wide)
        mine = ((slot >= first) & (slot < first + at_once)).nonzero().squeeze(1)
        place = slot[mine] - first
        if sampling.greedy:
            p, token[mine] = some.softmax(-1), some.argmax(-1)[place]
        else:
            assert noise is not None
            some = some if sampling.temperature == 1 else some / sampling.temperature
            if sampling.adapt is not None:
                some = some / sampling.adapt(some)[:, None]
            p = narrow(some, sampling).softmax(-1)
            token[mine] = invert(p, place, noise[mine])
        logp[mine] = p[place, token[mine]].log()
    return token, logp


def invert(p: Tensor, slot: Tensor, noise: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform, long `[n]`.

    p `[m, V]`, slot long `[n]`, noise `[n]`. First the block of tokens is found from the sums of the blocks, then the
    token from the cumulative sum inside that block, both in float64, so none is taken over all V.
    """
    short = -p.shape[1] % BLOCK
    blocks = (F.pad(p, (0, short)) if short else p).unflatten(1, (-1, BLOCK))
    cdf = blocks.sum(-1).double().cumsum(-1)
    target = _below(noise.double() * cdf[slot, -1], cdf[slot, -1])
    block = torch.searchsorted(cdf[slot], target[:, None], right=True)
    before = cdf[slot].gather(1, (block - 1).clamp_min(0)) * (block > 0)
    inside = blocks[slot, block.squeeze(1)].double().cumsum(-1)
    rest = _below(target - before.squeeze(1), inside[:, -1])
    return (block * BLOCK + torch.searchsorted(inside, rest[:, None], right=True)).squeeze(1)


def _below(target: Tensor, total: Tensor) -> Tensor:
    """A target that rounds up to the total would land behind the last token of positive probability."""
    return target.minimum(torch.nextafter(total, torch.zeros_like(total)))


def narrow(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits `[n, V]` with -inf outside top-k and top-p."""
    if 0 < sampling.top_k < logits.shape[-1]:
        value, index = logits.topk(sampling.top_k, -1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, value)
    if sampling.top_p < 1:
        value, index = logits.sort(dim=-1, descending=True, stable=True)
        p = value.softmax(-1)
        # The token that crosses top_p stays, hence the mass *before* each token.
        value = value.masked_fill(p.cumsum(-1) - p >= sampling.top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, value)
    return logits
