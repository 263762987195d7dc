"""Whether a Qwen3-VL that somebody else loaded is what our block, vision tower and stop rules compute.

A config's key that changes nothing in the model's own `generate` is nobody's business; what does change it is
computed, or refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

from alpamayo_dflash.target.qwen3 import check_activation
from alpamayo_dflash.target.rotary import rope_settings
from alpamayo_dflash.target.vlm import Qwen3VLTarget
from alpamayo_dflash.target.weights import hooked

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# What `generate` would do to the logits beside temperature and nucleus, and the values that do nothing.
_SHAPING: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "begin_suppress_tokens": ([],),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "stop_strings": (),
}


def check_class(vlm: Any) -> None:
    """Refuse models that only look like a Qwen3-VL, and settings that our arithmetic does not have.

    Raises:
        ValueError: naming the class, or the key and its value.
    """
    if not isinstance(vlm, qwen.Qwen3VLForConditionalGeneration):
        raise ValueError(
            f"accelerate: a {type(vlm).__name__} is no Qwen3VLForConditionalGeneration; nothing else is known"
        )
    for path, module, wanted in _parts(vlm):
        if not isinstance(module, wanted):
            raise ValueError(
                f"accelerate: {path} is a {type(module).__name__}; only {wanted.__name__} is known"
            )
    text: Any = vlm.config.text_config
    check_activation(text.hidden_act, "accelerate: text_config")
    rope = rope_settings(text)
    if rope.rope_type != "default":
        raise ValueError(
            f"accelerate: text_config's rope_type is {rope.rope_type!r}; only 'default' is known"
        )


def check_generation(generation: Any) -> None:
    """Refuse what a bare model's own `generate` would do to its logits and we do not.

    Raises:
        ValueError: naming the key of the generation config, and its value.
    """
    for key, harmless in _SHAPING.items():
        value = getattr(generation, key, None)
        if value is not None and value not in harmless:
            raise ValueError(
                f"accelerate: generation_config.{key} is {value!r}, which is not known; set it to None"
            )


def end_ids(vlm: Any) -> tuple[int, ...] | None:
    """The ids that end a text of the model's own `generate`; None where its config has none."""
    ends = vlm.generation_config.eos_token_id
    if ends is None:
        return None
    if isinstance(ends, Tensor):
        ends = ends.tolist()
    return tuple(dict.fromkeys(int(end) for end in (ends if isinstance(ends, (list, tuple)) else [ends])))


@torch.no_grad()
def check_hooks(target: Qwen3VLTarget, *, ignore: bool) -> None:
    """Refuse forward hooks that change the output and that decoding would leave out.

    Decoding calls projections, norms of the vision tower, mergers and the head; what it does not call is run
    once, with and without its hooks.

    Args:
        target: the model.
        ignore: go on with a warning instead.

    Raises:
        ValueError: naming the modules.
    """
    called = _called(target.vlm)
    silent = {
        name: module
        for name, module in target.vlm.named_modules()
        if hooked(module) and id(module) not in called
    }
    if not silent:
        return
    if ignore:
        warnings.warn(f"forward hooks are not run in decoding: those of {_names(silent)}", stacklevel=4)
        return
    inputs = _probe(target)
    with_hooks = target.vlm(**inputs, use_cache=False).logits
    with _without_hooks(silent):
        without = target.vlm(**inputs, use_cache=False).logits
    if not torch.equal(with_hooks, without):
        raise ValueError(
            f"accelerate: forward hooks of {_names(silent)} change the model's output, and decoding does "
            "not call these modules; remove them, or give ignore_hooks=True to go on without them"
        )


def _names(modules: dict[str, nn.Module]) -> str:
    return ", ".join(name or "the model itself" for name in modules)


def _parts(vlm: Any) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    """The modules whose forward is written anew here, and what they must be."""
    text, visual = vlm.model.language_model, vlm.model.visual
    yield "model.language_model", text, qwen.Qwen3VLTextModel
    yield "model.visual", visual, qwen.Qwen3VLVisionModel
    for index, layer in enumerate(text.layers):
        path = f"model.language_model.layers.{index}"
        yield path, layer, qwen.Qwen3VLTextDecoderLayer
        yield f"{path}.self_attn", layer.self_attn, qwen.Qwen3VLTextAttention
        yield f"{path}.mlp", layer.mlp, qwen.Qwen3VLTextMLP
    for index, block in enumerate(visual.blocks):
        yield f"model.visual.blocks.{index}", block, qwen.Qwen3VLVisionBlock
        yield f"model.visual.blocks.{index}.attn", block.attn, qwen.Qwen3VLVisionAttention


def _called(vlm: Any) -> set[int]:
    """The modules that decoding calls in its plain form, by `id`; with a hook there, that form is taken."""
    text, visual = vlm.model.language_model, vlm.model.visual
    roots = [vlm.lm_head, text.norm, text.embed_tokens, visual.pos_embed, visual.patch_embed, visual.merger]
    roots += visual.deepstack_merger_list
    for layer in text.layers:
        for owner, names in zip((layer.self_attn, layer.mlp), _PROJECTIONS, strict=True):
            roots += [getattr(owner, name) for name in names]
    for block in visual.blocks:
        roots += [block.norm1, block.norm2, block.attn.qkv, block.attn.proj, block.mlp]
    return {id(module) for root in roots for module in root.modules()}


def _probe(target: Qwen3VLTarget) -> dict[str, Tensor]:
    """A short prompt with one image."""
    config, cut = target.vlm.config, target.patch_shape
    side = 2 * cut.merge
    ids = [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id, 1, 2, 3]
    channels = config.vision_config.in_channels
    values = torch.linspace(-1, 1, side * side * channels * cut.temporal * cut.patch**2, device="cpu")
    prompt = target.prompt_from_inputs(
        {
            "input_ids": torch.tensor([ids], device="cpu"),
            "pixel_values": values.view(side * side, -1),
            "image_grid_thw": torch.tensor([[1, side, side]], device="cpu"),
        }
    )
    return target.transformers_inputs(prompt)


@contextmanager
def _without_hooks(modules: dict[str, nn.Module]) -> Iterator[None]:
    kept = [
        (module, dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in modules.values()
    ]
    for module, _, _ in kept:
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    try:
        yield
    finally:
        for module, after, before in kept:
            module._forward_hooks.update(after)
            module._forward_pre_hooks.update(before)
