"""The policy's weights as a Hugging Face folder, from any layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from megatron_occ.convert import write_folder
from megatron_occ.data.tokenizers import Tokenizer
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import model_state, read_tensors
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.rollout import EngineError


class HuggingFaceExport:
    """Writes the weights in two moves: all ranks to a scratch folder, the main one converts.

    The main rank holds all weights in the memory of its CPU meanwhile, twice.

    Args:
        actor: the policy.
        main: converts.
        scratch: folder that all ranks see; its content is deleted.
        tokenizer: of the run.
    """

    def __init__(
        self, actor: MegatronGPTActor, main: MainRank, scratch: Path, tokenizer: Tokenizer
    ) -> None:
        self._actor, self._main, self._scratch = actor, main, scratch
        self._tokenizer = tokenizer

    def stage(self) -> None:
        """Write the present weights to the scratch folder; called by all ranks.

        Raises:
            EngineError: the folder can't be made.
        """
        self._main.run(self._clear)
        dist_checkpointing.save(model_state(self._actor), str(self._scratch))
        torch.distributed.barrier()

    def write(self, folder: Path) -> None:
        """What was staged last, see ``convert.write_folder``; called on the main rank."""
        tensors = read_tensors(self._scratch, self._main.alone)
        write_folder(folder, tensors, self._actor.config, self._tokenizer)
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
