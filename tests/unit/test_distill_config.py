import re

import pytest

from alpamayo_dflash.distill.config import DistillConfig, response_bytes


def config(tmp_path, **values):
    base = {"model_path": "m", "cache_dir": tmp_path, "output_dir": tmp_path, "target_layers": "1,2"}
    return DistillConfig(**{**base, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context_len": 0}, "context_len is 0"),
        ({"top_k_logits": 0}, "top_k_logits is 0"),
        ({"samples_per_clip": 0}, "samples_per_clip is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 0.0}, "temperature is 0 with samples_per_clip above 1"),
        ({"target_layers": "2,1"}, "must be ascending"),
        ({"target_layers": None}, "one of target_layers and layers_file"),
        ({"layers_file": "layers.json"}, "one of target_layers and layers_file"),
        ({"world_size": 2}, "given together"),
        ({"start_chunk": 3, "end_chunk": 3}, "chunks from 3 to before 3 are none"),
        ({"start_chunk": -1}, "chunks from -1"),
        ({"num_chunks": 2, "end_chunk": 3}, "end_chunk or num_chunks, not both"),
        ({"chunks": "0-3", "num_chunks": 2}, "give chunks, or start_chunk"),
    ],
)
def test_bad_values_are_named(tmp_path, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, **values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"num_chunks": 2}, [0, 1]),
        ({"start_chunk": 1}, [1, 2, 7]),
        ({"start_chunk": 1, "end_chunk": 7}, [1, 2]),
        ({"start_chunk": 2, "num_chunks": 6}, [2, 7]),
        ({"end_chunk": 2}, [0, 1]),
    ],
)
def test_chunk_numbers(tmp_path, values, expected):
    assert config(tmp_path, **values).chunk_numbers([0, 1, 2, 7]) == expected


def test_greedy_alone_may_have_any_temperature(tmp_path):
    assert config(tmp_path, samples_per_clip=1, temperature=0.0).temperature == 0


def test_response_bytes_of_the_real_size():
    # 5 taps of 4096 in bf16, 64 prompt positions: the 2.6 MB a clip that the notes give
    prompt_only = response_bytes(
        num_tokens=0, context_len=64, num_taps=5, hidden_size=4096, top_k=128, dtype="bfloat16"
    )
    assert prompt_only == 2_621_440
    with_tokens = response_bytes(
        num_tokens=10, context_len=64, num_taps=5, hidden_size=4096, top_k=128, dtype="bfloat16"
    )
    assert with_tokens - prompt_only == 10 * (5 * 4096 * 2 + 128 * 8)
