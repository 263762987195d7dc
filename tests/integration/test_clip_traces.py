"""`evaluate --trace`: what a clip's page shows is stored beside the evaluation, whole, once, and checked."""

from __future__ import annotations

import copy
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from alpamayo_dflash.cli.main import main
from alpamayo_dflash.clips.window import CAMERAS, DEFAULT_CAMERAS, FRAMES_PER_CAMERA, Window
from alpamayo_dflash.common.artefacts import read_json, write_record
from alpamayo_dflash.decode.observer import SPANS
from alpamayo_dflash.evaluate import clip_traces
from alpamayo_dflash.evaluate.clip_traces import FRAME_WIDTH, MOST_FRAME_BYTES, encoded_frames
from alpamayo_dflash.report.clip_trace import FILE, Places, frame_bytes, probability, read_clip_trace
from alpamayo_dflash.report.evaluation import read_evaluation
from tests.helpers.random_target import random_draft, random_target

CLIPS, LIMIT, SAMPLES = 2, 12, 2


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A world of two clips, a target with small images, and a draft."""
    folder = tmp_path_factory.mktemp("traces")
    arguments = ["--num-chunks", "1", "--clips-per-chunk", str(CLIPS), "--seed", "5", "--workers", "1"]
    assert main(["world", "--out", str(folder / "world"), *arguments]) == 0
    target = random_target(folder / "made", layers=5, push=0.5)
    target.save_pretrained(folder / "target")
    path = folder / "target" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"min_pixels": 4096, "max_pixels": 8192}))
    random_draft(target).save_pretrained(folder / "draft")
    return folder


def evaluate(work, out, *more, interrupted=False):
    given = ["evaluate", "--draft-model", work / "draft", "--alpamayo-model", work / "target"]
    given += ["--cache-dir", work / "world", "--output-dir", out, "--max-tokens", LIMIT, "--warmup", 0]
    given += ["--temperature", 0.6, "--num-traj-samples", SAMPLES, "--no-compare", *more]
    status = main([str(each) for each in given])
    assert status == (130 if interrupted else 0)
    return None if interrupted else read_evaluation(out / "evaluation.json")


@pytest.fixture(scope="module")
def traced(work):
    evaluate(work, work / "traced", "--trace")
    return work / "traced"


def texts_of(first, rounds):
    return [
        [one, *(token for each in sample for token in each["emitted"])]
        for one, sample in zip(first, rounds, strict=True)
    ]


def test_a_trace_has_what_the_page_needs(traced):
    result = read_evaluation(traced / "evaluation.json")
    assert (result["trace"]["clips"], result["trace"]["lacking"], result["trace"]["unequal"]) == (CLIPS, 0, 0)
    assert result["trace"]["trace_ms_per_clip"] > 0
    sizes = []
    for row in result["clip_rows"]:
        folder = traced / "trace" / row["clip_id"]
        trace = read_clip_trace(folder)
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
        assert (trace["clip_id"], trace["coc"], trace["equal"]) == (row["clip_id"], row["coc"], True)
        assert trace["first"]["chosen"] == trace["first_tokens"]
        assert texts_of(trace["first_tokens"], trace["rounds"]) == texts_of(
            row["first_tokens"], row["rounds"]
        )
        for sample in trace["rounds"]:
            for each in sample:
                for token, index in zip(each["emitted"], each["at"], strict=True):
                    places = each["target"]
                    assert places["chosen"][index] == token
                    assert 0 < probability(places, index, places["chosen_logit"][index], 0.6) <= 1
                    shares = [probability(places, index, logit, 0.6) for logit in places["logits"][index]]
                    assert 0 < sum(shares) < 1.001
                assert len(each["draft"]["ids"]) in (0, trace["block_size"] - 1)
        assert {bar["name"] for bar in trace["bars"]} <= {"prefill", "action", *SPANS}
        starts = [bar["start_ms"] for bar in trace["bars"]]
        assert starts == sorted(starts)
        assert [len(path) for path in trace["predicted_xy"]] == [64] * SAMPLES
        assert trace["history_xy"][-1] == [0, 0]
        assert len(trace["future_xy"]) == 64
    assert result["trace"]["trace_bytes_per_clip"] == round(sum(sizes) / CLIPS)


def test_the_frames_are_small_pictures_of_the_window(traced):
    folder = next((traced / "trace").iterdir())
    trace = read_clip_trace(folder)
    found = [(frame["camera"], frame["index"]) for frame in trace["frames"]]
    assert found == [(CAMERAS[camera], i) for camera in DEFAULT_CAMERAS for i in range(FRAMES_PER_CAMERA)]
    pictures = [frame_bytes(folder, frame) for frame in trace["frames"]]
    assert sum(map(len, pictures)) < MOST_FRAME_BYTES
    assert all(Image.open(io.BytesIO(each)).width <= FRAME_WIDTH for each in pictures)
    assert len(list(folder.iterdir())) == len(found) + 1


def test_an_evaluation_without_traces_gets_them_later_and_once(work, tmp_path, monkeypatch):
    plain = evaluate(work, tmp_path)
    assert plain["trace"] is None
    assert not (tmp_path / "trace").exists()
    later = evaluate(work, tmp_path, "--trace")
    assert later["trace"]["clips"] == CLIPS
    for before, after in zip(plain["clip_rows"], later["clip_rows"], strict=True):
        assert after.pop("trace")["equal"]
        assert before == after
    monkeypatch.setattr(clip_traces, "clip_trace", None)  # nothing is decoded again
    assert evaluate(work, tmp_path, "--trace")["trace"] == later["trace"]
    monkeypatch.undo()
    lost = next((tmp_path / "trace").iterdir())
    (lost / FILE).unlink()
    assert evaluate(work, tmp_path, "--trace")["trace"]["clips"] == CLIPS
    read_clip_trace(lost)


def test_what_a_kill_leaves_goes_and_an_interrupted_run_goes_on(work, tmp_path, monkeypatch):
    add, done = clip_traces.ClipTraces.add, []

    def killed(self, window, prompt, row):
        if done:
            (self.folder / f".{window.clip_id}.half").mkdir()
            raise KeyboardInterrupt
        done.append(window.clip_id)
        return add(self, window, prompt, row)

    monkeypatch.setattr(clip_traces.ClipTraces, "add", killed)
    evaluate(work, tmp_path, "--trace", interrupted=True)
    monkeypatch.undo()
    kept = (tmp_path / "trace" / done[0] / FILE).stat().st_mtime_ns
    result = evaluate(work, tmp_path, "--trace")
    assert result["trace"]["clips"] == CLIPS
    assert (tmp_path / "trace" / done[0] / FILE).stat().st_mtime_ns == kept
    assert sorted(path.name for path in (tmp_path / "trace").iterdir()) == sorted(
        row["clip_id"] for row in result["clip_rows"]
    )


def test_a_clip_that_can_no_longer_be_read_keeps_its_row(work, tmp_path, monkeypatch, capsys):
    plain = evaluate(work, tmp_path, "--num-samples", 1)

    def broken(*_):
        raise ValueError("no frames <any more>")

    monkeypatch.setattr(clip_traces, "clip_trace", broken)
    again = evaluate(work, tmp_path, "--num-samples", 1, "--trace")
    assert "has no trace: no frames <any more>" in capsys.readouterr().err
    assert again["clip_rows"] == plain["clip_rows"]
    assert again["trace"] is None


def test_another_evaluations_traces_are_moved_aside(work, tmp_path):
    evaluate(work, tmp_path, "--trace", "--num-samples", 1)
    [before] = (tmp_path / "trace").glob(f"*/{FILE}")
    mark, text = read_json(before)["evaluation"], before.read_bytes()
    evaluate(work, tmp_path, "--trace", "--seed", 3)
    assert (tmp_path / f"trace.of-{mark}" / before.relative_to(tmp_path / "trace")).read_bytes() == text
    assert len(list((tmp_path / "trace").iterdir())) == CLIPS


def test_a_frame_that_changed_is_refused(traced, tmp_path):
    source = next((traced / "trace").iterdir())
    frame = read_clip_trace(source)["frames"][0]
    content = bytearray(frame_bytes(source, frame))
    content[100] ^= 1
    (tmp_path / frame["file"]).write_bytes(content)
    with pytest.raises(ValueError, match=f"{frame['file']}: changed since"):
        frame_bytes(tmp_path, frame)
    (tmp_path / frame["file"]).unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        frame_bytes(tmp_path, frame)


def first_round(trace):
    return next(each for sample in trace["rounds"] for each in sample if each["proposed"])


def no_places():
    return {name: [] for name in Places.__annotations__}


DAMAGE = {
    "coc is 7": lambda trace: trace.update(coc=7),
    "rounds has 1 samples": lambda trace: trace["rounds"].pop(),
    "parents has": lambda trace: first_round(trace)["parents"].pop(),
    "rounds: parents is 9": lambda trace: first_round(trace)["parents"].__setitem__(0, 9),
    "rounds: at is 99": lambda trace: first_round(trace)["at"].__setitem__(0, 99),
    "places; it must have one": lambda trace: first_round(trace)["target"].update(no_places()),
    "chosen has": lambda trace: first_round(trace)["target"]["chosen"].pop(),
    "ids has": lambda trace: first_round(trace)["target"]["ids"][0].pop(),
    "nucleus_mass is 0": lambda trace: first_round(trace)["target"].update(
        nucleus_mass=[0.0] * len(first_round(trace)["target"]["ids"])
    ),
    "is not in pieces": lambda trace: trace["pieces"].clear(),
    "must be the name of a file": lambda trace: trace["frames"][0].update(file="../x.jpg"),
    "must be a finite number": lambda trace: first_round(trace)["target"]["log_sum_exp"].__setitem__(0, "1"),
    "x is 1000000000000.0": lambda trace: trace["history_xy"].__setitem__(0, [1e12, 0.0]),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_trace_that_contradicts_itself_is_refused(traced, tmp_path, message):
    trace = copy.deepcopy(read_clip_trace(next((traced / "trace").iterdir())))
    write_record(tmp_path / FILE, trace)
    read_clip_trace(tmp_path)
    DAMAGE[message](trace)
    write_record(tmp_path / FILE, trace)
    with pytest.raises(ValueError, match=f"{FILE}: .*{message}"):
        read_clip_trace(tmp_path)


def test_probabilities_are_of_the_nucleus_alone():
    logits = [math.log(0.6), math.log(0.3), math.log(0.1)]
    place = {"nucleus_logit": [logits[1]], "nucleus_mass": [0.9], "tempered_log_sum_exp": [0.0]}
    assert [probability(place, 0, logit, 1.0) for logit in logits] == pytest.approx([2 / 3, 1 / 3, 0])
    assert probability(place, 0, logits[0], 0.0) == pytest.approx(2 / 3)  # greedy: at temperature 1


def test_large_frames_are_made_small_and_busy_ones_coarser():
    height, width = 360, 640
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (4, 4, height // 40, width // 40, 3), dtype=np.uint8)
    calm = coarse.repeat(40, axis=2).repeat(40, axis=3)
    busy = random.integers(0, 256, (4, 4, height, width, 3), dtype=np.uint8)
    still = np.zeros((16, 3), np.float32), np.eye(3, dtype=np.float32)[None].repeat(16, 0)
    sizes = {}
    for name, frames in {"calm": calm, "busy": busy}.items():
        made = list(encoded_frames(Window("clip", 0, DEFAULT_CAMERAS, frames, *still)))
        images = [Image.open(io.BytesIO(content)) for _, content in made]
        assert {image.size for image in images} == {(FRAME_WIDTH, FRAME_WIDTH * height // width)}
        sizes[name] = sum(len(content) for _, content in made), images[0].quantization[0][0]
    assert sizes["calm"][0] <= MOST_FRAME_BYTES
    assert sizes["busy"][1] > sizes["calm"][1]  # it quantises more
