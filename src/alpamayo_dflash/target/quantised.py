"""Which of a target's layers are in FP8: made from other weights, or as a checkpoint says that it holds them.

Two published layouts are read, both with `X.weight` (F8_E4M3) and `X.weight_scale` (multiplied by) for a
linear layer X, and `X.input_scale` where the input's scale is static:

- compressed-tensors' "float-quantized", which `convert` writes: `quantization_config` in config.json;
- NVIDIA ModelOpt's FP8: `quantization_config` in config.json, or hf_quant_config.json beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.common.fields import value_of
from alpamayo_dflash.target.formats import PARTS, TargetFormat
from alpamayo_dflash.target.fp8 import FP8Linear
from alpamayo_dflash.target.weights import allocate

QUANTIZATION = "quantization_config"
"""The key in config.json."""

MODELOPT = "hf_quant_config.json"
WEIGHT_SCALE, INPUT_SCALE = "weight_scale", "input_scale"
_CACHE_SCALES = ("k_scale", "v_scale")
_DYNAMIC_ALGORITHMS = ("FP8_PER_CHANNEL_PER_TOKEN",)
_STATIC_ALGORITHMS = ("FP8",)
_E4M3_NAN = 0x7F


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's FP8 layers take their input.

    Attributes:
        static: by one scale that is stored; otherwise each row by its own.
        where: the file and key that say so, for messages.
    """

    static: bool
    where: str


def stored_scheme(folder: Path, raw: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a checkpoint's FP8 layers; None where nothing says that it has any.

    Args:
        folder: the checkpoint.
        raw: its config.json.

    Raises:
        ValueError: it is quantised in another way, or its KV cache is scaled.
    """
    if raw.get(QUANTIZATION) is not None:
        where = f"{folder / 'config.json'}: {QUANTIZATION}"
        found = value_of(raw, QUANTIZATION, dict, where=str(folder / "config.json"))
        if found.get("quant_method") == "compressed-tensors":
            return _compressed(found, where)
        return _modelopt(found, where, cache="kv_cache_scheme")
    path = folder / MODELOPT
    if path.is_file():
        found = value_of(read_json(path), "quantization", dict, where=str(path))
        return _modelopt({"quant_method": "modelopt"} | found, str(path), cache="kv_cache_quant_algo")
    return None


def _compressed(found: Mapping[str, Any], where: str) -> Scheme:
    """compressed-tensors' float-quantized, weights by row or by tensor, inputs by row or static."""
    _refuse_scaled_cache(found.get("kv_cache_scheme"), where, "kv_cache_scheme")
    if found.get("format") != "float-quantized":
        raise ValueError(f"{where}: format is {found.get('format')!r}; of its formats float-quantized loads")
    groups = value_of(found, "config_groups", dict, where=where)
    if len(groups) != 1:
        raise ValueError(f"{where}: has {len(groups)} config_groups; one is known, of all FP8 layers")
    group = value_of(groups, name := next(iter(groups)), dict, where=where)
    of_weight, of_input = (
        value_of(group, part, dict, where=f"{where}: {name}") for part in ("weights", "input_activations")
    )
    for part, values, strategies in (
        ("weights", of_weight, ("channel", "tensor")),
        ("input_activations", of_input, ("token", "tensor")),
    ):
        kind = (values.get("num_bits"), values.get("type"))
        if kind != (8, "float") or values.get("strategy") not in strategies:
            raise ValueError(
                f"{where}: {part} have num_bits {kind[0]!r}, type {kind[1]!r} and strategy "
                f"{values.get('strategy')!r}; 8, 'float' and {' or '.join(strategies)} load"
            )
    dynamic = of_input.get("dynamic")
    if (of_input["strategy"], dynamic) not in (("token", True), ("tensor", False)):
        raise ValueError(
            f"{where}: input_activations have strategy {of_input['strategy']!r} and dynamic {dynamic!r}; "
            "token with dynamic true, or tensor with false, load"
        )
    return Scheme(static=dynamic is False, where=where)


def _modelopt(found: Mapping[str, Any], where: str, *, cache: str) -> Scheme:
    """ModelOpt's FP8, or its FP8 by row."""
    method = found.get("quant_method", found.get("quant_library", "modelopt"))
    algorithm = found.get("quant_algo")
    if method != "modelopt" or algorithm not in (*_STATIC_ALGORITHMS, *_DYNAMIC_ALGORITHMS):
        known = ", ".join((*_STATIC_ALGORITHMS, *_DYNAMIC_ALGORITHMS))
        raise ValueError(
            f"{where}: quant_method is {method!r} with quant_algo {algorithm!r}; modelopt with {known} "
            "loads, and compressed-tensors with format float-quantized"
        )
    _refuse_scaled_cache(found.get(cache), where, cache)
    return Scheme(static=algorithm in _STATIC_ALGORITHMS, where=where)


def _refuse_scaled_cache(found: Any, where: str, key: str) -> None:
    if found is not None:
        raise ValueError(
            f"{where}: {key} is {found!r}: a KV cache that is scaled (quantised) is not computed here; "
            "export the checkpoint without it"
        )


def fp8_config(ignored: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of FP8 with a scale a row, inputs cast by row, as compressed-tensors has it.

    Args:
        ignored: the linear layers that are not in FP8.
    """
    plain = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": plain | {"strategy": "channel", "dynamic": False},
                "input_activations": plain | {"strategy": "token", "dynamic": True},
            }
        },
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
    }


def linears(target: nn.Module, part: str) -> list[str]:
    """Names of the linear layers of a part that can be in FP8, in the order of the model."""
    visual = "vlm.model.visual."
    roots = {
        "text": ("vlm.model.language_model.layers.",),
        "expert": ("expert.layers.",),
        "vision": (f"{visual}blocks.", f"{visual}merger.", f"{visual}deepstack_merger_list."),
    }[part]
    kinds = (nn.Linear, FP8Linear)
    return [
        name
        for name, module in target.named_modules()
        if name.startswith(roots) and isinstance(module, kinds)
    ]


def expect_fp8(target: nn.Module, names: Iterable[str], *, static: bool = False) -> None:
    """Put empty FP8 layers on the meta device in the place of linear ones, to be filled as files are read."""
    for name in names:
        linear = target.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        target.set_submodule(name, FP8Linear.in_place_of(linear, static=static))


def make_fp8(target: nn.Module, format_: TargetFormat) -> None:
    """Turn parts of a target that is in memory into FP8, in place; at most one group is held twice.

    The bits are those of a checkpoint of the same weights, loaded with this format.

    Args:
        target: its weights are in a float type.
        format_: its parts that are asked for in FP8 are turned, if they are not in FP8 already.

    Raises:
        ValueError: a weight is not finite; the message names it.
    """
    make_layers_fp8(target, [name for part in format_.fp8 for name in linears(target, part)])


@torch.no_grad()
def make_layers_fp8(target: nn.Module, names: Iterable[str]) -> None:
    """`make_fp8` of layers by name."""
    for parent, children in _by_parent(names):
        module = target.get_submodule(parent)
        found = {child: module.get_submodule(child) for child in children}
        old = {child: layer for child, layer in found.items() if isinstance(layer, nn.Linear)}
        if not old:
            continue
        like = next(iter(old.values())).weight
        expect_fp8(target, [f"{parent}.{child}" for child in old])
        allocate(module, like.device, like.dtype)
        for child, linear in old.items():
            made = module.get_submodule(child)
            assert isinstance(made, FP8Linear)
            fill(made, f"{parent}.{child}.weight", linear.weight.data)
            if made.bias is not None and linear.bias is not None:
                made.bias.copy_(linear.bias.data)


def _by_parent(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        groups.setdefault(parent, []).append(child)
    return list(groups.items())


def fill(linear: FP8Linear, name: str, values_NI: Tensor) -> None:
    """`FP8Linear.fill`, whose error names the tensor."""
    try:
        linear.fill(values_NI)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_stored(linear: FP8Linear, name: str) -> None:
    """Raise ValueError if an FP8 layer that was read has NaN in its weight, or a scale that cannot be one."""
    if bool(((linear.weight.view(torch.uint8) & _E4M3_NAN) == _E4M3_NAN).any()):
        raise ValueError(f"{name}.weight holds NaN")
    for scale in (WEIGHT_SCALE, INPUT_SCALE):
        values = getattr(linear, scale)
        if values is not None and not bool((values.isfinite() & (values > 0)).all()):
            raise ValueError(f"{name}.{scale} holds a value that is not finite and above 0")


def cache_scales(names: Iterable[str]) -> list[str]:
    """The names of a scaled KV cache's scales among tensors' names."""
    return [name for name in names if name.rpartition(".")[2] in _CACHE_SCALES]


def describe(target: nn.Module) -> dict[str, str]:
    """What each part's products are in: `fp8`, `fp8 with static input scales`, or a dtype.

    A part of which some layers are in FP8 and some are not says how many are.
    """
    return {part: _described(target, linears(target, part)) for part in PARTS}


def is_fp8(described: str) -> bool:
    """Whether a part is in FP8, or some of its layers are, by what `describe` says of it."""
    return described.startswith("fp8")


def fp8_formats(target: nn.Module) -> dict[str, Any]:
    """`describe` under its key, for settings that are compared; nothing where no part is in FP8."""
    found = describe(target)
    return {"target_weights": found} if any(map(is_fp8, found.values())) else {}


def _described(target: nn.Module, names: list[str]) -> str:
    modules: list[Any] = [target.get_submodule(name) for name in names]
    fp8 = [module for module in modules if isinstance(module, FP8Linear)]
    if not fp8:
        return str(modules[0].weight.dtype).removeprefix("torch.")
    kind = "fp8 with static input scales" if any(module.input_scale is not None for module in fp8) else "fp8"
    return kind if len(fp8) == len(modules) else f"{kind} in {len(fp8)} of {len(modules)} layers"
