"""The command ``convert``: what it prints, verifies and refuses."""

from __future__ import annotations

import gc
import json
import os
import pickle

import pytest
import torch

from megatron_occ.cli import main
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.workspace import NOTES, Workspace
from megatron_occ.mcore.verify import verify
from tests.mcore.convert_folders import make_folder, read_tensors, write_tensors


def convert(*words):
    main(["convert", *map(str, words)])


def refused(*words):
    with pytest.raises(SystemExit) as caught:
        convert(*words)
    return str(caught.value)


def edit_config(folder, **values):
    content = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("glm", (), ["trunk", "MTP depth 1"]),
        ("deepseek yarn", ("--dtype", "bfloat16"), ["trunk", "MTP depth 1"]),
        ("glm", ("--mtp", "expand:2"), ["MTP depth 1", "nothing to compare with"]),
        ("mimo", (), ["trunk", "MTP depth 1"]),
        ("mimo", ("--mtp", "expand:2"), ["MTP depth 1", "nothing to compare with"]),
        ("llama 3.1", ("--mtp", "init:1"), ["trunk", "with them, and no server", "were added"]),
        ("glm flash", (), ["trunk", "not compared: transformers has none"]),
    ],
)
def test_verify_compares_with_transformers(tmp_path, capsys, name, options, found):
    folder = make_folder(tmp_path / "hf", name, 0 if name.startswith("llama") else 1)
    if name == "mimo":
        # as published: a model type that transformers does not know, and code that is not run
        edit_config(folder, model_type="mimo", auto_map={"AutoConfig": "mimo.MiMoConfig"})
    convert("import", folder, tmp_path / "mcore", "--verify", *options)
    text = capsys.readouterr().out
    assert "verified against transformers" in text
    assert all(part in text for part in found)


def test_verify_finds_other_weights(tmp_path, monkeypatch):
    folder, other = (make_folder(tmp_path / each, "llama") for each in ("hf", "other"))
    tensors = read_tensors(other)
    tensors["model.layers.1.mlp.down_proj.weight"].neg_()
    write_tensors(other, tensors)
    convert("import", other, tmp_path / "mcore")
    with pytest.raises(FolderError, match=r"is not what transformers computes: .* trunk"):
        verify(folder, tmp_path / "mcore")


def test_verify_says_first_what_it_cannot_do(tmp_path):
    folder = make_folder(tmp_path / "hf", "deepseek", 1)
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    message = refused("import", folder, tmp_path / "mcore", "--verify")
    assert "transformers runs fp8 weights on GPUs alone" in message
    assert not (tmp_path / "mcore").exists()


def test_a_dry_run_lists_everything_and_writes_nothing(tmp_path, capsys):
    folder = make_folder(tmp_path / "hf", "deepseek", 2)
    convert("import", folder, tmp_path / "mcore", "--dry-run", "--mtp", "drop")
    text = capsys.readouterr().out
    for name in read_tensors(folder):
        assert name in text
    assert "[QueryKeyValue" not in text and "[GateUp" in text
    assert "(dropped)  <-  model.layers.3.eh_proj.weight" in text
    assert "peak memory about" in text
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    convert("import", folder, tmp_path / "mcore")
    capsys.readouterr()
    convert("export", tmp_path / "mcore", tmp_path / "back", "--dry-run")
    text = capsys.readouterr().out
    assert all(name in text for name in read_tensors(folder))
    convert("inspect", tmp_path / "mcore")
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1.weight  [4, 32, 32]" in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "back").exists()


def test_a_reader_that_makes_no_difference_is_refused(tmp_path):
    convert("import", make_folder(tmp_path / "hf", "glm", 1), tmp_path / "mcore")
    message = refused("export", tmp_path / "mcore", tmp_path / "back", "--reader", "sglang")
    assert "is for MiMo's MTP layers" in message
    assert "this is Glm4MoeForCausalLM with 1 MTP layer, and model.mtp_reads=after" in message


def test_another_architecture_than_that_of_the_config_to_keep(tmp_path):
    folder = make_folder(tmp_path / "hf", "llama")
    convert("import", folder, tmp_path / "mcore")
    edit_config(tmp_path / "mcore" / "hugging_face", _name_or_path="kept")
    arguments = ("export", tmp_path / "mcore", tmp_path / "back", "--architecture")
    assert "has another one" in refused(*arguments, "Qwen2ForCausalLM", "--like", folder)
    convert(*arguments, "LlamaForCausalLM")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["_name_or_path"] == "kept"


@pytest.mark.parametrize("size", ["5", "GB", "-1GB", "0GB", "1.2.3GB"])
def test_sizes_are_spelled_right_or_refused(tmp_path, size):
    assert "write a size such as" in refused("export", "a", "b", f"--shard-size={size}")


class TestWhatIsInTheWay:
    @pytest.fixture
    def folder(self, tmp_path):
        return make_folder(tmp_path / "hf", "llama")

    def test_source_and_target_are_apart(self, folder):
        before = read_tensors(folder)
        for target in (folder, folder / "mcore", folder.parent):
            assert "is not apart from" in refused("import", folder, target, "--force")
        assert read_tensors(folder).keys() == before.keys()

    def test_folders_of_others_stay(self, folder, tmp_path):
        for name in ("mcore.partial", "mcore.old"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "mine").write_text("x")
        assert "is in the way" in refused("import", folder, tmp_path / "mcore")
        (tmp_path / "mcore.partial" / "mine").unlink()
        (tmp_path / "mcore.partial").rmdir()
        convert("import", folder, tmp_path / "mcore")
        convert("import", folder, tmp_path / "mcore", "--force")
        assert (tmp_path / "mcore.old" / "mine").read_text() == "x"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "mcore", "mcore.old"]

    def test_an_end_between_the_last_two_steps(self, folder, tmp_path, monkeypatch):
        def stop(_workspace):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Workspace, "publish", stop)
            refused("import", folder, tmp_path / "mcore")
        gc.collect()  # a process that ended holds no lock
        assert (tmp_path / "mcore.partial" / NOTES).is_dir()
        convert("import", folder, tmp_path / "mcore")
        assert not (tmp_path / "mcore" / NOTES).exists()

    def test_two_at_once(self, folder, tmp_path):
        first = Workspace(folder, tmp_path / "mcore", "plan", force=False)
        with pytest.raises(FolderError, match="another process is at work on it"):
            Workspace(folder, tmp_path / "mcore", "plan", force=False)
        assert first.folder.is_dir()


class Planted:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize("planted", [Planted(), {"x": torch.nn.Linear(1, 1)}])
def test_metadata_with_anything_else_in_it_is_refused(tmp_path, planted):
    convert("import", make_folder(tmp_path / "hf", "llama"), tmp_path / "mcore")
    (tmp_path / "mcore" / ".metadata").write_bytes(pickle.dumps(planted))
    assert "has no place in it" in refused("export", tmp_path / "mcore", tmp_path / "back")


def test_a_tied_model_with_experts_and_depths_goes_both_ways(tmp_path):
    folder = make_folder(tmp_path / "hf", "glm", 1)
    tensors = read_tensors(folder)
    del tensors["lm_head.weight"]
    repeated = "model.layers.3.shared_head.head.weight"
    tensors[repeated] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(folder, tensors)
    edit_config(folder, tie_word_embeddings=True)
    convert("import", folder, tmp_path / "mcore")
    convert("export", tmp_path / "mcore", tmp_path / "back")
    found = read_tensors(tmp_path / "back")
    # servers of this architecture look for an output layer
    assert found.keys() == tensors.keys() | {"lm_head.weight"}
    assert torch.equal(found["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(found[repeated], tensors[repeated])
    convert("import", tmp_path / "back", tmp_path / "again")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"]
    write_tensors(folder, tensors | {repeated: tensors[repeated] + 1})
    message = refused("import", folder, tmp_path / "other")
    assert f"{repeated} is not the same as model.embed_tokens.weight" in message
    # what is left behind need not agree
    convert("import", folder, tmp_path / "other", "--mtp", "drop")


def test_a_tokenizer_that_cannot_be_read_does_not_hold_up_the_weights(tmp_path, caplog):
    folder = make_folder(tmp_path / "hf", "llama")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.X", null]}}')
    convert("import", folder, tmp_path / "mcore")
    assert "the checkpoint will go with any tokenizer" in caplog.text
    assert json.loads((tmp_path / "mcore" / "meta.json").read_text())["tokenizer"] is None
    kept = tmp_path / "mcore" / "hugging_face" / "tokenizer_config.json"
    assert kept.read_text() == (folder / "tokenizer_config.json").read_text()
