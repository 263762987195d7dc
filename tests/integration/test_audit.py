"""`evaluate --audit`: stored texts are the target's own, or the run fails and says where they are not."""

from __future__ import annotations

import json

import pytest
import torch

from alpamayo_dflash.cli.main import main
from alpamayo_dflash.common.artefacts import read_json, write_record
from alpamayo_dflash.decode import round_host, steps
from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.steps import accept
from alpamayo_dflash.decode.tree import walk
from alpamayo_dflash.evaluate.arms import Arms
from alpamayo_dflash.evaluate.audit import drawn
from alpamayo_dflash.evaluate.config import EvaluateConfig
from tests.helpers.random_target import random_draft, random_target

CLIPS, LIMIT = 3, 12
SAMPLED = ["--temperature", "0.6", "--num-traj-samples", "2"]
GREEDY = ["--temperature", "0"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A world of three clips, two targets with small images (sharp, and with a flat head), and a draft."""
    folder = tmp_path_factory.mktemp("audit")
    arguments = ["--num-chunks", "1", "--clips-per-chunk", str(CLIPS), "--seed", "5", "--workers", "1"]
    assert main(["world", "--out", str(folder / "world"), *arguments]) == 0
    for name, options in {"target": {"push": 0.5}, "flat": {"push": 0.5, "sharpness": 1.0}}.items():
        target = random_target(folder / f"made-{name}", layers=5, **options)
        target.save_pretrained(folder / name)
        path = folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"min_pixels": 4096, "max_pixels": 8192}))
        random_draft(target).save_pretrained(folder / "draft")
    return folder


@pytest.fixture
def evaluate(work, tmp_path, capsys):
    """Run `evaluate` into one folder; its exit status, JSON object and standard error."""

    def run(*more, target="target", out=tmp_path):
        given = ["evaluate", "--draft-model", work / "draft", "--alpamayo-model", work / target]
        given += ["--cache-dir", work / "world", "--output-dir", out, "--max-tokens", LIMIT, "--warmup", 0]
        capsys.readouterr()
        status = main([str(each) for each in (*given, "--no-compare", *more)])
        captured = capsys.readouterr()
        return status, json.loads(captured.out or "null"), captured.err

    return run


@pytest.fixture
def change(tmp_path):
    """Change the stored rows of an evaluation."""

    def run(changing):
        path = tmp_path / "evaluation.json"
        stored = read_json(path)
        changing({row["clip_id"]: row for row in stored["clip_rows"]})
        write_record(path, stored)  # as a wrong loop would have stored it

    return run


def first_drawn(folder, seed=0):
    rows = read_json(folder / "evaluation.json")["clip_rows"]
    return drawn(rows, 1, seed)[0]["clip_id"]


def counts(audit):
    return [audit[name] for name in ("clips", "texts", "equal", "near_ties", "differences", "passed")]


@pytest.mark.parametrize("more", [GREEDY, SAMPLED, [*SAMPLED, "--row-width", "4"], ["--compare"]])
def test_a_sound_evaluation_passes(evaluate, tmp_path, more):
    status, result, _ = evaluate("--audit", 2, *more)
    samples = 2 if more[:4] == SAMPLED else 1
    assert status == 0 and result["passed"]
    assert counts(result["audit"]) == [2, 2 * samples, 2 * samples, 0, [], True]
    stored = read_json(tmp_path / "evaluation.json")
    assert counts(stored["audit"]) == counts(result["audit"])
    assert {"versions", "parents", "device"} <= set(stored["audit"]["provenance"])
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_a_finished_evaluation_is_audited_all_the_same(evaluate, tmp_path):
    status, before, _ = evaluate(*GREEDY)
    assert status == 0 and "audit" not in before and "passed" not in before
    first = read_json(tmp_path / "evaluation.json")
    status, result, errors = evaluate(*GREEDY, "--audit", 10)
    assert status == 0 and result["nothing_to_do"]
    assert counts(result["audit"]) == [CLIPS, CLIPS, CLIPS, 0, [], True]
    assert f"10 clips were asked for; there are {CLIPS}" in errors
    stored = read_json(tmp_path / "evaluation.json")
    assert stored.pop("audit")["asked"] == 10
    assert stored == first
    assert counts(evaluate(*GREEDY, "--audit", 1)[1]["audit"])[:2] == [1, 1]
    assert evaluate(*GREEDY)[1]["audit"]["asked"] == 1  # it stays, and nothing is decoded


def test_the_autoregressive_loop_does_it(evaluate, monkeypatch):
    evaluate(*GREEDY)
    drafts = []
    generate = SpeculativeDecoder.generate

    def seen(self, *arguments, **options):
        drafts.append(self.draft)
        return generate(self, *arguments, **options)

    monkeypatch.setattr(SpeculativeDecoder, "generate", seen)
    assert evaluate(*GREEDY, "--audit", 2)[0] == 0
    assert drafts == [None, None]


def test_the_draw_is_by_seed_and_clip_alone():
    rows = [{"clip_id": f"clip-{number}"} for number in range(30)]
    ten = drawn(rows, 10, 0)
    assert drawn(rows[::-1], 10, 0) == ten == drawn(rows, 20, 0)[:10]
    assert len({row["clip_id"] for row in ten}) == 10
    assert ten not in (rows[:10], drawn(rows, 10, 1))
    assert [row["clip_id"] for row in drawn(rows, 3, 0)] == ["clip-10", "clip-22", "clip-17"]
    assert len(drawn(rows, 50, 2**80)) == 30


def other_token(rounds, number, place):
    """Another token in a round's emitted ones; its position in the text, and both tokens."""
    emitted = rounds[number]["emitted"]
    old, emitted[place] = emitted[place], (emitted[place] + 1) % 250
    position = 1 + sum(len(each["emitted"]) for each in rounds[:number]) + place
    return position, old, emitted[place]


@pytest.mark.parametrize("more", [GREEDY, SAMPLED])
def test_a_changed_token_is_found_where_it_stands(evaluate, change, tmp_path, more):
    evaluate(*more)
    clip, sample, told = first_drawn(tmp_path), int(more == SAMPLED), {}

    def changing(rows):
        told["at"] = other_token(
            rows[clip]["rounds"][sample], 3, -1 + len(rows[clip]["rounds"][sample][3]["emitted"])
        )
        told["round"] = rows[clip]["rounds"][sample][3]

    change(changing)
    status, result, errors = evaluate(*more, "--audit", CLIPS)
    assert status == 1 and not result["passed"]
    [found] = result["audit"]["differences"]
    position, old, new = told["at"]
    assert (found["clip_id"], found["sample"], found["position"]) == (clip, sample, position)
    assert (found["stored"]["token"], found["own"]["token"]) == (new, old)
    assert (found["round_index"], found["round"]) == (3, told["round"])
    own, stored = found["own"], found["stored"]
    for name in ("logit", "wide_logit", "score", "wide_score")[: 2 if more == GREEDY else 4]:
        if name == "logit" and more == SAMPLED:
            continue  # the noise may lift a token of a lower logit
        if "score" in name or more == GREEDY:
            assert own[name] > stored[name]
    assert (own["score"] is None) == (more == GREEDY)
    assert own["logit"] == pytest.approx(own["wide_logit"], abs=1e-4)
    [line] = [line for line in errors.splitlines() if "position" in line and "round 3" in line]
    for word in (clip, f"sample {sample}, position {position}", str(new), f"{own['logit']:.6g}"):
        assert word in line
    assert json.dumps(told["round"]) in line
    assert f"stored {new}" in " ".join(errors.split())  # the table
    assert result["audit"]["equal"] == result["audit"]["texts"] - 1
    assert evaluate(*more)[0] == 1  # a failed audit stays one
    kept = read_json(tmp_path / "evaluation.json")
    assert kept["arms"] and kept["audit"]["differences"] == [found]


def test_both_logits_are_those_of_the_target(evaluate, change, work, tmp_path):
    from alpamayo_dflash.clips.source import ClipSource
    from alpamayo_dflash.target.alpamayo import Alpamayo

    evaluate(*GREEDY)
    clip, told = first_drawn(tmp_path), {}

    def changing(rows):
        rounds = rows[clip]["rounds"][0]
        told["text"] = [
            rows[clip]["first_tokens"][0],
            *(token for each in rounds for token in each["emitted"]),
        ]
        told["at"] = other_token(rounds, 2, 0)

    change(changing)
    [found] = evaluate(*GREEDY, "--audit", 1)[1]["audit"]["differences"]
    position, old, new = told["at"]
    decoder = SpeculativeDecoder(Alpamayo.from_pretrained(work / "target"))
    read = decoder.prefill(decoder.target.prompt(ClipSource(work / "world").window(clip)))
    logits = decoder.verifier.force(read, [told["text"][:position]]).logits(0)[position]
    assert found["own"]["logit"] == pytest.approx(float(logits[old]), abs=1e-4)
    assert found["stored"]["logit"] == pytest.approx(float(logits[new]), abs=1e-4)


def cut(row):
    row["rounds"][0].pop()


def longer(row):
    row["rounds"][0][-1]["emitted"].append(7)


def no_token(row):
    row["rounds"][0][1]["emitted"][-1] = 10**9


def below_zero(row):
    row["first_tokens"][0] = -1


def first(row):
    row["first_tokens"][0] = (row["first_tokens"][0] + 1) % 250


def anchor(row):
    row["rounds"][0][2]["anchor"] += 1


def taken(row):
    row["rounds"][0][2]["taken"] = [99]


def characters(row):
    row["coc"][0] += "!"


DAMAGES = {
    cut: ("token", "stored is the text's end"),
    longer: ("token", "the target alone writes the text's end"),
    no_token: ("token", "stored is 1000000000 (no token)"),
    below_zero: ("token", "stored is -1 (no token)"),
    first: ("token", "it comes from the prompt's own pass"),
    anchor: ("round", "round 2 does not fit the stored text: its anchor is"),
    taken: ("round", "it took nodes [99]"),
    characters: ("coc", "but coc is"),
}


@pytest.mark.parametrize("changing", DAMAGES)
def test_other_damage_is_found_too(evaluate, change, tmp_path, changing):
    kind, said = DAMAGES[changing]
    evaluate(*GREEDY)
    clip = first_drawn(tmp_path)
    change(lambda rows: changing(rows[clip]))
    status, result, errors = evaluate(*GREEDY, "--audit", 1)
    assert status == 1
    [found] = result["audit"]["differences"]
    assert (found["clip_id"], found["kind"]) == (clip, kind)
    assert said in found["message"]
    assert found["message"] in errors


def broken_walk(tree, chains, choose, room, stops, **more):
    """After its anchor a sample takes the first proposed token, whatever the target chose."""
    offered = {slots[0]: tree._tail.tokens[slots[1]] for slots in chains.values() if len(slots) > 1}

    def instead(pairs):
        return [offered.get(slot, own) for (_, slot), own in zip(pairs, choose(pairs), strict=True)]

    return walk(tree, chains, instead, room, stops, **more)


def broken_accept(state, marks, columns, settled, finite):
    """The same, on the device."""
    if state.block == 1:  # nothing is ever proposed
        accept(state, marks, columns, settled, finite)
        return
    rows = state.samples * state.sample_rows
    wrong, blocks = columns.clone(), state.row_tokens[:rows].view(state.samples, state.sample_rows)
    firsts = wrong[:rows].view(state.samples, state.sample_rows)[:, 0]
    firsts.copy_(torch.where(state.proposed > 0, blocks[:, 1], firsts))
    accept(state, marks, wrong, settled, finite)


@pytest.mark.parametrize("loop", ["host", "device"])
def test_a_walk_that_takes_the_drafts_tokens_is_caught(evaluate, monkeypatch, tmp_path, loop):
    monkeypatch.setattr(EvaluateConfig, "decode", property(lambda _: DecodeConfig(loop=loop)))
    assert evaluate(*SAMPLED, "--audit", CLIPS, out=tmp_path / "sound")[1]["audit"]["equal"] == 2 * CLIPS
    if loop == "host":
        monkeypatch.setattr(round_host, "walk", broken_walk)
    else:
        monkeypatch.setattr(steps, "accept", broken_accept)
    status, result, errors = evaluate(*SAMPLED, "--audit", CLIPS)
    assert status == 1
    assert len(result["audit"]["differences"]) == 2 * CLIPS
    for found in result["audit"]["differences"]:
        assert found["stored"]["token"] == found["round"]["proposed"][0] != found["own"]["token"]
        assert found["round"]["origins"][0] == "draft"
        assert found["own"]["score"] > found["stored"]["score"]
    assert result["audit"]["differences"][0]["message"] in errors
    assert read_json(tmp_path / "evaluation.json")["clips"]["done"] == CLIPS


def test_rows_that_keep_no_ids_are_refused(evaluate, change, tmp_path):
    evaluate(*GREEDY)

    def before_rounds(rows):
        for row in rows.values():
            del row["rounds"], row["first_tokens"]

    change(before_rounds)
    before = (tmp_path / "evaluation.json").read_bytes()
    status, result, errors = evaluate(*GREEDY, "--audit", 2)
    assert status == 2 and result is None
    assert "2 of the 2 clips to audit keep no token ids" in errors
    assert (tmp_path / "evaluation.json").read_bytes() == before


def test_rounds_alone_are_enough(evaluate, change):
    """As they were stored before first tokens were."""
    evaluate(*GREEDY)
    change(lambda rows: [row.pop("first_tokens") for row in rows.values()])
    assert counts(evaluate(*GREEDY, "--audit", CLIPS)[1]["audit"])[2] == CLIPS


def no_rounds(row):
    row["rounds"] = None


def few_samples(row):
    row["rounds"] = row["rounds"] * 2


def odd_token(row):
    row["rounds"][0][0]["emitted"] = ["x"]


def odd_coc(row):
    row["coc"] = [3]


def nameless(row):
    del row["clip_id"]


@pytest.mark.parametrize("damage", [no_rounds, few_samples, odd_token, odd_coc, nameless])
def test_rows_of_another_shape_are_refused(evaluate, change, damage):
    evaluate(*GREEDY)
    change(lambda rows: [damage(row) for row in rows.values()])
    status, _, errors = evaluate(*GREEDY, "--audit", 1)
    assert status == 2
    assert "evaluation.json" in errors.splitlines()[-1]


def test_a_clip_that_is_gone_fails_the_audit(evaluate, monkeypatch, tmp_path):
    from alpamayo_dflash.clips.source import ClipSource

    evaluate(*GREEDY)
    gone, window = first_drawn(tmp_path), ClipSource.window

    def lost(self, clip_id, *rest):
        if clip_id == gone:
            raise OSError("the disk is away")
        return window(self, clip_id, *rest)

    monkeypatch.setattr(ClipSource, "window", lost)
    status, result, errors = evaluate(*GREEDY, "--audit", 2)
    assert status == 1
    assert counts(result["audit"]) == [1, 1, 1, 0, [], False]
    assert [each["clip_id"] for each in result["audit"]["failures"]] == [gone]
    assert "could not be decoded again: the disk is away" in errors


def test_an_interrupted_run_that_goes_on_is_audited(evaluate, monkeypatch):
    timed, done = Arms.timed, []

    def interrupted(self, arm, prompt):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(prompt.key)
        return timed(self, arm, prompt)

    monkeypatch.setattr(Arms, "timed", interrupted)
    assert evaluate(*SAMPLED, "--audit", CLIPS)[0] == 130
    monkeypatch.setattr(Arms, "timed", timed)
    status, result, _ = evaluate(*SAMPLED, "--audit", CLIPS)
    assert status == 0 and counts(result["audit"])[:3] == [CLIPS, 2 * CLIPS, 2 * CLIPS]


def test_force_is_not_audited():
    from pathlib import Path

    with pytest.raises(ValueError, match="audit is 3 with sentence_end force"):
        EvaluateConfig(Path("draft"), Path("world"), sentence_end="force", audit=3)


# In bfloat16 at different widths.


class Rounded:
    """A text model whose logits are off by up to so much, always the same for the same ones."""

    def __init__(self, model, off):
        self._model, self._off = model, off
        self.prompt, self.rows = model.prompt, model.rows

    def logits(self, normed):
        logits = self._model.logits(normed).float()
        return logits + self._off * torch.sin(1e4 * logits)


@pytest.fixture
def rounded(monkeypatch):
    """The speculative loop rounds otherwise."""
    make = Arms.__init__

    def made(self, target, draft, config):
        make(self, target, draft, config)
        verifier = self._decoders["dflash"].verifier
        verifier._model = Rounded(verifier._model, 0.1)

    monkeypatch.setattr(Arms, "__init__", made)


HALF = ["--dtype", "bfloat16", "--max-tokens", "24"]


def test_at_one_row_width_bfloat16_is_equal(evaluate):
    status, result, _ = evaluate(*SAMPLED, *HALF, "--row-width", 8, "--audit", CLIPS, target="flat")
    assert status == 0 and result["audit"]["equal"] == 2 * CLIPS


@pytest.mark.parametrize("more", [GREEDY, SAMPLED])
def test_bfloat16_on_this_processor(evaluate, more):
    """How many texts part, if any, is the processor's business."""
    status, result, _ = evaluate(*more, *HALF, "--audit", CLIPS, target="flat")
    audit = result["audit"]
    assert status == 0 and audit["passed"]
    assert audit["equal"] + audit["near_ties"] == audit["texts"] == CLIPS * (1 + (more == SAMPLED))


@pytest.mark.parametrize("sampling", [GREEDY[:2], SAMPLED[:2]])
def test_near_ties_are_counted_and_allowed_in_bfloat16_alone(evaluate, rounded, tmp_path, sampling):
    more = [*sampling, "--num-traj-samples", 3, *HALF, "--audit", CLIPS]
    status, result, _ = evaluate(*more, target="flat", out=tmp_path / "half")
    audit = result["audit"]
    assert status == 0 and audit["near_ties"] > 0, audit
    assert audit["equal"] + audit["near_ties"] == audit["texts"] == 3 * CLIPS
    status, result, _ = evaluate(*more, "--row-width", 4, target="flat", out=tmp_path / "width")
    assert status == 1 and result["audit"]["near_ties"] == 0
    assert result["audit"]["differences"]
    status, result, _ = evaluate(*more, "--dtype", "float32", target="flat", out=tmp_path / "full")
    assert status == 1 and result["audit"]["near_ties"] == 0


@pytest.mark.parametrize("damage", ["another token", "cut", "no token", "goes on"])
def test_what_follows_a_near_tie_is_audited_too(evaluate, rounded, change, tmp_path, damage):
    """After it the two loops' texts have nothing in common, so the stored one is run through the target."""
    more = [*SAMPLED[:2], "--num-traj-samples", 3, *HALF]
    evaluate(*more, target="flat")
    clean = evaluate(*more, "--audit", CLIPS, target="flat")[1]["audit"]
    parted = near_tie_places(tmp_path, evaluate, more)
    (clip, sample), position = min(parted.items(), key=lambda each: each[1])
    told = {}

    def changing(rows):
        rounds = rows[clip]["rounds"][sample]
        number = max(len(rounds) - 2, 1)
        before = 1 + sum(len(each["emitted"]) for each in rounds[:number])
        assert before > position
        told["at"] = before
        emitted = rounds[number]["emitted"]
        if damage == "another token":
            emitted[0] = (emitted[0] + 17) % 250
        elif damage == "no token":
            emitted[0] = 10**6
        elif damage == "cut":
            del rounds[number:]
        else:
            told["at"] = 1 + sum(len(each["emitted"]) for each in rounds)
            rounds[-1]["emitted"].append(5)

    change(changing)
    status, result, _ = evaluate(*more, "--audit", CLIPS, target="flat")
    assert status == 1
    [found] = result["audit"]["differences"]
    assert (found["clip_id"], found["sample"], found["position"]) == (clip, sample, told["at"])
    assert result["audit"]["near_ties"] == clean["near_ties"] - 1


def near_tie_places(folder, evaluate, more):
    """By clip and sample: where stored texts part from those of the same run in which the target is alone."""
    from alpamayo_dflash.evaluate import audit

    found, judge = {}, audit._Clip.judge

    def seen(self, sample):
        place = audit._first_difference(self._own[sample], self._stored[sample])
        if place is not None:
            found[self._row["clip_id"], sample] = place
        return judge(self, sample)

    audit._Clip.judge = seen
    try:
        evaluate(*more, "--audit", CLIPS, target="flat")
    finally:
        audit._Clip.judge = judge
    return found
