"""The policy's weights in the main rank's memory, as servers name them, from any layout."""

from __future__ import annotations

from megatron_occ.convert.exporting import (
    ExportPlan,
    drafter_wants,
    each_tensor,
    sent_outputs,
)
from megatron_occ.data.tokenizers import Tokenizer
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.export import plan_for_servers
from megatron_occ.mcore.gathering import GatheringReader
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.rollout.remote.manifest import BUCKET, Piece
from megatron_occ.rollout.remote.store import Store


class MemoryExport:
    """Gathers the weights, one parameter at a time, and keeps them for servers.

    Args:
        actor: the policy.
        main: keeps them.
        tokenizer: of the run.
        bucket: bytes of a bucket.
    """

    def __init__(
        self,
        actor: MegatronGPTActor,
        main: MainRank,
        tokenizer: Tokenizer,
        bucket: int = BUCKET,
    ) -> None:
        self._actor, self._main, self._tokenizer = actor, main, tokenizer
        self._bucket = bucket
        self._store: Store | None = None

    def stage(self) -> None:
        """Gather the present weights; called by all ranks.

        Raises:
            EngineError: the main rank's machine has no memory for them.
        """
        reader = GatheringReader(self._actor, self._main)
        plan = plan_for_servers(reader, self._actor.config, self._tokenizer)
        # room is made first: an error in the middle would leave the others waiting
        self._main.run(lambda: self._make_room(plan))
        for output, tensor in each_tensor(plan, reader):
            if self._store is not None:
                self._store.put(output.name, tensor)

    def take(self) -> Store:
        """What was gathered last; called on the main rank, which closes it."""
        assert self._store is not None, "stage was called before"
        store, self._store = self._store, None
        return store

    def _make_room(self, plan: ExportPlan) -> None:
        if self._store is not None:
            # of an update that failed
            self._store.close()
        pieces = [
            Piece(output.name, output.dtype, output.shape, drafter_wants(plan, output.name))
            for output in sent_outputs(plan)
        ]
        self._store = Store(pieces, self._bucket)
