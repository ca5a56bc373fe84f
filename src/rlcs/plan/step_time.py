"""The seconds of one training step, phase by phase: how long, how much of it GPUs work, and why.

Every phase says how it is computed and whether its rates were measured. Phases follow each other; on all
GPUs but those that vLLM servers have to themselves.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from textwrap import wrap
from typing import Any

from rlcs.plan.checkpoints import stall
from rlcs.plan.lengths import group_lengths
from rlcs.plan.machine import CPU_BANDWIDTH, FP32, Assumed
from rlcs.plan.measured import Rates
from rlcs.plan.passes import (
    NO_TRAFFIC,
    Passed,
    forward_traffic,
    kept_features,
    passed,
    recomputed_times,
    rounds_of,
    speed_of_link,
    update_times,
    update_traffic,
)
from rlcs.plan.placement import Placement
from rlcs.plan.rates import READING, Basis, Speeds, least_certain
from rlcs.plan.rollouts import Sampled, engines_of, sampled
from rlcs.plan.work import Trees
from rlcs.recipe.schema import Images
from rlcs.recipe.stages import Grpo, Sft

OPTIMIZER_PASSES = 12
"""Times that a trained number is read or written in an optimiser step: divided, measured, clipped, AdamW."""
TOKEN_S = 2e-7
"""Seconds of the host for each sampled token that ranks exchange: pickled and read again, as measured on one
core of a server. (Rollouts are written to disk beside the next step.)"""
GUESSED = ("",)
"""In place of rates that have a name and may be measured."""

Groups = Sequence[Sequence[int]]
"""The lengths of the answers of each group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One phase of a step: its seconds, those in which an average GPU works, and how they are known."""

    name: str
    seconds: float
    busy: float
    basis: Basis
    formula: str

    def to_json(self) -> dict[str, Any]:
        """The phase for scripts."""
        return {
            "name": self.name,
            "seconds": round(self.seconds, 3),
            "busy": round(self.busy, 3),
            "basis": self.basis,
            "formula": self.formula,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """The phases of a step, in their order."""

    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        """The seconds of the step."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def idle(self) -> float:
        """The share of GPU seconds in which a GPU waits."""
        return 1 - sum(phase.busy for phase in self.phases) / self.seconds if self.seconds else 0.0

    @property
    def basis(self) -> Basis:
        """How the sum is known: as its least certain phase."""
        return least_certain(phase.basis for phase in self.phases)

    def to_text(self, width: int) -> Iterator[str]:
        """The phases as lines of text, each with its formula below it, and their sum."""
        for phase in self.phases:
            figures = f"{phase.seconds:>8.1f} s{phase.busy / phase.seconds:>6.0%}"
            yield f"  {phase.name:<32}{figures}  {phase.basis}"
            yield from wrap(phase.formula, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        yield f"  {'together':<32}{self.seconds:>8.1f} s{1 - self.idle:>6.0%}  {self.basis}"

    def to_json(self) -> dict[str, Any]:
        """The phases for scripts."""
        return {
            "seconds": round(self.seconds, 3),
            "basis": self.basis,
            "idle_share": round(self.idle, 4),
            "phases": [phase.to_json() for phase in self.phases],
        }


class Phases:
    """Collects the phases of a step; where `busy` does not say otherwise, the GPUs that train work in all."""

    def __init__(self, place: Placement, speeds: Speeds) -> None:
        """There are none yet."""
        self._part = place.trainers / place.machine.devices
        self.speeds = speeds
        self._phases: list[Phase] = []

    def add(
        self, name: str, seconds: float, rates: Iterable[str], formula: str, *, busy: float | None = None
    ) -> None:
        """Add a phase that takes time; `rates` are those that its seconds follow from."""
        if seconds > 0:
            basis = self.speeds.basis(rates)
            worked = seconds * self._part if busy is None else busy
            self._phases.append(Phase(name=name, seconds=seconds, busy=worked, basis=basis, formula=formula))

    def hide(self, seconds: float, formula: str) -> None:
        """Take off the seconds that pass in two phases at once."""
        if seconds > 0:
            name, basis = "at the same time", least_certain(phase.basis for phase in self._phases)
            self._phases.append(Phase(name=name, seconds=-seconds, busy=0.0, basis=basis, formula=formula))

    @property
    def time(self) -> StepTime:
        """The step."""
        return StepTime(phases=tuple(self._phases))


def step_time(
    place: Placement, stage: Sft | Grpo, trees: Trees, images: Images, speeds: Speeds, assumed: Assumed
) -> StepTime:
    """The seconds of one step of a stage."""
    phases = Phases(place, speeds)
    if isinstance(stage, Grpo):
        _add_grpo(phases, place, stage, trees, kept_features(place, stage, trees, images), assumed)
    else:
        # Demonstrations have no limit of their own.
        limit = max(trees.answer, stage.pack_tokens)
        groups = group_lengths(trees.count, 1, mean=trees.answer, limit=limit, spread=assumed.spread)
        _add_lost(phases, place, _update_passes(phases, place, stage, groups, trees, 0.0))
    _add_images(phases, place, trees, images)
    _add_checkpoint(phases, place, stage)
    return phases.time


def _add_grpo(
    phases: Phases, place: Placement, grpo: Grpo, trees: Trees, kept: float, assumed: Assumed
) -> None:
    """New weights, rollouts, grading, reference passes, update; `kept` is the share of kept features."""
    _add_weights(phases, place)
    rounds = _add_rollouts(phases, place, grpo, trees, assumed)
    groups = _lengths(grpo, trees, assumed, trees.count)
    references = _reference_passes(phases, place, grpo, groups, trees, kept)
    update = _update_passes(phases, place, grpo, groups, trees, kept if references else 0.0)
    masked = _masked_passes(phases, place, grpo, groups, trees)
    _add_lost(phases, place, [*references, *masked, *update])
    ahead = sum(one.seconds for one in references)
    if grpo.overlap == "on_policy":
        hidden = on_policy_overlap(grpo, rounds, ahead, update[0].seconds)
        phases.hide(hidden, "groups are learnt from as they arrive")
    elif grpo.overlap == "one_step_off":
        hidden = min(rounds[0].prefill + rounds[0].decode, ahead + update[0].seconds)
        phases.hide(hidden, "the next step's first round is sampled meanwhile")


def on_policy_overlap(grpo: Grpo, rounds: Sequence[Sampled], references: float, update: float) -> float:
    """Seconds of passes that are made while the servers sample, as `train.learning` does.

    The passes without gradients take up groups as they arrive, and so does the update, of the first optimiser
    step's share alone where old logprobs come from the policy. A group's place in the step is known when all
    before it have arrived.
    """
    count = grpo.prompts_per_step
    arrivals, begin = list[float](), 0.0
    for number, one in enumerate(rounds):
        kept = len(one.arrivals) - (len(rounds[number + 1].arrivals) if number + 1 < len(rounds) else 0)
        arrivals += [begin + seconds for seconds in accumulate(one.arrivals[:kept], max)]
        begin += one.prefill + one.decode
    waits_for_all = grpo.optimizer_steps > 1 and grpo.old_logprobs == "policy"
    share = -(-count // grpo.optimizer_steps) if waits_for_all else count
    now = 0.0
    for place, arrival in enumerate(arrivals[:count]):
        work = references + (update if place < share else 0.0)
        now = max(now, arrival) + work / count
    whole = references + update * share / count
    return begin + whole - max(begin, now)


def _lengths(grpo: Grpo, trees: Trees, assumed: Assumed, count: int) -> tuple[tuple[int, ...], ...]:
    limit = max(trees.answer, grpo.max_new_tokens)
    return group_lengths(count, trees.group, mean=trees.answer, limit=limit, spread=assumed.spread)


def _add_weights(phases: Phases, place: Placement) -> None:
    """New weights into vLLM: the adapters alone, or the whole model; a colocated one wakes up for it."""
    speeds = phases.speeds
    if place.rollout.engine == "local":
        return
    if place.rollout.engine == "vllm_colocated" and place.machine.gpus:
        phases.add("vLLM wakes up", speeds["wake_s"], ["wake_s"], "memory is mapped again", busy=0.0)
    size, name = sent_bytes(place), "weights to vLLM"
    if place.rollout.weights == "folder" and not place.lora.rank:
        seconds = size / speeds["disk_write"] + size / speeds["disk_read"]
        formula = f"{size / 1e9:.1f} GB written and read again through a folder"
        phases.add(name, seconds, ["disk_write", "disk_read"], formula, busy=0.0)
        return
    rate = speeds["weights_to_vllm"]
    formula = f"{size / 1e9:.1f} GB / {rate / 1e9:.3g} GB/s"
    phases.add(name, size / rate, ["weights_to_vllm"], formula, busy=0.0)


def _add_rollouts(
    phases: Phases, place: Placement, grpo: Grpo, trees: Trees, assumed: Assumed
) -> list[Sampled]:
    """Every round of sampling; with dynamic sampling there are more, for groups whose rewards are equal."""
    speeds = phases.speeds
    local, part = place.rollout.engine == "local", _part_that_samples(place)
    share = "forward_share" if local else "prefill_share"
    equal = 2 / (trees.group + 1) if assumed.equal is None else assumed.equal
    counts = [round(trees.count * equal**number) for number in range(1 + grpo.dynamic_sampling)]
    rounds = [
        (count, sampled(place, _lengths(grpo, trees, assumed, count), trees, speeds, max_rows=grpo.max_rows))
        for count in counts
        if count
    ]
    for number, (count, one) in enumerate(rounds, 1):
        which = "" if len(rounds) == 1 else f", round {number}"
        engines = min(engines_of(place), count)
        phases.add(
            f"prompts are read{which}",
            one.prefill,
            [share],
            f"{count:,} prompts with images once each, {_at(speeds, share)}; engines: {engines}",
            busy=part * one.busy_prefill,
        )
        phases.add(
            f"answers are decoded{which}",
            one.decode,
            ["local_layer_s" if local else "decode_step_s", "decode_read", share],
            f"{count * trees.group:,} answers, {one.slots:,} at once an engine: every step reads weights and "
            f"cache at {speeds['decode_read'] / 1e12:.2f} TB/s; {one.tail:.1f} s for the longest tenth",
            busy=part * one.busy_decode,
        )
    answers = sum(counts) * trees.group
    _add_after_sampling(phases, place, grpo, answers, trees)
    return [one for _, one in rounds]


def _add_after_sampling(phases: Phases, place: Placement, grpo: Grpo, answers: int, trees: Trees) -> None:
    """Grading, exchange and sleep: the GPUs wait."""
    speeds = phases.speeds
    graders = place.trainers
    note = "; the time of the judge is not known" if "judge" in grpo.reward.weights else ""
    phases.add(
        "answers are graded",
        answers / (graders * speeds["grades"]),
        ["grades"],
        f"{answers:,} answers / {speeds['grades']:,.0f} a second; ranks: {graders}{note}",
        busy=0.0,
    )
    phases.add(
        "answers are exchanged",
        answers * trees.answer * TOKEN_S if place.trainers > 1 else 0.0,
        GUESSED,
        f"{answers * trees.answer / 1e6:.1f} M tokens x {TOKEN_S * 1e6:.1f} microseconds on every rank",
        busy=0.0,
    )
    if place.rollout.engine == "vllm_colocated" and place.machine.gpus:
        phases.add("vLLM goes to sleep", speeds["sleep_s"], ["sleep_s"], "memory is given back", busy=0.0)


def sent_bytes(place: Placement) -> float:
    """Bytes of new weights for vLLM: the adapters (float32), or the whole model."""
    if place.lora.rank and place.rollout.lora != "merged":
        return float(FP32 * place.trained_numbers(()))
    return float(place.sizes.total * place.compute)


def _part_that_samples(place: Placement) -> float:
    """The share of the machine's GPUs that sample."""
    rollout, devices = place.rollout, place.machine.devices
    if rollout.engine == "vllm_server":
        return 0.0 if rollout.urls else min(1.0, rollout.servers * rollout.tensor_parallel / devices)
    return place.trainers / devices


def _add_images(phases: Phases, place: Placement, trees: Trees, images: Images) -> None:
    """Images are decoded in threads while the step before is sampled and learnt from."""
    own, rate = -(-trees.count // place.trainers), phases.speeds["images"]
    if not trees.patches:
        return
    needed, hidden = own / (rate * max(1, images.workers)), phases.time.seconds if images.workers else 0.0
    phases.add(
        "images are prepared",
        needed - hidden,
        ["images"],
        f"{own:,} images a rank / ({max(1, images.workers)} threads x {rate:.0f} a second), "
        "less the step before",
        busy=0.0,
    )


def _add_checkpoint(phases: Phases, place: Placement, stage: Sft | Grpo) -> None:
    """A checkpoint every few steps: training waits for the copy, and for a disk that is slower than that."""
    trained, speeds = place.trained_numbers(stage.freeze), phases.speeds
    frozen = 0 if place.lora.rank else place.sizes.total - trained
    size = 3 * FP32 * trained + place.weight * frozen
    rates = Rates(device="", to_host=speeds["to_host"], disk_write=speeds["disk_write"])
    step = phases.time.seconds
    found = stall(size, ranks=place.shards, save_every=stage.save_every, step_s=step, rates=rates)
    phases.add(
        "checkpoint",
        (found.copy_s + found.wait_s) / stage.save_every,
        ["to_host", "disk_write"],
        f"{size / 1e9:,.1f} GB every {stage.save_every} steps: {found.copy_s:.1f} s to copy to main memory; "
        f"{found.write_s:.0f} s to write meanwhile",
        busy=0.0,
    )


def _reference_passes(
    phases: Phases,
    place: Placement,
    grpo: Grpo,
    groups: Groups,
    trees: Trees,
    kept: float,
) -> list[Passed]:
    """Passes without gradients: by the policy before its first step, and by the reference over all trees.

    The trees of the first optimiser step need no old logprobs. The tower runs in the first pass over an
    image, and in the second where its features are not kept.
    """
    speeds = phases.speeds
    rounds = rounds_of(place, groups, trees, steps=grpo.optimizer_steps, budget=grpo.pack_tokens)
    shares = dict[str, float]()
    if grpo.optimizer_steps > 1 and grpo.old_logprobs == "policy":
        shares["old logprobs, by the policy"] = 1 - 1 / grpo.optimizer_steps
    if grpo.kl.active:
        shares["logprobs of the reference"] = 1.0
    done = list[Passed]()
    seen = 0.0
    for name, share in shares.items():
        tower, seen = share - kept * seen, share
        one = passed(place, rounds, (share, tower), forward_traffic(place), speeds, share="forward_share")
        amount = "one forward pass" if share == 1 else f"{share:g} of a forward pass"
        formula = f"{amount}{_tower(tower)}, {rounds.operations(share, tower) / 1e15:.1f} P operations "
        phases.add(name, one.work, ["forward_share"], formula + _at(speeds, "forward_share"))
        done.append(one)
    return done


def _masked_passes(
    phases: Phases, place: Placement, grpo: Grpo, groups: Groups, trees: Trees
) -> list[Passed]:
    """The passes over masked images of `grpo.sight`, whose features are never kept."""
    if not grpo.sight.coefficient:
        return []
    both, speeds = grpo.sight.gradient == "both", phases.speeds
    share = "update_share" if both else "forward_share"
    times = update_times(place, grpo.freeze) if both else (1.0, 1.0)
    rounds = rounds_of(place, groups, trees, steps=grpo.optimizer_steps, budget=grpo.pack_tokens)
    one = passed(place, rounds, times, forward_traffic(place), speeds, share=share)
    amount = f"{times[0]:g} times a forward pass" if both else "one forward pass"
    phases.add("masked images", one.work, [share], f"{amount} {_at(speeds, share)}")
    return [one]


def _tower(times: float) -> str:
    return "" if times == 1 else ", the tower's features kept" if not times else f", the tower {times:.0%}"


def _update_passes(
    phases: Phases, place: Placement, stage: Sft | Grpo, groups: Groups, trees: Trees, kept: float
) -> list[Passed]:
    """Forward and backward passes with recomputed activations, and the optimiser.

    `kept` is the share of the images of which an earlier pass has kept the features.
    """
    speeds = phases.speeds
    steps = stage.optimizer_steps if isinstance(stage, Grpo) else 1
    rounds = rounds_of(place, groups, trees, steps=steps, budget=stage.pack_tokens)
    trained, (layers, tower) = place.trained_numbers(stage.freeze), update_times(place, stage.freeze)
    times = layers, tower - kept
    whole = passed(place, rounds, times, update_traffic(place, trained), speeds, share="update_share")
    again = passed(
        place, rounds, recomputed_times(place, stage.freeze), NO_TRAFFIC, speeds, share="update_share"
    )
    rates, at = ["update_share"], _at(speeds, "update_share")
    once = int(place.checkpointing)
    ahead = (
        f"{layers - once} times a forward pass of the language model, {tower - kept:.3g} of the tower, {at}; "
    )
    ahead += f"{rounds.count} packs a GPU"
    phases.add("forward and backward passes", whole.work - again.work, rates, ahead)
    phases.add("activations are recomputed", again.work, rates, f"one more forward pass {at}")
    size = OPTIMIZER_PASSES * FP32 * trained / place.shards * steps
    speed = CPU_BANDWIDTH if place.offloaded else place.machine.device.bandwidth * READING
    phases.add(
        "optimiser",
        size / speed,
        GUESSED,
        f"{steps} x {trained / place.shards / 1e9:.2f} G numbers a device, {OPTIMIZER_PASSES} times "
        f"through memory at {speed / 1e12:.2f} TB/s",
        busy=0.0 if place.offloaded else None,
    )
    return [whole]


def _add_lost(phases: Phases, place: Placement, done: Sequence[Passed]) -> None:
    """What ranks that compute in step lose: waiting for the largest pack, and traffic that nothing hides."""
    speeds = phases.speeds
    phases.add(
        "waiting for the largest pack",
        sum(one.waiting for one in done),
        ["forward_share", "update_share"],
        "ranks go through their packs together; packs as training makes them, of the assumed lengths",
        busy=0.0,
    )
    phases.add(
        "traffic between GPUs",
        sum(one.traffic for one in done),
        ["collective"],
        f"embedding, head and their gradients, and what is longer than the work that hides it, at "
        f"{speed_of_link(place, speeds) / 1e9:,.0f} GB/s",
        busy=0.0,
    )


def _at(speeds: Speeds, share: str) -> str:
    return f"at {speeds[share]:.0%} of the peak"
