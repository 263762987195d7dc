"""What bounds each timing of the benchmark: the bytes it must read and the operations it must do.

Bytes over the rate of reading, operations over the rate of a large product; the larger of the two is the
floor. Small terms are left out: norms, rotary tables, the tail's keys, activations.

Shapes: R rows, P prompt tokens, L layers, C hidden, H query heads, K KV heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alpamayo_dflash.bench.figures import format_parts, round_rows, third_quartile

_REPLAYED = "speculative, replayed"


@dataclass(frozen=True)
class Work:
    """What must be read and done.

    Attributes:
        bytes: read once.
        operations: multiplications and additions, each counted.
        fp8_operations: those of them that are of e4m3 by e4m3.
    """

    bytes: float
    operations: float
    fp8_operations: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What a card does a second, measured in the same run.

    Attributes:
        read: bytes.
        product: operations of a large product.
        fp8_product: the same of e4m3 by e4m3; of a run without, `product`.
    """

    read: float
    product: float
    fp8_product: float

    def by_bytes(self, work: Work) -> float:
        """Seconds in which it can be read."""
        return work.bytes / self.read

    def by_operations(self, work: Work) -> float:
        """Seconds in which it can be done."""
        fp8 = work.fp8_operations
        return (work.operations - fp8) / self.product + fp8 / self.fp8_product

    def least(self, work: Work) -> float:
        """Seconds that it takes at least."""
        return max(self.by_bytes(work), self.by_operations(work))


@dataclass(frozen=True)
class TextShape:
    """The sizes of a target's text model.

    Attributes:
        layers: L.
        hidden: C.
        heads: H.
        kv_heads: K.
        head_dim: D.
        mlp: width of the gated MLP.
        vocab: V.
        element_bytes: of a weight.
        fp8: whether the layers' products are of e4m3 by e4m3.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    element_bytes: int
    fp8: bool = False

    @property
    def layer_weights(self) -> int:
        """Numbers in one layer's products."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return self.hidden * (attention + 3 * self.mlp)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's products."""
        return self.layer_weights * (1 if self.fp8 else self.element_bytes)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one cache entry's keys and values, in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.element_bytes

    def attention_operations(self, queries: float, keys: float) -> float:
        """Scores and sums of one layer, every query over every key."""
        return 4 * queries * keys * self.heads * self.head_dim


@dataclass(frozen=True)
class DraftShape:
    """The sizes of a draft whose layers are as wide as the target's.

    Attributes:
        taps: how many tapped layers feed it.
        block_size: b.
        context_len: X.
        vocab: rows of its head.
    """

    taps: int
    block_size: int
    context_len: int
    vocab: int


def floors(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Every timing beside its floor, from the raw timings of one run.

    Args:
        raw: of `bench`: `shape`, `draft_shape`, the rates, and the timings.

    Returns:
        the two rates (medians), and rows of `what`, `arm`, `measured_ms` (median, of texts the mean),
        `floor_ms`, `bound` ("bytes" or "operations": which is larger) and `over_floor`.
    """
    read, product = (statistics.median(raw[key]) for key in ("read_bytes_per_s", "product_flop_per_s"))
    rates = Rates(read, product, product)
    return {
        "read_bytes_per_s": read,
        "product_flop_per_s": product,
        "rows": [_row(rates, *line) for line in _lines(raw)],
    }


def format_floors(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`floors` of `bench --beside`: of each part in either format, at the rates of either format's products.

    Args:
        raw: of `bench.formats`: by format `counts` (`bench.decode.shapes`, `bench.expert.expert_sizes`), the
            rates, and the timings.
    """
    keys = ("read_bytes_per_s", "product_flop_per_s", "fp8_product_flop_per_s")
    # A product's slow runs are the card's, not the work's.
    read, product, fp8 = (statistics.median(raw[keys[0]]), *(third_quartile(raw[key]) for key in keys[1:]))
    rates, rows = Rates(read, product, fp8), []
    for part, times in format_parts(raw).items():
        for name, counts in raw["counts"].items():
            line = _format_work(part, counts, raw["prompt_tokens"])
            if line is not None:
                what, count, work = line
                rows.append(_row(rates, what, name, statistics.median(times[name]), (count, work)))
    return dict(zip(keys, (read, product, fp8), strict=True)) | {"rows": rows}


def _format_work(part: str, counts: Mapping[str, Any], prompt: int) -> tuple[str, int, Work] | None:
    """What a part is, how often which work is done; None of whole windows."""
    shape, expert = TextShape(**counts["shape"]), TextShape(**counts["expert_shape"])
    kind, *number = part.removesuffix("_ms").split("_")
    if kind == "vision":
        products = counts["vision_product_operations"] if counts["vision_fp8"] else 0
        return kind, 1, Work(counts["vision_bytes"], counts["vision_operations"], products)
    if kind == "prompt":
        return "prompt's pass", 1, prefill_work(shape, prompt)
    if kind == "verify":
        return f"pass, {number[0]} rows", 1, pass_work(shape, prompt, int(number[0]))
    if kind == "expert":
        samples, steps = int(number[0]), counts["steps"]
        work = expert_work(expert, counts["expert_prompt_tokens"], samples * counts["waypoints"])
        return _of(f"action expert, {steps} steps", samples), steps, work
    return None


def window_floors(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`floors` of `bench --window`, and `parts`: each part's floor with one sample.

    The rate of products is its third quartile: slow runs are the card's, not the work's.
    """
    read = statistics.median(raw["read_bytes_per_s"])
    product = third_quartile(raw["product_flop_per_s"])
    rates, rows = Rates(read, product, product), []
    for name, times in raw.get("expert_ms", {}).items():
        form, _, samples = name.partition("_")
        step = Work(raw["expert_bytes"], raw["expert_operations"][samples])
        what = _of(f"action expert, {raw['steps']} steps", int(samples))
        rows.append(_row(rates, what, form, statistics.median(times), (raw["steps"], step)))
    parts = {}
    for part, (rounds, *works) in _part_works(raw).items():
        arm = _REPLAYED if part == "decode" else "project"
        measured = statistics.median(raw["window_parts_ms"]["1"][part])
        row = _row(rates, f"window, {part}", arm, measured, *((rounds, work) for work in works))
        parts[part] = row["floor_ms"]
        rows.append(row)
    if "copy_ms" in raw:
        parts = {"preprocess": round(statistics.median(raw["copy_ms"]), 4), **parts}
    return {"read_bytes_per_s": read, "product_flop_per_s": product, "rows": rows, "parts": parts}


def _part_works(raw: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Of each part of a window with one sample how many times what work is done."""
    if "window_parts_ms" not in raw:
        return {}
    shape, draft, prompt = TextShape(**raw["shape"]), DraftShape(**raw["draft_shape"]), raw["prompt_tokens"]
    round_ = draft_work(shape, draft, raw["draft_layers"], 1), pass_work(shape, prompt, round_rows(raw))
    return {
        "vision": (1, Work(raw["vision_bytes"], raw["vision_operations"])),
        "prompt": (1, prefill_work(shape, prompt)),
        "decode": (statistics.fmean(raw["window_rounds"]["1"]), *round_),
        "action": (raw["steps"], Work(raw["expert_bytes"], raw["expert_operations"]["1"])),
    }


def _row(rates: Rates, what: str, arm: str, measured: float, *works: tuple[float, Work]) -> dict[str, Any]:
    """A row whose work is done so many times."""
    by_bytes, by_operations, floor = (
        sum(times * seconds(work) for times, work in works) * 1e3
        for seconds in (rates.by_bytes, rates.by_operations, rates.least)
    )
    return {
        "what": what,
        "arm": arm,
        "measured_ms": round(measured, 4),
        "floor_ms": round(floor, 4),
        "bound": "bytes" if by_bytes >= by_operations else "operations",
        "over_floor": round(measured / floor, 4),
    }


def _lines(raw: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """What was timed, by which arm, how long it took, and its work."""
    shape, draft = TextShape(**raw["shape"]), DraftShape(**raw["draft_shape"])
    prompt, rows_each = raw["prompt_tokens"], round_rows(raw)
    median, mean = statistics.median, statistics.fmean
    vision = Work(raw["vision_bytes"], raw["vision_operations"])
    for arm, times in raw["vision_ms"].items():
        yield "vision", arm, median(times), (1, vision)
    for arm, times in raw["prefill_ms"].items():
        yield "prefill without vision", arm, median(times), (1, prefill_work(shape, prompt))
    for rows, times in raw["verify_ms"].items():
        yield f"pass, {rows} rows", "project", median(times), (1, pass_work(shape, prompt, int(rows)))
    for name, times in raw["draft_ms"].items():
        layers, samples = draft_of(name)
        yield f"draft, {name}", "project", median(times), (1, draft_work(shape, draft, layers, samples))
    first, _ = draft_of(next(iter(raw["draft_ms"])))

    def round_work(samples: int) -> tuple[Work, Work]:
        return draft_work(shape, draft, first, samples), pass_work(shape, prompt, samples * rows_each)

    for samples, times in raw["round_ms"].items():
        yield (
            _of("round", int(samples)),
            _REPLAYED,
            median(times),
            *((1, w) for w in round_work(int(samples))),
        )
    for name, times in raw["text_ms"].items():
        arm, _, number = name.rpartition("_")
        samples, passes = int(number), mean(raw["text_rounds"][name])
        if not passes:  # every text ended with its first token
            continue
        what = _of(f"CoC of up to {raw['coc_tokens']} tokens", samples)
        if arm == "speculative":
            yield what, _REPLAYED, mean(times), *((passes, work) for work in round_work(samples))
            continue
        one = pass_work(shape, prompt, samples)
        yield what, arm, mean(times), (passes, one)
        yield _of("one token", samples), arm, mean(times) / passes, (1, one)


def draft_of(name: str) -> tuple[int, int]:
    """Layers and samples of a key of `draft_ms`, "2 layers" or "2 layers, 6 samples"."""
    layers, _, samples = name.partition(",")
    return int(layers.split()[0]), int(samples.split()[0]) if samples else 1


def _of(what: str, samples: int) -> str:
    return what if samples == 1 else f"{what}, {samples} samples"


def prefill_work(shape: TextShape, prompt: int) -> Work:
    """A prompt's causal pass, one row of logits."""
    head = shape.vocab * shape.hidden
    seen = shape.layers * shape.attention_operations(prompt, prompt) / 2
    layers = _layers_work(shape, prompt)
    read, done = layers.bytes + head * shape.element_bytes, layers.operations + 2 * head + seen
    return Work(read, done, layers.fp8_operations)


def _layers_work(shape: TextShape, rows: int) -> Work:
    """The products of all layers over so many rows."""
    done = 2 * shape.layers * shape.layer_weights * rows
    return Work(shape.layers * shape.layer_bytes, done, done if shape.fp8 else 0.0)


def pass_work(shape: TextShape, prompt: int, rows: int) -> Work:
    """A verify pass of so many rows, all with logits, after a prompt."""
    head, layers = shape.vocab * shape.hidden, _layers_work(shape, rows)
    seen = shape.layers * shape.attention_operations(rows, prompt)
    cached = shape.layers * prompt * shape.entry_bytes
    read = layers.bytes + head * shape.element_bytes + cached
    return Work(read, layers.operations + 2 * head * rows + seen, layers.fp8_operations)


def expert_work(shape: TextShape, prompt: int, rows: int) -> Work:
    """A step of the action expert, the projections left out: so many way-points after one prompt."""
    layers = _layers_work(shape, rows)
    seen = shape.layers * shape.attention_operations(rows, prompt)
    cached = shape.layers * prompt * shape.entry_bytes
    return Work(layers.bytes + cached, layers.operations + seen, layers.fp8_operations)


def draft_work(shape: TextShape, draft: DraftShape, layers: int, samples: int) -> Work:
    """A draft's block for each sample, and the features of as many new states."""
    rows, c = samples * draft.block_size, shape.hidden
    features, head = draft.taps * c * c, draft.vocab * c
    weights = features + layers * shape.layer_weights + head
    new_keys = layers * 2 * shape.kv_heads * shape.head_dim * c
    seen = layers * shape.attention_operations(rows, draft.context_len + draft.block_size)
    return Work(weights * shape.element_bytes, 2 * rows * (weights + new_keys) + seen)
