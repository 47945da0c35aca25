"""Files beside the weights: tokenizer, generation settings, code of the model."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_occ.data.tokenizers import CharTokenizer

SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.tiktoken")
# what a conversion writes itself
_OWN = ("config.json",)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what lies beside the weights, as it is: nothing of it is run.

    Args:
        source: folder to copy from.
        target: made if it is not there; its ``config.json`` stays.
    """
    target.mkdir(exist_ok=True)
    for pattern in SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            if file.name not in _OWN and not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)


def write_characters(alphabet: str, folder: Path) -> None:
    """A tokenizer of characters as Hugging Face files: vLLM gives no log-probs without one.

    Args:
        alphabet: of the tokenizer.
        folder: takes the files.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerFast

    tokenizer, pad, eos = CharTokenizer(alphabet), "<pad>", "<eos>"
    first = tokenizer.vocab_size - len(tokenizer.alphabet)
    ids = {char: first + place for place, char in enumerate(tokenizer.alphabet)}
    vocabulary = {pad: tokenizer.pad_id, eos: tokenizer.eos_id, **ids}
    fast = Fast(models.WordLevel(vocabulary, unk_token=pad))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    written = PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token=eos, pad_token=pad, unk_token=pad
    )
    written.save_pretrained(folder)
