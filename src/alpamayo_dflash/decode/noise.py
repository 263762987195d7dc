"""Noise that belongs to a place, not to the order in which it was drawn.

The token at (seed, window, sample, position) is chosen with noise that depends on these four and on the
token's id alone, so the same seed gives the same text with any draft, block size, tree or batch (design,
invariant 2). The generator is Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
easy as 1, 2, 3", SC 2011), a function from a counter and a key to four 32-bit words, here in int64
operations that never overflow, so that every device computes the same bits.

    key      two words: hash of (seed, window, sample)
    counter  token noise: (token id // 4, position, 0, 0); word `token id % 4` of the result is the token's
             flow noise:  (block of four values, 0, 1, 0)

Shapes: S sample, N positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alpamayo_dflash.common.machine import uploaded

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_TOKENS, _FLOW = 0, 1  # the third word of the counter keeps the two streams apart
NO_NOISE = (-1, -1)
"""In place of the key of a greedy sample among sampled ones."""
_CHUNK_POSITIONS = 16  # a CoC's median is 14 tokens, so one chunk mostly serves all of it
_CHUNK_VALUES = 1 << 20
_KEPT_VALUES = 1 << 26  # 256 MiB; those of a text that goes on are made again when they are asked for


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox 4x32-10.

    Args:
        counter: four int64 tensors of values in [0, 2^32), of one shape or broadcastable to one.
        key: two int64 tensors of values in [0, 2^32), broadcastable to that shape.

    Returns:
        Four int64 tensors of values in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c2 = high1.bitwise_xor_(c1).bitwise_xor_(k0), high0.bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = low1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and low words of word·multiplier, without leaving int64.

    word·(multiplier − 2³²) fits in 63 bits: its low word is right, its high word short by `word`.
    """
    product = word * (multiplier - (1 << 32))
    return (product >> 32).add_(word).bitwise_and_(_WORD), product.bitwise_and_(_WORD)


def stream_key(seed: int, window: str, sample: int) -> tuple[int, int]:
    """Hash (seed, window, sample) to the two words of a Philox key, the same in every process."""
    text = json.dumps([int(seed), window, int(sample)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def stream_keys(seed: int, window: str, samples: Sequence[int | None], device: torch.device | str) -> Tensor:
    """The keys of several samples, int64 [S, 2]; `NO_NOISE` for None."""
    found = [NO_NOISE if sample is None else stream_key(seed, window, sample) for sample in samples]
    keys = torch.tensor(found, device="cpu")
    return uploaded(keys, torch.device(device))


def without_noise(keys_R2: Tensor) -> Tensor:
    """Whether each row is greedy: bool [R]."""
    return keys_R2[:, 0] < 0


def _uniform(word: Tensor) -> Tensor:
    """Words to float64 strictly between 0 and 1: (word + 1/2) / 2^32, exactly."""
    return (word.double() + 0.5) * 2.0**-32


def token_noise(
    seed: int,
    window: str,
    samples: Sequence[int | None],
    positions: Sequence[int],
    vocab_size: int,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Gumbel noise for every token of the vocabulary.

    Args:
        seed: the user's seed.
        window: the window's key, clip id and moment.
        samples: S sample indices; None for one without noise.
        positions: N indices among the generated tokens (0 is the first after the prompt).
        vocab_size: V.
        device: where to compute.

    Returns:
        float32 [N, S, V], between about -3.14 and 22.9: never infinite.
    """
    keys = stream_keys(seed, window, samples, device).repeat(len(positions), 1)
    places = torch.tensor(list(positions), device=device).repeat_interleave(len(samples))
    return row_noise(keys, places, vocab_size).view(len(positions), len(samples), vocab_size)


def row_noise(
    keys_R2: Tensor, positions_R: Tensor, vocab_size: int, token_ids: Tensor | None = None
) -> Tensor:
    """Gumbel noise for rows of different samples and positions; nothing is read back from the device.

    Args:
        keys_R2: int64, from `stream_keys`, one a row.
        positions_R: int64, indices among the generated tokens.
        vocab_size: V.
        token_ids: int64 [V], target ids of a reduced head's columns; None where column and id are the same.

    Returns:
        float32 [R, V], as `token_noise`; zero where a row has none.
    """
    count = (vocab_size + 3) // 4
    block = torch.arange(count, device=keys_R2.device) if token_ids is None else token_ids // 4
    zero = torch.zeros(1, 1, dtype=torch.int64, device=keys_R2.device)
    counter = (block[None], positions_R[:, None], zero + _TOKENS, zero + _TOKENS)
    words = torch.stack(philox(counter, (keys_R2[:, :1], keys_R2[:, 1:])), dim=-1)
    if token_ids is None:
        uniform = _uniform(words).flatten(-2)[..., :vocab_size]
    else:
        choice = (token_ids % 4).expand(len(keys_R2), -1).unsqueeze(-1)
        uniform = _uniform(words.gather(-1, choice).squeeze(-1))
    noise = uniform.log_().neg_().log_().neg_().float()
    return noise.masked_fill_(without_noise(keys_R2)[:, None], 0.0)


def flow_noise(
    seed: int,
    window: str,
    samples: Sequence[int],
    num_waypoints: int,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal values for the start of flow matching, by Box and Muller's transform.

    Args:
        seed: the user's seed.
        window: the window's key.
        samples: S sample indices.
        num_waypoints: way-points per trajectory.
        device: where to compute.

    Returns:
        float32 [S, num_waypoints, 2].
    """
    key0, key1 = stream_keys(seed, window, samples, device).unbind(1)
    count = num_waypoints * 2
    block = torch.arange((count + 3) // 4, device=device).expand(len(samples), -1)
    zero = torch.zeros_like(block)
    words = philox((block, zero, zero + _FLOW, zero), (key0.view(-1, 1), key1.view(-1, 1)))
    radius = torch.stack([torch.sqrt(-2.0 * _uniform(words[i]).log()) for i in (0, 2)], dim=-1)
    angle = torch.stack([2.0 * math.pi * _uniform(words[i]) for i in (1, 3)], dim=-1)
    normals = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    return normals[:, :count].reshape(len(samples), num_waypoints, 2).float()


class TokenNoise:
    """The token noise of one window, made in chunks of positions when first asked for.

    Target and draft look up the same rows, and every loop the same values.

    Args:
        seed: the user's seed.
        window: the window's key.
        streams: of S samples the numbers that their noise depends on; None for one without.
        vocab_size: V.
        device: where the rows live.

    Attributes:
        streams: the same.
    """

    def __init__(
        self,
        seed: int,
        window: str,
        streams: Sequence[int | None],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._stream, self.streams = (seed, window), streams
        num_samples = len(streams)
        self._num_samples, self._vocab_size = num_samples, vocab_size
        self.device = device
        self._chunk = max(1, min(_CHUNK_POSITIONS, _CHUNK_VALUES // (num_samples * vocab_size)))
        self._most = max(1, _KEPT_VALUES // (self._chunk * num_samples * vocab_size))
        self._chunks: dict[int, Tensor] = {}

    def rows(self, samples: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return float32 [R, V]: row r is the noise of samples[r] at positions[r]."""
        wanted = sorted({position // self._chunk for position in positions})
        parts = [self._made(number) for number in wanted]
        for number in [number for number in self._chunks if number not in wanted]:
            if len(self._chunks) <= self._most:
                break
            del self._chunks[number]
        start = {number: place * self._chunk for place, number in enumerate(wanted)}
        places = [start[p // self._chunk] + p % self._chunk for p in positions]
        index = [p * self._num_samples + s for s, p in zip(samples, places, strict=True)]
        rows = (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(0, 1)
        return rows.index_select(0, torch.tensor(index, device=self.device))

    def _made(self, number: int) -> Tensor:
        """A chunk [positions, S, V]."""
        if number not in self._chunks:
            start = number * self._chunk
            places = range(start, start + self._chunk)
            self._chunks[number] = token_noise(
                *self._stream, self.streams, places, self._vocab_size, device=self.device
            )
        return self._chunks[number]
