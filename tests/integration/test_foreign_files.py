"""Other people's files, and ours after a mishap: a ValueError that names the file, or a load."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants

from alpamayo_dflash import Alpamayo, DFlashDraft
from alpamayo_dflash.cli.main import main
from alpamayo_dflash.draft.config import DraftConfig
from alpamayo_dflash.standins.blueprint import RandomCheckpointConfig
from alpamayo_dflash.standins.untrained import write_random_checkpoint
from alpamayo_dflash.target import checkpoint
from alpamayo_dflash.target.checkpoint import read_vlm_config
from alpamayo_dflash.target.config import AlpamayoConfig
from alpamayo_dflash.train.checkpoint import read_state

KINDS = (None, True, 7, -1, 0.5, math.nan, "text", "", [], [1, "a", None], {}, {"a": 1})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "target"
    write_random_checkpoint(folder, RandomCheckpointConfig("small", shards=2))
    return folder


@pytest.fixture
def target(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "target")


@pytest.fixture
def draft(tmp_path):
    shape = DraftConfig(
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        vocab_size=40,
        block_size=4,
        context_len=4,
        target_layer_ids=(0,),
        num_target_layers=2,
        mask_token_id=40,
    )
    DFlashDraft.random(shape).save_pretrained(tmp_path / "draft")
    return tmp_path / "draft"


def places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))


def with_value(raw, path, value):
    if not path:
        return value
    changed = copy.deepcopy(raw)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def check_every_value(file, read):
    """Put a value of every kind in every place of a JSON file: `read` loads it or says where the fault is."""
    raw = json.loads(file.read_text())
    refused = loaded = 0
    for path in places(raw):
        for value in KINDS:
            file.write_text(json.dumps(with_value(raw, path, value)))
            try:
                read()
                loaded += 1
            except ValueError as error:
                assert str(file.parent) in str(error), f"{path} is {value!r}: {error}"
                refused += 1
    file.write_text(json.dumps(raw))
    read()
    return refused, loaded


def test_every_value_of_a_targets_config(target):
    refused, loaded = check_every_value(
        target / "config.json", lambda: AlpamayoConfig.from_file(target / "config.json")
    )
    assert refused > 200 and loaded > 20


def test_every_value_of_a_qwens_config(target):
    config = AlpamayoConfig.from_file(target / "config.json")
    refused, loaded = check_every_value(
        target / "vlm" / "config.json", lambda: read_vlm_config(target / "vlm", config)
    )
    assert refused > 50 and loaded > 20


def test_every_value_of_a_drafts_config(draft):
    refused, loaded = check_every_value(draft / "config.json", lambda: DFlashDraft.from_pretrained(draft))
    assert refused > 150 and loaded > 5


def test_every_outer_value_of_a_trainers_state(tmp_path):
    file = tmp_path / "trainer.json"
    for value in KINDS:
        file.write_text(json.dumps(value))
        with pytest.raises(ValueError, match=r"trainer\.json"):
            read_state(tmp_path)


WEIGHTS = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:50],
    "cut in the tensors": lambda data: data[: len(data) // 2],
    "a header of 2^60 bytes": lambda data: (2**60).to_bytes(8, "little") + data[8:],
    "a header that is no JSON": lambda data: data[:8] + b"x" * (len(data) - 8),
    "a pickle": lambda data: b"\x80\x04K\x01.",
    "text": lambda data: b"weights",
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_none(draft, target, case):
    for folder, read in ((draft, DFlashDraft.from_pretrained), (target, Alpamayo.from_pretrained)):
        file = sorted(folder.glob("*.safetensors"))[0]
        file.write_bytes(WEIGHTS[case](file.read_bytes()))
        with pytest.raises(ValueError, match=file.name):
            read(folder)


@pytest.mark.parametrize("value", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, "x", None])
def test_indexes_that_are_none(target, value):
    (target / "model.safetensors.index.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"index\.json"):
        Alpamayo.from_pretrained(target)


def test_an_index_names_no_file_elsewhere(target):
    index = target / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"] = {name: f"../{file}" for name, file in raw["weight_map"].items()}
    index.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="a file in the same folder"):
        Alpamayo.from_pretrained(target)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"model": {}}', "\x00", '{"version": "9"}'])
def test_tokenizers_that_are_none(target, text):
    (target / "vlm" / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        Alpamayo.from_pretrained(target)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (None, "attn_implementation", "flash_attention_2"),
        ("text_config", "attn_implementation", "flash_attention_2"),
        ("vision_config", "_attn_implementation", "flash_attention_3"),
        ("text_config", "tie_word_embeddings", True),
    ],
)
def test_what_does_not_act_loads(target, part, key, value):
    plain = Alpamayo.from_pretrained(target).state_dict()
    file = target / "vlm" / "config.json"
    raw = json.loads(file.read_text())
    (raw if part is None else raw[part])[key] = value
    file.write_text(json.dumps(raw))
    loaded = Alpamayo.from_pretrained(target).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.items())


def test_a_training_folder_is_taken_for_its_draft(draft, tmp_path):
    shutil.copytree(draft, tmp_path / "run" / "draft")
    inner = DFlashDraft.from_pretrained(tmp_path / "run")
    assert torch.equal(inner.fc.weight, DFlashDraft.from_pretrained(draft).fc.weight)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty/config\.json: no such file"):
        DFlashDraft.from_pretrained(tmp_path / "empty")


def test_a_missing_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="runs/target: no such folder"):
        Alpamayo.from_pretrained("runs/target")


@pytest.mark.parametrize("end", ["", "\n", " \r\n"])
def test_a_ref_with_a_line_end_is_read(target, tmp_path, monkeypatch, end):
    cache = tmp_path / "hub"
    repository = cache / "models--somebody--target"
    commit = "a" * 40
    shutil.copytree(target, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit + end)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(checkpoint, "HF_HUB_CACHE", str(cache))
    assert len(Alpamayo.from_pretrained("somebody/target", local_files_only=True).state_dict()) > 50


def command(capsys, *words):
    """A command's exit status and what it said; a traceback would be an exception here."""
    status = main([str(word) for word in words])
    return status, capsys.readouterr().err


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"RANK": "0"}, {"RANK": "", "WORLD_SIZE": ""}])
@pytest.mark.parametrize("stage", ["layers", "distill"])
def test_half_a_rank_is_refused_before_work(tmp_path, capsys, monkeypatch, environment, stage):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    more = ["--target-layers", "1,3"] if stage == "distill" else []
    words = (stage, "--model-path", "tiny", "--cache-dir", tmp_path, "--output-dir", tmp_path / "out", *more)
    status, said = command(capsys, *words)
    assert status == 2
    assert "in the environment" in said
    assert not (tmp_path / "out").exists()


def test_the_command_line_names_a_broken_file(draft, target, tmp_path, capsys):
    (draft / "config.json").write_text("[]")
    status, said = command(
        capsys, "evaluate", "--draft-model", draft, "--cache-dir", tmp_path, "--alpamayo-model", target
    )
    assert status == 2
    assert "Traceback" not in said


def test_a_closed_pipe_ends_quietly(tmp_path):
    code = (
        "import sys; sys.argv = ['alpamayo-dflash', 'world', '--out', sys.argv[1], '--num-chunks', '1', "
        "'--clips-per-chunk', '1', '--workers', '1']; "
        "from alpamayo_dflash.cli.main import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "world")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(120) == 141
    assert "Traceback" not in said and "BrokenPipe" not in said
