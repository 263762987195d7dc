"""The live view: what it says of runs in every state, and that it neither disturbs them nor trips."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from alpamayo_dflash.cli import main as cli
from alpamayo_dflash.common import locks
from alpamayo_dflash.common.artefacts import read_json, write_json, write_record
from alpamayo_dflash.common.progress import Live
from alpamayo_dflash.evaluate.rows import RowStore
from alpamayo_dflash.layers.aggregate import aggregate
from alpamayo_dflash.report import watch
from alpamayo_dflash.report.config import WatchConfig
from alpamayo_dflash.report.files import Files
from alpamayo_dflash.report.look import Look, Stage
from alpamayo_dflash.report.stage_view import view_of
from alpamayo_dflash.report.terminal import clock, duration, sparkline, visible
from alpamayo_dflash.report.watch import Watcher
from alpamayo_dflash.train.checkpoint import save_training
from alpamayo_dflash.train.config import TrainConfig
from tests.helpers.small_artefacts import (
    CLIPS,
    clip_row,
    evaluation,
    write_checkpoint,
    write_distill,
    write_scores,
)

STORED = Path(__file__).parents[1] / "data" / "stored"
HOSTILE = "\x1b[2J\u202eeg\u200f[red]Stop[/red]\r\nnow\ud800"


def look(folder: Path, **options) -> Look:
    return Watcher(WatchConfig(folder, **options)).look()


def only(folder: Path, **options) -> Stage:
    (stage,) = look(folder, **options).stages
    return stage


def shown(seen: Look, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(view_of(seen, width))
    return console.file.getvalue()


def at_work(folder: Path, *, host: str = "elsewhere", pid: int = 7, since: float | None = None) -> None:
    """A lock as a run's first rank writes it."""
    about = {"mark": "a", "host": host, "pid": pid, "since": time.time() if since is None else since}
    (folder / ".run-rank0.lock").write_text(json.dumps(about))


def aged(folder: Path, seconds: float) -> None:
    """Make all that lies there older."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


# --- terminal


def test_what_a_terminal_would_act_on_is_text():
    found = visible(HOSTILE)
    assert found == r"\x1b[2J\u202eeg\u200f[red]Stop[/red]\r\nnow\ud800"
    assert visible("Änderung 停 é") == "Änderung 停 é"
    assert len(visible("a" * 999, most=50)) == 50


def test_sparklines():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 7]) == "▁▁"
    assert sparkline([]) == sparkline([float("nan")]) == ""
    assert len(sparkline(range(1000), width=20)) == 20


def test_lengths_of_time_and_moments():
    assert [duration(each) for each in (3.4, 61, 7261, 90000)] == ["3 s", "1 min 1 s", "2 h 1 min", "1 d 1 h"]
    now = time.mktime((2026, 5, 4, 12, 0, 0, 0, 0, -1))
    assert clock(now - 60, now) == "11:59:00"
    assert clock(now - 86400, now) == "2026-05-03 12:00"


# --- states


def test_a_generation_that_runs(tmp_path):
    folder = tmp_path / "data"
    with locks.owned(folder, "mark"):  # by the run's own lock, of this process
        write_distill(folder, most_shards=1)
        found = look(folder)
    (stage,) = found.stages
    assert (found.state, stage.reading.kind, stage.owners[0].alive) == ("running", "distill", True)
    assert (stage.reading.done, stage.reading.total, stage.reading.failed) == (2, 4, 0)
    assert stage.reading.texts == (("clip-0", "text 0"), ("clip-1", "text 1"))
    assert "2 of 4 clips  50%" in shown(found)
    assert only(folder).state == "stopped"  # the lock is gone


def test_rate_and_end_come_from_the_times_of_the_shards(tmp_path):
    write_distill(tmp_path)
    manifest = read_json(tmp_path / "manifest-rank0.json")
    write_record(tmp_path / "manifest-rank0.json", manifest | {"complete": False, "num_clips": 8})
    now = time.time()
    aged(tmp_path, 10)
    os.utime(tmp_path / "shards" / "rank0-0.safetensors", (now - 30,) * 2)
    os.utime(tmp_path / "shards" / "rank0-1.safetensors", (now - 10,) * 2)
    at_work(tmp_path, since=now - 60)
    os.utime(tmp_path / ".run-rank0.lock", (now - 60,) * 2)
    stage = only(tmp_path)
    assert stage.pace.per_s == pytest.approx(2 / 20, rel=1e-3)  # a shard's two clips in 20 s
    assert stage.expected_end == pytest.approx(now - 10 + 4 / 0.1, abs=0.5)
    at_work(tmp_path, since=now - 20)  # the first shard is an earlier run's
    assert only(tmp_path).pace.per_s == pytest.approx(2 / 10, rel=1e-3)


def test_failures_and_a_finished_generation(tmp_path):
    write_distill(tmp_path)
    found = look(tmp_path)
    (stage,) = found.stages
    assert found.state == "finished"
    assert (stage.reading.done, stage.reading.total, stage.reading.failed) == (4, 4, 1)
    assert stage.reading.failures == (("clip-3", "broken video"),)
    assert stage.expected_end is None
    assert stage.reading.figures["tokens"] == 3 + 4 + 5
    text = shown(found)
    assert "finished" in text
    assert "broken video" in text


def test_ranks_that_have_not_begun_leave_a_set_unfinished(tmp_path):
    write_distill(tmp_path, world_size=2)
    assert only(tmp_path).state == "finished"
    (tmp_path / "manifest-rank1.json").unlink()
    stage = only(tmp_path)
    assert stage.state == "stopped"
    assert "ranks: 1 of 2 have begun, 1 are done" in stage.reading.notes


def test_a_manifest_of_before_does_not_say_how_many_clips_there_are(tmp_path):
    write_distill(tmp_path)
    manifest = read_json(tmp_path / "manifest-rank0.json")
    assert manifest.pop("num_clips") == len(CLIPS)
    write_record(tmp_path / "manifest-rank0.json", manifest | {"complete": False})
    reading = only(tmp_path).reading
    assert (reading.done, reading.total) == (4, None)


def test_a_run_whose_last_write_is_long_ago_is_stale(tmp_path):
    write_distill(tmp_path / "data", most_shards=1)
    folder = tmp_path / "data"
    at_work(folder)
    assert only(folder).state == "running"
    aged(folder, 700)
    stage = only(folder)
    assert (stage.state, stage.remark) == ("stale", "nothing was written for 11 min 40 s")
    assert stage.expected_end is None
    assert only(folder, stale_min=15).state == "running"
    at_work(folder, host=socket.gethostname(), pid=os.getpid())
    aged(folder, 700)
    assert only(folder).remark.startswith("its process is there, but")


def test_a_run_that_writes_seldom_is_given_its_usual_pauses(tmp_path):
    write_distill(tmp_path)
    manifest = read_json(tmp_path / "manifest-rank0.json")
    write_record(tmp_path / "manifest-rank0.json", manifest | {"complete": False, "num_clips": 8})
    at_work(tmp_path, since=1.0)
    aged(tmp_path, 900)
    os.utime(tmp_path / "shards" / "rank0-0.safetensors", (time.time() - 1500,) * 2)
    assert only(tmp_path).state == "running"  # a shard took ten minutes
    aged(tmp_path, 1900)
    assert only(tmp_path).state == "stale"


def test_a_process_that_is_gone(tmp_path):
    write_distill(tmp_path / "data", most_shards=1)
    folder = tmp_path / "data"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    at_work(folder, host=socket.gethostname(), pid=ended.pid)
    assert only(folder).state == "running"  # it wrote just now: another container's perhaps
    aged(folder, 40)
    stage = only(folder)
    assert (stage.state, stage.owners[0].alive) == ("stopped", False)
    assert "gone" in stage.remark


def test_a_stage_that_has_only_begun(tmp_path):
    at_work(tmp_path)
    found = look(tmp_path)
    assert found.state == "running"
    assert found.to_plain()["stages"][0]["kind"] is None
    assert "begun" in shown(found)


# --- layers


def test_layers(tmp_path):
    config = write_scores(tmp_path)
    stage = only(tmp_path)
    assert (stage.state, stage.reading.done, stage.reading.total) == ("stopped", 2, 2)
    assert (stage.reading.failed, stage.reading.failures[0]) == (2, ("x", "no frames"))
    assert "pools them" in stage.reading.notes[0]
    aggregate(config, None)
    assert only(tmp_path).state == "finished"


def test_layers_that_run_are_silent_but_not_stale(tmp_path):
    at_work(tmp_path, host=socket.gethostname(), pid=os.getpid())
    aged(tmp_path, 3600)
    assert only(tmp_path).state == "running"


# --- train


def entry(step: int) -> dict:
    return {"step": step, "ce": 4.0 - step, "gradient_norm": 1.0, "learning_rate": 1e-3}


def held_out(step: int, length: float) -> dict:
    return {"step": step, "epoch": 1.0, "acceptance_length": length, "tokens": 3, "passes": 2}


def test_a_training_before_its_first_checkpoint(tmp_path):
    at_work(tmp_path, since=time.time() - 5)
    with Live(tmp_path / "logs", total_steps=8, first_step=0) as monitor:
        monitor.evaluated(held_out(0, 1.25))
        for step in (1, 2, 3):
            monitor.logged(entry(step), ["ce"])
    stage = only(tmp_path)
    reading = stage.reading
    assert (stage.state, reading.kind, reading.unit) == ("running", "train", "steps")
    assert (reading.done, reading.total) == (3, 8)
    assert reading.curves["loss, ce"] == (3.0, 2.0, 1.0)
    assert reading.curves["acceptance, simulated"] == (1.25,)
    assert set(reading.curves) == {"loss, ce", "acceptance, simulated"}
    assert reading.figures["best_acceptance_length"] == 1.25
    assert stage.pace.source == "the files' own times"
    assert "loss, ce" in shown(look(tmp_path))
    assert not (tmp_path / "checkpoint").exists()


def test_the_best_draft_so_far_is_what_the_trainer_chooses_by(tmp_path):
    at_work(tmp_path, since=time.time() - 5)
    with Live(tmp_path / "logs", total_steps=8, first_step=0) as monitor:
        for step, simulated, expected in ((0, 1.0, 1.0), (2, 5.0, 4.0), (4, 4.5, 4.5)):
            monitor.evaluated(held_out(step, simulated) | {"expected_acceptance_length": expected})
    reading = only(tmp_path).reading
    assert reading.curves["acceptance, expected, sampled"] == (1.0, 4.0, 4.5)
    assert (reading.figures["best_step"], reading.figures["best_acceptance_length"]) == (4, 4.5)


def test_a_training_between_checkpoints_and_taken_up_again(tmp_path):
    config = TrainConfig.flat("tiny", tmp_path / "data", tmp_path)
    write_checkpoint(tmp_path / "checkpoint", config)  # of step 1 of 4
    assert (only(tmp_path).reading.done, only(tmp_path).state) == (1, "stopped")
    watcher = Watcher(WatchConfig(tmp_path))
    with Live(tmp_path / "logs", total_steps=4, first_step=0) as monitor:
        for step in (1, 2, 3):
            monitor.logged(entry(step), ["ce"])
    assert watcher.look().stages[0].reading.done == 3
    # It was killed after step 3 and goes on from its checkpoint: what came after that is void.
    real = {"real_acceptance_length": 2.0, "real_greedy_acceptance_length": 2.5, "real_compared": 9}
    with Live(tmp_path / "logs", total_steps=4, first_step=1) as monitor:
        monitor.evaluated(held_out(2, 1.75) | real)
        monitor.logged(entry(2) | {"ce": 0.5}, ["ce"])
    for reading in (watcher.look().stages[0].reading, only(tmp_path).reading):
        assert (reading.done, reading.total) == (2, 4)
        assert reading.curves["loss, ce"][-1] == 0.5
        assert reading.curves["acceptance, real, sampled"] == (2.0,)
        assert reading.curves["acceptance, real, greedy"] == (2.5,)
        assert reading.figures["clips_real_compared"] == 9


def test_an_event_that_is_half_written_is_left_for_later(tmp_path):
    with Live(tmp_path / "logs", total_steps=8, first_step=0) as monitor:
        monitor.logged(entry(1), ["ce"])
        monitor.logged(entry(2), ["ce"])
    (events,) = (tmp_path / "logs").iterdir()
    whole = events.read_bytes()
    with events.open("r+b") as stream:
        stream.truncate(len(whole) - 120)  # within what was logged of step 2
    watcher = Watcher(WatchConfig(tmp_path))
    before = watcher.look().stages[0].reading
    assert before.curves["loss, ce"][:1] == (3.0,)
    with events.open("ab") as stream:
        stream.write(whole[len(whole) - 120 :])
    after = watcher.look().stages[0].reading
    assert after.curves["loss, ce"] == (3.0, 2.0)
    assert (after.done, after.total) == (2, 8)


def test_stored_training_is_finished():
    stage = only(STORED / "train")
    assert (stage.state, stage.reading.done, stage.reading.figures["best_step"]) == ("finished", 2, 2)


# --- evaluate

HEAD = {"identity": 2, "options": {"seed": 0}, "parents": {}, "clips": ["clip-0", "clip-1", "clip-2"]}


def test_an_evaluation_that_runs(tmp_path):
    store = RowStore(tmp_path / "rows.jsonl", HEAD)
    at_work(tmp_path, since=time.time() - 20)
    assert only(tmp_path).reading is None
    watcher = Watcher(WatchConfig(tmp_path))
    store.add(clip_row(0))
    first = watcher.look().stages[0]
    assert (first.reading.done, first.reading.total, first.reading.failed) == (1, 3, None)
    assert "since it began" in first.pace.source
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.write('{"clip_id": "clip-9", "coc": ["half')
    assert watcher.look().stages[0].reading.done == 1
    RowStore(tmp_path / "rows.jsonl", HEAD).add(clip_row(1))  # as a run does that goes on
    seen = watcher.look()
    reading = seen.stages[0].reading
    assert (reading.done, len(reading.texts)) == (2, 2)
    assert reading.figures["acceptance_length"] == 2.0
    assert reading.figures["acceptance_rate"] == pytest.approx(1 / 3)
    assert (reading.figures["clips_compared"], reading.figures["greedy_identical"]) == (2, 2)
    assert seen.stages[0].pace.source == "what was watched"
    assert "Keep <distance> & go." in shown(seen)


def test_a_finished_evaluation_of_which_clips_failed_keeps_its_rows(tmp_path):
    RowStore(tmp_path / "rows.jsonl", HEAD).add(clip_row(0))
    aged(tmp_path, -5)  # copied, so that times say nothing
    write_json(tmp_path / "evaluation.json", evaluation() | {"head": HEAD})
    stage = only(tmp_path)
    assert (stage.state, stage.reading.failed) == ("finished", 1)
    assert stage.reading.failures == (("x", "no <frames>"),)
    write_json(tmp_path / "evaluation.json", evaluation() | {"head": HEAD | {"options": {"seed": 1}}})
    aged(tmp_path, -5)
    RowStore(tmp_path / "rows.jsonl", HEAD).add(clip_row(1))
    os.utime(tmp_path / "rows.jsonl", (time.time() + 9,) * 2)
    assert (only(tmp_path).state, only(tmp_path).reading.done) == ("stopped", 2)  # of another evaluation


def test_text_of_a_model_is_shown_as_text(tmp_path):
    with (tmp_path / "rows.jsonl").open("w") as stream:
        for line in (HEAD, clip_row(0) | {"coc": [HOSTILE.rstrip("\ud800")], "clip_id": "\x07clip"}):
            stream.write(json.dumps(line) + "\n")
    text = shown(look(tmp_path))
    assert not {"\x1b", "\u202e", "\u200f", "\r", "\x07"} & set(text)
    assert r"\x1b[2J\u202eeg\u200f[red]Stop[/red]\r\nnow" in text
    assert r"\x07clip" in text


# --- a folder of several


def test_a_demo(tmp_path):
    world = {"num_chunks": 2, "clips_per_chunk": 3}
    write_json(tmp_path / "world" / "world.json", {"world": world, "complete": False})
    assert look(tmp_path).state == "running"
    write_json(tmp_path / "world" / "world.json", {"world": world, "complete": True})
    assert look(tmp_path).state == "waiting"
    (tmp_path / "report").mkdir()
    aggregate(write_scores(tmp_path / "layers"), None)
    write_distill(tmp_path / "data")
    (tmp_path / "evaluation").mkdir()
    RowStore(tmp_path / "evaluation" / "rows.jsonl", HEAD).add(clip_row(0))
    at_work(tmp_path / "evaluation")
    seen = look(tmp_path)
    assert [stage.folder.name for stage in seen.stages] == ["world", "layers", "data", "evaluation"]
    assert (seen.state, seen.stages[seen.front].folder.name) == ("running", "evaluation")
    lines = shown(seen).splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        [name, "finished"] for name in ("world", "layers", "data")
    ]
    (tmp_path / "evaluation" / ".run-rank0.lock").unlink()
    write_json(tmp_path / "evaluation" / "evaluation.json", evaluation())
    assert look(tmp_path).state == "waiting"
    write_json(tmp_path / "summary.json", evaluation())
    assert look(tmp_path).state == "finished"


# --- beside the run


@contextmanager
def writing(act):
    """Let a thread act again and again."""
    ended, errors = threading.Event(), []

    def work():
        try:
            while not ended.is_set():
                act()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert not errors


def test_files_are_replaced_under_it(tmp_path):
    data, train = tmp_path / "data", tmp_path / "train"
    write_distill(data)
    draft, optimizer = write_checkpoint(
        train / "checkpoint", TrainConfig.flat("tiny", tmp_path / "data", train)
    )
    state = read_json(train / "checkpoint" / "trainer.json")
    manifest = read_json(data / "manifest-rank0.json")

    def act():
        save_training(train / "checkpoint", draft, optimizer, state)
        write_record(data / "manifest-rank0.json", manifest)
        at_work(data)

    watcher = Watcher(WatchConfig(tmp_path))
    with writing(act):
        for _ in range(60):
            seen = watcher.look()
            assert [stage.reading.kind for stage in seen.stages] == ["distill", "train"]
            assert [stage.reading.done for stage in seen.stages] == [4, 1]
            assert seen.stages[0].reading.texts


def test_a_checkpoint_is_seen_between_the_two_renames_that_replace_it(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, TrainConfig.flat("tiny", tmp_path / "data", tmp_path))
    aside = folder.replace(tmp_path / ".checkpoint.abcdefgh.old")
    monkeypatch.setattr("alpamayo_dflash.report.files.time.sleep", lambda _: aside.rename(folder))
    assert only(tmp_path).reading.done == 1


def test_a_file_that_is_being_copied_there_is_read_when_it_is_whole(tmp_path, monkeypatch):
    write_distill(tmp_path)
    path = tmp_path / "manifest-rank0.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    monkeypatch.setattr("alpamayo_dflash.report.files.time.sleep", lambda _: path.write_bytes(whole))
    assert only(tmp_path).state == "finished"


def state_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_it_takes_no_lock_and_writes_and_holds_nothing(tmp_path, monkeypatch):
    write_distill(tmp_path / "data", most_shards=1)
    RowStore(tmp_path / "evaluation" / "rows.jsonl", HEAD).add(clip_row(0))
    with Live(tmp_path / "train" / "logs", total_steps=8, first_step=0) as monitor:
        monitor.logged(entry(1), ["ce"])
    at_work(tmp_path / "data")
    before, held = state_of(tmp_path), len(list(Path("/dev/fd").iterdir()))

    def refuse(*_):
        raise AssertionError("a lock was touched")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    watcher = Watcher(WatchConfig(tmp_path))
    assert [len(watcher.look().stages) for _ in range(2)] == [3, 3]
    assert state_of(tmp_path) == before
    assert len(list(Path("/dev/fd").iterdir())) == held


def test_what_has_not_changed_is_read_once(tmp_path):
    (tmp_path / "a").write_text("1")
    files, read = Files(), []
    for _ in range(3):
        files.read(tmp_path / "a", lambda path: read.append(path) or 1)
    assert len(read) == 1


# --- the command


def last_line(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


def test_once(tmp_path, capsys):
    write_distill(tmp_path / "data", most_shards=1)
    at_work(tmp_path / "data", since=time.time() - 60)
    assert cli.main(["watch", str(tmp_path / "data"), "--once", "--texts", "1"]) == 0
    printed = capsys.readouterr()
    found = last_line(printed.out)
    assert (found["state"], found["stage"]) == ("running", "data")
    (stage,) = found["stages"]
    assert (stage["done"], stage["total"], stage["unit"]) == (2, 4, "clips")
    assert stage["texts"] == [{"clip_id": "clip-1", "text": "text 1"}]
    assert stage["rate_per_s"] > 0
    assert stage["expected_end"].endswith("Z")
    assert "2 of 4 clips" in printed.err


def test_it_ends_with_the_run(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    write_distill(folder, most_shards=1)
    write_distill(tmp_path / "whole")
    at_work(folder)
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            (folder / ".run-rank0.lock").unlink()
            manifest = read_json(tmp_path / "whole" / "manifest-rank0.json")
            write_record(folder / "manifest-rank0.json", manifest)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert cli.main(["watch", str(folder), "--interval-s", "0.5"]) == 0
    assert pauses == [0.5] * 3
    printed = capsys.readouterr()
    assert last_line(printed.out)["state"] == "finished"
    assert "4 of 4 clips" in printed.err


def test_interrupted_by_a_person(tmp_path, monkeypatch, capsys):
    write_distill(tmp_path / "data", most_shards=1)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    assert cli.main(["watch", str(tmp_path / "data")]) == 130
    assert capsys.readouterr().out == ""


def damaged(folder: Path, name: str) -> str:
    """Change a number of a file that carries a checksum."""
    path = folder / name
    path.write_text(path.read_text().replace('"tokens": 7', '"tokens": 8'))
    return name


def test_what_is_no_run_or_is_damaged_is_refused(tmp_path, capsys):
    def refused(folder: Path) -> str:
        assert cli.main(["watch", str(folder), "--once"]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err

    assert "no such folder" in refused(tmp_path / "none")
    assert "no run; it must be" in refused(tmp_path)
    (tmp_path / "file").write_text("")
    assert "a file, not a folder" in refused(tmp_path / "file")
    write_distill(tmp_path / "data")
    name = damaged(tmp_path / "data", "manifest-rank0.json")
    assert name in (message := refused(tmp_path / "data"))
    assert "changed since it was written" in message
    rows = tmp_path / "evaluation\x1b" / "rows.jsonl"
    RowStore(rows.with_name("x"), HEAD)
    rows.parent.mkdir()
    rows.write_text(json.dumps(HEAD) + "\n{\n")
    message = refused(rows.parent)
    assert "line 2: not valid JSON" in message
    assert "\x1b" not in message
    rows.write_text(json.dumps(HEAD) + "\n" + json.dumps({"clip_id": 5}) + "\n")
    assert "clip_id is 5" in refused(rows.parent)


@pytest.mark.parametrize("option", [{"interval_s": 0.0}, {"stale_min": -1.0}, {"texts": -1}])
def test_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        WatchConfig(Path("r"), **option)
