"""The device, chosen in one place, and what is measured on it: times, ceilings, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from megatron_occ.config.schema import Config
from megatron_occ.mcore.layout import Layout
from megatron_occ.mcore.startup import initialize

# side of the square matrices of the ceiling, and bytes of a copy: on a GPU, and rehearsed
_SIDE, _TOY_SIDE = 8192, 256
_COPY, _TOY_COPY = 2**30, 2**22


def on_gpu() -> bool:
    """Whether this process computes on a CUDA device, which is what the product asks too."""
    return torch.cuda.is_available()


def start(config: Config) -> Layout:
    """Megatron in this process, as every command starts it; fp32 products in fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return initialize(config)


def drawn_here() -> tuple[str, ...]:
    """Overrides that draw initial weights on the device: a billion take the host seconds."""
    return ("model.init_device=cuda",) if on_gpu() else ()


def seconds(call: Callable[[], object], *, rounds: int, warm_up: int = 2) -> float:
    """Median time of a call, with what it queued on the device."""
    found = []
    for number in range(warm_up + rounds):
        _wait()
        begin = time.perf_counter()
        call()
        _wait()
        if number >= warm_up:
            found.append(time.perf_counter() - begin)
    return statistics.median(found)


def matrix_ceiling(device: torch.device) -> float:
    """Operations a second of a large matrix product in bf16."""
    side = _SIDE if on_gpu() else _TOY_SIDE
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return 2 * side**3 / seconds(lambda: left @ right, rounds=20, warm_up=5)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    source = torch.zeros(_COPY if on_gpu() else _TOY_COPY, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), rounds=20, warm_up=5)


def forget_peak() -> None:
    """Start counting the peak anew."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Most bytes of tensors at once since :func:`forget_peak`; 0 on the CPU."""
    return torch.cuda.max_memory_allocated() if on_gpu() else 0


def present_bytes() -> int:
    """Bytes of tensors now; 0 on the CPU."""
    return torch.cuda.memory_allocated() if on_gpu() else 0


def _wait() -> None:
    if on_gpu():
        torch.cuda.synchronize()
