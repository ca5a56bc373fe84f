"""`rlcs eval`: local and served models on small benchmarks, resume, judge, comparison, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import warm
from conftest import rlcs
from loopback_server import LoopbackServer, last_text
from rlcs.cli.train import _arm_lines
from rlcs.engines import openai_client
from rlcs.errors import EndpointError, RlcsError, RunFolderError, UserError
from rlcs.evals import CHUNK
from rlcs.evals.answer_extractor import needs_extractor
from rlcs.evals.arms import Evaluator, evaluate
from rlcs.evals.comparison import REPORTED, as_markdown
from rlcs.evals.run import EvalRun, evaluate_models, label_models
from rlcs.grading import GradePool
from rlcs.progress import screen
from rlcs.recipe.sampling import Endpoint
from rlcs.recipe.schema import Eval, Prompts
from rlcs.records import Grade, Problem, Sample, StopReason
from rlcs.signals import StopFlag, Stopped
from rlcs.storage import read_json, read_jsonl, write_json
from test_benchmarks import VISTA, vision, vision_folder, we, write_image, write_jsonl


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(openai_client, "FIRST_WAIT_S", 0.01)


def eval_run(folder: Path, server=None, judge=None, **changes) -> EvalRun:
    given = {
        "benchmarks": ("mathvision",),
        "out": folder / "out",
        "data": folder / "mini",
        "split": "testmini",
        "sampling": Eval(max_new_tokens=8, max_rows=4),
        "endpoint": server and Endpoint(base_url=server.url, model="", max_retries=1),
        "judge": judge and Endpoint(base_url=judge.url, model="reader", max_retries=1),
    }
    return EvalRun(**{**given, **changes})


def sampled(samples: int) -> dict[str, object]:
    return {"samples": samples, "sampling": Eval(max_new_tokens=8, max_rows=4, temperature=1.0)}


def run(chosen: EvalRun, *models, stop=None):
    return evaluate_models(chosen, models or ("m",), stop=stop or StopFlag())


def scores(folder: Path, model="m", benchmark="mathvision"):
    return read_json(folder / "out" / model / benchmark / "scores.json")


def predictions(folder: Path, model="m", benchmark="mathvision"):
    return read_jsonl(folder / "out" / model / benchmark / "predictions.jsonl")


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    vision_folder(tmp_path / "mini" / "mathvision", 6)
    return tmp_path


# ------------------------------------------------------------------------------------ local models


def test_a_local_model_answers_everything_and_says_what_chance_is(mini, random_model_folder, capsys):
    comparison = run(eval_run(mini), f"mine={random_model_folder}", "tiny=builtin")
    for model in ("mine", "tiny"):
        got = scores(mini, model)
        assert (got["n"], got["of"]) == (6, 304) and got["chance"] == pytest.approx(0.2)
        assert got["refused"]["count"] == 0
        assert got["rules"]["rlcs"]["low"] <= got["rules"]["rlcs"]["accuracy"] <= got["rules"]["rlcs"]["high"]
        rows = predictions(mini, model)
        assert [row["id"] for row in rows] == list("012345") and all(row["tokens"] >= 1 for row in rows)
        assert all("correct" in row["rules"]["rlcs"] for row in rows)
    table = as_markdown(comparison)
    assert table == (mini / "out" / "comparison.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "the table is aligned"
    named = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines[2:7]]
    assert [cells[:2] for cells in named] == [
        ["mine", "rlcs"], ["mine", "official"], ["tiny", "rlcs"], ["tiny", "official"], ["chance", ""]
    ]  # fmt: skip
    assert "6 of 304" in named[0][2] and named[4][2] == "20.0"
    assert "27.0 (test)" in table and "prompt `paper`, 1 answer, temperature 0" in table
    assert "MATH-Vision 6/6" in capsys.readouterr().out


def test_samples_give_pass_at_k_and_more_samples_ask_only_for_what_is_new(mini, random_model_folder):
    model = f"m={random_model_folder}"
    run(eval_run(mini, **sampled(2)), model)
    two = {(row["id"], row["index"]): row["response"] for row in predictions(mini)}
    run(eval_run(mini, **sampled(3)), model)
    three = {(row["id"], row["index"]): row["response"] for row in predictions(mini)}
    assert len(two) == 12 and len(three) == 18 and two.items() <= three.items()
    assert len(set(three.values())) > 3
    assert set(scores(mini)["rules"]["rlcs"]["pass_at"]) == {"1", "2", "3"}
    run(eval_run(mini, **sampled(1), limit=2), model)
    assert scores(mini)["n"] == 2 and len(predictions(mini)) == 18


def test_a_prompt_that_does_not_fit_counts_as_wrong_and_says_so(tmp_path, random_model_folder):
    folder = vision_folder(tmp_path / "mini", 2)
    write_jsonl(folder / "testmini.jsonl", [vision(0), vision(1, question="why " * 5000)])
    run(eval_run(tmp_path), f"m={random_model_folder}")
    got = scores(tmp_path)
    assert got["n"] == 2 and got["refused"]["count"] == 1 and "tokens" in got["refused"]["first"][0]


def test_a_huge_image_is_shrunk_to_the_models_own_bounds(tmp_path, random_model_folder):
    from PIL import Image

    folder = vision_folder(tmp_path / "mini", 1)
    Image.new("RGB", (4000, 3000), "white").save(folder / "images" / "0.png")
    run(eval_run(tmp_path), f"m={random_model_folder}")
    assert scores(tmp_path)["refused"]["count"] == 0 and predictions(tmp_path)[0]["tokens"] >= 1


@pytest.mark.fault("kills", "an evaluation that is killed", "goes on; nothing is asked twice")
def test_a_killed_evaluation_goes_on_without_asking_twice(tmp_path):
    vision_folder(tmp_path / "mini", 40)
    words = ["eval", "builtin", "--benchmarks", "mathvision", "--split", "testmini", "--data", "mini"]
    words += ["--out", "out", "--batch", "2", "--max-tokens", "24", "--prompt", "official"]
    path = tmp_path / "out" / "builtin" / "mathvision" / "predictions.jsonl"
    process = warm.Popen(
        [sys.executable, "-W", "ignore", "-m", "rlcs", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size > 500) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with path.open("a") as file:
        file.write('{"id": "3')  # what a crash in the middle of a write leaves
    before = read_jsonl(path)
    assert 0 < len(before) < 40
    before[0]["response"] = "kept as it was"
    path.write_text("".join(json.dumps(row) + "\n" for row in before))
    done = rlcs(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = read_jsonl(path)
    assert len(after) == len({row["id"] for row in after}) == 40
    assert after[0]["response"] == "kept as it was"
    assert "builtin" in done.stdout and "chance" in done.stdout and "out/comparison.md" in done.stdout
    assert read_json(path.with_name("scores.json"))["prompt"] == "official"


class CountingSampler:
    """Answers 5 to every problem but those called long; counts what is asked."""

    def __init__(self):
        self.asked: list[str] = []

    def batch(self, requests):
        self.asked += [request.id for request in requests]
        return [
            Sample(id=request.id, error="too long")
            if request.id.startswith("long")
            else Sample(id=request.id, text="\\boxed{5}", stop=StopReason.EOS, tokens=4)
            for request in requests
        ]


def test_an_arm_s_problem_without_an_answer_counts_as_wrong_and_says_why(tmp_path):
    names, sampler = ["long", *(str(n) for n in range(CHUNK))], CountingSampler()
    problems = [
        Problem(id=name, source="mine", question="?", answer="5", metadata={"level": int(name == "long")})
        for name in names
    ]
    with GradePool() as pool, screen("eval", len(problems), quiet=True) as view:
        evaluator = Evaluator(sampler=sampler, grader=pool)
        measured = partial(evaluate, evaluator, problems, folder=tmp_path, screen=view)
        with pytest.raises(Stopped):
            stop = StopFlag()
            stop.is_set = True
            measured(stop=stop)
        assert not sampler.asked
        arm = measured(stop=StopFlag())
        assert arm == read_json(tmp_path / "scores.json") == measured(stop=StopFlag())
    assert sampler.asked == names, "nothing is asked twice"
    assert (arm["n"], arm["accuracy"], arm["unscored"]) == (CHUNK + 1, CHUNK / (CHUNK + 1), 0)
    assert arm["by_level"] == {"0": {"accuracy": 1.0, "n": CHUNK}, "1": {"accuracy": 0.0, "n": 1}}
    rows = {row["id"]: row for row in read_jsonl(tmp_path / "predictions.jsonl")}
    told = [rows["long"][key] for key in ("response", "extracted", "correct", "why", "tokens", "stop")]
    assert told == ["", None, False, "too long", 0, "error"] and rows["7"]["response"] == "\\boxed{5}"


class FailingGrader:
    """Scores the answers to the problems in `scored` alone."""

    def __init__(self, *scored: str):
        self.scored = scored

    def grade(self, answers):
        unscored = Grade(reward=None, correct=None, why="the judge is away")
        right = Grade(reward=1.0, correct=True)
        return [right if problem.id in self.scored else unscored for problem, _ in answers]


def test_an_arm_without_a_scored_answer_is_an_error_and_unscored_answers_are_graded_again(tmp_path, capsys):
    problems = [Problem(id=name, source="mine", question="?", answer="5") for name in ("long", "1", "2", "3")]
    sampler = CountingSampler()

    def measured(*scored):
        with screen("eval", len(problems), quiet=True) as view:
            evaluator = Evaluator(sampler=sampler, grader=FailingGrader(*scored))
            return evaluate(evaluator, problems, folder=tmp_path, screen=view, stop=StopFlag())

    with pytest.raises(
        RlcsError, match=r"none of the 3 answers .* is scored; 3 of them: the judge is away"
    ) as e:
        measured()
    assert e.value.where == "grpo.reward" and "same command tries again" in e.value.fix
    assert not (tmp_path / "scores.json").exists()
    scores = measured("2")
    assert (scores["n"], scores["unscored"], scores["accuracy"]) == (4, 2, 0.25)
    assert "accuracy 25.0%  2 not scored" in capsys.readouterr().out
    assert "n=4, 2 not scored" in "".join(_arm_lines({"base": scores}, tmp_path))
    assert measured("1", "3")["unscored"] == 0
    assert sampler.asked == ["long", "1", "2", "3"], "an answer is graded again, not sampled again"
    assert len(read_jsonl(tmp_path / "predictions.jsonl")) == 4


# ------------------------------------------------------------------------------------ served models


def test_a_served_model_is_asked_as_a_local_one_would_be(mini):
    with LoopbackServer(answer=lambda body: "So \\boxed{D}.") as server:
        run(eval_run(mini, server), "org/model-7b")
        bodies = list(server.seen)
        run(eval_run(mini, server, **sampled(2)), "sampled")
        drawn = server.seen[6:]
    assert scores(mini, "org-model-7b")["rules"]["rlcs"]["accuracy"] == 1.0
    assert len(bodies) == 6 and bodies[0]["model"] == "org/model-7b" and bodies[0]["temperature"] == 0
    system, user = bodies[0]["messages"]
    assert system["content"] == Prompts().system
    assert [part["type"] for part in user["content"]] == ["text", "image_url", "text"]
    assert user["content"][0]["text"] == "Which one?\n" and "(E) 5" in user["content"][2]["text"]
    assert all("seed" not in body for body in bodies), "a greedy answer has none"
    assert all(0 <= body["seed"] < 2**31 for body in drawn) and len({body["seed"] for body in drawn}) == 12


def test_the_official_words_go_without_a_system_prompt(mini):
    with LoopbackServer() as server:
        run(eval_run(mini, server, style="official", sampling=Eval()))
        messages = server.seen[0]["messages"]
    assert len(messages) == 1 and messages[0]["content"][0]["type"] == "image_url"
    assert messages[0]["content"][1]["text"].startswith("Please solve the problem step by step")


def test_failed_answers_are_told_and_asked_again(mini):
    write_jsonl(
        mini / "mini" / "mathvision" / "testmini.jsonl",
        [vision(i, question=f"Q{i}?") for i in range(6)],
    )
    with LoopbackServer(faults={"Q1": ["always:500"], "Q2": ["always:400"]}) as server:
        comparison = run(eval_run(mini, server))
        assert comparison["failed"] == 2 and any("2 answers failed" in n for n in comparison["notes"])
        got = scores(mini)
        assert got["n"] == 4 and "told to say" in next(iter(got["failed"]["first"].values()))
        assert {row["id"] for row in predictions(mini)} == set("0345")
        asked = len(server.seen)
    with LoopbackServer() as server:
        other = run(eval_run(mini, server, endpoint=Endpoint(base_url=server.url, model="")), "n")
    assert other["failed"] == 0, "what failed with m is no fault of this call"
    assert any("m, MATH-Vision: 2 answers failed" in note for note in other["notes"])
    assert asked == 4 + 2 + 1


def test_resuming_asks_a_server_only_for_what_is_missing(mini):
    with LoopbackServer(faults={"(E) 5": ["400"]}) as server:
        assert run(eval_run(mini, server))["failed"] == 1
        assert run(eval_run(mini, server))["failed"] == 0
        assert len(server.seen) == 6 + 1
        run(eval_run(mini, server))
        assert len(server.seen) == 6 + 1
    assert scores(mini)["n"] == 6


def test_a_question_that_was_edited_since_is_named(mini):
    file = mini / "mini" / "mathvision" / "testmini.jsonl"
    write_jsonl(file, [vision(i, question=f"Q{i}?") for i in range(6)])
    with LoopbackServer(faults={"Q1": ["400"]}) as server:
        run(eval_run(mini, server))
        write_jsonl(file, [vision(i, question="Q1?" if i == 4 else f"Q{i}?") for i in range(6)])
        with pytest.raises(UserError, match=r"(?s)predictions\.jsonl: the data changed.*'4'.*restore"):
            run(eval_run(mini, server))
        assert len(server.seen) == 6


def test_a_stop_keeps_what_has_come(mini):
    stop = StopFlag()

    def answer(body):
        stop.is_set = len(seen) >= 3
        seen.append(body)
        return "\\boxed{D}"

    seen: list[object] = []
    with LoopbackServer(answer=answer) as server:
        chosen = eval_run(mini, endpoint=Endpoint(base_url=server.url, model="", concurrency=1))
        with pytest.raises(Stopped):
            run(chosen, stop=stop)
        some = len(predictions(mini))
        assert 1 <= some < 6
        run(eval_run(mini, endpoint=chosen.endpoint))
    assert len(predictions(mini)) == 6


@pytest.mark.fault("data", "a benchmark whose images are missing", "counted and named")
def test_missing_images_are_counted_and_named_not_scored_as_zero(tmp_path, capsys):
    keys = ("2steps_1", "2steps_2", "2steps_multi")
    rows = [we(f"2steps_{i}", key, image_path=f"2steps/image/{i}-{key}.png") for i in (1, 2) for key in keys]
    folder = tmp_path / "mini" / "wemath"
    write_jsonl(folder / "testmini.jsonl", rows)
    for key in keys:
        write_image(folder / "images" / "2steps" / "image" / f"1-{key}.png")
    with LoopbackServer(answer=lambda body: "\\boxed{400}") as server:
        comparison = run(eval_run(tmp_path, server, benchmarks=("wemath",)))
    got = scores(tmp_path, benchmark="wemath")
    assert (got["n"], got["of"], got["missing_images"]["count"]) == (3, 1740, 3)
    assert got["rules"]["rlcs"]["accuracy"] == 1.0  # the value of the right option
    assert (
        got["rules"]["rlcs"]["metrics"]["problems"] == 1 and got["rules"]["rlcs"]["metrics"]["strict_CM"] == 1
    )
    assert got["rules"]["official"]["accuracy"] == 0.0  # the official rule reads a letter after "Answer"
    said = capsys.readouterr().out
    assert "3 of 6 questions" in said and "2-2steps_1.png" in said
    assert "3 of 1,740" in as_markdown(comparison) and "strict score 100.0" in as_markdown(comparison)


# ------------------------------------------------------------------------------------ judge


def test_a_judge_reads_out_what_has_no_box_and_is_visible(tmp_path):
    folder = tmp_path / "mini" / "mathvista"
    write_jsonl(folder / "testmini.jsonl", [{**VISTA, "pid": str(i)} for i in range(4)])
    write_image(folder / "images" / "1.png")
    replies = iter(["It is \\boxed{1.2}.", "It is 1.2 long.", "It is 7 long.", "I do not know."])

    def read(body):
        assert "1.2" not in last_text(body).partition("Response:")[0], "the judge never sees the gold answer"
        response = last_text(body)
        return "1.2" if "is 1.2" in response else "7" if "is 7" in response else "NONE"

    chosen = {"benchmarks": ("mathvista",)}
    with LoopbackServer(answer=lambda body: next(replies)) as server, LoopbackServer(answer=read) as judge:
        plain = run(eval_run(tmp_path, server, **chosen))
        assert not judge.seen and [row["rule"] for row in plain["rows"]] == ["rlcs", "official"]
        assert scores(tmp_path, benchmark="mathvista")["judge"] is None
        judged = run(eval_run(tmp_path, server, judge, **chosen))
        assert len(judge.seen) == 1 + 3 and judge.seen[0]["model"] == "reader", "a trial, then the answers"
        run(eval_run(tmp_path, server, judge, **chosen))
        assert len(judge.seen) == 4 + 1, "nothing is judged twice"
        other = Endpoint(base_url=judge.url, model="another", max_retries=1)
        run(replace(eval_run(tmp_path, server, **chosen), judge=other))
        assert len(judge.seen) == 5 + 4, "another model extracts for itself"
        run(eval_run(tmp_path, server, judge, **chosen))
        assert len(judge.seen) == 9 + 1, "and what the first one extracted is still there"
    got = scores(tmp_path, benchmark="mathvista")
    assert {rule: each["accuracy"] for rule, each in got["rules"].items()} == {
        "rlcs": 0.25,
        "rlcs+judge": 0.5,
        "official": 0.5,  # on what the judge read, as the official script does it
    }
    assert got["judge"] == {"model": "reader", "asked": 3, "read": 3, "failed": 0, "why_failed": []}
    assert [row["rule"] for row in judged["rows"]] == ["rlcs", "rlcs+judge", "official"]
    assert any("reader read 3 answers" in note for note in judged["notes"])


def test_what_the_judge_is_asked():
    assert needs_extractor("It is 4.") and needs_extractor("\\boxed{4")
    assert not needs_extractor("\\boxed{4}") and not needs_extractor(" \n")


# ------------------------------------------------------------------------------------ comparison, refusals


def test_the_comparison_holds_every_model_of_the_folder_in_the_order_given(mini):
    with LoopbackServer() as server:
        run(eval_run(mini, server), "old")
        comparison = run(eval_run(mini, server), "zeta", "both=alpha")
    rules = ("rlcs", "official")
    assert [(row["model"], row["rule"]) for row in comparison["rows"]] == [
        (model, rule) for model in ("zeta", "both", "old") for rule in rules
    ]
    assert comparison["reported"]["the paper, 7B (SFT, then RL)"]["mathvista"] == 73.4
    means = [round(sum(each) / 4, 1) for each in REPORTED.values()]
    assert means == [40.0, 50.8, 49.5, 55.7]


def test_scores_of_a_run_in_the_same_folder_are_left_out(mini):
    write_json(mini / "out" / "eval" / "base" / "scores.json", {"accuracy": 0.5, "n": 4})
    with LoopbackServer() as server:
        assert {row["model"] for row in run(eval_run(mini, server))["rows"]} == {"m"}


def test_answers_of_other_settings_never_mix(mini):
    with LoopbackServer() as server:
        run(eval_run(mini, server))
        with pytest.raises(RunFolderError, match="prompt was 'paper', is 'official'"):
            run(eval_run(mini, server, style="official", sampling=Eval(max_new_tokens=8)))


def test_a_start_without_any_answer_may_be_corrected(mini):
    with LoopbackServer(faults={"Which": ["always:404"]}) as wrong, pytest.raises(EndpointError):
        run(eval_run(mini, wrong))
    with LoopbackServer() as server:
        run(eval_run(mini, server))
        assert scores(mini)["n"] == 6
    with LoopbackServer() as other, pytest.raises(RunFolderError, match="base_url was"):
        run(eval_run(mini, other))


@pytest.mark.fault("data", "a measured model changed in its folder", "another model")
def test_a_model_that_changed_in_its_folder_is_another_model(mini, random_model_folder, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(random_model_folder, model)
    run(eval_run(mini, limit=1), f"m={model}")
    os.utime(model / "model.safetensors", (1, 1))
    with pytest.raises(RunFolderError, match="weights was"):
        run(eval_run(mini, limit=1), f"m={model}")


def test_models_get_names_of_their_own():
    assert label_models(["runs/a/sft/final", "base=builtin", "Qwen/Qwen2.5-VL-3B"]) == {
        "a-sft-final": "runs/a/sft/final",
        "base": "builtin",
        "Qwen-Qwen2.5-VL-3B": "Qwen/Qwen2.5-VL-3B",
    }
    for bad in (["a", "a"], ["=x"], ["a="], ["../.."], ["a/b=c"]):
        with pytest.raises(UserError):
            label_models(bad)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model is named"),
        (["builtin", "--benchmarks", "mathvison"], "did you mean mathvision"),
        (["builtin", "--prompt", "papr"], "did you mean paper"),
        (["builtin", "--samples", "4"], "several greedy samples"),
        (["builtin", "--judge-url", "http://127.0.0.1:1/v1"], "a judge on a server has a model"),
        (["builtin", "--split", "tst", "--data", "mini"], "no split"),
        (["builtin", "--data", "nowhere"], "no such folder"),
        (["builtin", "--data", "mini", "--split", "test"], "there is no test.jsonl"),
        (["./nomodel", "--data", "mini"], "./nomodel: there is no such folder"),
        (["m", "--data", "mini", "--rollout", "tensor_paralel=2"], "did you mean tensor_parallel?"),
        (
            ["m", "--data", "mini", "--rollout", "tensor_parallel=0"],
            "should be a whole number at least 1 and at most 1,000,000,000 (got 0)",
        ),
        (["m", "--data", "mini", "--engine", "vllm"], "engine should be one of local, vllm_server"),
        (["m", "--data", "mini", "--rollout", 'devices=["0", "1"]'], "2 devices for 1 servers"),
        (["m", "--data", "mini", "--rollout", "urls=[http://a:1]"], "unknown key urls"),
        (["m", "--data", "mini", "--base-url", "localhost:1"], "not the URL of a server"),
        (["m", "--data", "mini", "--base-url", "http://127.0.0.1:1/v1"], "nothing answers there"),
    ],
)
def test_wrong_flags_get_a_sentence_and_exit_code_2(mini, words, message, monkeypatch, capsys):
    from rlcs.cli import main as cli

    monkeypatch.chdir(mini)
    own = ["--split", "testmini"] if "--data" in words and "--split" not in words else []
    own += ["--benchmarks", "mathvision"] if "--benchmarks" not in words else []
    monkeypatch.setattr(sys, "argv", ["rlcs", "eval", *words, *own])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and message in errors and "->" in errors


def test_what_is_sent_is_an_option(mini):
    words = [
        "eval",
        "m",
        "--benchmarks",
        "mathvision",
        "--split",
        "testmini",
        "--data",
        "mini",
        "--limit",
        "1",
    ]
    with LoopbackServer() as server, LoopbackServer() as judge:
        asked = [
            "--base-url",
            server.url,
            "--request",
            "omit=[temperature,seed]",
            "--request",
            "extra={top_k: 3}",
        ]
        read = [
            "--judge-url",
            judge.url,
            "--judge-model",
            "j",
            "--judge-request",
            "max_tokens=max_completion_tokens",
        ]
        done = rlcs(*words, *asked, *read, "--out", "out", cwd=mini)
        assert done.returncode == 0, done.stderr
        body, trial = server.seen[0], judge.seen[0]
        other = rlcs(*words, "--base-url", server.url, "--out", "out", cwd=mini)
    assert body["top_k"] == 3 and not {"temperature", "seed"} & set(body)
    assert "max_completion_tokens" in trial and "max_tokens" not in trial
    assert other.returncode == 2 and "request was" in other.stderr
    wrong = rlcs(*words, "--base-url", "http://127.0.0.1:1/v1", "--request", "omitt=[n]", cwd=mini)
    assert wrong.returncode == 2 and "--request omitt=[n]: unknown key omitt" in wrong.stderr
    refusal = (400, {"error": {"message": "Unknown parameter: 'top_k'"}})
    with LoopbackServer(reply=lambda body: refusal) as server:
        ended = rlcs(
            *words, "--base-url", server.url, "--request", "extra={top_k: 3}", "--out", "b", cwd=mini
        )
    assert ended.returncode == 2 and "take top_k out of --request extra" in ended.stderr


def test_the_command_line_asks_a_server_and_speaks_json(mini):
    with LoopbackServer(faults={"(E) 5": ["400"]}) as server:
        words = ["eval", "--model", "m", "--base-url", server.url, "--benchmarks", "mathvision"]
        words += ["--split", "testmini", "--data", "mini", "--out", "out", "--json"]
        first = rlcs(*words, cwd=mini)
        assert first.returncode == 1 and json.loads(first.stdout.splitlines()[-1])["failed"] == 1
        second = rlcs(*words, cwd=mini)
        assert second.returncode == 0, second.stderr
        assert json.loads(second.stdout.splitlines()[-1])["rows"][0]["model"] == "m"
