"""The dry run's estimate for one rank as json: ``python -m tools.gpu.estimate ASKED``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_occ.config import load_config
from megatron_occ.data.from_config import read_task, read_tokenizer
from megatron_occ.mcore.estimate.ranks import estimate


def main() -> None:
    """Print it as the last line."""
    asked = json.loads(sys.argv[1])
    config = load_config([Path(file) for file in asked["files"]], asked["overrides"])
    vocabulary = asked["vocabulary"]
    if vocabulary is None:
        vocabulary = read_tokenizer(config, read_task(config)).vocab_size
    memory = estimate(config, vocabulary, 1, 0).memory
    print(json.dumps({n: getattr(memory, n) for n in ("resident", "training", "generation")}))


if __name__ == "__main__":
    main()
