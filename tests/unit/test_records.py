"""Checksums: what is flipped, cut, swapped or of a newer version is named, what has none is counted."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from alpamayo_dflash.cli.main import main
from alpamayo_dflash.common.artefacts import atomic_file, read_json, read_record, write_json, write_record
from alpamayo_dflash.common.records import KEY
from alpamayo_dflash.common.tensors import TensorFile, header_hash, read_tensors, save_tensors
from alpamayo_dflash.evaluate.rows import RowStore, read_lines

RECORD = {"a": [1, 2.5, -0.0, 1e-300], "b": {"text": "é “x”\u2028", "none": None}, "seed": 2**70}


def tensors():
    generator = torch.Generator().manual_seed(1)
    return {
        "weight": torch.randn(3, 4, generator=generator),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "ids": torch.arange(6, dtype=torch.int32),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 3),
    }


def row(clip_id):
    counts = {"tokens_after_first": 1, "passes": 1, "drafted": 7, "accepted": 0}
    return {"clip_id": clip_id, "prompt_tokens": 1, "coc": [""], "arms": {}, "acceptance": counts}


def flip(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    with atomic_file(path) as temporary:  # the old one may be mapped
        temporary.write_bytes(content)


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, RECORD)
    assert read_record(path) == (RECORD, True)
    assert KEY not in read_json(path)
    write_record(path, read_json(path))  # again, with no checksum over a checksum
    assert read_record(path) == (RECORD, True)
    write_json(path, RECORD)
    assert read_record(path) == (RECORD, False)


def test_every_flipped_bit_of_a_record_is_found_or_changes_nothing(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, {"a": [1, 2.5], "text": "one two"})
    whole = path.read_bytes()
    found = 0
    for at in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                value, recorded = read_record(path)
            except ValueError as error:
                assert str(path) in str(error)
                found += 1
            else:  # a space between two keys; or the checksum's own name, and then it is a key too many
                assert value == {"a": [1, 2.5], "text": "one two"} or not recorded
    assert found > 6 * len(whole)


def test_tensors_are_read_as_they_were_written_and_files_are_equal(tmp_path):
    found = set()
    for number in range(6):
        path = tmp_path / f"{number}.safetensors"
        save_tensors(tensors(), path)
        found.add(path.read_bytes())
    assert len(found) == 1  # safetensors itself writes metadata in any order
    read = read_tensors(path)
    assert read.keys() == tensors().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors().items())
    assert TensorFile(path).recorded
    path = tmp_path / "older.safetensors"
    save_file(tensors(), path, metadata={"format": "pt"})
    assert not TensorFile(path).recorded
    assert read_tensors(path).keys() == tensors().keys()


def test_a_flipped_byte_of_a_tensor_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(tensors(), path)
    before = header_hash(path)
    content = path.read_bytes()
    flip(path, content.index(tensors()["ids"].numpy().tobytes()))
    assert header_hash(path) == before
    with pytest.raises(ValueError, match=r"a\.safetensors: corrupt, ids is not what was written"):
        read_tensors(path)
    assert torch.equal(TensorFile(path).get_tensor("half"), tensors()["half"])


def test_a_tensor_of_another_kind_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors({"one": torch.ones(4), "two": torch.ones(4)}, path)
    path.write_bytes(path.read_bytes().replace(b"F32", b"I32", 1))
    with pytest.raises(ValueError, match="corrupt, one"):
        read_tensors(path)


def test_rows_are_held_to_their_checksums_and_a_cut_last_line_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    store = RowStore(path, {"run": 1})
    for name in ("x", "y", "z"):
        store.add(row(name))
    assert [recorded for _, recorded in read_lines(path)] == [True] * 4
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert [row["clip_id"] for row in RowStore(path, {"run": 1}).rows()] == ["x", "y"]
    path.write_bytes(whole.replace(b'"y"', b'"w"'))
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 3: changed since it was written"):
        RowStore(path, {"run": 1})
    path.write_bytes(whole.replace(b'"y"', b'"y'))
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 3: not valid JSON"):
        RowStore(path, {"run": 1})
    lines = [json.loads(line) for line in whole.splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != KEY}) + "\n" for line in lines))
    assert len(RowStore(path, {"run": 1})) == 3  # of a version before checksums


def verified(capsys, *places):
    status = main(["verify", *map(str, places)])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_verify_reads_everything_and_names_what_is_wrong(tmp_path, capsys):
    write_record(tmp_path / "sealed.json", RECORD)
    write_json(tmp_path / "older.json", RECORD)
    (tmp_path / "list.json").write_text("[1]")
    save_tensors(tensors(), tmp_path / "new.safetensors")
    save_file(tensors(), tmp_path / "older.safetensors")
    RowStore(tmp_path / "rows.jsonl", {"run": 1}).add(row("x"))
    (tmp_path / "notes.txt").write_text("nothing of ours")
    status, found = verified(capsys, tmp_path)
    assert status == 0
    assert found["kinds"] == {
        "objects": {"files": 3, "sound": 1, "not_recorded": 2, "faults": 0},
        "rows": {"files": 1, "sound": 2, "not_recorded": 0, "faults": 0},
        "tensors": {"files": 2, "sound": 5, "not_recorded": 5, "faults": 0},
    }
    assert found["other_files"] == 1
    flip(tmp_path / "new.safetensors", -1)
    text = (tmp_path / "sealed.json").read_text()
    (tmp_path / "sealed.json").write_text(text.replace("2.5", "2.25"))
    (tmp_path / "older.json").write_text("{")
    shutil.copy(tmp_path / "list.json", tmp_path / "a.zip")
    status, found = verified(capsys, tmp_path)
    assert status == 1
    assert len(found["faults"]) == 4
    for name in ("new.safetensors", "sealed.json", "older.json", "a.zip"):
        assert sum(str(tmp_path / name) in fault for fault in found["faults"]) == 1
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
