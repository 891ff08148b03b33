"""The kernels of a small fully connected network, called with tensors."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from trimtab.native import library

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[Activation, int] = {torch.tanh: 0, torch.relu: 1}
LARGE = 2**23  # products: of more, torch is faster where it has several threads, for the kernels have one


class DenseKernels:
    """Layers of `[R, I]`, float32 on a CPU, as `policies.dense` defines them; `held` is weight and bias of each."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self._forward, self._backward = compiled.forward, compiled.backward
        for one in (self._forward, self._backward):
            one.argtypes, one.restype = [c_void_p], None
        self._norm = compiled.norm
        self._norm.argtypes, self._norm.restype = [c_void_p, c_int64, c_void_p], None
        self._gaussian, self._gaussian_back = compiled.gaussian, compiled.gaussian_back
        for one in (self._gaussian, self._gaussian_back):
            one.argtypes, one.restype = [*[c_void_p] * 5, c_int64, c_int64], None
        self._squash, self._squash_back = compiled.squash, compiled.squash_back
        self._squash.argtypes = [*[c_void_p] * 6, *[c_int64] * 3, *[c_float] * 3]
        self._squash_back.argtypes = [*[c_void_p] * 6, c_int64, c_int64]
        self._squash.restype = self._squash_back.restype = None
        compiled.pairs.restype = c_int64
        self._pairs = bool(compiled.pairs())

    @staticmethod
    def suited(x: Tensor, held: Sequence[Tensor], activation: Activation, half: bool) -> DenseKernels | None:
        """The kernels, where they are compiled and these layers are what they are for."""
        if x.dtype != torch.float32 or held[0].dtype != torch.float32 or not x.is_cpu or activation not in ACTIVATIONS:
            return None
        if x.shape[-1] != held[0].shape[-1]:  # torch says what does not fit
            return None
        found, rows = _compiled(), x.shape[0]
        if found is None or not rows or torch._C._len_torch_dispatch_stack():  # a mode is to see torch's products
            return None
        if torch.get_num_threads() > 1 and rows * sum(p.numel() for p in held) > LARGE:
            return None
        if half and (not found._pairs or rows % 2 or any(p.shape[-2] % 2 for p in held[:-2:2])):  # they come in pairs
            return None
        return found

    @staticmethod
    def norm(tensors: Sequence[Tensor]) -> Tensor | None:
        """The l2 norm of all numbers of some float32 tensors on a CPU, 0-d; None where there is no kernel for them."""
        found, total = DenseKernels.at(tensors[0]), 0
        numbers = array("q")
        for t in tensors:
            if t.dtype != torch.float32 or not t.is_cpu or not t.is_contiguous():
                return None
            size = t.numel()
            numbers.extend((t.data_ptr(), size))
            total += size
        if found is None or total > LARGE:
            return None
        made = tensors[0].new_empty(())
        found._norm(numbers.buffer_info()[0], len(tensors), made.data_ptr())
        return made

    @staticmethod
    def at(x: Tensor) -> DenseKernels | None:
        """The kernels, where they are compiled and `x` is float32 on a CPU."""
        return _compiled() if x.dtype == torch.float32 and x.is_cpu else None

    def gaussian(self, mean: Tensor, action: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """`z = (action - mean) / std`, `[R, A]`, and `sum_j (-z_j^2 / 2 - log std_j)` `[R]` of a diagonal one."""
        tensors = [t.contiguous() for t in (mean, action.to(mean.dtype), log_std)]
        rows, n = mean.shape
        z, logp = mean.new_empty(rows, n), mean.new_empty(rows)
        self._gaussian(*[t.data_ptr() for t in (*tensors, z, logp)], rows, n)
        return z, logp

    def gaussian_back(self, grad: Tensor, z: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients towards mean `[R, A]` and log deviation `[A]` from that of the log-density, `[R]`."""
        tensors = [t.contiguous() for t in (grad, z, log_std)]
        into_mean, into_log_std = torch.empty_like(z), torch.empty_like(log_std)
        self._gaussian_back(*[t.data_ptr() for t in (*tensors, into_mean, into_log_std)], *z.shape)
        return into_mean, into_log_std

    def squashed(
        self, made: Tensor, noise: Tensor, clamped: bool, reach: tuple[float, float], level: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """`tanh(u)` `[R, A]` and the log-density `[R]` of a squashed Gaussian (`policies.squashed`), from what its
        network gave, `[R, 2 A]`; and what the way back needs."""
        made, noise = made.contiguous(), noise.contiguous()
        y, step, slope = (torch.empty_like(noise) for _ in range(3))
        rows, n = noise.shape
        logp = noise.new_empty(rows)
        self._squash(*[t.data_ptr() for t in (made, noise, y, step, slope, logp)], rows, n, clamped, *reach, level)
        return y, logp, (y, step, slope)

    def squashed_back(self, into_y: Tensor | None, into_logp: Tensor | None, kept: Sequence[Tensor]) -> Tensor:
        """The gradient towards what the network gave, `[R, 2 A]`; None is a gradient of zero."""
        y = kept[0]
        given = [None if g is None else g.contiguous() for g in (into_y, into_logp)]
        made = y.new_empty(len(y), 2 * y.shape[1])
        places = [None if t is None else t.data_ptr() for t in (*given, *kept, made)]
        self._squash_back(*places, *y.shape)
        return made

    def forward(
        self, x: Tensor, held: Sequence[Tensor], activation: Activation, half: bool, keep: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """The result `[R, O]`, or `[E, R, O]` of stacked layers, and what the way back needs, if that is to be kept."""
        rows, last = x.shape[0], held[-1].shape
        x, held = x.contiguous(), [p.contiguous() for p in held]
        out = x.new_empty(*last[:-1], rows, last[-1])
        kept = [x.new_empty(rows * sum([p.numel() for p in held[1:-1:2]]))] if keep else []
        saved = kept[0].data_ptr() if kept and len(held) > 2 else 0
        self._call(self._forward, x, held, activation, half, out=out.data_ptr(), saved=saved)
        return out, kept

    def backward(
        self, grad: Tensor, x: Tensor, held: Sequence[Tensor], kept: Sequence[Tensor],
        activation: Activation, half: bool, into_x: bool, into_held: bool,
    ) -> tuple[Tensor | None, list[Tensor] | None]:  # fmt: skip
        """The gradients towards `x` and towards each of `held`, where they are asked for."""
        x, held, grad = x.contiguous(), [p.contiguous() for p in held], grad.contiguous()
        dx = torch.empty_like(x) if into_x else None
        made = [torch.empty_like(p) for p in held] if into_held else None
        self._call(
            self._backward, x, held, activation, half, saved=kept[0].data_ptr(), grad=grad.data_ptr(),
            into_x=0 if dx is None else dx.data_ptr(), into=[] if made is None else [p.data_ptr() for p in made],
        )  # fmt: skip
        return dx, made

    def _call(
        self, work: ctypes._NamedFuncPointer, x: Tensor, held: Sequence[Tensor], activation: Activation, half: bool,
        out: int = 0, saved: int = 0, grad: int = 0, into_x: int = 0, into: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Numbers and addresses in the order of `Layers` in dense.cpp; 0 is what is not there."""
        members = held[0].shape[0] if held[0].dim() == 3 else 1
        about = (x.shape[0], members, len(held) // 2, ACTIVATIONS[activation], half, len(into))
        widths, places = [x.shape[1], *[p.shape[-1] for p in held[1::2]]], [p.data_ptr() for p in held]
        numbers = array("q", (*about, x.data_ptr(), out, saved, grad, into_x, *widths, *places, *into))
        work(numbers.buffer_info()[0])


@functools.cache
def _compiled() -> DenseKernels | None:
    compiled = library("dense")
    return None if compiled is None else DenseKernels(compiled)
