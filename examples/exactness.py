"""Which rules of acceptance leave the target's distribution as it is: tokens a pass, and a test of it.

    python examples/exactness.py CLIPS DRAFT [DRAWS]

The same target, the same plain draft, temperature 0.6, four rules for what is kept of its proposals x, with p
the target's probabilities and q the draft's:

    shared noise        both choose with the same Gumbel noise, and what is equal stays (this project's rule:
                        the text is a function of the seed, with or without a draft)
    chain rejection     x stays with probability min(1, p/q), else a draw from max(p - q, 0) takes its place
                        (Leviathan et al. 2023)
    sample and match    the target draws for itself, and what is equal stays
    typical acceptance  x stays where p is above min(0.3, 0.09 exp(-entropy of p)), else a draw from p takes
                        its place (Cai et al. 2024, "Medusa"): biased towards what the draft likes

The texts of each are counted, and their first tokens are held to the target's own joint distribution by
`evaluate.distribution`'s chi-square test. A tiny p-value says: that is not what the target writes.
CLIPS is a folder of clips (`alpamayo-dflash world --out CLIPS` makes such), DRAFT a draft without a head on
previous picks (`examples/train_draft.py` makes one).

Shapes: V vocabulary, b block size.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import torch

from alpamayo_dflash import Alpamayo, ClipSource, DecodeConfig, DFlashDraft, SpeculativeDecoder
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.noise import token_noise
from alpamayo_dflash.decode.sampling import distribution, mask_bias
from alpamayo_dflash.decode.verify import Prefilled
from alpamayo_dflash.evaluate.distribution import chi_square, entropy, joint_distribution

SAMPLING = Sampling(temperature=0.6, top_p=0.98)
TESTED = 4  # first tokens whose joint distribution is tested
LIMIT = 8  # tokens of a text: proposals run past those that are tested, as they do in use
CLIPS = 4  # of the first so many the one whose texts are least certain
TYPICAL = (0.3, 0.09)
Text = tuple[int, ...]
Row = np.ndarray  # float64 [V], probabilities


class Rows:
    """What target and draft think after any text, each computed once.

    Args:
        decoder: with a draft.
        prefilled: the prompt, which it has read.
    """

    def __init__(self, decoder: SpeculativeDecoder, prefilled: Prefilled) -> None:
        self._decoder, self._prefilled = decoder, prefilled
        self._bias = mask_bias(decoder.target.traj_ids, decoder.target.vocab_size)
        self._known: dict[Text, tuple[Row, np.ndarray]] = {}

    def target(self, text: Text) -> Row:
        """Probabilities p of the next token, [V]."""
        return self._of(text)[0]

    def draft(self, text: Text) -> np.ndarray:
        """Probabilities q of the next b − 1 tokens, [b − 1, V]; [0, V] after the prompt alone."""
        return self._of(text)[1]

    def _of(self, text: Text) -> tuple[Row, np.ndarray]:
        if text not in self._known:
            self._known[text] = self._computed(text)
        return self._known[text]

    @torch.inference_mode()
    def _computed(self, text: Text) -> tuple[Row, np.ndarray]:
        verifier, draft = self._decoder.verifier, self._decoder.draft
        forced = verifier.force(self._prefilled, [text])
        p = distribution(forced.logits(0)[-1:], self._bias, SAMPLING).double().numpy()[0]
        if not text:
            return p, np.zeros((0, len(p)))
        context, lengths = verifier.cache.context([forced.paths[0][:-1]])
        block = draft.propose(context, lengths, torch.tensor(text[-1:]))
        if block.token_ids is not None or hasattr(block, "shift"):
            raise SystemExit("this example reads the rows of a plain draft: whole head, previous_head none")
        return p, distribution(block.logits[0, :, : len(p)], self._bias, SAMPLING).double().numpy()


Rule = Callable[[Rows, Text, np.random.Generator, "SharedNoise"], Iterator[int]]
"""The tokens that one pass emits after a text."""


class SharedNoise:
    """The project's noise of one seed and window: a row of Gumbel values for each position."""

    def __init__(self, seed: int, window: str, vocab_size: int) -> None:
        self._rows = token_noise(seed, window, [0], range(LIMIT), vocab_size)[:, 0].numpy()

    def choose(self, probabilities: Row, position: int) -> int:
        """The arg max of log p + g: with Gumbel noise a draw from p."""
        with np.errstate(divide="ignore"):
            return int((np.log(probabilities) + self._rows[position]).argmax())


def draw(probabilities: Row, random: np.random.Generator) -> int:
    """A token of a distribution."""
    summed = probabilities.cumsum()
    return int(np.searchsorted(summed, random.random() * summed[-1], side="right"))


def shared_noise(rows: Rows, text: Text, _: np.random.Generator, noise: SharedNoise) -> Iterator[int]:
    """See the module."""
    for q in rows.draft(text)[: LIMIT - len(text)]:
        offered = noise.choose(q, len(text))
        own = noise.choose(rows.target(text), len(text))
        yield own
        if own != offered:
            return
        text = (*text, own)
    if len(text) < LIMIT:
        yield noise.choose(rows.target(text), len(text))


def sample_and_match(rows: Rows, text: Text, random: np.random.Generator, _: SharedNoise) -> Iterator[int]:
    """See the module."""
    for q in rows.draft(text):
        offered, own = draw(q, random), draw(rows.target(text), random)
        yield own
        if own != offered:
            return
        text = (*text, own)
    yield draw(rows.target(text), random)


def chain_rejection(rows: Rows, text: Text, random: np.random.Generator, _: SharedNoise) -> Iterator[int]:
    """See the module."""
    for q in rows.draft(text):
        offered, p = draw(q, random), rows.target(text)
        if random.random() * q[offered] >= p[offered]:
            yield draw((p - q).clip(min=0), random)
            return
        yield offered
        text = (*text, offered)
    yield draw(rows.target(text), random)


def typical_acceptance(rows: Rows, text: Text, random: np.random.Generator, _: SharedNoise) -> Iterator[int]:
    """See the module."""
    for q in rows.draft(text):
        offered, p = draw(q, random), rows.target(text)
        most, share = TYPICAL
        if p[offered] <= min(most, share * np.exp(-entropy(p))):
            yield draw(p, random)
            return
        yield offered
        text = (*text, offered)
    yield draw(rows.target(text), random)


RULES: dict[str, Rule] = {
    "shared noise": shared_noise,
    "chain rejection": chain_rejection,
    "sample and match": sample_and_match,
    "typical acceptance": typical_acceptance,
}


def written(
    rule: Rule, rows: Rows, noise: SharedNoise, random: np.random.Generator, ends: set[int]
) -> tuple[Text, int]:
    """A text of at most LIMIT tokens by a rule, and its passes after the prompt's."""
    first = rows.target(())
    text: Text = (noise.choose(first, 0) if rule is shared_noise else draw(first, random),)
    passes = 0
    while len(text) < LIMIT and text[-1] not in ends:
        passes += 1
        for token in rule(rows, text, random, noise):
            text = (*text, token)
            if token in ends or len(text) == LIMIT:
                break
    return text, passes


def table(clips: str, draft: str, draws: int) -> list[dict]:
    """A row a rule: `rule`, `tokens_a_pass`, `p_value`; that the decoder writes the first is checked."""
    source, target = ClipSource(clips), Alpamayo.from_pretrained("tiny")
    config = DecodeConfig(sentence_end="off")
    decoder = SpeculativeDecoder(target, DFlashDraft.from_pretrained(draft), config)
    prompts = [target.prompt(source.window(clip)) for clip in source.clip_ids()[:CLIPS]]
    joints = [
        joint_distribution(decoder, decoder.prefill(prompt), TESTED, SAMPLING, least=1 / draws)
        for prompt in prompts
    ]
    # Where the target is least sure there is most to get wrong.
    prompt, joint = max(zip(prompts, joints, strict=True), key=lambda pair: entropy(pair[1].values()))
    prefilled = decoder.prefill(prompt)
    rows, ends = Rows(decoder, prefilled), {target.special.traj_future_start, target.special.eos}
    noises = [SharedNoise(seed, prompt.key, target.vocab_size) for seed in range(draws)]
    found = []
    for number, (name, rule) in enumerate(RULES.items()):
        random = np.random.default_rng(number)
        texts = [written(rule, rows, noise, random, ends) for noise in noises]
        fit = chi_square(Counter(text[:TESTED] for text, _ in texts), joint)
        pooled = sum(len(text) - 1 for text, _ in texts) / sum(passes for _, passes in texts)
        found.append({"rule": name, "tokens_a_pass": pooled, "p_value": fit.p_value})
        if rule is shared_noise:
            check_decoder(decoder, prefilled, texts[:8])
    return found


def check_decoder(decoder: SpeculativeDecoder, prefilled: Prefilled, texts: list[tuple[Text, int]]) -> None:
    """The rule as it is written here is the decoder's: the same texts in as many passes."""
    for seed, (text, passes) in enumerate(texts):
        result = decoder.generate(prefilled, seed=seed, max_new_tokens=LIMIT, trajectories=False)
        if (tuple(result.token_ids[0]), result.passes) != (text, passes):
            raise SystemExit(f"seed {seed}: the decoder writes {result.token_ids[0]}, this example {text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("clips")
    parser.add_argument("draft")
    parser.add_argument("draws", type=int, nargs="?", default=4000)
    given = parser.parse_args()
    rules = table(given.clips, given.draft, given.draws)
    print(f"{'rule':<20}{'tokens a pass':>15}{'p-value':>12}")
    for row in rules:
        print(f"{row['rule']:<20}{row['tokens_a_pass']:>15.2f}{row['p_value']:>12.2g}")
