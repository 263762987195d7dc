"""Remakes tests/data/run: a small run of six clips with two samples each, by the commands' own stages.

python -m tests.helpers.stored_run FOLDER

About two minutes on a CPU. The folder is what a demo leaves, without weights, data and pictures of plots: the
layers' scores, the training's numbers, a sampled evaluation with traces and a greedy one.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from alpamayo_dflash.cli.demo import DemoConfig, stages
from alpamayo_dflash.distill.run import run as distill
from alpamayo_dflash.evaluate.run import run as evaluate
from alpamayo_dflash.layers.run import run as layers
from alpamayo_dflash.train.run import run as train
from alpamayo_dflash.world.run import run as world

CLIPS, SAMPLES = 6, 2
KEPT = ("layers/layers.json", "train/train.json", "evaluation", "evaluation-greedy")


def remake(folder: Path) -> None:
    """Run the stages in a temporary folder, under names that say nothing of the machine, and keep `KEPT`."""
    torch.set_num_threads(1)
    config = DemoConfig(out=Path("run"), num_chunks=4, clips_per_chunk=40, num_samples=CLIPS, num_epochs=4)
    plan = stages(config)
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        world(plan.world)
        layers(plan.layers)
        distill(plan.distill)
        train(plan.train)
        evaluate(replace(plan.evaluate, num_traj_samples=SAMPLES))
        evaluate(plan.greedy)
        shutil.rmtree(folder, ignore_errors=True)
        for name in KEPT:
            found, kept = Path("run", name), folder / name
            kept.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if found.is_dir() else shutil.copy2
            copy(found, kept)
    for directory, _, files in os.walk(folder):
        for name in files:
            path = Path(directory, name)
            assert path.suffix in (".json", ".jpg"), path


if __name__ == "__main__":
    sys.argv[0] = "stored_run.py"
    remake(Path(sys.argv[1]).resolve())
