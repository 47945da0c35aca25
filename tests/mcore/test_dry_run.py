"""``--dry-run``: every shipped configuration at its own size, and what the text says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_occ.cli import main
from megatron_occ.config import limits

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the dry run hides CUDA from its process; here it is in use"
)

ROOT = Path(__file__).parents[2]
SHIPPED = {
    "planning.yaml": ("rl", 1),
    "demo.yaml": ("demo", 2),
    "pretrain/tiny.yaml": ("pretrain", 4),
    "rl/tiny.yaml": ("rl", 4),
    "rl/dapo_mimo_7b.yaml": ("rl", 128),
    "rl/gspo_mimo_7b.yaml": ("rl", 128),
    "rl/dapo_glm45_air.yaml": ("rl", 128),
    "rl/dapo_glm45_air_512.yaml": ("rl", 512),
}
GLM = ["rl", "--config", str(ROOT / "conf/rl/dapo_glm45_air_512.yaml"), "--world-size", "512"]


def dry_run(arguments: list[str], capsys) -> str:
    main([*arguments, "--dry-run"])
    return capsys.readouterr().out


def cells(text: str, name: str) -> list[str]:
    """Cells of the first row of this name."""
    (row, *_) = [line for line in text.splitlines() if line.strip().startswith(f"{name} ")]
    return row.split(name)[1].split()


def test_every_shipped_run_is_here():
    files = {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    others = ("model/", "base/", "compare/")  # parts of configurations, and studies
    assert {name for name in files if not name.startswith(others)} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_is_planned_at_its_own_size(name, capsys):
    command, ranks = SHIPPED[name]
    config = str(ROOT / "conf" / name)
    text = dry_run([command, "--config", config, "--world-size", str(ranks)], capsys)
    assert f"\nranks              {ranks} (" in text
    # the scripts for Slurm read it
    assert re.search(r"^run_dir            runs/\w+$", text, re.MULTILINE)
    assert set(cells(text, "fits in 80 GiB")) == {"yes"}


def test_the_plan_of_512_ranks_by_hand(capsys):
    text = dry_run(GLM, capsys)
    assert "rank grid          512 ranks, 64 nodes of 8" in text
    assert "rank             = tensor + 2 * context + 4 * data + 128 * pipeline\n" in text
    assert "in MoE layers    = expert + 8 * expert data + 128 * pipeline\n" in text
    assert "  1       128-255     16-31     t*12\n" in text
    assert "micro-batches of at most 20480 tokens" in text
    attention = (96 + 2 * 8) * 128 * (4096 + 1) + 96 * 128 * 4096
    shared, router = 3 * 4096 * 1408, 128 * 4096
    first = [attention // 2 + 2 * 4096] * 11
    trunk = sum(first) + 3 * 4096 * 10944 // 2 + 10 * (shared // 2 + router)
    assert cells(text, "embedding") == [f"{151552 // 2 * 4096:,}"] * 2
    assert cells(text, "trunk")[0] == f"{trunk:,}"
    assert cells(text, "trunk experts") == [f"{n * 16 * shared:,}" for n in (10, 11)]
    assert cells(text, "MTP experts") == ["-", f"{16 * shared:,}"]


def test_another_rank_shows_its_own_place_and_the_last_stage_above_it(capsys):
    text = dry_run([*GLM, "--rank", "133"], capsys)
    assert "rank 133           tensor 1, context 0, data 1, pipeline 1, expert tensor 0" in text
    assert "rank 389           tensor 1, context 0, data 1, pipeline 3" in text
    assert cells(text, "pipeline") == ["4", "5", "133", "261", "389"]
    assert cells(text, "expert data")[:3] == ["16", "133", "141"]


def test_a_rank_of_the_last_stage_stands_alone(capsys):
    assert len(cells(dry_run([*GLM, "--rank", "511"], capsys), "total")) == 1


def test_what_does_not_fit_is_said(capsys):
    text = dry_run([*GLM, "recompute=none", "rl.micro_batch_tokens=102400"], capsys)
    assert cells(text, "fits in 80 GiB") == ["no", "no"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rank", "512"], "--rank 512: there are ranks 0 to 511. Give one of them"),
        (["--rank", "-1"], "--rank -1: there are ranks 0 to 511"),
        (["--world-size", "100"], "does not divide the 100 ranks of this run"),
        (
            ["model.vocab_size=null"],
            "model.vocab_size=null: the vocabulary has to come from the tokenizer: tokenizer.path: "
            "no tokenizer in 'GIVE/tokenizer.path': it does not exist",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        dry_run([*GLM, *given], capsys)
    assert message in ended.value.code


def test_the_largest_sizes_are_counted(capsys):
    """By the numbers of the plan: nothing overflows, nothing of the size is allocated."""
    width, rows = limits.WIDTH, limits.VOCABULARY
    sizes = [f"model.hidden_size={width}", f"model.ffn_hidden_size={width}", "model.num_layers=2"]
    sizes += ["model.num_attention_heads=4000", f"model.vocab_size={rows}", "mtp.num_layers=0"]
    sizes += ["mtp.preset=none", f"model.max_position_embeddings={limits.TOKENS}"]
    text = dry_run(["rl", "--config", str(ROOT / "conf/rl/tiny.yaml"), *sizes], capsys)
    # tied; of a layer: qkv with as many groups as heads, projection, gated MLP and two norms
    assert cells(text, "embedding") == [f"{width * rows:,}"]
    layer = width * (3 + 1 + 3) * width + 2 * width
    assert cells(text, "trunk") == [f"{2 * layer + width:,}"]
    assert cells(text, "fits in 80 GiB") == ["no"]


def test_ranks_are_given_for_a_dry_run_alone(capsys):
    with pytest.raises(SystemExit):
        main(GLM)
    assert "--world-size goes with --dry-run alone" in capsys.readouterr().err


def test_files_that_are_not_there_are_named(tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.with_suffix(".idx").write_text("")
    there, missing = f"data.corpus={corpus}", f"data.prompts={tmp_path}/none.jsonl"
    config = ["rl", "--config", str(ROOT / "conf" / "rl" / "tiny.yaml")]
    untold = ("data.task.name=null", "data.task.params={}", "tokenizer.alphabet=abc")
    held_out = f"data.validation_prompts={tmp_path}/held_out.jsonl"
    text = dry_run([*config, *untold, there, missing, held_out], capsys)
    expected = f"\nnot found          {missing}\nnot found          {held_out}\nnot checked "
    assert expected in text
    assert "data.corpus=" not in text
