import json
import re
import shutil
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from alpamayo_dflash.cli.main import main
from alpamayo_dflash.common.artefacts import atomic_file, file_hash, read_json, write_json
from alpamayo_dflash.common.tensors import save_tensors
from alpamayo_dflash.distill.config import DEFAULT_HELD_OUT, response_bytes
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.distill.shards import (
    is_held_out,
    manifest_path,
    shard_path,
    table_path,
    training_counts,
)
from alpamayo_dflash.distill.writer import ClipResult, RankWriter, Response

TAPS, HIDDEN, TOP_K, CONTEXT = 2, 4, 3, 5
SETTINGS = {
    "target": "abc",
    "clips": "def",
    "world_size": 1,
    "taps": [1, 3],
    "context_len": CONTEXT,
    "top_k": TOP_K,
    "full_vocab": False,
    "hidden_size": HIDDEN,
    "vocab_size": 11,
    "num_target_layers": 4,
    "dtype": "float32",
    "seed": 0,
    "t0_us": 5_100_000,
}
CLIPS = [f"clip-{number}" for number in range(7)]


def respond(clip_id, sample):
    number = int(clip_id.split("-")[1]) * 10 + sample
    generator = torch.Generator().manual_seed(number)
    length = 1 + number % 7
    return Response(
        token_ids=tuple(range(number, number + length)),
        text=f"text {number}",
        stop="traj_future_start",
        temperature=0.6 if sample else 0.0,
        top_p=0.98,
        seed=sample,
        tensors={
            "prompt_states": torch.randn(CONTEXT, TAPS, HIDDEN, generator=generator),
            "states": torch.randn(length, TAPS, HIDDEN, generator=generator),
            "topk_logits": torch.randn(length, TOP_K, generator=generator),
            "topk_ids": torch.randint(11, (length, TOP_K), generator=generator, dtype=torch.int32),
        },
    )


def result(clip_id):
    if clip_id == "clip-4":
        return ClipResult(clip_id, 0, failure="broken video")
    return ClipResult(clip_id, int(clip_id[-1]) // 4, tuple(respond(clip_id, sample) for sample in range(2)))


def writer(folder, *, rank=0, clips=CLIPS, settings=SETTINGS, again=lambda _: False):
    return RankWriter(folder, rank, settings, clips, clips_per_shard=2, provenance={"seed": 0}, again=again)


def write(folder, *, shards=None, **options):
    """Write shards until all, or `shards`, are finished."""
    part = writer(folder, **options)
    if not part.complete:
        part.begin()
    for clips in part.remaining[:shards]:
        part.write([result(clip_id) for clip_id in clips])
    return part


def equal_sets(one, other):
    assert one.samples == other.samples
    for sample in one.samples:
        found, wanted = one.tensors(sample), other.tensors(sample)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_is_written_is_read(tmp_path):
    part = write(tmp_path)
    assert part.complete
    data = DistillData(tmp_path)
    assert len(data.samples) == 12
    for sample in data.samples:
        wanted = respond(sample.clip_id, sample.sample)
        assert (sample.token_ids, sample.text, sample.seed) == (wanted.token_ids, wanted.text, wanted.seed)
        assert sample.chunk == int(sample.clip_id[-1]) // 4
        tensors = data.tensors(sample)
        assert all(torch.equal(tensors[name], wanted.tensors[name]) for name in wanted.tensors)


def test_manifest_counts_and_says_where_it_came_from(tmp_path):
    part = write(tmp_path)
    manifest = read_json(tmp_path / "distill.json")
    assert manifest == DistillData(tmp_path).manifest
    assert manifest["taps"] == [1, 3]
    assert manifest["clips"] == {"attempted": 7, "done": 6, "failed": 1}
    assert manifest["complete"] == {"0": True}
    assert manifest["samples"] == 12
    assert manifest["tokens"] == sum(len(sample.token_ids) for sample in DistillData(tmp_path).samples)
    assert part.summary()["clips"] == manifest["clips"]
    failures = json.loads((tmp_path / "failures-rank0.json").read_text())
    assert failures["failures"] == [
        {"clip_id": "clip-4", "reason": "broken video", "kind": "target", "files": {}}
    ]


def test_estimate_matches_what_is_stored(tmp_path):
    write(tmp_path)
    data = DistillData(tmp_path)
    for sample in data.samples:
        stored = sum(tensor.numel() * tensor.element_size() for tensor in data.tensors(sample).values())
        assert stored == response_bytes(
            num_tokens=len(sample.token_ids),
            context_len=CONTEXT,
            num_taps=TAPS,
            hidden_size=HIDDEN,
            top_k=TOP_K,
            dtype="float32",
        )


@pytest.mark.parametrize("done", [0, 1, 3])
def test_interrupted_and_continued_equals_uninterrupted(tmp_path, done):
    write(tmp_path / "whole")
    write(tmp_path / "parts", shards=done)
    with pytest.raises(ValueError, match="not finished by rank"):
        DistillData(tmp_path / "parts")
    assert len(DistillData(tmp_path / "parts", allow_incomplete=True).manifest["shards"]) == done
    assert write(tmp_path / "parts").complete
    equal_sets(DistillData(tmp_path / "parts"), DistillData(tmp_path / "whole"))
    hashes = [
        [shard["sha256"] for shard in DistillData(tmp_path / name).manifest["shards"]]
        for name in ("whole", "parts")
    ]
    assert hashes[0] == hashes[1]


def test_killed_between_shard_and_manifest(tmp_path):
    """Shard and table are there, the manifest is of before, and a temporary file lies about."""
    write(tmp_path / "whole")
    write(tmp_path / "parts", shards=1)
    before = manifest_path(tmp_path / "parts", 0).read_bytes()
    write(tmp_path / "parts", shards=1)
    manifest_path(tmp_path / "parts", 0).write_bytes(before)
    leftover = tmp_path / "parts" / "shards" / ".rank0-2.safetensors.abc.safetensors"
    leftover.write_bytes(b"half")
    assert len(DistillData(tmp_path / "parts", allow_incomplete=True).samples) == 4
    write(tmp_path / "parts")
    assert not leftover.exists()
    equal_sets(DistillData(tmp_path / "parts"), DistillData(tmp_path / "whole"))


def test_complete_set_has_nothing_left(tmp_path):
    write(tmp_path)
    stamp = manifest_path(tmp_path, 0).stat().st_mtime_ns
    again = writer(tmp_path)
    assert again.complete
    assert again.remaining == []
    assert manifest_path(tmp_path, 0).stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("key", "value"), [("taps", [0, 3]), ("seed", 1), ("clips", "other"), ("world_size", 2)]
)
def test_other_settings_in_the_same_folder_are_named(tmp_path, key, value):
    write(tmp_path, shards=1)
    with pytest.raises(ValueError, match=re.escape(f"{key} {SETTINGS[key]!r}, not {value!r}")):
        writer(tmp_path, settings={**SETTINGS, key: value})


def test_ranks_are_merged_and_all_must_be_complete(tmp_path):
    settings = {**SETTINGS, "world_size": 2}
    write(tmp_path, rank=1, clips=CLIPS[1::2], settings=settings)
    with pytest.raises(ValueError, match="not finished by rank 0 of 2"):
        DistillData(tmp_path)
    assert len(DistillData(tmp_path, allow_incomplete=True).samples) == 6
    write(tmp_path, rank=0, clips=CLIPS[0::2], settings=settings)
    data = DistillData(tmp_path)
    write(tmp_path / "one")
    one = DistillData(tmp_path / "one")
    assert read_json(tmp_path / "distill.json") == data.manifest
    assert {(s.clip_id, s.sample, s.token_ids) for s in data.samples} == {
        (s.clip_id, s.sample, s.token_ids) for s in one.samples
    }
    with pytest.raises(ValueError, match="seed"):
        writer(tmp_path, rank=1, clips=CLIPS[1::2], settings={**settings, "seed": 5})


def test_no_data(tmp_path):
    with pytest.raises(ValueError, match="no distillation data"):
        DistillData(tmp_path)


def test_corrupt_and_missing_shards_are_named(tmp_path):
    write(tmp_path)
    sample = DistillData(tmp_path).samples[0]
    path = shard_path(tmp_path, sample.shard)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    data = DistillData(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        data.tensors(sample)
    with pytest.raises(ValueError, match=r"corrupt shard, .* bytes long, but finished"):
        writer(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=re.escape(str(path))):
        data.tensors(sample)
    with pytest.raises(ValueError, match="missing shard, but finished"):
        writer(tmp_path)


def test_verify_finds_a_flipped_bit(tmp_path):
    write(tmp_path)
    data = DistillData(tmp_path)
    data.verify()
    path = shard_path(tmp_path, data.samples[-1].shard)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: corrupt")):
        data.verify()


def test_a_shard_of_another_set_is_corrupt(tmp_path):
    write(tmp_path)
    data = DistillData(tmp_path)
    first, last = data.samples[0], data.samples[-1]
    assert len(first.token_ids) != len(data.samples[-2].token_ids)
    shutil.copy(shard_path(tmp_path, last.shard), shard_path(tmp_path, first.shard))
    with pytest.raises(ValueError, match="corrupt shard"):
        data.tensors(first)


def test_corrupt_table_is_named(tmp_path):
    write(tmp_path)
    table_path(tmp_path, 0).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"samples-rank0\.parquet"):
        DistillData(tmp_path)


def test_manifest_of_another_format_is_named(tmp_path):
    manifest_path(tmp_path, 0).write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"manifest-rank0\.json: of format 99, written by a newer version"):
        DistillData(tmp_path)
    manifest_path(tmp_path, 0).write_text('{"format": 0}')
    with pytest.raises(ValueError, match=r"manifest-rank0\.json: not a manifest"):
        DistillData(tmp_path)


def test_data_can_be_sent_to_a_worker(tmp_path):
    import pickle

    write(tmp_path)
    data = DistillData(tmp_path)
    first = data.tensors(data.samples[0])
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.tensors(copy.samples[0])["states"], first["states"])


def naive_counts(samples):
    counts = {}
    for sample in samples:
        for token in sample.token_ids:
            counts[token] = counts.get(token, 0) + 1
    return counts


@pytest.mark.parametrize("done", [0, 2])
def test_token_counts_are_those_of_the_default_training_split(tmp_path, done):
    """As recorded, after an interruption, by two ranks, and counted anew for another split."""
    clips = [f"clip-{number}" for number in range(30) if number != 4]
    write(tmp_path / "one", clips=clips, shards=done)
    write(tmp_path / "one", clips=clips)
    settings = {**SETTINGS, "world_size": 2}
    for rank in range(2):
        write(tmp_path / "two", rank=rank, clips=clips[rank::2], settings=settings)
    data = DistillData(tmp_path / "one")
    train = [sample for sample in data.samples if not is_held_out(sample.clip_id, DEFAULT_HELD_OUT)]
    assert 0 < len(train) < len(data.samples)
    expected = naive_counts(train)
    for name in ("one", "two"):
        manifest = DistillData(tmp_path / name).manifest
        recorded = json.loads((tmp_path / name / "distill.json").read_text())["token_counts"]
        assert recorded == manifest["token_counts"]
        assert recorded["counts"] == {str(token): expected[token] for token in sorted(expected)}
        assert training_counts(manifest, [], held_out=DEFAULT_HELD_OUT) == expected
        assert training_counts(manifest, train[:3], held_out=None) == naive_counts(train[:3])


def test_an_older_set_without_counts_is_read_and_counted(tmp_path):
    write(tmp_path)
    content = read_json(manifest_path(tmp_path, 0))
    del content["token_counts"]
    manifest_path(tmp_path, 0).write_text(json.dumps(content))
    data = DistillData(tmp_path)
    assert "token_counts" not in data.manifest
    counts = training_counts(data.manifest, data.samples, held_out=DEFAULT_HELD_OUT)
    assert counts == naive_counts(data.samples)


def test_failed_clips_are_tried_again_in_a_shard_of_their_own(tmp_path):
    """And the shards that are there, which a draft may have been trained on, stay as they are."""
    first = writer(tmp_path)
    first.begin()
    while first.remaining:
        first.write([result(clip_id) for clip_id in first.remaining[0]])
    assert first.summary()["clips"] == {"attempted": 7, "done": 6, "failed": 1}
    shards = {path.name: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    assert writer(tmp_path).complete

    again = writer(tmp_path, again=lambda failure: failure["clip_id"] == "clip-4")
    assert again.remaining == [["clip-4"]]
    again.begin()
    again.write([replace(result("clip-4"), failure="still broken", responses=())])
    assert again.complete
    assert again.summary()["clips"] == {"attempted": 7, "done": 6, "failed": 1}
    [failure] = json.loads((tmp_path / "manifest-rank0.json").read_text())["shards"][-1]["failures"]
    assert failure["reason"] == "still broken"

    mended = writer(tmp_path, again=lambda failure: failure["reason"] == "still broken")
    mended.begin()
    mended.write([replace(result("clip-3"), clip_id="clip-4")])
    assert mended.summary()["clips"] == {"attempted": 7, "done": 7, "failed": 0}
    assert mended.summary()["failure_kinds"] == {}
    assert writer(tmp_path, again=lambda _: True).complete
    assert {
        path.name: path.read_bytes() for path in tmp_path.rglob("*.safetensors") if path.name in shards
    } == shards
    data = DistillData(tmp_path)
    data.verify()
    assert {sample.clip_id for sample in data.samples} == set(CLIPS)


def without_checksums(folder):
    """Make a set what it was before there were checksums: in its shards, its rows and its manifest."""
    content = read_json(manifest_path(folder, 0))
    for shard in content["shards"]:
        del shard["rows"]
        if shard["file"] is not None:
            path = shard_path(folder, shard["file"])
            with atomic_file(path) as temporary:  # the old one may be mapped
                save_file(load_file(path), temporary, metadata={"format": "pt"})
            del shard["header"]
            shard |= {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    write_json(manifest_path(folder, 0), content)
    (folder / "distill.json").unlink()


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    with atomic_file(path) as temporary:  # the old one may be mapped
        temporary.write_bytes(content)


def test_a_set_without_checksums_is_read_tested_whole_and_shown_as_not_recorded(tmp_path, capsys):
    write(tmp_path)
    new = DistillData(tmp_path)
    kept = [new.tensors(sample) for sample in new.samples]
    assert main(["verify", str(tmp_path)]) == 0
    kinds = json.loads(capsys.readouterr().out.splitlines()[-1])["kinds"]
    assert kinds["tables of samples"] == {"files": 1, "sound": 12, "not_recorded": 0, "faults": 0}
    assert kinds["tensors"] == {"files": 4, "sound": 48, "not_recorded": 0, "faults": 0}
    without_checksums(tmp_path)
    old = DistillData(tmp_path)
    assert old.samples == new.samples
    for sample, tensors in zip(old.samples, kept, strict=True):
        assert all(torch.equal(old.tensors(sample)[name], tensor) for name, tensor in tensors.items())
    old.check()
    assert main(["verify", str(tmp_path)]) == 0
    kinds = json.loads(capsys.readouterr().out.splitlines()[-1])["kinds"]
    assert kinds["tables of samples"] == {"files": 1, "sound": 0, "not_recorded": 12, "faults": 0}
    assert kinds["tensors"] == {"files": 4, "sound": 0, "not_recorded": 48, "faults": 0}
    assert kinds["listed shards"] == {"files": 4, "sound": 4, "not_recorded": 0, "faults": 0}
    flip(shard_path(tmp_path, old.samples[0].shard), -1)
    with pytest.raises(ValueError, match="corrupt shard"):
        DistillData(tmp_path).tensors(old.samples[0])
    with pytest.raises(ValueError, match="corrupt shard"):
        DistillData(tmp_path).check()
    assert main(["verify", str(tmp_path)]) == 1


def test_an_older_set_goes_on_with_checksums(tmp_path):
    write(tmp_path, shards=2)
    without_checksums(tmp_path)
    write(tmp_path)
    shards = read_json(manifest_path(tmp_path, 0))["shards"]
    assert ["header" in shard for shard in shards] == [False, False, True, True]
    DistillData(tmp_path).verify()


def cut(path):
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"123")


def other_rows(folder):
    rows = pyarrow.parquet.read_table(table_path(folder, 0)).to_pylist()
    rows[0]["token_ids"][-1] += 1
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table_path(folder, 0))


def other_run(folder):
    """Put a shard of another run in the place of the first: as long, and sound in itself."""
    path = shard_path(folder, "rank0-0.safetensors")
    with atomic_file(path) as temporary:
        save_tensors({name: tensor + 1 for name, tensor in load_file(path).items()}, temporary)


DAMAGE = {
    "a flipped byte": lambda folder: flip(shard_path(folder, "rank0-0.safetensors"), -1),
    "a flipped byte of the header": lambda folder: flip(shard_path(folder, "rank0-0.safetensors"), 60),
    "a cut file": lambda folder: cut(shard_path(folder, "rank0-0.safetensors")),
    "a lost file": lambda folder: shard_path(folder, "rank0-0.safetensors").unlink(),
    "a shard of another run": other_run,
    "other rows": other_rows,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_bad_shard_is_named_or_left_out(tmp_path, damage):
    write(tmp_path)
    whole = DistillData(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=r"rank0-0\.safetensors|samples-rank0\.parquet"):
        DistillData(tmp_path).verify()
    data = DistillData(tmp_path, on_bad_shard="skip")
    bad = data.bad_shards | data.faults()
    assert list(bad) == ["rank0-0.safetensors"]
    data.leave_out(bad)
    data.verify()
    assert data.samples == [sample for sample in whole.samples if sample.shard not in bad]
    assert data.manifest["samples"] == len(data.samples) == 8
    assert data.identity.hash != whole.identity.hash
    assert training_counts(data.manifest, data.samples, held_out=DEFAULT_HELD_OUT) == naive_counts(
        data.samples
    )
    with pytest.raises(ValueError, match="no shard is sound"):
        data.leave_out([shard["file"] for shard in data.manifest["shards"]])


def test_a_table_that_cannot_be_read_makes_every_shard_of_its_rank_bad(tmp_path):
    write(tmp_path)
    table_path(tmp_path, 0).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not a Parquet file that can be read"):
        DistillData(tmp_path)
    assert len(DistillData(tmp_path, on_bad_shard="skip").bad_shards) == 4


def test_a_changed_manifest_is_refused(tmp_path):
    write(tmp_path)
    path = manifest_path(tmp_path, 0)
    path.write_text(
        path.read_text().replace('"top_p"', '"top_q"').replace('"hidden_size": 4', '"hidden_size": 5')
    )
    with pytest.raises(ValueError, match=r"manifest-rank0\.json: changed since it was written"):
        DistillData(tmp_path)
