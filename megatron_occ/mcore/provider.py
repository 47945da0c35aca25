"""From our configuration to Megatron-Core's: transformer configuration, model, gradient buffers."""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
    get_gpt_mtp_block_spec_for_backend,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.nn import functional

from megatron_occ.config.schema import Config, ModelConfig
from megatron_occ.mcore.cpu_modules import CPUSpecProvider, cpu_layer_spec
from megatron_occ.mcore.model import OCCGPTModel

logger = logging.getLogger(__name__)


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron's configuration of the model section, the layout and the precision."""
    model, dtype = config.model, torch.float32 if config.precision == "fp32" else torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return TransformerConfig(
            num_layers=model.num_layers,
            mtp_num_layers=config.mtp.num_layers or None,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            kv_channels=model.kv_channels,
            layernorm_epsilon=model.norm_epsilon,
            qk_layernorm=model.qk_layernorm,
            add_qkv_bias=model.qkv_bias,
            add_bias_linear=False,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=functional.silu,
            init_method_std=model.init_std,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=config.parallel.tensor,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            # our losses are normalised by global counts: no division anywhere else
            calculate_per_token_loss=True,
            use_cpu_initialization=True,
            **_no_fusions(),
        )


def _no_fusions() -> dict[str, bool]:
    """Kernels that need apex or TransformerEngine, or that add noise between layouts."""
    return {
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
    }


def build_model(config: Config, vocab_size: int, device: torch.device) -> OCCGPTModel:
    """Build the bare model on ``device``.

    Args:
        config: the run's configuration.
        vocab_size: ids of the tokenizer; padded here to a multiple of the tensor-parallel size.
        device: of the parameters.

    Raises:
        ValueError: a precision that the device can't do, or a rank left without token ids.
    """
    if config.precision == "bf16" and device.type != "cuda":
        raise ValueError(
            "precision=bf16: Megatron-Core's bf16 optimizer needs a CUDA device, there is none "
            "here: use precision=fp32"
        )
    megatron = transformer_config(config)
    spec, mtp_spec = _specs(config.model, megatron)
    tensor = config.parallel.tensor
    padded = -(-vocab_size // tensor) * tensor
    if (tensor - 1) * (padded // tensor) >= vocab_size:
        raise ValueError(
            f"parallel.tensor={tensor} leaves a rank without any of the {vocab_size} token ids: "
            "use a smaller tensor-parallel size"
        )
    model = OCCGPTModel(
        config=megatron,
        transformer_layer_spec=spec,
        mtp_block_spec=mtp_spec,
        vocab_size=padded,
        valid_vocab_size=vocab_size,
        max_sequence_length=config.model.max_position_embeddings,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
    )
    return model.to(device)


def _specs(model: ModelConfig, megatron: TransformerConfig) -> tuple[ModuleSpec, object | None]:
    has_mtp = megatron.mtp_num_layers is not None
    if torch.cuda.is_available() and find_spec("transformer_engine") is not None:
        logger.info("layer spec: TransformerEngine")
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_layernorm)
        return spec, get_gpt_mtp_block_spec(megatron, spec, True) if has_mtp else None
    logger.info("layer spec: Megatron-Core's local layers with torch's norm and attention")
    spec = cpu_layer_spec(megatron)
    backend = CPUSpecProvider()
    return spec, get_gpt_mtp_block_spec_for_backend(megatron, spec, backend) if has_mtp else None


def wrap_data_parallel(model: OCCGPTModel) -> DistributedDataParallel:
    """Megatron's gradient buffers and data-parallel reduction around the model."""
    megatron = model.config
    module = Float16Module(megatron, model) if megatron.bf16 else model
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(config=megatron, ddp_config=ddp, module=module)
