"""What a user sees of a wrong configuration or wrong data: the list of what is refused, and how.

Configurations go through the command line. Checkpoints, corpora and the preprocessing tool need
Megatron: their rows are in ``tests/mcore/test_refused_data.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_occ.cli import main
from megatron_occ.data import build_task, build_tokenizer
from megatron_occ.data.corpus import TaskCorpus
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.observe.progress import Timers
from megatron_occ.phases.inputs import read_inputs
from megatron_occ.rl.rewards import VerifierPool, VerifierResult, register_verifier
from tests.unit.fakes import TOKENIZER, FakeActor
from tests.unit.rl_setup import file_config, make_source, rl_config

TINY = Path(__file__).parents[2] / "conf" / "rl" / "tiny.yaml"
RL = {"trains": True, "validates": True}


@dataclass
class Wrong:
    """A wrong configuration on top of conf/rl/tiny.yaml, and what the message must contain.

    ``{file}`` in a part stands for the path of the yaml file, ``{folder}`` for its folder.
    """

    name: str
    parts: list[str]
    yaml: str | None = None
    overrides: list[str] = field(default_factory=list)
    ranks: int = 1
    more_files: dict[str, str] = field(default_factory=dict)


WRONG_CONFIGURATIONS = [
    # what is written
    Wrong(
        "unknown key in a file",
        ["{file}:3: unknown key rl.optimizer.learning_rate.", "rl.optimizer has: lr, min_lr"],
        yaml="rl:\n  optimizer:\n    learning_rate: 1e-4\n",
    ),
    Wrong(
        "misspelt key in a file",
        ["{file}:2: unknown key rl.mini_batch. Did you mean rl.mini_batches"],
        yaml="rl:\n  mini_batch: 4\n",
    ),
    Wrong(
        "unknown key on the command line",
        ["override 'mtp.lambda_plus=2': unknown key", "Did you mean mtp.trunk.lambda_plus?"],
        overrides=["mtp.lambda_plus=2"],
    ),
    Wrong(
        "file without --config",
        ["override 'conf/rl/tiny.yaml': must be key=value", "--config conf/rl/tiny.yaml"],
        overrides=["conf/rl/tiny.yaml"],
    ),
    Wrong(
        "malformed yaml",
        ["{file}:3: not valid YAML: expected ',' or ']'"],
        yaml="seed: 1\nrl: [1, 2\nmodel: 3\n",
    ),
    Wrong(
        "key given twice", ["{file}:2: not valid YAML: key seed is given twice"], "seed: 1\n" * 2
    ),
    Wrong("not a mapping", ["{file}: must be a mapping of keys, not [1]"], "- 1\n"),
    Wrong("value for a section", ["{file}:1: rl = 5: rl is a section; give its keys"], "rl: 5\n"),
    Wrong(
        "missing include",
        ["configuration file {folder}/gone.yaml: not found, included by {file}"],
        yaml="include: gone.yaml\n",
    ),
    Wrong(
        "circle of includes",
        ["{folder}/other.yaml:2: include goes in a circle: {file} -> {folder}/other.yaml"],
        yaml="include: other.yaml\n",
        more_files={"other.yaml": "seed: 1\ninclude: wrong.yaml\n"},
    ),
    # single values
    Wrong(
        "wrong type in a file",
        ["{file}:2: rl.steps = '12': must be an integer >= 1 and <= 1,000,000,000, not a string"],
        yaml="rl:\n  steps: '12'\n",
    ),
    Wrong(
        "wrong type on the command line",
        ["override 'model.qk_layernorm=1'", "model.qk_layernorm = 1: must be true or false"],
        overrides=["model.qk_layernorm=1"],
    ),
    Wrong(
        "out of range",
        ["{file}:1: rl.loss.clip_low = 1.5: must be a number > 0 and <= 1"],
        yaml="rl: {loss: {clip_low: 1.5}}\n",
    ),
    Wrong(
        "not among the choices",
        [
            "mtp.preset = 'oc': must be one of none, detach, ce, policy, occ, occ_decoupled, "
            "occ_exact, head_only or null"
        ],
        overrides=["mtp.preset=oc"],
    ),
    Wrong(
        "a KL estimator without a gradient",
        ["rl.loss.kl_kind = 'k1': must be one of k2, k3"],
        overrides=["rl.loss.kl_kind=k1", "rl.loss.kl_coefficient=0.1"],
    ),
    # contradictions
    Wrong(
        "calibrated coefficient without an MTP layer",
        ["mtp.num_layers=0: there is no MTP layer", "Set mtp.preset=none", "mtp.num_layers=1"],
        overrides=["mtp.num_layers=0", "mtp.preset=occ"],
    ),
    Wrong(
        "calibration of a cross-entropy",
        ["mtp.trunk.coefficient=occ", "mtp.trunk.signal=ce", "Set mtp.trunk.coefficient=fixed"],
        overrides=["mtp.trunk={signal: ce, coefficient: occ}"],
    ),
    Wrong(
        "regime that cannot act",
        ["mtp.head.signal=same_as_trunk: mtp.trunk.signal=none", "Set mtp.head.signal=ce"],
        yaml="mtp: {head: {signal: same_as_trunk}}\n",
    ),
    Wrong(
        "calibration with one mini-batch",
        ["rl.mini_batches=1: with mtp.trunk.coefficient=occ lambda would stay 0", "Give rl.mini_b"],
        overrides=["mtp.preset=occ", "rl.mini_batches=1"],
    ),
    Wrong(
        "key that contradicts a preset",
        ["{file}:1: mtp.head.signal = 'tv' contradicts mtp.preset = detach", "Drop one"],
        yaml="mtp: {head: {signal: tv}}\n",
        overrides=["mtp.preset=detach"],
    ),
    Wrong(
        "setting that a preset switches off",
        [
            "mtp.trunk.ema=0.5: has no effect with mtp.trunk.coefficient=fixed, set by mtp.preset",
            "Give mtp.trunk.ema=0.0, its default, or mtp.trunk.coefficient=occ",
        ],
        yaml="mtp: {trunk: {ema: 0.5}}\n",
        overrides=["mtp.preset=ce"],
    ),
    Wrong(
        "mini-batch not divisible",
        [
            "rl.mini_batches=3",
            "32 sequences can't be cut into 3 mini-batches",
            "Change one of the three",
        ],
        overrides=["rl.mini_batches=3"],
    ),
    Wrong(
        "micro-batch that does not divide",
        ["rl.micro_batch_size=5: does not divide the 16 sequences", "Give rl.micro_batch_size=4"],
        overrides=["rl.micro_batch_size=5"],
    ),
    Wrong(
        "sequence longer than the position range",
        ["pretrain.sequence_length=99: is more than model.max_position_embeddings=16", "Lower"],
        overrides=["pretrain.sequence_length=99"],
    ),
    Wrong(
        "response that leaves no room for a prompt",
        ["rl.rollout.max_response_length=16", "model.max_position_embeddings=16", "Lower"],
        overrides=["rl.rollout.max_response_length=16"],
    ),
    Wrong(
        "ranks that tensor parallelism does not divide",
        ["parallel.tensor=2: does not divide the 3 ranks", "start a multiple of 2 ranks"],
        overrides=["parallel.tensor=2"],
        ranks=3,
    ),
    Wrong(
        "unknown task",
        [
            "error: data.task.name: unknown task 'reversed_adition'",
            "did you mean 'reversed_addition'",
        ],
        overrides=["data.task.name=reversed_adition"],
    ),
    Wrong(
        "unknown task where the size of the vocabulary is given",
        ["error: data.task.name: unknown task 'sums': known: reversed_multiplication"],
        overrides=["data.task.name=sums", "model.vocab_size=32"],
    ),
    Wrong(
        "unknown parameter of a task",
        ["error: data.task.params: task reversed_addition has no parameter 'digit'", "'digits'"],
        overrides=["data.task={name: reversed_addition, params: {digit: 2}}"],
    ),
    Wrong(
        "path of a file in place of a verifier",
        ["data.verifiers.unit='checks.py': must be 'module:function'", "my_module:my_verifier"],
        yaml="data:\n  task: {name: null, params: {}}\n  verifiers: {unit: checks.py}\n"
        "  prompts: p\n  validation_prompts: v\ntokenizer: {alphabet: ab}\npretrain: {steps: 0}\n",
    ),
]


@pytest.mark.parametrize("wrong", WRONG_CONFIGURATIONS, ids=lambda wrong: wrong.name)
def test_a_wrong_configuration_is_refused_with_place_key_value_and_remedy(
    wrong, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", str(wrong.ranks))
    command = ["rl", "--config", str(TINY)]
    for name, text in {"wrong.yaml": wrong.yaml, **wrong.more_files}.items():
        if text is not None:
            (tmp_path / name).write_text(text, encoding="utf-8")
    if wrong.yaml is not None:
        command += ["--config", str(tmp_path / "wrong.yaml")]
    with pytest.raises(SystemExit) as ended:
        main([*command, *wrong.overrides, "--dry-run"])
    message = ended.value.code
    assert isinstance(message, str) and message.startswith("megatron-occ: error: ")
    for part in wrong.parts:
        assert part.format(file=tmp_path / "wrong.yaml", folder=tmp_path) in message
    assert capsys.readouterr().out == "", "nothing is planned"


def test_the_list_is_long_enough():
    assert len({wrong.name for wrong in WRONG_CONFIGURATIONS}) == len(WRONG_CONFIGURATIONS) >= 12
    assert len(WRONG_LINES) + len(WRONG_FILES) >= 6


GOOD = b'{"prompt": "1+1=", "answer": "2"}\n'
# second line of a file of prompts, and what is said about it
WRONG_LINES = {
    "not JSON": (b"{prompt: 1}", "not JSON: Expecting property name"),
    "not an object": (b'["1+1=", "2"]', "expected a JSON object, got list"),
    "not UTF-8": (b'{"prompt": "\xe9"}', "not UTF-8 text"),
    "missing key": (b'{"prompt": "1+1="}', "no field for the answer among answer, "),
    "wrong type": (b'{"prompt": "1+1=", "answer": true}', "'answer' must be text, got bool True"),
    "empty text": (b'{"prompt": "  ", "answer": "2"}', "'prompt' is empty"),
    "no answer after its mark": (
        b'{"prompt": "1+1=", "answer": "so #### "}',
        "'answer' has nothing after '####'",
    ),
}
WRONG_FILES = {"no such file": None, "the file is empty, expected one JSON object a line": b"\n \n"}


@pytest.mark.parametrize("kind", WRONG_LINES)
def test_a_wrong_line_of_data_is_refused_with_file_and_line(kind, tmp_path):
    line, reason = WRONG_LINES[kind]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}:2: {reason}')}"):
        PromptStream(str(path))


@pytest.mark.parametrize("reason", WRONG_FILES)
def test_a_missing_or_empty_file_is_refused_with_its_name(reason, tmp_path):
    path = tmp_path / "prompts.jsonl"
    if WRONG_FILES[reason] is not None:
        path.write_bytes(WRONG_FILES[reason])
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {reason}')}$"):
        PromptStream(str(path))


def test_a_line_that_asks_for_an_unknown_verifier_is_refused_with_the_closest_one(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(GOOD + b'{"prompt": "p", "answer": "2", "task_name": "maths"}\n')
    place = f"data.prompts: {path}:2: 'task_name': "
    message = "unknown verifier 'maths': did you mean 'math'"
    with pytest.raises(ValueError, match=f"^{re.escape(place + message)}"):
        read_inputs(file_config(path, path), None, TOKENIZER, **RL)
    config = file_config(path, path, "data.verifier=maths")
    with pytest.raises(ValueError, match=f"^data.verifier=maths: {message}"):
        read_inputs(config, None, TOKENIZER, **RL)


def test_a_prompt_that_does_not_fit_is_refused_with_its_number_text_and_remedy(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "abcdabcdabcd", "answer": "a"}\n')
    config = rl_config("rl.prompts_per_step=1")
    source = make_source(config, FakeActor(), stream=PromptStream(str(path)))
    what = re.escape("prompt 0 ('abcdabcdabcd') has 12 tokens, allowed are 1 to 10")
    with pytest.raises(ValueError, match=f"^{what}") as refused:
        source.generate(Timers())
    message = str(refused.value)
    assert "rl.rollout.max_response_length=6" in message
    assert "raise model.max_position_embeddings" in message


def test_a_problem_longer_than_a_pretraining_sequence_is_refused_with_both_lengths():
    task = build_task("reversed_addition", digits=2)
    tokenizer = build_tokenizer("char", alphabet=task.alphabet)
    with pytest.raises(ValueError, match=r"problem '.*' has .* more than the sequence length 8"):
        TaskCorpus(task, tokenizer).batch(0, 1, 8)


def test_a_character_outside_the_alphabet_is_refused_with_its_position_and_text():
    with pytest.raises(ValueError, match=r"character 'x' at position 2 of '12x4' .* '1234'"):
        build_tokenizer("char", alphabet="1234").encode("12x4")


GARBAGE = ["", "\x00\ud7ff\U0010ffff", "=" * 10_000, "__import__('os').abort()", "9**9**9**9=."]


@pytest.mark.parametrize("name", ["exact", "arithmetic"])
def test_garbage_from_the_model_scores_zero(name):
    with VerifierPool() as pool:
        results = pool.score([(name, text, "42") for text in GARBAGE])
        assert results == [VerifierResult(0.0, "ok")] * len(GARBAGE)


def test_model_output_that_breaks_a_verifier_scores_zero_is_told_and_loses_nothing(
    tmp_path, monkeypatch
):
    (tmp_path / "occ_test_refusals.py").write_text(
        "def fragile(response, answer):\n"
        "    while response == 'endless':\n"
        "        pass\n"
        "    return float(response) / float(answer)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    register_verifier("fragile", "occ_test_refusals:fragile")
    texts = ["3", "three", "endless", "nan", "6"]
    with VerifierPool(timeout_seconds=0.5) as pool:
        results = pool.score([("fragile", text, "6") for text in texts])
    assert [result.score for result in results] == [0.5, 0.0, 0.0, 0.0, 1.0]
    assert [result.status for result in results] == ["ok", "error", "timeout", "error", "ok"]
    assert "could not convert string to float: 'three' (at " in results[1].detail
    assert "occ_test_refusals.py:4)" in results[1].detail
    assert results[3].detail == "the verifier returned nan (float), not a finite number"
