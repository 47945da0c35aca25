"""``python -m megatron_occ``."""

from megatron_occ.cli import main

if __name__ == "__main__":
    # as of a script: processes that multiprocessing starts anew then import this file, and end with
    # the run (see rl/stopping.py); it leaves out modules of this name
    __spec__ = None
    main()
