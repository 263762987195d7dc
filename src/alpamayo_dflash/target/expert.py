"""The action expert: a second, smaller decoder that denoises way-points beside the target's cache.

Specification 8.1 to 8.3. Every layer attends to the keys and values that the target cached in the same
layer, and to its own way-points, all to all.

Shapes: S sample, N way-points, T cache entries, K KV heads, G query heads a KV head, D head dim, L layers,
F Fourier features, A the MLP's width, C the expert's hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig, Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer, Qwen3VLTextRMSNorm

from alpamayo_dflash.common.fields import checked
from alpamayo_dflash.common.options import check_range
from alpamayo_dflash.target.config import ActionProjectionConfig
from alpamayo_dflash.target.qwen3 import Attend, check_activation, rms_norm
from alpamayo_dflash.target.rotary import Rope, rope_settings, rope_values

Join = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, k, v [S, N, K, D]) -> keys and values of prefix and way-points, [S, K, T + N, D]."""
_WIDTH = 2**20  # the most of any size, far beyond every expert

_MLP_NORM_EPS = 1e-5
ACTION_CHANNELS = 2


@dataclass(frozen=True)
class ActionPrefix:
    """The target's cache, as the expert reads it.

    Attributes:
        keys: [L, S, T, K, D], rotated.
        values: [L, S, T, K, D].
        lengths: int64 [S], entries that a sample's way-points see (its first ones).
        positions: int64 [S], the position of a sample's first way-point: offset + rope_delta, where the
            offset counts the tokens through `<|traj_future_start|>` (specification 7).
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    positions: Tensor

    def __post_init__(self) -> None:
        if self.keys.dim() != 5 or self.keys.shape != self.values.shape:
            raise ValueError(
                f"keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)} "
                "must both be [L, S, T, K, D]"
            )
        samples = (self.keys.shape[1],)
        if self.lengths.shape != samples or self.positions.shape != samples:
            raise ValueError(
                f"lengths {tuple(self.lengths.shape)} and positions {tuple(self.positions.shape)} "
                f"must both be [{samples[0]}]"
            )

    def attend(self, waypoints: int, *, again: bool = False) -> Attend:
        """The expert's attention: N way-points a sample over the visible prefix and themselves.

        Args:
            waypoints: N.
            again: it will be called many times: the prefix is then copied once, to where the way-points' own
                keys and values are written after it. Without gradients only.
        """
        mask = self._mask(waypoints)
        join = self._written_behind(waypoints) if again else self._behind

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # All rows of a sample see the same, so the query heads of a KV head fold into the rows.
            samples, rows, heads, dim = q.shape
            kv_heads = k.shape[-2]
            q_SKGD = q.reshape(samples, rows, kv_heads, -1, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
            out = functional.scaled_dot_product_attention(q_SKGD, *join(layer, k, v), attn_mask=mask)
            grouped = out.reshape(samples, kv_heads, -1, rows, dim).permute(0, 3, 1, 2, 4)
            return grouped.reshape(samples, rows, heads, dim)

        return attend

    def _mask(self, waypoints: int) -> Tensor | None:
        """What the samples see, bool [S, 1, 1, T + N]; None where that is everything."""
        entries, device = self.keys.shape[2], self.keys.device
        if device.type == "cpu" and bool((self.lengths == entries).all()):
            return None
        visible = torch.arange(entries, device=device) < self.lengths.unsqueeze(-1)
        return functional.pad(visible, (0, waypoints), value=True)[:, None, None]

    def _behind(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [S, K, T + N, D], joined for this call."""
        keys, values = (torch.cat(pair, dim=1) for pair in ((self.keys[layer], k), (self.values[layer], v)))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _written_behind(self, waypoints: int) -> Join:
        """As `_behind`, the prefix copied once for all calls."""
        entries = self.keys.shape[2]
        joined = [functional.pad(each, (0, 0, 0, 0, 0, waypoints)) for each in (self.keys, self.values)]

        def join(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = (each[layer] for each in joined)
            keys[:, entries:], values[:, entries:] = k, v
            return keys.transpose(1, 2), values.transpose(1, 2)

        return join


class Expert(nn.Module):
    """The expert's decoder layers and final norm; the names are the checkpoint's."""

    def __init__(self, config: Qwen3VLTextConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            Qwen3VLTextDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen3VLTextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class FourierFeatures(nn.Module):
    """sqrt(2)·[sin 2πfs, cos 2πfs] at log-spaced frequencies from 1 to `max_freq`; R1 stores them."""

    freqs: Tensor

    def __init__(self, features: int, max_freq: float) -> None:
        super().__init__()
        self.count, self.max_freq = features // 2, max_freq
        self.register_buffer("freqs", log_spaced(self.count, max_freq))

    def reset(self, device: torch.device, *, rounded: bool) -> None:
        """Set the frequencies by the formula, rounded to bfloat16 if asked (specification 1.5)."""
        freqs = log_spaced(self.count, self.max_freq)
        self.freqs = (freqs.bfloat16().float() if rounded else freqs).to(device)

    def forward(self, s: Tensor) -> Tensor:
        """Map [...] to float32 [..., F]."""
        angles = s.float().unsqueeze(-1) * self.freqs.float().view(-1) * (2 * math.pi)
        return torch.cat((angles.sin(), angles.cos()), dim=-1) * math.sqrt(2)


def log_spaced(count: int, max_freq: float) -> Tensor:
    """Frequencies 10^(i·log10(max_freq)/(count − 1)), float32 [1, count].

    torch's logspace gives the values that R1 stores, to the bit; a power of float32 exponents does not, and
    an error of 2e-6 in a frequency shows in the features (1.5 stores none).
    """
    return torch.logspace(0, math.log10(max_freq), count, dtype=torch.float32, device="cpu").unsqueeze(0)


class RMSNorm(nn.Module):
    """The MLP's RMS norm; its epsilon is 1e-5, not the decoder's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = _MLP_NORM_EPS

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_norm(x, self.weight, self.eps)


class MLPEncoder(nn.Module):
    """The MLP over Fourier features; only its submodule's name, `trunk`, is the checkpoint's business."""

    def __init__(self, features: int, width: int, layers: int, out: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Linear(features, width), nn.SiLU()]
        for _ in range(layers - 1):
            parts += [RMSNorm(width), nn.Linear(width, width), nn.SiLU()]
        self.trunk = nn.Sequential(*parts, RMSNorm(width), nn.Linear(width, out))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., features] to [..., out]."""
        encoded: Tensor = self.trunk(x)
        return encoded


class ActionProjection(nn.Module):
    """Noisy actions and time to the expert's input (specification 8.2, steps 1 and 2)."""

    def __init__(self, config: ActionProjectionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.sinus = nn.ModuleList(
            FourierFeatures(config.num_fourier_feats, config.max_freq) for _ in range(ACTION_CHANNELS)
        )
        self.timestep_fourier_encoder = FourierFeatures(config.num_fourier_feats, config.max_freq)
        features = (ACTION_CHANNELS + 1) * config.num_fourier_feats
        self.encoder = MLPEncoder(features, config.hidden_size, config.num_enc_layers, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Embed actions.

        Args:
            x: [S, N, 2], the noisy actions.
            t: [S], the time in 0 ... 1.

        Returns:
            [S, N, C] in the dtype of the weights.
        """
        channels = [encoder(x[..., index]) for index, encoder in enumerate(self.sinus)]
        time = self.timestep_fourier_encoder(t).unsqueeze(-2).expand(-1, x.shape[-2], -1)
        features = torch.cat((*channels, time), dim=-1)
        embedded: Tensor = self.norm(self.encoder(features.to(self.norm.weight.dtype)))
        return embedded


def expert_text_config(vlm_config: Qwen3VLConfig, changes: dict[str, Any]) -> Qwen3VLTextConfig:
    """The expert's configuration: the text model's with `expert_cfg`'s keys put in (specification 8.1).

    Raises:
        ValueError: head_dim, the layers, the KV heads or the rotary settings then differ from the text
            model's, whose cache the expert shares; or either has another activation than SiLU.
    """
    text: Any = vlm_config.text_config
    shared: dict[str, Any] = text.to_dict()
    values = shared | changes
    config: Qwen3VLTextConfig = Qwen3VLTextConfig.from_dict(values)
    for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
        check_range(1, _WIDTH, **{f"expert_cfg.{key}": checked(values[key], int, f"expert_cfg.{key}")})
    for key in ("head_dim", "num_key_value_heads", "num_hidden_layers"):
        if values[key] != shared[key]:
            raise ValueError(
                f"expert_cfg.{key} is {values[key]}, but the target's is {shared[key]}; they share a cache"
            )
    _check_rope(rope_settings(text), changes)
    for name, act in (("text_config", shared["hidden_act"]), ("expert_cfg", values["hidden_act"])):
        check_activation(act, name)
    return config


def _check_rope(shared: Rope, changes: dict[str, Any]) -> None:
    """Refuse an expert whose rotary embedding is not that of the cached keys."""
    for key, value in rope_values(changes, "expert_cfg").items():
        theirs = getattr(shared, key)
        if value != theirs:
            raise ValueError(
                f"expert_cfg's {key} is {value}, but the target's is {theirs}; they share a cache"
            )
