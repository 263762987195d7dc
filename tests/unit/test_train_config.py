from functools import partial
from pathlib import Path

import pytest

from alpamayo_dflash.common.artefacts import to_plain
from alpamayo_dflash.train.config import DEFAULTS, TrainConfig, decay_gamma, flattened


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"prefix_weight_gamma": -1.0}, "prefix_weight_gamma is -1"),
        ({"ce_weight_end": 1.5}, "ce_weight_end is 1.5"),
        ({"block_size": 1}, "block_size is 1"),
        ({"held_out": 0.0}, "held_out is 0"),
        ({"full_vocab": True}, "init_from"),
        ({"draft_vocab_size": -1}, "draft_vocab_size is -1"),
        ({"draft_vocab_size": 9, "train_embeddings": True}, "train_embeddings has its own"),
        ({"target_layers": "3,1"}, "ascending"),
        ({"loss_type": "ce+mse"}, r"loss_type is 'ce\+mse'; it must be one of ce, kl, tv, lk, or several"),
    ],
)
def test_a_wrong_value_is_named(change, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig.flat("target", Path("data"), Path("out"), **change)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, True),
        ({"loss_type": "ce"}, False),
        ({"loss_type": "ce", "labels": "argmax"}, True),
        ({"loss_type": "ce+lk"}, True),
        ({"loss_type": "tv"}, True),
    ],
)
def test_the_stored_logits_are_read_where_something_needs_them(changes, needed):
    assert TrainConfig.flat("target", Path("data"), Path("out"), **changes).loss.needs_teacher is needed


def test_options_go_by_name_alone_and_stand_by_component():
    config = TrainConfig.flat("target", Path("data"), Path("out"), learning_rate=1e-3, loss_type="kl")
    assert (config.optimizer.learning_rate, config.loss.loss_type) == (1e-3, "kl")
    other = config.changed(batch_size=7, loss_type="ce")
    assert other == TrainConfig.flat(
        "target", Path("data"), Path("out"), learning_rate=1e-3, loss_type="ce", batch_size=7
    )
    assert config.schedule.batch_size == 64
    plain = flattened(to_plain(other))
    assert plain == DEFAULTS | plain and plain.keys() == DEFAULTS.keys() | {
        *("target_model", "data_dir", "output_dir")
    }
    assert (plain["batch_size"], plain["output_dir"]) == (7, "out")
    for make in (partial(TrainConfig.flat, "target", Path("data"), Path("out")), config.changed):
        with pytest.raises(TypeError, match="no option batchsize, rate"):
            make(rate=1, batchsize=2, seed=3)


@pytest.mark.parametrize(
    ("block_size", "given", "gamma"), [(8, None, 4), (10, None, 5), (16, None, 7), (4, None, 2), (8, 3.0, 3)]
)
def test_gamma_follows_the_block_size_unless_given(block_size, given, gamma):
    assert decay_gamma(block_size, given) == gamma
