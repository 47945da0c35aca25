"""The CPU back end: what Megatron-Core assumes of CUDA, answered where there is no CUDA device.

Megatron-Core names CUDA in places that have nothing to do with kernels: the device of a token
counter, the state of a random generator, the type of a gradient. :func:`apply_cpu_backend` answers
these calls on a machine without a CUDA device, once, at start-up; it is the only place of this
project that changes other people's code at run time, and it does nothing where CUDA exists.

``import transformer_engine``, ``apex``, ``amp_C`` and the like
    Megatron assumes a device where such a package is installed, in about thirty places.
    ``hidden.py`` lets these imports fail, before Megatron is imported: what follows holds whatever
    is installed.
``torch.cuda.current_device()``
    Megatron assumes an index to put buffers on (layers, KV cache, gradient buffers).
    We answer with the CPU device.
``torch.zeros``, ``ones``, ``empty``, ``full`` and ``tensor`` with ``device="cuda"``
    Megatron assumes that counters and flags live on the GPU (schedules, optimizer, norms).
    We make them on the CPU.
``torch.cuda.synchronize``, ``torch.cuda.empty_cache``, ``torch.cuda.current_stream``
    Megatron assumes a queue to wait for. There is none: nothing to do, and None is the stream.
``torch.tensor`` with ``pin_memory=True``, ``Tensor.cuda``
    Megatron assumes a copy to the GPU (rotary positions of a context-parallel rank).
    We leave the tensor where it is.
Random-number tracker
    Megatron forks CUDA generator states around dropout and initialisation. We install its own
    inference tracker, whose forks are no-ops: dropout is 0 and weights come from the CPU generator.
Random-number state of activation recomputation
    Megatron saves and restores CPU, CUDA and tracker state around a layer that it computes again.
    We answer the CUDA part with an empty state; the CPU's is saved and restored as it is.
``moe_utils.te_general_gemm``
    Megatron assumes that TransformerEngine can be imported where it tests this name for None.
    We define it as None: the router's product is torch's.
``multi_latent_attention.TELinear``
    Megatron asks whether a layer is an instance of it; with TransformerEngine hidden it is none.
    We put a class without instances in its place.
``rope_utils.fused_apply_rotary_pos_emb`` and its form for packed sequences
    Megatron assumes TransformerEngine's kernels where ``apply_rope_fusion`` is on. We put those of
    ``fused.py`` there.
``Tensor.type()`` in the constructors of the distributed and the 16-bit optimizer
    Megatron assumes names such as ``torch.cuda.FloatTensor`` and refuses others.
    For the time of these constructors a CPU tensor answers with the CUDA name.

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
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from torch.utils._device import _device_constructors

from megatron_occ.mcore.cpu.fused import rotate, rotate_packed

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
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapper


def _with_cuda_type_names(constructor: Callable[..., None]) -> Callable[..., None]:
    own = torch.Tensor.type

    def named(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = own(tensor, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    @functools.wraps(constructor)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        torch.Tensor.type = named
        try:
            constructor(*args, **kwargs)
        finally:
            torch.Tensor.type = own

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
    # "with torch.device(...)" lists the factories at its first use: let it list these, which ours
    # call, and not ours
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.current_stream = lambda device=None: None
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    megatron_random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.empty(0)
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None
    moe_utils.te_general_gemm = None
    multi_latent_attention.TELinear = type("NoTELinear", (), {})
    rope_utils.fused_apply_rotary_pos_emb = rotate
    rope_utils.fused_apply_rotary_pos_emb_thd = rotate_packed
    for optimizer in (DistributedOptimizer, Float16OptimizerWithFloat16Params):
        optimizer.__init__ = _with_cuda_type_names(optimizer.__init__)
    _applied = True
    logger.info("no CUDA device: Megatron-Core runs on the CPU over gloo (CPU back end applied)")
    return True
