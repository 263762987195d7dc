"""Checkpoints to resume from: a draft folder with the optimizer's tensors and the trainer's state beside it.

Only safetensors and JSON: nothing in them can run code when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from alpamayo_dflash.common.artefacts import atomic_folder, read_json, write_record
from alpamayo_dflash.common.fields import checked, value_of
from alpamayo_dflash.common.tensors import FLOATS, header_hash, read_tensors, save_tensors
from alpamayo_dflash.draft.formats import KEPT_IDS, WEIGHTS, read_draft, write_files
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.optimizer import Optimizers

STATE = "trainer.json"
OPTIMIZER = "optimizer.safetensors"
_RANDOM = "random_state"
_FILES = "files"  # by name, the hash of the header that vouches for its tensors


class ProgressEntry(TypedDict):
    """The trainer's `Progress` as JSON."""

    step: int
    best_length: float
    best_step: int
    evaluations: list[dict[str, Any]]
    losses: list[dict[str, Any]]


class State(TypedDict):
    """What `trainer.json` holds."""

    config: dict[str, Any]
    world_size: int
    parents: dict[str, str | None]
    progress: ProgressEntry
    total_steps: int


def save_training(folder: Path, draft: DFlashDraft, optimizer: Optimizers, state: Mapping[str, Any]) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
        folder: an earlier checkpoint in it is replaced.
        draft: the weights as they are now.
        optimizer: its tensors are stored by the names of the draft's parameters.
        state: what the trainer must know to go on; JSON values.
    """
    tensors = {_RANDOM: torch.get_rng_state()}
    for name, parameter in draft.named_parameters():
        for key, value in optimizer.state_of(parameter).items():
            tensors[f"{name}:{key}"] = value.detach().cpu().contiguous()
    with atomic_folder(folder) as temporary:
        write_files(temporary, draft.config, draft.state_dict())
        save_tensors(tensors, temporary / OPTIMIZER)
        files = {name: header_hash(temporary / name) for name in (WEIGHTS, OPTIMIZER)}
        write_record(temporary / STATE, {**state, _FILES: files})


def read_state(folder: Path) -> dict[str, Any] | None:
    """The trainer's state of a checkpoint; None where there is none.

    Raises:
        ValueError: the file is corrupt.
    """
    if not (folder / STATE).exists():
        return None
    state, where = read_json(folder / STATE), str(folder / STATE)
    checked(state, State, where)
    if not 0 <= state["progress"]["step"] <= state["total_steps"]:
        found = state["progress"]["step"]
        raise ValueError(
            f"{where}: progress.step is {found}; it must be 0 to total_steps {state['total_steps']}"
        )
    for name, written in value_of(state, _FILES, dict[str, str], {}, where=where).items():
        if header_hash(folder / name) != written:
            raise ValueError(f"{folder / name}: corrupt, or of another checkpoint: not that of {STATE}")
    return state


def load_training(folder: Path, draft: DFlashDraft, optimizer: Optimizers) -> None:
    """Put a checkpoint's weights, optimizer tensors and random state back.

    Raises:
        ValueError: it belongs to another draft, or a file is missing or corrupt.
    """
    config, weights = read_draft(folder)
    if config != draft.config:
        raise ValueError(f"{folder}: the checkpoint's draft is {config}, this run's {draft.config}")
    if draft.token_ids is not None and not torch.equal(weights[KEPT_IDS], draft.token_ids.cpu()):
        raise ValueError(f"{folder}: the checkpoint's head keeps other tokens than this run's")
    draft.load_state_dict(weights)
    tensors = read_tensors(folder / OPTIMIZER)
    random = tensors.pop(_RANDOM, None)
    now = torch.get_rng_state()
    if random is None or (random.dtype, random.shape) != (now.dtype, now.shape):
        raise ValueError(f"{folder / OPTIMIZER}: no {_RANDOM} of torch, {len(now)} bytes")
    by_name: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(":")
        by_name.setdefault(parameter, {})[key] = tensor
    parameters = dict(draft.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    if set(by_name) != trained:
        raise ValueError(f"{folder / OPTIMIZER}: not of this draft: {sorted(set(by_name) ^ trained)[:4]}")
    shapes = optimizer.state_shapes()
    wanted = {name: shapes[parameters[name]] for name in by_name}
    _check_optimizer(by_name, wanted, folder / OPTIMIZER)
    torch.set_rng_state(random)
    optimizer.load_state({parameters[name]: kept for name, kept in by_name.items()})


def _check_optimizer(
    found: Mapping[str, Mapping[str, Tensor]],
    wanted: Mapping[str, Mapping[str, tuple[int, ...]]],
    path: Path,
) -> None:
    """Refuse an optimizer's tensors of other names, shapes or kinds than it keeps."""
    for name, tensors in found.items():
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if shapes != wanted[name] or any(tensor.dtype not in FLOATS for tensor in tensors.values()):
            kinds = {key: f"{tensor.dtype} {list(tensor.shape)}" for key, tensor in tensors.items()}
            raise ValueError(
                f"{path}: {name} has {kinds}; the optimizer keeps numbers of shapes {wanted[name]}"
            )
