"""Flow matching's small operations on way-points: their features, the projection's norms, an Euler step.

They round where the modules of `target/expert.py` round, so that only the order of sums differs.

Shapes: R rows (way-points of all samples), F features a channel, A the projection's width, C the expert's
hidden size, J parts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_SQRT_2 = tl.constexpr(math.sqrt(2))
_TWO_PI = tl.constexpr(2 * math.pi)
_CHANNELS = tl.constexpr(3)  # acceleration, curvature, time


@triton.jit
def features_kernel(
    x_ptr, time, first_ptr, second_ptr, time_freqs_ptr, out_ptr, HALF: tl.constexpr, BLOCK_F: tl.constexpr
):
    """Program r: the Fourier features of x[r, 0], x[r, 1] and the time, each sines and then cosines."""
    row = tl.program_id(0)
    f = tl.arange(0, BLOCK_F)
    inside = f < HALF
    for channel in tl.static_range(_CHANNELS):
        if channel == 0:
            freqs, value = tl.load(first_ptr + f, mask=inside, other=0.0), tl.load(x_ptr + row * 2)
        elif channel == 1:
            freqs, value = tl.load(second_ptr + f, mask=inside, other=0.0), tl.load(x_ptr + row * 2 + 1)
        else:
            freqs, value = tl.load(time_freqs_ptr + f, mask=inside, other=0.0), time
        angle = value * freqs.to(tl.float32) * _TWO_PI
        at = out_ptr + (row * _CHANNELS + channel) * 2 * HALF + f
        dtype = out_ptr.dtype.element_ty
        tl.store(at, (tl.sin(angle) * _SQRT_2).to(dtype), mask=inside)
        tl.store(at + HALF, (tl.cos(angle) * _SQRT_2).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def encode_kernel(
    parts_ptr,
    bias_ptr,
    weight_ptr,
    shift_ptr,
    out_ptr,
    rows,
    width,
    eps,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Program r: the parts' sum and its bias, then SiLU and RMS norm, or with LAYER_NORM a layer norm."""
    row = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, BLOCK_A)
    inside = a < width
    dtype = out_ptr.dtype.element_ty
    x = tl.load(parts_ptr + row * width + a, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(parts_ptr + (part * rows + row) * width + a, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + a, mask=inside, other=0.0).to(tl.float32)
    x = x.to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + a, mask=inside, other=0.0)
    if LAYER_NORM:
        centred = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
        shift = tl.load(shift_ptr + a, mask=inside, other=0.0).to(tl.float32)
        normed = centred * scale * weight.to(tl.float32) + shift
    else:
        x = (x / (1.0 + tl.exp(-x))).to(dtype).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
        normed = weight * (x * scale).to(dtype)
    tl.store(out_ptr + row * width + a, normed.to(dtype), mask=inside)


@triton.jit
def euler_kernel(normed_ptr, weight_ptr, bias_ptr, x_ptr, step, width, BLOCK_C: tl.constexpr):
    """Program r: x[r] += step · velocity, the velocity normed[r] @ weight.T + bias."""
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    inside = c < width
    dtype = normed_ptr.dtype.element_ty
    normed = tl.load(normed_ptr + row.to(tl.int64) * width + c, mask=inside, other=0.0).to(tl.float32)
    for channel in tl.static_range(2):
        weight = tl.load(weight_ptr + channel * width + c, mask=inside, other=0.0).to(tl.float32)
        velocity = tl.sum(normed * weight, axis=0) + tl.load(bias_ptr + channel).to(tl.float32)
        at = x_ptr + row * 2 + channel
        tl.store(at, tl.load(at) + step * velocity.to(dtype).to(tl.float32))


def features(x_R2: Tensor, time: float, freqs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Fourier features of noisy actions and the time.

    Args:
        x_R2: float32 actions.
        time: in 0 ... 1.
        freqs: of acceleration, curvature and time, F/2 numbers each.
        dtype: of the outcome.

    Returns:
        [R, 3·F].
    """
    half = freqs[0].numel()
    out = torch.empty(len(x_R2), 6 * half, dtype=dtype, device=x_R2.device)
    features_kernel[(len(x_R2),)](
        x_R2, time, *freqs, out, HALF=half, BLOCK_F=triton.next_power_of_2(half), num_warps=1
    )
    return out


def silu_norm(parts_JRA: Tensor, bias_A: Tensor | None, weight_A: Tensor, eps: float) -> Tensor:
    """RMS norm of silu(the parts' sum + bias), [R, A] in the weight's dtype."""
    return _encode(parts_JRA, bias_A, weight_A, None, eps)


def layer_norm(parts_JRC: Tensor, bias_C: Tensor, weight_C: Tensor, shift_C: Tensor, eps: float) -> Tensor:
    """Layer norm of the parts' sum + bias, [R, C] in the weight's dtype."""
    return _encode(parts_JRC, bias_C, weight_C, shift_C, eps)


def _encode(
    parts_JRA: Tensor, bias_A: Tensor | None, weight_A: Tensor, shift_A: Tensor | None, eps: float
) -> Tensor:
    count, rows, width = parts_JRA.shape
    out = torch.empty(rows, width, dtype=weight_A.dtype, device=weight_A.device)
    encode_kernel[(rows,)](
        parts_JRA,
        weight_A if bias_A is None else bias_A,
        weight_A,
        weight_A if shift_A is None else shift_A,
        out,
        rows,
        width,
        eps,
        PARTS=count,
        BIAS=bias_A is not None,
        LAYER_NORM=shift_A is not None,
        BLOCK_A=triton.next_power_of_2(width),
        num_warps=4,
    )
    return out


def euler_step(x_R2: Tensor, normed_RC: Tensor, weight_2C: Tensor, bias_2: Tensor, step: float) -> None:
    """Add step · (normed @ weight.T + bias) to the float32 actions x."""
    width = normed_RC.shape[1]
    euler_kernel[(len(x_R2),)](
        normed_RC,
        weight_2C,
        bias_2,
        x_R2,
        step,
        width,
        BLOCK_C=triton.next_power_of_2(width),
        num_warps=4,
    )
