"""The rollout engine that a configuration names."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from megatron_occ.config.schema import Config
from megatron_occ.config.sizes import round_up
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.tokenizers import Tokenizer
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.capabilities import captures_cycles
from megatron_occ.mcore.export import HuggingFaceExport
from megatron_occ.mcore.inference.engine import MegatronEngine, speculation_from
from megatron_occ.mcore.inference.graphs import CUDACapture
from megatron_occ.mcore.inference.rounding import rounding_from
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.mcore.memory_export import MemoryExport
from megatron_occ.mcore.served_engine import ServedEngine
from megatron_occ.rollout import RolloutEngine
from megatron_occ.rollout.remote import Probe, RemoteEngine, RemoteSettings
from megatron_occ.rollout.remote.bucket_server import BucketServer
from megatron_occ.rollout.remote.carriers import MemoryCarrier
from megatron_occ.rollout.remote.fingerprint import fingerprint
from megatron_occ.rollout.remote.probe import SAMPLE_LENGTH

API_KEY = "ROLLOUT_API_KEY"
# of a probe: prompts, tokens of each, prompts that drafts are tried on, tokens of these responses
PROBE_PROMPTS, PROBE_TOKENS = 16, 32
DRAFT_PROMPTS, DRAFT_TOKENS = 4, 32
# servers are given no other depth
SERVED_HEAD = "mtp.layers.0."


def build_engine(
    config: Config, actor: MegatronGPTActor, tokenizer: Tokenizer, prompts: PromptStream
) -> RolloutEngine:
    """The engine of ``rl.rollout.engine``; called by all ranks.

    Args:
        config: of the run.
        actor: the policy that it samples from.
        tokenizer: of prompts and responses.
        prompts: some of them test whether servers have the right weights.

    Raises:
        EngineError: a server does not come up or can't do the work.
    """
    if config.rl.rollout.engine == "megatron":
        captures = captures_cycles(config, actor.layout.device)
        return MegatronEngine(
            actor.inference_chunks,
            actor.layout,
            slots=config.rl.rollout.batch_size,
            cache_tokens=config.rl.rollout.cache_tokens,
            speculation=speculation_from(config),
            decode=tokenizer.decode,
            capture=CUDACapture if captures and config.rl.rollout.cuda_graphs else None,
            rounding=rounding_from(config),
        )
    return _served(config, actor, tokenizer, prompts)


def _served(
    config: Config, actor: MegatronGPTActor, tokenizer: Tokenizer, prompts: PromptStream
) -> ServedEngine:
    settings = remote_settings(config, tokenizer.vocab_size)
    main = MainRank()
    probe = ProbeMaterial(actor, main, tokenizer, prompts)
    export: HuggingFaceExport | MemoryExport
    if settings.transfer == "folder":
        export = HuggingFaceExport(actor, main, settings.weights_dir / "staged", tokenizer)
    else:
        export = MemoryExport(actor, main, tokenizer)

    def prepare() -> None:
        export.stage()
        probe.score()

    def connect() -> RemoteEngine:
        if isinstance(export, MemoryExport):
            over_network = settings.transfer == "network"
            carried = MemoryCarrier(export.take, BucketServer() if over_network else None)
        else:
            carried = export.write
        return RemoteEngine(settings, carried, probe.probe(), tokenizer.decode)

    return ServedEngine(actor.layout, main, prepare, connect)


def remote_settings(config: Config, token_ids: int) -> RemoteSettings:
    """``rl.rollout.server`` with what the rest of the configuration and the environment say.

    Args:
        config: of the run.
        token_ids: of the tokenizer.
    """
    rollout, server = config.rl.rollout, config.rl.rollout.server
    folder = Path(server.weights_dir or Path(config.run_dir) / "rollout_weights")
    return RemoteSettings(
        rollout.engine,
        tuple(server.urls),
        folder.absolute(),
        config.model.vocab_size or token_ids,
        timeout=server.timeout,
        update_timeout=server.update_timeout,
        retries=server.retries,
        concurrency=server.concurrency,
        gap_mean=server.gap_mean,
        gap_max=server.gap_max,
        draft_share=server.draft_share,
        require_seeds=server.require_seeds,
        api_key=os.environ.get(API_KEY) or None,
        transfer=server.transfer,
    )


class ProbeMaterial:
    """Prompts of the run as sequences to score, and their log-probs under the present weights.

    Args:
        actor: the policy.
        main: talks to the servers.
        tokenizer: of prompts and responses.
        prompts: of the run.
    """

    def __init__(
        self, actor: MegatronGPTActor, main: MainRank, tokenizer: Tokenizer, prompts: PromptStream
    ) -> None:
        self._actor, self._main = actor, main
        config = actor.config
        self._draft_tokens = min(DRAFT_TOKENS, config.rl.rollout.max_response_length)
        # micro-batches of one size, as many as the schedule asks for
        rows = round_up(PROBE_PROMPTS, actor.micro_batch_multiple)
        room = config.model.max_position_embeddings - max(self._draft_tokens, SAMPLE_LENGTH)
        records = prompts.prompts_for_step(0, min(rows, prompts.size or rows))
        encoded = [tokenizer.encode(r.prompt)[: min(room, PROBE_TOKENS) - 1] for r in records]
        self._drafts = [tokens for tokens in encoded if tokens][:DRAFT_PROMPTS]
        # a sequence to score has two tokens at least
        self._sequences = [[tokenizer.eos_id, *encoded[row % len(encoded)]] for row in range(rows)]
        self._scores: list[list[float]] = []
        # of each rank's part
        self._head: list[int] = []

    def probe(self) -> Probe:
        """For the engine; :meth:`score` comes before each of its updates."""
        return Probe(
            self._sequences,
            lambda _: self._scores,
            draft_prompts=self._drafts,
            draft_tokens=self._draft_tokens,
            head=lambda: self._head,
        )

    def score(self) -> None:
        """Take log-probs and fingerprint of the present weights; called by all ranks."""
        named = [chunk.named_parameters() for chunk in self._actor.chunks]
        head = [p.data for part in named for name, p in part if name.startswith(SERVED_HEAD)]
        self._head = self._main.gather(fingerprint(head))
        ids, count = self._padded(), self._actor.micro_batch_multiple
        size = len(ids) // count
        parts = [list(range(first, first + size)) for first in range(0, len(ids), size)]
        logprobs = self._actor.get_inference_log_probs(
            ids, parts=parts, lengths=None, temperature=1.0
        )
        rows = zip(logprobs.tolist(), self._sequences, strict=True)
        self._scores = [row[: len(tokens) - 1] for row, tokens in rows]

    def _padded(self) -> Tensor:
        width = max(map(len, self._sequences))
        rows = [tokens + [0] * (width - len(tokens)) for tokens in self._sequences]
        return torch.tensor(rows, device=self._actor.layout.device)
