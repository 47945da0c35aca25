"""Checkpoint of this project to a Hugging Face folder: ``megatron-occ convert export``.

python tools/convert_mcore_to_hf.py --help
"""

from __future__ import annotations

import sys

from megatron_occ.commands.convert import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
