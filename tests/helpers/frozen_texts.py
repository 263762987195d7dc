"""The texts that the tiny target writes, frozen: what a change of the decoder must not change.

Losslessness compares two loops of one revision, so a slip in both would go unseen. The file was made once, by
the revision that it names. To make it again, which only a new tiny target or another noise justifies:
`python -m tests.helpers.frozen_texts tests/data/texts_tiny.json REVISION`; for those of the FP8 target, of
fewer clips: `python -m tests.helpers.frozen_texts tests/data/texts_tiny_fp8.json REVISION fp8`.
"""

import json
import sys
from pathlib import Path

import torch

from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo
from tests.helpers.proposers import Oracle

FILE = Path(__file__).parents[1] / "data" / "texts_tiny.json"
FP8_FILE = FILE.with_name("texts_tiny_fp8.json")
CLIPS, FP8_CLIPS = 40, 3
WORLD_SEED = 9
REQUESTS = {
    "greedy": {"temperature": 0.0, "num_traj_samples": 1, "seed": 0},
    "sampled": {"temperature": 0.6, "num_traj_samples": 6, "seed": 0},
}


def tiny_target(weights="checkpoint"):
    """The shipped target in float32 on the CPU, its parts in one format."""
    parts = dict.fromkeys(("weights", "expert_weights", "vision_weights"), weights)
    return Alpamayo.from_pretrained("tiny", dtype="float32", device="cpu", **parts)


def windows(count=CLIPS):
    """The held-out clips."""
    return [window for window, _ in held_out(count, seed=WORLD_SEED)]


def generate(decoder, window, **options):
    """Each request's result."""
    prefilled = decoder.prefill(window)
    return {name: decoder.generate(prefilled, **request, **options) for name, request in REQUESTS.items()}


def oracle(target, prompt, clip, seed):
    """A draft that knows a clip's frozen texts, and is right three times in four."""
    texts = [text for name in REQUESTS for text in clip[name]["token_ids"]]
    known = {"texts": texts, "prompt_length": len(prompt), "context_len": 512}
    return Oracle(target.vocab_size, 8, errors=0.25, seed=seed, **known)


def way_points(result):
    """Every fourth way-point, metres to five decimals, [samples][way-points][3]."""
    return [[[round(x, 5) for x in point] for point in sample[3::4]] for sample in result.pred_xyz.tolist()]


def clip_of(window, decoders):
    """What the file keeps of a clip: texts, on which the loops agree, and each loop's own way-points."""
    results = {loop: generate(decoder, window) for loop, decoder in decoders.items()}
    clip = {"clip_id": window.clip_id}
    for name, host in results["host"].items():
        assert host.token_ids == results["device"][name].token_ids, (window.clip_id, name)
        clip[name] = {
            "token_ids": host.token_ids,
            "stops": [str(stop) for stop in host.stops],
            "pred_xyz": {loop: way_points(each[name]) for loop, each in results.items()},
        }
    return clip


def main(path, revision, weights="checkpoint"):
    """Write the file."""
    torch.set_num_threads(1)
    target = tiny_target(weights)
    decoders = {
        loop: SpeculativeDecoder(target, config=DecodeConfig(loop=loop)) for loop in ("host", "device")
    }
    count = CLIPS if weights == "checkpoint" else FP8_CLIPS
    clips = [clip_of(window, decoders) for window in windows(count)]
    whole = {"revision": revision, "world_seed": WORLD_SEED, "requests": REQUESTS, "clips": clips}
    Path(path).write_text(json.dumps(whole, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
