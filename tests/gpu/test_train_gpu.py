"""Training steps on a CUDA device (run by hand: `pytest -m gpu`)."""

import pytest
import torch

from alpamayo_dflash.train import trainer as trainer_module
from alpamayo_dflash.train.run import run
from tests.helpers.toy_training import make_toy, options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


MIXES = [
    {},
    {"loss_type": "ce+kl+tv+lk", "position_weights": "dpace", "dtype": "bfloat16"},
    {"loss_type": "kl", "previous_head": "gru", "previous_size": 8, "dtype": "bfloat16"},
    {"labels": "argmax", "train_embeddings": True},
    {"optimizer": "muon", "num_workers": 0},
]


@pytest.mark.parametrize("changes", MIXES)
def test_a_step_does_not_wait_for_the_device(made, tmp_path, monkeypatch, changes):
    step, steps = trainer_module.Trainer.step, []

    def watched(self, batch):
        steps.append(self.progress.step)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 1 else before)  # the first makes the tables
        try:
            return step(self, batch)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    monkeypatch.setattr(trainer_module.Trainer, "step", watched)
    run(options(made, tmp_path / "out", device="cuda", **changes))
    assert len(steps) == 12


@pytest.mark.parametrize("changes", MIXES)
def test_a_gpu_trains_as_a_cpu_does(made, tmp_path, changes):
    torch.backends.cuda.matmul.allow_tf32 = False
    on_gpu = run(options(made, tmp_path / "gpu", device="cuda", **changes))
    on_cpu = run(options(made, tmp_path / "cpu", **changes))
    tolerance = 5e-2 if changes.get("dtype") == "bfloat16" or "optimizer" in changes else 1e-3
    for found, expected in zip(on_gpu["losses"], on_cpu["losses"], strict=True):
        assert found == pytest.approx(expected, rel=tolerance, abs=1e-3)
    for found, expected in zip(on_gpu["evaluations"], on_cpu["evaluations"], strict=True):
        pair = (each["expected_acceptance_length"] for each in (found, expected))
        assert next(pair) == pytest.approx(next(pair), rel=max(tolerance, 1e-2))
