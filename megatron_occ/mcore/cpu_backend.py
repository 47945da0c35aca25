"""The CPU back end: what Megatron-Core assumes of CUDA, answered where there is no CUDA device.

Megatron-Core names CUDA in places that have nothing to do with kernels: the device of a token
counter, the state of a random generator, the type of a gradient. :func:`apply_cpu_backend` answers
these calls on a machine without a CUDA device, once, at start-up; it is the only place of this
project that changes other people's code at run time, and it does nothing where CUDA exists.

``torch.cuda.current_device()``
    Megatron assumes an index to put buffers on (layers, KV cache, gradient buffers).
    We answer with the CPU device.
``torch.zeros``, ``ones``, ``empty``, ``full`` and ``tensor`` with ``device="cuda"``
    Megatron assumes that counters and flags live on the GPU (schedules, optimizer, norms).
    We make them on the CPU.
``torch.cuda.synchronize``, ``torch.cuda.empty_cache``
    Megatron assumes a queue to wait for. There is none: nothing to do.
Random-number tracker
    Megatron forks CUDA generator states around dropout and initialisation. We install its own
    inference tracker, whose forks are no-ops: dropout is 0 and weights come from the CPU generator.

Two further assumptions are met without touching anything: gradient clipping, whose helper asserts a
CUDA tensor type, is done by ``JointOptimizer``; weights are initialised with
``use_cpu_initialization``, which also makes them independent of the tensor-parallel size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import initialize_rng_tracker

logger = logging.getLogger(__name__)

_FACTORIES = ("zeros", "ones", "empty", "full", "tensor")
_applied = False


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapper


def apply_cpu_backend() -> bool:
    """Answer Megatron-Core's CUDA calls on the CPU.

    Returns:
        True where the back end is in force, False where a CUDA device makes it unnecessary.
    """
    global _applied
    if torch.cuda.is_available():
        return False
    if _applied:
        return True
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    _applied = True
    logger.info("no CUDA device: Megatron-Core runs on the CPU over gloo (CPU back end applied)")
    return True
