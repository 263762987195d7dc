import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.draft.formats import (
    from_json,
    read_draft,
    resize_vocabulary,
    tensor_shapes,
    to_json,
    write_draft,
)
from alpamayo_dflash.draft.model import DFlashDraft
from tests.unit.test_draft_config import GOOD

ZLAB_LAYER = {
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    "input_layernorm",
    "post_attention_layernorm",
}


@pytest.fixture
def folder(tmp_path):
    DFlashDraft.random(GOOD, 5).save_pretrained(tmp_path / "draft", provenance={"seed": 5})
    return tmp_path / "draft"


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "DROP"}))


def test_round_trip(folder):
    draft = DFlashDraft.from_pretrained(folder)
    assert draft.config == GOOD
    expected = DFlashDraft.random(GOOD, 5).state_dict()
    assert draft.state_dict().keys() == expected.keys()
    assert all(torch.equal(draft.state_dict()[name], expected[name]) for name in expected)
    assert read_json(folder / "provenance.json") == {"seed": 5}


def test_names_are_z_lab_s_and_the_mask_embedding(folder):
    names = {f"layers.{i}.{name}.weight" for i in range(2) for name in ZLAB_LAYER}
    names |= {"fc.weight", "hidden_norm.weight", "norm.weight", "mask_embedding"}
    assert set(load_file(folder / "model.safetensors")) == names == set(tensor_shapes(GOOD))


def test_config_holds_both_places_and_qwen_keys(folder):
    config = json.loads((folder / "config.json").read_text())
    draft = {"target_layer_ids": [0, 2], "mask_token_id": 40, "block_size": 4}
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["dflash_config"] == draft
    assert {key: config[key] for key in draft} == draft
    assert config["num_target_layers"] == 3
    assert config["context_len"] == 5


def test_own_embeddings_are_stored_and_read(tmp_path):
    config = dataclasses.replace(GOOD, trained_embeddings=True)
    draft = DFlashDraft.random(config, 2)
    draft.save_pretrained(tmp_path / "draft")
    again = DFlashDraft.from_pretrained(tmp_path / "draft")
    assert torch.equal(again.embed_tokens.weight, draft.embed_tokens.weight)
    assert torch.equal(again.lm_head.weight, draft.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": "DROP"}, "architectures is None"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "taps count from is not known"),
        ({"speculators_model_type": "dflash"}, "one higher"),
        ({"aux_hidden_state_layer_ids": [1, 3]}, "one higher"),
        ({"tap_convention": "layer_input"}, "tap_convention is 'layer_input'"),
        ({"num_target_layers": "DROP"}, "no num_target_layers"),
        ({"num_hidden_layers": "DROP"}, "no num_hidden_layers"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"block_size": 8}, "block_size is 4 in dflash_config and 8 at top level"),
        ({"mask_token_id": "DROP", "dflash_config": {}}, "no mask_token_id"),
        ({"target_layer_ids": [0, 3], "dflash_config": {}}, "out of range"),
        ({"target_layer_ids": "0,2", "dflash_config": {}}, "list of layer numbers"),
        ({"context_len": "DROP"}, "no context_len"),
        ({"rope_theta": 5e5}, "rope_theta is 500000.0"),
        ({"rope_theta": "DROP", "rope_parameters": "DROP"}, "no rope_theta"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "default type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"selector_rank": 256}, "unknown keys.*selector_rank"),
        ({"dflash_config": {"markov_rank": 4}}, "unknown keys.*dflash_config.markov_rank"),
        ({"rms_norm_eps": "DROP"}, "no rms_norm_eps"),
    ],
)
def test_a_config_that_needs_guessing_is_refused(folder, change, said):
    edit(folder, **change)
    with pytest.raises(ValueError, match=said) as error:
        DFlashDraft.from_pretrained(folder)
    assert "config.json" in str(error.value)


def test_z_lab_s_layout_is_read(folder):
    """No context length, no mask embedding, draft keys in one place, `rope_theta` at top level only."""
    for key in ("context_len", "tap_convention", "trained_embeddings", "rope_parameters"):
        edit(folder, **{key: "DROP"})
    for key in ("target_layer_ids", "mask_token_id", "block_size"):
        edit(folder, **{key: "DROP"})
    inner = {"target_layer_ids": [0, 2], "mask_token_id": 37, "block_size": 4}
    edit(folder, dflash_config=inner, transformers_version="4.57.1", torch_dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    del tensors["mask_embedding"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"takes row 37 .*--init-from"):
        read_draft(folder, context_len=9)
    config, found = read_draft(folder, context_len=9, own_mask=False)
    assert config == dataclasses.replace(GOOD, context_len=9, mask_token_id=37)
    assert set(found) == set(tensors)


def test_a_mask_embedding_beside_the_weights_is_read(folder):
    tensors = load_file(folder / "model.safetensors")
    mask = tensors.pop("mask_embedding").clone()  # of a file that is written anew below
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing mask_embedding"):
        read_draft(folder)
    torch.save(mask[None], folder / "mask_embedding.pt")
    assert torch.equal(read_draft(folder)[1]["mask_embedding"], mask)


def test_wrong_tensors_are_named(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["norm.weight"]
    tensors["fc.bias"] = torch.zeros(16)
    tensors["layers.1.mlp.up_proj.weight"] = torch.zeros(24, 17)
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=r"missing norm\.weight; surplus fc\.bias; layers\.1\.mlp\.up_proj\.weight is"
    ):
        read_draft(folder)


def test_a_cut_file_is_an_error_that_names_it(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole"):
        read_draft(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        read_draft(folder)
    with pytest.raises(ValueError, match="no such folder"):
        read_draft(folder / "none")


def test_shards_with_an_index_are_read(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    assert set(read_draft(folder)[1]) == set(names)


def test_writing_replaces_a_draft_and_nothing_else(folder):
    tensors = DFlashDraft.random(GOOD, 6).state_dict()
    write_draft(folder, GOOD, tensors)
    assert torch.equal(read_draft(folder)[1]["fc.weight"], tensors["fc.weight"])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        write_draft(folder, GOOD, tensors)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match=r"missing fc\.weight"):
        write_draft(folder, GOOD, {name: t for name, t in tensors.items() if name != "fc.weight"})


def test_json_round_trip_keeps_every_value():
    config = dataclasses.replace(GOOD, rope_theta=12345.5, rms_norm_eps=1e-5, trained_embeddings=True)
    assert from_json(json.loads(json.dumps(to_json(config))), "here") == config


@pytest.mark.parametrize("size", [44, 36])
def test_vocabulary_is_resized_with_the_target_s_rows(size):
    config = dataclasses.replace(GOOD, trained_embeddings=True)
    tensors = DFlashDraft.random(config, 2).state_dict()
    embedding, head = torch.randn(2, size, 16)
    resized, found = resize_vocabulary(config, tensors, embedding, head)
    assert (resized.vocab_size, resized.mask_token_id) == (size, size)
    kept = min(size, 40)
    for name, table in (("embed_tokens.weight", embedding), ("lm_head.weight", head)):
        assert torch.equal(found[name][:kept], tensors[name][:kept])
        assert torch.equal(found[name][kept:], table[kept:])
    DFlashDraft(resized).load_state_dict(found)


REDUCED = dataclasses.replace(GOOD, draft_vocab_size=4)


@pytest.fixture
def reduced(tmp_path):
    draft = DFlashDraft.random(REDUCED, 5)
    draft.draft_token_ids.copy_(torch.tensor([2, 3, 17, 39]))
    draft.save_pretrained(tmp_path / "reduced")
    return tmp_path / "reduced"


def test_a_reduced_head_is_kept(reduced, folder):
    assert json.loads((reduced / "config.json").read_text())["draft_vocab_size"] == 4
    draft = DFlashDraft.from_pretrained(reduced, dtype=torch.bfloat16)
    assert draft.config == REDUCED
    assert draft.token_ids.dtype == torch.int64
    assert draft.token_ids.tolist() == [2, 3, 17, 39]
    # A whole head's folder says nothing of it, as before.
    assert "draft_vocab_size" not in json.loads((folder / "config.json").read_text())
    assert DFlashDraft.from_pretrained(folder).token_ids is None


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.tensor([2, 3, 17]), r"draft_token_ids is \[3\], not \[4\]"),
        (torch.tensor([2, 3, 17, 40]), r"draft_token_ids \[40\] out of range; the target's ids are 0 to 39"),
        (torch.tensor([-1, 3, 17, 39]), r"\[-1\] out of range"),
        (torch.tensor([2, 3, 3, 17]), "draft_token_ids holds 3 twice"),
        (torch.tensor([2, 17, 3, 39]), "must ascend; 3 stands too late"),
        (torch.tensor([2, 3, 17, 39], dtype=torch.int32), r"torch\.int32; it must be int64"),
        (None, "missing draft_token_ids"),
    ],
)
def test_wrong_ids_of_a_reduced_head_are_refused(reduced, ids, said):
    tensors = load_file(reduced / "model.safetensors")
    del tensors["draft_token_ids"]
    tensors |= {} if ids is None else {"draft_token_ids": ids}
    with pytest.raises(ValueError, match=said):
        write_draft(reduced, REDUCED, tensors)
    save_file(tensors, reduced / "model.safetensors")
    with pytest.raises(ValueError, match=said):
        read_draft(reduced)


def test_only_our_layout_has_a_reduced_head(reduced):
    edit(reduced, draft_vocab_size="DROP")
    with pytest.raises(ValueError, match="surplus draft_token_ids"):
        read_draft(reduced)
    edit(reduced, draft_vocab_size=4, tap_convention="DROP")
    with pytest.raises(ValueError, match=r"unknown keys.*draft_vocab_size"):
        read_draft(reduced)
