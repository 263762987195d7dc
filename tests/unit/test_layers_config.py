import re
import subprocess
import sys

import pytest

from alpamayo_dflash.clips.lists import sample_clips
from alpamayo_dflash.common.options import check_layers, parse_layers
from alpamayo_dflash.common.ranks import own_device, share_of
from alpamayo_dflash.layers.config import LayersConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_target_layers": 0}, "num_target_layers is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"layers": "1,x"}, "'1,x' must be integers"),
        ({"layers": ""}, "must be integers"),
        ({"layers": "3,1"}, "must be ascending"),
        ({"layers": "-1,2"}, "must be ascending"),
        ({"rank": 1}, "given together"),
        ({"rank": 2, "world_size": 2}, "rank 2 is out of range"),
        ({"aggregate": False}, "scoring needs model_path and cache_dir"),
    ],
)
def test_bad_values_are_named(tmp_path, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LayersConfig(**{"output_dir": tmp_path, "aggregate": True, **values})


def test_parse_layers_takes_the_prototypes_list():
    assert parse_layers("0,16,20,24,28,30,31,32,34") == (0, 16, 20, 24, 28, 30, 31, 32, 34)
    assert parse_layers(None) is None


def test_layers_out_of_range_are_named():
    check_layers((0, 35), 36)
    with pytest.raises(ValueError, match="layer 36 is out of range: the target has layers 0 to 35"):
        check_layers((1, 36), 36)


def test_share_prefers_options_over_torchrun():
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert share_of(None, None, torchrun) == (3, 8)
    assert share_of(0, 2, torchrun) == (0, 2)
    assert share_of(None, None, {}) == (0, 1)
    assert own_device("cuda", torchrun) == "cuda:1"
    assert own_device("cuda:5", torchrun) == "cuda:5"
    assert own_device("cpu", torchrun) == "cpu"


def test_ranks_draw_disjoint_parts_of_one_sample():
    clips = [f"clip-{number:03d}" for number in range(100)]
    parts = [sample_clips(clips, 8, seed=3, rank=rank, world_size=3) for rank in range(3)]
    together = [clip for part in parts for clip in part]
    assert [len(part) for part in parts] == [8, 8, 8]
    assert len(set(together)) == 24
    assert set(together) == set(sample_clips(clips, 24, seed=3, rank=0, world_size=1))


def test_sample_is_random_seeded_and_takes_all_of_few():
    clips = [f"clip-{number:03d}" for number in range(50)]
    first = sample_clips(clips, 10, seed=0, rank=0, world_size=1)
    assert first == sample_clips(clips, 10, seed=0, rank=0, world_size=1)
    assert set(first) != set(sample_clips(clips, 10, seed=1, rank=0, world_size=1))
    assert set(first) != set(clips[:10])
    parts = [sample_clips(clips, 40, seed=0, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == clips


def test_configs_import_nothing_heavy():
    program = (
        "import sys, alpamayo_dflash.layers.config, alpamayo_dflash.distill.config\n"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'av', 'pyarrow', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_aggregating_takes_a_world_size_alone(tmp_path):
    assert LayersConfig(output_dir=tmp_path, aggregate=True, world_size=4).world_size == 4
