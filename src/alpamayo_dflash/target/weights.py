"""What a weight is, how it lies in memory and how it is multiplied: the one place that knows its format.

Weights that read one input lie together: q, k, v; gate, up; and a head has padded rows. The modules keep
views with their own names and shapes, so that the weights can be run one by one or as one product, and
nothing is held twice. A projection is a plain `nn.Linear` or one in e4m3 (`target.fp8.FP8Linear`).

Shapes: R rows, I inputs, N outputs, J parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from alpamayo_dflash.kernels.fp8 import MULTIPLE, CastRows
from alpamayo_dflash.target.fp8 import FP8Linear

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


def plain_parameters(module: nn.Module) -> list[nn.Parameter]:
    """A module's parameters but for those of layers in e4m3, whose types are their own."""
    parts = (part for part in module.modules() if not isinstance(part, FP8Linear))
    return [parameter for part in parts for parameter in part.parameters(recurse=False)]


def why_projection(linear: Any, dtype: torch.dtype, *, biased: bool = False) -> str | None:
    """Why a projection must be called, being neither plain in this dtype nor in e4m3; None if it need not.

    Args:
        linear: the module.
        dtype: that a plain weight must have, and a bias.
        biased: whether it must have a bias, or must have none.
    """
    if not isinstance(linear, FP8Linear):
        found = not_plain(linear, biased=biased)
        if found is not None:
            return f"a {found}"
        odd = [tensor.dtype for tensor in linear.parameters() if tensor.dtype != dtype]
        return f"{odd[0]}, the embedding {dtype}" if odd else None
    if (linear.bias is not None) != biased:
        return f"an FP8Linear {'without' if biased else 'with'} a bias"
    if linear.bias is not None and linear.bias.dtype != dtype:
        return f"an FP8Linear whose bias is {linear.bias.dtype}, the embedding {dtype}"
    if (why := why_module(linear, FP8Linear)) is not None:
        return f"a {why}"
    outputs, inputs = linear.weight.shape
    if inputs % MULTIPLE or outputs % MULTIPLE:
        return f"an FP8Linear of {inputs} inputs and {outputs} outputs, no multiples of {MULTIPLE}"
    return None


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
            names = _joint(parts) if all(part.weight.is_meta for part in parts) else ()
            for name in names:
                tensors = [getattr(part, name) for part in parts]
                counts = [len(tensor) for tensor in tensors]
                kind = tensors[0].dtype if len(names) > 1 else dtype
                storage = torch.empty(sum(counts), tensors[0].shape[1], device=device, dtype=kind)
                for part, view in zip(parts, storage.split(counts), strict=True):
                    setattr(part, name, nn.Parameter(view, requires_grad=len(names) == 1))
        head: Any = dict(module.named_children()).get("lm_head")
        if head is not None:
            count = head.weight.shape[0]
            storage = rows(padded_rows(count), head.weight)
            storage[count:] = 0
            head.weight = nn.Parameter(storage[:count])
        fp8 = isinstance(module, FP8Linear)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                kind = parameter.dtype if fp8 and name != "bias" else dtype
                made = torch.empty(parameter.shape, device=device, dtype=kind)
                setattr(module, name, nn.Parameter(made, requires_grad=not fp8))


def _joint(parts: Sequence[nn.Module]) -> tuple[str, ...]:
    """What of the modules of a group lies together: nothing where some are in e4m3 and some are not."""
    fp8 = [isinstance(part, FP8Linear) for part in parts]
    if not any(fp8):
        return ("weight",)
    return ("weight", "weight_scale") if all(fp8) else ()


Rows = Tensor | CastRows
"""What is multiplied: rows [R, I], or these as the norm in front cast them, where a product takes that."""


class Product(Protocol):
    """A weight without bias, or several that read one input, and how they are multiplied on a GPU."""

    @property
    def by_row(self) -> bool:
        """Whether `CastRows` are taken."""
        ...

    def parts(self, x: Any, /) -> Tensor:
        """X @ weight.T as parts [J, R, N] whose sum is the product, for kernels that sum as they read."""
        ...

    def __call__(self, x: Any, /) -> Tensor:
        """X @ weight.T, [R, N]."""
        ...

    def gated(self, x: Any, /) -> Tensor:
        """silu(x @ gate.T) · (x @ up.T), [R, N/2], where the weights are gate's and up's."""
        ...


class Linear:
    """A weight without bias, and how it is multiplied on a GPU.

    Args:
        weights: one, or several [N_i, I] that read the same input. Those that lie together
            (`target.storage`) are run as one product, others one by one; nothing is copied.
    """

    def __init__(self, *weights: Tensor) -> None:
        one = joined(weights)
        self.weights = weights if one is None else (one,)

    @property
    def by_row(self) -> bool:
        """See Product."""
        return False

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


class FP8Product:
    """A weight in e4m3, and how it is multiplied on a GPU: by rows that are cast to e4m3.

    Args:
        weight: e4m3 [N, I].
        scales: float32 [N, 1].
        input_scale: float32 [], static; None for a scale of each row.
    """

    def __init__(self, weight: Tensor, scales: Tensor, input_scale: Tensor | None) -> None:
        self._weight, self._scales, self._input_scale = weight, scales, input_scale

    @property
    def by_row(self) -> bool:
        """Whether rows are cast by their own scales, as the norm in front of them can do."""
        return self._input_scale is None

    def parts(self, x: Rows) -> Tensor:
        """See Product."""
        from alpamayo_dflash.kernels.fp8_fused import product_parts

        return product_parts(self._cast(x), self._weight, self._scales)

    def __call__(self, x: Rows) -> Tensor:
        """See Product."""
        parts = self.parts(x)
        return parts[0] if len(parts) == 1 else parts.sum(0).to(x.dtype)

    def gated(self, x: Rows) -> Tensor:
        """See Product."""
        from alpamayo_dflash.kernels.fp8_fused import gated

        return gated(self._cast(x), self._weight, self._scales)

    def gated_cast(self, x: Rows) -> CastRows:
        """`gated`, cast by row."""
        from alpamayo_dflash.kernels.fp8_fused import gated_cast

        return gated_cast(self._cast(x), self._weight, self._scales)

    def _cast(self, x: Rows) -> CastRows:
        return _cast_rows(x, self._input_scale)


class SeparateProducts:
    """Products of one input that are multiplied one by one: some in e4m3, or with other input scales.

    Args:
        products: in the order of their columns.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        self._products = products

    @property
    def by_row(self) -> bool:
        """See Product."""
        return all(product.by_row for product in self._products)

    def parts(self, x_RI: Tensor) -> Tensor:
        """See Product."""
        return self(x_RI).unsqueeze(0)

    def __call__(self, x_RI: Tensor) -> Tensor:
        """See Product."""
        return torch.cat([product(x_RI) for product in self._products], dim=-1)

    def gated(self, x_RI: Tensor) -> Tensor:
        """See Product."""
        from alpamayo_dflash.kernels.rows import gate

        return gate(self(x_RI))


def fused_linear(parts: Sequence[Any]) -> Product:
    """The product of several linear modules that read one input."""
    if not any(isinstance(part, FP8Linear) for part in parts):
        return Linear(*(part.weight.detach() for part in parts))
    if len(parts) == 1:
        return _fp8_product(parts[0], parts[0].weight.detach(), parts[0].weight_scale.detach())
    weight = scales = None
    # Static scales are each module's own, and their equality would have to be read from the device.
    if all(isinstance(part, FP8Linear) and part.input_scale is None for part in parts):
        weight = joined([part.weight.detach() for part in parts])
        scales = joined([part.weight_scale.detach() for part in parts])
    if weight is None or scales is None:
        return SeparateProducts([fused_linear((part,)) for part in parts])
    return _fp8_product(parts[0], weight, scales)


def _fp8_product(linear: FP8Linear, weight: Tensor, scales: Tensor) -> FP8Product:
    return FP8Product(weight, scales, None if linear.input_scale is None else linear.input_scale.detach())


def mlp_parts(gate_up: Product, down: Product, x: Rows) -> Tensor:
    """An MLP's output as parts (`Product.parts`): down of silu(gate) · up."""
    if down.by_row and isinstance(gate_up, FP8Product):
        return down.parts(gate_up.gated_cast(x))
    return down.parts(gate_up.gated(x))


def add_norm_for(
    product: Product | None,
    hidden_RC: Tensor,
    parts_JRC: Tensor | None,
    norm: tuple[Tensor, float],
    normed_RC: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """`kernels.rows.add_norm`, whose norm is cast where the product that reads it takes it so.

    Args:
        product: what reads the norm; None for another.
        hidden_RC: see `add_norm`.
        parts_JRC: likewise.
        norm: its weight [C] and eps.
        normed_RC: where to write the norm, which is not cast then.

    Returns:
        the sum [R, C], and its norm as the product's rows.
    """
    from alpamayo_dflash.kernels.rows import add_norm

    if product is None or not product.by_row or normed_RC is not None:
        return add_norm(hidden_RC, parts_JRC, *norm, normed_RC)
    from alpamayo_dflash.kernels.fp8_triton import add_norm_cast

    return add_norm_cast(hidden_RC, parts_JRC, *norm)


class BiasedLinear:
    """A weight with a bias, and how many rows (an image's patches) are multiplied: by the library.

    Args:
        weight: [N, I].
        bias: [N], added before the product is rounded.
    """

    by_row = False

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x_RI: Any) -> Tensor:
        """X @ weight.T + bias, [R, N]."""
        return functional.linear(x_RI, self.weight, self.bias)

    def gelu_tanh(self, x_RI: Any, *, rounded: bool = True) -> Tensor:
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


class FP8BiasedLinear:
    """A linear layer in e4m3 with a bias, and how many rows are multiplied.

    Args:
        linear: the layer, whose tensors are read where they lie.
    """

    def __init__(self, linear: FP8Linear) -> None:
        assert linear.bias is not None
        self.weight, self.bias = linear.weight.detach(), linear.bias.detach()
        self._scales = linear.weight_scale.detach()
        self._input_scale = None if linear.input_scale is None else linear.input_scale.detach()

    @property
    def by_row(self) -> bool:
        """Whether `CastRows` are taken; see `FP8Product`."""
        return self._input_scale is None

    def __call__(self, x: Rows) -> Tensor:
        """X @ weight.T + bias, [R, N]."""
        from alpamayo_dflash.kernels.fp8_fused import product

        rows = _cast_rows(x, self._input_scale)
        return product(rows.values, rows.scales, self.weight, self._scales, rows.dtype, self.bias)

    def gelu_tanh(self, x: Rows, *, rounded: bool = True) -> Tensor:
        """The product's GELU in its tanh form, [R, N]; the product is rounded before it in any case.

        Args:
            x: the rows.
            rounded: as `BiasedLinear.gelu_tanh` has it; the library has no such epilogue for scales a row.
        """
        del rounded
        return functional.gelu(self(x), approximate="tanh")

    def gelu_tanh_cast(self, x: Rows) -> CastRows:
        """`gelu_tanh`, cast by row."""
        from alpamayo_dflash.kernels.fp8_triton import cast_gelu

        product_RN = self(x)
        return CastRows(*cast_gelu(product_RN), product_RN.dtype)


def gelu_mlp(
    up: BiasedLinear | FP8BiasedLinear, down: BiasedLinear | FP8BiasedLinear, x: Rows, *, rounded: bool
) -> Tensor:
    """An MLP with biases and a GELU in its tanh form between, [R, N].

    Args:
        up: its first layer.
        down: its second.
        x: the rows, as `up` takes them.
        rounded: see `BiasedLinear.gelu_tanh`.
    """
    if down.by_row and isinstance(up, FP8BiasedLinear):
        return down(up.gelu_tanh_cast(x))
    return down(up.gelu_tanh(x, rounded=rounded))


def _cast_rows(x: Rows, input_scale: Tensor | None) -> CastRows:
    """Rows as a product in e4m3 takes them: cast here, if not in front."""
    from alpamayo_dflash.kernels.fp8_fused import cast

    if isinstance(x, CastRows):
        assert input_scale is None
        return x
    return CastRows(*cast(x, input_scale), x.dtype)


def biased_linear(module: Any) -> BiasedLinear | FP8BiasedLinear:
    """The product of a linear module, or of a convolution whose steps are its size."""
    if isinstance(module, FP8Linear):
        return FP8BiasedLinear(module)
    return BiasedLinear(module.weight.detach().flatten(1), module.bias.detach())
