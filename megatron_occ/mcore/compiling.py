"""Whether torch can make kernels of its own on this machine."""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path


@functools.cache
def compiles() -> bool:
    """Whether torch can compile a kernel here: Triton needs a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return bool(compiler) and headers.is_file() and find_spec("triton") is not None
