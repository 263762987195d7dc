"""Products of e4m3 by e4m3 with float32 scales, by plain operations: what the fast forms are held against.

A row of activations, and a row of a weight (an output column), is a scale times values of e4m3: four exponent
bits, three of the mantissa, the largest 448. The values are multiples of 2^-9 below 2^9, so that their
products are multiples of 2^-18 below 2^18, and a sum of up to 2^17 of them is exact in float64 in whatever
order it is taken. Rounded once to float32 and scaled, a product is thus the same on every machine, and a
row's does not depend on how many rows there are or on what they hold.

Shapes: R rows, N output columns, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest value of e4m3."""

MULTIPLE = 16
"""What the fast forms take: inputs and output columns in multiples of this."""

MOST_INPUTS = 2**17
"""Up to so many inputs a product's sum is exact in float64."""

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class CastRows:
    """Rows in e4m3.

    Attributes:
        values: e4m3 [R, I].
        scales: float32 [R, 1].
        dtype: of what was cast, and of the products that are made of it.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        """How many rows."""
        return len(self.values)


def row_scales(x_RI: Tensor) -> Tensor:
    """The scales that put each row's largest magnitude on the largest value of e4m3, float32 [R, 1].

    A row of zeros, or one so small that its scale would have fewer bits than others, has scale 1. A row that
    is not finite has a scale that is not.
    """
    largest = x_RI.abs().amax(-1, keepdim=True).float()
    # By a tensor: a GPU multiplies by the reciprocal of a number, which rounds otherwise.
    scales = largest / torch.full_like(largest, LARGEST)
    return torch.where(scales < _SMALLEST_SCALE, torch.ones_like(scales), scales)


def cast_rows(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3 [R, I], rounded to nearest even, and their scales, float32 [R, 1].

    What is not finite in a row makes the whole of it, values times scale, not finite.
    """
    scales = row_scales(x_RI)
    return (x_RI.float() / scales).to(E4M3), scales


def cast_by(x_RI: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3 by one scale that is given, and that scale for each row, float32 [R, 1].

    What lies beyond the largest value saturates, as a static scale means it; a row that holds a value that is
    not finite gets a scale that is not.

    Args:
        x_RI: the rows.
        scale: float32 [], a static `input_scale`.
    """
    wide = x_RI.float()
    finite_R1 = wide.isfinite().all(-1, keepdim=True)
    values = (wide / scale).clamp(-LARGEST, LARGEST).to(E4M3)
    return values, torch.where(finite_R1, scale, torch.full_like(scale, torch.nan))


def product(
    x_RI: Tensor,
    x_scales_R1: Tensor,
    weight_NI: Tensor,
    weight_scales_N1: Tensor,
    dtype: torch.dtype,
    bias_N: Tensor | None = None,
) -> Tensor:
    """The scaled product X @ weight.T (+ bias), [R, N].

    Args:
        x_RI: e4m3.
        x_scales_R1: float32, of each row.
        weight_NI: e4m3, or its values in float64 already.
        weight_scales_N1: float32, of each output column.
        dtype: of the result.
        bias_N: is added before the result is rounded.
    """
    assert x_RI.shape[-1] <= MOST_INPUTS
    sums_RN = (x_RI.double() @ weight_NI.double().t()).float()
    return scaled(sums_RN, x_scales_R1, weight_scales_N1, dtype, bias_N)


def scaled(
    sums_RN: Tensor,
    x_scales_R1: Tensor,
    weight_scales_N1: Tensor,
    dtype: torch.dtype,
    bias_N: Tensor | None = None,
) -> Tensor:
    """Sums of products of values, float32, times both scales (+ bias), rounded once to `dtype`."""
    result_RN = sums_RN * x_scales_R1 * weight_scales_N1.t()
    return (result_RN if bias_N is None else result_RN + bias_N.float()).to(dtype)
