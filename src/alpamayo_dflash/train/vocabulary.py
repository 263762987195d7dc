"""Which of the target's tokens a draft's reduced head keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alpamayo_dflash.target.config import AlpamayoConfig
from alpamayo_dflash.target.load import vlm_files
from alpamayo_dflash.target.tokenizer import load_tokenizer

_END_MARKS = ("<|cot_end|>", "<|traj_future_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Vocabulary:
    """The kept tokens.

    Attributes:
        token_ids: int64 [Vd], ascending.
        counted: how many of them stand in the training responses.
        filled: how many were added only to reach the size: they are no end marks and stand in no response.
    """

    token_ids: Tensor
    counted: int
    filled: int


def end_token_ids(target_folder: Path, *, local_files_only: bool = False) -> set[int]:
    """Ids of `<|cot_end|>`, `<|traj_future_start|>`, eos and the period, as far as the target has them.

    Args:
        target_folder: of the checkpoint.
        local_files_only: never ask the hub for its tokenizer.

    Raises:
        ValueError: the tokenizer is not found or does not fit the checkpoint.
    """
    config = AlpamayoConfig.from_file(target_folder / "config.json")
    files = vlm_files(config, target_folder, override=None, local_files_only=local_files_only)
    tokenizer = load_tokenizer(files.folder, config)
    ids = [tokenizer.token_to_id(name) for name in _END_MARKS]
    period = tokenizer.encode(".", add_special_tokens=False).ids
    return {token for token in (*ids, *(period if len(period) == 1 else ())) if token is not None}


def choose_tokens(
    counts: Mapping[int, int], size: int, *, vocab_size: int, always: Collection[int], masked: range
) -> Vocabulary:
    """Choose the tokens of a reduced head: `always`, then the commonest (of equals the lower id).

    Where there are fewer different tokens than `size`, the lowest unmasked ids fill up.

    Args:
        counts: how often each token stands in the training responses.
        size: Vd.
        vocab_size: V of the target.
        always: kept however rare.
        masked: ids that the target never writes in text; none of them is kept.

    Raises:
        ValueError: `size` is below the number of `always`, or above that of unmasked tokens.
    """
    allowed = vocab_size - len(masked)
    first = sorted(set(always) - set(masked))
    if not len(first) <= size <= allowed:
        raise ValueError(
            f"draft_vocab_size is {size}; it must be {len(first)} (the end marks) to {allowed} (the tokens "
            "that the target may write)"
        )
    ranked = sorted(counts.keys() - set(masked) - set(first), key=lambda token: (-counts[token], token))
    kept = {*first, *ranked[: size - len(first)]}
    counted = sum(counts.get(token, 0) > 0 for token in kept)
    others = (token for token in range(vocab_size) if token not in masked and token not in kept)
    fill = [token for token, _ in zip(others, range(size - len(kept)), strict=False)]
    return Vocabulary(torch.tensor(sorted(kept.union(fill))), counted, len(fill))
