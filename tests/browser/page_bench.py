"""`make page-bench`: the page of a thousand clips, opened from disk in Chromium.

python -m tests.browser.page_bench RUN --out docs/results/page_tiny.json

RUN is a finished demo's folder; its clips are repeated under new ids. The last line printed is the figures.
"""

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpamayo_dflash.common.artefacts import file_hash, provenance, read_json, write_json, write_record
from alpamayo_dflash.report.page import page
from alpamayo_dflash.report.page.runs import read_runs
from tests.helpers.chromium import Opened, axe_violations, chromium, opened

USABLE = """() => {
    const lines = document.querySelectorAll("#clip-list tbody tr").length;
    const near = (each) => each.getBoundingClientRect().top < window.innerHeight;
    const charts = [...document.querySelectorAll("#overview .chart[data-lazy]")];
    const whole = document.readyState === "complete" && lines >= %d;
    return whole && charts.filter(near).every((each) => each.view) && performance.now();
}"""
"""When all is loaded, the list of clips is whole and every chart in sight is drawn: ms since the start."""


@dataclass(frozen=True)
class PageBench:
    """What is measured.

    Attributes:
        run: a finished demo's folder.
        out: the results file.
        clips: how many the page has.
        opens: how often it is opened; the median counts.
    """

    run: Path
    out: Path
    clips: int = 1000
    opens: int = 7


def repeated(run: Path, clips: int, folder: Path) -> None:
    """A demo's folder with its clips repeated under new ids, traces too."""
    summary = read_json(run / "summary.json")
    sources = summary["clip_rows"]
    rows = []
    for number, row in zip(range(clips), itertools.cycle(sources), strict=False):
        clip_id = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{row['clip_id']} {number}"))
        rows.append(row | {"clip_id": clip_id})
        old = run / "evaluation" / "trace" / row["clip_id"]
        new = folder / "evaluation" / "trace" / clip_id
        shutil.copytree(old, new)
        write_record(new / "clip.json", without_checksum(read_json(new / "clip.json")) | {"clip_id": clip_id})
    counts = {"attempted": clips, "done": clips, "failed": 0, "failures": []}
    lossless = summary["lossless"] | {"of": clips}
    for name, key in (("greedy", "greedy_identical"), ("sampled", "sampled_identical")):
        lossless[key] = sum(row["identity"][name] for row in rows)
    same = "autoregressive_equals_transformers"
    lossless[same] = sum(row["identity"][same] for row in rows)
    found = summary | {"clip_rows": rows, "clips": summary["clips"] | counts, "lossless": lossless}
    write_record(folder / "summary.json", without_checksum(found))
    for name in ("layers/layers.json", "train/train.json", "evaluation-greedy/evaluation.json"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy2(run / name, folder / name)


def without_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """A record that may be changed and written anew."""
    return {key: value for key, value in record.items() if key != "record_sha256"}


def measure(bench: PageBench, folder: Path) -> dict[str, Any]:
    """Make the page, open it, step into a clip, and look at what it printed, asked for and lacks."""
    repeated(bench.run, bench.clips, folder / "demo")
    runs = read_runs([folder / "demo"])
    file = folder / "report.html"
    began = time.perf_counter()
    page.write(runs, page.sections_of(runs), file)
    write_s = time.perf_counter() - began
    times, errors, requests, violations = [], [], [], []
    with chromium() as browser:
        for number in range(bench.opens):
            with opened(browser, file) as found:
                usable = found.page.wait_for_function(USABLE % bench.clips, polling=10, timeout=60_000)
                times.append(usable.json_value() / 1e3)
                if number == 0:
                    violations += axe_violations(found)
                    found.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
                    open_clip(found, runs[0].rows[-1]["clip_id"])
                    violations += axe_violations(found)
                errors += found.errors
                requests += found.requests
        version = browser.version
    return {
        "figures": {
            "open_s": round(statistics.median(times), 3),
            "bytes": file.stat().st_size,
            "console_errors": len(errors),
            "requests": len(requests),
            "axe_serious": sum(len(each["nodes"]) for each in violations),
        },
        "clips": bench.clips,
        "opens_s": [round(each, 3) for each in times],
        "write_s": round(write_s, 3),
        "frames_beside_bytes": sum(each.stat().st_size for each in file.with_name("report-frames").iterdir()),
        "messages": errors,
        "asked_for": requests,
        "violations": violations,
        "chromium": version,
    }


def open_clip(found: Opened, clip_id: str) -> None:
    """Open a clip's view, and wait for its tree and its frames."""
    found.page.evaluate("(hash) => { location.hash = hash }", f"#run=0&clip={clip_id}")
    found.settle("() => document.querySelector('[data-chart=clip-tree]')?.view")
    found.settle("() => [...document.querySelectorAll('.frames img')].every((each) => each.naturalWidth)")


def main() -> None:
    """Measure, write the results and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    bench, started = PageBench(given.run, given.out), time.time()
    evaluation = bench.run / "evaluation" / "evaluation.json"
    trace = read_json(evaluation)["trace"]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(bench, Path(folder))
    found["figures"] |= {key: trace[key] for key in ("trace_ms_per_clip", "trace_bytes_per_clip")}
    found["provenance"] = provenance(bench, started, {"evaluation": file_hash(evaluation)})
    write_json(bench.out, found)
    print(json.dumps(found["figures"]))


if __name__ == "__main__":
    main()
