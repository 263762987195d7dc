"""What users build on: names, flags, and the files that finished commands have written."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import alpamayo_dflash
from alpamayo_dflash import SpeculativeDecoder
from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.draft.formats import from_json
from alpamayo_dflash.evaluate.rows import RowStore
from alpamayo_dflash.layers.choice import read_choice
from alpamayo_dflash.train.config import DEFAULT_OPTIMIZER
from tests.helpers import public_list

STORED = Path(__file__).parents[1] / "data" / "stored"
RESULTS = Path(__file__).parents[2] / "docs" / "results"
NAMES = {
    *("Alpamayo", "BlockDraft", "ClipSource", "DFlashDraft", "DecodeConfig", "Listed", "Observer", "Prompt"),
    *("Proposed", "Recorder", "Result", "SpeculativeDecoder", "Window", "accelerate"),
}


def test_the_roots_names():
    assert set(alpamayo_dflash.__all__) == NAMES | {"__version__"}
    for name in alpamayo_dflash.__all__:
        assert getattr(alpamayo_dflash, name) is not None
    with pytest.raises(AttributeError, match="Nobody"):
        alpamayo_dflash.Nobody  # noqa: B018


def test_the_decoders_arguments():
    made = list(inspect.signature(SpeculativeDecoder).parameters)
    assert made == ["target", "draft", "config", "proposers"]
    generate = list(inspect.signature(SpeculativeDecoder.generate).parameters)
    assert generate[1:8] == [
        "window", "temperature", "top_p", "num_traj_samples", "seed", "max_new_tokens", "observer"
    ]  # fmt: skip


def test_no_flag_is_gone():
    stored, now = json.loads(public_list.FILE.read_text()), public_list.flags()
    stored["train"]["--optimizer"] = repr(DEFAULT_OPTIMIZER)  # the installed torch decides
    for command, flags in stored.items():
        assert flags.items() <= now[command].items(), command


def test_the_module_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "alpamayo_dflash.cli.main", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(command in done.stdout for command in public_list.flags())


def test_stored_layers_are_read():
    assert read_choice(STORED / "layers") == (2, 6)


def test_stored_data_are_read():
    data = DistillData(STORED / "data")
    assert len(data.samples) > 0
    assert all(sample.text for sample in data.samples)


def test_a_stored_drafts_config_is_read():
    path = STORED / "train" / "draft" / "config.json"
    assert from_json(read_json(path), str(path)).block_size == 8


def test_an_unfinished_evaluation_of_an_earlier_version_is_refused():
    path = STORED / "evaluation" / "rows.jsonl"
    with pytest.raises(ValueError, match="an unfinished run of another version"):
        RowStore(path, json.loads(path.read_text().splitlines()[0]))
