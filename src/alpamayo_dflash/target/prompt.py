"""From a window to the target's prompt (specification 3, 4.3 and 5).

Shapes: P prompt tokens, T image tokens, C hidden.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.target.config import AlpamayoConfig
from alpamayo_dflash.target.images import PatchesOf, PatchShape, patch_grid, plain_patches, smart_size
from alpamayo_dflash.target.motion import encode_history
from alpamayo_dflash.target.tokenizer import SpecialTokens

_SYSTEM = "You are a driving assistant that generates safe and accurate actions."
_INSTRUCTION = (
    "output the chain-of-thought reasoning of the driving process, then output the future trajectory."
)
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# Camera names in the text of 1.5's prompt, by the dataset's index.
CAMERA_TEXT = {
    0: "Front left camera",
    1: "Front camera",
    2: "Front right camera",
    3: "Rear left camera",
    4: "Rear camera",
    5: "Rear right camera",
    6: "Front telephoto camera",
}


@dataclass(frozen=True)
class Prompt:
    """What the target reads before its first own token.

    Attributes:
        input_ids: int64 [P], the history already written over its placeholders.
        pixel_values: [patches, 3·temporal·patch·patch], float32 on the CPU, or on the target's device in its
            dtype where they were made there (the same values, rounded to it).
        image_grid_thw: int64 [images, 3], in patches.
        position_ids: int64 [3, P], M-RoPE positions (t, h, w).
        rope_delta: a generated token at cache index n has position n + rope_delta.
        key: the window's name, which fixes the noise.
        ego_history_xyz: float32 [M, 3] metres.
        ego_history_rot: float32 [M, 3, 3].
    """

    input_ids: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    position_ids: Tensor
    rope_delta: int
    key: str
    ego_history_xyz: Tensor
    ego_history_rot: Tensor

    def __len__(self) -> int:
        """P, the tokens of the prompt."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Prompt:
        """The same prompt with its tensors on `device`."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device),
            pixel_values=self.pixel_values.to(device),
            image_grid_thw=self.image_grid_thw.to(device),
            position_ids=self.position_ids.to(device),
            ego_history_xyz=self.ego_history_xyz.to(device),
            ego_history_rot=self.ego_history_rot.to(device),
        )


@dataclass(frozen=True)
class PromptEmbeddings:
    """The input of the first text layer, and what is added behind the first few layers.

    Attributes:
        hidden: [P, C], image features at image positions.
        deepstack: [n, T, C]; item k is added at image positions to the output of layer k.
        image_positions: int64 [T].
    """

    hidden: Tensor
    deepstack: Tensor
    image_positions: Tensor


def render(
    config: AlpamayoConfig,
    cameras: tuple[int, ...],
    frames: int,
    *,
    camera_text: bool | None = None,
    route: str | None = None,
    question: str | None = None,
) -> str:
    """The prompt's text with one `<|image_pad|>` an image.

    Args:
        config: the checkpoint's; R1 and 1.5 differ.
        cameras: dataset indices in prompt order.
        frames: frames a camera.
        camera_text: whether camera names and frame numbers stand between the images; None is the official
            example's way, with them in 1.5 and without in R1.
        route: 1.5's navigation text.
        question: 1.5's question; the prompt then asks for an answer instead of a trajectory.

    Raises:
        ValueError: R1 was asked for something that only 1.5 knows, a question comes with a route, or a camera
            has no name.
    """
    is_r1 = config.version == "r1"
    if is_r1 and (camera_text or route is not None or question is not None):
        raise ValueError("camera text, a route and questions belong to Alpamayo 1.5; this checkpoint is R1")
    if question is not None and route is not None:
        raise ValueError(f"route {route!r} is given with a question, whose prompt has no place for it")
    named = not is_r1 if camera_text is None else camera_text
    images = _named_images(cameras, frames) if named else _IMAGE * (len(cameras) * frames)
    if question is not None:
        user, start = f"<|question_start|>{question}<|question_end|>", "<|answer_start|>"
    else:
        history = "<|traj_history|>" * config.tokens_per_history_traj
        route_text = "" if route is None else f"<|route_start|>{route}<|route_end|>"
        user = f"<|traj_history_start|>{history}<|traj_history_end|>{route_text}{_INSTRUCTION}"
        start = "<|cot_start|>"
    return (
        f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{images}{user}<|im_end|>\n"
        f"<|im_start|>assistant\n{start}"
    )


def _named_images(cameras: tuple[int, ...], frames: int) -> str:
    unknown = [camera for camera in cameras if camera not in CAMERA_TEXT]
    if unknown:
        raise ValueError(f"camera {unknown[0]} has no name; known are {', '.join(map(str, CAMERA_TEXT))}")
    numbered = "".join(f"frame {index} {_IMAGE}" for index in range(frames))
    return "".join(f"{CAMERA_TEXT[camera]}: {numbered}" for camera in cameras)


def fuse_history(input_ids: Tensor, history_ids: Tensor, placeholder: int) -> Tensor:
    """Write history ids [n] over the placeholders in input_ids [P], in order (specification 4.3).

    Raises:
        ValueError: the counts differ.
    """
    where = input_ids == placeholder
    count = int(where.sum())
    if count != history_ids.numel():
        raise ValueError(
            f"the prompt has {count} history placeholders, but the history gives {history_ids.numel()}"
        )
    fused = input_ids.clone()
    fused[where] = history_ids
    return fused


def mrope_positions(input_ids: Tensor, grid: Tensor, *, image_pad: int, merge: int) -> tuple[Tensor, int]:
    """Interleaved M-RoPE positions (specification 5).

    Args:
        input_ids: int64 [P], image tokens repeated.
        grid: int64 [images, 3], (1, gh, gw) in patches.
        image_pad: the id of image tokens.
        merge: patches on the side of a merged block.

    Returns:
        position_ids int64 [3, P] and the rope delta.
    """
    parts: list[Tensor] = []
    image_starts = (input_ids == image_pad).nonzero().flatten().tolist()
    cursor = position = used = 0
    for _, grid_h, grid_w in grid.tolist():
        rows, columns = grid_h // merge, grid_w // merge
        text = image_starts[used] - cursor
        parts.append((position + torch.arange(text, device="cpu")).expand(3, -1))
        position += text
        sides = torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu")
        row, column = torch.meshgrid(*sides, indexing="ij")
        parts.append(position + torch.stack((torch.zeros_like(row), row, column)).flatten(1))
        position += max(rows, columns)
        cursor = image_starts[used] + rows * columns
        used += rows * columns
    parts.append((position + torch.arange(len(input_ids) - cursor, device="cpu")).expand(3, -1))
    position_ids = torch.cat(parts, dim=1)
    return position_ids, int(position_ids.max()) + 1 - len(input_ids)


def build_prompt(
    window: Window,
    config: AlpamayoConfig,
    tokenizer: Tokenizer,
    special: SpecialTokens[int],
    shape: PatchShape,
    *,
    camera_text: bool | None = None,
    route: str | None = None,
    question: str | None = None,
    patches_of: PatchesOf = plain_patches,
) -> Prompt:
    """Turn a window into a prompt, on the CPU but for what `patches_of` makes; for the options see `render`.

    A question's prompt has no ego history: an answer is asked for, and no trajectory. Frames are read last,
    when all else has been found to fit.

    Raises:
        ValueError: the window's arrays do not fit the checkpoint, its history is not one of the moment t0, or
            a route or question holds a control token.
    """
    order = _camera_order(window)
    count, per_camera, full_height, full_width = window.frames.shape[:4]
    height, width = resized_size(full_height, full_width, config, shape)
    grid = patch_grid(count * per_camera, height, width, shape.patch)
    for name, given in (("route", route), ("question", question)):
        _check_plain_text(name, given, tokenizer)
    cameras = tuple(int(window.cameras[place]) for place in order)
    text = render(config, cameras, per_camera, camera_text=camera_text, route=route, question=question)
    grids = tuple(tuple(each) for each in grid.tolist())
    with torch.inference_mode(False):  # what is kept serves training too
        laid_out = _laid_out(text, grids, tokenizer, special.image_pad, shape.merge)
    ids, position_ids, delta = laid_out[0].clone(), laid_out[1].clone(), laid_out[2]
    xyz, rot = no_history()
    if question is None:
        xyz = torch.from_numpy(np.asarray(window.ego_history_xyz, dtype=np.float32))
        rot = torch.from_numpy(np.asarray(window.ego_history_rot, dtype=np.float32))
        check_history(xyz, rot, f"window {window.key}")
        history = encode_history(xyz, rot, config.history_tokenizer) + config.history_token_start_idx
        ids = fuse_history(ids, history, special.traj_history)
    pixel_values = patches_of(window.frames, order, height, width, shape)
    return Prompt(ids, pixel_values, grid, position_ids, delta, window.key, xyz, rot)


@functools.lru_cache(maxsize=8)
def _laid_out(
    text: str, grids: tuple[tuple[int, ...], ...], tokenizer: Tokenizer, image_pad: int, merge: int
) -> tuple[Tensor, Tensor, int]:
    """A prompt's ids with image tokens repeated and no history yet, and `mrope_positions` of them.

    A stream's windows differ in history and pixels alone, so this is made once.
    """
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64, device="cpu")
    grid, repeats = torch.tensor(grids, device="cpu"), torch.ones_like(ids)
    repeats[ids == image_pad] = grid.prod(-1) // merge**2
    ids = ids.repeat_interleave(repeats)
    return ids, *mrope_positions(ids, grid, image_pad=image_pad, merge=merge)


def resized_size(height: int, width: int, config: AlpamayoConfig, shape: PatchShape) -> tuple[int, int]:
    """The height and width that a checkpoint's images are resized to.

    Raises:
        ValueError: the aspect ratio is above 200.
    """
    return smart_size(
        height,
        width,
        factor=shape.patch * shape.merge,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
    )


def _camera_order(window: Window) -> list[int]:
    """The places of a window's cameras in its frames, cameras ascending; refuses frames that are none."""
    frames = window.frames
    if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"window {window.key}: frames are {frames.dtype} {frames.shape}; "
            "they must be uint8 [cameras, frames, height, width, 3]"
        )
    if len(window.cameras) != len(frames):
        raise ValueError(f"window {window.key}: {len(window.cameras)} cameras, but frames of {len(frames)}")
    places: list[int] = np.argsort(window.cameras, kind="stable").tolist()
    return places


def no_history() -> tuple[Tensor, Tensor]:
    """The history of a prompt that asks for no trajectory."""
    points = torch.zeros(0, 3, 3, dtype=torch.float32, device="cpu")
    return points[:, 0], points


def check_history(xyz: Tensor, rot: Tensor, where: str) -> None:
    """Make sure that an ego history is one, in the frame of its own last point.

    A history that is newest first, or in another frame, ends elsewhere. Its direction of travel is its own
    affair: cars reverse, and a standing one's points are all zero.

    Args:
        xyz: [M, 3] metres, oldest first.
        rot: [M, 3, 3].
        where: whose it is, for the message.

    Raises:
        ValueError: other shapes, a value that is not finite, or a last point away from the origin.
    """
    if xyz.dim() != 2 or xyz.shape[1] != 3 or rot.shape != (*xyz.shape, 3) or len(xyz) < 2:
        raise ValueError(
            f"{where}: ego history xyz {tuple(xyz.shape)}, rot {tuple(rot.shape)}: must be [M, 3] and "
            "[M, 3, 3], M ≥ 2"
        )
    for name, values in (("ego_history_xyz", xyz), ("ego_history_rot", rot)):
        sound = values.isfinite().flatten(1).all(1)
        if not bool(sound.all()):
            at = int(sound.logical_not().nonzero()[0])
            raise ValueError(f"{where}: {name}[{at}] is {values[at].tolist()}; it must be finite")
    away = float(xyz[-1].norm())
    turned = float((rot[-1].double() - torch.eye(3, dtype=torch.float64, device=rot.device)).norm())
    if away > _MOST_AWAY_M or turned > _MOST_TURNED:
        raise ValueError(
            f"{where}: the ego history's last point is {xyz[-1].tolist()} m, turned {rot[-1].tolist()}; it "
            "must be the origin and the identity (the frame of t0, oldest point first)"
        )


_MOST_AWAY_M = 0.01
_MOST_TURNED = math.radians(0.1) * 2**0.5  # the Frobenius norm of R − 1 is √2 times a small angle


def _check_plain_text(option: str, text: str | None, tokenizer: Tokenizer) -> None:
    """Raise ValueError if a user's text would write control tokens."""
    if text is None:
        return
    added = tokenizer.get_added_tokens_decoder()
    found = [token for token in tokenizer.encode(text, add_special_tokens=False).ids if token in added]
    if found:
        raise ValueError(f"{option} {text!r} holds the control token {added[found[0]].content}; leave it out")


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
    if len(xyz):
        check_history(xyz, rot, "inputs")
    return Prompt(ids, pixels.cpu().float(), grid, positions, delta, key, xyz, rot)


def _history(xyz: Tensor | None, rot: Tensor | None) -> tuple[Tensor, Tensor]:
    if xyz is None or rot is None:
        if xyz is not None or rot is not None:
            raise ValueError("ego_history_xyz and ego_history_rot come together; one of them is missing")
        return no_history()
    points = xyz.shape[-2] if xyz.dim() > 1 else 0
    if xyz.numel() != points * 3 or rot.numel() != points * 9 or points < 2:
        raise ValueError(
            f"ego_history_xyz {tuple(xyz.shape)} and ego_history_rot {tuple(rot.shape)} must be [M, 3] and "
            "[M, 3, 3] of one window, leading axes 1"
        )
    return xyz.cpu().float().reshape(points, 3), rot.cpu().float().reshape(points, 3, 3)
