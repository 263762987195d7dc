"""The fast expert on a CUDA device against its plain form (run by hand: `pytest -m gpu`)."""

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

# The products and attention of float32 tensors in float32: Triton would round their factors to TF32.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

import pytest
import torch
from torch.nn import functional

from alpamayo_dflash.decode.cache import Cache
from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.noise import flow_noise
from alpamayo_dflash.decode.verify import Verifier
from alpamayo_dflash.standins import blueprint, untrained
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.expert_fused import FusedExpert, SampleTexts, why_plain_expert
from alpamayo_dflash.target.weights import share_groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SCENES = 192
WINDOWS = 32
TO = 1e-3  # of ten steps in float32, which amplify rounding: up to 5e-4 was seen on one H200
# The expert of R1 in width, four layers of it, behind a text model that has little but its cache.
R1_EXPERT = blueprint.TargetShape(
    pieces=1000,
    hidden=256,
    layers=4,
    heads=8,
    mlp=256,
    vision_depth=4,
    vision_hidden=32,
    vision_heads=2,
    vision_mlp=48,
    vision_positions=64,
    deepstack=(0, 1, 2),
    min_pixels=4096,
    max_pixels=8192,
)


def r1_expert(folder, dtype):
    """A random target of that shape, whose actions do not amplify rounding over the steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blueprint.SHAPES, "small", R1_EXPERT)
        target = untrained.random_target(blueprint.RandomCheckpointConfig("small", 0, "cuda"), folder)
    project = target.action_in_proj
    with torch.no_grad():
        frequencies = project.timestep_fourier_encoder.freqs.flatten().repeat(6)
        project.encoder.trunk[0].weight *= (0.3 / frequencies).to(project.norm.weight)
    target.to(dtype)
    share_groups(target.expert.layers)
    return target.requires_grad_(False)


def filled(target, capacity=3072):
    cache = Cache(target, prompt_capacity=capacity, num_taps=0, context_len=0)
    cache.grow(16 * 64)
    generator = torch.Generator("cuda").manual_seed(1)
    for tensor in (cache.keys, cache.values):
        tensor.normal_(generator=generator)
    return cache


def history():
    steps = torch.arange(-15.0, 1.0)
    xyz = torch.stack((steps * 0.8, 0.01 * steps, 0.1 * steps + 2), dim=-1)
    return xyz.cuda(), torch.eye(3).repeat(16, 1, 1).cuda()


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory):
    torch.backends.cuda.matmul.allow_tf32 = False
    target = r1_expert(tmp_path_factory.mktemp("float32"), torch.float32)
    cache = filled(target)
    return target, cache, FusedExpert(target, cache)


@torch.inference_mode()
@pytest.mark.parametrize("samples", [1, 2, 6, 16, 5, 20])
def test_the_fast_expert_is_the_plain_one_in_float32(in_float32, monkeypatch, samples):
    """Prompts of several lengths one after another, texts of different lengths, by one graph a bucket.

    Stretches are the plans'; their tiles are smaller, for float32 takes twice the room and no tensor cores.
    """
    from alpamayo_dflash.kernels import waypoints

    small = {"rows": 64, "keys": 32, "warps": 4, "registers": None}
    plans = {most: replace(plan, **small) for most, plan in waypoints.PLANS.items()}
    monkeypatch.setattr(waypoints, "PLANS", plans)
    target, cache, fast = in_float32
    generator = torch.Generator("cuda").manual_seed(samples)
    for length in (3007, 1, 64, 1000, 3072, 3007):
        cache.begin_prompt(length)
        paths = [list(range(51 * s, 51 * s + (7 * s + length) % 50)) for s in range(samples)]
        offsets = [len(path) + s % 2 for s, path in enumerate(paths)]
        noise = torch.randn(samples, target.n_waypoints, 2, generator=generator, device="cuda")
        texts = SampleTexts(paths, [length + offset - 40 for offset in offsets])
        action, xyz, rot = fast(fast.start(noise, *history()), texts)
        expected = target.denoise(noise, cache.prefix(paths, offsets, -40))
        assert relative(action, expected) < TO, length
        expected_xyz, expected_rot = target.trajectory(expected, *history())
        assert relative(xyz, expected_xyz) < TO, length
        assert relative(rot, expected_rot) < TO, length
    assert len(fast.kept) <= 6


@torch.inference_mode()
@pytest.mark.parametrize("samples", [1, 6, 16])
def test_in_bfloat16_actions_are_as_near_as_the_plain_ones(tmp_path, samples):
    """At R1's widths, from a float32 reference on the same weights, keys and values; mean over windows."""
    torch.backends.cuda.matmul.allow_tf32 = False
    target = r1_expert(tmp_path, torch.bfloat16)
    assert why_plain_expert(target) is None
    exact, cache = copy.deepcopy(target).float(), filled(target)
    expert, away = FusedExpert(target, cache), {"fast": [], "plain": []}
    generator = torch.Generator("cuda").manual_seed(samples)
    for window in range(WINDOWS):
        length = 3007 - 31 * window
        cache.begin_prompt(length)
        paths = [list(range(60 * s, 60 * s + 14 + (s + window) % 20)) for s in range(samples)]
        offsets = [len(path) for path in paths]
        noise = torch.randn(samples, target.n_waypoints, 2, generator=generator, device="cuda")
        prefix = cache.prefix(paths, offsets, 0)
        wide = type(prefix)(prefix.keys.float(), prefix.values.float(), prefix.lengths, prefix.positions)
        texts = SampleTexts(paths, [length + offset for offset in offsets])
        expected = exact.denoise(noise, wide)
        found = {
            "plain": target.denoise(noise, prefix),
            "fast": expert(expert.start(noise, *history()), texts)[0],
        }
        for name, distances in away.items():
            distances.append(relative(found[name], expected))
    means = {name: sum(distances) / len(distances) for name, distances in away.items()}
    print(f"{samples} samples: relative distance from float32 over {WINDOWS} windows: {means}")
    assert means["fast"] <= 1.05 * means["plain"]


@pytest.fixture(scope="module")
def views():
    return [view for view, _ in held_out(SCENES, seed=3)]


@torch.inference_mode()
def test_in_bfloat16_windows_are_as_near_as_by_the_plain_form(views):
    """The shipped target, fixed tokens: way-points' distance from a float32 reference, mean over windows."""
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = Alpamayo.from_pretrained("tiny", dtype=torch.float32, device="cuda")
    target = Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device="cuda")
    writer = SpeculativeDecoder(exact)
    verifiers = [Verifier(each, prompt_capacity=4096) for each in (exact, target)]
    assert why_plain_expert(target) is None
    fast, samples, away = None, 6, {"fast": [], "plain": []}
    for view in views:
        ids = writer.generate(view, num_traj_samples=samples, seed=4, trajectories=False).token_ids
        prompt = target.prompt(view)
        noise = flow_noise(4, prompt.key, range(samples), target.n_waypoints, device="cuda")
        found = {}
        for name, verifier in zip(("exact", "plain"), verifiers, strict=True):
            read = verifier.prefill(prompt)
            forced = verifier.force(read, ids)
            offsets = [len(text) for text in ids]
            prefix = verifier.cache.prefix(forced.paths, offsets, prompt.rope_delta)
            past = read.prompt.ego_history_xyz.cuda(), read.prompt.ego_history_rot.cuda()
            found[name] = verifier.target.trajectory(verifier.target.denoise(noise, prefix), *past)[0]
        fast = fast or FusedExpert(target, verifiers[1].cache)
        first = len(prompt.input_ids) + prompt.rope_delta
        texts = SampleTexts(forced.paths, [first + offset for offset in offsets])
        found["fast"] = fast(fast.start(noise, *past), texts)[1]
        for name, distances in away.items():
            distances.append(float((found[name] - found["exact"]).norm(dim=-1).mean()))
    means = {name: sum(distances) / len(distances) for name, distances in away.items()}
    print(f"metres from float32 over {len(views)} windows: {means}")
    assert means["fast"] <= 1.05 * means["plain"]


def test_a_poisoned_window_is_an_error_and_leaves_nothing_behind(views):
    target = Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device="cuda")
    decoder, options = SpeculativeDecoder(target), {"num_traj_samples": 3, "seed": 2}
    good = decoder.generate(views[0], **options)
    noise = torch.randn(3, target.n_waypoints, 2)
    noise[1, 5, 0] = float("nan")
    with pytest.raises(ValueError, match="sample 1"):
        decoder.generate(views[0], action_noise=noise, **options)
    weight = target.expert.layers[1].mlp.down_proj.weight
    kept = weight[3].clone()
    with torch.no_grad():
        weight[3] = float("nan")
    with pytest.raises(ValueError, match="sample 0: the trajectory is not finite"):
        decoder.generate(views[0], **options)
    with torch.no_grad():
        weight[3] = kept
    prompt = target.prompt(views[1])
    past = prompt.ego_history_xyz.clone()
    past[2, 0] = float("nan")
    prompt = replace(prompt, ego_history_xyz=past)
    with pytest.raises(ValueError, match="history"):
        decoder.generate(prompt, **options)
    again = decoder.generate(views[0], **options)
    assert again.token_ids == good.token_ids
    assert torch.equal(again.pred_xyz, good.pred_xyz) and torch.equal(again.pred_rot, good.pred_rot)
    assert list(decoder._trajectories._fused[1].kept) == [3]


def test_threads(views):
    """Decoders over one target capture and replay side by side; callers of one wait for each other."""
    target = Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device="cuda")
    requests = [{"seed": seed, "num_traj_samples": (1, 6, 2, 1)[seed]} for seed in range(4)]

    def paths(decoder):
        pairs = zip(views[: len(requests)], requests, strict=True)
        return [decoder.generate(view, **each) for view, each in pairs]

    def new():
        return SpeculativeDecoder(target, None, DecodeConfig(row_width=8))

    right = paths(new())
    one = new()
    for decoders in ([new(), new(), new()], [one, one, one]):
        with ThreadPoolExecutor(3) as pool:
            for results in pool.map(paths, decoders):
                for found, expected in zip(results, right, strict=True):
                    assert found.token_ids == expected.token_ids
                    assert torch.equal(found.pred_xyz, expected.pred_xyz)


@torch.inference_mode()
@pytest.mark.parametrize("samples", [1, 2, 3, 4, 6, 8, 12, 16])
def test_way_points_attention_at_r1s_size(samples):
    from alpamayo_dflash.kernels.waypoints import attend_waypoints

    generator = torch.Generator("cuda").manual_seed(samples)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    count, kv_heads, length, slots = 64, 8, 3007, 16 * 64
    q = normal(samples * count, 16, 128)
    cached = normal(length + slots, kv_heads, 128), normal(length + slots, kv_heads, 128)
    own = normal(samples * count, kv_heads, 128), normal(samples * count, kv_heads, 128)
    lengths = torch.arange(samples, device="cuda", dtype=torch.int32) * 5 % 64
    table = torch.arange(64, device="cuda", dtype=torch.int32) + 64 * torch.arange(
        samples, device="cuda", dtype=torch.int32
    ).unsqueeze(1)
    got = attend_waypoints(q, cached, own, torch.tensor([length], device="cuda"), lengths, table)
    for sample in range(samples):
        rows = slice(sample * count, (sample + 1) * count)
        at = torch.cat((torch.arange(length, device="cuda"), length + table[sample, : int(lengths[sample])]))
        keys, values = (torch.cat((c[at], o[rows])).float() for c, o in zip(cached, own, strict=True))
        expected = functional.scaled_dot_product_attention(
            *(each.transpose(0, 1) for each in (q[rows].float(), keys, values)), enable_gqa=True
        ).transpose(0, 1)
        assert relative(got[rows].view_as(expected), expected) < 0.01


@torch.inference_mode()
@pytest.mark.parametrize("rows", [64, 128, 192, 384, 1024])
@pytest.mark.parametrize(
    "columns, inner, gated", [(4096, 2048, 0), (2048, 2048, 0), (2048, 8256, 0), (16512, 2048, 1)]
)
def test_products_at_the_experts_widths(rows, columns, inner, gated):
    from alpamayo_dflash.kernels.product import gated_product, whole_product

    x = torch.randn(rows, inner, device="cuda").bfloat16()
    weight = (torch.randn(columns, inner, device="cuda") / inner**0.5).bfloat16()
    expected = x.float() @ weight.float().T
    if gated:
        gate, up = expected.chunk(2, dim=-1)
        assert relative(gated_product(x, weight), functional.silu(gate) * up) < 0.01
    else:
        assert relative(whole_product(x, weight), expected) < 0.01
