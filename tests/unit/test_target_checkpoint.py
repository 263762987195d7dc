"""Loading and saving: what comes back, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alpamayo_dflash.common.artefacts import folder_hash
from alpamayo_dflash.target import checkpoint as load
from alpamayo_dflash.target.alpamayo import Alpamayo, open_target
from alpamayo_dflash.target.config import AlpamayoConfig
from alpamayo_dflash.target.expert import log_spaced
from tests.helpers import random_target as factory

NAME = "vlm.model.language_model.layers.1.self_attn.k_proj.weight"
THETA = {"rope_theta": 1e6}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    factory.odd_target(folder).save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil: one file of weights."""
    target = Alpamayo.from_pretrained(saved)
    target.save_pretrained(tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> list[str]:
    """Split the weights in two files with an index; their names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return list(halves)


def edit_config(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(first: Alpamayo, second: Alpamayo) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_round_trip_keeps_every_tensor(tmp_path: Path):
    built = factory.odd_target(tmp_path)
    built.save_pretrained(tmp_path / "out")
    loaded = Alpamayo.from_pretrained(tmp_path / "out")
    same(built, loaded)
    assert loaded.config == AlpamayoConfig.from_dict(factory.odd_config() | {"model_dtype": "float32"})
    loaded.save_pretrained(tmp_path / "again")
    first, second = tmp_path / "out", tmp_path / "again"
    for file in ("model.safetensors", "config.json", "vlm/tokenizer.json", "vlm/config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_a_loaded_target_computes_what_the_built_one_does(tmp_path: Path):
    built = factory.odd_target(tmp_path)
    built.save_pretrained(tmp_path / "out")
    loaded = Alpamayo.from_pretrained(tmp_path / "out")
    inputs = built.transformers_inputs(built.prompt(factory.odd_window()))
    with torch.no_grad():
        # Through transformers' own forward, which also reads the buffers that no file holds.
        assert torch.equal(built.vlm(**inputs).logits, loaded.vlm(**inputs).logits)


def test_saving_over_a_checkpoint_that_is_in_use(copy: Path):
    target = Alpamayo.from_pretrained(copy)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with torch.no_grad():
        target.head.add_(1.0)
    target.save_pretrained(copy)
    after = Alpamayo.from_pretrained(copy).state_dict()
    assert torch.equal(after["vlm.lm_head.weight"], before["vlm.lm_head.weight"] + 1.0)
    assert torch.equal(after[NAME], before[NAME])


def test_a_failed_save_leaves_the_old_files(copy: Path, monkeypatch: pytest.MonkeyPatch):
    target = Alpamayo.from_pretrained(copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    def fail(tensors: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(load, "save_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        target.save_pretrained(copy)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_shards_load_like_one_file(saved: Path, copy: Path):
    shard(copy)
    same(Alpamayo.from_pretrained(saved), Alpamayo.from_pretrained(copy))


def test_projections_of_one_input_share_storage(saved: Path):
    target = Alpamayo.from_pretrained(saved)
    for layer in [*target.text_layers, *target.expert.layers]:
        q, k, v = (layer.self_attn.get_submodule(f"{x}_proj").weight for x in "qkv")
        joined = q.as_strided((len(q) + len(k) + len(v), q.shape[1]), q.stride())
        assert torch.equal(joined, torch.cat((q, k, v)))
    rows = target.head.untyped_storage().nbytes() // target.head[0].nbytes
    assert rows % 64 == 0
    assert 0 <= rows - target.vocab_size < 64


def test_a_renamed_tensor_is_refused_by_both_names(copy: Path):
    rewrite(copy, lambda tensors: {("odd.name" if n == NAME else n): t for n, t in tensors.items()})
    with pytest.raises(ValueError, match="tensors do not fit") as caught:
        Alpamayo.from_pretrained(copy)
    assert f"1 missing: {NAME}" in str(caught.value)
    assert "1 surplus: odd.name" in str(caught.value)


def test_a_wrong_shape_is_refused_by_name(copy: Path):
    rewrite(copy, lambda tensors: tensors | {NAME: torch.zeros(47, 48)})
    with pytest.raises(ValueError, match="1 misshapen") as caught:
        Alpamayo.from_pretrained(copy)
    assert f"{NAME} is [47, 48] and must be [48, 48]" in str(caught.value)


def test_a_missing_shard_is_refused_by_name(copy: Path):
    files = shard(copy)
    (copy / files[1]).unlink()
    with pytest.raises(ValueError, match=files[1]):
        Alpamayo.from_pretrained(copy)


def test_a_truncated_file_is_refused_by_name(copy: Path):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        Alpamayo.from_pretrained(copy)


def test_missing_weights_are_refused(copy: Path):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        Alpamayo.from_pretrained(copy)


def test_a_wrong_vocabulary_size_is_refused(copy: Path):
    size = factory.odd_config()["vocab_size"]
    edit_config(copy / "config.json", vocab_size=size + 1)
    with pytest.raises(ValueError, match=rf"vocab_size is {size + 1} .* has {size}$"):
        Alpamayo.from_pretrained(copy)


def test_a_head_of_another_vocabulary_is_refused(copy: Path):
    name = "vlm.lm_head.weight"
    rewrite(copy, lambda tensors: tensors | {name: tensors[name][:-1].contiguous()})
    with pytest.raises(ValueError, match=rf"{name} is \[308, 48\] and must be \[309, 48\]"):
        Alpamayo.from_pretrained(copy)


def test_ids_that_do_not_fit_are_refused(copy: Path):
    ids = factory.odd_config()["traj_token_ids"] | {"future_start": 7}
    edit_config(copy / "config.json", traj_token_ids=ids)
    with pytest.raises(ValueError, match=r"<\|traj_future_start\|> is 293, the checkpoint says 7"):
        Alpamayo.from_pretrained(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama", "architectures": ["Llama"]}, "known are"),
        ({"expert_cfg": None}, "missing: expert_cfg"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"vocab_size": 200}, "vocab_size is 200"),
        ({"diffusion_cfg": {"int_method": "heun"}}, "int_method is 'heun'"),
        ({"action_space_cfg": {"_target_": "a.b.Other"}}, "_target_ is 'a.b.Other'"),
        ({"expert_non_causal_attention": False}, "expert_non_causal_attention"),
        ({"hist_traj_tokenizer_cfg": {"num_bins": 1000}}, "go beyond the last trajectory id"),
        ({"min_pixels": 1000}, "min_pixels 1000 must be"),
        ({"vlm_name_or_path": "../nowhere"}, "vlm_name_or_path is '../nowhere'"),
        ({"expert_cfg": {"hidden_size": 24, "head_dim": 8}}, "expert_cfg.head_dim is 8"),
        ({"add_special_tokens": False, "vocab_size": 287, "traj_token_ids": {}}, r"no <\|cot_start\|>"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(copy: Path, changes: dict[str, object], message: str):
    edit_config(copy / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        Alpamayo.from_pretrained(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_vl"}, "must be 'qwen3_vl'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"image_token_id": 3}, "image_token_id is 3"),
        ({"text_config": {"rope_scaling": {}}}, r"vlm/config\.json: text_config: no rope_theta"),
        ({"text_config": THETA | {"rope_scaling": {"rope_type": "yarn"}}}, "rope_type is 'yarn'"),
        (
            {"text_config": THETA | {"rope_scaling": {"mrope_interleaved": False}}},
            "mrope_interleaved is false",
        ),
    ],
)
def test_vlm_configs_that_cannot_be_used_are_refused(copy: Path, changes: dict[str, object], message: str):
    edit_config(copy / "vlm" / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        Alpamayo.from_pretrained(copy)


def test_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no such folder"):
        Alpamayo.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        Alpamayo.from_pretrained(tmp_path)


def test_tiny_is_the_one_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny, found = open_target("tiny", device="cpu")
    assert (tiny.num_layers, found.before()) == (8, folder_hash(load.SHIPPED))
    assert found.hash == load.target_identity(load.SHIPPED, tiny.vlm_files).hash
    assert not any(parameter.requires_grad for parameter in tiny.parameters())
    same(tiny, Alpamayo.from_pretrained("tiny"))
    frozen = load.read_target("tiny")
    assert torch.equal(frozen.embedding, tiny.embedding)
    assert torch.equal(frozen.head, tiny.head)
    assert torch.equal(frozen.final_norm, tiny.vlm.model.language_model.norm.weight)
    assert (frozen.num_layers, frozen.special()) == (tiny.num_layers, tiny.special)
    q, k, gate = (
        tiny.text_layers[0].get_submodule(f"{part}_proj").weight
        for part in ("self_attn.q", "self_attn.k", "mlp.gate")
    )
    text = frozen.text
    assert len(q) == text.num_attention_heads * text.head_dim
    assert len(k) == text.num_key_value_heads * text.head_dim
    assert len(gate) == text.intermediate_size
    # A folder of that name has to be written as one.
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load.checkpoint_folder("tiny") == load.SHIPPED
    assert load.checkpoint_folder("./tiny") == load.checkpoint_folder(Path("tiny")) == Path("tiny")


def test_a_local_folder_never_asks_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **kwargs: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(load, "snapshot_download", fail)
    Alpamayo.from_pretrained(saved)


def test_a_hub_id_asks_for_weights_and_small_files_only(saved: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(
        repo_id: str, *, allow_patterns: list[str], local_files_only: bool, revision: str | None
    ) -> str:
        assert revision is None
        asked.append((repo_id, allow_patterns, local_files_only))
        return str(saved if repo_id == "owner/target" else saved / "vlm")

    monkeypatch.setattr(load, "snapshot_download", download)
    target = Alpamayo.from_pretrained("owner/target", vlm="owner/vlm", local_files_only=True)
    assert target.vlm_files.hub_id == "owner/vlm"
    assert asked == [
        ("owner/target", ["*.json", "*.safetensors"], True),
        ("owner/vlm", ["*.json", "*.jinja", "merges.txt"], True),
    ]


def test_a_repository_that_cannot_be_reached_is_a_clear_error(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(load, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"owner/target: not found .* a local folder works without the hub"):
        Alpamayo.from_pretrained("owner/target")


def test_dtypes(saved: Path):
    assert Alpamayo.from_pretrained(saved).dtype == torch.float32
    target = Alpamayo.from_pretrained(saved, dtype="bfloat16")
    assert {parameter.dtype for parameter in target.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in target.buffers()} == {torch.float32}
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        Alpamayo.from_pretrained(saved, dtype="int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constants_that_the_file_lacks_are_computed(tmp_path: Path, dtype: torch.dtype):
    """1.5 stores none; its official loader computes them in bfloat16 in a bfloat16 run (spec 1.5)."""
    factory.odd_target(tmp_path, "1.5").save_pretrained(tmp_path / "out")
    rewrite(tmp_path / "out", lambda t: {n: v for n, v in t.items() if n not in load.OPTIONAL_TENSORS})
    target = Alpamayo.from_pretrained(tmp_path / "out", dtype=dtype)
    freqs = log_spaced(4, 30.0).to(dtype).float()
    assert torch.equal(target.action_in_proj.sinus[1].freqs, freqs)
    assert torch.equal(target.action_in_proj.timestep_fourier_encoder.freqs, freqs)
    mean = torch.tensor(target.config.action_space.accel_mean).to(dtype).float()
    assert torch.equal(target.action_space.accel_mean, mean)


def test_constants_of_the_file_win(copy: Path):
    name = "action_space.accel_std"
    rewrite(copy, lambda tensors: tensors | {name: torch.tensor(0.6796875)})
    assert Alpamayo.from_pretrained(copy).action_space.accel_std.item() == 0.6796875


def test_release_constants_round_as_the_specification_says():
    freqs = log_spaced(10, 100.0).bfloat16().flatten().tolist()
    assert freqs == [1, 1.671875, 2.78125, 4.65625, 7.75, 12.9375, 21.5, 36, 60, 100]
    space = AlpamayoConfig.from_dict(factory.odd_config(action_space_cfg={})).action_space
    values = [space.accel_mean, space.accel_std, space.curvature_mean, space.curvature_std]
    rounded = torch.tensor(values).bfloat16().tolist()
    assert rounded == [0.029052734375, 0.6796875, 0.0002689361572265625, 0.026123046875]


def test_special_tokens_of_both_versions_have_the_same_ids(tmp_path: Path):
    r1, later = factory.odd_target(tmp_path / "a"), factory.odd_target(tmp_path / "b", "1.5")
    assert r1.special == later.special
    assert r1.special.traj_ids == r1.config.traj_ids
    assert r1.tokenizer.token_to_id("<|image_pre_tkn|>") == later.tokenizer.token_to_id("<|_padding_0|>")
    assert r1.tokenizer.token_to_id("<|vectorized_wm_pre_tkn|>") == later.tokenizer.token_to_id(
        "<|_padding_8|>"
    )
    assert r1.special.eos == r1.tokenizer.token_to_id("<|im_end|>")
    assert r1.special.pad == r1.tokenizer.token_to_id("<|endoftext|>")
