"""The steps of `decode.steps` by the kernels of `decode.step_kernels`: one launch each."""

from __future__ import annotations

import triton
from torch import Tensor

from alpamayo_dflash.decode.step_kernels import accept_kernel, propose_kernel
from alpamayo_dflash.decode.steps import Marks, State


def propose(
    state: State, marks: Marks, columns: Tensor | None, finite: Tensor | None, token_ids: Tensor | None
) -> None:
    """As `steps.propose`."""
    nothing = state.tokens
    propose_kernel[(state.samples,)](
        state.tokens,
        state.lengths,
        state.done,
        state.pending,
        state.limit,
        state.bases,
        nothing if columns is None else columns,
        nothing if finite is None else finite,
        nothing if token_ids is None else token_ids,
        state.row_tokens,
        state.row_positions,
        state.next_positions,
        state.row_slots,
        state.seen,
        state.proposed,
        state.drafted,
        state.failed,
        state.per_sample,
        state.slots,
        marks.cot_end,
        marks.traj_future_start,
        marks.eos,
        marks.period,
        DRAFT=columns is not None,
        REDUCED=token_ids is not None,
        BLOCK=state.block,
        BLOCK_E=triton.next_power_of_2(state.slots),
        num_warps=4,
    )


def accept(state: State, marks: Marks, columns: Tensor, settled: Tensor, finite: Tensor) -> None:
    """As `steps.accept`."""
    accept_kernel[(state.samples,)](
        state.tokens,
        state.lengths,
        state.previous,
        state.done,
        state.pending,
        state.limit,
        state.row_tokens,
        columns,
        settled,
        finite,
        state.proposed,
        state.drafted,
        state.failed,
        state.report,
        state.per_sample,
        marks.traj_future_start,
        marks.eos,
        BLOCK=state.block,
        num_warps=1,
    )
