"""The product's command line, and the memory that the command took.

python -m tools.gpu.cli MEMORY.json rl --config FILE key=value ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_occ.cli import main as command_line
from tools.gpu.results import write_json


def main() -> None:
    """Run the command; it ends as it ends."""
    file, *arguments = sys.argv[1:]
    try:
        command_line(arguments)
    finally:
        from tools.gpu.device import peak_bytes

        write_json(Path(file), {"peak": peak_bytes()})


if __name__ == "__main__":
    main()
