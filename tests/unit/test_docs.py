"""The Markdown files say what is true: links, commands, keys, code and names of tests."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pyarrow.parquet
import pytest

from megatron_occ.cli import main
from megatron_occ.commands.convert import make_parser
from megatron_occ.config import load_config
from megatron_occ.config.keys import leaves, sections
from megatron_occ.data.tokenizers import HFTokenizer
from megatron_occ.phases.inputs import read_inputs

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# a figure of measured numbers: may be missing
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROCESSES = re.compile(r"--(?:nproc-per-node|ntasks|world-size)[ =](\d+)|WORLD_SIZE=(\d+)")


def blocks(page: Path, language: str) -> list[str]:
    """Contents of a page's fenced blocks in a language."""
    return [body for name, body in FENCE.findall(page.read_text()) if name == language]


def inline(page: Path) -> list[str]:
    """Inline code of a page, without the error messages that are set in bold."""
    text = re.sub(r"\*\*[^*]+\*\*", "", FENCE.sub("", page.read_text()))
    return re.findall(r"`([^`\n]+)`", text)


def shell_lines() -> list[str]:
    """Commands of all pages that run ``megatron-occ``."""
    lines = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            lines += block.replace("\\\n", " ").splitlines()
    return [line for line in lines if re.search(r"megatron-occ|-m megatron_occ", line)]


def arguments(line: str) -> list[str]:
    """What follows the program's name, quotes of an enclosing ``bash -c`` removed."""
    words = shlex.split(line.replace("'", " "), comments=True)
    start = next(i for i, word in enumerate(words) if word in ("megatron-occ", "megatron_occ"))
    return words[start + 1 :]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_there_are_commands_to_check():
    assert len(shell_lines()) > 8
    assert len(PAGES) >= 6


@pytest.mark.parametrize("line", shell_lines())
def test_commands_are_accepted(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    given = arguments(line)
    if given[0] == "report":
        return  # reads run folders, which are not here
    if given[0] == "convert":
        make_parser().parse_args(given[1:])
        return
    if given[0] == "compare":
        if given[1].endswith(".json"):
            return  # what a study has left behind
        main([*given, "--dry-run"])
        assert re.search(r"^runs +\d+: 0 finished", capsys.readouterr().out, re.MULTILINE)
        return
    given = [word for word in given if not word.startswith("model.from_hf=")]
    # a run's own configuration does not exist here: that of the shipped file it came from does
    given = [re.sub(r"^runs/rl_tiny/config\.yaml$", "conf/rl/tiny.yaml", word) for word in given]
    processes = PROCESSES.search(line)
    count = next(filter(None, processes.groups())) if processes else "1"
    monkeypatch.setenv("WORLD_SIZE", count)
    main([*given, "--dry-run"])
    assert f"ranks              {count} " in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_and_values_in_the_text_exist(page):
    known = {*leaves(), *sections()}
    tops = {name.partition(".")[0] for name in known if name}
    for code in inline(page):
        key, _, value = code.partition("=")
        dotted = re.fullmatch(r"\w+(\.[\w-]+)+", key)
        if not (dotted or value) or key.partition(".")[0] not in tops:
            continue
        if key.endswith(".safetensors"):
            # a file
            continue
        in_mapping = any(key.startswith(f"{leaf}.") for leaf in leaves())
        assert key in known or in_mapping, f"{page.name}: {code}"
        if value:
            load_config([], [code])


def test_files_named_in_the_text_exist():
    for page in PAGES:
        for code in inline(page):
            if re.fullmatch(r"(megatron_occ|tests|examples|conf|tools|docs)/[\w./-]+", code):
                assert (ROOT / code).exists(), f"{page.name}: {code}"


def test_the_tests_that_the_method_names_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "method.md").read_text()))
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in sorted(named) if f"def {name}(" not in sources]
    assert len(named) > 12
    assert missing == []


def test_the_code_in_the_readme_is_that_of_the_example():
    """Both compute the same loss and lambda; the README's sets up advantages as well."""
    import torch

    (snippet,) = blocks(ROOT / "README.md", "python")
    readme: dict = {"rewards": torch.tensor([1.0, 0.0, 1.0, 1.0]), "group_size": 2}
    exec(snippet, readme)
    example: dict = {"__name__": "example"}
    exec((ROOT / "examples" / "losses_in_your_trainer.py").read_text(), example)
    assert readme["advantages"].tolist() == pytest.approx([0.7071, -0.7071, 0.0, 0.0], abs=1e-3)

    generator = torch.Generator().manual_seed(0)
    old, logprobs = -torch.rand(2, 4, 6, generator=generator)
    mtp, mask = -torch.rand(2, 4, 6, generator=generator), torch.ones(4, 6)
    inputs = (logprobs, old, mtp, readme["advantages"], mask)
    loss, weights = readme["joint_loss"](*inputs)
    expected, expected_weights = example["joint_loss"](*inputs)
    assert torch.equal(loss, expected)
    assert torch.equal(weights, expected_weights)
    assert bool((weights != 0).all())


def test_the_configuration_of_the_page_on_data_reads_published_files(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    words = tokenizers.models.WordLevel({"<end>": 0, "<user>": 1, "?": 2}, unk_token="?")
    template = "{% for m in messages %}<user>{{ m.content }}<end>{% endfor %}<model>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="<end>", chat_template=template
    ).save_pretrained("tokenizer")
    page = ROOT / "docs" / "data.md"
    line, (_, yaml) = blocks(page, "json")[0], blocks(page, "yaml")
    Path("train.yaml").write_text(yaml)
    chat = [{"role": "user", "content": "12 * 12?"}]
    published = {
        "prompt": chat,
        "reward_model": {"ground_truth": "144"},
        "data_source": "math_dapo",
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([published] * 3), "dapo-math-17k.parquet")
    Path("aime_2024.jsonl").write_text(line)
    config = load_config(
        ["train.yaml"], ["model.from_hf=null", "rl.prompts_per_step=1", "rl.validation.problems=1"]
    )
    inputs = read_inputs(config, None, HFTokenizer("tokenizer"), trains=True, validates=True)
    (train,), (held_out,) = inputs.train.records(1), inputs.held_out[""].records(1)
    suffix = "\nPut the final answer in \\boxed{}."
    assert train.prompt == f"<user>12 * 12?{suffix}<end><model>"
    assert (train.answer, train.task_name) == ("144", "math_dapo")
    asked = "What is 12 * 12? Answer with a number.\n"
    assert held_out.prompt == f"<user>{asked}{suffix}<end><model>"
    assert (held_out.answer, held_out.task_name) == ("144", "math")
    assert inputs.notes[0].endswith("; left out: 2 that repeat a prompt")


def test_no_file_mentions_a_machine():
    """Paths of a home folder, a scratch disk or a temporary folder work on one machine only."""
    # put together here, so that this file does not match itself
    roots = "|".join(("home", "root", "work", "tmp", "Users", "mnt", "scratch"))
    local = re.compile(rf"(?<![\w.$}}~/*-])/(?:{roots})/\w")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if not path.is_file() or path.suffix in (".svg", ".png"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if local.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert found == []
