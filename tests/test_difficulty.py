"""Running pass rates and the order of problems by them."""

import itertools
import json
import math
from statistics import fmean

import numpy as np
import pytest

from rlcs.data.difficulty import HALF_LIFE, EstimatedStream, PassRates, stream_of
from rlcs.data.loading import load
from rlcs.data.run_data import by_pass_rate
from rlcs.data.stream import Outcome, ProblemStream
from rlcs.errors import CheckpointError, UserError
from rlcs.evals.intervals import wilson
from rlcs.pipeline import difficulty
from rlcs.pipeline.difficulty import Difficulty, measure_difficulty
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Data
from rlcs.records import Problem
from rlcs.signals import StopFlag, Stopped
from rlcs.storage import read_jsonl

GROUP = 8


def problem(index: int, source: str = "all", **metadata) -> Problem:
    return Problem(id=f"p{index}", source=source, question="?", answer="1", metadata=metadata)


def outcome(index: int, right: int, answers: int = GROUP) -> Outcome:
    return Outcome(problem_id=f"p{index}", answers=answers, right=right, signal=0 < right < answers)


class World:
    """Problems with pass rates, half of which an imagined policy never solves."""

    def __init__(self, count: int = 600) -> None:
        rng = np.random.default_rng(1)
        self.problems = [problem(i) for i in range(count)]
        self.rates = {p.id: float(rng.choice([0.0, 0.1, 0.5, 0.9])) for p in self.problems}

    def answers(self, drawn, step: int) -> list[Outcome]:
        rng = np.random.default_rng(step)
        return [outcome(int(p.id[1:]), int(rng.binomial(GROUP, self.rates[p.id]))) for p in drawn]

    def run(self, stream, steps, *, first: int = 0, size: int = 16):
        drawn, metrics = [], []
        for step in range(first, steps):
            drawn.append(stream.take(size))
            stream.peek(size)
            metrics.append(stream.observe(self.answers(drawn[-1], step)))
        return drawn, metrics


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def signal_chance(rate: float, size: int) -> float:
    return 1 - rate**size - (1 - rate) ** size


@pytest.mark.parametrize("size", [2, 8, 64])
def test_the_nearer_to_a_half_the_likelier_a_signal_whatever_the_group_size(size):
    rates = sorted(np.random.default_rng(0).random(50), key=lambda rate: abs(rate - 0.5))
    chances = [signal_chance(rate, size) for rate in rates]
    assert chances == sorted(chances, reverse=True)


def test_the_posterior_is_that_of_answers_which_fade_and_leans_on_the_kind():
    rates = PassRates([*(problem(i, "easy") for i in range(4)), problem(4, "hard"), problem(5, "hard")])
    rates.add(0, outcome(0, 8), 1)
    rates.add(4, outcome(4, 0), 1)
    alpha, beta = rates.posterior(1)
    overall = (8 + 1) / (16 + 2)
    easy, hard = (8 + 8 * overall) / 16, (0 + 8 * overall) / 16
    assert alpha == pytest.approx([2 * easy + 8, *[2 * easy] * 3, 2 * hard, 2 * hard])
    assert beta == pytest.approx([2 * (1 - easy), *[2 * (1 - easy)] * 3, 2 * (1 - hard) + 8, 2 * (1 - hard)])
    later = 1 + int(HALF_LIFE)
    rates.add(0, outcome(0, 2), later)
    alpha, beta = rates.posterior(later)
    assert alpha[0] + beta[0] == pytest.approx(2 + 8 / 2 + 8)
    far, _ = rates.posterior(1000 * later)
    assert far == pytest.approx([1.0] * 6), "in the end nothing is known"


def test_rows_bring_their_pass_rates_and_these_are_corrected_by_what_is_seen():
    problems = [
        *(problem(i, pass_rate=0.95) for i in range(50)),
        *(problem(50 + i, pass_rate=0.05) for i in range(50)),
    ]
    rates = PassRates(problems)
    alpha, beta = rates.posterior(0)
    assert alpha[0] / (alpha[0] + beta[0]) == pytest.approx(0.95)
    assert alpha[-1] / (alpha[-1] + beta[-1]) == pytest.approx(0.05)
    for index in range(8):  # another model's rates: what it solved is of medium difficulty for this one
        rates.add(index, outcome(index, 4), 1)
    alpha, beta = rates.posterior(1)
    assert alpha[20] / (alpha[20] + beta[20]) == pytest.approx((32 + 8 * 0.95) / 72)


def test_rows_that_agree_in_columns_with_few_values_are_a_kind():
    problems = [problem(i, level=i % 2, note=f"row {i}", right=i % 9) for i in range(100)]
    rates = PassRates(problems)
    for index in range(0, 100, 4):
        rates.add(index, outcome(index, 6), 1)
        rates.add(index + 1, outcome(index, 2), 1)
    alpha, beta = rates.posterior(1)
    mean = alpha / (alpha + beta)
    assert mean[2::4] == pytest.approx([(25 * 6 + 8 * 0.5) / (25 * 8 + 8)] * 25)
    assert mean[3::4] == pytest.approx([(25 * 2 + 8 * 0.5) / (25 * 8 + 8)] * 25)
    few = PassRates(problems[:30])
    few.add(0, outcome(0, 8), 1)
    alpha, _ = few.posterior(1)
    assert alpha[1] == alpha[2], "too few for two kinds"


def test_more_groups_have_a_signal_than_in_shuffled_order_and_no_problem_is_forgotten(world):
    stream = stream_of(world.problems, "signal", seed=0, steps=200)
    assert isinstance(stream, EstimatedStream)
    drawn, metrics = world.run(stream, 200)
    chance = fmean(signal_chance(rate, GROUP) for rate in world.rates.values())
    of_estimate = fmean(row["signal_by_estimate"] for row in metrics[100:])
    of_shuffled = fmean(row["signal_shuffled"] for row in metrics)
    assert of_shuffled == pytest.approx(chance, abs=0.05)
    assert of_estimate > chance + 0.25
    counts = dict.fromkeys(world.rates, 0)
    for step in drawn:
        assert len({p.id for p in step}) == 16, "no problem twice in a step"
        for p in step:
            counts[p.id] += 1
    assert min(counts.values()) >= 1
    mean = {rate: fmean(counts[i] for i, r in world.rates.items() if r == rate) for rate in (0.0, 0.5)}
    assert mean[0.5] > 4 * mean[0.0]


def test_easy_first_goes_from_easy_problems_to_hard_ones(world):
    drawn, _ = world.run(stream_of(world.problems, "easy_first", seed=0, steps=200), 200)
    parts = (drawn[25:75], drawn[100:150], drawn[150:])
    rates = [fmean(world.rates[p.id] for step in part for p in step) for part in parts]
    assert rates[0] > rates[1] + 0.05 > rates[2] + 0.2


@pytest.mark.parametrize("order", ["shuffled", "signal", "easy_first"])
def test_a_stream_continues_exactly_from_its_state_and_alike_everywhere(world, order):
    unbroken, metrics = world.run(stream_of(world.problems, order, seed=3, steps=12), 12)
    assert world.run(stream_of(world.problems, order, seed=4, steps=12), 12)[0] != unbroken
    first = stream_of(world.problems, order, seed=3, steps=12)
    before = world.run(first, 5)[0]
    again = stream_of(world.problems, order, seed=3, steps=12)
    again.restore(json.loads(json.dumps(first.state())))
    after, rest = world.run(again, 12, first=5)
    assert before + after == unbroken and rest == metrics[5:]
    assert json.dumps(again.state()) == json.dumps(again.state())


def test_a_step_that_is_taken_again_draws_the_same(world):
    stream = stream_of(world.problems, "signal", seed=3, steps=12)
    world.run(stream, 3)
    cursor = json.dumps(stream.state())
    taken, more = stream.take(16), stream.take(5)  # a further round of dynamic sampling
    assert not {p.id for p in taken} & {p.id for p in more}
    stream.observe(world.answers([*taken, *more], 3))
    stream.restore(json.loads(cursor))
    assert stream.take(16) == taken and stream.peek(5) == more


def test_few_problems_come_several_times_in_a_step():
    stream = stream_of([problem(i) for i in range(3)], "signal", seed=0, steps=5)
    for _ in range(3):
        drawn = stream.take(7)
        assert {p.id for p in drawn} == {"p0", "p1", "p2"}
        stream.observe([outcome(int(p.id[1:]), 4) for p in drawn])


def test_the_state_of_a_million_problems_is_small():
    rates = PassRates([problem(0)] * 1_000_000)
    assert sum(map(len, rates.state().values())) == 0
    for index in range(0, 1_000_000, 50):
        rates.add(index, outcome(0, 3), 1)
    assert sum(map(len, rates.state().values())) == pytest.approx(20_000 * 16 * 4 / 3, rel=0.01)


def test_a_state_of_another_order_or_damaged_is_refused(world):
    stream = stream_of(world.problems, "signal", seed=3, steps=12)
    world.run(stream, 2)
    state = stream.state()
    shuffled = ProblemStream(world.problems, seed=3)
    with pytest.raises(CheckpointError, match="cannot be read"):
        stream.restore(shuffled.state())
    with pytest.raises(CheckpointError, match="cannot be read"):
        shuffled.restore(state)
    with pytest.raises(CheckpointError, match="estimated pass rates"):
        stream.restore({**state, "rates": {**state["rates"], "right": "AAAA"}})


# --- pass rates of a data source -----------------------------------------------------------------

SHORT = ("grpo.max_new_tokens=48", "grpo.group_size=3", "grpo.max_rows=32")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """A file of ten problems, one of which is too long to be a prompt."""
    folder = tmp_path_factory.mktemp("source")
    rows = [
        {"id": f"r{i}", "problem": "How many?" + " more" * (400 * (i == 3)), "answer": "2", "note": i}
        for i in range(10)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def measured(source, out, *, stop_after=None, monkeypatch=None):
    recipe = load_recipe("quickstart", SHORT).recipe
    with StopFlag() as stop:
        if stop_after is not None:
            calls = itertools.count(1)
            sample = difficulty._sample

            def sample_and_stop(*args):
                sample(*args)
                if next(calls) == stop_after:
                    stop.is_set = True

            monkeypatch.setattr(difficulty, "_sample", sample_and_stop)
        return measure_difficulty(source, recipe, out, samples=4, stop=stop)


def test_pass_rates_are_written_into_the_rows_and_a_stopped_measurement_goes_on(
    source, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(difficulty, "CHUNK", 8)
    whole = measured(source, tmp_path / "a" / "rated.jsonl")
    rows = read_jsonl(tmp_path / "a" / "rated.jsonl")
    assert [(row["id"], row["note"]) for row in rows] == [(f"r{i}", i) for i in range(10)]
    assert (rows[3]["samples"], rows[3]["pass_rate"]) == (0, None), "its prompt is too long"
    for row in (*rows[:3], *rows[4:]):
        assert row["samples"] == 4 and row["pass_rate"] == row["right"] / 4
        bounds = [row["pass_rate_low"], row["pass_rate_high"]]
        assert bounds == pytest.approx(wilson(row["right"], 4), abs=1e-4)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        measured(source, tmp_path / "b" / "rated.jsonl", stop_after=2, monkeypatch=patch)
    kept = read_jsonl(tmp_path / "b" / "rated.answers" / "samples.jsonl")
    assert len(kept) == 16 and not (tmp_path / "b" / "rated.jsonl").exists()
    assert measured(source, tmp_path / "b" / "rated.jsonl") == whole
    assert read_jsonl(tmp_path / "b" / "rated.jsonl") == rows

    facts = whole.summary()
    assert (facts["problems"], facts["unmeasured"], facts["group_size"]) == (9, 1, 3)
    with pytest.raises(UserError, match="such a file already"):
        measured(source, tmp_path / "a" / "rated.jsonl")


def test_what_is_written_is_what_a_run_selects_by_and_begins_with(source, tmp_path):
    found = Difficulty(counts={f"r{i}": (8, i % 9) for i in range(10)}, samples=8, group_size=8, unmeasured=0)
    data = Data(rl_pass_rate=(0.2, 0.8))
    rows = load(source, data, decode_limit=10**6, role="rl").rows
    out = tmp_path / "rated.jsonl"
    difficulty.write_rows(
        rows, source, out, data.columns, added={f"r{i}": found.columns(f"r{i}") for i in range(10)}
    )
    problems = [row.problem for row in load(str(out), data, decode_limit=10**6, role="rl").rows]
    assert [p.id for p in by_pass_rate(problems, data)] == ["r2", "r3", "r4", "r5", "r6"]
    alpha, beta = PassRates(problems).posterior(0)
    assert np.argsort(alpha / (alpha + beta), kind="stable").tolist()[-3:] == [6, 7, 8]


def test_the_share_with_a_signal_is_that_of_all_choices_of_a_group():
    found = Difficulty(counts={"a": (6, 2), "b": (6, 0), "c": (6, 6)}, samples=6, group_size=3, unmeasured=0)
    groups = [*itertools.combinations([True, True, False, False, False, False], 3)]
    share = fmean(0 < sum(group) < 3 for group in groups) / 3
    facts = found.summary()
    assert math.isclose(facts["signal"]["accuracy"], share)
    assert facts["histogram"] == {
        "none right": 1, "0% to 20%": 0, "20% to 40%": 1, "40% to 60%": 0, "60% to 80%": 0,
        "80% to 100%": 0, "all right": 1,
    }  # fmt: skip
    few = Difficulty(counts={**found.counts, "d": (1, 1)}, samples=6, group_size=3, unmeasured=0).summary()
    assert few["group_size"] == 3, "one problem with few graded answers makes no other's group smaller"
    assert math.isclose(few["signal"]["accuracy"], share * 3 / 4)


def test_problems_without_a_prompt_are_drawn_no_more_also_after_a_stop(world):
    """Without answers an estimate stays where it draws the problem again and again."""
    refused = {problem(index).id for index in range(0, 40, 2)}

    def run(stream, steps):
        taken = []
        for _ in range(steps):
            problems = stream.take(4)
            stream.set_aside({each.id for each in problems} & refused)
            stream.observe([])
            taken += [each.id for each in problems]
        return taken

    stream = stream_of([problem(index) for index in range(40)], "signal", seed=3, steps=60)
    first = run(stream, 20)
    other = stream_of([problem(index) for index in range(40)], "signal", seed=3, steps=60)
    other.restore(json.loads(json.dumps(stream.state())))
    rest = run(stream, 40)
    assert rest == run(other, 40)
    seen = [each for each in first + rest if each in refused]
    assert seen and len(seen) == len(set(seen))


def test_where_no_problem_has_a_prompt_there_is_still_one_to_refuse():
    stream = stream_of([problem(0), problem(1)], "signal", seed=3, steps=9)
    for _ in range(3):
        stream.set_aside([each.id for each in stream.take(2)])
    assert len(stream.take(2)) == 2
