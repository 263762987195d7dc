"""A load, a text and lossless texts; `make compat-quick` runs them again, an old transformers laid over."""

import json
import os

import pytest
import torch
import transformers

from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.evaluate.reference import greedy_tokens
from alpamayo_dflash.standins.validate import held_out
from tests.helpers import frozen_texts
from tests.helpers.proposers import Oracle


def test_the_version_that_was_asked_for_runs():
    wanted = os.environ.get("ALPAMAYO_TRANSFORMERS")
    if wanted is None:
        pytest.skip("no version was asked for")
    assert transformers.__version__ == wanted


@pytest.mark.parametrize("request_name", frozen_texts.REQUESTS)
def test_tiny_writes_its_frozen_texts(request_name):
    """Loaded, decoded with and without a draft, and greedily by transformers itself."""
    target = frozen_texts.tiny_target()
    ((window, _),) = held_out(1, seed=frozen_texts.WORLD_SEED)
    expected = json.loads(frozen_texts.FILE.read_text())["clips"][0]
    request, texts = frozen_texts.REQUESTS[request_name], expected[request_name]["token_ids"]
    assert window.clip_id == expected["clip_id"]
    prompt = target.prompt(window)
    draft = Oracle(target.vocab_size, 8, errors=0.25, texts=texts, prompt_length=len(prompt), context_len=512)
    for decoder in (SpeculativeDecoder(target), SpeculativeDecoder(target, draft)):
        result = decoder.generate(prompt, **request)
        assert result.token_ids == texts
        assert torch.isfinite(result.pred_xyz).all()
    assert result.accepted > 0
    if request["temperature"] == 0:
        assert greedy_tokens(target, prompt, max_new_tokens=128) == texts
