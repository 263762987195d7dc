"""`bench --train`: its counts, its formula, and the largest step."""

import pytest
import torch

from alpamayo_dflash.bench import train as bench_train
from alpamayo_dflash.bench.config import BenchConfig
from alpamayo_dflash.bench.figures import train_figures, train_operations

SMALL = {"target": "random:small", "device": "cpu", "draft_layers": "1", "context_len": 8}


def test_the_formula_counts_what_a_step_cannot_do_without():
    case = {"layer_weights": 1000, "fc_weights": 300, "head_weights": 700}
    step = {
        "blocks": 64,
        "block_rows": 512,
        "context_rows": 50,
        "label_rows": 400,
        "attention_operations": 12_345,
        "peak_bytes": 3 * 2**30,
        "step_ms": [5.0, 1.0, 2.0],
        "step_alone_ms": [1.0],
    }
    assert train_operations(case, step) == {
        "layers": 6 * 1000 * 512,
        "fc": 2 * 300 * 50,
        "head": 4 * 700 * 400,
        "attention": 12_345,
    }
    much = step | {"blocks": 128, "block_rows": 512e9}
    keys = train_figures({"cases": {"2_layers": case | {"steps": {"most": much, "small": step}}}})
    whole = 6 * 1000 * 512e9 + 2 * 300 * 50 + 4 * 700 * 400 + 12_345
    assert keys["mfu_2_layers"] == pytest.approx(whole / (989e12 * 2e-3), abs=1e-6)
    assert keys["label_rows_per_s_2_layers_64"] == 400 / 2e-3
    assert keys["peak_gib_2_layers_64"] == 3
    assert (keys["blocks_2_layers"], keys["blocks_2_layers_64"]) == (128, 64)


def test_synthetic_responses_have_the_statistics_of_real_ones():
    config = BenchConfig(train=True, most_blocks=1024, **SMALL)
    setup = bench_train.Setup(config, bench_train.Case("kl", 1, loss_type="kl"))
    lengths = setup.data.lengths
    assert set(lengths.tolist()) == set(range(14, 21))
    (batch,) = setup.batches(1024, 1)
    assert batch.labelled.shape == (1024, 7)
    # A response of n tokens has n − 1 anchors; the last ones have fewer labels.
    whole = int(((lengths - 1).cumsum(0) <= 1024).sum())
    per_response = [sum(min(7, n - 1 - at) for at in range(n - 1)) for n in lengths[:whole].tolist()]
    assert sum(per_response) <= len(batch.label_rows) < sum(per_response) + 7 * 20
    assert batch.teacher_logits.shape == (len(batch.label_rows), 128)
    assert int(batch.context_lengths.min()) == 8


def test_memory_that_does_not_reach_is_taken_for_a_step_too_large(monkeypatch):
    setup = bench_train.Setup(BenchConfig(train=True, repeats=2, **SMALL), bench_train.Case("ce", 1))
    step, sizes = setup.trainer.step, []

    def limited(batch):
        sizes.append(len(batch.anchors))
        if sizes[-1] > 256 or (sizes[-1] == 256 and sizes.count(256) > 3):  # a few steps of 256 fit
            raise torch.OutOfMemoryError
        return step(batch)

    monkeypatch.setattr(setup.trainer, "step", limited)
    assert setup.largest()["blocks"] == 128
    assert max(sizes) == 512
    monkeypatch.setattr(setup.trainer, "step", lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(ValueError, match="ce: a step of 64 blocks does not fit cpu"):
        setup.largest()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": "tiny"}, "target is 'tiny'; train takes random:r1-10b"),
        ({"window": True}, "train, window and beside are benchmarks of their own"),
        ({"most_blocks": 63}, "most_blocks is 63"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        BenchConfig(train=True, **SMALL | changes)
