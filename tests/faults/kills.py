"""Kill stages at random moments and before each of their file operations, resume them, compare what is made.

    python -m tests.faults.kills --kills 200 --out kills.json

A process that has imported everything forks one worker a trial. Each stage's artefacts must equal those of a
run that nobody disturbed: the same samples and tokens, the same weights, none twice, none missing, nothing
left behind. As root, stages are also run on a small disk that is full, and on one that is read-only.
"""

from __future__ import annotations

import argparse
import collections
import gc
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # a thread that pyarrow's import starts

import torch

from alpamayo_dflash.cli.main import main
from alpamayo_dflash.common.artefacts import file_hash, git_revision, read_json, versions, write_json
from alpamayo_dflash.distill import run as _distill  # noqa: F401  imported before the forks
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.evaluate import run as _evaluate  # noqa: F401
from alpamayo_dflash.layers import run as _layers  # noqa: F401
from alpamayo_dflash.train import run as _train  # noqa: F401
from tests.helpers.random_target import random_draft, random_target

# What the stages import only when they need it; else every fork would import it again.
LATE = ("huggingface_hub.hf_file_system", "physical_ai_av", "torch.utils.tensorboard", "tyro.extras")
STAGES = ("layers", "distill", "train", "evaluate")
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}
_FULL_KIB = {"layers": 8, "distill": 48, "train": 192, "evaluate": 4}
"""Room that is left on the full disk: less than a stage writes."""


def prepare(folder: Path) -> int:
    """A world of nine clips, a random target, a draft, and data to train on."""
    torch.manual_seed(0)
    given = ["--num-chunks", "3", "--clips-per-chunk", "3", "--seed", "5", "--workers", "1"]
    assert main(["world", "--out", str(folder / "world"), *given]) == 0
    target = random_target(folder / "made", layers=5, hidden=32)
    target.save_pretrained(folder / "target")
    config = read_json(folder / "target" / "config.json") | {"min_pixels": 4096, "max_pixels": 8192}
    (folder / "target" / "config.json").write_text(json.dumps(config))
    random_draft(target).save_pretrained(folder / "draft")
    return main(command("distill", folder, folder / "data"))


def command(stage: str, folder: Path, out: Path) -> list[str]:
    """A stage's command line."""
    target, world, short = folder / "target", f"--cache-dir {folder / 'world'}", "--max-tokens 8 --seed 1"
    given = {
        "layers": f"--model-path {target} {world} {short} --num-samples 4 --num-target-layers 2",
        "distill": f"--model-path {target} {world} {short} --target-layers 1,3 --context-len 4 "
        "--samples-per-clip 2 --shard-size 4",
        "train": f"--target-model {target} --data-dir {folder / 'data'} --num-draft-layers 1 --block-size 4 "
        "--batch-size 4 --max-steps 12 --save-every 2 --held-out-chunks 2 --num-workers 0",
        "evaluate": f"--alpamayo-model {target} {world} {short} --draft-model {folder / 'draft'} "
        "--num-samples 4 --warmup 0",
    }
    return [stage, *given[stage].split(), "--output-dir", str(out)]


def made(stage: str, out: Path) -> Any:
    """What a stage made, without times and records of how."""
    if stage == "layers":
        content = read_json(out / "layers.json")
        scores = read_json(out / "scores-rank0of1.json")
        return [content[key] for key in ("target_layers", "cosine", "clips")], scores["clip_ids"]
    if stage == "distill":
        data = DistillData(out)
        data.verify()
        return data.samples, [shard["sha256"] for shard in data.manifest["shards"]], data.manifest["clips"]
    if stage == "train":
        summary = read_json(out / "train.json")
        kept = [summary[key] for key in ("evaluations", "best_step", "steps", "losses")]
        return kept, file_hash(out / "draft" / "model.safetensors"), file_hash(out / "draft" / "config.json")
    rows = read_json(out / "evaluation.json")["clip_rows"]
    return [[row[key] for key in ("clip_id", "coc", "acceptance", "rounds", "identity")] for row in rows]


def left_behind(out: Path) -> list[str]:
    """Temporary files, locks and folders put aside that no run needs."""
    return sorted(str(path.relative_to(out)) for path in out.rglob(".*"))


def fork(run: Callable[[], int], log: Path) -> int:
    """Run in a child whose output goes to a file; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        status = run()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """A child's exit status; −9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Trials:
    """The trials of one folder of inputs, and their counts."""

    def __init__(self, folder: Path) -> None:
        """Make the inputs, and each stage's artefacts undisturbed."""
        self.folder, self.log = folder, folder / "log.txt"
        for name in LATE:
            importlib.import_module(name)
        gc.freeze()  # a collection in a fork would write to, and so copy, all that the imports made
        # In a child, as all that computes: threads do not live on in what is forked after them.
        assert ended(fork(lambda: prepare(folder), self.log)) == 0, self.log.read_text()[-3000:]
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds: dict[str, float] = {}
        self.wanted: dict[str, Any] = {}
        for stage in STAGES:
            start = time.monotonic()
            self._finish(stage, folder / f"undisturbed-{stage}")
            self.seconds[stage] = time.monotonic() - start
            self.wanted[stage] = made(stage, folder / f"undisturbed-{stage}")

    def _finish(self, stage: str, out: Path) -> None:
        status = ended(fork(lambda: main(command(stage, self.folder, out)), self.log))
        if status != 0:
            raise AssertionError(f"{stage} ended with {status}:\n{self.log.read_text()[-3000:]}")

    def _compare(self, stage: str, out: Path, what: str) -> None:
        self._finish(stage, out)
        if made(stage, out) != self.wanted[stage]:
            raise AssertionError(f"{stage}, {what}: other artefacts than undisturbed, in {out}")
        if left_behind(out):
            raise AssertionError(f"{stage}, {what}: left behind {left_behind(out)}")
        shutil.rmtree(out)

    def random_kills(self, count: int, draw: random.Random) -> None:
        """Kill each stage in turn, one to three times in one folder, until there are enough."""
        while self.counts["random kills"] < count:
            stage = STAGES[self.counts["folders"] % len(STAGES)]
            out = self.folder / "out"
            for _ in range(draw.randint(1, 3)):
                pid = fork(lambda: main(command(stage, self.folder, out)), self.log)  # noqa: B023
                time.sleep(draw.uniform(0, 1.1 * self.seconds[stage]))
                os.kill(pid, signal.SIGKILL)
                if ended(pid) == -signal.SIGKILL:
                    self.counts["random kills"] += 1
                    self.counts[f"random kills of {stage}"] += 1
            self.counts["folders"] += 1
            self._compare(stage, out, "killed at random moments")

    def forced_kills(self, stage: str, numbers: Iterator[int]) -> None:
        """Kill a stage before its n-th change of a file, for each of these n that it reaches."""
        for number in numbers:
            out = self.folder / "out"
            status = ended(fork(lambda: self._until(stage, out, number), self.log))  # noqa: B023
            if status == 0:  # it has fewer
                shutil.rmtree(out)
                return
            if status != -signal.SIGKILL:
                raise AssertionError(f"{stage} ended with {status}:\n{self.log.read_text()[-3000:]}")
            self.counts["forced kills"] += 1
            self.counts[f"forced kills of {stage}"] += 1
            self._compare(stage, out, f"killed before its change {number} of a file")

    def _until(self, stage: str, out: Path, number: int) -> int:
        """Run a stage, and die before a change of a file in its folder."""
        seen = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            writes = event == "open" and (
                (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")) or arguments[2] & 3
            )
            if (event in _CHANGES or writes) and str(arguments[0]).startswith(str(out)):
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(watch)
        return main(command(stage, self.folder, out))

    def disks(self) -> None:
        """Run each stage on a full disk and on a read-only one: one line, no traceback, and it can go on."""
        for stage in STAGES:
            with disk(self.folder / "disk") as place:
                out = place / "out"
                free = shutil.disk_usage(place).free
                (place / "ballast").write_bytes(b"\0" * (free - 1024 * _FULL_KIB[stage]))
                self._refused(stage, out, "No space left", "are needed, but only")
                (place / "ballast").unlink()
                self._compare(stage, out, "disk full")
                self.counts["full disks"] += 1
                subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
                self._refused(stage, out, "Read-only")
                subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
                self._compare(stage, out, "disk read-only")
                self.counts["read-only disks"] += 1

    def _refused(self, stage: str, out: Path, *words: str) -> None:
        log = self.folder / "refused.txt"
        log.unlink(missing_ok=True)
        status = ended(fork(lambda: main(command(stage, self.folder, out)), log))
        printed = log.read_text()
        if status not in (1, 2) or "Traceback" in printed or not any(word in printed for word in words):
            raise AssertionError(f"{stage} ended with {status} and printed:\n{printed[-2000:]}")


@contextmanager
def disk(place: Path) -> Iterator[Path]:
    """A small file system of its own, in memory."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def disks_can_be_made() -> bool:
    """Whether this process may mount file systems."""
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        if tried.returncode == 0:
            subprocess.run(["umount", folder], check=True)
    return tried.returncode == 0


def run(arguments: Sequence[str] | None = None) -> int:
    """Make the trials; the last line that is printed is their counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="at random moments")
    parser.add_argument("--forced-every", type=int, default=1, help="take each n-th change of a file")
    parser.add_argument("--disks", action="store_true", help="full and read-only disks; wants root")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the counts go as well")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        trials = Trials(Path(folder))
        trials.random_kills(options.kills, random.Random(options.seed))
        for stage in STAGES:
            trials.forced_kills(stage, iter(range(0, 10_000, options.forced_every)))
        if options.disks:
            if disks_can_be_made():
                trials.disks()
            else:
                trials.counts["disks not tried: this user may not mount any"] = 1
    counts = {**trials.counts, "seconds": round(time.monotonic() - started, 1)}
    if options.out:
        given = {"command": " ".join(sys.argv), "revision": git_revision(), "versions": versions()}
        write_json(options.out, {"counts": counts, **given})
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(run())
