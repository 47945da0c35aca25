"""A Hugging Face folder on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_occ.config.schema import Config
from megatron_occ.convert.dense import hugging_face_config, hugging_face_tensors
from megatron_occ.data.tokenizers import CharTokenizer, Tokenizer

# files that make up a tokenizer, as far as a folder has them
_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: Config, tokenizer: Tokenizer
) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Args:
        folder: exists.
        tensors: as for ``hugging_face_tensors``.
        config: of the run; ``rl.rollout.engine`` names the reader.
        tokenizer: of the run.
    """
    from safetensors.torch import save_file

    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    # only vLLM's MTP layer of MiMo gets the trunk's state before the final norm
    prenorm = config.rl.rollout.engine == "vllm"
    weights = hugging_face_tensors(tensors, config, vocab_size, prenorm=prenorm)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    content = hugging_face_config(config, vocab_size, tokenizer.eos_id)
    (folder / "config.json").write_text(json.dumps(content, indent=1))
    # safetensors writes for the owner alone; the server may be another user
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    if isinstance(tokenizer, CharTokenizer):
        _write_characters(tokenizer, folder)
    else:
        _copy_tokenizer(Path(config.tokenizer.path), folder)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_characters(tokenizer: CharTokenizer, folder: Path) -> None:
    """The same tokenizer as Hugging Face files: vLLM gives no log-probs without one."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerFast

    pad, eos = "<pad>", "<eos>"
    first = tokenizer.vocab_size - len(tokenizer.alphabet)
    ids = {char: first + place for place, char in enumerate(tokenizer.alphabet)}
    vocabulary = {pad: tokenizer.pad_id, eos: tokenizer.eos_id, **ids}
    fast = Fast(models.WordLevel(vocabulary, unk_token=pad))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    written = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=eos, pad_token=pad)
    written.save_pretrained(folder)
