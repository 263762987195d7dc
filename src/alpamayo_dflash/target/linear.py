"""The linear layers of the fast decoder go through here, so that other formats need change nothing else.

Shapes: R rows, N output columns, I inner dimension, J parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.target.storage import joined


class Linear:
    """A weight without bias, and how it is multiplied on a GPU.

    Args:
        weights: one, or several [N_i, I] that read the same input. Those that lie together
            (`target.storage`) are run as one product, others one by one; nothing is copied.
    """

    def __init__(self, *weights: Tensor) -> None:
        one = joined(weights)
        self.weights = weights if one is None else (one,)

    def parts(self, x_RI: Tensor) -> Tensor:
        """X @ weight.T as parts [J, R, N] whose sum is the product, for kernels that sum as they read."""
        from alpamayo_dflash.kernels import launch

        return launch.product(x_RI, self.weights[0]) if len(self.weights) == 1 else self(x_RI).unsqueeze(0)

    def __call__(self, x_RI: Tensor) -> Tensor:
        """X @ weight.T, [R, N]."""
        from alpamayo_dflash.kernels import launch

        products = [launch.whole_product(x_RI, weight) for weight in self.weights]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def gated(self, x_RI: Tensor) -> Tensor:
        """silu(x @ gate.T) · (x @ up.T), [R, N/2], where the weights are gate's and up's."""
        from alpamayo_dflash.kernels import launch

        if len(self.weights) == 1:
            return launch.gated_product(x_RI, self.weights[0])
        return launch.gate(self(x_RI))


def fused_linear(parts: Sequence[Any]) -> Linear:
    """The product of several linear modules that read one input."""
    return Linear(*(part.weight.detach() for part in parts))
