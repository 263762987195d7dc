"""Layer scores and distillation data of a random tiny target on a few clips of the world, end to end."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional

from alpamayo_dflash.cli.distill import run as run_distill
from alpamayo_dflash.clips.source import ClipError, ClipSource
from alpamayo_dflash.decode.config import DecodeConfig, Sampling
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.rollouts import Rollouts, teacher_forced
from alpamayo_dflash.distill import run as distill_run
from alpamayo_dflash.distill.config import DistillConfig
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.distill.writer import RankWriter
from alpamayo_dflash.draft.formats import draft_identity
from alpamayo_dflash.layers import run as layers_run
from alpamayo_dflash.layers.choice import read_choice
from alpamayo_dflash.layers.config import LayersConfig
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.run import run as write_world
from tests.helpers.random_target import random_draft, random_target

LAYERS, MAX_TOKENS, CONTEXT = 4, 12, 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(WorldConfig(folder, num_chunks=2, clips_per_chunk=2, seed=5, workers=1))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    random_target(folder / "made", layers=LAYERS).save_pretrained(folder / "checkpoint")
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    config |= {"min_pixels": 4096, "max_pixels": 8192}
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config))
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def inputs(world, checkpoint):
    return {"model_path": str(checkpoint), "cache_dir": world}


@pytest.fixture(scope="module")
def target(checkpoint):
    return Alpamayo.from_pretrained(checkpoint).requires_grad_(False)


def layers_config(inputs, out, **values):
    base = {"num_samples": 4, "num_target_layers": 2, "max_tokens": MAX_TOKENS}
    return LayersConfig(**inputs, output_dir=out, **{**base, **values})


def distill_config(inputs, out, **values):
    base = {
        "target_layers": "0,2",
        "context_len": CONTEXT,
        "top_k_logits": 7,
        "max_tokens": MAX_TOKENS,
        "shard_size": 3,
        "temperature": 1.0,
    }
    values = {key: value for key, value in {**base, **values}.items() if value is not None}
    return DistillConfig(**inputs, output_dir=out, **values)


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    return out, distill_run.run(distill_config(inputs, out))


def full_forward(target, prompt, token_ids):
    """transformers' own forward over prompt and response: each layer's output, and logits; no cache."""
    outputs = {}
    hooks = [
        layer.register_forward_hook(
            lambda _module, _inputs, output, index=index: outputs.__setitem__(
                index, output[0] if isinstance(output, tuple) else output
            )
        )
        for index, layer in enumerate(target.text_layers)
    ]
    steps = torch.arange(len(token_ids)) + len(prompt) + prompt.rope_delta
    positions = torch.cat((prompt.position_ids, steps.expand(3, -1)), dim=1)
    ids = torch.cat((prompt.input_ids, torch.tensor(token_ids)))
    try:
        with torch.no_grad():
            answer = target.vlm(
                input_ids=ids[None],
                attention_mask=torch.ones_like(ids)[None],
                pixel_values=prompt.pixel_values,
                image_grid_thw=prompt.image_grid_thw,
                position_ids=positions[:, None],
                use_cache=False,
            )
    finally:
        for hook in hooks:
            hook.remove()
    states = torch.stack([outputs[index].view(len(ids), -1) for index in range(target.num_layers)])
    return states, answer.logits[0].float()


def equal_sets(one, other):
    def key(sample):
        return sample.clip_id, sample.sample

    pairs = list(zip(sorted(one.samples, key=key), sorted(other.samples, key=key), strict=True))
    for mine, theirs in pairs:
        assert (mine.clip_id, mine.sample, mine.token_ids) == (
            theirs.clip_id,
            theirs.sample,
            theirs.token_ids,
        )
        found, wanted = one.tensors(mine), other.tensors(theirs)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# Layers.


def naive_scores(target, source, clip_ids):
    """Both scores from transformers' forward, token by token."""
    decoder = SpeculativeDecoder(target)
    states, losses = [], {layer: [] for layer in range(target.num_layers)}
    for clip_id in clip_ids:
        prompt = target.prompt(source.window(clip_id))
        ids = decoder.generate(
            prompt, temperature=0, max_new_tokens=MAX_TOKENS, trajectories=False
        ).token_ids[0]
        outputs, _ = full_forward(target, prompt, ids)
        states.append(outputs[:, len(prompt) :])
        for layer, (position, token) in itertools.product(losses, enumerate(ids)):
            hidden = outputs[layer, len(prompt) + position - 1]
            logits = target.logits(target.final_norm(hidden))
            logits[list(target.traj_ids)] = -torch.inf
            losses[layer].append(functional.cross_entropy(logits[None], torch.tensor([token])).item())
    mean = torch.cat(states, dim=1).mean(1)
    cosine = functional.cosine_similarity(mean, mean[-1:], dim=-1).tolist()
    return cosine, {str(layer): float(np.mean(values)) for layer, values in losses.items()}


@pytest.fixture(scope="module")
def layers_alone(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("layers")
    return out, layers_run.run(layers_config(inputs, out, plot=True))


def test_layer_scores_equal_the_naive_ones(world, target, layers_alone):
    out, answer = layers_alone
    content = json.loads((out / "layers.json").read_text())
    source = ClipSource(world)
    cosine, losses = naive_scores(target, source, source.clip_ids())
    assert content["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert content["early_exit_ce"] == pytest.approx(losses, abs=1e-4)
    assert content["clips"] == answer["clips"] == {"attempted": 4, "done": 4, "failed": 0}


def test_the_choice_is_an_artefact(layers_alone):
    out, answer = layers_alone
    taps = read_choice(out)
    assert list(taps) == answer["target_layers"]
    assert len(taps) == len(set(taps)) == 2
    assert max(taps) < LAYERS - 1
    assert (out / "layers.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(answer)


def test_ranks_pooled_equal_one_process(inputs, layers_alone, tmp_path, monkeypatch):
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        answer = layers_run.run(layers_config(inputs, tmp_path, num_samples=2))
        assert answer["rank"] == rank
        assert not (tmp_path / "layers.json").exists()
    layers_run.run(LayersConfig(output_dir=tmp_path, aggregate=True, num_target_layers=2))
    pooled, alone = (json.loads((out / "layers.json").read_text()) for out in (tmp_path, layers_alone[0]))
    assert pooled["tokens"] == alone["tokens"]
    assert pooled["cosine"] == pytest.approx(alone["cosine"], rel=1e-9)
    assert pooled["early_exit_ce"] == pytest.approx(alone["early_exit_ce"], rel=1e-9)
    assert pooled["target_layers"] == alone["target_layers"]


def test_scoring_again_has_nothing_to_do_and_refuses_other_settings(inputs, layers_alone):
    out, first = layers_alone
    again = layers_run.run(layers_config(inputs, out))
    assert (first["nothing_to_do"], again["nothing_to_do"]) == (False, True)
    assert again["target_layers"] == first["target_layers"]
    assert len(layers_run.run(layers_config(inputs, out, num_target_layers=3))["target_layers"]) == 3
    with pytest.raises(ValueError, match="seed 0, not 1"):
        layers_run.run(layers_config(inputs, out, seed=1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": "1,4"}, "layer 4 is out of range: the target has layers 0 to 3"),
        ({"num_target_layers": 4}, "num_target_layers is 4"),
        ({"chunks": "9"}, "9"),
    ],
)
def test_bad_layer_options_leave_nothing(inputs, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        layers_run.run(layers_config(inputs, tmp_path, **values))
    assert list(tmp_path.iterdir()) == []


# Distillation data.


def test_data_is_what_the_target_writes(world, target, written):
    out, answer = written
    data, source, decoder = DistillData(out), ClipSource(world), SpeculativeDecoder(target)
    assert answer["clips"] == {"attempted": 4, "done": 4, "failed": 0}
    assert answer["samples"] == len(data.samples) == 12
    assert sorted({sample.clip_id for sample in data.samples}) == source.clip_ids()
    for clip_id in source.clip_ids():
        samples = [sample for sample in data.samples if sample.clip_id == clip_id]
        assert [sample.sample for sample in samples] == [0, 1, 2]
        assert [sample.temperature for sample in samples] == [0.0, 1.0, 1.0]
        options = {"max_new_tokens": MAX_TOKENS, "trajectories": False, "seed": 0}
        prefilled = decoder.prefill(source.window(clip_id))
        greedy = decoder.generate(prefilled, temperature=0.0, **options)
        sampled = decoder.generate(prefilled, temperature=1.0, top_p=0.98, num_traj_samples=2, **options)
        assert [list(sample.token_ids) for sample in samples] == greedy.token_ids + sampled.token_ids
        assert [sample.text for sample in samples] == greedy.coc + sampled.coc
        assert [sample.stop for sample in samples] == [str(stop) for stop in greedy.stops + sampled.stops]
        assert {sample.chunk for sample in samples} == {source.chunk_of(clip_id)}
    texts = [sample.token_ids for sample in data.samples if sample.sample]
    assert len(set(texts)) == len(texts)  # sampled at a high temperature: no noise is used twice


def test_stored_states_equal_a_fresh_full_forward(world, target, written):
    data, source = DistillData(written[0]), ClipSource(world)
    for sample in data.samples[:6]:
        prompt = target.prompt(source.window(sample.clip_id))
        states, logits = full_forward(target, prompt, sample.token_ids)
        tensors, start = data.tensors(sample), len(prompt)
        wanted = states[[0, 2]].transpose(0, 1)
        assert torch.allclose(tensors["states"], wanted[start:], atol=2e-5)
        assert torch.allclose(tensors["prompt_states"], wanted[start - CONTEXT : start], atol=2e-5)
        predicting = logits[start - 1 : -1]
        predicting[:, list(target.traj_ids)] = -torch.inf
        assert torch.allclose(tensors["topk_logits"], predicting.topk(7).values, atol=2e-4)
        assert torch.allclose(
            tensors["topk_logits"], predicting.gather(1, tensors["topk_ids"].long()), atol=2e-4
        )
        if sample.sample == 0:
            assert tensors["topk_ids"][:, 0].tolist() == list(sample.token_ids)


def test_states_never_see_what_comes_behind_them(world, target):
    """The context of an anchor is strictly before it: tokens from the anchor on change nothing there."""
    source = ClipSource(world)
    rollouts = Rollouts(target, taps=range(LAYERS), context_len=CONTEXT, max_tokens=MAX_TOKENS)
    rollouts.read(source.window(source.clip_ids()[0]))
    ids = list(range(20, 30))
    (one,) = rollouts.score([ids])
    for anchor in (0, 4, 9):
        (other,) = rollouts.score([ids[:anchor] + [50 + token for token in ids[anchor:]]])
        assert torch.equal(other.prompt_states, one.prompt_states)
        assert torch.equal(other.states[:, :anchor], one.states[:, :anchor])
        assert torch.equal(other.logits[: anchor + 1], one.logits[: anchor + 1])
        assert not torch.equal(other.states[:, anchor], one.states[:, anchor])


def test_responses_scored_together_equal_those_scored_alone(world, target):
    source = ClipSource(world)
    window = source.window(source.clip_ids()[0])
    rollouts = Rollouts(target, taps=[1, 3], context_len=CONTEXT, max_tokens=MAX_TOKENS)
    rollouts.read(window)
    rollouts.write(Sampling(1.0, 0.98), seed=3, num_samples=2)  # what was written before leaves no trace
    responses = [[5, 6, 7, 8], [5, 6, 9], [4], [5, 6, 7, 8]]
    for response, together in zip(responses, rollouts.score(responses), strict=True):
        alone = teacher_forced(target, target.prompt(window), response, layers=[1, 3], prompt_states=CONTEXT)
        assert torch.allclose(together.states, alone.states, atol=1e-5)
        assert torch.allclose(together.logits, alone.logits, atol=1e-5)
        assert torch.equal(together.prompt_states, alone.prompt_states)


ROLLED = {
    "host": ({"loop": "host"}, False),
    "device": ({"loop": "device"}, False),
    "host, draft": ({"loop": "host"}, True),
    "device, draft": ({"loop": "device"}, True),
    "one row width": ({"loop": "host", "row_width": 4}, False),
    "one row width, draft": ({"loop": "host", "row_width": 4}, True),
    "one row width, device, draft": ({"loop": "device", "row_width": 4}, True),
}


@pytest.fixture(scope="module")
def rolled(world, target):
    """Responses and what is kept of them, of a window that was read after another, by each form."""
    source = ClipSource(world)
    windows = [source.window(clip_id) for clip_id in source.clip_ids()[:2]]
    draft = random_draft(target, target_layer_ids=(0, 3))
    found = {}
    for name, (options, drafted) in ROLLED.items():
        rollouts = Rollouts(
            target,
            taps=[1, 3],
            context_len=CONTEXT,
            max_tokens=MAX_TOKENS,
            draft=draft if drafted else None,
            config=DecodeConfig(**options),
        )
        for window in windows:
            rollouts.read(window)
            greedy = rollouts.write(Sampling(0.0), seed=4)
            sampled = rollouts.write(Sampling(1.0, 0.98), seed=4, num_samples=2)
        texts = rollouts.write(Sampling(1.0, 0.98), seed=4, num_samples=3, greedy_first=True)
        assert texts == [*greedy, *sampled]
        found[name] = texts, rollouts.score([text.token_ids for text in texts]), rollouts
    return found


@pytest.mark.parametrize("name", list(ROLLED)[1:])
def test_every_form_rolls_out_the_same(rolled, name):
    """Whoever walks, and whatever proposes: the same responses; at one width of rows the same numbers."""
    (texts, wanted, _), (found, forced, _) = rolled["host"], rolled[name]
    if "row_width" in ROLLED[name][0]:
        wanted = rolled["one row width"][1]
    assert found == texts
    for one, other in zip(forced, wanted, strict=True):
        assert torch.equal(one.logits, other.logits)
        assert torch.equal(one.states, other.states)
        assert torch.equal(one.prompt_states, other.prompt_states)


def test_a_drafts_taps_leave_what_is_recorded_alone(rolled):
    """The draft reads layers and positions of its own beside those that are recorded."""
    caches = [rolled[name][2]._verifier.cache for name in ("host", "host, draft")]
    assert [cache.taps.shape[1] for cache in caches] == [0, 2 * 32]
    assert [cache.recorded.shape[1] for cache in caches] == [2 * 32, 2 * 32]
    assert caches[1].context_len != caches[1].recorded_context == CONTEXT
    assert rolled["host"][2].passes == rolled["host"][2].emitted > 0
    assert rolled["host, draft"][2].emitted == rolled["host"][2].emitted


def test_rollouts_are_the_targets_own(target):
    with pytest.raises(ValueError, match="sentence_end is 'force'; rollouts are the target's own texts"):
        Rollouts(target, taps=[1], context_len=1, max_tokens=4, config=DecodeConfig(sentence_end="force"))


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("where", ["between shards", "inside a shard"])
def test_interrupted_and_continued_equals_uninterrupted(inputs, written, tmp_path, monkeypatch, where):
    config = distill_config(inputs, tmp_path)
    owner, name = (RankWriter, "write") if where == "between shards" else (distill_run, "respond")
    original, calls = getattr(owner, name), itertools.count()

    def failing(*args):
        if next(calls) == 2:
            raise KilledError
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(KilledError):
            distill_run.run(config)
    assert len(DistillData(tmp_path, allow_incomplete=True).samples) == 6
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert len(kept) == 2
    answer = distill_run.run(config)
    assert answer["clips"] == {"attempted": 4, "done": 4, "failed": 0}
    assert all((tmp_path / "shards" / shard).stat().st_mtime_ns == stamp for shard, stamp in kept.items())
    equal_sets(DistillData(tmp_path), DistillData(written[0]))
    hashes = [
        [shard["sha256"] for shard in DistillData(out).manifest["shards"]] for out in (tmp_path, written[0])
    ]
    assert hashes[0] == hashes[1]


def test_a_shard_that_cannot_be_written_ends_the_run_before_the_next(inputs, written, tmp_path, monkeypatch):
    """The writing thread's error reaches the command, no later shard is written, and the set goes on."""
    original = RankWriter.write
    tried = []

    def full(self, results):
        tried.append(results[0].clip_id)
        if len(tried) == 2:
            raise OSError(28, "No space left on device")
        original(self, results)

    config = distill_config(inputs, tmp_path, num_workers=3)
    with monkeypatch.context() as patch:
        patch.setattr(RankWriter, "write", full)
        with pytest.raises(OSError, match="No space left"):
            distill_run.run(config)
    assert len(tried) == 2
    assert len(DistillData(tmp_path, allow_incomplete=True).samples) == 3
    distill_run.run(config)
    assert shards(tmp_path) == shards(written[0])


def test_complete_data_has_nothing_to_do_and_refuses_other_settings(inputs, written):
    out, first = written
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = distill_run.run(distill_config(inputs, out))
    assert (first["nothing_to_do"], again["nothing_to_do"]) == (False, True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    for values, message in (
        ({"target_layers": "1,2"}, "taps"),
        ({"context_len": 6}, "context_len"),
        ({"chunks": "0"}, "clips"),
        ({"temperature": 0.5}, "temperature"),
    ):
        with pytest.raises(ValueError, match=f"was made with {message} "):
            distill_run.run(distill_config(inputs, out, **values))


@pytest.fixture(scope="module")
def draft_folder(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft")
    random_draft(target, target_layer_ids=(0, 2), context_len=7).save_pretrained(folder)
    return folder


def shards(out):
    """All of a manifest's entries of shards: what they hold, byte for byte."""
    return DistillData(out).manifest["shards"]


@pytest.mark.parametrize("row_width", [None, 6])
def test_a_draft_changes_no_byte_of_the_data(inputs, written, draft_folder, tmp_path, row_width):
    config = distill_config(inputs, tmp_path / "drafted", draft_path=draft_folder, row_width=row_width)
    answer = run_distill(config)
    assert answer["acceptance_length"] > 1
    alone = written[0]
    if row_width is not None:
        alone = tmp_path / "alone"
        assert run_distill(distill_config(inputs, alone, row_width=row_width))["acceptance_length"] == 1
    assert shards(config.output_dir) == shards(alone)
    assert DistillData(config.output_dir).samples == DistillData(alone).samples
    settings, plain = (DistillData(out).manifest["settings"] for out in (config.output_dir, alone))
    assert settings == plain | {"draft": draft_identity(draft_folder).hash}
    assert settings.get("row_width") == row_width
    made = DistillData(config.output_dir).manifest["provenance"]["0"]
    assert made["parents"]["draft"] == settings["draft"]
    assert made["config"]["draft_path"] == str(draft_folder)
    assert made["weights"].startswith("plain: ")


def test_a_set_says_who_wrote_it(inputs, target, written, draft_folder, tmp_path):
    """Begun without a draft, it does not go on with one, nor with another one; a set of before goes on."""
    assert not {"draft", "row_width"} & set(DistillData(written[0]).manifest["settings"])
    with pytest.raises(ValueError, match=r"was made with draft None, not '[0-9a-f]{64}'; use the same"):
        run_distill(distill_config(inputs, written[0], draft_path=draft_folder))
    with pytest.raises(ValueError, match="was made with row_width None, not 4; use the same"):
        run_distill(distill_config(inputs, written[0], row_width=4))
    out = tmp_path / "out"
    run_distill(distill_config(inputs, out, draft_path=draft_folder, num_chunks=1))
    random_draft(target, target_layer_ids=(1, 2)).save_pretrained(tmp_path / "other")
    for path, other in ((None, "None"), (tmp_path / "other", "'[0-9a-f]{64}'")):
        with pytest.raises(ValueError, match=f"was made with draft '[0-9a-f]{{64}}', not {other}; use"):
            run_distill(distill_config(inputs, out, draft_path=path, num_chunks=1))


def test_the_stage_takes_the_draft_that_is_named(inputs, target, draft_folder, tmp_path):
    with pytest.raises(ValueError, match="and no draft was handed over"):
        distill_run.run(distill_config(inputs, tmp_path, draft_path=draft_folder))
    random_draft(target, num_target_layers=7, target_layer_ids=(1, 4)).save_pretrained(tmp_path / "draft")
    with pytest.raises(ValueError, match="of a target with 7 layers; this target has 4"):
        run_distill(distill_config(inputs, tmp_path / "out", draft_path=tmp_path / "draft"))
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "draft")
    with pytest.raises(ValueError, match="nowhere"):
        run_distill(distill_config(inputs, tmp_path, draft_path=tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_ranks_split_the_clips(inputs, written, tmp_path):
    for rank in range(3):
        answer = distill_run.run(distill_config(inputs, tmp_path, rank=rank, world_size=3))
        assert answer["clips"]["done"] == (2 if rank == 0 else 1)
    equal_sets(DistillData(tmp_path), DistillData(written[0]))
    # more ranks than clips: the last has nothing to write, and says so
    more = tmp_path / "more"
    for rank in range(5):
        distill_run.run(distill_config(inputs, more, rank=rank, world_size=5, samples_per_clip=1))
    assert len(DistillData(more).samples) == 4


def test_failed_clips_are_recorded_and_counted(inputs, tmp_path, monkeypatch):
    broken = ClipSource(inputs["cache_dir"]).clip_ids()[1]
    original = ClipSource.window

    def window(self, clip_id, *args):
        if clip_id == broken:
            raise ClipError(clip_id, "no such video")
        return original(self, clip_id, *args)

    monkeypatch.setattr(ClipSource, "window", window)
    answer = distill_run.run(distill_config(inputs, tmp_path / "on"))
    assert answer["clips"] == {"attempted": 4, "done": 3, "failed": 1}
    data = DistillData(tmp_path / "on")
    assert len(data.samples) == 9
    failures = json.loads((tmp_path / "on" / "failures-rank0.json").read_text())
    assert failures["failed"] == 1
    assert failures["failures"][0]["clip_id"] == broken
    assert "no such video" in failures["failures"][0]["reason"]
    with pytest.raises(ValueError, match="no such video"):
        distill_run.run(distill_config(inputs, tmp_path / "stop", keep_going=False))
    scored = layers_run.run(layers_config(inputs, tmp_path / "layers"))
    assert scored["clips"] == {"attempted": 4, "done": 3, "failed": 1}


def test_too_little_disk_leaves_nothing(inputs, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="are free"):
        distill_run.run(distill_config(inputs, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_layers_file_and_other_forms(inputs, target, written, layers_alone, tmp_path):
    """The choice as an artefact, one tap, bfloat16 storage, all logits with trajectory tokens, one chunk."""
    answer = distill_run.run(
        distill_config(
            inputs,
            tmp_path / "choice",
            target_layers=None,
            layers_file=layers_alone[0],
            samples_per_clip=1,
            num_chunks=1,
        )
    )
    assert tuple(answer["target_layers"]) == read_choice(layers_alone[0])
    assert {sample.chunk for sample in DistillData(tmp_path / "choice").samples} == {0}
    distill_run.run(
        distill_config(
            inputs,
            tmp_path / "forms",
            target_layers="2",
            dtype="bfloat16",
            full_vocab=True,
            top_k_logits=100_000,
        )
    )
    data, usual = DistillData(tmp_path / "forms"), DistillData(written[0])
    assert data.manifest["top_k"] == target.vocab_size
    for sample, like in zip(data.samples, usual.samples, strict=True):
        tensors, wanted = data.tensors(sample), usual.tensors(like)
        assert sample.token_ids == like.token_ids
        assert torch.equal(tensors["states"], wanted["states"][:, 1:].bfloat16())
        assert torch.equal(tensors["prompt_states"], wanted["prompt_states"][:, 1:].bfloat16())
        assert torch.equal(
            tensors["topk_ids"].sort().values,
            torch.arange(target.vocab_size).expand(len(sample.token_ids), -1),
        )
        assert not set(wanted["topk_ids"].flatten().tolist()) & set(target.traj_ids)


@pytest.mark.parametrize("layers", ["4", "1,2,3,7"])
def test_taps_out_of_range_leave_nothing(inputs, tmp_path, layers):
    with pytest.raises(ValueError, match=r"layer [47] is out of range: the target has layers 0 to 3"):
        distill_run.run(distill_config(inputs, tmp_path / "out", target_layers=layers))
    assert not (tmp_path / "out").exists()
