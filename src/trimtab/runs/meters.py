"""What a phase is held against: counted products, peak memory, and what this machine reaches at best."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trimtab.machine import busy

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Share of a core that other work may use before a time is not to be trusted.
QUIET = 0.1


class Products(TorchDispatchMode):
    """Counts while it is entered: `flops` of matrix products and attention, `bytes` that they read and write.

    A product of [m, k] and [k, n] is 2 m k n flops; attention is its two products. Element-wise work is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = _flops(func._overloadpacket, args, kwargs or {}, out)
        if made:
            self.flops += made
            self.bytes += sum(t.nbytes for t in _tensors((args, out)))
        return out

    def meters(self) -> dict[str, Callable[[], float]]:
        """For `measuring`."""
        return {"flops": lambda: self.flops, "bytes": lambda: self.bytes}


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> float:
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    name = getattr(packet, "__name__", "")
    if name == "_linear_pointwise":  # a product with a weight in the order of the machine
        return 2.0 * args[0].numel() * out.shape[-1]
    if name == "_scaled_dot_product_flash_attention_for_cpu":  # torch counts the GPU's kernels only
        return _attention(args[0], args[1])
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return 2.5 * _attention(args[1], args[2])  # five products to the forward's two
    return 0.0


def _attention(query: Tensor, key: Tensor) -> float:
    n, heads, places, width = query.shape
    return 4.0 * n * heads * places * key.shape[-2] * width


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


# -- memory --------------------------------------------------------------------------------------------------------
def peak_since() -> int:
    """Peak memory in bytes since the last call: of the GPU where one is used, else resident memory of this process.

    Where the system cannot set its mark back (other than Linux), the peak since the process began.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    if not _CLEAR.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = _kilobytes(_STATUS, "VmHWM:")
    _CLEAR.write_text("5")
    return peak


def memory_used() -> int:
    """Bytes that this process holds now: of the GPU where one is used, else resident memory; 0 where not known."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    return _kilobytes(_STATUS, "VmRSS:") if _STATUS.exists() else 0


def memory_free() -> int | None:
    """Bytes that a process may still take here: of the GPU where one is used, else of the machine or its container.

    None where the system does not say.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.mem_get_info()[0]
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    free = _kilobytes(table, "MemAvailable:")
    most, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if most.exists() and used.exists() and most.read_text().strip().isdigit():
        free = min(free, int(most.read_text()) - int(used.read_text()))
    return max(0, free)


def _kilobytes(table: Path, name: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in table.read_text().splitlines() if line.startswith(name))


# -- speed ---------------------------------------------------------------------------------------------------------
def machine_rates(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """`gflops` of a 1024 x 1024 product in `dtype`, `gbps` of a copy that no cache holds: the best of seven each."""
    size = 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    source = torch.ones(2**25, dtype=torch.float32, device=device)  # 128 MiB
    target = torch.empty_like(source)
    product = _fastest(lambda: torch.mm(a, b))
    copy = _fastest(lambda: target.copy_(source))
    return {"gflops": 2 * size**3 / product / 1e9, "gbps": 2 * source.nbytes / copy / 1e9}


def _fastest(work: Callable[[], Any], times: int = 7) -> float:
    best = float("inf")
    for _ in range(times):
        _wait()
        started = time.perf_counter()
        work()
        _wait()
        best = min(best, time.perf_counter() - started)
    return best


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def beside() -> Iterator[dict[str, Any]]:
    """Look at what else runs before and after the work inside: `{"before", "after"}` in cores, and `busy`.

    Two threads beside another process are many times slower than alone: such a time says nothing.
    """
    seen: dict[str, Any] = {"before": round(busy(), 2)}
    yield seen
    time.sleep(0.1)  # threads of this process that still spin are not others
    seen["after"] = round(busy(), 2)
    seen["busy"] = max(seen["before"], seen["after"]) > QUIET


def machine_words(threads: int) -> dict[str, Any]:
    """The machine of a measurement: processor, cores, threads, GPU, torch."""
    import platform

    return {
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }
