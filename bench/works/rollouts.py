"""Rollouts against transformers' `generate`: same weights, prompts and answer lengths.

Our engine samples first, and its answers end where the model ends them; `generate` then samples answers of
the same lengths. So a trained model (`--model`) is measured at what it writes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList

from bench.ours import WAIT_S
from bench.pairs import Options, Pair, in_turns, row
from bench.shapes import SEED, THREADS
from bench.sides import answer, asked, start
from bench.table import Row
from rlcs.data import puzzles
from rlcs.distributed import join_world
from rlcs.engines.local import LocalEngine
from rlcs.model import loading
from rlcs.model.chat import Chat
from rlcs.model.vlm import Vlm
from rlcs.recipe.schema import Model
from rlcs.records import Problem, Prompt, Rollout, Sampling
from rlcs.train.batching import shared

PROBLEMS, GROUP = 64, 8
MAX_NEW_TOKENS = 96
BATCHES = (64, 128, 512)
"""Answers at once, of which each side's fastest is taken."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What both sides sample."""

    vlm: Vlm
    chat: Chat
    prompts: Sequence[Prompt]
    sampling: Sampling


def rows(options: Options) -> list[Row]:
    """One row: all rollouts of a step."""
    work = make_work(options)
    ranks = 1 if options.cpu_time or options.device.type == "cuda" else THREADS
    processes, pipe = start(sample_in_ranks, options, ranks=ranks)

    def by_ranks(size: int) -> list[int]:
        pipe.send(size)
        found: list[int] = answer(pipe)
        return found

    try:
        return [_measured(work, by_ranks, ranks, options)]
    finally:
        pipe.send(0)
        for process in processes:
            process.join()


def sample_in_ranks(pipe: Connection | None, options: Options) -> None:
    """One of the processes that share our side: for each number of rows from the pipe, sample all groups."""
    with join_world(timeout_s=WAIT_S) as world:
        torch.set_num_threads(1 if options.cpu_time else THREADS // world.size)
        work = make_work(options)

        while size := asked(pipe, world):
            sample = partial(ours, work, size // world.size)
            groups = shared(sample, work.prompts, lambda prompt: len(prompt.ids), world)
            if pipe is not None:
                pipe.send([len(rollout.ids) for group in groups for rollout in group])


def _measured(work: Work, by_ranks: Callable[[int], list[int]], ranks: int, options: Options) -> Row:
    lengths = by_ranks(BATCHES[-1])
    model = peer_model(options)
    own_batch, own = _fastest({size: partial(by_ranks, size) for size in BATCHES}, options)
    batch, peer = _fastest(
        {size: partial(theirs, model, work.sampling, prepared(work, lengths, size)) for size in BATCHES},
        options,
    )
    pair = in_turns(own, peer, rounds=options.rounds, clock=options.clock)
    says = f"{own_batch} answers at once in {ranks} process{'es' * (ranks > 1)}"
    return _row(pair, lengths, work, says, batch, options)


def _fastest(sides: Mapping[int, Callable[[], object]], options: Options) -> tuple[int, Callable[[], object]]:
    """The number of answers at once with which a side is fastest in one round, and that side."""
    seconds = {
        size: in_turns(side, None, rounds=1, clock=options.clock).seconds for size, side in sides.items()
    }
    fastest = min(seconds, key=lambda size: seconds[size])
    return fastest, sides[fastest]


def _row(pair: Pair, lengths: Sequence[int], work: Work, says: str, batch: int, options: Options) -> Row:
    assert pair.peer_seconds is not None, "both sides were measured"
    tokens = sum(lengths)
    trunk = sum(len(prompt.ids) for prompt in work.prompts) / len(work.prompts)
    return row(
        work="rollouts",
        shape="trained" if options.model != "builtin" else "built-in",
        phase="rollout",
        peer=f"transformers {version('transformers')} generate, {batch} rows at once",
        pair=pair,
        says=f"{len(work.prompts)} problems x {GROUP} answers; trunks of {trunk:.0f} tokens, answers of "
        f"{tokens / len(lengths):.0f} (longest {max(lengths)}); {says}",
        answer_tokens_per_s=round(tokens / pair.seconds, 1),
        peer_answer_tokens_per_s=round(tokens / pair.peer_seconds, 1),
    )


def make_work(options: Options, *, count: int = PROBLEMS, group: int = GROUP) -> Work:
    """The model in fp32, prompts of built-in problems, and the settings of sampling."""
    vlm = loading.load(Model(name=options.model, dtype="float32"), device=options.device)
    vlm.model.eval()
    chat = loading.make_chat(vlm)
    sampling = chat.sampling(n=group, temperature=1.0, max_new_tokens=MAX_NEW_TOKENS, seed=SEED)
    return Work(vlm=vlm, chat=chat, prompts=[chat.prompt(p) for p in problems(count)], sampling=sampling)


def problems(count: int) -> tuple[Problem, ...]:
    """Built-in problems, with an image each."""
    return puzzles.load("puzzles", split="train", count=count, seed=2, levels=(1, 2))


def ours(
    work: Work, max_rows: int = BATCHES[-1], prompts: Sequence[Prompt] = ()
) -> list[tuple[Rollout, ...]]:
    """The groups of these prompts, or of all, by the local engine, as a step of GRPO asks for them."""
    engine = LocalEngine(work.vlm, work.chat, max_rows=max_rows)
    return engine.sample(prompts or work.prompts, work.sampling)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Keywords of one `generate`, and how long each row's answer becomes."""

    inputs: dict[str, Any]
    lengths: Tensor


def prepared(work: Work, lengths: Sequence[int], size: int) -> list[Batch]:
    """The peer's inputs, `size` rows at once: every prompt as often as it is answered, padded on the left."""
    repeated = [prompt for prompt in work.prompts for _ in range(work.sampling.n)]
    places = range(0, len(repeated), size)
    return [_batch(work, repeated[i : i + size], lengths[i : i + size]) for i in places]


def _batch(work: Work, prompts: Sequence[Prompt], lengths: Sequence[int]) -> Batch:
    longest = max(len(prompt.ids) for prompt in prompts)
    pads = [longest - len(prompt.ids) for prompt in prompts]
    ids = torch.tensor([[0] * pad + list(prompt.ids) for pad, prompt in zip(pads, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    images = [image for prompt in prompts for image in prompt.images]
    grids = torch.tensor([grid for prompt in prompts for grid in prompt.grids])
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        **work.vlm.family.text_inputs(ids, work.chat.image_id),
    }
    inputs |= work.vlm.family.vision_inputs([work.chat.patches(image) for image in images], grids)
    device = work.vlm.device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return Batch(inputs=moved, lengths=torch.tensor(lengths, device=device))


class Ending(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Ends every row at its length and nowhere else, and bans what our engine bans."""

    def __init__(self, batch: Batch, sampling: Sampling) -> None:
        self._lengths, self._prompt = batch.lengths, batch.inputs["input_ids"].shape[1]
        [self._end] = sampling.stop_ids
        self._limit = sampling.max_new_tokens
        self._banned = torch.tensor([*sampling.banned_ids, self._end], device=batch.lengths.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) of the next token."""
        scores = scores.index_fill(1, self._banned, float("-inf"))
        ending = self._lengths <= input_ids.shape[1] - self._prompt + 1
        if ending.any():
            scores[ending] = float("-inf")
            scores[ending, self._end] = 0.0
        return scores


def peer_model(options: Options) -> Any:
    """The same weights as transformers loads them."""
    folder = loading.resolve(options.model)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.to(options.device).eval()


@torch.no_grad()
def theirs(model: Any, sampling: Sampling, batches: Sequence[Batch]) -> list[Tensor]:
    """Every answer by `generate`."""
    return [
        model.generate(
            **batch.inputs,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sampling.stop_ids[0],
            pad_token_id=sampling.stop_ids[0],
            logits_processor=LogitsProcessorList([Ending(batch, sampling)]),
        )
        for batch in batches
    ]
