"""The speed of prefill, passes, drafts, rounds and whole texts on this machine, each beside its floor.

Every ratio's arms run in one process. Where the target's weights are random no draft can be right: then a
replay proposes (`decode.replay`), and what it was used for is labelled so.
"""

from __future__ import annotations

import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpamayo_dflash.evaluate.floors import DraftShape, TextShape, floors

if TYPE_CHECKING:
    import torch

    from alpamayo_dflash.decode import Prefilled, Result, SpeculativeDecoder
    from alpamayo_dflash.decode.proposer import Proposer
    from alpamayo_dflash.draft import DFlashDraft
    from alpamayo_dflash.target import Alpamayo, Prompt

REPLAYED = ("decode_vs_transformers", "decode_vs_autoregressive", "decode_six_over_one")
"""Keys whose figures rest on replayed proposals."""
_SIX = 6
_NOT_CAPTURED = 10
_PUBLISHED_TAPS = (24, 30, 31, 32, 34)


@dataclass(frozen=True)
class BenchConfig:
    """Measure the engine's speed.

    Attributes:
        target: `random:r1-10b`, `random:medium`, `random:small` (random weights of that size), `tiny`, or a
            checkpoint.
        device: torch device.
        rows: rows of the verify passes that are timed, with commas between.
        draft_layers: layers of the drafts that are timed; the first one's drafts decode.
        block_size: of the drafts.
        context_len: of the drafts.
        draft_vocab: tokens of the drafts' reduced head.
        coc_tokens: tokens of the text that decode figures are for.
        acceptance: acceptance length that the replay gives texts of that length.
        temperature: of sampling.
        repeats: of each timing.
        texts: how many texts of each kind are decoded.
        lossless_prompts: prompts on which speculative and autoregressive texts are compared.
        coc_counts: CSV of CoC lengths (columns tokens, steps); empty leaves the table of lengths out.
        transformers: time transformers too.
        seed: of weights, prompts and noise.
        out: the JSON file to write.
    """

    target: str = "random:r1-10b"
    device: str = "cuda"
    rows: str = "1,8,16,32,48,64,96,256"
    draft_layers: str = "2,5"
    block_size: int = 8
    context_len: int = 64
    draft_vocab: int = 4096
    coc_tokens: int = 17
    acceptance: float = 6.25
    temperature: float = 0.6
    repeats: int = 30
    texts: int = 48
    lossless_prompts: int = 20
    coc_counts: str = ""
    transformers: bool = True
    seed: int = 0
    out: Path = Path("docs/results/engine.json")

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.texts < 2:
            raise ValueError(f"texts is {self.texts}; it must be at least 2: the first one is not timed")
        for name in ("block_size", "context_len", "draft_vocab", "coc_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.block_size < 2 or self.coc_tokens < 2:
            raise ValueError("block_size and coc_tokens must be at least 2")
        if self.lossless_prompts < 0:
            raise ValueError(f"lossless_prompts is {self.lossless_prompts}; it must be 0 or more")
        for name in ("rows", "draft_layers"):
            _ = _numbers(getattr(self, name), name)


def _numbers(text: str, name: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} is {text!r}; it must be whole numbers above 0 with commas between")
    return [int(part) for part in parts]


def figures(raw: dict[str, Any]) -> dict[str, float]:
    """The results' keys from the raw timings, milliseconds; a key whose arms were not timed is left out.

    Forwards and rounds by their medians, texts by their means: how many rounds a text takes is drawn.
    """
    median, mean = statistics.median, statistics.fmean
    floor = raw["weight_bytes"] / median(raw["read_bytes_per_s"]) * 1e3
    verify, rounds, texts = raw["verify_ms"], raw["round_ms"], raw["text_ms"]
    keys = {f"verify_{rows}_over_floor": median(times) / floor for rows, times in verify.items()}
    draft, one, six = (
        median(next(iter(raw["draft_ms"].values()))),
        median(rounds["1"]),
        median(rounds[str(_SIX)]),
    )
    if str(raw["block_size"]) in verify:
        block = median(verify[str(raw["block_size"])])
        keys |= {"draft_over_verify": draft / block, "round_overhead": (one - draft - block) / one}
    keys |= {
        "round_six_over_one": six / one,
        "decode_six_over_one": mean(texts["speculative_6"]) / mean(texts["speculative_1"]),
        "decode_vs_autoregressive": mean(texts["autoregressive_1"]) / mean(texts["speculative_1"]),
    }
    if "transformers_1" in texts:
        keys["decode_vs_transformers"] = mean(texts["transformers_1"]) / mean(texts["speculative_1"])
        keys["prefill_vs_transformers"] = median(raw["prefill_ms"]["transformers"]) / median(
            raw["prefill_ms"]["project"]
        )
    return {key: round(value, 4) for key, value in keys.items()}


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure, and write the results.

    Raises:
        ValueError: the target cannot be loaded or the device is not there.
    """
    from alpamayo_dflash.artefacts import provenance, write_json

    started = time.time()
    bench = _Bench(config)
    raw = bench.raw()
    lossless = bench.lossless() if config.lossless_prompts else None
    profile = bench.profile()
    made = provenance(config=config, seed=config.seed, device=config.device, started=started)
    result = {
        "figures": figures(raw),
        "replayed": list(REPLAYED),
        "floors": floors(raw),
        "spread": _spread(raw),
        "lossless": lossless,
        "profile": profile,
        "raw": raw,
        "gpu": bench.gpu(),
        "provenance": made,
    }
    write_json(config.out, result)
    passed = lossless is None or lossless["passed"]
    return {key: result[key] for key in ("figures", "replayed", "floors", "lossless")} | {
        "out": str(config.out),
        "passed": passed,
    }


def _spread(raw: dict[str, Any]) -> dict[str, Any]:
    """Median, quartiles, least and most of every list of timings."""
    out: dict[str, Any] = {}
    for name, value in raw.items():
        if isinstance(value, dict):
            out[name] = _spread(value)
        elif isinstance(value, list) and len(value) > 1 and isinstance(value[0], float):
            low, middle, high = statistics.quantiles(value, n=4)
            numbers = {"min": min(value), "q1": low, "median": middle, "q3": high, "max": max(value)}
            out[name] = {key: round(number, 4) for key, number in numbers.items()}
    return out


class _Bench:
    """A target, its drafts, and the clocks."""

    def __init__(self, config: BenchConfig) -> None:
        import torch

        from alpamayo_dflash.decode.replay import rate_for
        from alpamayo_dflash.evaluate.target_size import noise_window
        from alpamayo_dflash.target.device import check_device

        self.config, self.device = config, check_device(config.device)
        self.rate = rate_for(config.acceptance, config.coc_tokens - 1, config.block_size)
        torch.manual_seed(config.seed)
        self.target = _load(config)
        self.prompt = self.target.prompt(noise_window(config.seed)).to(self.device)
        if config.target.startswith("random:"):
            self._widen()
        self.draft = self._make_draft(_numbers(config.draft_layers, "draft_layers")[0])

    def _widen(self) -> None:
        """Margins as a trained head has them: the head's rows are the embedding's, permuted.

        The scale puts the best logit about 7 above the next (greedy has no near-ties), while at temperature
        0.6 one token in ten or so is another.
        """
        import torch

        embedding, head = self.target.embedding, self.target.head
        with torch.inference_mode():
            embedding.normal_()
            head.copy_(embedding[torch.randperm(len(head), device=self.device)])
            logits = self._decoder(None).prefill(self.prompt).logits_V
            head.mul_(8.5 / float(logits.max()))

    def _make_draft(self, layers: int) -> DFlashDraft:
        import torch

        from alpamayo_dflash.draft import DFlashDraft, DraftConfig

        target, config = self.target, self.config
        last = target.num_layers - 1
        taps = _PUBLISHED_TAPS if last > max(_PUBLISHED_TAPS) else tuple({last // 2, last - 1})
        few = min(config.draft_vocab, target.vocab_size)
        shape = DraftConfig(
            hidden_size=target.hidden_size,
            num_layers=layers,
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            intermediate_size=int(target.vlm.config.text_config.intermediate_size),
            vocab_size=target.vocab_size,
            block_size=config.block_size,
            context_len=config.context_len,
            target_layer_ids=taps,
            num_target_layers=target.num_layers,
            mask_token_id=target.vocab_size,
            draft_vocab_size=few,
        )
        with torch.device(self.device):
            draft = DFlashDraft(shape).eval()
        with torch.no_grad():
            for name, parameter in draft.named_parameters():
                if parameter.ndim == 2 or name == "mask_embedding":
                    parameter.normal_(0.0, 0.02)
            chosen = torch.randperm(target.vocab_size, device=self.device)[:few].sort().values
            assert draft.token_ids is not None
            draft.token_ids.copy_(chosen)
        return draft

    def _decoder(self, draft: Proposer | None, row_width: int | None = None) -> SpeculativeDecoder:
        from alpamayo_dflash.decode import DecodeConfig, SpeculativeDecoder

        capacity = -(-len(self.prompt.input_ids) // 64) * 64
        config = DecodeConfig(row_width=row_width, prompt_capacity=capacity, loop="device")
        return SpeculativeDecoder(self.target, draft, config)

    def _replaying(self, row_width: int | None = None) -> tuple[SpeculativeDecoder, Any]:
        """A speculative decoder with a replay, and the replay."""
        from alpamayo_dflash.decode.replay import Replay

        decoder = self._decoder(self.draft, row_width)
        decoder.engine.replay = Replay(
            samples=_SIX,
            length=512,
            block=self.config.block_size,
            rate=self.rate,
            vocab=self.target.traj_ids.start or self.target.vocab_size,
            device=self.device,
        )
        return decoder, decoder.engine.replay

    def gpu(self) -> dict[str, Any] | None:
        """The card, its driver, and the memory taken."""
        if self.device.type != "cuda":
            return None
        import torch

        from alpamayo_dflash.evaluate.target_size import driver_version

        return {
            "name": torch.cuda.get_device_name(self.device),
            "driver": driver_version(),
            "peak_gib": round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3),
        }

    # Clocks.

    def _sync(self) -> None:
        from alpamayo_dflash.decode import synchronise

        synchronise(self.device)()

    def _wall(self, call: Callable[[], Any], repeats: int, warm: int = 2) -> list[float]:
        """Milliseconds of whole calls, launches included."""
        times = []
        for index in range(repeats + warm):
            self._sync()
            start = time.perf_counter()
            call()
            self._sync()
            if index >= warm:
                times.append(round((time.perf_counter() - start) * 1e3, 4))
        return times

    def _captured(self, call: Callable[[], Any]) -> list[float]:
        """Milliseconds of replays of a call as a CUDA graph; on a CPU of the call."""
        import torch

        if self.device.type != "cuda":
            return self._wall(call, self.config.repeats)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        times = []
        for index in range(self.config.repeats + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if index >= 3:
                times.append(round(start.elapsed_time(end), 4))
        return times

    # What is measured.

    def raw(self) -> dict[str, Any]:
        """All timings."""
        import torch

        config = self.config
        with torch.inference_mode():
            raw: dict[str, Any] = {
                "block_size": config.block_size,
                "coc_tokens": config.coc_tokens,
                "prompt_tokens": len(self.prompt.input_ids),
                "weight_bytes": self._weight_bytes(),
                **self._shapes(),
                **self._ceilings(),
                **self._prefill(),
                "verify_ms": self._verify(),
                **self._drafts(),
            }
        return raw | self._texts()

    def _weight_bytes(self) -> int:
        """Bytes that any pass reads: the text decoder's and the head's."""
        text = self.target.vlm.model.language_model
        decoder = sum(p.numel() * p.element_size() for p in (*text.layers.parameters(), text.norm.weight))
        return int(decoder + self.target.head.numel() * self.target.head.element_size())

    def _shapes(self) -> dict[str, Any]:
        """What `floors` counts from."""
        from torch.utils.flop_counter import FlopCounterMode

        target, draft = self.target, self.draft.config
        shape = TextShape(
            layers=target.num_layers,
            hidden=target.hidden_size,
            heads=target.num_heads,
            kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            mlp=int(target.vlm.config.text_config.intermediate_size),
            vocab=target.vocab_size,
            element_bytes=target.embedding.element_size(),
        )
        heads = DraftShape(
            taps=len(draft.target_layer_ids),
            block_size=draft.block_size,
            context_len=draft.context_len,
            vocab=draft.draft_vocab_size or draft.vocab_size,
        )
        visual = target.vlm.model.visual
        with FlopCounterMode(display=False) as counter:
            target.embed(self.prompt)
        return {
            "shape": asdict(shape),
            "draft_shape": asdict(heads),
            "vision_bytes": sum(p.numel() * p.element_size() for p in visual.parameters()),
            "vision_operations": counter.get_total_flops(),
        }

    def _ceilings(self) -> dict[str, Any]:
        """The rate of reading, and of a large product, on this device now."""
        import torch

        gpu = self.device.type == "cuda"
        size, side = (2**29, 8192) if gpu else (2**22, 512)
        values = torch.randn(size, device=self.device)
        read = [size * 4 / (ms / 1e3) for ms in self._captured(values.sum)]
        del values
        a, b = (torch.randn(side, side, device=self.device, dtype=self.target.dtype) for _ in range(2))
        product = [2 * side**3 / (ms / 1e3) for ms in self._captured(lambda: a @ b)]
        return {"read_bytes_per_s": read, "product_flop_per_s": product}

    def _prefill(self) -> dict[str, Any]:
        verifier = self._decoder(None).verifier
        target, prompt, repeats = self.target, self.prompt, max(3, self.config.repeats // 3)
        embeddings = target.embed(prompt)
        vision = {"project": self._wall(lambda: target.embed(prompt), repeats)}
        prefill = {"project": self._wall(lambda: verifier.read(prompt, embeddings), repeats)}
        if self.config.transformers:
            from transformers import DynamicCache

            text = target.vlm.model.language_model
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

            visual = target.vlm.model.visual
            vision["transformers"] = self._wall(lambda: visual(pixels, prompt.image_grid_thw), repeats)
            prefill["transformers"] = self._wall(reference, repeats)
        return {"vision_ms": vision, "prefill_ms": prefill}

    def _verify(self) -> dict[str, list[float]]:
        """Passes over a chain of so many rows, head included."""
        import torch

        verifier = self._decoder(None).verifier
        prefilled = verifier.prefill(self.prompt)
        out = {}
        for rows in _numbers(self.config.rows, "rows"):
            slots = -(-max(rows, 25) // 64) * 64
            verifier.begin(prefilled, slots)
            at = torch.arange(rows, device=self.device)
            tokens = torch.randint(0, 1000, (rows,), device=self.device)
            seen = torch.zeros(rows, slots, dtype=torch.uint8, device=self.device)
            seen[:, :rows] = torch.ones(rows, rows, device=self.device).tril().to(torch.uint8)
            call = lambda t=tokens, a=at, s=seen: verifier.run(t, a, a, s)  # noqa: E731
            out[str(rows)] = self._captured(call)
        return out

    def _drafts(self) -> dict[str, Any]:
        """A draft's forward, for one sample and for six."""
        times: dict[str, list[float]] = {}
        for layers in _numbers(self.config.draft_layers, "draft_layers"):
            draft = self.draft if layers == self.draft.config.num_layers else self._make_draft(layers)
            for samples in (1, _SIX):
                name = f"{layers} layers" + ("" if samples == 1 else f", {samples} samples")
                times[name] = self._draft(draft, samples)
        return {"draft_ms": times, "draft_vocab": self.draft.config.draft_vocab_size}

    def _draft(self, draft: DFlashDraft, samples: int) -> list[float]:
        import torch

        from alpamayo_dflash.decode.engine import block_of
        from alpamayo_dflash.decode.steps import State

        verifier = self._decoder(draft).verifier
        prefilled = verifier.prefill(self.prompt)
        verifier.begin(prefilled, 64 * samples)
        state = State(
            samples=samples,
            block=draft.block_size,
            width=samples * draft.block_size,
            per_sample=64,
            slots=64 * samples,
            device=self.device,
        )
        state.bases.copy_(torch.arange(samples) * 64)
        block = block_of(draft, verifier.cache, samples=samples, per_sample=64, slots=64 * samples)
        block.begin(verifier.cache.prompt_length)
        state.previous.fill_(3)
        state.lengths.fill_(9)
        return self._captured(lambda: block(state))

    def _texts(self) -> dict[str, Any]:
        """Whole texts: decode times of every arm, the passes behind the first token, and single rounds."""
        config = self.config
        plain = self._decoder(None)
        fast, replay = self._replaying()
        read = {"plain": plain.prefill(self.prompt), "fast": fast.prefill(self.prompt)}
        times: dict[str, list[float]] = {}
        passes: dict[str, list[int]] = {}
        clocks: dict[str, list[float]] = {}
        counts: dict[str, int] = {}
        for samples in (1, _SIX):
            options = [self._options(samples, index, config.coc_tokens) for index in range(config.texts)]
            own = [plain.generate(read["plain"], **each) for each in options]
            clock, got = _RoundClock(), []
            for index, (each, expected) in enumerate(zip(options, own, strict=True)):
                observer = clock if index else None
                known = expected.token_ids
                got.append(self._replayed(fast, replay, read["fast"], known, options=each, observer=observer))
            for arm, results in (("autoregressive", own[1:]), ("speculative", got[1:])):
                times[f"{arm}_{samples}"] = [round(result.timings.decode_ms, 4) for result in results]
                passes[f"{arm}_{samples}"] = [result.rounds for result in results]
            clocks[str(samples)] = clock.times_ms
            counts[f"emitted_{samples}"] = sum(result.emitted for result in got[1:])
            counts[f"passes_{samples}"] = sum(result.passes for result in got[1:])
            if config.transformers:
                name = f"transformers_{samples}"
                times[name], passes[name] = self._transformers(samples)
        out = {
            "text_ms": times,
            "text_rounds": passes,
            "round_ms": clocks,
            "replay": counts | {"rate": round(self.rate, 6)},
        }
        if config.coc_counts:
            out["coc"] = self._lengths(plain, fast, replay, read)
        return out

    def _replayed(
        self,
        fast: SpeculativeDecoder,
        replay: Any,
        read: Prefilled,
        known: list[list[int]],
        *,
        options: dict[str, Any],
        observer: Any = None,
    ) -> Result:
        """Decode with the target's own continuation replayed: what it writes at this width of rows.

        In bfloat16 that is not always what it writes a row at a time, and behind a near-tie that text would
        be all wrong; so it is asked first.
        """
        replay.load(known, options["seed"])
        own = fast.generate(read, **options).token_ids
        replay.load(own, options["seed"])
        got = fast.generate(read, **options, observer=observer)
        if got.token_ids != own:
            raise RuntimeError(f"the same prompt and seed gave {own} and then {got.token_ids}")
        return got

    def _options(self, samples: int, seed: int, tokens: int) -> dict[str, Any]:
        return {
            "temperature": self.config.temperature,
            "num_traj_samples": samples,
            "seed": seed,
            "max_new_tokens": tokens,
            "trajectories": False,
        }

    def _transformers(self, samples: int) -> tuple[list[float], list[int]]:
        """Decode times of `generate`, and its passes behind the first token."""
        from alpamayo_dflash.evaluate.reference import generate

        config, times, passes = self.config, [], []
        for index in range(max(4, config.texts // 8 // samples)):
            given = generate(
                self.target,
                self.prompt,
                temperature=config.temperature,
                top_p=0.98,
                num_traj_samples=samples,
                max_new_tokens=config.coc_tokens,
                seed=index,
            )
            if index:
                times.append(round(given.decode_ms, 4))
                passes.append(max(map(len, given.token_ids)) - 1)
        return times, passes

    def _lengths(
        self, plain: SpeculativeDecoder, fast: SpeculativeDecoder, replay: Any, read: dict[str, Prefilled]
    ) -> list[dict[str, Any]]:
        """Decode times of CoCs of the lengths that real ones have, ends included."""
        rows = []
        for name, tokens in coc_quantiles(Path(self.config.coc_counts)).items():
            times: dict[str, list[float]] = {"autoregressive": [], "speculative": []}
            for index in range(9):
                options = self._options(1, index, tokens + 2)  # and the two end marks
                own = plain.generate(read["plain"], **options)
                got = self._replayed(fast, replay, read["fast"], own.token_ids, options=options)
                if index:
                    times["autoregressive"].append(round(own.timings.decode_ms, 4))
                    times["speculative"].append(round(got.timings.decode_ms, 4))
            rows.append({"quantile": name, "coc_tokens": tokens, "decode_ms": times})
        return rows

    # Losslessness.

    def lossless(self) -> dict[str, Any]:
        """Speculative against autoregressive texts, at one row width and at different ones."""
        import torch

        config = self.config
        same = self._decoder(None, config.block_size)
        fast, replay = self._replaying(config.block_size)
        one = self._decoder(None)
        found = {"prompts": config.lossless_prompts, "tokens": 0, "equal": 0, "texts": 0}
        wide = {"texts": 0, "equal": 0, "near_ties": 0, "not_near_ties": 0}
        largest = 0.0
        for index in range(config.lossless_prompts):
            prompt = self._random_prompt(index)
            with torch.inference_mode():
                embeddings = self.target.embed(prompt)
                read = [d.verifier.read(prompt, embeddings) for d in (same, fast, one)]
            for temperature in (0.0, config.temperature):
                options = self._options(1, index, 24) | {"temperature": temperature}
                expected = same.generate(read[0], **options).token_ids
                replay.load(expected, index)
                got = fast.generate(read[1], **options).token_ids
                found["texts"] += 1
                found["tokens"] += len(expected[0])
                found["equal"] += got == expected
                narrow = one.generate(read[2], **options).token_ids
                wide["texts"] += 1
                wide["equal"] += narrow == got
                if narrow != got or index < _NOT_CAPTURED:
                    tie = _tie(
                        (same, read[0], got[0]),
                        (one, read[2], narrow[0]),
                        temperature=temperature,
                        seed=index,
                    )
                    largest = max(largest, tie["largest_difference"])
                    if narrow != got:
                        wide["near_ties" if tie["near"] else "not_near_ties"] += 1
        passed = found["equal"] == found["texts"] and not wide["not_near_ties"]
        return {
            "one_row_width": found | {"row_width": config.block_size},
            "different_widths": wide | {"widths": [1, config.block_size], "largest_difference": largest},
            "passed": passed,
        }

    def _random_prompt(self, index: int) -> Prompt:
        import torch

        prompt = self.prompt
        ids = prompt.input_ids.clone()
        ids[-1] = torch.randint(0, 1000, ())
        pixels = torch.randn_like(prompt.pixel_values, dtype=torch.float32)
        return replace(prompt, input_ids=ids, pixel_values=pixels, key=f"random{index}")

    # The profiler's view of a round.

    def profile(self) -> dict[str, Any] | None:
        """What happens inside one speculative round, by the profiler; None on a CPU."""
        if self.device.type != "cuda":
            return None
        import torch
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as record

        fast, replay = self._replaying()
        read = fast.prefill(self.prompt)
        options = self._options(1, 0, self.config.coc_tokens)
        fast.generate(read, **options)
        replay.load([[1] * self.config.coc_tokens], 0)
        fast.verifier.begin(read, 64)
        round_ = next(iter(fast.engine.rounds.values()))
        with torch.inference_mode():
            round_.begin(read, 0, [0], 60)
            round_()
            torch.cuda.synchronize()
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
                round_()
                round_()
        allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        host: dict[str, int] = {}
        device: dict[str, list[float]] = {}
        for event in recorded.events():
            if event.device_type.name == "CUDA":
                device.setdefault(_short(event.name), []).append(event.device_time)
            elif event.name.startswith("cuda") or event.name.startswith("cu"):
                host[event.name] = host.get(event.name, 0) + 1
        table = [
            {"name": name, "launches": len(times) / 2, "ms": round(sum(times) / 2e3, 4)}
            for name, times in sorted(device.items(), key=lambda item: -sum(item[1]))
        ]
        return {"rounds": 2, "allocations": allocations, "host_calls": host, "device_per_round": table}


def coc_quantiles(path: Path) -> dict[str, int]:
    """CoC lengths at quantiles, from a CSV with columns tokens and steps.

    Raises:
        ValueError: the file has other columns, or no CoC.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"tokens", "steps"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: has columns {reader.fieldnames}; it must have tokens and steps")
        counts = sorted((int(row["tokens"]), int(row["steps"])) for row in reader if int(row["tokens"]) > 0)
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


class _RoundClock:
    """An observer that takes the time from each round's end to the next one's, host work included."""

    def __init__(self) -> None:
        self.times_ms: list[float] = []
        self._last = 0.0

    def on_prefill(self, prompt_tokens: int, first_tokens: tuple[int, ...]) -> None:
        """The first tokens are known: the device is idle."""
        self._last = time.perf_counter()

    def on_round(self, trace: Any) -> None:
        """A report has been read: the device is idle."""
        now = time.perf_counter()
        self.times_ms.append(round((now - self._last) * 1e3, 4))
        self._last = now

    def span(self, name: str) -> Any:
        """Not timed."""
        import contextlib

        return contextlib.nullcontext()


def _short(name: str) -> str:
    """A kernel's name without its arguments and namespaces."""
    return name.replace("void ", "").partition("<")[0].partition("(")[0].rpartition("::")[2][:60]


def _tie(
    wide_arm: tuple[SpeculativeDecoder, Prefilled, Sequence[int]],
    narrow_arm: tuple[SpeculativeDecoder, Prefilled, Sequence[int]],
    *,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """Where the texts of two arms part, and whether that is a near-tie by the design's rule (invariant 1)."""
    import torch

    from alpamayo_dflash.decode.noise import row_noise, stream_keys
    from alpamayo_dflash.decode.sampling import mask_bias, nucleus

    (wide, wide_read, wide_text), (narrow, narrow_read, narrow_text) = wide_arm, narrow_arm
    part = next((i for i, (a, b) in enumerate(zip(wide_text, narrow_text, strict=False)) if a != b), None)
    shared = list(wide_text[: part or len(wide_text) - 1]) if part != 0 else []
    a = _forced_logits(wide, wide_read, shared)
    b = _forced_logits(narrow, narrow_read, shared)
    largest = float((a - b).abs().max())
    if part is None:
        return {"largest_difference": largest, "near": False}
    target, temper = wide.target, temperature or 1.0
    bias = mask_bias(target.traj_ids, target.vocab_size).to(a.device)
    scores = (a[part] / temper + bias)[None]
    perturbed = scores
    edge = float("inf")
    if temperature:
        keys = stream_keys(seed, wide_read.prompt.key, [0], a.device)
        perturbed = scores + row_noise(keys, torch.tensor([part], device=a.device), target.vocab_size)
        inside = nucleus(scores.softmax(-1), 0.98)
        threshold = scores.masked_fill(~inside, float("inf")).min()
        both = torch.tensor([wide_text[part], narrow_text[part]], device=a.device)
        edge = float((scores[0, both] - threshold).abs().min())
        perturbed = perturbed.masked_fill(~inside, float("-inf"))
    best = perturbed[0].topk(2).values
    margin = min(float(best[0] - best[1]), edge)
    return {"largest_difference": largest, "near": margin < 2 * largest / temper}


def _forced_logits(decoder: SpeculativeDecoder, read: Prefilled, text: Sequence[int]) -> torch.Tensor:
    """Logits [len(text) + 1, V] of a text's tokens and the one behind it, at the decoder's width."""
    import torch

    from alpamayo_dflash.decode.tail import ROOT
    from alpamayo_dflash.decode.walk import Tree

    verifier = decoder.verifier
    verifier.begin(read, 64)
    step = verifier.row_width or 1
    slots = Tree(verifier.cache.tail).add_chain(text, ROOT)
    parts = [verifier.rows(slots[start : start + step]) for start in range(0, len(slots), step)]
    return torch.cat([read.logits_V[None], *parts])


def _load(config: BenchConfig) -> Alpamayo:
    """The target that the config names.

    Raises:
        ValueError: there is no such size or checkpoint.
    """
    from alpamayo_dflash.target import Alpamayo
    from alpamayo_dflash.target.random_checkpoint import random_target
    from alpamayo_dflash.target.random_config import RandomCheckpointConfig

    kind, _, size = config.target.partition(":")
    if kind == "random":
        shape: Any = size
        with tempfile.TemporaryDirectory() as folder:
            return random_target(RandomCheckpointConfig(shape, config.seed, config.device), Path(folder))
    if config.target == "tiny":
        from alpamayo_dflash.tiny import checkpoint_path

        return Alpamayo.from_pretrained(checkpoint_path(), device=config.device)
    return Alpamayo.from_pretrained(config.target, device=config.device)
