"""Layouts that must give the numbers of one process, and how one of them is measured.

Every rank compares its own shards, replicas included, with those of the single-process run: a
gradient that is wrong on one copy of a parameter alone is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_occ.config import Config, load_config, validate
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import model_state
from megatron_occ.mcore.layout import Layout
from megatron_occ.mcore.startup import initialize
from megatron_occ.rl.batch import MiniBatch, RolloutBatch
from megatron_occ.rl.exchange import distribute
from megatron_occ.rl.update import PolicyUpdater

VOCABULARY = 29
ROWS, LENGTH, PROMPT = 16, 19, 4
UPDATES = 3

_MODEL = (
    "pretrain.steps=0",
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.max_position_embeddings=64",
    # large enough that every position matters
    "model.init_std=0.15",
    "rl.samples_per_prompt=4",
    "rl.prompts_per_step=4",
    "rl.mini_batches=2",
    "rl.micro_batch_size=2",
    "rl.optimizer.lr=0.01",
    # Adam divides by the root of a variance: with a small epsilon rounding of a tiny gradient
    # becomes a step of full size
    "rl.optimizer.eps=1.0",
    "rl.optimizer.beta1=0.5",
)
# statistics of the same mini-batch: lambda is not 0 from the first update on
CURRENT = "mtp.trunk.statistics=current"
DENSE = ("mtp.preset=occ_decoupled", CURRENT)
COUPLED = ("mtp.preset=occ", CURRENT)
SOFT_CE = ("mtp.head.signal=soft_ce", CURRENT)
MOE = (
    *DENSE,
    "model.moe.num_experts=4",
    "model.moe.top_k=2",
    "model.moe.ffn_hidden_size=24",
    "model.moe.shared_ffn_hidden_size=16",
    "model.moe.first_dense_layers=1",
    "model.moe.score_function=sigmoid",
    "model.moe.expert_bias=true",
)
MLA = (
    *DENSE,
    "model.num_query_groups=null",
    "model.mla.enabled=true",
    "model.mla.q_lora_rank=16",
    "model.mla.kv_lora_rank=16",
    "model.mla.qk_head_dim=8",
    "model.mla.qk_rope_head_dim=4",
    "model.mla.v_head_dim=6",
    "model.qk_layernorm=true",
)
UNTIED = ("model.tie_embeddings=false",)
PACKED = ("rl.micro_batch_tokens=64",)
SEQUENCE = ("parallel.sequence=true",)


@dataclass(frozen=True)
class Case:
    """A layout.

    Args:
        name: as printed.
        ranks: processes.
        model: settings shared with the single process that it is compared with.
        layout: settings of its own.
    """

    name: str
    ranks: int
    model: tuple[str, ...]
    layout: tuple[str, ...]

    @property
    def config(self) -> Config:
        """Its configuration."""
        return read(self.model, self.layout)


def _case(name: str, ranks: int, model: tuple[str, ...], *layout: Any) -> Case:
    flat = [item for part in layout for item in ([part] if isinstance(part, str) else part)]
    return Case(name, ranks, model, tuple(flat))


def _depths(count: int) -> tuple[str, ...]:
    return (f"mtp.num_layers={count}",)


TP2, PP2, CP2 = "parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2"
CASES = (
    _case("1 process, packed", 1, DENSE + _depths(2), PACKED),
    _case("1 process, full recompute", 1, DENSE + _depths(2), "recompute=full"),
    _case("TP2", 2, DENSE + _depths(2), TP2),
    _case("TP2, untied, K=3", 2, DENSE + UNTIED + _depths(3), TP2),
    _case("TP2 + SP, packed", 2, DENSE + _depths(2), TP2, SEQUENCE, PACKED),
    _case(
        "TP2 + SP, full recompute", 2, DENSE + UNTIED + _depths(1), TP2, SEQUENCE, "recompute=full"
    ),
    _case("PP2, tied", 2, DENSE + _depths(1), PP2),
    _case("PP2, untied, packed, K=2", 2, DENSE + UNTIED + _depths(2), PP2, PACKED),
    _case("PP2, full recompute", 2, DENSE + _depths(2), PP2, "recompute=full"),
    _case(
        "PP2, layout Ettt|tmmL",
        2,
        DENSE + UNTIED + _depths(2),
        PP2,
        "parallel.pipeline_layout=Et*3|tmmL",
    ),
    _case("PP2 x VPP2, tied", 2, DENSE + _depths(2), PP2, "parallel.virtual_pipeline=2"),
    _case(
        "PP2 x VPP2, coupled OCC",
        2,
        COUPLED + UNTIED + _depths(1),
        PP2,
        "parallel.virtual_pipeline=2",
    ),
    _case("CP2", 2, DENSE + _depths(2), CP2),
    _case("CP2, packed, K=3", 2, DENSE + UNTIED + _depths(3), CP2, PACKED),
    _case("CP2, packed, soft CE head", 2, SOFT_CE + _depths(2), CP2, PACKED),
    _case("CP2, full recompute", 2, DENSE + _depths(2), CP2, "recompute=full"),
    _case("DP2", 2, DENSE + _depths(2)),
    _case(
        "DP2, overlapped reduction, packed",
        2,
        DENSE + _depths(2),
        "parallel.overlap_grad_reduce=true",
        PACKED,
    ),
    _case(
        "DP2, distributed optimizer",
        2,
        DENSE + _depths(2),
        "parallel.distributed_optimizer=true",
        "parallel.overlap_grad_reduce=true",
    ),
    _case("MoE, EP2", 2, MOE + _depths(1), "parallel.expert=2"),
    _case("MoE, TP2 + SP, packed", 2, MOE + UNTIED + _depths(2), TP2, SEQUENCE, PACKED),
    _case("MLA, TP2", 2, MLA + _depths(1), TP2),
    _case("MLA, CP2, packed", 2, MLA + UNTIED + _depths(2), CP2, PACKED),
    _case(
        "PP3, MTP stage of its own",
        3,
        DENSE + UNTIED + _depths(2),
        "parallel.pipeline=3",
        "parallel.pipeline_layout=Et*4|mm|L",
    ),
    _case(
        "PP3, MTP stage of its own, tied, packed",
        3,
        DENSE + _depths(1),
        "parallel.pipeline=3",
        "parallel.pipeline_layout=Et*4|m|L",
        PACKED,
    ),
    _case("TP2 x PP2", 4, DENSE + _depths(2), TP2, PP2),
    _case("TP2 x CP2 + SP, packed", 4, DENSE + UNTIED + _depths(2), TP2, CP2, SEQUENCE, PACKED),
    _case("PP2 x CP2, packed", 4, DENSE + _depths(1), PP2, CP2, PACKED),
    _case(
        "DP2 x PP2, overlapped reduction",
        4,
        ("mtp.preset=detach", *UNTIED, *_depths(2)),
        PP2,
        "parallel.overlap_grad_reduce=true",
    ),
    _case(
        "MoE, TP2 x EP2 + SP",
        4,
        MOE + _depths(1),
        TP2,
        SEQUENCE,
        "parallel.expert=2",
        "parallel.expert_tensor=1",
    ),
    _case("MoE, PP2 x EP2, packed", 4, MOE + UNTIED + _depths(2), PP2, "parallel.expert=2", PACKED),
    _case("MLA, TP2 x PP2", 4, MLA + _depths(1), TP2, PP2),
)


@dataclass
class Measured:
    """Largest deviations from the single process, relative; ``loss`` etc. over all updates.

    No gradient is compared under the distributed optimizer: a rank has the sum of its part alone.
    """

    loss: float
    grad_norm: float
    coefficient: float
    gradient: float | None
    parameter: float
    worst: str = ""
    metrics: list[dict[str, float]] = field(default_factory=list)


def read(model: tuple[str, ...], layout: tuple[str, ...] = ()) -> Config:
    """Configuration of a model under a layout."""
    packed = any(item.startswith("rl.micro_batch_tokens") for item in layout)
    base = [item for item in _MODEL if not (packed and item.startswith("rl.micro_batch_size"))]
    return load_config([], [*base, *model, *layout])


def reference(model: tuple[str, ...], folder: Path) -> list[dict[str, float]]:
    """Run one process; leave weights, gradients and updated weights in ``folder``."""
    config = read(model)
    initialize(config)
    actor = _actor(config)
    _save(actor, folder / "start")
    updater, metrics = PolicyUpdater(config, actor), []
    for step in range(UPDATES):
        result = updater.run_update(mini_batches(config, actor)[step % 2])
        metrics.append(result.metrics)
        if step == 0:
            _save_gradients(actor, folder)
    _save(actor, folder / "end")
    _save_scales(actor, folder / "end_scale")
    return metrics


def measure(case: Case, folder: Path, expected: list[dict[str, float]]) -> Measured:
    """Run a layout from the reference's weights; called on every rank."""
    config = case.config
    validate(config, command="rl", world_size=case.ranks)
    initialize(config)
    actor = _actor(config)
    _load(actor, folder / "start")
    actor.optimizer.megatron.reload_model_params()
    updater, metrics = PolicyUpdater(config, actor), []
    gradient: tuple[float | None, str] = (None, "")
    for step in range(UPDATES):
        metrics.append(updater.run_update(mini_batches(config, actor)[step % 2]).metrics)
        if step == 0 and not config.parallel.distributed_optimizer:
            gradient = _compare_gradients(actor, folder)
    parameters = _compare(actor, folder / "end", folder / "end_scale")
    return Measured(
        loss=_largest(metrics, expected, ("loss/",)),
        grad_norm=_largest(metrics, expected, ("grad_norm/",)),
        coefficient=_largest(metrics, expected, ("lambda/",)),
        gradient=gradient[0],
        parameter=parameters[0],
        worst=f"{gradient[1]} {parameters[1]}",
        metrics=metrics,
    )


def _actor(config: Config) -> MegatronGPTActor:
    layout = Layout.of_this_rank(torch.device("cpu"))
    return MegatronGPTActor(
        config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=UPDATES
    )


def mini_batches(config: Config, actor: MegatronGPTActor) -> list[MiniBatch]:
    """This rank's part of fixed mini-batches with rows of many lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    mask = torch.zeros(ids.shape)
    for row in range(ROWS):
        end = LENGTH - (5 * row) % 11
        mask[row, PROMPT:end] = 1.0
        ids[row, end:] = 0
    sampled = -1.0 - 3.0 * torch.rand(ids.shape, generator=generator)
    advantages = torch.randn(ROWS, generator=generator)
    layout = actor.layout
    owners = [row % layout.data_parallel_size for row in range(ROWS)]
    mine = [row for row, owner in enumerate(owners) if owner == layout.data_parallel_rank]
    batch = RolloutBatch(
        ids=ids,
        response_mask=mask,
        rollout_logprobs=sampled * mask,
        advantages=advantages,
        old_logprobs=sampled,
    ).map(lambda values: values[mine])
    return distribute(batch, owners, config.rl, actor)


def _largest(found: list[dict], expected: list[dict], prefixes: tuple[str, ...]) -> float:
    deviations = [0.0]
    for line, wanted in zip(found, expected, strict=True):
        assert line.keys() == wanted.keys(), line.keys() ^ wanted.keys()
        for name, value in wanted.items():
            if name.startswith(prefixes):
                deviations.append(abs(line[name] - value) / max(abs(value), 1e-3))
    return max(deviations)


def _named(actor: MegatronGPTActor) -> Iterator[tuple[int, str, torch.nn.Parameter]]:
    for index, chunk in enumerate(actor.chunks):
        for name, parameter in chunk.named_parameters():
            yield index, name, parameter


@contextmanager
def _holding(actor: MegatronGPTActor, values: list[Tensor]) -> Iterator[None]:
    """Parameters show other tensors, so that checkpoints of Megatron can carry these."""
    live = [parameter.data for _, _, parameter in _named(actor)]
    try:
        for (_, _, parameter), value in zip(_named(actor), values, strict=True):
            parameter.data = value
        yield
    finally:
        for (_, _, parameter), value in zip(_named(actor), live, strict=True):
            parameter.data = value


def _save(actor: MegatronGPTActor, path: Path) -> None:
    path.mkdir(parents=True)
    dist_checkpointing.save(model_state(actor), str(path))


def _load(actor: MegatronGPTActor, path: Path) -> None:
    state = dist_checkpointing.load(model_state(actor), str(path))
    for index, chunk in enumerate(actor.chunks):
        chunk.load_state_dict(state[f"model{index}"])


def _gradients(actor: MegatronGPTActor) -> list[Tensor]:
    return [parameter.main_grad.clone() for _, _, parameter in _named(actor)]


def _save_gradients(actor: MegatronGPTActor, folder: Path) -> None:
    with _holding(actor, _gradients(actor)):
        _save(actor, folder / "gradient")
        _save_scales(actor, folder / "gradient_scale")


def _save_scales(actor: MegatronGPTActor, path: Path) -> None:
    """Each tensor's largest entry, as a tensor of its shape: a shard then finds it in its place."""
    scales = [torch.full_like(p.data, float(p.data.abs().max())) for _, _, p in _named(actor)]
    with _holding(actor, scales):
        _save(actor, path)


def _compare_gradients(actor: MegatronGPTActor, folder: Path) -> tuple[float, str]:
    with _holding(actor, _gradients(actor)):
        return _compare(actor, folder / "gradient", folder / "gradient_scale")


def _compare(actor: MegatronGPTActor, path: Path, scale_path: Path) -> tuple[float, str]:
    """Largest deviation of this rank's parameters, and whose it is."""
    own = {(index, name): p.data.clone() for index, name, p in _named(actor)}
    places = [torch.empty_like(value) for value in own.values()]
    with _holding(actor, places):
        expected = dist_checkpointing.load(model_state(actor), str(path))
    with _holding(actor, [torch.empty_like(value) for value in places]):
        scales = dist_checkpointing.load(model_state(actor), str(scale_path))
    worst = (0.0, "")
    for (index, name), value in own.items():
        wanted, scale = (state[f"model{index}"].get(name) for state in (expected, scales))
        if wanted is None:  # a tied copy, saved under the embedding's name
            continue
        deviation = float(((value - wanted).abs() / scale.clamp(min=1e-12)).max())
        worst = max(worst, (deviation, name))
    return worst
