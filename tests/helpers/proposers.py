"""Drafts and lists for tests of the decoder: they look like real ones, and each is wrong in its own way."""

from types import SimpleNamespace

import torch

from alpamayo_dflash import Listed, Proposed


class Scripted:
    """A draft of any block size; `block` says its logits for one text."""

    taps = (0, 2)

    def __init__(self, vocab_size, block_size, context_len=64, seed=0):
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.context_len = context_len
        self.random = torch.Generator().manual_seed(seed)
        self.calls = []

    def bind(self, embedding, head, num_layers):
        self.bound = (embedding.shape, head.shape, num_layers)

    def propose(self, context, context_lengths, anchors):
        self.calls.append((context.clone(), context_lengths.clone(), anchors.clone()))
        pairs = zip(context_lengths.tolist(), anchors.tolist(), strict=True)
        logits = torch.stack([self.block(length, anchor) for length, anchor in pairs])
        return SimpleNamespace(logits=logits.to(anchors.device), token_ids=None)

    def block(self, length, anchor):
        raise NotImplementedError

    def one_hot(self, tokens):
        logits = torch.zeros(self.block_size - 1, self.vocab_size)
        logits[torch.arange(self.block_size - 1), torch.tensor(tokens)] = 1e4
        return logits


class Random(Scripted):
    """Knows nothing."""

    def block(self, length, anchor):
        return torch.randn(self.block_size - 1, self.vocab_size, generator=self.random)


class NotANumber(Random):
    """Gives NaN, for some texts or for all."""

    def __init__(self, *args, share=1.0, **options):
        super().__init__(*args, **options)
        self.share = share
        self.failures = 0

    def block(self, length, anchor):
        logits = super().block(length, anchor)
        if float(torch.rand((), generator=self.random)) < self.share:
            logits[-1, 3] = float("nan")
            self.failures += 1
        return logits


class Oracle(Scripted):
    """Knows texts by heart, and says a random token instead at a share of the places.

    It finds its place by the length of the context, which must not be cut: `context_len` is long enough. On a
    text that it does not know it says another.
    """

    def __init__(self, *args, texts, prompt_length, errors=0.0, insert=None, **options):
        super().__init__(*args, **options)
        self.texts = texts
        self.prompt_length = prompt_length
        self.errors = errors
        self.insert = insert

    def block(self, length, anchor):
        place = length - self.prompt_length
        known = [text for text in self.texts if place < len(text) and text[place] == anchor]
        known = known or self.texts
        text = known[int(torch.randint(len(known), (), generator=self.random))]
        tokens = (text[place + 1 :] + [1] * self.block_size)[: self.block_size - 1]
        for i in range(len(tokens)):
            if float(torch.rand((), generator=self.random)) < self.errors:
                wrong = int(torch.randint(250, (), generator=self.random))
                tokens[i] = wrong if self.insert is None else self.insert
        return self.one_hot(tokens)


class Reduced(Oracle):
    """An oracle whose head has a part of the vocabulary, in another order."""

    def __init__(self, *args, ids, **options):
        super().__init__(*args, **options)
        self.ids = torch.tensor(ids)

    def propose(self, context, context_lengths, anchors):
        full = super().propose(context, context_lengths, anchors)
        return SimpleNamespace(logits=full.logits[..., self.ids], token_ids=self.ids)


class Known(Listed):
    """Offers texts that it knows, wrong at a share of the places; as trees, a wrong branch first."""

    def __init__(self, texts, *, errors=0.0, tree=False, source="phrase tree", count=5):
        self.texts, self.errors, self.tree, self.source, self.count = texts, errors, tree, source, count
        self.random = torch.Generator().manual_seed(0)
        self.begun = []

    def begin(self, prefilled, samples):
        self.begun.append((prefilled.prompt.key, len(samples)))

    def propose(self, samples):
        assert all(sample.stop is None for sample in samples)
        return [self.one(sample) for sample in samples]

    def one(self, sample):
        place = len(sample.tokens)
        tokens = self.texts[sample.index][place : place + self.count]
        wrong = torch.rand(len(tokens), generator=self.random) < self.errors
        tokens = [7 if bad else token for token, bad in zip(tokens, wrong.tolist(), strict=True)]
        if not self.tree:
            return Proposed(tokens, source=self.source)
        # A branch of two wrong tokens, and the text beside it.
        parents = [-1, 0, -1, *range(2, len(tokens) + 1)]
        return Proposed([8, 9, *tokens], parents[: 2 + len(tokens)], self.source)
