"""What is measured: a target, drafts of its width, and decoders with a replay where weights are random."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from alpamayo_dflash.bench.config import BenchConfig
from alpamayo_dflash.bench.figures import SIX
from alpamayo_dflash.bench.replay import Replay, rate_for
from alpamayo_dflash.common.machine import check_device, describe_gpu, make_current
from alpamayo_dflash.common.options import generator_seed
from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import Result, SpeculativeDecoder
from alpamayo_dflash.decode.observer import Observer
from alpamayo_dflash.decode.proposer import BlockDraft, Captured
from alpamayo_dflash.decode.verify import Prefilled
from alpamayo_dflash.draft.config import DraftConfig
from alpamayo_dflash.draft.heads import PreviousKind
from alpamayo_dflash.draft.model import INITIAL_STD, DFlashDraft
from alpamayo_dflash.standins.blueprint import RandomCheckpointConfig
from alpamayo_dflash.standins.untrained import noise_window, random_target
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.prompt import Prompt
from alpamayo_dflash.target.quantised import make_fp8
from alpamayo_dflash.target.vlm import Qwen3VLTarget

_PUBLISHED_TAPS = (24, 30, 31, 32, 34)
_MORE_TOKENS = 64  # the end marks, and the texts that losslessness is tried on


class Bench:
    """A target with its prompt, and what decodes it.

    Attributes:
        config: see BenchConfig.
        device: where.
        target: the model.
        prompt: of noise, with the real number of images.
        draft: the one that decodes, random.
        rate: of right tokens that the replay proposes.
        round_rows: W, a sample's rows in a round's pass.
        coc_lengths: of real CoCs, by quantile.

    Raises:
        ValueError: there is no such target, device, acceptance or file of CoC lengths.
    """

    def __init__(self, config: BenchConfig) -> None:
        self.config, self.device = config, check_device(config.device)
        make_current(self.device)
        self.coc_lengths = coc_quantiles(Path(config.coc_counts)) if config.coc_counts else {}
        self.rate = rate_for(config.acceptance, config.text_tokens - 1, config.block_size)
        torch.manual_seed(generator_seed(config.seed))
        self.target = load(config)
        self.prompt = self.target.prompt(noise_window(config.seed)).to(self.device)
        if config.target.startswith("random:"):
            self._widen()
        self.draft = self.make_draft(config.layer_counts[0])
        # Whatever does not fit is said before anything is timed.
        self.round_rows = self.decoder(self.draft).device_rounds.sample_rows

    def _widen(self) -> None:
        """Margins as a trained head has them: the head's rows are the embedding's, permuted.

        The scale keeps greedy clear of near-ties, while at temperature 0.6 some tokens are not the best one.
        """
        embedding, head = self.target.embedding, self.target.head
        with torch.inference_mode():
            embedding.normal_()
            head.copy_(embedding[torch.randperm(len(head), device=self.device)])
            logits = self.decoder(None).prefill(self.prompt).logits_V
            head.mul_(8.5 / float(logits.max()))

    def make_draft(self, layers: int, previous_head: PreviousKind | None = None) -> DFlashDraft:
        """A random draft of the target's width, with a reduced head."""
        config = self.config
        return random_draft(
            self.target,
            layers,
            block_size=config.block_size,
            context_len=config.context_len,
            draft_vocab=config.draft_vocab,
            previous_head=previous_head,
        )

    def decoder(
        self,
        draft: BlockDraft | None,
        row_width: int | None = None,
        proposers: Sequence[Captured] = (),
        *,
        reuse_mib: int = 0,
    ) -> SpeculativeDecoder:
        """A decoder whose rounds run on the device."""
        capacity = -(-len(self.prompt.input_ids) // 64) * 64
        config = DecodeConfig(
            row_width=row_width, prompt_capacity=capacity, loop="device", vision_reuse_mib=reuse_mib
        )
        decoder = SpeculativeDecoder(self.target, draft, config, proposers=proposers)
        if decoder.device_rounds.unsuited is not None:
            raise ValueError(f"the benchmark is of rounds on the device: {decoder.device_rounds.unsuited}")
        return decoder

    def replaying(
        self, row_width: int | None = None, *, reuse_mib: int = 0
    ) -> tuple[SpeculativeDecoder, Replay]:
        """A speculative decoder with a replay, and the replay."""
        replay = Replay(
            samples=SIX,
            length=self.config.text_tokens + max(self.coc_lengths.values(), default=0) + _MORE_TOKENS,
            block=self.config.block_size,
            rate=self.rate,
            vocab=self.target.traj_ids.start or self.target.vocab_size,
            device=self.device,
        )
        return self.decoder(self.draft, row_width, [replay], reuse_mib=reuse_mib), replay

    def options(self, samples: int, seed: int, tokens: int) -> dict[str, Any]:
        """Those of `SpeculativeDecoder.generate`."""
        return {
            "temperature": self.config.temperature,
            "num_traj_samples": samples,
            "seed": seed,
            "max_new_tokens": tokens,
            "trajectories": False,
        }

    def random_prompt(self, index: int) -> Prompt:
        """The prompt with other images and another last token; the same for the same seed and index."""
        prompt = self.prompt
        seed = generator_seed(self.config.seed * 1_000_003 + index)
        generator = torch.Generator(self.device).manual_seed(seed)
        ids, shape = prompt.input_ids.clone(), prompt.pixel_values.shape
        ids[-1] = torch.randint(0, 1000, (), generator=generator, device=self.device)
        pixels = torch.randn(shape, generator=generator, device=self.device)
        return replace(prompt, input_ids=ids, pixel_values=pixels, key=f"random{index}")


def random_draft(
    target: Qwen3VLTarget,
    layers: int,
    *,
    block_size: int,
    context_len: int,
    draft_vocab: int,
    previous_head: PreviousKind | None = None,
) -> DFlashDraft:
    """A random draft of a target's width on its device, with a reduced head."""
    few = min(draft_vocab, target.vocab_size)
    shape = DraftConfig(
        hidden_size=target.hidden_size,
        num_layers=layers,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        intermediate_size=int(target.vlm.config.text_config.intermediate_size),
        vocab_size=target.vocab_size,
        block_size=block_size,
        context_len=context_len,
        target_layer_ids=published_taps(target.num_layers),
        num_target_layers=target.num_layers,
        mask_token_id=target.vocab_size,
        draft_vocab_size=few,
        previous_head=previous_head,
    )
    draft = untrained_draft(shape, target.device).eval()
    with torch.no_grad():
        chosen = torch.randperm(target.vocab_size, device=target.device)[:few].sort().values
        assert draft.token_ids is not None
        draft.token_ids.copy_(chosen)
    return draft


def published_taps(num_layers: int) -> tuple[int, ...]:
    """The published drafts' taps; of a target with fewer layers one in the middle and one near the end."""
    last = num_layers - 1
    return _PUBLISHED_TAPS if last > max(_PUBLISHED_TAPS) else tuple(sorted({last // 2, last - 1}))


def untrained_draft(shape: DraftConfig, device: torch.device) -> DFlashDraft:
    """A draft with random matrices, made on its device, not bound."""
    with torch.device(device):
        draft = DFlashDraft(shape)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.ndim == 2 or name == "mask_embedding":
                parameter.normal_(0.0, INITIAL_STD)
    return draft


def replayed(
    decoder: SpeculativeDecoder,
    replay: Replay,
    read: Prefilled,
    known: list[list[int]],
    *,
    options: dict[str, Any],
    observer: Observer | None = None,
) -> Result:
    """Decode with the target's own continuation replayed: what it writes at this width of rows.

    In bfloat16 that is not always what it writes a row at a time, and behind a near-tie that text would be
    all wrong; so it is asked first.

    Args:
        decoder: from `Bench.replaying`.
        replay: likewise.
        read: the prompt, which this decoder has read.
        known: texts at another width, to begin with.
        options: of `generate`.
        observer: watches the timed decode.
    """
    replay.load(known, options["seed"])
    own = decoder.generate(read, **options).token_ids
    replay.load(own, options["seed"])
    got = decoder.generate(read, **options, observer=observer)
    if got.token_ids != own:
        raise RuntimeError(f"the same prompt and seed gave {own} and then {got.token_ids}")
    return got


def load(config: BenchConfig) -> Alpamayo:
    """The target that the config names.

    Raises:
        ValueError: there is no such size or checkpoint.
    """
    kind, _, size = config.target.partition(":")
    if kind == "random":
        shape: Any = size
        with tempfile.TemporaryDirectory() as folder:
            target = random_target(RandomCheckpointConfig(shape, config.seed, config.device), Path(folder))
        make_fp8(target, config.target_format)
        return target
    return Alpamayo.from_pretrained(
        config.target,
        device=config.device,
        weights=config.weights,
        expert_weights=config.expert_weights,
        vision_weights=config.vision_weights,
    )


def coc_quantiles(path: Path) -> dict[str, int]:
    """CoC lengths at quantiles, from a CSV with columns tokens and steps.

    Raises:
        ValueError: the file has other columns, or no CoC.
    """
    with path.open(newline="", encoding="utf-8") as file:
        try:
            reader = csv.DictReader(file)
            if not {"tokens", "steps"} <= set(reader.fieldnames or ()):
                raise ValueError(f"has columns {reader.fieldnames}; it must have tokens and steps")
            rows = [(int(row["tokens"]), int(row["steps"])) for row in reader]
        except (ValueError, TypeError, csv.Error) as error:  # a row may be short, or hold no numbers
            raise ValueError(f"{path}: {error}") from None
    counts = sorted(row for row in rows if row[0] > 0)
    total = sum(steps for _, steps in counts)
    if not total:
        raise ValueError(f"{path}: holds no CoC")
    out = {}
    for name, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9), ("p99", 0.99)):
        passed = 0
        for tokens, steps in counts:
            passed += steps
            if passed >= share * total:
                out[name] = tokens
                break
    return out


def gpu(device: torch.device) -> dict[str, Any] | None:
    """The card, its driver, and the memory taken; None on a CPU."""
    if device.type != "cuda":
        return None
    return describe_gpu(device) | {"peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)}
