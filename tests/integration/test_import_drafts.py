"""Drafts as others publish them: z-lab's and FlashDrive's folders, decoded as they were trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from alpamayo_dflash import Alpamayo, DFlashDraft, SpeculativeDecoder
from alpamayo_dflash.decode.verify import Verifier
from alpamayo_dflash.draft.config import FULL_CONTEXT, DraftConfig
from alpamayo_dflash.draft.formats import to_json
from tests.helpers.random_target import random_prompt, random_target

TAPS = [0, 2]
BLOCK = 5


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Alpamayo:
    return random_target(tmp_path_factory.mktemp("vlm"), push=0.7)


Truth = dict[tuple[float, int], list[list[int]]]


@pytest.fixture(scope="module")
def truth(target: Alpamayo) -> Truth:
    """The target's own texts, by temperature and seed."""
    return {
        (temperature, seed): SpeculativeDecoder(target)
        .generate(random_prompt(target, seed=seed), **sampled(temperature, seed))
        .token_ids
        for temperature in (0.0, 0.7)
        for seed in range(3)
    }


def sampled(temperature: float, seed: int) -> dict[str, Any]:
    """Half of the sampled texts end within so many tokens."""
    options = {"temperature": temperature, "num_traj_samples": 2, "seed": seed}
    return options | {"max_new_tokens": 48, "trajectories": False}


def published(
    target: Alpamayo, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The keys of a Qwen3 config and the tensors of a random draft, with no mask embedding."""
    config = DraftConfig(
        hidden_size=target.hidden_size,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=48,
        vocab_size=target.vocab_size,
        block_size=BLOCK,
        context_len=FULL_CONTEXT,
        target_layer_ids=tuple(TAPS),
        num_target_layers=target.num_layers,
        mask_token_id=7,
    )
    tensors = DFlashDraft.random(config, 3).state_dict()
    del tensors["mask_embedding"]
    keys = to_json(config)
    for own in ("dflash_config", "target_layer_ids", "mask_token_id", "block_size", "tap_convention"):
        del keys[own]
    del keys["trained_embeddings"], keys["context_len"]
    return keys, {name: 3 * tensor.to(dtype) for name, tensor in tensors.items()}


def zlab_folder(target: Alpamayo, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    keys, tensors = published(target, dtype)
    inner = {"target_layer_ids": TAPS, "mask_token_id": 7}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(keys | {"block_size": BLOCK, "dflash_config": inner}))
    return folder


def flashdrive_folder(target: Alpamayo, folder: Path, *, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    keys, tensors = published(target)
    top = {"target_layer_ids": TAPS, "context_len": 6, "block_size": BLOCK}
    keys |= top | {"mask_token_id": target.vocab_size} | changes
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    mask = torch.randn(1, target.hidden_size, generator=torch.Generator().manual_seed(1))
    torch.save({"mask_embedding": mask}, folder / "mask_embedding.pt")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in keys.items() if k not in drop}))
    return folder


def assert_lossless(target: Alpamayo, draft: DFlashDraft, truth: Truth) -> None:
    drafted = 0
    for (temperature, seed), expected in truth.items():
        prompt = random_prompt(target, seed=seed)
        result = SpeculativeDecoder(target, draft).generate(prompt, **sampled(temperature, seed))
        assert result.token_ids == expected
        assert result.draft_failures == 0
        drafted += result.drafted
    assert drafted > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zlab_draft_decodes_losslessly(
    target: Alpamayo, truth: Truth, tmp_path: Path, dtype: torch.dtype
) -> None:
    draft = DFlashDraft.from_pretrained(zlab_folder(target, tmp_path / "draft", dtype))
    assert draft.context_len == FULL_CONTEXT
    assert_lossless(target, draft, truth)
    assert torch.equal(draft.mask_embedding, target.embedding[7])


class Watched:
    """Keeps what a draft is asked."""

    def __init__(self, draft: DFlashDraft) -> None:
        self.draft = draft
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.draft, name)

    def propose(self, context: Tensor, lengths: Tensor, anchors: Tensor) -> Any:
        self.seen.append((context.clone(), lengths.clone()))
        return self.draft.propose(context, lengths, anchors)


def test_a_zlab_draft_sees_every_state_before_the_anchor(target: Alpamayo, tmp_path: Path) -> None:
    draft = Watched(DFlashDraft.from_pretrained(zlab_folder(target, tmp_path / "draft")))
    prompt = random_prompt(target, seed=4)
    result = SpeculativeDecoder(target, draft).generate(prompt, temperature=0.0, trajectories=False)
    text = result.token_ids[0]
    verifier = Verifier(target, taps=TAPS, context_len=512, prompt_capacity=64)
    prefilled = verifier.prefill(prompt)
    verifier.begin(prefilled, 256)
    tail = verifier.cache.tail
    path: list[int] = []
    for token in text:
        path.append(tail.add(token, path[-1] if path else -1))
    verifier.rows(path)
    states, _ = verifier.cache.context([path])
    assert len(draft.seen) > 1
    for context, lengths in draft.seen:
        known = int(lengths[0])
        assert len(prompt) <= known < len(prompt) + len(text)
        assert context.shape[1] == known
        torch.testing.assert_close(context[0], states[0, :known], rtol=0, atol=1e-4)


def test_what_lies_beyond_a_flashdrive_context_changes_nothing(target: Alpamayo, tmp_path: Path) -> None:
    draft = DFlashDraft.from_pretrained(flashdrive_folder(target, tmp_path / "draft"))
    assert draft.context_len == 6
    watched = Watched(draft)
    SpeculativeDecoder(target, watched).generate(random_prompt(target), trajectories=False)
    assert {context.shape[1] for context, _ in watched.seen} == {6}


@pytest.mark.parametrize("drop", [(), ("architectures",), ("num_target_layers",)])
@pytest.mark.parametrize("extra_row", [0, 1])
def test_a_flashdrive_draft_decodes_losslessly(
    target: Alpamayo, truth: Truth, tmp_path: Path, drop: tuple[str, ...], extra_row: int
) -> None:
    folder = flashdrive_folder(
        target, tmp_path / "draft", drop=drop, vocab_size=target.vocab_size + extra_row
    )
    draft = DFlashDraft.from_pretrained(folder)
    expected = torch.load(folder / "mask_embedding.pt", weights_only=True)["mask_embedding"][0]
    assert torch.equal(draft.mask_embedding, expected)
    assert_lossless(target, draft, truth)


def test_an_imported_draft_is_written_in_our_layout_and_read_again(target: Alpamayo, tmp_path: Path) -> None:
    prompt = random_prompt(target)
    for index, folder in enumerate(
        (
            zlab_folder(target, tmp_path / "z"),
            flashdrive_folder(target, tmp_path / "f", drop=("num_target_layers",)),
        )
    ):
        draft = DFlashDraft.from_pretrained(folder)
        first = SpeculativeDecoder(target, draft).generate(prompt, temperature=0.0)
        draft.save_pretrained(tmp_path / f"ours{index}")
        again = DFlashDraft.from_pretrained(tmp_path / f"ours{index}")
        assert again.config == draft.config
        assert torch.equal(again.mask_embedding, draft.mask_embedding)
        second = SpeculativeDecoder(target, again).generate(prompt, temperature=0.0)
        assert (second.accepted, second.drafted) == (first.accepted, first.drafted)


def test_what_would_be_guessed_is_refused(target: Alpamayo, tmp_path: Path) -> None:
    folder = zlab_folder(target, tmp_path / "z")
    with pytest.raises(ValueError, match="bind it to that first"):
        DFlashDraft.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    path = folder / "config.json"
    keys = json.loads(path.read_text())
    path.write_text(json.dumps(keys | {"architectures": None}))
    with pytest.raises(ValueError, match="architectures is None"):
        DFlashDraft.from_pretrained(folder)
    outside = keys | {"dflash_config": {"target_layer_ids": TAPS, "mask_token_id": target.vocab_size}}
    path.write_text(json.dumps(outside))
    with pytest.raises(ValueError, match="missing mask_embedding"):
        DFlashDraft.from_pretrained(folder)
    high = flashdrive_folder(
        target, tmp_path / "f", drop=("num_target_layers",), target_layer_ids=[0, target.num_layers]
    )
    with pytest.raises(ValueError, match="this target has 3 layers"):
        SpeculativeDecoder(target, DFlashDraft.from_pretrained(high))
