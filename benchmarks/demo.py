"""What the demo reaches: sampled pass@1 before and after RL for several seeds, and its plot.

Runs ``megatron-occ demo`` once a seed (a finished run in the folder is taken as it is), prints a
table and writes the README's figure.

    python benchmarks/demo.py [--seeds 0 1 2] [--folder runs/demo_seeds] [--plot docs/demo.svg]
                              [key=value ...]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from megatron_occ.observe import Series, write_plot
from megatron_occ.observe.run_data import accuracy_change, load_run


def main() -> None:
    """Run the seeds, then tabulate and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    print(f"{'seed':>4} {'pretrained':>10} {'after RL':>8} {'points':>7} {'minutes':>7}")
    gains, curves = [], []
    for color, seed in enumerate(options.seeds, start=1):
        folder = options.folder / f"seed_{seed}"
        if not (folder / "report.html").is_file():
            _run(folder, seed, options.overrides)
        run = load_run(folder)
        minutes = run.wall_seconds / 60
        before, after = accuracy_change(run)
        gains.append(after - before)
        print(f"{seed:>4} {before:>10.1%} {after:>8.1%} {gains[-1]:>+7.1%} {minutes:>7.1f}")
        curves.append(Series(f"seed {seed}", run.points("validation", "pass@1"), color=color))
    print(f"median gain {statistics.median(gains):+.1%}, smallest {min(gains):+.1%}")
    if options.plot:
        title = "Sampled pass@1 on 512 held-out multiplications during RL"
        write_plot(options.plot, curves, title=title, x_label="RL step", percent=True)


def _run(folder: Path, seed: int, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "megatron_occ", "demo"]
    subprocess.run([*command, f"run_dir={folder}", f"seed={seed}", *overrides], check=True)


if __name__ == "__main__":
    main()
