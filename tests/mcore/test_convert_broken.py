"""Folders and checkpoints that are damaged or do not fit: named file and tensor, nothing left."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megatron_occ.convert.checkpoints import export_checkpoint
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.importing import import_folder
from megatron_occ.convert.plan import MTPChoice
from tests.mcore.convert_folders import make_folder, read_tensors, write_tensors

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
NORM = "model.layers.3.enorm.weight"


@pytest.fixture
def folder(tmp_path):
    """A whole one, of three shards."""
    return make_folder(tmp_path / "hf", "deepseek", 1, shards=3)


def edit(name, change):
    """Change the content of a JSON file."""

    def run(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return run


def retensor(change):
    """Change the tensors."""

    def run(folder):
        tensors = read_tensors(folder)
        change(tensors)
        write_tensors(folder, tensors, shards=3)

    return run


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


def cut(folder):
    with (folder / FIRST).open("r+b") as file:
        file.truncate((folder / FIRST).stat().st_size - 10)


def grow(folder):
    with (folder / FIRST).open("ab") as file:
        file.write(b"0" * 10)


def in_header(old, new):
    def run(folder):
        data = (folder / FIRST).read_bytes()
        assert old in data
        (folder / FIRST).write_bytes(data.replace(old, new, 1))

    return run


def twice(folder):
    shutil.copyfile(folder / FIRST, folder / "again.safetensors")
    index = json.loads((folder / INDEX).read_text())
    name = next(n for n, shard in index["weight_map"].items() if shard != FIRST)
    index["weight_map"][name] = "again.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def pickled(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def another_dtype(tensors):
    tensors[GATE] = tensors[GATE].to(torch.bfloat16)


def refused_and_empty(folder):
    edit(CONFIG, lambda c: c.update(architectures=["Step3p5ForCausalLM"]))(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()


CONFIG = "config.json"
BROKEN = {
    "no config": (
        lambda folder: (folder / CONFIG).unlink(),
        r"is no Hugging Face folder: it has no config\.json and no meta\.json\. Give a folder with",
    ),
    "no json": (lambda f: (f / CONFIG).write_text("{"), r"config\.json: is no JSON"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), r"config\.json: holds no object"),
    "unknown architecture": (
        edit(CONFIG, lambda c: c.update(architectures=["OtherForCausalLM"])),
        "OtherForCausalLM is not known: there are tables for",
    ),
    "refused architecture": (
        edit(CONFIG, lambda c: c.update(architectures=["Step3p5ForCausalLM"])),
        "Step3p5ForCausalLM can't be converted: each of its MTP depths has an output layer",
    ),
    "refused architecture without tensors": (
        refused_and_empty,
        "Step3p5ForCausalLM can't be converted: each of its MTP depths has an output layer",
    ),
    "scaled rotary embedding": (
        edit(CONFIG, lambda c: c.update(rope_parameters={"type": "linear", "factor": 40})),
        r"config\.json: rope_scaling has the type 'linear': only 'yarn' can be converted",
    ),
    "setting that nobody looks at": (
        edit(CONFIG, lambda c: c.update(logit_scale=0.5)),
        r"config\.json: logit_scale=0\.5: not known for this architecture, and may change",
    ),
    "unknown setting": (
        edit(CONFIG, lambda c: c.update(hidden_act="gelu")),
        "hidden_act='gelu': only 'silu' can be converted",
    ),
    "missing setting": (
        edit(CONFIG, lambda c: c.pop("kv_lora_rank")),
        r"config\.json: kv_lora_rank is missing",
    ),
    "setting of another type": (
        edit(CONFIG, lambda c: c.update(num_hidden_layers="three")),
        r"config\.json: .*model\.num_layers",
    ),
    "K too large": (
        edit(CONFIG, lambda c: c.update(num_nextn_predict_layers=2)),
        "num_nextn_predict_layers=2, but there are tensors of 1 MTP layer ",
    ),
    "K too small": (
        edit(CONFIG, lambda c: c.update(num_nextn_predict_layers=0)),
        "num_nextn_predict_layers=0, but there are tensors of 1 MTP layer ",
    ),
    "another quantization": (
        edit(CONFIG, lambda c: c.update(quantization_config={"quant_method": "awq"})),
        "quant_method='awq': only blocks of fp8",
    ),
    "missing shard": (lambda f: (f / FIRST).unlink(), f"names {FIRST}, which is not there"),
    "missing index": (
        lambda f: (f / INDEX).unlink(),
        "is missing, and the folder has 3 safetensors files",
    ),
    "index without a map": (edit(INDEX, lambda c: c.pop("weight_map")), "has no weight_map"),
    "index leads elsewhere": (
        edit(INDEX, lambda c: c["weight_map"].update({NORM: "../x.safetensors"})),
        "which is no file of this folder",
    ),
    "index names what is not there": (
        edit(INDEX, lambda c: c["weight_map"].update(x=FIRST)),
        rf"{FIRST}: x is missing, {INDEX} has it there",
    ),
    "index lacks a tensor": (
        edit(INDEX, lambda c: c["weight_map"].pop(NORM)),
        rf"safetensors: {NORM} is not in {INDEX}",
    ),
    "index names the wrong shard": (
        edit(INDEX, lambda c: c["weight_map"].update({"lm_head.weight": "wrong"})),
        "names wrong, which is not there",
    ),
    "a tensor twice": (twice, r"is in again\.safetensors too|is in model-0000"),
    "cut off": (cut, rf"{FIRST}: has \d+ bytes, its header describes \d+: it is cut off"),
    "more bytes": (grow, rf"{FIRST}: has \d+ bytes, its header describes \d+"),
    "damaged header": (in_header(b'{"', b"{{"), rf"{FIRST}: has a damaged header"),
    "damaged length": (
        lambda f: (f / FIRST).write_bytes(b"\xff" * 8 + (f / FIRST).read_bytes()[8:]),
        f"{FIRST}: is cut off or no safetensors file",
    ),
    "unknown dtype": (in_header(b'"F32"', b'"I32"'), "has the dtype I32, which can't be converted"),
    "only a pickle": (pickled, r"pytorch_model\.bin is a pickle, which is never opened"),
    "missing tensor": (retensor(lambda t: t.pop(GATE)), f"{GATE} is missing"),
    "unknown tensor": (
        retensor(lambda t: t.update({"model.layers.0.extra.weight": torch.ones(2)})),
        r"safetensors: model\.layers\.0\.extra\.weight has no place in DeepseekV3ForCausalLM",
    ),
    "renamed tensor": (
        retensor(lambda t: rename(t, NORM, "model.layers.3.e_norm.weight")),
        r"enorm\.weight is missing[\s\S]*model\.layers\.3\.e_norm\.weight has no place",
    ),
    "layer too many": (
        edit(CONFIG, lambda c: c.update(first_k_dense_replace=2)),
        r"model\.layers\.1\.mlp\.gate_proj\.weight",
    ),
    "wrong shape": (
        retensor(lambda t: t.update({GATE: torch.ones(8, 32)})),
        rf"{GATE} has the shape \[8, 32\], config\.json makes it \[16, 32\]",
    ),
    "wrong dtype": (retensor(another_dtype), f"{GATE}.* have different dtypes: bfloat16, float32"),
    "layers of different dtypes": (
        retensor(
            lambda t: t.update(
                {n: t[n].half() for n in t if "layers.1.mlp.experts" in n and "experts.2." in n}
            )
        ),
        r"the layers have different dtypes \(float16, float32\)\. Give --dtype",
    ),
    "fp8 without scales": (
        retensor(
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)})
        ),
        r"lm_head\.weight is fp8, and its scales lm_head\.weight_scale_inv are missing",
    ),
    "another copy of the embedding": (
        retensor(lambda t: t["model.layers.3.embed_tokens.weight"].add_(1)),
        r"model\.layers\.3\.embed_tokens\.weight is not the same as model\.embed_tokens\.weight",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused_by_file_and_tensor(folder, tmp_path, kind):
    damage, message = BROKEN[kind]
    damage(folder)
    with pytest.raises(FolderError, match=message) as caught:
        import_folder(folder, tmp_path / "mcore", mtp=MTPChoice("keep"))
    assert str(folder) in str(caught.value) or "layers have different" in str(caught.value)
    # neither half a checkpoint nor one that a second call would take for checked
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_output_layer_that_is_not_the_embedding_it_is_tied_to(tmp_path):
    tied = make_folder(tmp_path / "hf", "llama tied")
    tensors = read_tensors(tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    write_tensors(tied, tensors)
    with pytest.raises(FolderError, match=r"lm_head\.weight is not the same .*tie_word_embeddings"):
        import_folder(tied, tmp_path / "mcore", mtp=MTPChoice("keep"))


@pytest.fixture
def checkpoint(folder, tmp_path):
    import_folder(folder, tmp_path / "mcore", mtp=MTPChoice("keep"))
    return tmp_path / "mcore"


def cut_checkpoint(folder):
    (file,) = folder.glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BROKEN_CHECKPOINTS = {
    "no meta": (lambda f: (f / "meta.json").unlink(), "is no checkpoint of this project"),
    "no metadata": (lambda f: (f / ".metadata").unlink(), "is no distributed checkpoint"),
    "file cut off": (cut_checkpoint, r"\.distcp: .* can't be read"),
    "another model": (
        edit("meta.json", lambda c: c["model"].update(hidden_size=64)),
        r"has the shape \[23, 32\], the model \[23, 64\]",
    ),
    "more depths": (
        edit("meta.json", lambda c: c.update(mtp_layers=2)),
        r"mtp\.layers\.1\..* is missing",
    ),
    "unknown key": (
        edit("meta.json", lambda c: c["model"].update(colour=1)),
        r"meta\.json: can't be read: .*colour",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint_is_refused(checkpoint, tmp_path, kind):
    damage, message = BROKEN_CHECKPOINTS[kind]
    damage(checkpoint)
    shutil.rmtree(checkpoint / "hugging_face")
    with pytest.raises(FolderError, match=message):
        export_checkpoint(checkpoint, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_nothing_is_overwritten_unless_forced(folder, checkpoint, tmp_path):
    before = {file.name: file.read_bytes() for file in checkpoint.glob("*.distcp")}
    with pytest.raises(FolderError, match="is there already: name another folder, or give --force"):
        import_folder(folder, checkpoint, mtp=MTPChoice("drop"))
    assert {file.name: file.read_bytes() for file in checkpoint.glob("*.distcp")} == before
    import_folder(folder, checkpoint, mtp=MTPChoice("drop"), force=True)
    assert json.loads((checkpoint / "meta.json").read_text())["mtp_layers"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]
