"""The decoder of `run_layers` in its fast form: fused weights and the project's kernels, on a GPU.

The same arithmetic with the same roundings; only the order inside sums differs. `run_layers` is its plain
form, which the tests hold it against.

Shapes: R rows, C hidden, H query heads, K KV heads, D head dim, E cache entries, N fused columns, J parts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alpamayo_dflash.target.qwen3 import AfterLayer
from alpamayo_dflash.target.weights import (
    Product,
    Rows,
    add_norm_for,
    fused_linear,
    mlp_parts,
    why_projection,
)

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_HEAD_WIDTHS = (16, 256)  # a tensor core's inner dimension; what fits a multiprocessor's shared memory
_LEAST_CAPABILITY = (8, 0)  # bfloat16 on tensor cores


@dataclass(frozen=True)
class FusedLayer:
    """The weights of one layer, those of the same input as one.

    Attributes:
        input_norm: [C].
        qkv: [(H + 2K)·D, C].
        qk_norms: q's and k's, [D] each.
        out: [C, H·D].
        mlp_norm: [C].
        gate_up: gate's rows, then up's.
        down: of the MLP.
        eps: of every norm.
    """

    input_norm: Tensor
    qkv: Product
    qk_norms: tuple[Tensor, Tensor]
    out: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product
    eps: float

    @classmethod
    def of(cls, layer: Any) -> FusedLayer:
        """Read one of transformers' decoder layers, or one of a draft's."""
        attention, mlp = layer.self_attn, layer.mlp
        norm = layer.input_layernorm
        return cls(
            norm.weight.detach(),
            fused_linear((attention.q_proj, attention.k_proj, attention.v_proj)),
            (attention.q_norm.weight.detach(), attention.k_norm.weight.detach()),
            fused_linear((attention.o_proj,)),
            layer.post_attention_layernorm.weight.detach(),
            fused_linear((mlp.gate_proj, mlp.up_proj)),
            fused_linear((mlp.down_proj,)),
            float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps),
        )

    def queries(
        self,
        normed_RC: Rows,
        rotary: tuple[Tensor, Tensor],
        keys_EKD: Tensor,
        values_EKD: Tensor,
        entries_R: Tensor,
    ) -> Tensor:
        """Write rows' keys and values to entries of a cache, and return their queries [R, H, D].

        Args:
            normed_RC: the layer's normed input.
            rotary: cos and sin [R, D].
            keys_EKD: the cache's keys of this layer.
            values_EKD: its values.
            entries_R: int64, where each row's go.
        """
        from alpamayo_dflash.kernels.rows import rotate_store

        parts_JRN = self.qkv.parts(normed_RC)
        return rotate_store(parts_JRN, self.qk_norms, self.eps, rotary, keys_EKD, values_EKD, entries_R)


FusedAttend = Callable[[int, FusedLayer, Any], Rows]
"""(layer index, layer, normed input [R, C]) -> [R, H·D]; it multiplies by the layer's `qkv` itself.

Where the layer's `out` takes cast rows it may return these."""


class FusedDecoder:
    """Qwen3 decoder layers over rows, and the norm behind them.

    Args:
        layers: transformers' decoder layers.
        final_norm: the norm behind the last.
    """

    def __init__(self, layers: nn.ModuleList, final_norm: Any) -> None:
        self.layers = [FusedLayer.of(layer) for layer in layers]
        self.final_norm: Tensor = final_norm.weight.detach()

    def __call__(
        self,
        hidden_RC: Tensor,
        attend: FusedAttend,
        after_layer: AfterLayer | None = None,
        *,
        wanted: Tensor | None = None,
        inputs_RC: Tensor | None = None,
    ) -> Tensor:
        """Run the layers.

        Args:
            hidden_RC: input of the first.
            attend: the attention, which also owns the cache.
            after_layer: as in `run_layers`.
            wanted: as in `run_layers`.
            inputs_RC: where each layer's normed input is written; a new tensor by default.

        Returns:
            [R, C] (or [W, C]), *after* the final norm.
        """
        layers, into = self.layers, inputs_RC
        first = layers[0]
        hidden, normed = add_norm_for(first.qkv, hidden_RC, None, (first.input_norm, first.eps), into)
        for index, layer in enumerate(layers):
            attended = attend(index, layer, normed)
            if wanted is not None and index + 1 == len(layers):
                hidden = hidden.index_select(0, wanted)
            out = layer.out.parts(attended)
            hidden, normed = add_norm_for(layer.gate_up, hidden, out, (layer.mlp_norm, layer.eps))
            down = mlp_parts(layer.gate_up, layer.down, normed)
            qkv: Product | None = None
            if index + 1 < len(layers):
                qkv, weight = layers[index + 1].qkv, layers[index + 1].input_norm
            else:
                weight, into = self.final_norm, None
            total, normed = add_norm_for(qkv, hidden, down, (weight, layer.eps), into)
            hidden = total if after_layer is None else after_layer(index, total)
            if hidden is not total:
                _, normed = add_norm_for(qkv, hidden, None, (weight, layer.eps), into)
        result: Tensor = normed
        return result


def why_plain(layers: Iterable[Any], like: Tensor, head: Any = None) -> str | None:
    """Why decoder layers cannot take their fast form; None where they can.

    Args:
        layers: transformers' decoder layers, or a draft's.
        like: a tensor on their device, in their dtype.
        head: the linear module behind them, where it is to be run in the fast form too.
    """
    return why_device(like) or misfit(layers, like.dtype, head)


def why_device(like: Tensor) -> str | None:
    """Why kernels cannot run on a tensor's device and dtype; None where they can."""
    if not like.is_cuda:
        return f"the weights are on the {like.device.type}, not on a GPU"
    if like.dtype != torch.bfloat16:
        return f"the weights are {str(like.dtype).removeprefix('torch.')}, not bfloat16"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(like.device)
    if capability < _LEAST_CAPABILITY:
        return f"the GPU's compute capability is {'.'.join(map(str, capability))}; the kernels need 8.0"
    return None


def misfit(layers: Iterable[Any], dtype: torch.dtype, head: Any = None) -> str | None:
    """What of decoder layers the kernels are not made for: modules that are not plain, a dtype, a width."""
    named = [] if head is None else [("the head", head)]
    for index, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        for module, names in ((attention, _ATTENTION), (mlp, _MLP)):
            named += [(f"{name} of layer {index}", getattr(module, name)) for name in names]
        width = len(attention.q_norm.weight)
        if not _HEAD_WIDTHS[0] <= width <= _HEAD_WIDTHS[1] or width & (width - 1):
            least, most = _HEAD_WIDTHS
            return f"the heads are {width} wide; the kernels take powers of two from {least} to {most}"
    for name, linear in named:
        found = why_projection(linear, dtype)
        if found is not None:
            return f"{name} is {found}"
    return None
