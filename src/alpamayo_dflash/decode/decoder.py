"""From a window to a Chain-of-Causation and a trajectory, with or without a draft.

Shapes: S sample, N way-points, V vocabulary, C hidden.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.common.machine import current, synchronise
from alpamayo_dflash.common.options import check_positive
from alpamayo_dflash.decode.config import MOST_BLOCK, DecodeConfig, Request, Sampling
from alpamayo_dflash.decode.handover import Handover, hand_over
from alpamayo_dflash.decode.loop import Decode, Drafter, Sample, autoregressive, speculative
from alpamayo_dflash.decode.noise import flow_noise
from alpamayo_dflash.decode.observer import Observer
from alpamayo_dflash.decode.proposer import Proposer
from alpamayo_dflash.decode.round_device import Engine, Written
from alpamayo_dflash.decode.stops import StopReason, stop_rules
from alpamayo_dflash.decode.verify import Prefilled, Verifier
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.borrow import borrow
from alpamayo_dflash.target.expert import ActionPrefix
from alpamayo_dflash.target.prompt import Prompt
from alpamayo_dflash.target.vlm import Qwen3VLTarget


@dataclass(frozen=True)
class Timings:
    """Wall time of one `generate`, milliseconds.

    Attributes:
        prefill_ms: vision and the prompt's pass; 0 for a prompt that had been read before.
        decode_ms: from the prompt's logits to the last token, and the cache made whole for the expert.
        action_ms: the action expert and the trajectory.
        total_ms: everything, images to prompt included.
    """

    prefill_ms: float
    decode_ms: float
    action_ms: float
    total_ms: float


@dataclass(frozen=True)
class Result:
    """What `SpeculativeDecoder.generate` returns, S samples of one window.

    Attributes:
        coc: the Chain-of-Causation texts.
        token_ids: the emitted ids, through `<|traj_future_start|>`, eos or the limit.
        stops: why each sample ended.
        pred_xyz: float32 [S, N, 3] metres in the ego frame at t0; None if no trajectories were wanted.
        pred_rot: float32 [S, N, 3, 3], or None.
        rounds: verify passes after the prompt's (closing rows, which have no logits, are not counted).
        emitted: tokens after the first, over all samples: numerator of the acceptance length.
        passes: verify passes that a sample took part in, over all samples: its denominator. Pool both over
            windows.
        drafted: tokens that the draft proposed and the target verified, over all samples: denominator of
            the acceptance rate. End marks put in by rule are not the draft's.
        accepted: how many of those the target chose too.
        draft_failures: texts and rounds in which the draft's logits were not finite.
        lossless: whether the mode guarantees the target's own output (all but `force`).
        timings: wall times.
    """

    coc: list[str]
    token_ids: list[list[int]]
    stops: list[StopReason]
    pred_xyz: Tensor | None
    pred_rot: Tensor | None
    rounds: int
    emitted: int
    passes: int
    drafted: int
    accepted: int
    draft_failures: int
    lossless: bool
    timings: Timings

    @property
    def acceptance_length(self) -> float:
        """Tokens after the first over verify passes, pooled over samples; 0 if no pass was needed."""
        return self.emitted / self.passes if self.passes else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafted tokens over drafted tokens; 0 if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0


class SpeculativeDecoder:
    """Decodes a target with a draft; without one, autoregressively. The text is the same either way.

    Args:
        target: the model.
        draft: proposes blocks; None for the autoregressive loop.
        config: see DecodeConfig.

    Attributes:
        verifier: the target with its cache, which holds one prompt at a time.

    Raises:
        ValueError: the draft does not fit the target.
    """

    def __init__(
        self, target: Qwen3VLTarget, draft: Proposer | None = None, config: DecodeConfig | None = None
    ) -> None:
        self.target = target
        self.draft = draft
        self.config = config or DecodeConfig()
        if draft is not None:
            if not 2 <= draft.block_size <= MOST_BLOCK:
                raise ValueError(
                    f"the draft's block_size is {draft.block_size}; it must be 2 to {MOST_BLOCK}"
                )
            draft.bind(target.embedding, target.head, target.num_layers)
        self._drafter = Drafter(draft) if draft is not None else None
        self.verifier = Verifier(
            target,
            taps=draft.taps if draft is not None else (),
            context_len=draft.context_len if draft is not None else 0,
            prompt_capacity=self.config.prompt_capacity,
            row_width=self.config.row_width,
        )
        self.rules = stop_rules(target, self.config)
        self.engine = Engine(self.verifier, self.rules, draft)
        self._finished: tuple[Prefilled, Decode | Written] | None = None

    def prefill(self, window: Window | Prompt) -> Prefilled:
        """Read a prompt, so that `generate` can start from it any number of times.

        It stays good until this decoder reads another.

        Raises:
            ValueError: the prompt is longer than `prompt_capacity`.
        """
        return self.verifier.prefill(self._prompt(window))

    def generate(
        self,
        window: Window | Prompt | Prefilled,
        *,
        temperature: float = 0.6,
        top_p: float = 0.98,
        num_traj_samples: int = 1,
        seed: int = 0,
        max_new_tokens: int = 128,
        observer: Observer | None = None,
        trajectories: bool | None = None,
        action_noise: Tensor | None = None,
    ) -> Result:
        """Write the Chain-of-Causation and predict the trajectory.

        Args:
            window: a window, its prompt, or a prompt that this decoder has read.
            temperature: divides the logits; below 1e-5 greedy.
            top_p: nucleus mass.
            num_traj_samples: S.
            seed: with the window's key, fixes every random choice.
            max_new_tokens: the most tokens that a sample may emit.
            observer: watches; see `decode.observer`.
            trajectories: whether to run the action expert; None means if the target has one and the prompt
                an ego history.
            action_noise: float32 [S, N, 2], where flow matching starts; None draws it from the seed.

        Raises:
            ValueError: an option outside its range, a prompt longer than the cache, or a target whose logits
                are not finite.
        """
        request = Request(Sampling(temperature, top_p), seed, num_traj_samples, max_new_tokens)
        check_positive(num_traj_samples=num_traj_samples, max_new_tokens=max_new_tokens)
        start = before = read = self._now_ms()
        self._finished = None
        if isinstance(window, Prefilled):
            prefilled = window
        else:
            prompt = self._prompt(window)
            before = self._now_ms()
            prefilled = self.prefill(prompt)
            read = self._now_ms()
        driver = self._driver(prefilled.prompt, trajectories)
        with torch.inference_mode(), current(self.target.device):
            decode = self._write(prefilled, request, observer or Observer())
        written = self._now_ms()
        self._finished = (prefilled, decode)
        xyz = rot = None
        if driver is not None:
            xyz, rot = self._act(driver, prefilled, decode, seed, action_noise)
        end = self._now_ms()
        timings = Timings(read - before, written - read, end - written, end - start)
        return self._result(decode, xyz, rot, timings)

    def _write(self, prefilled: Prefilled, request: Request, observer: Observer) -> Decode | Written:
        """Write the texts, on the device or from the host."""
        if self._on_device():
            return self.engine.write(prefilled, request, observer)
        self.verifier.begin(prefilled, request.num_samples * (request.max_new_tokens + MOST_BLOCK))
        decode = Decode(self.verifier, prefilled, request, rules=self.rules, observer=observer)
        # All samples together, or at one row width one after another: there, sharing rows would order the
        # cache's slots differently in the two loops, and so the roundings.
        together = [decode.samples] if self.config.row_width is None else [[s] for s in decode.samples]
        for samples in together:
            if self._drafter is None:
                autoregressive(decode, samples)
            else:
                speculative(decode, samples, self._drafter)
        return decode

    def _on_device(self) -> bool:
        wanted = self.config.loop
        if wanted == "auto":
            wanted = "device" if self.target.device.type == "cuda" else "host"
        if wanted == "host":
            return False
        reason = self.engine.unsuited
        if reason is not None:
            warnings.warn(f"decoding runs in the plain, slower loop on the host: {reason}", stacklevel=4)
        return reason is None

    def _prefix(self, prefilled: Prefilled, samples: Sequence[Sample]) -> ActionPrefix:
        return self.verifier.cache.prefix(
            [sample.path for sample in samples],
            [len(sample.tokens) for sample in samples],
            prefilled.prompt.rope_delta,
        )

    def handover(self, samples: Sequence[int] | None = None) -> Handover:
        """The cache of the last `generate`, as transformers' own `generate` would have left it.

        Args:
            samples: which ones; None for all.

        Raises:
            ValueError: nothing has been generated, or another prompt has been read since; or samples that
                the reference cannot take together (see `hand_over`).
        """
        if self._finished is None:
            raise ValueError("handover() comes after generate()")
        prefilled, decode = self._finished
        self.verifier.check(prefilled)
        chosen = decode.samples if samples is None else [decode.samples[index] for index in samples]
        return hand_over(
            self._prefix(prefilled, chosen),
            prefilled.prompt.input_ids,
            [sample.tokens for sample in chosen],
            rope_delta=prefilled.prompt.rope_delta,
            pad=self.target.special.pad,
            end=self.target.special.traj_future_start,
        )

    def _prompt(self, window: Window | Prompt) -> Prompt:
        if isinstance(window, Prompt):
            return window
        if not isinstance(self.target, Alpamayo):
            raise ValueError("a bare Qwen3-VL takes prompts (target.prompt_from_inputs), not windows")
        return self.target.prompt(window)

    def _driver(self, prompt: Prompt, wanted: bool | None) -> Alpamayo | None:
        """The target as the one that predicts trajectories, or None if they are not wanted."""
        lacking = ""
        if not isinstance(self.target, Alpamayo):
            lacking = "the target is a bare Qwen3-VL without an action expert"
        elif len(prompt.ego_history_xyz) == 0:
            lacking = f"the prompt {prompt.key!r} has no ego history"
        if wanted and lacking:
            raise ValueError(f"trajectories=True: {lacking}")
        if lacking or wanted is False:
            return None
        assert isinstance(self.target, Alpamayo)
        return self.target

    def _act(
        self,
        target: Alpamayo,
        prefilled: Prefilled,
        decode: Decode | Written,
        seed: int,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        prompt = prefilled.prompt
        samples = range(len(decode.samples))
        shape = (len(samples), target.n_waypoints, 2)
        if noise is None:
            noise = flow_noise(seed, prompt.key, samples, target.n_waypoints, device=target.device)
        elif noise.shape != shape:
            raise ValueError(f"action_noise is {tuple(noise.shape)}; it must be {shape}")
        with torch.inference_mode():
            action = target.denoise(noise.to(target.device), self._prefix(prefilled, decode.samples))
            xyz, rot = target.trajectory(action, prompt.ego_history_xyz, prompt.ego_history_rot)
        return xyz.clone(), rot.clone()  # ordinary tensors, not inference mode's

    def _result(
        self, decode: Decode | Written, xyz: Tensor | None, rot: Tensor | None, timings: Timings
    ) -> Result:
        samples = decode.samples
        return Result(
            coc=[self.target.coc_text(sample.tokens) for sample in samples],
            token_ids=[sample.tokens for sample in samples],
            stops=[sample.stop for sample in samples if sample.stop is not None],
            pred_xyz=xyz,
            pred_rot=rot,
            rounds=decode.rounds,
            emitted=sum(len(sample.tokens) - 1 for sample in samples),
            passes=sum(sample.passes for sample in samples),
            drafted=sum(sample.drafted for sample in samples),
            accepted=sum(sample.accepted for sample in samples),
            draft_failures=decode.draft_failures,
            lossless=self.config.lossless,
            timings=timings,
        )

    def _now_ms(self) -> float:
        synchronise(self.target.device)()
        return time.perf_counter() * 1e3


def accelerate(
    model: Any,
    draft: Proposer | None = None,
    *,
    tokenizer: Any = None,
    fuse: bool = False,
    config: DecodeConfig | None = None,
) -> SpeculativeDecoder:
    """Make a decoder on a loaded model's weights, without changing a value of them.

    Its `target.prompt_from_inputs(...)` takes what the model's own processor makes; its `generate` writes
    the texts (and, with an Alpamayo, the trajectories); its `handover()` gives the finished cache in the form
    that the model's own expert takes.

    Args:
        model: an `AlpamayoR1` or `Alpamayo1_5` object of NVIDIA's package, or transformers'
            `Qwen3VLForConditionalGeneration`.
        draft: proposes blocks, on the model's device; None decodes one token a pass.
        tokenizer: needed with a bare Qwen3-VL.
        fuse: move weights that read one input into one storage (the same values); False leaves the model
            as it is.
        config: see DecodeConfig.

    Raises:
        ValueError: the model is of another kind, a part is missing or does not fit.
    """
    return SpeculativeDecoder(borrow(model, tokenizer, fuse=fuse), draft, config)
