"""MathVerse's official scoring by a judge: two requests an answer, in `rlcs grade` and `rlcs eval`."""

import pytest

from conftest import rlcs
from loopback_server import LoopbackServer, last_text, text_of
from rlcs.errors import EndpointError
from rlcs.evals.answer_file import Tally, grade_file
from rlcs.evals.mathverse_judge import WORDS, MathVerseJudge
from rlcs.evals.run import EvalRun, evaluate_models
from rlcs.recipe.sampling import Endpoint
from rlcs.recipe.schema import Eval
from rlcs.signals import StopFlag
from rlcs.storage import read_json, read_jsonl, write_jsonl
from test_benchmarks import VERSE, write_image

LONG = "word " * 100


def answers(path):
    """One answer of each kind, in two versions."""
    rows = [
        {"response": f"{LONG} hence it is 0.5 m", "answer": "50 cm", "problem_version": "Text Dominant"},
        {"response": "The answer is 7.", "answer": "50 cm", "problem_version": "Text Dominant"},
        {"response": "It is 50 cm", "answer": "50 cm", "problem_version": "Vision Only"},
        {"response": "I cannot see it.", "answer": "50 cm", "problem_version": "Vision Only"},
        {"response": "strange", "answer": "50 cm", "problem_version": "Vision Only"},
        {"response": " ", "answer": "50 cm", "problem_version": "Vision Only"},
        {"extraction": "0.50 m", "answer": "50 cm", "problem_version": "Vision Only"},
        {"response": "no gold", "answer": ""},
    ]
    write_jsonl(path, [{"id": str(i), "question": "How long?", **row} for i, row in enumerate(rows)])
    return path


def judge(body) -> str:
    """Extracts the last words; thinks that half a metre is 50 cm; does not know what to do with `?`."""
    text = last_text(body)
    if text.startswith("Response:"):
        end = text.removeprefix("Response:\n").partition("\n\nAnswer:")[0]
        assert len(end.split(" ")) <= WORDS
        known = {"m": "0.5 m", "7.": "Answer: 7", "cm": "50 cm", "it.": "null", "strange": "?"}
        return known[end.split()[-1]]
    assert "Question:\nHow long?" in text and "Reference answer: 50 cm" in text
    given = text.partition("Model's answer: ")[2].partition("\n")[0]
    return "well..." if given == "?" else str(int(given in ("0.5 m", "0.50 m")))


def endpoint(server) -> Endpoint:
    return Endpoint(base_url=server.url, model="j", max_retries=0)


def grade(file, out, model, **changes) -> Tally:
    judging = MathVerseJudge(model=model, replies=out.with_name("judged.jsonl"), **changes)
    return grade_file(file, out, rule="mathverse", judge=judging)


def test_a_file_is_scored_in_two_requests_an_answer(tmp_path):
    file, out = answers(tmp_path / "a.jsonl"), tmp_path / "out.jsonl"
    with LoopbackServer(answer=judge) as server:
        tally = grade(file, out, endpoint(server))
        extracting = [body for body in server.seen if last_text(body).startswith("Response:")]
        assert (len(extracting), len(server.seen)) == (5, 5 + 4), (
            "equal texts and no answers are not compared"
        )
        assert len(extracting[0]["messages"]) == 1 + 2 * 6 + 1
        assert not any("50 cm" in text_of(m) for b in extracting for m in b["messages"][:-1])
        grade(file, out, endpoint(server))
        assert len(server.seen) == 9 + 1, "nothing is asked twice but what could not be read"
        assert last_text(server.seen[-1]).count("Model's answer: ?") == 1
    rows = read_jsonl(out)
    assert [row["correct"] for row in rows] == [True, False, True, False, None, False, True, None]
    assert [row["prediction"] for row in rows] == ["0.5 m", "7", "50 cm", None, "?", None, "0.50 m", None]
    assert rows[4]["why"] == "the judge's reply is neither 0 nor 1: 'well...'"
    assert [tally.count(verdict) for verdict in (True, False, None)] == [3, 3, 2]
    assert tally.by_version == {"Text Dominant": (1, 2), "Vision Only": (2, 4)}


def test_quick_match_compares_texts_without_the_second_request(tmp_path):
    file, out = answers(tmp_path / "a.jsonl"), tmp_path / "out.jsonl"
    with LoopbackServer(answer=judge) as server:
        grade(file, out, endpoint(server), quick_match=True)
        assert len(server.seen) == 5
    assert [row["correct"] for row in read_jsonl(out)] == [False, False, True, *[False] * 4, None]


def test_requests_that_fail_leave_answers_unscored(tmp_path):
    file, out = answers(tmp_path / "a.jsonl"), tmp_path / "out.jsonl"
    faults = {"The answer is 7.": ["always:400"], "Model's answer: 0.5 m": ["always:500"]}
    with LoopbackServer(answer=judge, faults=faults) as server:
        grade(file, out, endpoint(server))
    first, second, *_ = read_jsonl(out)
    assert first["correct"] is second["correct"] is None
    assert "the judge gave no reply: HTTP 500" in first["why"]
    assert "the extraction failed: HTTP 400" in second["why"]


def test_the_next_start_asks_again_for_what_could_not_be_read(tmp_path):
    file, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    rows = [{"response": "first"}, {"response": "second"}]
    write_jsonl(file, [{"id": str(i), "question": "?", "answer": "5", **row} for i, row in enumerate(rows)])
    verdicts = iter(["perhaps", "1", "1"])

    def answer(body):
        return "6" if last_text(body).startswith("Response:") else next(verdicts)

    faults = {"second": ["400"]}
    with LoopbackServer(answer=answer, faults=faults) as server:
        tallies = [grade(file, out, endpoint(server)) for _ in range(3)]
        assert len(server.seen) == 3 + 2, "the verdict and the extraction that failed; then nothing"
    assert [len(tally.unscored) for tally in tallies] == [2, 0, 0]


def test_the_command_prints_the_versions_and_wants_a_judge(tmp_path):
    file = answers(tmp_path / "a.jsonl")
    words = ["grade", file, "--out", tmp_path / "out.jsonl", "--rule", "mathverse"]
    with LoopbackServer(answer=judge) as server:
        done = rlcs(*words, "--judge-url", server.url, "--judge-model", "j")
    assert done.returncode == 0 and "accuracy 50.00% by mathverse" in done.stdout, done.stderr
    assert "  Text Dominant: 50.00% of 2\n  Vision Only: 50.00% of 4" in done.stdout
    refused = rlcs(*words)
    assert refused.returncode == 2 and "give a file and --judge-model" in refused.stderr


def test_a_judge_of_ours_needs_no_server(tmp_path, random_model_folder):
    """A random model says neither 0 nor 1."""
    file = tmp_path / "a.jsonl"
    write_jsonl(file, [{"id": "1", "extraction": "6", "answer": "5", "question": "2 + 3?"}])
    tally = grade(file, tmp_path / "out.jsonl", str(random_model_folder))
    assert len(tally.unscored) == 1 and "neither 0 nor 1" in tally.unscored[0]


@pytest.fixture
def mini(tmp_path):
    folder = tmp_path / "mini" / "mathverse"
    versions = ("Text Dominant", "Vision Only")
    rows = [{**VERSE, "sample_index": str(i), "problem_version": v} for i, v in enumerate(versions)]
    write_jsonl(folder / "testmini.jsonl", rows)
    write_image(folder / "images" / "images_version_1-4" / "image_1.png")
    return tmp_path


def evaluate(mini, server, judge_server) -> dict:
    chosen = EvalRun(
        benchmarks=("mathverse",),
        out=mini / "out",
        data=mini / "mini",
        sampling=Eval(max_new_tokens=8),
        endpoint=Endpoint(base_url=server.url, model="", max_retries=0),
        judge=endpoint(judge_server),
    )
    with StopFlag() as stop:
        evaluate_models(chosen, ["m"], stop=stop)
    return read_json(mini / "out" / "m" / "mathverse" / "scores.json")["rules"]


def test_a_benchmark_run_scores_by_our_rule_and_by_the_judge(mini):
    def verdict(body):
        return "1" if "Reference answer" in last_text(body) else "as the picture shows"

    with (
        LoopbackServer(answer=lambda body: "It follows.") as server,
        LoopbackServer(answer=verdict) as judging,
    ):
        scores = evaluate(mini, server, judging)
        asked = [last_text(body) for body in judging.seen if "Reference answer" in last_text(body)]
    assert list(scores) == ["rlcs", "rlcs+judge", "official"]
    assert scores["rlcs"]["accuracy"] == 0.0 and scores["official"]["accuracy"] == 1.0
    versions = scores["official"]["by"]["problem_version"]
    assert versions == {name: {"accuracy": 1.0, "n": 1} for name in ("Text Dominant", "Vision Only")}
    assert len(asked) == 1 and VERSE["question_for_eval"] in asked[0], "both versions ask the judge the same"


@pytest.mark.parametrize(("fault", "message"), [("400", "does not reply"), ("404", "no model 'j'")])
def test_a_judge_that_does_not_reply_ends_the_evaluation_before_the_first_answer(fault, message, mini):
    faults = {"2 + 3": [f"always:{fault}"]}
    with LoopbackServer() as server, LoopbackServer(faults=faults) as judging:
        with pytest.raises(EndpointError, match=message):
            evaluate(mini, server, judging)
        assert not server.seen
