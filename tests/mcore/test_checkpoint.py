"""Checkpoints: complete or absent, refused where they don't fit, random state included."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time

import pytest
import torch

from megatron_occ.config.identity import describe
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import DamagedCheckpointError, load_checkpoint, load_weights
from megatron_occ.mcore.checkpoint_folder import Keep, damage, list_checkpoints, set_aside
from megatron_occ.mcore.checkpoint_process import _write
from megatron_occ.mcore.checkpoint_writer import CheckpointWriteError, CheckpointWriter
from tests.mcore.conftest import VOCABULARY, small_config


@pytest.fixture
def actor(layout):
    return make_actor(layout)


def make_actor(layout, depths=1):
    config = small_config(depths)
    actor = MegatronGPTActor(
        config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=10
    )
    actor.finish_training_step()
    return actor


def meta(config=None, **changes):
    return {**describe(config or small_config(1), {"kind": "char"}, {"corpus": "a1"}), **changes}


def writer(folder, actor, keep=2, **options):
    options = {"background": False, **options}
    return CheckpointWriter(folder, actor, meta(), keep=Keep(keep), **options)


def save(folder, step, actor, keep=2):
    return writer(folder, actor, keep).save(step, {"step": step})


def test_weights_trainer_and_random_state_come_back(actor, tmp_path):
    path = save(tmp_path, 3, actor)
    expected = {n: p.clone() for n, p in actor.chunks[0].named_parameters()}
    drawn = torch.rand(4)
    with torch.no_grad():
        for parameter in actor.chunks[0].parameters():
            parameter.zero_()
    assert load_checkpoint(path, actor, meta()) == {"step": 3}
    for name, parameter in actor.chunks[0].named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert torch.equal(torch.rand(4), drawn)


def test_another_layout_gets_everything_but_the_random_state(actor, tmp_path, caplog):
    path = save(tmp_path, 3, actor)
    file = path / "meta.json"
    stored = json.loads(file.read_text())
    sizes = ("world_size", "tensor", "pipeline", "virtual_pipeline", "context", "expert")
    assert stored["layout"] == dict.fromkeys(sizes, 1)
    stored["layout"] |= {"world_size": 2, "tensor": 2}
    file.write_text(json.dumps(stored))
    torch.manual_seed(5)
    expected, weights = torch.rand(4), actor.chunks[0].decoder.final_layernorm.weight
    with torch.no_grad():
        weights.zero_()
    torch.manual_seed(5)
    with caplog.at_level("INFO"):
        assert load_checkpoint(path, actor, meta()) == {"step": 3}
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(weights, torch.ones_like(weights))
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("megatron_occ")]
    assert "random state" in line
    assert "'world_size': 2" in line


def test_a_checkpoint_from_before_the_first_update_can_be_loaded(layout, tmp_path):
    config = small_config(1)
    actor, other = (
        MegatronGPTActor(
            config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=10
        )
        for _ in range(2)
    )
    assert load_checkpoint(save(tmp_path, 0, actor), other, meta()) == {"step": 0}
    pairs = zip(actor.chunks[0].parameters(), other.chunks[0].parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert not other.finish_training_step().skipped


def test_only_the_newest_stay_and_unfinished_ones_are_not_seen(actor, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, actor)
    (tmp_path / "step_000009.tmp").mkdir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 3]
    save(tmp_path, 9, actor)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 9]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer": {"kind": "hf"}}, "tokenizer.kind is .*char.* this run has .*hf"),
        ({"data": {"corpus": "b2"}}, "data.corpus is .*a1.* this run has .*b2"),
        ({"mtp_layers": 2}, "mtp_layers is 1, this run has 2"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(actor, tmp_path, changes, named):
    path = save(tmp_path, 1, actor)
    with pytest.raises(ValueError, match=f"meta.json: {named}"):
        load_checkpoint(path, actor, meta(**changes))


def test_another_phase_may_have_other_data_but_not_another_model(actor, tmp_path):
    path = save(tmp_path, 1, actor)
    load_weights(path, actor, meta(data={"prompts": "zz"}))
    other = small_config(1)
    other.model.hidden_size = 64
    with pytest.raises(ValueError, match=r"json: model.hidden_size is 32, this run has 64: give"):
        load_weights(path, actor, meta(other))


def test_a_folder_that_is_no_checkpoint_is_refused(actor, tmp_path):
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        load_weights(tmp_path, actor, meta())


def test_the_meta_file_is_readable_by_a_person(actor, tmp_path):
    found = json.loads((save(tmp_path, 4, actor) / "meta.json").read_text())
    assert found["step"] == 4
    assert found["model"]["hidden_size"] == 32


def test_a_damaged_checkpoint_is_refused_with_its_path(actor, tmp_path):
    path = save(tmp_path, 4, actor)
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    (path / "common.pt").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="step_000004: can't be read, a file is damaged"):
        load_checkpoint(path, actor, meta())


def test_optimizer_state_of_an_older_format_is_refused_and_its_weights_are_read(actor, tmp_path):
    path = save(tmp_path, 4, actor)
    content = json.loads((path / "meta.json").read_text())
    del content["format"]
    (path / "meta.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="format is None, this run has 2"):
        load_checkpoint(path, actor, meta())
    load_weights(path, actor, meta())


def test_a_longer_position_range_reads_the_same_weights(actor, tmp_path):
    longer = small_config(1)
    longer.model.max_position_embeddings *= 2
    load_weights(save(tmp_path, 4, actor), actor, meta(longer))


def test_a_folder_of_checkpoints_is_told_what_lies_in_it(actor, tmp_path):
    path = save(tmp_path / "checkpoints" / "rl", 4, actor)
    with pytest.raises(ValueError, match=f"a folder of a run, with checkpoints such as {path}$"):
        load_weights(tmp_path, actor, meta())


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_a_missing_file_is_named(actor, tmp_path, name):
    path = save(tmp_path, 1, actor)
    (path / name).unlink()
    with pytest.raises(DamagedCheckpointError, match=f"{path}: {name} is missing"):
        load_checkpoint(path, actor, meta())


def test_a_cut_file_is_told_in_a_line(actor, tmp_path):
    path = save(tmp_path, 1, actor)
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    (path / "common.pt").unlink(missing_ok=True)
    with pytest.raises(DamagedCheckpointError, match="a file is damaged or missing") as told:
        load_checkpoint(path, actor, meta())
    assert "\n" not in str(told.value)


def test_a_broken_description_is_named(actor, tmp_path):
    path = save(tmp_path, 1, actor)
    (path / "meta.json").write_text("{")
    with pytest.raises(DamagedCheckpointError, match=r"meta\.json: is not JSON"):
        load_checkpoint(path, actor, meta())


def test_what_is_written_in_the_background_is_the_state_at_the_time(actor, tmp_path):
    background = writer(tmp_path, actor, background=True)
    expected = {n: p.clone() for n, p in actor.chunks[0].named_parameters()}
    path = background.save(3, {"step": 3})
    assert not path.exists()
    with torch.no_grad():
        for parameter in actor.chunks[0].parameters():
            parameter.add_(1.0)
    background.finish()
    assert damage(path) is None
    assert load_checkpoint(path, actor, meta()) == {"step": 3}
    for name, parameter in actor.chunks[0].named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_second_save_waits_for_the_first(actor, tmp_path):
    background = writer(tmp_path, actor, background=True)
    for step in (1, 2, 3):
        background.save(step, {"step": step})
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]
    background.finish()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 3]


def test_polling_completes_what_is_written(actor, tmp_path):
    background = writer(tmp_path, actor, background=True)
    background.save(1, {})
    deadline = time.monotonic() + 60
    while not list_checkpoints(tmp_path) and time.monotonic() < deadline:
        background.poll()
        time.sleep(0.01)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]


def test_what_is_abandoned_is_no_checkpoint(actor, tmp_path):
    background = writer(tmp_path, actor, background=True)
    background.save(1, {})
    background.abandon()
    background.finish()
    assert list_checkpoints(tmp_path) == []
    assert background.save(2, {}).parent == tmp_path
    background.finish()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]


@pytest.mark.parametrize(
    ("keep", "scores", "kept"),
    [
        (Keep(1), {10: 0.9}, {50}),
        (Keep(2), {}, {40, 50}),
        (Keep(1, best=1), {10: 0.2, 20: 0.7, 30: 0.7, 40: 0.1}, {20, 50}),
        (Keep(1, best=2), {10: 0.2, 50: 0.9}, {10, 50}),
        (Keep(1, best=3), {}, {50}),
        (Keep(1, every=20), {}, {20, 40, 50}),
        (Keep(1, best=1, every=30), {10: 0.5}, {10, 30, 50}),
        (Keep(9), {}, {10, 20, 30, 40, 50}),
    ],
)
def test_which_checkpoints_stay(keep, scores, kept):
    assert keep.kept([10, 20, 30, 40, 50], scores) == kept


def test_the_best_one_stays_when_newer_ones_come(actor, tmp_path):
    scores = {1: 0.3, 2: 0.8, 3: 0.5, 4: 0.1}
    each = CheckpointWriter(
        tmp_path, actor, meta(), keep=Keep(1, best=1), background=False, scores=lambda: scores
    )
    for step in scores:
        each.save(step, {})
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4]


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "spoil", "told"),
    [
        ("*.distcp", cut, r"\.distcp has \d+ bytes, \d+ were written"),
        ("*.distcp", flip, r"\.distcp is not what was written \(its SHA-256 differs\)"),
        ("*.distcp", lambda file: file.unlink(), r"\.distcp is missing"),
        (".metadata", flip, r"\.metadata is not what was written"),
        ("metadata.json", flip, r"metadata\.json is not what was written"),
        ("meta.json", cut, r"Expecting"),
        ("checksums.json", cut, r"Expecting"),
        ("checksums.json", lambda file: file.unlink(), r"checksums\.json is missing"),
        ("meta.json", lambda file: file.unlink(), r"No such file"),
    ],
)
def test_damage_is_found_by_checksums(actor, tmp_path, pattern, spoil, told):
    path = save(tmp_path, 1, actor)
    assert damage(path) is None
    spoil(sorted(path.glob(pattern))[0])
    assert re.search(told, damage(path))
    aside = set_aside(path)
    assert aside.name == "step_000001.broken"
    assert list_checkpoints(tmp_path) == []


def test_a_broken_one_goes_when_all_that_stay_are_newer(actor, tmp_path):
    set_aside(save(tmp_path, 2, actor))
    for step, found in ((1, [2]), (3, [])):
        each = CheckpointWriter(tmp_path, actor, meta(), keep=Keep(1), background=False)
        each.save(step, {})
        assert [int(path.stem[5:]) for path in tmp_path.glob("*.broken")] == found


def test_weights_of_a_damaged_checkpoint_are_refused(actor, tmp_path):
    path = save(tmp_path, 1, actor)
    flip(sorted(path.glob("*.distcp"))[0])
    with pytest.raises(DamagedCheckpointError, match=f"{path}: .* is not what was written"):
        load_weights(path, actor, meta())


def test_a_folder_that_cannot_be_written_is_an_error_of_all_ranks(actor, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointWriteError, match=r"could not be written: .*Not a directory"):
        save(tmp_path / "file" / "rl", 1, actor)


def test_a_writing_process_that_is_killed_is_an_error(actor, tmp_path, monkeypatch):
    def end(parent):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("megatron_occ.mcore.checkpoint_process.belong_to_parent", end)
    told = r"step_000001 could not be written: the process that wrote it ended before it was done"
    with pytest.raises(CheckpointWriteError, match=told):
        save(tmp_path, 1, actor)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fail", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(3)]
)
def test_a_writing_process_ends_with_a_failed_part_of_it(tmp_path, fail):
    """Megatron-Core 0.16 writes in a process of this one, and would wait for ever."""

    def write(*_):
        if os.fork() == 0:
            fail()
        time.sleep(60)

    arguments = (write, tmp_path, os.getpid(), 0, [], None)
    process = multiprocessing.get_context("fork").Process(target=_write, args=arguments)
    process.start()
    process.join(30)
    assert process.exitcode == 1


def test_saving_a_step_again_replaces_its_checkpoint(actor, tmp_path):
    save(tmp_path, 1, actor)
    with torch.no_grad():
        actor.chunks[0].decoder.final_layernorm.weight.fill_(3.0)
    path = save(tmp_path, 1, actor)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_000001"]
    assert damage(path) is None
    load_checkpoint(path, actor, meta())
    assert (actor.chunks[0].decoder.final_layernorm.weight == 3.0).all()
