"""Compare two run folders: last checkpoint bit for bit, metrics, rollouts.

    python tools/compare_runs.py runs/one runs/other [--phase rl]

Clocks are left out. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PHASES = ("pretrain", "rl", "validation")


def main() -> None:
    """Compare the folders of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs=2, type=Path)
    parser.add_argument("--phase", choices=("pretrain", "rl"), default="rl")
    options = parser.parse_args()
    sys.exit(0 if compare(*options.runs, options.phase) else 1)


def compare(run: Path, other: Path, phase: str) -> bool:
    """Whether two runs ended the same; prints what was compared."""
    found, expected = contents(run, phase), contents(other, phase)
    names = found.keys() | expected.keys()
    different = sorted(name for name in names if not same(found.get(name), expected.get(name)))
    tensors = [value for value in expected.values() if hasattr(value, "numel")]
    numbers = sum(tensor.numel() for tensor in tensors)
    size = f"{len(names)} entries, {len(tensors)} of them tensors with {numbers} numbers"
    results = {f"last {phase} checkpoint ({size})": bool(tensors) and not different}
    for name in PHASES:
        mine, theirs = records(run, name), records(other, name)
        results[f"metrics of {name} ({len(theirs)} lines)"] = mine == theirs
    texts = [
        file.read_text() if file.is_file() else ""
        for file in (folder / "rollouts.jsonl" for folder in (run, other))
    ]
    results[f"rollouts ({texts[1].count(chr(10))} lines)"] = texts[0] == texts[1]
    for name, equal in results.items():
        print(f"{name}: {'equal' if equal else 'DIFFERENT'}")
    for name in different:
        print(f"  differs in the checkpoint: {name}")
    return all(results.values())


def records(run: Path, phase: str) -> list[dict[str, Any]]:
    """Complete lines of a phase in ``metrics.jsonl``, without clocks; none without the file."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [
        {name: value for name, value in line.items() if not is_clock(name)}
        for line in lines
        if line["phase"] == phase
    ]


def is_clock(name: str) -> bool:
    """Whether a metric depends on how fast the machine is."""
    # what each server did depends on who was free
    return name.startswith(("time", "server/")) or "per_second" in name


def contents(run: Path, phase: str) -> dict[str, Any]:
    """The last checkpoint of a phase by key, read without a model: weights, optimizer, trainer."""
    from megatron_occ.mcore.checkpoint import read_plain
    from megatron_occ.mcore.checkpoint_folder import list_checkpoints

    _, path = list_checkpoints(run / "checkpoints" / phase)[-1]
    return {"/step": path.name, **dict(flatten(read_plain(path)))}


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts by path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}/{key}")
    else:
        yield prefix, value


def same(one: Any, other: Any) -> bool:
    """Equality, bit for bit in tensors."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


if __name__ == "__main__":
    main()
