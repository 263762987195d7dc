"""Random checkpoints: the R1 release's sizes without its memory, and small ones to the last byte."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from alpamayo_dflash.common.artefacts import read_json, to_plain
from alpamayo_dflash.standins import untrained as random
from alpamayo_dflash.standins.blueprint import (
    QWEN_ADDED,
    SHAPES,
    RandomCheckpointConfig,
    TargetShape,
    alpamayo_config,
    preprocessor_config,
    tokenizer_config,
    vlm_config,
)
from alpamayo_dflash.standins.tiny import TINY
from alpamayo_dflash.target import checkpoint as load
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.config import AlpamayoConfig
from alpamayo_dflash.target.tokenizer import load_tokenizer

SMALL = RandomCheckpointConfig(size="small")
# The release's sizes as specification 1.3, 1.4 and 2 give them.
RELEASE = {
    "vlm.lm_head.weight": (155_697, 4096),
    "vlm.model.language_model.embed_tokens.weight": (155_697, 4096),
    "vlm.model.language_model.layers.35.self_attn.q_proj.weight": (4096, 4096),
    "vlm.model.language_model.layers.35.self_attn.k_proj.weight": (1024, 4096),
    "vlm.model.language_model.layers.35.self_attn.k_norm.weight": (128,),
    "vlm.model.language_model.layers.35.mlp.down_proj.weight": (4096, 12_288),
    "vlm.model.visual.patch_embed.proj.weight": (1152, 3, 2, 16, 16),
    "vlm.model.visual.pos_embed.weight": (2304, 1152),
    "vlm.model.visual.blocks.26.mlp.linear_fc1.weight": (4304, 1152),
    "vlm.model.visual.deepstack_merger_list.2.linear_fc2.weight": (4096, 4608),
    "expert.layers.35.self_attn.q_proj.weight": (2048, 2048),
    "expert.layers.35.mlp.up_proj.weight": (8256, 2048),
    "action_in_proj.encoder.trunk.0.weight": (512, 60),
    "action_in_proj.encoder.trunk.6.weight": (2048, 512),
    "action_in_proj.sinus.1.freqs": (1, 10),
    "action_out_proj.weight": (2, 2048),
    "action_space.curvature_std": (),
}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Alpamayo:
    folder = tmp_path_factory.mktemp("release") / "vlm"
    random.write_vlm(folder, SHAPES["r1-10b"], random.made_up_tokenizer(SHAPES["r1-10b"]))
    return random.meta_target(AlpamayoConfig.from_dict(alpamayo_config(SHAPES["r1-10b"])), folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "target"
    random.write_random_checkpoint(folder, SMALL)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_release_has_its_tensors(release: Alpamayo) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in release.state_dict().items()}
    assert len(shapes) == 1166
    assert {name: shapes[name] for name in RELEASE} == RELEASE
    assert all(parameter.is_meta for parameter in release.parameters())
    assert 22.0e9 < 2 * sum(map(math.prod, shapes.values())) < 22.3e9


def test_the_releases_shards_are_of_roughly_equal_size(release: Alpamayo) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in release.state_dict().items()}
    shards = random._split(shapes, 5)
    assert [shard.file for shard in shards] == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert sorted(name for shard in shards for name in shard.names) == sorted(shapes)
    sizes = [sum(random._size(shapes[name]) for name in shard.names) for shard in shards]
    assert max(sizes) < 1.2 * sum(sizes) / 5


def test_the_releases_tokenizer_has_its_ids(release: Alpamayo) -> None:
    tokenizer = release.tokenizer
    expected = {
        "<|endoftext|>": 151_643,
        "<|im_end|>": 151_645,
        "<|vision_start|>": 151_652,
        "<|image_pad|>": 151_655,
        "</think>": 151_668,
        "<i0>": 151_669,
        "<i3999>": 155_668,
        "<|traj_history_start|>": 155_674,
        "<|cot_start|>": 155_677,
        "<|cot_end|>": 155_678,
        "<|traj_future_start|>": 155_681,
        "<|answer_end|>": 155_696,
    }
    assert {token: tokenizer.token_to_id(token) for token in expected} == expected
    assert tokenizer.get_vocab_size() == release.vocab_size == 155_697
    assert release.config.history_token_start_idx == 154_669
    assert len(QWEN_ADDED) == 26
    assert vlm_config(SHAPES["r1-10b"])["text_config"]["vocab_size"] == 151_936


def test_the_releases_prompt_is_about_as_long_as_the_real_one(release: Alpamayo) -> None:
    from alpamayo_dflash.standins.untrained import noise_window

    prompt = release.prompt(noise_window(0))
    # The real tokenizer gives 3,006; the made-up one cuts the fixed words in its own way.
    assert len(prompt) == 3007
    assert prompt.rope_delta == -2592


def test_the_made_up_tokenizer_reads_and_writes_any_text(small: Path) -> None:
    tokenizer = random.made_up_tokenizer(SMALL.shape)
    for text in ("Keep distance to the lead vehicle.", "Grüße – 東京 123\n", "output the future trajectory."):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode(".").ids) == 1
    assert tokenizer.decode([SMALL.shape.pieces - 1]) == f" filler{SMALL.shape.pieces - 1}"


def test_a_small_one_loads_to_what_was_drawn(small: Path) -> None:
    target = Alpamayo.from_pretrained(small, dtype=torch.bfloat16)
    found, written = target.state_dict(), tensors(small)
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(found[name].to(torch.bfloat16), tensor), name
        if name not in load.OPTIONAL_TENSORS:
            drawn = random.random_tensor(name, tensor.shape, SMALL.seed, torch.device("cpu"))
            assert torch.equal(tensor, drawn), name


def test_the_target_without_files_is_the_one_that_is_loaded(small: Path, tmp_path: Path) -> None:
    loaded = Alpamayo.from_pretrained(small, dtype=torch.bfloat16)
    built = random.random_target(SMALL, tmp_path / "vlm")
    first, second = loaded.state_dict(), built.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for (name, one), (_, other) in zip(loaded.named_buffers(), built.named_buffers(), strict=True):
        assert torch.equal(one, other), name


def test_the_layout_is_the_releases(small: Path) -> None:
    index = read_json(small / "model.safetensors.index.json")
    files = sorted(path.name for path in small.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(small).values())
    for name, file in index["weight_map"].items():
        assert name in load_file(small / file)
    assert {path.name for path in (small / "vlm").iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    }


def test_weights_are_scaled_norms_are_one_and_constants_are_the_configs(small: Path) -> None:
    written = tensors(small)
    down = written["vlm.model.language_model.layers.0.mlp.down_proj.weight"].float()
    assert down.std().item() == pytest.approx(SMALL.shape.mlp**-0.5, rel=0.05)
    assert torch.all(written["expert.norm.weight"] == 1)
    assert torch.all(written["vlm.model.visual.blocks.0.norm1.bias"] == 0)
    # Specification 1.5's values in bfloat16.
    assert written["action_space.accel_std"].item() == 0.6796875
    freqs = [1, 1.671875, 2.78125, 4.65625, 7.75, 12.9375, 21.5, 36, 60, 100]
    assert written["action_in_proj.sinus.0.freqs"].tolist() == [freqs]


def test_a_seed_gives_one_checkpoint_and_another_seed_another(small: Path, tmp_path: Path) -> None:
    random.write_random_checkpoint(tmp_path / "again", SMALL)
    random.write_random_checkpoint(tmp_path / "other", dataclasses.replace(SMALL, seed=1))
    first, again, other = (tensors(each) for each in (small, tmp_path / "again", tmp_path / "other"))
    name = "vlm.lm_head.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    twin = "vlm.model.language_model.embed_tokens.weight"
    assert not torch.equal(first[name], first[twin])


def test_a_finished_one_is_left_alone_and_another_is_refused(small: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    again = random.write_random_checkpoint(small, SMALL)
    assert again["nothing_to_do"] is True
    assert again["tensors"] == len(tensors(small))
    with pytest.raises(ValueError, match="holds another checkpoint"):
        random.write_random_checkpoint(small, dataclasses.replace(SMALL, seed=3))
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


def test_an_interrupted_write_leaves_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    draw = random.random_tensor

    def fail(name: str, *rest: object) -> Tensor:
        drawn.append(name)
        if len(drawn) > 80:
            raise OSError("disk full")
        return draw(name, *rest)

    monkeypatch.setattr(random, "random_tensor", fail)
    with pytest.raises(OSError, match="disk full"):
        random.write_random_checkpoint(tmp_path, SMALL)
    assert not (tmp_path / "config.json").exists()
    assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(random, "random_tensor", draw)
    random.write_random_checkpoint(tmp_path, SMALL)
    assert Alpamayo.from_pretrained(tmp_path).num_layers == SMALL.shape.layers


@pytest.mark.parametrize("limit", [64, 1000, 4096, 100_000])
def test_loading_in_pieces_gives_the_same_weights(
    small: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(load, "_MAPPED_BYTES", limit)
    for shard in sorted(small.glob("*.safetensors")):
        groups = load._groups(shard)
        sizes = [sum(2 * (stop - start) for _, start, stop in group) for group in groups]
        assert max(sizes) <= limit
        assert sum(sizes) == sum(tensor.nbytes for tensor in load_file(shard).values())
    if limit >= 4096:  # every piece opens a file
        found = Alpamayo.from_pretrained(small, dtype=torch.bfloat16).state_dict()
        for name, tensor in tensors(small).items():
            assert torch.equal(found[name].to(torch.bfloat16), tensor), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "r1"}, "size is 'r1'"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"shards": 0}, "shards is 0"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomCheckpointConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 64}, "mrope_section"),
        ({"heads": 30}, "heads is 30"),
        ({"deepstack": (8, 16, 27)}, "vision_depth 27"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TargetShape(**changes)


def test_too_many_shards_and_too_few_pieces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shards is 500"):
        random.write_random_checkpoint(tmp_path, dataclasses.replace(SMALL, shards=500))
    with pytest.raises(ValueError, match="pieces is 260"):
        random.made_up_tokenizer(dataclasses.replace(SMALL.shape, pieces=260))


def test_config_json_is_plain_json() -> None:
    raw = alpamayo_config(SHAPES["r1-10b"])
    assert AlpamayoConfig.from_dict(json.loads(json.dumps(raw))).vocab_size == 155_697
    assert raw["traj_token_ids"] == {
        "history": 155_684,
        "future": 155_685,
        "history_start": 155_674,
        "future_start": 155_681,
        "history_end": 155_676,
        "future_end": 155_683,
    }


def test_the_checkpoint_that_ships_is_tinys_blueprint() -> None:
    written = {
        "config.json": alpamayo_config(TINY),
        "vlm/config.json": vlm_config(TINY),
        "vlm/preprocessor_config.json": preprocessor_config(TINY),
        "vlm/tokenizer_config.json": tokenizer_config(TINY),
    }
    assert {name: read_json(load.SHIPPED / name) for name in written} == to_plain(written)
    tokenizer = load_tokenizer(load.SHIPPED / "vlm", AlpamayoConfig.from_dict(alpamayo_config(TINY)))
    assert tokenizer.token_to_id("<i0>") == TINY.traj_start
