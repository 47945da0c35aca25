"""Install this checkout with its pinned versions, but keep a torch that is already there.

``python tools/install.py --create DIR`` makes a virtual environment (one that sees the torch of the
interpreter it is made with, as in a vendor's container); ``tools/install.py``, run by that
environment's Python, installs with the versions that are pinned for it.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# as in setup.py
OLDEST_PYTHON, OLDEST_TORCH, FIRST_REFUSED_TORCH = (3, 11), (2, 6), (3, 0)
# the newest tested megatron-core needs it
FIRST_WITH_LATEST = (3, 12)


def usable_torch() -> str | None:
    """Version of an installed torch within the range of setup.py, else None."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return version if OLDEST_TORCH <= release < FIRST_REFUSED_TORCH else None


def pins_for(python: tuple[int, ...]) -> str:
    """Name of the file with the versions that are pinned for a version of Python.

    Raises:
        SystemExit: too old a Python.
    """
    if python < OLDEST_PYTHON:
        wanted, found = (".".join(map(str, version)) for version in (OLDEST_PYTHON, python))
        raise SystemExit(
            f"{sys.executable} is Python {found}, and {wanted} or newer is needed: make ... "
            "PYTHON=/path/to/python3.11"
        )
    return "constraints.txt" if python < FIRST_WITH_LATEST else "constraints-latest.txt"


def create(folder: str) -> None:
    """Make a virtual environment, on top of the interpreter's own packages if torch is there."""
    venv.create(folder, with_pip=True, system_site_packages=usable_torch() is not None)


def install(file: str) -> None:
    """Install the package in editable mode with its development tools, pinned as in ``file``."""
    pins = (ROOT / file).read_text()
    kept = usable_torch()
    if kept is not None:
        print(f"keeping torch {kept}", flush=True)
        pins = re.sub(r"(?m)^torch==.*$", f"torch=={kept}", pins)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(pins)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "-c", str(constraints)]
        if kept is None:
            # torch first and alone: a later resolver run must not pick another build of it
            pin = re.search(r"(?m)^torch==.*$", pins)
            assert pin is not None, f"{file} pins torch"
            subprocess.run([*pip, pin[0]], check=True)
        subprocess.run([*pip, "-e", f"{ROOT}[dev]"], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--create"]:
        pins_for(sys.version_info[:2])
        create(sys.argv[2])
    else:
        install(pins_for(sys.version_info[:2]))
