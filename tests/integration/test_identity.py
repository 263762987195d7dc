"""Folders are known by the content that acts: those of before go on, and a README changes nothing."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from alpamayo_dflash.cli.main import main
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.draft.formats import draft_identity
from alpamayo_dflash.evaluate.rows import RowStore
from alpamayo_dflash.target.checkpoint import SHIPPED

STORED = Path(__file__).parents[1] / "data" / "stored"  # made at ada2e04, on two chunks of two clips
OLD = "made when every file of a folder counted"
COMMANDS = {
    "layers": ("--chunks", "0", "--num-samples", "2", "--num-target-layers", "2", "--no-plot"),
    "distill": (
        "--chunks",
        "0-1",
        "--layers-file",
        "layers",
        "--context-len",
        "4",
        "--samples-per-clip",
        "1",
    ),
    # Named, since an older run's options that were left out stand for what was the default then.
    "train": (
        *("--max-steps", "2", "--num-draft-layers", "1", "--held-out-chunks", "1"),
        *("--loss-type", "ce", "--previous-head", "none"),
    ),
    "evaluate": ("--draft-model", "train", "--chunks", "1", "--temperature", "0", "--detailed-timing"),
}
INPUTS = {
    "layers": ("--model-path", "target", "--cache-dir", "world"),
    "distill": ("--model-path", "target", "--cache-dir", "world"),
    "train": ("--target-model", "target", "--data-dir", "data"),
    "evaluate": ("--alpamayo-model", "target", "--cache-dir", "world"),
}
FOLDERS = {"layers": "layers", "distill": "data", "train": "train", "evaluate": "evaluation"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity")
    given = ["--num-chunks", "2", "--clips-per-chunk", "2", "--workers", "1"]
    assert main(["world", "--out", str(folder / "world"), *given]) == 0
    shutil.copytree(SHIPPED, folder / "target")
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A folder with the world, the target and what was made at ada2e04."""
    for name in FOLDERS.values():
        shutil.copytree(STORED / name, tmp_path / name)
    shutil.copytree(made / "target", tmp_path / "target")
    (tmp_path / "evaluation" / "rows.jsonl").unlink()  # of a run that was not finished
    (tmp_path / "world").symlink_to(made / "world")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys):
    """Run a command; its object and what it printed beside it."""

    def run(name, *more, out=None, expected=0):
        arguments = [name, *INPUTS[name], *COMMANDS[name], "--output-dir", out or FOLDERS[name], *more]
        status = main(arguments)
        printed = capsys.readouterr()
        assert status == expected, printed.err
        return (json.loads(printed.out) if status == 0 else {}), printed.err

    return run


@pytest.mark.parametrize("name", FOLDERS)
def test_what_was_made_before_is_finished(work, command, name):
    answer, printed = command(name)
    assert answer["nothing_to_do"]
    assert OLD not in printed


@pytest.mark.parametrize("name", FOLDERS)
def test_what_was_made_before_goes_on_beside_a_new_file_and_says_so(work, command, name):
    (work / "target" / "README.md").write_text("notes")
    answer, printed = command(name)
    assert answer["nothing_to_do"]
    assert OLD in printed


def test_each_stage_takes_what_was_made_before(work, command):
    command("distill", out="data-again")
    ids = [
        [(sample.clip_id, sample.token_ids) for sample in DistillData(work / name).samples]
        for name in ("data", "data-again")
    ]
    assert ids[0] == ids[1]
    assert command("train", out="train-again")[0]["steps"] == 2
    answer, _ = command("evaluate", "--num-samples", "1", out="evaluation-again")
    assert answer["lossless"]["greedy_identical"] == 1
    assert main(["report", "--evaluation", "evaluation/evaluation.json", "--out", "report"]) == 0


def test_another_draft_in_its_old_place_is_another_evaluation(work, command):
    weights = work / "train" / "draft" / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(weights).items()}, weights)
    answer, printed = command("evaluate", "--num-samples", "2")
    assert "nothing_to_do" not in answer
    assert "evaluation.json: held another evaluation, now in evaluation.of-" in printed
    [aside] = (work / "evaluation").glob("evaluation.of-*.json")
    assert json.loads(aside.read_text()) == json.loads(
        (STORED / "evaluation" / "evaluation.json").read_text()
    )


@pytest.fixture
def anew(work, command):
    """The same folders, made now."""
    for name, folder in FOLDERS.items():
        shutil.rmtree(work / folder)
        command(name)
    return work


@pytest.mark.slow
def test_what_is_made_now_knows_its_parents_by_what_is_read(anew, command):
    (anew / "target" / "README.md").write_text("notes")
    (anew / "target" / "vlm" / "merges.txt").write_text("")
    (anew / "train" / "draft" / "README.md").write_text("card")
    shutil.copytree(anew / "target", anew / "elsewhere")
    places = {
        "layers": ("--model-path", str(anew / "elsewhere"), "--dtype", "float32"),
        "distill": ("--model-path", "./elsewhere/", "--target-dtype", "float32", "--dtype", "float32"),
        "train": ("--target-model", "elsewhere", "--data-dir", str(anew / "data"), "--block-size", "8"),
        "evaluate": ("--alpamayo-model", "elsewhere", "--draft-model", "./train/draft", "--dtype", "float32"),
    }
    for name, more in places.items():
        answer, printed = command(name, *more)
        assert answer["nothing_to_do"], name
        assert OLD not in printed
    clips = json.loads((anew / "evaluation" / "evaluation.json").read_text())["head"]["clips"]
    (anew / "clips.txt").write_text("\n".join(clips))
    arguments = ["evaluate", *INPUTS["evaluate"], "--draft-model", "train", "--clip-ids", "clips.txt"]
    assert main([*arguments, "--temperature", "0", "--detailed-timing", "--output-dir", "evaluation"]) == 0
    assert not list((anew / "evaluation").glob("*.of-*"))

    weights = anew / "target" / "model.safetensors"
    tensors = load_file(weights)
    tensors["action_out_proj.bias"] += 1
    save_file(tensors, weights)
    for name in ("layers", "distill", "train"):
        _, printed = command(name, expected=2)
        assert "target" in printed, name
    assert "nothing_to_do" not in command("evaluate")[0]


def test_a_tree_of_training_leaves_the_draft_what_it_is(work):
    draft = work / "train" / "draft"
    before = draft_identity(draft)
    for name in ("optimizer.safetensors", "trainer.json", "README.md"):
        (draft / name).write_text("{}")
    after = draft_identity(work / "train")
    assert after.hash == before.hash
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"block_size": 4}))
    assert draft_identity(draft).hash != before.hash


def test_data_are_what_they_hold(work):
    before = DistillData(work / "data").identity.hash
    manifest = json.loads((work / "data" / "manifest-rank0.json").read_text())
    manifest["provenance"]["wall_s"] = 1.5
    (work / "data" / "manifest-rank0.json").write_text(json.dumps(manifest))
    assert DistillData(work / "data").identity.hash == before
    manifest["shards"][0]["sha256"] = "0" * 64
    (work / "data" / "manifest-rank0.json").write_text(json.dumps(manifest))
    assert DistillData(work / "data").identity.hash != before


def test_a_newer_rule_is_refused(work, command):
    for path in (work / "data").glob("*.json"):
        content = json.loads(path.read_text())
        if "settings" in content:
            content["settings"]["identity"] = 3
            path.write_text(json.dumps(content))
    _, printed = command("train", out="new", expected=2)
    assert "says identity 3; this version knows 1 and 2" in printed
    _, printed = command("distill", expected=2)
    assert "identity 3" in printed


def test_an_interrupted_evaluation_goes_on_by_another_name(work, command):
    command("evaluate", out="first")
    result = json.loads((work / "first" / "evaluation.json").read_text())
    store = RowStore(work / "second" / "rows.jsonl", result["head"])
    row = result["clip_rows"][0] | {"prompt_tokens": 12345}  # so that it is seen where it came from
    (work / "second").mkdir()
    store.add(row)
    command("evaluate", "--alpamayo-model", str(work / "target"), out="second")
    rows = json.loads((work / "second" / "evaluation.json").read_text())["clip_rows"]
    assert len(rows) == 2
    assert rows[0]["prompt_tokens"] == 12345
