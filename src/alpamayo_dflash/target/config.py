"""The checkpoint's config.json (specification 1.2), parsed into frozen dataclasses.

Keys that are not known are ignored; where a key is absent, the release's value (or the default of the
official code, as the specification gives it) stands in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.common.fields import build, path_text, value_of
from alpamayo_dflash.common.options import check_range

Version = Literal["r1", "1.5"]

_VERSIONS: dict[str, Version] = {
    "alpamayo_r1": "r1",
    "AlpamayoR1": "r1",
    "alpamayo1_5": "1.5",
    "Alpamayo1_5": "1.5",
}
_Part = TypeVar("_Part")
CONFIG = "config.json"
_NEEDED = ("vlm_name_or_path", "vocab_size", "traj_token_start_idx", "traj_vocab_size", "expert_cfg")
_DTYPES = ("float32", "float16", "bfloat16")
# The most that sizes may be: far beyond any checkpoint, and below what no machine can hold.
_IDS, _WIDTH, _LAYERS, _POINTS, _STEPS = 2**24, 2**20, 1024, 2**14, 10_000


@dataclass(frozen=True)
class ActionProjectionConfig:
    """The projection of noisy actions and time into the expert's width (specification 1.4, 8.2).

    Attributes:
        hidden_size: width of the MLP.
        max_freq: the highest Fourier frequency.
        num_enc_layers: MLP layers before the last Linear.
        num_fourier_feats: features a channel, sines and cosines together.
    """

    hidden_size: int = 512
    max_freq: float = 100.0
    num_enc_layers: int = 2
    num_fourier_feats: int = 20

    def __post_init__(self) -> None:
        check_range(1, _WIDTH, hidden_size=self.hidden_size, num_fourier_feats=self.num_fourier_feats)
        check_range(1, _LAYERS, num_enc_layers=self.num_enc_layers)
        if self.num_fourier_feats < 4 or self.num_fourier_feats % 2:
            raise ValueError(f"num_fourier_feats is {self.num_fourier_feats}; it must be even and at least 4")
        if self.num_enc_layers < 1 or self.hidden_size < 1 or self.max_freq <= 0:
            raise ValueError(
                f"num_enc_layers {self.num_enc_layers}, hidden_size {self.hidden_size} and max_freq "
                f"{self.max_freq} must all be positive"
            )


@dataclass(frozen=True)
class ActionSpaceConfig:
    """The unicycle action space: normalised (acceleration, curvature) a way-point (specification 8.4-8.6).

    Attributes:
        accel_mean: m/s².
        accel_std: m/s².
        curvature_mean: 1/m.
        curvature_std: 1/m.
        accel_bounds: m/s²; a check only, nothing is clipped.
        curvature_bounds: 1/m; a check only.
        dt: seconds between way-points.
        n_waypoints: N.
        theta_lambda: smoothing weight of the heading; `*_ridge` its ridge. Likewise v, a and kappa.
    """

    accel_mean: float = 0.02902694707164455
    accel_std: float = 0.6810426736454882
    curvature_mean: float = 0.0002692167976330542
    curvature_std: float = 0.026148280660833106
    accel_bounds: tuple[float, float] = (-9.8, 9.8)
    curvature_bounds: tuple[float, float] = (-0.33, 0.33)
    dt: float = 0.1
    n_waypoints: int = 64
    theta_lambda: float = 1e-6
    theta_ridge: float = 1e-8
    v_lambda: float = 1e-6
    v_ridge: float = 1e-4
    a_lambda: float = 1e-4
    a_ridge: float = 1e-4
    kappa_lambda: float = 1e-4
    kappa_ridge: float = 1e-4

    def __post_init__(self) -> None:
        check_range(1, _POINTS, n_waypoints=self.n_waypoints)
        if self.dt <= 0 or self.n_waypoints < 1:
            raise ValueError(
                f"action space: dt {self.dt} and n_waypoints {self.n_waypoints} must be positive"
            )
        if self.accel_std <= 0 or self.curvature_std <= 0:
            raise ValueError(
                f"action space: accel_std {self.accel_std} and curvature_std {self.curvature_std} "
                "must be positive"
            )


@dataclass(frozen=True)
class HistoryTokenizerConfig:
    """The delta tokeniser of the ego history (specification 4.1).

    Attributes:
        num_bins: bins a value.
        ego_xyz_min: metres a step, the lower end of the first bin's centre.
        ego_xyz_max: metres a step.
        ego_yaw_min: radians a step.
        ego_yaw_max: radians a step.
        predict_yaw: whether a fourth value a point, the change of yaw, is written.
    """

    num_bins: int = 1000
    ego_xyz_min: tuple[float, float, float] = (-4.0, -4.0, -10.0)
    ego_xyz_max: tuple[float, float, float] = (4.0, 4.0, 10.0)
    ego_yaw_min: float = -math.pi
    ego_yaw_max: float = math.pi
    predict_yaw: bool = False

    def __post_init__(self) -> None:
        check_range(1, _IDS, num_bins=self.num_bins)
        if self.num_bins < 2:
            raise ValueError(f"history tokenizer: num_bins is {self.num_bins}; it must be at least 2")
        if any(low >= high for low, high in zip(self.ego_xyz_min, self.ego_xyz_max, strict=True)):
            raise ValueError(
                f"history tokenizer: ego_xyz_min {self.ego_xyz_min} must be below "
                f"ego_xyz_max {self.ego_xyz_max}"
            )

    @property
    def values_per_point(self) -> int:
        """Tokens a history point: x, y, z and, with yaw on, yaw."""
        return 4 if self.predict_yaw else 3


@dataclass(frozen=True)
class FutureTokenizerConfig:
    """The discrete tokeniser of future actions (specification 4.4); generation masks its tokens.

    Attributes:
        num_bins: bins a value.
        dims_min: the lower end, in normalised units, of (acceleration, curvature).
        dims_max: the upper end.
    """

    num_bins: int = 3000
    dims_min: tuple[float, ...] = (-10.0, -10.0)
    dims_max: tuple[float, ...] = (10.0, 10.0)


@dataclass(frozen=True)
class AlpamayoConfig:
    """What config.json says of an Alpamayo checkpoint.

    Attributes:
        version: "r1" or "1.5".
        vlm_name_or_path: where the Qwen3-VL configuration and tokenizer are.
        vocab_size: V, rows of the embedding and of the head.
        traj_token_start_idx: the id of `<i0>`.
        traj_vocab_size: the count of `<i…>` tokens.
        traj_token_ids: role to id, for the ids that the checkpoint names itself.
        dtype: the dtype of the weights in the file.
        add_special_tokens: whether the whole list of special tokens is appended (specification 2).
        tokens_per_history_traj: placeholders in the prompt.
        tokens_per_future_traj: also the official limit on new tokens.
        min_pixels: the least size of a resized image.
        max_pixels: the greatest.
        expert_cfg: what the expert changes in the text model's configuration.
        action_in_proj: see ActionProjectionConfig.
        action_space: see ActionSpaceConfig.
        history_tokenizer: see HistoryTokenizerConfig.
        history_token_start_idx: the id of history bin 0.
        future_tokenizer: see FutureTokenizerConfig.
        num_inference_steps: Euler steps.
        raw: the file as it was read; written again by `save_pretrained`.
    """

    version: Version
    vlm_name_or_path: str
    vocab_size: int
    traj_token_start_idx: int
    traj_vocab_size: int
    traj_token_ids: Mapping[str, int]
    dtype: str
    add_special_tokens: bool
    tokens_per_history_traj: int
    tokens_per_future_traj: int
    min_pixels: int
    max_pixels: int
    expert_cfg: Mapping[str, Any]
    action_in_proj: ActionProjectionConfig
    action_space: ActionSpaceConfig
    history_tokenizer: HistoryTokenizerConfig
    history_token_start_idx: int
    future_tokenizer: FutureTokenizerConfig
    num_inference_steps: int
    raw: Mapping[str, Any] = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; known are {', '.join(_DTYPES)}")
        check_range(1, _IDS, vocab_size=self.vocab_size, traj_vocab_size=self.traj_vocab_size)
        check_range(0, _IDS, traj_token_start_idx=self.traj_token_start_idx)
        check_range(0, _POINTS, tokens_per_history_traj=self.tokens_per_history_traj)
        check_range(0, _POINTS, tokens_per_future_traj=self.tokens_per_future_traj)
        check_range(1, _STEPS, num_inference_steps=self.num_inference_steps)
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} must be positive and at most max_pixels {self.max_pixels}"
            )
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}; it must be at least 1")
        end = self.traj_ids.stop
        if self.history_token_start_idx + self.history_tokenizer.num_bins > end:
            raise ValueError(
                f"the history's {self.history_tokenizer.num_bins} bins from id "
                f"{self.history_token_start_idx} go beyond the last trajectory id {end - 1}"
            )
        if end > self.vocab_size:
            raise ValueError(f"vocab_size is {self.vocab_size}, but the trajectory ids end at {end - 1}")

    @property
    def traj_ids(self) -> range:
        """The ids of `<i0>`, `<i1>` ..."""
        return range(self.traj_token_start_idx, self.traj_token_start_idx + self.traj_vocab_size)

    @classmethod
    def from_file(cls, path: Path | str) -> AlpamayoConfig:
        """Read config.json.

        Raises:
            ValueError: the file is missing, is not JSON, lacks a key, or holds a value that cannot be used.
        """
        raw = read_json(path)
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix(f'{CONFIG}: ')}") from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> AlpamayoConfig:
        """Parse the object of config.json.

        Raises:
            ValueError: a key is missing or a value cannot be used; the message names it.
        """
        missing = [key for key in _NEEDED if raw.get(key) is None]
        if missing:
            raise ValueError(f"these keys are missing: {', '.join(missing)}")
        _check_targets(raw)

        def value(key: str, kind: type[_Part], default: Any = ...) -> _Part:
            return value_of(raw, key, kind, default, where=CONFIG)

        def part(kind: type[_Part], key: str) -> _Part:
            return build(kind, raw.get(key), f"{CONFIG}: {key}")

        history, future = raw.get("hist_traj_tokenizer_cfg"), raw.get("traj_tokenizer_cfg")
        future_tokenizer = part(FutureTokenizerConfig, "traj_tokenizer_cfg")
        start = value("traj_token_start_idx", int)
        shift = future_tokenizer.num_bins if history is not None and future is not None else 0
        ids = value("traj_token_ids", dict, {})
        diffusion = value("diffusion_cfg", dict, {})
        dtypes = [value(key, str) for key in ("dtype", "torch_dtype", "model_dtype") if raw.get(key)]
        return cls(
            version=_version(raw),
            vlm_name_or_path=path_text(raw["vlm_name_or_path"], f"{CONFIG}: vlm_name_or_path"),
            vocab_size=value("vocab_size", int),
            traj_token_start_idx=start,
            traj_vocab_size=value("traj_vocab_size", int),
            traj_token_ids={key: value_of(ids, key, int, where=f"{CONFIG}: traj_token_ids") for key in ids},
            dtype=dtypes[0] if dtypes else "bfloat16",
            add_special_tokens=value("add_special_tokens", bool, True),
            tokens_per_history_traj=value("tokens_per_history_traj", int, 48),
            tokens_per_future_traj=value("tokens_per_future_traj", int, 128),
            min_pixels=value("min_pixels", int, 163840),
            max_pixels=value("max_pixels", int, 196608),
            expert_cfg=value("expert_cfg", dict),
            action_in_proj=part(ActionProjectionConfig, "action_in_proj_cfg"),
            action_space=part(ActionSpaceConfig, "action_space_cfg"),
            history_tokenizer=part(HistoryTokenizerConfig, "hist_traj_tokenizer_cfg"),
            history_token_start_idx=start + shift,
            future_tokenizer=future_tokenizer,
            num_inference_steps=value_of(
                diffusion, "num_inference_steps", int, 10, where=f"{CONFIG}: diffusion_cfg"
            ),
            raw=dict(raw),
        )


def _version(raw: Mapping[str, Any]) -> Version:
    """Tell R1 from 1.5 by `model_type`, or by `architectures`."""
    names = [raw.get("model_type"), *value_of(raw, "architectures", list, [], where=CONFIG)]
    for name in names:
        if isinstance(name, str) and name in _VERSIONS:
            return _VERSIONS[name]
    raise ValueError(f"model_type and architectures are {names}; known are {', '.join(sorted(_VERSIONS))}")


def _check_targets(raw: Mapping[str, Any]) -> None:
    """Refuse parts that are not the ones built here. `_target_` counts by its last path component."""
    known = {
        "action_in_proj_cfg": ("PerWaypointActionInProjV2",),
        "action_out_proj_cfg": ("Linear",),
        "action_space_cfg": ("UnicycleAccelCurvatureActionSpace",),
        "diffusion_cfg": ("FlowMatching",),
        "hist_traj_tokenizer_cfg": ("DeltaTrajectoryTokenizer",),
        "traj_tokenizer_cfg": ("DiscreteTrajectoryTokenizer", "DeltaTrajectoryTokenizer"),
    }
    for key, allowed in known.items():
        part = value_of(raw, key, dict, {}, where=CONFIG)
        target = value_of(part, "_target_", str, "", where=f"{CONFIG}: {key}")
        if target and target.rsplit(".", 1)[-1] not in allowed:
            raise ValueError(f"{key}._target_ is {target!r}; known are {', '.join(allowed)}")
    method = value_of(raw, "diffusion_cfg", dict, {}, where=CONFIG).get("int_method", "euler")
    if method != "euler":
        raise ValueError(f"diffusion_cfg.int_method is {method!r}; only 'euler' is known")
    if raw.get("expert_non_causal_attention", True) is not True:
        raise ValueError("expert_non_causal_attention is false; only the non-causal expert is known")
