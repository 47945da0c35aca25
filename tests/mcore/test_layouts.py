"""A few layouts of every kind through RL updates, each against one process.

All of them: ``python -m benchmarks.layout_invariance``.
"""

from __future__ import annotations

import pytest

from benchmarks.layout_cases import CASES
from benchmarks.layout_invariance import COLUMNS, LIMIT, compare

NAMES = (
    "1 process, full recompute, packed",
    "TP2 + SP, packed",
    "TP2 + SP, sampling masks",
    "PP2, untied, packed, K=2",
    "PP2 x VPP2, tied",
    "PP2 x VPP2, a chunk without layers",
    "PP2, no MTP training, overlapped reduction",
    "CP2, packed, soft CE head",
    "CP2, packed, CISPO, tokens rejected",
    "DP2, packed, SAPO, weights of sequences",
    "DP2, overlapped reduction, packed",
    "DP2, distributed optimizer",
    "DP2, head alone, distributed optimizer",
    "TP2 + SP, head alone, packed",
    "CP2, head alone, full recompute",
    "PP2, head alone, distributed optimizer",
    "PP2 x VPP2, head alone",
    "PP3, head alone, MTP stage of its own",
    "PP3, MTP reads before the norm, MTP stage of its own",
    "PP3, head alone, MTP reads before the norm, MTP stage of its own",
    "PP2 x VPP2, MTP reads before the norm, a chunk without layers",
    "CP2, packed, MTP reads before the norm",
    "MoE, EP2, head alone",
    "MoE, EP2",
    "MoE, EP2, experts replayed, packed",
    "MoE, PP2, experts replayed, packed, recompute",
    "MoE, TP2 + SP, experts of old log-probs",
    "MoE, CP2, experts of old log-probs, packed",
    "MoE, EP2, balance loss",
    "MoE, TP2 + SP, balance loss",
    "MoE, CP2, balance loss, packed",
    "MoE, PP2, balance loss, packed, recompute",
    "MLA, CP2, packed",
    "PP3, MTP stage of its own",
    "TP2 x PP2",
    "TP2 x PP2, MTP reads before the norm",
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    cases = [case for case in CASES if case.name in NAMES]
    return compare(cases, tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("name", NAMES)
def test_updates_are_those_of_one_process(measured, name):
    found = measured[name]
    for column in COLUMNS:
        deviation = getattr(found, column)
        assert deviation <= LIMIT, (column, found.worst)
