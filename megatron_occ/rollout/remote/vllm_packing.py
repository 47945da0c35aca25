"""Runs inside vLLM's workers: what its CPU build lays out once, and not when weights change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def pack_experts_again(*models: Any) -> None:
    """Before weights are loaded on a CPU: have vLLM pack the experts, as it did at the start.

    Its method packs them for its kernel only when it makes that kernel
    (``UnquantizedFusedMoEMethod._setup_kernel``, 0.32.0): later weights would be read as if they
    were packed. Without a kernel it makes one. On GPUs nothing is packed in this way, and recorded
    graphs hold on to the kernel.
    """
    for method in _methods(models):
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def pack_output_layer_again(model: Any) -> None:
    """After weights were loaded on a CPU: an output layer that is tied to the embedding.

    It has a packed copy of the embedding, which vLLM makes anew only for an output layer that is
    loaded itself (``UnquantizedEmbeddingMethod.process_weights_after_loading``, 0.32.0).
    """
    layer = getattr(model, "lm_head", None)
    if next(_methods([layer]), None) is not None:
        layer.quant_method.process_weights_after_loading(layer)


def _methods(models: Iterable[Any]) -> Iterator[Any]:
    """How the layers of models compute and load; none on a GPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for model in models:
        modules = model.modules() if model is not None else ()
        yield from filter(None, (getattr(module, "quant_method", None) for module in modules))
