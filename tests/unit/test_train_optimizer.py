from pathlib import Path

import pytest
import torch

from alpamayo_dflash.draft.config import DraftConfig
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.config import TrainConfig
from alpamayo_dflash.train.optimizer import make_optimizer

SHAPE = DraftConfig(
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=24,
    vocab_size=40,
    block_size=4,
    context_len=3,
    target_layer_ids=(0, 2),
    num_target_layers=3,
    mask_token_id=40,
    trained_embeddings=True,
    previous_head="gru",
    previous_size=6,
)
HAS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
MUON = TrainConfig.flat("", Path(), Path(), optimizer="muon", learning_rate=1e-2, weight_decay=0.1)


def with_gradients(seed=0):
    draft = DFlashDraft.random(SHAPE)
    generator = torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return draft


@HAS_MUON
def test_muon_takes_the_matrices_of_the_network_and_adamw_all_else():
    draft = with_gradients()
    draft.lm_head.requires_grad_(False)
    optimizer = make_optimizer(draft, MUON, 1)
    muon, adamw = optimizer.parts
    names = {parameter: name for name, parameter in draft.named_parameters()}
    matrices, others = (
        {names[parameter] for group in part.param_groups for parameter in group["params"]}
        for part in (muon, adamw)
    )
    assert matrices == {
        "fc.weight",
        *(
            f"layers.{layer}.{name}_proj.weight"
            for layer in range(2)
            for name in (*(f"self_attn.{way}" for way in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
        ),
    }
    assert others == set(names.values()) - matrices - {"lm_head.weight"}
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.pop("embed_tokens.weight") == pytest.approx(1e-3)
    assert set(rates.values()) == {1e-2}


@HAS_MUON
def test_a_step_of_muon_is_as_large_as_one_of_adamw_and_along_the_orthogonal_factor():
    draft, config = with_gradients(), MUON.changed(weight_decay=0.0)
    before = draft.layers[0].mlp.up_proj.weight.detach().clone()
    make_optimizer(draft, config, 1).step()
    moved = (before - draft.layers[0].mlp.up_proj.weight.detach()) / config.optimizer.learning_rate
    # AdamW's root mean square is about 0.2 (arXiv 2502.16982); of the first step's gradient G = U S V', only
    # U V' is left, but for Newton-Schulz's five rounds, which bring singular values to 0.7 to 1.2.
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)
    left, _, right = torch.linalg.svd(draft.layers[0].mlp.up_proj.weight.grad, full_matrices=False)
    inner = (left.T @ moved @ right.T) / (0.2 * 24**0.5)
    assert 0.6 < float(inner.diagonal().min()) <= float(inner.diagonal().max()) < 1.3
    assert float((inner - inner.diagonal().diag()).abs().max()) < 0.05


@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=HAS_MUON)])
def test_what_is_kept_has_the_shapes_that_are_told_and_can_be_put_back(kind):
    config = MUON.changed(optimizer=kind)
    draft, other = with_gradients(), with_gradients()
    optimizer, again = make_optimizer(draft, config, 1), make_optimizer(other, config, 1)
    optimizer.step()
    kept = {
        name: {key: value.clone() for key, value in optimizer.state_of(parameter).items()}
        for name, parameter in draft.named_parameters()
    }
    shapes = optimizer.state_shapes()
    for name, parameter in draft.named_parameters():
        assert {key: tuple(value.shape) for key, value in kept[name].items()} == shapes[parameter]
    other.load_state_dict(draft.state_dict())
    again.load_state({parameter: kept[name] for name, parameter in other.named_parameters()})
    optimizer.step()
    again.step()
    for one, two in zip(draft.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_torch_without_muon_is_told_what_it_needs(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"optimizer is muon, which torch .* install torch 2\.9 or later"):
        make_optimizer(with_gradients(), MUON, 1)
