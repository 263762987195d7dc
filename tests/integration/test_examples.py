"""Every example is run, as a user would run it, on the tiny target; `examples/README.md` names them all."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from alpamayo_dflash import ClipSource
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.run import run as write_world

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))


def run(name, capsys, *arguments):
    """An example's globals, and the lines that it prints."""
    before = sys.argv
    sys.argv = [str(FOLDER / f"{name}.py"), *map(str, arguments)]
    capsys.readouterr()
    try:
        found = runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before
    return found, capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "clips"
    write_world(WorldConfig(folder, num_chunks=2, clips_per_chunk=4, workers=1))
    return folder


@pytest.fixture(scope="module")
def trained(clips):
    """What `train_draft.py` leaves, its globals and its lines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(FOLDER / "train_draft.py"), "tiny", str(clips), str(clips.parent)])
        found = runpy.run_path(sys.argv[0], run_name="__main__")
    return clips.parent / "train" / "draft", found


def train_draft(trained, **_):
    draft, found = trained
    assert (draft / "config.json").is_file()
    evaluations = found["trained"]["evaluations"]
    assert found["trained"]["acceptance_length"] > evaluations[0]["acceptance_length"]
    assert found["result"].coc[0] and found["result"].lossless


def decode_clip(capsys, clips, trained):
    found, lines = run("decode_clip", capsys, clips, trained[0])
    plain, drafted = found["plain"], found["drafted"]
    assert plain.token_ids == drafted.token_ids
    assert drafted.passes < plain.passes
    assert found["metres"] < 1e-3
    assert lines[0] == plain.coc[0]


def own_cameras(capsys, **_):
    found, lines = run("own_cameras", capsys)
    xyz, rot = found["history_xyz"], found["history_rot"]
    assert xyz[-1] == pytest.approx([0, 0, 0]) and rot[-1] == pytest.approx(rot[-1].T, abs=1e-6)
    assert xyz[0, 0] < -11 and abs(xyz[0, 1]) < 1.5  # it came from behind, at 8 m/s for 1.5 s
    assert len(lines) == 2 and found["result"].pred_xyz.isfinite().all()


def own_proposer(capsys, clips, **_):
    ids = ClipSource(clips).clip_ids()
    found, lines = run("own_proposer", capsys, clips, *ids[:2], ids[0])
    assert len(lines) == 3 and lines[0].rpartition(" (")[0] == lines[2].rpartition(" (")[0]
    assert found["result"].acceptance_length > 2  # of a clip that it has seen


def accelerate_qwen(capsys, trained, **_):
    found, lines = run("accelerate_qwen", capsys, trained[0])
    assert lines[0] == found["ours"].coc[0]
    assert found["ours"].passes <= len(found["tokens"])


def exactness(capsys, clips, trained):
    found, lines = run("exactness", capsys, clips, trained[0], 1000)
    rows = {row["rule"]: row for row in found["rules"]}
    assert len(lines) == 1 + len(rows) == 5
    for name in ("shared noise", "chain rejection", "sample and match"):
        assert rows[name]["p_value"] > 1e-4, name
        assert rows[name]["tokens_a_pass"] > 1.05, name
    assert rows["typical acceptance"]["p_value"] < 1e-6
    # Rejection keeps at least what matching does: Σ min(p, q) ≥ Σ p·q.
    assert rows["chain rejection"]["tokens_a_pass"] > rows["sample and match"]["tokens_a_pass"]


CHECKS = (train_draft, decode_clip, own_cameras, own_proposer, accelerate_qwen, exactness)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_example(check, capsys, clips, trained):
    check(capsys=capsys, clips=clips, trained=trained)


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"own_cameras"}))
def test_an_example_without_its_arguments_names_them(name, capsys):
    with pytest.raises(SystemExit) as ended:
        run(name, capsys)
    told = capsys.readouterr().err
    wanted = re.search(rf"python examples/{name}.py (\w+)", (FOLDER / f"{name}.py").read_text())
    assert ended.value.code == 2
    assert f"{name}.py: error: the following arguments are required: {wanted[1].lower()}" in told


def test_every_example_is_run_and_named():
    assert sorted(check.__name__ for check in CHECKS) == EXAMPLES
    named = re.findall(r"\]\((\w+)\.py\)", (FOLDER / "README.md").read_text())
    assert sorted(named) == EXAMPLES
