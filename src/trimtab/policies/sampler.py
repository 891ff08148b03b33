"""Sampling responses: one prefill per prompt, one uniform per row and step, inverse CDF.

A row's noise comes from a counter-based stream keyed by the row's seed, so what a row says does not depend on which
rows are sampled beside it (exactly in float64; up to the rounding of the forward pass below that).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trimtab.core.errors import TrimtabError
from trimtab.core.stopwatch import phase, timed

# More rows than this are sampled in parts: above it the logits, not the decoding, dominate memory.
ROWS_AT_ONCE = 256


class SamplingError(TrimtabError):
    """A request for samples that cannot be met."""


@dataclass(frozen=True)
class Sampling:
    """How decisions are drawn.

    new_tokens: at most so many tokens a response, >= 1. temperature: logits are divided by it; 0 is greedy.
    top_k: only the k most probable tokens, 0 is all. top_p: the smallest set of most probable tokens that holds
    this much probability, (0, 1]. Temperature first, then top-k, then top-p on what is left, renormalised.

    Raises `SamplingError` outside these ranges.
    """

    new_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

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


@dataclass
class Rollout:
    """Sampled responses, `N` rows of at most `T` tokens.

    tokens: long `[N, T]`, right padded. mask: bool `[N, T]`, 1 on what was sampled (the end token included).
    logp: float `[N, T]` under the distribution sampled from (temperature, top-k and top-p renormalised); for greedy
    the temperature-1 log-probability; 0 where mask is 0. finished: bool `[N]`, whether the end token was sampled.
    """

    tokens: Tensor
    mask: Tensor
    logp: Tensor
    finished: Tensor

    def cpu(self) -> Rollout:
        """The same on the CPU, where text is decoded and scored."""
        return Rollout(self.tokens.cpu(), self.mask.cpu(), self.logp.cpu(), self.finished.cpu())


class Sampler(Protocol):
    """Whatever draws responses: the local one below, or a server."""

    def sample(self, prompts: list[list[int]], copies: int, seeds: Tensor | None, sampling: Sampling) -> Rollout: ...


class Decoder(Protocol):
    """A language model that reads prompts once and then one token per row and step."""

    def start(self, prompts: Tensor, mask: Tensor, room: int) -> Tensor:
        """Read left-padded prompts `[B, P]` (on any device), with room for more tokens; next-token logits `[B, V]`."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token per row, `[n]`; the next-token logits `[n, V]`."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, a long index `[n]` into the present ones; one may come several times, or never."""


def pad_left(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Token lists to `(tokens, mask)`, long and bool `[N, P]`, padded on the left."""
    width = max(map(len, rows), default=0)
    tokens = torch.tensor([[fill] * (width - len(r)) + list(r) for r in rows], dtype=torch.long).reshape(-1, width)
    lengths = torch.tensor([len(r) for r in rows], dtype=torch.long)
    return tokens, torch.arange(width) >= width - lengths[:, None]


def uniforms(seeds: Tensor, steps: int) -> Tensor:
    """Noise in [0, 1), float64 `[N, steps]`: row `i` depends on `seeds[i]` alone, and is the prefix of a longer one."""
    streams = [np.random.Generator(np.random.Philox(key=int(s) & (2**64 - 1))) for s in seeds.tolist()]
    return torch.from_numpy(np.stack([g.random(steps) for g in streams]))


def draw(logits: Tensor, slot: Tensor, noise: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability, `[n]` each.

    logits `[m, V]` of `m` distinct pasts, slot long `[n]` the past of each row, noise uniforms `[n]`. The token is the
    first whose cumulative probability exceeds the uniform (inverse CDF); greedy takes the largest logit, without noise.
    """
    if sampling.greedy:
        token = logits.argmax(-1)
        return token[slot], logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)[slot]
    assert noise is not None
    p = narrow(logits / sampling.temperature, sampling).softmax(-1)
    cdf = p.cumsum(-1)
    total = cdf[:, -1][slot]
    # A target that rounds up to the total would land behind the last token of positive probability.
    target = (noise.to(cdf) * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
    # Rows of one past stand side by side in a table, so that no cumulative sum is copied per row.
    order = slot.argsort(stable=True)
    counts = slot.bincount(minlength=len(cdf))
    line, place = slot[order], torch.arange(len(slot), device=slot.device)
    place = place - (counts.cumsum(0) - counts)[line]
    table = cdf.new_zeros(len(cdf), int(counts.max()))
    table[line, place] = target[order]
    token = torch.empty_like(slot)
    token[order] = torch.searchsorted(cdf, table, right=True)[line, place]
    return token, p[slot, token].log()


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


class LocalSampler:
    """Samples from a decoder on this machine.

    decoder: gives one that holds the policy's *present* weights; asked once per call of `sample`.
    ends: ids that finish a response. fill: id that pads. compute: dtype of probabilities (float32, or float64 for a
    float64 policy). context: the most tokens, prompt and response together, that the model reads; None is no limit.
    """

    def __init__(
        self,
        decoder: Callable[[], Decoder],
        ends: Sequence[int],
        fill: int,
        compute: torch.dtype,
        context: int | None = None,
    ) -> None:
        self.context = context
        self.decoder = decoder
        self.ends = torch.tensor(sorted(ends), dtype=torch.long)
        self.fill = fill
        self.compute = compute

    @timed("sample")
    @torch.no_grad()
    def sample(self, prompts: list[list[int]], copies: int, seeds: Tensor | None, sampling: Sampling) -> Rollout:
        """Responses to every prompt: all `copies` of prompt 0, then of prompt 1, ...; `N = len(prompts) * copies` rows.

        prompts: token lists, each at least one token. copies: >= 1. seeds: long `[N]`, the noise of each row; None
        only when greedy. `T` is the longest row sampled, at least 1.

        Raises `SamplingError` for an empty or too long prompt, or seeds that are missing or of another number.
        """
        rows = len(prompts) * copies
        self._check(prompts, copies, seeds, rows, sampling)
        noise = None
        if not sampling.greedy:
            assert seeds is not None
            noise = uniforms(seeds, sampling.new_tokens)
        decoder = self.decoder()
        per = max(1, ROWS_AT_ONCE // copies)
        parts = [
            self._part(
                decoder, prompts[i : i + per], copies, noise[i * copies :] if noise is not None else None, sampling
            )
            for i in range(0, len(prompts), per)
        ]
        return _join(parts, self.fill)

    def _check(
        self, prompts: list[list[int]], copies: int, seeds: Tensor | None, rows: int, sampling: Sampling
    ) -> None:
        if not prompts or copies < 1:
            raise SamplingError(f"asked for {copies} copies of {len(prompts)} prompts; give at least one of each")
        empty = [i for i, p in enumerate(prompts) if not p]
        if empty:
            raise SamplingError(f"prompt {empty[0]} has no tokens; the first decision needs one before it")
        long = [i for i, p in enumerate(prompts) if self.context and len(p) + sampling.new_tokens > self.context]
        if long:
            raise SamplingError(
                f"prompt {long[0]} has {len(prompts[long[0]])} tokens, and new_tokens={sampling.new_tokens} more are "
                f"above the {self.context} that the model reads; shorten it, or ask for fewer tokens"
            )
        if seeds is None and not sampling.greedy:
            raise SamplingError(f"temperature={sampling.temperature} needs noise, so every row needs a seed")
        if seeds is not None and len(seeds) != rows:
            raise SamplingError(f"{len(seeds)} seeds for {rows} rows; give one a row")

    def _part(
        self, decoder: Decoder, prompts: list[list[int]], copies: int, noise: Tensor | None, sampling: Sampling
    ) -> Rollout:
        n, steps = len(prompts) * copies, sampling.new_tokens
        ids, mask = pad_left(prompts, self.fill)
        with phase("prefill"):
            logits = decoder.start(ids, mask, steps).to(self.compute)
        device, ends = logits.device, self.ends.to(logits.device)
        noise = None if noise is None else noise.to(device)
        tokens = torch.full((n, steps), self.fill, dtype=torch.long, device=device)
        logp = torch.zeros(n, steps, dtype=self.compute, device=device)
        taken = torch.zeros(n, steps, dtype=torch.bool, device=device)
        finished = torch.zeros(n, dtype=torch.bool, device=device)
        alive = torch.arange(n, device=device)
        # The decoder holds one row per distinct past: samples that said the same so far are one row of it.
        slot = alive // copies
        for t in range(steps):
            token, value = draw(logits, slot, None if noise is None else noise[alive, t], sampling)
            tokens[alive, t], logp[alive, t], taken[alive, t] = token, value, True
            ended = torch.isin(token, ends)
            finished[alive[ended]] = True
            if t + 1 == steps or bool(ended.all()):
                break
            alive, held, vocabulary = alive[~ended], len(logits), logits.shape[1]
            pasts, slot = (slot * vocabulary + token)[~ended].unique(return_inverse=True)
            before, said = pasts // vocabulary, pasts % vocabulary
            if not torch.equal(before, torch.arange(held, device=device)):
                decoder.keep(before)
            logits = decoder.step(said).to(self.compute)
        width = int(taken.any(0).sum())
        return Rollout(tokens[:, :width], taken[:, :width], logp[:, :width], finished)


def _join(parts: list[Rollout], fill: int) -> Rollout:
    width = max(p.tokens.shape[1] for p in parts)

    def wide(x: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)

    return Rollout(
        torch.cat([wide(p.tokens, fill) for p in parts]),
        torch.cat([wide(p.mask, 0) for p in parts]),
        torch.cat([wide(p.logp, 0) for p in parts]),
        torch.cat([p.finished for p in parts]),
    )
