"""Check this project on a GPU within minutes: numbers, runs, speed, memory. See docs/gpu.md.

python tools/gpu_check.py [--rehearse] [--only SECTION[:PART],...] [--out runs/gpu_check]
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.gpu.main import main

if __name__ == "__main__":
    # so that the section under way ends with this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
