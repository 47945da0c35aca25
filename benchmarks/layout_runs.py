"""How a layout is measured against the single process.

Every rank compares its own shards, replicas included, with those of the single-process run: a
gradient that is wrong on one copy of a parameter alone is found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from benchmarks.layout_cases import Case, read
from megatron_occ.config import Config, validate
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_model, model_state
from megatron_occ.mcore.layout import Layout
from megatron_occ.mcore.startup import initialize
from megatron_occ.rl.batch import MiniBatch, RolloutBatch, route_dtype
from megatron_occ.rl.calibration import regime_from
from megatron_occ.rl.exchange import distribute
from megatron_occ.rl.head_update import build_updater

VOCABULARY = 29
ROWS, LENGTH, PROMPT = 16, 19, 4
UPDATES = 3


@dataclass
class Measured:
    """Largest deviations from the single process, relative; ``loss`` etc. over all updates.

    ``missing`` names parameters that the single process does not have: copies of tied ones.
    """

    loss: float
    grad_norm: float
    coefficient: float
    gradient: float
    parameter: float
    worst: str = ""
    missing: list[str] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)


def reference(model: tuple[str, ...], folder: Path) -> list[dict[str, float]]:
    """Run one process; leave weights, gradients and updated weights in ``folder``."""
    config = read(model)
    initialize(config)
    actor = _actor(config)
    _save(actor, folder / "start")
    updater, metrics = build_updater(config, actor), []
    batches = _with_experts(mini_batches(config, actor), updater)
    for step in range(UPDATES):
        result = updater.run_update(batches[step % 2])
        metrics.append(result.metrics)
        if step == 0:
            _save_gradients(actor, folder)
    _save(actor, folder / "end")
    _save_scales(actor, folder / "end_scale")
    return metrics


def measure(case: Case, folder: Path, expected: list[dict[str, float]]) -> Measured:
    """Run a layout from the reference's weights; called on every rank."""
    return measure_and_keep(case, folder, expected)[0]


def measure_and_keep(
    case: Case, folder: Path, expected: list[dict[str, float]]
) -> tuple[Measured, MegatronGPTActor]:
    """As :func:`measure`; the policy after its updates besides."""
    config = case.config
    validate(config, command="rl", world_size=case.ranks)
    initialize(config)
    actor = _actor(config)
    _load(actor, folder / "start")
    actor.optimizer.megatron.reload_model_params()
    updater, metrics = build_updater(config, actor), []
    gradient, missing = (0.0, ""), []
    batches = _with_experts(mini_batches(config, actor), updater)
    for step in range(UPDATES):
        metrics.append(updater.run_update(batches[step % 2]).metrics)
        if step == 0:
            gradient = _compare_gradients(actor, folder)
    parameters = _compare(actor, folder / "end", folder / "end_scale", missing)
    found = Measured(
        loss=_largest(metrics, expected, ("loss/", "routing/balance")),
        grad_norm=_largest(metrics, expected, ("grad_norm/",)),
        coefficient=_largest(metrics, expected, ("lambda/",)),
        gradient=gradient[0],
        parameter=parameters[0],
        worst=f"{gradient[1]} {parameters[1]}",
        missing=missing,
        metrics=metrics,
    )
    return found, actor


def _with_experts(batches: list[MiniBatch], updater: Any) -> list[MiniBatch]:
    """Where the update replays the experts of the old log-probs, these with those."""
    replays = updater.config.rl.routing_replay == "training"
    return updater.compute_logprobs(batches) if replays else batches


def _actor(config: Config) -> MegatronGPTActor:
    layout = Layout.of_this_rank(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return MegatronGPTActor(
        config,
        VOCABULARY,
        layout,
        optimizer=config.rl.optimizer,
        total_updates=UPDATES,
        train_head=regime_from(config.mtp).trains_head,
        train_trunk=config.rl.train_trunk,
        balance_loss=config.rl.balance_loss,
    )


def mini_batches(config: Config, actor: MegatronGPTActor, *, parts: int = 1) -> list[MiniBatch]:
    """This rank's share of fixed mini-batches with rows of many lengths, cut into parts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    mask = torch.zeros(ids.shape)
    for row in range(ROWS):
        end = LENGTH - (5 * row) % 11
        mask[row, PROMPT:end] = 1.0
        ids[row, end:] = 0
    sampled = -1.0 - 3.0 * torch.rand(ids.shape, generator=generator)
    advantages = torch.randn(ROWS, generator=generator)
    routes = None
    if config.rl.routing_replay == "rollout":
        routes = _routes(config, actor)
    layout = actor.layout
    owners = [row % layout.data_parallel_size for row in range(ROWS)]
    mine = [row for row, owner in enumerate(owners) if owner == layout.data_parallel_rank]
    batch = RolloutBatch(
        ids=ids,
        response_mask=mask,
        rollout_logprobs=sampled * mask,
        advantages=advantages,
        old_logprobs=sampled,
        sampling_masks=_masks(ids, config) if config.rl.loss.sampling_mask else None,
        routes=routes,
    ).map(lambda values: values[mine].to(layout.device if values.dim() < 3 else "cpu"))
    return distribute(batch, owners, config.rl, actor, parts=parts)


def _routes(config: Config, actor: MegatronGPTActor) -> Tensor:
    """Random experts of each token in each layer of this rank, in some places the router's own."""
    moe, depths = config.model.moe, config.mtp.num_layers
    generator = torch.Generator().manual_seed(3)
    size = (ROWS, LENGTH, config.model.num_layers + depths, moe.num_experts)
    made = 1 + torch.rand(size, generator=generator).topk(moe.top_k, dim=3).indices
    made *= torch.rand(*size[:3], 1, generator=generator) < 0.8
    return made[:, :, routed_layers(actor)].to(route_dtype(moe.num_experts))


def routed_layers(actor: MegatronGPTActor) -> list[int]:
    """Numbers of this rank's layers with experts, MTP layers behind the trunk's, in their order."""
    config, found = actor.config, []
    for chunk in actor.chunks:
        numbers = [layer.layer_number for layer in chunk.decoder.layers]
        found += [number - 1 for number in numbers if number > config.model.moe.first_dense_layers]
        depths = range(config.mtp.num_layers * chunk.mtp_process)
        found += [config.model.num_layers + depth for depth in depths]
    return found


def _masks(ids: Tensor, config: Config) -> Tensor:
    """Of 0 (all) to ``rl.rollout.top_k`` ids, the token's own one among them."""
    generator = torch.Generator().manual_seed(2)
    most = config.rl.rollout.top_k
    others = torch.rand(*ids.shape, VOCABULARY, generator=generator)
    others.scatter_(2, ids.unsqueeze(2), 2.0)
    kept = 1 + others.topk(most, dim=2).indices
    counts = torch.randint(0, most + 1, (*ids.shape, 1), generator=generator)
    return kept.masked_fill(torch.arange(most) >= counts, 0).int()


def _largest(found: list[dict], expected: list[dict], prefixes: tuple[str, ...]) -> float:
    deviations = [0.0]
    for line, wanted in zip(found, expected, strict=True):
        assert line.keys() == wanted.keys(), line.keys() ^ wanted.keys()
        for name, value in wanted.items():
            if name.startswith(prefixes):
                deviation = abs(line[name] - value) / max(abs(value), 1e-3)
                deviations.append(math.inf if math.isnan(deviation) else deviation)
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


def _weights(actor: MegatronGPTActor) -> dict[str, Any]:
    """Of each chunk, without what layers keep besides: that differs with where they run."""
    return {
        name: {key: value for key, value in chunk.items() if not isinstance(value, ShardedObject)}
        for name, chunk in model_state(actor).items()
    }


def _save(actor: MegatronGPTActor, path: Path) -> None:
    path.mkdir(parents=True)
    dist_checkpointing.save(_weights(actor), str(path))


def _load(actor: MegatronGPTActor, path: Path) -> None:
    load_model(actor, dist_checkpointing.load(_weights(actor), str(path)))


def _gather_gradients(actor: MegatronGPTActor) -> None:
    """Under the distributed optimizer a rank has the sum of its part of each bucket alone."""
    for chunk in actor.wrapped:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                part = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, part, group=group)


def _gradients(actor: MegatronGPTActor) -> list[Tensor]:
    if actor.config.parallel.distributed_optimizer:
        _gather_gradients(actor)
    parameters = [parameter for _, _, parameter in _named(actor)]
    return [p.main_grad.clone() if p.requires_grad else torch.zeros_like(p) for p in parameters]


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


def _compare(
    actor: MegatronGPTActor, path: Path, scale_path: Path, missing: list[str] | None = None
) -> tuple[float, str]:
    """Largest deviation of this rank's parameters, and whose it is; others go to ``missing``."""
    own = {(index, name): p.data.clone() for index, name, p in _named(actor)}
    places = [torch.empty_like(value) for value in own.values()]
    with _holding(actor, places):
        expected = dist_checkpointing.load(_weights(actor), str(path))
    with _holding(actor, [torch.empty_like(value) for value in places]):
        scales = dist_checkpointing.load(_weights(actor), str(scale_path))
    worst = (0.0, "")
    for (index, name), value in own.items():
        wanted, scale = (state[f"model{index}"].get(name) for state in (expected, scales))
        if wanted is None:  # a tied copy, saved under the embedding's name
            if missing is not None:
                missing.append(name)
            continue
        relative = (value - wanted).abs() / scale.clamp(min=1e-12)
        deviation = float(relative.nan_to_num(nan=torch.inf).max())
        worst = max(worst, (deviation, name))
    return worst
