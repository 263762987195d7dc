import math

import pytest
import torch

from alpamayo_dflash.decode.noise import TokenNoise, flow_noise, philox, stream_key, token_noise

# Known answers of the authors' Random123 distribution (kat_vectors, "philox4x32 10").
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter, key):
    """Philox 4x32-10 in Python's own integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(word) for word in words) == expected
    assert plain_philox(counter, key) == expected


def test_philox_equals_plain_integers_on_many_values():
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(0, 1 << 32, (6, 500), generator=generator)
    words = torch.stack(philox(tuple(draw[:4]), tuple(draw[4:])))
    for column in range(draw.shape[1]):
        counter, key = draw[:4, column].tolist(), draw[4:, column].tolist()
        assert tuple(words[:, column].tolist()) == plain_philox(counter, key)


def test_token_noise_is_what_the_counter_says():
    seed, window, sample, position, token = 3, "clip@5100000", 2, 7, 1001
    got = token_noise(seed, window, [0, sample], [4, position], 1500)[1, 1, token]
    word = plain_philox((token // 4, position, 0, 0), stream_key(seed, window, sample))[token % 4]
    assert float(got) == pytest.approx(-math.log(-math.log((word + 0.5) / 2**32)), abs=1e-6)


def test_stream_key_is_stable_and_separates_its_parts():
    # A changed hash would change every sampled text that was ever published with a seed.
    assert stream_key(0, "clip@5100000", 0) == (0x5A9C8206, 0xF475F00B)
    keys = {stream_key(s, w, i) for s in (0, 1, 11) for w in ("a", "a1", "1a", "") for i in (0, 1, 11)}
    assert len(keys) == 36


def test_noise_is_finite_at_the_extremes():
    from alpamayo_dflash.decode.noise import _uniform

    uniform = _uniform(torch.tensor([0, 0xFFFFFFFF]))
    gumbel = -torch.log(-torch.log(uniform)).float()
    assert torch.isfinite(gumbel).all()
    assert gumbel[0] < -3 and gumbel[1] > 22


def test_rows_do_not_depend_on_the_order_of_asking():
    def lookup(order):
        noise = TokenNoise(5, "w", range(3), 50)
        return {place: noise.rows([place[0]], [place[1]])[0] for place in order}

    places = [(s, p) for s in range(3) for p in (0, 1, 15, 16, 40)]
    forward, backward = lookup(places), lookup(places[::-1])
    for sample, position in places:
        expected = token_noise(5, "w", [sample], [position], 50)[0, 0]
        assert torch.equal(forward[sample, position], expected)
        assert torch.equal(backward[sample, position], expected)


def test_gumbel_distribution():
    noise = token_noise(0, "w", range(4), range(32), 2048).double()
    uniform = torch.exp(-torch.exp(-noise)).flatten()
    counts = torch.histc(uniform, 64, 0, 1)
    expected = len(uniform) / 64
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 63 + 4 * math.sqrt(2 * 63)
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)


def correlation(a, b):
    a, b = a.flatten().double(), b.flatten().double()
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_noise_of_different_places_is_independent():
    samples, positions, vocab = range(8), range(32), 1024
    noise = token_noise(0, "clip@1", samples, positions, vocab)
    pairs = {
        "positions": (noise[1:], noise[:-1]),
        "far positions": (noise[16:], noise[:-16]),
        "samples": (noise[:, 1:], noise[:, :-1]),
        "tokens": (noise[..., 1:], noise[..., :-1]),
        "token blocks": (noise[..., 4:], noise[..., :-4]),
        "windows": (noise, token_noise(0, "clip@2", samples, positions, vocab)),
        "seeds": (noise, token_noise(1, "clip@1", samples, positions, vocab)),
        "sample of one seed, next seed": (
            noise[:, 1:],
            token_noise(1, "clip@1", samples, positions, vocab)[:, :-1],
        ),
    }
    for name, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < 4 / math.sqrt(a.numel()), name
        # and not only linearly: the joint frequencies of coarse bins
        edges = torch.tensor([-0.3266, 0.3665, 1.2459])  # quartiles of the Gumbel distribution
        cells = torch.bucketize(a.flatten(), edges) * 4 + torch.bucketize(b.flatten(), edges)
        counts = torch.bincount(cells, minlength=16).double()
        expected = a.numel() / 16
        assert float(((counts - expected) ** 2 / expected).sum()) < 15 + 4 * math.sqrt(30), name


def test_flow_noise_is_normal_and_its_own_stream():
    noise = flow_noise(0, "w", range(200), 64)
    assert noise.shape == (200, 64, 2)
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.var()) == pytest.approx(1, abs=0.04)
    assert float((noise.double() ** 4).mean()) == pytest.approx(3, abs=0.25)
    assert abs(correlation(noise[..., 0], noise[..., 1])) < 4 / math.sqrt(noise[..., 0].numel())
    assert abs(correlation(noise[1:], noise[:-1])) < 4 / math.sqrt(noise[1:].numel())
    assert torch.equal(flow_noise(0, "w", [3], 64)[0], noise[3])
    # Of the same key's token stream, a quarter of the words would be the same if the domains were not apart.
    words = token_noise(0, "w", range(200), [0], 128)[0]
    assert abs(correlation(noise.flatten(1), words)) < 4 / math.sqrt(words.numel())


def test_a_sample_without_noise_has_none_and_changes_no_other():
    noise = token_noise(3, "w", [None, 0, 1], [0, 5], 40)
    assert not noise[:, 0].any()
    assert torch.equal(noise[:, 1:], token_noise(3, "w", [0, 1], [0, 5], 40))
    rows = TokenNoise(3, "w", [None, 0, 1], 40).rows([2, 0, 1], [5, 5, 0])
    assert torch.equal(rows, torch.stack((noise[1, 2], noise[1, 0], noise[0, 1])))
