"""A large synthetic checkpoint there and back: memory, speed, and what an interruption costs.

    python -m benchmarks.convert --folder SCRATCH [--gigabytes 20 --shards 40]

Writes a MiMo of that size (bf16, K = 1), converts it, and prints time and peak memory of the
process; converts it again, killed at a random point and started once more, and compares every byte;
converts it back and compares every tensor. Needs twice the size on the disk, and deletes what it
wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from megatron_occ.config import load_config
from megatron_occ.convert.exporting import plan_export
from megatron_occ.convert.shards import (
    Output,
    shard_name,
    split_into_shards,
    write_index,
    write_shard,
)
from megatron_occ.convert.slots import Slot
from megatron_occ.convert.source import Source

# the number of layers makes the size
MODEL = load_config([Path(__file__).resolve().parent.parent / "conf/model/mimo_7b.yaml"]).model
_BLOCK = 1 << 26


class _Anything:
    """In the place of a checkpoint, to plan with."""

    def check(self, _slots: list[Slot]) -> None: ...

    def dtype(self, _slot: Slot) -> torch.dtype:
        return torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="scratch, made and deleted")
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--shards", type=int, default=40)
    options = parser.parse_args()
    root = options.folder
    root.mkdir(parents=True)
    try:
        _run(root, options.gigabytes, options.shards)
    finally:
        shutil.rmtree(root)


def _run(root: Path, gigabytes: float, shards: int) -> None:
    source, target = root / "hf", root / "mcore"
    outputs, count = _make(source, gigabytes, shards)
    total, largest = sum(o.bytes for o in outputs), max(o.bytes for o in outputs)
    print(
        f"source: {total / 1e9:.1f} GB in {count} shards, {len(outputs)} tensors, largest "
        f"{largest / 1e9:.2f} GB"
    )
    command = [sys.executable, "-m", "megatron_occ", "convert", "import", str(source), str(target)]
    seconds, peak, _ = _measured(command)
    _report("import", total, largest, seconds, peak)
    expected = _digests(target)
    shutil.rmtree(target)
    after = random.uniform(0.1, 0.9) * seconds
    _, _, code = _measured(command, kill_after=after)
    written = sum(f.stat().st_size for f in target.with_name("mcore.partial").glob("*.distcp"))
    print(
        f"killed after {after:.0f} s (exit {code}), {written / 1e9:.1f} GB written, nothing under "
        f"the final name: {not target.exists()}"
    )
    seconds, _, _ = _measured(command)
    same = _digests(target) == expected
    print(f"started again: {seconds:.0f} s, every byte as without the interruption: {same}")
    whole = Source(source)
    digests = {name: _digest_of(whole, name) for name in whole.entries}
    shutil.rmtree(source)
    back = [sys.executable, "-m", "megatron_occ", "convert", "export", str(target), str(source)]
    seconds, peak, _ = _measured(back)
    _report("export", total, largest, seconds, peak)
    found = Source(source)
    same = found.entries.keys() == digests.keys() and all(
        _digest_of(found, name) == digest for name, digest in digests.items()
    )
    print(f"every tensor as in the source: {same}")


def _report(name: str, total: int, largest: int, seconds: float, peak: int) -> None:
    print(
        f"{name}: {seconds:.0f} s ({total / 1e6 / seconds:.0f} MB/s), peak resident memory "
        f"{peak / 1e9:.2f} GB, {(peak - largest) / 1e9:.2f} GB beyond the largest tensor"
    )


def _make(folder: Path, gigabytes: float, shards: int) -> tuple[list[Output], int]:
    folder.mkdir()
    layers = 1
    while _size(_plan(layers)) < gigabytes * 1e9:
        layers += 1
    plan = _plan(layers)
    block = torch.randn(_BLOCK // 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = split_into_shards(plan.outputs, -(-_size(plan) // shards))
    by_name = {output.name: output for output in plan.outputs}

    def read(name: str) -> torch.Tensor:
        output = by_name[name]
        first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:3], "little")
        numbers = output.bytes // 2
        turned = block.roll(first)
        return turned.repeat(-(-numbers // len(turned)))[:numbers].view(output.shape)

    for number, part in enumerate(parts):
        write_shard(folder / shard_name(number, len(parts)), part, read)
    write_index(folder, parts)
    (folder / "config.json").write_text(json.dumps(plan.content))
    return plan.outputs, len(parts)


def _plan(layers: int):  # noqa: ANN202
    model = replace(MODEL, num_layers=layers)
    return plan_export(_Anything(), model, 1, MODEL.vocab_size, architecture="MiMoForCausalLM")


def _size(plan) -> int:  # noqa: ANN001
    return sum(output.bytes for output in plan.outputs)


def _measured(command: list[str], kill_after: float | None = None) -> tuple[float, int, int]:
    """Seconds, peak resident bytes and exit code of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if kill_after is not None:
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code and kill_after is None:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024, code


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            found[str(file.relative_to(folder))] = hashlib.file_digest(
                stream, "blake2b"
            ).hexdigest()
    return found


def _digest_of(source: Source, name: str) -> str:
    tensor = source.tensor(name)
    return hashlib.blake2b(tensor.view(torch.uint8).numpy().data).hexdigest()


if __name__ == "__main__":
    main()
