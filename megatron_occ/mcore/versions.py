"""Which versions of Megatron-Core this package was tested with; another one is refused."""

from __future__ import annotations

import logging
import os
import re
from importlib.util import find_spec
from pathlib import Path

TESTED = ("0.16.1", "0.19.2")
ALLOW_UNTESTED = "MEGATRON_OCC_ALLOW_UNTESTED"

logger = logging.getLogger(__name__)


def require_tested_version() -> None:
    """Refuse an untested Megatron-Core before anything of it is imported.

    Raises:
        ValueError: no Megatron-Core, or a version that is not in ``TESTED`` while the environment
            variable ``MEGATRON_OCC_ALLOW_UNTESTED`` is not 1.
    """
    check_version(installed_version(), allow_untested=os.environ.get(ALLOW_UNTESTED) == "1")


def check_version(installed: str | None, *, allow_untested: bool) -> None:
    """Refuse what is not in ``TESTED``, or warn if that is allowed.

    Args:
        installed: see :func:`installed_version`.
        allow_untested: go on with a warning.

    Raises:
        ValueError: names the tested versions and how to override.
    """
    tested = " and ".join(TESTED)
    if installed is None:
        raise ValueError(
            f"megatron-core is not installed: pip install megatron-core=={TESTED[-1]} (Python 3.12 "
            f"or newer) or megatron-core=={TESTED[0]}"
        )
    if installed in TESTED:
        return
    if not allow_untested:
        raise ValueError(
            f"megatron-core {installed} is installed, and results were checked with {tested} only: "
            f"install one of these, or set {ALLOW_UNTESTED}=1 to go on with {installed}"
        )
    logger.warning("megatron-core %s was not tested (%s were): going on", installed, tested)


def check_written_by(written: str | None, installed: str | None) -> None:
    """Refuse a checkpoint of a newer Megatron-Core, which an older one can't read.

    Up to 0.18 the state that is common to all ranks lies in a file of its own, from 0.19 on among
    the tensors. Newer versions read both.

    Args:
        written: version that wrote the checkpoint; None if it does not say.
        installed: version that is to read it.

    Raises:
        ValueError: names both versions.
    """
    if written and installed and _number(written) > _number(installed):
        raise ValueError(
            f"the checkpoint was written with megatron-core {written}, and {installed} can't read "
            f"it: install megatron-core {written} or newer"
        )


def installed_version() -> str | None:
    """Version of the Megatron-Core that an import would bring, None if there is none.

    Read from its source. Package metadata would miss a checkout on ``PYTHONPATH``, and
    ``megatron.core.__version__`` takes on the commit of any git repository around the environment.
    """
    try:
        spec = find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    return version_in(Path(spec.origin).with_name("package_info.py"))


def version_in(package_info: Path) -> str:
    """Version that Megatron-Core's ``package_info.py`` states, ``unknown`` if it is not found."""
    text = package_info.read_text(encoding="utf-8") if package_info.is_file() else ""
    found = dict(re.findall(r"""(?m)^(MAJOR|MINOR|PATCH|PRE_RELEASE) *= *["']?(\w*)""", text))
    if not {"MAJOR", "MINOR", "PATCH"} <= found.keys():
        return "unknown"
    return f"{found['MAJOR']}.{found['MINOR']}.{found['PATCH']}{found.get('PRE_RELEASE', '')}"


def _number(version: str) -> tuple[int, ...]:
    """Its first two numbers, () if unknown: the format is that of a minor release."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
