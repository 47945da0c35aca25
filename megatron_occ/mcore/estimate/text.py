"""The dry run's text: rank grid, stages, parameters and memory of some ranks, what fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from megatron_occ.config.keys import spell
from megatron_occ.config.pipeline import model_chunks, spell_chunk
from megatron_occ.config.schema import Config
from megatron_occ.config.words import counted
from megatron_occ.mcore.estimate.largest import GIB, Change
from megatron_occ.mcore.estimate.ranks import RankEstimate
from megatron_occ.mcore.estimate.whole import ModelParameters

_UNITS = {"GiB": GIB, "MiB": 2**20}
_NAME = 36
_COLUMN = 20


def grid_text(config: Config, estimate: RankEstimate, node: int) -> str:
    """Axes, how a rank's number follows from its place on them, groups, and pipeline stages.

    Args:
        config: the run's configuration.
        estimate: of the rank whose groups are shown.
        node: ranks of a node.
    """
    groups, world_size = estimate.groups, estimate.world_size
    nodes = -(-world_size // node)
    lines = [
        f"rank grid          {world_size} rank{'s' * (world_size > 1)}, {nodes} "
        f"node{'s' * (nodes > 1)} of {node}; tensor varies fastest, then context, data, pipeline",
        f"  rank             = {_formula(groups, ('tensor', 'context', 'data', 'pipeline'))}",
    ]
    if "expert" in groups:
        axes = ("expert_tensor", "expert", "expert_data", "pipeline")
        lines.append(f"  in MoE layers    = {_formula(groups, axes)}")
    lines += ["", f"  {'axis':<16} {'size':>5}  ranks of rank {estimate.rank}'s group"]
    for axis, ranks in groups.items():
        lines.append(f"  {axis.replace('_', ' '):<16} {len(ranks):>5}  {_ranks(ranks)}")
    lines += ["", f"  {'stage':<8}{'ranks':<12}{'nodes':<10}chunks"]
    stages, chunks = config.parallel.pipeline, model_chunks(config)
    size = world_size // stages
    for stage in range(stages):
        first, last = stage * size, (stage + 1) * size - 1
        span, places = _span(first, last), _span(first // node, last // node)
        held = ", ".join(spell_chunk(chunk) for chunk in chunks[stage::stages])
        lines.append(f"  {stage:<8}{span:<12}{places:<10}{held}")
    return "\n".join(lines)


def _formula(groups: dict[str, list[int]], axes: Sequence[str]) -> str:
    text, stride = "", 1
    for axis in [axis for axis in axes if len(groups[axis]) > 1]:
        name = axis.replace("_", " ")
        text += f"{' + ' if text else ''}{name if stride == 1 else f'{stride} * {name}'}"
        stride *= len(groups[axis])
    return text or "0"


def _ranks(ranks: list[int]) -> str:
    steps = {later - earlier for earlier, later in pairwise(ranks)}
    if len(ranks) <= 8 or len(steps) > 1:
        return " ".join(map(str, ranks))
    return f"{ranks[0]} {ranks[1]} {ranks[2]} ... {ranks[-1]}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def ranks_text(
    config: Config, estimates: Sequence[RankEstimate], model: ModelParameters, gpu_memory: float
) -> str:
    """Contents, exact parameters beside the model's, and memory by use of some ranks.

    Args:
        config: the run's configuration.
        estimates: of the ranks.
        model: parameters of the whole model.
        gpu_memory: of a rank, in GiB.
    """
    lines = []
    for entry in estimates:
        place = ", ".join(f"{n.replace('_', ' ')} {i}" for n, i in entry.coordinates.items())
        lines += [f"rank {entry.rank:<13} {place}"]
        lines += [f"  {'holds':<16} {chunk}" for chunk in entry.chunks]
    counts = {f"rank {entry.rank}": entry.parameters for entry in estimates}
    counts["model"] = model.total
    if model.active != model.total:
        counts["active on a token"] = model.active
    tables = list(counts.values())
    lines += ["", _row("parameters", list(counts)), *_rows(tables, "{:,}".format)]
    lines.append(_row("  total", [f"{sum(table.values()):,}" for table in tables]))
    memory = _memory(estimates, gpu_memory)
    return "\n".join([*lines, "", *memory, "", *_notes(config, estimates)])


def _memory(estimates: Sequence[RankEstimate], gpu_memory: float) -> list[str]:
    uses = [entry.memory for entry in estimates]
    unit = _unit(estimates)
    size = partial(_size, unit=unit)
    lines = [_row(f"memory, {unit}", [f"rank {entry.rank}" for entry in estimates])]
    lines += _rows([use.resident for use in uses], size)
    lines += _rows([use.start for use in uses], size, "start: ")
    lines += _rows([use.training for use in uses], size, "update: ")
    lines += _rows([use.generation for use in uses], size, "rollout: ")
    fits = ["yes" if use.peak <= gpu_memory * GIB else "no" for use in uses]
    return [
        *lines,
        _row("  peak", [size(use.peak) for use in uses]),
        _row(f"  fits in {gpu_memory:g} GiB", fits),
        *_rows([use.host for use in uses], size, "on the host: "),
    ]


def fit_text(
    config: Config, entry: RankEstimate, changes: Sequence[tuple[Change, int]], gpu_memory: float
) -> str:
    """Which rank is the largest, whether it fits, and if not what would make it fit.

    Args:
        config: the run's configuration.
        entry: the largest rank.
        changes: those that lower its peak, with the peak that they lead to, in bytes.
        gpu_memory: of a rank, in GiB.
    """
    limit, peak = int(gpu_memory * GIB), entry.memory.peak
    unit = _unit([entry])
    size = partial(_size, unit=unit)
    ranks = entry.world_size // config.parallel.pipeline
    alike = f", like all {ranks} ranks of pipeline stage {entry.held.stage}" if ranks > 1 else ""
    lines = [f"largest rank       rank {entry.rank}{alike}: {size(peak)} {unit}. It "]
    if peak <= limit:
        left = f"leaves {_size(limit - peak, 'GiB')} GiB for what is not counted"
        return f"{lines[0]}fits into --gpu-memory {gpu_memory:g} GiB and {left}"
    lines[0] += (
        f"does not fit into --gpu-memory {gpu_memory:g} GiB: {size(peak - limit)} {unit} too much"
    )
    for change, after in changes:
        keys = " ".join(f"{key}={_spell(value)}" for key, value in change.items())
        verdict = "fits" if after <= limit else "not enough"
        lines.append(f"  with             {keys}: {size(after)} {unit}, {verdict}")
    if not any(after <= limit for _, after in changes):
        layout = "parallel.tensor, parallel.pipeline"
        if config.model.moe.num_experts is not None:
            layout += ", parallel.expert"
        lines.append(
            f"  otherwise        give a rank less of the model ({layout}) or of a sequence "
            "(parallel.context), on more ranks"
        )
    return "\n".join(lines)


def _spell(value: object) -> str:
    return spell(value) if value is None or isinstance(value, (bool, list)) else str(value)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<{_NAME}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)


def _rows(
    tables: Sequence[dict[str, int]], write: Callable[[int], str], prefix: str = ""
) -> list[str]:
    names = dict.fromkeys(name for entries in tables for name in entries)
    return [
        _row(f"  {prefix}{name}", [write(t[name]) if name in t else "-" for t in tables])
        for name in names
    ]


def _unit(estimates: Sequence[RankEstimate]) -> str:
    largest = max(entry.memory.peak for entry in estimates)
    return "GiB" if largest >= _UNITS["GiB"] else "MiB"


def _size(size: int, unit: str) -> str:
    return f"{size / _UNITS[unit]:.2f}"


def _recompute(config: Config) -> str:
    if config.recompute == "selective":
        return f"selective of {', '.join(config.recompute_modules)}"
    some = config.recompute_layers
    return config.recompute + (f" of {counted(some, 'layer')} a chunk" if some else "")


def _notes(config: Config, estimates: Sequence[RankEstimate]) -> list[str]:
    lines, unit = [], _unit(estimates)
    for entry in [entry for entry in estimates if entry.memory.training]:
        use = entry.memory
        plain, recomputed = (_size(size, unit) for size in use.activations)
        lines.append(
            f"rank {entry.rank}: a micro-batch of {use.micro_batch_tokens} tokens keeps {plain} "
            f"{unit} of activations, {recomputed} with recompute=full (this run: "
            f"{_recompute(config)}); {use.in_flight:g} in flight"
        )
    return [
        *lines,
        "Parameters are counted on this rank's model, built on the meta device from local layers;",
        "those of TransformerEngine have the same. Activations: the method of arXiv 2205.05198, of",
        "the longest micro-batch and balanced experts. Not counted: CUDA context, buffers of NCCL",
        "and kernels, fragmentation.",
    ]
