"""An SFT epoch against TRL's SFTTrainer: responses of mixed lengths, images of mixed sizes.

TRL refuses to pack examples with images, so it pads: in batches of 8 or 32, whichever is faster. Both sides
start from the same weights and see the same batches in the same order with the same optimiser; before the
ratio counts, the losses of all steps must be equal.
"""

import io
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling, SFTTrainer

from bench.ours import WAIT_S
from bench.pairs import Options, in_turns, row
from bench.shapes import SEED, THREADS, drawn_image
from bench.sides import answer, asked, start
from bench.table import Row
from rlcs.distributed import World, join_world
from rlcs.model import loading
from rlcs.recipe.execution import Parallel
from rlcs.recipe.schema import Model, Prompts
from rlcs.recipe.stages import Optimizer, Sft
from rlcs.records import Demonstration, Problem
from rlcs.train import sft
from rlcs.train.trainer import Batch, Trainer

EXAMPLES, BATCH = 96, 32
PEER_BATCHES = (8, 32)
SIDES = (56, 84, 112, 168, 224)
RESPONSE = (8, 240)
"""Tokens of the shortest and the longest response, whose lengths are even in logarithms."""
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Work:
    """What both sides learn, in order."""

    folder: str
    demonstrations: Sequence[Demonstration]
    options: Options

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-len(self.demonstrations) // BATCH)


def rows(options: Options) -> list[Row]:
    """One row: an epoch."""
    return measured(options, drawn_demonstrations(EXAMPLES))


def measured(options: Options, demonstrations: Sequence[Demonstration]) -> list[Row]:
    """Check losses, then take turns. Raises RuntimeError where the losses differ."""
    work = Work(folder=loading.resolve("builtin"), demonstrations=demonstrations, options=options)
    ranks = 1 if options.cpu_time or options.device.type == "cuda" else THREADS
    processes, pipe = start(epochs_in_ranks, work, ranks=ranks)

    def epoch() -> tuple[list[float], int]:
        pipe.send("go")
        found: tuple[list[float], int] = answer(pipe)
        return found

    try:
        return [_measured(work, epoch, ranks)]
    finally:
        pipe.send("end")
        for process in processes:
            process.join()


def epochs_in_ranks(pipe: Connection | None, work: Work) -> None:
    """One of the processes that share our side: an epoch for each word, always from the same start."""
    with join_world(timeout_s=WAIT_S) as world:
        torch.set_num_threads(1 if work.options.cpu_time else THREADS // world.size)

        # What epochs start from is made before the clock runs.
        epochs = [ours(work, world) for _ in range(1 + work.options.rounds)]
        while asked(pipe, world) == "go":
            done = epochs.pop()()
            if pipe is not None:
                pipe.send(done)


def _measured(work: Work, epoch: Callable[[], tuple[list[float], int]], ranks: int) -> Row:
    options, demonstrations = work.options, work.demonstrations
    losses, tokens = epoch()
    first: dict[int, float] = {}
    gaps = []
    for size in PEER_BATCHES:
        side = theirs(work, size)
        first[size] = in_turns(side, None, rounds=1, clock=options.clock).seconds
        gaps += [abs(a - b) / b for a, b in zip(losses, side.losses, strict=True)]
    if max(gaps) > TOLERANCE:
        raise RuntimeError(f"the losses differ by {max(gaps):.1e}: the two sides do not train the same")
    fastest = min(first, key=lambda size: first[size])
    others = [theirs(work, fastest) for _ in range(options.rounds)]
    pair = in_turns(epoch, lambda: others.pop()(), rounds=options.rounds, clock=options.clock)
    return row(
        work="sft",
        shape="mixed",
        phase="epoch",
        peer=f"trl {version('trl')} SFTTrainer, {fastest} examples at once",
        pair=pair,
        says=f"built-in model; {len(demonstrations)} examples, {BATCH} a step; responses of "
        f"{RESPONSE[0]} to {RESPONSE[1]} tokens, images of {SIDES[0]} to {SIDES[-1]} pixels a side; "
        f"{ranks} process{'es' * (ranks > 1)}",
        tokens_per_s=round(tokens / pair.seconds, 1),
        peer_tokens_per_s=round(tokens / (pair.peer_seconds or 1.0), 1),
        largest_gap_of_losses=f"{max(gaps):.0e}",
    )


def drawn_demonstrations(count: int) -> list[Demonstration]:
    """Questions about drawn images, with responses of digits (a token each)."""
    found = []
    for index in range(count):
        rng = random.Random(f"{SEED}|sft|{index}")
        low, high = RESPONSE
        length = round(low * (high / low) ** rng.random())
        response = "".join(rng.choice("0123456789") for _ in range(length))
        question = "What is " + "".join(rng.choice("0123456789") for _ in range(rng.randint(4, 60)))
        image = drawn_image(rng.choice(SIDES), rng)
        problem = Problem(id=f"sft-{index}", source="bench", question=question, answer="1", images=(image,))
        found.append(Demonstration(problem=problem, response=response, teacher="bench"))
    return found


def settings() -> Sft:
    """Of both sides; no weight decay, whose groups of parameters differ."""
    optimizer = Optimizer(lr=1e-4, schedule="constant", warmup_steps=0, betas=(0.9, 0.999), weight_decay=0.0)
    return Sft(batch_size=BATCH, epochs=1, optimizer=optimizer)


def ours(work: Work, world: World) -> Callable[[], tuple[list[float], int]]:
    """An epoch from the start, as `sft.train` runs it; returns losses, and the demonstrations' tokens."""
    chosen = settings()
    device = None if world.grouped else work.options.device
    vlm = loading.load(Model(name=work.folder, dtype="float32"), device=device, world=world)
    vlm = loading.spread(vlm, Parallel())
    chat = loading.make_chat(vlm)
    trainer = Trainer(vlm, chosen.optimizer, steps=work.steps, max_bad_steps=1)
    objective = sft.make_objective(chosen.loss_average)

    def epoch() -> tuple[list[float], int]:
        losses, tokens = [], 0
        for step in range(work.steps):
            taken = work.demonstrations[step * BATCH : (step + 1) * BATCH]
            trees, _ = sft.usable_trees(taken, chat, world)
            packs = sft.packs_of(trees, vlm, chat, chosen)
            sft.prepared_share(work.demonstrations[(step + 1) * BATCH : (step + 2) * BATCH], chat, world)
            result = trainer.step(
                [Batch(pack=pack) for pack in packs], objective, average=chosen.loss_average
            )
            losses.append(result.loss)
            tokens += sum(world.gather(sum(tree.num_tokens for tree in trees)))
        return losses, tokens

    return epoch


class Collator:
    """TRL's own, without the newline behind the end token, which its template writes: ours learns none."""

    def __init__(self, inner: DataCollatorForVisionLanguageModeling, end_id: int) -> None:
        self._inner, self._end = inner, end_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A padded batch."""
        batch: dict[str, Any] = self._inner(examples)
        labels = batch["labels"]
        ended = (labels == self._end).cumsum(1) - (labels == self._end).long() > 0
        batch["labels"] = labels.masked_fill(ended, -100)
        return batch


class Losses(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """After a step; the last log of a run has no loss."""
        if "loss" in logs:
            self.seen.append(logs["loss"])


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """TRL's trainer, ready to start."""

    trainer: Any
    log: Losses

    def __call__(self) -> None:
        """Train."""
        self.trainer.train()

    @property
    def losses(self) -> list[float]:
        """Of every step."""
        return self.log.seen


def theirs(work: Work, size: int) -> Epoch:
    """An epoch by TRL, `size` examples at once."""
    chosen = settings().optimizer
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="bench-"),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=BATCH // size,
        num_train_epochs=1,
        learning_rate=chosen.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=chosen.max_grad_norm,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=work.options.device.type == "cpu",
        train_sampling_strategy="sequential",
        seed=SEED,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = AutoModelForImageTextToText.from_pretrained(work.folder, dtype=torch.float32)
    # Else the loss of a step is the mean of its batches' means, and not of its tokens as ours is.
    model.accepts_loss_kwargs = True
    processor = AutoProcessor.from_pretrained(work.folder)
    inner = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    end_id = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    log = Losses()
    trainer = SFTTrainer(
        model=model,
        args=config,
        processing_class=processor,
        data_collator=Collator(inner, end_id),
        train_dataset=Dataset.from_list([dataset_row(each) for each in work.demonstrations]),
        callbacks=[log],
    )
    trainer.remove_callback(PrinterCallback)
    return Epoch(trainer=trainer, log=log)


def dataset_row(demonstration: Demonstration) -> dict[str, Any]:
    """A demonstration in TRL's form."""
    problem = demonstration.problem
    data = problem.images[0].data
    assert data is not None, "the bench keeps images in memory"
    return {
        "prompt": [
            {"role": "system", "content": Prompts().system or ""},
            {"role": "user", "content": problem.question},
        ],
        "completion": [{"role": "assistant", "content": demonstration.response}],
        "images": [Image.open(io.BytesIO(data)).convert("RGB")],
    }
