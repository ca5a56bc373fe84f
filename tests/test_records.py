"""Records and their JSON rows: out and back unchanged, and what is odd is refused or left out."""

import json
import string
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcs import records
from rlcs.records import (
    Grade,
    ImageRef,
    Problem,
    Request,
    Rollout,
    Sample,
    StepReport,
    StopReason,
    Turn,
    from_row,
    from_row_or_none,
    to_row,
    trees,
)

texts = st.text(max_size=8)
names = st.text(string.ascii_letters, min_size=1, max_size=8)
some_text = texts.filter(lambda text: bool(text.strip()))
numbers = st.floats(allow_nan=False, allow_infinity=False)
plain = st.none() | st.booleans() | st.integers() | numbers | texts
image_refs = st.builds(
    ImageRef,
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    width=st.integers(1, 9000),
    height=st.integers(1, 9000),
    path=names,
) | st.builds(
    ImageRef, sha256=st.just("0" * 64), width=st.just(1), height=st.just(2), data=st.binary(max_size=9)
)
turns = st.builds(Turn, role=st.sampled_from(["system", "user", "assistant"]), text=texts)
problems = st.builds(
    Problem,
    id=some_text,
    source=texts,
    question=some_text,
    answer=texts,
    images=st.lists(image_refs, max_size=2).map(tuple),
    choices=st.lists(texts, max_size=3).map(tuple),
    metadata=st.dictionaries(texts, plain, max_size=3),
    history=st.sampled_from([(), (Turn(role="user", text="a"), Turn(role="assistant", text="b"))]),
)
grades = st.builds(
    lambda verdict, extracted, why: Grade(
        reward=verdict and verdict[0], correct=verdict and verdict[1], extracted=extracted, why=why
    ),
    st.none() | st.tuples(numbers, st.booleans()),
    st.none() | texts,
    texts,
)
ids = st.lists(st.integers(0, 200_000), min_size=1, max_size=4)
rollouts = ids.flatmap(
    lambda ids: st.builds(
        Rollout,
        problem_id=texts,
        index=st.integers(0, 99),
        ids=st.just(tuple(ids)),
        logprobs=st.lists(st.floats(-50, 0), min_size=len(ids), max_size=len(ids)).map(tuple),
        stop=st.sampled_from(StopReason),
        seed=st.integers(0, 2**63 - 1),
        text=texts,
    )
)
samples = st.sampled_from(StopReason).flatmap(
    lambda stop: st.builds(
        Sample,
        id=texts,
        index=st.integers(0, 99),
        turn=st.integers(0, 3),
        text=texts,
        stop=st.just(stop),
        tokens=st.integers(0, 99),
        seconds=st.floats(0, 99),
        error=st.just("refused" if stop is StopReason.ERROR else ""),
        retryable=st.booleans() if stop is StopReason.ERROR else st.just(False),
    )
)
messages = st.builds(
    records.Message,
    role=st.sampled_from(["system", "user", "assistant"]),
    parts=st.lists(texts | image_refs, max_size=3).map(tuple),
)
prompts = st.builds(
    records.Prompt,
    problem_id=texts,
    ids=st.just((1, 7, 7, 2)),
    images=image_refs.map(lambda ref: (ref,)),
    grids=st.just(((1, 2, 4),)),
    spans=st.just(((1, 3),)),
    image_token_id=st.just(7),
    merge_size=st.just(2),
    positions=st.sampled_from(["grid", "line"]),
    repeat=st.integers(0, 3),
)
groups = st.builds(
    lambda problem, prompt, rollout, grade: records.Group(
        problem=problem,
        prompt=prompt,
        rollouts=(rollout,),
        grades=(grade,),
        advantages=(grade.reward,),
    ),
    problems,
    prompts,
    rollouts,
    grades,
)
reports = st.builds(
    StepReport,
    stage=names,
    step=st.integers(0, 999),
    steps=st.integers(0, 999),
    values=st.dictionaries(texts.map("value {}".format), numbers, max_size=3),
    seconds=st.dictionaries(texts, numbers, max_size=3),
    skipped=texts,
)
EVERY = {
    ImageRef: image_refs,
    Turn: turns,
    Problem: problems,
    Grade: grades,
    Rollout: rollouts,
    StepReport: reports,
    records.Prompt: prompts,
    records.Group: groups,
    records.Demonstration: st.builds(
        records.Demonstration,
        problem=problems,
        response=some_text,
        teacher=texts,
        attempt=st.integers(0, 9),
        grade=st.none() | grades,
    ),
    records.Message: messages,
    records.Request: st.builds(records.Request, id=texts, messages=messages.map(lambda one: (one,))),
    Sample: samples,
    records.GradedSample: st.builds(
        records.GradedSample, sample=samples, grade=grades, advantage=st.none() | numbers
    ),
    records.Sampling: st.builds(
        records.Sampling,
        max_new_tokens=st.integers(1, 99),
        stop_ids=st.just((1,)),
        banned_ids=st.just((2, 3)),
        top_p=st.floats(0.1, 1),
    ),
    trees.Part: st.just(trees.Part(ids=(1, 2), parent=0)),
    trees.Shape: st.just(trees.Shape(parts=(trees.Part(ids=(1,), parent=None),), paths=((0,), (0,)))),
    trees.Branch: st.just(trees.Branch(ids=(1, 2), weights=(0.5, 1.0), logprobs=(-0.5, 0.0))),
    trees.Tree: prompts.map(
        lambda prompt: trees.Tree(prompt=prompt, branches=(trees.Branch(ids=(1,), weights=(1.0,)),))
    ),
}


def test_every_record_is_tried_here() -> None:
    found = {
        each
        for module in (records, trees)
        for each in vars(module).values()
        if is_dataclass(each) and each.__module__ == module.__name__
    }
    assert found == set(EVERY)


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_record_is_itself_after_a_row(kind: type, data: st.DataObject) -> None:
    record = data.draw(EVERY[kind])
    row = json.loads(json.dumps(to_row(record), allow_nan=False))
    assert from_row(kind, row) == record == from_row_or_none(kind, row)
    for each in fields(kind):
        name = each.metadata.get("row", each.name)
        if each.default is MISSING and each.default_factory is MISSING and name:
            torn = {key: value for key, value in row.items() if key != name}
            with pytest.raises(ValueError, match=f"{name} is missing"):
                from_row(kind, torn)
            assert from_row_or_none(kind, torn) is None


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_an_odd_row_is_refused_or_left_out_and_nothing_else_happens(kind: type, data: st.DataObject) -> None:
    row = to_row(data.draw(EVERY[kind]))
    json_values = st.recursive(
        plain | st.just(10**400) | st.just(float("inf")),
        lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
        max_leaves=4,
    )
    row[data.draw(st.sampled_from(sorted(row)))] = data.draw(json_values)
    read: Any = None
    try:
        read = from_row(kind, row)
    except ValueError as error:
        assert str(error)
    assert read is None or to_row(read).keys() == row.keys()
    from_row_or_none(kind, row)


GRADE = {"reward": 1.0, "correct": True, "extracted": "5", "why": ""}


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (Grade, {"reward": "much"}, "reward must be a finite number, not 'much'"),
        (Grade, {"reward": True}, "reward must be a finite number, not True"),
        (Grade, {"reward": 10**400}, "reward must be a finite number, not 1000"),
        (Grade, {"correct": 1}, "correct must be true or false, not 1"),
        (Grade, {"why": None}, "why must be a text, not None"),
        (Grade, {"reward": None}, "reward and correct go together"),
        (Grade, {"mood": "good"}, "unknown fields: mood"),
        (StepReport, {"step": 1.5}, "step must be a whole number, not 1.5"),
        (StepReport, {"loss": float("nan")}, "loss must be a finite number, not nan"),
        (StepReport, {"seconds": {"update": "x"}}, "seconds.update must be a finite number, not 'x'"),
        (StepReport, {"seconds": [1]}, r"seconds must be an object, not \[1\]"),
        (Rollout, {"ids": 3}, "ids must be a list, not 3"),
        (Rollout, {"ids": [1, "2"]}, r"ids\[1\] must be a whole number, not '2'"),
        (Rollout, {"stop": "tired"}, "stop must be one of eos, length, error, not 'tired'"),
        (records.Message, {"role": "judge"}, "role must be one of system, user, assistant, not 'judge'"),
        (Problem, {"images": [{"path": "x"}]}, r"images\[0\]: sha256 is missing"),
        (records.Demonstration, {"grade": {**GRADE, "why": 3}}, "grade: why must be a text, not 3"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_says_where_and_why(
    kind: type, change: dict[str, object], words: str
) -> None:
    rollout = {
        "problem_id": "1",
        "index": 0,
        "ids": [1],
        "logprobs": [0.0],
        "stop": "eos",
        "seed": 1,
        "text": "",
    }
    problem = {"id": "1", "source": "s", "question": "?", "answer": "5"}
    rows: dict[type, dict[str, object]] = {
        Grade: GRADE,
        Rollout: rollout,
        Problem: problem,
        StepReport: {"stage": "grpo", "step": 1, "steps": 2, "seconds": {}, "loss": 0.5},
        records.Message: {"role": "user", "parts": ["hello"]},
        records.Demonstration: {"problem": problem, "response": "5", "teacher": "t", "grade": GRADE},
    }
    assert from_row(kind, rows[kind])
    with pytest.raises(ValueError, match=words):
        from_row(kind, rows[kind] | change)


def test_the_lenient_reader_ignores_what_it_does_not_know_and_leaves_out_what_is_odd() -> None:
    assert from_row_or_none(Grade, GRADE | {"mood": "good"}) == Grade(reward=1.0, correct=True, extracted="5")
    row = {"stage": "grpo", "step": 1, "steps": 2, "seconds": {"update": "x"}, "loss": 0.5, "odd": [1]}
    read = from_row_or_none(StepReport, row)
    assert read is not None and read.values == {"loss": 0.5} and read.seconds == {}
    assert from_row_or_none(Grade, GRADE | {"reward": "much"}) is None


def test_the_members_of_a_group_are_flat_rows() -> None:
    rollout = Rollout(
        problem_id="p", index=1, ids=(5, 6), logprobs=(-1.0, 0.0), stop=StopReason.EOS, seed=3, text="five"
    )
    broken = Rollout(problem_id="p", index=2, ids=(), logprobs=(), stop=StopReason.ERROR, seed=4, text="")
    prompt = records.Prompt(
        problem_id="p", ids=(1,), images=(), grids=(), spans=(), image_token_id=7, merge_size=2
    )
    group = records.Group(
        problem=Problem(id="p", source="s", question="?", answer="5"),
        prompt=prompt,
        rollouts=(rollout, broken),
        grades=(
            Grade(reward=1.0, correct=True, extracted="5"),
            Grade(reward=None, correct=None, why="broken"),
        ),
        advantages=(0.5, None),
    )
    first, second = map(to_row, group.samples)
    assert first.items() >= {
        "id": "p", "index": 1, "response": "five", "stop": "eos", "tokens": 2, "error": "",
        "reward": 1.0, "correct": True, "extracted": "5", "why": "", "advantage": 0.5,
    }.items()  # fmt: skip
    assert second["stop"] == "error" and second["error"] and second["advantage"] is None
    assert [from_row(records.GradedSample, row) for row in (first, second)] == group.samples


def test_a_step_report_is_a_flat_row() -> None:
    report = StepReport(stage="grpo", step=1, steps=2, values={"loss": 0.5}, seconds={"update": 1.0})
    assert to_row(report) == {
        "stage": "grpo", "step": 1, "steps": 2, "loss": 0.5, "seconds": {"update": 1.0}, "skipped": "",
    }  # fmt: skip
    with pytest.raises(ValueError, match="two fields of one row are named seconds"):
        to_row(StepReport(stage="grpo", step=1, steps=2, values={"seconds": 0.5}, seconds={}))


RED, BLUE = (ImageRef(sha256=digit * 64, width=2, height=2) for digit in "12")


def conversation(*turns: tuple[str, str], question: str, **others: Any) -> Problem:
    history = tuple(Turn(role=role, text=text) for role, text in turns)  # type: ignore[arg-type]
    return Problem(id="1", source="s", question=question, answer="", history=history, **others)


def parts(problem: Problem) -> list[tuple[str, tuple[str | ImageRef, ...]]]:
    return [(message.role, message.parts) for message in Request.of(problem, system="recipe").messages]


def test_images_of_a_conversation_stand_at_their_slots_in_all_its_turns():
    turns = ("user", "Left <image>?"), ("assistant", "Red.")
    problem = conversation(*turns, question="<image> And this?", images=(RED, BLUE))
    assert parts(problem) == [
        ("system", ("recipe",)),
        ("user", ("Left ", RED, "?")),
        ("assistant", ("Red.",)),
        ("user", (BLUE, " And this?")),
    ]


def test_images_without_slots_come_first_in_the_first_turn_of_the_user():
    turns = ("system", "own"), ("user", "Left?"), ("assistant", "Red.")
    problem = conversation(*turns, question="Right?", images=(RED, BLUE), choices=("x <image>",))
    assert parts(problem) == [
        ("system", ("own",)),
        ("user", (RED, BLUE, "Left?")),
        ("assistant", ("Red.",)),
        ("user", ("Right?\n(A) x <image>",)),
    ]


@pytest.mark.parametrize(
    "roles", [["assistant"], ["user"], ["user", "user"], ["user", "assistant", "system"], ["system", "user"]]
)
def test_turns_before_a_question_are_in_order(roles):
    with pytest.raises(ValueError, match="turn"):
        conversation(*((role, "text") for role in roles), question="?")


def test_what_was_said_before_changes_the_digest():
    plain = conversation(question="?")
    assert plain.digest != conversation(("user", "a"), ("assistant", "b"), question="?").digest
