"""The tokenizer: Qwen's, extended by the checkpoint's tokens in their order (specification 2)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from tokenizers import AddedToken, Tokenizer

from alpamayo_dflash.target.config import AlpamayoConfig

# 29 names give 28 new ids: image_pad is Qwen's own.
R1_NAMES = (
    "prompt_start",
    "prompt_end",
    "image_start",
    "image_pre_tkn",
    "image_end",
    "traj_history_start",
    "traj_history_pre_tkn",
    "traj_history_end",
    "cot_start",
    "cot_end",
    "meta_action_start",
    "meta_action_end",
    "traj_future_start",
    "traj_future_pre_tkn",
    "traj_future_end",
    "traj_history",
    "traj_future",
    "image_pad",
    "vectorized_wm",
    "vectorized_wm_start",
    "vectorized_wm_end",
    "vectorized_wm_pre_tkn",
    "route_start",
    "route_pad",
    "route_end",
    "question_start",
    "question_end",
    "answer_start",
    "answer_end",
)
_PADDING_IN_1_5 = {
    name: f"_padding_{index}"
    for index, name in enumerate(
        (
            "image_pre_tkn",
            "traj_history_pre_tkn",
            "meta_action_start",
            "meta_action_end",
            "traj_future_pre_tkn",
            "vectorized_wm",
            "vectorized_wm_start",
            "vectorized_wm_end",
            "vectorized_wm_pre_tkn",
        )
    )
}
# Roles in config.json's traj_token_ids and the special token of each.
ROLES = {
    role: f"traj_{role}"
    for role in ("history", "future", "history_start", "future_start", "history_end", "future_end")
}


class EndTokens(Protocol):
    """The ids that decoding looks at; None for a token that the tokenizer does not have."""

    @property
    def image_pad(self) -> int:
        """Stands for an image's features."""
        ...

    @property
    def eos(self) -> int:
        """Ends a turn."""
        ...

    @property
    def pad(self) -> int:
        """Fills sequences which ended early."""
        ...

    @property
    def cot_end(self) -> int | None:
        """Ends the Chain-of-Causation."""
        ...

    @property
    def traj_future_start(self) -> int | None:
        """Ends the text; the trajectory begins."""
        ...


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that have a part in the prompt or in generation; each is `<|name|>` in text.

    `eos` is `<|im_end|>` and `pad` is `<|endoftext|>`.
    """

    cot_start: int
    cot_end: int
    traj_history_start: int
    traj_history: int
    traj_history_end: int
    traj_future_start: int
    traj_future: int
    traj_future_end: int
    route_start: int
    route_end: int
    question_start: int
    question_end: int
    answer_start: int
    answer_end: int
    image_pad: int
    vision_start: int
    vision_end: int
    im_start: int
    im_end: int
    endoftext: int

    @property
    def eos(self) -> int:
        """The id that ends a turn."""
        return self.im_end

    @property
    def pad(self) -> int:
        """The id that fills sequences which ended early."""
        return self.endoftext


def special_names(config: AlpamayoConfig) -> list[str]:
    """Names of the special tokens in the order in which they are appended."""
    if not config.add_special_tokens:
        return list(ROLES.values())
    if config.version == "1.5":
        return [_PADDING_IN_1_5.get(name, name) for name in R1_NAMES]
    return list(R1_NAMES)


def load_tokenizer(folder: Path, config: AlpamayoConfig) -> Tokenizer:
    """Read the base tokenizer and append the checkpoint's tokens.

    Args:
        folder: holds Qwen's tokenizer.json.
        config: the checkpoint's.

    Raises:
        ValueError: the file is missing, or the ids do not come out as the checkpoint has them.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the tokenizer comes from vlm_name_or_path")
    tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # transformers leaves `normalized` on for ordinary added tokens and off for special ones; so do we.
    tokenizer.add_tokens(
        [AddedToken(f"<i{index}>", normalized=True) for index in range(config.traj_vocab_size)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(f"<|{name}|>", normalized=False) for name in special_names(config)]
    )
    check_ids(tokenizer, config)
    return tokenizer


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Look the special ids up.

    Raises:
        ValueError: the tokenizer lacks one; the message names it.
    """
    ids: dict[str, int] = {}
    missing = []
    for name in (f.name for f in fields(SpecialTokens)):
        found = tokenizer.token_to_id(f"<|{name}|>")
        if found is None:
            missing.append(f"<|{name}|>")
        else:
            ids[name] = found
    if missing:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}; a Chain-of-Causation target needs them")
    return SpecialTokens(**ids)


def check_ids(tokenizer: Tokenizer, config: AlpamayoConfig) -> None:
    """Compare the extended tokenizer's size and ids with the checkpoint's.

    Raises:
        ValueError: they differ; the message names both.
    """
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size != config.vocab_size:
        raise ValueError(
            f"vocab_size is {config.vocab_size} in the checkpoint's config.json, but the tokenizer of "
            f"{config.vlm_name_or_path!r} extended by {config.traj_vocab_size} trajectory tokens and the "
            f"special tokens has {size}"
        )
    first, last = config.traj_token_start_idx, config.traj_token_start_idx + config.traj_vocab_size - 1
    expected = {"<i0>": first, f"<i{config.traj_vocab_size - 1}>": last}
    expected |= {
        f"<|{ROLES[role]}|>": index for role, index in config.traj_token_ids.items() if role in ROLES
    }
    wrong = [
        f"{token} is {tokenizer.token_to_id(token)}, the checkpoint says {index}"
        for token, index in expected.items()
        if tokenizer.token_to_id(token) != index
    ]
    if wrong:
        raise ValueError(f"the tokenizer's ids do not fit the checkpoint: {'; '.join(wrong)}")
