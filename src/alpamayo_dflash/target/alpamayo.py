"""The target: an Alpamayo checkpoint as a module, tiny and real alike.

The Qwen3-VL is transformers' own module and the weights keep the checkpoint's names; what runs over prompts,
verify rows and way-points is `layers.run_layers`, so that whoever owns a cache brings the attention.

Shapes: P prompt tokens, R rows, S sample, N way-points, M history points, C hidden, V vocabulary, D head dim,
K KV heads, L layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.common.identity import Fingerprint
from alpamayo_dflash.common.machine import check_device
from alpamayo_dflash.target.checkpoint import (
    VLMFiles,
    checkpoint_folder,
    fill_rotary_buffers,
    load_weights,
    prepare_formats,
    read_vlm_config,
    save_checkpoint,
    save_config,
    target_identity,
    vlm_files,
)
from alpamayo_dflash.target.config import CONFIG, AlpamayoConfig
from alpamayo_dflash.target.expert import (
    ACTION_CHANNELS,
    ActionPrefix,
    ActionProjection,
    Expert,
    FourierFeatures,
    expert_text_config,
)
from alpamayo_dflash.target.formats import AS_STORED, TargetFormat, Weights
from alpamayo_dflash.target.images import PatchesOf, plain_patches
from alpamayo_dflash.target.images_fused import DevicePatches, why_plain_images
from alpamayo_dflash.target.motion import ActionSpace, encode_history
from alpamayo_dflash.target.prompt import Prompt, build_prompt, fuse_history
from alpamayo_dflash.target.quantised import QUANTIZATION, describe, fp8_config, is_fp8, linears
from alpamayo_dflash.target.qwen3 import AfterLayer, Attend, run_layers
from alpamayo_dflash.target.tokenizer import SpecialTokens, load_tokenizer, special_tokens
from alpamayo_dflash.target.vlm import Qwen3VLTarget

DenoiseObserver = Callable[[int, Tensor, Tensor, Tensor], None]
"""(step, t [], x [S, N, 2] before the step, velocity [S, N, 2]) -> None"""

# What transformers and torch raise for a config whose values do not fit each other.
_BUILDING_ERRORS = (ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError)


class Alpamayo(nn.Module, Qwen3VLTarget):
    """An Alpamayo R1 or 1.5 checkpoint.

    Attributes:
        config: what config.json says.
        vlm: transformers' Qwen3-VL, whose own `forward` and `generate` work as usual.
        expert: the action expert's layers and norm.
        action_in_proj: noisy actions and time to the expert's input.
        action_out_proj: the expert's output to a velocity.
        action_space: the unicycle model's constants and maths.
        tokenizer: Qwen's tokenizer with the checkpoint's tokens.
        special: ids of special tokens.
    """

    special: SpecialTokens[int]

    def __init__(
        self,
        config: AlpamayoConfig,
        vlm_config: Qwen3VLConfig,
        tokenizer: Tokenizer,
        vlm_files: VLMFiles,
    ) -> None:
        super().__init__()
        expert_config = expert_text_config(vlm_config, dict(config.expert_cfg))
        self.config = config
        self.tokenizer = tokenizer
        self.special = special_tokens(tokenizer)
        self.vlm_files = vlm_files
        self.vlm = Qwen3VLForConditionalGeneration(vlm_config)
        self.expert = Expert(expert_config)
        self.action_in_proj = ActionProjection(config.action_in_proj, expert_config.hidden_size)
        self.action_out_proj = nn.Linear(expert_config.hidden_size, ACTION_CHANNELS)
        self.action_space = ActionSpace(config.action_space)
        self._device_patches: DevicePatches | None = None
        if vlm_config.image_token_id != self.special.image_pad:
            raise ValueError(
                f"{vlm_files.folder}: image_token_id is {vlm_config.image_token_id}, but the tokenizer's "
                f"<|image_pad|> is {self.special.image_pad}"
            )
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        local_files_only: bool = False,
        vlm: str | Path | None = None,
        weights: Weights = "checkpoint",
        expert_weights: Weights = "checkpoint",
        vision_weights: Weights = "checkpoint",
    ) -> Alpamayo:
        """Load a checkpoint in the official layout, or in one of FP8 (`target.quantised`).

        Args:
            name_or_folder: a local folder, a hub id, or `tiny` (see `checkpoint_folder`).
            dtype: of the parameters; None means float32 on a CPU and the checkpoint's own dtype elsewhere.
            device: where the weights go, straight from the file.
            local_files_only: never touch the network.
            vlm: a folder or hub id to take instead of the checkpoint's `vlm_name_or_path`.
            weights: format of the text decoder's products: `checkpoint`, as the files hold them, or `fp8`,
                made from them as they are read.
            expert_weights: the same for the action expert.
            vision_weights: the same for the vision tower.

        Raises:
            ValueError: something is missing or does not fit; the message names it.
        """
        device, format_ = check_device(device), TargetFormat(weights, expert_weights, vision_weights)
        folder = checkpoint_folder(name_or_folder, local_files_only=local_files_only)
        model = cls.on_meta(folder, local_files_only=local_files_only, vlm=vlm)
        wanted = _dtype(dtype, model.config, device)
        model._fill_buffers(device, rounded=wanted == torch.bfloat16)
        prepare_formats(model, folder, model.config.raw, format_)
        load_weights(model, folder, device=device, dtype=wanted)
        return model

    @classmethod
    def on_meta(
        cls, folder: Path, *, local_files_only: bool = False, vlm: str | Path | None = None
    ) -> Alpamayo:
        """The model of a checkpoint with its weights on the meta device, which takes no memory.

        Args:
            folder: the checkpoint.
            local_files_only: never touch the network.
            vlm: as in `from_pretrained`.

        Raises:
            ValueError: a config or the tokenizer is missing or does not fit; the message names it.
        """
        config = AlpamayoConfig.from_file(folder / CONFIG)
        files = vlm_files(config, folder, override=vlm, local_files_only=local_files_only)
        tokenizer = load_tokenizer(files.folder, config)
        vlm_config = read_vlm_config(files.folder, config)
        try:
            with torch.device("meta"):
                return cls(config, vlm_config, tokenizer, files)
        except (*_BUILDING_ERRORS, StrictDataclassError) as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            raise ValueError(
                f"{folder / CONFIG} and {files.folder / CONFIG} ask for what cannot be built "
                f"({type(error).__name__}: {reason})"
            ) from error

    @classmethod
    def from_config(
        cls,
        config: AlpamayoConfig,
        vlm_folder: str | Path,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Alpamayo:
        """Build a model with random weights, drawn from torch's global generator.

        Args:
            config: the checkpoint's configuration.
            vlm_folder: holds the Qwen3-VL config.json and tokenizer.json.
            dtype: of the parameters.
            device: where they go.
        """
        device = check_device(device)
        model = cls._build(config, VLMFiles(Path(vlm_folder)))
        deviation = model.expert.config.initializer_range
        for module in model.expert.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=deviation)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device, _dtype(dtype, config, device))
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
        return model

    @classmethod
    def _build(cls, config: AlpamayoConfig, files: VLMFiles) -> Alpamayo:
        tokenizer = load_tokenizer(files.folder, config)
        return cls(config, read_vlm_config(files.folder, config), tokenizer, files)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | str | None = None) -> None:
        """Write the official layout: config.json, model.safetensors and, where local, the Qwen3-VL files.

        Args:
            folder: is made if it does not exist; each file is replaced atomically.
            dtype: of every tensor in the file; None means that of the parameters.

        Raises:
            ValueError: layers are in FP8; the command `convert` writes such a checkpoint.
        """
        if fp8 := {part: found for part, found in self.weight_formats.items() if is_fp8(found)}:
            raise ValueError(
                f"save_pretrained: the target's {' and '.join(fp8)} are in FP8, which this does not write; "
                "`convert` writes FP8 from the official files"
            )
        wanted = self.dtype if dtype is None else _dtype(dtype, self.config, self.device)
        save_checkpoint(Path(folder), self.config.raw, self.state_dict(), self.vlm_files, wanted)

    def save_config(self, folder: Path, format_: TargetFormat) -> None:
        """Write config.json of this checkpoint with some parts in FP8, and the Qwen3-VL files where local.

        Args:
            folder: holds the weights.
            format_: the parts that are in FP8 there.
        """
        fp8 = {name for part in format_.fp8 for name in linears(self, part)}
        plain = (name for name, module in self.named_modules() if isinstance(module, nn.Linear))
        quantised = {QUANTIZATION: fp8_config(name for name in plain if name not in fp8)}
        save_config(folder, dict(self.config.raw) | quantised, self.vlm_files)

    def _fill_buffers(self, device: torch.device, *, rounded: bool) -> None:
        """Compute what the file may not hold; the file's tensors, where present, go over it."""
        fill_rotary_buffers(self.vlm, device)
        for module in self.modules():
            if isinstance(module, (FourierFeatures, ActionSpace)):
                module.reset(device, rounded=rounded)

    @property
    def weight_formats(self) -> dict[str, str]:
        """What products of `text`, `expert` and `vision` are in: a dtype or FP8 (`quantised.describe`)."""
        return describe(self)

    @property
    def n_waypoints(self) -> int:
        """N, the way-points of a trajectory."""
        return self.config.action_space.n_waypoints

    def prompt(
        self,
        window: Window,
        *,
        camera_text: bool | None = None,
        route: str | None = None,
        question: str | None = None,
    ) -> Prompt:
        """Turn a window into a prompt.

        Its tensors are on the CPU. On a GPU with Triton frames are resized there, equal to the bit to the
        CPU: pixel_values lie on the target's device, in its dtype. The window's frames have been read when
        this returns; in pinned memory (`target.images.FrameStaging`) they need no copy on the host.

        Args:
            window: frames and ego history.
            camera_text: whether 1.5's camera names and frame numbers are written; None means in 1.5 only.
            route: 1.5's navigation text.
            question: 1.5's question, which is then answered instead of driving.

        Raises:
            ValueError: the window does not fit the checkpoint, or R1 was asked for what only 1.5 knows.
        """
        return build_prompt(
            window,
            self.config,
            self.tokenizer,
            self.special,
            self.patch_shape,
            camera_text=camera_text,
            route=route,
            question=question,
            patches_of=self._patches_of(),
        )

    def _patches_of(self) -> PatchesOf:
        """From frames to patches: on the target's device where the kernels run, else on the CPU."""
        device, kept = self.device, self._device_patches
        if kept is not None and (kept.device, kept.dtype) == (device, self.dtype):
            return kept
        reason = why_plain_images(device)
        if reason is None:
            self._device_patches = DevicePatches(device, self.dtype)
            return self._device_patches
        if device.type == "cuda":
            warnings.warn(f"frames are resized on the CPU, which is slower: {reason}", stacklevel=3)
        return plain_patches

    def _fused(self, prompt: Prompt) -> Tensor:
        """The prompt's ids with the history over its placeholders, where they still hold some."""
        if not bool((prompt.input_ids == self.special.traj_history).any()):
            return prompt.input_ids
        if len(prompt.ego_history_xyz) == 0:
            raise ValueError(
                "inputs: the ids hold <|traj_history|> placeholders; give ego_history_xyz and ego_history_rot"
            )
        history = encode_history(
            prompt.ego_history_xyz, prompt.ego_history_rot, self.config.history_tokenizer
        )
        ids = history + self.config.history_token_start_idx
        return fuse_history(prompt.input_ids, ids, self.special.traj_history)

    # Actions.

    def velocity(
        self, x: Tensor, t: Tensor, prefix: ActionPrefix, after_layer: AfterLayer | None = None
    ) -> Tensor:
        """The expert's velocity field; differentiable (specification 8.2).

        Args:
            x: float32 [S, N, 2], the noisy normalised actions.
            t: float32 [S], the time in 0 ... 1.
            prefix: the target's cache.
            after_layer: called with each expert layer's output.

        Returns:
            float32 [S, N, 2].
        """
        attend, rotary = prefix.attend(x.shape[-2]), self._waypoint_rotary(prefix, x.shape[-2])
        return self._velocity(x, t, rotary, attend, after_layer)

    def _waypoint_rotary(self, prefix: ActionPrefix, waypoints: int) -> tuple[Tensor, Tensor]:
        positions = prefix.positions.unsqueeze(-1) + torch.arange(waypoints, device=prefix.positions.device)
        return self.rotary(positions.expand(3, -1, -1))

    def _velocity(
        self,
        x: Tensor,
        t: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend,
        after_layer: AfterLayer | None = None,
    ) -> Tensor:
        embedded = self.action_in_proj(x, t)
        hidden = run_layers(self.expert.layers, embedded, rotary, attend, after_layer)
        velocity: Tensor = self.action_out_proj(self.expert.norm(hidden))
        return velocity.float()

    @torch.no_grad()
    def denoise(
        self,
        noise: Tensor,
        prefix: ActionPrefix,
        *,
        num_steps: int | None = None,
        observe: DenoiseObserver | None = None,
    ) -> Tensor:
        """Integrate the velocity field by Euler steps from noise to actions (specification 8.3).

        Args:
            noise: float32 [S, N, 2], standard normal.
            prefix: the target's cache.
            num_steps: Euler steps; None means the checkpoint's.
            observe: called at every step, before it.

        Returns:
            The normalised actions, float32 [S, N, 2].
        """
        grid = time_grid(self.config.num_inference_steps if num_steps is None else num_steps).to(noise.device)
        x, waypoints = noise.float(), noise.shape[-2]
        # On a GPU a prompt's keys for each sample are gigabytes: not held twice.
        attend = prefix.attend(waypoints, again=noise.device.type == "cpu")
        rotary = self._waypoint_rotary(prefix, waypoints)
        for step in range(len(grid) - 1):
            velocity = self._velocity(x, grid[step].expand(len(x)), rotary, attend)
            if observe is not None:
                observe(step, grid[step], x, velocity)
            x = x + (grid[step + 1] - grid[step]) * velocity
        return x

    def trajectory(
        self, action: Tensor, ego_history_xyz: Tensor, ego_history_rot: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Integrate normalised actions to trajectories (specification 8.4).

        Args:
            action: [S, N, 2].
            ego_history_xyz: [M, 3] metres, oldest first.
            ego_history_rot: [M, 3, 3].

        Returns:
            xyz float32 [S, N, 3] metres and rot float32 [S, N, 3, 3], in the frame of t0.
        """
        action = action.float()
        history_xyz, history_rot = ego_history_xyz.to(action), ego_history_rot.to(action)
        with torch.autocast(action.device.type, enabled=False):
            return self.action_space.to_trajectory(action, history_xyz, history_rot)


def open_target(
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype | str | None = None,
    local_files_only: bool = False,
    format_: TargetFormat = AS_STORED,
) -> tuple[Alpamayo, Fingerprint]:
    """Load a target to be run, not trained; returns it and its identity.

    Args:
        name: as of `Alpamayo.from_pretrained`, like all others.
        device: of the weights.
        dtype: of the parameters.
        local_files_only: never touch the network.
        format_: of each part's weights.

    Raises:
        ValueError: the checkpoint is missing or broken; the message names what.
    """
    folder = checkpoint_folder(name, local_files_only=local_files_only)
    target = Alpamayo.from_pretrained(
        folder,
        dtype=dtype,
        device=device,
        local_files_only=local_files_only,
        weights=format_.text,
        expert_weights=format_.expert,
        vision_weights=format_.vision,
    )
    return target.requires_grad_(False), target_identity(folder, target.vlm_files, format_)


def time_grid(steps: int) -> Tensor:
    """Times of the Euler loop, float32 [steps + 1], from 0 to 1.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"num_steps is {steps}; it must be at least 1")
    return torch.linspace(0, 1, steps + 1, dtype=torch.float32, device="cpu")


def _dtype(dtype: torch.dtype | str | None, config: AlpamayoConfig, device: torch.device) -> torch.dtype:
    if dtype is None:
        dtype = "float32" if device.type == "cpu" else config.dtype
    if isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ValueError(f"dtype is {dtype!r}; known are {', '.join(known)}")
    return known[dtype]
