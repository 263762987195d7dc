"""Trains DFlash drafts with speculators 0.9.0, the field's own trainer, on a distillation set of ours.

    .venv-speculators/bin/python -m tests.peers.speculators_training documents --data D --world W --out S
    .venv-speculators/bin/python -m tests.peers.speculators_training train --documents S --out F \\
        --row equal-steps --steps 1256

`make speculators` makes the environment. What is written to F is what `alpamayo-dflash study --peer-drafts F`
takes: `draft/` in our layout and `peer.json`.

Theirs are model, data set, packing, collation, loss, optimizer, schedule and training loop: `train` calls
the `main` of `speculators train` with its own flags. Overridden from outside is what ties that to a GPU:
where the trainer moves model and batches, timers that wait for an accelerator, and the dtype of its
checkpoints (float32; theirs are bfloat16). In all rows the arithmetic is float32 with `sdpa` attention and
the eager losses, the only ones that a CPU runs, and every layer sees all of its document
(`--full-attention-indices`), which is what our draft computes; their default, a causal window, is not.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from alpamayo_dflash.cli.study import DATA, PEER_FILE, TENTH
from alpamayo_dflash.clips.lists import parse_chunks
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.common.artefacts import atomic_folder, provenance, read_json, write_record
from alpamayo_dflash.common.options import check_above_zero, check_positive
from alpamayo_dflash.common.tensors import read_tensors, save_tensors
from alpamayo_dflash.decode.rollouts import teacher_forced_all
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.distill.shards import DistillSample
from alpamayo_dflash.draft.config import FULL_CONTEXT
from alpamayo_dflash.draft.formats import from_json, write_draft
from alpamayo_dflash.evaluate.acceptance import PEERS
from alpamayo_dflash.target.alpamayo import Alpamayo, open_target
from alpamayo_dflash.train.data import of_few_clips, split_samples

DOCUMENTS, HIDDEN, VERIFIER, SET = "documents", "hidden_states", "verifier", "set.json"
CALIBRATION_STEPS = 12
_SETTLED = 4  # the first steps of a run pay for allocations
_OFF = 0.01  # share of labels
_DEFAULT_TOKENS = 8192  # of a batch, where their command is not told
_MANY = 1000  # steps whose epochs are counted
_DIFFERENCE = 2e-3  # of float32 states that were computed in other company


@dataclass(frozen=True)
class DocumentsConfig:
    """Write a distillation set as documents of speculators: prompt and response, with the target's states.

    Their trainer reads states of the whole prompt and the last layer's output before the final norm, which
    the set lacks: the target runs once over prompt and response.

    Attributes:
        data: folder that `distill` wrote.
        world: the clips' hub cache folder.
        out: folder to write.
        target: folder or hub id of the target, or tiny.
        held_out_chunks: chunks that validate; they come last.
        amount: all, or tenth: of the training clips, as in the study.
    """

    data: Path
    world: Path
    out: Path
    target: str = "tiny"
    held_out_chunks: str = "8"
    amount: Literal["all", "tenth"] = "all"


@dataclass(frozen=True)
class TrainPeerConfig:
    """Train a draft with speculators' own trainer.

    Attributes:
        documents: folder that `documents` wrote.
        out: folder of the result; it must not be there.
        row: equal-steps or equal-time (batch, optimizer, rate and schedule ours), or defaults (theirs).
        steps: of equal-steps; of defaults it cuts their epochs short.
        seconds: of equal-time: a short training is timed first, and as many steps are planned as fit.
        batch_size: blocks a step, but for defaults.
        learning_rate: the peak, but for defaults.
        optimizer: theirs, but for defaults (which is muon).
        block_size: tokens of a block.
        num_layers: layers of the draft.
        seed: theirs.
        threads: of torch.
    """

    documents: Path
    out: Path
    row: Literal["equal-steps", "equal-time", "defaults"]
    steps: int | None = None
    seconds: float | None = None
    batch_size: int = 128
    learning_rate: float = 2e-3
    optimizer: Literal["adamw", "muon"] = "adamw"
    block_size: int = 8
    num_layers: int = 2
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        """Check that the row has what it needs."""
        check_positive(steps=self.steps, batch_size=self.batch_size, threads=self.threads)
        check_above_zero(seconds=self.seconds, learning_rate=self.learning_rate)
        wanted = {"equal-steps": "steps", "equal-time": "seconds", "defaults": None}[self.row]
        for name in ("steps", "seconds"):
            given = getattr(self, name) is not None
            if given != (name == wanted) and not (self.row == "defaults" and name == "steps"):
                raise ValueError(f"{self.row} {'takes no' if given else 'needs'} {name}")


# Documents.


def documents(config: DocumentsConfig) -> dict[str, Any]:
    """Write the documents, the verifier's part that their trainer loads, and `set.json`.

    Raises:
        ValueError: bad input, or what the target computes on a response is not what the set holds.
    """
    started = time.time()
    data = DistillData(config.data)
    samples, training = _rows(data, config)
    target, identity = open_target(config.target, device="cpu", dtype="float32", local_files_only=True)
    taps = [int(tap) for tap in data.manifest["taps"]]
    with atomic_folder(config.out) as folder:
        hidden = folder / DOCUMENTS / HIDDEN
        ids, wrong = [], 0
        with torch.inference_mode():
            for row, (token_ids, states, off) in enumerate(_documents(target, data, samples, taps, config)):
                save_document(hidden / f"hs_{row}.safetensors", token_ids, states)
                ids.append(token_ids)
                wrong += off
        lengths = [len(sample.token_ids) for sample in samples]
        if wrong > _OFF * sum(lengths):
            raise ValueError(f"{wrong} of {sum(lengths)} labels are not the best tokens of {config.data}")
        save_table(folder / DOCUMENTS, ids, lengths)
        write_verifier(folder / VERIFIER, target)
        described = {
            "amount": config.amount,
            "taps": taps,
            "num_target_layers": target.num_layers,
            "mask_token_id": target.traj_ids[-1],
            "training_rows": training,
            "document_tokens": [len(each) for each in ids],
            "response_tokens": lengths,
            "labels_off": wrong,
            "provenance": provenance(config, started, {"target": identity.hash, "data": data.identity.hash}),
        }
        write_record(folder / SET, described)
    return {"out": str(config.out), "documents": len(samples), "training": training}


def _rows(data: DistillData, config: DocumentsConfig) -> tuple[list[DistillSample], int]:
    """The responses, those that train before those that validate, and how many train."""
    train, held_out = split_samples(data.samples, share=0.1, chunks=parse_chunks(config.held_out_chunks))
    if config.amount != DATA[0]:
        clips = len({sample.clip_id for sample in train})
        if clips < TENTH:
            raise ValueError(f"amount is tenth; {config.data} has {clips} training clips, fewer than {TENTH}")
        train = of_few_clips(train, clips // TENTH)
    return [*train, *held_out], len(train)


def _documents(
    target: Alpamayo,
    data: DistillData,
    samples: Sequence[DistillSample],
    taps: Sequence[int],
    config: DocumentsConfig,
) -> Iterator[tuple[list[int], Tensor, int]]:
    """Token ids and states [T, taps + 1, C] of prompt and response, and labels that are off, by sample."""
    source = ClipSource(config.world)
    layers = [*taps, target.num_layers - 1]
    for clip_id, group in itertools.groupby(samples, key=lambda sample: sample.clip_id):
        of_clip = list(group)
        prompt = target.prompt(source.window(clip_id, of_clip[0].t0_us))
        prompt_ids = prompt.input_ids.tolist()
        responses = [sample.token_ids for sample in of_clip]
        forced = teacher_forced_all(target, prompt, responses, layers=layers, prompt_states=len(prompt_ids))
        for sample, each in zip(of_clip, forced, strict=True):
            kept = data.tensors(sample)
            _check_states(each.states[:-1].transpose(0, 1), kept["states"], clip_id)
            states = torch.cat((each.prompt_states, each.states), dim=1).transpose(0, 1)
            off = labels_off(target, states[len(prompt_ids) - 1 : -1, -1], kept["topk_ids"][:, 0])
            yield [*prompt_ids, *sample.token_ids], states.contiguous(), off


def _check_states(found: Tensor, kept: Tensor, clip_id: str) -> None:
    """Raise ValueError unless the target computes on a response what the set holds of it."""
    worst = float((found - kept.to(found)).abs().max() / kept.abs().max())
    if worst > _DIFFERENCE:
        raise ValueError(
            f"{clip_id}: the target's states are off by {worst:.1e} of the set's largest; the set was made "
            "with another target, world or prompt"
        )


def labels_off(target: Alpamayo, last_TC: Tensor, best_T: Tensor) -> int:
    """How many of the labels that their trainer makes are not the set's best tokens.

    It takes the arg max of norm and head over the whole vocabulary; the set leaves trajectory tokens out.

    Args:
        target: the model.
        last_TC: the last layer's outputs before the final norm, from the prompt's last position on.
        best_T: the set's best stored token at each place.
    """
    return int((target.logits(target.final_norm(last_TC)).argmax(-1) != best_T).sum())


def save_document(path: Path, token_ids: Sequence[int], states: Tensor) -> None:
    """Write one document's states.

    Args:
        path: their `hs_<row>.safetensors`.
        token_ids: T ids.
        states: [T, taps + 1, C]; the last of them is the last layer's output before the final norm.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({"hidden_states": states, "token_ids": torch.tensor(token_ids)}, path)


def save_table(folder: Path, ids: Sequence[Sequence[int]], responses: Sequence[int]) -> None:
    """Write the table of documents: token ids, which of them may be anchors and labels, and lengths."""
    from datasets import Dataset

    table = Dataset.from_dict(
        {
            "input_ids": [list(each) for each in ids],
            "loss_mask": [
                [0] * (len(each) - response) + [1] * response
                for each, response in zip(ids, responses, strict=True)
            ],
            "seq_len": [len(each) for each in ids],
        }
    )
    table.with_format("torch").save_to_disk(folder)


def write_verifier(folder: Path, target: Alpamayo) -> None:
    """Write what their trainer loads of a verifier: embedding, final norm and head, and a Qwen3's config.

    The multi-axis sections of the target's rotary positions are left out: a draft's positions are plain.
    """
    from transformers import Qwen3Config

    text = target.vlm.config.text_config
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "initializer_range")
    config = Qwen3Config(
        **{key: getattr(text, key) for key in (*same, *more)},
        vocab_size=target.vocab_size,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"]},
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    tensors = {
        "model.embed_tokens.weight": target.embedding,
        "model.norm.weight": target.vlm.model.language_model.norm.weight,
        "lm_head.weight": target.head,
    }
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_tensors(plain, folder / "model.safetensors")


# Training.


@dataclass
class Watched:
    """What is noted of a training.

    Attributes:
        steps: when each step was done.
        epoch_ends_s: from each epoch's last step to the end of its checkpoint and validation.
        validation: their validation metrics, by epoch.
        loop_s: their training loop, all in all.
    """

    steps: list[float] = field(default_factory=list)
    epoch_ends_s: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    loop_s: float = 0.0

    @property
    def step_s(self) -> float:
        """The median step, once settled."""
        times = self.steps[_SETTLED:]
        return statistics.median(after - before for before, after in itertools.pairwise(times))


@contextlib.contextmanager
def on_the_cpu(watched: Watched) -> Iterator[None]:
    """Let `speculators train` run on a CPU, and note what it does."""
    from speculators.train import cli, trainer

    class CpuTrainer(trainer.Trainer):
        """Their trainer with its device overridden."""

        def setup_trainer(self) -> None:
            super().setup_trainer()
            self.local_rank, self.device_type = torch.device("cpu"), "cpu"
            save = self.checkpointer.save_checkpoint
            self.checkpointer.save_checkpoint = partial(save, float_dtype=torch.float32)

        def train_epoch(self, epoch: int, *, step_callback: Any = None) -> None:
            super().train_epoch(epoch, step_callback=lambda: watched.steps.append(time.time()))

        def val_epoch(self, epoch: int) -> dict[str, float] | None:
            metrics = super().val_epoch(epoch)
            watched.validation.append(metrics or {})
            watched.epoch_ends_s.append(time.time() - watched.steps[-1])
            return metrics

        def run_training(self) -> None:
            began = time.time()
            super().run_training()
            watched.loop_s = time.time() - began

    class Untimed(trainer._StepTimer):
        """A step's parts are timed by waiting for an accelerator, which a CPU does not have."""

        def reset(self, enabled: bool) -> None:
            super().reset(False)

    with mock.patch.object(cli, "Trainer", CpuTrainer), mock.patch.object(trainer, "_StepTimer", Untimed):
        yield


def flags(config: TrainPeerConfig, described: Mapping[str, Any], save_path: Path) -> dict[str, Any]:
    """The flags of `speculators train` but for the number of steps, by name."""
    rows, training = len(described["document_tokens"]), described["training_rows"]
    always = {
        "speculator-type": "dflash",
        "verifier-name-or-path": config.documents / VERIFIER,
        "data-path": config.documents / DOCUMENTS,
        "save-path": save_path,
        "log-dir": save_path / "logs",
        "block-size": config.block_size,
        "num-layers": config.num_layers,
        "full-attention-indices": list(range(config.num_layers)),
        "target-layer-ids": [tap + 1 for tap in described["taps"]],
        "mask-token-id": described["mask_token_id"],
        "train-data-ratio": (training + 0.5) / rows,  # which they multiply and cut off
        "on-missing": "raise",
        "num-workers": 0,
        "hidden-states-dtype": "float32",
        "draft-attn-impl": "sdpa",
        "loss-implementation": "eager",
        "seed": config.seed,
    }
    if config.row == "defaults":
        return always
    return always | {
        **batch_flags(config.batch_size, described),
        "optimizer": config.optimizer,
        "lr": config.learning_rate,
        "weight-decay": 0.01,
        "scheduler-type": "cosine",
        "scheduler-warmup-ratio": 0.1,
    }


def batch_flags(batch_size: int, described: Mapping[str, Any]) -> dict[str, int]:
    """A batch with about so many blocks that have a label, packed as theirs are.

    Theirs holds documents up to a number of tokens, and anchors drawn among all of their response tokens. The
    last token of a response is one of them, and has no label.
    """
    training = described["training_rows"]
    document = statistics.mean(described["document_tokens"][:training])
    response = statistics.mean(described["response_tokens"][:training])
    # A batch is closed where the next document does not fit, so on average half of one stays empty.
    in_a_batch = batch_size / (response - 1) + 0.5
    tokens = max(round(in_a_batch * document), *described["document_tokens"])
    return {
        "total-seq-len": tokens,
        "max-anchors": math.ceil(batch_size * response / (response - 1)),
    }


def command_line(values: Mapping[str, Any]) -> list[str]:
    """Flags and values as arguments."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def epochs_of(values: Mapping[str, Any], described: Mapping[str, Any], steps: int) -> int:
    """Epochs that hold so many steps; their loop takes one step in each epoch beyond."""
    from speculators.train.distributed_batch_sampler import MultipackDistributedBatchSamplerV2 as Sampler

    lengths = described["document_tokens"][: described["training_rows"]]
    sampler = Sampler(values.get("total-seq-len", _DEFAULT_TOKENS), lengths, 1, 0, seed=values["seed"])
    epoch = count = 0
    while count < steps:
        sampler.set_epoch(epoch)
        count, epoch = count + len(sampler), epoch + 1
    return epoch


def speculators_train(values: Mapping[str, Any]) -> tuple[Watched, float]:
    """`speculators train` with these flags, on the CPU; what was noted, and its seconds in all."""
    from speculators.train import cli
    from speculators.train.config import TrainConfig

    watched, began = Watched(), time.time()
    with on_the_cpu(watched):
        cli.main(TrainConfig.resolve(command_line(values)))
    return watched, time.time() - began


def planned(config: TrainPeerConfig, described: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """All flags, the number of steps among them."""
    values = flags(config, described, scratch / "training")
    steps = config.steps
    if steps is None and config.seconds is None:
        return values
    if steps is None:
        assert config.seconds is not None
        steps = _steps_in(config.seconds, values | {"save-path": scratch / "calibration"}, described)
    return values | {"max-steps": steps, "epochs": epochs_of(values, described, steps)}


def _steps_in(seconds: float, values: Mapping[str, Any], described: Mapping[str, Any]) -> int:
    """How many steps fit, with a validation and a checkpoint after every epoch, by a short training."""
    short = {"max-steps": CALIBRATION_STEPS, "epochs": epochs_of(values, described, CALIBRATION_STEPS)}
    watched, total = speculators_train({**values, **short})
    epochs_a_step = epochs_of(values, described, _MANY) / _MANY
    step_s = watched.step_s + statistics.median(watched.epoch_ends_s) * epochs_a_step
    steps = int((seconds - (total - watched.loop_s)) / step_s)
    print(f"a step takes {step_s:.3f} s with its share of validation: {steps} steps", file=sys.stderr)
    if steps < 1:
        raise ValueError(f"seconds is {seconds}; a step takes {step_s:.3f} s")
    return steps


def train(config: TrainPeerConfig) -> dict[str, Any]:
    """Train a draft and write it in our layout, with `peer.json`.

    Of their checkpoints, one an epoch, the one of the greatest expected accepted length on validation clips
    is taken, their headline metric. Their `checkpoint_best` is that of the least loss, which under their
    default weights (D-PACE) grows with the confidence of a draft that gets better.

    Raises:
        ValueError: bad input, or `out` is there already.
    """
    if config.out.exists():
        raise ValueError(f"{config.out}: is there already; name another folder")
    torch.set_num_threads(config.threads)
    described = read_json(config.documents / SET, "amount", "taps", "training_rows", "mask_token_id")
    started = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        values = planned(config, described, Path(scratch))
        watched, seconds = speculators_train(values)
        lengths = [metrics["eal_epoch"] for metrics in watched.validation]
        best = Path(values["save-path"]) / str(lengths.index(max(lengths)))
        with atomic_folder(config.out) as folder:
            convert(best, config.documents / VERIFIER, folder / "draft")
            shutil.copy(best / "config.json", folder / "their_config.json")
            peer = {
                "recipe": PEERS[config.row],
                "data": described["amount"],
                "seed": config.seed,
                "steps": len(watched.steps),
                "best_epoch": int(best.name),
                "train_s": round(seconds, 1),
                "step_s": round(watched.step_s, 4) if len(watched.steps) > _SETTLED + 1 else None,
                "validation": watched.validation,
                "flags": command_line(_without_paths(values)),
                "provenance": provenance(config, started),
            }
            write_record(folder / PEER_FILE, peer)
    return {name: peer[name] for name in ("recipe", "data", "seed", "steps", "train_s", "step_s")}


def _without_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not isinstance(value, Path)}


# Their layout to ours.


def convert(theirs: Path, verifier: Path, out: Path) -> None:
    """Write a draft of speculators in our layout.

    Their tensors have our names. What changes: layer ids (theirs are one higher), their decoder's config
    stands at top level, and the mask's embedding, a row of the verifier's table, becomes the draft's tensor.

    Args:
        theirs: their checkpoint, `config.json` and `model.safetensors`.
        verifier: the folder of `write_verifier`, for the number of layers and the mask's row.
        out: folder to write.

    Raises:
        ValueError: the draft computes what ours does not.
    """
    values = read_json(theirs / "config.json")
    layers = read_json(verifier / "config.json")["num_hidden_layers"]
    config = from_json(their_config(values, layers), str(theirs / "config.json"), context_len=FULL_CONTEXT)
    tensors = read_tensors(theirs / "model.safetensors")
    table = read_tensors(verifier / "model.safetensors")["model.embed_tokens.weight"]
    left_out = {name for name in ("t2d", "d2t") if name in tensors}  # of a head that is whole
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    write_draft(out, config, kept | {"mask_embedding": table[config.mask_token_id].to(kept["fc.weight"])})


def their_config(values: Mapping[str, Any], num_target_layers: int) -> dict[str, Any]:
    """A speculators config as z-lab has it.

    Raises:
        ValueError: a part that our network does not compute.
    """
    from transformers import Qwen3Config

    decoder = Qwen3Config(**values["transformer_layer_config"]).to_dict()
    wanted = {
        "speculators_model_type": "dflash",
        "sample_from_anchor": False,
        "target_hidden_size": None,
        "draft_vocab_size": decoder["vocab_size"],
    }
    for key, only in wanted.items():
        if values.get(key, only) != only:
            raise ValueError(f"{key} is {values[key]!r}; only {only!r} is converted")
    return decoder | {
        "architectures": ["DFlashDraftModel"],
        "num_target_layers": num_target_layers,
        "dflash_config": {
            "target_layer_ids": [layer - 1 for layer in values["aux_hidden_state_layer_ids"]],
            "mask_token_id": values["mask_token_id"],
            "block_size": values["block_size"],
        },
    }


def main() -> None:
    """The command line."""
    import tyro

    config = tyro.extras.subcommand_cli_from_dict(
        {"documents": DocumentsConfig, "train": TrainPeerConfig}, description=__doc__
    )
    try:
        result = documents(config) if isinstance(config, DocumentsConfig) else train(config)
    except ValueError as error:
        sys.exit(str(error))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
