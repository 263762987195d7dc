"""An FP8 target that NVIDIA's ModelOpt quantises and exports on a CPU, in our hands.

It lives in an environment of its own (`pip install nvidia-modelopt` beside this package); without it these
tests are skipped.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.fp8 import FP8Linear
from alpamayo_dflash.target.quantised import QUANTIZATION, linears
from tests.helpers import random_target as factory

quantization = pytest.importorskip(
    "modelopt.torch.quantization", reason="the package nvidia-modelopt is not installed"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Their export of a target's Qwen3-VL, the other tensors beside, and the logits of their own forward."""
    from modelopt.torch.export import export_hf_checkpoint

    root = tmp_path_factory.mktemp("modelopt")
    target = factory.odd_target(root)
    target.save_pretrained(root / "checkpoint", dtype=torch.bfloat16)
    # In bfloat16 for the export, in float32 for the logits that are compared.
    target = Alpamayo.from_pretrained(root / "checkpoint", dtype="bfloat16")
    wide = Alpamayo.from_pretrained(root / "checkpoint", dtype="float32")
    inputs = target.transformers_inputs(target.prompt(factory.odd_window()))
    wide_inputs = wide.transformers_inputs(wide.prompt(factory.odd_window()))
    with torch.no_grad():
        for model, given in ((target.vlm, inputs), (wide.vlm, wide_inputs)):
            config = copy.deepcopy(quantization.FP8_DEFAULT_CFG)
            quantization.quantize(model, config, lambda m, given=given: m(**given))
        export_hf_checkpoint(target.vlm, export_dir=root / "export")
    theirs = load_file(root / "export/model.safetensors")
    # The export divides in bfloat16, so some weights are another value of e4m3 than in their forward: that is
    # to have the exported ones.
    for name, module in wide.vlm.named_modules():
        if f"{name}.weight_scale" in theirs:
            scale = theirs[f"{name}.weight_scale"]
            module.weight.data.copy_(theirs[f"{name}.weight"].float() * scale)
            module.weight_quantizer._amax.fill_(scale.item() * 448)
            module.input_quantizer._amax.fill_(theirs[f"{name}.input_scale"].item() * 448)
    with torch.no_grad():
        logits = wide.vlm(**wide_inputs).logits
    official = load_file(root / "checkpoint/model.safetensors")
    tensors = {name: tensor for name, tensor in official.items() if not name.startswith("vlm.")}
    tensors |= {f"vlm.{name}": tensor for name, tensor in theirs.items()}
    (root / "checkpoint/model.safetensors").unlink()
    save_file(tensors, root / "checkpoint/model.safetensors")
    return root, logits


def say(root, where):
    """Let one of the two files say the format."""
    path, other = root / "checkpoint/config.json", root / "checkpoint/hf_quant_config.json"
    config = json.loads(path.read_text())
    config.pop(QUANTIZATION, None)
    other.unlink(missing_ok=True)
    if where == "config.json":
        config[QUANTIZATION] = json.loads((root / "export/config.json").read_text())[QUANTIZATION]
    else:
        other.write_text((root / "export/hf_quant_config.json").read_text())
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
def test_their_export_loads_and_gives_their_logits(exported, where):
    root, logits = exported
    say(root, where)
    target = Alpamayo.from_pretrained(root / "checkpoint", dtype="float32")
    assert target.weight_formats["text"] == "fp8 with static input scales"
    assert target.weight_formats["vision"] == "float32"
    layers = [target.get_submodule(name) for name in linears(target, "text")]
    assert all(isinstance(layer, FP8Linear) for layer in layers)
    with torch.no_grad():
        got = target.vlm(**target.transformers_inputs(target.prompt(factory.odd_window()))).logits
    # A value on the border of two of e4m3 may fall to either side.
    assert (got - logits).norm() / logits.norm() < 0.005  # 1e-5 was seen; 0.1 with scales a row
    assert (got.argmax(-1) == logits.argmax(-1)).float().mean() > 0.98


def test_a_scaled_cache_of_theirs_is_refused(tmp_path):
    from modelopt.torch.export import export_hf_checkpoint

    target = factory.odd_target(tmp_path).to(torch.bfloat16)
    inputs = target.transformers_inputs(target.prompt(factory.odd_window()))
    config = copy.deepcopy(quantization.FP8_DEFAULT_CFG)
    config["quant_cfg"] = [*config["quant_cfg"], *quantization.FP8_KV_CFG["quant_cfg"]]
    with torch.no_grad():
        quantization.quantize(target.vlm, config, lambda m: m(**inputs))
        export_hf_checkpoint(target.vlm, export_dir=tmp_path / "export")
    factory.odd_target(tmp_path).save_pretrained(tmp_path / "checkpoint", dtype=torch.bfloat16)
    (tmp_path / "checkpoint/hf_quant_config.json").write_text(
        (tmp_path / "export/hf_quant_config.json").read_text()
    )
    theirs = load_file(tmp_path / "export/model.safetensors")
    assert any(name.endswith("k_scale") for name in theirs)
    with pytest.raises(ValueError, match=r"kv_cache_quant_algo is 'FP8'|holds scales of a KV cache"):
        Alpamayo.from_pretrained(tmp_path / "checkpoint")
