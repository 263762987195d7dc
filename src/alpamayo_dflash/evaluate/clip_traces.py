"""`evaluate --trace`: what a page of each clip shows, stored beside the evaluation.

The clip is decoded twice more after the timed runs: once with scores and trajectories, and once with a clock
around the parts of each round. Neither changes what the evaluation measures.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from rich.console import Console

from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.clips.window import CAMERAS, STEP_S, Window
from alpamayo_dflash.common.artefacts import (
    atomic_folder,
    move_aside,
    read_json,
    recover_folder,
    write_record,
)
from alpamayo_dflash.common.extras import needs
from alpamayo_dflash.common.machine import Clock
from alpamayo_dflash.decode.decoder import Result
from alpamayo_dflash.decode.observer import PlaceScores, Recorder, Span, SpanRecorder
from alpamayo_dflash.evaluate.arms import CLIP_ERRORS, Arms, rounds_of
from alpamayo_dflash.evaluate.rows import ClipRow, TraceRow
from alpamayo_dflash.report.clip_trace import FILE, Bar, ClipTrace, Frame, Places, Round
from alpamayo_dflash.target.prompt import Prompt

with needs("clips"):
    from PIL import Image

FOLDER = "trace"
FRAME_WIDTH = 320
MOST_FRAME_BYTES = 150_000
"""Of all frames of a clip; the first of `_QUALITIES` that keeps to it is taken, or the last."""
_QUALITIES = (75, 60, 45, 30)
_DIGITS = 4  # of logits: a hundredth of a per cent of a probability


class ClipTraces:
    """The traces of one evaluation, a folder a clip, each written whole or not at all.

    Args:
        arms: the evaluation's; the speculative loop decodes.
        mark: of the evaluation; traces of another one in the folder are moved aside.

    Attributes:
        folder: of all traces.
    """

    def __init__(self, arms: Arms, mark: str) -> None:
        self._arms, self._mark = arms, mark
        self.folder = arms.config.output_dir / FOLDER
        self._begun = False

    def complete(self, rows: Sequence[ClipRow], source: ClipSource, console: Console) -> int:
        """Trace the clips of rows that have no trace; one that fails is printed and tried again next time.

        Returns:
            How many were traced; their rows have what it cost.
        """
        made = 0
        for row in rows:
            if "trace" in row and (self.folder / row["clip_id"] / FILE).is_file():
                continue
            row.pop("trace", None)
            try:
                window = source.window(row["clip_id"], self._arms.config.t0_us)
                prompt = self._arms.target.prompt(window)
                self._arms.read("dflash", prompt)
                row["trace"] = self.add(window, prompt, row)
                made += 1
            except CLIP_ERRORS as error:
                text = f"clip {row['clip_id']} has no trace: {error}"
                console.print(text, style="red", highlight=False, markup=False)
        return made

    def add(self, window: Window, prompt: Prompt, row: ClipRow) -> TraceRow:
        """Trace a clip whose row is known; the speculative loop has read its prompt.

        Returns:
            What it cost, to be kept in the row.

        Raises:
            ValueError: the loop has read another prompt.
        """
        started = time.perf_counter()
        if not self._begun:
            self._begin()
        trace = clip_trace(self._arms, window, prompt, row, self._mark)
        pictures = list(encoded_frames(window))
        place = self.folder / window.clip_id
        recover_folder(place)
        with atomic_folder(place) as folder:
            for frame, content in pictures:
                trace["frames"].append(frame)
                (folder / frame["file"]).write_bytes(content)
            write_record(folder / FILE, trace)
            size = sum(path.stat().st_size for path in folder.iterdir())
        return {
            "bytes": size,
            "ms": round(1000 * (time.perf_counter() - started), 3),
            "equal": trace["equal"],
        }

    def _begin(self) -> None:
        """Move another evaluation's traces aside."""
        found = next(iter(sorted(self.folder.glob(f"*/{FILE}"))), None)
        if found is not None:
            mark = str(read_json(found).get("evaluation"))
            if mark != self._mark:
                shutil.rmtree(self.folder.with_name(f"{FOLDER}.of-{mark}"), ignore_errors=True)
                move_aside(self.folder, mark, "another evaluation's traces")
        self._begun = True


def clip_trace(arms: Arms, window: Window, prompt: Prompt, row: ClipRow, mark: str) -> ClipTrace:
    """Decode a clip for its page; the frames are still to come.

    Args:
        arms: the evaluation's.
        window: the clip.
        prompt: its prompt, which the speculative loop has read last.
        row: its row.
        mark: the evaluation's.
    """
    config = arms.config
    recorder, watch = Recorder(scores=True), SpanRecorder(Clock(arms.target.device).now_ms)
    result = arms.again("dflash", prompt, config.sampling, recorder, trajectories=True)
    arms.again("dflash", prompt, config.sampling, watch)
    first, rounds = _places(recorder.first_scores), _rounds_of(recorder)
    future = window.ego_future_xyz
    return {
        "evaluation": mark,
        "clip_id": window.clip_id,
        "t0_us": window.t0_us,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "block_size": arms.block_size,
        "equal": result.coc == row["coc"],
        "coc": result.coc,
        "pieces": _pieces(arms, recorder.first_tokens, first, rounds),
        "first_tokens": list(recorder.first_tokens),
        "first": first,
        "rounds": rounds,
        "bars": _bars(watch.spans, row),
        "frames": [],
        "step_s": STEP_S,
        "history_xy": _from_above(window.ego_history_xyz),
        "future_xy": None if future is None else _from_above(future),
        "predicted_xy": _predicted(result),
    }


def _rounds_of(recorder: Recorder) -> list[list[Round]]:
    """The rounds of the evaluation's rows, with their numbers and scores; by sample."""
    rows: list[list[Round]] = [[] for _ in recorder.first_tokens]
    plain = [iter(rounds) for rounds in rounds_of(recorder)]
    for trace in recorder.rounds:
        for part in trace.samples:
            assert part.scores is not None
            rows[part.sample].append(
                {
                    "index": trace.index,
                    **next(plain[part.sample]),
                    "target": _places(part.scores.target),
                    "at": list(part.scores.at),
                    "draft": _places(part.scores.draft),
                }
            )
    return rows


def _places(places: Sequence[PlaceScores]) -> Places:
    return {
        "ids": [list(place.ids) for place in places],
        "logits": [[_rounded(logit) for logit in place.logits] for place in places],
        "log_sum_exp": [_rounded(place.log_sum_exp) for place in places],
        "tempered_log_sum_exp": [_rounded(place.tempered_log_sum_exp) for place in places],
        "nucleus_mass": [float(f"{place.nucleus_mass:.{_DIGITS}g}") for place in places],
        "nucleus_logit": [_rounded(place.nucleus_logit) for place in places],
        "chosen": [place.chosen for place in places],
        "chosen_logit": [
            None if place.chosen_logit is None else _rounded(place.chosen_logit) for place in places
        ],
        "chosen_rank": [place.chosen_rank for place in places],
    }


def _rounded(logit: float) -> float:
    return round(logit, _DIGITS)


def _pieces(
    arms: Arms, first_tokens: Sequence[int], first: Places, rounds: Sequence[Sequence[Round]]
) -> dict[str, str]:
    """The text of every token that a trace names."""
    found, places = set(first_tokens), [first]
    for each in (round_ for sample in rounds for round_ in sample):
        found.update((each["anchor"], *each["proposed"], *each["emitted"]))
        places += [each["target"], each["draft"]]
    for some in places:
        found.update(*some["ids"], (token for token in some["chosen"] if token is not None))
    decode = arms.target.tokenizer.decode
    return {str(token): decode([token], skip_special_tokens=False) for token in sorted(found)}


def _bars(spans: Sequence[Span], row: ClipRow) -> list[Bar]:
    """Prompt, rounds and trajectory one after another."""
    times = row["arms"]["dflash"]
    began = min((span.start_ms for span in spans), default=0.0) - times["prefill_ms"]
    parts = [(span.name, span.start_ms - began, span.end_ms - began) for span in spans]
    end = max((part[2] for part in parts), default=times["prefill_ms"])
    parts = [("prefill", 0.0, times["prefill_ms"]), *parts, ("action", end, end + times["action_ms"])]
    return [{"name": name, "start_ms": round(one, 3), "end_ms": round(two, 3)} for name, one, two in parts]


def _predicted(result: Result) -> list[list[tuple[float, float]]]:
    assert result.pred_xyz is not None, "trajectories were asked for"
    return [_from_above(path) for path in result.pred_xyz.cpu().numpy()]


def _from_above(xyz: npt.NDArray[np.float32]) -> list[tuple[float, float]]:
    return [(round(float(x), 3), round(float(y), 3)) for x, y in xyz[:, :2]]


def encoded_frames(window: Window) -> Iterator[tuple[Frame, bytes]]:
    """The frames as small JPEG files, all of one quality, in the order of cameras and time."""
    small = [[_small(frame) for frame in frames] for frames in window.frames]
    contents: list[list[bytes]] = []
    for quality in _QUALITIES:
        contents = [[_jpeg(image, quality) for image in images] for images in small]
        if sum(len(each) for images in contents for each in images) <= MOST_FRAME_BYTES:
            break
    for camera, images in zip(window.cameras, contents, strict=True):
        for index, content in enumerate(images):
            name = CAMERAS[camera]
            digest = hashlib.sha256(content).hexdigest()
            yield (
                {"camera": name, "index": index, "file": f"{name}-{index}.jpg", "sha256": digest},
                content,
            )


def _small(frame: npt.NDArray[np.uint8]) -> Image.Image:
    """A frame at most `FRAME_WIDTH` wide."""
    image = Image.fromarray(frame)
    if image.width <= FRAME_WIDTH:
        return image
    size = (FRAME_WIDTH, max(1, round(image.height * FRAME_WIDTH / image.width)))
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=True)
    return stream.getvalue()
