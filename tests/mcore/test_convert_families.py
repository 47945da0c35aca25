"""Converted checkpoints of every family against implementations that nobody here wrote."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_occ.config.identity import describe
from megatron_occ.convert.checkpoints import export_checkpoint
from megatron_occ.convert.importing import import_folder
from megatron_occ.convert.plan import MTPChoice
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_weights
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.rl.batch import head_targets
from tests.mcore.conftest import positions, random_ids
from tests.mcore.convert_configs import CONFIGS, FAMILIES_WITH_MTP, VOCABULARY
from tests.mcore.convert_folders import (
    chosen,
    load_model,
    make_folder,
    read_tensors,
    reference_logits,
    write_tensors,
)
from tests.mcore.convert_renamed import as_ling2

CASES = [(name, 0) for name in CONFIGS] + [
    (name, depths) for name, each in FAMILIES_WITH_MTP.items() for depths in each
]


def load(checkpoint, config, layout, vocab_size=23):
    """Actor on the weights of a converted checkpoint."""
    with torch.enable_grad():
        actor = MegatronGPTActor(
            config, vocab_size, layout, optimizer=config.rl.optimizer, total_updates=1
        )
    load_weights(checkpoint, actor, describe(config, None, {}))
    return actor


def convert(folder, target, mtp="keep", **options):
    plan = import_folder(folder, target, mtp=MTPChoice.parse(mtp), **options).plan
    return plan.config


@torch.no_grad()
def logprobs(actor, ids):
    """[1 + K] log-probs of the targets, [b, s] each in the source frame."""
    (model,) = actor.chunks
    outputs = model.eval()(
        ids, positions(ids), None, request=HeadRequest(head_targets(ids, actor.num_depths))
    )
    return [outputs.logprobs, *(outputs.passes[0] if actor.num_depths else ())]


@pytest.mark.parametrize(("name", "depths"), CASES)
def test_every_head_gives_the_logits_of_the_reference(layout, tmp_path, name, depths):
    folder = make_folder(tmp_path / "hf", name, depths, shards=2)
    config = convert(folder, tmp_path / "mcore")
    assert config.mtp.num_layers == depths
    ids = random_ids()
    found = every_logprob(load(tmp_path / "mcore", config, layout), ids)
    expected = reference_logits(folder, ids, depths)
    assert len(found) == len(expected) == 1 + depths
    for depth, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        length = ids.size(1) - depth
        assert theirs.shape == (len(ids), length, VOCABULARY)
        theirs = theirs.log_softmax(-1)
        torch.testing.assert_close(ours[:, :length], theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def every_logprob(actor, ids):
    """[1 + K] log-probs of every token of the vocabulary at every position, [b, s, v] each."""
    (model,), depths, found = actor.chunks, actor.num_depths, []
    given, rows = head_targets(ids, depths), ids.repeat(VOCABULARY, 1)
    for depth in range(1 + depths):
        # depth k reads the targets of the depths before it; its own is the token asked for
        targets = given.repeat(1, VOCABULARY, 1)
        targets[depth] = torch.arange(VOCABULARY).repeat_interleave(len(ids)).unsqueeze(1)
        outputs = model.eval()(rows, positions(rows), None, request=HeadRequest(targets))
        heads = (outputs.logprobs, *(outputs.passes[0] if depths else ()))
        found.append(heads[depth].view(VOCABULARY, len(ids), -1).permute(1, 2, 0))
    return found


def assert_equal(found, expected, ids):
    """Log-probs of each head against its reference logits."""
    assert len(found) == len(expected)
    for depth, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        ours = ours[:, : ids.size(1) - 1 - depth]
        torch.testing.assert_close(ours, chosen(theirs, ids, 1 + depth), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depths", [1, 2])
def test_ling_2_is_glm_by_other_names(layout, tmp_path, depths):
    """Nobody but its own authors implements it, so it is compared with what it is made of."""
    glm = make_folder(tmp_path / "glm", "glm groups", depths)
    config = convert(as_ling2(glm, tmp_path / "ling", depths), tmp_path / "mcore")
    ids = random_ids()
    found = logprobs(load(tmp_path / "mcore", config, layout), ids)
    assert_equal(found, reference_logits(glm, ids, depths), ids)


@pytest.mark.parametrize("name", FAMILIES_WITH_MTP)
def test_swapped_halves_of_the_projection_are_noticed(layout, tmp_path, name):
    """A wrong order survives a round trip; the reference knows."""
    folder = make_folder(tmp_path / "hf", name, 1)
    tensors = read_tensors(folder)
    (projection,) = [n for n in tensors if n.endswith(("eh_proj.weight", "input_proj.weight"))]
    ids, expected = random_ids(), reference_logits(folder, random_ids(), 1)
    tensors[projection] = torch.cat(tensors[projection].chunk(2, dim=1)[::-1], dim=1)
    write_tensors(folder, tensors)
    config = convert(folder, tmp_path / "mcore")
    found = logprobs(load(tmp_path / "mcore", config, layout), ids)
    assert_equal(found[:1], expected[:1], ids)
    with pytest.raises(AssertionError):
        assert_equal(found, expected, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "depths"), [*CASES, ("ling", 2)])
def test_there_and_back_every_tensor_is_the_same_to_the_bit(tmp_path, name, depths, dtype):
    if name == "ling":
        glm = make_folder(tmp_path / "glm", "glm groups", depths)
        folder = as_ling2(glm, tmp_path / "hf", depths)
    else:
        folder = make_folder(tmp_path / "hf", name, depths)
    tensors = {key: tensor.to(dtype) for key, tensor in read_tensors(folder).items()}
    write_tensors(folder, tensors, shards=3)
    convert(folder, tmp_path / "mcore", part=10_000)
    export_checkpoint(tmp_path / "mcore", tmp_path / "back", shard=20_000)
    found = read_tensors(tmp_path / "back")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == dtype
        assert torch.equal(found[key], tensor), key
    content = json.loads((tmp_path / "back" / "config.json").read_text())
    assert content.get("num_nextn_predict_layers", 0) == depths
    if name != "ling":
        ids = random_ids()
        expected, model = load_model(folder)(ids).logits, load_model(tmp_path / "back")
        assert torch.equal(model(ids).logits, expected)
