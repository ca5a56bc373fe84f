"""Stage one: supervised fine-tuning on demonstrations.

A demonstration is a tree with one branch, weight 1 on every response token and the end token. In a
conversation the earlier assistant turns, which lie in the trunk, have weight 1 too (`sft.turns`); nothing
else carries loss.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from rlcs.data.stream import ProblemStream
from rlcs.distributed import ALONE, World
from rlcs.errors import DataError
from rlcs.model.chat import Chat
from rlcs.model.packing import Pack
from rlcs.model.parity_check import require_agreement
from rlcs.model.policy import Scores
from rlcs.model.vlm import Vlm
from rlcs.progress import Screen
from rlcs.recipe.stages import Sft, Turns
from rlcs.records import Demonstration
from rlcs.records.trees import Branch, Tree
from rlcs.signals import StopFlag
from rlcs.train.batching import guessed_tokens, own_share, packs_in_step
from rlcs.train.clock import Clock
from rlcs.train.losses import Average, LossSums, sft_loss
from rlcs.train.run_dir import RunDir
from rlcs.train.trainer import Batch, Objective, Trainer, logprobs_of

log = logging.getLogger("rlcs")


def tree_of(demonstration: Demonstration, chat: Chat, *, turns: Turns = "all") -> Tree:
    """A tree with one branch. Raises PromptError or ImageError for a problem that cannot be a prompt."""
    ids = chat.response_ids(demonstration.response)
    branch = Branch(ids=ids, weights=(1.0,) * len(ids))
    prompt = chat.checked(chat.prompt(demonstration.problem))
    if turns == "last" or not prompt.replies:
        return Tree(prompt=prompt, branches=(branch,))
    weights = [0.0] * len(prompt.ids)
    for start, end in prompt.replies:
        weights[start:end] = [1.0] * (end - start)
    return Tree(prompt=prompt, branches=(branch,), trunk_weights=tuple(weights))


def hold_out(
    demonstrations: Sequence[Demonstration], problems: int
) -> tuple[list[Demonstration], list[Demonstration]]:
    """All demonstrations but those of the last `problems` problems (a tenth of them at most), and those."""
    names = list(dict.fromkeys(each.problem.id for each in demonstrations))
    last = set(names[len(names) - min(problems, len(names) // 10) :])
    learnt = [each for each in demonstrations if each.problem.id not in last]
    return learnt, [each for each in demonstrations if each.problem.id in last]


def loss_on(demonstrations: Sequence[Demonstration], vlm: Vlm, chat: Chat, settings: Sft) -> float | None:
    """The mean negative log likelihood of the tokens that SFT would learn; None without demonstrations."""
    if not demonstrations:
        return None
    trees, _ = usable_trees(demonstrations, chat, vlm.world, turns=settings.turns)
    packs = packs_of(trees, vlm, chat, settings)
    sums = {"loss": 0.0, "tokens": 0.0}
    for pack, logprobs in zip(packs, logprobs_of(vlm, packs, temperature=1.0), strict=True):
        sums["loss"] -= (logprobs.cpu() * pack.weights).sum().item()
        sums["tokens"] += pack.weights.sum().item()
    total = vlm.world.sum(sums)
    return total["loss"] / max(1.0, total["tokens"])


def train(
    vlm: Vlm,
    chat: Chat,
    demonstrations: Sequence[Demonstration],
    settings: Sft,
    *,
    run: RunDir,
    screen: Screen,
    stop: StopFlag,
) -> None:
    """Train from the newest checkpoint of the run, if there is one; `run` saves the trained model."""
    steps = settings.num_steps(len(demonstrations))
    trainer = Trainer(vlm, settings.optimizer, steps=steps, max_bad_steps=settings.max_bad_steps)
    stream = ProblemStream(demonstrations, seed=run.seed)
    objective = make_objective(settings.loss_average)
    first = run.resume(trainer, stream, steps=steps)
    named = set[str]()
    for step in range(first, steps):
        run.validate(step, screen=screen, stop=stop)
        clock = Clock()
        with clock("data"):
            taken = stream.take(settings.batch_size)
            trees, bad = usable_trees(taken, chat, vlm.world, turns=settings.turns)
            for error in bad:
                if error.where not in named:
                    named.add(error.where)
                    log.warning("sft leaves a demonstration out: %s", error)
            packs = packs_of(trees, vlm, chat, settings)
            prepared_share(stream.peek(settings.batch_size), chat, vlm.world)
            if step == first:
                require_agreement(vlm, chat, trees, shares_head=shares_head(vlm))
        with clock("update"):
            batches = [Batch(pack=pack) for pack in packs]
            result = trainer.step(batches, objective, average=settings.loss_average)
        values = {"bad_rows": float(len(bad))} if bad else {}
        run.after_step(result, step=step + 1, values=values, seconds=clock.seconds, screen=screen, stop=stop)
    run.conclude(screen, stop)


def usable_trees(
    demonstrations: Sequence[Demonstration], chat: Chat, world: World = ALONE, *, turns: Turns = "all"
) -> tuple[list[Tree], list[DataError]]:
    """Trees of this rank's share of the demonstrations, and why some on all ranks cannot be prompts.

    Raises DataError when none of them can, which a few bad rows do not explain.
    """
    trees: list[Tree] = []
    errors: list[DataError] = []
    for index in prepared_share(demonstrations, chat, world):
        try:
            trees.append(tree_of(demonstrations[index], chat, turns=turns))
        except DataError as error:
            errors.append(error)
    bad = [error for of_rank in world.gather(errors) for error in of_rank]
    if bad and len(bad) == len(demonstrations):
        raise bad[-1]
    return trees, bad


def packs_of(trees: Sequence[Tree], vlm: Vlm, chat: Chat, settings: Sft) -> list[Pack]:
    """This rank's packs of a step, in which what prompts and responses begin with is computed once."""
    shares, budget = shares_head(vlm), settings.pack_tokens
    trees = of_one_prompt(trees, budget=budget) if shares else trees
    return packs_in_step(trees, chat, budget=budget, world=vlm.world, shares_head=shares)


def of_one_prompt(trees: Sequence[Tree], *, budget: int) -> list[Tree]:
    """Trees with the same prompt as one, which merges responses that begin alike, if it fits the budget.

    Where the prompt has a loss of its own, trees stay apart: each learns it.
    """
    made: list[Tree] = []
    places: dict[tuple[tuple[int, ...], tuple[str, ...]], int] = {}
    for tree in trees:
        key = tree.prompt.ids, tuple(image.sha256 for image in tree.prompt.images)
        if key in places and not tree.trunk_weights:
            first = made[places[key]]
            both = replace(first, branches=(*first.branches, *tree.branches), merges=True)
            if both.num_tokens <= budget:
                made[places[key]] = both
                continue
        if not tree.trunk_weights:
            places[key] = len(made)
        made.append(tree)
    return made


def shares_head(vlm: Vlm) -> bool:
    """Whether trees of a pack may share what they begin with: experts are balanced tree by tree."""
    return vlm.family.router is None


def prepared_share(demonstrations: Sequence[Demonstration], chat: Chat, world: World) -> list[int]:
    """This rank's share of the demonstrations; their images begin to be decoded."""
    own = own_share([guessed_tokens(d.problem, d.response) for d in demonstrations], world)
    chat.prepare(image for index in own for image in demonstrations[index].problem.images)
    return own


def make_objective(average: Average) -> Objective:
    """The negative log likelihood of a batch's demonstrations."""

    def objective(batch: Batch, scores: Scores) -> LossSums:
        device = scores.logprobs.device
        weights, sequence = batch.pack.weights.to(device), batch.pack.sequence.to(device)
        return sft_loss(scores.logprobs, weights, sequence, average, scores.router_loss)

    return objective
