"""Products of e4m3 by e4m3 on a GPU: the one place that chooses who casts the rows and who multiplies.

The plain form is `kernels.fp8`. The cast's bits are the same; a product's sums are taken in the library's
order and at the tensor cores' precision, and rounded once to the result's dtype.

Shapes: R rows, N output columns, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alpamayo_dflash.kernels import fp8, fp8_product, fp8_triton
from alpamayo_dflash.kernels.rows import gate


def cast(x_RI: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows in e4m3 and their scales [R, 1]; by each row's own scale where none is given."""
    return fp8_triton.cast_rows(x_RI) if input_scale is None else fp8.cast_by(x_RI, input_scale)


def product_parts(x: fp8.CastRows, weight_NI: Tensor, weight_scales_N1: Tensor) -> Tensor:
    """The scaled product X @ weight.T as parts [J, R, N] still to be summed; few rows by the kernel."""
    if _few(x.values, weight_NI):
        return fp8_product.few_rows_product(x.values, x.scales, weight_NI, weight_scales_N1, x.dtype)
    return product(x.values, x.scales, weight_NI, weight_scales_N1, x.dtype).unsqueeze(0)


def gated(x: fp8.CastRows, weight_NI: Tensor, weight_scales_N1: Tensor) -> Tensor:
    """silu(x @ gate.T) · (x @ up.T), scaled, [R, N/2], of a weight that holds gate's rows, then up's."""
    if _few(x.values, weight_NI):
        return fp8_product.few_rows_gated_product(x.values, x.scales, weight_NI, weight_scales_N1, x.dtype)
    return gate(product(x.values, x.scales, weight_NI, weight_scales_N1, x.dtype))


def gated_cast(x: fp8.CastRows, weight_NI: Tensor, weight_scales_N1: Tensor) -> fp8.CastRows:
    """`gated`, cast by row."""
    if _few(x.values, weight_NI):
        rows = fp8_triton.cast_rows(gated(x, weight_NI, weight_scales_N1))
    else:
        both_RN = product(x.values, x.scales, weight_NI, weight_scales_N1, x.dtype)
        rows = fp8_triton.cast_gated(both_RN)
    return fp8.CastRows(*rows, x.dtype)


def _few(x_RI: Tensor, weight_NI: Tensor) -> bool:
    """Whether the kernel for few rows multiplies these."""
    few = len(x_RI) <= fp8_product.FEW_ROWS and fp8_triton.converts(x_RI.device)
    return few and fp8_product.fits(weight_NI.shape[1])


def product(
    x_RI: Tensor,
    x_scales_R1: Tensor,
    weight_NI: Tensor,
    weight_scales_N1: Tensor,
    dtype: torch.dtype,
    bias_N: Tensor | None = None,
    *,
    native: bool | None = None,
) -> Tensor:
    """The scaled product X @ weight.T (+ bias), [R, N].

    Args:
        x_RI: e4m3.
        x_scales_R1: float32.
        weight_NI: e4m3.
        weight_scales_N1: float32.
        dtype: of the result and of the bias.
        bias_N: is added before the result is rounded.
        native: multiply e4m3 by e4m3; otherwise both in bfloat16, which holds every value of e4m3, with sums
            in float32. None for what the GPU has; a CPU, where Triton interprets, takes the plain form.
    """
    if x_RI.device.type == "cpu":
        return fp8.product(x_RI, x_scales_R1, weight_NI, weight_scales_N1, dtype, bias_N)
    if bias_N is not None and native is not False and _few(x_RI, weight_NI):
        # The library takes few rows of many inputs without a bias alone.
        rest = x_scales_R1, weight_NI, weight_scales_N1, torch.float32
        return (fp8_product.few_rows_product(x_RI, *rest).sum(0) + bias_N.float()).to(dtype)
    if fp8_triton.converts(x_RI.device) if native is None else native:
        return torch._scaled_mm(
            x_RI,
            weight_NI.t(),
            scale_a=x_scales_R1,
            scale_b=weight_scales_N1.t(),
            bias=bias_N,
            out_dtype=dtype,
            use_fast_accum=True,
        )
    sums_RN = torch.mm(x_RI.bfloat16(), weight_NI.bfloat16().t(), out_dtype=torch.float32)
    return fp8.scaled(sums_RN, x_scales_R1, weight_scales_N1, dtype, bias_N)
