"""The kernels of a language model, called with tensors."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.native import library

if TYPE_CHECKING:
    from trimtab.policies.cache import SharedCache

_POINTERS = (
    "qkv", "out", "cos", "sin", "query_norm", "key_norm", "prompt_keys", "prompt_values", "said_keys", "said_values",
    "owner", "lengths", "born",
)  # fmt: skip
_NUMBERS = ("n", "heads", "groups", "width", "prompt_places", "said_places", "room", "time")


# Places that are read at a time, as in language.cpp.
STEP = 32


class _Attend(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in _POINTERS),
        *((name, c_int64) for name in _NUMBERS),
        ("scale", c_float),
        ("eps", c_float),
    )


class _Packed(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "rows", "first", "grad", "out")),
        *((name, c_void_p) for name in ("into_k", "into_v")),
        *((name, c_int64) for name in ("families", "heads", "groups", "width")),
    )


class Kernels:
    """What is done between products, for numbers stored in `dtype` (float32 or bfloat16) on a CPU; sums are float32."""

    def __init__(self, compiled: ctypes.CDLL, dtype: torch.dtype) -> None:
        suffix = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        self.dtype = dtype
        self._add_norm = _typed(compiled, f"add_norm_{suffix}", [c_void_p] * 4, [c_int64] * 2, [c_float])
        self._gated = _typed(compiled, f"gated_{suffix}", [c_void_p] * 2, [c_int64] * 2)
        self._attend = _typed(compiled, f"attend_{suffix}", [c_void_p])
        self._split = _typed(compiled, f"split_{suffix}", [c_void_p] * 8, [c_int64] * 5, [c_float])
        self._draw = _typed(compiled, f"draw_{suffix}", [c_void_p] * 3, [c_float], [c_void_p] * 2, [c_int64] * 3)
        self._norm_back = _typed(compiled, f"norm_back_{suffix}", [c_void_p] * 4, [c_int64] * 2, [c_float])
        self._gate_up = _typed(compiled, f"gate_up_{suffix}", [c_void_p] * 3, [c_int64])
        self._gate_up_back = _typed(compiled, f"gate_up_back_{suffix}", [c_void_p] * 6, [c_int64])
        self._turn = _typed(compiled, f"turn_{suffix}", [c_void_p] * 4, [c_int64] * 3, [c_float] * 2)
        self._packed = _typed(compiled, f"packed_{suffix}", [c_void_p])
        self._read_out = _typed(compiled, f"read_out_{suffix}", [c_void_p] * 6, [c_int64] * 3)

    @staticmethod
    def suited(wide: torch.dtype, dtype: torch.dtype, device: torch.device) -> Kernels | None:
        """The kernels, where they are compiled and the states are float32 on a CPU."""
        return _compiled(dtype) if device.type == "cpu" and wide == torch.float32 else None

    # -- decoding -----------------------------------------------------------------------------------------------
    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """`x += delta` in place, and `x / sqrt(mean(x^2) + eps) * weight`; float32 `[..., H]`, without gaps."""
        assert x.is_contiguous()
        assert x.dtype == torch.float32
        out = torch.empty_like(x, dtype=self.dtype)
        size, weight = x.shape[-1], _plain(weight)
        held = None if delta is None else delta.to(self.dtype).contiguous()
        rows = x.numel() // size
        self._add_norm(x.data_ptr(), _at(held), _at(weight), out.data_ptr(), rows, size, eps)
        return out

    def gated(self, both: Tensor) -> Tensor:
        """`silu(gate) * up` of `[..., 2 I]`, gate first."""
        both, size = both.contiguous(), both.shape[-1] // 2
        out = both.new_empty(*both.shape[:-1], size)
        self._gated(both.data_ptr(), out.data_ptr(), out.numel() // size, size)
        return out

    def attend(
        self, cache: SharedCache, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None,
        key_norm: Tensor | None, scale: float, eps: float,
    ) -> Tensor:  # fmt: skip
        """A decoding step's attention: turns query and key, appends key and value to the cache, and reads it.

        qkv `[n, (H G + 2 H) w]`, cos and sin float32 `[n, 1, w]` (sin with its sign). Gives `[n, H G w]`.
        """
        n, heads, width = len(qkv), cache.said_keys.shape[2], cache.said_keys.shape[3]
        groups = qkv.shape[1] // (heads * width) - 2
        qkv, out = qkv.contiguous(), qkv.new_empty(n, heads * groups * width)
        norms = (n if n is None else _plain(n) for n in (query_norm, key_norm))
        tensors = (qkv, out, _plain(cos), _plain(sin), *norms)
        rows = (cache.owner, cache.lengths, cache.born)
        room = (cache.prompt_keys.shape[4], cache.said_keys.shape[4], cache.room, cache.time)
        numbers = (n, heads, groups, width, *room)
        places = cache.places[layer]
        self._attend(ctypes.byref(_Attend(*map(_at, tensors), *places, *map(_at, rows), *numbers, scale, eps)))
        return out

    def split(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, query_norm: Tensor | None, key_norm: Tensor | None, heads: int,
        width: int, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Turned queries and keys and values, `[m, ., t, width]`, of prompts `[m, t, (H G + 2 H) width]`; H is `heads`.

        cos and sin float32 `[1, t, 1, width]`, as in `attend`.
        """
        m, t, size = qkv.shape
        groups = size // (heads * width) - 2
        q = qkv.new_empty(m, heads * groups, t, width)
        k, v = qkv.new_empty(m, heads, t, width), qkv.new_empty(m, heads, t, width)
        norms = (n if n is None else _plain(n) for n in (query_norm, key_norm))
        tensors = (qkv.contiguous(), _plain(cos), _plain(sin), *norms, q, k, v)
        self._split(*map(_at, tensors), m, t, heads, groups, width, eps)
        return q, k, v

    def draw(self, logits: Tensor, slot: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """`draws.draw` of logits `[m, V]` without top-k and top-p, in two passes over them."""
        logits, slot, noise = logits.contiguous(), slot.contiguous(), noise.double().contiguous()
        token, logp = torch.empty_like(slot), logits.new_empty(len(slot), dtype=torch.float32)
        at = (logits.data_ptr(), slot.data_ptr(), noise.data_ptr())
        self._draw(*at, 1 / temperature, token.data_ptr(), logp.data_ptr(), len(logits), len(slot), logits.shape[1])
        return token, logp

    # -- the training pass --------------------------------------------------------------------------------------
    def norm_back(self, grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The gradient of `add_norm`'s second result towards x, float32 like x."""
        grad, weight = grad.to(self.dtype).contiguous(), _plain(weight)
        out, size = torch.empty_like(x), x.shape[-1]
        at = (grad.data_ptr(), x.data_ptr(), _at(weight), out.data_ptr())
        self._norm_back(*at, x.numel() // size, size, eps)
        return out

    def gate_up(self, gate: Tensor, up: Tensor) -> Tensor:
        """`silu(gate) * up`."""
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        self._gate_up(gate.data_ptr(), up.data_ptr(), out.data_ptr(), out.numel())
        return out

    def gate_up_back(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`gate_up` once more, and its gradients towards both."""
        tensors = [x.to(self.dtype).contiguous() for x in (grad, gate, up)]
        made = torch.empty_like(tensors[1]), torch.empty_like(tensors[1]), torch.empty_like(tensors[1])
        self._gate_up_back(*(x.data_ptr() for x in (*tensors, *made)), made[0].numel())
        return made

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor, scale: float, back: bool = False) -> Tensor:
        """Heads `[..., heads, w]` turned by their places, times `scale`; cos and sin float32 `[..., w]`.

        `back` turns the other way, which is the gradient: both halves of cos and sin have the same numbers.
        """
        tensors = [x.contiguous(), _plain(cos), _plain(sin)]
        out = torch.empty_like(tensors[0])
        heads, w = x.shape[-2:]
        at = (t.data_ptr() for t in (*tensors, out))
        self._turn(*at, out.numel() // (heads * w), heads, w, -1.0 if back else 1.0, scale)
        return out

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, first: Tensor, grad: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Attention of a packed row: what scaled queries `[S, H G, w]` read of keys and values `[S, H, w]`.

        With its `grad`, the gradients towards all three. rows, first: see `packing.Packed`. w is a multiple of STEP.
        """
        families, (_, heads, width), groups = len(first) - 1, k.shape, q.shape[1] // k.shape[1]
        alone = groups > 1 and families * heads < 2 * torch.get_num_threads()
        if alone:  # too few to share: every query head has keys of its own
            k, v, heads = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), heads * groups
        assert width % STEP == 0
        held = [x.to(self.dtype).contiguous() for x in (q, k, v)]
        out = torch.empty_like(held[0])
        into = [] if grad is None else [torch.empty_like(x) for x in held[1:]]
        grad = None if grad is None else grad.to(self.dtype).contiguous()
        given = map(_at, (*held, rows, first, grad, out, *into))
        asked = _Packed(*given, families=families, heads=heads, groups=q.shape[1] // heads, width=width)
        self._packed(ctypes.byref(asked))
        return (out, *(x.unflatten(1, (-1, groups)).sum(2) if alone else x for x in into))

    def read_out(
        self, logits: Tensor, token: Tensor, scale: Tensor | None, logp: Tensor, entropy: Tensor | None,
        entropy_slopes: Tensor | None, slopes: bool,
    ) -> None:  # fmt: skip
        """logp and entropy `[n]` of logits `[n, V]`, which become probabilities where there are `slopes`.

        entropy_slopes `[n, V]` is filled with `-p (log p + entropy)`. All tensors have no gaps. Raises IndexError for a
        token that the vocabulary has not: memory knows no such bound.
        """
        if len(token) and not 0 <= int(token.min()) <= int(token.max()) < logits.shape[1]:
            raise IndexError(f"tokens from {token.min()} to {token.max()}, but the logits are of {logits.shape[1]}")
        tensors = (logits, token.contiguous(), scale, logp, entropy, entropy_slopes)
        self._read_out(*map(_at, tensors), *logits.shape, int(slopes))


@functools.cache
def _compiled(dtype: torch.dtype) -> Kernels | None:
    compiled = library("language") if dtype in (torch.float32, torch.bfloat16) else None
    return None if compiled is None else Kernels(compiled, dtype)


def _typed(compiled: ctypes.CDLL, name: str, *kinds: list[type]) -> ctypes._NamedFuncPointer:
    """A function that gives nothing. Types are declared, or a pointer would be cut to an int."""
    found = compiled[name]
    found.argtypes, found.restype = [kind for some in kinds for kind in some], None
    return found


def _plain(x: Tensor) -> Tensor:
    """In float32 and without gaps, as the kernels read it."""
    return x.float().contiguous()


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
