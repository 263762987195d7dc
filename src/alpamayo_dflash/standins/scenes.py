"""Training scenes: an endless stream, every scene drawn anew, already in the target's input form.

Shapes: B scenes, T patches of a window, E values of a patch in one time slot, P prompt tokens, G response
tokens, N way-points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from alpamayo_dflash.common.options import generator_seed
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.world.events import sample_scene
from alpamayo_dflash.world.language import coc
from alpamayo_dflash.world.render import window

# A model sampled at T 0.6 sharpens what it learned by the power 1/0.6; labels drawn from the weights to the
# power 0.6 make its samples follow the weights.
SOFTEN = 0.6
IGNORE = -100
# Streams of seeds that never meet: training, validation (the demo's clips have a third, see `world`).
TRAINING, VALIDATION = 0x7261, 0x7661
# The wording is drawn apart from the scene: from one stream, a picture would give its wording away.
WORDING = 0x776F


def stream_seed(seed: int, stream: int, *index: int) -> int:
    """The scene seed at a place of a stream."""
    sequence = np.random.SeedSequence([generator_seed(seed), stream, *index])
    return int(sequence.generate_state(2, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Batch:
    """Scenes in the target's input form.

    Attributes:
        patches: uint8 [B, T, E], resized frames cut into patches, one time slot.
        input_ids: int64 [B, P + G], fused prompt, response, padding.
        labels: int64 [B, G]: the response's ids, `IGNORE` behind its end.
        lengths: int64 [B], entries up to and including `<|traj_future_start|>`.
        action: float32 [B, N, 2], normalised future actions.
    """

    patches: Tensor
    input_ids: Tensor
    labels: Tensor
    lengths: Tensor
    action: Tensor

    def to(self, device: str) -> Batch:
        """The same batch on a device."""
        moved = (getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__)
        return Batch(*moved)


class SceneStream(IterableDataset[Batch]):
    """Batches of fresh scenes; worker w of n draws scenes of its own.

    Args:
        target: on the CPU; gives prompt, tokenizer and action space, its weights are not used.
        seed: of the stream.
        batch_size: scenes a batch.
        max_response: response tokens kept; a longer response is an error.
    """

    def __init__(self, target: Alpamayo, seed: int, batch_size: int, max_response: int = 64) -> None:
        super().__init__()
        self.target = target
        self.seed = seed
        self.batch_size = batch_size
        self.max_response = max_response

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end."""
        worker = torch.utils.data.get_worker_info()
        index = 0 if worker is None else worker.id
        torch.set_num_threads(1)
        count = 0
        while True:
            seeds = [stream_seed(self.seed, TRAINING, index, count + i) for i in range(self.batch_size)]
            count += self.batch_size
            yield self._batch(seeds)

    def _batch(self, seeds: list[int]) -> Batch:
        rows = [self._row(seed) for seed in seeds]
        longest = max(len(response) for _, _, response, _ in rows)
        pad = self.target.special.pad
        prompt_length = len(rows[0][1])
        input_ids = torch.full((len(rows), prompt_length + longest), pad, dtype=torch.int64)
        labels = torch.full((len(rows), longest), IGNORE, dtype=torch.int64)
        for row, (_, prompt_ids, response, _) in enumerate(rows):
            input_ids[row, :prompt_length] = prompt_ids
            input_ids[row, prompt_length : prompt_length + len(response)] = torch.tensor(response)
            labels[row, : len(response)] = torch.tensor(response)
        return Batch(
            patches=torch.stack([patches for patches, _, _, _ in rows]),
            input_ids=input_ids,
            labels=labels,
            lengths=torch.tensor([prompt_length + len(response) for _, _, response, _ in rows]),
            action=torch.stack([action for _, _, _, action in rows]),
        )

    def _row(self, seed: int) -> tuple[Tensor, Tensor, list[int], Tensor]:
        scene = sample_scene(seed)
        view = window(scene)
        prompt = self.target.prompt(view)
        text = coc(scene.facts, np.random.default_rng([seed, WORDING]), soften=SOFTEN)
        special = self.target.special
        response = [*self.target.tokenizer.encode(text).ids, special.cot_end, special.traj_future_start]
        if len(response) > self.max_response:
            raise ValueError(f"response of {len(response)} tokens, more than {self.max_response}: {text!r}")
        assert view.ego_future_xyz is not None
        assert view.ego_future_rot is not None
        poses = (view.ego_future_xyz, view.ego_future_rot, view.ego_history_xyz, view.ego_history_rot)
        action = self.target.action_space.from_trajectory(*(torch.from_numpy(part) for part in poses))
        levels = prompt.pixel_values.unflatten(-1, (3, 2, -1))[:, :, 0].flatten(1) * 127.5 + 127.5
        return levels.round().to(torch.uint8), prompt.input_ids, response, action


def loader(stream: SceneStream, workers: int) -> DataLoader[Batch]:
    """A loader over the stream that keeps workers' order, so that a run can be repeated."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=False,
        persistent_workers=workers > 0,
    )
