"""What training needs of the target: embedding, head and sizes, read without loading the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alpamayo_dflash.artefacts import read_json
from alpamayo_dflash.target.config import AlpamayoConfig
from alpamayo_dflash.target.load import checkpoint_folder

_TEXT = "vlm.model.language_model."
_LAYER = re.compile(re.escape(_TEXT) + r"layers\.(\d+)\.input_layernorm\.weight")


@dataclass(frozen=True)
class FrozenTarget:
    """Parts of a target that a draft shares, and the shape that a new draft takes over.

    Attributes:
        folder: where the checkpoint lies.
        embedding: [V, C] float32.
        head: [V, C] float32.
        final_norm: [C] float32, weight of the text decoder's last norm.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: D.
        intermediate_size: width of the MLP.
        traj_ids: ids of trajectory tokens, which are never generated in text.
    """

    folder: Path
    embedding: Tensor
    head: Tensor
    final_norm: Tensor
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    traj_ids: range


def read_target(name: str | Path, *, local_files_only: bool = False) -> FrozenTarget:
    """Read the shared parts of a checkpoint in the official layout.

    Args:
        name: folder or hub id.
        local_files_only: never ask the hub.

    Raises:
        ValueError: the checkpoint is not found, or a tensor is missing or corrupt; the message names it.
    """
    folder = checkpoint_folder(name, local_files_only=local_files_only)
    config = AlpamayoConfig.from_file(folder / "config.json")
    files = _files(folder)
    layers = [int(match[1]) for match in map(_LAYER.fullmatch, files) if match]
    if not layers:
        raise ValueError(f"{folder}: no text decoder layers ({_TEXT}layers.*) among its tensors")
    first = _TEXT + "layers.0."
    (head_dim,) = _read(files, first + "self_attn.q_norm.weight", folder).shape
    return FrozenTarget(
        folder=folder,
        embedding=_read(files, _TEXT + "embed_tokens.weight", folder).float(),
        head=_read(files, "vlm.lm_head.weight", folder).float(),
        final_norm=_read(files, _TEXT + "norm.weight", folder).float(),
        num_layers=max(layers) + 1,
        num_heads=_read(files, first + "self_attn.q_proj.weight", folder).shape[0] // head_dim,
        num_kv_heads=_read(files, first + "self_attn.k_proj.weight", folder).shape[0] // head_dim,
        head_dim=head_dim,
        intermediate_size=_read(files, first + "mlp.gate_proj.weight", folder).shape[0],
        traj_ids=range(config.traj_token_start_idx, config.traj_token_start_idx + config.traj_vocab_size),
    )


def check_data(
    manifest: Mapping[str, Any], target: FrozenTarget, where: Path, *, target_hash: str | None
) -> None:
    """Raise ValueError if the distillation data was not made with this target.

    Args:
        manifest: of the data.
        target: its shape is compared,
        where: the data's folder, for messages.
        target_hash: and the hash of its folder, unless this is None.
    """
    vocab_size, width = target.embedding.shape
    found = {"hidden_size": width, "vocab_size": vocab_size, "num_target_layers": target.num_layers}
    for key, value in found.items():
        if manifest[key] != value:
            raise ValueError(f"{where}: made with a target of {key} {manifest[key]}; this target has {value}")
    made_with = manifest["settings"]["target"]
    if target_hash is not None and made_with != target_hash:
        raise ValueError(
            f"{where}: made with another target (hash {made_with[:12]}) than {target.folder}; "
            "--other-target goes on all the same"
        )


def _files(folder: Path) -> dict[str, Path]:
    """Which file each tensor is in."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        raise ValueError(f"{folder}: holds neither {single.name} nor {index.name}")
    return {name: folder / shard for name, shard in read_json(index)["weight_map"].items()}


def _read(files: Mapping[str, Path], name: str, folder: Path) -> Tensor:
    if name not in files:
        raise ValueError(f"{folder}: no tensor {name}")
    with _open(files[name]) as file:
        tensor: Tensor = file.get_tensor(name)
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{files[name]}: {name} holds values that are not finite")
    return tensor


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path}: missing, or not a whole safetensors file ({error})") from None
