"""`accelerate` on models that others loaded: NVIDIA's object, a bare Qwen3-VL; and the way back."""

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alpamayo_dflash import Alpamayo, SpeculativeDecoder, accelerate
from alpamayo_dflash.decode.handover import Handover
from alpamayo_dflash.target.prompt import Prompt
from tests.helpers.loaded_models import TheirAlpamayo, inputs_of
from tests.helpers.proposers import Random
from tests.helpers.random_target import random_prompt, random_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Alpamayo:
    return random_target(tmp_path_factory.mktemp("vlm"), push=1.5)


def fingerprint(module: nn.Module) -> str:
    """A hash of every name and value."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def addresses(module: nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in module.named_parameters()}


def read_back(decoder: SpeculativeDecoder, prompt: Prompt) -> Prompt:
    return decoder.target.prompt_from_inputs(
        inputs_of(prompt),
        key=prompt.key,
        ego_history_xyz=prompt.ego_history_xyz[None, None],
        ego_history_rot=prompt.ego_history_rot[None, None],
    )


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("stored_constants", [True, False])
def test_their_alpamayo_gives_what_ours_gives(
    tmp_path: Path, target: Alpamayo, fuse: bool, stored_constants: bool
) -> None:
    target = random_target(tmp_path, push=1.5) if fuse else target
    prompt = random_prompt(target, seed=3)
    expected = SpeculativeDecoder(target).generate(prompt, num_traj_samples=3, seed=5)
    model = TheirAlpamayo(target, stored_constants=stored_constants)
    before, places = fingerprint(model), addresses(model)
    decoder = accelerate(model, Random(target.vocab_size, 5), fuse=fuse)
    result = decoder.generate(read_back(decoder, prompt), num_traj_samples=3, seed=5)
    assert result.token_ids == expected.token_ids
    assert result.coc == expected.coc
    assert expected.pred_xyz is not None
    torch.testing.assert_close(result.pred_xyz, expected.pred_xyz, rtol=0, atol=1e-4)
    assert fingerprint(model) == before
    assert (addresses(model) == places) is not fuse


def test_fused_weights_lie_together(tmp_path: Path) -> None:
    target = random_target(tmp_path)
    held = [id(parameter) for parameter in target.vlm.parameters()]
    accelerate(target.vlm, tokenizer=target.tokenizer, fuse=True)
    layer = target.text_layers[0]
    projections = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    assert len({p.weight.untyped_storage().data_ptr() for p in projections}) == 1
    assert len({p.weight.untyped_storage().data_ptr() for p in (layer.mlp.gate_proj, layer.mlp.up_proj)}) == 1
    rows = target.vlm.lm_head.weight.untyped_storage().nbytes() // (4 * target.hidden_size)
    assert rows % 64 == 0 and rows >= target.vocab_size
    assert [id(parameter) for parameter in target.vlm.parameters()] == held


def test_an_experts_weights_are_fused_with_the_texts(tmp_path: Path) -> None:
    theirs = TheirAlpamayo(random_target(tmp_path))
    kept = [parameter.clone() for parameter in theirs.expert.parameters()]
    accelerate(theirs, fuse=True)
    mlp: Any = theirs.expert.layers[2].mlp
    assert len({p.weight.untyped_storage().data_ptr() for p in (mlp.gate_proj, mlp.up_proj)}) == 1
    assert all(torch.equal(a, b) for a, b in zip(kept, theirs.expert.parameters(), strict=True))


def test_fuse_refuses_what_is_not_a_plain_linear_layer_and_moves_nothing(tmp_path: Path) -> None:
    target = random_target(tmp_path)
    target.text_layers[1].mlp.up_proj = nn.Sequential(target.text_layers[1].mlp.up_proj)
    places = addresses(target.vlm)
    with pytest.raises(ValueError, match="Sequential"):
        accelerate(target.vlm, tokenizer=target.tokenizer, fuse=True)
    assert addresses(target.vlm) == places


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_bare_qwen_decodes_losslessly(target: Alpamayo, temperature: float) -> None:
    prompt = random_prompt(target, seed=1)
    plain = accelerate(target.vlm, tokenizer=target.tokenizer)
    drafted = accelerate(target.vlm, Random(target.vocab_size, 5), tokenizer=TheirAlpamayo(target).tokenizer)
    options: dict[str, Any] = {"temperature": temperature, "num_traj_samples": 2, "max_new_tokens": 24}
    expected = plain.generate(plain.target.prompt_from_inputs(inputs_of(prompt), key="k"), **options)
    result = drafted.generate(drafted.target.prompt_from_inputs(inputs_of(prompt), key="k"), **options)
    assert result.token_ids == expected.token_ids
    assert result.pred_xyz is None
    whole = SpeculativeDecoder(target).generate(replace(prompt, key="k"), trajectories=False, **options)
    assert expected.token_ids == whole.token_ids
    assert expected.coc == whole.coc


def test_a_vocabulary_without_end_marks_ends_at_eos_or_the_limit(target: Alpamayo) -> None:
    words = {f"w{index}": index for index in range(target.vocab_size - 2)}
    words |= {"<|endoftext|>": target.vocab_size - 2, "<|im_end|>": target.vocab_size - 1}
    from tokenizers import Tokenizer, models

    decoder = accelerate(
        target.vlm, Random(target.vocab_size, 5), tokenizer=Tokenizer(models.WordLevel(words, unk_token="w0"))
    )
    prompt = decoder.target.prompt_from_inputs(inputs_of(random_prompt(target)))
    result = decoder.generate(prompt, max_new_tokens=12, temperature=0.0)
    assert len(decoder.target.traj_ids) == 0
    assert result.coc[0].split() and result.stops[0] in ("eos", "limit")


def reference_generate(target: Alpamayo, prompt: Prompt, limit: int) -> Any:
    """transformers' own greedy generation, one token beyond the end, as the reference runs it."""
    from alpamayo_dflash.evaluate.reference import MaskIds, OneAfter

    return target.vlm.generate(
        **target.transformers_inputs(prompt),
        do_sample=False,
        max_new_tokens=limit,
        logits_processor=[MaskIds(target.traj_ids)],
        stopping_criteria=[OneAfter(target.special.traj_future_start, len(prompt))],
        eos_token_id=target.special.eos,
        pad_token_id=target.special.pad,
        return_dict_in_generate=True,
    )


def layers_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def test_the_cache_handed_over_is_what_transformers_leaves(target: Alpamayo) -> None:
    seen = set()
    for seed, limit in itertools.product(range(4), (2, 40)):
        prompt = random_prompt(target, seed=seed)
        decoder = accelerate(TheirAlpamayo(target), Random(target.vocab_size, 5))
        result = decoder.generate(read_back(decoder, prompt), temperature=0.0, max_new_tokens=limit)
        handed = decoder.handover()
        expected = reference_generate(target, prompt, limit)
        text = result.token_ids[0]
        seen.add(result.stops[0].value)
        length = len(prompt) + len(text)
        assert handed.sequences[0, :length].tolist() == expected.sequences[0, :length].tolist()
        assert handed.offsets.tolist() == [length]
        cached = handed.past_key_values.get_seq_length()
        assert handed.sequences.shape == (1, cached + 1)
        pairs = zip(layers_of(handed.past_key_values), layers_of(expected.past_key_values), strict=True)
        for ours, theirs in pairs:
            for a, b in zip(ours, theirs, strict=True):
                assert a.shape[2] == cached
                torch.testing.assert_close(a, b[:, :, :cached], rtol=0, atol=1e-4)
    assert len(seen) > 1, f"all of these prompts end alike ({seen}); other cases are not covered"


def their_velocity(model: TheirAlpamayo, handed: Handover, x: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
    """One evaluation of their expert over a handed cache, masked and placed as in specification 8.2."""
    waypoints, entries = x.shape[1], handed.past_key_values.get_seq_length()
    positions = handed.offsets[:, None] + handed.rope_deltas + torch.arange(waypoints)
    visible = torch.arange(entries) < handed.offsets[:, None]
    mask = torch.zeros(len(x), 1, waypoints, entries + waypoints)
    mask[..., :entries].masked_fill_(~visible[:, None, None], torch.finfo(torch.float32).min)
    out = model.expert(
        inputs_embeds=embeds,
        position_ids=positions.expand(3, -1, -1),
        past_key_values=handed.past_key_values,
        attention_mask=mask,
        use_cache=True,
    )
    handed.past_key_values.crop(-waypoints)
    return model.action_out_proj(out.last_hidden_state)


def test_their_own_expert_runs_on_the_cache_handed_over(target: Alpamayo) -> None:
    model = TheirAlpamayo(target)
    decoder = accelerate(model)
    prompt = random_prompt(target, seed=2)
    samples = 3
    noise = torch.randn(samples, target.n_waypoints, 2, generator=torch.Generator().manual_seed(0))
    for seed in range(100):
        result = decoder.generate(
            read_back(decoder, prompt), num_traj_samples=samples, seed=seed, action_noise=noise
        )
        if len({len(ids) for ids in result.token_ids}) > 1 and set(result.stops) == {"traj_future_start"}:
            break
    else:
        pytest.fail("no seed gives texts of different lengths that all end in the mark")
    handed = decoder.handover()
    x, grid = noise, torch.linspace(0, 1, target.config.num_inference_steps + 1)
    for t, after in itertools.pairwise(grid):
        embeds = target.action_in_proj(x, t.expand(samples))
        x = x + (after - t) * their_velocity(model, handed, x, t, embeds)
    xyz, _ = target.trajectory(x.detach(), prompt.ego_history_xyz, prompt.ego_history_rot)
    torch.testing.assert_close(xyz, result.pred_xyz, rtol=0, atol=1e-3)


def test_what_the_reference_cannot_take_together_is_refused(target: Alpamayo) -> None:
    decoder = accelerate(TheirAlpamayo(target))
    prompt = read_back(decoder, random_prompt(target, seed=2))
    for seed in range(40):
        result = decoder.generate(prompt, num_traj_samples=4, seed=seed, max_new_tokens=30)
        short = [i for i, stop in enumerate(result.stops) if stop == "eos"]
        if short and min(len(result.token_ids[i]) for i in short) < max(map(len, result.token_ids)) - 1:
            break
    else:
        pytest.fail("no seed ends one sample early without the mark")
    with pytest.raises(ValueError, match="hand it over alone"):
        decoder.handover()
    alone = decoder.handover(samples=[short[0]])
    assert alone.sequences[0].tolist()[-1] == target.special.eos


def test_handover_needs_a_finished_text_whose_prompt_is_still_there(target: Alpamayo) -> None:
    decoder = SpeculativeDecoder(target)
    with pytest.raises(ValueError, match="after generate"):
        decoder.handover()
    decoder.generate(random_prompt(target))
    decoder.prefill(random_prompt(target, seed=1))
    with pytest.raises(ValueError, match="another was read since"):
        decoder.handover()


def test_history_is_written_over_placeholders_or_its_absence_refused(target: Alpamayo) -> None:
    prompt = random_prompt(target)
    ids = prompt.input_ids.clone()
    ids[-2] = target.special.traj_history
    inputs = inputs_of(replace(prompt, input_ids=ids))
    with pytest.raises(ValueError, match="ego_history_xyz"):
        target.prompt_from_inputs(inputs)
    history = {"ego_history_xyz": prompt.ego_history_xyz, "ego_history_rot": prompt.ego_history_rot}
    with pytest.raises(ValueError, match="1 history placeholders"):
        target.prompt_from_inputs(inputs, **history)
    bare = accelerate(target.vlm, tokenizer=target.tokenizer).target
    with pytest.raises(ValueError, match="fuse the history first"):
        bare.prompt_from_inputs(inputs, **history)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(2, 5, dtype=torch.int64)}, "2 sequences"),
        ({"attention_mask": torch.tensor([[0, 1]])}, "no padding"),
        ({"pixel_values_videos": torch.zeros(1)}, "pixel_values_videos"),
        ({"image_grid_thw": torch.tensor([[1, 4, 8]])}, "makes 8"),
        ({"pixel_values": None}, "no pixel_values"),
    ],
)
def test_bad_inputs_are_named(target: Alpamayo, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target.prompt_from_inputs(inputs_of(random_prompt(target)) | change)


def test_bad_models_are_named(target: Alpamayo) -> None:
    with pytest.raises(ValueError, match="neither an Alpamayo"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="tokenizer="):
        accelerate(target.vlm)
    model = TheirAlpamayo(target)
    del model.action_in_proj.norm.weight
    with pytest.raises(ValueError, match=r"action_in_proj\.norm\.weight"):
        accelerate(model)
    model = TheirAlpamayo(target)
    model.tokenizer = SimpleNamespace()
    with pytest.raises(ValueError, match="backend_tokenizer"):
        accelerate(model)


def test_a_bare_target_takes_no_window_and_drives_nowhere(target: Alpamayo) -> None:
    decoder = accelerate(target.vlm, tokenizer=target.tokenizer)
    with pytest.raises(ValueError, match="without an action expert"):
        decoder.generate(random_prompt(target), trajectories=True)
    with pytest.raises(ValueError, match="not windows"):
        decoder.prefill(SimpleNamespace())  # type: ignore[arg-type]
