"""The action expert in its fast form: all samples together, from noise to trajectories, as one CUDA graph.

The arithmetic of `Alpamayo.denoise` and `ActionSpace.to_trajectory` with the same roundings; only the order
inside sums differs. They are its plain form, which the tests hold it against. The prompt's keys and values
are read where they lie in the decoder's cache, once for all samples.

Shapes: S sample, N way-points, R = S·N rows, L layers, E cache entries, K KV heads, H query heads, D head
dim, C the expert's hidden size, A the projection's width, T slots a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from alpamayo_dflash.common.graphs import CapturedCall
from alpamayo_dflash.common.machine import uploaded
from alpamayo_dflash.target.alpamayo import Alpamayo, time_grid
from alpamayo_dflash.target.expert import ActionProjection, FourierFeatures, RMSNorm
from alpamayo_dflash.target.motion import initial_speed
from alpamayo_dflash.target.qwen3 import inverse_frequencies, text_rotary_tables
from alpamayo_dflash.target.qwen3_fused import FusedDecoder, FusedLayer, why_plain
from alpamayo_dflash.target.rotary import rope_settings
from alpamayo_dflash.target.weights import Rows, fused_linear, why_module

BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Samples that a graph is made for; more of them are run in turns."""


class PromptCache(Protocol):
    """Where a prompt's keys and values lie, and those of the texts after it (`decode.cache.Cache`)."""

    @property
    def layer_keys(self) -> Sequence[Tensor]:
        """L tensors [E, K, D], rotated: the prompt's entries, then the slots of texts."""
        ...

    @property
    def layer_values(self) -> Sequence[Tensor]:
        """L tensors [E, K, D]."""
        ...

    @property
    def length_1(self) -> Tensor:
        """int64 [1] on the device, the prompt's entries."""
        ...

    @property
    def slots(self) -> int:
        """How many slots there are."""
        ...


@dataclass(frozen=True)
class SampleTexts:
    """What each sample's way-points see after the prompt, and where they stand.

    Attributes:
        paths: S lists of slots.
        positions: S positions of the first way-point, as in `ActionPrefix`.
    """

    paths: Sequence[Sequence[int]]
    positions: Sequence[int]


@dataclass(frozen=True)
class DeviceTexts:
    """The same of samples whose slots lie in a row, as a device keeps it: nothing is read back.

    Attributes:
        first_slots: int64 [S].
        counts: int64 [S], the tokens that are seen.
        positions: int64 [S], of the first way-point.
    """

    first_slots: Tensor
    counts: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class ExpertStart:
    """What the samples of one window start from, on the device.

    Attributes:
        noise_SN2: float32, standard normal.
        drive_2: float32, speed and height at t0.
    """

    noise_SN2: Tensor
    drive_2: Tensor


def why_plain_expert(target: Alpamayo) -> str | None:
    """Why a target's expert must run in its plain form; None where the fast one serves."""
    weight = target.action_out_proj.weight
    reason = why_plain(target.expert.layers, weight)
    if reason is None and target.embedding.dtype != weight.dtype:
        reason = f"the expert's weights are {weight.dtype}, the cache {target.embedding.dtype}"
    return reason or misfit_projections(target)


def misfit_projections(target: Alpamayo) -> str | None:
    """What of the expert's projections is more than its weights tell."""
    project = target.action_in_proj
    parts: list[tuple[str, nn.Module, type[nn.Module]]] = [
        ("action_out_proj", target.action_out_proj, nn.Linear),
        ("action_in_proj", project, ActionProjection),
        ("action_in_proj.norm", project.norm, nn.LayerNorm),
        ("expert.norm", target.expert.norm, type(target.expert.norm)),
    ]
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.SiLU, RMSNorm)
    for index, module in enumerate(project.encoder.trunk):
        parts.append((f"action_in_proj.encoder.trunk.{index}", module, kinds[index % len(kinds)]))
    for name, module, plain in parts:
        found = why_module(module, plain)
        if found is not None:
            return f"{name} is a {found}"
    return None


class FusedProjection:
    """`ActionProjection` by kernels.

    Args:
        project: whose weights are read, where they lie.
    """

    def __init__(self, project: ActionProjection) -> None:
        first, second = (cast(FourierFeatures, sinus).freqs for sinus in project.sinus)
        self._freqs = first, second, project.timestep_fourier_encoder.freqs
        trunk: list[Any] = list(project.encoder.trunk)
        self._linears, self._norms = (
            trunk[0::3],
            trunk[2::3],
        )  # each linear but the last, SiLU and norm follow
        self._products = [fused_linear((linear,)) for linear in self._linears]
        self._norm: Any = project.norm

    def __call__(self, x_R2: Tensor, time: float) -> Tensor:
        """Embed float32 actions at a time, [R, C]."""
        from alpamayo_dflash.kernels import flow

        first = self._linears[0]
        features = flow.features(x_R2, time, self._freqs, first.weight.dtype)
        bias: Any = None  # of 60 columns, which is the library's
        parts = functional.linear(features, first.weight, first.bias).unsqueeze(0)
        for norm, linear, product in zip(self._norms, self._linears[1:], self._products[1:], strict=True):
            parts = product.parts(flow.silu_norm(parts, bias, norm.weight, norm.eps))
            bias = linear.bias
        last = self._norm
        return flow.layer_norm(parts, bias, last.weight, last.bias, last.eps)


class FusedExpert:
    """A target's expert over one cache: a graph for each bucket of samples, which serves every prompt.

    It owns buffers, so one call at a time.

    Args:
        target: the model; see `why_plain_expert`.
        cache: of the prompt and the texts. Its tensors' addresses are kept.
        graph: capture what is run; left out, on a GPU.
    """

    def __init__(self, target: Alpamayo, cache: PromptCache, *, graph: bool | None = None) -> None:
        self._target, self._cache = target, cache
        self._flow = _Flow(target)
        self._graph = target.device.type == "cuda" if graph is None else graph
        self.kept: dict[int, _Batch] = {}

    @torch.inference_mode()
    def start(self, noise_SN2: Tensor, history_xyz: Tensor, history_rot: Tensor) -> ExpertStart:
        """Take over what does not depend on the texts.

        Speed and height at t0 are solved on the host; a history that is on the CPU is not waited for.

        Args:
            noise_SN2: float32, standard normal, on the device.
            history_xyz: float32 [M, 3] metres, oldest first.
            history_rot: float32 [M, 3, 3].
        """
        xyz, rot = history_xyz.cpu(), history_rot.cpu()
        speed = initial_speed(xyz, rot, self._target.action_space.config)
        drive = uploaded(torch.stack((speed, xyz[-1, 2])).float(), self._target.device)
        start = ExpertStart(noise_SN2, drive)
        if len(noise_SN2) <= BUCKETS[-1]:
            self._batch(len(noise_SN2)).load(start)
        return start

    @torch.inference_mode()
    def __call__(self, start: ExpertStart, texts: SampleTexts | DeviceTexts) -> tuple[Tensor, Tensor, Tensor]:
        """From noise to trajectories; on a GPU the host does not wait for them.

        Args:
            start: from `start`.
            texts: what the samples see after the prompt that is in the cache.

        Returns:
            Normalised actions float32 [S, N, 2], xyz float32 [S, N, 3] metres and rot float32 [S, N, 3, 3],
            in the frame of t0.
        """
        count, most = len(start.noise_SN2), BUCKETS[-1]
        if count <= most:
            return self._batch(count).run(start, texts)
        parts = []
        for first in range(0, count, most):
            some = slice(first, first + most)
            share = ExpertStart(start.noise_SN2[some], start.drive_2)
            parts.append(self._batch(len(share.noise_SN2)).run(share, _share(texts, some)))
        actions, paths, turns = zip(*parts, strict=True)
        return torch.cat(actions), torch.cat(paths), torch.cat(turns)

    def replay(self, samples: int) -> None:
        """Do the last call with so many samples again, its inputs as they are: what benchmarks time."""
        self._batch(samples).work()

    def _batch(self, samples: int) -> _Batch:
        """The buffers and graph for so many samples."""
        size = next(size for size in BUCKETS if size >= samples)
        if size not in self.kept:
            self.kept[size] = _Batch(self._flow, self._cache, size, graph=self._graph)
        return self.kept[size]


class _Flow:
    """The work itself: weights, times, and what is launched."""

    def __init__(self, target: Alpamayo) -> None:
        self.waypoints, self.device = target.n_waypoints, target.device
        self.dtype = target.action_out_proj.weight.dtype
        self.space = target.action_space
        self._decoder = FusedDecoder(target.expert.layers, target.expert.norm)
        self._project = FusedProjection(target.action_in_proj)
        self._out = target.action_out_proj
        grid = time_grid(target.config.num_inference_steps)
        self._steps = list(zip(grid[:-1].tolist(), grid.diff().tolist(), strict=True))
        theta = rope_settings(target.vlm.config.text_config).rope_theta
        self._inverse = inverse_frequencies(target.head_dim, theta, self.device)
        self._shape = (target.num_kv_heads, target.head_dim)

    def denoise(self, x_R2: Tensor, batch: _Batch, cache: PromptCache) -> None:
        """Euler steps from noise to actions, in place."""
        from alpamayo_dflash.kernels.flow import euler_step
        from alpamayo_dflash.kernels.waypoints import attend_waypoints

        rows = len(x_R2)
        positions_SN = batch.positions.unsqueeze(-1) + torch.arange(self.waypoints, device=self.device)
        cos, sin = text_rotary_tables(positions_SN.flatten(), self._inverse)
        rotary = cos.to(self.dtype), sin.to(self.dtype)
        entries = torch.arange(rows, device=self.device)
        own = (
            torch.empty(rows, *self._shape, dtype=self.dtype, device=self.device),
            torch.empty(rows, *self._shape, dtype=self.dtype, device=self.device),
        )

        def attend(index: int, layer: FusedLayer, normed_RC: Rows) -> Rows:
            q_RHD = layer.queries(normed_RC, rotary, *own, entries)
            cached = cache.layer_keys[index], cache.layer_values[index]
            return attend_waypoints(
                q_RHD, cached, own, cache.length_1, batch.texts, batch.slots, cast=layer.out.by_row
            )

        for time, step in self._steps:
            normed = self._decoder(self._project(x_R2, time), attend)
            euler_step(x_R2, normed, self._out.weight, self._out.bias, step)


class _Batch:
    """The buffers for a number of samples, and on a GPU the graph. Samples that there are not see no text."""

    def __init__(self, flow: _Flow, cache: PromptCache, samples: int, *, graph: bool) -> None:
        self._flow, self._cache, device = flow, cache, flow.device
        self.noise = torch.zeros(samples, flow.waypoints, 2, device=device)
        self.slots = torch.zeros(samples, cache.slots, dtype=torch.int32, device=device)
        self.texts = torch.zeros(samples, dtype=torch.int32, device=device)
        self.positions = torch.zeros(samples, dtype=torch.int64, device=device)
        self.drive = torch.zeros(2, device=device)
        self._places = torch.arange(cache.slots, dtype=torch.int32, device=device)
        self._loaded: ExpertStart | None = None
        self._out: tuple[Tensor, Tensor, Tensor] | None = None
        self.work = CapturedCall(self._launch).replay if graph else self._launch

    def load(self, start: ExpertStart) -> None:
        """Take over what samples start from."""
        count = len(start.noise_SN2)
        for buffer in (self.noise, self.texts, self.positions):
            buffer[count:] = 0
        self.noise[:count] = start.noise_SN2
        self.drive.copy_(start.drive_2)
        self._loaded = start

    def run(self, start: ExpertStart, texts: SampleTexts | DeviceTexts) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, xyz and rot of as many samples as are given."""
        if self._loaded is not start:
            self.load(start)
        count = len(start.noise_SN2)
        self._see(texts, count)
        self.work()
        assert self._out is not None
        action, xyz, rot = (each[:count].clone() for each in self._out)
        return action, xyz, rot

    def _see(self, texts: SampleTexts | DeviceTexts, count: int) -> None:
        """Write down what the samples see and where they stand."""
        device = self.slots.device
        if isinstance(texts, DeviceTexts):
            torch.add(texts.first_slots[:, None], self._places, out=self.slots[:count])
            self.texts[:count], self.positions[:count] = texts.counts, texts.positions
            return
        longest = max(map(len, texts.paths))
        lengths = [len(path) for path in texts.paths]
        slots = torch.tensor(
            [[*path, *[0] * (longest - len(path))] for path in texts.paths], dtype=torch.int32, device="cpu"
        )
        self.slots[:count, :longest] = uploaded(slots, device)
        self.texts[:count] = uploaded(torch.tensor(lengths, dtype=torch.int32, device="cpu"), device)
        self.positions[:count] = uploaded(torch.tensor(texts.positions, device="cpu"), device)

    def _launch(self) -> None:
        flow = self._flow
        action = self.noise.clone()
        flow.denoise(action.view(-1, 2), self, self._cache)
        speed, height = self.drive.unbind()
        self._out = (action, *flow.space.drive(action, speed.expand(len(action)), height))


def _share(texts: SampleTexts | DeviceTexts, some: slice) -> SampleTexts | DeviceTexts:
    """Those of some samples."""
    if isinstance(texts, DeviceTexts):
        return DeviceTexts(texts.first_slots[some], texts.counts[some], texts.positions[some])
    return SampleTexts(texts.paths[some], texts.positions[some])
