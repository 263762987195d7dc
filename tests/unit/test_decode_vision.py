"""Reading a prompt's images: features of images seen before are the tower's own, bit for bit."""

from dataclasses import replace

import pytest
import torch

from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.vision import VisionReader, vision_tower
from alpamayo_dflash.target.vision import encode_images
from tests.helpers.random_target import random_prompt, random_target

GRIDS = {16: (4, 4), 24: (4, 6)}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("vision")).requires_grad_(False)


@pytest.fixture(scope="module")
def prompt(target):
    return random_prompt(target)


def image(seed, patches=16):
    return torch.randn(patches, 1536, generator=torch.Generator().manual_seed(seed))


def showing(prompt, images):
    """The prompt with other images; its ids, which a reader does not look at, stay."""
    grid = torch.tensor([(1, *GRIDS[len(each)]) for each in images])
    return replace(prompt, pixel_values=torch.cat(images), image_grid_thw=grid)


def image_bytes(target, images):
    """What so many images of 16 patches take: pixels, and a plane more than deepstack's one level."""
    return images * 4 * (16 * 1536 + 4 * 2 * target.hidden_size)


def check(reader, target, prompt, images, hits):
    """The features are the tower's, and so many images are known."""
    before = reader.hits, reader.misses
    asked = showing(prompt, images)
    got = reader(asked)
    expected = encode_images(target.vlm.model.visual, asked.pixel_values, asked.image_grid_thw)
    assert torch.equal(got.embeds, expected.embeds) and torch.equal(got.deepstack, expected.deepstack)
    assert (reader.hits - before[0], reader.misses - before[1]) == (hits, len(images) - hits)


def test_twelve_of_sixteen_images_seen_before(target, prompt):
    reader = VisionReader(target, reuse_bytes=image_bytes(target, 32))
    images = [image(seed) for seed in range(24)]
    check(reader, target, prompt, images[:16], hits=0)
    check(reader, target, prompt, images[4:20], hits=12)
    check(reader, target, prompt, images[4:20], hits=16)
    check(reader, target, prompt, [images[21], *images[3:0:-1], images[22]], hits=3)
    assert len(reader._seen) == 22


def test_without_memory_every_image_goes_through_the_tower(target, prompt):
    reader = VisionReader(target)
    for _ in range(2):
        check(reader, target, prompt, [image(0), image(0)], hits=0)
    reader.forget()


@pytest.mark.parametrize("sampled", [True, False])
def test_one_value_that_differs_makes_another_image(target, prompt, sampled):
    """By a level of 255, in a value that is sampled and in one that is not."""
    from alpamayo_dflash.decode import vision

    columns = vision._columns(4 * 1536, 4, torch.device("cpu")).tolist()
    column = columns[3] if sampled else next(n for n in range(1536) if n not in columns)
    reader = VisionReader(target, reuse_bytes=image_bytes(target, 4))
    one, other = image(0), image(0)
    other.view(4, -1)[2, column] += 2 / 255
    check(reader, target, prompt, [one], hits=0)
    check(reader, target, prompt, [other], hits=0)
    check(reader, target, prompt, [one], hits=1 if sampled else 0)
    check(reader, target, prompt, [one, other, one], hits=3 if sampled else 2)


def test_zeros_of_two_signs_are_two_values(target, prompt):
    reader = VisionReader(target, reuse_bytes=image_bytes(target, 4))
    one = image(0)
    one[0, 0] = 0.0
    check(reader, target, prompt, [one], hits=0)
    one[0, 0] = -0.0
    check(reader, target, prompt, [one], hits=0)


def test_the_same_image_twice_in_one_prompt(target, prompt):
    reader = VisionReader(target, reuse_bytes=image_bytes(target, 8))
    check(reader, target, prompt, [image(0), image(1), image(0), image(0), image(1)], hits=3)
    assert len(reader._seen) == 2
    check(reader, target, prompt, [image(1), image(2), image(1), image(2)], hits=3)


def test_images_of_several_sizes(target, prompt):
    reader = VisionReader(target, reuse_bytes=image_bytes(target, 12))
    small, large = [image(seed) for seed in range(3)], [image(seed, 24) for seed in range(3)]
    check(reader, target, prompt, [small[0], large[0], large[1], small[1], small[0]], hits=1)
    check(reader, target, prompt, [large[1], small[2], large[2], small[1]], hits=2)
    check(reader, target, prompt, [large[2], large[0], small[2]], hits=3)


def test_the_same_values_in_another_shape_are_another_image(target, prompt):
    reader = VisionReader(target, reuse_bytes=image_bytes(target, 4))
    asked = showing(prompt, [image(0, 24)])
    reader(asked)
    turned = replace(asked, image_grid_thw=torch.tensor([[1, 6, 4]]))
    got = reader(turned)
    expected = encode_images(target.vlm.model.visual, turned.pixel_values, turned.image_grid_thw)
    assert torch.equal(got.embeds, expected.embeds) and reader.hits == 0


def test_the_one_used_least_recently_makes_room(target, prompt):
    reader = VisionReader(target, reuse_bytes=image_bytes(target, 3))
    a, b, c, d = (image(seed) for seed in range(4))
    check(reader, target, prompt, [a, b, c], hits=0)
    assert reader._seen.nbytes <= image_bytes(target, 3)
    check(reader, target, prompt, [a], hits=1)
    check(reader, target, prompt, [d], hits=0)
    check(reader, target, prompt, [c, a, d], hits=3)
    check(reader, target, prompt, [b], hits=0)


def test_room_of_several_images_serves_a_large_one(target, prompt):
    reader = VisionReader(target, reuse_bytes=image_bytes(target, 3))
    check(reader, target, prompt, [image(0), image(1), image(2)], hits=0)
    check(reader, target, prompt, [image(9, 24)], hits=0)
    check(reader, target, prompt, [image(2), image(9, 24)], hits=2)
    assert len(reader._seen) == 2


@pytest.mark.parametrize("bytes_", [1, 3])
def test_a_prompt_that_does_not_fit_keeps_what_does(target, prompt, bytes_):
    """Its own known images are not given up for its new ones."""
    limit = image_bytes(target, bytes_) if bytes_ > 1 else 1
    reader = VisionReader(target, reuse_bytes=limit)
    images = [image(seed) for seed in range(5)]
    known = 0 if bytes_ == 1 else 3
    check(reader, target, prompt, images, hits=0)
    check(reader, target, prompt, images, hits=known)
    check(reader, target, prompt, images, hits=known)


def test_an_image_with_a_nan_is_never_known(target, prompt):
    reader = VisionReader(target, reuse_bytes=image_bytes(target, 8))
    bad = image(0)
    bad[5, 7] = float("nan")
    asked = showing(prompt, [bad, image(1), bad])
    for known in (0, 1):
        hits = reader.hits
        assert not reader(asked).embeds.isfinite().all()
        assert reader.hits - hits == known
    check(reader, target, prompt, [image(1), image(0)], hits=1)


def test_nothing_is_kept_where_reading_fails(target, prompt):
    reader = VisionReader(target, reuse_bytes=image_bytes(target, 8))
    check(reader, target, prompt, [image(0)], hits=0)
    encode = reader._encode

    def fail(pixels, grid):
        encode(pixels, grid)
        raise RuntimeError("the tower fell")

    reader._encode = fail
    with pytest.raises(RuntimeError, match="fell"):
        reader(showing(prompt, [image(0), image(1)]))
    reader._encode = encode
    assert len(reader._seen) == 0 and reader._seen.nbytes == 0
    check(reader, target, prompt, [image(0), image(1)], hits=0)
    check(reader, target, prompt, [image(0), image(1)], hits=2)


def windows(target):
    """Prompts of four images; each has three of the one before."""
    prompts = [random_prompt(target, seed=seed, length=40, images=4) for seed in range(3)]
    images = [image(seed) for seed in range(6)]
    return [showing(prompt, images[at : at + 4]) for at, prompt in enumerate(prompts)]


def test_a_decoder_writes_the_same_whether_images_are_known(target):
    options = {"num_traj_samples": 2, "max_new_tokens": 8, "seed": 3}
    plain = SpeculativeDecoder(target)
    reusing = SpeculativeDecoder(target, None, DecodeConfig(vision_reuse_mib=2))
    for window in windows(target):
        expected, got = plain.generate(window, **options), reusing.generate(window, **options)
        assert got.token_ids == expected.token_ids
        assert torch.equal(got.pred_xyz, expected.pred_xyz) and torch.equal(got.pred_rot, expected.pred_rot)
    reader = reusing.verifier.vision
    assert (reader.hits, reader.misses) == (6, 6)
    assert plain.verifier.vision.hits == 0


def test_a_target_that_is_not_finite_leaves_no_features(target):
    decoder = SpeculativeDecoder(target, None, DecodeConfig(vision_reuse_mib=2))
    first, second, _ = windows(target)
    expected = decoder.generate(second, max_new_tokens=4)
    weight = target.vlm.model.visual.merger.linear_fc2.weight
    kept = weight[3].clone()
    weight[3] = float("nan")
    try:
        with pytest.raises(ValueError, match="not finite"):
            decoder.generate(first, max_new_tokens=4)
    finally:
        weight[3] = kept
    got = decoder.generate(second, max_new_tokens=4)
    assert got.token_ids == expected.token_ids and torch.equal(got.pred_xyz, expected.pred_xyz)


def test_the_fast_tower_is_taken_where_it_runs(target, prompt, monkeypatch):
    from alpamayo_dflash.decode import vision

    monkeypatch.setattr(vision, "why_plain_vision", lambda _: None)
    assert isinstance(vision_tower(target), vision.FusedVision)


def test_on_a_gpu_a_warning_says_why_the_plain_tower_runs(target, monkeypatch):
    from alpamayo_dflash.decode import vision

    monkeypatch.setattr(vision, "why_plain_vision", lambda _: "of a reason")
    monkeypatch.setattr(type(target), "device", torch.device("cuda"))
    with pytest.warns(UserWarning, match="of a reason"):
        vision_tower(target)
