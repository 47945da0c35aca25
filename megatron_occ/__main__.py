"""``python -m megatron_occ``."""

from megatron_occ.cli import main

if __name__ == "__main__":
    main()
