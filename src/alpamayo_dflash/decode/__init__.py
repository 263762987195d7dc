"""Decoding: one verify pass, one autoregressive and one speculative loop, from a window to a trajectory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from alpamayo_dflash.decode.config import DecodeConfig, Sampling, SentenceEnd

if TYPE_CHECKING:
    from alpamayo_dflash.decode.accelerated import accelerate
    from alpamayo_dflash.decode.check import ChiSquare, chi_square, count_texts, joint_distribution
    from alpamayo_dflash.decode.handover import Handover
    from alpamayo_dflash.decode.observer import (
        Observer,
        Observers,
        Recorder,
        RoundTrace,
        SampleTrace,
        StageTimer,
    )
    from alpamayo_dflash.decode.proposer import ProposalLike, Proposer
    from alpamayo_dflash.decode.rollout import Result, SpeculativeDecoder, Timings, synchronise
    from alpamayo_dflash.decode.sampling import choose, distribution, mask_bias, nucleus
    from alpamayo_dflash.decode.score import TeacherForced, teacher_forced, teacher_forced_all
    from alpamayo_dflash.decode.stops import StopReason, StopRules
    from alpamayo_dflash.decode.verify import Prefilled, Verifier

# Loaded on first use, so that a stage's config can name Sampling without loading torch.
_LAZY = {
    "accelerate": "accelerated",
    "Handover": "handover",
    "ChiSquare": "check",
    "chi_square": "check",
    "count_texts": "check",
    "joint_distribution": "check",
    "Observer": "observer",
    "Observers": "observer",
    "Recorder": "observer",
    "RoundTrace": "observer",
    "SampleTrace": "observer",
    "StageTimer": "observer",
    "ProposalLike": "proposer",
    "Proposer": "proposer",
    "Result": "rollout",
    "SpeculativeDecoder": "rollout",
    "Timings": "rollout",
    "synchronise": "rollout",
    "choose": "sampling",
    "distribution": "sampling",
    "mask_bias": "sampling",
    "nucleus": "sampling",
    "TeacherForced": "score",
    "teacher_forced": "score",
    "teacher_forced_all": "score",
    "StopReason": "stops",
    "StopRules": "stops",
    "Prefilled": "verify",
    "Verifier": "verify",
}

__all__ = [
    "ChiSquare",
    "DecodeConfig",
    "Handover",
    "Observer",
    "Observers",
    "Prefilled",
    "ProposalLike",
    "Proposer",
    "Recorder",
    "Result",
    "RoundTrace",
    "SampleTrace",
    "Sampling",
    "SentenceEnd",
    "SpeculativeDecoder",
    "StageTimer",
    "StopReason",
    "StopRules",
    "TeacherForced",
    "Timings",
    "Verifier",
    "accelerate",
    "chi_square",
    "choose",
    "count_texts",
    "distribution",
    "joint_distribution",
    "mask_bias",
    "nucleus",
    "synchronise",
    "teacher_forced",
    "teacher_forced_all",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
