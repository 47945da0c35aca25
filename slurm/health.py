"""Whether a node can do its part of a job; ``slurm/health.sh`` runs this on each node before it.

    python slurm/health.py --folder DIR --gpus 8 --free-memory 50 --free-gpu-memory 90

Prints ``healthy``, or ``unhealthy: ...`` with all that is wrong, and exits with 1. What hangs here,
as a dead disk or GPU may, is ended from outside.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_MIB = 2**20
# integers below 7 have exact products and sums in every precision of matrix units: 6 * 6 * 256
_SIZE, _MODULUS = 256, 7


def main() -> None:
    """Check this node."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="a folder of the run, on disk")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs that must be there")
    parser.add_argument("--free-memory", type=float, required=True, help="percent of the node's")
    parser.add_argument("--free-gpu-memory", type=float, required=True, help="percent of a GPU's")
    options = parser.parse_args()
    found = [
        *disk_problems(options.folder),
        *disk_problems(Path(tempfile.gettempdir())),
        *memory_problems(Path("/proc/meminfo"), options.free_memory),
        *device_problems(options.gpus, options.free_gpu_memory),
    ]
    print(f"unhealthy: {'; '.join(found)}" if found else "healthy", flush=True)
    sys.exit(1 if found else 0)


def disk_problems(folder: Path) -> Iterator[str]:
    """Writes a MiB to a file of this node in ``folder``, and reads it back."""
    file, content = folder / f".health_{socket.gethostname()}_{os.getpid()}", os.urandom(_MIB)
    try:
        with file.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        if file.read_bytes() != content:
            yield f"{folder} gives back something else than was written"
    except OSError as error:
        yield f"{folder} can't be written: {error.strerror}"
    finally:
        file.unlink(missing_ok=True) if folder.is_dir() else None


def memory_problems(file: Path, percent: float) -> Iterator[str]:
    """Compares what Linux calls available with ``percent`` of all memory; elsewhere nothing."""
    if not file.exists():
        return
    lines = (line.split() for line in file.read_text().splitlines())
    sizes = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
    free, total = sizes["MemAvailable"], sizes["MemTotal"]
    yield from _too_little("memory", free * 1024, total * 1024, percent)


def _too_little(what: str, free: int, total: int, percent: float) -> Iterator[str]:
    if 100 * free < percent * total:
        yield f"only {free >> 30} of {total >> 30} GiB of {what} are free, not {percent:g} %"


def device_problems(gpus: int, percent: float) -> Iterator[str]:
    """Counts GPUs, and has each, or the CPU, multiply two matrices."""
    # imported late, so that what is wrong with disks is found before torch hangs on them
    import torch

    if not gpus:
        yield from product_problems("cpu")
        return
    found = torch.cuda.device_count()
    if found != gpus:
        yield f"{found} of {gpus} GPUs are visible"
    for index in range(found):
        name = f"GPU {index}"
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            yield f"{name}: {_first_line(error)}"
            continue
        yield from _too_little(f"{name}'s memory", free, total, percent)
        yield from product_problems(f"cuda:{index}", name)


def product_problems(
    device: str, name: str = "CPU", multiply: Callable | None = None
) -> Iterator[str]:
    """Multiplies matrices of small integers [256, 256], whose product is exact in fp32.

    Args:
        device: of torch.
        name: of the device, for the message.
        multiply: in place of torch's product of matrices.
    """
    import torch

    integers = torch.arange(_SIZE * _SIZE).reshape(_SIZE, _SIZE) % _MODULUS
    try:
        matrix = integers.to(device, torch.float32)
        product = (multiply or torch.matmul)(matrix, matrix.T).to("cpu", torch.int64)
    except RuntimeError as error:
        yield f"{name}: {_first_line(error)}"
        return
    if not torch.equal(product, integers @ integers.T):
        yield f"{name} multiplies matrices wrongly"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


if __name__ == "__main__":
    main()
