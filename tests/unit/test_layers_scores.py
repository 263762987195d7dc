import json
import re

import numpy as np
import pytest
import torch
from torch.nn import functional

from alpamayo_dflash.common.artefacts import write_json
from alpamayo_dflash.layers.aggregate import aggregate, pool, score_files, scores_path
from alpamayo_dflash.layers.config import LayersConfig
from alpamayo_dflash.layers.score import Scores, score_response
from alpamayo_dflash.report.page.plots import plot_scores

LAYERS, HIDDEN, VOCABULARY = 4, 6, 11


class HeadOnly:
    """The part of a target that early exit needs."""

    traj_ids = range(7, 10)
    vocab_size = VOCABULARY

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.head = torch.randn(VOCABULARY, HIDDEN, generator=generator)

    def final_norm(self, hidden):
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)

    def logits(self, hidden):
        return hidden @ self.head.T


def response(length, seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(LAYERS, length, HIDDEN, generator=generator)
    before = torch.randn(LAYERS, HIDDEN, generator=generator)
    allowed = [0, 1, 2, 3, 4, 5, 6, 10]
    ids = [allowed[i] for i in torch.randint(len(allowed), (length,), generator=generator).tolist()]
    return states, before, ids


def naive(target, responses):
    """Both scores, one token at a time."""
    losses, states = {layer: [] for layer in range(LAYERS)}, []
    for states_LTC, before_LC, ids in responses:
        for position, token in enumerate(ids):
            states.append(states_LTC[:, position])
            for layer in range(LAYERS):
                hidden = before_LC[layer] if position == 0 else states_LTC[layer, position - 1]
                logits = target.logits(target.final_norm(hidden))
                kept = [i for i in range(VOCABULARY) if i not in target.traj_ids]
                losses[layer].append(-functional.log_softmax(logits[kept], dim=0)[kept.index(token)].item())
    mean = torch.stack(states).mean(0)
    cosine = [functional.cosine_similarity(mean[layer], mean[-1], dim=0).item() for layer in range(LAYERS)]
    return cosine, {layer: float(np.mean(values)) for layer, values in losses.items()}


def scored(responses, candidates=range(LAYERS)):
    scores = Scores.empty(LAYERS, HIDDEN, list(candidates))
    for states, before, ids in responses:
        scores.add(score_response(HeadOnly(), states, before, ids, list(candidates)))
    return scores


def test_scores_equal_the_naive_computation():
    responses = [response(3, 1), response(1, 2), response(9, 3)]
    scores = scored(responses)
    cosine, losses = naive(HeadOnly(), responses)
    assert scores.tokens == 13
    assert scores.cosine() == pytest.approx(cosine, abs=1e-5)
    assert scores.cosine()[-1] == pytest.approx(1.0, abs=1e-12)
    assert scores.early_exit_ce() == pytest.approx(losses, abs=1e-5)


def test_a_long_response_weighs_more_than_a_short_one():
    short, long = response(1, 5), response(9, 6)
    mean_of_means = (scored([short]).early_exit_ce()[0] + scored([long]).early_exit_ce()[0]) / 2
    assert scored([short, long]).early_exit_ce()[0] != pytest.approx(mean_of_means, abs=1e-4)


def test_scores_survive_their_file_bit_for_bit():
    scores = scored([response(5, 7)])
    again = Scores.from_plain(json.loads(json.dumps(scores.to_plain())))
    assert torch.equal(again.state_sums, scores.state_sums)
    assert again.ce_sums == scores.ce_sums
    assert again.tokens == scores.tokens


def test_scores_of_other_candidates_do_not_mix():
    with pytest.raises(ValueError, match="cannot be pooled"):
        scored([response(2, 1)], [0, 1]).add(scored([response(2, 1)], [0, 2]))


SETTINGS = {"target": "abc", "seed": 0, "layers": [0, 1, 2, 3]}


def write_part(folder, rank, world_size, responses, settings=None):
    write_json(
        scores_path(folder, rank, world_size),
        {
            "settings": settings or SETTINGS,
            "scores": scored(responses).to_plain(),
            "clips": {"attempted": len(responses), "done": len(responses), "failed": 0},
            "failures": [],
        },
    )


RESPONSES = [response(length, seed) for seed, length in enumerate([2, 8, 1, 5, 5, 12])]


def test_pooled_ranks_equal_one_process(tmp_path):
    for rank in range(3):
        write_part(tmp_path / "three", rank, 3, RESPONSES[rank::3])
    write_part(tmp_path / "one", 0, 1, RESPONSES)
    found = [
        aggregate(LayersConfig(output_dir=tmp_path / name, aggregate=True, num_target_layers=2), None)
        for name in ("three", "one")
    ]
    assert found[0]["cosine"] == pytest.approx(found[1]["cosine"], rel=1e-12)
    assert found[0]["early_exit_ce"] == pytest.approx(found[1]["early_exit_ce"], rel=1e-12)
    assert found[0]["target_layers"] == found[1]["target_layers"]
    assert found[0]["tokens"] == found[1]["tokens"] == 33
    assert found[0]["clips"] == {"attempted": 6, "done": 6, "failed": 0}
    assert json.loads((tmp_path / "one" / "layers.json").read_text())["num_target_layers"] == LAYERS


def test_the_last_layer_is_a_candidate_only_when_named(tmp_path):
    write_part(tmp_path, 0, 1, RESPONSES)
    assert (
        3 not in aggregate(LayersConfig(tmp_path, aggregate=True, num_target_layers=3), None)["target_layers"]
    )
    named = LayersConfig(tmp_path, aggregate=True, layers="1,3", num_target_layers=2)
    assert aggregate(named, None)["target_layers"] == [1, 3]


def test_aggregate_refuses_a_missing_rank(tmp_path):
    write_part(tmp_path, 0, 3, RESPONSES[:2])
    write_part(tmp_path, 2, 3, RESPONSES[2:])
    with pytest.raises(ValueError, match=r"missing scores-rank1of3\.json"):
        aggregate(LayersConfig(tmp_path, aggregate=True), None)
    assert not (tmp_path / "layers.json").exists()


def test_aggregate_refuses_other_settings(tmp_path):
    write_part(tmp_path, 0, 2, RESPONSES[:2])
    write_part(tmp_path, 1, 2, RESPONSES[2:], {**SETTINGS, "seed": 1})
    with pytest.raises(ValueError, match="seed 1, not 0"):
        pool(score_files(tmp_path, 2))


def test_aggregate_asks_which_world_size(tmp_path):
    write_part(tmp_path, 0, 1, RESPONSES)
    write_part(tmp_path, 0, 2, RESPONSES)
    with pytest.raises(ValueError, match=re.escape("world sizes [1, 2]")):
        score_files(tmp_path, None)
    assert score_files(tmp_path, 1) == [scores_path(tmp_path, 0, 1)]


def test_aggregate_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="no scores-rank"):
        aggregate(LayersConfig(tmp_path, aggregate=True), None)
    scores_path(tmp_path, 0, 1).write_text("{}")
    with pytest.raises(ValueError, match="no settings; it must be an object"):
        aggregate(LayersConfig(tmp_path, aggregate=True), None)
    write_part(tmp_path, 0, 1, [])
    with pytest.raises(ValueError, match="no clip was scored"):
        aggregate(LayersConfig(tmp_path, aggregate=True), None)


@pytest.mark.parametrize(
    ("layers", "message"), [("1,4", "layer 4 is out of range: the target has layers 0 to 3")]
)
def test_aggregate_refuses_layers_out_of_range(tmp_path, layers, message):
    write_part(tmp_path, 0, 1, RESPONSES)
    with pytest.raises(ValueError, match=message):
        aggregate(LayersConfig(tmp_path, aggregate=True, layers=layers, num_target_layers=2), None)


def test_aggregate_refuses_layers_that_were_not_scored(tmp_path):
    write_json(
        scores_path(tmp_path, 0, 1),
        {
            "settings": SETTINGS,
            "scores": scored(RESPONSES, [0, 3]).to_plain(),
            "clips": {"attempted": 6, "done": 6, "failed": 0},
            "failures": [],
        },
    )
    with pytest.raises(ValueError, match=re.escape("layers [1] were not scored; scored are [0, 3]")):
        aggregate(LayersConfig(tmp_path, aggregate=True, layers="0,1", num_target_layers=2), None)


def test_plot_draws_a_picture(tmp_path):
    write_part(tmp_path, 0, 1, RESPONSES)
    content = aggregate(LayersConfig(tmp_path, aggregate=True, num_target_layers=2), None)
    plot_scores(content, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
