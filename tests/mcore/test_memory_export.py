"""Weights gathered over the process group are those of a folder, to the bit, from any layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.slots import Slot
from megatron_occ.mcore.export import HuggingFaceExport
from megatron_occ.mcore.gathering import GatheringReader
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.mcore.memory_export import MemoryExport
from megatron_occ.mcore.startup import initialize
from megatron_occ.rollout.engine import EngineError
from megatron_occ.rollout.remote.arrival import opened, tensors_of
from megatron_occ.rollout.remote.carriers import MemoryCarrier
from tests.mcore.conftest import small_config
from tests.mcore.distributed import run_ranks
from tests.mcore.test_export import TOKENIZER, build

# bytes: less than the largest tensor has
BUCKET = 1000
EXPERTS = {
    "num_experts": 4,
    "ffn_hidden_size": 16,
    "expert_bias": True,
    "score_function": "sigmoid",
}
CASES = {
    "one process": (1, {}, {}),
    "TP2": (2, {"tensor": 2}, {}),
    "PP2": (2, {"pipeline": 2}, {"tie_embeddings": False}),
    "CP2": (2, {"context": 2}, {}),
    "DP2": (2, {}, {"mtp_reads": "before"}),
    "EP2": (2, {"expert": 2}, {"qk_layernorm": True, "moe": EXPERTS}),
    "TP2 x PP2": (4, {"tensor": 2, "pipeline": 2}, {"qkv_bias": True}),
}


def configured(parallel, settings):
    config = small_config(1)
    for key, value in settings.items():
        for name, inner in value.items() if isinstance(value, dict) else ():
            setattr(config.model.moe, name, inner)
        if not isinstance(value, dict):
            setattr(config.model, key, value)
    for key, value in parallel.items():
        setattr(config.parallel, key, value)
    config.rl.rollout.engine = "vllm"
    return config


def arrived(shipment):
    """Name and tensor of everything, and of what a drafter is given."""
    with opened(shipment.manifest, as_text(shipment)) as source:
        return [
            {n: t.clone() for n, t in tensors_of(shipment.manifest, source, for_drafter=only)}
            for only in (False, True)
        ]


def as_text(shipment):
    return json.dumps(shipment.source_for("http://127.0.0.1:1"))


def both_ways(folder, parallel, settings):
    config, folder = configured(parallel, settings), Path(folder)
    actor = build(config, initialize(config))
    main = MainRank()
    written = HuggingFaceExport(actor, main, folder / "staged", TOKENIZER)
    written.stage()
    gathered = MemoryExport(actor, main, TOKENIZER, BUCKET)
    # a second time for the same room
    gathered.stage()
    gathered.stage()
    if not main.is_this:
        return None
    written.write(folder)
    carrier = MemoryCarrier(gathered.take)
    found, drafter = arrived(carrier.publish(3))
    carrier.close()
    return found, sorted(drafter)


@pytest.mark.parametrize("name", CASES)
def test_gathered_weights_are_those_of_the_folder(tmp_path, name):
    ranks, parallel, settings = CASES[name]
    (found, drafter), *rest = run_ranks(both_ways, ranks, str(tmp_path), parallel, settings)
    assert rest == [None] * (ranks - 1)
    expected = {}
    for file in tmp_path.glob("*.safetensors"):
        expected |= load_file(file)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    trunk = {key for key in expected if key.startswith(("model.layers.0.", "model.layers.1."))}
    assert drafter == sorted(expected.keys() - trunk)


def no_room():
    config = configured({}, {})
    actor, main = build(config, initialize(config)), MainRank()
    export = MemoryExport(actor, main, TOKENIZER)

    def refuse(plan):
        raise EngineError("no memory for 7 GB of weights")

    export._make_room = refuse
    with pytest.raises(EngineError, match="no memory for 7 GB"):
        export.stage()
    reader = GatheringReader(actor, main)
    lacking = Slot("a", "a.weight", (2,), (2,), (0,))
    other = "decoder.final_layernorm.weight"
    with pytest.raises(FolderError, match=r"(?s)no a\.weight.*layernorm.weight is \[32\]"):
        reader.check([lacking, Slot(other, other, (2,), (2,), (0,))])
    return True


def test_a_main_rank_without_room_ends_all_ranks():
    assert run_ranks(no_room, 2) == [True, True]
