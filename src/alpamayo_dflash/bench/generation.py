"""transformers' own `generate` under a clock: the eager way, and with a static cache its compiled one.

Every text has one number of tokens, so that runs compare: it is sampled with the mask of trajectory ids, and
the only end that `generate` knows is an id that the mask never lets through.

Where its cache is static, `generate` compiles decoding by itself (on a GPU: `torch.compile`, mode
"reduce-overhead", which captures CUDA graphs). It takes a static cache of the caller's, and the one here is
made once and reset between texts: for one that lies elsewhere every graph would be captured again.

Shapes: S sample, P prompt tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    Qwen3VLForConditionalGeneration,
    StaticCache,
)

from alpamayo_dflash.bench.clocks import WARM, PartClock
from alpamayo_dflash.common.options import check_at_least
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.evaluate.reference import MaskIds, generation_config, repeated
from alpamayo_dflash.target.alpamayo import Alpamayo


@dataclass(frozen=True)
class Texts:
    """What is decoded.

    Attributes:
        tokens: of each text; the first one's logits are the prompt's.
        samples: S, the prompt repeated as a batch, images too (specification 7).
        temperature: of sampling.

    Raises:
        ValueError: fewer than two tokens, after which no pass is left, or no sample.
    """

    tokens: int
    samples: int
    temperature: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_at_least(2, tokens=self.tokens)
        check_at_least(1, samples=self.samples)

    @property
    def passes(self) -> int:
        """Passes of the model after the prompt's."""
        return self.tokens - 1


class Generator:
    """`generate` of texts of one length; marks the parts vision, prompt and decode on a clock.

    Args:
        target: whose tokens these are.
        model: its Qwen3-VL, or a Qwen3 of its vocabulary.
        texts: what is decoded.
        static: P, for a static cache of that prompt's texts and a compiled pass; None for the eager way.
        compile_config: how it is compiled; None for transformers' own choice.
    """

    def __init__(
        self,
        target: Alpamayo,
        model: Any,
        texts: Texts,
        *,
        static: int | None = None,
        compile_config: CompileConfig | None = None,
    ) -> None:
        self.texts = texts
        self._target, self._model = target, model
        self._config = _fixed_length(target, texts)
        self._cache: StaticCache | None = None
        if static is not None:
            text = model.config.get_text_config()
            self._cache = StaticCache(config=text, max_cache_len=static + texts.tokens)
            self._config.compile_config = compile_config

    def __call__(self, inputs: Mapping[str, Tensor], clock: PartClock) -> Any:
        """Write S texts after a prompt; returns what `generate` returns.

        Args:
            inputs: of one prompt, on the model's device.
            clock: has been started.
        """
        given: dict[str, Any] = repeated(inputs, self.texts.samples)
        prompt = given["input_ids"].shape[1]
        if self._cache is not None:
            if self._cache.get_seq_length():  # before its first use it has no tensors to reset
                self._cache.reset()
            given["past_key_values"] = self._cache
        mask = MaskIds(self._target.traj_ids, lambda: clock.mark("prompt"))
        with _vision_marked(self._model, clock):
            output = self._model.generate(
                **given, generation_config=self._config, logits_processor=LogitsProcessorList([mask])
            )
        clock.mark("decode")
        assert output.sequences.shape[1] == prompt + self.texts.tokens, "nothing but the limit ends a text"
        return output

    def decode_ms(self, inputs: Mapping[str, Tensor], repeats: int) -> list[float]:
        """Milliseconds from a prompt's logits to its texts' end, for each call after the untimed ones."""
        clock, times = PartClock(self._target.device), []
        for _ in range(WARM + repeats):
            clock.start()
            self(inputs, clock)
            times.append(clock.parts_ms()["decode"])
        return times[WARM:]


def _fixed_length(target: Alpamayo, texts: Texts) -> GenerationConfig:
    config = generation_config(
        target, temperature=texts.temperature, top_p=Sampling().top_p, max_new_tokens=texts.tokens
    )
    config.eos_token_id = [target.traj_ids.start]  # for None transformers takes the model's own
    return config


@contextlib.contextmanager
def _vision_marked(model: Any, clock: PartClock) -> Iterator[None]:
    """Gives the time inside a Qwen3-VL's vision tower to vision; what comes before it is the prompt's."""
    if not isinstance(model, Qwen3VLForConditionalGeneration):
        yield
        return
    visual = model.model.visual
    handles = (
        visual.register_forward_pre_hook(lambda *_: clock.mark("prompt")),
        visual.register_forward_hook(lambda *_: clock.mark("vision")),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
