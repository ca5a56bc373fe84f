"""A teacher behind a misbehaving server: every sample asked for once, kills survived, chains put together."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import warm
from conftest import make_conversation
from loopback_server import LoopbackServer, last_text, text_of
from plain_grading import grade
from rlcs.data import puzzles
from rlcs.data.rows import Row
from rlcs.distill.chains import Chain, formatted
from rlcs.distill.filters import choose, reason_to_reject
from rlcs.distill.run import load_kept, run
from rlcs.engines import openai_client
from rlcs.errors import DataError, EndpointError, RecipeError, RunFolderError
from rlcs.generation import Entry
from rlcs.progress import screen
from rlcs.recipe.loading import load_recipe
from rlcs.recipe.schema import Filters, Teacher
from rlcs.records import ImageRef, Problem, Sample, StopReason
from rlcs.signals import StopFlag, Stopped
from rlcs.storage import read_json, read_jsonl

RESULTS = ("kept.jsonl", "rejected.jsonl", "problems.jsonl", "stats.json")
FAULTS = ("429", "500", "cut", "hangup", "not-json", "no-choices", "empty")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(openai_client, "FIRST_WAIT_S", 0.01)


def problems(count):
    return [
        Problem(id=f"p{n}", source="mine", question=f"What is {n} + 1 ?", answer=str(n + 1))
        for n in range(count)
    ]


def rows(count):
    return [Row(problem=problem, response=None) for problem in problems(count)]


def said(body):
    """Right, wrong, wordy or without a box, as the question and the seed of the request decide."""
    number = int(last_text(body).split()[2])
    draw = (number * 7919 + body["seed"] // 3) % 10
    value = number + 1 if draw < 5 else number + 2
    return f"Adding 1 to {number}:{' so' * (draw % 3)} \\boxed{{{value}}}" if draw < 9 else "I cannot say."


def teacher(server, **changes):
    return Teacher(base_url=server.url, **{"model": "m", "max_samples": 4, "concurrency": 8, **changes})


def results(folder):
    files = {name: (folder / name).read_bytes() for name in RESULTS}
    stats = json.loads(files["stats.json"])
    return {
        **files,
        "stats.json": {name: stats[name] for name in stats if name not in ("retries", "repeated_tokens")},
    }


def line_count(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def asked(server):
    return Counter((last_text(body), body["seed"]) for body in server.seen)


def test_a_server_teaches_and_every_try_lies_on_disk(tmp_path: Path):
    picture = puzzles.load("shapes", split="train", count=1, seed=5)[0]
    with LoopbackServer(answer=lambda body: f"Look. \\boxed{{{picture.answer}}}") as server:
        kept = run(
            [Row(problem=picture, response=None)],
            teacher(server, completion_price=2.0),
            folder=tmp_path,
            seed=1,
        )
        (body,) = server.seen
    assert [part["type"] for part in body["messages"][1]["content"]] == ["image_url", "text"]
    assert (
        "boxed" in text_of(body["messages"][0]) and body["temperature"] == 0.7 and body["max_tokens"] == 4096
    )
    assert kept[0].teacher == "m" and kept[0].grade is not None and kept[0].grade.correct
    (line,) = read_jsonl(tmp_path / "samples.jsonl")
    assert line["response"] == kept[0].response and line["tokens"] == 2 and line["correct"] is True
    stats = read_json(tmp_path / "stats.json")
    assert stats["cost"] == pytest.approx(2 * 2.0 / 1e6) and stats["asked"] == 1 and stats["failed"] == 0
    (image,) = read_jsonl(tmp_path / "kept.jsonl")[0]["images"]
    assert (tmp_path / image).read_bytes() == picture.images[0].data


def test_a_problem_is_asked_until_enough_is_right_and_no_more(tmp_path: Path):
    with LoopbackServer(answer=said) as server:
        run(rows(40), teacher(server, enough_kept=2, max_kept=2), folder=tmp_path, seed=1)
        assert max(asked(server).values()) == 1
    by_problem = {}
    for line in read_jsonl(tmp_path / "samples.jsonl"):
        by_problem.setdefault(line["id"], {})[line["index"]] = line["correct"]
    assert {len(samples) for samples in by_problem.values()} == {2, 3, 4}
    for samples in by_problem.values():
        assert sorted(samples) == list(range(len(samples)))
        right = [samples[n] for n in range(len(samples))]
        assert len(samples) == 4 or (sum(right) == 2 and right[-1])
    rated = {row["id"]: row for row in read_jsonl(tmp_path / "problems.jsonl")}
    assert all(
        rated[n]["pass_rate"] == pytest.approx(sum(t.values()) / len(t), abs=1e-4)
        for n, t in by_problem.items()
    )


def test_faults_of_every_kind_lose_nothing(tmp_path: Path):
    faults = {f"is {5 * n + 1} ": [fault] for n, fault in enumerate(FAULTS)}
    with LoopbackServer(answer=said) as server:
        run(rows(60), teacher(server), folder=tmp_path / "calm", seed=1)
    with LoopbackServer(answer=said, faults=faults) as server:
        run(rows(60), teacher(server, concurrency=64), folder=tmp_path / "stormy", seed=1)
        assert sum(asked(server).values()) == len(read_jsonl(tmp_path / "stormy/samples.jsonl")) + len(FAULTS)
    assert results(tmp_path / "calm") == results(tmp_path / "stormy")
    assert not read_json(tmp_path / "calm/stats.json")["retries"]
    retries = read_json(tmp_path / "stormy/stats.json")["retries"]
    assert sum(retries.values()) == len(FAULTS) and retries["HTTP 429"] and retries["empty"] == 1


def test_what_is_refused_is_named_and_asked_again_the_next_time(tmp_path: Path, capsys):
    with LoopbackServer(answer=said, faults={"is 3 ": ["always:400"], "is 4 ": ["always:500"]}) as server:
        settings = teacher(server, enough_kept=0, max_samples=2, max_retries=1)
        with screen("cold start", 6, quiet=True) as view:
            run(rows(6), settings, folder=tmp_path, seed=1, view=view)
        assert (
            sum(n for (text, _), n in asked(server).items() if " 3 " in text) == 2
        )  # no use in asking again
        assert sum(n for (text, _), n in asked(server).items() if " 4 " in text) == 2 * 2 * 3
    stats, shown = read_json(tmp_path / "stats.json"), capsys.readouterr().out
    assert stats["failed"] == stats["refused"] == 2, "a 500 may pass, a 400 never"
    assert "2 samples were not answered" in shown and "2 samples are left out" in shown
    with LoopbackServer(answer=said) as server:
        run(rows(6), settings.model_copy(update={"base_url": server.url}), folder=tmp_path, seed=1)
        assert {text.split()[2] for text, _ in asked(server)} == {"3", "4"} and len(server.seen) == 4
    assert read_json(tmp_path / "stats.json")["failed"] == 0


def test_a_server_that_cannot_be_used_costs_nothing_that_came_before(tmp_path: Path):
    with LoopbackServer(answer=said, faults={"is 30 ": ["always:401"]}) as server:
        with pytest.raises(EndpointError, match="key"):
            run(rows(40), teacher(server, enough_kept=0, concurrency=2), folder=tmp_path, seed=1)
        before = len(read_jsonl(tmp_path / "samples.jsonl"))
    with LoopbackServer(answer=said) as server:
        run(rows(40), teacher(server, enough_kept=0), folder=tmp_path, seed=1)
        assert len(server.seen) == 160 - before and before > 50


def test_stopped_as_asked_and_gone_on(tmp_path: Path):
    stop = StopFlag()

    def answer(body):
        stop.is_set = stop.is_set or last_text(body).split()[2] == "9"
        return said(body)

    with LoopbackServer(answer=answer) as server, pytest.raises(Stopped):
        run(rows(40), teacher(server), folder=tmp_path, seed=1, stop=stop)
    assert not (tmp_path / "kept.jsonl").exists() and 0 < len(read_jsonl(tmp_path / "samples.jsonl")) < 40
    with LoopbackServer(answer=said) as server:
        assert run(rows(40), teacher(server), folder=tmp_path, seed=1, stop=StopFlag())


def test_a_torn_line_is_mended_and_asked_again(tmp_path: Path):
    with LoopbackServer(answer=said) as server:
        run(rows(10), teacher(server), folder=tmp_path, seed=1)
    whole = results(tmp_path)
    data = (tmp_path / "samples.jsonl").read_bytes()
    (tmp_path / "samples.jsonl").write_bytes(data[:-9])
    with LoopbackServer(answer=said) as server:
        run(rows(10), teacher(server), folder=tmp_path, seed=1)
        assert len(server.seen) == 1
    assert results(tmp_path) == whole and len(read_jsonl(tmp_path / "samples.jsonl")) == data.count(b"\n")


def test_an_edited_problem_is_asked_again_and_only_that(tmp_path: Path):
    with LoopbackServer(answer=said) as server:
        run(rows(10), teacher(server, enough_kept=0), folder=tmp_path, seed=1)
        edited = rows(10)
        edited[3] = Row(
            problem=Problem(id="p3", source="mine", question="What is 7 + 2 ?", answer="9"), response=None
        )
        del edited[5]
        del server.seen[:]
        run(edited, teacher(server, enough_kept=0), folder=tmp_path, seed=1)
        assert {last_text(body) for body in server.seen} == {"What is 7 + 2 ?"} and len(server.seen) == 4
    assert "p5" not in (tmp_path / "problems.jsonl").read_text()


def test_other_settings_never_share_a_folder_but_the_choice_may_change(tmp_path: Path):
    with LoopbackServer(answer=said) as server:
        first = run(rows(10), teacher(server, enough_kept=0), folder=tmp_path, seed=1)
        with pytest.raises(RunFolderError, match=r"temperature was 0\.7, is 1\.0"):
            run(rows(10), teacher(server, temperature=1.0), folder=tmp_path, seed=1)
        count = len(server.seen)
        more = run(
            rows(10), teacher(server, enough_kept=0, max_kept=3, pick="shortest"), folder=tmp_path, seed=1
        )
        assert len(server.seen) == count and len(more) > len(first)
    assert load_kept(rows(10), tmp_path) == more
    ids = [row["id"] for row in read_jsonl(tmp_path / "kept.jsonl")]
    assert len(set(ids)) == len(ids) == len(more)
    assert any("others are kept" in row["why"] for row in read_jsonl(tmp_path / "rejected.jsonl"))


def test_a_start_without_any_answer_may_be_corrected(tmp_path: Path):
    with LoopbackServer(faults={"What": ["always:404"]}) as wrong, pytest.raises(EndpointError):
        run(rows(10), teacher(wrong, model="typo"), folder=tmp_path, seed=1)
    with LoopbackServer(answer=said) as server:
        run(rows(10), teacher(server), folder=tmp_path, seed=1)
        with pytest.raises(RunFolderError, match="model was 'm', is 'typo'"):
            run(rows(10), teacher(server, model="typo"), folder=tmp_path, seed=1)


@pytest.mark.parametrize("kills", [2])
def test_killed_and_resumed_it_ends_like_an_undisturbed_run(kills, tmp_path: Path):
    """The command itself, in a process of its own, killed without warning."""
    count = int(os.environ.get("RLCS_DISTILL_PROBLEMS", "200"))
    kills = int(os.environ.get("RLCS_DISTILL_KILLS", str(kills)))
    source = tmp_path / "problems.jsonl"
    lines = [{"id": p.id, "question": p.question, "answer": p.answer} for p in problems(count)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # a fault for one problem in 20 of each kind
    faults = {f"is {n} ": [FAULTS[n % 20]] for n in range(count) if n % 20 < len(FAULTS)}

    def command(server, out):
        return [
            *(sys.executable, "-W", "ignore", "-m", "rlcs", "distill", "quickstart", "--out", str(out)),
            *(
                f"data.problems={source}",
                f"teacher.base_url={server.url}",
                "teacher.model=m",
                "teacher.max_samples=4",
            ),
            *("teacher.concurrency=64", "teacher.enough_kept=0", "--quiet"),
        ]

    with LoopbackServer(answer=said) as server:
        done = warm.run(command(server, tmp_path / "calm"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "right" in done.stdout and "kept" in done.stdout
    killed, samples = tmp_path / "killed/cold_start", tmp_path / "killed/cold_start/samples.jsonl"
    with LoopbackServer(answer=said, faults=faults, delay_s=0.05) as server:
        for kill in range(kills):
            process = warm.Popen(command(server, tmp_path / "killed"), stdout=subprocess.DEVNULL)
            wanted = (kill + 1) * 4 * count // (kills + 1)
            while process.poll() is None and (
                not samples.exists() or samples.read_bytes().count(b"\n") < wanted
            ):
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            answered = {(line["id"], line["index"]) for line in read_jsonl(samples)}
            assert len(answered) >= wanted
        done = warm.run(command(server, tmp_path / "killed"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        most = 4 * count + len(faults) + kills * 2 * 64  # what was under way at a kill is asked again
        assert 4 * count <= len(server.seen) <= most
    lines = [(line["id"], line["index"]) for line in read_jsonl(samples)]
    assert len(lines) == len(set(lines)) == 4 * count, "nothing is lost, and nothing answered is asked twice"
    assert results(tmp_path / "calm/cold_start") == results(killed)


# --- chains ---------------------------------------------------------------------------------------


def test_turns_of_a_chain_are_put_together_and_survive_a_stop(tmp_path: Path):
    def answer(body):
        text = last_text(body)
        if "Do not answer yet" in text:
            return "Two <image> apples \\boxed{9}."
        assert "Two <image> apples 9." not in text and "Two  apples 9." in text
        return "So \\boxed{2}."

    problem = puzzles.load("shapes", split="train", count=1, seed=5)[0]
    row = Row(problem=problem, response=None)
    settings = {"chain": "caption", "keep": "all"}
    with (
        LoopbackServer(answer=answer, faults={"A description": ["always:401"]}) as server,
        pytest.raises(EndpointError),
    ):
        run([row], teacher(server, **settings), folder=tmp_path, seed=1)
    with LoopbackServer(answer=answer) as server:
        (kept,) = run([row], teacher(server, **settings), folder=tmp_path, seed=1)
        assert len(server.seen) == 1  # the description was answered before
    assert kept.response == "The image shows: Two <image> apples 9.\n\nSo \\boxed{2}."
    assert [(line["turn"], line["tokens"]) for line in read_jsonl(tmp_path / "samples.jsonl")] == [
        (0, 4),
        (1, 2),
    ]
    assert read_json(tmp_path / "stats.json")["completion_tokens"] == 4 + 2


@pytest.mark.parametrize(
    ("kind", "length"), [("distilled", 1), ("caption", 2), ("reflection", 2), ("self_critic", 3)]
)
def test_every_kind_ends_in_one_box(kind, length):
    chain = Chain(kind, folder=None, form="plain")
    turns = [
        Sample(id="p0", turn=n, text=f"turn {n} \\boxed{{{n}}}", stop=StopReason.EOS) for n in range(length)
    ]
    problem = problems(1)[0]
    for n in range(length):
        request = chain.request(problem, turns[:n])
        (words,) = request.messages[1].parts
        assert (request.id, request.turn, request.messages[0].parts) == ("p0", n, (chain.system,))
        assert "What is 0 + 1 ?" in words and all(f"turn {m} {m}" in words for m in range(max(0, n - 1), n))
    assert chain.length == length and "boxed" in chain.system
    response = chain.response(turns)
    assert response.count("\\boxed") == 1 and response.endswith(f"\\boxed{{{length - 1}}}")
    think = Chain(kind, folder=None, form="think").response(turns)
    assert think.startswith("<think>\n") and think.endswith(f"</think>\n\n\\boxed{{{length - 1}}}")


@pytest.mark.parametrize("kind", ["distilled", "caption", "reflection", "self_critic"])
def test_a_teacher_sees_the_whole_conversation(kind):
    chain = Chain(kind, folder=None, form="plain")
    problem = make_conversation("p0", system="Answer in English.")
    turns = []
    for n in range(chain.length):
        request = chain.request(problem, turns)
        assert [m.role for m in request.messages] == ["system", *["user", "assistant"] * 2, "user"]
        assert request.messages[0].parts == (f"Answer in English.\n\n{chain.system}",)
        shown = [part for message in request.messages for part in message.parts if isinstance(part, ImageRef)]
        assert shown == list(problem.images)
        assert [len(message.parts) for message in request.messages[1:5]] == [2, 1, 3, 1]
        turns.append(Sample(id="p0", turn=n, text="it shows <image> \\boxed{4}", stop=StopReason.EOS))
    no_system = make_conversation("p1")
    assert chain.request(no_system, []).messages[0].parts == (chain.system,)


def test_templates_of_one_s_own(tmp_path: Path):
    (tmp_path / "distilled").mkdir()
    (tmp_path / "distilled/1.j2").write_text("Rechne: {{ question }}")
    chain = Chain("distilled", folder=str(tmp_path), form="plain")
    assert chain.request(problems(1)[0], []).messages[-1].parts == ("Rechne: What is 0 + 1 ?",)
    assert chain.sources != Chain("distilled", folder=None, form="plain").sources
    (tmp_path / "distilled/1.j2").write_text("{{ question")
    with pytest.raises(RecipeError, match=r"template cannot be used"):
        Chain("distilled", folder=str(tmp_path), form="plain")
    (tmp_path / "distilled/1.j2").write_text("{{ question.no.such }}")
    with pytest.raises(RecipeError, match=r"cannot be filled in"):
        Chain("distilled", folder=str(tmp_path), form="plain").request(problems(1)[0], [])
    with pytest.raises(RecipeError, match="no such folder"):
        Chain("distilled", folder=str(tmp_path / "nowhere"), form="plain")


def test_formats():
    thought = "<think>\nhm\n</think>\n\n\\boxed{4}"
    assert formatted("hm, \\boxed{4}", "", "think") == "<think>\nhm, 4\n</think>\n\n\\boxed{4}"
    assert formatted(thought, "", "think") == thought
    assert formatted("\\boxed{4}", "hm", "think") == thought
    assert formatted("no answer", "", "think") == "no answer"
    assert formatted("It is \\boxed{4}.", "", "plain") == "It is \\boxed{4}."
    assert (
        formatted("<think>a long way to it</think>\\boxed{4}", "", "plain")
        == "a long way to it\n\n\\boxed{4}"
    )
    opened_by_the_prompt = "hm\n</think>\n\nSo the answer to it is \\boxed{4}."
    assert formatted(opened_by_the_prompt, "", "plain") == "So the answer to it is \\boxed{4}."
    assert formatted("hm</think>\\boxed{4}", "", "think") == thought
    assert formatted("hm</think>\\boxed{4}", "", "plain") == "hm\n\n\\boxed{4}"
    assert formatted("</think>\\boxed{4}", "hm", "think") == thought


@pytest.mark.parametrize("kind", ["caption", "reflection", "self_critic"])
def test_the_builtin_teacher_knows_every_kind(kind):
    drawn = puzzles.load("puzzles", split="train", count=60, seed=5)
    for problem in drawn:
        text = puzzles.teach(problem, chain=kind, seed=1, wrong_share=0.0)
        assert grade(problem, text, allow_fallbacks=False).correct and text.count("\\boxed") == 1
        assert text == puzzles.teach(problem, chain=kind, seed=1, wrong_share=0.0)
        assert not grade(
            problem, puzzles.teach(problem, chain=kind, seed=1, wrong_share=1.0), allow_fallbacks=False
        ).correct
    mistakes = [
        [
            grade(p, puzzles.teach(p, chain=c, seed=2, wrong_share=0.4), allow_fallbacks=False).correct
            for p in drawn
        ]
        for c in (kind, "distilled")
    ]
    assert mistakes[0] == mistakes[1] and 10 < sum(map(bool, mistakes[0])) < 50
    with pytest.raises(DataError):
        puzzles.teach(problems(1)[0], chain=kind, seed=1, wrong_share=0.0)


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("Three and one make \\boxed{4}.", ""),
        ("Let α = 3 and naïve x = 1: \\boxed{4}", ""),
        ("三加一等于 four, so \\boxed{4}", "mixes languages: cjk"),
        ("It is the gold answer: \\boxed{4}", "speaks of the 'gold answer'"),
        ("The correct answer is \\boxed{4}", ""),
        ("so it is four again and " * 20 + "\\boxed{4}", "repeats itself"),
    ],
)
def test_filters(response, why):
    assert reason_to_reject("What is 3 + 1?", response, Filters()) == why
    off = Filters(mixed_languages=False, repetition=False, leaks=False)
    assert reason_to_reject("What is 3 + 1?", response, off) == ""


def test_filters_of_length_and_of_the_question_s_own_script():
    assert "shorter" in reason_to_reject("?", "abc", Filters(min_chars=4))
    assert "longer" in reason_to_reject("?", "abc", Filters(max_chars=2))
    assert reason_to_reject("三加一?", "三加一等于 \\boxed{4}", Filters()) == ""


def test_filtered_and_cut_answers_are_rejected_with_their_reason(tmp_path: Path):
    words = {"0": "the gold answer is \\boxed{1}", "1": "cut \\boxed{2}", "2": "fine \\boxed{3}"}
    with LoopbackServer(
        answer=lambda body: words[last_text(body).split()[2]], faults={"is 1 ": ["length"] * 9}
    ) as server:
        kept = run(rows(3), teacher(server, max_samples=2), folder=tmp_path, seed=1)
    assert [d.problem.id for d in kept] == ["p2"]
    reasons = [(row["id"], row["why"], row["correct"]) for row in read_jsonl(tmp_path / "rejected.jsonl")]
    leak, cut = "speaks of the 'gold answer'", "cut off before its end"
    assert reasons == [("p0", leak, True)] * 2 + [("p1", cut, True)] * 2
    stats = read_json(tmp_path / "stats.json")
    assert stats["reasons"] == {cut: 2, leak: 2} and stats["pass_rates"] == [0] * 9 + [3]


def test_rules_of_choice():
    texts = ["a b c d e f", "a b c d e g", "x y z", "x y z", "a b c d e f"]
    samples = [Sample(id="p", index=n, text=text, stop=StopReason.EOS) for n, text in enumerate(texts)]
    usable = [Entry(sample=sample) for sample in samples]

    def picked(**changes):
        return [one.response for one in choose(usable, Teacher(enough_kept=0, **changes))]

    assert picked() == [texts[0]] and picked(max_kept=2) == texts[:2]
    assert picked(pick="shortest", max_kept=2) == ["x y z", "x y z"]
    assert picked(pick="diverse", max_kept=2) == [texts[0], "x y z"]
    assert picked(pick="diverse", max_kept=9) == [texts[0], "x y z", texts[1]]


# --- the recipe -----------------------------------------------------------------------------------


def test_the_kind_of_teacher_follows_from_what_is_given():
    assert load_recipe("quickstart").recipe.teacher.who == "builtin"
    assert load_recipe("quickstart", ["teacher.model=m"]).recipe.teacher.who == "local"
    served = load_recipe("quickstart", ["teacher.model=m", "teacher.base_url=http://x/v1"]).recipe
    assert served.teacher.who == "endpoint" and served.teacher.endpoint.base_url == "http://x/v1"
    for words, message in (
        (["teacher.kind=local"], "needs model"),
        (["teacher.base_url=http://x", "teacher.kind=endpoint"], "needs model"),
        (["teacher.max_kept=2"], "raise enough_kept"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe("quickstart", words)
