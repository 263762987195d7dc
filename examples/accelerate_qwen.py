"""A Qwen3-VL that somebody else has loaded, decoded on its own weights; the words are transformers' own.

    python examples/accelerate_qwen.py DRAFT

DRAFT is a draft's folder (`examples/train_draft.py` makes one). The model here is the tiny Alpamayo's
language half, and its inputs are of a made-up window. With a model of yours they are
`Qwen3VLForConditionalGeneration.from_pretrained(...)` and what its processor returns.
"""

import argparse

import numpy as np

from alpamayo_dflash import Alpamayo, DFlashDraft, Window, accelerate

STRAIGHT = np.stack((np.arange(-15.0, 1.0) * 0.5, np.zeros(16), np.zeros(16)), axis=1)


def loaded() -> tuple:
    """A model, its tokenizer, and a processor's inputs."""
    target = Alpamayo.from_pretrained("tiny")
    window = Window(
        clip_id="someone's",
        t0_us=0,
        cameras=(0, 1, 2, 6),
        frames=np.full((4, 4, 128, 256, 3), 100, dtype=np.uint8),
        ego_history_xyz=STRAIGHT.astype(np.float32),
        ego_history_rot=np.eye(3, dtype=np.float32)[None].repeat(16, axis=0),
    )
    return target.vlm, target.tokenizer, target.transformers_inputs(target.prompt(window))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("draft")
    given = parser.parse_args()
    model, tokenizer, inputs = loaded()
    decoder = accelerate(model, DFlashDraft.from_pretrained(given.draft), tokenizer=tokenizer)
    prompt = decoder.target.prompt_from_inputs(inputs, key="someone's@0")
    ours = decoder.generate(prompt, temperature=0.0)
    tokens = ours.token_ids[0]
    theirs = model.generate(**inputs, do_sample=False, max_new_tokens=len(tokens))
    if theirs[0, -len(tokens) :].tolist() != tokens:
        raise SystemExit(f"transformers writes something else: {tokenizer.decode(theirs[0].tolist())!r}")
    print(ours.coc[0])
    print(f"{len(tokens)} tokens, as transformers writes them, in {ours.passes} passes after the prompt's")
