"""Memory and time of the loss over a large vocabulary, against the straightforward computation.

Both sides go forward and backward from the hidden states [s, h] of 1+K heads and one output weight
[V, h]: log-probs of all heads, entropy of the main one. The straightforward side is what a plain
PyTorch trainer writes: logits in fp32, ``log_softmax``, ``gather``; autograd keeps the rest.

Extra memory is the peak of allocated bytes less what is left at the end: hidden states, weight and
their gradients, which both sides must make (``.grad`` is empty at the start). "with grads" leaves
the gradients in. On the CPU the peak comes from the allocator's events, and "resident" is the rise
of the process's resident memory over the same run, gradients included, as a cross-check. On CUDA
it is ``max_memory_allocated``.

Gradients are compared first, in fp32 and at a size small enough for both but of many tiles. Timed
runs alternate; the table gives medians of seconds and the median of ratios. "CPU s" is the
processor time of all threads: less disturbed by others on the machine than seconds are.

    python -m benchmarks.loss_memory [--sequence 4096] [--vocabulary 151936] [--depths 2]
        [--hidden 1024] [--dtype bfloat16] [--rounds 3] [--threads 2] [--no-scaling] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_occ.mcore.vocabulary import logprobs
from megatron_occ.mcore.vocabulary.logprobs import HeadTokens, VocabShard, head_statistics

TOLERANCE = 1e-5
ENTROPY_WEIGHT = 0.01
MIB = 2**20
CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Size:
    """Tokens, vocabulary, MTP depths, width and precision."""

    sequence: int
    vocabulary: int
    depths: int
    hidden: int
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Memory:
    """MiB: peak less what is left, peak with the gradients that are left, resident."""

    extra: float
    with_grads: float
    resident: float | None


class Inputs:
    """Hidden states and targets of all heads, and the weight."""

    def __init__(self, size: Size) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype, device = getattr(torch, size.dtype), "cuda" if CUDA else "cpu"

        def normal(rows: int, scale: float) -> Tensor:
            values = torch.randn(rows, size.hidden, generator=generator).mul_(scale)
            return values.to(device, dtype).requires_grad_()

        def ids() -> Tensor:
            shape = (size.sequence,)
            return torch.randint(0, size.vocabulary, shape, generator=generator).to(device)

        heads = range(1 + size.depths)
        self.weight = normal(size.vocabulary, 2 / size.hidden**0.5)
        self.hidden = [normal(size.sequence, 1.0) for _ in heads]
        self.targets = [ids() for _ in heads]
        # advantages: a weight for each token
        self.scales = [torch.randn(size.sequence, generator=generator).to(device) for _ in heads]

    def leaves(self) -> list[Tensor]:
        """What gets a gradient."""
        return [self.weight, *self.hidden]

    def forget(self) -> None:
        """Drop all gradients."""
        for leaf in self.leaves():
            leaf.grad = None

    def loss(self, found: list[Tensor], entropy: Tensor) -> Tensor:
        """A loss that uses log-probs of all heads and the main head's entropy."""
        terms = [(x * scale).sum() for x, scale in zip(found, self.scales, strict=True)]
        return -sum(terms) - ENTROPY_WEIGHT * entropy.sum()


def straightforward(inputs: Inputs) -> None:
    """Forward and backward, as a plain PyTorch trainer writes it."""
    found, entropy = [], None
    for hidden, targets in zip(inputs.hidden, inputs.targets, strict=True):
        log_probs = (hidden @ inputs.weight.t()).float().log_softmax(-1)
        found.append(log_probs.gather(-1, targets[:, None]).squeeze(-1))
        if entropy is None:
            entropy = -(log_probs.exp() * log_probs).sum(-1)
        del log_probs
    inputs.loss(found, entropy).backward()


def ours(inputs: Inputs) -> None:
    """Forward and backward by this project."""
    pairs = zip(inputs.hidden, inputs.targets, strict=True)
    heads = [HeadTokens(x, y, entropy=k == 0) for k, (x, y) in enumerate(pairs)]
    results = head_statistics(heads, inputs.weight, VocabShard(0, inputs.weight.size(0)))
    inputs.loss([result.logprobs for result in results], results[0].entropy).backward()


SIDES = {"straightforward": straightforward, "ours": ours}


def peak_memory(run: Callable[[Inputs], None], inputs: Inputs) -> Memory:
    """Peak of one forward and backward pass above the inputs."""
    inputs.forget()
    gc.collect()
    peak, resident = (_cuda_peak if CUDA else _cpu_peak)(lambda: run(inputs))
    left = sum(leaf.grad.nbytes for leaf in inputs.leaves())
    return Memory((peak - left) / MIB, peak / MIB, resident)


def _cuda_peak(run: Callable[[], None]) -> tuple[int, None]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, None


def _cpu_peak(run: Callable[[], None]) -> tuple[int, float | None]:
    before = _reset_resident_peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    resident = None if before is None else (_status("VmHWM") - before) / MIB
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, resident


def _reset_resident_peak() -> int | None:
    """Resident bytes now; None where the kernel does not let the peak be reset."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024


def gradient_deviation() -> float:
    """Largest deviation in fp32, relative to the largest entry of that tensor."""
    inputs = Inputs(Size(300, 5003, 2, 64, "float32"))
    gradients = []
    # some 100 tiles a head
    with mock.patch.object(logprobs, "CHUNK_LOGITS", 2**14):
        for run in SIDES.values():
            inputs.forget()
            run(inputs)
            gradients.append([leaf.grad for leaf in inputs.leaves()])
    return max(
        float((found - expected).abs().max() / expected.abs().max())
        for expected, found in zip(*gradients, strict=True)
    )


def _seconds(run: Callable[[Inputs], None], inputs: Inputs) -> tuple[float, float]:
    inputs.forget()
    gc.collect()
    if CUDA:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(inputs)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, float("nan")
    wall, processor = time.perf_counter(), time.process_time()
    run(inputs)
    return time.perf_counter() - wall, time.process_time() - processor


def compare(size: Size, rounds: int) -> dict:
    """Print memory and time of both sides."""
    inputs = Inputs(size)
    memory = {name: peak_memory(run, inputs) for name, run in SIDES.items()}
    runs = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, run in SIDES.items():
            runs[name].append(_seconds(run, inputs))
            print(f"  {name}: {runs[name][-1][0]:.1f} s", flush=True)
    print(f"{'':<16}{'extra MiB':>10}{'with grads':>11}{'resident':>10}{'s':>8}{'CPU s':>8}")
    for name, found in memory.items():
        wall, processor = (statistics.median(x) for x in zip(*runs[name], strict=True))
        resident = "" if found.resident is None else f"{found.resident:.0f}"
        print(
            f"{name:<16}{found.extra:>10.0f}{found.with_grads:>11.0f}{resident:>10}"
            f"{wall:>8.2f}{processor:>8.2f}"
        )
    plain, mine = memory.values()
    pairs = list(zip(*runs.values(), strict=True))
    time_ratio, processor_ratio = (
        statistics.median(b[i] / a[i] for a, b in pairs) for i in range(2)
    )
    print(
        f"extra memory {plain.extra / mine.extra:.1f} times less "
        f"({plain.with_grads / mine.with_grads:.1f} times with gradients), "
        f"time {time_ratio:.2f} times (CPU time {processor_ratio:.2f} times)"
    )
    return {
        "size": asdict(size),
        "memory": {name: asdict(found) for name, found in memory.items()},
        "runs": runs,
        "memory_ratio": plain.extra / mine.extra,
        "time_ratio": time_ratio,
        "cpu_time_ratio": processor_ratio,
    }


def scaling(base: Size) -> list[dict]:
    """Print how the extra memory of both sides grows, from a quarter of the given sequence on."""
    small = replace(base, sequence=base.sequence // 4)
    sizes = [
        small,
        replace(small, depths=1),
        replace(small, depths=4),
        replace(small, vocabulary=base.vocabulary // 2),
        replace(small, sequence=small.sequence // 2),
    ]
    rows = []
    print(f"{'s':>8}{'V':>8}{'K':>4}{'straightforward':>17}{'ours':>8}   extra MiB")
    for size in sizes:
        inputs = Inputs(size)
        plain, mine = (peak_memory(run, inputs).extra for run in SIDES.values())
        rows.append({"size": asdict(size), "straightforward": plain, "ours": mine})
        print(
            f"{size.sequence:>8}{size.vocabulary:>8}{size.depths:>4}{plain:>17.0f}{mine:>8.0f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--depths", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-scaling", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # the first use of the profiler and of each kernel costs time and memory
    peak_memory(ours, Inputs(Size(8, 64, 0, 8, options.dtype)))
    deviation = gradient_deviation()
    print(f"fp32 gradients: largest deviation {deviation:.1e} of a tensor's largest entry")
    assert deviation <= TOLERANCE, deviation
    size = Size(options.sequence, options.vocabulary, options.depths, options.hidden, options.dtype)
    results = {"gradient_deviation": deviation, "scaling": []}
    if not options.no_scaling:
        results["scaling"] = scaling(size)
    print(f"s = {size.sequence}, V = {size.vocabulary}, K = {size.depths}, {size.dtype}")
    results |= compare(size, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
