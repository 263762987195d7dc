"""How weights that read one input lie together: q, k, v; gate, up; and a head of padded rows.

The modules keep views with their own names and shapes, so that the weights can be run one by one or as one
product, and nothing is held twice.

Shapes: R rows, I inputs, N outputs, J parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Siblings that read the same input.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# A head of 155,697 rows makes cuBLAS fall to a quarter of the bandwidth (docs/log.md).
HEAD_MULTIPLE = 64


def hooked(module: nn.Module) -> bool:
    """Whether something runs before or after the module's own forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def why_module(module: nn.Module, plain: type[nn.Module]) -> str | None:
    """Why a module must be called, and its weight alone is not all of it; None where it is.

    Args:
        module: an adapter or a quantised layer has a weight too.
        plain: the class whose forward the weight tells whole.
    """
    if type(module) is not plain:
        return type(module).__name__
    return f"{plain.__name__} with hooks" if hooked(module) else None


def not_plain(linear: Any, *, biased: bool = False) -> str | None:
    """What a projection is, if it is more than a weight: an adapter and a quantised layer have one too.

    Args:
        linear: the module.
        biased: whether it must have a bias, or must have none.
    """
    name = type(linear).__name__
    if (getattr(linear, "bias", None) is not None) != biased:
        return f"{name} {'without' if biased else 'with'} a bias"
    why = why_module(linear, nn.Linear)
    if why is not None:
        return why
    weight = linear.weight
    if type(weight.data) is not Tensor:
        return f"{name} of a {type(weight.data).__name__}"
    return None if weight.is_contiguous() else f"{name} whose weight does not lie row by row"


def fused_groups(module: nn.Module) -> list[list[Any]]:
    """The groups of a module's children that lie together."""
    children: dict[str, Any] = dict(module.named_children())
    return [[children[name] for name in names] for names in FUSED if all(name in children for name in names)]


def padded_rows(rows: int) -> int:
    """The rows that a head of `rows` rows is stored with."""
    return math.ceil(rows / HEAD_MULTIPLE) * HEAD_MULTIPLE


def joined(weights: Sequence[Tensor]) -> Tensor | None:
    """Several weights [N_i, K] as one view [sum N_i, K] where they lie one behind the other; else None."""
    first, rows = weights[0], sum(len(weight) for weight in weights)
    offset = first.storage_offset()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and weight.is_contiguous() and weight.storage_offset() == offset):
            return None
        offset += weight.numel()
    return first.detach().as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())


def padded(head: Tensor) -> Tensor:
    """A head with the rows that it is padded by, where its storage has them; else the head itself."""
    rows, width = padded_rows(len(head)), head.shape[1]
    enough = head.untyped_storage().nbytes() >= (head.storage_offset() + rows * width) * head.element_size()
    if not enough or not head.is_contiguous():
        return head.detach()
    return head.detach().as_strided((rows, width), head.stride(), head.storage_offset())


@torch.no_grad()
def share_groups(root: nn.Module) -> None:
    """Move the weights of each fused group under a module into one storage, values and parameters the same.

    Groups that lie together are left where they are. At most one group is held twice at a time.
    """
    for module in root.modules():
        for group in fused_groups(module):
            weights = [linear.weight for linear in group]
            if joined([weight.data for weight in weights]) is not None:
                continue
            storage = torch.cat([weight.data for weight in weights])
            for weight, view in zip(weights, storage.split([len(weight) for weight in weights]), strict=True):
                weight.data = view


@torch.no_grad()
def share_storage(vlm: Any, *decoders: nn.Module) -> None:
    """Move a loaded Qwen3-VL's text weights into shared storage, group by group, values unchanged.

    The parameters stay the same objects; only where they lie changes. A head that is tied to the embedding
    stays where it is. At most one group is held twice at a time.

    Args:
        vlm: transformers' Qwen3-VL for conditional generation.
        decoders: others whose layers are laid out likewise.

    Raises:
        ValueError: a projection is not a plain linear layer without bias; nothing has been moved then.
    """
    text = vlm.model.language_model
    roots = (text.layers, *decoders)
    groups = [group for root in roots for module in root.modules() for group in fused_groups(module)]
    for group in groups:
        for linear in group:
            found = not_plain(linear)
            if found is not None:
                raise ValueError(
                    f"fuse=True: a projection is a {found}; only plain nn.Linear can be moved (merge "
                    "adapters first, or leave fuse off)"
                )
    for root in roots:
        share_groups(root)
    head: Tensor = vlm.lm_head.weight
    if head is not text.embed_tokens.weight:
        storage = head.data.new_zeros(padded_rows(len(head)), head.shape[1])
        storage[: len(head)] = head.data
        head.data = storage[: len(head)]


def allocate(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace every meta parameter by uninitialised storage on the device, as `load_weights` lays it out."""

    def rows(count: int, like: Tensor) -> Tensor:
        return torch.empty(count, *like.shape[1:], device=device, dtype=dtype)

    for module in model.modules():
        for parts in fused_groups(module):
            counts = [part.weight.shape[0] for part in parts]
            storage = rows(sum(counts), parts[0].weight)
            for part, view in zip(parts, storage.split(counts), strict=True):
                part.weight = nn.Parameter(view)
        head: Any = dict(module.named_children()).get("lm_head")
        if head is not None:
            count = head.weight.shape[0]
            storage = rows(padded_rows(count), head.weight)
            storage[count:] = 0
            head.weight = nn.Parameter(storage[:count])
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device=device, dtype=dtype)))


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
        from alpamayo_dflash.kernels.product import product

        return product(x_RI, self.weights[0]) if len(self.weights) == 1 else self(x_RI).unsqueeze(0)

    def __call__(self, x_RI: Tensor) -> Tensor:
        """X @ weight.T, [R, N]."""
        from alpamayo_dflash.kernels.product import whole_product

        products = [whole_product(x_RI, weight) for weight in self.weights]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def gated(self, x_RI: Tensor) -> Tensor:
        """silu(x @ gate.T) · (x @ up.T), [R, N/2], where the weights are gate's and up's."""
        from alpamayo_dflash.kernels.product import gated_product
        from alpamayo_dflash.kernels.rows import gate

        if len(self.weights) == 1:
            return gated_product(x_RI, self.weights[0])
        return gate(self(x_RI))


def fused_linear(parts: Sequence[Any]) -> Linear:
    """The product of several linear modules that read one input."""
    return Linear(*(part.weight.detach() for part in parts))


class BiasedLinear:
    """A weight with a bias, and how many rows (an image's patches) are multiplied: by the library.

    Args:
        weight: [N, I].
        bias: [N], added before the product is rounded.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x_RI: Tensor) -> Tensor:
        """X @ weight.T + bias, [R, N]."""
        return functional.linear(x_RI, self.weight, self.bias)

    def gelu_tanh(self, x_RI: Tensor, *, rounded: bool = True) -> Tensor:
        """The product's GELU in its tanh form, [R, N].

        Args:
            x_RI: the rows.
            rounded: round the product before the GELU, as the plain form does. Otherwise the product's own
                epilogue takes the GELU of the unrounded sums, which saves a pass over [R, N]; on a GPU only.
        """
        if rounded:
            return functional.gelu(self(x_RI), approximate="tanh")
        assert x_RI.is_cuda, "a CPU's epilogue has the other GELU"
        return torch._addmm_activation(self.bias, x_RI, self.weight.t(), use_gelu=True)


def biased_linear(module: Any) -> BiasedLinear:
    """The product of a linear module, or of a convolution whose steps are its size."""
    return BiasedLinear(module.weight.detach().flatten(1), module.bias.detach())
