"""Loading: precedence, includes, types, messages and the round trip."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_occ.config import PRESETS, Config, ConfigError, load_config, save_config, to_yaml

CONF = Path(__file__).parents[2] / "conf"
# those in compare/ are studies: test_compare_study.py
SHIPPED = sorted(set(CONF.rglob("*.yaml")) - set(CONF.glob("compare/**/*.yaml")))


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(paths: list[Path] = (), overrides: list[str] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(paths, overrides)
    return str(caught.value)


def test_importing_the_configuration_imports_no_torch():
    code = (
        "import sys, megatron_occ.config as c; c.validate(c.load_config(), command='demo');"
        "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_nothing_given_is_the_defaults():
    assert load_config() == Config()


def test_later_wins_defaults_files_overrides(tmp_path):
    first = write(tmp_path, "a.yaml", "seed: 1\nrl: {steps: 11, mini_batches: 8}\n")
    second = write(tmp_path, "b.yaml", "rl: {steps: 22}\n")
    config = load_config([first, second], ["model.num_layers=5", "seed=3", "seed=4"])
    assert (config.rl.steps, config.rl.mini_batches, config.seed) == (22, 8, 4)
    assert config.model.num_layers == 5
    assert config.rl.samples_per_prompt == Config().rl.samples_per_prompt


def test_includes_are_relative_to_the_file_and_come_before_it(tmp_path):
    write(tmp_path, "base/a.yaml", "seed: 1\nrl: {steps: 5, mini_batches: 2}\n")
    write(tmp_path, "base/b.yaml", "seed: 2\n")
    top = write(
        tmp_path, "runs/top.yaml", "include: [../base/a.yaml, ../base/b.yaml]\nrl: {steps: 7}\n"
    )
    config = load_config([top])
    assert (config.seed, config.rl.steps, config.rl.mini_batches) == (2, 7, 2)


def test_a_circle_of_includes_is_refused_and_a_diamond_is_not(tmp_path):
    base = write(tmp_path, "base.yaml", "seed: 9\n")
    write(tmp_path, "left.yaml", "include: base.yaml\n")
    write(tmp_path, "right.yaml", "include: base.yaml\n")
    top = write(tmp_path, "top.yaml", "include: [left.yaml, right.yaml]\n")
    assert load_config([top]).seed == 9
    base.write_text("\ninclude: top.yaml\n", encoding="utf-8")
    message = refusal([top])
    assert f"{base}:2: include goes in a circle" in message and "left.yaml" in message


def test_missing_files_name_the_file_and_who_includes_it(tmp_path):
    assert f"{tmp_path / 'no.yaml'}: not found" in refusal([tmp_path / "no.yaml"])
    top = write(tmp_path, "top.yaml", "include: gone.yaml\n")
    assert f"gone.yaml: not found, included by {top}" in refusal([top])
    assert str(tmp_path) in refusal([tmp_path])  # a folder
    bad = write(tmp_path, "bad.yaml", "seed: 1\ninclude: {a: b}\n")
    assert f"{bad}:2: include = {{a: 'b'}}: must be a file name or a list" in refusal([bad])


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("seed: 1\nrl: [1, 2\nmodel: 3\n", 3, "expected ',' or ']'"),
        ("seed: 1\n\nseed: 2\n", 3, "key seed is given twice"),
        ("rl:\n  steps: 1\n\tmini_batches: 2\n", 3, "cannot start any token"),
        ("run_dir: !!python/name:os.system x\n", 1, "could not determine a constructor"),
    ],
)
def test_malformed_yaml_names_file_and_line(tmp_path, text, line, reason):
    path = write(tmp_path, "override.yaml", text)
    message = refusal([path])
    assert message.startswith(f"{path}:{line}: not valid YAML") and reason in message


def test_other_unreadable_content_is_refused_with_the_file(tmp_path):
    assert "must be a mapping" in refusal([write(tmp_path, "list.yaml", "- 1\n")])
    assert "given twice" in refusal(
        [write(tmp_path, "twice.yaml", "rl.steps: 1\nrl: {steps: 2}\n")]
    )
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"seed: \xff\xfe1\n")
    assert f"{binary}: not valid YAML" in refusal([binary])
    deep = write(tmp_path, "deep.yaml", "seed: " + "[" * 5000)
    assert f"{deep}: not valid YAML" in refusal([deep])
    assert load_config([write(tmp_path, "empty.yaml", "# nothing\n")]) == Config()


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("rl.lr", "rl.optimizer.lr?"),
        ("lr", "rl.optimizer.lr"),
        ("mtp.trunk.sginal", "mtp.trunk.signal?"),
        ("mtp.trnk.signal", "mtp.trunk.signal"),
        ("rl.dynamic_sampling.enable", "rl.dynamic_sampling.enabled?"),
        ("parallel.tp", "parallel has: tensor"),
        ("nonsense", "There are: run_dir"),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(key, suggestion):
    message = refusal([], [f"{key}=1"])
    assert f"unknown key {key}." in message and suggestion in message


def test_unknown_keys_name_file_and_line_and_all_of_them_are_reported(tmp_path):
    path = write(tmp_path, "a.yaml", "rl:\n  steps: 3\n  lr: 1e-4\nmodle:\n  num_layers: 2\n")
    with pytest.raises(ConfigError) as caught:
        load_config([path], ["sede=1"])
    assert caught.value.problems == [
        f"{path}:3: unknown key rl.lr. Did you mean rl.optimizer.lr?",
        f"{path}:4: unknown key modle. Did you mean model?",
        "override 'sede=1': unknown key sede. Did you mean seed?",
    ]


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        (
            "rl.steps='12'",
            "rl.steps = '12': must be an integer >= 1 and <= 1,000,000,000, not a string",
        ),
        ("rl.steps=true", "rl.steps = true: must be an integer >= 1"),
        ("rl.steps=1.0", "rl.steps = 1.0: must be an integer >= 1"),
        ("rl.steps=", "rl.steps = null: must be an integer >= 1"),
        ("rl.steps=0", "rl.steps = 0: must be an integer >= 1"),
        ("rl.optimizer.lr='1e-4'", "must be a number > 0 and <= 1, not a string"),
        ("rl.optimizer.lr=false", "rl.optimizer.lr = false: must be a number > 0"),
        ("rl.optimizer.lr=.nan", "must be a number > 0"),
        ("rl.optimizer.lr=.inf", "must be a number > 0"),
        ("rl.optimizer.beta1=1", "rl.optimizer.beta1 = 1: must be a number >= 0 and < 1"),
        ("rl.advantage.normalize=1", "must be true or false"),
        ("rl.advantage.normalize=yes", "rl.advantage.normalize = 'yes': must be true or false"),
        ("run_dir=12", "must be a string; write it in quotes"),
        ("mtp.trunk.signal=polcy", "one of none, ce, policy. Did you mean policy?"),
        ("mtp.trunk.signal=null", "mtp.trunk.signal = null: must be one of none, ce, policy"),
        ("mtp.preset=[occ]", "must be one of none, detach"),
        ("mtp.trunk.clamp=[0.0, x]", "mtp.trunk.clamp = [0.0, 'x']: must be a list of numbers"),
        ("mtp.trunk.clamp=1.0", "a list of numbers >= -1,000,000 and <= 1,000,000 or null"),
        ("data.task.params=[1]", "must be a mapping"),
        ("data.task.params={1: 2}", "data.task.params = {1: 2}: must be a mapping"),
        ("mtp=null", "mtp is a section"),
        ("seed=2147483648", "must be an integer >= 0 and <= 2,147,483,647"),
        ("rl.loss.clip_low=0", "rl.loss.clip_low = 0: must be a number > 0 and <= 1"),
        ("rl.steps", "must be key=value"),
        ("=3", "must be key=value"),
        ("rl.steps=[1", "override 'rl.steps=[1': not valid YAML"),
        ("tokenizer.alphabet=ab #c", "put the value in quotes"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_key_value_and_what_is_allowed(override, allowed):
    message = refusal([], [override])
    assert allowed in message and message.startswith(f"override {override!r}: ")


def test_wrong_values_in_a_file_name_the_line(tmp_path):
    path = write(tmp_path, "a.yaml", "rl:\n  loss:\n    clip_low: 1.5\n")
    assert refusal([path]) == f"{path}:3: rl.loss.clip_low = 1.5: must be a number > 0 and <= 1"


def test_overrides_are_yaml_values():
    config = load_config(
        [],
        [
            "rl.optimizer.lr=1e-4",
            "rl.optimizer.clip_grad=2",
            "mtp.trunk.clamp=[null, 3]",
            "data.task.params={digits: 2}",
            "data.task.params.terms=3",
            "tokenizer.alphabet='0123+=#'",
            "rl.loss.dual_clip=null",
            "mtp.head={signal: tv, weight: 0.5}",
            "run_dir=a=b",
        ],
    )
    assert config.rl.optimizer.lr == 1e-4
    assert config.rl.optimizer.clip_grad == 2.0 and type(config.rl.optimizer.clip_grad) is float
    assert config.mtp.trunk.clamp == [None, 3.0]
    assert config.data.task.params == {"digits": 2, "terms": 3}
    assert config.tokenizer.alphabet == "0123+=#"
    assert (config.mtp.head.signal, config.mtp.head.weight) == ("tv", 0.5)
    assert config.mtp.head.clip_grad == 1.0
    assert config.run_dir == "a=b"


def test_an_open_mapping_is_replaced_as_a_whole(tmp_path):
    base = write(tmp_path, "a.yaml", "data: {task: {params: {digits_a: 4, digits_b: 4}}}\n")
    config = load_config([base], ["data.task.params={digits: 2}"])
    assert config.data.task.params == {"digits": 2}
    assert load_config([base], ["data.task.params.digits_a=1"]).data.task.params == {
        "digits_a": 1,
        "digits_b": 4,
    }
    assert Config().data.task.params == {}
    twice = refusal([], ["data.task.params=[1]", "data.task.params.x=1"])
    assert "data.task.params = [1] has no entries to set" in twice
    assert load_config([], ["seed=2147483647"]).seed == 2147483647


def test_interpolation_sees_the_final_values(tmp_path):
    path = write(
        tmp_path, "a.yaml", "model:\n  ffn_hidden_size: ${model.hidden_size}\nrun_dir: r/${seed}\n"
    )
    config = load_config([path], ["model.hidden_size=64", "seed=7"])
    assert (config.model.ffn_hidden_size, config.run_dir) == (64, "r/7")
    weight = load_config([], ["mtp.preset=policy", "mtp.head.weight=${mtp.trunk.weight}"])
    assert weight.mtp.head.weight == 1.0
    copied = load_config(
        [], ["data.task.params={a: '${seed}'}", "mtp.trunk.clamp=['${mtp.trunk.ema}', null]"]
    )
    assert copied.data.task.params == {"a": 0} and type(copied.data.task.params) is dict
    assert copied.mtp.trunk.clamp == [0.0, None] and type(copied.mtp.trunk.clamp) is list
    bad = write(tmp_path, "b.yaml", "seed: 1\nrun_dir: ${no.such.key}\n")
    assert f"{bad}:2: run_dir = '${{no.such.key}}'" in refusal([bad])
    assert "Recursive interpolation" in refusal(
        [], ["run_dir=${data.verifier}", "data.verifier=${run_dir}"]
    )
    assert "must be an integer" in refusal([], ["seed=${run_dir}"])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        *([f"mtp.preset={name}", "mtp.trunk.weight=0.7"] for name in PRESETS["mtp.preset"]),
        *([f"rl.algorithm={name}", "rl.optimizer.lr=1e-6"] for name in PRESETS["rl.algorithm"]),
        ["run_dir='1e-4'", "data.corpus='yes'", "data.prompts='true'", "data.verifier='12'"],
        ["run_dir='2024-01-01'", "data.chat.system=''", "tokenizer.alphabet=' #\"\\\\:é√\t'"],
        ["run_dir='\\${seed}'", "data.task.params={a: 1.0, b: [x, null, '\\${y}'], c: {d: '07'}}"],
    ],
)
def test_a_saved_configuration_loads_to_the_same(tmp_path, overrides):
    config = load_config([], overrides)
    save_config(config, tmp_path / "config.yaml")
    assert load_config([tmp_path / "config.yaml"]) == config
    assert to_yaml(load_config([tmp_path / "config.yaml"])) == to_yaml(config)


def test_an_escaped_interpolation_is_text():
    assert load_config([], ["run_dir='\\${seed}'"]).run_dir == "${seed}"


@pytest.mark.parametrize("value", [1e-5, 1e-300, 0.1, 123456789.125, 1e11, math.pi])
def test_numbers_survive_the_round_trip_exactly(tmp_path, value):
    config = Config()
    config.rl.optimizer.clip_grad = value
    save_config(config, tmp_path / "config.yaml")
    assert load_config([tmp_path / "config.yaml"]).rl.optimizer.clip_grad == value


@pytest.mark.parametrize("path", SHIPPED, ids=[str(path.relative_to(CONF)) for path in SHIPPED])
def test_shipped_files_load(path):
    load_config([path])


def test_the_demo_is_what_it_is_documented_to_be():
    demo = load_config([CONF / "demo.yaml"])
    assert (demo.rl.loss.clip_low, demo.rl.loss.clip_high) == (0.2, 0.28)
    assert demo.mtp.preset == "occ_exact" and demo.rl.optimizer.lr == 7e-5
    assert demo.data.task.params == {"digits_a": 3, "digits_b": 2}


def test_a_key_of_an_earlier_version_is_named_with_its_successor(tmp_path):
    """A saved configuration has every key: null asked for nothing."""
    path = tmp_path / "config.yaml"
    path.write_text("rl: {loss: {importance_cap: null}}\n", encoding="utf-8")
    assert load_config([path]) == load_config([])
    path.write_text("rl: {loss: {importance_cap: 2.0}}\n", encoding="utf-8")
    message = refusal([path])
    assert message.startswith(f"{path}:1: rl.loss.importance_cap is no key any more")
    assert "rl.correction.weights=token and rl.correction.high" in message
