"""On a CUDA device: the same noise as on the CPU, and losslessness there (run by hand: `pytest -m gpu`)."""

import pytest
import torch

from alpamayo_dflash.decode import DecodeConfig, SpeculativeDecoder
from alpamayo_dflash.decode.noise import flow_noise, token_noise
from alpamayo_dflash.draft import DFlashDraft, DraftConfig
from alpamayo_dflash.target import Alpamayo
from alpamayo_dflash.tiny import checkpoint_path
from alpamayo_dflash.tiny.validate import held_out

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SCENES = 12


def random_draft(target, block_size, seed=0):
    text = target.vlm.config.text_config
    config = DraftConfig(
        hidden_size=target.hidden_size,
        intermediate_size=text.intermediate_size,
        num_layers=2,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        vocab_size=target.vocab_size,
        block_size=block_size,
        context_len=16,
        target_layer_ids=(1, 2, 4, 6),
        num_target_layers=target.num_layers,
        mask_token_id=target.vocab_size,
    )
    return DFlashDraft.random(config, seed=seed).eval()


class Oracle:
    """Proposes what the target will write, with a wrong token now and then."""

    taps = (1, 2, 4, 6)
    context_len = 16

    def __init__(self, texts, block_size, vocab_size, wrong_every):
        self.texts, self.block_size, self.vocab_size, self.wrong_every = (
            texts,
            block_size,
            vocab_size,
            wrong_every,
        )
        self.asked = 0

    def bind(self, embedding, head, num_layers):
        self.device = embedding.device

    def propose(self, context, context_lengths, anchors):
        from types import SimpleNamespace

        logits = torch.zeros(len(anchors), self.block_size - 1, self.vocab_size, device=self.device)
        for row, anchor in enumerate(anchors.tolist()):
            text = next((t for t in self.texts if anchor in t), self.texts[0])
            start = text.index(anchor) + 1 if anchor in text else 0
            for step, token in enumerate(text[start : start + self.block_size - 1]):
                self.asked += 1
                wrong = self.asked % self.wrong_every == 0
                logits[row, step, 5 if wrong else token] = 1e4
        return SimpleNamespace(logits=logits, token_ids=None)


def _same_path(found, expected):
    """Equal but for rounding: products over other numbers of rows round differently on a GPU, and ten Euler
    steps through Fourier features of frequency 100 amplify that beyond a millimetre at 6.4 s."""
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.0)


@pytest.fixture(scope="module")
def target():
    return Alpamayo.from_pretrained(checkpoint_path(), dtype=torch.float32, device="cuda")


@pytest.fixture(scope="module")
def views():
    return [view for view, _ in held_out(SCENES, seed=3)]


def test_noise_is_that_of_the_cpu():
    for device_noise, cpu_noise in (
        (
            token_noise(7, "w@1", [0, 3], range(40), 155_697, device="cuda"),
            token_noise(7, "w@1", [0, 3], range(40), 155_697, device="cpu"),
        ),
        (flow_noise(7, "w@1", [0, 3], 64, device="cuda"), flow_noise(7, "w@1", [0, 3], 64, device="cpu")),
    ):
        # The words are the same integers; the logarithm's last bit may be rounded another way.
        torch.testing.assert_close(device_noise.cpu(), cpu_noise, atol=0.0, rtol=3e-7)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("block_size", [8, 16])
def test_speculative_is_autoregressive(target, views, temperature, samples, block_size):
    torch.backends.cuda.matmul.allow_tf32 = False
    options = {"temperature": temperature, "num_traj_samples": samples, "seed": 5}
    plain = SpeculativeDecoder(target)
    random = SpeculativeDecoder(target, random_draft(target, block_size).to("cuda"))
    for view in views:
        expected = plain.generate(view, **options)
        oracle = SpeculativeDecoder(target, Oracle(expected.token_ids, block_size, target.vocab_size, 5))
        for decoder in (random, oracle):
            found = decoder.generate(view, **options)
            assert found.token_ids == expected.token_ids
            _same_path(found.pred_xyz, expected.pred_xyz)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_the_gpu_writes_what_the_cpu_writes(target, views, temperature):
    on_cpu = SpeculativeDecoder(Alpamayo.from_pretrained(checkpoint_path(), dtype=torch.float32))
    on_gpu = SpeculativeDecoder(target)
    for view in views:
        options = {"temperature": temperature, "num_traj_samples": 2, "seed": 1}
        cpu, gpu = on_cpu.generate(view, **options), on_gpu.generate(view, **options)
        assert gpu.token_ids == cpu.token_ids
        _same_path(gpu.pred_xyz.cpu(), cpu.pred_xyz)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_bfloat16_loops_agree_at_one_row_width(views, temperature):
    target = Alpamayo.from_pretrained(checkpoint_path(), dtype=torch.bfloat16, device="cuda")
    config = DecodeConfig(row_width=16)
    plain = SpeculativeDecoder(target, None, config)
    for view in views:
        expected = plain.generate(view, temperature=temperature, seed=2)
        oracle = Oracle(expected.token_ids, 8, target.vocab_size, 4)
        found = SpeculativeDecoder(target, oracle, config).generate(view, temperature=temperature, seed=2)
        assert found.token_ids == expected.token_ids


@torch.inference_mode()
def test_the_fused_model_is_the_plain_one_within_rounding(tmp_path):
    """Prompt and rows in bfloat16, against the same arithmetic in float32."""
    from alpamayo_dflash.decode import verify
    from alpamayo_dflash.decode.passes import FusedModel, PlainModel
    from alpamayo_dflash.evaluate.target_size import noise_window
    from alpamayo_dflash.target.random_checkpoint import random_target
    from alpamayo_dflash.target.random_config import RandomCheckpointConfig

    target = random_target(RandomCheckpointConfig("medium", 0, "cuda"), tmp_path)
    prompt = target.prompt(noise_window(0)).to(target.device)
    found = {}
    for name, model in (("fused", FusedModel), ("plain", PlainModel)):
        verifier = verify.Verifier(target, taps=(0, 2), context_len=16, prompt_capacity=4096)
        verifier._model = model(target, verifier.cache)
        read = verifier.prefill(prompt)
        verifier.begin(read, 64)
        at = torch.arange(40, device="cuda")
        seen = torch.ones(40, 64, device="cuda").tril().to(torch.uint8)
        logits = verifier.run(at + 100, at, at, seen)[:, : target.vocab_size].float()
        found[name] = (read.logits_V, logits, verifier.cache.taps[: 16 + 40].float())
    for fused, plain in zip(found["fused"], found["plain"], strict=True):
        assert float((fused - plain).norm() / plain.norm()) < 0.03
