"""A checkpoint converted by one process, loaded by several; and what several trained, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_occ.config.identity import describe
from megatron_occ.convert.checkpoints import export_checkpoint
from megatron_occ.convert.importing import import_folder
from megatron_occ.convert.plan import MTPChoice, read_model
from megatron_occ.convert.source import Source
from megatron_occ.losses.heads import LossReport
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_weights
from megatron_occ.mcore.startup import initialize
from megatron_occ.rl.batch import head_masks
from tests.mcore.conftest import random_ids, write_checkpoint
from tests.mcore.convert_configs import VOCABULARY
from tests.mcore.convert_folders import (
    chosen,
    make_folder,
    read_tensors,
    reference_logits,
)
from tests.mcore.distributed import run_ranks

ROWS = [[0, 1], [2, 3]]
LAYOUTS = {
    "TP2 x PP2": ("mimo", {"tensor": 2, "pipeline": 2, "pipeline_layout": "Ett|tmmL"}, 4),
    "EP2": ("glm", {"expert": 2}, 2),
    "TP2 + SP": ("deepseek", {"tensor": 2, "sequence": True}, 2),
}


def load_and_save(folder, checkpoint, saved, layout):
    """On each rank: log-probs of main head and depths; the weights are saved again."""
    source = Source(Path(folder))
    _, config = read_model(source.folder, source.config)
    config.mtp.num_layers = 2
    for key, value in layout.items():
        setattr(config.parallel, key, value)
    actor = MegatronGPTActor(
        config, VOCABULARY, initialize(config), optimizer=config.rl.optimizer, total_updates=1
    )
    meta = describe(config, None, {})
    load_weights(Path(checkpoint), actor, meta)
    ids = random_ids()
    main = actor.get_inference_log_probs(ids, parts=ROWS, lengths=None, temperature=1.0)
    passes = actor.get_loss_and_metrics(
        [actor.micro_batch(ids[rows], masks(ids[rows]), passes=((False, True),)) for rows in ROWS],
        depth_sums,
        forward_only=True,
    )
    write_checkpoint(Path(saved), 1, actor, {}, meta)
    return main, passes.metrics


def masks(ids):
    return head_masks(torch.ones(ids.shape), 2)


def depth_sums(outputs, mask):
    """Sum of the log-probs of each depth over the tokens that it can predict."""
    found = {
        f"depth_{k}": (depth * mask[k]).sum() for k, depth in enumerate(outputs.passes[0], start=1)
    }
    return outputs.logprobs.sum(), LossReport(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_logits_and_exports_the_same_weights(tmp_path, layout):
    name, parallel, ranks = LAYOUTS[layout]
    folder = make_folder(tmp_path / "hf", name, 2)
    import_folder(folder, tmp_path / "mcore", mtp=MTPChoice("keep"))
    arguments = [str(tmp_path / each) for each in ("hf", "mcore", "run")]
    found, metrics = run_ranks(load_and_save, ranks, *arguments, parallel)[0]
    ids = random_ids()
    expected = reference_logits(folder, ids, 2)
    torch.testing.assert_close(found[:, :-1], chosen(expected[0], ids), atol=1e-5, rtol=1e-5)
    # data-parallel ranks have the same rows here
    copies = 2 if layout == "EP2" else 1
    for depth in (1, 2):
        length = ids.size(1) - 1 - depth
        targets = ids[:, 1 + depth :].unsqueeze(-1)
        total = expected[depth][:, :length].log_softmax(-1).gather(-1, targets).sum()
        assert float(metrics[f"depth_{depth}"]) == pytest.approx(copies * float(total), rel=1e-5)
    export_checkpoint(tmp_path / "run" / "step_000001", tmp_path / "back", like=folder)
    tensors, source = read_tensors(tmp_path / "back"), read_tensors(folder)
    assert tensors.keys() == source.keys()
    assert all(torch.equal(tensors[key], source[key]) for key in source)
