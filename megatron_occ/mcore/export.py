"""The policy's weights as a Hugging Face folder for a rollout server, from any layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from megatron_occ.config.schema import Config
from megatron_occ.config.served import architecture, served_depths
from megatron_occ.convert.distributed import DistributedReader
from megatron_occ.convert.exporting import ExportPlan, plan_export, write_weights
from megatron_occ.convert.reader import Reader
from megatron_occ.convert.tokenizer_files import copy_side_files, write_characters
from megatron_occ.data.tokenizers import CharTokenizer, Tokenizer
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import model_state
from megatron_occ.mcore.checkpoint_writer import finish_writing
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.rollout import EngineError


class HuggingFaceExport:
    """Writes the weights in two moves: all ranks to a scratch folder, the main one converts.

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
        finish_writing()
        self._main.run(self._clear)
        dist_checkpointing.save(model_state(self._actor), str(self._scratch))
        torch.distributed.barrier()

    def write(self, folder: Path) -> None:
        """What was staged last; called on the main rank.

        Args:
            folder: exists.
        """
        config, tokenizer = self._actor.config, self._tokenizer
        reader = DistributedReader(self._scratch)
        plan = plan_for_servers(reader, config, tokenizer)
        write_weights(plan, reader, folder, quiet=True)
        if isinstance(tokenizer, CharTokenizer):
            write_characters(tokenizer.alphabet, folder)
        else:
            copy_side_files(Path(config.tokenizer.path), folder)
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


def plan_for_servers(reader: Reader, config: Config, tokenizer: Tokenizer) -> ExportPlan:
    """What servers of a run are given.

    Args:
        reader: of the weights.
        config: of the run.
        tokenizer: of the run.
    """
    return plan_export(
        reader,
        config.model,
        served_depths(config),
        config.model.vocab_size or tokenizer.vocab_size,
        architecture=architecture(config),
        tokenizer=tokenizer.state(),
        for_sglang=config.rl.rollout.engine == "sglang",
    )
