"""Are sampled tokens drawn from the target's distribution, and is their noise independent?

The joint distribution of the first tokens is computed without any noise; the frequencies come from the very
loops that users run, over many seeds. All tests together fail with a chance below `level` if all is right:
each is held to `level` over their number (Bonferroni).
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from alpamayo_dflash.clips.lists import take
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.common.artefacts import provenance, write_record
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.noise import token_noise
from alpamayo_dflash.decode.sampling import distribution, mask_bias
from alpamayo_dflash.decode.verify import Prefilled, Verifier
from alpamayo_dflash.draft.formats import draft_identity
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.evaluate.config import DistributionConfig
from alpamayo_dflash.evaluate.reference import next_logits
from alpamayo_dflash.target.alpamayo import open_target
from alpamayo_dflash.target.prompt import Prompt

# Tokens written beyond those that count, so that a draft's proposals run past them as they do in use.
_BEYOND = 2
_CANDIDATES = 16
_BINS = 8
_NOISE_VALUES = 1 << 20
Text = tuple[int, ...]
_TEXTS_A_PASS = 256
_ROUNDING = 1e-5
_LEAST_EXPECTED = 5.0  # cells that expect fewer are pooled, as is usual for this test


@dataclass(frozen=True)
class Test:
    """A statistical test.

    Attributes:
        name: what is tested.
        p_value: the chance of a statistic at least as large if all is right.
        detail: the statistic and what it was computed from.
    """

    name: str
    p_value: float
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class ChiSquare:
    """A goodness-of-fit test.

    Attributes:
        statistic: chi-square.
        degrees: of freedom.
        p_value: the chance of a statistic at least as large if the frequencies are right; 0 if something was
            observed that cannot occur.
        draws: how many observations.
    """

    statistic: float
    degrees: int
    p_value: float
    draws: int


def run(config: DistributionConfig) -> dict[str, Any]:
    """Draw, count, test, write; `passed` says whether every test holds at its level.

    Raises:
        ValueError: bad input; the message names it.
    """
    started = time.time()
    source = ClipSource(config.cache_dir)
    draft = DFlashDraft.from_pretrained(config.draft_model, dtype=torch.float32)
    target, identity = open_target(
        config.alpamayo_model, device=config.device, dtype="float32", format_=config.target_format
    )
    sampling = config.sampling
    decoders = {"autoregressive": SpeculativeDecoder(target), "dflash": SpeculativeDecoder(target, draft)}
    plain = decoders["autoregressive"]
    named = take(source.clip_ids(), None)[:_CANDIDATES] if config.clip_id is None else [config.clip_id]
    prompts = [target.prompt(source.window(clip_id, config.t0_us)) for clip_id in named]
    # What expects fewer than five of all draws is pooled by the test, so it need not be listed.
    least = _LEAST_EXPECTED / (config.seeds * max(config.sample_counts))
    joints = [
        joint_distribution(plain, plain.prefill(prompt), config.tokens, sampling, least) for prompt in prompts
    ]
    prompt, joint = max(zip(prompts, joints, strict=True), key=lambda pair: entropy(pair[1].values()))
    tests = _series_tests(decoders, prompt, joint, config) + noise_tests(target.vocab_size)
    bound = config.level / len(tests)
    result = {
        "window": prompt.key,
        "target_weights": target.weight_formats,
        "outcomes": len(joint),
        "probability_listed": sum(joint.values()),
        "reference_difference": reference_difference(plain, prompt, sampling),
        "level": config.level,
        "level_each": bound,
        "tests": [dataclasses.asdict(test) | {"passed": test.p_value >= bound} for test in tests],
        "passed": all(test.p_value >= bound for test in tests),
    }
    parents = {"target": identity.hash, "draft": draft_identity(config.draft_model).hash}
    made = provenance(config, started, parents)
    write_record(config.out, result | {"provenance": made})
    return result | {"out": str(config.out)}


def _series_tests(
    decoders: Mapping[str, SpeculativeDecoder],
    prompt: Prompt,
    joint: Mapping[Text, float],
    config: DistributionConfig,
) -> list[Test]:
    """The joint frequencies of every series, and the independence of its samples where it has several."""
    tests = []
    for arm, decoder in decoders.items():
        prefilled = decoder.prefill(prompt)
        for samples in config.sample_counts:
            found = first_tokens(decoder, prefilled, config, samples)
            tests.append(frequency_test(f"{arm}, {samples} sample(s)", found, joint))
            if samples > 1:
                pairs = [(texts[0], texts[1]) for texts in found]
                statistic, degrees, p_value = contingency(pairs)
                detail = {"statistic": statistic, "degrees": degrees, "draws": len(pairs)}
                name = f"samples of one seed are independent, {arm}, {samples} samples"
                tests.append(Test(name, p_value, detail))
    return tests


def first_tokens(
    decoder: SpeculativeDecoder, prefilled: Prefilled, config: DistributionConfig, samples: int
) -> list[list[Text]]:
    """The first tokens of every sample, seed by seed."""
    console = Console(file=sys.stderr)
    drafted, beyond = ("without a draft", 0) if decoder.draft is None else ("with a draft", _BEYOND)
    found = []
    for seed in track(range(config.seeds), f"{samples} sample(s) {drafted}", console=console):
        result = decoder.generate(
            prefilled,
            temperature=config.temperature,
            top_p=config.top_p,
            num_traj_samples=samples,
            seed=seed,
            max_new_tokens=config.tokens + beyond,
            trajectories=False,
        )
        found.append([tuple(ids[: config.tokens]) for ids in result.token_ids])
    return found


def frequency_test(series: str, found: Sequence[Sequence[Text]], joint: Mapping[Text, float]) -> Test:
    """Joint frequencies against the distribution; texts too rare to be listed make one cell."""
    counts = Counter(text for texts in found for text in texts)
    fit = chi_square(counts, joint)
    unlisted = sum(count for text, count in counts.items() if text not in joint)
    detail = {
        "statistic": fit.statistic,
        "degrees": fit.degrees,
        "draws": fit.draws,
        "unlisted": unlisted,
        "unlisted_expected": fit.draws * (1 - sum(joint.values())),
    }
    return Test(f"joint frequencies, {series}", fit.p_value, detail)


def chi_square(counts: Mapping[Text, int], joint: Mapping[Text, float]) -> ChiSquare:
    """Test counts against a distribution.

    Texts that expect fewer than five observations are pooled into one cell, with whatever the distribution
    leaves out.

    Args:
        counts: observations by text.
        joint: probability by text; may sum to less than 1.

    Raises:
        ValueError: there are too few observations for two cells.
    """
    draws = sum(counts.values())
    own = {text: probability * draws for text, probability in joint.items()}
    own = {text: expected for text, expected in own.items() if expected >= _LEAST_EXPECTED}
    pairs = [(counts.get(text, 0), expected) for text, expected in own.items()]
    rest = draws - sum(expected for _, expected in pairs)
    rest_seen = draws - sum(seen for seen, _ in pairs)
    if rest >= _LEAST_EXPECTED:
        pairs.append((rest_seen, rest))
    elif pairs:
        seen, expected = pairs.pop()  # too small to stand alone: it joins the last cell
        pairs.append((seen + rest_seen, expected + rest))
    if len(pairs) < 2:
        raise ValueError(f"{draws} observations make {len(pairs)} cell(s) of five or more; draw more")
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in pairs)
    degrees = len(pairs) - 1
    if _is_complete(joint) and not counts.keys() <= joint.keys():
        return ChiSquare(statistic, degrees, 0.0, draws)
    return ChiSquare(statistic, degrees, upper_tail(statistic, degrees), draws)


def _is_complete(joint: Mapping[Text, float]) -> bool:
    """Whether the distribution leaves nothing out; its float32 probabilities sum to 1 within rounding."""
    return sum(joint.values()) > 1 - _ROUNDING


def contingency(pairs: Sequence[tuple[Any, Any]]) -> tuple[float, int, float]:
    """Pearson's chi-square test of independence of two categories.

    Categories whose smallest expected cell would be below five are pooled into one.

    Returns:
        The statistic, its degrees of freedom and its p-value; a p-value of 1 where fewer than two categories
        are left on a side.
    """
    total = len(pairs)
    threshold = math.sqrt(_LEAST_EXPECTED * total)
    left, right = (_pooled([pair[side] for pair in pairs], threshold) for side in (0, 1))
    rows, columns, cells = Counter(left), Counter(right), Counter(zip(left, right, strict=True))
    statistic = 0.0
    for row, row_count in rows.items():
        for column, column_count in columns.items():
            expected = row_count * column_count / total
            statistic += (cells[row, column] - expected) ** 2 / expected
    degrees = (len(rows) - 1) * (len(columns) - 1)
    return statistic, degrees, upper_tail(statistic, degrees) if degrees else 1.0


def _pooled(values: Sequence[Any], threshold: float) -> list[Any]:
    """Values with the rare ones, fewer than `threshold`, replaced by one."""
    counts = Counter(values)
    return [value if counts[value] >= threshold else "rare" for value in values]


def upper_tail(statistic: float, degrees: int) -> float:
    """The chance that chi-square with these degrees of freedom is at least this large."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def noise_tests(vocab_size: int) -> list[Test]:
    """Independence of the noise of neighbouring positions, of samples, of windows, of seeds and of tokens.

    Each pairs a million values of one place with those of another, binned by their own distribution's
    quantiles, in a contingency table.
    """
    places = max(1, _NOISE_VALUES // vocab_size)

    def at(seed: int = 0, window: str = "a@0", sample: int = 0, first: int = 0) -> Tensor:
        rows = token_noise(seed, window, [sample], range(first, first + places), vocab_size)
        # exp(-exp(-g)) is uniform where g is Gumbel noise.
        return rows.double().neg().exp().neg().exp().flatten()

    base = at()
    others = {
        "positions": at(first=1),
        "samples": at(sample=1),
        "windows": at(window="b@0"),
        "seeds": at(seed=1),
        "tokens": base.view(places, -1).roll(1, dims=-1).flatten(),
    }
    return [_noise_test(name, base, other) for name, other in others.items()]


def _noise_test(name: str, one: Tensor, other: Tensor) -> Test:
    """Pearson's test on a table of equal bins, and the correlation beside it."""
    cells = (one * _BINS).long() * _BINS + (other * _BINS).long()
    counts = torch.bincount(cells, minlength=_BINS**2).double().view(_BINS, _BINS)
    expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    degrees = (_BINS - 1) ** 2
    correlation = float(torch.corrcoef(torch.stack((one, other)))[0, 1])
    detail = {"statistic": statistic, "degrees": degrees, "values": len(one), "correlation": correlation}
    return Test(f"noise of different {name} is independent", upper_tail(statistic, degrees), detail)


def joint_distribution(
    decoder: SpeculativeDecoder,
    prefilled: Prefilled,
    depth: int,
    sampling: Sampling,
    least: float = 0.0,
) -> dict[Text, float]:
    """The target's own distribution of the first tokens: tempered, nucleus-cut, trajectory ids masked.

    Every text is extended by each token of its nucleus, level by level; no noise takes part.

    Args:
        decoder: has read the prompt; what it has in its cache after the prompt is lost.
        prefilled: the prompt.
        depth: how many tokens.
        sampling: temperature and top_p.
        least: texts less probable than this are left out, so that the values sum to less than 1.

    Returns:
        Probability by text; texts that end before `depth` have shorter keys.
    """
    target = decoder.target
    bias = mask_bias(target.traj_ids, target.vocab_size).to(target.device)
    ended: dict[Text, float] = {}
    open_texts: dict[Text, float] = {(): 1.0}
    for _ in range(depth):
        logits = _next_logits(decoder.verifier, prefilled, list(open_texts))
        rows = distribution(logits, bias, sampling).double()
        longer = {
            (*text, token): probability * float(row[token])
            for (text, probability), row in zip(open_texts.items(), rows, strict=True)
            for token in row.nonzero().flatten().tolist()
        }
        longer = {text: probability for text, probability in longer.items() if probability >= least}
        stopped = {text for text in longer if decoder.rules.reason(text[-1]) is not None}
        ended |= {text: longer[text] for text in stopped}
        open_texts = {text: probability for text, probability in longer.items() if text not in stopped}
    return ended | open_texts


@torch.inference_mode()
def _next_logits(verifier: Verifier, prefilled: Prefilled, texts: Sequence[Text]) -> Tensor:
    """Logits [R, V] of what follows each text after the prompt; texts share the rows of equal beginnings."""
    if texts == [()]:
        return prefilled.logits_V.unsqueeze(0)
    parts = []
    for first in range(0, len(texts), _TEXTS_A_PASS):
        batch = texts[first : first + _TEXTS_A_PASS]
        forced = verifier.force(prefilled, batch)
        parts.append(forced.logits_RV[[forced.rows[path[-1]] for path in forced.paths]])
    return torch.cat(parts) if parts else prefilled.logits_V.new_zeros(0, len(prefilled.logits_V))


def entropy(probabilities: Iterable[float]) -> float:
    """Entropy of a distribution, nats."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def reference_difference(decoder: SpeculativeDecoder, prompt: Prompt, sampling: Sampling) -> float:
    """The largest difference of the first token's probabilities from those of transformers' own forward.

    The mask, temperature and nucleus are written out here a second time.
    """
    target = decoder.target
    logits = next_logits(target, prompt).double()
    logits[target.traj_ids.start : target.traj_ids.stop] = -math.inf
    ranked, ids = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    kept = ranked * (ranked.cumsum(-1) - ranked < sampling.top_p)
    expected: dict[int, float] = dict(zip(ids.tolist(), (kept / kept.sum()).tolist(), strict=True))
    ours = joint_distribution(decoder, decoder.prefill(prompt), 1, sampling)
    return max(abs(probability - ours.get((token,), 0.0)) for token, probability in expected.items())
