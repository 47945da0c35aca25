"""Bytes that a rank needs, by use, from what it holds.

Not counted: the CUDA context, buffers of NCCL and of kernels, and fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_occ.audit.signals import SIGNALS
from megatron_occ.config import pretrains_first
from megatron_occ.config.schema import Config
from megatron_occ.config.sizes import derive, most_micro_batches, round_up, sequence_multiple
from megatron_occ.config.validate_exact import measures_gradients
from megatron_occ.mcore.estimate.activations import EVERYTHING, NOTHING, activations, asked
from megatron_occ.mcore.estimate.generation import generation_memory, host_memory
from megatron_occ.mcore.estimate.held import Held, element_bytes
from megatron_occ.mcore.vocabulary.logprobs import FUSED_LOGITS
from megatron_occ.rl.calibration import regime_from

_FP32 = 4


@dataclass(frozen=True)
class MemoryUse:
    """Bytes by use. Start, training and generation take turns: the peak has the largest of them.

    Args:
        resident: always there: weights, gradients, optimizer.
        start: while the optimizer is made, besides.
        training: in an update, besides.
        generation: in a rollout, besides.
        activations: what the backward pass reads of one micro-batch, without and with recompute.
        micro_batch_tokens: tokens of that micro-batch, over all context-parallel ranks.
        in_flight: micro-batches of this stage whose backward pass is due, in the 1F1B schedule.
        host: kept in the host's memory, between phases or always.
    """

    resident: dict[str, int]
    start: dict[str, int]
    training: dict[str, int]
    generation: dict[str, int]
    activations: tuple[int, int]
    micro_batch_tokens: int
    in_flight: float
    host: dict[str, int]

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        turns = (self.start, self.training, self.generation)
        return sum(self.resident.values()) + max(sum(turn.values()) for turn in turns)


def memory_use(config: Config, held: Held, world_size: int, command: str, window: int) -> MemoryUse:
    """Memory of a rank.

    Args:
        config: a configuration that ``validate`` accepts.
        held: what the rank holds.
        world_size: ranks in all.
        command: ``pretrain``, ``rl``, ``demo``, ``audit`` or ``eval``.
        window: of an audit: mini-batches whose gradients it keeps.
    """
    tokens, head_alone = _micro_batch_tokens(config, command), _trains_head_alone(config, command)
    # without a graph the trunk's layers leave nothing behind
    graph = replace(held, dense_layers=0, moe_layers=0) if head_alone else held
    length = _longest_sequence(config, command)
    plain, run, recomputed = (
        activations(config, graph, tokens, length, recompute)
        for recompute in (NOTHING, asked(config), EVERYTHING)
    )
    flight = _in_flight(config, held.stage, _micro_batches(config, world_size, command))
    training, generation = {}, {}
    sequences = derive(config, world_size).rank_step_sequences
    if command != "eval":
        training["activations"] = int(run.each * flight + run.once)
        if held.has_output:
            training |= _output(config, held, tokens)
        if config.parallel.grad_reduce_dtype == "bf16":
            # when the optimizer needs them, activations are gone
            wide = _updated(config, held, _trained(held, head_alone)) * _FP32
            missing = int(wide) - sum(training.values())
            training |= {"gradients in fp32, beyond these": missing} if missing > 0 else {}
    samples = command != "pretrain" or config.pretrain.validate_every > 0
    if samples and config.rl.rollout.engine == "megatron":
        generation = generation_memory(config, held, world_size, command)
    return MemoryUse(
        resident=_resident(config, held, command, head_alone)
        | _gradient_copies(config, held, command, window),
        start=_start(config, held, head_alone) if command != "eval" else {},
        training=training,
        generation=generation,
        activations=(int(plain.each + plain.once), int(recomputed.each + recomputed.once)),
        micro_batch_tokens=tokens,
        in_flight=flight,
        host=host_memory(config, held, sequences, command) | _on_the_host(config, held, head_alone),
    )


def _trains_head_alone(config: Config, command: str) -> bool:
    """Whether no phase of the command trains the trunk."""
    return command in ("rl", "demo") and not config.rl.train_trunk and not pretrains_first(config)


def _resident(config: Config, held: Held, command: str, head_alone: bool) -> dict[str, int]:
    everything, trained = sum(held.parameters.values()), _trained(held, head_alone)
    updated, gradients = _updated(config, held, trained), sum(trained.values())
    resident = {"weights": everything * element_bytes(config)}
    if config.fp8.format != "none":
        resident["FP8 weights and transposes"] = 2 * held.fp8_matrices
    width = 2 if config.parallel.grad_reduce_dtype == "bf16" else _FP32
    resident[f"gradients, {config.parallel.grad_reduce_dtype}"] = gradients * width
    if config.precision == "bf16":
        resident["main weights, fp32"] = int(updated * _FP32)
    parallel = config.parallel
    width = 2 if parallel.moments_dtype == "bf16" else _FP32
    here = updated * (1 - parallel.optimizer_offload)
    resident[f"Adam moments, {parallel.moments_dtype}"] = int(here * 2 * width)
    if command in ("rl", "demo") and config.rl.loss.kl_coefficient > 0:
        resident["reference policy"] = resident["weights"]
    return resident


def _start(config: Config, held: Held, head_alone: bool) -> dict[str, int]:
    """Where moments go to the host: what Megatron's optimizer holds before it knows the share.

    It makes fp32 copies of all of a rank's parameters that are to stay, when there are no moments.
    """
    stays = 1 - config.parallel.optimizer_offload
    if stays == 1:
        return {}
    trained = _trained(held, head_alone)
    copies = sum(trained.values()) * _FP32 - _updated(config, held, trained) * 2 * _FP32
    return {"copies of all parameters, beyond moments": max(int(stays * copies), 0)}


def _on_the_host(config: Config, held: Held, head_alone: bool) -> dict[str, int]:
    """Of each entry that is updated there two moments, main weight and gradient, in fp32.

    Megatron moves whole parameters, up to one more than the share. At the start a rank has copies
    of all its parameters there, in bf16 and fp32, beside the main weights.
    """
    share = config.parallel.optimizer_offload
    if share == 0:
        return {}
    trained = _trained(held, head_alone)
    updated, everything = _updated(config, held, trained), sum(trained.values())
    start = everything * (2 + _FP32) + updated * _FP32
    return {"optimizer": int(share * max(updated * 4 * _FP32, start))}


def _trained(held: Held, head_alone: bool) -> dict[str, int]:
    """Parameters that have a gradient, by part."""
    return {n: c for n, c in held.parameters.items() if n.startswith("MTP") or not head_alone}


def _updated(config: Config, held: Held, trained: dict[str, int]) -> float:
    """What an optimizer updates on this rank: all that is trained, or this rank's share."""
    everything = sum(trained.values())
    if not config.parallel.distributed_optimizer:
        return float(everything)
    experts = sum(count for name, count in trained.items() if name.endswith("experts"))
    return (everything - experts) / held.replicas + experts / held.expert_replicas


def _gradient_copies(config: Config, held: Held, command: str, window: int) -> dict[str, int]:
    """Gradients that are held besides the one that is being computed."""
    copies = _copies(config, command, window)
    trained = _trained(held, head_alone=False)
    everything = sum(trained.values())
    if not copies or not everything:
        return {}
    mtp = sum(count for name, count in trained.items() if name.startswith("MTP"))
    # RL's gradient of a part comes with the head's
    entries = everything - mtp if command == "audit" else everything
    share = _updated(config, held, trained) / everything
    return {"copies of gradients, fp32": int(copies * entries * share * _FP32)}


def _copies(config: Config, command: str, window: int) -> int:
    depths = config.mtp.num_layers
    if command == "audit":
        return (1 + len(SIGNALS) * depths) * (1 + window)
    if command not in ("rl", "demo") or not measures_gradients(config.mtp):
        return 0
    # of the parts before, and of this part: RL's and each depth's
    return 2 * (1 + depths) if config.mtp.trunk.exact.pairs == "cross" else depths


def _micro_batch_tokens(config: Config, command: str) -> int:
    """Most tokens of a micro-batch, padding included, over all context-parallel ranks."""
    rl, multiple = config.rl, sequence_multiple(config)
    length, rows = config.model.max_position_embeddings, rl.micro_batch_size
    if command == "pretrain":
        length, rows = config.pretrain.sequence_length, config.pretrain.micro_batch_size
    elif rl.micro_batch_tokens is not None:
        return rl.micro_batch_tokens
    return rows * round_up(length, multiple)


def _longest_sequence(config: Config, command: str) -> int:
    pretrains = command == "pretrain"
    return config.pretrain.sequence_length if pretrains else config.model.max_position_embeddings


def _micro_batches(config: Config, world_size: int, command: str) -> int:
    """Micro-batches of an update on a rank; where they are packed, as many as there may be."""
    if command == "pretrain":
        return derive(config, world_size).pretrain_micro_batches
    return most_micro_batches(config, world_size)


def _in_flight(config: Config, stage: int, micro_batches: int) -> float:
    """Micro-batches whose backward pass is due, counted on all layers of the rank.

    1F1B: one for each stage from here on. Interleaved: Megatron-Core's warm-up and one, in chunks;
    on the first stage this is the paper's p + (p - 1) / m.
    """
    stages, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    flight = stages - stage
    if virtual > 1:
        flight = ((stages - stage - 1) * 2 + (virtual - 1) * stages + 1) / virtual
    return min(flight, micro_batches)


def _output(config: Config, held: Held, tokens: int) -> dict[str, int]:
    """Hidden states of all heads; a tile of logits and its gradient, as on a GPU."""
    local = tokens // config.parallel.context
    heads = 1
    if config.mtp.num_layers:
        passes = len(regime_from(config.mtp).passes)
        heads += config.mtp.num_layers * passes
    # with their gradients
    states = 2 * heads * local * config.model.hidden_size * element_bytes(config)
    tile = min(FUSED_LOGITS, local * held.vocabulary) * element_bytes(config)
    return {"hidden states of the heads": states, "tile of logits": 2 * tile}
