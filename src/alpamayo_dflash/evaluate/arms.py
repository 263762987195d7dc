"""One clip through one arm: the same prompt, temperature, stop rule, token limit and noise in each.

Shapes: S sample, N way-points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.common.machine import Clock
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.decoder import Result, SpeculativeDecoder
from alpamayo_dflash.decode.noise import flow_noise
from alpamayo_dflash.decode.observer import Observer, Recorder
from alpamayo_dflash.decode.proposer import BlockDraft
from alpamayo_dflash.decode.verify import Prefilled
from alpamayo_dflash.evaluate.config import ARMS, EvaluateConfig
from alpamayo_dflash.evaluate.near_ties import Loop, parting
from alpamayo_dflash.evaluate.reference import generate, greedy_tokens
from alpamayo_dflash.evaluate.rows import AcceptanceRow, ArmRow
from alpamayo_dflash.report.clip_trace import RoundRow
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.prompt import Prompt

CLIP_ERRORS = (ValueError, OSError, torch.OutOfMemoryError)
"""What may happen to one clip without being the program's own fault: bad data, a full disk, no memory."""


@dataclass(frozen=True)
class Run:
    """What one arm gave on one clip.

    Attributes:
        token_ids: of each sample.
        coc: of each sample.
        xyz: float32 [S, N, 3], metres.
        times: the row to keep.
        result: the loop's own result; None for transformers.
        recorder: has watched it; likewise.
    """

    token_ids: list[list[int]]
    coc: list[str]
    xyz: Tensor
    times: ArmRow
    result: Result | None = None
    recorder: Recorder | None = None


class Arms:
    """The three arms over one target.

    Args:
        target: the model.
        draft: the speculative loop's.
        config: the evaluation's options.

    Attributes:
        names: the arms that the options ask for, in the order of the tables.
        block_size: the draft's.

    Raises:
        ValueError: the draft does not fit the target.
    """

    def __init__(self, target: Alpamayo, draft: BlockDraft, config: EvaluateConfig) -> None:
        self.target = target
        self.config = config
        self._clock = Clock(target.device)
        self._decoders = {"dflash": SpeculativeDecoder(target, draft, config.decode)}
        if config.compare:
            self._decoders["autoregressive"] = SpeculativeDecoder(target, None, config.decode)
        self._read: dict[str, Prefilled] = {}
        self.block_size = draft.block_size
        self.names = list(ARMS) if config.compare else ["dflash"]

    def timed(self, arm: str, prompt: Prompt) -> Run:
        """The whole way from the prompt to the trajectory, timed, at the evaluation's own temperature."""
        return self._transformers(prompt) if arm == "transformers" else self._loop(arm, prompt)

    def read(self, arm: str, prompt: Prompt) -> None:
        """Let a loop read a prompt; `again` and `loops` start from it."""
        self._read[arm] = self._decoder(arm).prefill(prompt)

    def again(
        self,
        arm: str,
        prompt: Prompt,
        sampling: Sampling,
        observer: Observer | None = None,
        *,
        trajectories: bool = False,
    ) -> Result:
        """Decode once more after the prompt that a loop has read last.

        Raises:
            ValueError: the loop has read another prompt, or none.
        """
        prefilled = self._read.get(arm)
        if prefilled is None or prefilled.prompt.key != prompt.key:
            raise ValueError(f"the {arm} loop has not read {prompt.key}")
        return self._decoder(arm).generate(
            prefilled, **self._options(sampling), observer=observer, trajectories=trajectories
        )

    def near_ties(
        self,
        sampling: Sampling,
        autoregressive: Sequence[Sequence[int]],
        speculative: Sequence[Sequence[int]],
    ) -> tuple[int, int]:
        """Of the texts that the two loops wrote differently: how many part at a near-tie, and how many not.

        Args:
            sampling: what both were decoded with.
            autoregressive: a text a sample, of the prompt that both loops have read last.
            speculative: likewise.
        """
        near = others = 0
        for index, (one, other) in enumerate(zip(autoregressive, speculative, strict=True)):
            if one == other:
                continue
            found = parting(*self.loops(one, other), sampling=sampling, seed=self.config.seed, sample=index)
            near, others = near + found.near_tie, others + (not found.near_tie)
        return near, others

    def loops(self, autoregressive: Sequence[int], speculative: Sequence[int]) -> tuple[Loop, Loop]:
        """Both loops, each with what it wrote for one sample of the prompt that both have read last."""
        samples, width = self.config.num_traj_samples, self.config.row_width
        parts = (("autoregressive", autoregressive, 1), ("dflash", speculative, self.block_size))
        found = []
        for arm, text, step in parts:
            decoder = self._decoder(arm)
            rows = width or samples * decoder.device_rounds.sample_rows
            found.append(Loop(decoder, self._read[arm], text, step, rows))
        return found[0], found[1]

    def transformers_greedy(self, prompt: Prompt) -> list[list[int]]:
        """The greedy tokens of transformers, one sample."""
        return greedy_tokens(self.target, prompt, max_new_tokens=self.config.max_tokens)

    def _options(self, sampling: Sampling) -> dict[str, Any]:
        """What every arm's `generate` takes."""
        config = self.config
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "num_traj_samples": config.num_traj_samples,
            "seed": config.seed,
            "max_new_tokens": config.max_tokens,
        }

    def _decoder(self, arm: str) -> SpeculativeDecoder:
        """A loop. Without a comparison the autoregressive one is made when it is first wanted."""
        if arm not in self._decoders:
            self._decoders[arm] = SpeculativeDecoder(self.target, None, self.config.decode)
        return self._decoders[arm]

    def _loop(self, arm: str, prompt: Prompt) -> Run:
        decoder = self._decoder(arm)
        start = self._clock.now_ms()
        prefilled = self._read[arm] = decoder.prefill(prompt)
        prefill_ms = self._clock.now_ms() - start
        recorder = Recorder()
        result = decoder.generate(prefilled, observer=recorder, **self._options(self.config.sampling))
        assert result.pred_xyz is not None, "trajectories were asked for"
        times = arm_row(prefill_ms, result.timings.decode_ms, result.timings.action_ms, result.token_ids)
        return Run(result.token_ids, result.coc, result.pred_xyz, times, result, recorder)

    def _transformers(self, prompt: Prompt) -> Run:
        config, target = self.config, self.target
        given = generate(target, prompt, **self._options(config.sampling))
        start = self._clock.now_ms()
        samples = range(config.num_traj_samples)
        noise = flow_noise(config.seed, prompt.key, samples, target.n_waypoints, device=target.device)
        with torch.inference_mode():
            action = target.denoise(noise, given.prefix)
            xyz, _ = target.trajectory(action, prompt.ego_history_xyz, prompt.ego_history_rot)
        action_ms = self._clock.now_ms() - start
        times = arm_row(given.prefill_ms, given.decode_ms, action_ms, given.token_ids)
        return Run(given.token_ids, [target.coc_text(ids) for ids in given.token_ids], xyz, times)


def arm_row(prefill_ms: float, decode_ms: float, action_ms: float, token_ids: list[list[int]]) -> ArmRow:
    """The times of one run as a row; the total is their sum, the making of the prompt left out."""
    return {
        "preprocess_ms": None,
        "vision_ms": None,
        "prompt_ms": None,
        "prefill_ms": round(prefill_ms, 4),
        "decode_ms": round(decode_ms, 4),
        "action_ms": round(action_ms, 4),
        "total_ms": round(prefill_ms + decode_ms + action_ms, 4),
        "tokens": sum(len(ids) for ids in token_ids),
    }


def acceptance_of(result: Result) -> AcceptanceRow:
    """The counts of a speculative run that are pooled over clips."""
    return {
        "tokens_after_first": result.emitted,
        "passes": result.passes,
        "drafted": result.drafted,
        "accepted": result.accepted,
        "draft_failures": result.draft_failures,
    }


def rounds_of(recorder: Recorder) -> list[list[RoundRow]]:
    """What each round did for each sample, by sample."""
    rows: list[list[RoundRow]] = [[] for _ in recorder.first_tokens]
    for trace in recorder.rounds:
        for part in trace.samples:
            rows[part.sample].append(
                {
                    "position": part.position,
                    "anchor": part.anchor,
                    "proposed": list(part.proposed),
                    "parents": list(part.parents),
                    "sources": list(part.sources),
                    "taken": list(part.taken),
                    "emitted": list(part.emitted),
                    "origins": list(part.origins),
                }
            )
    return rows
