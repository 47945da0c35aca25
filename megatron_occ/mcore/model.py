"""Megatron-Core's GPT with per-token log-probs of the main head and of every MTP depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_occ.losses.heads import HeadOutputs
from megatron_occ.mcore.balance import Balance
from megatron_occ.mcore.final_norm import FinalNorm
from megatron_occ.mcore.head_request import HeadRequest, agreement, head_tokens, token_statistics
from megatron_occ.mcore.placement import Placement, place_padded
from megatron_occ.mcore.routing import Routing
from megatron_occ.mcore.shared_copy import SharedCopy
from megatron_occ.mcore.vocabulary.logprobs import VocabShard, draft_distance


class _KeptStates(torch.nn.Module):
    """In the trunk's place: its input is what the trunk has computed before."""

    # Megatron looks for the tensors of another pipeline stage here
    input_tensor = None

    def __init__(self, final_norm: FinalNorm) -> None:
        super().__init__()
        self._final_norm = final_norm

    def forward(self, *, hidden_states: Tensor, **_arguments: Any) -> Tensor:
        return self._final_norm.of_kept(hidden_states)


class OCCGPTModel(GPTModel):
    """GPT that answers a :class:`HeadRequest`; every other call is Megatron's own.

    The hidden states come out of Megatron's public ``forward``: for its duration this stage calls
    itself an inner pipeline stage, which is how Megatron returns hidden states, and the arguments
    that the decoder received (rotary embedding, mask) are kept for the MTP block, which then runs
    once for each pass. Megatron's own MTP loss is never entered.

    In a pipeline the stage with the MTP block sends ``[main, pass 1 depths 1..K, pass 2 ...]``,
    concatenated along the sequence, to the stage with the output layer if that is another one.
    """

    def __init__(
        self,
        *args: Any,
        valid_vocab_size: int | None = None,
        mtp_reads: str = "after",
        build_mtp: Callable[[], torch.nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        """See ``GPTModel``.

        Args:
            valid_vocab_size: ids that exist; rows beyond are padding and take no part in softmax.
            mtp_reads: side of the final norm whose states MTP layers read, see ``FinalNorm``.
            build_mtp: makes a second MTP block, for passes that leave the head alone.
        """
        super().__init__(*args, **kwargs)
        self.valid_vocab_size = valid_vocab_size or self.vocab_size
        self._block_arguments: dict[str, Any] = {}
        self._build_mtp, self._frozen_mtp = build_mtp, None
        self.mtp_reads = mtp_reads
        # where experts are replayed, see `replay_routing`
        self.routing: Routing | None = None
        # where they have a balance loss
        self.balance: Balance | None = None
        self._final_norm = FinalNorm(self.decoder, mtp_reads, has_mtp=self.mtp_process)
        self.decoder.register_forward_pre_hook(self._keep_block_arguments, with_kwargs=True)
        # not a submodule: it has no weights, and is the decoder for the time of one call
        kept = _KeptStates(self._final_norm)
        kept.register_forward_pre_hook(self._keep_block_arguments, with_kwargs=True)
        self.__dict__["_kept_states"] = kept
        if self.mtp_process:
            for parameter in self.mtp.parameters():
                parameter.is_mtp_head = True
            if self.post_process and self.share_embeddings_and_output_weights:
                # in a pipeline Megatron allocates an output layer that nothing ever uses
                self.output_layer.weight = None

    def forward(self, *args: Any, request: HeadRequest | None = None, **kwargs: Any) -> Any:
        """Megatron's forward, or, with ``request``, the log-probs of all heads.

        Args:
            args: Megatron's ``input_ids`` [rows, length], ``position_ids``, ``attention_mask``.
            request: what to return; its ``placement`` says where the input's tokens belong.
            kwargs: further arguments of Megatron's forward.

        Returns:
            With ``request``: :class:`HeadOutputs`, on an inner pipeline stage hidden states;
            without it what Megatron returns.
        """
        if request is None:
            return super().forward(*args, **kwargs)
        ids = args[0]
        placement = request.placement or place_padded(tuple(ids.shape), ids.device)
        targets = placement.take(request.targets if request.passes else request.targets[:1])
        depths = targets.size(0) - 1
        # behind the MTP block, on a stage of its own, the head's gradient passes through
        comes_after_mtp = self.post_process and not self.mtp_process and depths > 0
        is_frozen = request.frozen_trunk and not comes_after_mtp
        trains = torch.is_grad_enabled() and not is_frozen
        if self.routing is not None:
            self.routing.begin(request.routes, placement, trains=trains)
        if self.balance is not None:
            self.balance.begin(request.balance, placement, trains=trains)
        with (
            self._as_inner_stage(),
            self._instead_of_trunk(request, placement) as states,
            self._final_norm.for_depths(depths > 0),
            torch.no_grad() if is_frozen else nullcontext(),
        ):
            arguments = kwargs | states
            hidden = super().forward(*args, packed_seq_params=placement.packed, **arguments)
        if self.routing is not None and request.record is not None:
            request.record(self.routing.first, self.routing.recorded(placement))
        states = [hidden]
        if self.mtp_process and depths:
            states[0], read = self._final_norm.split(hidden)
            depth_ids = placement.as_input(targets[:depths])
            for to_trunk, to_head in request.passes:
                if self.balance is not None:
                    trains = torch.is_grad_enabled() and to_head
                    self.balance.begin_depths(request.balance, placement, trains=trains)
                states += self._mtp_hidden(read, depth_ids, args[1], to_trunk, to_head)
        if self.mtp_process and not any(to_trunk for to_trunk, _ in request.passes):
            states[0] = self._with_embedding(states[0])
        if is_frozen:
            states[-1] = self._with_received(states[-1])
        if not self.post_process:
            return torch.cat(states) if len(states) > 1 else hidden
        if depths and not self.mtp_process:
            states = list(hidden.chunk(1 + depths * len(request.passes)))
        return self._head_outputs(states, targets, request, placement)

    def replay_routing(self, first: int) -> int:
        """From now on passes can replay experts.

        Args:
            first: routers of this rank's chunks before this one.

        Returns:
            Routers up to this chunk's last.
        """
        self.routing = Routing(self, first)
        return first + self.routing.count

    def forget_micro_batches(self) -> None:
        """After a mini-batch: no router is to be run again."""
        for each in (self.routing, self.balance):
            if each is not None:
                each.forget()

    def output_weight(self) -> Tensor:
        """Rows of the output layer on this tensor-parallel rank, [v_local, h]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    @contextmanager
    def _as_inner_stage(self) -> Iterator[None]:
        saved = self.post_process, self.mtp_process
        self.post_process = self.mtp_process = False
        try:
            yield
        finally:
            self.post_process, self.mtp_process = saved

    @contextmanager
    def _instead_of_trunk(
        self, request: HeadRequest, placement: Placement
    ) -> Iterator[dict[str, Tensor]]:
        """The argument of Megatron's forward that gives it the request's states, if it has any."""
        if request.states is None:
            yield {}
            return
        states = placement.take_states(request.states)
        if self.config.sequence_parallel:
            group = self.pg_collection.tp
            states = states.chunk(group.size())[group.rank()]
        decoder, self.decoder = self.decoder, self.__dict__["_kept_states"]
        try:
            yield {"decoder_input": states}
        finally:
            self.decoder = decoder

    def _keep_block_arguments(self, _module: Any, _args: tuple, kwargs: dict[str, Any]) -> None:
        names = ("rotary_pos_emb", "packed_seq_params", "sequence_len_offset")
        self._block_arguments = {name: kwargs.get(name) for name in names}

    def _vocab_shard(self) -> VocabShard:
        group = self.pg_collection.tp
        local = self.vocab_size // group.size()
        start = group.rank() * local
        size = max(0, min(local, self.valid_vocab_size - start))
        return VocabShard(start, size, group if group.size() > 1 else None)

    def _mtp_hidden(
        self, hidden: Tensor, ids: Tensor, positions: Tensor, to_trunk: bool, to_head: bool
    ) -> tuple[Tensor, ...]:
        """Hidden states [s, b, h] of each depth; gradient goes where the two flags say.

        The cut is at the trunk's boundary alone (hidden state, embedding; the output layer is
        detached where it is used): a cut between depths would leave depth 1 untrained by depth 2.
        """
        block = self.mtp
        if to_trunk and not to_head:
            if self._frozen_mtp is None:
                assert self._build_mtp is not None, "this pass needs a second MTP block"
                self._frozen_mtp = SharedCopy(self.mtp, self._build_mtp)
            block = self._frozen_mtp.refresh().train(self.training)
        if self.routing is not None:
            trains = torch.is_grad_enabled() and (to_trunk or to_head)
            self.routing.begin_depths(block, trains=trains)
        with nullcontext() if to_trunk or to_head else torch.no_grad():
            output = block(
                input_ids=ids,
                position_ids=positions,
                attention_mask=None,
                hidden_states=hidden if to_trunk else self._cut(hidden),
                embedding=self.embedding if to_trunk else self._embed_cut,
                **self._block_arguments,
            )
        return output.chunk(1 + self.config.mtp_num_layers, dim=0)[1:]

    def _embed_cut(self, **kwargs: Any) -> Tensor:
        return self._cut(self.embedding(**kwargs))

    def _with_embedding(self, hidden: Tensor) -> Tensor:
        """The same values; the embedding of the MTP layers gets a gradient of zeros.

        An overlapped reduction would wait for ever for that of one without another use: as the
        input of the trunk, or as the output layer.
        """
        is_output = self.post_process and self.share_embeddings_and_output_weights
        if self.pre_process or is_output or not torch.is_grad_enabled():
            return hidden
        return hidden + 0.0 * self.embedding.word_embeddings.weight.view(-1)[:1]

    def _with_received(self, states: Tensor) -> Tensor:
        """The same values; what came from the stage before gets a gradient of zeros.

        The schedule sends one back to that stage, which waits for it.
        """
        received = self.decoder.input_tensor
        if received is None or not torch.is_grad_enabled():
            return states
        return states + 0.0 * received.view(-1)[:1]

    def _cut(self, hidden: Tensor) -> Tensor:
        """Detached; recompute runs a block backward only if an input of it wants a gradient."""
        # for the first layers alone it leaves MTP layers out
        recomputes = self.config.recompute_method == "uniform"
        return hidden.detach().requires_grad_(recomputes and torch.is_grad_enabled())

    def _head_outputs(
        self,
        states: list[Tensor],
        targets: Tensor,
        request: HeadRequest,
        placement: Placement,
    ) -> HeadOutputs:
        """Log-probs from the hidden states of all heads, main head first, then pass by pass."""
        shard, weight = self._vocab_shard(), self.output_weight()
        depths = targets.size(0) - 1
        flat = [self._flatten(state) for state in states[0 if request.main_head else 1 :]]
        asked, trains = head_tokens(flat, targets, request, placement)
        heads = token_statistics(asked, trains, weight, shard, request.temperature)
        main = heads.pop(0) if request.main_head else None
        values = [] if main is None else [main.logprobs]
        values += [main.entropy] if main is not None and request.entropy else []
        values += [head.logprobs for head in heads]
        if depths and request.distance is not None:
            values += self._distances(request, flat[-depths:], states[0], shard, placement)
        found = iter(placement.put(torch.stack(values)))
        return HeadOutputs(
            logprobs=None if main is None else next(found),
            entropy=next(found) if main is not None and request.entropy else None,
            passes=tuple(
                torch.stack([next(found) for _ in range(depths)])
                for _ in range(len(request.passes) if depths else 0)
            ),
            distance=torch.stack(list(found)) if depths and request.distance else None,
            agreement=agreement(main, heads[-depths:], placement) if depths and main else None,
        )

    def _flatten(self, hidden: Tensor) -> Tensor:
        """[s, b, h] -> [s * b, h], whole and ready for a vocabulary split over ranks."""
        if self.config.sequence_parallel:
            group = self.pg_collection.tp
            return gather_from_sequence_parallel_region(hidden, group=group).flatten(0, 1)
        return copy_to_tensor_model_parallel_region(hidden).flatten(0, 1)

    def _distances(
        self,
        request: HeadRequest,
        students: list[Tensor],
        hidden: Tensor,
        shard: VocabShard,
        placement: Placement,
    ) -> list[Tensor]:
        weight = self.output_weight()
        teacher = placement.everywhere(self._flatten(hidden.detach()))
        return [
            draft_distance(
                request.distance,
                student,
                weight,
                placement.ahead(teacher, k),
                shard,
                request.temperature,
            )
            for k, student in enumerate(students, start=1)
        ]
