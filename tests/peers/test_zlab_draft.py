"""Our draft's numbers beside those of z-lab's own package, `dflash` 0.1.0.

It pins its dependencies exactly, so it lives in an environment of its own: `pip install --no-deps
dflash==0.1.0` beside this package's. Without it these tests are skipped.
"""

import json
from pathlib import Path

import pytest
import torch

from alpamayo_dflash import DFlashDraft
from alpamayo_dflash.draft.config import FULL_CONTEXT, DraftConfig

dflash = pytest.importorskip("dflash", reason="the package dflash 0.1.0 is not installed")

SHAPE = DraftConfig(
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=48,
    vocab_size=60,
    block_size=6,
    context_len=FULL_CONTEXT,
    target_layer_ids=(0, 2, 3),
    num_target_layers=5,
    mask_token_id=11,
)


@torch.no_grad()
def test_blocks_are_those_of_their_package_as_the_text_grows(tmp_path: Path) -> None:
    ours = DFlashDraft.random(SHAPE, 1)
    generator = torch.Generator().manual_seed(2)
    embedding, head = (torch.randn(60, 32, generator=generator) for _ in range(2))
    ours.bind(embedding, head, 5)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
        ours.mask_embedding.copy_(embedding[11])
    ours.save_pretrained(tmp_path / "draft")
    theirs = dflash.DFlashDraftModel.from_pretrained(tmp_path / "draft", dtype=torch.float32).eval()
    assert (
        theirs.target_layer_ids
        == json.loads((tmp_path / "draft/config.json").read_text())["target_layer_ids"]
    )
    from transformers import DynamicCache

    states = torch.randn(1, 40, SHAPE.feature_size, generator=generator)
    tokens = torch.randint(0, 60, (40,), generator=generator)
    positions = torch.arange(60)[None]
    cache, cached = DynamicCache(), 0
    for anchor in (17, 18, 21, 27, 33):  # their loop: new states go into the cache, blocks are cut off it
        block = torch.full((1, 6), 11)
        block[0, 0] = tokens[anchor]
        hidden = theirs(
            position_ids=positions[:, cached : anchor + 6],
            noise_embedding=embedding[block],
            target_hidden=states[:, cached:anchor],
            past_key_values=cache,
            use_cache=True,
        )
        cache.crop(-6)
        cached = anchor
        expected = hidden[0, 1:] @ head.T
        found = ours.propose(states[:, :anchor], torch.tensor([anchor]), tokens[anchor : anchor + 1]).logits[
            0
        ]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
