"""A Hugging Face folder through the commands: RL on its weights, and the way back."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_occ.cli import main
from megatron_occ.config import ConfigError, load_config
from megatron_occ.config.schema import Config
from tests.e2e.conftest import forked, metrics
from tests.mcore.convert_folders import read_tensors

QUICK = ("rl.steps=2", "rl.rollout.speculative.mode=fixed")


@pytest.fixture(scope="module")
def folder(pretrained, tmp_path_factory):
    """A pretrained model as a folder that somebody could have downloaded."""
    target = tmp_path_factory.mktemp("hf") / "model"
    main(["convert", "export", str(pretrained(1)), str(target)])
    return target


def only_data(path):
    """The tiny configuration without what the folder says."""
    path.write_text(
        "data:\n  task: {name: reversed_addition, params: {digits: 1, terms: 3}}\n"
        "rl: {prompts_per_step: 8, samples_per_prompt: 4, mini_batches: 2, micro_batch_size: 4, "
        "rollout: {max_response_length: 9, batch_size: 32, log_samples: 2}, "
        "validation: {every: 0, problems: 8}, optimizer: {lr: 3e-4}}\n"
    )
    return path


def test_rl_starts_from_the_folder_alone(run, folder, pretrained, tmp_path):
    config = only_data(tmp_path / "data.yaml")
    found = run("rl", "run", *QUICK, f"model.from_hf={folder}", config=config)
    usual = run("rl", "usual", *QUICK, f"rl.init_from={pretrained(1)}")
    # MiMo has biases and an output layer of its own, which then learn too
    line, expected = (metrics(each, "rl")[0] for each in (found, usual))
    assert line["reward/mean"] == expected["reward/mean"]
    assert line["loss/mtp_1"] == pytest.approx(expected["loss/mtp_1"], rel=1e-2)
    done = tmp_path / "back"
    checkpoint = sorted((found / "checkpoints" / "rl").glob("step_*"))[-1]
    # without --like: the run knows where it comes from
    main(["convert", "export", str(checkpoint), str(done)])
    assert read_tensors(done).keys() == read_tensors(folder).keys()
    content, source = (json.loads((each / "config.json").read_text()) for each in (done, folder))
    assert content == source


def test_ranks_and_depths(folder, tmp_path):
    config = only_data(tmp_path / "data.yaml")
    done = forked(
        tmp_path / "run",
        2,
        *QUICK,
        f"model.from_hf={folder}",
        "mtp.num_layers=2",
        "parallel.tensor=2",
        config=config,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = metrics(tmp_path / "run", "rl")
    assert "loss/mtp_2" in lines[-1]
    again = json.loads((tmp_path / "run" / "from_hf" / "meta.json").read_text())
    assert again["mtp_layers"] == 2


def test_pretraining_goes_on_with_the_folder(run, folder):
    fresh = run(
        "pretrain",
        "fresh",
        "pretrain.steps=2",
        "pretrain.log_every=1",
        "pretrain.optimizer.warmup_steps=0",
    )
    more = run(
        "pretrain",
        "more",
        "pretrain.steps=2",
        "pretrain.log_every=1",
        f"model.from_hf={folder}",
        config=only_corpus(run.folder / "data.yaml"),
    )
    losses = [metrics(each, "pretrain")[0]["loss/main"] for each in (more, fresh)]
    assert losses[0] < 0.8 * losses[1]


def only_corpus(path):
    only_data(path)
    path.write_text(
        path.read_text() + "pretrain: {batch_size: 32, micro_batch_size: 32, sequence_length: 15, "
        "optimizer: {lr: 5e-3}}\n"
    )
    return path


def test_what_contradicts_the_folder_is_refused(run, folder):
    with pytest.raises(SystemExit, match=r"model\.hidden_size = 48 contradicts model\.from_hf="):
        run("rl", "run", f"model.from_hf={folder}", "model.hidden_size=48")
    with pytest.raises(SystemExit, match=r"model\.qk_layernorm = true contradicts model\.from_hf="):
        run("rl", "run", f"model.from_hf={folder}", "model.qk_layernorm=true")
    with pytest.raises(SystemExit, match="/nowhere: is no Hugging Face folder: there is no"):
        run("rl", "run", "model.from_hf=/nowhere")


def test_the_folder_gives_the_whole_section():
    given = {"model.hidden_size": 64, "mtp.num_layers": 2}
    config = load_config([], ["model.from_hf=x", "mtp.num_layers=1"], folder=given)
    assert (config.model.hidden_size, config.mtp.num_layers) == (64, 1)
    with pytest.raises(ConfigError, match=r"model\.hidden_size = 48 contradicts model\.from_hf=x"):
        load_config([], ["model.from_hf=x", "model.hidden_size=48"], folder=given)
    assert Config().model.from_hf is None


def test_a_damaged_folder_is_told_before_anything_is_written(run, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    config = only_data(tmp_path / "data.yaml")
    with pytest.raises(SystemExit, match="is cut off"):
        run("rl", "run", *QUICK, f"model.from_hf={broken}", config=config)
    assert not (run.folder / "run").exists()
