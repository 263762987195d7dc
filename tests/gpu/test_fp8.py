"""FP8 weights on a CUDA device: their plain form, and losslessness (run by hand: `pytest -m gpu`)."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from alpamayo_dflash.bench.config import BenchConfig
from alpamayo_dflash.bench.setup import Bench
from alpamayo_dflash.bench.widths import compare
from alpamayo_dflash.decode import verify
from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.forward import FusedModel, PlainModel, why_plain_text
from alpamayo_dflash.kernels import fp8
from alpamayo_dflash.standins.blueprint import RandomCheckpointConfig
from alpamayo_dflash.standins.untrained import noise_window, random_target
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.expert_fused import why_plain_expert
from alpamayo_dflash.target.formats import TargetFormat
from alpamayo_dflash.target.quantised import make_fp8
from alpamayo_dflash.target.vision import encode_images
from alpamayo_dflash.target.vision_fused import FusedVision, why_plain_vision
from alpamayo_dflash.target.weights import fused_linear, mlp_parts
from tests.helpers.proposers import Oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# Columns and inputs of R1: q with k and v, an MLP's down, vision's up and down, the expert's out and down.
SHAPES = [(6144, 4096), (4096, 12288), (4304, 1152), (1152, 4304), (2048, 2048), (2048, 8256)]
ROWS = [1, 8, 48, 3007]
# Of a product, from the exact one: bfloat16 rounds to 1.7e-3, and tensor cores add with few bits.
PRODUCT_TO = 5e-3
# Of a whole model: a value that a rounding before it moves to the next of e4m3 is off by a sixteenth.
MODEL_TO = 0.1
ALL = TargetFormat("fp8", "fp8", "fp8")


@pytest.fixture(params=[True, False], ids=["native", "by integers"])
def native(request, monkeypatch):
    """With the card's own e4m3, and as a card does that has none."""
    from alpamayo_dflash.kernels import fp8_triton

    if request.param and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no e4m3")
    monkeypatch.setattr(fp8_triton, "converts", lambda device: request.param)
    return request.param


def normal(*shape, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").bfloat16()


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def equal(found, expected):
    """To the bit, NaN included."""
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(found[1].nan_to_num(-1.0), expected[1].nan_to_num(-1.0))


@pytest.mark.parametrize("width", [2048, 4096, 4304, 12288])
def test_rows_are_cast_to_the_bit(native, width):
    from alpamayo_dflash.kernels import fp8_triton

    x = normal(67, width)
    x[1], x[2, 3], x[3, 5] = 0, float("nan"), float("inf")
    x[4] *= torch.logspace(-8, 0, width, device="cuda").bfloat16()
    x[5] *= 1e-25  # is lifted, so that what a quotient leaves is a normal number
    x[6] *= 1e-37
    x[7] *= 1e30
    x[8:] *= torch.logspace(-4, 4, 59, device="cuda").bfloat16()[:, None]
    found, expected = fp8_triton.cast_rows(x), fp8.cast_rows(x)
    assert torch.equal(found[1].nan_to_num(-1.0), expected[1].nan_to_num(-1.0))
    kept = [row for row in range(67) if row not in {2, 3}]  # what is not finite has no one code
    equal((found[0][kept], found[1][kept]), (expected[0][kept], expected[1][kept]))
    bits = fp8.cast_rows(x.cpu())
    equal((found[0][kept].cpu(), found[1][kept].cpu()), (bits[0][kept], bits[1][kept]))


def test_every_rounding_of_e4m3(native):
    from alpamayo_dflash.kernels import fp8_triton

    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cuda")
    values = codes.view(torch.bfloat16)
    values = values[values.float().abs() <= fp8.LARGEST]
    x = torch.cat((torch.tensor([448.0], device="cuda").bfloat16(), values)).unsqueeze(0)
    equal(fp8_triton.cast_rows(x), fp8.cast_rows(x))


def test_gated_rows_are_cast(native):
    from alpamayo_dflash.kernels import fp8_triton

    both = normal(48, 2 * 12288)
    gate, up = both.chunk(2, dim=-1)
    found, expected = fp8_triton.cast_gated(both), fp8.cast_rows(functional.silu(gate) * up)
    got, wanted = (values.float() * scales for values, scales in (found, expected))
    assert relative(got, wanted) < 2e-3  # the exponential's last bit may move a value to the next
    assert float((found[0].view(torch.uint8) == expected[0].view(torch.uint8)).float().mean()) > 0.99


def close(found, expected):
    """Rows in e4m3 whose values another order of sums, or another exponential, moves to the next at most."""
    values, wanted = (each.float() * scales for each, scales in (found, expected))
    assert relative(values, wanted) < 1e-2
    assert float((found[0].view(torch.uint8) == expected[0].view(torch.uint8)).float().mean()) > 0.97


def test_what_is_written_in_e4m3_is_the_cast_of_what_was_written_before(native):
    """GELU, layer norm, attention's merging in one kernel (7 stretches) or two (13), the gated product."""
    from alpamayo_dflash.kernels import attention, fp8_product, fp8_triton, rows, vision

    x, weight, shift = normal(2880, 4304), normal(4304, seed=1), normal(4304, seed=2)
    close(fp8_triton.cast_gelu(x), fp8.cast_rows(functional.gelu(x, approximate="tanh")))
    _, normed = vision.add_layer_norm(x, x, weight, shift, 1e-6)
    _, cast_norm = vision.add_layer_norm_cast(x, x, weight, shift, 1e-6)
    close((cast_norm.values, cast_norm.scales), fp8.cast_rows(normed))
    for stretches in (7, 13):
        out, tops = normal(stretches, 48, 32, 128).float(), normal(2, stretches, 48, 32, seed=1).float().abs()
        like = normal(48, 32, 128)
        merged = attention.merge(out, tops, like, cast=True)
        close((merged.values, merged.scales), fp8.cast_rows(attention.merge(out, tops, like)))
    if native:
        x, weight = fp8.cast_rows(normal(48, 4096)), fp8.cast_rows(normal(24576, 4096, seed=1))
        both = fp8.product(*x, *weight, torch.bfloat16)
        assert (
            relative(fp8_product.few_rows_gated_product(*x, *weight, torch.bfloat16), rows.gate(both)) < 1e-2
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_the_exact_one(native, shape, rows, biased):
    from alpamayo_dflash.kernels.fp8_fused import cast, product

    columns, inputs = shape
    x, weight = cast(normal(rows, inputs), None), fp8.cast_rows(normal(columns, inputs, seed=1))
    bias = normal(columns, seed=2) if biased else None
    found = product(*x, *weight, torch.bfloat16, bias)
    expected = fp8.product(*x, *weight, torch.float32, bias)
    distance = relative(found, expected)
    print(f"{rows} rows, {shape}: {distance:.2e}")
    assert distance < PRODUCT_TO


@pytest.mark.parametrize("rows", ROWS)
def test_a_row_depends_on_that_row_alone(native, rows):
    """At one number of rows."""
    from alpamayo_dflash.kernels.fp8_fused import cast, product

    weight, x = fp8.cast_rows(normal(6144, 4096, seed=1)), normal(rows, 4096)
    changed = normal(rows, 4096, seed=3)
    changed[rows // 2] = x[rows // 2]
    first, second = (product(*cast(each, None), *weight, torch.bfloat16) for each in (x, changed))
    assert torch.equal(first[rows // 2], second[rows // 2])
    assert rows == 1 or not torch.equal(first, second)


def test_a_static_scale(native):
    """ModelOpt's: the same scale for every row, with saturation."""
    holder = nn.Module()
    holder.down = nn.Linear(4096, 2048, bias=False, dtype=torch.bfloat16, device="cuda")
    from alpamayo_dflash.target.fp8 import FP8Linear

    layer = FP8Linear(4096, 2048, static=True, device="cuda")
    layer.fill(holder.down.weight.data)
    layer.input_scale.data.fill_(0.005)
    x = normal(48, 4096)
    assert relative(fused_linear((layer,))(x), layer(x)) < PRODUCT_TO


def test_an_mlp(native):
    from alpamayo_dflash.target.fp8 import FP8Linear

    gate, up, down = (
        FP8Linear(*shape, device="cuda") for shape in ((4096, 12288), (4096, 12288), (12288, 4096))
    )
    for seed, layer in enumerate((gate, up, down)):
        layer.fill(normal(*layer.weight.shape, seed=seed) * layer.weight.shape[1] ** -0.5)
    x = normal(48, 4096, seed=9)
    found = mlp_parts(fused_linear((gate, up)), fused_linear((down,)), x).sum(0)
    assert relative(found, down(functional.silu(gate(x)) * up(x))) < 0.03


@torch.inference_mode()
def test_the_fused_model_is_the_plain_one_within_rounding(native, tmp_path):
    """Prompt and rows in bfloat16, their products in FP8, at the medium size."""
    target = random_target(RandomCheckpointConfig("medium", 0, "cuda"), tmp_path)
    make_fp8(target, ALL)
    assert why_plain_text(target) is None
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
    distances = [relative(fused, plain) for fused, plain in zip(found["fused"], found["plain"], strict=True)]
    print(f"fused from plain: {distances}")
    assert max(distances) < MODEL_TO


@pytest.fixture(scope="module")
def tiny():
    parts = dict.fromkeys(("weights", "expert_weights", "vision_weights"), "fp8")
    return Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device="cuda", **parts)


def test_a_loaded_target_has_the_bits_of_the_cpus(tiny):
    parts = dict.fromkeys(("weights", "expert_weights", "vision_weights"), "fp8")
    on_cpu = Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, **parts).state_dict()
    for name, tensor in tiny.state_dict().items():
        bits = [each.cpu().reshape(-1).contiguous().view(torch.uint8) for each in (tensor, on_cpu[name])]
        assert torch.equal(*bits), name


@torch.inference_mode()
def test_the_fast_tower_is_the_plain_one_within_rounding(tiny):
    assert why_plain_vision(tiny) is None
    prompt = tiny.prompt(held_out(1, seed=3)[0][0]).to("cuda")
    pixels, visual = prompt.pixel_values.bfloat16(), tiny.vlm.model.visual
    found, plain = (
        FusedVision(visual)(pixels, prompt.image_grid_thw),
        encode_images(visual, pixels, prompt.image_grid_thw),
    )
    distance = relative(found.embeds, plain.embeds)
    print(f"features from plain: {distance}")
    assert distance < MODEL_TO


@pytest.mark.filterwarnings("ignore:this round could not be captured")  # an oracle looks at its anchors
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("samples", [1, 6])
def test_loops_agree_at_one_row_width(tiny, temperature, samples):
    assert why_plain_expert(tiny) is None
    config, options = DecodeConfig(row_width=48), {"temperature": temperature, "num_traj_samples": samples}
    plain = SpeculativeDecoder(tiny, None, config)
    for view, _ in held_out(12, seed=3):
        prompt = tiny.prompt(view)
        expected = plain.generate(prompt, seed=2, **options)
        known = {"texts": expected.token_ids, "prompt_length": len(prompt), "context_len": 512}
        draft = Oracle(tiny.vocab_size, 8, errors=0.25, **known)
        found = SpeculativeDecoder(tiny, draft, config).generate(prompt, seed=2, **options)
        assert found.token_ids == expected.token_ids
        assert bool(found.pred_xyz.isfinite().all())


@pytest.mark.filterwarnings("ignore:the target runs in its plain")
def test_the_plain_form_writes_what_the_cpu_writes():
    """In float32 the fast form does not run: the exact sums are the CPU's, and so are the texts."""
    targets = [
        Alpamayo.from_pretrained("tiny", dtype="float32", device=d, weights="fp8") for d in ("cpu", "cuda")
    ]
    torch.backends.cuda.matmul.allow_tf32 = False
    for view, _ in held_out(6, seed=3):
        texts = [
            SpeculativeDecoder(target).generate(view, temperature=0.0, trajectories=False).token_ids
            for target in targets
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("parts", ["text", "all"])
def test_400_texts_of_r1s_size_are_lossless_at_one_row_width(parts):
    """Random weights of R1's size: greedy and sampled at 200 prompts, all as the autoregressive loop's."""
    more = {"expert_weights": "fp8", "vision_weights": "fp8"} if parts == "all" else {}
    prompts = 200 if parts == "text" else 10
    config = BenchConfig(transformers=False, lossless_prompts=prompts, weights="fp8", **more)
    bench = Bench(config)
    assert bench.target.weight_formats["text"] == "fp8"
    assert why_plain_text(bench.target) is None and why_plain_vision(bench.target) is None
    found = compare(bench)
    print(found)
    one = found["one_row_width"]
    assert one["texts"] == 2 * prompts and one["equal"] == one["texts"]


def test_memory_is_what_the_formats_say(tmp_path):
    """At the medium size: a layer's weight takes half, and nothing else is kept of the old one."""
    target = random_target(RandomCheckpointConfig("medium", 0, "cuda"), tmp_path)
    layers = copy.copy(target.text_layers)
    before, weights = (
        torch.cuda.memory_allocated(),
        sum(p.numel() for p in layers.parameters() if p.ndim == 2),
    )
    make_fp8(target, TargetFormat(text="fp8"))
    freed = before - torch.cuda.memory_allocated()
    assert freed > 0.9 * weights  # the allocator keeps up to 1 MiB behind each tensor
