"""What a study of the cold start says, in sentences: whether one pays, from where on, and what adds nothing.

Every sentence about a difference rests on its interval, and on all seeds having the same sign.
"""

from collections.abc import Iterator, Sequence

from rlcs.recipe.coldstart import NONE
from rlcs.report.coldstart_results import Gap, Result, Results
from rlcs.report.conclusions import Conclusions, Note
from rlcs.report.load_run import text
from rlcs.report.pages import duration, points


def conclude(study: Results) -> Conclusions:
    """The conclusions of a study, finished or not."""
    none = study.none
    if none is None or not study.cold:
        lead = f"{study.over} of {study.cells} cells are over: no cold start can be compared with none yet."
        return Conclusions(headline="Nothing to compare yet", lead=lead, notes=())
    best = max(study.cold, key=lambda result: result.after)
    pays = [r for r in study.cold if (gap := study.against_none(r)) and gap.clear and gap.points > 0]
    notes = [*_before_and_after(none, best), *_lengths(study), *_kinds(study)]
    if pays:
        notes = [*_cheapest(study, best), *_more_adds_nothing(study, best), *notes]
    doubts = (Note(text=line) for line in _doubts(study))
    return Conclusions(
        headline=_headline(study, pays),
        lead=_lead(study, none, best),
        notes=(*doubts, *(Note(text=line, serious=False) for line in notes)),
    )


def best_of_each(results: Sequence[Result]) -> list[Result]:
    """The best result of each number of demonstrations, over lengths of SFT; the smallest number first."""
    counts = sorted({result.demonstrations for result in results})
    return [max((r for r in results if r.demonstrations == n), key=lambda r: r.after) for n in counts]


def _difference(gap: Gap) -> str:
    return f"{points(gap.points)} points (interval {points(gap.low)} to {points(gap.high)})"


def _named(study: Results, result: Result) -> str:
    """A result's number and length, and its kind where there are several."""
    several = len({each.chain for each in study.cold}) > 1 and result.chain != NONE
    return f"{result.kind}, {result.title}" if several else result.title


def _headline(study: Results, pays: Sequence[Result]) -> str:
    counts = sorted({result.demonstrations for result in study.cold})
    paying = sorted({result.demonstrations for result in pays})
    if not paying:
        gaps = [study.against_none(result) for result in study.cold]
        if all(gap is not None and gap.clear for gap in gaps):
            return "Every cold start that was tried costs accuracy"
        return "No cold start that was tried pays measurably with this much RL"
    if len(counts) > 1 and paying == counts[-len(paying) :]:
        fewest = ", the fewest that were tried," if paying == counts else ""
        return f"A cold start pays from {paying[0]:,} demonstrations{fewest} on"
    return f"A cold start pays with {', '.join(f'{count:,}' for count in paying)} demonstrations"


def _lead(study: Results, none: Result, best: Result) -> str:
    gap = study.against_none(best)
    line = f"After RL the best cold start ({_named(study, best)}) answers {best.after:.1%} right, the model "
    line += f"without one {none.after:.1%}"
    if gap is None:
        return f"{line}."
    seeds = f"; by seed {', '.join(map(points, gap.by_seed))}" if len(gap.by_seed) > 1 else ""
    return f"{line}: {_difference(gap)}{seeds}."


def _not_worse(study: Results, result: Result, best: Result) -> bool:
    """Whether a result is not measurably worse than the best one."""
    gap = study.gap(result, best)
    return result is best or (gap is not None and not (gap.clear and gap.points > 0))


def _more_adds_nothing(study: Results, best: Result) -> Iterator[str]:
    """From which number of demonstrations on more of them make no difference that can be seen."""
    of_count = best_of_each(study.cold)
    if len(of_count) < 2:
        return
    enough = next(r for r in of_count if _not_worse(study, r, best))
    if enough.demonstrations == of_count[-1].demonstrations:
        yield f"More demonstrations still help at {enough.demonstrations:,}, the most that were tried."
        return
    gap = study.gap(enough, best)
    evidence = f"; the best, {_named(study, best)}: {_difference(gap)}" if gap and best is not enough else ""
    yield f"More than {enough.demonstrations:,} demonstrations add nothing that the interval shows{evidence}."


def _lengths(study: Results) -> Iterator[str]:
    """Whether a longer SFT on the same demonstrations helps or hurts what RL makes of it."""
    for chain in dict.fromkeys(result.chain for result in study.cold):
        most = max(result.demonstrations for result in study.cold if result.chain == chain)
        same = [r for r in study.cold if r.chain == chain and r.demonstrations == most]
        best = max(same, key=lambda result: result.after)
        gaps = [(result, study.gap(best, result)) for result in same]
        worse = [(r, gap) for r, gap in gaps if gap is not None and gap.clear and gap.points < 0]
        about, against = f"On {most:,} demonstrations ({best.kind})", f"against {best.steps:,} steps"
        if longer := [each for each in worse if each[0].steps > best.steps]:
            result, gap = longer[0]
            line = (
                f"{about} a longer SFT hurts RL from {result.steps:,} steps on: {_difference(gap)} {against}"
            )
            ahead = f", although it is ahead before RL, {result.before:.1%} to {best.before:.1%}"
            yield f"{line}{ahead if result.before > best.before else ''}."
        if shorter := [each for each in worse if each[0].steps < best.steps]:
            result, gap = shorter[-1]
            yield f"{about} {result.steps:,} steps of SFT are too few: {_difference(gap)} {against}."
        if len(same) > 1 and not worse:
            span = f"{same[0].steps:,} to {same[-1].steps:,} steps of SFT"
            yield f"{about} {span} make no difference after RL that the intervals show."


def _kinds(study: Results) -> Iterator[str]:
    """How the kinds of demonstrations compare, each at its best."""
    chains = dict.fromkeys(result.chain for result in study.cold)
    each = [max((r for r in study.cold if r.chain == c), key=lambda r: r.after) for c in chains]
    first, *others = sorted(each, key=lambda result: -result.after)
    for other in others:
        if (gap := study.gap(other, first)) is not None:
            verb = "beats" if gap.clear and gap.points > 0 else "is not measurably better than"
            yield f"Of the kinds, {first.kind} {verb} {other.kind}, each at its best: {_difference(gap)}."


def _before_and_after(none: Result, best: Result) -> Iterator[str]:
    """What RL does to the lead that the cold start gives."""
    before, after = best.before - none.before, best.after - none.after
    if before > 0:
        yield (
            f"Against no cold start the best one is at {points(before)} points before RL ({best.before:.1%} "
            f"to {none.before:.1%}) and at {points(after)} after it."
        )


def _cheapest(study: Results, best: Result) -> Iterator[str]:
    """The smallest cold start that does as well as the best one, and how to have it."""
    enough = [result for result in study.cold if _not_worse(study, result, best)]
    least = min(enough, key=lambda result: (result.demonstrations, result.steps))
    chain = f"teacher.chain={least.chain} " if least.chain != "given" else ""
    yield (
        f"The smallest cold start that is not measurably worse than the best: {_named(study, least)}, "
        f"{duration(least.sft_s)} of SFT, {least.after:.1%} after RL. In a recipe: {chain}"
        f"data.max_demonstrations={least.demonstrations} sft.epochs={least.epochs:g} "
        f"sft.optimizer.schedule={text(study.facts, 'schedule')}."
    )


def _doubts(study: Results) -> Iterator[str]:
    """What puts the figures in doubt."""
    if study.over < study.cells:
        yield f"{study.over} of {study.cells} cells are over: the figures may change."
    if study.seeds == 1:
        yield "There is one seed: how much the order of data and samples alone changes is not known here."
    cold = [cell for result in study.cold for cell in result.cells.values()]
    if stopped := sum(cell.how == "stopped" for cell in cold):
        yield (
            f"{stopped} of {len(cold)} cells with a cold start were stopped in the middle of RL: they could "
            "not become the best (hollow points). With all of their RL they may be better than shown."
        )
    for cell in (*cold, *(study.none.cells.values() if study.none else ())):
        if cell.how == "failed":
            yield f"RL of {cell.name} did not learn, and its model before RL counts: {cell.why[:300]}"
