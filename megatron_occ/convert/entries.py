"""Entries of ``config.json`` that were looked at, and those that change nothing.

What nobody looks at and what changes the model's function is the way wrong conversions are made. So
a family's settings are read through :class:`Entries`, and what is left over has to be known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# none of these changes a logit of the model
_BOOKKEEPING = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _name_or_path architectures attn_implementation auto_map
    chunk_size_feed_forward cross_attention_hidden_size custom_pipelines dtype
    experts_implementation finetuning_task id2label is_decoder is_llama_config
    keys_to_ignore_at_inference label2id license model_type name_or_path num_labels
    output_attentions output_hidden_states output_router_logits output_scores problem_type
    pruned_heads quantization_config return_dict return_dict_in_generate task_specific_params
    tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16
    use_cache
"""
_TOKENS = """
    begin_suppress_tokens bos_token bos_token_id cls_token_id decoder_start_token_id eos_token
    eos_token_id forced_bos_token_id forced_eos_token_id mask_token_id pad_token pad_token_id
    prefix sep_token_id suppress_tokens unk_token_id
"""
_GENERATION = """
    bad_words_ids diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values
    repetition_penalty temperature top_k top_p typical_p
"""
_TRAINING = """
    aux_loss_alpha ep_size gradient_checkpointing initializer_range max_sequence_length
    mtp_loss_scaling_factor pretraining_tp router_aux_loss_coef seq_aux
"""
HARMLESS = frozenset(f"{_BOOKKEEPING} {_TOKENS} {_GENERATION} {_TRAINING}".split())


class Entries(Mapping[str, Any]):
    """``config.json``, which remembers what it was asked for.

    Args:
        content: of the file.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self._seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._seen.add(key)
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def check(self, known: frozenset[str]) -> None:
        """Refuse entries that nobody looked at; null is as if there were none.

        Args:
            known: further entries without an effect.

        Raises:
            ValueError: names them with their values.
        """
        left = self._content.keys() - self._seen - HARMLESS - known
        unknown = [k for k in sorted(left) if self._content[k] is not None]
        if unknown:
            listed = ", ".join(f"{key}={self._content[key]!r:.60}" for key in unknown)
            raise ValueError(
                f"{listed}: not known for this architecture, and may change what the model "
                "computes. Take out of config.json what does not"
            )
