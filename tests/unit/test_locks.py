"""A folder has one run at a time, and what a killed run left is put right."""

import json
import signal
import subprocess
import sys
import textwrap

import pytest

from alpamayo_dflash.common import locks
from alpamayo_dflash.common.artefacts import atomic_file, atomic_folder, recover_folder
from alpamayo_dflash.common.locks import mark_of, owned
from alpamayo_dflash.evaluate.rows import RowStore
from tests.helpers.small_artefacts import clip_row


def holder(folder, mark, rank):
    """A process that owns a folder until it is killed."""
    code = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from alpamayo_dflash.common.locks import owned
        with owned(Path({str(folder)!r}), {mark!r}, {rank}):
            print("in", flush=True)
            time.sleep(60)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    return process


@pytest.fixture
def other(tmp_path):
    """Rank 1 of run `a` at work in a folder."""
    process = holder(tmp_path / "out", "a", 1)
    yield process
    process.kill()
    process.wait()


def test_strangers_are_refused_and_ranks_of_one_run_are_none(tmp_path, other):
    folder = tmp_path / "out"
    for mark, rank in (("b", 0), ("b", 1), ("a", 1)):
        refused = pytest.raises(ValueError, match=rf"out: process {other.pid} on .* is at work there since")
        with refused, owned(folder, mark, rank):
            pytest.fail("it was let in")
    with owned(folder, "a", 0):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with owned(folder, "b", 1), owned(folder, "b", 0):
        pass
    assert not folder.exists()  # nothing came of it


def test_a_lock_that_cannot_be_tested_is_refused_by_path(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    refused = pytest.raises(ValueError, match=r"whether another run .* cannot be told .* --take-over")
    with refused, owned(tmp_path, "a"):
        pytest.fail("it was let in")
    with owned(tmp_path, "a", take_over=True):
        assert (tmp_path / ".run-rank0.lock").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    refused = pytest.raises(ValueError, match="out: a file, not a folder")
    with refused, owned(tmp_path / "out", "a"):
        pytest.fail("it was let in")


def test_a_mark_is_of_the_settings_alone():
    assert mark_of({"a": 1, "b": (1, 2)}) == mark_of({"b": [1, 2], "a": 1})
    assert mark_of({"a": 1}) != mark_of({"a": 2})


def write(folder, text):
    with atomic_folder(folder) as temporary:
        (temporary / "file").write_text(text)


def test_a_kill_between_any_two_renames_leaves_a_whole_folder(tmp_path):
    """At every rename of a second write, before and after it."""
    for kill_at in range(1, 5):
        folder = tmp_path / str(kill_at) / "checkpoint"
        write(folder, "old")
        code = textwrap.dedent(
            f"""
            import os, pathlib, signal
            from alpamayo_dflash.common.artefacts import atomic_folder
            count, rename = 0, pathlib.Path.replace
            def step():
                global count
                count += 1
                if count == {kill_at}:
                    os.kill(os.getpid(), signal.SIGKILL)
            def replace(self, target):
                step()
                answer = rename(self, target)
                step()
                return answer
            pathlib.Path.replace = replace
            with atomic_folder({str(folder)!r}) as temporary:
                (temporary / "file").write_text("new")
            """
        )
        done = subprocess.run([sys.executable, "-c", code], check=False)
        assert done.returncode == -signal.SIGKILL
        recover_folder(folder)
        assert (folder / "file").read_text() == ("new" if kill_at == 4 else "old")
        assert [each.name for each in folder.parent.iterdir()] == ["checkpoint"]


def test_a_link_stays_a_link(tmp_path):
    disk = tmp_path / "disk" / "checkpoint"
    disk.mkdir(parents=True)
    link = tmp_path / "run" / "checkpoint"
    link.parent.mkdir()
    link.symlink_to(disk)
    write(link, "new")
    assert link.is_symlink()
    assert (disk / "file").read_text() == "new"
    file = tmp_path / "run" / "file.json"
    (tmp_path / "disk" / "file.json").write_text("old")
    file.symlink_to(tmp_path / "disk" / "file.json")
    with atomic_file(file) as temporary:
        temporary.write_text("new")
    assert file.is_symlink() and file.read_text() == "new"


def test_rows_of_another_run_are_moved_aside(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    first = RowStore(path, {"run": 1})
    first.add(clip_row(0) | {"clip_id": "a"})
    second = RowStore(path, {"run": 2})
    assert len(second) == 0
    second.add(clip_row(0) | {"clip_id": "b"})
    assert "held another run's rows" in capsys.readouterr().err
    [aside] = tmp_path.glob("rows.of-*.jsonl")
    assert [json.loads(line).get("clip_id") for line in aside.read_text().splitlines()] == [None, "a"]
    assert len(RowStore(path, {"run": 2})) == 1
    aside.replace(path)
    assert len(RowStore(path, {"run": 1})) == 1


def test_many_ranks_of_one_run_start_at_once(tmp_path):
    """Each looks at the others' locks while they are being taken."""
    code = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from alpamayo_dflash.common.locks import owned
        for turn in range(40):
            with owned(Path({str(tmp_path)!r}) / "out", "a", int(sys.argv[1])):
                pass
        """
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(6)]
    assert [rank.wait(60) for rank in ranks] == [0] * 6


@pytest.mark.parametrize("place", ["file", "file/inside/it"])
def test_a_file_in_the_folders_place_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file: a file, not a folder"), owned(tmp_path / place, "a"):
        pass
