"""Writes golden sets of other shapes, in the layout of the recorded ones (shared/golden/README.md).

What a set records comes from programs other than the package: vision, text, positions and greedy ids from
transformers' Qwen3-VL (eager attention, float32), all else from plain formulas of the specification
(shared/spec/alpamayo.md), many of them loops in float64. Nothing of `alpamayo_dflash` is imported here.

Shapes: P prompt tokens, G generated, L layers, N way-points, M history points, V vocabulary, S Euler steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    DynamicCache,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tests.helpers.transformers_versions import forward_inputs, rope_index

Json = dict[str, Any]
Weights = dict[str, Tensor]

# The margin between the best and the second logit that the fitted head keeps on every recorded path.
LEAST_MARGIN = 2.0
QWEN_NAMES = (
    "<|vision_pad|>",
    "<|endoftext|>",
    "<|image_pad|>",
    "<|im_start|>",
    "<|vision_end|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|video_pad|>",
)
SPECIAL_NAMES = [
    "prompt_start",
    "prompt_end",
    "image_start",
    "image_pre_tkn",
    "image_end",
    "traj_history_start",
    "traj_history_pre_tkn",
    "traj_history_end",
    "cot_start",
    "cot_end",
    "meta_action_start",
    "meta_action_end",
    "traj_future_start",
    "traj_future_pre_tkn",
    "traj_future_end",
    "traj_history",
    "traj_future",
    "image_pad",
    "vectorized_wm",
    "vectorized_wm_start",
    "vectorized_wm_end",
    "vectorized_wm_pre_tkn",
    "route_start",
    "route_pad",
    "route_end",
    "question_start",
    "question_end",
    "answer_start",
    "answer_end",
]
PADDING_NAMES = [
    "image_pre_tkn",
    "traj_history_pre_tkn",
    "meta_action_start",
    "meta_action_end",
    "traj_future_pre_tkn",
    "vectorized_wm",
    "vectorized_wm_start",
    "vectorized_wm_end",
    "vectorized_wm_pre_tkn",
]
CAMERA_NAMES = (
    "Front left camera",
    "Front camera",
    "Front right camera",
    "Rear left camera",
    "Rear camera",
    "Rear right camera",
    "Front telephoto camera",
)
SPACE: Json = {
    "accel_mean": 0.05,
    "accel_std": 0.7,
    "curvature_mean": 0.001,
    "curvature_std": 0.03,
    "accel_bounds": [-2.0, 2.0],
    "curvature_bounds": [-0.1, 0.1],
    "theta_lambda": 2e-6,
    "theta_ridge": 1e-8,
    "v_lambda": 3e-6,
    "v_ridge": 2e-4,
    "a_lambda": 2e-4,
    "a_ridge": 3e-4,
    "kappa_lambda": 1e-4,
    "kappa_ridge": 2e-4,
}


@dataclass(frozen=True)
class CaseShape:
    """One case: what the cameras see, and what the model is made to write.

    Attributes:
        name: of its files.
        cameras: dataset indices, ascending.
        frames: a camera.
        size: height and width of a frame, pixels.
        text: the Chain-of-Causation.
        ends: whether the text ends in its marks; if not, the limit of new tokens cuts it.
        route: 1.5's navigation text.
    """

    name: str
    cameras: tuple[int, ...]
    frames: int
    size: tuple[int, int]
    text: str
    ends: bool = True
    route: str | None = None


@dataclass(frozen=True)
class SetShape:
    """The sizes of a set; they are named as in the configuration files."""

    name: str
    version: str
    cases: tuple[CaseShape, ...]
    min_pixels: int
    max_pixels: int
    history_points: int
    history_tokenizer: Json
    future_tokenizer: Json
    traj_vocab_size: int
    n_waypoints: int
    dt: float
    steps: int
    text: Json
    vision: Json
    expert: Json
    projection: Json
    seed: int = 0


SET_B = SetShape(
    name="r1_b",
    version="r1",
    cases=(
        CaseShape("case0", (0, 1, 6), 2, (30, 44), "Stop for the red light."),
        CaseShape("case1", (1,), 3, (16, 24), "Keep the lane and slow", ends=False),
    ),
    min_pixels=256,
    max_pixels=1024,
    history_points=11,
    history_tokenizer={
        "num_bins": 23,
        "ego_xyz_min": [-3.0, -2.0, -1.0],
        "ego_xyz_max": [5.0, 2.0, 1.0],
    },
    future_tokenizer={"num_bins": 9, "dims_min": [-4.0, -5.0], "dims_max": [6.0, 5.0]},
    traj_vocab_size=35,
    n_waypoints=13,
    dt=0.2,
    steps=4,
    text={
        "hidden_size": 56,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_theta": 1e5,
        "mrope_section": [2, 3, 3],
    },
    vision={
        "depth": 4,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 40,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [1, 3],
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    expert={"hidden_size": 40, "intermediate_size": 52, "num_attention_heads": 2, "head_dim": 16},
    projection={"hidden_size": 28, "max_freq": 50.0, "num_enc_layers": 3, "num_fourier_feats": 12},
)
SET_C = SetShape(
    name="v1_5_c",
    version="1.5",
    cases=(
        CaseShape("left", (1, 5), 1, (40, 20), "Yield to the bus.", route="Turn left in 30 m"),
        CaseShape("case7", (0, 2, 3, 4, 6), 2, (24, 24), "Nudge right."),
    ),
    min_pixels=144,
    max_pixels=500,
    history_points=6,
    history_tokenizer={"num_bins": 41, "predict_yaw": True, "ego_yaw_min": -1.0, "ego_yaw_max": 2.0},
    future_tokenizer={"num_bins": 15},
    traj_vocab_size=61,
    n_waypoints=8,
    dt=0.1,
    steps=7,
    text={
        "hidden_size": 60,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 12,
        "rope_theta": 2e4,
        "mrope_section": [2, 2, 2],
    },
    vision={
        "depth": 2,
        "hidden_size": 24,
        "num_heads": 3,
        "intermediate_size": 36,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0],
        "patch_size": 4,
        "spatial_merge_size": 3,
        "temporal_patch_size": 3,
    },
    expert={"hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 3, "head_dim": 12},
    projection={"hidden_size": 20, "max_freq": 20.0, "num_enc_layers": 1, "num_fourier_feats": 8},
    seed=1,
)


@dataclass
class Parts:
    """A set that is being written: its shape, where it goes, and the models it is recorded from."""

    shape: SetShape
    folder: Path
    tokenizer: Tokenizer
    base_length: int
    config: Json
    vlm: Any
    rest: Weights = field(default_factory=dict)

    def token(self, name: str) -> int:
        index = self.tokenizer.token_to_id(f"<|{name}|>")
        if index is None:
            raise ValueError(f"the tokenizer has no <|{name}|>")
        return index

    @property
    def trajectory_ids(self) -> list[int]:
        return list(range(self.base_length, self.base_length + self.shape.traj_vocab_size))

    @property
    def history_start(self) -> int:
        return self.base_length + int(self.shape.future_tokenizer["num_bins"])


def write_set(root: Path, shape: SetShape) -> Path:
    """Write one set into root/name and return that folder."""
    torch.manual_seed(shape.seed)
    folder = root / shape.name
    for name in ("checkpoint", "vlm", "cases", "units"):
        (folder / name).mkdir(parents=True)
    base = base_tokenizer([case.text for case in shape.cases])
    base.save(str(folder / "vlm" / "tokenizer.json"))
    length = base.get_vocab_size()
    vlm_config = qwen_config(shape, base)
    write_json(folder / "vlm" / "config.json", vlm_config)
    write_json(folder / "vlm" / "preprocessor_config.json", preprocessor_config(shape))
    tokenizer = extend(base, shape)
    config = alpamayo_config(shape, tokenizer, length)
    write_json(folder / "checkpoint" / "config.json", config)
    parts = Parts(shape, folder, tokenizer, length, config, random_vlm(vlm_config, config["vocab_size"]))
    parts.rest = expert_weights(shape) | projection_weights(shape)
    prepared = [prepare(parts, case) for case in shape.cases]
    fit_head(parts, prepared)
    write_checkpoint(parts)
    write_tokens(parts)
    for index, case in enumerate(prepared):
        write_case(parts, case)
        if index == 0:
            write_samples(parts, case)
    write_units(parts)
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def save(path: Path, tensors: Weights) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


# Tokens and configurations (specification 1 and 2).


def base_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A byte-level tokenizer which knows a few pieces of the texts; its own order of specials."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in QWEN_NAMES])
    return tokenizer


def extend(base: Tokenizer, shape: SetShape) -> Tokenizer:
    tokenizer = Tokenizer.from_str(base.to_str())
    tokenizer.add_tokens([f"<i{index}>" for index in range(shape.traj_vocab_size)])
    names = SPECIAL_NAMES
    if shape.version == "1.5":
        names = [f"_padding_{PADDING_NAMES.index(n)}" if n in PADDING_NAMES else n for n in names]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False) for name in names])
    return tokenizer


def qwen_config(shape: SetShape, base: Tokenizer) -> Json:
    text = {key: value for key, value in shape.text.items() if key != "mrope_section"}
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": shape.text["mrope_section"]}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": base.token_to_id("<|image_pad|>"),
        "video_token_id": base.token_to_id("<|video_pad|>"),
        "vision_start_token_id": base.token_to_id("<|vision_start|>"),
        "vision_end_token_id": base.token_to_id("<|vision_end|>"),
        "tie_word_embeddings": False,
        "text_config": text
        | {
            "model_type": "qwen3_vl_text",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_scaling": rope,
            "attention_bias": False,
            "vocab_size": base.get_vocab_size() + 5,
            "bos_token_id": base.token_to_id("<|endoftext|>"),
            "eos_token_id": base.token_to_id("<|im_end|>"),
        },
        "vision_config": shape.vision
        | {
            "model_type": "qwen3_vl",
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "out_hidden_size": shape.text["hidden_size"],
        },
    }


def preprocessor_config(shape: SetShape) -> Json:
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "patch_size": shape.vision["patch_size"],
        "merge_size": shape.vision["spatial_merge_size"],
        "temporal_patch_size": shape.vision["temporal_patch_size"],
    }


def alpamayo_config(shape: SetShape, tokenizer: Tokenizer, base_length: int) -> Json:
    r1 = shape.version == "r1"
    package, model = ("alpamayo_r1", "AlpamayoR1") if r1 else ("alpamayo1_5", "Alpamayo1_5")
    space = SPACE | {"dt": shape.dt, "n_waypoints": shape.n_waypoints}
    space["_target_"] = f"{package}.action_space.UnicycleAccelCurvatureActionSpace"
    roles = ("history", "future", "history_start", "future_start", "history_end", "future_end")
    return {
        "model_type": package,
        "architectures": [model],
        "dtype": "float32",
        "model_dtype": "float32",
        "vlm_name_or_path": "../vlm",
        "vlm_backend": "qwenvl3",
        "add_special_tokens": True,
        "traj_vocab_size": shape.traj_vocab_size,
        "traj_token_start_idx": base_length,
        "vocab_size": base_length + shape.traj_vocab_size + 28,
        "traj_token_ids": {role: tokenizer.token_to_id(f"<|traj_{role}|>") for role in roles},
        "tokens_per_history_traj": shape.history_points * values_per_point(shape.history_tokenizer),
        "tokens_per_future_traj": 2 * shape.n_waypoints,
        "min_pixels": shape.min_pixels,
        "max_pixels": shape.max_pixels,
        "expert_non_causal_attention": True,
        "expert_cfg": shape.expert | {"dtype": "float32"},
        "action_in_proj_cfg": shape.projection
        | {"_target_": f"{package}.models.action_in_proj.PerWaypointActionInProjV2"},
        "action_out_proj_cfg": {"_target_": "torch.nn.Linear"},
        "diffusion_cfg": {
            "_target_": f"{package}.diffusion.flow_matching.FlowMatching",
            "int_method": "euler",
            "num_inference_steps": shape.steps,
            "x_dims": "???",
        },
        "action_space_cfg": space,
        "hist_traj_tokenizer_cfg": shape.history_tokenizer
        | {"_target_": f"{package}.models.delta_tokenizer.DeltaTrajectoryTokenizer"},
        "traj_tokenizer_cfg": shape.future_tokenizer
        | {
            "_target_": f"{package}.action_space.discrete_action_space.DiscreteTrajectoryTokenizer",
            "_recursive_": False,
            "action_space_cfg": space,
        },
    }


# Weights.


def random_vlm(vlm_config: Json, vocab_size: int) -> Any:
    """transformers' Qwen3-VL with weights that let every part of the input count."""
    raw = vlm_config | {"text_config": vlm_config["text_config"] | {"vocab_size": vocab_size}}
    config = Qwen3VLConfig.from_dict(json.loads(json.dumps(raw)))
    config._attn_implementation = "eager"
    vlm = Qwen3VLForConditionalGeneration(config).float().eval()
    for name, parameter in vlm.named_parameters():
        parameter.data = random_weight(name, parameter.shape)
    return vlm


def random_weight(name: str, shape: Sequence[int]) -> Tensor:
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * torch.randn(*shape)
    if len(shape) == 1:
        return 0.1 * torch.randn(*shape)
    if "embed" in name and "proj" not in name:
        return torch.randn(*shape)
    return torch.randn(*shape) / math.sqrt(math.prod(shape[1:]))


def expert_weights(shape: SetShape) -> Weights:
    width, inner, dim = (shape.expert[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
    queries, keys = shape.expert["num_attention_heads"] * dim, shape.text["num_key_value_heads"] * dim
    shapes = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "self_attn.q_norm": (dim,),
        "self_attn.k_norm": (dim,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    weights = {
        f"expert.layers.{layer}.{name}.weight": random_weight(f"{name}.weight", size)
        for layer in range(shape.text["num_hidden_layers"])
        for name, size in shapes.items()
    }
    out = {"action_out_proj.weight": (2, width), "action_out_proj.bias": (2,), "expert.norm.weight": (width,)}
    return weights | {name: random_weight(name, size) for name, size in out.items()}


def projection_weights(shape: SetShape) -> Weights:
    """The input projection and, in R1, the stored buffers.

    The weights on action features fall with their frequency: undamped, the Euler loop is chaotic.
    """
    inner, width = shape.projection["hidden_size"], shape.expert["hidden_size"]
    features, layers = shape.projection["num_fourier_feats"], shape.projection["num_enc_layers"]
    freqs = frequencies(shape)
    damping = torch.cat([*[0.3 / freqs] * 4, *[torch.ones_like(freqs)] * 2]).float()
    weights = {"encoder.trunk.0.weight": random_weight("", (inner, 3 * features)) * damping}
    weights["encoder.trunk.0.bias"] = random_weight("", (inner,))
    for layer in range(1, layers + 1):
        last = layer == layers
        weights[f"encoder.trunk.{3 * layer - 1}.weight"] = random_weight("norm.weight", (inner,))
        weights[f"encoder.trunk.{3 * layer}.weight"] = random_weight("", (width if last else inner, inner))
        weights[f"encoder.trunk.{3 * layer}.bias"] = random_weight("", (width if last else inner,))
    weights |= {f"norm.{name}": random_weight(f"norm.{name}", (width,)) for name in ("weight", "bias")}
    weights = {f"action_in_proj.{name}": tensor for name, tensor in weights.items()}
    if shape.version == "r1":
        for name in ("sinus.0", "sinus.1", "timestep_fourier_encoder"):
            weights[f"action_in_proj.{name}.freqs"] = freqs[None].clone()
        for name in ("accel_mean", "accel_std", "curvature_mean", "curvature_std"):
            weights[f"action_space.{name}"] = torch.tensor(SPACE[name], dtype=torch.float32)
    return weights


def frequencies(shape: SetShape) -> Tensor:
    count = shape.projection["num_fourier_feats"] // 2
    return torch.logspace(0, math.log10(shape.projection["max_freq"]), count)


def fit_head(parts: Parts, prepared: Sequence[Prepared]) -> None:
    """Solve for the head: at each place of the texts the wanted token wins by far.

    In every third place a trajectory token has a greater logit still, so that forgetting its mask shows.
    """
    states, rows = [], []
    vocab = parts.config["vocab_size"]
    for case in prepared:
        whole = text_pass(parts, case, torch.cat((case.input_ids, torch.tensor(case.wanted))))
        states.append(whole.final[len(case.input_ids) - 1 : -1])
        for place, token in enumerate(case.wanted):
            row = torch.randn(vocab)
            row[token] = 9.0
            if place % 3 == 0:
                row[parts.trajectory_ids[place % len(parts.trajectory_ids)]] = 12.0
            rows.append(row)
    states_GC, rows_GV = torch.cat(states).double(), torch.stack(rows).double()
    if len(states_GC) > states_GC.shape[1]:
        raise ValueError(
            f"{len(states_GC)} tokens cannot be fitted by {states_GC.shape[1]} states; cut a text"
        )
    parts.vlm.lm_head.weight.data = (torch.linalg.pinv(states_GC) @ rows_GV).T.float().contiguous()


def write_checkpoint(parts: Parts) -> None:
    tensors = {f"vlm.{name}": tensor for name, tensor in parts.vlm.state_dict().items()} | parts.rest
    save(parts.folder / "checkpoint" / "model.safetensors", tensors)
    described = {name: [list(tensor.shape), "float32"] for name, tensor in tensors.items()}
    write_json(parts.folder / "state_dict.json", described)


def write_tokens(parts: Parts) -> None:
    tokenizer, base = parts.tokenizer, parts.base_length
    names = (token.content[2:-2] for token in tokenizer.get_added_tokens_decoder().values() if token.special)
    probes = ("Stop for 2 cyclists", "<|cot_start|>Yield<|cot_end|>", "<i0><i7>", "naïve 你好 – 12.5 m/s\n\n")
    write_json(
        parts.folder / "tokens.json",
        {
            "base_len": base,
            "vocab_size": parts.config["vocab_size"],
            "traj_token_start_idx": base,
            "hist_token_start_idx": parts.history_start,
            "future_token_start_idx": base,
            "traj_token_ids": parts.config["traj_token_ids"],
            "special_token_ids": {name: parts.token(name) for name in names},
            "qwen_special": {name: tokenizer.token_to_id(name) for name in QWEN_NAMES},
            "pad_token_id": parts.token("endoftext"),
            "eos_token_id": parts.token("im_end"),
            "probes": {text: tokenizer.encode(text, add_special_tokens=False).ids for text in probes},
        },
    )


# Prompts (specification 3 to 5).


@dataclass(frozen=True)
class Prepared:
    """A case's inputs and the ids that the head is fitted to."""

    case: CaseShape
    frames: np.ndarray
    history: tuple[Tensor, Tensor]
    text: str
    pixel_u8: Tensor
    pixel_values: Tensor
    grid: Tensor
    unfused: Tensor
    input_ids: Tensor
    wanted: list[int]


def prepare(parts: Parts, case: CaseShape) -> Prepared:
    shape = parts.shape
    count = len(case.cameras) * case.frames
    height, width = case.size
    rough = torch.rand(count, 3, 3, 4) * 255
    frames = functional.interpolate(rough, size=case.size, mode="bilinear")
    frames = (frames + 40 * torch.randn(count, 3, height, width)).clamp(0, 255).to(torch.uint8)
    pixel_u8, grid = cut(frames, shape)
    repeated = pixel_u8.float().sub(127.5).div(127.5)[:, :, None]
    pixel_values = repeated.expand(-1, -1, shape.vision["temporal_patch_size"], -1, -1).flatten(1)
    xyz, rot = (part[0] for part in moving_paths(1, shape.history_points, shape.dt, past=True))
    text = prompt_text(shape, case)
    per_image = int(grid[0].prod()) // shape.vision["spatial_merge_size"] ** 2
    repeated_text = text.replace("<|image_pad|>", "<|image_pad|>" * per_image)
    unfused = torch.tensor(parts.tokenizer.encode(repeated_text, add_special_tokens=False).ids)
    fused = unfused.clone()
    bins = delta_bins(xyz[None], rot[None], shape.history_tokenizer)[0]
    fused[unfused == parts.token("traj_history")] = bins + parts.history_start
    wanted = parts.tokenizer.encode(case.text).ids
    if case.ends:
        wanted += [parts.token(name) for name in ("cot_end", "traj_future_start", "traj_future_end")]
    stacked = frames.permute(0, 2, 3, 1).reshape(-1, width, 3).numpy()
    return Prepared(case, stacked, (xyz, rot), text, pixel_u8, pixel_values, grid, unfused, fused, wanted)


def prompt_text(shape: SetShape, case: CaseShape) -> str:
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    images = ""
    for camera in case.cameras:
        if shape.version == "1.5":
            images += f"{CAMERA_NAMES[camera]}: "
        for frame in range(case.frames):
            images += (f"frame {frame} " if shape.version == "1.5" else "") + image
    history = "<|traj_history|>" * (shape.history_points * values_per_point(shape.history_tokenizer))
    route = f"<|route_start|>{case.route}<|route_end|>" if case.route else ""
    return (
        "<|im_start|>system\nYou are a driving assistant that generates safe and accurate actions."
        f"<|im_end|>\n<|im_start|>user\n{images}<|traj_history_start|>{history}<|traj_history_end|>{route}"
        "output the chain-of-thought reasoning of the driving process, then output the future trajectory."
        "<|im_end|>\n<|im_start|>assistant\n<|cot_start|>"
    )


def resized(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    sides = [height, width]
    out = [round(side / factor) * factor for side in sides]
    area = height * width
    if math.prod(out) > most:
        return tuple(max(factor, math.floor(s / math.sqrt(area / most) / factor) * factor) for s in sides)  # type: ignore[return-value]
    if math.prod(out) < least:
        return tuple(math.ceil(s * math.sqrt(least / area) / factor) * factor for s in sides)  # type: ignore[return-value]
    return out[0], out[1]


def cut(frames: Tensor, shape: SetShape) -> tuple[Tensor, Tensor]:
    """Patches uint8 [patches, 3, patch, patch] of frames uint8 [n, 3, h, w], one by one, and the grid."""
    patch, merge = shape.vision["patch_size"], shape.vision["spatial_merge_size"]
    height, width = resized(
        frames.shape[2], frames.shape[3], patch * merge, shape.min_pixels, shape.max_pixels
    )
    small = functional.interpolate(
        frames, size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    rows, columns = height // patch, width // patch
    pieces = [
        image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        for image in small
        for block_row in range(0, rows, merge)
        for block_column in range(0, columns, merge)
        for row in range(block_row, block_row + merge)
        for column in range(block_column, block_column + merge)
    ]
    return torch.stack(pieces), torch.tensor([[1, rows, columns]] * len(frames))


def values_per_point(config: Json) -> int:
    return 4 if config.get("predict_yaw") else 3


def history_limits(config: Json) -> tuple[np.ndarray, np.ndarray]:
    low = [*config.get("ego_xyz_min", (-4, -4, -10)), config.get("ego_yaw_min", -math.pi)]
    high = [*config.get("ego_xyz_max", (4, 4, 10)), config.get("ego_yaw_max", math.pi)]
    count = values_per_point(config)
    return np.array(low[:count], np.float32), np.array(high[:count], np.float32)


def delta_bins(xyz: Tensor, rot: Tensor, config: Json) -> Tensor:
    """Bins, int64 [B, M * values], of poses [B, M, ...] (specification 4.1)."""
    values = xyz.numpy().astype(np.float32)
    if config.get("predict_yaw"):
        yaw = torch.atan2(rot[..., 0, 1], rot[..., 0, 0]).numpy()
        values = np.concatenate((values, yaw[..., None]), -1)
    deltas = np.diff(values, axis=1, prepend=np.zeros_like(values[:, :1]))
    if config.get("predict_yaw"):
        deltas[..., 3] = np.arctan2(np.sin(deltas[..., 3]), np.cos(deltas[..., 3]))
    low, high = history_limits(config)
    top = config.get("num_bins", 1000) - 1
    bins = np.rint((deltas - low) / (high - low) * np.float32(top)).clip(0, top)
    return torch.from_numpy(bins.astype(np.int64)).flatten(1)


def delta_values(bins: Tensor, config: Json) -> tuple[Tensor, Tensor]:
    """Poses of bins: xyz [B, M, 3] and yaw [B, M] (with yaw off by cubic fits over ten points)."""
    low, high = history_limits(config)
    steps = bins.reshape(len(bins), -1, values_per_point(config)).numpy().astype(np.float64)
    poses = np.cumsum(steps / (config.get("num_bins", 1000) - 1) * (high - low) + low, axis=1)
    yaw = poses[..., 3] if config.get("predict_yaw") else np.stack([fitted_yaw(path) for path in poses])
    return torch.from_numpy(poses[..., :3]).float(), torch.from_numpy(yaw).float()


def fitted_yaw(path: np.ndarray) -> np.ndarray:
    out = []
    for index in range(len(path)):
        start = min(max(index - 5, 0), len(path) - 10)
        window = np.arange(start, start + 10)
        slopes = [
            np.polyval(np.polyder(np.polyfit(window - start, path[window, axis], 3)), index - start)
            for axis in (0, 1)
        ]
        out.append(math.atan2(slopes[1], slopes[0]))
    return np.array(out)


def moving_paths(count: int, points: int, dt: float, *, past: bool) -> tuple[Tensor, Tensor]:
    """Curved drives: xyz [B, points, 3] and rotations, in the frame of the last (past) or zeroth point."""
    speed = 3 + 5 * torch.rand(count, 1, dtype=torch.float64)
    curvature = 0.04 * torch.randn(count, 1, dtype=torch.float64)
    offset = 1 - points if past else 1
    time = (torch.arange(points) + offset).double() * dt
    acceleration = 0.8 * torch.randn(count, 1, dtype=torch.float64)
    length = speed * time + acceleration * time**2 / 2
    yaw = curvature * length
    xyz = torch.stack((yaw.sin() / curvature, (1 - yaw.cos()) / curvature, 0.02 * time.expand_as(yaw)), -1)
    return xyz.float(), turned(yaw)


def turned(yaw: Tensor) -> Tensor:
    """Rotations about z, float32 [..., 3, 3]."""
    cos, sin, zero = yaw.cos(), yaw.sin(), torch.zeros_like(yaw)
    rows = (cos, -sin, zero, sin, cos, zero, zero, zero, zero + 1)
    return torch.stack(rows, -1).reshape(*yaw.shape, 3, 3).float()


# What transformers says of the vision tower and the text model.


@dataclass(frozen=True)
class TextPass:
    """A whole pass: inputs of each layer and of the final norm, its output, logits, and the cache."""

    hidden: Tensor
    final: Tensor
    logits: Tensor
    embeds: Tensor
    deepstack: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    positions: Tensor
    delta: Tensor


@torch.no_grad()
def text_pass(parts: Parts, case: Prepared, ids: Tensor) -> TextPass:
    model = parts.vlm.model
    inputs = model_inputs(parts, case, ids)
    states: list[Tensor] = []
    image: dict[int, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, named: states.append((args[0] if args else named["hidden_states"])[0]),
            with_kwargs=True,
        )
        for module in (*model.language_model.layers, model.language_model.norm)
    ]
    mergers = (model.visual.merger, *model.visual.deepstack_merger_list)
    for index, module in enumerate(mergers):
        hooks.append(
            module.register_forward_hook(lambda _, args, out, index=index: image.__setitem__(index, out))
        )
    finals: list[Tensor] = []
    hooks.append(model.language_model.norm.register_forward_hook(lambda _, args, out: finals.append(out[0])))
    cache: Any = DynamicCache()
    positions, delta = rope_index(model, inputs)
    out = parts.vlm(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    layers = len(model.language_model.layers)
    return TextPass(
        hidden=torch.stack(states),
        final=finals[0],
        logits=out.logits[0],
        embeds=image[0],
        deepstack=torch.stack([image[index] for index in range(1, len(mergers))]),
        keys=[cache.layers[layer].keys[0] for layer in range(layers)],
        values=[cache.layers[layer].values[0] for layer in range(layers)],
        positions=positions,
        delta=delta,
    )


def model_inputs(parts: Parts, case: Prepared, ids: Tensor) -> dict[str, Tensor]:
    inputs = {
        "input_ids": ids[None],
        "attention_mask": torch.ones_like(ids)[None],
        "pixel_values": case.pixel_values,
        "image_grid_thw": case.grid,
        "mm_token_type_ids": (ids == parts.token("image_pad"))[None].int(),
    }
    return forward_inputs(parts.vlm, inputs)


class OneTokenLater(StoppingCriteria):  # type: ignore[misc]
    """Stops when the end mark is in the text and one more token has been computed (specification 7)."""

    def __init__(self, mark: int) -> None:
        self.mark = mark

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids[:, :-1] == self.mark).any(1)


def greedy(parts: Parts, case: Prepared, limit: int) -> Tensor:
    ids = parts.vlm.generate(
        **model_inputs(parts, case, case.input_ids),
        do_sample=False,
        max_new_tokens=limit,
        suppress_tokens=parts.trajectory_ids,
        eos_token_id=parts.token("im_end"),
        pad_token_id=parts.token("endoftext"),
        stopping_criteria=StoppingCriteriaList([OneTokenLater(parts.token("traj_future_start"))]),
    )
    generated: Tensor = ids[0, len(case.input_ids) :]
    return generated


# The expert and flow matching (specification 8), written out.


@dataclass(frozen=True)
class Prefix:
    """What one sample's way-points see: keys and values [K, T, D] a layer, and the first position."""

    keys: list[Tensor]
    values: list[Tensor]
    visible: int
    position: int


def prefix_of(parts: Parts, done: TextPass, sequence: Tensor, delta: int) -> Prefix:
    kept = len(sequence) - 1
    ends = (sequence == parts.token("traj_future_start")).nonzero().flatten().tolist()
    offset = ends[0] + 1 if ends else len(sequence)
    visible = min(offset, kept)
    keys = [k[:, :kept] for k in done.keys]
    return Prefix(keys, [v[:, :kept] for v in done.values], visible, offset + delta)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def fourier(shape: SetShape, s: Tensor) -> Tensor:
    # The order of these products counts: s·f goes to hundreds, and a rounding of it shows in the sine.
    angle = s[..., None] * frequencies(shape) * (2 * math.pi)
    return math.sqrt(2) * torch.cat((angle.sin(), angle.cos()), -1)


def embed_actions(parts: Parts, x: Tensor, t: Tensor) -> Tensor:
    """Embeddings [N, h] of x [N, 2] at time t []."""
    shape, w = parts.shape, parts.rest
    time = fourier(shape, t)[None].expand(len(x), -1)
    h = torch.cat((fourier(shape, x[:, 0]), fourier(shape, x[:, 1]), time), -1)
    trunk = "action_in_proj.encoder.trunk"
    h = h @ w[f"{trunk}.0.weight"].T + w[f"{trunk}.0.bias"]
    for layer in range(1, shape.projection["num_enc_layers"] + 1):
        h = rms(h * torch.sigmoid(h), w[f"{trunk}.{3 * layer - 1}.weight"], 1e-5)
        h = h @ w[f"{trunk}.{3 * layer}.weight"].T + w[f"{trunk}.{3 * layer}.bias"]
    centred = h - h.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
    return scaled * w["action_in_proj.norm.weight"] + w["action_in_proj.norm.bias"]


def turn_heads(shape: SetShape, x: Tensor, first: int) -> Tensor:
    """Rotate [N, heads, D] by positions first, first + 1, ..., equal on the three axes."""
    dim = shape.text["head_dim"]
    inverse = shape.text["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim)
    angle = ((first + torch.arange(len(x)))[:, None] * inverse)[:, None]
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x[..., : dim // 2], x[..., dim // 2 :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def expert_layer(parts: Parts, layer: int, h: Tensor, prefix: Prefix) -> Tensor:
    shape, dim = parts.shape, parts.shape.text["head_dim"]

    def weight(name: str) -> Tensor:
        return parts.rest[f"expert.layers.{layer}.{name}.weight"]

    def heads(name: str, x: Tensor) -> Tensor:
        return (x @ weight(f"self_attn.{name}_proj").T).reshape(len(x), -1, dim)

    normed = rms(h, weight("input_layernorm"), 1e-6)
    q = turn_heads(shape, rms(heads("q", normed), weight("self_attn.q_norm"), 1e-6), prefix.position)
    k = turn_heads(shape, rms(heads("k", normed), weight("self_attn.k_norm"), 1e-6), prefix.position)
    v = heads("v", normed)
    group = q.shape[1] // k.shape[1]
    outs = []
    for head in range(q.shape[1]):
        kv = head // group
        keys = torch.cat((prefix.keys[layer][kv, : prefix.visible], k[:, kv]))
        values = torch.cat((prefix.values[layer][kv, : prefix.visible], v[:, kv]))
        outs.append((q[:, head] @ keys.T / math.sqrt(dim)).softmax(-1) @ values)
    h = h + torch.cat(outs, -1) @ weight("self_attn.o_proj").T
    normed = rms(h, weight("post_attention_layernorm"), 1e-6)
    gate = normed @ weight("mlp.gate_proj").T
    return h + (gate * torch.sigmoid(gate) * (normed @ weight("mlp.up_proj").T)) @ weight("mlp.down_proj").T


def evaluate(parts: Parts, x: Tensor, t: Tensor, prefix: Prefix) -> tuple[Tensor, list[Tensor], Tensor]:
    """Velocity [N, 2], the residual stream [L + 1] of [N, h], and the normed output [N, h]."""
    stream = [embed_actions(parts, x, t)]
    for layer in range(parts.shape.text["num_hidden_layers"]):
        stream.append(expert_layer(parts, layer, stream[-1], prefix))
    out = rms(stream[-1], parts.rest["expert.norm.weight"], 1e-6)
    return project_out(parts, out), stream, out


def project_out(parts: Parts, out: Tensor) -> Tensor:
    return out @ parts.rest["action_out_proj.weight"].T + parts.rest["action_out_proj.bias"]


def record_rollout(
    parts: Parts, prefixes: Sequence[Prefix], history: tuple[Tensor, Tensor], kept: int
) -> Weights:
    """Everything behind the text, for the samples of one prompt."""
    shape = parts.shape
    waypoints, samples = shape.n_waypoints, len(prefixes)
    grid = torch.linspace(0, 1, shape.steps + 1)
    x = noise = torch.randn(samples, waypoints, 2)
    xs, velocities = [], []
    for step in range(shape.steps):
        velocity = torch.stack([evaluate(parts, x[s], grid[step], p)[0] for s, p in enumerate(prefixes)])
        xs.append(x)
        velocities.append(velocity)
        x = x + (grid[step + 1] - grid[step]) * velocity
    paths = [integrate(shape, action, *history) for action in x]
    mask = torch.zeros(samples, 1, kept + waypoints)
    for sample, prefix in enumerate(prefixes):
        mask[sample, :, prefix.visible : kept] = torch.finfo(torch.float32).min
    positions = torch.tensor([prefix.position for prefix in prefixes])[:, None] + torch.arange(waypoints)
    return {
        "expert_position_ids": positions.expand(3, -1, -1),
        "expert_attention_mask": mask,
        "noise": noise,
        "step_t": grid[:-1],
        "step_x": torch.stack(xs),
        "step_velocity": torch.stack(velocities),
        "action": x,
        "pred_xyz": torch.stack([xyz for xyz, _ in paths])[None, None],
        "pred_rot": torch.stack([rot for _, rot in paths])[None, None],
    }


def integrate(shape: SetShape, action: Tensor, xyz: Tensor, rot: Tensor) -> tuple[Tensor, Tensor]:
    """The unicycle, point by point in float64: xyz [N, 3] and rotations of actions [N, 2]."""
    dt, heading, x, y = shape.dt, 0.0, 0.0, 0.0
    speed = initial_speed(shape, xyz, rot)
    points, headings = [], []
    for first, second in action.double().tolist():
        acceleration = first * SPACE["accel_std"] + SPACE["accel_mean"]
        curvature = second * SPACE["curvature_std"] + SPACE["curvature_mean"]
        later = speed + acceleration * dt
        turned_to = heading + curvature * speed * dt + curvature * acceleration * dt**2 / 2
        x += dt / 2 * (speed * math.cos(heading) + later * math.cos(turned_to))
        y += dt / 2 * (speed * math.sin(heading) + later * math.sin(turned_to))
        speed, heading = later, turned_to
        points.append((x, y, float(xyz[-1, 2])))
        headings.append(heading)
    return torch.tensor(points, dtype=torch.float32), turned(torch.tensor(headings, dtype=torch.float64))


def headings(rot: Tensor) -> np.ndarray:
    return np.unwrap(np.arctan2(rot[:, 1, 0].double().numpy(), rot[:, 0, 0].double().numpy()))


def differences(count: int, stencil: Sequence[float]) -> np.ndarray:
    rows = np.zeros((count - len(stencil) + 1, count))
    for row in range(len(rows)):
        rows[row, row : row + len(stencil)] = stencil
    return rows.T @ rows


def speed_system(shape: SetShape, points: np.ndarray, yaw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The normal equations of 8.5 without their ridge: [n, n] and [n]."""
    count = len(points)
    rows, right = [], []
    for index in range(count - 1):
        for axis, unit in enumerate((np.cos, np.sin)):
            row = np.zeros(count)
            row[index], row[index + 1] = unit(yaw[index]), unit(yaw[index + 1])
            rows.append(row)
            right.append(2 / shape.dt * (points[index + 1, axis] - points[index, axis]))
    system = np.array(rows)
    smooth = SPACE["v_lambda"] / shape.dt**6 * differences(count, (-1, 3, -3, 1))
    return system.T @ system + smooth, system.T @ np.array(right)


def initial_speed(shape: SetShape, xyz: Tensor, rot: Tensor) -> float:
    matrix, right = speed_system(shape, xyz[:, :2].double().numpy(), headings(rot))
    return float(np.linalg.solve(matrix + SPACE["v_ridge"] * np.eye(len(right)), right)[-1])


def actions_of(shape: SetShape, history: tuple[Tensor, Tensor], future: tuple[Tensor, Tensor]) -> np.ndarray:
    """Normalised actions float64 [N, 2] of a future (specification 8.6)."""
    dt, count = shape.dt, len(future[0])
    eye = np.eye(count)
    smooth = SPACE["theta_lambda"] / dt**6 * differences(count + 1, (-1, 3, -3, 1))[1:, 1:]
    yaw = np.linalg.solve((1 + SPACE["theta_ridge"]) * eye + smooth, headings(future[1]))
    yaw = np.concatenate(([0.0], yaw))
    points = torch.cat((history[0][-1:], future[0]))[:, :2].double().numpy()
    start = initial_speed(shape, *history)
    matrix, right = speed_system(shape, points, yaw)
    inner = matrix[1:, 1:] + SPACE["v_ridge"] * eye
    speed = np.concatenate(([start], np.linalg.solve(inner, right[1:] - matrix[1:, 0] * start)))
    second = differences(count, (-1, 2, -1)) / dt**4
    weights = (1 + SPACE["a_ridge"]) * eye + SPACE["a_lambda"] * second
    acceleration = np.linalg.solve(weights, np.diff(speed) / dt)
    arc = dt * speed[:-1] + dt**2 / 2 * acceleration
    weights = np.diag(arc**2) + SPACE["kappa_lambda"] * second + SPACE["kappa_ridge"] * eye
    curvature = np.linalg.solve(weights, arc * np.diff(yaw))
    return np.stack(
        (
            (acceleration - SPACE["accel_mean"]) / SPACE["accel_std"],
            (curvature - SPACE["curvature_mean"]) / SPACE["curvature_std"],
        ),
        -1,
    )


# Files of a case.


def write_case(parts: Parts, case: Prepared) -> None:
    limit = len(case.wanted) if not case.case.ends else len(case.wanted) + 5
    generated = greedy(parts, case, limit)
    if generated.tolist() != case.wanted:
        raise ValueError(f"{case.case.name}: transformers generates {generated.tolist()}, not {case.wanted}")
    length, sequence = len(case.input_ids), torch.cat((case.input_ids, generated))
    before, done = text_pass(parts, case, case.input_ids), text_pass(parts, case, sequence)
    delta = int(before.delta)
    prefix = prefix_of(parts, done, sequence, delta)
    rollout = record_rollout(parts, [prefix], case.history, len(sequence) - 1)
    _, stream, out = evaluate(parts, rollout["noise"][0], rollout["step_t"][0], prefix)
    padded = pad_behind_end(parts, sequence[None])
    logits = done.logits[length - 1 : -1]
    tensors = {
        "ego_history_xyz": case.history[0][None, None],
        "ego_history_rot": case.history[1][None, None],
        "input_ids_unfused": case.unfused[None],
        "input_ids": case.input_ids[None],
        "attention_mask": torch.ones_like(case.input_ids)[None],
        "pixel_u8": case.pixel_u8,
        "pixel_values_image0": case.pixel_values[: int(case.grid[0].prod())],
        "image_grid_thw": case.grid,
        "position_ids": before.positions,
        "rope_deltas": before.delta.reshape(1, 1),
        "vision_embeds": before.embeds,
        "deepstack": before.deepstack,
        "prompt_hidden": before.hidden,
        "prompt_final_norm": before.final,
        "last_logits": before.logits[-1],
        "generated_ids": generated[None],
        "sequences_padded": padded,
        "gen_position_ids": done.positions[:, :, length:],
        "gen_hidden": done.hidden[:, length:],
        "gen_final_norm": done.final[length:],
        "gen_logits": logits,
        "expert_embeds_step0": stream[0][None],
        "expert_hidden_step0": torch.stack(stream),
        "expert_out_step0": out[None],
    }
    save(parts.folder / "cases" / f"{case.case.name}.safetensors", tensors | rollout)
    image = f"{case.case.name}_frames.png"
    Image.fromarray(case.frames).save(parts.folder / "cases" / image)
    facts = case_facts(parts, case, logits)
    facts |= {"frames_uint8_png": image, "max_new_tokens": limit, "rope_delta": delta}
    facts["kv_len_before_actions"] = len(sequence) - 1
    write_json(parts.folder / "cases" / f"{case.case.name}.json", facts)


def case_facts(parts: Parts, case: Prepared, logits: Tensor) -> Json:
    shape, wanted = parts.shape, case.wanted
    masked = logits.clone()
    masked[:, parts.trajectory_ids] = -torch.inf
    best = masked.topk(2).values
    margin = float((best[:, 0] - best[:, 1]).min())
    if margin < LEAST_MARGIN:
        raise ValueError(f"{case.case.name}: the least margin is {margin}; it must be {LEAST_MARGIN} or more")
    return {
        "n_frames": len(case.case.cameras) * case.case.frames,
        "frame_hw": list(case.case.size),
        "n_cameras": len(case.case.cameras),
        "frames_per_camera": case.case.frames,
        "min_pixels": shape.min_pixels,
        "max_pixels": shape.max_pixels,
        "prompt_text": case.text,
        "prompt_len": len(case.input_ids),
        "generated_len": len(wanted),
        "generated_ids": wanted,
        "generated_text": parts.tokenizer.decode(wanted, skip_special_tokens=False),
        "cot": case.case.text if case.case.ends else "",
        "meta_action": "",
        "answer": "",
        "min_top2_margin": margin,
        "steps_where_mask_changes_argmax": int((logits.argmax(-1) != masked.argmax(-1)).sum()),
        "n_euler_steps": shape.steps,
    }


def pad_behind_end(parts: Parts, sequences: Tensor) -> Tensor:
    padded = sequences.clone()
    for row in padded:
        ends = (row == parts.token("traj_future_start")).nonzero().flatten()
        if len(ends):
            row[ends[0] + 1 :] = parts.token("endoftext")
    return padded


def write_samples(parts: Parts, case: Prepared) -> None:
    """Three samples of one prompt: the greedy one, a shorter one, and one that never ends."""
    marks = [parts.token("cot_end"), parts.token("traj_future_start")]
    texts = [case.wanted, [*case.wanted[:2], *marks], case.wanted[:1]]
    width = len(case.wanted) + 3
    rows = [text + [40 + place for place in range(len(text), width)] for text in texts]
    sequences = torch.stack([torch.cat((case.input_ids, torch.tensor(row))) for row in rows])
    passes = [text_pass(parts, case, sequence) for sequence in sequences]
    delta = int(text_pass(parts, case, case.input_ids).delta)
    prefixes = [prefix_of(parts, p, s, delta) for p, s in zip(passes, sequences, strict=True)]
    kept = sequences.shape[1] - 1
    tensors = {"sequences_raw": sequences, "sequences_padded": pad_behind_end(parts, sequences)}
    name = f"{case.case.name}_multi"
    rollout = record_rollout(parts, prefixes, case.history, kept)
    save(parts.folder / "cases" / f"{name}.safetensors", tensors | rollout)
    short = parts.tokenizer.decode(case.wanted[:2]).strip()
    write_json(
        parts.folder / "cases" / f"{name}.json",
        {
            "num_traj_samples": len(rows),
            "max_new_tokens": width,
            "prompt_len": len(case.input_ids),
            "kv_len_before_actions": kept,
            "cot": [case.case.text, short, ""],
        },
    )


# Units.


def write_units(parts: Parts) -> None:
    shape, folder = parts.shape, parts.folder / "units"
    save(folder / "delta_tokenizer.safetensors", tokenizer_unit(shape))
    save(folder / "action_space.safetensors", action_space_unit(shape))
    x, t = torch.randn(3, shape.n_waypoints, 2), torch.rand(3, 1, 1)
    out = torch.stack([embed_actions(parts, x[s], t[s, 0, 0]) for s in range(3)])
    unit = {"x": x, "t": t, "out": out, "action_out": project_out(parts, out)}
    unit |= {"fourier_x0": fourier(shape, x[..., 0]), "fourier_t": fourier(shape, t[..., 0])}
    save(folder / "action_proj.safetensors", unit)
    grids = {f"grid_{steps}": torch.linspace(0, 1, steps + 1) for steps in (1, 3, shape.steps)}
    save(folder / "time_grid.safetensors", grids)
    write_json(folder / "resize.json", resize_unit(shape))


def tokenizer_unit(shape: SetShape) -> Weights:
    xyz, rot = moving_paths(4, 12, 0.1, past=True)
    configs: dict[str, Json] = {
        "default": {},
        "bins41": {"num_bins": 41},
        "range": {"num_bins": 256, "ego_xyz_min": (-2.0, -1.0, -0.5), "ego_xyz_max": (6.0, 1.0, 0.5)},
        "set": shape.history_tokenizer,
        "yaw": {"predict_yaw": True},
    }
    unit = {"xyz": xyz, "rot": rot}
    for name, config in configs.items():
        unit[f"tokens_{name}"] = delta_bins(xyz, rot, config)
        unit[f"decoded_xyz_{name}"], yaw = delta_values(unit[f"tokens_{name}"], config)
        if name in ("default", "yaw"):
            unit[f"decoded_rot_{name}"] = turned(yaw)
    return unit


def action_space_unit(shape: SetShape) -> Weights:
    count, points = 5, shape.n_waypoints
    past = moving_paths(count, shape.history_points, shape.dt, past=True)
    future = moving_paths(count, points, shape.dt, past=False)
    histories = list(zip(*past, strict=True))
    action = torch.randn(count, points, 2) * torch.tensor([0.2, 1.0, 1.0, 2.0, 3.0])[:, None, None]
    accel = action[..., 0].double() * SPACE["accel_std"] + SPACE["accel_mean"]
    curve = action[..., 1].double() * SPACE["curvature_std"] + SPACE["curvature_mean"]
    wide = np.stack(
        [actions_of(shape, h, f) for h, f in zip(histories, zip(*future, strict=True), strict=True)]
    )
    back = torch.from_numpy(wide).float()
    bins, low, high = action_bins(shape, back)
    decoded = low + bins.reshape(count, points, 2) / (shape.future_tokenizer["num_bins"] - 1) * (high - low)

    def driven(actions: Tensor) -> tuple[Tensor, Tensor]:
        paths = [integrate(shape, a, *h) for a, h in zip(actions, histories, strict=True)]
        return torch.stack([xyz for xyz, _ in paths]), torch.stack([rot for _, rot in paths])

    speeds = torch.tensor([initial_speed(shape, *h) for h in histories], dtype=torch.float64)
    inside = (accel.abs() <= 2.0).all(-1) & (curve.abs() <= 0.1).all(-1)
    unit = {
        "hist_xyz": past[0],
        "hist_rot": past[1],
        "action": action,
        "v0": speeds.float(),
        "v0_f64": speeds,
    }
    unit |= {"future_xyz": future[0], "future_rot": future[1], "within_bounds": inside.to(torch.uint8)}
    unit |= {"future_action": back, "future_action_f64": torch.from_numpy(wide), "future_tokens": bins}
    unit["pred_xyz"], unit["pred_rot"] = driven(action)
    unit["future_action_pred_xyz"], unit["future_tokens_decoded_xyz"] = driven(back)[0], driven(decoded)[0]
    return unit


def action_bins(shape: SetShape, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low = torch.tensor(shape.future_tokenizer.get("dims_min", [-10.0, -10.0]))
    high = torch.tensor(shape.future_tokenizer.get("dims_max", [10.0, 10.0]))
    top = shape.future_tokenizer["num_bins"] - 1
    return ((action - low) / (high - low) * top).round().clamp(0, top).long().flatten(1), low, high


def resize_unit(shape: SetShape) -> list[Json]:
    patch, merge = shape.vision["patch_size"], shape.vision["spatial_merge_size"]
    entries = []
    for height, width in ((1080, 1920), (720, 1280), (20, 44), (333, 71)):
        for least, most in ((163840, 196608), (shape.min_pixels, shape.max_pixels)):
            out = resized(height, width, patch * merge, least, most)
            grid = [1, out[0] // patch, out[1] // patch]
            entry: Json = {"h": height, "w": width, "min_pixels": least, "max_pixels": most}
            entry |= {"out_h": out[0], "out_w": out[1], "grid": grid}
            entries.append(entry | {"tokens": grid[1] * grid[2] // merge**2})
    return entries
