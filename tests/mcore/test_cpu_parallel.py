"""The CPU back end's layers split over ranks: the gradients of one process."""

from __future__ import annotations

import re
import zlib

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_occ.mcore.cpu.backend import apply_cpu_backend
from tests.mcore.cpu_models import LENGTH, backward, build, token_ids
from tests.mcore.distributed import run_ranks


def start(tensor=1, context=1, expert=1, expert_tensor=None):
    apply_cpu_backend()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        create_gloo_process_groups=False,
    )


def global_name(name):
    """Experts numbered over all ranks."""

    def number(match):
        local = 4 // parallel_state.get_expert_model_parallel_world_size()
        rank = parallel_state.get_expert_model_parallel_rank()
        return f".local_experts.{int(match[1]) + local * rank}."

    return re.sub(r"\.local_experts\.(\d+)\.", number, name)


def parts(name):
    """A gated layer holds two matrices, one above the other."""
    return 2 if "linear_fc1" in name else 1


def share_of(name, parameter):
    """(size, rank, dim) of this rank's share of a parameter, None if it is whole."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    if ".local_experts." in name:
        size = parallel_state.get_expert_tensor_parallel_world_size()
        return size, parallel_state.get_expert_tensor_parallel_rank(), parameter.partition_dim
    size = parallel_state.get_tensor_model_parallel_world_size()
    return size, parallel_state.get_tensor_model_parallel_rank(), parameter.partition_dim


@torch.no_grad()
def fill(model):
    """Weights by name, drawn whole and cut."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            continue
        size, rank, dim = share_of(name, parameter) or (1, 0, 0)
        shape = list(parameter.shape)
        shape[dim] *= size
        seed = torch.Generator().manual_seed(zlib.crc32(global_name(name).encode()))
        whole = 0.2 * torch.randn(shape, generator=seed)
        matrices = whole.chunk(parts(name)) if dim == 0 else [whole]
        parameter.copy_(torch.cat([matrix.chunk(size, dim)[rank] for matrix in matrices], dim))


def joined(results):
    """Whole gradients from (name, share, gradient) of all ranks; copies must be equal."""
    shares = {}
    for result in results:
        for name, share, gradient in result:
            size, rank, dim = share or (1, 0, 0)
            held = shares.setdefault(name, {"size": size, "dim": dim})
            assert torch.equal(held.setdefault(rank, gradient), gradient), name
    whole = {}
    for name, held in shares.items():
        size, dim = held["size"], held["dim"]
        count = parts(name) if dim == 0 else 1
        cut = [held[rank].chunk(count, dim) for rank in range(size)]
        whole[name] = torch.cat([piece[i] for i in range(count) for piece in cut], dim)
    return whole


def same(found, expected, bound=1e-5):
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        scale = reference.abs().max()
        # an expert may be without a token
        assert scale > 0 or ".local_experts." in name, name
        difference = (found[name] - reference).abs().max()
        assert difference <= bound * scale, (name, difference, scale)


def my_share(packed):
    """This rank's part of the batch: rows by data rank, chunks r and 2 * cp - 1 - r of each row."""
    rank = parallel_state.get_data_parallel_rank()
    ids = token_ids().chunk(parallel_state.get_data_parallel_world_size())[rank]
    cp = parallel_state.get_context_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    columns = torch.arange(LENGTH).chunk(2 * cp)
    columns = torch.cat([columns[rank], columns[2 * cp - 1 - rank]])
    ids, places = ids[:, columns], columns.expand(len(ids), -1)
    if not packed:
        return ids, None, places
    bounds = torch.arange(0, ids.size(0) * LENGTH + 1, LENGTH, dtype=torch.int32)
    parameters = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=LENGTH, max_seqlen_kv=LENGTH)
    return ids.reshape(1, -1), parameters, places.reshape(1, -1)


def layout_gradients(kind, layout, depths, options, packed=False):
    start(**layout)
    model = build(
        kind,
        depths,
        tensor_model_parallel_size=layout.get("tensor", 1),
        context_parallel_size=layout.get("context", 1),
        expert_model_parallel_size=layout.get("expert", 1),
        expert_tensor_parallel_size=layout.get("expert_tensor"),
        **options,
    )
    fill(model)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    backward(wrapped, *my_share(packed))
    finalize_model_grads([wrapped])
    return [
        (global_name(name), share_of(name, parameter), parameter.main_grad.clone())
        for name, parameter in model.named_parameters()
    ]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qk_norm", {"num_query_groups": 2}),
        ("qk_norm", {"num_query_groups": 1}),
        ("mla", {}),
        ("mla_q_lora", {}),
    ],
)
def test_tensor_parallel_ranks_give_the_gradients_of_one(kind, options, sequence):
    whole = joined(run_ranks(layout_gradients, 1, kind, {}, 1, options))
    options = options | {"sequence_parallel": sequence}
    same(joined(run_ranks(layout_gradients, 2, kind, {"tensor": 2}, 1, options)), whole)


@pytest.mark.parametrize(
    ("kind", "layout", "packed"),
    [
        ("sigmoid", {"expert": 2}, False),
        ("mla_moe", {"tensor": 2, "expert": 2, "expert_tensor": 1}, False),
        ("shared_expert", {"tensor": 2}, False),
        ("qk_norm", {"context": 2}, False),
        ("qk_norm", {"context": 2}, True),
        ("mla_moe", {"context": 2}, False),
        ("mla_moe", {"context": 2}, True),
    ],
)
def test_other_layouts_give_the_gradients_of_one_process(kind, layout, packed):
    """Megatron's MTP loss is normalised on each rank, so without MTP."""
    whole = joined(run_ranks(layout_gradients, 1, kind, {}, None, {}))
    options = {"sequence_parallel": "tensor" in layout}
    same(joined(run_ranks(layout_gradients, 2, kind, layout, None, options, packed)), whole)


def data_parallel(kind, overlap, split_optimizer, updates):
    """Gradients of two micro-batches, and the parameters after ``updates``."""
    start()
    model = build(kind, 2)
    settings = DistributedDataParallelConfig(
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=split_optimizer,
        bucket_size=3000,
    )
    wrapped = DistributedDataParallel(model.config, settings, model)
    adam = OptimizerConfig(
        optimizer="adam", lr=0.01, clip_grad=0.0, use_distributed_optimizer=split_optimizer
    )
    optimizer = get_megatron_optimizer(adam, [wrapped], use_gloo_process_groups=False)
    ids = token_ids(4).chunk(2)[torch.distributed.get_rank()].chunk(2)
    for _ in range(updates):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        with wrapped.no_sync():
            backward(wrapped, ids[0])
        backward(wrapped, ids[1])
        finalize_model_grads([wrapped])
        gradients = {n: p.main_grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    buckets = sum(len(group.buckets) for group in wrapped.bucket_groups)
    return buckets, gradients, {n: p.detach().clone() for n, p in model.named_parameters()}


def test_gradients_reduced_during_the_backward_pass_are_the_same():
    plain = run_ranks(data_parallel, 2, "mla_moe", False, False, 1)
    overlapped = run_ranks(data_parallel, 2, "mla_moe", True, False, 1)
    for (_, expected, _), (buckets, found, _) in zip(plain, overlapped, strict=True):
        assert buckets > 5
        same(found, expected, bound=0)


def test_split_optimizer_state_gives_the_same_parameters():
    plain = run_ranks(data_parallel, 2, "qk_norm", False, False, 3)
    split = run_ranks(data_parallel, 2, "qk_norm", False, True, 3)
    for (_, _, expected), (_, _, found) in zip(plain, split, strict=True):
        same(found, expected)
