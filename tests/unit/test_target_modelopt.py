"""A checkpoint in ModelOpt's FP8 layout: a scale a tensor, static input scales, part of the layers.

The files are written here, from the layout that ModelOpt 0.47 exports; `tests/peers/test_modelopt_target.py`
has its own.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpamayo_dflash.kernels import fp8
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.fp8 import FP8Linear
from alpamayo_dflash.target.quantised import linears
from alpamayo_dflash.target.weights import SeparateProducts, fused_linear
from tests.helpers import random_target as factory

LAYERS = "vlm.model.language_model.layers."
LEFT_OUT = f"{LAYERS}2.self_attn.k_proj"
HF_QUANT = {
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
}
IN_CONFIG = {
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
            "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head", "model.visual*"],
    "quant_algo": "FP8",
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quant_method": "modelopt",
}


def static(tensors, names):
    """Tensors with some layers in FP8: a scale of the whole weight, and one of the input."""
    for number, name in enumerate(names):
        weight = tensors[f"{name}.weight"].float()
        scale = weight.abs().max() / fp8.LARGEST
        tensors[f"{name}.weight"] = (weight / scale).to(fp8.E4M3)
        tensors[f"{name}.weight_scale"] = scale
        tensors[f"{name}.input_scale"] = torch.tensor(0.01 + 0.001 * number)
    return tensors


@pytest.fixture
def exported(tmp_path):
    """A folder without any word of its format yet."""
    target = factory.odd_target(tmp_path)
    folder = tmp_path / "checkpoint"
    target.save_pretrained(folder, dtype=torch.bfloat16)
    names = [name for name in linears(target, "text") if name != LEFT_OUT]
    tensors = static(load_file(folder / "model.safetensors"), names)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(params=["config.json", "hf_quant_config.json"])
def said(exported, request):
    """The folder whose one file or the other says its format."""
    if request.param == "config.json":
        edit_config(exported, quantization_config=IN_CONFIG)
    else:
        (exported / "hf_quant_config.json").write_text(json.dumps(HF_QUANT))
    return exported


def test_scales_are_broadcast_and_inputs_static(said):
    target, tensors = Alpamayo.from_pretrained(said), load_file(said / "model.safetensors")
    name = f"{LAYERS}1.mlp.down_proj"
    layer = target.get_submodule(name)
    assert isinstance(layer, FP8Linear)
    assert torch.equal(layer.weight_scale, tensors[f"{name}.weight_scale"].expand(48, 1))
    assert torch.equal(layer.input_scale, tensors[f"{name}.input_scale"])
    x = torch.randn(5, 56, generator=torch.Generator().manual_seed(0))
    x[2, 7] = 1e4  # beyond 448 scales: saturates
    scale = tensors[f"{name}.input_scale"]
    values = (x / scale).clamp(-448, 448).to(fp8.E4M3).double()
    weight = tensors[f"{name}.weight"].double()
    expected = (values @ weight.T).float() * scale * tensors[f"{name}.weight_scale"]
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=0)


def test_what_is_left_out_stays_as_it_is(said):
    target = Alpamayo.from_pretrained(said)
    assert not isinstance(target.get_submodule(LEFT_OUT), FP8Linear)
    count = len(linears(target, "text"))
    assert target.weight_formats == {
        "text": f"fp8 with static input scales in {count - 1} of {count} layers",
        "expert": "float32",
        "vision": "float32",
    }


def test_other_parts_can_be_made_beside(said):
    target = Alpamayo.from_pretrained(said, expert_weights="fp8")
    assert target.weight_formats["expert"] == "fp8"
    assert all(target.get_submodule(name).input_scale is None for name in linears(target, "expert"))
    # What was left out is asked for by name.
    made = Alpamayo.from_pretrained(said, weights="fp8").get_submodule(LEFT_OUT)
    assert isinstance(made, FP8Linear) and made.input_scale is None


def test_a_fused_product_keeps_each_ones_scale(said):
    attention = Alpamayo.from_pretrained(said).text_layers[2].self_attn
    product = fused_linear((attention.q_proj, attention.k_proj, attention.v_proj))
    assert isinstance(product, SeparateProducts)


def test_a_missing_input_scale_is_named(said):
    tensors = load_file(said / "model.safetensors")
    del tensors[f"{LAYERS}0.mlp.up_proj.input_scale"]
    (said / "model.safetensors").unlink()
    save_file(tensors, said / "model.safetensors")
    with pytest.raises(ValueError, match=f"1 missing: {LAYERS}0.mlp.up_proj.input_scale"):
        Alpamayo.from_pretrained(said)


def test_scales_by_row_with_inputs_by_row(exported):
    """ModelOpt's FP8_PER_CHANNEL_PER_TOKEN, whose scales are [N]."""
    tensors = load_file(exported / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("input_scale")}
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        rows = len(tensors[name.removesuffix("_scale")])
        tensors[name] = tensors[name] * torch.linspace(1, 2, rows)
    (exported / "model.safetensors").unlink()
    save_file(tensors, exported / "model.safetensors")
    edit_config(exported, quantization_config=IN_CONFIG | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"})
    layer = Alpamayo.from_pretrained(exported).get_submodule(f"{LAYERS}1.mlp.down_proj")
    assert layer.input_scale is None
    assert torch.equal(layer.weight_scale[:, 0], tensors[f"{LAYERS}1.mlp.down_proj.weight_scale"])


def test_a_scaled_cache_is_refused_by_name(exported):
    quantization = HF_QUANT["quantization"] | {"kv_cache_quant_algo": "FP8"}
    (exported / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    with pytest.raises(ValueError, match=r"hf_quant_config\.json: kv_cache_quant_algo is 'FP8': a KV cache"):
        Alpamayo.from_pretrained(exported)


def test_another_algorithm_is_refused_by_name(exported):
    quantization = HF_QUANT["quantization"] | {"quant_algo": "W4A8_AWQ"}
    (exported / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    with pytest.raises(ValueError, match=r"hf_quant_config\.json: .* quant_algo 'W4A8_AWQ'"):
        Alpamayo.from_pretrained(exported)
