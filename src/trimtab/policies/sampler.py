"""Sampling responses: one prefill per prompt, one uniform per row and step, prompts that enter as rows finish.

A row's noise comes from a counter-based stream keyed by the row's seed, so what a row says does not depend on which
rows are sampled beside it (exactly in float64; up to the rounding of the forward pass below that).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trimtab.core.stopwatch import phase, timed
from trimtab.policies.cache import settle
from trimtab.policies.draws import Sampling, SamplingError, draw, uniforms

# At most so many samples are drawn at a time (or the copies of one prompt); other prompts wait until rows are free.
ROWS_AT_ONCE = 256


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

    def copy(self) -> Rollout:
        """The same in tensors of its own."""
        return Rollout(self.tokens.clone(), self.mask.clone(), self.logp.clone(), self.finished.clone())

    def cpu(self) -> Rollout:
        """The same on the CPU, where text is decoded and scored."""
        return Rollout(self.tokens.cpu(), self.mask.cpu(), self.logp.cpu(), self.finished.cpu())


class Sampler(Protocol):
    """Whatever draws responses: the local one below, or a server."""

    def sample(self, prompts: list[list[int]], copies: int, seeds: Tensor | None, sampling: Sampling) -> Rollout: ...


class Decoder(Protocol):
    """A language model that reads a prompt once and then one token per row and step."""

    joins: bool  # whether prompts may be admitted while others are being answered

    def open(self, prompts: int, rows: int, length: int, room: int) -> None:
        """Begin anew, with place for so many live prompts and rows, the longest prompt, and tokens to be appended."""

    def admit(self, prompts: list[list[int]]) -> Tensor:
        """Read prompts, each a new row after the present ones; their next-token logits `[m, V]`."""

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
        # A tenth faster than no_grad at one row; the copy is an ordinary tensor again, which autograd may read.
        with torch.inference_mode():
            rollout = _Sampling(self, decoder, prompts, copies, noise, sampling).run()
        return rollout.copy()

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


class _Sampling:
    """One call of `sample`: waiting prompts enter as rows finish, so that the batch stays wide.

    Of the samples that are being drawn, sorted by their row of the decoder: alive `[k]` says which, slot `[k]` the
    row. The decoder holds one row per distinct past: samples that said the same so far are one row of it.
    """

    def __init__(
        self, sampler: LocalSampler, decoder: Decoder, prompts: list[list[int]], copies: int, noise: Tensor | None,
        sampling: Sampling,
    ) -> None:  # fmt: skip
        self.decoder = decoder
        self.prompts, self.copies, self.how = prompts, copies, sampling
        self.rows = max(copies, min(ROWS_AT_ONCE // copies, len(prompts)) * copies)
        # Twice as many prompts as fill the rows: of some, only a few copies are still being drawn.
        self.live = min(2 * self.rows // copies, self.rows, len(prompts))
        self.decoder.open(self.live, self.rows, max(map(len, prompts)), sampling.new_tokens)
        self.read = 0  # prompts that were admitted
        logits = self._admit(self.rows // copies)
        self.logits, device = logits, logits.device
        self.ends = sampler.ends.to(device)
        self.noise = None if noise is None else noise.to(device)
        n = len(prompts) * copies
        self.tokens = torch.full((n, sampling.new_tokens), sampler.fill, dtype=torch.long, device=device)
        self.logp = torch.zeros(n, sampling.new_tokens, dtype=sampler.compute, device=device)
        self.length = torch.zeros(n, dtype=torch.long, device=device)
        self.finished = torch.zeros(n, dtype=torch.bool, device=device)
        self.alive = torch.arange(self.read * copies, device=device)
        self.slot = self.alive // copies

    def _admit(self, prompts: int) -> Tensor:
        some = self.prompts[self.read : self.read + prompts]
        self.read += len(some)
        with phase("prefill"):
            return self.decoder.admit(some)

    def run(self) -> Rollout:
        while len(self.alive):
            tokens, stays = self._draw()
            self._advance(tokens, stays)
            self._fill()
        width = int(self.length.max())
        mask = torch.arange(width, device=self.length.device) < self.length[:, None]
        return Rollout(self.tokens[:, :width], mask, self.logp[:, :width], self.finished)

    def _draw(self) -> tuple[Tensor, Tensor]:
        """The next token of every living sample, and which of them go on."""
        alive, at = self.alive, self.length[self.alive]
        token, value = draw(self.logits, self.slot, None if self.noise is None else self.noise[alive, at], self.how)
        self.tokens[alive, at], self.logp[alive, at] = token, value.to(self.logp)
        self.length[alive] = at + 1
        ended = torch.isin(token, self.ends)
        self.finished[alive] = ended
        return token, ~ended & (at + 1 < self.how.new_tokens)

    def _advance(self, token: Tensor, stays: Tensor) -> None:
        """Let the decoder read what the living samples said, each distinct past once, and few rows move."""
        held, alone = len(self.logits), len(self.alive) == len(self.logits)
        if not (alone and bool(stays.all())):
            self.alive, before, token = self.alive[stays], self.slot[stays], token[stays]
            owner = torch.arange(len(before), device=before.device)
            if not alone:
                vocabulary = self.logits.shape[1]
                pasts, owner = (before * vocabulary + token).unique(return_inverse=True)
                before, token = pasts // vocabulary, pasts % vocabulary
            place = settle(before)
            order = place.argsort()
            before, token = before[order], token[order]
            self.slot, sorting = place[owner].sort(stable=True)
            self.alive = self.alive[sorting]
            if len(before) != held or not torch.equal(before, torch.arange(held, device=before.device)):
                self.decoder.keep(before)
        if len(token):
            self.logits = self.decoder.step(token)

    def _fill(self) -> None:
        """Admit waiting prompts, all copies of each, when none is alive or a quarter of the rows is free."""
        living, free = len(self.alive), self.rows - len(self.alive)
        if self.read == len(self.prompts) or (living and (not self.decoder.joins or 4 * free < self.rows)):
            return
        room = min(free // self.copies, self.live - len((self.alive // self.copies).unique()))
        if room == 0:
            return
        first = self.read * self.copies
        held = len(self.logits) if living else 0
        logits = self._admit(room)
        new = torch.arange(first, self.read * self.copies, device=logits.device)
        self.alive = torch.cat([self.alive, new])
        self.slot = torch.cat([self.slot, held + (new - first) // self.copies])
        self.logits = torch.cat([self.logits, logits]) if living else logits
