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
    **{
        f"rl/{name}_mimo_7b.yaml": ("rl", 128)
        for name in ("grpo", "dr_grpo", "rloo", "reinforce_pp", "cispo", "sapo", "dppo")
    },
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
    assert cells(text, "embedding")[:2] == [f"{151552 // 2 * 4096:,}"] * 2
    assert cells(text, "trunk")[0] == f"{trunk:,}"
    # of all 45 MoE layers 128 experts are the model's, and 8 act on a token
    experts = [10 * 16, 11 * 16, 45 * 128, 45 * 8]
    assert cells(text, "trunk experts") == [f"{n * shared:,}" for n in experts]
    assert cells(text, "MTP experts") == ["-", *[f"{n * shared:,}" for n in (16, 128, 8)]]
    whole = 46 * (attention + 2 * 4096) + 3 * 4096 * 10944 + 45 * (shared + router) + 4096
    assert cells(text, "trunk")[2:] == [f"{whole:,}"] * 2


def test_another_rank_shows_its_own_place_and_the_last_stage_above_it(capsys):
    text = dry_run([*GLM, "--rank", "133"], capsys)
    assert "rank 133           tensor 1, context 0, data 1, pipeline 1, expert tensor 0" in text
    assert "rank 389           tensor 1, context 0, data 1, pipeline 3" in text
    assert cells(text, "pipeline") == ["4", "5", "133", "261", "389"]
    assert cells(text, "expert data")[:3] == ["16", "133", "141"]


def test_a_rank_of_the_last_stage_stands_alone(capsys):
    text = dry_run([*GLM, "--rank", "511"], capsys)
    assert len(cells(text, "peak")) == 1
    assert len(cells(text, "total")) == 3  # beside the model's, and those that act on a token


def test_what_does_not_fit_is_said_with_what_would(capsys):
    text = dry_run([*GLM, "recompute=none", "rl.micro_batch_tokens=102400"], capsys)
    # with two micro-batches stage 1 of twelve layers needs more than stage 0 of eleven
    assert cells(text, "fits in 80 GiB") == ["no", "no", "no"]
    peak, fewer = cells(text, "peak")[2], float(cells(text, "peak")[2]) - 80
    assert (
        f"\nlargest rank       rank 128, like all 128 ranks of pipeline stage 1: {peak} GiB" in text
    )
    assert f"does not fit into --gpu-memory 80 GiB: {fewer:.2f} GiB too much\n" in text
    assert re.search(r"\n  with +recompute=full: [\d.]+ GiB, fits\n", text)
    assert "otherwise" not in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["recompute=selective", "recompute_modules=[moe_act, layernorm]"],
            "selective of moe_act, layernorm",
        ),
        (["recompute=full", "recompute_layers=2"], "full of 2 layers a chunk"),
    ],
)
def test_recompute_of_parts_is_named_and_all_of_it_is_offered(given, words, capsys):
    text = dry_run([*GLM, *given, "rl.micro_batch_tokens=102400"], capsys)
    assert f"(this run: {words})" in text
    rest = given[1].partition("=")[0] + ("=[]" if "modules" in given[1] else "=null")
    assert re.search(rf"\n  with +recompute=full {re.escape(rest)}: [\d.]+ GiB, fits\n", text)


@pytest.mark.parametrize(("memory", "verdict"), [("40", "yes"), ("39", "no")])
def test_the_largest_rank_is_compared_with_the_memory_that_is_given(memory, verdict, capsys):
    text = dry_run([*GLM, "--gpu-memory", memory], capsys)
    assert cells(text, f"fits in {memory} GiB") == ["yes", verdict]
    said = "fits into" if verdict == "yes" else "does not fit into"
    line = f"rank 384, like all 128 ranks of pipeline stage 3: 39.46 GiB. It {said}"
    assert f"{line} --gpu-memory {memory} GiB" in text
    assert ("leaves 0.54 GiB for what is not counted" in text) == (verdict == "yes")


def test_a_rank_that_nothing_makes_fit_is_told_to_hold_less(capsys):
    text = dry_run([*GLM, "--gpu-memory", "1"], capsys)
    assert (
        "otherwise        give a rank less of the model (parallel.tensor, parallel.pipeline, "
        "parallel.expert) or of a sequence (parallel.context), on more ranks" in text
    )


TINY = ["--config", str(ROOT / "conf" / "rl" / "tiny.yaml"), "mtp.preset=detach"]
PP2 = ["parallel.pipeline=2", "--world-size", "2"]


def test_micro_batches_and_bubble_by_hand(capsys):
    """Pretraining has 32 / 8 micro-batches and RL 16 / 4; two stages wait for one of these."""
    text = dry_run(["rl", *TINY, *PP2], capsys)
    assert "pretraining        60 updates of 32 sequences, 4 micro-batches a rank\n" in text
    assert "2 updates each, 4 micro-batches a rank\n" in text
    bubble = (
        "  bubble           25.0% of the time that a stage works (2 - 1 stages / (4 micro-batches)"
    )
    assert text.count(f"{bubble}, arXiv 2104.04473), or 20.0% of an update") == 2
    interleaved = ["parallel.virtual_pipeline=2", "model.num_layers=4"]
    text = dry_run(["rl", *TINY, *PP2, *interleaved], capsys)
    assert text.count("12.5% of the time that a stage works (2 - 1 stages / (4 micro-batches") == 2
    assert "* 2 chunks), arXiv 2104.04473), or 11.1% of an update" in text
    # packed, at most: 16 sequences of at most 16 tokens, two of them in 40 tokens
    packed = ["rl.micro_batch_tokens=40", "rl.micro_batch_size=128", "rl.init_from=c"]
    text = dry_run(["rl", *TINY, *PP2, *packed], capsys)
    assert "at most 8 a rank)" in text
    assert "at least 12.5% of the time" in text
    assert "bubble" not in dry_run(["rl", *TINY], capsys)


def test_groups_that_cross_nodes_are_warned_of(capsys, monkeypatch):
    tensor = [*TINY, "parallel.tensor=2", "--world-size", "4"]
    text = dry_run(["rl", *tensor, "--gpus-per-node", "1"], capsys)
    assert "\nwarning            tensor ranks cross nodes of 1: 2 of 2 groups" in text
    assert "4 nodes of 1; " in text
    assert "warning" not in dry_run(["rl", *tensor], capsys)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert "tensor ranks cross nodes of 1" in dry_run(["rl", *tensor], capsys)
    assert "warning" not in dry_run(["rl", *tensor, "--gpus-per-node", "2"], capsys)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rank", "512"], "--rank 512: there are ranks 0 to 511. Give one of them"),
        (["--rank", "-1"], "--rank -1: there are ranks 0 to 511"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0: give 1 or more"),
        (["--gpu-memory", "-1"], "--gpu-memory -1: give a number of GiB above 0"),
        (["--gpu-memory", "nan"], "--gpu-memory nan: give a number of GiB above 0"),
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
    # the model, and its one rank
    assert cells(text, "embedding") == [f"{width * rows:,}"] * 2
    layer = width * (3 + 1 + 3) * width + 2 * width
    assert cells(text, "trunk") == [f"{2 * layer + width:,}"] * 2
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
