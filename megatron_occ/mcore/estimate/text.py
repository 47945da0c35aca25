"""The dry run's text: rank grid, stages, and parameters and memory of some ranks side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from megatron_occ.config.pipeline import model_chunks
from megatron_occ.config.schema import Config
from megatron_occ.mcore.estimate.ranks import RankEstimate

NODE = 8
GPU_GIB = 80
_UNITS = {"GiB": 2**30, "MiB": 2**20}
_NAME = 36
_COLUMN = 16


def grid_text(config: Config, estimate: RankEstimate) -> str:
    """Axes, how a rank's number follows from its place on them, groups, and pipeline stages.

    Args:
        config: the run's configuration.
        estimate: of the rank whose groups are shown.
    """
    groups, world_size = estimate.groups, estimate.world_size
    nodes = -(-world_size // NODE)
    lines = [
        f"rank grid          {world_size} rank{'s' * (world_size > 1)}, {nodes} "
        f"node{'s' * (nodes > 1)} of {NODE}; tensor varies fastest, then context, data, pipeline",
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
        span, node = _span(first, last), _span(first // NODE, last // NODE)
        held = ", ".join(_short(chunk) for chunk in chunks[stage::stages])
        lines.append(f"  {stage:<8}{span:<12}{node:<10}{held}")
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
    if len(ranks) <= NODE or len(steps) > 1:
        return " ".join(map(str, ranks))
    return f"{ranks[0]} {ranks[1]} {ranks[2]} ... {ranks[-1]}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _short(chunk: str) -> str:
    """``Ettt`` as ``E t*3``."""
    runs = re.finditer(r"(.)\1*", chunk)
    return " ".join(run[1] if len(run[0]) == 1 else f"{run[1]}*{len(run[0])}" for run in runs)


def ranks_text(config: Config, estimates: Sequence[RankEstimate]) -> str:
    """Contents, exact parameters, and memory by use of some ranks."""
    lines = []
    for entry in estimates:
        place = ", ".join(f"{n.replace('_', ' ')} {i}" for n, i in entry.coordinates.items())
        lines += [f"rank {entry.rank:<13} {place}"]
        lines += [f"  {'holds':<16} {chunk}" for chunk in entry.chunks]
    lines += ["", _row("parameters", [f"rank {entry.rank}" for entry in estimates])]
    lines += _rows(estimates, lambda entry: entry.parameters, "{:,}".format)
    lines.append(_row("  total", [f"{entry.total_parameters:,}" for entry in estimates]))
    return "\n".join([*lines, "", *_memory(estimates), "", *_notes(config, estimates)])


def _memory(estimates: Sequence[RankEstimate]) -> list[str]:
    peaks = [entry.memory.peak for entry in estimates]
    unit = _unit(estimates)
    size = partial(_size, unit=unit)
    lines = [_row(f"memory, {unit}", [f"rank {entry.rank}" for entry in estimates])]
    lines += _rows(estimates, lambda entry: entry.memory.resident, size)
    lines += _rows(estimates, lambda entry: entry.memory.training, size, "update: ")
    lines += _rows(estimates, lambda entry: entry.memory.generation, size, "rollout: ")
    fits = ["yes" if peak <= GPU_GIB * _UNITS["GiB"] else "no" for peak in peaks]
    return [
        *lines,
        _row("  peak", [size(peak) for peak in peaks]),
        _row(f"  fits in {GPU_GIB} GiB", fits),
    ]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<{_NAME}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)


def _rows(
    estimates: Sequence[RankEstimate],
    table: Callable[[RankEstimate], dict[str, int]],
    spell: Callable[[int], str],
    prefix: str = "",
) -> list[str]:
    tables = [table(entry) for entry in estimates]
    names = dict.fromkeys(name for entries in tables for name in entries)
    return [
        _row(f"  {prefix}{name}", [spell(t[name]) if name in t else "-" for t in tables])
        for name in names
    ]


def _unit(estimates: Sequence[RankEstimate]) -> str:
    largest = max(entry.memory.peak for entry in estimates)
    return "GiB" if largest >= _UNITS["GiB"] else "MiB"


def _size(size: int, unit: str) -> str:
    return f"{size / _UNITS[unit]:.2f}"


def _notes(config: Config, estimates: Sequence[RankEstimate]) -> list[str]:
    lines, unit = [], _unit(estimates)
    for entry in [entry for entry in estimates if entry.memory.training]:
        use = entry.memory
        plain, recomputed = (_size(size, unit) for size in use.activations)
        lines.append(
            f"rank {entry.rank}: a micro-batch of {use.micro_batch_tokens} tokens keeps {plain} "
            f"{unit} of activations, {recomputed} with recompute=full (this run: "
            f"{config.recompute}); {use.in_flight:g} in flight"
        )
    return [
        *lines,
        "Parameters are counted on this rank's model, built on the meta device from local layers;",
        "those of TransformerEngine have the same. Activations: the method of arXiv 2205.05198, of",
        "the longest micro-batch and balanced experts. Not counted: CUDA context, buffers of NCCL",
        "and kernels, fragmentation.",
    ]
