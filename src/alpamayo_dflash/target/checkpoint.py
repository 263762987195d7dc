"""Reading and writing the official checkpoint layout (specification 1).

A checkpoint is config.json and safetensors, one file or shards with an index. Weights are read tensor by
tensor into storage that is allocated once on the device. The files are mapped, and what was read of a mapping
counts as the process's memory until it is closed, so a file is opened anew after every few hundred MiB.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import Qwen3VLConfig

from alpamayo_dflash.common.artefacts import atomic_file, read_json, write_json
from alpamayo_dflash.common.fields import file_name, naming, value_of
from alpamayo_dflash.common.hub import ended
from alpamayo_dflash.common.identity import Fingerprint, changed_identity, identity_of
from alpamayo_dflash.common.tensors import opened, save_tensors
from alpamayo_dflash.target.config import CONFIG, AlpamayoConfig
from alpamayo_dflash.target.formats import AS_STORED, PARTS, TargetFormat
from alpamayo_dflash.target.fp8 import FP8Linear
from alpamayo_dflash.target.quantised import (
    INPUT_SCALE,
    MODELOPT,
    QUANTIZATION,
    WEIGHT_SCALE,
    cache_scales,
    check_stored,
    expect_fp8,
    fill,
    linears,
    stored_scheme,
)
from alpamayo_dflash.target.rotary import rope_settings, vision_rope_theta, with_rope
from alpamayo_dflash.target.sizes import check_sizes
from alpamayo_dflash.target.tokenizer import SpecialTokens, load_tokenizer, special_tokens
from alpamayo_dflash.target.weights import allocate

# The trained tiny target's folder in the package, installed or not.
SHIPPED = Path(str(resources.files("alpamayo_dflash") / "standins" / "checkpoint"))
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# What a Qwen3-VL repository holds beside its weights.
_VLM_PATTERNS = ("*.json", "*.jinja", "merges.txt")
# Buffers that R1 stores and 1.5 does not (specification 1.4).
OPTIONAL_TENSORS = frozenset(
    {
        "action_in_proj.sinus.0.freqs",
        "action_in_proj.sinus.1.freqs",
        "action_in_proj.timestep_fourier_encoder.freqs",
        "action_space.accel_mean",
        "action_space.accel_std",
        "action_space.curvature_mean",
        "action_space.curvature_std",
    }
)
_TEXT = "vlm.model.language_model."
_NAMES_SHOWN = 20
_FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them
_FP8 = "F8_E4M3"
# How much of a file is read through one mapping: enough to make opening it again cost nothing.
_MAPPED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class VLMFiles:
    """Where the Qwen3-VL configuration and tokenizer were found.

    Attributes:
        folder: holds config.json and tokenizer.json.
        hub_id: the repository that they came from, or None for a local folder.
    """

    folder: Path
    hub_id: str | None = None


@dataclass(frozen=True)
class FrozenTarget:
    """Parts of a target that a draft shares, and the shape that a new draft takes over.

    Attributes:
        folder: where the checkpoint lies.
        config: what its config.json says.
        vlm_files: where its tokenizer lies.
        text: the text model's configuration.
        embedding: [V, C] float32.
        head: [V, C] float32.
        final_norm: [C] float32, weight of the text decoder's last norm.
    """

    folder: Path
    config: AlpamayoConfig
    vlm_files: VLMFiles
    text: Any
    embedding: Tensor
    head: Tensor
    final_norm: Tensor

    @property
    def num_layers(self) -> int:
        """L, the text model's layers."""
        return int(self.text.num_hidden_layers)

    @property
    def traj_ids(self) -> range:
        """Ids of trajectory tokens, which are never generated in text."""
        return self.config.traj_ids

    def special(self) -> SpecialTokens[int]:
        """Ids of special tokens.

        Raises:
            ValueError: the tokenizer is not found or does not fit the checkpoint.
        """
        tokenizer = load_tokenizer(self.vlm_files.folder, self.config)
        with naming(str(self.vlm_files.folder / "tokenizer.json")):
            return special_tokens(tokenizer)


def checkpoint_folder(name: str | Path, *, local_files_only: bool = False) -> Path:
    """The local folder of a checkpoint, downloaded first where `name` is a hub id.

    Args:
        name: a folder, a hub id, or `tiny` for the checkpoint that ships with the package; a folder of that
            name is `./tiny`, or a `Path`.
        local_files_only: never touch the network.

    Raises:
        ValueError: there is neither such a folder nor such a repository.
    """
    if name == "tiny":
        return SHIPPED
    if Path(name).is_dir():
        return Path(name)
    # A hub's owner is no folder here.
    if not _is_hub_id(str(name)) or Path(name).parent.is_dir():
        raise ValueError(f"{name}: no such folder; else give a hub id of the form owner/name, or tiny")
    return _download(str(name), ("*.json", "*.safetensors"), local_files_only=local_files_only)


def vlm_files(
    config: AlpamayoConfig, checkpoint: Path, *, override: str | Path | None = None, local_files_only: bool
) -> VLMFiles:
    """Find the Qwen3-VL configuration and tokenizer.

    A relative `vlm_name_or_path` is tried beside the checkpoint's files first, then as it stands, then as a
    hub id: in the local cache, and only then over the network.

    Args:
        config: the checkpoint's.
        checkpoint: its folder.
        override: used instead of the config's `vlm_name_or_path`.
        local_files_only: never touch the network.

    Raises:
        ValueError: nothing was found.
    """
    name = config.vlm_name_or_path if override is None else str(override)
    folders = [Path(name)] if override is not None else [checkpoint / name, Path(name)]
    for folder in folders:
        if (folder / "config.json").is_file():
            return VLMFiles(folder)
    if not _is_hub_id(name):
        raise ValueError(
            f"{checkpoint / CONFIG}: vlm_name_or_path is {name!r}, but neither "
            f"{' nor '.join(map(str, folders))} holds a config.json"
        )
    try:
        return VLMFiles(_download(name, _VLM_PATTERNS, local_files_only=True), name)
    except ValueError:
        if local_files_only:
            raise
    return VLMFiles(_download(name, _VLM_PATTERNS, local_files_only=False), name)


def read_vlm_config(folder: Path, config: AlpamayoConfig) -> Qwen3VLConfig:
    """Read the Qwen3-VL configuration and put the checkpoint's vocabulary size in.

    Raises:
        ValueError: it is not a Qwen3-VL, ties its embeddings, has no `rope_theta`, or asks for another
            rotary type.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "qwen3_vl":
        raise ValueError(f"{path}: model_type is {raw.get('model_type')!r}; it must be 'qwen3_vl'")
    text, vision = (
        value_of(raw, part, dict, {}, where=str(path)) for part in ("text_config", "vision_config")
    )
    # How transformers would attend is no part of the model: both forms here are our own.
    for part in (raw, text, vision):
        for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
            part.pop(key, None)
    if raw.get("tie_word_embeddings"):  # of the nested one transformers takes no notice
        raise ValueError(
            f"{path}: tie_word_embeddings is true; Alpamayo has a head of its own (vlm.lm_head.weight)"
        )
    rope = rope_settings(text, f"{path}: text_config")
    if rope.rope_type != "default":
        raise ValueError(f"{path}: rope_type is {rope.rope_type!r}; only 'default' is known")
    if not rope.mrope_interleaved:
        raise ValueError(f"{path}: mrope_interleaved is false; only interleaved M-RoPE is known")
    raw["text_config"] = with_rope(text, rope) | {"vocab_size": config.vocab_size}
    raw["text_config"]["tie_word_embeddings"] = False
    try:
        vlm_config: Qwen3VLConfig = Qwen3VLConfig.from_dict(raw)
    except (TypeError, AttributeError, LookupError, StrictDataclassError) as error:
        raise ValueError(f"{path}: transformers cannot read it ({type(error).__name__}: {error})") from None
    check_sizes(vlm_config, str(path))
    return vlm_config


def prepare_formats(model: nn.Module, folder: Path, raw: Mapping[str, Any], format_: TargetFormat) -> None:
    """Put empty FP8 layers into a model on the meta device: those that are stored so, and those asked for.

    Args:
        model: that `load_weights` is to fill.
        folder: the checkpoint.
        raw: its config.json.
        format_: what is asked for; layers that are stored in FP8 are in FP8 in any case.

    Raises:
        ValueError: the checkpoint is quantised in a way that is not known, or does not say in which; its KV
            cache is scaled.
    """
    shards = _shards(folder)
    if scales := cache_scales(shards):
        raise ValueError(
            f"{folder}: holds scales of a KV cache ({_listed(scales)}): a cache that is scaled (quantised) "
            "is not computed here; export the checkpoint without it"
        )
    scheme, stored = stored_scheme(folder, raw), _stored_in_fp8(shards)
    if stored and scheme is None:
        raise ValueError(
            f"{folder}: holds weights in {_FP8}, but neither {QUANTIZATION} in {CONFIG} nor {MODELOPT} says "
            f"how their inputs are cast; the first is {min(stored)}"
        )
    if scheme is not None and not stored:
        raise ValueError(f"{scheme.where}: says that weights are in FP8, but none is {_FP8}")
    names = [(name, part in format_.fp8) for part in PARTS for name in linears(model, part)]
    static = scheme is not None and scheme.static
    expect_fp8(model, [name for name, _ in names if name in stored], static=static)
    expect_fp8(model, [name for name, asked in names if asked and name not in stored])


def load_weights(model: nn.Module, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
    """Fill a model that was built on the meta device.

    Parameters get `dtype`; stored buffers stay float32, with the values of the file. Projections that read
    the same input lie in one piece of storage (q, k, v; gate, up) and the head has rows up to a multiple of
    64, so that they can be run as one product; the modules hold views. FP8 layers (`prepare_formats`) are
    filled as they are stored, or made of what is: one layer at a time is held twice then.

    Args:
        model: its state dict has the checkpoint's names.
        folder: the checkpoint.
        device: where the weights go.
        dtype: of the parameters.

    Raises:
        ValueError: a file is missing or broken, or tensors are missing, surplus, misshapen or cannot be what
            they are to be; each is named.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shards = _shards(folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    stored = _stored_in_fp8(shards) & layers.keys()
    for name in layers.keys() - stored:
        del expected[f"{name}.{WEIGHT_SCALE}"]
    _check_tensors(expected, shards, folder, fp8=stored)
    allocate(model, device, dtype)
    filling = _Filling(
        model.state_dict(), {name: layers[name] for name in layers if name not in stored}, device
    )
    # safetensors puts what it reads on the caller's default device.
    with torch.no_grad(), torch.device("cpu"):
        for shard in dict.fromkeys(shards.values()):
            for group in _groups(shard):
                with opened(shard) as file:
                    for name, start, stop in group:
                        filling.add(name, file.get_tensor(name).view(-1)[start:stop], start)
        with naming(str(folder)):
            for name in sorted(stored):
                check_stored(layers[name], name)


def write_fp8(
    model: nn.Module, folder: Path, out: Path, format_: TargetFormat, *, device: torch.device
) -> dict[str, Any]:
    """Write a checkpoint's tensors once more, those of some parts' products in FP8: a shard at a time.

    The shards keep their names, and what is not converted keeps its type. config.json is not written.

    Args:
        model: of the checkpoint, on the meta device, without FP8 layers.
        folder: the checkpoint.
        out: where the shards go; is made if it does not exist.
        format_: the parts that are converted.
        device: where they are.

    Returns:
        how many `layers` were converted and `tensors` written; `weight_bytes`, `shards`,
        `largest_shard_bytes`.

    Raises:
        ValueError: the checkpoint is broken, or holds weights in FP8; the message names what.
    """
    shards = _shards(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if stored := _stored_in_fp8(shards):
        raise ValueError(
            f"{folder}: holds weights in {_FP8} already (the first is {min(stored)}); convert the official "
            "files"
        )
    _check_tensors(expected, shards, folder)
    layers = {f"{name}.weight" for part in format_.fp8 for name in linears(model, part)}
    out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    sizes: list[int] = []
    for shard in dict.fromkeys(shards.values()):
        tensors = _converted(shard, layers, device)
        with atomic_file(out / shard.name) as temporary:
            save_tensors(tensors, temporary)
        weight_map |= dict.fromkeys(tensors, shard.name)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
    if len(sizes) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(out / _INDEX, index)
    return {
        "layers": len(layers),
        "tensors": len(weight_map),
        "weight_bytes": sum(sizes),
        "shards": len(sizes),
        "largest_shard_bytes": max(sizes),
    }


@torch.no_grad()
def _converted(shard: Path, layers: set[str], device: torch.device) -> dict[str, Tensor]:
    """A shard's tensors, weights of some layers as e4m3 and scales."""
    tensors: dict[str, Tensor] = {}
    with opened(shard) as file, torch.device("cpu"):
        for name in file.keys():  # noqa: SIM118
            values = file.get_tensor(name)
            if name not in layers:
                tensors[name] = values
                continue
            layer = FP8Linear(values.shape[1], len(values), device=device)
            with naming(str(shard)):
                fill(layer, name, values.to(device))
            tensors[name] = layer.weight.data.cpu()
            tensors[name.removesuffix("weight") + WEIGHT_SCALE] = layer.weight_scale.data.cpu()
    return tensors


class _Filling:
    """A model's tensors as they are filled, in pieces.

    Args:
        targets: the model's tensors by name.
        made: FP8 layers whose weights are stored in a float type; each is made when it is whole.
        device: where they are collected until then.
    """

    def __init__(
        self, targets: Mapping[str, Tensor], made: Mapping[str, FP8Linear], device: torch.device
    ) -> None:
        self._targets, self._device = targets, device
        self._made = {f"{name}.weight": layer for name, layer in made.items()}
        self._whole: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, start: int) -> None:
        """Take values [stop - start] of a tensor, which come in order."""
        target = self._targets[name]
        if name not in self._made:
            flat = target.view(-1)
            scalar = len(values) == 1 and name.endswith((WEIGHT_SCALE, INPUT_SCALE))
            (flat if scalar else flat[start : start + len(values)]).copy_(values)
            return
        whole = self._whole.setdefault(
            name, torch.empty(target.shape, dtype=values.dtype, device=self._device)
        )
        whole.view(-1)[start : start + len(values)].copy_(values)
        if start + len(values) == target.numel():
            fill(self._made[name], name, self._whole.pop(name))


def _stored_in_fp8(shards: Mapping[str, Path]) -> set[str]:
    """The layers whose weights are stored in FP8."""
    found = set()
    for path in dict.fromkeys(shards.values()):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(".weight") and file.get_slice(name).get_dtype() == _FP8:
                    found.add(name.removesuffix(".weight"))
    return found


def read_target(name: str | Path, *, local_files_only: bool = False) -> FrozenTarget:
    """Read the shared parts of a checkpoint in the official layout.

    Args:
        name: folder, hub id or `tiny`.
        local_files_only: never ask the hub.

    Raises:
        ValueError: the checkpoint is not found, or a tensor is missing or corrupt; the message names it.
    """
    folder = checkpoint_folder(name, local_files_only=local_files_only)
    config = AlpamayoConfig.from_file(folder / "config.json")
    files = vlm_files(config, folder, local_files_only=local_files_only)
    text: Any = read_vlm_config(files.folder, config).text_config
    rows = (config.vocab_size, text.hidden_size)
    shapes = {
        f"{_TEXT}embed_tokens.weight": rows,
        "vlm.lm_head.weight": rows,
        f"{_TEXT}norm.weight": rows[1:],
    }
    shards = {name: path for name, path in _shards(folder).items() if name in shapes}
    _check_tensors(shapes, shards, folder, fp8=_stored_in_fp8(_shards(folder)))
    return FrozenTarget(folder, config, files, text, *(_read(shards[name], name) for name in shapes))


def target_identity(folder: Path, vlm: VLMFiles, format_: TargetFormat = AS_STORED) -> Fingerprint:
    """The identity of a target: its config, its weights, and the Qwen3-VL's config and tokenizer.

    Args:
        folder: the checkpoint.
        vlm: where its Qwen3-VL files were found.
        format_: that it is loaded with; parts made in FP8 are another target than the files'.
    """
    files = {path.name: path for path in (folder / CONFIG, *_shards(folder).values())}
    if (folder / MODELOPT).is_file():
        files[MODELOPT] = folder / MODELOPT
    beside = {f"vlm/{name}": vlm.folder / name for name in (CONFIG, "tokenizer.json")}
    # Training reads no tokenizer, and does without.
    found = identity_of(files | {name: path for name, path in beside.items() if path.is_file()}, folder)
    return found if format_ == AS_STORED else changed_identity(found, f"fp8 {' '.join(format_.fp8)}")


def fill_rotary_buffers(vlm: nn.Module, device: torch.device) -> None:
    """Compute the inverse frequencies that transformers keeps as buffers outside the state dict."""
    for path, module in vlm.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_meta:
                continue
            if name not in ("inv_freq", "original_inv_freq"):
                raise RuntimeError(
                    f"this version of transformers has a buffer that is not known: {path}.{name}"
                )
            setattr(module, name, _inverse_frequencies(vlm, path).to(device))


def save_checkpoint(
    folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], vlm: VLMFiles, dtype: torch.dtype
) -> None:
    """Write config.json, model.safetensors and, unless they are the hub's, the Qwen3-VL files in `vlm/`.

    Every file is written atomically, config.json last.

    Args:
        folder: is made if it does not exist.
        raw: the object of config.json.
        tensors: the state dict.
        vlm: where the Qwen3-VL files are now.
        dtype: of every tensor in the file.
    """
    name = str(dtype).removeprefix("torch.")
    config = dict(raw) | {"dtype": name, "model_dtype": name}
    config["expert_cfg"] = dict(config["expert_cfg"]) | {"dtype": name}
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, because views of one storage cannot be written as they are.
    plain = {key: value.detach().to("cpu", dtype, copy=True).contiguous() for key, value in tensors.items()}
    with atomic_file(folder / _WEIGHTS) as temporary:
        save_tensors(plain, temporary)
    save_config(folder, config, vlm)


def save_config(folder: Path, raw: Mapping[str, Any], vlm: VLMFiles) -> None:
    """Write the Qwen3-VL files in `vlm/`, unless they are the hub's, and config.json, which names them."""
    if vlm.hub_id is None:
        _copy_vlm(vlm.folder, folder / "vlm")
    write_json(folder / CONFIG, dict(raw) | {"vlm_name_or_path": vlm.hub_id or "vlm"})


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts)


def _download(repo_id: str, patterns: tuple[str, ...], *, local_files_only: bool) -> Path:
    call = partial(
        snapshot_download,
        repo_id,
        allow_patterns=list(patterns),
        local_files_only=local_files_only,
        revision=_blank_ended_ref(repo_id),
    )
    try:
        return Path(call() if local_files_only else ended(call, repo_id, _cache_of(repo_id)))
    except OSError as error:
        where = "in the local cache" if local_files_only else "on the hub or in the local cache"
        raise ValueError(
            f"{repo_id}: not found {where} ({type(error).__name__}: {error}). "
            "A gated repository needs its terms accepted and a login; a local folder works without the hub."
        ) from None


def _cache_of(repo_id: str) -> Path:
    return Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"


def _blank_ended_ref(repo_id: str) -> str | None:
    """The cached `main`, where its file ends in a line end, which the hub's library would take along."""
    reference = _cache_of(repo_id) / "refs" / "main"
    text = reference.read_bytes().decode("utf-8", "replace") if reference.is_file() else ""
    return text.strip() if text.strip() != text else None


def _shards(folder: Path) -> dict[str, Path]:
    """Each tensor's file.

    Raises:
        ValueError: a file that should be there is not.
    """
    single, index = folder / _WEIGHTS, folder / _INDEX
    if single.is_file():
        files = [single]
        named: dict[str, Path] = {}
    elif index.is_file():
        weight_map = value_of(read_json(index), "weight_map", dict, where=str(index))
        named = {name: folder / file_name(file, f"{index}: {name:.200}") for name, file in weight_map.items()}
        files = sorted(set(named.values()))
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{folder}: the index names files that are missing: {', '.join(missing)}")
    else:
        raise ValueError(f"{folder}: holds neither {_WEIGHTS} nor {_INDEX}")
    found: dict[str, Path] = {}
    for path in files:
        with opened(path) as file:
            found.update(dict.fromkeys(file.keys(), path))
    misplaced = [name for name, path in named.items() if name in found and found[name] != path]
    if misplaced:
        raise ValueError(f"{index}: these tensors are in another file than it says: {_listed(misplaced)}")
    return found


def _check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    shards: Mapping[str, Path],
    folder: Path,
    *,
    fp8: Iterable[str] = (),
) -> None:
    """Raise ValueError for tensors that are not the expected ones.

    Args:
        expected: shapes by name.
        shards: where the tensors are.
        folder: for the message.
        fp8: layers whose weights are stored in FP8; a scale of a whole tensor is a row's too.
    """
    problems = []
    missing = [name for name in expected if name not in shards and name not in OPTIONAL_TENSORS]
    surplus = [name for name in shards if name not in expected]
    misshapen, strange = [], []
    weights = {f"{name}.weight" for name in fp8}
    scales = {f"{name}.{scale}" for name in fp8 for scale in (WEIGHT_SCALE, INPUT_SCALE)}
    for path in dict.fromkeys(shards.values()):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
                if name in expected and shape not in _shapes(expected[name], scale=name in scales):
                    misshapen.append(f"{name} is {list(shape)} and must be {list(expected[name])}")
                allowed = (_FP8,) if name in weights else _FLOATS
                if dtype not in allowed:
                    strange.append(f"{name} is {dtype} and must be one of {', '.join(allowed)}")
    faults = {"missing": missing, "surplus": surplus, "misshapen": misshapen, "of another dtype": strange}
    for label, names in faults.items():
        if names:
            problems.append(f"{len(names)} {label}: {_listed(names)}")
    if problems:
        raise ValueError(f"{folder}: the tensors do not fit config.json; {'; '.join(problems)}")


def _shapes(shape: tuple[int, ...], *, scale: bool) -> tuple[tuple[int, ...], ...]:
    """The shapes that a tensor may be stored in: a scale of each row without its last axis, or one of all."""
    return (shape, shape[:1], (1,), ()) if scale else (shape,)


def _listed(names: list[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _groups(path: Path) -> list[list[tuple[str, int, int]]]:
    """A file's tensors, or parts of them, in groups of at most `_MAPPED_BYTES`: (name, start, stop)."""
    groups: list[list[tuple[str, int, int]]] = []
    room = 0
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.mapped(name)
            start, count, size = 0, tensor.numel(), tensor.element_size()
            while start < count:
                if room < size:
                    groups.append([])
                    room = _MAPPED_BYTES
                stop = min(count, start + room // size)
                groups[-1].append((name, start, stop))
                room -= (stop - start) * size
                start = stop
    return groups


def _read(path: Path, name: str) -> Tensor:
    """A tensor of a file, in float32."""
    with opened(path) as file:
        tensor: Tensor = file.get_tensor(name)
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{path}: {name} holds values that are not finite")
    return tensor.float()


def _inverse_frequencies(vlm: Any, path: str) -> Tensor:
    """1 / theta^(2i / d), d the text model's head, or half a head for rows and columns of patches."""
    if path.startswith("model.visual"):
        vision = vlm.config.vision_config
        size, theta = vision.hidden_size // vision.num_heads // 2, vision_rope_theta(vision)
    else:
        text = vlm.config.text_config
        size, theta = text.head_dim, rope_settings(text).rope_theta
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    return torch.reciprocal(theta**exponents)


def _copy_vlm(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    if target.resolve() == source.resolve():
        return
    for pattern in _VLM_PATTERNS:
        for path in sorted(source.glob(pattern)):
            if not path.name.endswith(".index.json"):
                with atomic_file(target / path.name) as temporary:
                    shutil.copyfile(path, temporary)
    raw = read_json(source / "config.json")
    text = raw["text_config"]
    if "rope_parameters" in text:  # written by transformers 5, for it alone
        where = f"{source / 'config.json'}: text_config"
        write_json(target / "config.json", raw | {"text_config": with_rope(text, rope_settings(text, where))})
