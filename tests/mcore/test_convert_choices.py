"""MTP layers kept, left behind, copied or made anew; fp8 weights; other dtypes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_occ.commands.convert import main
from megatron_occ.convert.checkpoints import export_checkpoint, read_checkpoint
from megatron_occ.convert.distributed import DistributedReader
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.importing import import_folder
from megatron_occ.convert.plan import MTPChoice
from megatron_occ.convert.slots import model_slots
from tests.mcore.convert_folders import LAYERS, make_folder, read_tensors, write_tensors


def weights(checkpoint):
    """All parameters of a checkpoint by name."""
    found = read_checkpoint(checkpoint)
    slots = model_slots(found.config.model, found.config.mtp.num_layers, found.vocab_size)
    reader = DistributedReader(checkpoint)
    assert reader.keys() == {slot.key for slot in slots.values()}
    return {name: reader.tensor(slot) for name, slot in slots.items()}


def convert(folder, target, mtp="keep", **options):
    import_folder(folder, target, mtp=MTPChoice.parse(mtp), **options)
    return weights(target)


def depth(tensors, number):
    prefix = f"mtp.layers.{number}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.mark.parametrize("name", ["mimo", "deepseek"])
def test_drop_leaves_the_layers_behind_and_says_so(tmp_path, name):
    folder = make_folder(tmp_path / "hf", name, 2)
    kept, dropped = (convert(folder, tmp_path / each, each) for each in ("keep", "drop"))
    assert dropped.keys() == {key for key in kept if not key.startswith("mtp.")}
    assert all(torch.equal(dropped[key], kept[key]) for key in dropped)
    export_checkpoint(tmp_path / "drop", tmp_path / "back")
    content = json.loads((tmp_path / "back" / "config.json").read_text())
    assert content["num_nextn_predict_layers"] == 0
    export_checkpoint(tmp_path / "keep", tmp_path / "also", most_depths=0)
    assert read_tensors(tmp_path / "also").keys() == read_tensors(tmp_path / "back").keys()


@pytest.mark.parametrize(("name", "second"), [("mimo", "mtp_layers.1."), ("deepseek", "layers.4.")])
def test_a_folder_for_servers_has_the_first_layer_alone(tmp_path, name, second):
    folder = make_folder(tmp_path / "hf", name, 2)
    convert(folder, tmp_path / "mcore", "keep")
    main(["export", str(tmp_path / "mcore"), str(tmp_path / "back"), "--mtp", "first"])
    content = json.loads((tmp_path / "back" / "config.json").read_text())
    assert content["num_nextn_predict_layers"] == 1
    left, whole = read_tensors(tmp_path / "back"), read_tensors(folder)
    assert left.keys() == {key for key in whole if f"model.{second}" not in key}
    assert all(torch.equal(left[key], whole[key]) for key in left)


def mtp_file(folder, name="mtp.safetensors"):
    """Move the tensors of the MTP layers into a file that the index does not name."""
    tensors = read_tensors(folder)
    last = {key: tensors.pop(key) for key in list(tensors) if f"layers.{LAYERS}." in key}
    write_tensors(folder, tensors, shards=2)
    save_file(last, folder / name)


@pytest.mark.parametrize("name", ["deepseek", "glm"])
def test_a_model_that_transformers_saved_has_lost_its_layers(tmp_path, name):
    folder = make_folder(tmp_path / "hf", name, 1)
    mtp_file(folder)
    (folder / "mtp.safetensors").unlink()
    with pytest.raises(FolderError, match=r"predict_layers=1, but .* of 0 .*--mtp drop .*init:K"):
        convert(folder, tmp_path / "keep")
    assert not any(key.startswith("mtp.") for key in convert(folder, tmp_path / "drop", "drop"))
    fresh = depth(convert(folder, tmp_path / "init", "init:2"), 1)
    assert torch.equal(fresh["enorm.weight"], torch.ones(32))
    with pytest.raises(FolderError, match="tensors of 0 MTP layers"):
        convert(folder, tmp_path / "expand", "expand:2")


@pytest.mark.parametrize("shards", [1, 2])
def test_layers_in_a_file_that_the_index_does_not_name_are_read(tmp_path, shards):
    whole = make_folder(tmp_path / "whole", "glm", 1)
    apart = make_folder(tmp_path / "apart", "glm", 1)
    mtp_file(apart)
    if shards == 1:
        rest = {k: v for k, v in read_tensors(whole).items() if f"layers.{LAYERS}." not in k}
        layer = (apart / "mtp.safetensors").read_bytes()
        write_tensors(apart, rest)
        (apart / "mtp.safetensors").write_bytes(layer)
    expected, found = (convert(f, tmp_path / f"{f.name} m") for f in (whole, apart))
    assert found.keys() == expected.keys() and depth(found, 0)
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_another_file_that_the_index_does_not_name_is_left_alone(tmp_path):
    folder = make_folder(tmp_path / "hf", "glm", 1)
    mtp_file(folder, "consolidated.safetensors")
    with pytest.raises(FolderError, match="tensors of 0 MTP layers"):
        convert(folder, tmp_path / "mcore")


@pytest.mark.parametrize("name", ["mimo", "glm"])
def test_expand_copies_the_last_depth(tmp_path, name):
    folder = make_folder(tmp_path / "hf", name, 2)
    tensors = convert(folder, tmp_path / "mcore", "expand:4")
    first, last = depth(tensors, 0), depth(tensors, 1)
    assert not torch.equal(first["eh_proj.weight"], last["eh_proj.weight"])
    for number in (2, 3):
        copied = depth(tensors, number)
        assert copied.keys() == last.keys()
        assert all(torch.equal(copied[key], last[key]) for key in last)
    export_checkpoint(tmp_path / "mcore", tmp_path / "back")
    content = json.loads((tmp_path / "back" / "config.json").read_text())
    assert content["num_nextn_predict_layers"] == 4


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama tied", "glm"])
def test_init_makes_layers_as_megatron_initialises(tmp_path, name):
    folder = make_folder(tmp_path / "hf", name)
    tensors = convert(folder, tmp_path / "mcore", "init:2")
    assert len(depth(tensors, 0)) == len(depth(tensors, 1)) > 8
    for key, value in depth(tensors, 1).items():
        if key.endswith(("layernorm.weight", "norm.weight", "layer_norm_weight")):
            assert torch.equal(value, torch.ones_like(value)), key
        elif value.dim() == 1:
            assert not value.any(), key
        else:
            scaled = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = 0.02 / (2 * LAYERS) ** 0.5 if scaled else 0.02
            assert value.std() == pytest.approx(std, rel=0.2), key
            assert not torch.equal(value, depth(tensors, 0)[key])
    again = convert(folder, tmp_path / "again", "init:2")
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("name", "depths", "mtp", "message"),
    [
        ("mimo", 1, "init:1", "brings 1 MTP layer. Use keep, or expand:2"),
        ("llama", 0, "expand:2", "no MTP layer to copy. Use init:2"),
        ("mimo", 2, "expand:2", "it has 2 MTP layers already"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused(tmp_path, name, depths, mtp, message):
    folder = make_folder(tmp_path / "hf", name, depths)
    with pytest.raises(FolderError, match=message):
        convert(folder, tmp_path / "mcore", mtp)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_for_sglang_says_which_states_its_head_reads(tmp_path):
    """What was trained with the state after the norm goes there as it is, and comes back so."""
    convert(make_folder(tmp_path / "hf", "llama"), tmp_path / "mcore", "init:1")
    options = dict(architecture="MiMoForCausalLM", for_sglang=True)
    export_checkpoint(tmp_path / "mcore", tmp_path / "mimo", **options)
    back = import_folder(tmp_path / "mimo", tmp_path / "again", mtp=MTPChoice("keep")).plan
    assert back.config.model.mtp_reads == "after"
    again, first = (weights(tmp_path / name) for name in ("again", "mcore"))
    assert all(torch.equal(again[key], value) for key, value in first.items())


def test_for_other_readers_the_final_norm_is_in_the_heads_norm(tmp_path):
    folder = make_folder(tmp_path / "hf", "llama")
    convert(folder, tmp_path / "mcore", "init:1")
    export_checkpoint(tmp_path / "mcore", tmp_path / "mimo", architecture="MiMoForCausalLM")
    back = import_folder(tmp_path / "mimo", tmp_path / "again", mtp=MTPChoice("keep")).plan
    assert back.config.model.mtp_reads == "before"
    final = read_tensors(folder)["model.norm.weight"]
    found = read_tensors(tmp_path / "mimo")["model.mtp_layers.0.hidden_layernorm.weight"]
    torch.testing.assert_close(found, final / final.square().mean().sqrt())


@pytest.mark.parametrize("text", ["", "keep:1", "init", "init:0", "init:x", "more"])
def test_a_choice_is_spelled_right_or_refused(text):
    with pytest.raises(ValueError, match="none of keep, drop, init:K, expand:K"):
        MTPChoice.parse(text)


@pytest.mark.parametrize("shard", [10**9, 20_000])
@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2", "qwen3", "qwen3 moe"])
def test_added_depths_leave_beside_the_model_and_come_back(tmp_path, name, shard):
    """The trunk is the folder as it was; transformers reads nothing else."""
    folder = make_folder(tmp_path / "hf", name)
    trained = convert(folder, tmp_path / "mcore", "init:2")
    export_checkpoint(tmp_path / "mcore", tmp_path / "out", shard=shard)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["num_nextn_predict_layers"] == 2
    beside = load_file(tmp_path / "out" / "mtp.safetensors")
    prefix = "model.mtp_layers.1."
    assert torch.equal(beside[f"{prefix}eh_proj.weight"], depth(trained, 1)["eh_proj.weight"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    source = read_tensors(folder)
    assert index["weight_map"].keys() == source.keys()
    assert read_tensors(tmp_path / "out").keys() == source.keys() | beside.keys()
    again = convert(tmp_path / "out", tmp_path / "again")
    assert again.keys() == trained.keys()
    assert all(torch.equal(again[key], trained[key]) for key in trained)
    ids = torch.arange(12).view(1, -1)
    run = AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        expected, found = (run(f)(ids).logits for f in (folder, tmp_path / "out"))
    assert torch.equal(found, expected)


def test_without_added_depths_a_folder_says_nothing_of_them(tmp_path):
    convert(make_folder(tmp_path / "hf", "llama"), tmp_path / "mcore", "init:1")
    export_checkpoint(tmp_path / "mcore", tmp_path / "back", most_depths=0)
    assert not (tmp_path / "back" / "mtp.safetensors").exists()
    assert "predict_layers" not in (tmp_path / "back" / "config.json").read_text()


def test_added_depths_of_a_plain_model_may_leave_as_mimo(tmp_path):
    convert(make_folder(tmp_path / "hf", "llama"), tmp_path / "mcore", "init:1")
    export_checkpoint(tmp_path / "mcore", tmp_path / "mimo", architecture="MiMoForCausalLM")
    found, source = read_tensors(tmp_path / "mimo"), read_tensors(tmp_path / "hf")
    assert all(torch.equal(found[key], source[key]) for key in source)
    assert not found["model.layers.0.self_attn.q_proj.bias"].any()


def test_a_dtype_is_that_of_all_weights_but_the_bias_of_the_experts(tmp_path):
    folder = make_folder(tmp_path / "hf", "glm", 1)
    single = convert(folder, tmp_path / "as_is")
    tensors = convert(folder, tmp_path / "mcore", dtype=torch.bfloat16)
    for key, value in tensors.items():
        expected = torch.float32 if "expert_bias" in key else torch.bfloat16
        assert value.dtype == expected, key
        assert torch.equal(value, single[key].to(expected))


def test_fp8_blocks_are_multiplied_out(tmp_path):
    folder = make_folder(tmp_path / "hf", "deepseek", 1)
    generator, block = torch.Generator().manual_seed(5), (16, 8)
    tensors, expected = {}, {}
    for name, tensor in read_tensors(folder).items():
        is_matrix = "proj" in name and "eh_proj" not in name
        if not is_matrix:
            tensors[name] = expected[name] = tensor.to(torch.bfloat16)
            continue
        rows, columns = tensor.shape
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        scale = 0.5 + torch.rand(grid, generator=generator)
        quantized = tensor.to(torch.float8_e4m3fn)
        tensors |= {name: quantized, f"{name}_scale_inv": scale}
        # the definition, entry by entry
        whole = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        expected[name] = (quantized.float() * whole[:rows, :columns]).to(torch.bfloat16)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(content))
    write_tensors(folder, tensors, shards=2)
    convert(folder, tmp_path / "mcore")
    export_checkpoint(tmp_path / "mcore", tmp_path / "back")
    found = read_tensors(tmp_path / "back")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    content = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in content
    assert content["torch_dtype"] == "bfloat16"
