"""What training takes of a device's memory, estimated before it is taken."""

from __future__ import annotations

from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.config import TrainConfig
from alpamayo_dflash.train.loss import CHUNK_ELEMENTS

_FLOAT = 4
_KEPT_AFTER_A_STEP = 3 * _FLOAT  # of each number that is trained: gradient and AdamW's two moments
_CHUNK_BYTES = 20  # of a chunk's logits with their gradients, see `loss.CHUNK_ELEMENTS`


def training_bytes(draft: DFlashDraft, config: TrainConfig) -> int:
    """About what a run will take beside the draft, its embedding and its head, which are there already.

    Gradients, the optimizer's tensors, the head in bfloat16 and one step's activations: rows of blocks in the
    layers, the context's features, keys and values, and a chunk of logits.

    Args:
        draft: bound.
        config: the options.
    """
    shape = draft.config
    blocks = config.schedule.batch_size
    rows, slots = blocks * shape.block_size, blocks * (shape.context_len + shape.block_size)
    trained = sum(parameter.numel() for parameter in draft.parameters() if parameter.requires_grad)
    in_layers = rows * (8 * shape.hidden_size + 4 * shape.intermediate_size)
    in_layers += 4 * slots * shape.num_kv_heads * shape.head_dim
    states = 5 * blocks * shape.feature_size  # a response has a context more of them than blocks
    logits = min(CHUNK_ELEMENTS, rows * len(draft.head))
    head = len(draft.head) * shape.hidden_size * 2 if config.run.dtype == "bfloat16" else 0
    activations = _FLOAT * (shape.num_layers * in_layers + 4 * states)
    return trained * _KEPT_AFTER_A_STEP + head + activations + _CHUNK_BYTES * logits
