"""This project's weights as a Hugging Face transformers model, for comparing speed on equal terms.

The architecture is Llama's: RMSNorm before attention and MLP, rotary embedding over halves,
grouped-query attention, SwiGLU. transformers runs MTP layers (``generate(use_mtp=True)``) on any
causal LM whose configuration has ``num_mtp_layers`` and whose class names the checkpoint keys of
these layers, and builds them of the model's own decoder layer. So :func:`peer_class` is Llama plus
that one attribute; the models of transformers that come with MTP layers have them as mixture of
experts or with another attention, which would do other work than ours.
``tests/mcore/test_peer_weights.py`` holds the logits of every head against ours.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain_model import head_sizes
from megatron_occ.config.schema import Config, ModelConfig
from megatron_occ.convert.families.common import MTP
from megatron_occ.convert.families.dense import LLAMA
from megatron_occ.convert.slots import model_slots
from megatron_occ.convert.table import expand
from megatron_occ.mcore.model import OCCGPTModel

# names in a live model, and in a checkpoint
_KEPT_AS = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
    # from Megatron-Core 0.17
    (".mtp_model_layer.", ".transformer_layer."),
)
# Llama with MTP layers where DeepSeek-V3 has them, behind the trunk's
_TABLE = replace(LLAMA, depths_key="num_mtp_layers", mtp=MTP, mtp_prefix=LLAMA.layer_prefix)


def export_peer(
    model: OCCGPTModel,
    config: Config,
    folder: Path,
    *,
    stop_ids: Sequence[int] = (),
    pad_id: int | None = None,
) -> Any:
    """Write the weights as a checkpoint of transformers and load it: fp32, in evaluation mode.

    Args:
        model: the only chunk of a dense model on one process.
        config: the configuration it was built with.
        folder: takes ``config.json`` and ``model.safetensors``; transformers reads the MTP layers
            from there when it generates, so it must stay.
        stop_ids: ids that end a response.
        pad_id: id of the padding.

    Returns:
        A ``LlamaForCausalLM``. The MTP layers are in the folder, not in it.

    Raises:
        ValueError: an architecture that Llama does not have.
    """
    from safetensors.torch import save_file

    _check(config.model)
    peer = peer_config(config, model.vocab_size, stop_ids=stop_ids, pad_id=pad_id)
    folder.mkdir(parents=True, exist_ok=True)
    weights = from_megatron(dict(model.named_parameters()), config, model.vocab_size)
    # tensors of a file must not share memory
    copies = {name: tensor.detach().float().cpu().clone() for name, tensor in weights.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})
    peer.save_pretrained(folder)
    return load_peer(folder)


def load_peer(folder: Path) -> Any:
    """Another copy of an exported model, fp32, in evaluation mode."""
    with _without_progress_bar():
        return peer_class().from_pretrained(folder, dtype=torch.float32).eval()


def peer_config(
    config: Config, vocab_size: int, *, stop_ids: Sequence[int] = (), pad_id: int | None = None
) -> Any:
    """The same architecture as a ``LlamaConfig``.

    Args:
        config: the run's configuration.
        vocab_size: rows of embedding and output layer.
        stop_ids: ids that end a response.
        pad_id: id of the padding.
    """
    from transformers import LlamaConfig

    model = config.model
    heads, groups, channels = head_sizes(model)
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=channels,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(model.rotary_base)},
        attention_bias=model.qkv_bias,
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=None,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        dtype="float32",
        # not Llama's own: what transformers' MTP code looks for
        num_mtp_layers=config.mtp.num_layers,
    )


@functools.cache
def peer_class() -> type:
    """Llama that says which keys of its checkpoint belong to MTP layers: those past its own."""
    from transformers import LlamaForCausalLM

    class LlamaWithMTP(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            first = config.num_hidden_layers
            layers = range(first, first + config.num_mtp_layers)
            self._keys_to_ignore_on_load_unexpected = {rf"model\.layers\.{n}\." for n in layers}

    return LlamaWithMTP


def load_mtp(peer: Any) -> Any:
    """The MTP layers of an exported model, on its embedding and output layer (``MtpModel``)."""
    from transformers.modeling_layers import MtpModel

    with _without_progress_bar():
        return MtpModel.from_pretrained(peer, device_map={"": torch.device("cpu")}).eval()


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def from_megatron(tensors: dict[str, Tensor], config: Config, rows: int) -> dict[str, Tensor]:
    """Megatron-Core's weights under the names and in the layout of a transformers checkpoint.

    Args:
        tensors: parameters of a model on one process, by name.
        config: the configuration it was built with.
        rows: of embedding and output layer.
    """
    model, converted, ours = config.model, {}, dict(tensors)
    for live, kept in _KEPT_AS:
        ours = {name.replace(live, kept): tensor for name, tensor in ours.items()}
    for move in expand(_TABLE, model, model_slots(model, config.mtp.num_layers, rows)):
        parts = move.transform.split(ours[move.slot.name], model)
        converted |= zip(move.theirs, parts, strict=True)
    if model.qkv_bias:
        # Llama's flag adds a bias to the output projection too
        queries = [name for name in converted if name.endswith("q_proj.bias")]
        zeros = torch.zeros(model.hidden_size)
        converted |= {name.replace("q_proj", "o_proj"): zeros for name in queries}
    return converted


def _check(model: ModelConfig) -> None:
    refused = {
        "model.moe.num_experts": model.moe.num_experts is not None,
        "model.mla.enabled": model.mla.enabled,
        "model.qk_layernorm": model.qk_layernorm,
        "model.rotary_percent": model.rotary_percent != 1,
    }
    wrong = [key for key, is_set in refused.items() if is_set]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: Llama has nothing of the kind: leave the default")
