"""The tiny Alpamayo's sizes and tokenizer: the official layout at a five-hundredth of the size.

Everything that the real checkpoint has is here (vision tower with deepstack, interleaved M-RoPE decoder,
trajectory and special tokens, action expert, flow matching); only the sizes differ.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from alpamayo_dflash.common.artefacts import write_json
from alpamayo_dflash.standins.blueprint import QWEN_SPECIAL, TargetShape, alpamayo_config, write_vlm
from alpamayo_dflash.target.config import ActionSpaceConfig

_MOST_PIECES = 1100  # the 256 bytes and more merges than the world's words need
TINY = TargetShape(
    pieces=853,  # of the one that ships; the texts decide
    added=QWEN_SPECIAL,  # those that a prompt can hold
    spare_rows=0,
    future_bins=64,
    history_bins=256,
    hidden=192,
    layers=8,
    heads=6,
    kv_heads=2,
    head_dim=32,
    mlp=416,
    mrope_section=(6, 5, 5),
    rope_theta=10_000,
    max_positions=4096,
    attention="sdpa",
    vision_depth=4,
    vision_hidden=96,
    vision_heads=4,
    vision_mlp=256,
    vision_positions=64,
    deepstack=(1, 2),
    expert_hidden=128,
    expert_heads=4,
    expert_mlp=256,
    action_hidden=64,
    action_space=ActionSpaceConfig(accel_mean=-0.2, accel_std=0.9, curvature_mean=0.0, curvature_std=0.012),
    min_pixels=4096,
    max_pixels=8192,
    processor_pixels=(4096, 8192),
)
# How byte-level BPE of the Qwen family cuts text before merging: contractions, words with their leading
# blank, single digits, punctuation, line ends, other blanks.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CUT = "|".join(
    (
        _CONTRACTIONS,
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# The prompt's fixed words (specification 3.3), so that BPE learns them too.
_PROMPT_TEXT = (
    "system\nYou are a driving assistant that generates safe and accurate actions.",
    "user\n",
    "output the chain-of-thought reasoning of the driving process, then output the future trajectory.",
    "assistant\n",
)


def write_blueprint(folder: Path, texts: list[str]) -> None:
    """Write all of a tiny checkpoint but its weights: config.json and vlm/ with tokenizer and processor.

    Args:
        folder: where; made if it is not there.
        texts: what the tokenizer is trained on.
    """
    tokenizer = train_tokenizer(texts)
    shape = replace(TINY, pieces=tokenizer.get_vocab_size() - len(TINY.added))
    write_vlm(folder / "vlm", shape, tokenizer)
    write_json(folder / "config.json", alpamayo_config(shape))


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer in Qwen's form on the world's texts and the prompt's words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MOST_PIECES,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *_PROMPT_TEXT * 50], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in TINY.added])
    return tokenizer
