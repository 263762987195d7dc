"""The tokenizer: Qwen's, extended by the checkpoint's tokens in their order (specification 2)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from tokenizers import AddedToken, Tokenizer

from alpamayo_dflash.common.fields import naming
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


Id_co = TypeVar("Id_co", int, int | None, covariant=True)


@dataclass(frozen=True)
class SpecialTokens(Generic[Id_co]):
    """Ids of the tokens that have a part in the prompt or in generation; each is `<|name|>` in text.

    In an Alpamayo all are there (`SpecialTokens[int]`); a bare Qwen3-VL's vocabulary has None for those that
    it lacks. `im_end` ends a turn, `endoftext` fills sequences that ended early.

    Attributes:
        period: the sentence's end; None if no single token is it.
        traj_ids: ids of `<i0>`, `<i1>` ..., which generation never emits; empty where there are none.
        ends: ids that end a turn; a borrowed model's are those of its generation config.
    """

    image_pad: int
    im_end: int
    endoftext: int
    cot_start: Id_co
    cot_end: Id_co
    traj_history_start: Id_co
    traj_history: Id_co
    traj_history_end: Id_co
    traj_future_start: Id_co
    traj_future: Id_co
    traj_future_end: Id_co
    route_start: Id_co
    route_end: Id_co
    question_start: Id_co
    question_end: Id_co
    answer_start: Id_co
    answer_end: Id_co
    vision_start: Id_co
    vision_end: Id_co
    im_start: Id_co
    period: int | None
    traj_ids: range
    ends: tuple[int, ...]

    @property
    def eos(self) -> int:
        """The id that ends a turn, the first of them."""
        return self.ends[0]

    @property
    def pad(self) -> int:
        """The id that fills sequences which ended early."""
        return self.endoftext

    @property
    def stops(self) -> list[Id_co | int]:
        """The ids after which a text has ended: the trajectory's start and the turn's ends."""
        return [self.traj_future_start, *self.ends]


_LOOKED_UP = [f.name for f in fields(SpecialTokens) if f.name not in ("period", "traj_ids", "ends")]


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
    tokenizer = read_tokenizer(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # transformers leaves `normalized` on for ordinary added tokens and off for special ones; so do we.
    tokenizer.add_tokens(
        [AddedToken(f"<i{index}>", normalized=True) for index in range(config.traj_vocab_size)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(f"<|{name}|>", normalized=False) for name in special_names(config)]
    )
    with naming(str(path)):
        check_ids(tokenizer, config)
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        ValueError: it is none, or none that can encode; the library raises bare exceptions and panics, and
            only here are they caught.
    """
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode(".", add_special_tokens=False)
    except BaseException as error:
        # A panic of the library's Rust is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path}: not a tokenizer ({error})") from None
    return tokenizer


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens[int]:
    """Look the special ids of an Alpamayo's tokenizer up.

    Raises:
        ValueError: the tokenizer lacks one; the message names it.
    """
    missing = [f"<|{name}|>" for name in _LOOKED_UP if tokenizer.token_to_id(f"<|{name}|>") is None]
    if missing:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}; a Chain-of-Causation target needs them")
    return cast("SpecialTokens[int]", found_tokens(tokenizer))


def found_tokens(tokenizer: Tokenizer, **known: int) -> SpecialTokens[int | None]:
    """Look up those special ids that a Qwen3-VL's tokenizer has; `known` ones come from elsewhere.

    Raises:
        ValueError: the tokenizer lacks Qwen's own.
    """
    find = tokenizer.token_to_id
    ids: dict[str, Any] = {name: find(f"<|{name}|>") for name in _LOOKED_UP} | known
    if None in (ids["im_end"], ids["endoftext"]):
        raise ValueError("the tokenizer has no <|im_end|> or no <|endoftext|>; it is not Qwen3-VL's")
    first = find("<i0>") or 0
    traj = sum(1 for _ in takewhile(lambda index: find(f"<i{index}>") == first + index, count()))
    period = tokenizer.encode(".", add_special_tokens=False).ids
    return SpecialTokens(
        **ids,
        period=period[0] if len(period) == 1 else None,
        traj_ids=range(first, first + traj),
        ends=(ids["im_end"],),
    )


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
    expected = {f"<i{place}>": config.traj_ids[place] for place in (0, config.traj_vocab_size - 1)}
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
