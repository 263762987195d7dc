"""The decoder block of Qwen3, written once: for the prompt, for verify rows and for the action expert.

Attention is handed in, so that who owns a cache decides what a row sees. The weights stay in the modules
of transformers; they are read here, never changed.

Shapes: R rows, H query heads, K KV heads, D head dim, C hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [..., R, H, D], k [..., R, K, D], v [..., R, K, D]) -> [..., R, H, D]; q and k are rotated."""

AfterLayer = Callable[[int, Tensor], Tensor]
"""(layer, hidden [..., R, C]) -> hidden that the next layer reads: adds deepstack features, or taps."""


def check_activation(name: str, where: str) -> None:
    """Raise ValueError if the MLP's activation is not the one that `run_layers` has."""
    if name not in ("silu", "swish"):
        raise ValueError(f"{where}.hidden_act is {name!r}; only 'silu' is known")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm in float32, cast back, times weight (specification 6)."""
    if x.dtype == torch.float32 == weight.dtype:
        return functional.rms_norm(x, weight.shape, weight, eps)  # the same formula in one call
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _norm(module: Any, x: Tensor) -> Tensor:
    """The norm of one of transformers' modules."""
    return rms_norm(x, module.weight, module.variance_epsilon)


def rotary_tables(
    position_ids: Tensor, *, head_dim: int, theta: float, mrope_section: Iterable[int]
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of interleaved M-RoPE (specification 5).

    Args:
        position_ids: int64 [3, ..., R], the axes (t, h, w).
        head_dim: D.
        theta: the rotary base.
        mrope_section: frequencies of (t, h, w); only h's and w's counts are used.

    Returns:
        cos and sin, float32 [..., R, D].
    """
    _, section_h, section_w = mrope_section
    inverse = inverse_frequencies(head_dim, theta, position_ids.device)
    index = torch.arange(head_dim // 2, device=position_ids.device)
    axis = torch.zeros_like(index)
    axis[(index % 3 == 1) & (index < 3 * section_h)] = 1
    axis[(index % 3 == 2) & (index < 3 * section_w)] = 2
    return _cos_sin(position_ids.movedim(0, -1).float()[..., axis] * inverse)


def text_rotary_tables(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary_tables` of positions with three equal axes, as those after a prompt; sections then say nothing.

    Args:
        positions: int64 [..., R].
        inverse: from `inverse_frequencies`.

    Returns:
        cos and sin, float32 [..., R, D].
    """
    return _cos_sin(positions.unsqueeze(-1).float() * inverse)


def inverse_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Radians a position of each pair of a head's dimensions, float32 [D/2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    inverse: Tensor = 1.0 / theta**exponents
    return inverse


def _cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary tables [..., R, D] to x [..., R, heads, D] in rotate-half form."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def run_layers(
    layers: nn.ModuleList,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    attend: Attend,
    after_layer: AfterLayer | None = None,
    *,
    wanted: Tensor | None = None,
) -> Tensor:
    """Run Qwen3 decoder layers over rows.

    Args:
        layers: transformers' decoder layers (of the text model or of the expert).
        hidden: [..., R, C] input of the first layer.
        rotary: cos and sin, [..., R, D], in the dtype of `hidden`.
        attend: the attention, which also owns the cache.
        after_layer: called with each layer's output; what it returns goes on.
        wanted: int64 [W], the rows of the last layer's output that are wanted; its attention then gives
            these alone, and `after_layer` gets them. None for all.

    Returns:
        [..., R, C] (or [..., W, C]), the last layer's output *before* the final norm.
    """
    cos, sin = rotary
    layer: Any
    for index, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        normed = _norm(layer.input_layernorm, hidden)
        heads = (*normed.shape[:-1], -1, attention.head_dim)
        q = rotate(_norm(attention.q_norm, attention.q_proj(normed).view(heads)), cos, sin)
        k = rotate(_norm(attention.k_norm, attention.k_proj(normed).view(heads)), cos, sin)
        v = attention.v_proj(normed).view(heads)
        if wanted is not None and index + 1 == len(layers):
            hidden = hidden.index_select(-2, wanted)
        hidden = hidden + attention.o_proj(attend(index, q, k, v).flatten(-2))
        normed = _norm(layer.post_attention_layernorm, hidden)
        hidden = hidden + mlp.down_proj(functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        if after_layer is not None:
            hidden = after_layer(index, hidden)
    return hidden
