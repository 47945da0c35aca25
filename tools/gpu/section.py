"""The process of one section: ``python -m tools.gpu.section``, started by ``main``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

from tools.gpu.bounds import SECTIONS
from tools.gpu.session import Session


def main() -> None:
    """Measure the section of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--part", action="append", default=[])
    options = parser.parse_args()
    # rows alone go where the caller looks: what libraries print goes to the log
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = Session(
        options.section,
        options.out,
        limit=options.limit,
        rehearse=options.rehearse,
        parts=options.part,
        told=told,
    )
    if options.section == "environment":
        # TransformerEngine reads them when it is imported: it says which attention it takes
        os.environ |= {"NVTE_DEBUG": "1", "NVTE_DEBUG_LEVEL": "1"}
    importlib.import_module(f"tools.gpu.{options.section}").measure(session)
    told.flush()
    sys.stderr.flush()
    # threads and children of libraries must not hold the table up
    os._exit(0)


if __name__ == "__main__":
    main()
