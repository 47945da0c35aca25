"""What a Hugging Face folder or a checkpoint holds: ``megatron-occ convert inspect``.

python tools/inspect_checkpoint.py --help
"""

from __future__ import annotations

import sys

from megatron_occ.commands.convert import main

if __name__ == "__main__":
    main(["inspect", *sys.argv[1:]])
