"""From what transformers' processor makes to a prompt: the way of users who have their own pre-processing.

Shapes: P prompt tokens, M history points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.target.prompt import Prompt, mrope_positions

_KNOWN = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")


def read_inputs(
    inputs: Mapping[str, Any],
    *,
    image_pad: int,
    merge: int,
    key: str,
    ego_history_xyz: Tensor | None,
    ego_history_rot: Tensor | None,
) -> Prompt:
    """A prompt of a processor's output, its history placeholders as they are.

    Args:
        inputs: `input_ids` [1, P] or [P], image tokens already repeated; `pixel_values` and `image_grid_thw`
            where there are images; an `attention_mask` of ones may be there.
        image_pad: the id of image tokens.
        merge: patches on the side of a merged block.
        key: the window's name, which fixes the noise.
        ego_history_xyz: [..., M, 3] metres, all leading axes 1; None for a text without trajectory.
        ego_history_rot: [..., M, 3, 3].

    Raises:
        ValueError: a key is unknown or missing, there is more than one sequence, or there is padding.
    """
    unknown = sorted(name for name, value in inputs.items() if name not in _KNOWN and value is not None)
    if unknown or "input_ids" not in inputs:
        raise ValueError(f"inputs: {unknown or 'no input_ids'}; known are {', '.join(_KNOWN)} (still images)")
    ids = inputs["input_ids"].reshape(-1, inputs["input_ids"].shape[-1])
    if len(ids) != 1:
        raise ValueError(
            f"inputs: input_ids holds {len(ids)} sequences; give one: samples are num_traj_samples"
        )
    mask = inputs.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError("inputs: attention_mask has zeros; a single prompt needs no padding")
    ids = ids[0].cpu()
    pixels, grid = inputs.get("pixel_values"), inputs.get("image_grid_thw")
    if pixels is None or grid is None:
        raise ValueError("inputs: no pixel_values or no image_grid_thw; a driving prompt has images")
    grid = grid.cpu()
    wanted, found = int(grid.prod(-1).sum()) // merge**2, int((ids == image_pad).sum())
    if wanted != found:
        raise ValueError(f"inputs: {found} image tokens, but image_grid_thw {grid.tolist()} makes {wanted}")
    positions, delta = mrope_positions(ids, grid, image_pad=image_pad, merge=merge)
    xyz, rot = _history(ego_history_xyz, ego_history_rot)
    return Prompt(ids, pixels.cpu().float(), grid, positions, delta, key, xyz, rot)


def _history(xyz: Tensor | None, rot: Tensor | None) -> tuple[Tensor, Tensor]:
    if xyz is None or rot is None:
        if xyz is not None or rot is not None:
            raise ValueError("ego_history_xyz and ego_history_rot come together; one of them is missing")
        return torch.zeros(0, 3), torch.zeros(0, 3, 3)
    points = xyz.shape[-2] if xyz.dim() > 1 else 0
    if xyz.numel() != points * 3 or rot.numel() != points * 9 or points < 2:
        raise ValueError(
            f"ego_history_xyz {tuple(xyz.shape)} and ego_history_rot {tuple(rot.shape)} must be [M, 3] and "
            "[M, 3, 3] of one window, leading axes 1"
        )
    return xyz.cpu().float().reshape(points, 3), rot.cpu().float().reshape(points, 3, 3)
