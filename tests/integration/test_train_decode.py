"""A draft trained on a target's own rollouts, decoded with: what training promises is what decoding gives."""

import dataclasses

import pytest
import torch
from random_target import random_prompt, random_target

from alpamayo_dflash.artefacts import folder_hash
from alpamayo_dflash.decode import DecodeConfig, SpeculativeDecoder, teacher_forced
from alpamayo_dflash.distill.writer import ClipResult, RankWriter, Response
from alpamayo_dflash.draft import DFlashDraft, DraftConfig
from alpamayo_dflash.train import TrainConfig
from alpamayo_dflash.train.run import run

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


@pytest.mark.parametrize("block_size", [4, 8])
def test_the_simulated_acceptance_is_the_real_one(tmp_path, block_size):
    target = random_target(tmp_path / "vlm")
    target.save_pretrained(tmp_path / "target")
    prompts = [random_prompt(target, seed=seed) for seed in range(PROMPTS)]
    responses = [respond(target, prompt) for prompt in prompts]
    settings = {
        "target": folder_hash(tmp_path / "target"),
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
    writer = RankWriter(tmp_path / "data", 0, settings, clips, clips_per_shard=100, provenance={})
    writer.begin()
    writer.write([ClipResult(clip, int(clip[0]), (copied(responses[int(clip[2:])]),)) for clip in clips])
    trained = run(
        TrainConfig(
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
        torch.ones(1, 3, dtype=torch.bool),
    )
    out.sum().backward()
    assert draft.fc.weight.grad is not None
