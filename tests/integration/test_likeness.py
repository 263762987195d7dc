"""A borrowed Qwen3-VL: what its config, adapters and hooks say is computed, or refused by name."""

import copy
import inspect
import json

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from alpamayo_dflash import Alpamayo, DecodeConfig, SpeculativeDecoder, accelerate
from alpamayo_dflash.target.checkpoint import checkpoint_folder
from tests.helpers.random_target import random_draft

CONFIG = json.loads((checkpoint_folder("tiny") / "vlm" / "config.json").read_text())
CONFIG["text_config"]["vocab_size"] = 1215
IMAGE, STARTS, ENDS = (CONFIG[f"{name}_token_id"] for name in ("image", "vision_start", "vision_end"))


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Alpamayo.from_pretrained("tiny").tokenizer)


def model_of(config=CONFIG, seed=5):
    """A Qwen3-VL of transformers with random weights, wide enough for its texts to vary."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(copy.deepcopy(config))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(2.0)
    return model


def changed(part, key, value):
    config = copy.deepcopy(CONFIG)
    if "." in key:
        group, _, name = key.partition(".")
        config[part].setdefault(group, {})[name] = value
    else:
        config[part][key] = value
    return config


def inputs_of(model):
    """A prompt of text and two images, cut as the model cuts images."""
    vision = model.config.vision_config
    ids = [*range(300, 312), STARTS, *[IMAGE] * 6, ENDS, 5, STARTS, *[IMAGE] * 4, ENDS, 9]
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "pixel_values": torch.randn(40, width, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 4]]),
    }
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return inputs


def hidden(decoder):
    """Ids that our loops never emit; transformers is told the same."""
    return list(decoder.target.traj_ids)


@torch.no_grad()
def difference(model, decoder):
    """Of the prompt's logits, between the model and the decoder, as a share of the largest."""
    inputs = inputs_of(model)
    want = model(**inputs, use_cache=False).logits[0, -1]
    got = decoder.prefill(decoder.target.prompt_from_inputs(inputs)).logits_V
    return float((want - got).abs().max() / want.abs().max())


def texts(model, decoder, limit=8):
    """The greedy texts of transformers and of the decoder."""
    inputs = inputs_of(model)
    options = {"max_new_tokens": limit, "do_sample": False, "suppress_tokens": hidden(decoder)}
    out = model.generate(**inputs, **options, return_dict_in_generate=True).sequences
    prompt = decoder.target.prompt_from_inputs(inputs)
    ours = decoder.generate(prompt, temperature=0, max_new_tokens=limit).token_ids[0]
    return out[0, inputs["input_ids"].shape[1] :].tolist(), ours


def test_the_models_own_text(tokenizer):
    model = model_of()
    decoder = accelerate(model, tokenizer=tokenizer)
    theirs, ours = texts(model, decoder, 16)
    assert theirs == ours
    assert difference(model, decoder) < 1e-4


# Every key whose change transformers itself survives: what is not refused must compute the same.
TEXT = {
    "intermediate_size": 417,
    "num_hidden_layers": 5,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.14,
    "rms_norm_eps": 0.1,
    "use_cache": False,
    "rope_theta": 20_000,
    "rope_scaling.mrope_section": [5, 5, 6],
    "rope_scaling.mrope_interleaved": False,
    "attention_bias": True,
    "attention_dropout": 0.1,
    "vocab_size": 1300,
    "pad_token_id": 1,
    "bos_token_id": 7,
    "output_attentions": True,
    "output_hidden_states": True,
    "chunk_size_feed_forward": 1,
    "tie_word_embeddings": True,
    "attn_implementation": "eager",
    "is_encoder_decoder": True,
    "name_or_path": "elsewhere",
    "problem_type": "regression",
    "id2label": {"0": "a"},
}
VISION = {
    "depth": 5,
    "hidden_size": 192,
    "hidden_act": "relu",
    "intermediate_size": 257,
    "num_heads": 8,
    "in_channels": 4,
    "patch_size": 8,
    "temporal_patch_size": 3,
    "num_position_embeddings": 144,
    "deepstack_visual_indexes": [2, 1],
    "initializer_range": 0.14,
    "output_attentions": True,
    "output_hidden_states": True,
    "name_or_path": "elsewhere",
    "id2label": {"0": "a"},
}
KEYS = [("text_config", *item) for item in TEXT.items()]
KEYS += [("vision_config", *item) for item in VISION.items()]
REFUSED = {
    "hidden_act": ("gelu", "hidden_act is 'gelu'"),
    "rope_scaling.rope_type": ("linear", "rope_type is 'linear'"),
}


@pytest.mark.parametrize(("part", "key", "value"), KEYS, ids=str)
def test_a_key_is_computed(tokenizer, part, key, value):
    model = model_of(changed(part, key, value))
    decoder = accelerate(model, tokenizer=tokenizer)
    assert difference(model, decoder) < 1e-4
    theirs, ours = texts(model, decoder, 3)
    assert theirs == ours


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_is_not_computed_is_refused_by_name(tokenizer, key):
    value, message = REFUSED[key]
    config = changed("text_config", key, value)
    config["text_config"]["rope_scaling"]["factor"] = 4.0
    with pytest.raises(ValueError, match=message):
        accelerate(model_of(config), tokenizer=tokenizer)


def test_yarn_is_refused(tokenizer):
    config = changed("text_config", "rope_scaling.rope_type", "yarn")
    config["text_config"]["rope_scaling"] |= {"factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match="rope_type is 'yarn'"):
        accelerate(model_of(config), tokenizer=tokenizer)


def second_end(model, extra):
    """Make `extra` ids ends, one of them probable from the fourth token on."""
    decoder_text = model.generate(**inputs_of(model), max_new_tokens=8, do_sample=False)
    fourth = int(decoder_text[0, inputs_of(model)["input_ids"].shape[1] + 3])
    model.generation_config.eos_token_id = [855, *extra]
    with torch.no_grad():
        model.lm_head.weight[extra[0]] = model.lm_head.weight[fourth] * 1.05


@pytest.mark.parametrize("extra", [[853], [853, 12, 13]])
@pytest.mark.parametrize("loop", ["host", "device"])
def test_every_end_of_the_generation_config_ends_a_text(tokenizer, extra, loop):
    model = model_of()
    second_end(model, extra)
    config = DecodeConfig(loop=loop)
    if len(extra) > 1 and loop == "device":
        with pytest.warns(UserWarning, match="4 ids end a turn"):
            theirs, ours = texts(model, accelerate(model, tokenizer=tokenizer, config=config), 12)
    else:
        theirs, ours = texts(model, accelerate(model, tokenizer=tokenizer, config=config), 12)
    assert theirs == ours
    assert len(ours) < 12


def test_an_end_that_the_generation_config_lacks_is_none(tokenizer):
    model = model_of()
    model.generation_config.eos_token_id = 853
    decoder = accelerate(model, tokenizer=tokenizer)
    assert decoder.target.special.ends == (853,)
    model.generation_config.eos_token_id = None
    assert accelerate(model, tokenizer=tokenizer).target.special.ends == (855,)


@pytest.mark.parametrize(("key", "value"), [("repetition_penalty", 1.2), ("no_repeat_ngram_size", 2)])
def test_generation_that_shapes_logits_is_refused(tokenizer, key, value):
    model = model_of()
    setattr(model.generation_config, key, value)
    with pytest.raises(ValueError, match=f"generation_config.{key} is {value}"):
        accelerate(model, tokenizer=tokenizer)
    for harmless in (1.0 if key == "repetition_penalty" else 0, None):
        setattr(model.generation_config, key, harmless)
        accelerate(model, tokenizer=tokenizer)


def mixture():
    raw = copy.deepcopy(CONFIG) | {"model_type": "qwen3_vl_moe"}
    raw["text_config"] |= {
        "model_type": "qwen3_vl_moe_text",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    raw["vision_config"]["model_type"] = "qwen3_vl_moe"
    config = transformers.Qwen3VLMoeConfig.from_dict(raw)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def older():
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 1215,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "patch_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=865)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize("make", [mixture, older])
def test_models_that_only_look_alike_are_refused_by_class(tokenizer, make):
    model = make().eval()
    with pytest.raises(ValueError, match=type(model).__name__):
        accelerate(model, tokenizer=tokenizer)


def test_a_part_of_another_class_is_refused_by_path(tokenizer):
    class Other(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, x):
            return self.down_proj(self.up_proj(x))

    model = model_of()
    layer = model.model.language_model.layers[1]
    layer.mlp = Other(layer.mlp)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp is a Other; only Qwen3VLTextMLP"):
        accelerate(model, tokenizer=tokenizer)


class Table(nn.Module):
    """A low-rank adapter on a table, as adapters' libraries leave them."""

    def __init__(self, base):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        rows, width = base.weight.shape
        self.base_layer = base
        self.a = nn.Parameter(torch.randn(rows, 2, generator=generator) / 2)
        self.b = nn.Parameter(torch.randn(2, width, generator=generator) / 2)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, ids):
        return self.base_layer(ids) + self.a[ids] @ self.b


class Product(Table):
    def forward(self, x):
        return self.base_layer(x) + x @ self.b.T @ self.a.T


class Patches(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.delta = nn.Parameter(torch.full_like(base.weight, 0.05))

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + nn.functional.conv3d(x, self.delta, stride=self.base_layer.stride)


ADAPTED = {
    "model.language_model.layers.2.self_attn.q_proj": Product,
    "model.language_model.layers.2.mlp.down_proj": Product,
    "lm_head": Product,
    "model.language_model.embed_tokens": Table,
    "model.visual.pos_embed": Table,
    "model.visual.patch_embed.proj": Patches,
    "model.visual.blocks.1.attn.qkv": Product,
    "model.visual.merger.linear_fc1": Product,
}


@pytest.mark.parametrize("path", ADAPTED)
def test_an_adapter_runs(tokenizer, path):
    model = model_of()
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    plain = accelerate(model, tokenizer=tokenizer)
    prompt = plain.target.prompt_from_inputs(inputs_of(model))
    before = plain.prefill(prompt).logits_V
    setattr(owner, name, ADAPTED[path](getattr(owner, name)))
    decoder = accelerate(model, tokenizer=tokenizer)
    assert difference(model, decoder) < 1e-4
    assert (decoder.prefill(prompt).logits_V - before).abs().max() > 1e-3, "the adapter does nothing"
    theirs, ours = texts(model, decoder)
    assert theirs == ours


CALLED = [
    "model.language_model.layers.1.self_attn.q_proj",
    "model.language_model.embed_tokens",
    "model.language_model.norm",
    "model.visual.pos_embed",
    "model.visual.patch_embed",
    "model.visual.blocks.0.mlp",
    "lm_head",
]
NOT_CALLED = [
    "",
    "model",
    "model.language_model",
    "model.language_model.layers.1",
    "model.language_model.layers.1.self_attn",
    "model.language_model.layers.1.mlp",
    "model.language_model.layers.1.input_layernorm",
    "model.visual",
    "model.visual.blocks.0",
]


def larger(module, inputs, output):
    """A hook that changes what a module gives."""
    if isinstance(output, torch.Tensor):
        return output * 1.1
    if isinstance(output, tuple):
        return (output[0] * 1.1, *output[1:])
    for name in ("logits", "last_hidden_state", "pooler_output"):
        if getattr(output, name, None) is not None:
            output[name] = output[name] * 1.1
    return output


@pytest.mark.parametrize("path", CALLED)
def test_a_hook_on_a_module_that_is_called_runs(tokenizer, path):
    model = model_of()
    model.get_submodule(path).register_forward_hook(larger)
    decoder = accelerate(model, tokenizer=tokenizer)
    assert difference(model, decoder) < 1e-4


@pytest.mark.parametrize("path", NOT_CALLED)
def test_a_hook_that_would_be_left_out_is_refused_by_name(tokenizer, path):
    model = model_of()
    plain = accelerate(model, tokenizer=tokenizer)
    handle = model.get_submodule(path).register_forward_hook(larger)
    with pytest.raises(ValueError, match=f"hooks of {path or 'the model itself'} change"):
        accelerate(model, tokenizer=tokenizer)
    assert handle.id in model.get_submodule(path)._forward_hooks  # it has been put back
    with pytest.warns(UserWarning, match="not run in decoding"):
        decoder = accelerate(model, tokenizer=tokenizer, ignore_hooks=True)
    prompt = plain.target.prompt_from_inputs(inputs_of(model))
    assert torch.equal(decoder.prefill(prompt).logits_V, plain.prefill(prompt).logits_V)


def test_harmless_hooks_are_left_alone(tokenizer):
    """What trainers' and profilers' libraries leave: counters, and gradients asked for."""
    model = model_of()
    calls = []
    model.model.language_model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.model.visual.register_forward_pre_hook(lambda *_: None)
    model.enable_input_require_grads()
    decoder = accelerate(model, tokenizer=tokenizer)
    assert difference(model, decoder) < 1e-4
    theirs, ours = texts(model, decoder)
    assert theirs == ours


def test_one_draft_on_two_targets_serves_both():
    """The one that was bound first goes on as if the second were not there."""
    first, second = Alpamayo.from_pretrained("tiny"), Alpamayo.from_pretrained("tiny")
    with torch.no_grad():
        second.vlm.model.language_model.embed_tokens.weight.mul_(-3)
        second.vlm.lm_head.weight.mul_(0.5)
    draft = random_draft(first)
    one = SpeculativeDecoder(first, draft)
    embedding = one.draft.embedding
    two = SpeculativeDecoder(second, draft)
    three = SpeculativeDecoder(first, draft)
    assert one.draft is draft is three.draft
    assert torch.equal(one.draft.embedding, embedding)
    assert torch.equal(two.draft.embedding, second.embedding)
    assert two.draft.fc.weight is one.draft.fc.weight  # nothing is held twice
    halved = Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16)
    four = SpeculativeDecoder(halved, draft)
    assert four.draft.fc.weight.dtype == torch.bfloat16
    assert one.draft.fc.weight.dtype == torch.float32
