"""Training that decodes held-out clips: the command's own decoding, held to the simulated walk."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alpamayo_dflash.cli import real_acceptance
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.common import machine
from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.observer import Recorder
from alpamayo_dflash.distill.config import DistillConfig
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.distill.run import run as distill
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.checkpoint import read_target
from alpamayo_dflash.train import run as train_run
from alpamayo_dflash.train.config import TrainConfig
from alpamayo_dflash.train.data import BlockData
from alpamayo_dflash.train.expected import expect
from alpamayo_dflash.train.run import run
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.run import run as write_world

CLIPS = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    write_world(WorldConfig(folder / "world", num_chunks=2, clips_per_chunk=CLIPS, seed=3, workers=1))
    distill(
        DistillConfig(
            "tiny", folder / "world", folder / "data", target_layers="2,4,6", samples_per_clip=2, seed=1
        )
    )
    return folder


def options(made, out, **changes):
    values = {
        "num_epochs": 2,
        "batch_size": 12,
        "learning_rate": 2e-4,
        "init_from": made / "first" / "draft",
        "held_out_chunks": "1",
        "log_interval": 1,
        "real_acceptance": made / "world",
        "real_acceptance_seeds": 2,
        **changes,
    }
    return TrainConfig.flat("tiny", made / "data", out, **values)


@pytest.fixture(scope="module")
def trained(made):
    # It has learnt the very clips that are held out after it, so that much is accepted.
    first = {"init_from": None, "num_draft_layers": 1, "num_epochs": 16, "held_out_chunks": "0"}
    first |= {"loss_type": "ce", "previous_head": "none"}
    run(options(made, made / "first", **first, learning_rate=5e-3, real_acceptance=None))
    return real_acceptance.train(options(made, made / "out"))


def test_real_and_simulated_greedy_acceptance_are_the_same(trained, made):
    epoch = trained["steps_per_epoch"]
    assert [entry["step"] for entry in trained["evaluations"]] == [0, epoch, 2 * epoch]
    for entry in trained["evaluations"]:
        assert "real_difference" not in entry
        assert (entry["real_clips"], entry["real_compared"], entry["real_differing"]) == (CLIPS, CLIPS, 0)
        # All held-out responses are decoded here, so the counts are the simulation's.
        assert (entry["real_greedy_tokens"], entry["real_greedy_passes"]) == (
            entry["tokens"],
            entry["passes"],
        )
        assert entry["real_greedy_acceptance_length"] == pytest.approx(entry["acceptance_length"])
        assert entry["real_passes"] > entry["real_greedy_passes"]  # two seeds
        assert entry["real_greedy_acceptance_length"] > 1.5
    events = EventAccumulator(str(made / "out" / "logs"))
    events.Reload()
    logged = [event.value for event in events.Scalars("held_out/real_acceptance_length")]
    assert logged == pytest.approx([entry["real_acceptance_length"] for entry in trained["evaluations"]])


def test_the_best_draft_is_the_best_at_temperature_0_6(trained, made):
    lengths = {entry["step"]: entry["real_acceptance_length"] for entry in trained["evaluations"]}
    assert trained["acceptance_length"] == max(lengths.values())
    assert lengths[trained["best_step"]] == trained["acceptance_length"]
    assert trained["chosen_by"] == "real acceptance"
    assert read_json(made / "out" / "train.json")["evaluations"] == trained["evaluations"]
    # Decoding leaves the run as it is: without it the numbers are the same.
    plain = run(options(made, made / "plain", real_acceptance=None))
    assert plain["losses"] == trained["losses"]
    assert plain["chosen_by"] == "expected acceptance"
    assert plain["acceptance_length"] == max(
        entry["expected_acceptance_length"] for entry in plain["evaluations"]
    )
    assert [entry["passes"] for entry in plain["evaluations"]] == [
        entry["passes"] for entry in trained["evaluations"]
    ]


def test_decoding_accepts_what_drawn_responses_let_expect(trained, made, tmp_path):
    """Passes that wrote these very responses, each sample's own, without the rules for a sentence's end."""
    config = DistillConfig("tiny", made / "world", tmp_path / "data", target_layers="2,4,6", chunks="1")
    distill(replace(config, samples_per_clip=25, seed=1))
    data, target = DistillData(tmp_path / "data"), Alpamayo.from_pretrained("tiny")
    drawn = [sample for sample in data.samples if sample.temperature > 0]
    draft = DFlashDraft.from_pretrained(made / "first" / "draft")
    frozen = read_target("tiny", local_files_only=True)
    draft.bind(frozen.embedding, frozen.head, frozen.num_layers)
    blocks = BlockData(data, drawn, draft.config, teacher=True, unlabelled=target.traj_ids, cache_bytes=2**28)
    expected = expect(draft, blocks)

    # In the device's rounds, where samples of one prompt do not find each other's proposals.
    source, alone = ClipSource(made / "world"), DecodeConfig(loop="device", sentence_end="off")
    decoder = SpeculativeDecoder(target, draft, alone)
    tokens, passes = 0, 0
    for clip in {sample.clip_id: sample for sample in drawn}.values():
        recorder, prompt = Recorder(), target.prompt(source.window(clip.clip_id, clip.t0_us))
        options = {"num_traj_samples": 24, "seed": clip.seed, "temperature": 0.6, "trajectories": False}
        decoder.generate(prompt, observer=recorder, **options)
        tokens += sum(len(part.emitted) for trace in recorder.rounds for part in trace.samples)
        passes += sum(len(trace.samples) for trace in recorder.rounds)
    assert tokens == expected.tokens
    assert expected.length == pytest.approx(tokens / passes, rel=0.04) and expected.length > 1.3


def test_a_difference_is_reported_with_its_first_place(trained, made, tmp_path, monkeypatch, capsys):
    """As if the data's states were of another layer than the draft meets when it decodes."""
    tensors = train_run.DistillData.tensors

    def shifted(self, sample):
        found = tensors(self, sample)
        return found | {name: found[name].roll(1, dims=1) for name in ("prompt_states", "states")}

    monkeypatch.setattr(train_run.DistillData, "tensors", shifted)
    result = real_acceptance.train(options(made, tmp_path / "out", max_steps=1, learning_rate=1e-9))
    entry = result["evaluations"][0]
    assert entry["real_compared"] == CLIPS and entry["real_differing"] >= 1
    first = entry["real_difference"]
    assert first["what"] == "accepted" and first["place"] >= 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"of {CLIPS} clips, first on {first['clip_id']} at token {first['place']}: one of the two" in said


def test_what_does_not_fit_is_refused_before_anything_is_trained(made, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"training with the target beside it .* a smaller batch_size"):
        real_acceptance.train(options(made, tmp_path / "out"))
    assert not (tmp_path / "out" / "checkpoint").exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="give both or neither"):
        run(options(made, tmp_path / "out"))
    config = options(made, tmp_path / "out", real_acceptance=None)
    with pytest.raises(ValueError, match="give both or neither"):
        run(config, partial(real_acceptance.open_evaluate, config))


def test_a_run_goes_on_only_with_the_same_choice_of_the_best(trained, made):
    assert real_acceptance.train(options(made, made / "out"))["nothing_to_do"]
    with pytest.raises(ValueError, match="made with real_acceptance True, not False"):
        run(options(made, made / "out", real_acceptance=None))


def test_the_copy_that_decodes_is_of_its_own(made):
    draft = DFlashDraft.from_pretrained(made / "out" / "draft")
    copy = real_acceptance._copied(draft)
    assert all(torch.equal(value, copy.state_dict()[name]) for name, value in draft.state_dict().items())
    copy.mask_embedding.add_(1)
    assert not torch.equal(copy.mask_embedding, draft.mask_embedding)
    assert draft.mask_embedding.requires_grad and not copy.mask_embedding.requires_grad
