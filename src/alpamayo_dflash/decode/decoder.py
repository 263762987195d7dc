"""From a window to a Chain-of-Causation and a trajectory, with or without a draft.

Shapes: S sample, N way-points, V vocabulary, C hidden.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.common.machine import Clock, Moment, Stopwatch, between_ms, current
from alpamayo_dflash.common.options import check_positive
from alpamayo_dflash.common.turn import Turn
from alpamayo_dflash.decode.config import DecodeConfig, Request, Sampling
from alpamayo_dflash.decode.engine import Engine
from alpamayo_dflash.decode.handover import Handover, hand_over
from alpamayo_dflash.decode.loop import Decoded
from alpamayo_dflash.decode.observer import Observer, Observers
from alpamayo_dflash.decode.proposer import BlockDraft, Captured, Listed
from alpamayo_dflash.decode.stops import StopReason
from alpamayo_dflash.decode.trajectory import Trajectories, check_noise, finite, sample_prefix
from alpamayo_dflash.decode.verify import Prefilled
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.borrow import borrow
from alpamayo_dflash.target.prompt import Prompt
from alpamayo_dflash.target.vlm import Qwen3VLTarget


@dataclass(frozen=True)
class Timings:
    """Times of one `generate`, milliseconds.

    The first four are from end to end of what they name, gaps included; on a GPU they are taken by events, so
    that nothing is waited for. `parts` is the device's work alone: what of the whole is in none of them is
    the host's.

    Attributes:
        preprocess_ms: from the call to the prompt's tensors; 0 for a prompt that had been read before.
        prefill_ms: vision and the prompt's pass; 0 likewise.
        decode_ms: from the prompt's logits to the last token, and the cache made whole for the expert.
        action_ms: the action expert and the trajectory.
        total_ms: everything, by the host's clock.
        parts: of "preprocess", "vision", "prompt", "decode" and "action" those that ran.
    """

    preprocess_ms: float
    prefill_ms: float
    decode_ms: float
    action_ms: float
    total_ms: float
    parts: Mapping[str, float]

    @property
    def overhead(self) -> float:
        """What of the whole lies in none of the parts: 1 − Σ parts / total."""
        return 1 - sum(self.parts.values()) / self.total_ms


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
    """Decodes a target with proposers; without any, autoregressively. The text is the same either way.

    It owns one prompt's cache, so calls from several threads wait for each other. Decoders that shall work at
    the same time can share a target.

    Args:
        target: the model.
        draft: proposes blocks; None for none.
        config: see DecodeConfig.
        proposers: propose beside the draft: `Listed`, or in the device's rounds `Captured`.

    Attributes:
        verifier: the target with its cache, which holds one prompt at a time.
        device_rounds: the rounds on the device, by shape.

    Raises:
        ValueError: the draft does not fit the target, or a proposer is of neither kind.
    """

    def __init__(
        self,
        target: Qwen3VLTarget,
        draft: BlockDraft | None = None,
        config: DecodeConfig | None = None,
        *,
        proposers: Sequence[Listed | Captured] = (),
    ) -> None:
        self.target = target
        self.config = config or DecodeConfig()
        self._clock = Clock(target.device)
        self._turn = Turn("this decoder")
        self._engine = Engine(target, draft, self.config, proposers=proposers)
        self.draft, self.rules = self._engine.draft, self._engine.rules
        self.verifier, self.device_rounds = self._engine.verifier, self._engine.device_rounds
        self._finished: tuple[Prefilled, Decoded, int] | None = None  # and the thread that asked
        self._trajectories = Trajectories(target, self.verifier) if isinstance(target, Alpamayo) else None

    def prefill(self, window: Window | Prompt) -> Prefilled:
        """Read a prompt, so that `generate` can start from it any number of times.

        It stays good until this decoder reads another.

        Raises:
            ValueError: the prompt is longer than `prompt_capacity`, or what `Alpamayo.prompt` refuses.
            RuntimeError: called from inside a call of this decoder.
        """
        with self._alone():
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
            ValueError: an option outside its range, a window that does not fit the target, a prompt longer
                than the cache, or a target whose logits or trajectory are not finite.
            RuntimeError: called from inside a call of this decoder.
        """
        check_positive(num_traj_samples=num_traj_samples, max_new_tokens=max_new_tokens)
        request = Request(Sampling(temperature, top_p), seed, num_traj_samples, max_new_tokens)
        with self._alone():
            began, watch = self._clock.now_ms(), Stopwatch(self.target.device)
            moments = [watch.moment()]
            self._finished = None
            if isinstance(window, Prefilled):
                prompt = window.prompt
            else:
                with watch.part("preprocess"):
                    prompt = self._prompt(window)
            driver = self._driver(prompt, trajectories)
            if driver is not None and action_noise is not None:
                check_noise(action_noise, (num_traj_samples, driver.target.n_waypoints, 2))
            moments.append(watch.moment())
            prefilled = window if isinstance(window, Prefilled) else self.verifier.prefill(prompt, watch)
            moments.append(watch.moment())
            with torch.inference_mode(), current(self.target.device):
                # Enqueued behind the prompt's pass, which hides the host's share of it. A new round may move
                # the cache, so the expert starts after it.
                watched = Observers(observer or Observer(), _Watched(watch))
                round_ = self._engine.round(request, scored=watched.wants_scores)
                start = None if driver is None else driver.start(prompt, request, action_noise)
                decoded = self._engine.decode(round_, prefilled, request, watched)
                moments.append(watch.moment())
                self._finished = (prefilled, decoded, threading.get_ident())
                xyz = rot = None
                if driver is not None and start is not None:
                    with watch.part("action"):
                        xyz, rot = driver(start, prefilled, decoded.samples, round_)
                    moments.append(watch.moment())
                # While the device is still at work.
                coc = [self.target.coc_text(sample.tokens) for sample in decoded.samples]
                if xyz is not None and rot is not None:
                    xyz, rot = finite(xyz, rot)
            total_ms = self._clock.now_ms() - began
        timings = _timings(moments, total_ms, watch.parts_ms())
        return self._result(decoded, coc, xyz, rot, timings)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The buffers for this call alone, and arithmetic in the weights' own types without autocast."""
        with self._turn.taken(), torch.autocast(self.target.device.type, enabled=False):
            yield

    def handover(self, samples: Sequence[int] | None = None) -> Handover:
        """The cache of the last `generate`, as transformers' own `generate` would have left it.

        Args:
            samples: which ones; None for all.

        Raises:
            ValueError: nothing has been generated, another prompt has been read since, or another thread has
                generated since; or samples that the reference cannot take together (see `hand_over`).
        """
        with self._alone():
            if self._finished is None or self._finished[2] != threading.get_ident():
                raise ValueError("handover() comes after generate(), before another thread's")
            prefilled, decoded, _ = self._finished
            self.verifier.check(prefilled)
            chosen = decoded.samples if samples is None else [decoded.samples[index] for index in samples]
            return hand_over(
                sample_prefix(self.verifier, prefilled, chosen),
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

    def _driver(self, prompt: Prompt, wanted: bool | None) -> Trajectories | None:
        """What predicts the trajectories, or None if they are not wanted."""
        lacking = ""
        if self._trajectories is None:
            lacking = "the target is a bare Qwen3-VL without an action expert"
        elif len(prompt.ego_history_xyz) == 0:
            lacking = f"the prompt {prompt.key!r} has no ego history"
        if wanted and lacking:
            raise ValueError(f"trajectories=True: {lacking}")
        return None if lacking or wanted is False else self._trajectories

    def _result(
        self, decoded: Decoded, coc: list[str], xyz: Tensor | None, rot: Tensor | None, timings: Timings
    ) -> Result:
        samples = decoded.samples
        return Result(
            coc=coc,
            token_ids=[sample.tokens for sample in samples],
            stops=[sample.stop for sample in samples if sample.stop is not None],
            pred_xyz=xyz,
            pred_rot=rot,
            rounds=decoded.rounds,
            emitted=sum(len(sample.tokens) - 1 for sample in samples),
            passes=sum(sample.passes for sample in samples),
            drafted=sum(sample.drafted for sample in samples),
            accepted=sum(sample.accepted for sample in samples),
            draft_failures=decoded.draft_failures,
            lossless=self.config.lossless,
            timings=timings,
        )


def _timings(moments: Sequence[Moment], total_ms: float, parts: Mapping[str, float]) -> Timings:
    """Of the moments between preprocessing, the prompt, decoding and the trajectories, if there are any."""
    spent = [between_ms(*each) for each in itertools.pairwise(moments)]
    preprocess, prefill, decode_, action = (*spent, 0.0)[:4]
    return Timings(preprocess, prefill, decode_, action, total_ms, parts)


class _Watched(Observer):
    """Times the rounds' work on the device."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def span(self, name: str) -> AbstractContextManager[None]:
        """See Observer."""
        return self._watch.part("decode")


def accelerate(
    model: Any,
    draft: BlockDraft | None = None,
    *,
    tokenizer: Any = None,
    fuse: bool = False,
    ignore_hooks: bool = False,
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
        ignore_hooks: go on, with a warning, although the model has forward hooks that change its output on
            modules that decoding does not call.
        config: see DecodeConfig.

    Raises:
        ValueError: the model is of another kind or computes something else than is computed here, a part is
            missing or does not fit.
    """
    target = borrow(model, tokenizer, fuse=fuse, ignore_hooks=ignore_hooks)
    return SpeculativeDecoder(target, draft, config)
