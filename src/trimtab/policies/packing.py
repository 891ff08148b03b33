"""Rows packed into one, without padding: every prompt once, then the responses, each seeing its prompt and itself.

The layers of a model work on tokens one by one, but for attention; so attention alone has to know which tokens belong
together. A `Packed` row says that in `Block`s, and `attention`, registered with transformers, computes them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from trimtab.native.language import STEP, Kernels
from trimtab.policies.view import View

# Its name among transformers' attention implementations.
ATTENTION = "trimtab_packed"
# Query tokens of one row that are read together; later tiles see earlier ones as part of their prefix.
TILE = 256
# Attention scores (heads x queries x keys) that exist at once: 32 MiB in float32.
SCORES_AT_ONCE = 2**23
# Blocks are merged while their padded scores are at most so many times the true ones, or few altogether.
WASTE, FEW = 1.3, 2**14


@dataclass(frozen=True)
class Bundle:
    """Spans of tokens that see the same `prefix` (token places) and, causally, themselves."""

    prefix: tuple[int, ...]
    spans: tuple[range, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.spans), max(map(len, self.spans)), len(self.prefix)

    @property
    def scores(self) -> int:
        return sum(len(s) * (len(s) + len(self.prefix)) for s in self.spans)


@dataclass(frozen=True)
class Block:
    """`b` bundles of up to `G` spans of up to `T` tokens after up to `P` tokens, padded.

    tokens `[b, G, T]`: where they are in the packed row, padding reads token 0; write: the same, but padding goes
    behind the end. prefix `[b, P]`: where those are in `Packed.laid`, hidden bool `[b, P]` its padding; None where
    there is none.
    """

    tokens: Tensor
    write: Tensor
    prefix: Tensor | None
    hidden: Tensor | None
    later: Tensor


@dataclass(frozen=True)
class Packed:
    """ids, places (position ids) `[S]`; state `[rows, T]`: the token before each response token, padded with 0.

    laid: the tokens of all blocks, one after the other. made `[S]`: where each token is among them.

    For compiled kernels, rows `[R, 4]`: the tokens from [2] to [3] see those from [0] to [1] and, causally, themselves.
    first `[prompts + 1]`: where in `rows` each prompt is, which sees nothing else; those that see it follow.
    """

    ids: Tensor
    places: Tensor
    state: Tensor
    blocks: tuple[Block, ...]
    laid: Tensor
    made: Tensor
    rows: Tensor
    first: Tensor


def pack(view: View, heads: int) -> Packed:
    """The rows of a view in one; what follows a row's last decision is left out."""
    said, lengths = view.said, view.lengths
    prompts, owner = view.prompt.masked_fill(~view.attend, -1).unique(dim=0, return_inverse=True)
    sizes = (prompts >= 0).sum(1).tolist()
    place = torch.arange(said.shape[1], device=said.device)
    read = place < lengths[:, None]
    ids = torch.cat([prompts[prompts >= 0], said[read]])
    starts = _spans([*sizes, *lengths.tolist()])
    whole, rows = starts[: len(sizes)], starts[len(sizes) :]
    owners = owner.tolist()
    places = [torch.arange(len(s)) for s in whole] + [sizes[o] + torch.arange(len(r)) for o, r in zip(owners, rows)]
    first = torch.tensor([whole[o].stop - 1 for o in owners], device=said.device)
    begin = torch.tensor([r.start for r in rows], device=said.device)
    state = torch.where(place == 0, first[:, None], (begin[:, None] + place - 1)).masked_fill(
        place > lengths[:, None], 0
    )
    groups: dict[int, list[range]] = {}
    for o, r in zip(owners, rows):
        groups.setdefault(o, []).append(r)
    limit = max(1, SCORES_AT_ONCE // heads)
    bundles = [b for o, held in groups.items() for b in _bundles(whole[o], held, limit)]
    bundles.sort(key=lambda b: b.shape)
    blocks = tuple(_block(part, len(ids), said.device) for part in _alike(bundles, limit))
    made, laid = _made(blocks, len(ids)), torch.cat([b.tokens.flatten() for b in blocks])
    blocks = tuple(replace(b, prefix=None if b.prefix is None else made[b.prefix]) for b in blocks)
    lines, first = _families([(whole[o], held) for o, held in groups.items()])
    return Packed(ids, torch.cat(places).to(said.device), state, blocks, laid, made, lines, first)


def _families(groups: list[tuple[range, list[range]]]) -> tuple[Tensor, Tensor]:
    """`Packed.rows` and `Packed.first` of prompts and their rows."""
    lines, first = [], [0]
    for prompt, rows in groups:
        lines.append((prompt.start, prompt.start, prompt.start, prompt.stop))
        lines += [(prompt.start, prompt.stop, r.start, r.stop) for r in rows]
        first.append(len(lines))
    return torch.tensor(lines), torch.tensor(first)


def _made(blocks: tuple[Block, ...], count: int) -> Tensor:
    write = torch.cat([block.write.flatten() for block in blocks])
    made = torch.empty(count + 1, dtype=torch.long, device=write.device)
    made[write] = torch.arange(len(write), device=write.device)
    return made[:-1]


def states(model: Any, packed: Packed) -> Tensor:
    """The last hidden state of each token of a packed row, `[S, H]`, by the model's own forward."""
    ids, places = packed.ids[None], packed.places[None]
    with attending(model, ATTENTION):
        return model.base_model(input_ids=ids, position_ids=places, use_cache=False, packed=packed).last_hidden_state[0]


@contextlib.contextmanager
def attending(model: Any, kind: str) -> Iterator[None]:
    """With this attention implementation for the time being."""
    before = model.config._attn_implementation
    if kind == before:
        yield
        return
    model.set_attn_implementation(kind)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def fits(model: Any, token: int) -> bool:
    """Whether this model reads a packed row as it reads the rows alone. Asked of the model itself, on five tokens.

    Its parameters have to be float32 or float64: in bfloat16 rounding is as large as some of the differences.
    """
    cache = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers) or not has_places(model):
        return False
    device, other = next(model.parameters()).device, int(token == 0)
    prompt = torch.tensor([[token, other]] * 2, device=device)
    said = torch.tensor([[other, other, token], [token, token, other]], device=device)
    yes = torch.ones_like(said, dtype=torch.bool)
    two = torch.arange(2, device=device)
    packed = pack(View(prompt, yes[:, :2], said, yes, None, two, two, (2, 3)), 1)
    rows = torch.cat([prompt, said[:, :-1]], 1)
    want = model.base_model(input_ids=rows, use_cache=False).last_hidden_state[:, -3:]
    try:
        got = states(model, packed)[packed.state]
    except (RuntimeError, TypeError, ValueError):  # it knows no such argument, or does more than this attention
        return False
    return bool((got - want).norm() <= 1e-4 * want.norm())


def has_places(model: Any) -> bool:
    """Whether it can be told the place of each token."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _spans(sizes: Sequence[int]) -> list[range]:
    """Ranges of these sizes, one after the other."""
    out, at = [], 0
    for size in sizes:
        out.append(range(at, at + size))
        at += size
    return out


def _bundles(prompt: range, rows: list[range], limit: int) -> Iterator[Bundle]:
    """A prompt in tiles, then its responses: the first tiles of all together, later ones each alone."""
    for i in range(0, len(prompt), TILE):
        yield Bundle(tuple(prompt[:i]), (prompt[i : i + TILE],))
    before = tuple(prompt)
    first = [Bundle(before, (r[:TILE],)) for r in sorted(rows, key=len) if len(r)]
    for part in _alike(first, limit):
        yield Bundle(before, tuple(bundle.spans[0] for bundle in part))
    for r in rows:
        for i in range(TILE, len(r), TILE):
            yield Bundle((*before, *r[:i]), (r[i : i + TILE],))


def _alike(bundles: list[Bundle], limit: int) -> Iterator[list[Bundle]]:
    """Cut sorted bundles into blocks: little padding in each, and at most `limit` scores of a head."""
    part: list[Bundle] = []
    shape, true = (0, 0, 0), 0
    for bundle in bundles:
        spans, longest, before = (max(sizes) for sizes in zip(shape, bundle.shape))
        padded = (len(part) + 1) * spans * longest * (longest + before)
        if part and padded > min(limit, max(FEW, WASTE * (true + bundle.scores))):
            yield part
            part, true = [], 0
            spans, longest, before = bundle.shape
        part.append(bundle)
        shape, true = (spans, longest, before), true + bundle.scores
    if part:
        yield part


def _block(bundles: list[Bundle], end: int, device: torch.device) -> Block:
    spans, longest, before = (max(sizes) for sizes in zip(*(b.shape for b in bundles)))
    write = torch.full((len(bundles), spans, longest), end)
    prefix = torch.full((len(bundles), before), end)
    for i, bundle in enumerate(bundles):
        prefix[i, : len(bundle.prefix)] = torch.tensor(bundle.prefix, dtype=torch.long)
        for j, span in enumerate(bundle.spans):
            write[i, j, : len(span)] = torch.arange(span.start, span.stop)
    write, prefix = write.to(device), prefix.to(device)
    hidden = prefix == end
    later = torch.ones(longest, longest, dtype=torch.bool, device=device).triu(1)
    return Block(
        write.masked_fill(write == end, 0),
        write,
        prefix.masked_fill(hidden, 0) if before else None,
        hidden if before and bool(hidden.any()) else None,
        later,
    )


# -- attention ----------------------------------------------------------------------------------------------------
# What some models add to attention and this one lacks.
_EXTRAS = ("sliding_window", "softcap", "s_aux", "position_bias")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    packed: Packed,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row, as transformers calls it: query `[1, heads, S, d]`, key and value `[1, k, S, d]`.

    Scores are products in the value's dtype; their softmax is float32 at least. They are not kept for the backward but
    made again, block by block. Raises `ValueError` for a kind of attention that it is not.
    """
    for name in _EXTRAS:
        if more.get(name) is not None:
            raise ValueError(f"packed attention has no {name}; the model gave {name}={more[name]!r}")
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    return attend(q * (scaling if scaling is not None else q.shape[-1] ** -0.5), k, v, packed)[None], None


def attend(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """What the tokens of a packed row read, `[S, heads, d]` like the scaled queries; key and value `[S, k, d]`."""
    return _Read.apply(q, k, v, packed) if _kernels(q) else _by_blocks(q, k, v, packed)


def _kernels(q: Tensor) -> Kernels | None:
    wide = torch.promote_types(q.dtype, torch.float32)
    return Kernels.suited(wide, q.dtype, q.device) if q.shape[-1] % STEP == 0 else None


class _Read(torch.autograd.Function):
    """`_by_blocks` in one pass, keeping its inputs alone; a gradient of its gradient is that of the blocks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.packed = packed
        kernels = _kernels(q)
        assert kernels is not None
        return kernels.packed(q, k, v, packed.rows, packed.first)[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v), packed = ctx.saved_tensors, ctx.packed
        kernels = None if torch.is_grad_enabled() else _kernels(q)
        if kernels:
            return *kernels.packed(q, k, v, packed.rows, packed.first, upstream[0]), None
        of = [x for x in (q, k, v) if x.requires_grad]
        with torch.enable_grad():
            made = iter(torch.autograd.grad(_by_blocks(q, k, v, packed), of, upstream, create_graph=True))
        return *(next(made) if x.requires_grad else None for x in (q, k, v)), None


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """`attend`, block by block."""
    q, k, v = (_Laid.apply(x, packed.laid, packed.made) for x in (q, k, v))
    made: list[Any] = []
    start = 0
    for block in packed.blocks:
        stop = start + block.tokens.numel()
        given = (q[start:stop], k[start:stop], v[start:stop], k, v, block)
        made.append(
            checkpoint(_attend, *given, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else _attend(*given)
        )
        start = stop
    return torch.cat(made).index_select(0, packed.made)


class _Laid(torch.autograd.Function):
    """`x[places]`, where `made` says which of the places holds each row, once; gradients of the others are zero.

    Autograd would add every gradient to its row; reading them is six times as fast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, made: Tensor) -> Tensor:
        ctx.save_for_backward(made)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream[0].index_select(0, ctx.saved_tensors[0]), None, None


def _attend(q: Tensor, own_k: Tensor, own_v: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
    """What the block's tokens read, `[b G T, heads, d]`; heads that share keys are further queries of those.

    q, own_k and own_v are those of the block's tokens, k and v of all that are laid.
    """
    b, spans, t = block.tokens.shape
    heads, d = k.shape[1], q.shape[2]
    queries = q.view(b, spans, t, heads, -1, d).permute(0, 3, 1, 4, 2, 5)  # [b, k, G, g, T, d]
    own_k, own_v = (x.view(b, spans, t, heads, -1).permute(0, 3, 1, 2, 4) for x in (own_k, own_v))
    groups = queries.shape[3]
    queries = queries.reshape(b, heads, spans, groups * t, d)
    scores = queries @ own_k.transpose(-1, -2)
    scores = scores.view(b, heads, spans, groups, t, t).masked_fill(block.later, -torch.inf).view_as(scores)
    wide = torch.promote_types(scores.dtype, torch.float32)
    if block.prefix is None:
        out = scores.softmax(-1, dtype=wide).to(v.dtype) @ own_v
    else:
        p = block.prefix.shape[1]
        past_k, past_v = (x[block.prefix.flatten()].view(b, p, heads, -1).transpose(1, 2) for x in (k, v))
        past = queries.flatten(2, 3) @ past_k.transpose(-1, -2)
        if block.hidden is not None:
            past = past.masked_fill(block.hidden[:, None, None], -torch.inf)
        weights = torch.cat([past.view(b, heads, spans, groups * t, p), scores], -1).softmax(-1, dtype=wide).to(v.dtype)
        out = (weights[..., :p].flatten(2, 3) @ past_v).view(b, heads, spans, groups * t, -1)
        out = out + weights[..., p:] @ own_v
    return out.view(b, heads, spans, groups, t, -1).permute(0, 2, 4, 1, 3, 5).reshape(b * spans * t, heads * groups, -1)


AttentionInterface.register(ATTENTION, attention)
