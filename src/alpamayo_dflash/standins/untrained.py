"""A checkpoint with random weights in the official layout, up to the R1 release's size.

It stands in for the real one where only size and layout count: loading, memory, speed. Weights are drawn
tensor by tensor and written as they are drawn, so the host holds one tensor at a time.

The tokenizer is made up: a byte-level BPE that has merged the prompt's own words and is filled up to the
wanted length with entries that no text gives. A prompt therefore has about, and not exactly, the tokens of
Qwen's; what a random target writes is noise.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from alpamayo_dflash.clips.config import DEFAULT_T0_US
from alpamayo_dflash.clips.window import (
    DEFAULT_CAMERAS,
    FRAMES_PER_CAMERA,
    HISTORY_POINTS,
    STEP_S,
    Window,
)
from alpamayo_dflash.common.artefacts import atomic_file, provenance, read_json, to_plain, write_json
from alpamayo_dflash.common.fields import shown, value_of
from alpamayo_dflash.common.machine import check_device
from alpamayo_dflash.common.options import generator_seed
from alpamayo_dflash.standins.blueprint import (
    QWEN_ORDINARY,
    QWEN_SPECIAL,
    RandomCheckpointConfig,
    TargetShape,
    alpamayo_config,
    write_vlm,
)
from alpamayo_dflash.standins.config import WriteRandomTargetConfig
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.checkpoint import OPTIONAL_TENSORS, VLMFiles, fill_rotary_buffers, read_vlm_config
from alpamayo_dflash.target.config import AlpamayoConfig
from alpamayo_dflash.target.expert import FourierFeatures
from alpamayo_dflash.target.motion import ActionSpace
from alpamayo_dflash.target.prompt import render
from alpamayo_dflash.target.tokenizer import load_tokenizer
from alpamayo_dflash.target.weights import allocate

RECORD = "random_checkpoint.json"
_BYTES = 2  # of a bfloat16
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class _Shard:
    """A file of weights: names in the order of their bytes."""

    file: str
    names: tuple[str, ...]


def write_random_checkpoint(folder: Path | str, config: RandomCheckpointConfig) -> dict[str, Any]:
    """Write config.json, vlm/, the shards and their index; each atomically, config.json last.

    A folder that holds this very checkpoint is left as it is.

    Args:
        folder: is made if it does not exist.
        config: size, seed and device.

    Returns:
        `tensors`, `parameters`, `weight_bytes`, `largest_shard_bytes`, `shards`, `vocab_size` and
        `nothing_to_do`.

    Raises:
        ValueError: the folder holds another checkpoint, or the device is not there.
    """
    started = time.time()
    folder, device = Path(folder), check_device(config.device)
    if (folder / "config.json").exists():
        return _already(folder, config)
    raw = alpamayo_config(config.shape)
    write_vlm(folder / "vlm", config.shape, made_up_tokenizer(config.shape))
    target = meta_target(AlpamayoConfig.from_dict(raw), folder / "vlm")
    constants = {name: target.state_dict()[name] for name in OPTIONAL_TENSORS}
    shapes = {name: tuple(tensor.shape) for name, tensor in target.state_dict().items()}
    shards = _split(shapes, config.shards)

    def values(name: str) -> Tensor:
        if name in constants:
            constant: Tensor = constants[name]
            return constant.bfloat16()
        return random_tensor(name, shapes[name], config.seed, device)

    for shard in shards:
        with atomic_file(folder / shard.file) as temporary, temporary.open("wb") as stream:
            stream.write(_header(shard, shapes))
            for name in shard.names:
                stream.write(values(name).cpu().reshape(-1).view(torch.uint8).numpy().data)
    total = sum(_size(shape) for shape in shapes.values())
    weight_map = {name: shard.file for shard in shards for name in shard.names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    summary = {
        "tensors": len(shapes),
        "parameters": total // _BYTES,
        "weight_bytes": total,
        "largest_shard_bytes": max((folder / shard.file).stat().st_size for shard in shards),
        "shards": len(shards),
        "vocab_size": config.shape.vocab_size,
    }
    made = provenance(config, started)
    write_json(folder / RECORD, summary | {"provenance": made})
    write_json(folder / "config.json", raw)
    return summary | {"nothing_to_do": False}


def meta_target(config: AlpamayoConfig, vlm: Path) -> Alpamayo:
    """The model with its weights on the meta device, which takes no memory, and its constants computed.

    The constants are rounded to bfloat16, as R1's file holds them (specification 1.5).
    """
    with torch.device("meta"):
        target = Alpamayo(config, read_vlm_config(vlm, config), load_tokenizer(vlm, config), VLMFiles(vlm))
    _reset_constants(target, torch.device("cpu"))
    return target


@torch.no_grad()
def random_target(config: RandomCheckpointConfig, vlm: Path) -> Alpamayo:
    """The target that `write_random_checkpoint` would write, in bfloat16 on `config.device`, without files.

    Args:
        config: size, seed and device.
        vlm: a folder for the Qwen3-VL files, which are written there (see `write_vlm`).

    Raises:
        ValueError: the device is not there.
    """
    device = check_device(config.device)
    write_vlm(vlm, config.shape, made_up_tokenizer(config.shape))
    target = meta_target(AlpamayoConfig.from_dict(alpamayo_config(config.shape)), vlm)
    fill_rotary_buffers(target.vlm, device)
    _reset_constants(target, device)
    allocate(target, device, torch.bfloat16)
    for name, parameter in target.named_parameters():
        parameter.copy_(random_tensor(name, parameter.shape, config.seed, device))
    return target


def random_tensor(name: str, shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """A parameter's values: norms 1, biases 0, all others normal with deviation fan-in^-1/2.

    So a product of normed states has states of about unit size, and nothing grows without bound.

    Args:
        name: with the seed it fixes the values on one kind of device.
        shape: of the tensor; all behind the first is the fan-in.
        seed: of the checkpoint.
        device: where the values are drawn and stay.

    Returns:
        bfloat16 of that shape.
    """
    tensor = torch.empty(tuple(shape), dtype=torch.bfloat16, device=device)
    if name.endswith(".bias"):
        return tensor.zero_()
    if tensor.dim() < 2:
        return tensor.fill_(1.0)
    word = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]
    generator = torch.Generator(device).manual_seed(int.from_bytes(word, "little") >> 1)
    return tensor.normal_(0.0, math.prod(tensor.shape[1:]) ** -0.5, generator=generator)


def made_up_tokenizer(shape: TargetShape) -> Tokenizer:
    """A byte-level BPE of `shape.pieces` entries with Qwen's added tokens behind them.

    Raises:
        ValueError: `shape.pieces` is too small for the bytes and the prompt's words.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.pieces,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = render(AlpamayoConfig.from_dict(alpamayo_config(shape)), (0,), 1)
    tokenizer.train_from_iterator(re.split(r"<\|\w+\|>", text), trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    if len(vocabulary) >= shape.pieces:
        raise ValueError(f"pieces is {shape.pieces}; the bytes and the prompt's words need more")
    # No merge leads to these; only a model can emit them, and they decode to themselves.
    vocabulary |= {f"Ġfiller{index}": index for index in range(len(vocabulary), shape.pieces)}
    filled: Tokenizer = Tokenizer.from_str(json.dumps(state))
    filled.add_special_tokens([AddedToken(token, normalized=False) for token in QWEN_SPECIAL])
    filled.add_tokens([AddedToken(token, normalized=False) for token in QWEN_ORDINARY])
    return filled


def _reset_constants(target: Alpamayo, device: torch.device) -> None:
    for module in target.modules():
        if isinstance(module, (FourierFeatures, ActionSpace)):
            module.reset(device, rounded=True)


def _already(folder: Path, config: RandomCheckpointConfig) -> dict[str, Any]:
    """What a finished folder's record says.

    Raises:
        ValueError: the folder holds another checkpoint.
    """
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    made = value_of(record, "provenance", dict, {}, where=str(folder / RECORD)).get("config")
    record.pop("provenance", None)
    if made != to_plain(config):
        found = shown(made) if made else "not a random one"
        raise ValueError(f"{folder}: holds another checkpoint ({found}); give an empty folder")
    return record | {"nothing_to_do": True}


def _split(shapes: Mapping[str, tuple[int, ...]], count: int) -> list[_Shard]:
    """Files of roughly equal size, tensors in the model's order; each goes where its middle falls.

    Inside a file the names are sorted, which is the order in which safetensors hands them out again, so that
    a load reads forward.
    """
    total = sum(_size(shape) for shape in shapes.values())
    parts: list[list[str]] = [[] for _ in range(count)]
    offset = 0
    for name, shape in shapes.items():
        middle = offset + _size(shape) // 2
        parts[min(count - 1, middle * count // total)].append(name)
        offset += _size(shape)
    if not all(parts):
        raise ValueError(f"shards is {count}; the tensors do not fill so many files of equal size")
    return [
        _Shard(f"model-{index:05d}-of-{count:05d}.safetensors", tuple(sorted(part)))
        for index, part in enumerate(parts, start=1)
    ]


def _size(shape: Sequence[int]) -> int:
    return math.prod(shape) * _BYTES


def _header(shard: _Shard, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """What stands before the tensors' bytes in a safetensors file.

    The header's length (64 bit, little endian) and the header as JSON, filled up with blanks.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in shard.names:
        end = offset + _size(shapes[name])
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


_FRAME = (1080, 1920, 3)
_SPEED_MPS = 10.0


def write(config: WriteRandomTargetConfig) -> dict[str, Any]:
    """Write the checkpoint; a finished one is left as it is.

    Raises:
        ValueError: the folder holds another checkpoint, or the device is not there.
    """
    started = time.time()
    summary = write_random_checkpoint(config.out, config.checkpoint)
    return summary | {"write_s": round(time.time() - started, 3), "out": str(config.out)}


def noise_window(seed: int) -> Window:
    """Sixteen 1080×1920 images of noise, and a straight drive at 10 m/s."""
    import numpy as np

    shape = (len(DEFAULT_CAMERAS), FRAMES_PER_CAMERA, *_FRAME)
    xyz = np.zeros((HISTORY_POINTS, 3), dtype=np.float32)
    xyz[:, 0] = np.arange(1 - HISTORY_POINTS, 1) * (STEP_S * _SPEED_MPS)
    return Window(
        clip_id=f"noise{seed}",
        t0_us=DEFAULT_T0_US,
        cameras=DEFAULT_CAMERAS,
        frames=np.random.default_rng(generator_seed(seed)).integers(0, 256, shape, dtype=np.uint8),
        ego_history_xyz=xyz,
        ego_history_rot=np.broadcast_to(np.eye(3, dtype=np.float32), (HISTORY_POINTS, 3, 3)).copy(),
    )
