"""What one rank of a layout of any size holds, found without its machines.

The rank's model is built on the meta device under a fake process group of the full size: parameter
counts are those of the model that would run, and nothing of its size is allocated. Without
TransformerEngine the local layers are counted; they have the same parameters. Bytes follow from the
counts by the formulas in ``estimate.memory``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_occ.config.schema import Config
from megatron_occ.config.sizes import fp8_layers
from megatron_occ.mcore.cpu.backend import apply_cpu_backend
from megatron_occ.mcore.estimate.held import Held
from megatron_occ.mcore.estimate.memory import MemoryUse, memory_use
from megatron_occ.mcore.model import OCCGPTModel
from megatron_occ.mcore.provider import build_chunks
from megatron_occ.mcore.startup import initialize_groups, shutdown
from megatron_occ.rl.measuring import WINDOW

META = torch.device("meta")


@dataclass(frozen=True)
class RankEstimate:
    """One rank of a layout.

    Args:
        rank: of ``world_size``.
        world_size: ranks in all.
        coordinates: place on each axis by name: ``tensor``, ``context``, ``data``, ``pipeline``;
            ``expert_tensor``, ``expert`` and ``expert_data`` with a mixture of experts.
        groups: ranks of each axis's group that this rank is in, in order.
        chunks: contents of each model chunk, in words.
        held: what the rank holds: counts of parameters by part, layers, replicas.
        memory: bytes by use.
    """

    rank: int
    world_size: int
    coordinates: dict[str, int]
    groups: dict[str, list[int]]
    chunks: list[str]
    held: Held
    memory: MemoryUse

    @property
    def parameters(self) -> dict[str, int]:
        """Counts by part: embedding, trunk, MTP, output layer, experts apart."""
        return self.held.parameters

    @property
    def total_parameters(self) -> int:
        """Parameters on this rank."""
        return sum(self.parameters.values())


def estimate(
    config: Config,
    vocab_size: int,
    world_size: int,
    rank: int,
    *,
    command: str = "rl",
    window: int = WINDOW,
) -> RankEstimate:
    """Build a rank's model on the meta device, and count.

    Args:
        config: a configuration that ``validate`` accepts for this world size.
        vocab_size: ids of the tokenizer.
        world_size: ranks in all.
        rank: the one to build.
        command: says what is kept: ``pretrain``, ``rl``, ``demo``, ``audit`` or ``eval``.
        window: of an audit: mini-batches whose gradients it keeps.

    Raises:
        ValueError: this process sees a CUDA device, or a rank is left without token ids.
    """
    with fake_rank(config, world_size, rank):
        with META:
            chunks = build_chunks(config, vocab_size, META)
        groups = _groups(config)
        held = _held(config, chunks, groups)
        return RankEstimate(
            rank=rank,
            world_size=world_size,
            coordinates={name: ranks.index(rank) for name, ranks in groups.items()},
            groups=groups,
            chunks=[_contents(chunk) for chunk in chunks],
            held=held,
            memory=memory_use(config, held, world_size, command, window),
        )


def last_stage_rank(config: Config, world_size: int, rank: int) -> int:
    """The rank of the last pipeline stage that shares its sequences with ``rank``."""
    stage = world_size // config.parallel.pipeline
    return world_size - stage + rank % stage


@contextmanager
def fake_rank(config: Config, world_size: int, rank: int) -> Iterator[None]:
    """Megatron's groups as this rank would see them, without the others.

    Raises:
        ValueError: this process sees a CUDA device.
    """
    assert not torch.distributed.is_initialized(), "one process group a process"
    if not apply_cpu_backend():
        raise ValueError(
            "parameters are counted where no CUDA device is visible: set CUDA_VISIBLE_DEVICES= "
            "(empty) for this process"
        )
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    try:
        initialize_groups(config)
        yield
    finally:
        shutdown()


def _groups(config: Config) -> dict[str, list[int]]:
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
    }
    if config.model.moe.num_experts is not None:
        groups |= {
            "expert_tensor": parallel_state.get_expert_tensor_parallel_group(),
            "expert": parallel_state.get_expert_model_parallel_group(),
            "expert_data": parallel_state.get_expert_data_parallel_group(),
        }
    return {name: torch.distributed.get_process_group_ranks(g) for name, g in groups.items()}


def _held(config: Config, chunks: list[OCCGPTModel], groups: dict[str, list[int]]) -> Held:
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    moe = [any(".experts." in name for name, _ in layer.named_parameters()) for layer in layers]
    replicas = len(groups["data"]) * len(groups["context"])
    return Held(
        parameters=count_by_part(chunks),
        kept_in_bf16=_kept_in_bf16(config, layers),
        dense_layers=moe.count(False),
        moe_layers=moe.count(True),
        has_mtp=any(chunk.mtp_process for chunk in chunks),
        has_output=any(chunk.post_process for chunk in chunks),
        vocabulary=chunks[-1].vocab_size // config.parallel.tensor,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        replicas=replicas,
        expert_replicas=len(groups.get("expert_data", range(replicas))),
    )


def _kept_in_bf16(config: Config, layers: list[TransformerLayer]) -> int:
    """Parameters of layers that ``fp8`` leaves out."""
    kept = [layer for layer in layers if layer.layer_number not in fp8_layers(config)]
    return sum(parameter.numel() for layer in kept for parameter in layer.parameters())


def count_by_part(
    chunks: list[OCCGPTModel], repeats: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Parameters by part: embedding, trunk, MTP, output layer, routed experts apart.

    Args:
        chunks: of a rank.
        repeats: by beginning of a name: how many such modules the one that is there stands for.
    """
    parts = dict.fromkeys(
        ("embedding", "trunk", "trunk experts", "MTP", "MTP experts", "output layer"), 0
    )
    names = {"embedding": "embedding", "decoder": "trunk", "mtp": "MTP"}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            part = names.get(name.partition(".")[0], "output layer")
            times = next((n for start, n in (repeats or {}).items() if name.startswith(start)), 1)
            # routed experts; shared ones are called shared_experts
            parts[part + (" experts" if ".experts." in name else "")] += times * parameter.numel()
    return {part: count for part, count in parts.items() if count}


def _contents(chunk: OCCGPTModel) -> str:
    numbers = [layer.layer_number for layer in chunk.decoder.layers]
    parts = ["embedding"] if chunk.pre_process else []
    if numbers:
        span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
        parts.append(f"layer{'s' * (len(numbers) > 1)} {span}")
    if chunk.mtp_process:
        depths = len(chunk.mtp.layers)
        parts.append("MTP depth 1" if depths == 1 else f"MTP depths 1-{depths}")
        if not chunk.pre_process:
            parts.append("a copy of the embedding for it")
    if chunk.post_process:
        parts.append("output layer")
    return ", ".join(parts) or "nothing"
