"""The timings: prefill, passes, drafts, and whole texts with their rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from alpamayo_dflash.bench.clocks import RoundClock, ceilings, graph_ms, wall_ms
from alpamayo_dflash.bench.compiled import compiled_texts, why_not_compiled
from alpamayo_dflash.bench.figures import SIX
from alpamayo_dflash.bench.floors import DraftShape, TextShape
from alpamayo_dflash.bench.generation import Texts
from alpamayo_dflash.bench.setup import Bench, replayed
from alpamayo_dflash.decode.cache import per_sample_slots
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.decoder import Result, SpeculativeDecoder
from alpamayo_dflash.decode.picks import DraftPicks
from alpamayo_dflash.decode.proposer import StaticBlock
from alpamayo_dflash.decode.round_device import static_block
from alpamayo_dflash.decode.steps import State
from alpamayo_dflash.decode.verify import Prefilled, Verifier
from alpamayo_dflash.draft.heads import KINDS
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.evaluate.reference import generate
from alpamayo_dflash.target.quantised import is_fp8

_END_MARKS = 2
_SAMPLES = (1, SIX)
_FEW_TEXTS = 21  # of transformers, and of each length; the first is not timed
_TEXTS_OF_SIX = 5  # of transformers, which takes a second for each


def timings(bench: Bench) -> dict[str, Any]:
    """All timings, milliseconds, and what their floors are counted from."""
    config, target = bench.config, bench.target
    with torch.inference_mode():
        raw: dict[str, Any] = {
            "block_size": config.block_size,
            "round_rows": bench.round_rows,
            "coc_tokens": config.text_tokens,
            "prompt_tokens": len(bench.prompt.input_ids),
            "weight_bytes": _weight_bytes(bench),
            **shapes(bench),
            **ceilings(config.repeats, bench.device, target.dtype),
            **_prompts(bench),
            "verify_ms": _passes(bench),
            "draft_ms": _drafts(bench),
            "picks_ms": _picks(bench),
        }
    return raw | _texts(bench)


def _weight_bytes(bench: Bench) -> int:
    """Bytes that any pass reads: the text decoder's and the head's."""
    text, head = bench.target.vlm.model.language_model, bench.target.head
    decoder = sum(p.numel() * p.element_size() for p in (*text.layers.parameters(), text.norm.weight))
    return int(decoder + head.numel() * head.element_size())


def shapes(bench: Bench) -> dict[str, Any]:
    """What `floors` counts from."""
    target, draft = bench.target, bench.draft.config
    shape = TextShape(
        layers=target.num_layers,
        hidden=target.hidden_size,
        heads=target.num_heads,
        kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        mlp=int(target.vlm.config.text_config.intermediate_size),
        vocab=target.vocab_size,
        element_bytes=target.embedding.element_size(),
        fp8=is_fp8(target.weight_formats["text"]),
    )
    heads = DraftShape(
        taps=len(draft.target_layer_ids),
        block_size=draft.block_size,
        context_len=draft.context_len,
        vocab=draft.draft_vocab_size or draft.vocab_size,
    )
    with FlopCounterMode(display=False) as counter:
        target.see(bench.prompt)
    return {
        "shape": asdict(shape),
        "draft_shape": asdict(heads),
        "vision_bytes": sum(p.numel() * p.element_size() for p in target.vlm.model.visual.parameters()),
        "vision_operations": counter.get_total_flops(),
        "vision_product_operations": sum(
            flops
            for op, flops in counter.get_flop_counts()["Global"].items()
            if op in (torch.ops.aten.mm, torch.ops.aten.addmm)  # a batched one would be attention's
        ),
        "vision_fp8": is_fp8(target.weight_formats["vision"]),
    }


def _prompts(bench: Bench) -> dict[str, dict[str, list[float]]]:
    """Vision, and the language model's pass over the prompt, by arm."""
    config, target, prompt = bench.config, bench.target, bench.prompt
    verifier = bench.decoder(None).verifier
    features = verifier.vision(prompt)
    embeddings = target.placed(prompt.input_ids, target.image_positions(prompt.input_ids, features), features)
    text, visual = target.vlm.model.language_model, target.vlm.model.visual
    seen = (prompt.input_ids == target.special.image_pad)[None]
    pixels = prompt.pixel_values.to(target.dtype)

    def reference() -> None:
        out = text(
            inputs_embeds=embeddings.hidden[None],
            position_ids=prompt.position_ids[:, None],
            past_key_values=DynamicCache(),
            use_cache=True,
            visual_pos_masks=seen,
            deepstack_visual_embeds=list(embeddings.deepstack),
        )
        target.vlm.lm_head(out.last_hidden_state[:, -1:])

    vision = {"project": wall_ms(lambda: verifier.vision(prompt), config.repeats, bench.device)}
    prefill = {"project": wall_ms(lambda: verifier.read(prompt, features), config.repeats, bench.device)}
    if config.transformers:
        vision["transformers"] = wall_ms(
            lambda: visual(pixels, prompt.image_grid_thw), config.repeats, bench.device
        )
        prefill["transformers"] = wall_ms(reference, config.repeats, bench.device)
    return {"vision_ms": vision, "prefill_ms": prefill}


def _passes(bench: Bench) -> dict[str, list[float]]:
    """Passes over a chain of so many rows, head included."""
    config, device = bench.config, bench.device
    verifier = bench.decoder(None).verifier
    prefilled = verifier.prefill(bench.prompt)
    least = per_sample_slots(config.text_tokens, bench.round_rows)
    out = {}
    for rows in sorted({*config.row_counts, bench.round_rows}):
        slots = max(least, per_sample_slots(rows, 0))
        call = rows_call(verifier, prefilled, rows, slots)
        out[str(rows)] = graph_ms(call, config.repeats, device)
    return out


def rows_call(verifier: Verifier, prefilled: Prefilled, rows: int, slots: int) -> Callable[[], object]:
    """A pass over a chain of so many rows in a tail of so many slots, head included."""
    device = verifier.target.device
    verifier.begin(prefilled, slots)
    at = torch.arange(rows, device=device)
    tokens = torch.randint(0, 1000, (rows,), device=device)
    seen = torch.zeros(rows, slots, dtype=torch.uint8, device=device)
    seen[:, :rows] = torch.ones(rows, rows, device=device).tril().to(torch.uint8)
    return partial(verifier.run, tokens, at, at, seen)


def _drafts(bench: Bench) -> dict[str, list[float]]:
    """A draft's forward, for one sample and for six (names as `floors.draft_of` reads them)."""
    out: dict[str, list[float]] = {}
    for layers in bench.config.layer_counts:
        same = layers == bench.draft.config.num_layers
        draft = bench.draft if same else bench.make_draft(layers)
        for samples in _SAMPLES:
            name = f"{layers} layers" + ("" if samples == 1 else f", {samples} samples")
            out[name] = _draft(bench, draft, samples)
    return out


def _draft(bench: Bench, draft: DFlashDraft, samples: int) -> list[float]:
    block, state = _begun(bench, draft, samples)
    return graph_ms(lambda: block(state), bench.config.repeats, bench.device)


def _picks(bench: Bench) -> dict[str, list[float]]:
    """A draft's forward and the choice of its tokens for one sample, by its head on previous picks."""
    config, target = bench.config, bench.target
    out: dict[str, list[float]] = {}
    for kind in (None, *KINDS):
        draft = bench.make_draft(bench.draft.config.num_layers, kind)
        block, state = _begun(bench, draft, 1)
        picks = DraftPicks(
            block,
            samples=1,
            places=draft.block_size - 1,
            target_ids=(target.vocab_size, target.traj_ids),
            sampling=Sampling(config.temperature),
            device=bench.device,
        )
        out[kind or "no"] = graph_ms(partial(picks, state), config.repeats, bench.device)
    return out


def _begun(bench: Bench, draft: DFlashDraft, samples: int) -> tuple[StaticBlock, State]:
    """A draft's block, and the state that it finds after a round that accepted five tokens."""
    config, verifier = bench.config, bench.decoder(draft).verifier
    prefilled = verifier.prefill(bench.prompt)
    per_sample = per_sample_slots(config.text_tokens, bench.round_rows)
    slots = samples * per_sample
    verifier.begin(prefilled, slots)
    state = State(
        samples=samples,
        block=draft.block_size,
        width=samples * draft.block_size,
        per_sample=per_sample,
        slots=slots,
        device=bench.device,
    )
    state.bases.copy_(torch.arange(samples) * per_sample)
    block = static_block(draft, verifier.cache, samples=samples, per_sample=per_sample, slots=slots)
    block.begin(verifier.cache.prompt_length)
    state.lengths.fill_(min(config.text_tokens, 9))
    state.previous.copy_((state.lengths - 6).clamp_min(0))
    return block, state


class _Pair:
    """The two loops of the project, each after its own reading of the prompt."""

    def __init__(self, bench: Bench) -> None:
        self.plain: SpeculativeDecoder = bench.decoder(None)
        fast, self.replay = bench.replaying()
        self.fast: SpeculativeDecoder = fast
        self.read: tuple[Prefilled, Prefilled] = (
            self.plain.prefill(bench.prompt),
            fast.prefill(bench.prompt),
        )

    def decode(self, options: dict[str, Any], clock: RoundClock | None = None) -> tuple[Result, Result]:
        """A text one token a pass, and the same with replayed proposals."""
        own = self.plain.generate(self.read[0], **options)
        known = own.token_ids
        fast, replay = self.fast, self.replay
        return own, replayed(fast, replay, self.read[1], known, options=options, observer=clock)


def _texts(bench: Bench) -> dict[str, Any]:
    """Whole texts: decode times of every arm, the passes after the first token, and single rounds."""
    config, pair = bench.config, _Pair(bench)
    times: dict[str, list[float]] = {}
    passes: dict[str, list[int]] = {}
    clocks: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    ran: dict[str, Any] = {}
    for samples in _SAMPLES:
        clock, kept = RoundClock(), []
        for index in range(config.texts):
            options = bench.options(samples, index, config.text_tokens)
            found = pair.decode(options, clock if index else None)
            kept += [found] if index else []
        for arm, results in zip(("autoregressive", "speculative"), zip(*kept, strict=True), strict=True):
            times[f"{arm}_{samples}"] = [round(result.timings.decode_ms, 4) for result in results]
            passes[f"{arm}_{samples}"] = [result.rounds for result in results]
        counts[f"emitted_{samples}"] = sum(speculative.emitted for _, speculative in kept)
        counts[f"passes_{samples}"] = sum(speculative.passes for _, speculative in kept)
        clocks[str(samples)] = clock.times_ms
        if config.transformers:
            name = f"transformers_{samples}"
            times[name], passes[name] = _transformers(bench, samples)
            ran[str(samples)], more = _compiled(bench, samples)
            times |= more
            passes |= {arm: [config.text_tokens - 1] * len(ms) for arm, ms in more.items()}
    out = {
        "text_ms": times,
        "text_rounds": passes,
        "compiled": ran,
        "round_ms": clocks,
        "replay": counts | {"rate": round(bench.rate, 6)},
    }
    if bench.coc_lengths:
        out["coc"] = _lengths(bench, pair)
    return out


def _transformers(bench: Bench, samples: int) -> tuple[list[float], list[int]]:
    """Decode times of `generate`, and its passes after the first token."""
    config, times, passes = bench.config, [], []
    for index in range(min(config.texts, _FEW_TEXTS if samples == 1 else _TEXTS_OF_SIX)):
        given = generate(
            bench.target,
            bench.prompt,
            temperature=config.temperature,
            top_p=Sampling().top_p,
            num_traj_samples=samples,
            max_new_tokens=config.text_tokens,
            seed=index,
        )
        if index:
            times.append(round(given.decode_ms, 4))
            passes.append(max(map(len, given.token_ids)) - 1)
    return times, passes


def _compiled(bench: Bench, samples: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """On what transformers' fast way ran, or why not; and its decode times, of texts with all passes."""
    config = bench.config
    because = why_not_compiled(bench.device, None)
    if because is not None:
        return {"because": because}, {}
    texts = Texts(config.text_tokens, samples, config.temperature)
    most = min(config.texts, _FEW_TEXTS if samples == 1 else _TEXTS_OF_SIX) - 1
    found = compiled_texts(bench.target, bench.prompt, texts, repeats=most)
    times = found.pop("decode_ms")
    return found, {f"compiled_{samples}": times} if times else {}


def _lengths(bench: Bench, pair: _Pair) -> list[dict[str, Any]]:
    """Decode times of CoCs of the lengths that real ones have, ends included."""
    rows = []
    for name, tokens in bench.coc_lengths.items():
        times: dict[str, list[float]] = {"autoregressive": [], "speculative, replayed": []}
        for index in range(_FEW_TEXTS):
            found = pair.decode(bench.options(1, index, tokens + _END_MARKS))
            for arm, result in zip(times, found, strict=True):
                times[arm] += [round(result.timings.decode_ms, 4)] if index else []
        rows.append({"quantile": name, "coc_tokens": tokens, "decode_ms": times})
    return rows
