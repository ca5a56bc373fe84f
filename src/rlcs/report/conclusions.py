"""What a run found, in sentences: what each stage of training added, and what a reader must know besides."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from rlcs.recipe.arms import ARMS, MAIN_FIRST, RL_ARMS, TRAINING_ORDER
from rlcs.records import NO_SIGNAL
from rlcs.report.differences import Difference, differences
from rlcs.report.findings import ArmResult, arm_results, health, training_headline
from rlcs.report.load_run import Row, Run, number, part
from rlcs.report.pages import points
from rlcs.report.stages import ending, progress
from rlcs.report.validation import ValidationCurve, validation_curves

_CUT_SHARE = 0.01
"""Cut answers are worth a sentence from this share on."""

_CAUSES = {
    ("sft_grpo", "sft"): "RL",
    ("sft", "base"): "The cold start (SFT)",
    ("sft_grpo", "grpo"): "A cold start before RL",
    ("grpo", "base"): "RL without a cold start",
    ("sft_grpo", "base"): "Cold start and RL together",
    ("mixed", "sft_grpo"): "One mixed stage in place of two",
    ("mixed", "grpo"): "Demonstrations in the steps of RL",
    ("mixed", "sft"): "Mixed training against SFT alone",
    ("mixed", "base"): "Mixed training",
}
"""What the difference between two arms is the effect of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What a reader must know besides; `serious` where the numbers are in doubt."""

    text: str
    serious: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Conclusions:
    """The sentences at the top of a report: the main one, its evidence, and notes."""

    headline: str
    lead: str
    notes: tuple[Note, ...]


def conclude(runs: Sequence[Run]) -> Conclusions:
    """The conclusions about a run, or about the seeds of one, finished or not."""
    results, gaps = arm_results(runs), differences(runs)
    if gaps:
        headline, lead = effect(gaps[0]), _evidence(gaps[0], len(runs))
    elif results:
        headline, lead = _alone(next(r for arm in MAIN_FIRST for r in results if r.arm == arm))
    else:
        headline, lead = training_headline(runs)
    return Conclusions(headline=headline, lead=lead, notes=tuple(_notes(runs, results)))


def effect(gap: Difference) -> str:
    """What one arm has over another, in a clause: "RL added 16.3 points: 73.6% → 89.9%"."""
    cause, shares = _CAUSES[gap.arm, gap.against], f"{gap.first:.1%} → {gap.second:.1%}"
    if not gap.clear:
        return f"{cause} added nothing measurable: {shares}"
    return f"{cause} {'added' if gap.points > 0 else 'cost'} {100 * abs(gap.points):.1f} points: {shares}"


def _evidence(gap: Difference, seeds: int) -> str:
    """The second sentence of the page: what was compared, on what, with which interval."""
    problems = f"the same {gap.shared:,}" if gap.shared else "separate"
    text = f"{ARMS[gap.arm].label} against {ARMS[gap.against].label} on {problems} held-out problems"
    text += f", mean of {seeds} seeds" if seeds > 1 else ""
    text += f". The 95% interval of the difference, {points(gap.low)} to {points(gap.high)} points, "
    text += "includes zero" if gap.low <= 0 <= gap.high else "excludes zero"
    if gap.by_seed:
        agree = "the seeds disagree" if len({each > 0 for each in gap.by_seed}) > 1 else "by seed"
        text += f"; {agree}: {', '.join(points(each) for each in gap.by_seed)}"
    return text + "."


def _alone(result: ArmResult) -> tuple[str, str]:
    """The headline of a run in which a single arm was measured."""
    headline = f"{result.name}: {result.accuracy:.1%} of {result.n:,} held-out problems right"
    kind = "Lowest and highest seed" if len(result.seeds) > 1 else "95% interval"
    lead = f"{kind}: {result.low:.1%} to {result.high:.1%}."
    if result.arm == "base":
        return headline, f"{lead} This is the model before any training."
    return headline, f"{lead} No other arm was measured, so this does not tell what training added."


def _notes(runs: Sequence[Run], results: Sequence[ArmResult]) -> Iterator[Note]:
    """The serious ones first."""
    stats, curves = runs[0].cold_start, validation_curves(runs)
    serious = [
        *(line for run in runs for line in _stopped(run)),
        *_not_answered(results),
        *_alarms(runs),
        *_wrong_demonstrations(stats),
        *(_late_steps(curve) for curve in curves if curve.peaked_early and curve.fell and curve.kept is None),
    ]
    overlap = list(_overlap(runs[0].data_checks))
    yield from (Note(text=line) for line in serious)
    yield from (note for note in overlap if note.serious)
    mild = [
        *(line for run in runs for line in _unfinished(run)),
        *_left_out(stats),
        *_compared(runs),
        *_ordered(runs),
        *(_late_steps(c) for c in curves if (c.peaked_early and not c.fell) or _kept_early(c)),
    ]
    yield from (Note(text=line, serious=False) for line in mild)
    yield from (note for note in overlap if not note.serious)


def _ordered(runs: Sequence[Run]) -> Iterator[str]:
    """What drawing problems by their pass rates gained in groups that RL can learn from."""
    for stage in RL_ARMS:
        rows = [row for run in runs for row in run.curves.get(stage, ())]
        chosen = [v for row in rows if (v := number(row, "signal_by_estimate")) is not None]
        shuffled = [v for row in rows if (v := number(row, "signal_shuffled")) is not None]
        if min(len(chosen), len(shuffled)) > 1:
            gain = fmean(chosen) - fmean(shuffled)
            half = 1.96 * math.sqrt(variance(chosen) / len(chosen) + variance(shuffled) / len(shuffled))
            yield (
                f"{ARMS[stage].stage} drew problems by their estimated pass rates: {fmean(chosen):.1%} of "
                f"these groups had unequal rewards, against {fmean(shuffled):.1%} of the groups in shuffled "
                f"order, one in 8 ({points(gain)} points, 95% interval {points(gain - half)} to "
                f"{points(gain + half)})."
            )


def _stopped(run: Run) -> Iterator[str]:
    if not run.summary and (why := ending(run)):
        yield f"The run stopped{_place(run)}: {why[:300]}"


def _unfinished(run: Run) -> Iterator[str]:
    """That a stage is not done; a finished run has a summary."""
    if not run.summary and not ending(run) and (place := _place(run)):
        yield f"This run is not finished{place}: its numbers may change."


def _place(run: Run) -> str:
    """The first stage that is not done, in brackets; empty where all are."""
    at = next((row for row in progress(run) if row.state != "done"), None)
    return "" if at is None else f" ({run.folder.name}, {at.name}: {at.place})"


def _not_answered(results: Sequence[ArmResult]) -> Iterator[str]:
    """Answers without a verdict, or without an end."""
    cut = [f"{r.truncated:.1%} of {r.name}" for r in results if (r.truncated or 0) >= _CUT_SHARE]
    if cut:
        yield (
            f"Answers cut at the token limit: {', '.join(cut)}. A cut answer is mostly wrong: with a larger "
            "eval.max_new_tokens the accuracy may be higher."
        )
    unscored = [f"{r.unscored:,} of {r.name}" for r in results if r.unscored]
    if unscored:
        yield f"Answers that could not be scored, and count as wrong: {', '.join(unscored)}."


def _alarms(runs: Sequence[Run]) -> Iterator[str]:
    """The warning signs above their limits at the end of RL, and steps that were skipped."""
    for row in health(runs):
        for stage, (first, last) in row.stages.items():
            if last > row.sign.most:
                form = row.sign.form.format
                yield (
                    f"Warning sign in {ARMS[stage].stage}: {row.sign.name[0].lower()}{row.sign.name[1:]}, "
                    f"{form(first)} → {form(last)} (limit {form(row.sign.most)}). What to do: {row.sign.fix}."
                )
    for stage in TRAINING_ORDER:
        rows = [row for run in runs for row in run.curves.get(stage, ())]
        skipped = [row for row in rows if row.get("skipped") and row["skipped"] != NO_SIGNAL]
        if skipped:
            yield f"{ARMS[stage].stage}: {len(skipped):,} of {len(rows):,} steps were skipped (see Health)."


def _compared(runs: Sequence[Run]) -> Iterator[str]:
    """How often engine and trainer were compared, and the comparison that came nearest to its limit."""
    for stage in TRAINING_ORDER:
        rows = [row for run in runs for row in run.curves.get(stage, ())]
        pairs = [(number(row, "engine_gap"), number(row, "engine_gap_limit")) for row in rows]
        if found := [(gap / limit, gap, limit) for gap, limit in pairs if gap is not None and limit]:
            _, gap, limit = max(found)
            yield (
                f"{ARMS[stage].stage}: what the rollout engine sees and computes was compared with the "
                f"trainer {len(found):,} times: at most {gap:.2g} nats a token apart, {limit:.2g} allowed."
            )


def _left_out(stats: Row) -> Iterator[str]:
    """Demonstrations that SFT did not learn from, with the reasons."""
    kept, rejected = number(stats, "kept"), number(stats, "rejected")
    if kept is not None and rejected:
        counts = {why: count for why, count in part(stats, "reasons").items() if isinstance(count, int)}
        order = sorted(counts, key=lambda why: -counts[why])
        reasons = ", ".join(f"{counts[why]:,} {why}" for why in order[:3]) + (", …" if order[3:] else "")
        colon = f": {reasons}" if reasons else ""
        yield f"SFT learned from {kept:,.0f} demonstrations; {rejected:,.0f} others were left out{colon}."


def _wrong_demonstrations(stats: Row) -> Iterator[str]:
    if wrong := number(stats, "kept_wrong"):
        yield (
            f"{wrong:,.0f} of the demonstrations that SFT learned from have a wrong answer: "
            "teacher.keep=right leaves such ones out."
        )


def _overlap(checks: Row) -> Iterator[Note]:
    """What data_checks.json says about training rows that are also in the test data."""
    overlap = part(checks, "overlap")
    if same := _rows(overlap, "same problem", "same question"):
        if overlap.get("setting") == "drop":
            what = "Left out of the training because they are also in the test data"
            yield Note(text=f"{what}: {same}.", serious=False)
        else:
            what = (
                f"Training and test data overlap: {same} are also test problems, so the accuracy may be too "
            )
            yield Note(text=f"{what}high. data.overlap=drop leaves them out of the training.")
    if images := _rows(overlap, "same image"):
        yield Note(text=f"With an image of the test data but another question: {images}.", serious=False)


def _rows(overlap: Row, *kinds: str) -> str:
    """How many rows of each training source overlap the test data in one of these ways."""
    found, counts = overlap.get("found"), Counter[str]()
    for fact in found if isinstance(found, list) else ():
        if isinstance(fact, Mapping) and fact.get("kind") in kinds:
            counts[str(fact.get("role"))] += int(number(fact, "rows") or 0)
    return " and ".join(f"{count:,} rows of data.{role}" for role, count in counts.items() if count)


def _kept_early(curve: ValidationCurve) -> bool:
    return curve.kept not in (None, curve.points[-1].step)


def _late_steps(curve: ValidationCurve) -> str:
    """Which step was best, whether the last one is clearly below it, and which weights were kept."""
    best, last = curve.best, curve.points[-1]
    text = f"{ARMS[curve.stage].stage} was best on the validation problems at step {best.step:,} "
    text += f"of {last.step:,}: {best.accuracy:.1%}, at the end {last.accuracy:.1%}"
    text += ". " if curve.fell else ", which is within the interval. "
    if curve.kept is not None:
        return f"{text}The weights of step {curve.kept:,} were kept."
    key = "grpo.keep=best" if curve.stage in RL_ARMS else "sft.handover.rule=best_pass_1"
    return f"{text}The last weights were kept; {key} would keep the best."
