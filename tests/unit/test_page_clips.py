"""What the browser is given of a clip: trees, probabilities, notes, frames, texts that are seen whole."""

import copy
import hashlib
import json
import math

import pytest

from alpamayo_dflash.common.artefacts import write_record
from alpamayo_dflash.report.clip_trace import FILE
from alpamayo_dflash.report.page import pictures as pictures_module
from alpamayo_dflash.report.page.clip_charts import clip_specs
from alpamayo_dflash.report.page.clips import camera_name, chosen_clips, clip_view, clips_context, row_view
from alpamayo_dflash.report.page.islands import island
from alpamayo_dflash.report.page.palette import SOURCE_LOOKS
from alpamayo_dflash.report.page.rounds import lanes
from alpamayo_dflash.report.page.runs import Run
from tests.helpers.small_artefacts import PICTURE, clip_row, clip_trace


def place(ids, logits, chosen, temperature=1.0):
    """One place's scores as the scorer makes them where nothing is cut."""
    total = math.log(sum(math.exp(each) for each in logits))
    tempered = math.log(sum(math.exp(each / temperature) for each in logits))
    rank = sorted(logits, reverse=True).index(logits[ids.index(chosen)]) if chosen in ids else None
    return {
        "ids": ids,
        "logits": logits,
        "log_sum_exp": total,
        "tempered_log_sum_exp": tempered,
        "nucleus_mass": 1.0,
        "nucleus_logit": min(logits),
        "chosen": chosen,
        "chosen_logit": None if rank is None else logits[ids.index(chosen)],
        "chosen_rank": rank,
    }


def places(*each):
    return {name: [one[name] for one in each] for name in place([5], [0.0], 5)}


def traced(row):
    """A trace of a round with a tree: 6 and 7 proposed after the anchor, 8 after 6; 6 taken, 9 emitted."""
    trace = clip_trace()
    trace |= {"clip_id": row["clip_id"], "coc": list(row["coc"]), "temperature": 0.5}
    target = places(
        place([6, 7], [2.0, 1.0], 6, 0.5),
        place([9, 8], [3.0, 0.0], 9, 0.5),
        place([5, 6], [1.0, 0.0], None, 0.5),
        place([5, 6], [1.0, 0.0], None, 0.5),
    )
    draft = places(place([7, 6], [1.0, 0.5], 6, 0.5))
    trace["rounds"] = [
        [
            {
                "index": 4,
                "position": 0,
                "anchor": 5,
                "proposed": [6, 7, 8],
                "parents": [-1, -1, 0],
                "sources": ["draft", "phrase tree", "draft"],
                "taken": [0],
                "emitted": [6, 9],
                "origins": ["draft", "target"],
                "target": target,
                "at": [0, 1],
                "draft": draft,
            }
        ]
    ]
    return trace


def test_a_round_is_a_tree_with_what_both_thought():
    row = clip_row(0)
    (sample,) = clip_view(row, traced(row))["samples"]
    (shown,) = sample["rounds"]
    anchor, six, seven, eight, nine = shown["nodes"]
    assert [node["state"] for node in shown["nodes"]] == ["anchor", "accepted", "rejected", "rejected", "own"]
    assert [(node["x"], node["y"]) for node in shown["nodes"]] == [(0, 0), (1, 0), (1, 2), (2, 1), (2, 0)]
    assert [node["parent"] for node in shown["nodes"]] == [-1, 0, 0, 1, 1]
    assert [node["source"] for node in shown["nodes"]] == [
        "target",
        "draft",
        "phrase tree",
        "draft",
        "target",
    ]
    assert shown["emitted"] == [1, 4]
    assert "p" not in anchor
    two = 1 / (1 + math.exp(-2))  # one logit more, at temperature 0.5
    assert six["p"] == pytest.approx(two, abs=1e-4)
    assert six["p1"] == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-4)
    assert (six["rank"], six["draft_place"], six["draft_rank"]) == (0, 0, 1)
    assert six["q"] == pytest.approx(1 / (1 + math.e), abs=1e-4)
    assert seven["p"] == pytest.approx(1 - two, abs=1e-4)
    assert (seven["rank"], seven["draft_rank"]) == (1, 0)
    assert (eight["place"], eight["rank"]) == (1, 1)
    assert (nine["place"], nine["rank"]) == (1, 0)
    assert "draft_place" not in nine  # the draft has one place
    assert [piece for piece, _, _ in shown["target"][1]] == [" <9>", " <8>"]
    assert sum(p for _, p, _ in shown["target"][0]) == pytest.approx(1, abs=1e-3)
    assert sample["first"]["state"] == "own"


def test_a_token_that_no_list_has_is_without_a_probability():
    row = clip_row(0)
    trace = traced(row)
    trace["rounds"][0][0]["proposed"] = [6, 9, 8]
    node = clip_view(row, trace)["samples"][0]["rounds"][0]["nodes"][2]
    assert not {"p", "p1", "rank", "q", "draft_rank"} & set(node)
    assert node["draft_place"] == 0


@pytest.mark.parametrize(
    ("parents", "path", "wanted"),
    [
        ([-1], [], [0]),
        ([-1, 0, 1, 2], [1, 2], [0, 0, 0, 0]),
        ([-1, 0, 1, 1], [1, 3], [0, 0, 1, 0]),
        ([-1, 0, 0, 0], [], [0, 0, 1, 2]),
        ([-1, 0, 0, 1, 2], [2, 4], [0, 1, 0, 1, 0]),
    ],
)
def test_lanes(parents, path, wanted):
    assert lanes(parents, path) == wanted
    drawn = list(zip(wanted, (depth(parents, node) for node in range(len(parents))), strict=True))
    assert len(set(drawn)) == len(drawn)


def depth(parents, node):
    return 0 if node == 0 else 1 + depth(parents, parents[node])


def test_paths_and_bars():
    row = clip_row(0)
    trace = traced(row)
    trace["bars"] = [
        {"name": name, "start_ms": float(i), "end_ms": i + 1.0}
        for i, name in enumerate(["prefill", "sampling", "draft", "verify", "draft", "verify", "action"])
    ]
    trace["rounds"][0] = [dict(trace["rounds"][0][0], index=i) for i in range(2)]
    view = clip_view(row, trace)
    assert [bar["round"] for bar in view["bars"]] == [None, None, 0, 0, 1, 1, None]
    assert [path["name"] for path in view["paths"]] == ["history", "what the vehicle did", "sample 0"]
    assert view["paths"][0]["points"] == [(-0.1, -1.0, 0.0), (0.0, 0.0, 0.0)]
    assert view["paths"][2]["points"] == [(0.1, 1.0, 0.4)]
    low, high = view["extent"]["y"]
    assert high - low >= 12
    trace["bars"] = [bar for bar in trace["bars"] if bar["name"] != "draft"]
    assert {bar["round"] for bar in clip_view(row, trace)["bars"]} == {None}  # whose they are is not known


def test_what_was_not_equal_is_said_first():
    row = clip_row(0)
    row["identity"] = row["identity"] | {"greedy": False, "sampled": False, "near_ties": 1}
    row["acceptance"]["draft_failures"] = 3
    notes = row_view(row)["notes"]
    assert [note.split()[1] for note in notes] == ["greedy", "sampled", "texts", "draft"]
    assert "3 times" in notes[-1]
    trace = traced(clip_row(0)) | {"equal": False, "coc": ["another text"]}
    view = clip_view(clip_row(0), trace)
    assert "other texts" in view["notes"][0]
    assert view["samples"][0]["coc"] == "another text"


def test_a_trace_of_another_clip_or_text_is_refused():
    row = clip_row(0)
    with pytest.raises(ValueError, match="it is of clip 'clip-0', not of 'clip-1'"):
        clip_view(clip_row(1), traced(row))
    with pytest.raises(ValueError, match="another evaluation"):
        clip_view(row | {"coc": ["another"]}, traced(row))


def test_cameras_have_captions():
    assert camera_name("camera_front_wide_120fov") == "front wide 120°"
    assert camera_name("camera_<b>_fov") == "<b> fov"


def store(folder, row, picture=PICTURE, **more):
    trace = traced(row) | more
    trace["frames"] = [dict(trace["frames"][0], sha256=hashlib.sha256(picture).hexdigest())]
    place_ = folder / row["clip_id"]
    place_.mkdir(parents=True)
    write_record(place_ / FILE, trace)
    (place_ / trace["frames"][0]["file"]).write_bytes(picture)


def run_of(folder, rows, failures=()):
    evaluation = {"clips": {"failures": list(failures)}, "clip_rows": rows}
    return Run("a run", folder / "evaluation.json", evaluation, rows, folder / "trace")


def test_a_run_becomes_views_and_pictures(tmp_path):
    rows = [clip_row(number) for number in range(2)]
    store(tmp_path / "trace", rows[0])
    found = clips_context(
        [run_of(tmp_path, rows, [{"clip_id": "x", "error": "no <frames>"}])], tmp_path / "p.html"
    )
    (run,) = found["clips_index"]
    assert run["clips"] == [
        {"clip": "clip-0", "view": 0, "pictures": 0},
        {"clip": "clip-1", "view": 1, "pictures": None},
        {"clip": "x", "view": 2, "pictures": None},
    ]
    (source,) = found["clips_pictures"][0].values()
    assert source.startswith("data:image/jpeg;base64,")
    assert "--trace" in found["clips_views"][1]["notes"][-1]
    assert found["clips_views"][2]["notes"] == ["This clip failed: no <frames>"]
    assert not (tmp_path / "p-frames").exists()
    assert json.loads(island(found["clips_views"]))[0]["samples"][0]["rounds"]


def test_a_damaged_trace_and_a_missing_frame_are_named(tmp_path):
    rows = [clip_row(number) for number in range(2)]
    for row in rows:
        store(tmp_path / "trace", row)
    (tmp_path / "trace" / "clip-0" / FILE).write_text("{")
    (tmp_path / "trace" / "clip-1" / "front-0.jpg").write_bytes(b"another")
    views = clips_context([run_of(tmp_path, rows)], tmp_path / "p.html")["clips_views"]
    assert "cannot be shown" in views[0]["notes"][-1]
    assert "changed since it was written" in views[1]["notes"][-1]
    assert views[1]["frames"] == []
    assert views[1]["samples"][0]["rounds"]


def test_an_id_that_leads_out_of_the_folder_reads_nothing(tmp_path):
    row = clip_row(0)
    store(tmp_path, row)
    (tmp_path / "trace").mkdir()
    row["clip_id"] = "../clip-0"
    (view,) = clips_context([run_of(tmp_path, [row])], tmp_path / "p.html")["clips_views"]
    assert "must be the name of a file" in view["notes"][-1]


def test_of_many_clips_the_chosen_ones_keep_their_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures_module, "MOST_EMBEDDED", 4)
    monkeypatch.setattr(pictures_module, "FEW_EMBEDDED", 3)
    rows = [copy.deepcopy(clip_row(number)) for number in range(6)]
    rows[5]["identity"]["sampled"] = False
    rows[4]["acceptance"]["draft_failures"] = 1
    rows[2]["arms"]["dflash"]["decode_ms"] = 1e3
    rows[1]["trajectory"]["min_ade_m"] = 50.0
    for number, row in enumerate(rows):
        store(tmp_path / "trace", row, b"picture %d" % (number // 2))
    run = run_of(tmp_path, rows)
    assert chosen_clips([run])[:4] == ["clip-5", "clip-4", "clip-2", "clip-1"]
    found = clips_context([run], tmp_path / "my page.html")["clips_pictures"]
    sources = [next(iter(each.values())) for each in found]
    assert [source.startswith("data:") for source in sources] == [False, False, True, False, True, True]
    folder = tmp_path / "my page-frames"
    assert {path.read_bytes() for path in folder.iterdir()} == {b"picture 0", b"picture 1"}
    for source in (sources[0], sources[1], sources[3]):
        assert source.startswith("my%20page-frames/")
        assert (folder / source.partition("/")[2]).is_file()


def test_hostile_texts_are_seen_character_by_character(tmp_path):
    row = clip_row(0) | {"coc": ["a\0b\x1b[2J \u202eabc </script><b>"]}
    trace = traced(row)
    trace["pieces"]["6"] = "\u202e<i>\r"
    trace["rounds"][0][0]["sources"][0] = "own\nword"
    view = clip_view(row, trace)
    assert view["samples"][0]["coc"] == "a␀b␛[2J \\u202eabc </script><b>"
    node = view["samples"][0]["rounds"][0]["nodes"][1]
    assert (node["piece"], node["source"]) == ("\\u202e<i>␍", "own␊word")
    assert "</" not in island(view)


def test_every_word_of_a_source_has_a_look():
    pytest.importorskip("torch")
    from alpamayo_dflash.decode.proposer import SOURCES

    assert {*SOURCES, "target"} == set(SOURCE_LOOKS)


def test_the_specifications_take_their_values_by_name():
    vl_convert = pytest.importorskip("vl_convert")
    specs = clip_specs()
    row = clip_row(0)
    view = clip_view(row, traced(row))
    nodes = [
        node | {"ink": "#000", "colour": "#123456", "p": "1 %", "rank": "rank 1"}
        for node in view["samples"][0]["rounds"][0]["nodes"]
    ]
    edges = [{"x": 0, "y": 0, "x2": 1, "y2": 0, "taken": True, "colour": "#654321"}]
    paths = [{"path": "history", "kind": "history", "t": 0, "x": 0, "y": 0, "colour": "#123456", "width": 1}]
    bars = [bar | {"colour": "#123456"} for bar in view["bars"]]
    for name, datasets in (
        ("tree", {"nodes": nodes, "edges": edges}),
        ("paths", {"paths": paths}),
        ("timing", {"bars": bars}),
    ):
        drawn = vl_convert.vegalite_to_svg(specs[name] | {"datasets": datasets, "width": 300})
        assert "#123456" in drawn, name
    assert drawn.count("prefill") >= 1
