"""The trunk over all pipeline stages: from new tokens to hidden states and logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from megatron_occ.mcore.inference.attend import Attend, Attention
from megatron_occ.mcore.inference.attention import gather_last, norm, sum_over
from megatron_occ.mcore.inference.cache import Cache, Rotary, Tokens
from megatron_occ.mcore.inference.kernels import Shapes
from megatron_occ.mcore.inference.layers import Company, Layer
from megatron_occ.mcore.inference.linear import tensor_of
from megatron_occ.mcore.inference.room import Room
from megatron_occ.mcore.inference.rounding import Rounding
from megatron_occ.mcore.model import OCCGPTModel


@dataclass(frozen=True)
class TrunkStates:
    """Hidden states [n * q, h] at the trunk's end.

    Args:
        main: after the final norm, for the main head.
        read: those that MTP layers read; ``main``, or before the final norm.
    """

    main: Tensor
    read: Tensor


class Trunk:
    """This rank's part of the trunk, on the weights that Megatron's modules have now.

    Args:
        chunks: for inference: without sequence and context parallelism, see
            ``provider.build_inference_chunk``.
        company: see ``layers.Company``.
        keeps_experts: caches keep those of each token.
        rounding: of products, on copies of the weights as they are now; None: none.
    """

    def __init__(
        self,
        chunks: Sequence[OCCGPTModel],
        company: Company,
        *,
        keeps_experts: bool = False,
        rounding: Rounding | None = None,
    ) -> None:
        self.chunks, self.company, self.keeps_experts = chunks, company, keeps_experts
        self.rounding = rounding
        self.config = chunks[0].config
        self.tensor: ProcessGroup = chunks[0].pg_collection.tp
        self.pipeline: ProcessGroup = chunks[0].pg_collection.pp
        self.layers = [[self._layer(layer) for layer in chunk.decoder.layers] for chunk in chunks]
        self.eps = self.config.layernorm_epsilon
        # of each chunk, where the trunk ends in it
        self.final_norms = [
            tensor_of(getattr(chunk.decoder, "final_layernorm", None)) for chunk in chunks
        ]
        self.reads_before = chunks[0].mtp_reads == "before"
        self.tables = [
            tensor_of(chunk.embedding.word_embeddings) if hasattr(chunk, "embedding") else None
            for chunk in chunks
        ]
        self.is_last = chunks[-1].post_process
        self.output = chunks[-1].output_weight().detach() if self.is_last else None

    def _layer(self, module: Any) -> Layer:
        rounds = self.rounding is not None and module.layer_number in self.rounding.layers
        return Layer(
            module,
            self.config,
            self.tensor,
            self.company,
            keeps=self.keeps_experts,
            rounding=self.rounding if rounds else None,
        )

    @property
    def vocabulary(self) -> int:
        """Ids that exist."""
        return self.chunks[-1].valid_vocab_size

    @property
    def is_static(self) -> bool:
        """Whether a pass is one of this rank alone, and of the same kernels whatever it reads."""
        ranks = self.tensor.size() * self.pipeline.size()
        return ranks == 1 and self.config.num_moe_experts is None

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and of the cache."""
        return self.config.params_dtype

    @property
    def attended(self) -> Shapes:
        """What attention outside of prompts looks at."""
        config, heads = self.config, self.config.num_attention_heads
        if config.multi_latent_attention:
            width = config.kv_lora_rank + config.qk_pos_emb_head_dim
            return Shapes(1, heads // self.tensor.size(), width)
        groups = config.num_query_groups
        return Shapes(groups // self.tensor.size(), heads // groups, config.kv_channels)

    def new_cache(self, room: Room) -> Cache:
        """Empty, for this rank's layers."""
        layers = [layer for layers in self.layers for layer in layers]
        return Cache(
            [layer.attention.cached for layer in layers],
            room,
            dtype=self.dtype,
            device=torch.cuda.current_device(),
            experts=[layer.experts for layer in layers],
        )

    def rotary(self, length: int, device: torch.device) -> Rotary:
        """Rotary table for positions below ``length``."""
        config, chunk = self.config, self.chunks[0]
        if config.multi_latent_attention:
            width = config.qk_pos_emb_head_dim
            heads = dict(turned=1, kept=0)
        else:
            width = config.kv_channels
            # queries and key of a group, and its value beside them
            heads = dict(turned=config.num_attention_heads // config.num_query_groups + 1, kept=1)
        if not config.multi_latent_attention:
            # as the training forward has them, scaled or not
            frequencies = chunk.rotary_pos_emb.inv_freq.to(device)
        else:
            exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
            frequencies = 1.0 / (chunk.rotary_base**exponents)
            if config.rope_type == "yarn":
                frequencies = yarn_frequencies(frequencies, config)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
        return Rotary(angles, width, **heads, dtype=self.dtype)

    def forward(self, ids: Tensor, tokens: Tokens, cache: Cache) -> TrunkStates | None:
        """What comes out on the last stage, None on others.

        Args:
            ids: [n, q] token ids, the same on all stages.
            tokens: their places.
            cache: holds them afterwards, on every stage for its own layers.
        """
        hidden, first = None, 0
        for number, (chunk, layers) in enumerate(zip(self.chunks, self.layers, strict=True)):
            if chunk.pre_process:
                hidden = self.embed(ids, number)
            else:
                hidden = self._receive(ids.numel(), layers)
            for layer, kept in zip(layers, cache.layers[first:], strict=False):
                hidden = layer(hidden, tokens, kept)
            first += len(layers)
            if (final := self.final_norms[number]) is not None:
                hidden = self._end(hidden, final)
            if not chunk.post_process:
                self._send(hidden)
        if not self.is_last:
            return None
        return TrunkStates(*hidden.chunk(2)) if self.reads_before else TrunkStates(hidden, hidden)

    def _end(self, hidden: Tensor, final: Tensor) -> Tensor:
        """After the final norm; where MTP layers read the states before it, these behind."""
        after = norm(hidden, final, self.eps)
        return torch.cat([after, hidden]) if self.reads_before else after

    def embed(self, ids: Tensor, chunk: int) -> Tensor:
        """Embeddings [t, h] of ids of any shape, by the table of a chunk."""
        weight, ids = self.tables[chunk], ids.flatten()
        assert weight is not None, "this chunk has no embedding"
        if self.tensor.size() == 1:
            return functional.embedding(ids, weight)
        local = ids - self.tensor.rank() * weight.size(0)
        elsewhere = (local < 0) | (local >= weight.size(0))
        found = functional.embedding(local.masked_fill(elsewhere, 0), weight)
        return sum_over(found.masked_fill(elsewhere.unsqueeze(1), 0.0), self.tensor)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [t, valid vocabulary] fp32 of hidden states [t, h], on the last stage."""
        logits = gather_last(functional.linear(hidden, self.output), self.tensor)
        return logits[:, : self.vocabulary].float()

    def _send(self, hidden: Tensor) -> None:
        ranks = self.pipeline.size()
        torch.distributed.send(
            hidden.contiguous(), group=self.pipeline, group_dst=(self.pipeline.rank() + 1) % ranks
        )

    def _receive(self, count: int, layers: Sequence[Layer]) -> Tensor:
        if self.reads_before and not layers:
            # behind the trunk's end both come
            count *= 2
        device = torch.cuda.current_device()
        hidden = torch.empty(count, self.config.hidden_size, dtype=self.dtype, device=device)
        source = (self.pipeline.rank() - 1) % self.pipeline.size()
        torch.distributed.recv(hidden, group=self.pipeline, group_src=source)
        return hidden

    def share(self, values: Tensor) -> Tensor:
        """Values of the last stage on all stages, in place; returns them."""
        ranks = self.pipeline.size()
        if ranks > 1:
            torch.distributed.broadcast(values, group=self.pipeline, group_src=ranks - 1)
        return values


class Placer:
    """Makes the :class:`Tokens` of a pass.

    Args:
        trunk: what the tokens are for.
        attention: how they attend.
        length: positions that occur.
        device: of everything.
    """

    def __init__(
        self, trunk: Trunk, attention: Attention, length: int, device: torch.device
    ) -> None:
        self.attention, self.rotary = attention, trunk.rotary(length, device)
        self.positions = torch.arange(length, device=device)

    def from_start(self, cache: Cache, rows: int, each: int) -> Tokens:
        """The first ``each`` tokens of the first ``rows`` rows of a cache."""
        return self._place(cache, self.positions[:each].expand(rows, each), None)

    def at(
        self, cache: Cache, positions: Tensor, last: np.ndarray, *, repeats: bool = False
    ) -> Tokens:
        """Tokens of the first n rows.

        Args:
            cache: has the rows.
            positions: [n, q] neighbours.
            last: [n] the last of each row, for the host.
            repeats: a row may begin with several times position 0.
        """
        attend = self.attention.look(positions, last, cache.room, repeats=repeats)
        return self._place(cache, positions, attend)

    def _place(self, cache: Cache, positions: Tensor, attend: Attend | None) -> Tokens:
        rows, each = positions.shape
        flat = positions.reshape(-1)
        cos, sin = self.rotary.cos[flat], self.rotary.sin[flat]
        places = cache.room.places(positions).flatten()
        return Tokens(rows, each, places, cos, sin, self.rotary.half, attend)


def yarn_frequencies(frequencies: Tensor, config: Any) -> Tensor:
    """Frequencies of a scaled context (YaRN, arXiv 2309.00071, section 3.2).

    Those that turn often in the original context stay, those that hardly turn are divided by the
    factor, a ramp between them.

    Args:
        frequencies: [width / 2] of the original context.
        config: of the transformer.
    """
    pairs, original = len(frequencies), config.original_max_position_embeddings

    def pair(turns: float) -> float:
        """The pair of channels that turns so often in the original context."""
        wave = original / (turns * 2 * math.pi)
        return pairs * math.log(wave) / math.log(config.rotary_base)

    low = max(math.floor(pair(config.beta_fast)), 0)
    high = min(math.ceil(pair(config.beta_slow)), 2 * pairs - 1)
    places = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
    scaled = ((places - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies * (1 - scaled) + frequencies / config.rotary_scaling_factor * scaled
