"""The verify pass against transformers' own full forward over prompt and text, without a cache."""

import random

import pytest
import torch

from alpamayo_dflash.decode.cache import ROOT
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.forward import PlainModel
from alpamayo_dflash.decode.rollouts import teacher_forced, teacher_forced_all
from alpamayo_dflash.decode.sampling import distribution, mask_bias
from alpamayo_dflash.decode.tree import Tree
from alpamayo_dflash.decode.verify import Verifier
from alpamayo_dflash.evaluate.distribution import joint_distribution
from tests.helpers.random_target import random_prompt, random_target

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("vlm"), push=1.5, sharpness=4.0)


@pytest.fixture(scope="module")
def prompt(target):
    return random_prompt(target, length=33, images=2)


@torch.no_grad()
def full_forward(target, prompt, tokens):
    """Logits [P + T, V] and layer outputs, [P + T, C] by layer, of one causal pass by transformers."""
    inputs = target.transformers_inputs(prompt)
    more = torch.tensor([list(tokens)], dtype=torch.int64)
    inputs["input_ids"] = torch.cat((inputs["input_ids"], more), dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:  # of transformers 5
        more_kinds = torch.zeros_like(more).int()
        inputs["mm_token_type_ids"] = torch.cat((inputs["mm_token_type_ids"], more_kinds), dim=1)
    outputs = {}
    # A layer's output with the deepstack addition is what the next layer reads.
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: outputs.__setitem__(
                i - 1, (args[0] if args else kwargs["hidden_states"])[0]
            ),
            with_kwargs=True,
        )
        for i, layer in enumerate(target.text_layers)
    ]
    logits = target.vlm(**inputs, use_cache=False).logits[0].float()
    for hook in hooks:
        hook.remove()
    return logits, outputs


def verifier_of(target, prompt, slots=64, **options):
    verifier = Verifier(target, prompt_capacity=64, **options)
    verifier.begin(verifier.prefill(prompt), slots)
    return verifier


def close(a, b, tolerance=TOLERANCE):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance


@torch.inference_mode()
def test_a_pass_for_prompts_of_any_length_reads_the_length_on_the_device(target):
    """As a captured pass must: what the host says of the prompt is what it was at capture."""
    verifier = Verifier(target, prompt_capacity=64)
    verifier._model = PlainModel(target, verifier.cache, any_length=True)
    tokens = [5, 100, 7, 263]
    for length, images in ((33, 2), (50, 2), (21, 1)):
        prompt = random_prompt(target, length=length, images=images)
        expected, _ = full_forward(target, prompt, tokens)
        verifier.begin(verifier.prefill(prompt), 16)
        slots = Tree(verifier.cache.tail).add_chain(tokens, ROOT)
        verifier.cache.prompt_length = 1
        close(verifier.rows(slots), expected[len(prompt) :])
        verifier.cache.prompt_length = len(prompt)


def test_a_chain_is_the_full_forward(target, prompt):
    tokens = [5, 100, 7, 263, 9, 9, 30]
    expected, _ = full_forward(target, prompt, tokens)
    verifier = Verifier(target, prompt_capacity=64)
    prefilled = verifier.prefill(prompt)
    close(prefilled.logits_V, expected[len(prompt) - 1])
    verifier.begin(prefilled, 16)
    close(verifier.rows(Tree(verifier.cache.tail).add_chain(tokens, ROOT)), expected[len(prompt) :])


def test_a_chain_in_several_passes_is_the_same(target, prompt):
    tokens = [5, 100, 7, 263, 9, 9, 30]
    expected, _ = full_forward(target, prompt, tokens)
    verifier = verifier_of(target, prompt)
    slots = Tree(verifier.cache.tail).add_chain(tokens, ROOT)
    parts = [verifier.rows(part) for part in (slots[:1], slots[1:5], slots[5:])]
    close(torch.cat(parts), expected[len(prompt) :])


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_random_tree_are_full_forwards_of_their_paths(target, prompt, seed):
    rng = random.Random(seed)
    verifier = verifier_of(target, prompt)
    tail = verifier.cache.tail
    paths = {ROOT: []}
    for _ in range(4):  # passes; between them branches are dropped and their slots used again
        tree = Tree(tail)
        for _ in range(rng.randint(1, 9)):
            parent = rng.choice(list(paths))
            slot = tree.add(token := rng.randrange(260), parent)
            paths[slot] = [*paths[parent], token]
        logits = verifier.rows(tree.slots)
        for slot, row in zip(tree.slots, logits, strict=True):
            close(row, full_forward(target, prompt, paths[slot])[0][-1])
        leaf = rng.choice(tree.slots)
        kept = [s for s, path in paths.items() if path and path == paths[leaf][: len(path)]]
        tail.keep(kept)
        paths = {ROOT: []} | {s: paths[s] for s in kept}


@pytest.mark.parametrize("width", [1, 3, 16])
def test_padding_and_splitting_change_nothing(target, prompt, width):
    tokens = [5, 100, 7, 263, 9]
    plain, fixed = (
        verifier_of(target, prompt, taps=(0, 2), context_len=4, row_width=w) for w in (None, width)
    )
    for verifier in (plain, fixed):
        tree = Tree(verifier.cache.tail)
        slots = [*tree.add_chain(tokens, ROOT), tree.add(8, 0)]
        verifier.logits = verifier.rows(slots)
    close(plain.logits, fixed.logits)
    used = len(prompt) + 6
    close(plain.cache.keys[:, :used], fixed.cache.keys[:, :used])
    close(plain.cache.values[:, :used], fixed.cache.values[:, :used])
    close(plain.cache.taps[: 4 + 6], fixed.cache.taps[: 4 + 6])


def test_rows_without_logits_write_the_same_cache(target, prompt):
    one, two = verifier_of(target, prompt), verifier_of(target, prompt)
    one.rows(Tree(one.cache.tail).add_chain([4, 5], ROOT))
    assert two.rows(Tree(two.cache.tail).add_chain([4, 5], ROOT), logits=False).shape == (
        0,
        target.vocab_size,
    )
    assert torch.equal(one.cache.keys, two.cache.keys)
    assert torch.equal(one.cache.values, two.cache.values)


@pytest.mark.parametrize("context_len", [2, 9, 50])
def test_context_is_the_last_tapped_states(target, prompt, context_len):
    tokens = [5, 100, 7, 20]
    _, outputs = full_forward(target, prompt, tokens)
    states = torch.cat([outputs[layer] for layer in (1, 0)], dim=-1)
    verifier = verifier_of(target, prompt, taps=(1, 0), context_len=context_len)
    tree = Tree(verifier.cache.tail)
    decoy = tree.add_chain([9, 9, 9], ROOT)
    slots = tree.add_chain(tokens, ROOT)
    verifier.rows(tree.slots)
    context, lengths = verifier.cache.context([slots, slots[:1], []])
    assert decoy[0] == 0
    for row, length, end in zip(context, lengths.tolist(), (4, 1, 0), strict=True):
        before = states[: len(prompt) + end][-context_len:]
        assert length == len(before)
        close(row[context_len - length :], before)
        assert not row[: context_len - length].any()


def test_teacher_forcing_is_the_full_forward(target, prompt):
    responses = [[5, 100, 7, 263, 9, 9, 30], [5, 1]]
    many = teacher_forced_all(target, prompt, responses, layers=(0, 1), prompt_states=5)
    for tokens, got in zip(responses, many, strict=True):
        logits, outputs = full_forward(target, prompt, tokens)
        close(got.logits, logits[len(prompt) - 1 : -1])
        for index, layer in enumerate((0, 1)):
            close(got.states[index], outputs[layer][len(prompt) :])
            close(got.prompt_states[index], outputs[layer][len(prompt) - 5 : len(prompt)])
        assert not got.states.is_inference()
    alone = teacher_forced(target, prompt, responses[1])
    assert torch.equal(alone.logits, many[1].logits)


def test_teacher_forcing_refuses(target, prompt):
    with pytest.raises(ValueError, match="no tokens"):
        teacher_forced(target, prompt, [])
    with pytest.raises(ValueError, match="99999"):
        teacher_forced(target, prompt, [99999])
    with pytest.raises(ValueError, match="tap 3"):
        teacher_forced(target, prompt, [1], layers=(3,))


def test_a_prompt_longer_than_the_cache_is_refused(target, prompt):
    with pytest.raises(ValueError, match=r"33 tokens.*32"):
        Verifier(target, prompt_capacity=32).prefill(prompt)


def test_a_prompt_that_was_replaced_is_refused(target, prompt):
    verifier = Verifier(target, prompt_capacity=64)
    first = verifier.prefill(prompt)
    verifier.prefill(random_prompt(target, seed=5))
    with pytest.raises(ValueError, match="random0@0"):
        verifier.begin(first, 8)


def test_growing_the_tail_keeps_the_prompt(target, prompt):
    verifier = Verifier(target, taps=(0,), context_len=4, prompt_capacity=64)
    prefilled = verifier.prefill(prompt)
    verifier.begin(prefilled, 8)
    before = verifier.rows(Tree(verifier.cache.tail).add_chain([4, 5], ROOT))
    context = verifier.cache.context([[]])[0]
    verifier.begin(prefilled, 2000)
    assert torch.equal(verifier.rows(Tree(verifier.cache.tail).add_chain([4, 5], ROOT)), before)
    assert torch.equal(verifier.cache.context([[]])[0], context)


def test_joint_distribution_is_the_product_of_full_forwards(target, prompt):
    sampling = Sampling(0.5, 0.8)
    decoder = SpeculativeDecoder(target)
    joint = joint_distribution(decoder, decoder.prefill(prompt), 3, sampling)
    assert sum(joint.values()) == pytest.approx(1, abs=1e-5)
    bias = mask_bias(target.traj_ids, target.vocab_size)
    ends = {target.special.traj_future_start, target.special.eos}
    assert all(len(text) == 3 or text[-1] in ends for text in joint)
    for text in sorted(joint, key=joint.get)[-5:] + sorted(joint)[:5]:
        logits = full_forward(target, prompt, text)[0][len(prompt) - 1 : -1]
        rows = distribution(logits, bias, sampling)
        expected = float(
            torch.tensor([float(row[token]) for row, token in zip(rows, text, strict=True)]).prod()
        )
        assert joint[text] == pytest.approx(expected, rel=1e-3)
    likely = joint_distribution(decoder, decoder.prefill(prompt), 3, sampling, least=0.01)
    assert likely.keys() == {text for text, probability in joint.items() if probability >= 0.01}
