"""The blind control: twins, what is known of built-in problems, the split of gains, the data of a run."""

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest

from conftest import SMALL_STUDY, make_problem, rlcs
from loopback_server import LoopbackServer, last_text
from rlcs.data import puzzles
from rlcs.data.blind import blind_twins
from rlcs.data.loading import load
from rlcs.data.run_data import RunData
from rlcs.errors import DataError, RunFolderError
from rlcs.evals.arms import Evaluator, evaluate
from rlcs.evals.blind import split_gains
from rlcs.evals.comparison import as_markdown
from rlcs.evals.intervals import paired_interval, wilson
from rlcs.grading import GradePool
from rlcs.pipeline import difficulty
from rlcs.pipeline.blind import RL_BLIND, answered_blind, blind_tasks
from rlcs.pipeline.difficulty import measure_difficulty
from rlcs.pipeline.faults import add_faults
from rlcs.pipeline.study import Output, Study
from rlcs.progress import screen
from rlcs.recipe.judge import Judge
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Eval
from rlcs.records import (
    IMAGE_SLOT,
    Grade,
    GradedSample,
    ImageRef,
    Problem,
    Sample,
    StopReason,
    Turn,
    to_row,
)
from rlcs.signals import StopFlag
from test_benchmarks import vision, write_image, write_jsonl
from test_evals import eval_run, run


def images_of(problem: Problem) -> set[str]:
    return {ref.sha256 for ref in problem.images}


# ------------------------------------------------------------------------------------------- twins


def test_a_twin_shows_another_problem_s_image_and_keeps_all_else():
    problems = puzzles.load("puzzles", split="test", count=60, seed=1)
    twins = blind_twins(problems, "other")
    by_id = {problem.id: problem for problem in problems}
    for problem, twin in zip(problems, twins, strict=True):
        other = by_id[twin.metadata["images_of"]]
        assert twin.images == other.images and other.source == problem.source and other.id != problem.id
        assert not images_of(twin) & images_of(problem) and twin.digest != problem.digest
        assert replace(twin, images=problem.images, metadata=problem.metadata) == problem
    used = Counter(twin.metadata["images_of"] for twin in twins)
    assert set(used.values()) == {1}, "each problem gives its image to one other"
    assert blind_twins(problems[::-1], "other")[::-1] == twins, "whatever the order"


def test_without_an_image_its_place_in_the_text_goes_too():
    shown = replace(
        make_problem("a", f"Left: {IMAGE_SLOT} How many?"),
        history=(Turn(role="user", text="Hello."), Turn(role="assistant", text="Hi.")),
    )
    only = make_problem("b", IMAGE_SLOT)
    earlier = replace(
        make_problem("c", "And now?"),
        history=(Turn(role="user", text=f"See {IMAGE_SLOT}"), Turn(role="assistant", text="Yes.")),
    )
    texts = [[turn.text for turn in twin.turns] for twin in blind_twins([shown, only, earlier], "removed")]
    assert texts == [["Hello.", "Hi.", "Left:  How many?"], ["(no image)"], ["See ", "Yes.", "And now?"]]


def test_interleaved_shared_and_rare_images(tmp_path):
    pair = ((28, 28), (56, 28))
    many = make_problem("many", f"{IMAGE_SLOT} or {IMAGE_SLOT}?", sizes=pair)
    more = make_problem("more", f"{IMAGE_SLOT} and {IMAGE_SLOT}?", sizes=pair)
    one = make_problem("one")
    same = replace(one, id="same", question="Which colour?")  # another question about one's image
    text = Problem(id="text", source="test", question="1+1?", answer="2")
    twins = {twin.id: twin for twin in blind_twins([many, more, one, same, text], "other")}
    assert set(twins) == {"many", "more", "one", "same"}, "without an image a problem is blind as it is"
    assert twins["many"].images == more.images and twins["more"].images == many.images
    for name in ("one", "same"):  # no other with one image: from any others, never the own one
        assert len(twins[name].images) == 1 and not images_of(twins[name]) & images_of(one)
        assert twins[name].metadata["images_of"] == ""
    with pytest.raises(DataError, match=r"same.*no other problem has an image"):
        blind_twins([same, one], "other")
    data, recipe = (
        RunData(cold_start=(), rl=(), test=(same, one)),
        load_recipe("quickstart", ["eval.blind=other"]),
    )
    study = Study(
        recipe.recipe, tmp_path / "run", data=data, output=Output(quiet=True), stop=StopFlag(), dry=tmp_path
    )
    with pytest.raises(DataError, match="no other problem"):  # in the first minute
        study.check_data()


# ------------------------------------------------------------------- what is known of the built-in tasks


class ReadsWhatItSees:
    """Answers every built-in question without fault about the image that it is shown."""

    def __init__(self, problems):
        self.problems = {problem.id: problem for problem in problems}
        self.of_image = {problem.images[0].sha256: problem for problem in problems}

    def batch(self, requests):
        samples = []
        for request in requests:
            [image] = [p for m in request.messages for p in m.parts if isinstance(p, ImageRef)]
            answer = puzzles.answer_on(self.problems[request.id], self.of_image[image.sha256])
            text = "I do not see it." if answer is None else f"\\boxed{{{answer}}}"
            samples.append(request.sample(text=text, stop=StopReason.EOS, tokens=1))
        return samples


def test_a_model_that_reads_without_fault_is_right_blind_as_often_as_the_generator_says(tmp_path):
    problems = puzzles.load("puzzles", split="test", count=300, seed=4)
    by_id, twins = {problem.id: problem for problem in problems}, blind_twins(problems, "other")
    known = [puzzles.answer_on(twin, by_id[twin.metadata["images_of"]]) for twin in twins]
    right = sum(str(answer) == twin.answer for answer, twin in zip(known, twins, strict=True))
    assert 0.04 < right / 300 < 0.15, "some answers coincide"
    scores = {}
    with GradePool() as pool, screen("eval", 300, quiet=True) as view:
        evaluator = Evaluator(sampler=ReadsWhatItSees(problems), grader=pool)
        for name, chosen in (("seeing", problems), ("blind", twins)):
            scores[name] = evaluate(evaluator, chosen, folder=tmp_path / name, screen=view, stop=StopFlag())[
                "accuracy"
            ]
    assert scores == {"seeing": 1.0, "blind": right / 300}


# ------------------------------------------------------------------------------------ the split of gains


def shares(text: str) -> dict[str, float]:
    return {str(n): float(mark == "x") for n, mark in enumerate(text)}


def test_gains_are_split_by_what_any_model_answers_blind():
    found = split_gains(
        {"base": shares("xx........"), "sft": shares("xxxxx....."), "alone": shares("x")},
        {"base": shares("x........."), "sft": shares(".x........")},
        pairs=[("sft", "base"), ("sft", "grpo")],
        chance=0.25,
    )
    assert (found["n"], found["without_need"], found["chance"]) == (10, 2, 0.25)
    sft, base = found["arms"]["sft"], found["arms"]["base"]
    assert sft["needs_image"] == {"accuracy": 3 / 8, "low": wilson(3, 8)[0], "high": wilson(3, 8)[1], "n": 8}
    assert sft["without_need"]["accuracy"] == base["without_need"]["accuracy"] == 1.0
    assert base["needs_image"]["accuracy"] == 0.0 and base["blind"]["accuracy"] == 0.1
    points = sft["seeing_minus_blind"]
    assert points["points"] == pytest.approx(0.4)
    assert (points["low"], points["high"]) == paired_interval(4, 0, 10)
    [gain] = found["gains"]
    assert (gain["arm"], gain["against"]) == ("sft", "base")
    assert gain["needs_image"]["points"] == 3 / 8 and gain["without_need"]["points"] == 0.0
    assert gain["blind"]["points"] == 0.0
    assert (gain["blind"]["low"], gain["blind"]["high"]) == paired_interval(1, 1, 10)


def test_several_answers_count_as_one_problem():
    found = split_gains(
        {"a": {"1": 0.5, "2": 1.0}, "b": {"1": 1.0, "2": 1.0}},
        {"a": {"1": 0.25, "2": 0.5}, "b": {"1": 0.25, "2": 0.0}},
        pairs=[("b", "a")],
        chance=0.0,
    )
    assert found["without_need"] == 1, "from half of the answers on"
    [gain] = found["gains"]
    assert gain["all"]["points"] == 0.25 and gain["all"]["low"] < 0 < gain["all"]["high"]


# --------------------------------------------------------------------------------------------- benchmarks


@pytest.fixture
def six(tmp_path):
    """Six questions with an image each, and one without."""
    folder = tmp_path / "mini" / "mathvision"
    rows = [vision(n, question=f"Q{n}: which one?\n<image1>") for n in range(6)]
    write_jsonl(folder / "testmini.jsonl", [*rows, vision(6, question="Q6: which one?", image=None)])
    for n in range(6):
        write_image(folder / "images" / f"{n}.png", seed=n)
    return tmp_path


def looker(guesses: str, images: dict[str, str]):
    """A server's model that knows an answer from the question's own image, and some without."""

    def answer(body):
        parts = body["messages"][-1]["content"]
        shown = [] if isinstance(parts, str) else [p for p in parts if p["type"] == "image_url"]
        url = shown[0]["image_url"]["url"] if shown else ""
        number = last_text(body).partition("Q")[2][0]
        images.setdefault(number, url)
        return "\\boxed{D}" if number in guesses or images[number] == url != "" else "\\boxed{A}"

    return answer


@pytest.mark.parametrize("how", ["other", "removed"])
def test_benchmarks_are_answered_blind_beside_the_answers_with_images(six, how):
    images = {}
    chosen = {"sampling": Eval(max_new_tokens=8, max_rows=4, blind=how)}
    with LoopbackServer(answer=looker("15", images)) as server:
        comparison = run(eval_run(six, server, **chosen), "m")
        assert len(server.seen) == 7 + 6
        pictures = sum("image_url" in json.dumps(body) for body in server.seen)
        assert pictures == (6 + 6 if how == "other" else 6)
        run(eval_run(six, server, **chosen), "m")
        assert len(server.seen) == 13, "nothing is asked twice"
        log = six / "out/m/mathvision/blind/predictions.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(lines[:2]))
        run(eval_run(six, server, **chosen), "m")
        assert len(server.seen) == 13 + 4, "what is missing is asked"
        other = {"sampling": Eval(max_new_tokens=8, blind="removed" if how == "other" else "other")}
        with pytest.raises(RunFolderError, match=f"blind was '{how}'"):
            run(eval_run(six, server, **other), "m")
    found = comparison["blind"]["mathvision/testmini"]
    assert (found["n"], found["without_need"]) == (6, 2) and found["chance"] == pytest.approx(0.2)
    assert found["arms"]["m"]["blind"]["accuracy"] == 2 / 6
    assert found["arms"]["m"]["needs_image"]["accuracy"] == found["arms"]["m"]["seeing"]["accuracy"] == 1.0
    saw = {"other": "another image", "removed": "no image"}[how]
    assert [row["model"] for row in comparison["rows"]] == ["m", "m", f"m, {saw}", f"m, {saw}"]
    table = as_markdown(comparison)
    assert "m: 33.3 [9.7, 70.0] right without the image, 100.0 [61.0, 100.0] with it (chance 20.0)" in table


def test_the_gain_of_a_second_model_is_split(six):
    chosen = {"sampling": Eval(max_new_tokens=8, max_rows=4, blind="other")}
    with LoopbackServer(answer=lambda body: "\\boxed{A}") as blind:
        run(eval_run(six, blind, **chosen), "a")
    with LoopbackServer(answer=looker("15", {})) as server:
        comparison = run(eval_run(six, server, **chosen), "b")
    [gain] = comparison["blind"]["mathvision/testmini"]["gains"]
    assert (gain["arm"], gain["against"]) == ("a", "b"), "against the one that was evaluated just now"
    assert gain["needs_image"]["points"] == gain["without_need"]["points"] == -1.0
    note = "a over b: -100.0 [-100.0, -16.8] points on 4 questions that need the image"
    assert note in as_markdown(comparison)


def test_an_unknown_control_is_named():
    done = rlcs("eval", "builtin", "--blind", "others")
    assert done.returncode == 2 and "other" in done.stderr and "--blind" in done.stderr


# ------------------------------------------------------------------------------------- the data of a run


def test_rl_problems_are_left_out_by_rate_or_by_measurement(tmp_path):
    problems = [replace(make_problem(name), choices=("4", "5")) for name in "abcd"]
    problems[0] = replace(problems[0], metadata={"blind_rate": 0.5})
    problems[1] = replace(problems[1], metadata={"blind_rate": 0.25})
    data = RunData(cold_start=(), rl=tuple(problems), test=())
    rows = [{"id": "c", "correct": True}, {"id": "d", "correct": None}]
    (tmp_path / RL_BLIND).mkdir()
    (tmp_path / RL_BLIND / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    blind, note = answered_blind(data, tmp_path)
    assert blind == ["a", "c"]
    assert note.startswith("2 of 4 RL problems are left out") and "about 2 would be guessed by chance" in note
    with pytest.raises(DataError, match="all 1 RL problems right without their images"):
        answered_blind(replace(data, rl=tuple(problems[:1])), tmp_path)


def test_rates_that_are_measured_before_a_run_are_those_of_twins_and_drop_problems(tmp_path, monkeypatch):
    source = "builtin:puzzles?split=train&count=40&seed=6&levels=1"
    recipe = load_recipe("quickstart", []).recipe
    rows = load(source, recipe.data, decode_limit=10**6, role="rl").rows
    problems = [row.problem for row in rows]

    @contextmanager
    def reader(recipe, samples, folder):
        with GradePool() as pool:
            yield Evaluator(sampler=ReadsWhatItSees(problems), grader=pool)

    monkeypatch.setattr(difficulty, "_evaluator", reader)
    with StopFlag() as stop:
        found = measure_difficulty(source, recipe, tmp_path / "rated.jsonl", samples=2, stop=stop, blind=True)
    by_id, twins = {problem.id: problem for problem in problems}, blind_twins(problems, "other")
    known = {twin.id: puzzles.answer_on(twin, by_id[twin.metadata["images_of"]]) for twin in twins}
    coincide = {problem.id for problem in problems if str(known[problem.id]) == problem.answer}
    assert coincide and found.summary()["pass_rate"] == len(coincide) / 40
    data = data_of_file(recipe, tmp_path / "rated.jsonl")
    assert [p.images[0].sha256 for p in data.rl] == [p.images[0].sha256 for p in problems], "its own images"
    assert {p.id for p in data.rl if p.metadata["blind_rate"] == 1.0} == coincide
    assert "pass_rate" not in data.rl[0].metadata
    words = ["data.rl_blind=drop", "eval.blind=none"]
    assert not blind_tasks("base", load_recipe("quickstart", words).recipe, data, tmp_path)
    assert set(answered_blind(data, tmp_path)[0]) == coincide


def data_of_file(recipe, path):
    rows = load(str(path), recipe.data, decode_limit=10**6, role="rl").rows
    return RunData(cold_start=(), rl=tuple(row.problem for row in rows), test=())


def test_a_run_measures_blind_trains_without_blind_problems_and_resumes(tmp_path):
    words = ["quickstart", *SMALL_STUDY, "data.rl=builtin:puzzles?count=40&seed=2", "grpo.steps=1"]
    words += ["grpo.max_new_tokens=8", "eval.max_new_tokens=8", "eval.blind=other", "data.rl_blind=drop"]
    words += ["study.preflight=off"]
    out = tmp_path / "run"
    first = rlcs("grpo", *words, "--out", out)
    assert first.returncode == 0, first.stderr
    rows = [json.loads(line) for line in (out / RL_BLIND / "predictions.jsonl").open()]
    blind = {row["id"] for row in rows if row["correct"]}
    assert len(rows) == 40 and blind
    summary = json.loads((out / "summary.json").read_text())
    assert summary["counts"]["rl"] == 40 - len(blind)
    assert f"{len(blind)} of 40 RL problems are left out" in (out / "logs/attempt-1.log").read_text()
    found = summary["blind"]
    assert found["n"] == 20 and set(found["arms"]) == {"base", "grpo"}
    for arm, facts in found["arms"].items():
        assert facts["seeing"]["accuracy"] == summary["arms"][arm]["accuracy"]
        scores = json.loads((out / "eval" / arm / "blind/scores.json").read_text())
        assert facts["blind"]["accuracy"] == scores["accuracy"] and scores["n"] == 20
    page = (out / "report/index.html").read_text()
    needs = found["n"] - found["without_need"]
    assert "With and without the image" in page and f"Needs the image ({needs})" in page
    assert f"on the {needs} problems that need their image" in page
    assert "What failed: perception or reasoning" in page
    # Killed while the base answered blind: what is there is kept, and the end is the same.
    log = out / "eval/base/blind/predictions.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:5]))
    for name in ("eval/base/blind/done.json", "eval/base/blind/scores.json", "summary.json"):
        (out / name).unlink()
    again = rlcs("grpo", *words, "--out", out)
    assert again.returncode == 0, again.stderr
    assert log.read_text().splitlines(keepends=True)[:5] == lines[:5]
    assert json.loads((out / "summary.json").read_text())["blind"] == found


# ---------------------------------------------------------------------------- perception and reasoning


@pytest.fixture(scope="module")
def drawn() -> tuple[Problem, ...]:
    return puzzles.load("puzzles", split="train", count=150, seed=5)


@pytest.mark.parametrize("chain", ["distilled", "reflection", "caption", "self_critic"])
def test_a_misreading_is_a_fault_of_perception_alone(drawn, chain):
    for problem in drawn:
        misread = puzzles.teach(problem, seed=1, wrong_share=1.0, chain=chain)
        assert puzzles.fault(problem, misread) == "perception", misread
        assert puzzles.fault(problem, puzzles.teach(problem, seed=1, wrong_share=0.0, chain=chain)) == "none"


def test_reasoning_fails_where_the_answer_does_not_follow_from_the_reading(drawn):
    for problem in drawn:
        right = puzzles.teach(problem, seed=1, wrong_share=0.0)
        misread = puzzles.teach(problem, seed=1, wrong_share=1.0)
        wrong = f"\\boxed{{{int(problem.answer) + 100}}}"
        lines = {text: text.rpartition("\n")[0] for text in (right, misread)}
        assert puzzles.fault(problem, f"{lines[right]}\n{wrong}") == "reasoning"
        assert puzzles.fault(problem, f"{lines[misread]}\n{wrong}") == "both"
        assert puzzles.fault(problem, f"{lines[misread]}\n\\boxed{{{problem.answer}}}") == "both"
        assert puzzles.fault(problem, f"\\boxed{{{problem.answer}}}") == "unreadable"
        assert puzzles.fault(problem, lines[right]) == "unreadable"


def test_what_is_not_mentioned_was_not_perceived():
    problem = Problem(
        id="p", source="builtin:bars", question="?", answer="7",
        metadata={"family": "bars", "scene": "white:red=3,blue=4,none=0,none=0", "plan": "add|red|blue"},
    )  # fmt: skip
    assert puzzles.fault(problem, "red=3, green=4\nred=3, blue=4\n3+4=7\n\\boxed{7}") == "perception"
    assert puzzles.fault(problem, "red=3, pink=4\n3+4=7\n\\boxed{7}") == "unreadable"
    assert puzzles.fault(problem, "red=0, blue=0\n0+0=0\n\\boxed{0}") == "unreadable", "no bar at all"
    assert puzzles.fault(problem, "red=0, blue=7\n0+7=7\n\\boxed{7}") == "perception"
    assert puzzles.fault(problem, "red=3, blue=4, black=9\nred=3, blue=4\n3+4=7\n\\boxed{7}") == "none"


def test_the_faults_of_an_arm_are_in_its_scores(tmp_path, drawn):
    class Teacher:
        def batch(self, requests):
            by_id = {problem.id: problem for problem in drawn}
            return [
                Sample(id=r.id, text=puzzles.teach(by_id[r.id], seed=2, wrong_share=0.3), stop=StopReason.EOS)
                for r in requests
            ]

    with GradePool() as pool, screen("eval", len(drawn), quiet=True) as view:
        evaluator = Evaluator(sampler=Teacher(), grader=pool)
        scores = evaluate(evaluator, drawn, folder=tmp_path, screen=view, stop=StopFlag())
    right = round(scores["accuracy"] * len(drawn))
    assert scores["faults"] == {
        "none": right, "perception": len(drawn) - right, "reasoning": 0, "both": 0, "unreadable": 0,
    }  # fmt: skip


@pytest.mark.parametrize("sees", [True, False])
def test_a_judge_says_which_part_of_a_wrong_answer_failed(tmp_path, sees):
    texts = {"a": "right", "b": "I see 3", "c": "2+2=5", "d": "no idea", "e": "cut off"}
    verdicts = {
        "I see 3": "It misreads.\n**perception**",
        "2+2=5": "Arithmetic.\nreasoning",
        "no idea": "Yes.",
    }
    problems = [make_problem(name) for name in texts]
    folder = tmp_path / "eval" / "base"
    folder.mkdir(parents=True)
    rows = [
        GradedSample(
            sample=Sample(id=name, text=text, stop=StopReason.EOS),
            grade=Grade(reward=float(name == "a"), correct=name == "a"),
        )
        for name, text in list(texts.items())[:4]
    ]
    rows.append(GradedSample(sample=Sample(id="e", error="too long"), grade=Grade(reward=0.0, correct=False)))
    write_jsonl(folder / "predictions.jsonl", [{**to_row(row), "digest": "d"} for row in rows])
    (folder / "scores.json").write_text('{"accuracy": 0.2}')

    def answer(body):
        return next(reply for text, reply in verdicts.items() if f"\n{text}\n" in last_text(body))

    with LoopbackServer(answer=answer) as server:
        settings = Judge(model="m", base_url=server.url, faults=True, sees_images=sees)
        for _ in range(2):
            add_faults(folder, problems, settings, tmp_path / "judge")
        assert len(server.seen) == 3, "of wrong answers alone, and once"
        assert all(("image_url" in json.dumps(body)) == sees for body in server.seen)
        assert all(("cannot see" in last_text(body)) != sees for body in server.seen)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["accuracy"] == 0.2
    assert scores["faults"] == {"none": 1, "perception": 1, "reasoning": 1, "both": 0, "unreadable": 2}


def test_a_judge_of_faults_that_is_away_is_known_before_the_run(tmp_path):
    words = [*SMALL_STUDY, "grpo.reward.judge={faults: true, model: m, base_url: 'http://127.0.0.1:9/v1'}"]
    words += ["grpo.reward.judge.max_retries=0"]
    done = rlcs("grpo", "quickstart", *words, "--out", tmp_path / "run")
    assert done.returncode == 2 and "127.0.0.1:9" in done.stderr, done.stdout
    assert not (tmp_path / "run" / "grpo").exists()
