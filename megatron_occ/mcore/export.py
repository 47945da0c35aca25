"""The policy's weights as a Hugging Face folder, from any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from megatron_occ.convert import hugging_face_config, hugging_face_tensors
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import model_state, read_tensors
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.rollout import EngineError

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


class HuggingFaceExport:
    """Writes the weights in two moves: all ranks to a scratch folder, the main one converts.

    The main rank holds all weights in the memory of its CPU meanwhile, twice.

    Args:
        actor: the policy.
        main: converts.
        scratch: folder that all ranks see; its content is deleted.
        vocab_size: ids that take part in the softmax.
        eos_id: end of text.
        prenorm: see ``convert.hugging_face_tensors``.
    """

    def __init__(
        self,
        actor: MegatronGPTActor,
        main: MainRank,
        scratch: Path,
        *,
        vocab_size: int,
        eos_id: int,
        prenorm: bool,
    ) -> None:
        self._actor, self._main, self._scratch = actor, main, scratch
        self._vocab_size, self._eos_id, self._prenorm = vocab_size, eos_id, prenorm

    def stage(self) -> None:
        """Write the present weights to the scratch folder; called by all ranks.

        Raises:
            EngineError: the folder can't be made.
        """
        self._main.run(self._clear)
        dist_checkpointing.save(model_state(self._actor), str(self._scratch))
        torch.distributed.barrier()

    def write(self, folder: Path) -> None:
        """What was staged last, as ``config.json``, ``model.safetensors`` and tokenizer files.

        Called on the main rank.
        """
        from safetensors.torch import save_file

        config = self._actor.config
        staged = read_tensors(self._scratch, self._main.alone)
        tensors = hugging_face_tensors(staged, config, self._vocab_size, prenorm=self._prenorm)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        content = hugging_face_config(config, self._vocab_size, self._eos_id)
        (folder / "config.json").write_text(json.dumps(content, indent=1))
        if config.tokenizer.path is not None:
            copy_tokenizer(Path(config.tokenizer.path), folder)
        shutil.rmtree(self._scratch)

    def _clear(self) -> None:
        try:
            if self._scratch.exists():
                shutil.rmtree(self._scratch)
            self._scratch.mkdir(parents=True)
        except OSError as error:
            raise EngineError(
                f"rl.rollout.server.weights_dir: {self._scratch} can't be written: {error}"
            ) from error


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a Hugging Face tokenizer's files."""
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
