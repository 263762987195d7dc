"""Sums over label rows with their gradients in one pass: a chunk's logits are computed once and dropped.

Plain autograd would keep the logits of all rows, or compute each chunk's again for the gradient (a third of
the head's work). Sums over rows are sums over chunks, so each chunk's gradient can be taken as soon as its
sums are there, for each term apart, since what a term is multiplied by is known only after the last chunk
(as in fused linear cross-entropy: Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989). The backward pass only
scales.

Shapes: R label rows, S blocks, T terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Sums = tuple[tuple[Tensor, ...], Tensor]
"""The weighted sum of each term, with gradient, and the sum of each term's weights, [T], without."""


@dataclass(frozen=True)
class Part:
    """A run of whole blocks, and of their label rows."""

    blocks: slice
    rows: slice


def parts_of(row_ends: Sequence[int], most_rows: int) -> list[Part]:
    """Cut blocks into runs of at most `most_rows` label rows; a block of more is a run of its own.

    Args:
        row_ends: label rows up to the end of each block.
        most_rows: see above.
    """
    parts, first, begin, end = [], 0, 0, 0
    for block, following in enumerate(row_ends):
        if following - begin > most_rows and block > first:
            parts.append(Part(slice(first, block), slice(begin, end)))
            first, begin = block, end
        end = following
    return [*parts, Part(slice(first, len(row_ends)), slice(begin, end))]


def sums_with_gradients(
    sums_of: Callable[[Part, Sequence[Tensor], Sequence[Tensor]], Sums],
    parts: Sequence[Part],
    *,
    by_row: Sequence[Tensor],
    shared: Sequence[Tensor],
    graded: Sequence[int],
) -> Sums:
    """What `sums_of` gives over all parts, added up; its graph lives for one part at a time.

    Args:
        sums_of: the sums of one part, from its rows of `by_row` and from `shared`.
        parts: of `parts_of`.
        by_row: tensors [R, …].
        shared: tensors that every part reads, such as the head.
        graded: which of the terms can be differentiated. For each, gradients of the size of every tensor that
            needs one are kept until the backward pass.
    """
    *sums, masses = _Sums.apply(sums_of, parts, tuple(graded), len(by_row), *by_row, *shared)
    return tuple(sums), masses


class _Sums(torch.autograd.Function):
    """The graph's one node: gradients are made in its forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        sums_of: Callable[[Part, Sequence[Tensor], Sequence[Tensor]], Sums],
        parts: Sequence[Part],
        graded: tuple[int, ...],
        num_by_row: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[4:]
        by_row, shared = tensors[:num_by_row], _leaves(tensors[num_by_row:], needed[num_by_row:])
        wanted = [place for place, needs in enumerate(needed) if needs]
        gradients = [[torch.zeros_like(tensors[place]) for place in wanted] for _ in graded]
        totals: list[Tensor] = []
        for part in parts:
            rows = _leaves([tensor[part.rows] for tensor in by_row], needed)
            with torch.enable_grad():
                sums, masses = sums_of(part, rows, shared)
            leaves = [(*rows, *shared)[place] for place in wanted]
            for term, into in zip(graded if wanted else (), gradients, strict=False):
                found = torch.autograd.grad(sums[term], leaves, retain_graph=term != graded[-1])
                for place, total, gradient in zip(wanted, into, found, strict=True):
                    (total[part.rows] if place < num_by_row else total).add_(gradient)
            values = [*(each.detach() for each in sums), masses]
            totals = [a + b for a, b in zip(totals, values, strict=True)] if totals else values
        ctx.graded, ctx.wanted, ctx.gradients, ctx.num_tensors = graded, wanted, gradients, len(tensors)
        ctx.mark_non_differentiable(*(each for term, each in enumerate(totals) if term not in graded))
        ctx.set_materialize_grads(False)
        return tuple(totals)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        found: list[Tensor | None] = [None] * ctx.num_tensors
        for term, gradients in zip(ctx.graded, ctx.gradients, strict=True):
            scale = given[term]
            if scale is None:
                continue
            for place, gradient in zip(ctx.wanted, gradients, strict=True):
                before, scaled = found[place], gradient * scale
                found[place] = scaled if before is None else before + scaled
        return None, None, None, None, *found


def _leaves(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [t.detach().requires_grad_(needs) for t, needs in zip(tensors, needed, strict=False)]
