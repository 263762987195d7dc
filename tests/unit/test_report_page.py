"""The page of runs: what is read, counted, drawn, compared and escaped; browsers are tested elsewhere."""

from __future__ import annotations

import copy
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alpamayo_dflash.common.bootstrap import median_interval, ratio_difference_interval, ratio_interval
from alpamayo_dflash.common.manoeuvres import manoeuvre_of
from alpamayo_dflash.report.page import charts, measures
from alpamayo_dflash.report.page.compare import differences, matched, missing, text_counts, unlike
from alpamayo_dflash.report.page.data import Column, DataTable, Measured, clip_link
from alpamayo_dflash.report.page.page import comparison, sections_of, write
from alpamayo_dflash.report.page.plots import drawn
from alpamayo_dflash.report.page.runs import Run, read_runs
from alpamayo_dflash.report.page.sections import clip_list, trouble
from alpamayo_dflash.report.page.summary import summary
from alpamayo_dflash.report.page.tallies import block_places, depths, sentence_places
from alpamayo_dflash.report.tables import WORLD_FIGURES

ARMS = ("transformers", "autoregressive", "dflash")
HOSTILE = "Stop \"now\" & 'then' <img src=x onerror=alert(1)></script><script>alert(2)</script>\x07\u202eabc"


def round_of(position: int, proposed: int, taken: int, **other: Any) -> dict[str, Any]:
    """A chain of which the first so many are taken, then the target's own token."""
    return {
        "position": position,
        "anchor": 1,
        "proposed": list(range(10, 10 + proposed)),
        "parents": list(range(-1, proposed - 1)),
        "sources": ["draft"] * proposed,
        "taken": list(range(taken)),
        "emitted": [*range(10, 10 + taken), 9],
        "origins": ["draft"] * taken + ["target"],
        **other,
    }


def row(number: int, coc: str = "Keep lane since the road is clear.", scale: float = 1.0) -> dict[str, Any]:
    times = {"prefill_ms": 50.0, "action_ms": 5.0, "tokens": 9}
    decode = {"transformers": 150.0, "autoregressive": 100.0, "dflash": (30.0 + number) * scale}
    rounds = [round_of(0, 3, 3), round_of(4, 3, number % 3)]
    tokens = sum(len(each["emitted"]) for each in rounds)
    return {
        "clip_id": f"clip-{number}",
        "coc": [coc],
        "arms": {arm: {**times, "decode_ms": decode[arm], "total_ms": 55.0 + decode[arm]} for arm in ARMS},
        "acceptance": {
            **{"tokens_after_first": tokens, "passes": 2, "drafted": 6, "accepted": 3 + number % 3},
        },
        "identity": dict.fromkeys(("greedy", "sampled", "autoregressive_equals_transformers"), True),
        "trajectory": {"min_ade_m": 0.5 + number / 10, "constant_velocity_ade_m": 1.5},
        "named": {"manoeuvre": True, "cause": number % 2 == 0},
        "parts_ms": {"draft": 10.0, "verify": 15.0 + number, "other": 1.0},
        "rounds": [rounds],
    }


def evaluation(rows: list[dict[str, Any]] | None = None, **other: Any) -> dict[str, Any]:
    rows = [row(number) for number in range(6)] if rows is None else rows
    times = {"prefill_ms": 50.0, "decode_ms": 33.0, "action_ms": 5.0, "total_ms": 88.0, "tokens_per_s": 200.0}
    equal = {"greedy_identical", "sampled_identical", "autoregressive_equals_transformers"}
    return {
        "clips": {"attempted": len(rows), "done": len(rows), "failed": 0, "failures": []},
        "lossless": {**dict.fromkeys(equal, len(rows)), "of": len(rows), "near_ties": 0, "not_near_ties": 0},
        "acceptance_length": 3.0,
        "acceptance_rate": 0.66,
        "arms": dict.fromkeys(ARMS, times),
        "speedup": {"decode_vs_autoregressive": 3.0, "decode_vs_transformers": 4.5},
        "trajectory": {"min_ade_m": 0.7, "constant_velocity_min_ade_m": 1.5},
        "coc_names": {"both": 0.5},
        "settings": {"temperature": 0.6, "lossless_mode": True},
        "clip_rows": rows,
        **other,
    }


def written(folder: Path, result: dict[str, Any], name: str = "evaluation.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(result))
    return folder / name


def demo(folder: Path) -> Path:
    """The folder of a demo, as far as the page reads it."""
    world = dict.fromkeys(WORLD_FIGURES, 0.5)
    bounds = dict.fromkeys(WORLD_FIGURES, (0.1, 0.9))
    extra = {"world": world, "world_here": world, "world_bounds": bounds, "training": {"evaluations": []}}
    written(folder, evaluation(**extra), "summary.json")
    written(folder / "evaluation", evaluation())
    written(folder / "evaluation-greedy", evaluation([row(number, scale=0.9) for number in range(6)]))
    (folder / "evaluation" / "trace").mkdir()
    scores = {"cosine": [0.2, 0.5, 1.0], "early_exit_ce": {"0": 2.0, "1": 1.0, "2": 0.1}, "tokens": 9}
    written(folder / "layers", scores | {"target_layers": [1, 2]}, "layers.json")
    entries = [
        {"step": 0, "acceptance_length": 1.0, "real_acceptance_length": 1.1},
        {"step": 10, "acceptance_length": 3.0, "expected_acceptance_length": 2.8}
        | {"real_acceptance_length": 2.9},
    ]
    losses = [{"step": 5, "ce": 2.0, "kl": 1.0, "gradient_norm": 3.0, "learning_rate": 0.1}]
    written(folder / "train", {"evaluations": entries, "losses": losses, "best_step": 10}, "train.json")
    return folder


def page_of(tmp_path: Path, *paths: Path) -> str:
    runs = read_runs(paths)
    write(runs, sections_of(runs), tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


# What is read.


def test_a_demos_folder_is_read_whole(tmp_path: Path) -> None:
    (run,) = read_runs([demo(tmp_path / "demo")])
    assert run.name == "demo" and len(run.rows) == 6
    assert run.traces == tmp_path / "demo" / "evaluation" / "trace"
    assert run.greedy is not None and run.layers is not None and run.training is not None
    assert [each.name for each in run.series] == ["sampled", "greedy"]
    assert run.layers["target_layers"] == [1, 2]
    assert len(run.training["losses"]) == 1


def test_an_evaluation_is_found_by_folder_and_by_file(tmp_path: Path) -> None:
    file = written(tmp_path / "one", evaluation())
    by_folder, by_file = read_runs([tmp_path / "one"]), read_runs([file])
    assert by_folder == by_file
    assert [each.name for each in by_file[0].series] == ["one"]
    assert by_file[0].traces is None and by_file[0].layers is None


def test_runs_have_names_that_tell_them_apart(tmp_path: Path) -> None:
    files = [written(tmp_path / name / "evaluation", evaluation()) for name in ("a", "b")]
    assert [run.name for run in read_runs(files)] == ["a/evaluation", "b/evaluation"]
    other = written(tmp_path, evaluation(), "mine.json")
    assert [run.name for run in read_runs([other, files[0]])] == ["mine", "evaluation"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"cosine": ["x"]}, r"layers\.json\.cosine\[0\] is 'x'"),
        ({"early_exit_ce": {"one": 1.0}}, r"layers\.json: early_exit_ce has 'one'"),
        ({"target_layers": 1}, r"layers\.json\.target_layers is 1"),
    ],
)
def test_damaged_scores_of_layers_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    folder = demo(tmp_path / "demo")
    path = folder / "layers" / "layers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ValueError, match=message):
        read_runs([folder])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": [0, 0, 1]}, "rounds: parents is 0"),
        ({"taken": [3]}, "rounds: taken is 3"),
        ({"origins": ["draft"]}, "origins has 1 tokens; emitted has 4"),
        ({"position": -1}, "position is -1"),
    ],
)
def test_rounds_that_contradict_themselves_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    rows = [row(0)]
    rows[0]["rounds"] = [[round_of(0, 3, 3) | change]]
    with pytest.raises(ValueError, match=message):
        read_runs([written(tmp_path, evaluation(rows))])


def test_runs_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run is given"):
        read_runs([])
    with pytest.raises(ValueError, match=f"{tmp_path}: holds neither summary.json nor evaluation.json"):
        read_runs([tmp_path])
    file = written(tmp_path, evaluation())
    with pytest.raises(ValueError, match="is given twice"):
        read_runs([file, tmp_path])


# What is counted.


def test_places_of_a_tree_are_depths() -> None:
    assert depths([-1, 0, 0, 1, -1]) == [1, 2, 2, 3, 1]
    tree = {"parents": [-1, 0, 0, 1, -1], "taken": [0, 2], "proposed": [1, 2, 3, 4, 5]}
    found = block_places({"rounds": [[round_of(0, 0, 0) | tree]]})
    assert dict(found.proposed) == {1: 1, 2: 1, 3: 1}
    assert dict(found.taken) == {1: 1, 2: 1}
    assert dict(found.reached) == {1: 1, 2: 1, 3: 1}


def test_acceptance_by_place_in_the_block() -> None:
    rows = [{"clip_id": "a", "rounds": [[round_of(0, 3, 3), round_of(4, 3, 1), round_of(6, 2, 0)]]}]
    table = measures.by_block_place([measures.Series("run", {}, rows)])
    found = {each["place"]: each for each in table.objects()}
    assert [found[place]["proposed"] for place in (1, 2, 3)] == [3, 3, 2]
    assert [found[place]["taken"] for place in (1, 2, 3)] == [2, 1, 1]
    assert [found[place]["reached"] for place in (1, 2, 3)] == [3, 2, 1]
    assert found[2]["share"] == pytest.approx(1 / 3) and found[2]["of_reached"] == pytest.approx(1 / 2)
    assert found[1]["low"] is None  # of one clip there is no spread


def test_acceptance_by_place_in_the_sentence() -> None:
    rows = [{"clip_id": "a", "rounds": [[round_of(0, 3, 1), round_of(2, 3, 0)]]}]
    assert sentence_places(rows[0]) == {1: {"draft": 1}, 2: {"target": 1}, 3: {"target": 1}}
    table = measures.by_sentence_place([measures.Series("run", {}, rows)])
    assert [(each["place"], each["share"]) for each in table.objects()] == [(1, 1.0), (2, 0.0), (3, 0.0)]


def test_sources_and_manoeuvres_are_pooled() -> None:
    rows = [row(0), row(1, "Stop for the red light."), row(2, "Zebra")]
    series = [measures.Series("run", {}, rows)]
    assert {each["source"]: each["tokens"] for each in measures.by_source(series).objects()} == {
        "draft": 12,
        "target": 6,
    }
    found = {each["manoeuvre"]: each["length"] for each in measures.by_manoeuvre(series).objects()}
    assert found == {"keep lane": 2.5, "stop": 3.0, "none recognised": 3.5}


@pytest.mark.parametrize(
    ("text", "manoeuvre"),
    [
        ("  NUDGE to the left to pass", "nudge left"),
        ("Slow down for the cones", "slow down"),
        ("Slow to a stop", "stop"),
        ("", ""),
    ],
)
def test_manoeuvres_are_read_from_texts(text: str, manoeuvre: str) -> None:
    assert manoeuvre_of(text) == manoeuvre


def test_intervals_are_the_bootstraps() -> None:
    values = np.random.default_rng(1).exponential(size=40)
    low, high = median_interval(values, resamples=500) or (0.0, 0.0)
    drawn_anew = np.random.default_rng(0).integers(40, size=(500, 40))
    medians = [statistics.median(values[indices]) for indices in drawn_anew]
    assert (low, high) == pytest.approx(tuple(np.percentile(medians, (2.5, 97.5))))
    ones = [1.0] * 40
    low, high = ratio_interval(values, ones) or (0.0, 0.0)
    error = values.std() / 40**0.5
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_intervals_of_what_does_not_vary_have_no_width() -> None:
    assert median_interval([2.0] * 5) == (2.0, 2.0)
    assert ratio_interval([3, 6], [1, 2]) == (3.0, 3.0)
    twice = ([2.0, 4.0, 9.0], [1.0, 1.0, 1.0])
    assert ratio_difference_interval(twice, twice) == (0.0, 0.0)
    assert ratio_interval([0, 0], [0, 0]) is None and ratio_interval([1], [1]) is None
    assert median_interval([1.0]) is None and median_interval([]) is None
    with pytest.raises(ValueError, match="2 beside 1 clips"):
        ratio_interval([1, 2], [1])


def test_the_summary_has_values_with_intervals(tmp_path: Path) -> None:
    (run,) = read_runs([demo(tmp_path / "demo")])
    found = {name: (sampled, greedy) for name, sampled, greedy in summary(run.series).rows}
    pattern = r"3\.00 \[\d\.\d\d, \d\.\d\d\]"
    assert all(re.fullmatch(pattern, str(cell)) for cell in found["acceptance length, tokens a pass"])
    assert found["clips equal: greedy, sampled, transformers"][0] == "6, 6, 6 of 6"
    bare = evaluation()
    del bare["clip_rows"]
    (plain,) = read_runs([written(tmp_path / "bare", bare)])
    assert ("acceptance length, tokens a pass", "3.00") in summary(plain.series).rows


# What is drawn.


def fields(spec: Any) -> set[str]:
    """The fields that a specification takes from its rows."""
    made: set[str] = set()
    used: set[str] = set()

    def walk(part: Any) -> None:
        if isinstance(part, list):
            for each in part:
                walk(each)
        elif isinstance(part, dict):
            if isinstance(part.get("field"), str):
                used.add(part["field"])
            made.update([part["as"]] if isinstance(part.get("as"), str) else [])
            used.update(re.findall(r"datum\.(\w+)", part.get("filter", "") + part.get("calculate", "")))
            for value in part.values():
                walk(value)

    walk(spec)
    return used - made


def test_every_chart_draws_the_rows_of_its_table(tmp_path: Path) -> None:
    folders = [demo(tmp_path / "a"), demo(tmp_path / "b")]
    bench = written(tmp_path, {"parts": {"ours_1": {"decode": 3.0}, "floor": {"decode": 2.0}}}, "window.json")
    runs = read_runs([*folders, bench])
    figures = [figure for section in sections_of(runs) for figure in section.figures]
    assert {figure.name for figure in figures} == {
        *("differences", "time-parts", "decode-parts", "decode-by-tokens", "speedup", "window-2"),
        *("round-lengths", "clip-lengths", "block-places", "sentence-places", "manoeuvres"),
        *("sources", "source-places-0", "source-places-1", "errors", "losses", "training-acceptance"),
        *("layers-cosine", "layers-early-exit"),
    }
    for figure in figures:
        assert figure.table.rows and figure.description
        taken = fields(dict(figure.spec))
        assert taken and taken <= set(figure.table.keys), figure.name
        assert "datasets" not in figure.spec and "config" not in figure.spec
    drawing = drawn(figures, "dark")  # Vega-Lite takes them all
    assert drawing.count('aria-roledescription="bar"') > 50
    assert charts.theme("dark")["range"]["category"][0] in drawing


def test_the_layers_that_are_tapped_are_marked(tmp_path: Path) -> None:
    runs = read_runs([demo(tmp_path / "a")])
    figure = charts.layer_figures(runs)[1]
    assert [each["layer"] for each in figure.table.objects() if each["chosen"]] == [1, 2]
    drawing = drawn([figure], "light")
    lines = re.search(r'<g class="mark-rule role-mark layer_0_marks"[^>]*>(.*?)</g>', drawing)
    assert lines is not None and lines[1].count("<line") == 2


def test_simulated_expected_and_real_acceptance_are_drawn(tmp_path: Path) -> None:
    table = measures.training_acceptance(read_runs([demo(tmp_path / "a")]))
    kinds = {(each["kind"], each["step"]): (each["length"], each["best"]) for each in table.objects()}
    assert kinds[("simulated", 10)] == (3.0, True) and kinds[("real, sampled", 0)] == (1.1, False)
    assert kinds[("expected, sampled", 10)] == (2.8, True)
    assert {each["loss"] for each in measures.losses(read_runs([tmp_path / "a"])).objects()} == {"ce", "kl"}


def test_values_are_written_by_kind() -> None:
    assert Column("a", "", "share").shown(Measured(0.5, 0.4, 0.6)) == "50.0 % [40.0, 60.0]"
    assert Column("a", "", "times", 1).shown(2.0) == "2.0 ×"
    assert Column("a", "", "count").shown(1234) == "1,234"
    assert Column("a", "").shown(True) == "yes" and Column("a", "", "number").shown(None) == "–"
    table = DataTable("t", (Column("a", "a", "number"),), ((Measured(2.0, 1.0, 3.0),),))
    assert table.cells() == [[("2.00 [1.00, 3.00]", 2.0, "number")]]


# What went wrong stands first.


def test_all_well_is_said() -> None:
    section = trouble([Run("r", Path("x"), evaluation=evaluation(), rows=evaluation()["clip_rows"])])
    texts = {each.level: each.text for each in section.findings[-2:]}
    assert "none of 6 clips failed" in texts["good"]
    assert any("all of 6 clips equal" in each.text for each in section.findings)
    assert not any(each.level == "bad" for each in section.findings)


def test_what_is_wrong_comes_first_and_leads_to_its_clips() -> None:
    wrong = evaluation()
    wrong["clip_rows"][2]["identity"]["sampled"] = False
    wrong["lossless"] |= {"sampled_identical": 5, "near_ties": 1}
    failure = {"clip_id": "lost & found", "error": "no <frames>"}
    wrong["clips"] = {"attempted": 7, "done": 6, "failed": 1, "failures": [failure]}
    wrong["settings"]["lossless_mode"] = False
    wrong["draft_failures"] = 3
    findings = trouble([Run("r", Path("x"), evaluation=wrong, rows=wrong["clip_rows"])]).findings
    bad = [each for each in findings if each.level == "bad"]
    assert list(findings[: len(bad)]) == bad and len(bad) == 4
    assert "5 of 6 sampled texts" in bad[0].text and "1 part at a near-tie" in bad[0].text
    assert bad[0].table is not None and bad[0].table.links == ("#run=0&clip=clip-2",)
    assert bad[1].text == "1 of 7 clips failed."
    assert bad[1].table is not None and bad[1].table.rows == (("lost & found", "no <frames>"),)
    assert bad[1].table.links == ("#run=0&clip=lost%20%26%20found",)
    table, meta = clip_list([Run("r", Path("x"), evaluation=wrong, rows=wrong["clip_rows"])])
    states = [each["state"] for each in table.objects()]
    assert states == ["equal", "equal", "unequal", "equal", "equal", "equal", "failed"]
    assert meta[-1] == {"run": 0, "clip": "lost & found"}


def test_what_was_replayed_is_said(tmp_path: Path) -> None:
    bench = {"parts": {"ours_1": {"decode": 3.0}}, "replayed": ["window_ms"]}
    section = trouble(read_runs([written(tmp_path, bench, "window.json")]))
    assert [each.level for each in section.findings] == ["note"]
    assert section.findings[0].text.endswith("say nothing of a draft: window_ms.")


# Runs beside each other.


def two_runs(tmp_path: Path) -> list[Run]:
    failed = {
        "attempted": 6,
        "done": 5,
        "failed": 1,
        "failures": [{"clip_id": "clip-0", "error": "no frames"}],
    }
    rows = [row(number, scale=1.5) for number in (5, 4, 3, 2, 7)]
    rows[0]["coc"] = ["Stop."]
    other = evaluation(rows, clips=failed) | {"settings": {"temperature": 0.9}}
    return read_runs([written(tmp_path / "a", evaluation()), written(tmp_path / "b", other)])


def test_clips_are_matched_by_id_and_differences_are_paired(tmp_path: Path) -> None:
    first, other = two_runs(tmp_path)
    pairs = matched(first.series[0], other.series[0])
    assert [(one["clip_id"], two["clip_id"]) for one, two in pairs] == [
        (f"clip-{number}", f"clip-{number}") for number in (2, 3, 4, 5)
    ]
    found = {each.measure: each for each in differences(pairs)}
    decode = found["decode of DFlash, ms, median"]
    apart = [0.5 * (30 + number) for number in (2, 3, 4, 5)]
    assert decode.clips == 4 and decode.difference == pytest.approx(statistics.median(apart))
    assert decode.first == pytest.approx(33.5) and decode.other == pytest.approx(33.5 * 1.5)
    assert decode.interval is not None and min(apart) <= decode.interval[0] <= decode.interval[1] <= max(
        apart
    )
    same = found["acceptance length, tokens a pass"]
    assert same.difference == 0 and same.interval == (0.0, 0.0)  # clips are drawn together
    (counts,) = text_counts(first, [other]).objects()
    assert (counts["clips"], counts["same"]) == (4, 3)


def test_missing_clips_are_listed_with_their_reasons(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    found = {(each["clip"], each["run"]): each["why"] for each in missing(runs).objects()}
    assert found == {
        ("clip-0", "b"): "failed: no frames",
        ("clip-1", "b"): "not among its clips",
        ("clip-7", "a"): "not among its clips",
    }
    assert missing(runs).links[-1] == clip_link(1, "clip-7")
    assert unlike(runs[0], runs[1:]) == ["b has temperature 0.9, a has 0.6."]


def test_the_page_compares_runs(tmp_path: Path) -> None:
    section = comparison(two_runs(tmp_path))
    assert [(each.level, each.text) for each in section.findings] == [
        ("note", "b has temperature 0.9, a has 0.6."),
        ("bad", "3 times a clip of one run is missing in another."),
    ]
    (figure,) = section.figures
    decode = next(
        each for each in figure.table.objects() if each["measure"] == "decode of DFlash, ms, median"
    )
    assert decode["relative"] == pytest.approx(0.5, abs=0.02) and decode["clips"] == 4


# What the page holds is text.


class Elements(HTMLParser):
    """A page's elements, links and the text of its scripts, as a browser finds them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.links: list[str] = []
        self.islands: dict[str, str] = {}
        self.text = ""
        self._island = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        self._island = str(found.get("id", "")) if found.get("type") == "application/json" else ""

    def handle_endtag(self, tag: str) -> None:
        self._island = ""

    def handle_data(self, data: str) -> None:
        if self._island:
            self.islands[self._island] = self.islands.get(self._island, "") + data
        else:
            self.text += data


def elements(page: str) -> Elements:
    found = Elements()
    found.feed(page)
    return found


def test_hostile_texts_are_text(tmp_path: Path) -> None:
    rows = [row(0), row(1)]
    plain = elements(page_of(tmp_path, written(tmp_path / "plain", evaluation(rows))))
    hostile = copy.deepcopy(evaluation(rows))
    hostile["clip_rows"][0] |= {"coc": [HOSTILE + "long " * 5000], "clip_id": HOSTILE}
    hostile["clip_rows"][0]["rounds"][0][0]["origins"][0] = HOSTILE
    hostile["clip_rows"][0]["identity"]["greedy"] = False
    hostile["lossless"]["greedy_identical"] = 1
    page = page_of(tmp_path, written(tmp_path / "<script>alert(3)<", hostile))
    found = elements(page)
    assert found.tags.count("script") == plain.tags.count("script")
    assert found.tags.count("img") == plain.tags.count("img")
    seen = "Stop \"now\" & 'then' <img src=x onerror=alert(1)></script><script>alert(2)</script>␇\\u202eabc"
    assert seen in found.text
    clips = json.loads(found.islands["page-data"])["clips"]
    assert clips["rows"][0][1].startswith(seen) and clips["meta"][0]["clip"] == HOSTILE
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", page)


def test_the_page_asks_no_network(tmp_path: Path) -> None:
    page = page_of(tmp_path, demo(tmp_path / "demo"))
    found = elements(page)
    assert all(link.startswith(("#", "data:")) for link in found.links)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert (
        policy is not None and policy[1].startswith("default-src 'none'") and "unsafe-eval" not in policy[1]
    )
    assert "@import" not in page and "url(" not in page.split("</style>")[0]


@pytest.mark.parametrize("ground", ["light", "dark"])
def test_charts_are_legible(ground: charts.Ground) -> None:
    """WCAG 2.1: 4.5 for text."""
    paper = {"light": "#ffffff", "dark": "#14171b"}[ground]
    theme = charts.theme(ground)
    inks = [theme["axis"]["labelColor"], theme["axis"]["titleColor"], theme["legend"]["labelColor"]]
    assert min(contrast(ink, paper) for ink in inks) >= 4.5
    style = (Path(charts.__file__).parent / "templates" / "page.css").read_text()
    block = style.split('[data-theme="dark"]')[1] if ground == "dark" else style
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block.split("}")[0]))
    assert colours["paper"] == paper
    for name in ("ink", "muted", "accent", "good", "bad"):
        assert contrast(colours[name], paper) >= 4.5, name
        assert contrast(colours[name], colours["panel"]) >= 4.5, name
    assert contrast(colours["good"], colours["good-panel"]) >= 4.5
    assert contrast(colours["bad"], colours["bad-panel"]) >= 4.5


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = (int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
