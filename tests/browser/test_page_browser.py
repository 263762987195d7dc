"""The page in Chromium, from disk, with no network: charts, clips, keys, mouse, filters, hostile texts."""

import json
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest

from alpamayo_dflash.common.artefacts import read_json, write_record
from alpamayo_dflash.report.page import page as page_module
from alpamayo_dflash.report.page.islands import visible
from alpamayo_dflash.report.page.runs import read_runs
from tests.helpers.chromium import axe_violations, opened

RUN = Path(__file__).parents[1] / "data" / "run"
LOOKS = [(1440, False), (1440, True), (390, False), (390, True)]
HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'><b id=hacked>bold</b>",
    "\"quotes\" 'single' `back` ${window.hacked=1} {{ 7*7 }} {% raw %} &lt;b&gt; &amp;",
    "zero\0 escape\x1b[31m bell\x07 line\r\nnext\ttab \x7f\x9b",
    "עצור בצומת \u202egnp.exe\u202c \u2066isolated\u2069 مرحبا",
    "very long " * 4000,
)


def write(paths, out):
    runs = read_runs(paths)
    page_module.write(runs, page_module.sections_of(runs), out)
    return out


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The page of the stored run."""
    return write([RUN], tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def rows():
    return read_json(RUN / "evaluation" / "evaluation.json")["clip_rows"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, rows):
    """The page of the stored run beside a copy with hostile texts, a clip that failed and one not equal."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(RUN, folder / "<b>run & 'copy'")
    copy = folder / "<b>run & 'copy'"
    file = copy / "evaluation" / "evaluation.json"
    found = read_json(file)
    for row, text in zip(found["clip_rows"], HOSTILE, strict=False):
        row["coc"][0] = text
        place = copy / "evaluation" / "trace" / row["clip_id"] / "clip.json"
        trace = read_json(place)
        trace["coc"][0] = text
        trace["pieces"][str(trace["first_tokens"][0])] = text
        trace.pop("record_sha256", None)
        write_record(place, trace)
    found["clip_rows"][5]["identity"]["sampled"] = False
    failure = {"clip_id": "<i>lost</i>", "error": "no <frames> \u202e", "kind": "file"}
    found["clips"] |= {"attempted": 7, "failed": 1, "failures": [failure], "kinds": {"file": 1}}
    found.pop("record_sha256", None)
    write_record(file, found)
    return write([RUN, copy], folder / "report.html")


def link(clip, run=0, sample=0, round_=0):
    return f"#run={run}&clip={quote(clip, safe='')}&sample={sample}&round={round_}"


def drawn(found, name):
    """A graphic's data by name, once it is there."""
    found.settle(
        "(name) => { const place = document.querySelector(`[data-chart=clip-${name}]`);"
        " return place.view && place.done === place.wanted; }",
        name,
    )
    names = {"tree": ["nodes", "edges"], "paths": ["paths"], "timing": ["bars"]}[name]
    script = """([name, names]) => {
        const view = document.querySelector(`[data-chart="clip-${name}"]`).view;
        return Object.fromEntries(names.map((each) => [each, view.data(each).map((row) => ({...row}))]));
    }"""
    return found.page.evaluate(script, [name, names])


def clean(found):
    assert found.errors == []
    assert found.requests == []
    assert found.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def current(found):
    """Clip, sample and round of the hash."""
    words = found.page.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")
    return words.get("clip"), int(words.get("sample", -1)), int(words.get("round", -1))


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_charts_and_clips_are_drawn(browser, stored, rows, width, dark):
    with opened(browser, stored, width=width, dark=dark) as found:
        page = found.page
        assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
        charts = page.locator("#overview .chart").all()
        assert len(charts) >= 8
        if dark:  # the others are drawn as they come into sight, in colours that the first one shows
            charts = charts[:1]
        for chart in charts:
            chart.scroll_into_view_if_needed()
            chart.evaluate("(each) => { each.wanted = true }")
        wanted = "[...document.querySelectorAll('#overview .chart')].filter((each) => each.wanted)"
        found.settle(f"() => {wanted}.every((each) => each.view)")
        sizes = page.evaluate(f"{wanted}.map((each) => each.view.data('rows').length)")
        assert len(sizes) == len(charts)
        assert min(sizes) > 0
        row = rows[0]
        page.evaluate("(hash) => { location.hash = hash }", link(row["clip_id"]))
        nodes = drawn(found, "tree")["nodes"]
        first = row["rounds"][0][0]
        assert len(nodes) == 1 + len(first["proposed"]) + len(first["emitted"]) - len(first["taken"])
        assert len(drawn(found, "paths")["paths"]) == 16 + 64 + 64 * len(row["coc"])
        assert {bar["name"] for bar in drawn(found, "timing")["bars"]} >= {"prefill", "verify", "action"}
        assert page.locator(".frames img").count() == 16
        found.settle(
            "() => [...document.querySelectorAll('.frames img')].every((each) => each.naturalWidth > 0)"
        )
        assert page.locator("[data-part=coc]").text_content() == row["coc"][0]
        clean(found)


def test_keyboard(browser, stored, rows):
    with opened(browser, stored) as found:
        page, keys = found.page, found.page.keyboard
        page.locator("#clip-list tbody a").first.focus()
        keys.press("Enter")
        found.settle("() => !document.getElementById('clip-view').hidden")
        order = page.evaluate("window.page.shownClips(0)")
        assert current(found)[0] == order[0]
        keys.press("j")
        assert current(found) == (order[1], 0, 0)
        keys.press("ArrowDown")
        keys.press("k")
        keys.press("ArrowUp")
        keys.press("k")  # there is none before the first
        assert current(found)[0] == order[0]
        row = next(each for each in rows if each["clip_id"] == order[0])
        count = len(row["rounds"][0])
        for number in range(1, count):
            keys.press("ArrowRight")
            assert current(found) == (order[0], 0, number)
            assert page.locator(".rounds [aria-current=true]").count() == 1
            assert page.locator(".rounds li").nth(number).locator("[aria-current=true]").count() == 1
            found.settle(
                "(n) => document.querySelector('[data-chart=clip-tree]').view?.data('nodes').length === n",
                nodes_of(row["rounds"][0][number]),
            )
        keys.press("ArrowRight")  # nor a round after the last
        assert current(found)[2] == count - 1
        keys.press("ArrowLeft")
        assert current(found)[2] == max(0, count - 2)
        keys.press("]")
        assert current(found) == (order[0], 1, 0)
        assert page.locator("[data-part=coc]").text_content() == row["coc"][1]
        keys.press("[")
        keys.press("?")
        assert page.locator("#clip-keys").is_visible()
        keys.press("Escape")
        found.settle("() => !document.getElementById('clip-keys').open")
        assert page.locator("#clip-view").is_visible()
        keys.press("Escape")
        found.settle("() => document.getElementById('clip-view').hidden")
        assert page.locator("#overview").is_visible()
        assert page.evaluate("document.activeElement.tagName") == "A"
        clean(found)


def nodes_of(round_):
    return 1 + len(round_["proposed"]) + len(round_["emitted"]) - len(round_["taken"])


def test_mouse(browser, stored, rows):
    row = max(rows, key=lambda each: len(each["rounds"][0]))
    with opened(browser, stored, hash_=link(row["clip_id"])) as found:
        page = found.page
        panel = page.locator("[data-part=token]")
        tokens = page.locator(".token")
        emitted = [token for each in row["rounds"][0] for token in each["emitted"]]
        assert tokens.count() == 1 + len(emitted)
        origins = [origin for each in row["rounds"][0] for origin in each["origins"]]
        letters = {"draft": "D", "end rule": "E", "target": "T"}
        assert [tokens.nth(i + 1).get_attribute("data-look") for i in range(len(emitted))] == [
            letters[o] for o in origins
        ]
        tokens.nth(1).hover()
        assert "The target gave it" in panel.text_content()
        assert "Draft’s likeliest" in panel.text_content()
        assert panel.locator("tr.is-it").count() >= 1
        tokens.nth(0).focus()
        assert "the prompt’s own pass" in panel.text_content()
        tokens.last.click()
        assert current(found)[2] == len(row["rounds"][0]) - 1
        page.get_by_role("button", name="Previous round").click()
        assert current(found)[2] == len(row["rounds"][0]) - 2
        page.locator(".rounds button").first.click()
        assert current(found)[2] == 0
        drawn(found, "tree")
        pieces = page.evaluate(
            "document.querySelector('[data-chart=clip-tree]').view.data('nodes').map((n) => n.piece)"
        )
        page.locator("[data-chart=clip-tree] .mark-symbol path").nth(2).hover()
        assert panel.locator(".piece").text_content() == pieces[2]
        page.locator("#clip-view details[data-clip-table=tree] summary").click()
        found.settle(
            "(n) => document.querySelectorAll('[data-clip-table=tree] tbody tr').length === n",
            nodes_of(row["rounds"][0][0]),
        )
        page.locator(".frames button").nth(3).click()
        assert "(4 of 16)" in page.locator("#clip-frame-title").text_content()
        page.keyboard.press("ArrowRight")
        assert "(5 of 16)" in page.locator("#clip-frame-title").text_content()
        page.get_by_role("button", name="Close").click()
        found.settle("() => !document.getElementById('clip-frame').open")
        before = current(found)[0]
        page.get_by_role("button", name="Next clip").click()
        assert current(found)[0] != before
        page.locator("#theme").click()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert drawn(found, "tree")["nodes"][0]["ink"] == page.evaluate(
            "getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()"
        )
        page.get_by_role("button", name="All clips").click()
        found.settle("() => document.getElementById('clip-view').hidden")
        clean(found)


def test_a_link_opens_its_clip_and_round_also_when_it_changes(browser, stored, rows):
    row = max(rows, key=lambda each: len(each["rounds"][1]))
    last = len(row["rounds"][1]) - 1
    with opened(browser, stored, hash_=link(row["clip_id"], 0, 1, last)) as found:
        page = found.page
        assert page.locator("[data-part=coc]").text_content() == row["coc"][1]
        assert page.locator(".rounds li").nth(last).locator("[aria-current=true]").count() == 1
        other = next(each for each in rows if each is not row)
        page.evaluate("(hash) => { location.hash = hash }", link(other["clip_id"]))
        found.settle(
            "(text) => document.querySelector('[data-part=coc]').textContent === text", other["coc"][0]
        )
        page.evaluate("(hash) => { location.hash = hash }", link("no such clip"))
        found.settle("() => document.querySelector('[data-part=notes]').textContent.includes('no such clip')")
        page.evaluate("(hash) => { location.hash = hash }", link(other["clip_id"], run=7))
        found.settle("() => document.querySelector('[data-part=notes]').textContent.includes('no run 7')")
        page.evaluate("(hash) => { location.hash = hash }", link(other["clip_id"], 0, 99, 99))
        found.settle(
            "(text) => document.querySelector('[data-part=coc]').textContent === text", other["coc"][-1]
        )
        page.go_back()
        clean(found)


def shown(page):
    return page.locator("#clip-list tbody tr:visible").count()


def test_filters_and_sorting(browser, hostile, rows):
    with opened(browser, hostile) as found:
        page = found.page
        form = page.locator("#clip-filters")
        every = 2 * len(rows) + 1
        assert shown(page) == every
        form.locator("[name=state]").select_option("failed")
        assert shown(page) == 1
        form.locator("[name=state]").select_option("unequal")
        assert shown(page) == 1
        form.locator("[type=reset]").click()
        found.settle(
            "(count) => document.getElementById('clip-count').textContent.startsWith(String(count))", every
        )
        form.locator("[name=text]").fill("window.hacked")
        assert shown(page) == 2
        form.locator("[name=text]").fill(rows[3]["clip_id"])
        assert shown(page) == 2
        form.locator("[name=run]").select_option("1")
        assert shown(page) == 1
        form.locator("[type=reset]").click()
        lengths = [each["acceptance"]["tokens_after_first"] / each["acceptance"]["passes"] for each in rows]
        most = sorted(lengths)[2] + 1e-6
        form.locator("[name=run]").select_option("0")
        form.locator("[name=acceptance]").fill(str(most))
        assert shown(page) == sum(length <= most for length in lengths)
        form.locator("[type=reset]").click()
        form.locator("[name=run]").select_option("0")
        errors = [each["trajectory"]["min_ade_m"] for each in rows]
        least = sorted(errors)[3] - 1e-6
        form.locator("[name=error]").fill(str(least))
        assert shown(page) == sum(error >= least for error in errors)
        page.locator("#clip-list tbody tr:visible a").first.click()
        found.settle("() => !document.getElementById('clip-view').hidden")
        page.keyboard.press("j")  # steps through what the filter left
        assert current(found)[0] in {
            each["clip_id"] for each in rows if each["trajectory"]["min_ade_m"] >= least
        }
        page.keyboard.press("Escape")
        form.locator("[type=reset]").click()
        head = page.locator("#clip-list thead th.number, #clip-list thead th.count").first
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        clean(found)


def test_hostile_texts_show_as_text(browser, hostile, rows):
    with opened(browser, hostile) as found:
        page = found.page
        for row, text in zip(rows, HOSTILE, strict=False):
            page.evaluate("(hash) => { location.hash = hash }", link(row["clip_id"], run=1))
            found.settle(
                "(text) => document.querySelector('[data-part=coc]').textContent === text", visible(text)
            )
            assert page.locator(".token bdi").first.text_content() == visible(text)
            assert drawn(found, "tree")["nodes"][0]["piece"] == visible(text).replace(" ", "␣")
            for width in (390, 1440):
                page.set_viewport_size({"width": width, "height": 900})
                clean(found)
        page.evaluate("(hash) => { location.hash = hash }", link("<i>lost</i>", run=1))
        found.settle(
            "() => document.querySelector('[data-part=notes]').textContent.includes('no <frames> \\\\u202e')"
        )
        assert page.locator("[data-part=name]").text_content() == "<i>lost</i>"
        assert page.evaluate("window.hacked") is None
        assert page.locator("#hacked, #clip-view i").count() == 0
        clean(found)


def test_axe_finds_nothing_serious(browser, stored, rows):
    with opened(browser, stored) as found:
        assert axe_violations(found) == []
        found.page.evaluate("(hash) => { location.hash = hash }", link(rows[0]["clip_id"]))
        drawn(found, "tree")
        assert axe_violations(found) == []
        found.page.emulate_media(color_scheme="dark")
        drawn(found, "tree")
        assert axe_violations(found) == []


def test_the_page_holds_its_data_as_json_alone(stored):
    text = stored.read_text(encoding="utf-8")
    assert "unsafe-eval" not in text.partition("</head>")[0]
    islands = text.split('<script type="application/json"')[1:]
    assert len(islands) >= 6
    for island in islands:
        json.loads(island.partition(">")[2].partition("</script>")[0])
