"""Which fused kernels a run uses: all that compute the same and are installed, or none.

Left out, since they have nothing to fuse here: ``bias_dropout_fusion`` (no bias, no dropout: one
addition), ``masked_softmax_fusion`` and ``persist_layer_norm`` (parts of Megatron's local layers
that neither ours nor TransformerEngine's have).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe import moe_utils
from torch import nn

from megatron_occ.config.schema import Config
from megatron_occ.mcore.capabilities import uses_transformer_engine
from megatron_occ.mcore.compiling import compiles

SWIGLU, ROTARY = "swiglu", "rotary"
WEIGHT_GRADIENTS, PERMUTATION, ROUTER = "weight gradients", "expert permutation", "router"
# what modules call the switch that adds a weight's gradient to the buffer in the product itself:
# TransformerEngine's, and Megatron's local ones
_SWITCHES = ("fuse_wgrad_accumulation", "gradient_accumulation_fusion")


def fusions(config: Config) -> dict[str, bool]:
    """Each fusion by name, and whether the run uses it on this machine."""
    names = (SWIGLU, ROTARY, WEIGHT_GRADIENTS, PERMUTATION, ROUTER)
    if config.fusions == "off":
        return dict.fromkeys(names, False)
    is_dense, latent = config.model.moe.num_experts is None, config.model.mla.enabled
    if not torch.cuda.is_available():
        # cpu/fused.py; Megatron's experts and its latent attention have no place for these
        found = {SWIGLU: is_dense, ROTARY: not latent}
    else:
        engine = uses_transformer_engine()
        found = {
            SWIGLU: compiles(),
            # Megatron's fusion for latent attention is experimental, and for YaRN alone
            ROTARY: engine and not latent and rope_utils.fused_apply_rotary_pos_emb is not None,
            WEIGHT_GRADIENTS: engine or find_spec("fused_weight_gradient_mlp_cuda") is not None,
            PERMUTATION: engine and not is_dense and _has("fused_permute_with_probs"),
            # the fused router chooses by itself
            ROUTER: engine
            and not is_dense
            and config.rl.routing_replay == "none"
            and _has("fused_topk_with_score_function"),
        }
    return {name: found.get(name, False) for name in names}


def megatron_fusions(config: Config) -> dict[str, bool]:
    """Megatron's settings for :func:`fusions`; weight gradients are fused by module, see below."""
    found, on_cpu = fusions(config), not torch.cuda.is_available()
    return {
        # Megatron would refuse it without apex on account of the output layer, whose product is
        # ours
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        # SwiGLU without a bias has a form of its own there
        "bias_activation_fusion": found[SWIGLU] and not on_cpu,
        "use_te_activation_func": found[SWIGLU] and on_cpu,
        "apply_rope_fusion": found[ROTARY],
        "moe_permute_fusion": found[PERMUTATION],
        "moe_router_fusion": found[ROUTER],
    }


def fuse_weight_gradients(chunks: Sequence[nn.Module], config: Config) -> None:
    """Let linear layers add their weights' gradients to the gradient buffers themselves.

    Saves a tensor of the weight's size and an addition. It changes no sum: such a layer marks its
    weight, and Megatron's hook then adds nothing. All that reads gradients here reads the buffers
    (``GradientSpace``, ``JointOptimizer``). The output layer's and the embedding's come as tensors.
    A second module on the same weights (``SharedCopy``) takes no gradient of them.

    Args:
        chunks: of the model on this rank, wrapped for data parallelism: weights have buffers.
        config: the run's configuration.
    """
    if not fusions(config)[WEIGHT_GRADIENTS]:
        return
    for module in (module for chunk in chunks for module in chunk.modules()):
        for name in _SWITCHES:
            if hasattr(module, name):
                setattr(module, name, True)


def fusions_text(config: Config) -> str:
    """The fusions in use, in words."""
    return ", ".join(name for name, on in fusions(config).items() if on) or "none"


def _has(kernel: str) -> bool:
    return getattr(moe_utils, kernel, None) is not None
