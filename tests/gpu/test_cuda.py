"""On a CUDA device: the same noise as on the CPU, and losslessness there (run by hand: `pytest -m gpu`)."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from alpamayo_dflash.decode.config import DecodeConfig, Sampling
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.noise import flow_noise, token_noise
from alpamayo_dflash.decode.sampling import Chooser
from alpamayo_dflash.draft.config import FULL_CONTEXT, DraftConfig
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SCENES = 12


def random_draft(target, block_size, seed=0, context_len=16):
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
        context_len=context_len,
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
    return Alpamayo.from_pretrained("tiny", dtype=torch.float32, device="cuda")


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


@pytest.mark.filterwarnings("ignore:the target runs in its plain")
@pytest.mark.filterwarnings("ignore:this round could not be captured")  # an oracle looks at its anchors
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


@pytest.mark.filterwarnings("ignore:the target runs in its plain")
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_the_gpu_writes_what_the_cpu_writes(target, views, temperature):
    on_cpu = SpeculativeDecoder(Alpamayo.from_pretrained("tiny", dtype=torch.float32))
    on_gpu = SpeculativeDecoder(target)
    for view in views:
        options = {"temperature": temperature, "num_traj_samples": 2, "seed": 1}
        cpu, gpu = on_cpu.generate(view, **options), on_gpu.generate(view, **options)
        assert gpu.token_ids == cpu.token_ids
        _same_path(gpu.pred_xyz.cpu(), cpu.pred_xyz)


@pytest.mark.filterwarnings("ignore:this round could not be captured")
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_bfloat16_loops_agree_at_one_row_width(views, temperature):
    target = Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device="cuda")
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
    from alpamayo_dflash.decode.forward import FusedModel, PlainModel
    from alpamayo_dflash.standins.blueprint import RandomCheckpointConfig
    from alpamayo_dflash.standins.untrained import noise_window, random_target

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


def prompts_of_lengths(target, view, *lengths):
    """The view's prompt with text added to its front, which moves everything behind."""
    from dataclasses import replace

    from alpamayo_dflash.target.prompt import mrope_positions

    base = target.prompt(view)
    prompts = []
    for index, more in enumerate(lengths):
        ids = torch.cat((torch.arange(more) % 50 + 20, base.input_ids.cpu()))
        positions, delta = mrope_positions(
            ids,
            base.image_grid_thw.cpu(),
            image_pad=target.special.image_pad,
            merge=target.patch_shape.merge,
        )
        prompts.append(
            replace(base, input_ids=ids, position_ids=positions, rope_delta=delta, key=f"length{index}")
        )
    return prompts


@pytest.mark.filterwarnings("ignore:the target runs in its plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_round_serves_prompts_of_any_length(views, dtype):
    """In both forms of the target: fresh decoders, which capture for that prompt, write the same."""
    target = Alpamayo.from_pretrained("tiny", dtype=dtype, device="cuda")
    options = {"temperature": 0.6, "seed": 4, "trajectories": False, "max_new_tokens": 24}
    draft = random_draft(target, 8).to("cuda")
    kept = [SpeculativeDecoder(target, d, DecodeConfig(row_width=8)) for d in (None, draft)]
    for prompt in prompts_of_lengths(target, views[0], 40, 0, 90):
        fresh = SpeculativeDecoder(target, None, DecodeConfig(row_width=8))
        expected = fresh.generate(prompt, **options).token_ids
        for decoder in kept:
            assert decoder.generate(prompt, **options).token_ids == expected
    for decoder in kept:
        [captured] = decoder.device_rounds.kept.values()
        assert captured._graph is not None


def test_a_round_that_cannot_be_captured_says_so(views):
    target = Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device="cuda")
    config = DecodeConfig(row_width=8)
    expected = SpeculativeDecoder(target, None, config).generate(views[0], seed=2).token_ids
    oracle = SpeculativeDecoder(target, Oracle(expected, 8, target.vocab_size, 4), config)
    with pytest.warns(UserWarning, match="could not be captured"):
        assert oracle.generate(views[0], seed=2).token_ids == expected


@pytest.mark.parametrize("context_len", [16, FULL_CONTEXT])
def test_a_draft_of_nan_is_dropped_and_leaves_nothing_behind(views, context_len):
    """In bfloat16, where the draft's fast form runs, captured."""
    target = Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device="cuda")
    config = DecodeConfig(row_width=8)
    options = {"seed": 2, "trajectories": False}
    expected = SpeculativeDecoder(target, None, config).generate(views[0], **options).token_ids
    draft = random_draft(target, 8, context_len=context_len).to("cuda")
    decoder = SpeculativeDecoder(target, draft, config)
    good = decoder.generate(views[0], **options)
    assert good.token_ids == expected and not good.draft_failures and good.drafted
    kept = draft.fc.weight[3].clone()
    with torch.no_grad():
        draft.fc.weight[3] = float("nan")
    bad = decoder.generate(views[0], **options)
    assert bad.token_ids == expected
    assert bad.draft_failures > 0 and not bad.drafted
    with torch.no_grad():
        draft.fc.weight[3] = kept
    again = decoder.generate(views[0], **options)
    assert (again.token_ids, again.draft_failures, again.drafted) == (expected, 0, good.drafted)
    [captured] = decoder.device_rounds.kept.values()
    assert captured._graph is not None


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.6), Sampling(1.0, 0.02), Sampling(1.0, 1.0)])
@pytest.mark.parametrize("reduced", [False, True])
def test_the_choice_by_kernels_is_the_plain_one(sampling, reduced):
    rows, vocab = 9, 155_697
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randperm(vocab, generator=generator, device="cuda")[:4099].sort().values if reduced else None
    columns = vocab if ids is None else len(ids)
    logits = 2 * torch.randn(rows, columns + 15, generator=generator, device="cuda").bfloat16()
    logits[6, 5], logits[7], logits[8, columns - 1] = float("nan"), float("nan"), float("inf")
    keys = torch.randint(0, 2**32, (rows, 2), generator=generator, device="cuda")
    places = torch.arange(rows, device="cuda")
    fast, plain = (
        Chooser(
            rows,
            columns,
            masked=range(151_669, 155_669),
            token_ids=ids,
            sampling=sampling,
            device=torch.device("cuda"),
            kernels=kernels,
        )
        for kernels in (True, False)
    )
    got, expected = fast(logits, keys, places), plain(logits, keys, places)
    assert got.finite.tolist() == [True] * 6 + [False] * 3
    assert ((got.columns >= 0) & (got.columns < columns)).all()
    sure = got.settled & got.finite
    assert torch.equal(got.columns[sure], expected.columns[sure])
    if sampling.top_p > 0.5:
        assert sure[:6].all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_target_on_the_second_gpu(views):
    expected = None
    for device in ("cuda:0", "cuda:1"):
        target = Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device=device)
        decoder = SpeculativeDecoder(target, random_draft(target, 8), DecodeConfig(row_width=8))
        got = decoder.generate(views[0], seed=2)
        expected = expected or got.token_ids
        assert got.token_ids == expected
        [captured] = decoder.device_rounds.kept.values()
        assert captured._graph is not None
        assert torch.cuda.current_device() == 0


def test_threads(views):
    """Decoders over one target capture and replay side by side; callers of one wait for each other."""
    target = Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device="cuda")
    config = DecodeConfig(row_width=8)
    options = [{"seed": seed, "max_new_tokens": 24 + 64 * (seed % 2)} for seed in range(4)]

    def texts(decoder):
        return [
            decoder.generate(view, **each).token_ids
            for view, each in zip(views[: len(options)], options, strict=True)
        ]

    def new():
        return SpeculativeDecoder(target, random_draft(target, 8), config)

    right = texts(SpeculativeDecoder(target, None, config))
    one = new()
    for decoders in ([new(), new(), new()], [one, one, one]):
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(texts, decoders)) == [right] * 3


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 7, 16, 48, 64, 96, 256])
def test_attention_and_products_are_the_plain_ones(rows):
    from torch.nn import functional

    from alpamayo_dflash.kernels.attention import attend
    from alpamayo_dflash.kernels.product import (
        few_rows_gated_product,
        few_rows_product,
        gated_product,
        whole_product,
    )

    generator = torch.Generator("cuda").manual_seed(rows)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    heads, kv_heads, dim, slots = 32, 8, 128, max(64, rows)
    for length in (1, 1001, 3008):
        q, keys, values = (
            normal(n, h, dim) for n, h in ((rows, heads), *2 * [(length + slots + 1, kv_heads)])
        )
        seen = torch.ones(rows, slots, device="cuda").tril()
        mask = torch.cat((torch.ones(rows, length, device="cuda"), seen), dim=1).bool()
        got = attend(q, keys, values, torch.tensor([length], device="cuda"), seen.to(torch.uint8))
        end = length + slots
        expected = functional.scaled_dot_product_attention(
            *(each.transpose(0, 1).float() for each in (q, keys[:end], values[:end])),
            attn_mask=mask,
            enable_gqa=True,
        ).transpose(0, 1)
        assert _relative(got.view_as(q), expected) < 0.01
    x, weight = normal(rows, 4096), normal(6144, 4096) / 64
    for found in (whole_product(x, weight), few_rows_product(x, weight).float().sum(0)):
        assert _relative(found, x.float() @ weight.float().T) < 0.01
    gate, up = (x.float() @ weight.float().T).chunk(2, dim=-1)
    for found in (gated_product(x, weight), few_rows_gated_product(x, weight)):
        assert _relative(found, functional.silu(gate) * up) < 0.01


def _relative(found, expected):
    return float((found.float() - expected).norm() / expected.norm())
