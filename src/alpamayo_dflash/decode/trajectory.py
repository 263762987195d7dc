"""The action expert behind a decoder's cache: from noise to trajectories, in the fast form where it runs.

Shapes: S sample, N way-points.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.decode.config import Request
from alpamayo_dflash.decode.loop import Round, Sample
from alpamayo_dflash.decode.noise import flow_noise
from alpamayo_dflash.decode.round_device import DeviceRound
from alpamayo_dflash.decode.verify import Prefilled, Verifier
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.expert import ActionPrefix
from alpamayo_dflash.target.expert_fused import (
    DeviceTexts,
    ExpertStart,
    FusedExpert,
    SampleTexts,
    why_plain_expert,
)
from alpamayo_dflash.target.prompt import Prompt

_NOT_ASKED = "not asked yet"


@dataclass(frozen=True)
class Start:
    """What trajectories start from.

    Attributes:
        noise_SN2: float32 on the device.
        history: xyz and rot of the past.
        fused: the expert in its fast form with its own start, or None.
    """

    noise_SN2: Tensor
    history: tuple[Tensor, Tensor]
    fused: tuple[FusedExpert, ExpertStart] | None


class Trajectories:
    """A target's action expert over one verifier's cache. Call it in inference mode, on the target's device.

    Args:
        target: the model.
        verifier: holds the cache.

    Attributes:
        target: the model.
    """

    def __init__(self, target: Alpamayo, verifier: Verifier) -> None:
        self.target, self._verifier = target, verifier
        self._fused: tuple[int, FusedExpert] | None = None  # and the generation of the cache that it reads
        self._plain_because: str | None = _NOT_ASKED

    def start(self, prompt: Prompt, request: Request, noise: Tensor | None) -> Start:
        """Enqueue what does not depend on the texts.

        Args:
            prompt: its history.
            request: seed and number of samples.
            noise: float32 [S, N, 2]; None draws it from the seed.
        """
        target = self.target
        if noise is None:
            everyone = range(request.num_samples)
            noise = flow_noise(request.seed, prompt.key, everyone, target.n_waypoints, device=target.device)
        noise, history = noise.to(target.device), (prompt.ego_history_xyz, prompt.ego_history_rot)
        expert = self._expert()
        return Start(noise, history, None if expert is None else (expert, expert.start(noise, *history)))

    def __call__(
        self, start: Start, prefilled: Prefilled, samples: Sequence[Sample], round_: Round
    ) -> tuple[Tensor, Tensor]:
        """Trajectories of finished samples; on a GPU the host does not wait for them.

        Args:
            start: from `start`.
            prefilled: the prompt.
            samples: finished ones, all that were asked for.
            round_: what wrote them.

        Returns:
            xyz float32 [S, N, 3] metres and rot float32 [S, N, 3, 3], in the frame of t0.
        """
        target, expert = self.target, self._expert()
        if expert is None:
            action = target.denoise(start.noise_SN2, sample_prefix(self._verifier, prefilled, samples))
            return target.trajectory(action, *(each.to(target.device) for each in start.history))
        texts: SampleTexts | DeviceTexts = _texts(prefilled, samples)
        if isinstance(round_, DeviceRound):
            texts = round_.texts()
        began = start.fused
        if began is None or began[0] is not expert:  # the cache has moved since
            began = expert, expert.start(start.noise_SN2, *start.history)
        _, xyz, rot = expert(began[1], texts)
        return xyz, rot

    def _expert(self) -> FusedExpert | None:
        """The expert's fast form over the cache as it lies now, or None where the plain one runs."""
        cache = self._verifier.cache
        if self._plain_because == _NOT_ASKED:
            self._plain_because = why_plain_expert(self.target)
            if self._plain_because is not None and self.target.device.type == "cuda":
                warnings.warn(
                    f"the action expert runs in its plain, slower form: {self._plain_because}", stacklevel=4
                )
        if self._plain_because is not None:
            return None
        if self._fused is None or self._fused[0] != cache.generation:
            self._fused = None  # its graphs' memory first
            self._fused = cache.generation, FusedExpert(self.target, cache)
        return self._fused[1]


def sample_prefix(verifier: Verifier, prefilled: Prefilled, samples: Sequence[Sample]) -> ActionPrefix:
    """What the way-points of finished samples see."""
    return verifier.cache.prefix(
        [sample.path for sample in samples],
        [len(sample.tokens) for sample in samples],
        prefilled.prompt.rope_delta,
    )


def _texts(prefilled: Prefilled, samples: Sequence[Sample]) -> SampleTexts:
    """The same after the prompt, by the host's record."""
    start = len(prefilled.prompt.input_ids) + prefilled.prompt.rope_delta
    return SampleTexts(
        [sample.path for sample in samples], [start + len(sample.tokens) for sample in samples]
    )


def check_noise(noise: Tensor, shape: tuple[int, int, int]) -> None:
    """Raise ValueError if the noise that was given is of another shape [S, N, 2], or not finite."""
    if noise.shape != shape:
        raise ValueError(f"action_noise is {tuple(noise.shape)}; it must be {shape}")
    bad = (~noise.isfinite().flatten(1).all(1)).tolist()
    if any(bad):
        raise ValueError(
            f"action_noise of sample {bad.index(True)} is not finite; it must be standard normal values"
        )


def finite(xyz: Tensor, rot: Tensor) -> tuple[Tensor, Tensor]:
    """Trajectories as ordinary tensors, not inference mode's; this waits for the device.

    Raises:
        ValueError: one is not finite.
    """
    bad_S = ~(xyz.isfinite().all(-1) & rot.isfinite().flatten(-2).all(-1)).all(-1)
    with torch.inference_mode(False):
        kept = xyz.clone(), rot.clone()
    bad = bad_S.tolist()
    if any(bad):
        raise ValueError(
            f"sample {bad.index(True)}: the trajectory is not finite: the expert's weights or dtype, or "
            "the history, are at fault"
        )
    return kept
