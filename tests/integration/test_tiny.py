"""The tiny Alpamayo: what ships, and the training that made it."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from alpamayo_dflash.decode.rollouts import teacher_forced
from alpamayo_dflash.standins.config import TinyTrainConfig
from alpamayo_dflash.standins.scenes import IGNORE, SceneStream
from alpamayo_dflash.standins.training import BatchForward, learning_rate, train_steps
from alpamayo_dflash.standins.validate import held_out, look
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.checkpoint import SHIPPED


@pytest.fixture(scope="module")
def tiny():
    return Alpamayo.from_pretrained("tiny")


@pytest.fixture(scope="module")
def batch(tiny):
    return next(iter(SceneStream(tiny, seed=5, batch_size=3)))


def test_the_checkpoint_is_small(tiny):
    assert (SHIPPED / "model.safetensors").stat().st_size <= 12_000_000
    assert tiny.num_layers >= 8


def test_it_sees(tiny):
    """A looser bound than docs/results/tiny_sees.json shows, on fewer scenes."""
    seen = look(tiny, held_out(24, seed=1))
    assert seen["named"] >= 0.85
    assert seen["named_swapped"] <= 0.5
    assert seen["min_ade_m"] < 0.6 * seen["constant_velocity_ade_m"]


def test_the_batched_forward_is_the_targets_own(tiny, batch):
    """Training's forward over a batch gives the loss that the decoder's own pass over each text gives."""
    view, _ = held_out(1, seed=0)[0]
    forward = BatchForward(tiny, tiny.prompt(view))
    stream = SceneStream(tiny, seed=5, batch_size=3)
    with torch.no_grad():
        got = forward(batch, pixel_noise=0.0).text
    expected = []
    for row in range(3):
        ids = batch.labels[row][batch.labels[row] != IGNORE].tolist()
        prompt = _prompt(stream, row)
        scored = teacher_forced(tiny, prompt, ids, layers=(0,), prompt_states=1)
        expected.append(torch.nn.functional.cross_entropy(scored.logits, torch.tensor(ids), reduction="none"))
    torch.testing.assert_close(got, torch.cat(expected).mean(), atol=1e-4, rtol=1e-4)


def _prompt(stream, row):
    """The prompt of a row of the stream's first batch."""
    from alpamayo_dflash.standins.scenes import TRAINING, stream_seed
    from alpamayo_dflash.world.events import sample_scene
    from alpamayo_dflash.world.render import window

    return stream.target.prompt(window(sample_scene(stream_seed(stream.seed, TRAINING, 0, row))))


def test_the_patches_survive_their_bytes(tiny, batch):
    prompt = _prompt(SceneStream(tiny, seed=5, batch_size=3), 1)
    pixels = (batch.patches[1].float() - 127.5) / 127.5
    assert torch.equal(pixels.unflatten(-1, (3, 1, -1)).expand(-1, -1, 2, -1).flatten(1), prompt.pixel_values)


def test_training_lowers_both_losses_and_reaches_every_weight(tiny, batch):
    model = Alpamayo.from_config(tiny.config, tiny.vlm_files.folder)
    view, _ = held_out(1, seed=0)[0]
    config = TinyTrainConfig(steps=8, batch_size=3, warmup_steps=1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    rows = list(train_steps(model, BatchForward(model, model.prompt(view)), _repeat(batch), config))
    assert rows[-1]["text"] < 0.8 * rows[0]["text"]
    unmoved = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not unmoved


def _repeat(batch):
    while True:
        yield batch


def test_learning_rate_warms_up_and_ends_low():
    config = SimpleNamespace(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(config, 0.0, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(config, 1.0, 100) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"warmup_steps": 9999}, "warmup_steps is 9999"),
        ({"learning_rate": -1.0}, "-1.0"),
    ],
)
def test_refuses_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TinyTrainConfig(), **change)
