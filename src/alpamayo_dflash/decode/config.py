"""What a user sets about decoding. Nothing here imports torch, so that a command line can be made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alpamayo_dflash.common.options import check_at_least, check_positive, check_whole

LoopKind = Literal["auto", "host", "device"]
SentenceEnd = Literal["hint", "force", "off"]

# Below this temperature a token is the arg max of its logits (design, invariant 2).
GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen from the target's logits.

    Attributes:
        temperature: divides the logits; below 1e-5 decoding is greedy.
        top_p: nucleus mass: a token may be chosen if the mass of strictly more probable tokens is below it.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.6
    top_p: float = 0.98

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    @property
    def greedy(self) -> bool:
        """Whether a token is simply the arg max."""
        return self.temperature < GREEDY_BELOW


class Sampled:
    """A stage's config whose texts are sampled."""

    temperature: float
    top_p: float

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; raises ValueError where a value lies outside its range."""
        return Sampling(self.temperature, self.top_p)


@dataclass(frozen=True)
class Request:
    """What is asked of one prompt.

    Attributes:
        sampling: temperature and top_p.
        seed: with the prompt's key and a sample's index, fixes the noise.
        num_samples: S.
        max_new_tokens: the most tokens that a sample may emit.
        greedy_first: sample 0 is greedy, whatever the sampling, and sample k + 1 is what sample k would be.

    Raises:
        ValueError: a value outside its range.
    """

    sampling: Sampling
    seed: int = 0
    num_samples: int = 1
    max_new_tokens: int = 128
    greedy_first: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_whole(seed=self.seed)
        check_positive(num_samples=self.num_samples, max_new_tokens=self.max_new_tokens)

    @property
    def streams(self) -> list[int | None]:
        """By sample the number that its noise depends on; None where there is none, which makes it greedy."""
        if self.greedy_first:
            return [None, *range(self.num_samples - 1)]
        return list(range(self.num_samples))


@dataclass(frozen=True)
class DecodeConfig:
    """How the decoder runs. Nothing here changes what is written, except `sentence_end="force"`.

    Attributes:
        sentence_end: what happens at sentence ends. `hint` proposes the end marks after a period and lets
            the target decide; `force` is the first prototype's behaviour and is not lossless; `off` does
            neither (see `decode.stops`).
        row_width: run every verify pass at exactly this many rows (padded, or split), one sample after
            another, over keys of one length, so that in bf16 both loops round alike. None takes the rows
            as they come. End marks beyond a draft's block find room from two rows more than the block on.
        prompt_capacity: the longest prompt that the cache holds, tokens.
        loop: who walks. `device` runs whole rounds on the device, on a GPU as CUDA graphs; `host` walks in
            Python, a few reads a round. Both write the same. `auto` is device on a GPU and host elsewhere.
            What the device loop does not do (`force`; drafts that see every state, where their fused form
            does not run) runs on the host.
        vision_reuse_mib: memory for images seen before with their features, MiB, taken when the first prompt
            is read. An image that is the same in every value takes its features from there. 0 keeps none. Of
            R1's, an image takes 8 MiB; a stream wants room for the images of two windows.

    Raises:
        ValueError: a value outside its range.
    """

    sentence_end: SentenceEnd = "hint"
    row_width: int | None = None
    prompt_capacity: int = 4096
    loop: LoopKind = "auto"
    vision_reuse_mib: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.sentence_end not in ("hint", "force", "off"):
            raise ValueError(f"sentence_end is {self.sentence_end!r}; it must be 'hint', 'force' or 'off'")
        if self.loop not in ("auto", "host", "device"):
            raise ValueError(f"loop is {self.loop!r}; it must be 'auto', 'host' or 'device'")
        check_positive(row_width=self.row_width, prompt_capacity=self.prompt_capacity)
        check_whole(vision_reuse_mib=self.vision_reuse_mib)
        check_at_least(0, vision_reuse_mib=self.vision_reuse_mib)

    @property
    def lossless(self) -> bool:
        """Whether the output is what the target alone writes."""
        return self.sentence_end != "force"
