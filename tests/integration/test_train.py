"""Training end to end on a toy: phrases that the prompt's states foretell, in the real formats on disk."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.distill.shards import shard_path
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.target.checkpoint import read_target
from alpamayo_dflash.train import run as run_module
from alpamayo_dflash.train import trainer as trainer_module
from alpamayo_dflash.train.checkpoint import load_training
from alpamayo_dflash.train.optimizer import make_optimizer
from alpamayo_dflash.train.run import run
from alpamayo_dflash.train.start import first_draft
from tests.helpers.toy_training import (
    CONTEXT,
    LAYERS,
    PHRASES,
    TAPS,
    V,
    identity_of,
    make_toy,
    options,
    weights,
    write_target,
    write_vlm,
)

HAS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


def test_a_toy_is_learnt_to_nearly_the_longest_acceptance(made, tmp_path):
    config = options(
        made, tmp_path / "out", num_epochs=40, num_draft_layers=2, learning_rate=1e-2, log_interval=50
    )
    result = run(config)
    # Phrases of 9 to 11 tokens: 8 to 10 after the first, two passes each where every block is right.
    perfect = sum(8 + c % PHRASES % 3 for c in range(30, 40)) / sum(
        1 + (c % PHRASES % 3 > 0) for c in range(30, 40)
    )
    assert result["evaluations"][0]["acceptance_length"] < 1.5
    assert result["acceptance_length"] > 0.9 * perfect
    assert result["acceptance_length"] <= perfect
    assert result["held_out"] == {"clips": 10, "responses": 10, "too_short": 0, "greedy": True}
    assert result["train"]["clips"] == 30
    assert result["steps"] == 40 * result["steps_per_epoch"]
    expected = {entry["step"]: entry["expected_acceptance_length"] for entry in result["evaluations"]}
    assert result["acceptance_length"] == max(expected.values()) == expected[result["best_step"]]
    assert result["chosen_by"] == "expected acceptance"
    assert max(entry["acceptance_length"] for entry in result["evaluations"]) > 0.9 * perfect
    assert read_json(tmp_path / "out" / "train.json") == result
    assert list((tmp_path / "out" / "logs").glob("events*"))

    draft = DFlashDraft.from_pretrained(result["draft"])
    assert (draft.taps, draft.context_len, draft.block_size) == (TAPS, CONTEXT, 8)
    record = read_json(tmp_path / "out" / "draft" / "provenance.json")
    assert record["parents"]["target"] == identity_of(made / "target").hash
    assert run(config) == {**result, "nothing_to_do": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "kl", "kl_temperature": 2.0},
        {"loss_type": "ce+kl", "position_weights": "dpace", "dtype": "bfloat16"},
        {"loss_type": "lk", "labels": "argmax", "position_weights": "dpace"},
        {"train_embeddings": True, "prefix_weight_gamma": 3.0, "block_size": 4, "stride": 2}
        | {"optimizer": "adamw"},
        {"cache_gib": 0.0, "num_workers": 2, "save_every": 3, "context_len": 3, "target_layers": "2"},
    ],
)
def test_every_loss_and_option_brings_the_loss_down(made, tmp_path, changes):
    result = run(options(made, tmp_path / "out", num_epochs=4, **changes))
    names = ["ce", *(name for name in changes.get("loss_type", "ce").split("+") if name != "ce")]
    first, *_, last = result["losses"]
    assert list(last) == ["step", *names, "gradient_norm", "learning_rate"]
    assert last[names[-1]] < 0.8 * first[names[-1]]
    draft = DFlashDraft.from_pretrained(result["draft"])
    assert draft.config.trained_embeddings == changes.get("train_embeddings", False)
    if "save_every" in changes:
        assert {3, 6} <= {entry["step"] for entry in result["evaluations"]}
        assert draft.taps == (2,)
    if draft.config.trained_embeddings:
        target = load_file(made / "target" / "model.safetensors")["vlm.lm_head.weight"]
        assert 0 < float((draft.lm_head.weight.detach() - target).abs().max()) < 0.1


def test_a_mix_that_bounds_acceptance_teaches_the_toy(made, tmp_path):
    result = run(options(made, tmp_path / "out", num_epochs=16, learning_rate=1e-2, loss_type="kl+tv"))
    first, *_, last = result["losses"]
    assert last["tv"] < 0.5 * first["tv"]
    assert last["kl"] < 0.2 * first["kl"]
    assert result["acceptance_length"] > 2 * result["evaluations"][0]["acceptance_length"]


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=HAS_MUON)])
def test_an_interrupted_run_equals_an_uninterrupted_one(made, tmp_path, monkeypatch, optimizer):
    changes = {"save_every": 4, "loss_type": "ce+kl", "train_embeddings": True, "optimizer": optimizer}
    whole = run(options(made, tmp_path / "whole", **changes))

    class PulledError(Exception):
        """The plug."""

    step = trainer_module.Trainer.step

    def until(last):
        def limited(self, batch):
            if self.progress.step == last:
                raise PulledError
            return step(self, batch)

        return limited

    config = options(made, tmp_path / "parts", **changes)
    for last in (6, 9):  # past a checkpoint at step 4, and past the next
        monkeypatch.setattr(trainer_module.Trainer, "step", until(last))
        with pytest.raises(PulledError):
            run(config)
    monkeypatch.setattr(trainer_module.Trainer, "step", step)
    parts = run(config.changed(num_workers=0, resume="must"))
    for key in ("steps", "best_step", "acceptance_length", "evaluations", "losses"):
        assert parts[key] == whole[key]
    for folder in ("draft", "checkpoint"):
        one, other = weights(tmp_path / "whole" / folder), weights(tmp_path / "parts" / folder)
        assert all(torch.equal(one[name], other[name]) for name in one)


def contents(folder):
    """Every file below a folder but logs and locks, with its bytes."""
    files = (
        path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors")
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("changes", "steps_between"),
    [
        ({"save_every": 4, "log_interval": 100}, (7, 8)),  # found before a checkpoint
        ({"save_every": 5, "log_interval": 3}, (2, 3)),  # at a log entry
        ({"log_interval": 100}, (10, 12)),  # at the end
    ],
)
def test_nothing_is_written_after_a_loss_that_is_not_finite(
    made, tmp_path, monkeypatch, changes, steps_between
):
    bad, found = steps_between
    out, steps, before = tmp_path / "out", [], {}
    step = trainer_module.Trainer.step

    def spoilt(self, batch):
        steps.append(self.progress.step + 1)
        if steps[-1] == bad:
            before.update(contents(out))
            batch = dataclasses.replace(batch, states=batch.states * torch.inf)
        return step(self, batch)  # the weights are bad from here on

    monkeypatch.setattr(trainer_module.Trainer, "step", spoilt)
    message = rf"not finite at step {bad}: weight of ce [0-9.]+, ce nan, .*gradient norm nan; .* is whole"
    with pytest.raises(ValueError, match=message):
        run(options(made, out, **changes))
    assert steps == list(range(1, found + 1))
    assert contents(out) == before
    assert not (out / "train.json").exists()
    # Mended, the run goes on from its checkpoint and is the one that was never spoilt.
    monkeypatch.undo()
    mended, expected = run(options(made, out, **changes)), run(options(made, tmp_path / "whole", **changes))
    for key in ("losses", "evaluations", "best_step"):
        assert mended[key] == expected[key]


def test_a_step_is_not_read_before_the_next_log_entry_or_evaluation(made, tmp_path, monkeypatch):
    steps, read = [], []
    note, check = trainer_module.FirstFault.note, trainer_module.FirstFault.check

    def noted(self, step, report):
        steps.append(step)
        note(self, step, report)

    def checked(self, names):
        read.append(steps[-1])
        check(self, names)

    monkeypatch.setattr(trainer_module.FirstFault, "note", noted)
    monkeypatch.setattr(trainer_module.FirstFault, "check", checked)
    result = run(options(made, tmp_path / "out", log_interval=4))
    assert result["steps_per_epoch"] == 6
    assert steps == list(range(1, 13))
    assert read == [4, 6, 8, 12]


def test_a_checkpoint_of_other_options_is_refused_or_goes_on_where_they_are_the_same(made, tmp_path):
    config = options(made, tmp_path / "out", num_epochs=1, loss_type="ce+tv+kl")
    run(config)
    assert run(config.changed(loss_type="kl+ce+tv"))["nothing_to_do"]
    with pytest.raises(ValueError, match=r"made with loss_type 'ce\+kl\+tv', not 'ce\+kl'"):
        run(config.changed(loss_type="kl+ce"))
    path = tmp_path / "out" / "checkpoint" / "trainer.json"
    state = read_json(path)
    # An earlier version did not have the option, and did what is its default now.
    del state["config"]["loss"]["labels"]
    path.write_text(json.dumps(state))
    assert run(config)["nothing_to_do"]
    with pytest.raises(ValueError, match="made with labels 'emitted', not 'argmax'"):
        run(config.changed(labels="argmax"))
    state["config"]["loss"]["terms"] = ["ce"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"options that this version does not have, \['terms'\]"):
        run(config)


def test_a_training_from_before_options_stood_by_component(made, tmp_path):
    """Finished it is what it was; unfinished it is refused, for its steps were others."""
    config = options(made, tmp_path / "out", num_epochs=1)
    run(config)
    path = tmp_path / "out" / "checkpoint" / "trainer.json"
    state = read_json(path)
    state["config"] = {name: value for part in state["config"].values() for name, value in part.items()}
    path.write_text(json.dumps(state))
    assert run(config)["nothing_to_do"]
    with pytest.raises(ValueError, match="made with seed 0, not 1"):
        run(config.changed(seed=1))
    state["progress"]["step"] -= 1
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="unfinished, and of a version before options stood by component"):
        run(config)


def test_a_training_whose_best_was_chosen_otherwise_does_not_continue(made, tmp_path):
    config = options(made, tmp_path / "out", num_epochs=1)
    run(config)
    path = tmp_path / "out" / "checkpoint" / "trainer.json"
    state = read_json(path)
    for entry in state["progress"]["evaluations"]:
        del entry["expected_acceptance_length"]
    path.write_text(json.dumps(state))
    assert run(config)["nothing_to_do"]
    state["progress"]["step"] -= 1
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"lack expected_acceptance_length, .* --resume never to start over"):
        run(config)


@HAS_MUON
def test_a_checkpoint_of_another_optimizer_does_not_continue(made, tmp_path):
    config = options(made, tmp_path / "out", num_epochs=1, optimizer="muon")
    run(config)
    with pytest.raises(ValueError, match="made with optimizer 'muon', not 'adamw'"):
        run(config.changed(optimizer="adamw"))
    kept = load_file(tmp_path / "out" / "checkpoint" / "optimizer.safetensors")
    matrix, vector = "layers.0.mlp.up_proj.weight", "norm.weight"
    assert {name for name in kept if name.startswith(f"{matrix}:")} == {f"{matrix}:momentum_buffer"}
    assert {name for name in kept if name.startswith(f"{vector}:")} == {
        f"{vector}:{part}" for part in ("step", "exp_avg", "exp_avg_sq")
    }
    draft = DFlashDraft.from_pretrained(tmp_path / "out" / "checkpoint")
    other = make_optimizer(draft, config.changed(optimizer="adamw"), 1)
    with pytest.raises(ValueError, match=r"momentum_buffer.*the optimizer keeps numbers of shapes.*exp_avg"):
        load_training(tmp_path / "out" / "checkpoint", draft, other)


def test_a_run_with_other_options_does_not_continue(made, tmp_path):
    config = options(made, tmp_path / "out", num_epochs=1)
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        run(config.changed(resume="must"))
    first = run(config)
    with pytest.raises(ValueError, match=r"made with learning_rate 0\.003, not 0\.001"):
        run(config.changed(learning_rate=1e-3))
    # The target counts by its hash, not by what it is called.
    shutil.copytree(config.run.target_model, tmp_path / "renamed")
    assert run(config.changed(target_model=str(tmp_path / "renamed")))["nothing_to_do"]
    again = run(config.changed(learning_rate=1e-3, resume="never"))
    assert again["losses"] != first["losses"]


# As torchrun --standalone --nproc-per-node 2 does, but the two are forked after the imports. They get no
# batch after a step, at which there is a checkpoint.
TORCHRUN = """
import sys
from pathlib import Path
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from alpamayo_dflash.train.config import TrainConfig
from alpamayo_dflash.train.run import run
from alpamayo_dflash.train.start import first_draft
from alpamayo_dflash.train.trainer import Trainer
target, data, out, last, changes = sys.argv[1:]
config = TrainConfig.flat(target, Path(data), Path(out), **eval(changes))
batches = Trainer._batches
def until(self):
    for batch in batches(self):
        if self.progress.step == int(last):
            return
        yield batch
Trainer._batches = until
launch = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="two",
                      start_method="fork", monitor_interval=0.1)
elastic_launch(launch, run)(config)
"""


def on_two(made, out, last, changes):
    """Train on two processes as far as the step `last`."""
    script = out.parent / "train.py"
    script.write_text(TORCHRUN)
    places = [str(made / "target"), str(made / "data"), str(out), str(last), repr(changes)]
    done = subprocess.run(
        [sys.executable, str(script), *places],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_starting_over_forgets_the_old_checkpoint(made, tmp_path, monkeypatch):
    """Killed before its first checkpoint, a run that started over must not be taken for the old one."""
    run(options(made, tmp_path / "out", num_epochs=1))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module.Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(options(made, tmp_path / "out", num_epochs=1, resume="never"))
    monkeypatch.undo()
    assert not (tmp_path / "out" / "checkpoint").exists()
    again = run(options(made, tmp_path / "out", num_epochs=1))
    assert "nothing_to_do" not in again


def test_a_checkpoint_of_other_data_does_not_continue(made, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(made / "data", other)
    config = options(made, tmp_path / "out", num_epochs=1).changed(data_dir=other)
    run(config)
    manifest = next(other.glob("manifest-rank*.json"))
    content = read_json(manifest)
    manifest.write_text(json.dumps(content | {"settings": content["settings"] | {"seed": 1}}))
    with pytest.raises(ValueError, match="made from another distill"):
        run(config)


@pytest.mark.parametrize(
    ("optimizer", "norm_to"), [("adamw", 1e-3), pytest.param("muon", 1e-2, marks=HAS_MUON)]
)
def test_one_process_two_and_one_again_take_the_steps_of_one(made, tmp_path, monkeypatch, optimizer, norm_to):
    """Interrupted twice and continued on another number of processes, with as many blocks a step.

    Muon makes its matrices orthogonal in bfloat16, which moves gradients more than losses.
    """
    changes = {
        "optimizer": optimizer,
        "num_epochs": 12,
        "batch_size": 96,
        "learning_rate": 3e-3,
        "num_draft_layers": 1,
        "held_out_chunks": "3",
        "log_interval": 1,
        "loss_type": "ce+kl+tv+lk",
        "previous_head": "none",
        "position_weights": "dpace",
    }
    whole = run(options(made, tmp_path / "whole", **changes))
    assert whole["steps"] == 72
    config = options(made, tmp_path / "parts", **changes)
    step = trainer_module.Trainer.step

    class PulledError(Exception):
        """The plug."""

    def until_eight(self, batch):
        if self.progress.step == 8:
            raise PulledError
        return step(self, batch)

    monkeypatch.setattr(trainer_module.Trainer, "step", until_eight)
    with pytest.raises(PulledError):
        run(config)
    monkeypatch.undo()
    on_two(made, tmp_path / "parts", 60, changes | {"batch_size": 48})
    state = read_json(tmp_path / "parts" / "checkpoint" / "trainer.json")
    assert (state["world_size"], state["progress"]["step"]) == (2, 60)
    parts = run(config)  # the 60 steps on two are 6 to 60
    for found, expected in zip(parts["losses"], whole["losses"], strict=True):
        norm = found.pop("gradient_norm"), expected.pop("gradient_norm")
        assert norm[0] == pytest.approx(norm[1], rel=norm_to), found["step"]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), found["step"]
    assert parts["evaluations"][0] == whole["evaluations"][0]
    assert [entry["tokens"] for entry in parts["evaluations"]] == [
        entry["tokens"] for entry in whole["evaluations"]
    ]
    for found, expected in zip(parts["evaluations"], whole["evaluations"], strict=True):
        pair = (each["expected_acceptance_length"] for each in (found, expected))
        assert next(pair) == pytest.approx(next(pair), rel=1e-2), found["step"]
    with pytest.raises(
        ValueError, match=r"96 blocks a step on all processes \(1\), not with 48 on each of 1"
    ):
        run(config.changed(batch_size=48))


@pytest.mark.parametrize(
    ("changes", "processes", "said"),
    [
        ({}, 2, r"96 blocks a step on all processes \(1\), not with 96 on each of 2; use a batch_size of 48"),
        ({"batch_size": 14}, 7, "7 processes cannot share them equally"),
        ({"batch_size": 48, "scale_lr": True}, 2, "made on 1 processes with scale_lr"),
    ],
)
def test_another_number_of_processes_must_keep_the_step(made, tmp_path, changes, processes, said):
    config = options(made, tmp_path / "out", num_epochs=1, scale_lr=changes.get("scale_lr", False))
    run(config)
    data = DistillData(made / "data")
    with pytest.raises(ValueError, match=said):
        run_module._earlier(config.changed(**changes), processes, data)
    fitting = config.changed(batch_size=96 // 2)
    if not config.optimizer.scale_lr:
        assert run_module._earlier(fitting, 2, data)["world_size"] == 1


def test_training_goes_on_from_a_draft(made, tmp_path):
    first = run(options(made, tmp_path / "first", num_epochs=8))
    second = run(
        options(
            made, tmp_path / "second", init_from=first["draft"], num_draft_layers=None, learning_rate=1e-5
        )
    )
    assert second["evaluations"][0]["expected_acceptance_length"] == first["acceptance_length"]
    wider = run(
        options(
            made,
            tmp_path / "wider",
            init_from=first["draft"],
            num_draft_layers=None,
            block_size=16,
            num_epochs=1,
        )
    )
    assert wider["draft_config"]["block_size"] == 16


@pytest.mark.parametrize("kind", ["bigram", "mlp", "gru"])
def test_a_head_on_previous_picks_is_trained_kept_and_let_go(made, tmp_path, kind):
    """From nothing, from a draft without one, with fewer columns; and a head of another kind begins anew."""
    plain = run(options(made, tmp_path / "plain", num_epochs=4))
    with_head = {"num_epochs": 2, "num_draft_layers": None, "previous_size": 8, "loss_type": "kl"}
    grown = run(options(made, tmp_path / "grown", init_from=plain["draft"], previous_head=kind, **with_head))
    # A new head adds nothing yet, so the first look finds the draft as it was.
    assert grown["evaluations"][0]["expected_acceptance_length"] == plain["acceptance_length"]
    assert grown["losses"][-1]["kl"] < grown["losses"][0]["kl"]
    moved = weights(tmp_path / "grown" / "checkpoint")
    names = {name for name in moved if name.startswith("previous.")}
    assert {"previous.token.weight", "previous.out.weight"} <= names
    assert moved["previous.out.weight"].any()

    config = options(made, tmp_path / "again", init_from=grown["draft"], num_draft_layers=None)
    fewer, best = torch.arange(0, 40, 2), weights(tmp_path / "grown" / "draft")
    manifest = DistillData(made / "data").manifest
    reduced = first_draft(config, manifest, read_target(made / "target"), fewer)
    assert (reduced.config.previous_head, reduced.config.previous_size) == (kind, 8)
    assert torch.equal(reduced.previous.out.weight, best["previous.out.weight"][fewer])
    other = config.changed(previous_head="mlp" if kind == "gru" else "gru")
    anew = first_draft(other, manifest, read_target(made / "target"))
    assert anew.previous.kind != kind and not anew.previous.out.weight.any()
    assert torch.equal(anew.fc.weight, best["fc.weight"])

    without = run(
        options(
            made,
            tmp_path / "no",
            init_from=grown["draft"],
            num_draft_layers=None,
            num_epochs=1,
            previous_head="none",
        )
    )
    assert DFlashDraft.from_pretrained(without["draft"]).previous is None


def test_a_draft_of_another_vocabulary_is_resized_by_option(made, tmp_path):
    small = dataclasses.replace(
        DFlashDraft.from_pretrained(run(options(made, tmp_path / "a", num_epochs=1))["draft"]).config,
        vocab_size=V - 10,
        mask_token_id=V - 10,
        trained_embeddings=True,
    )
    DFlashDraft.random(small).save_pretrained(tmp_path / "small")
    config = options(made, tmp_path / "b", init_from=tmp_path / "small", num_draft_layers=None, num_epochs=1)
    with pytest.raises(ValueError, match=r"54 tokens, the target's 64.*--full-vocab"):
        run(config)
    result = run(config.changed(full_vocab=True))
    draft = DFlashDraft.from_pretrained(result["draft"])
    assert draft.config.mask_token_id == V
    head = load_file(made / "target" / "model.safetensors")["vlm.lm_head.weight"]
    assert torch.equal(draft.lm_head.weight[V - 10 :], head[V - 10 :])  # kept, and frozen here


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"held_out_chunks": "9"}, "no held-out clip"),
        ({"held_out_chunks": "0-3"}, "no training clip"),
        ({"context_len": 7}, "keeps 6 prompt states"),
        ({"target_layers": "0,1"}, r"also needs \[1\]"),
    ],
)
def test_options_that_the_data_cannot_serve_leave_nothing_behind(made, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        run(options(made, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_another_target_is_refused(made, tmp_path):
    write_target(tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    tensors = load_file(path)
    tensors["vlm.lm_head.weight"] += 1
    save_file(tensors, path)
    config = options(made, tmp_path / "out", num_epochs=1).changed(target_model=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="made with another target"):
        run(config)
    assert run(config.changed(other_target=True))["steps"] > 0
    config = config.changed(output_dir=tmp_path / "fresh")
    write_vlm(tmp_path / "other", LAYERS + 1)
    with pytest.raises(ValueError, match="num_target_layers 3; this target has 4"):
        run(config)
    del tensors["vlm.lm_head.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 missing: vlm.lm_head.weight"):
        run(config)
    path.write_bytes(path.read_bytes()[:64])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        run(config)
    with pytest.raises(ValueError, match="no such folder"):
        run(config.changed(target_model=str(tmp_path / "none")))


def test_a_corrupt_shard_is_named(made, tmp_path):
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(made / "data"), str(data)], check=True)
    path = shard_path(data, "rank0-1.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    config = options(made, tmp_path / "out").changed(data_dir=data)
    with pytest.raises(ValueError, match=r"rank0-1.safetensors: .*corrupt"):
        run(config)


def test_a_corrupt_response_is_named_when_it_is_read_or_its_shard_left_out(made, tmp_path, capsys):
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(made / "data"), str(data)], check=True)
    path = shard_path(data, "rank0-1.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    config = options(made, tmp_path / "out").changed(data_dir=data)
    with pytest.raises(ValueError, match=r"rank0-1.safetensors: corrupt, .* is not what was written"):
        run(config)
    config = config.changed(output_dir=tmp_path / "less", on_bad_shard="skip")
    result = run(config)
    assert list(result["bad_shards"]) == ["rank0-1.safetensors"]
    assert "1 shards left out" in capsys.readouterr().err
    whole = DistillData(made / "data").samples
    left = [sample for sample in whole if sample.shard != "rank0-1.safetensors"]
    counts = result["train"]["responses"] + result["held_out"]["responses"]
    assert 0 < counts <= len(left) < len(whole)
    assert read_json(tmp_path / "less" / "train.json")["bad_shards"] == result["bad_shards"]
    assert run(config)["nothing_to_do"]
    with pytest.raises(ValueError, match="made from another distill"):  # the whole set is another one
        run(config.changed(data_dir=made / "data"))


def test_a_checkpoint_with_files_of_another_is_refused(made, tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        run(options(made, tmp_path / name, seed=seed))
    one, two = (tmp_path / name / "checkpoint" / "optimizer.safetensors" for name in ("one", "two"))
    shutil.copy(two, one)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors: corrupt, or of another checkpoint"):
        run(options(made, tmp_path / "one", seed=1, resume="must"))


def test_starting_over_removes_nothing_where_the_draft_cannot_be_replaced(made, tmp_path):
    config = options(made, tmp_path / "out", num_epochs=1)
    run(config)
    (tmp_path / "out" / "draft" / "README.md").write_text("card")
    with pytest.raises(ValueError, match=r"holds \['README\.md'\]"):
        run(config.changed(resume="never"))
    assert (tmp_path / "out" / "checkpoint" / "trainer.json").exists()
    assert run(config)["nothing_to_do"]
