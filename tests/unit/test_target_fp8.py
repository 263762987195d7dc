"""FP8 weights of a target: made as files are read, stored once, read as published; refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from alpamayo_dflash.convert.config import ConvertConfig
from alpamayo_dflash.convert.run import run as convert
from alpamayo_dflash.kernels import fp8
from alpamayo_dflash.target import checkpoint as files
from alpamayo_dflash.target.alpamayo import Alpamayo, open_target
from alpamayo_dflash.target.checkpoint import read_target
from alpamayo_dflash.target.formats import TargetFormat
from alpamayo_dflash.target.fp8 import FP8Linear
from alpamayo_dflash.target.quantised import linears, make_fp8
from tests.helpers import random_target as factory

TEXT = "vlm.model.language_model.layers."
Q = f"{TEXT}1.self_attn.q_proj"
ALL = {"weights": "fp8", "expert_weights": "fp8", "vision_weights": "fp8"}
FORMAT = TargetFormat("fp8", "fp8", "fp8")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random target in bfloat16, as the official files are."""
    folder = tmp_path_factory.mktemp("fp8")
    factory.odd_target(folder).save_pretrained(folder / "checkpoint", dtype=torch.bfloat16)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def stored(saved):
    """The same, converted."""
    convert(ConvertConfig(checkpoint=str(saved), out=saved.parent / "stored", **ALL))
    return saved.parent / "stored"


@pytest.fixture
def copy(stored, tmp_path):
    """A converted one to spoil."""
    shutil.copytree(stored, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def bits(target):
    """Every tensor's dtype and bytes."""
    return {
        name: (tensor.dtype, tensor.reshape(-1).contiguous().view(torch.uint8))
        for name, tensor in target.state_dict().items()
    }


def same(first, second):
    a, b = bits(first), bits(second)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name][0] == b[name][0] and torch.equal(a[name][1], b[name][1]), name


def test_the_default_is_the_checkpoint_as_it_is(saved):
    target = Alpamayo.from_pretrained(saved)
    assert target.weight_formats == dict.fromkeys(("text", "expert", "vision"), "float32")
    assert not any(isinstance(module, FP8Linear) for module in target.modules())
    assert (
        open_target(str(saved), device="cpu")[1].hash == files.target_identity(saved, target.vlm_files).hash
    )


@pytest.mark.parametrize("part", ["text", "expert", "vision"])
def test_a_part_alone_is_made_as_it_is_read(saved, part):
    option = "weights" if part == "text" else f"{part}_weights"
    target, plain = Alpamayo.from_pretrained(saved, **{option: "fp8"}), Alpamayo.from_pretrained(saved)
    formats = dict.fromkeys(("text", "expert", "vision"), "float32") | {part: "fp8"}
    assert target.weight_formats == formats
    names = set(linears(target, part))
    for name, module in plain.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        made = target.get_submodule(name)
        assert isinstance(made, FP8Linear) == (name in names), name
        if name in names:
            values, scales = fp8.cast_rows(module.weight.data)
            assert torch.equal(made.weight.view(torch.uint8), values.view(torch.uint8))
            assert torch.equal(made.weight_scale, scales)
        else:
            assert torch.equal(made.weight, module.weight), name
    kept = {n: t for n, t in target.state_dict().items() if n.rpartition(".")[0] not in names}
    plain_tensors = plain.state_dict()
    for name, tensor in kept.items():
        assert torch.equal(tensor, plain_tensors[name]), name


def test_stored_and_made_and_turned_in_memory_are_the_same_bits(saved, stored):
    made = Alpamayo.from_pretrained(saved, **ALL)
    same(Alpamayo.from_pretrained(stored), made)
    same(Alpamayo.from_pretrained(stored, **ALL), made)
    turned = Alpamayo.from_pretrained(saved)
    make_fp8(turned, FORMAT)
    same(turned, made)
    make_fp8(turned, FORMAT)  # nothing is left to turn
    same(turned, made)


def test_pieces_of_a_weight_come_together(saved, monkeypatch):
    whole = Alpamayo.from_pretrained(saved, **ALL)
    monkeypatch.setattr(files, "_MAPPED_BYTES", 1000)
    same(Alpamayo.from_pretrained(saved, **ALL), whole)


def test_projections_of_one_input_share_storage(saved, stored):
    turned = Alpamayo.from_pretrained(saved)
    make_fp8(turned, FORMAT)
    for target in (Alpamayo.from_pretrained(stored), turned):
        for layer in [*target.text_layers, *target.expert.layers]:
            projections = [layer.self_attn.get_submodule(f"{x}_proj") for x in "qkv"]
            for name in ("weight", "weight_scale"):
                storages = {getattr(p, name).untyped_storage().data_ptr() for p in projections}
                assert len(storages) == 1


def test_half_the_bytes(saved, stored):
    """Of what is converted: e4m3 and four bytes a row of 48 inputs, beside bfloat16."""
    before, after = (load_file(folder / "model.safetensors") for folder in (saved, stored))
    names = [name for name in before if f"{name}_scale" in after]
    old = sum(before[name].nbytes for name in names)
    new = sum(after[name].nbytes + after[f"{name}_scale"].nbytes for name in names)
    scales = sum(after[f"{name}_scale"].nbytes for name in names)
    assert new == old // 2 + scales
    assert all(torch.equal(after[name], before[name]) for name in before if name not in names)


def test_the_record_and_a_second_run(saved, stored):
    record = json.loads((stored / "convert.json").read_text())
    _, identity = open_target(str(saved), device="cpu")
    assert record["source"] == identity.hash == record["provenance"]["parents"]["target"]
    assert record["format"]["parts"] == ["text", "expert", "vision"]
    again = convert(ConvertConfig(checkpoint=str(saved), out=stored, **ALL))
    assert again["nothing_to_do"] and again["layers"] == record["layers"]
    with pytest.raises(ValueError, match="holds another checkpoint"):
        convert(ConvertConfig(checkpoint=str(saved), out=stored, weights="fp8"))
    with pytest.raises(ValueError, match="holds another checkpoint"):
        convert(ConvertConfig(checkpoint=str(saved), out=saved, weights="fp8"))
    with pytest.raises(ValueError, match="F8_E4M3 already"):
        convert(ConvertConfig(checkpoint=str(stored), out=saved.parent / "twice", weights="fp8"))
    with pytest.raises(ValueError, match="nothing to convert"):
        ConvertConfig(checkpoint=str(saved), out=stored)


def test_shards_are_converted_one_by_one(saved, stored, tmp_path):
    shutil.copytree(saved, tmp_path / "sharded")
    tensors = load_file(saved / "model.safetensors")
    (tmp_path / "sharded/model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / "sharded" / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "sharded/model.safetensors.index.json").write_text(json.dumps(index))
    result = convert(ConvertConfig(checkpoint=str(tmp_path / "sharded"), out=tmp_path / "out", **ALL))
    assert result["shards"] == 2
    same(Alpamayo.from_pretrained(tmp_path / "out"), Alpamayo.from_pretrained(stored))


def test_another_format_is_another_target(saved, stored):
    hashes = {
        open_target(str(folder), device="cpu", format_=format_)[1].hash
        for folder, format_ in (
            (saved, TargetFormat()),
            (saved, TargetFormat(text="fp8")),
            (saved, FORMAT),
            (stored, TargetFormat()),
        )
    }
    assert len(hashes) == 4


def test_the_shared_parts_are_read_of_a_stored_one(saved, stored):
    of_stored, of_saved = read_target(stored), read_target(saved)
    assert torch.equal(of_stored.embedding, of_saved.embedding)
    assert torch.equal(of_stored.head, of_saved.head)


def test_a_target_in_fp8_keeps_its_formats_where_it_is_moved(stored):
    target = Alpamayo.from_pretrained(stored)
    before = target.get_submodule(Q).weight.clone()
    target.to(torch.bfloat16)
    moved = target.get_submodule(Q)
    assert moved.weight.dtype == fp8.E4M3 and moved.weight_scale.dtype == torch.float32
    assert torch.equal(moved.weight.view(torch.uint8), before.view(torch.uint8))
    assert target.embedding.dtype == torch.bfloat16


def test_save_pretrained_says_who_writes_fp8(stored, tmp_path):
    with pytest.raises(ValueError, match="convert"):
        Alpamayo.from_pretrained(stored).save_pretrained(tmp_path / "out")


def test_another_name_is_refused(saved):
    with pytest.raises(ValueError, match="vision_weights is 'int4'; it must be 'checkpoint' or 'fp8'"):
        Alpamayo.from_pretrained(saved, vision_weights="int4")


def test_a_weight_that_is_not_finite_cannot_be_made(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")

    def spoil(tensors):
        tensors[f"{Q}.weight"][3, 3] = float("inf")

    rewrite(tmp_path / "copy", spoil)
    with pytest.raises(ValueError, match=rf"{Q}.weight: it holds values that are not finite"):
        Alpamayo.from_pretrained(tmp_path / "copy", weights="fp8")


# Damage, and files of other formats.


def drop_scale(tensors):
    del tensors[f"{Q}.weight_scale"]


def wrong_shape(tensors):
    tensors[f"{Q}.weight_scale"] = torch.ones(3, 1)


def zero_scale(tensors):
    tensors[f"{Q}.weight_scale"][5] = 0


def endless_scale(tensors):
    tensors[f"{Q}.weight_scale"][5] = float("inf")


def nan_weight(tensors):
    tensors[f"{Q}.weight"].view(torch.uint8)[2, 2] = 0xFF


def other_fp8(tensors):
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].view(torch.uint8).view(torch.float8_e5m2)


def head_in_fp8(tensors):
    tensors["vlm.lm_head.weight"] = tensors["vlm.lm_head.weight"].to(fp8.E4M3)


def scale_in_fp8(tensors):
    tensors[f"{Q}.weight_scale"] = tensors[f"{Q}.weight_scale"].to(fp8.E4M3)


def cache_scales(tensors):
    tensors[f"{TEXT}0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)


def input_scale(tensors):
    tensors[f"{Q}.input_scale"] = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_scale, f"1 missing: {Q}.weight_scale"),
        (wrong_shape, rf"{Q}.weight_scale is \[3, 1\] and must be \[96, 1\]"),
        (zero_scale, f"{Q}.weight_scale holds a value that is not finite and above 0"),
        (endless_scale, f"{Q}.weight_scale holds a value that is not finite and above 0"),
        (nan_weight, f"{Q}.weight holds NaN"),
        (other_fp8, f"{Q}.weight is F8_E5M2 and must be one of"),
        (head_in_fp8, "vlm.lm_head.weight is F8_E4M3 and must be one of F16"),
        (scale_in_fp8, f"{Q}.weight_scale is F8_E4M3 and must be one of"),
        (cache_scales, "holds scales of a KV cache .*k_proj.k_scale"),
        (input_scale, f"1 surplus: {Q}.input_scale"),
    ],
)
def test_a_damaged_file_is_one_error(copy, change, message):
    rewrite(copy, change)
    with pytest.raises(ValueError, match=message):
        Alpamayo.from_pretrained(copy)


def test_a_flipped_bit_is_found_by_the_checksum(copy):
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="corrupt"):
        Alpamayo.from_pretrained(copy)


def scheme(**changes):
    """`quantization_config` as compressed-tensors has it, with changes."""
    return files_config() | changes


def files_config():
    from alpamayo_dflash.target.quantised import fp8_config

    return fp8_config([])


def group(part, **changes):
    config = files_config()
    config["config_groups"]["group_0"][part] |= changes
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "holds weights in F8_E4M3, but neither quantization_config"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method is 'fp8'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4'"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": "FP8"},
            "kv_cache_scheme is 'FP8'",
        ),
        (scheme(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is .*: a KV cache that is scaled"),
        (scheme(format="pack-quantized"), "format is 'pack-quantized'"),
        (scheme(config_groups={}), "has 0 config_groups"),
        (group("weights", num_bits=4), "weights have num_bits 4"),
        (group("weights", strategy="block"), "strategy 'block'"),
        (group("input_activations", dynamic=False), "dynamic False"),
    ],
)
def test_another_scheme_is_refused_by_name(copy, config, message):
    edit_config(copy, quantization_config=config)
    with pytest.raises(ValueError, match=message):
        Alpamayo.from_pretrained(copy)


def test_a_scheme_without_fp8_weights_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    edit_config(tmp_path / "copy", quantization_config=files_config())
    with pytest.raises(ValueError, match="says that weights are in FP8, but none is F8_E4M3"):
        Alpamayo.from_pretrained(tmp_path / "copy")
