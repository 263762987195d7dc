"""Every reader of tensors and tokenizers, fed with what sound files become, and with hostile ones."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
from functools import partial

import pytest
import torch
from hypothesis import strategies as st

from alpamayo_dflash import Alpamayo, DFlashDraft
from alpamayo_dflash.common.artefacts import file_hash, read_json, write_json
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.draft.config import DraftConfig
from alpamayo_dflash.draft.formats import MASK_FILE, to_json
from alpamayo_dflash.standins.blueprint import RandomCheckpointConfig
from alpamayo_dflash.standins.untrained import write_random_checkpoint
from alpamayo_dflash.target.checkpoint import read_target
from alpamayo_dflash.train.checkpoint import OPTIMIZER, load_training
from alpamayo_dflash.train.config import TrainConfig
from tests.helpers.fuzzing import TRAP, VALUES, changed_values, damaged, encoded, fuzz_file
from tests.helpers.small_artefacts import write_checkpoint, write_distill, write_draft

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4")
DTYPES += ("F8_E8M0", "C64", "U64", "U32", "U16", "", "f32", None, 7)
SIZES = (0, 1, 2, 8, 2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1)


class Trap:
    """Unpickling runs code."""

    def __reduce__(self):
        return __import__, (TRAP,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "target"
    write_random_checkpoint(folder, RandomCheckpointConfig("small", shards=2))
    return folder


@st.composite
def headers(draw, header):
    """A safetensors header, changed as such: kinds, shapes, offsets and names of its tensors."""
    changed = json.loads(json.dumps(header))
    names = [name for name in changed if name != "__metadata__"]
    for _ in range(draw(st.integers(1, 2))):
        name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        entry = changed.get(name)
        if not isinstance(entry, dict):
            continue
        match draw(
            st.sampled_from(("dtype", "shape", "offsets", "same", "rename", "swap", "drop", "metadata"))
        ):
            case "dtype":
                entry["dtype"] = draw(st.sampled_from(DTYPES))
            case "shape":
                shape = draw(st.lists(st.sampled_from((*SIZES, -1)), max_size=4))
                entry["shape"] = draw(st.sampled_from((shape, entry["shape"][::-1], [*entry["shape"], 1])))
            case "offsets":
                entry["data_offsets"] = draw(st.lists(st.sampled_from((*SIZES, -1)), max_size=3))
            case "same":
                entry["data_offsets"] = header[other]["data_offsets"]
            case "rename":
                changed[draw(st.sampled_from(("", "x", other, "x" * 300, "../x", "a\0")))] = changed.pop(name)
            case "swap" if isinstance(changed.get(other), dict):
                changed[name], changed[other] = changed[other], entry
            case "drop":
                del changed[name]
            case _:
                changed["__metadata__"] = draw(st.sampled_from(VALUES))
    return changed


@st.composite
def tensor_files(draw, data):
    """The bytes of a file that was the safetensors file `data`."""
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    if draw(st.integers(0, 5)):  # without its checksums a file is read as it stands
        header.get("__metadata__", {}).pop("sha256", None)
        text = encoded(header)
        data, size = struct.pack("<Q", len(text)) + text + rest, len(text)
    kind = draw(
        st.sampled_from(("header",) * 4 + ("value", "length", "cut", "head", "bytes", "bytes", "pickle"))
    )
    if kind == "header":
        text = encoded(draw(headers(header)))
    elif kind == "value":
        text = encoded(draw(changed_values(header)))
    elif kind == "length":
        return struct.pack("<Q", draw(st.sampled_from((*SIZES, size - 1, size + 1, len(data))))) + data[8:]
    elif kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    elif kind == "head":
        return draw(damaged(data[: 8 + size])) + rest
    elif kind == "pickle":
        return draw(st.sampled_from((pickle.dumps(Trap()), pickle.dumps({"a": 1}), saved_by_torch(Trap()))))
    else:
        return draw(damaged(data))
    return struct.pack("<Q", len(text)) + text + rest


def saved_by_torch(value):
    """What `torch.save` writes of it."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def fuzz(reader, inputs, folder, file, read):
    fuzz_file(reader, inputs, read, tensor_files, file=file, folder=folder)


def test_weights_of_a_target(saved, tmp_path):
    target = shutil.copytree(saved, tmp_path / "target")
    file = sorted(target.glob("*.safetensors"))[0]
    fuzz("target: weights", 60, target, file, partial(read_target, target))


def test_weights_of_a_whole_target(saved, tmp_path):
    target = shutil.copytree(saved, tmp_path / "target")
    file = sorted(target.glob("*.safetensors"))[1]
    fuzz("whole target: weights", 15, target, file, partial(Alpamayo.from_pretrained, target))


def test_weights_of_a_draft(tmp_path):
    write_draft(tmp_path / "draft")
    read = partial(DFlashDraft.from_pretrained, tmp_path / "draft")
    fuzz("draft: weights", 100, tmp_path, tmp_path / "draft" / "model.safetensors", read)


def test_weights_of_a_draft_with_a_reduced_head(tmp_path):
    from tests.helpers.small_artefacts import draft_config

    shape = DraftConfig(**{**draft_config().__dict__, "draft_vocab_size": 7})
    DFlashDraft.random(shape).save_pretrained(tmp_path / "draft")
    read = partial(DFlashDraft.from_pretrained, tmp_path / "draft")
    fuzz("draft with a reduced head: weights", 40, tmp_path, tmp_path / "draft" / "model.safetensors", read)


@st.composite
def mask_files(draw, data):
    """The bytes of a file that was written by `torch.save`."""
    kind = draw(st.sampled_from(("bytes", "bytes", "member", "other", "trap", "plain")))
    if kind == "member":
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
            chosen = draw(st.sampled_from(old.namelist()))
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, draw(damaged(content)) if name == chosen else content)
        return file.getvalue()
    if kind == "other":
        values = (None, 7, "a", [], {}, {"a": torch.zeros(16)}, {"a": 1}, [torch.zeros(2)], torch.zeros(0))
        values += (
            torch.zeros(16, dtype=torch.int64),
            torch.zeros(2, 8),
            torch.zeros(17),
            torch.zeros(16).to_sparse(),
        )
        return saved_by_torch(draw(st.sampled_from(values)))
    if kind == "trap":
        return draw(st.sampled_from((saved_by_torch(Trap()), pickle.dumps(Trap()), pickle.dumps(Trap(), 0))))
    if kind == "plain":
        return draw(damaged(pickle.dumps({"a": [1, 2.5, "b", None, (1,)]})))
    return draw(damaged(data))


def test_a_mask_embedding_beside_a_draft(tmp_path):
    draft = write_draft(tmp_path / "draft")
    config = {key: value for key, value in to_json(draft.config).items() if key != "tap_convention"}
    write_json(tmp_path / "draft" / "config.json", config)
    from safetensors.torch import save_file

    tensors = {k: v for k, v in draft.state_dict().items() if k != "mask_embedding"}
    save_file(tensors, tmp_path / "draft" / "model.safetensors")
    file = tmp_path / "draft" / MASK_FILE
    file.write_bytes(saved_by_torch(torch.zeros(1, 16)))
    read = partial(DFlashDraft.from_pretrained, tmp_path / "draft")
    fuzz_file("draft: mask_embedding.pt", 80, read, mask_files, file=file, folder=tmp_path)


def test_tensors_of_an_optimizer(tmp_path):
    config = TrainConfig.flat("tiny", tmp_path, tmp_path / "out")
    draft, optimizer = write_checkpoint(tmp_path / "checkpoint", config)
    read = partial(load_training, tmp_path / "checkpoint", draft, optimizer)
    fuzz("train: optimizer's tensors", 80, tmp_path, tmp_path / "checkpoint" / OPTIMIZER, read)


def test_shards_of_distillation(tmp_path):
    write_distill(tmp_path)
    file, manifest = tmp_path / "shards" / "rank0-0.safetensors", tmp_path / "manifest-rank0.json"
    content = read_json(manifest)

    def read():
        # As whoever made the file would have noted it, so that more than the hash is looked at.
        content["shards"][0] |= {"sha256": file_hash(file), "bytes": file.stat().st_size}
        content["shards"][0].pop("header", None)
        manifest.write_text(json.dumps(content))
        data = DistillData(tmp_path)
        data.verify()
        for sample in data.samples:
            data.tensors(sample)

    fuzz("distill: shards", 100, tmp_path, file, read)


def test_shards_that_are_not_what_was_written(tmp_path):
    write_distill(tmp_path)

    file = tmp_path / "shards" / "rank0-0.safetensors"
    sound = file.read_bytes()

    def read():
        DistillData(tmp_path).verify()
        assert file.read_bytes() == sound  # what is taken is what was written

    fuzz(
        "distill: shards against their hash", 30, tmp_path, tmp_path / "shards" / "rank0-0.safetensors", read
    )


@st.composite
def tokenizer_files(draw, data):
    """The bytes of a file that was a tokenizer.json."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(data))
    raw = json.loads(data)
    part = draw(st.sampled_from([None, None, *raw]))
    changed = draw(changed_values(raw if part is None else raw[part]))
    return encoded(changed if part is None else raw | {part: changed})


def test_tokenizers(saved, tmp_path):
    target = shutil.copytree(saved, tmp_path / "target")
    found = read_target(target)
    read = found.special

    file = target / "vlm" / "tokenizer.json"
    fuzz_file("target: tokenizer.json", 60, read, tokenizer_files, file=file, folder=target)
