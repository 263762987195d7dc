"""A draft trained on a target's own rollouts, decoded with: what training promises is what decoding gives."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.rollouts import teacher_forced
from alpamayo_dflash.distill.writer import ClipResult, RankWriter, Response
from alpamayo_dflash.draft.config import DraftConfig
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.target.checkpoint import VLMFiles, target_identity
from alpamayo_dflash.train.checkpoint import load_training
from alpamayo_dflash.train.config import TrainConfig
from alpamayo_dflash.train.optimizer import make_optimizer
from alpamayo_dflash.train.run import run
from tests.helpers.random_target import random_prompt, random_target

TAPS, CONTEXT, TOKENS, PROMPTS = (0, 2), 24, 18, 6  # the prompts are shorter than the context


def respond(target, prompt):
    result = SpeculativeDecoder(target).generate(
        prompt, temperature=0, max_new_tokens=TOKENS, trajectories=False
    )
    (tokens,) = result.token_ids
    with torch.inference_mode():
        forced = teacher_forced(target, prompt, tokens, layers=TAPS, prompt_states=CONTEXT)
    top = forced.logits.topk(8)
    return Response(
        token_ids=tuple(tokens),
        text="",
        stop="length",
        temperature=0.0,
        top_p=1.0,
        seed=0,
        tensors={
            "prompt_states": forced.prompt_states.movedim(0, 1).contiguous(),
            "states": forced.states.movedim(0, 1).contiguous(),
            "topk_logits": top.values,
            "topk_ids": top.indices.int(),
        },
    )


def copied(response):
    """A shard takes no two tensors of one storage."""
    tensors = {name: tensor.clone() for name, tensor in response.tensors.items()}
    return dataclasses.replace(response, tensors=tensors)


def distilled(folder, target):
    """A set of the target's greedy responses, and the prompts and responses."""
    prompts = [random_prompt(target, seed=seed) for seed in range(PROMPTS)]
    responses = [respond(target, prompt) for prompt in prompts]
    settings = {
        "identity": 2,
        "target": target_identity(folder / "target", VLMFiles(folder / "target" / "vlm")).hash,
        "world_size": 1,
        "taps": list(TAPS),
        "context_len": CONTEXT,
        "top_k": 8,
        "full_vocab": False,
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "num_target_layers": target.num_layers,
        "dtype": "float32",
        "t0_us": 0,
    }
    # The same responses in both chunks: the draft knows what it is asked.
    clips = [f"{chunk}-{index}" for chunk in range(2) for index in range(PROMPTS)]
    writer = RankWriter(folder / "data", 0, settings, clips, clips_per_shard=100, provenance={})
    writer.begin()
    writer.write([ClipResult(clip, int(clip[0]), (copied(responses[int(clip[2:])]),)) for clip in clips])
    return prompts, responses


@pytest.mark.parametrize("block_size", [4, 8])
def test_the_simulated_acceptance_is_the_real_one(tmp_path, block_size):
    target = random_target(tmp_path / "vlm")
    target.save_pretrained(tmp_path / "target")
    prompts, responses = distilled(tmp_path, target)
    trained = run(
        TrainConfig.flat(
            str(tmp_path / "target"),
            tmp_path / "data",
            tmp_path / "out",
            num_epochs=40,
            batch_size=34,
            learning_rate=1e-2,
            num_draft_layers=2,
            block_size=block_size,
            held_out_chunks="1",
        )
    )
    assert trained["acceptance_length"] > 1.5

    draft = DFlashDraft.from_pretrained(trained["draft"])
    decoder = SpeculativeDecoder(target, draft, DecodeConfig(sentence_end="off"))
    tokens = passes = 0
    for prompt, response in zip(prompts, responses, strict=True):
        found = decoder.generate(prompt, temperature=0, max_new_tokens=TOKENS, trajectories=False)
        assert found.token_ids == [list(response.token_ids)]
        tokens += len(response.token_ids) - 1
        passes += found.rounds
    assert tokens / passes == pytest.approx(trained["acceptance_length"])


def test_a_draft_that_has_decoded_can_still_be_trained(tmp_path):
    target = random_target(tmp_path / "target")
    config = DraftConfig(
        hidden_size=target.hidden_size,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=32,
        vocab_size=target.vocab_size,
        block_size=4,
        context_len=CONTEXT,
        target_layer_ids=TAPS,
        num_target_layers=target.num_layers,
        mask_token_id=target.vocab_size,
    )
    draft = DFlashDraft.random(config)
    SpeculativeDecoder(target, draft).generate(random_prompt(target), trajectories=False, max_new_tokens=4)
    out = draft(
        torch.randn(CONTEXT, len(TAPS) * target.hidden_size),
        torch.tensor([CONTEXT]),
        torch.tensor([1]),
        torch.arange(CONTEXT)[None],
        torch.arange(3),
    )
    out.sum().backward()
    assert draft.fc.weight.grad is not None


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A target, its set, and the tokens of its responses."""
    folder = tmp_path_factory.mktemp("reduced")
    target = random_target(folder / "vlm")
    target.save_pretrained(folder / "target")
    prompts, responses = distilled(folder, target)
    return folder, target, prompts, responses


def options(folder, out, **changes):
    values = {
        "num_epochs": 12,
        "batch_size": 34,
        "learning_rate": 1e-2,
        "num_draft_layers": 1,
        "block_size": 4,
        "held_out_chunks": "1",
        "log_interval": 1,
        **changes,
    }
    return TrainConfig.flat(str(folder / "target"), folder / "data", out, **values)


@pytest.mark.parametrize("changes", [{}, {"loss_type": "ce+kl", "position_weights": "dpace"}])
def test_a_draft_with_a_reduced_head_is_lossless(small, tmp_path, changes):
    folder, target, prompts, responses = small
    counts = Counter(token for response in responses for token in response.token_ids)
    size = len(counts) - 6  # some labels have no column
    trained = run(options(folder, tmp_path / "out", draft_vocab_size=size, **changes))
    draft = DFlashDraft.from_pretrained(trained["draft"])
    kept = set(draft.token_ids.tolist())
    special, period = target.special, target.tokenizer.encode(".").ids[0]
    assert len(kept) == size
    assert {special.cot_end, special.traj_future_start, special.eos, period} <= kept
    assert not kept & set(target.traj_ids)
    outside = sum(token not in kept for response in responses for token in response.token_ids[1:])
    assert outside > 0
    assert trained["train"]["labels_outside_vocab"] == outside
    assert trained["held_out"]["labels_outside_vocab"] == outside
    assert all(entry["labels_outside_vocab"] >= 0 for entry in trained["losses"])
    assert any(entry["labels_outside_vocab"] > 0 for entry in trained["losses"])
    key = "kl" if "loss_type" in changes else "ce"
    assert trained["losses"][-1][key] < 0.8 * trained["losses"][0][key]

    off = DecodeConfig(sentence_end="off")
    tokens = passes = 0
    for prompt in prompts:
        for temperature, samples in ((0.0, 1), (0.6, 3)):
            asked = {
                "temperature": temperature,
                "num_traj_samples": samples,
                "max_new_tokens": TOKENS,
                "trajectories": False,
            }
            plain = SpeculativeDecoder(target, None, off).generate(prompt, **asked)
            found = SpeculativeDecoder(target, draft, off).generate(prompt, **asked)
            assert found.token_ids == plain.token_ids
            if temperature == 0:
                tokens += len(found.token_ids[0]) - 1
                passes += found.rounds
    assert tokens / passes == pytest.approx(trained["acceptance_length"])
    assert tokens / passes > 1


def test_a_reduced_head_is_chosen_anew_kept_or_dropped(small, tmp_path, capsys):
    """From a whole draft, from a reduced one, back to whole; and a checkpoint of other tokens is refused."""
    folder, _, _, responses = small
    whole = run(options(folder, tmp_path / "whole", num_epochs=1))
    assert "draft_vocab" not in whole
    assert "labels_outside_vocab" not in whole["train"]
    different = len({token for response in responses for token in response.token_ids})
    from_whole = {"num_epochs": 1, "num_draft_layers": None, "init_from": Path(whole["draft"])}
    wide = options(folder, tmp_path / "wide", draft_vocab_size=different + 40, **from_whole)
    result = run(wide)
    assert result["draft_vocab"]["counted"] == different
    assert 36 <= result["draft_vocab"]["filled"] <= 40  # end marks may stand in no response
    assert "fill up" in capsys.readouterr().err
    # Every token of the responses is kept; one that is left out was wrong wherever the whole draft chose it.
    assert result["evaluations"][0]["acceptance_length"] >= whole["acceptance_length"] > 1
    again = {**from_whole, "init_from": Path(result["draft"])}
    for size, expected in ((None, different + 40), (0, None), (12, 12)):
        out = tmp_path / f"again{size}"
        found = run(options(folder, out, draft_vocab_size=size, **again))
        assert DFlashDraft.from_pretrained(found["draft"]).config.draft_vocab_size == expected
    assert run(wide)["nothing_to_do"]
    with pytest.raises(ValueError, match="made with draft_vocab_size"):
        run(wide.changed(draft_vocab_size=different + 41))
    draft = DFlashDraft.from_pretrained(tmp_path / "wide" / "checkpoint")
    draft.draft_token_ids[-1] += 1
    optimizer = make_optimizer(draft, wide, 1)
    with pytest.raises(ValueError, match="keeps other tokens"):
        load_training(tmp_path / "wide" / "checkpoint", draft, optimizer)
    with pytest.raises(ValueError, match="draft_vocab_size is 3; it must be 4"):
        run(options(folder, tmp_path / "none", draft_vocab_size=3))
    assert not (tmp_path / "none").exists()
