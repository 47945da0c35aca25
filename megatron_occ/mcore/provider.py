"""Builds this rank's model chunks and their gradient buffers."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_occ.config.schema import Config
from megatron_occ.config.sizes import round_up
from megatron_occ.mcore.adjust import adjusted
from megatron_occ.mcore.capabilities import check_machine, uses_transformer_engine
from megatron_occ.mcore.cpu.attention import CoreAttention
from megatron_occ.mcore.cpu.specs import cpu_block_spec, cpu_mtp_spec
from megatron_occ.mcore.fusions import fuse_weight_gradients, fusions_text
from megatron_occ.mcore.model import OCCGPTModel
from megatron_occ.mcore.mtp_layer import MTPLayer
from megatron_occ.mcore.shared_copy import SharedCopy
from megatron_occ.mcore.transformer_config import transformer_config
from megatron_occ.mcore.weight_gathers import wait_in_turn

logger = logging.getLogger(__name__)


def build_chunks(
    config: Config, vocab_size: int, device: torch.device, *, draws: bool = True
) -> list[OCCGPTModel]:
    """This rank's model: one chunk, or several under the interleaved schedule.

    Args:
        config: the run's configuration.
        vocab_size: ids of the tokenizer. Rows of the output layer beyond them, of
            ``model.vocab_size`` or padding to a multiple of the tensor-parallel size, take no part
            in the softmax unless ``tokenizer.unused_rows`` says so.
        device: of the parameters; "meta" counts them without allocating any.
        draws: initial weights are drawn; False: a checkpoint has to bring every parameter.

    Raises:
        ValueError: what this machine can't do, a size that does not fit the vocabulary, or a model
            that does not fit in memory.
    """
    check_machine(config, device)
    rows, ids = _vocabulary(config, vocab_size)
    megatron = transformer_config(config, draws=draws)
    layers = "TransformerEngine" if uses_transformer_engine() else "local layers, torch's kernels"
    logger.info("layer spec: %s; fusions: %s", layers, fusions_text(config))
    virtual = config.parallel.virtual_pipeline
    stages = [None] if virtual == 1 else list(range(virtual))
    with _told_without_memory(device):
        chunks = [_build_chunk(config, megatron, (rows, ids), stage).to(device) for stage in stages]
    # on a GPU Megatron draws experts of each rank from a generator of their own
    if device.type != "meta" and draws and megatron.use_cpu_initialization:
        _draw_experts_apart(chunks, config)
    return chunks


@contextmanager
def _told_without_memory(device: torch.device) -> Iterator[None]:
    """Turn torch's error about an allocation into one about the model."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, that of the CPU has no name
        wanted = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        if wanted is None:
            raise
        raise ValueError(
            f"the model does not fit in the memory of {device}: there is none left for another "
            f"{wanted[1]}. --dry-run prints what each rank needs: make the model smaller, or "
            "parallel.tensor, parallel.pipeline or parallel.expert larger"
        ) from error


def _vocabulary(config: Config, vocab_size: int) -> tuple[int, int]:
    """Rows of embedding and output layer, and how many of them take part in the softmax."""
    rows, tensor = config.model.vocab_size or vocab_size, config.parallel.tensor
    if rows < vocab_size:
        raise ValueError(
            f"model.vocab_size={rows}: the tokenizer has {vocab_size} ids: give at least as many"
        )
    # a server draws from all rows, whatever the trainer does
    is_served = config.rl.rollout.engine != "megatron"
    ids = rows if config.tokenizer.unused_rows or is_served else vocab_size
    if (tensor - 1) * -(-rows // tensor) >= ids:
        raise ValueError(
            f"parallel.tensor={tensor} leaves a rank without any of the {ids} token ids: "
            "use a smaller tensor-parallel size"
        )
    return rows, ids


def _build_chunk(
    config: Config, megatron: TransformerConfig, sizes: tuple[int, int], vp_stage: int | None
) -> OCCGPTModel:
    """A chunk; ``sizes`` are those of the vocabulary, see :func:`_vocabulary`."""
    rows, ids = sizes
    model, tensor = config.model, config.parallel.tensor
    mtp = _mtp_spec(megatron, vp_stage)
    place = dict(ignore_virtual=False, vp_stage=vp_stage)
    chunk = OCCGPTModel(
        config=megatron,
        transformer_layer_spec=_block_spec(megatron, vp_stage),
        mtp_block_spec=mtp,
        vocab_size=round_up(rows, tensor),
        valid_vocab_size=ids,
        mtp_reads=model.mtp_reads,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        rotary_percent=model.rotary_percent,
        vp_stage=vp_stage,
        build_mtp=lambda: adjusted(_second_mtp(megatron, mtp, vp_stage), model),
    )
    return adjusted(chunk, model)


def _second_mtp(
    megatron: TransformerConfig,
    spec: MultiTokenPredictionBlockSubmodules | None,
    vp_stage: int | None,
) -> MultiTokenPredictionBlock:
    return MultiTokenPredictionBlock(
        config=_quiet(megatron),
        spec=spec,
        vp_stage=vp_stage,
        # 0.19 hands the collection on to the layers, and its default has but two groups
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def _block_spec(megatron: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    if not uses_transformer_engine():
        return cpu_block_spec(megatron, vp_stage)
    block = get_gpt_decoder_block_spec(megatron, True, vp_stage=vp_stage)
    _choose_attention(megatron, block.layer_specs)
    return block


def _choose_attention(megatron: TransformerConfig, layers: list[ModuleSpec]) -> None:
    """Torch's attention in TransformerEngine's layers, for ``attention_backend=local``."""
    if megatron.attention_backend == AttnBackend.local:
        for layer in layers:
            layer.submodules.self_attention.submodules.core_attention = CoreAttention


def _mtp_spec(
    megatron: TransformerConfig, vp_stage: int | None
) -> MultiTokenPredictionBlockSubmodules | None:
    if uses_transformer_engine():
        layers = get_gpt_decoder_layer_specs(megatron, True, None, False)
        _choose_attention(megatron, layers)
        mtp = get_gpt_mtp_block_spec(megatron, layers[-1], True, vp_stage=vp_stage)
    else:
        mtp = cpu_mtp_spec(megatron, vp_stage)
    for layer in mtp.layer_specs if mtp is not None else ():
        layer.module = MTPLayer
    return mtp


def _quiet(megatron: TransformerConfig) -> TransformerConfig:
    """The same configuration for a module whose weights are replaced at once."""
    quiet = copy.copy(megatron)
    quiet.perform_initialization = False
    quiet.init_model_with_meta_device = True
    # its layers would be filled on the host otherwise, from what lies on the meta device
    quiet.use_cpu_initialization = not uses_transformer_engine()
    # TransformerEngine would keep the FP8 weights of the very first pass: what tells a module that
    # a step begins goes through the trained model's modules alone
    quiet.disable_parameter_transpose_cache = True
    # these hold the trained model, and some modules copy their configuration deeply
    quiet.no_sync_func = quiet.finalize_model_grads_func = None
    return quiet


def _draw_experts_apart(chunks: list[OCCGPTModel], config: Config) -> None:
    """Draw experts again from a seed of this rank's own.

    Data-parallel ranks draw the same weights, and expert-parallel ranks are such ranks: each would
    start with the same experts. So would the parts of an expert that is split over ranks, where
    each is drawn by itself: here, and by TransformerEngine, whose experts know no whole.
    """
    rank = parallel_state.get_expert_model_parallel_rank()
    part = parallel_state.get_expert_tensor_parallel_rank()
    if rank == 0 and (part == 0 or not uses_transformer_engine()):
        return
    state = torch.get_rng_state()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(config.seed + 1024 + 100 * rank + stage + 100_003 * part)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".experts." in name and parameter.dim() > 1:
                scaled = "linear_fc2" in name
                method = (
                    chunk.config.output_layer_init_method if scaled else chunk.config.init_method
                )
                method(parameter.data)
    torch.set_rng_state(state)


def wrap_data_parallel(chunks: list[OCCGPTModel], config: Config) -> list[DistributedDataParallel]:
    """Megatron's gradient buffers and data-parallel reduction around each chunk."""
    parallel = config.parallel
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=parallel.grad_reduce_dtype == "fp32",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        megatron = chunk.config
        module = Float16Module(megatron, chunk) if megatron.bf16 else chunk
        around = DistributedDataParallel(
            config=megatron, ddp_config=settings, module=module, disable_bucketing=index > 0
        )
        if parallel.overlap_param_gather:
            wait_in_turn(chunk, around)
        wrapped.append(around)
    fuse_weight_gradients(wrapped, config)
    return wrapped


@dataclass(frozen=True)
class InferenceChunk:
    """A model chunk for generation and the shared copy that keeps it on the trained weights."""

    copy: SharedCopy

    def refresh(self) -> OCCGPTModel:
        """The chunk on the present weights, in evaluation mode."""
        return self.copy.refresh().eval()


def build_inference_chunk(chunk: OCCGPTModel, config: Config) -> InferenceChunk:
    """A chunk without context and sequence parallelism and recompute, on the same weights.

    Args:
        chunk: the trained chunk.
        config: the run's configuration.
    """
    megatron = _inference_config(chunk.config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # weights come from the trained model, ties included
    groups.embd = None
    if config.parallel.context > 1:
        groups.cp = _group_of_one()
    block, mtp = _block_spec(megatron, chunk.vp_stage), _mtp_spec(megatron, chunk.vp_stage)
    model = config.model

    def build() -> OCCGPTModel:
        generating = OCCGPTModel(
            config=megatron,
            transformer_layer_spec=block,
            mtp_block_spec=mtp,
            vocab_size=chunk.vocab_size,
            valid_vocab_size=chunk.valid_vocab_size,
            mtp_reads=chunk.mtp_reads,
            max_sequence_length=chunk.max_sequence_length,
            pre_process=chunk.pre_process,
            post_process=chunk.post_process,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,
            rotary_percent=model.rotary_percent,
            vp_stage=chunk.vp_stage,
            pg_collection=groups,
        )
        return adjusted(generating, model)

    return InferenceChunk(SharedCopy(chunk, build))


def _inference_config(megatron: TransformerConfig) -> TransformerConfig:
    inference = _quiet(megatron)
    inference.context_parallel_size = 1
    inference.sequence_parallel = False
    inference.recompute_granularity = None
    inference.fp8 = None
    return inference


def _group_of_one() -> torch.distributed.ProcessGroup:
    own, _ = torch.distributed.new_subgroups(group_size=1)
    return own
