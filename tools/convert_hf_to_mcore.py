"""Hugging Face folder to a Megatron-Core checkpoint: ``megatron-occ convert import``.

python tools/convert_hf_to_mcore.py --help
"""

from __future__ import annotations

import sys

from megatron_occ.commands.convert import main

if __name__ == "__main__":
    main(["import", *sys.argv[1:]])
