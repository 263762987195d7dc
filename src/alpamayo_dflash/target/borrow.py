"""A target on weights that somebody else loaded: NVIDIA's Alpamayo object, or a bare Qwen3-VL.

Nothing is copied and no value is changed: our modules are given the other's parameters. With `fuse`,
parameters that read one input are moved into one storage, with the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.checkpoint import OPTIONAL_TENSORS, VLMFiles
from alpamayo_dflash.target.config import AlpamayoConfig
from alpamayo_dflash.target.expert import FourierFeatures
from alpamayo_dflash.target.likeness import check_class, check_generation, check_hooks, end_ids
from alpamayo_dflash.target.motion import ActionSpace
from alpamayo_dflash.target.tokenizer import check_ids, found_tokens
from alpamayo_dflash.target.vlm import Qwen3VLTarget
from alpamayo_dflash.target.weights import share_storage

_EXPERT_PARTS = ("expert", "action_in_proj", "action_out_proj", "action_space")
# Small modules of ours that get their tensors; the large ones are theirs.
_OURS = ("action_in_proj", "action_space")


class BareTarget(Qwen3VLTarget):
    """A Qwen3-VL without an action expert: it writes texts, not trajectories.

    Args:
        vlm: transformers' Qwen3-VL for conditional generation.
        tokenizer: of its vocabulary. `<i0>`, `<i1>` ... in it are never emitted, as in Alpamayo.

    Raises:
        ValueError: the tokenizer lacks the end of turn.
    """

    def __init__(self, vlm: Any, tokenizer: Tokenizer) -> None:
        self.vlm, self.tokenizer = vlm, tokenizer
        self.special = found_tokens(tokenizer, image_pad=vlm.config.image_token_id)

    def coc_text(self, token_ids: Any) -> str:
        """The Chain-of-Causation; the whole text where the vocabulary has no mark for its end."""
        if self.special.cot_end is None:
            text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
            return text.strip()
        return super().coc_text(token_ids)


def borrow(
    model: Any, tokenizer: Any = None, *, fuse: bool = False, ignore_hooks: bool = False
) -> Alpamayo | BareTarget:
    """A target on a loaded model's weights.

    Args:
        model: an `AlpamayoR1` or `Alpamayo1_5` of NVIDIA's package (its `.vlm`, `.tokenizer` and `.config`
            are read, and its action expert if it has one), or transformers'
            `Qwen3VLForConditionalGeneration`.
        tokenizer: a bare model's: of transformers (fast) or of `tokenizers`; an Alpamayo has its own.
        fuse: move q, k, v and gate, up of each text and expert layer into one storage, and the head into
            storage of a multiple of 64 rows; layer by layer, values unchanged.
        ignore_hooks: leave out forward hooks that decoding would not run, although they change the output.

    Raises:
        ValueError: the object is neither, a part is missing, weights are not all on one device, or the model
            computes something else than is computed here (see `likeness`).
    """
    vlm = getattr(model, "vlm", model)
    if not hasattr(getattr(vlm, "model", None), "language_model") or not hasattr(vlm, "lm_head"):
        raise ValueError(
            f"accelerate: a {type(model).__name__} is neither an Alpamayo (with .vlm) nor a Qwen3-VL for "
            "conditional generation (with .model.language_model and .lm_head)"
        )
    check_class(vlm)
    _check_devices(vlm)
    if vlm is model:
        if tokenizer is None:
            raise ValueError("accelerate: a bare Qwen3-VL comes with its tokenizer (tokenizer=…)")
        target: Alpamayo | BareTarget = BareTarget(vlm, _tokenizer(tokenizer))
    else:
        given = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        if given is None:
            raise ValueError(f"accelerate: the {type(model).__name__} has no .tokenizer; give tokenizer=…")
        whole = all(hasattr(model, part) for part in _EXPERT_PARTS)
        target = _whole(model, _tokenizer(given)) if whole else BareTarget(vlm, _tokenizer(given))
    size = target.tokenizer.get_vocab_size(with_added_tokens=True)
    if size > target.vocab_size:
        raise ValueError(
            f"accelerate: the tokenizer has {size} tokens, the model's embedding {target.vocab_size} rows"
        )
    if isinstance(target, BareTarget):
        check_generation(vlm.generation_config)
    ends = end_ids(vlm)
    if ends is not None:
        target.special = replace(target.special, ends=ends)
    check_hooks(target, ignore=ignore_hooks)
    if fuse:
        share_storage(vlm, *([target.expert.layers] if isinstance(target, Alpamayo) else []))
    return target


def _whole(model: Any, tokenizer: Tokenizer) -> Alpamayo:
    """Our module around their parts; the small action modules get their parameters and buffers."""
    config = AlpamayoConfig.from_dict(_as_dict(model.config))
    check_ids(tokenizer, config)
    with torch.device("meta"):
        target = Alpamayo(config, model.vlm.config, tokenizer, VLMFiles(Path(config.vlm_name_or_path)))
    target.vlm, target.expert, target.action_out_proj = model.vlm, model.expert, model.action_out_proj
    for part in _OURS:
        getattr(target, part).to_empty(device=target.device)
    for module in target.modules():
        if isinstance(module, (FourierFeatures, ActionSpace)):
            module.reset(target.device, rounded=target.dtype == torch.bfloat16)
    for part in _OURS:
        _assign(getattr(target, part), getattr(model, part), part)
    return target


def _assign(ours: nn.Module, theirs: nn.Module, part: str) -> None:
    """Give our module their tensors by name; 1.5 may lack the stored constants."""
    given = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    wanted = ours.state_dict()
    missing = [f"{part}.{name}" for name in wanted if name not in given]
    wrong = [name for name in missing if name not in OPTIONAL_TENSORS]
    wrong += [
        f"{part}.{name} is {list(given[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"accelerate: the model's action modules lack or misshape {', '.join(wrong)}")
    ours.load_state_dict({name: given[name] for name in wanted if name in given}, strict=False, assign=True)


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    values: dict[str, Any] = config.to_dict()
    return values


def _tokenizer(tokenizer: Any) -> Tokenizer:
    """The `tokenizers` object behind a fast tokenizer of transformers; a processor's tokenizer too."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    found = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(found, Tokenizer):
        raise ValueError(
            f"accelerate: a {type(tokenizer).__name__} has no backend_tokenizer; a fast tokenizer is needed"
        )
    return found


def _check_devices(vlm: nn.Module) -> None:
    devices: dict[torch.device, str] = {}
    for name, tensor in vlm.named_parameters():
        devices.setdefault(tensor.device, name)
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(f"accelerate: the weights must all be on one device, not offloaded: {places}")
