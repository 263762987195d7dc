"""Every reader of JSON, fed with what sound files become: a result, or a ValueError that names the file."""

from __future__ import annotations

import io
import json
import shutil
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from alpamayo_dflash import Alpamayo, DFlashDraft
from alpamayo_dflash.clips.lists import read_clip_list
from alpamayo_dflash.common import locks
from alpamayo_dflash.common.artefacts import write_json
from alpamayo_dflash.common.fields import build
from alpamayo_dflash.common.records import KEY
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.distill.shards import MANIFEST_FILE, training_counts, write_merged
from alpamayo_dflash.distill.writer import RankWriter
from alpamayo_dflash.draft.formats import draft_identity
from alpamayo_dflash.evaluate.metrics import evaluation_summary
from alpamayo_dflash.evaluate.recorded import (
    contradiction,
    is_recorded,
    read_rows,
    recorded_texts,
    round_of,
)
from alpamayo_dflash.evaluate.rows import FORMAT, RowStore
from alpamayo_dflash.layers import aggregate as aggregate_module
from alpamayo_dflash.layers.aggregate import aggregate
from alpamayo_dflash.layers.choice import read_choice
from alpamayo_dflash.report import run as report_run
from alpamayo_dflash.report.clip_trace import frame_bytes, probability, read_clip_trace
from alpamayo_dflash.report.config import ReportConfig, WatchConfig
from alpamayo_dflash.report.evaluation import read_evaluation
from alpamayo_dflash.report.page import measures
from alpamayo_dflash.report.page.clips import clip_view
from alpamayo_dflash.report.page.islands import island
from alpamayo_dflash.report.page.page import write
from alpamayo_dflash.report.page.runs import read_runs
from alpamayo_dflash.report.page.sections import Section, trouble
from alpamayo_dflash.report.page.summary import arms, origins, summary, world
from alpamayo_dflash.report.stage_view import view_of
from alpamayo_dflash.report.watch import Watcher
from alpamayo_dflash.standins.blueprint import RandomCheckpointConfig
from alpamayo_dflash.standins.untrained import RECORD, write_random_checkpoint
from alpamayo_dflash.target.checkpoint import read_target, read_vlm_config, target_identity
from alpamayo_dflash.target.config import AlpamayoConfig
from alpamayo_dflash.train import run as train_run
from alpamayo_dflash.train.checkpoint import read_state
from alpamayo_dflash.train.config import TrainConfig
from alpamayo_dflash.world import run as world_run
from alpamayo_dflash.world.config import WorldConfig
from tests.helpers.fuzzing import fuzz_file, fuzzed, json_files, tried
from tests.helpers.small_artefacts import (
    CLIPS,
    MADE,
    PICTURE,
    clip_row,
    clip_trace,
    evaluation,
    write_checkpoint,
    write_distill,
    write_draft,
    write_scores,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "target"
    write_random_checkpoint(folder, RandomCheckpointConfig("small", shards=2))
    return folder


def fuzz(reader, inputs, folder, file, read):
    """Fuzz a file without its checksum, which is read as it stands; one input in six keeps it."""

    def made(sound):
        raw = json.loads(sound)
        plain = {key: raw[key] for key in raw if key != KEY}
        return st.sampled_from([plain] * 5 + [raw]).flatmap(json_files)

    fuzz_file(reader, inputs, read, made, file=file, folder=folder)


@pytest.fixture
def target(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "target")


def test_a_targets_config(target):
    def read():
        found = read_target(target, local_files_only=True)
        target_identity(found.folder, found.vlm_files)

    fuzz("target: config.json", 120, target, target / "config.json", read)


def test_a_qwens_config(target):
    config = AlpamayoConfig.from_file(target / "config.json")
    read = partial(read_vlm_config, target / "vlm", config)
    fuzz("target: Qwen3-VL's config.json", 150, target, target / "vlm" / "config.json", read)


@pytest.mark.parametrize("file", ["config.json", "vlm/config.json"])
def test_a_whole_targets_configs(target, file):
    read = partial(Alpamayo.from_pretrained, target, local_files_only=True)
    fuzz(f"whole target: {file}", 12, target, target / file, read)


def test_a_targets_index(target):
    read = partial(read_target, target)
    fuzz("target: index of shards", 100, target, target / "model.safetensors.index.json", read)


def test_a_random_targets_record(target):
    read = partial(write_random_checkpoint, target, RandomCheckpointConfig("small", shards=2))
    fuzz("write-random-target: record", 60, target, target / RECORD, read)


def test_a_drafts_config(tmp_path):
    write_draft(tmp_path / "draft")
    read = partial(DFlashDraft.from_pretrained, tmp_path / "draft")
    fuzz("draft: config.json", 130, tmp_path, tmp_path / "draft" / "config.json", read)


def test_a_drafts_index(tmp_path):
    draft = write_draft(tmp_path / "draft")
    weights, index = (tmp_path / "draft" / f"model.safetensors{end}" for end in ("", ".index.json"))
    weights.rename(weights.with_name("model-1.safetensors"))
    write_json(
        index, {"metadata": {}, "weight_map": dict.fromkeys(draft.state_dict(), "model-1.safetensors")}
    )

    def read():
        DFlashDraft.from_pretrained(tmp_path / "draft")
        draft_identity(tmp_path / "draft")

    fuzz("draft: index of shards", 100, tmp_path, index, read)


def test_scores_of_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(aggregate_module, "provenance", lambda *_, **__: {})  # asks git each time
    read = partial(aggregate, write_scores(tmp_path), None)
    fuzz("layers: scores", 100, tmp_path, tmp_path / "scores-rank0of2.json", read)


def test_chosen_layers(tmp_path):
    aggregate(write_scores(tmp_path), None)
    fuzz("layers: layers.json", 80, tmp_path, tmp_path / "layers.json", partial(read_choice, tmp_path))


def test_manifests_of_distillation(tmp_path):
    settings = write_distill(tmp_path)

    def read():
        data = DistillData(tmp_path, allow_incomplete=True)
        assert data.identity.hash
        for sample in data.samples:
            data.tensors(sample)
        training_counts(data.manifest, data.samples, held_out=0.1)
        given = {"clips_per_shard": 2, "provenance": MADE}
        RankWriter(tmp_path, 0, settings, CLIPS, **given, again=lambda _: True).summary()

    fuzz("distill: manifest", 130, tmp_path, tmp_path / "manifest-rank0.json", read)


def test_a_merged_manifest(tmp_path):
    write_distill(tmp_path)
    fuzz("distill: distill.json", 40, tmp_path, tmp_path / MANIFEST_FILE, partial(write_merged, tmp_path))


def test_a_trainers_state(tmp_path):
    write_distill(tmp_path / "data")
    config = TrainConfig.flat("tiny", tmp_path / "data", tmp_path / "out")
    folder = tmp_path / "out" / "checkpoint"
    write_checkpoint(folder, config)
    data = DistillData(tmp_path / "data")

    def read():
        state = train_run._earlier(config, 1, data)
        assert state is not None
        assert state["progress"]["step"] <= state["total_steps"]
        build(train_run.Progress, state["progress"], str(folder))
        read_state(folder)

    fuzz("train: trainer.json", 120, tmp_path, folder / "trainer.json", read)


def test_a_worlds_manifest(tmp_path):
    identity = world_run._identity(WorldConfig(tmp_path, num_chunks=1, clips_per_chunk=1))
    write_json(tmp_path / "world.json", {"world": identity, "complete": True, "provenance": MADE})
    fuzz(
        "world: world.json",
        60,
        tmp_path,
        tmp_path / "world.json",
        partial(world_run._claim, tmp_path, identity),
    )


def test_a_list_of_clips(tmp_path):
    file = tmp_path / "clips.json"
    write_json(file, {"clip_ids": list(CLIPS)})
    fuzz("clips: list in JSON", 100, tmp_path, file, partial(read_clip_list, file))


def test_an_evaluation_for_a_report(tmp_path):
    file = tmp_path / "evaluation.json"
    write_json(file, evaluation())

    def reported():
        """All but the charts' specifications, which take half a second and depend on no value."""
        runs = read_runs([file])
        sections = [trouble(runs), Section("summary", "", tables=(summary(runs[0].series),))]
        tables = (*(of(runs) for of in BY_RUN), *(of(runs[0].series) for of in BY_SERIES))
        write(runs, [*sections, Section("tables", "", tables=(*tables, origins(runs), *world(runs)))], page)

    page = tmp_path / "report.html"
    fuzz("report: evaluation.json", 60, tmp_path, file, reported)


BY_RUN = (
    *(measures.decode_by_tokens, measures.speedups, measures.clip_lengths, measures.errors),
    *(measures.losses, measures.training_acceptance),
)
BY_SERIES = (
    *(measures.times, measures.decode_parts, measures.round_lengths, measures.by_block_place),
    *(measures.by_sentence_place, measures.by_manoeuvre, measures.by_source, arms),
)


def test_an_evaluation_for_a_report_with_plots(tmp_path):
    file = tmp_path / "evaluation.json"
    write_json(file, evaluation())
    config = ReportConfig((file,), out=tmp_path / "report")
    fuzz("report with plots: evaluation.json", 1, tmp_path, file, partial(report_run.run, config))


def test_what_lies_beside_a_demos_evaluation(tmp_path):
    write_json(tmp_path / "summary.json", evaluation())
    scores = {"cosine": [0.1, 1.0], "early_exit_ce": {"0": 2.0, "1": 0.1}, "target_layers": [1], "tokens": 3}
    entry = {"step": 1, "acceptance_length": 1.5, "real_acceptance_length": 1.4}
    training = {"evaluations": [entry], "losses": [{"step": 1, "ce": 2.0}], "best_step": 1}

    def read():
        runs = read_runs([tmp_path])
        for of in (
            measures.losses,
            measures.training_acceptance,
            measures.layer_cosines,
            measures.layer_losses,
        ):
            json.dumps(of(runs).objects(), allow_nan=False)

    for file, content in (("layers/layers.json", scores), ("train/train.json", training)):
        write_json(tmp_path / file, content)
        fuzz(f"report: {file}", 60, tmp_path, tmp_path / file, read)
        write_json(tmp_path / file, content)


def test_an_evaluation_for_an_audit(tmp_path):
    file = tmp_path / "evaluation.json"
    write_json(file, evaluation())

    def read():
        for row in read_rows(read_evaluation(file), str(file)):
            if is_recorded(row, str(file)):
                for text in recorded_texts(row, 1, f"{file}: clip {row['clip_id']}"):
                    contradiction(text[0], row["rounds"][0])
                    round_of(row["rounds"][0], 1)

    fuzz("evaluate --audit: evaluation.json", 120, tmp_path, file, read)


def test_a_clips_trace(tmp_path):
    file = tmp_path / "clip.json"
    write_json(file, clip_trace())
    (tmp_path / "front-0.jpg").write_bytes(PICTURE)

    def read():
        trace = read_clip_trace(tmp_path)
        for each in (round_ for sample in trace["rounds"] for round_ in sample):
            places = each["target"]
            for index in each["at"]:
                for token, logit in zip(places["ids"][index], places["logits"][index], strict=True):
                    assert trace["pieces"][str(token)] is not None
                    assert 0 <= probability(places, index, logit, trace["temperature"]) <= 1
        for frame in trace["frames"]:
            frame_bytes(tmp_path, frame)
        island(clip_view({**clip_row(0), "coc": trace["coc"], "clip_id": trace["clip_id"]}, trace))

    fuzz("report: clip.json", 60, tmp_path, file, read)


def test_a_lock(tmp_path):
    about = {"mark": "a", "host": "b", "pid": 7, "since": 1.5e9}

    @fuzzed(60)
    @given(json_files(about))
    def each(data):
        tried("locks", "", lambda: locks._message(tmp_path, locks._about(data.decode("utf-8", "replace"))))

    each()


def watched(folder):
    """Look at a run, draw it and make the command's last line."""
    look = Watcher(WatchConfig(folder)).look()
    Console(file=io.StringIO(), width=100).print(view_of(look, 100))
    json.dumps(look.to_plain(), allow_nan=False)


@pytest.mark.parametrize(
    "name",
    [
        *("data/manifest-rank0.json", "data/failures-rank0.json", "layers/scores-rank0of2.json"),
        *("layers/layers.json", "train/checkpoint/trainer.json", "evaluation/evaluation.json"),
    ],
)
def test_what_is_watched(name, tmp_path, monkeypatch):
    monkeypatch.setattr("alpamayo_dflash.report.files.time.sleep", lambda _: None)
    write_distill(tmp_path / "data")
    aggregate(write_scores(tmp_path / "layers"), None)
    write_checkpoint(tmp_path / "train" / "checkpoint", TrainConfig.flat("tiny", tmp_path, tmp_path))
    write_json(tmp_path / "evaluation" / "evaluation.json", evaluation())
    fuzz(f"watch: {name}", 30, tmp_path, tmp_path / name, partial(watched, tmp_path))


def test_rows_of_an_evaluation(tmp_path):
    file = tmp_path / "rows.jsonl"
    head = {"identity": 2, "options": {"seed": 0}, "clips": list(CLIPS)}
    file.write_text(
        "".join(json.dumps(line) + "\n" for line in ({"format": FORMAT} | head, clip_row(0), clip_row(1)))
    )
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    def read():
        evaluation_summary(RowStore(file, head).rows() or [clip_row(0)], [], 2)

    read()

    @fuzzed(100)
    @given(json_files(rows))
    def each(data):
        try:
            lines = json.loads(data)
            data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        except (ValueError, TypeError, RecursionError):
            pass
        file.write_bytes(data)
        tried("evaluate: rows.jsonl", tmp_path, read)
        tried("watch: rows.jsonl", tmp_path, partial(watched, tmp_path))

    each()
