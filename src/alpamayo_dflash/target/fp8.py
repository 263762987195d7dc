"""A linear layer in e4m3: a float32 scale for each output column, and the input cast row by row.

Shapes: R rows, I inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alpamayo_dflash.kernels import fp8

_KEPT_WIDE = 2**20
"""Up to so many values a weight is kept in float64 too, where it is multiplied by plain operations on a CPU:
to convert it each time takes longer than the product."""


class FP8Linear(nn.Module):
    """`nn.Linear` with a weight in e4m3; called, it computes by plain operations (`kernels.fp8`).

    Attributes:
        weight: e4m3 [N, I].
        weight_scale: float32 [N, 1].
        input_scale: float32 [], a static scale of the input; None for one of each row, made as it comes.
        bias: [N], or None.
    """

    bias: nn.Parameter | None
    input_scale: nn.Parameter | None

    def __init__(
        self, inputs: int, outputs: int, *, biased: bool = False, static: bool = False, device: Any = None
    ) -> None:
        super().__init__()
        self.weight = _frozen(torch.empty(outputs, inputs, dtype=fp8.E4M3, device=device))
        self.weight_scale = _frozen(torch.empty(outputs, 1, dtype=torch.float32, device=device))
        scale = _frozen(torch.empty((), dtype=torch.float32, device=device)) if static else None
        bias = _frozen(torch.empty(outputs, device=device)) if biased else None
        self.register_parameter("input_scale", scale)
        self.register_parameter("bias", bias)
        self._wide: Tensor | None = None

    @classmethod
    def in_place_of(cls, linear: nn.Linear, *, static: bool = False) -> FP8Linear:
        """The layer of another's shape, with nothing in it yet, on the meta device."""
        inputs, outputs = linear.in_features, linear.out_features
        return cls(inputs, outputs, biased=linear.bias is not None, static=static, device="meta")

    @torch.no_grad()
    def fill(self, values_NI: Tensor) -> None:
        """Take a weight's values, of any float type, and their scales.

        Raises:
            ValueError: a value is not finite.
        """
        values, scales = fp8.cast_rows(values_NI)
        if not bool(scales.isfinite().all()):
            raise ValueError("it holds values that are not finite")
        self.weight.copy_(values)
        self.weight_scale.copy_(scales)
        self._wide = None

    def cast(self, x_RI: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in e4m3 and their scales."""
        return fp8.cast_rows(x_RI) if self.input_scale is None else fp8.cast_by(x_RI, self.input_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., N] in the dtype of x."""
        values, scales = self.cast(x.flatten(0, -2))
        out_RN = fp8.product(values, scales, self._multiplied(), self.weight_scale, x.dtype, self.bias)
        return out_RN.view(*x.shape[:-1], -1)

    def _multiplied(self) -> Tensor:
        """The weight as a product takes it: in float64 where it is small and on a CPU."""
        if self.weight.device.type != "cpu" or self.weight.numel() > _KEPT_WIDE:
            return self.weight
        if self._wide is None:
            with torch.inference_mode(False):
                self._wide = self.weight.double()
        return self._wide

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP8Linear:
        """Move to another device; the weight and its scales keep their types, whatever is asked for."""
        scales = [] if self.input_scale is None else ["input_scale"]
        kept = {name: getattr(self, name).data for name in ("weight", "weight_scale", *scales)}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            setattr(self, name, _frozen(tensor.to(getattr(self, name).device)))
        self._wide = None
        return self

    def extra_repr(self) -> str:
        """Inputs, outputs and what else tells it from others."""
        outputs, inputs = self.weight.shape
        how = "a row" if self.input_scale is None else "static"
        return (
            f"in_features={inputs}, out_features={outputs}, bias={self.bias is not None}, input scale {how}"
        )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
