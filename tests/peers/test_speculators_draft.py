"""Drafts of speculators 0.9.0 in our hands: the same numbers, and a training with their trainer on a CPU.

It lives in an environment of its own, which `make speculators` makes; without it these tests are skipped.
"""

import json
from pathlib import Path

import pytest
import torch

from alpamayo_dflash import DFlashDraft
from alpamayo_dflash.cli.study import PeerDraft
from alpamayo_dflash.common.artefacts import write_record
from alpamayo_dflash.common.tensors import save_tensors
from alpamayo_dflash.draft.config import FULL_CONTEXT

pytest.importorskip("speculators", reason="the package speculators 0.9.0 is not installed")

from tests.peers.speculators_training import (
    SET,
    TrainPeerConfig,
    batch_flags,
    convert,
    epochs_of,
    save_document,
    save_table,
    train,
)

VOCABULARY, WIDTH, TAPS, BLOCK, LAYERS, MASK = 60, 32, (0, 2, 3), 6, 5, 59


def verifier(folder, generator):
    """What their classes load of a verifier; its embedding and head."""
    from transformers import Qwen3Config

    Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)
    embedding, head = (torch.randn(VOCABULARY, WIDTH, generator=generator) for _ in range(2))
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    save_tensors(tensors | {"model.norm.weight": torch.ones(WIDTH)}, folder / "model.safetensors")
    return embedding, head


def their_draft(folder, **options):
    """A draft of theirs for the verifier in a folder, made as their command makes it, with larger weights."""
    from speculators.models.dflash.core import DFlashDraftModel
    from speculators.train.cli import create_transformer_layer_config

    decoder = create_transformer_layer_config(str(folder), 2, "qwen3", None, 2048, [0, 1])
    torch.manual_seed(4)
    given = {"draft_vocab_size": VOCABULARY, "block_size": BLOCK, "mask_token_id": MASK}
    draft = DFlashDraftModel.from_training_args(
        decoder,
        verifier_name_or_path=str(folder),
        target_layer_ids=[tap + 1 for tap in TAPS],
        draft_attn_impl="sdpa",
        **(given | options),
    )
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.requires_grad and parameter.ndim == 2:
                parameter.mul_(5)
            elif parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
    return draft.eval()


@torch.no_grad()
def test_their_weights_give_their_logits_in_our_forward(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    embedding, head = verifier(tmp_path / "verifier", generator)
    theirs = their_draft(tmp_path / "verifier")
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "verifier", tmp_path / "ours")
    ours = DFlashDraft.from_pretrained(tmp_path / "ours")
    assert ours.config.target_layer_ids == TAPS and ours.config.context_len == FULL_CONTEXT
    ours.bind(embedding, head, LAYERS)

    lengths = (17, 23)  # two documents in one pack: none may see the other
    total = sum(lengths) + BLOCK
    states = torch.randn(1, total, len(TAPS) * WIDTH, generator=generator)
    tokens = torch.randint(0, VOCABULARY, (1, total), generator=generator)
    mask = torch.zeros(1, total, dtype=torch.int64)
    places, starts = [4, 9, 16, 17 + 6, 17 + 22], (0, 17)
    mask[0, places] = 1
    documents = torch.full((1, total), -1)
    documents[0, :17], documents[0, 17:40] = 0, 1
    positions = torch.cat((torch.arange(17), torch.arange(23), torch.zeros(BLOCK, dtype=torch.int64)))
    _, logits, _, _, indices = theirs._backbone_forward(
        states, tokens, mask, states[..., :WIDTH], documents, positions[None], max_anchors=len(places)
    )
    assert indices.view(-1, BLOCK)[:, 0].tolist() == places
    for anchor, expected in zip(places, logits[0].unflatten(0, (-1, BLOCK)), strict=True):
        start = starts[int(documents[0, anchor])]
        context = states[:, start:anchor]
        found = ours.propose(context, torch.tensor([anchor - start]), tokens[0, anchor : anchor + 1])
        torch.testing.assert_close(found.logits[0], expected[1:], rtol=1e-4, atol=1e-4)
    assert float(logits.std()) > 0.5  # else all drafts would agree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_from_anchor": True}, "sample_from_anchor is True"),
        ({"draft_vocab_size": 7}, "draft_vocab_size is 7"),
        ({"speculators_model_type": "dspark"}, "speculators_model_type is 'dspark'"),
    ],
)
def test_what_ours_does_not_compute_is_refused(tmp_path: Path, change, message) -> None:
    verifier(tmp_path / "verifier", torch.Generator().manual_seed(2))
    their_draft(tmp_path / "verifier").save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "theirs", tmp_path / "verifier", tmp_path / "ours")


def test_a_sliding_layer_is_refused(tmp_path: Path) -> None:
    verifier(tmp_path / "verifier", torch.Generator().manual_seed(2))
    their_draft(tmp_path / "verifier").save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    values = json.loads(path.read_text())
    values["transformer_layer_config"]["layer_types"] = ["full_attention", "sliding_attention"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="layer_types"):
        convert(tmp_path / "theirs", tmp_path / "verifier", tmp_path / "ours")


def small_set(folder, generator):
    """Documents of random tokens and states: eight that train, two that validate."""
    verifier(folder / "verifier", generator)
    prompts, responses = [12 + row for row in range(10)], [9] * 10
    ids = [torch.randint(0, MASK, (prompt + 9,), generator=generator).tolist() for prompt in prompts]
    for row, each in enumerate(ids):
        states = torch.randn(len(each), len(TAPS) + 1, WIDTH, generator=generator)
        save_document(folder / "documents" / "hidden_states" / f"hs_{row}.safetensors", each, states)
    save_table(folder / "documents", ids, responses)
    described = {
        "amount": "tenth",
        "taps": list(TAPS),
        "num_target_layers": LAYERS,
        "mask_token_id": MASK,
        "training_rows": 8,
        "document_tokens": [len(each) for each in ids],
        "response_tokens": responses,
    }
    write_record(folder / SET, described)
    return described


def test_their_trainer_takes_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    described = small_set(tmp_path / "set", torch.Generator().manual_seed(3))
    given = {"documents": tmp_path / "set", "block_size": BLOCK, "batch_size": 16, "row": "equal-steps"}
    done = train(TrainPeerConfig(out=tmp_path / "few", steps=5, **given))
    assert done["steps"] == 5
    peer = PeerDraft.read(tmp_path / "few")
    assert peer.key == "speculators, equal steps | tenth | 0" and peer.steps == 5
    few = DFlashDraft.from_pretrained(tmp_path / "few" / "draft")
    assert few.config.block_size == BLOCK and few.config.num_layers == 2
    train(TrainPeerConfig(out=tmp_path / "one", steps=1, **given))
    one = DFlashDraft.from_pretrained(tmp_path / "one" / "draft")
    assert not torch.equal(one.fc.weight, few.fc.weight)  # it was trained
    assert epochs_of(batch_flags(16, described) | {"seed": 0}, described, 5) > 1
    with pytest.raises(ValueError, match="is there already"):
        train(TrainPeerConfig(out=tmp_path / "one", steps=1, **given))


def test_a_batch_has_about_so_many_labelled_blocks() -> None:
    described = {
        "training_rows": 3,
        "document_tokens": [100, 110, 120, 500],
        "response_tokens": [9, 17, 25, 99],
    }
    found = batch_flags(128, described)
    assert found == {"total-seq-len": round((128 / 16 + 0.5) * 110), "max-anchors": 136}


def test_a_row_says_what_it_needs(tmp_path: Path) -> None:
    for row, options, message in (
        ("equal-steps", {}, "equal-steps needs steps"),
        ("equal-time", {"seconds": 3.0, "steps": 4}, "equal-time takes no steps"),
        ("defaults", {"seconds": 3.0}, "defaults takes no seconds"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainPeerConfig(documents=tmp_path, out=tmp_path / "out", row=row, **options)
