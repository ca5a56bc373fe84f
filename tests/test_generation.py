"""One act: requests to samples from a model of ours and from a server, and the log that keeps them."""

import json
import os
import signal
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import warm
from conftest import draw, make_problem
from loopback_server import LoopbackServer, last_text
from rlcs.engines.local import LocalEngine
from rlcs.engines.stop_reasons import STOP_REASONS, stop_reason
from rlcs.errors import DataError, RunFolderError, UserError
from rlcs.generation import EngineSampler, Entry, SampleLog, annotate, open_sampler
from rlcs.model.chat import Chat
from rlcs.model.vlm import Vlm
from rlcs.recipe.schema import Endpoint
from rlcs.records import Problem, Request, Sample, Sampling, StopReason
from rlcs.signals import StopFlag
from rlcs.storage import read_json, read_jsonl

SAMPLING = Sampling(max_new_tokens=6, temperature=1.0, seed=3)


def problems(count: int) -> list[Problem]:
    return [
        Problem(id=f"p{n}", source="mine", question=f"What is {n} + 1 ?", answer="1") for n in range(count)
    ]


def digests(some: list[Problem]) -> dict[str, str]:
    return {problem.id: problem.digest for problem in some}


def answered(name: str = "p0", index: int = 0, text: str = "4") -> Sample:
    return Sample(id=name, index=index, text=text, stop=StopReason.EOS, tokens=2, reasoning="hm")


# --- requests and samples -------------------------------------------------------------------------


def test_a_request_holds_images_at_their_slots_and_choices() -> None:
    a, b = draw(8, 8), draw(9, 9)
    problem = Problem(id="x", source="mine", question="Is <image> like <image>?", answer="A", images=(a, b))
    request = Request.of(problem, system="Think.", index=2, turn=1)
    assert [m.role for m in request.messages] == ["system", "user"] and request.key == ("x", 2, 1)
    assert request.messages[1].parts == ("Is ", a, " like ", b, "?")
    first = replace(problem, question="Which?", images=(a,), choices=("one", "two"))
    assert Request.of(first).messages[0].parts == (a, "Which?\n(A) one\n(B) two")


def test_a_failure_says_why_and_an_answer_has_no_error() -> None:
    with pytest.raises(ValueError, match="stop"):
        Sample(id="x")
    with pytest.raises(ValueError, match="stop"):
        Sample(id="x", stop=StopReason.EOS, error="down")
    with pytest.raises(ValueError, match="retryable"):
        Sample(id="x", stop=StopReason.EOS, retryable=True)


def test_an_unknown_stop_reason_counts_as_cut_off() -> None:
    assert stop_reason("stop") is stop_reason("END_TURN") is StopReason.EOS
    assert stop_reason("max_tokens") is stop_reason("tired") is stop_reason(None) is StopReason.LENGTH
    assert stop_reason("content_filter") is stop_reason("refusal") is stop_reason("abort") is StopReason.ERROR
    assert all(name == name.lower() for name in STOP_REASONS)


# --- samplers -------------------------------------------------------------------------------------


def test_an_engine_s_samples_depend_on_their_keys_alone(vlm: Vlm, chat: Chat) -> None:
    some = [make_problem("a", sizes=()), make_problem("b", "why?", sizes=((56, 56),))]
    engine = LocalEngine(vlm, chat, max_rows=8)

    def texts(n: int, requests: list[Request]) -> dict[object, str]:
        sampler = EngineSampler(engine, chat, replace(SAMPLING, n=n), batch_size=8)
        return {sample.key: sample.text for sample in sampler.samples(requests)}

    requests = [Request.of(problem, index=index) for problem in some for index in range(4)]
    together, alone = texts(4, requests), texts(1, requests)
    assert together == alone == texts(2, requests[::-1]) and len(set(together.values())) == 8
    assert texts(4, requests[5:6]) == {("b", 1, 0): together["b", 1, 0]}, "one of a group that is left"
    later = texts(1, [replace(requests[0], turn=1)])
    assert later["a", 0, 1] != together["a", 0, 0]


def test_requests_of_one_prompt_share_it(vlm: Vlm, chat: Chat) -> None:
    calls: list[tuple[list[str], int]] = []

    class Counting(LocalEngine):
        def sample(self, prompts, sampling, **kwargs):  # type: ignore[no-untyped-def]
            calls.append(([prompt.problem_id for prompt in prompts], sampling.n))
            return super().sample(prompts, sampling, **kwargs)

    sampler = EngineSampler(Counting(vlm, chat, max_rows=8), chat, replace(SAMPLING, n=3), batch_size=7)
    requests = [Request.of(make_problem(name, sizes=()), index=i) for name in "abc" for i in range(3)]
    assert len(list(sampler.samples(requests))) == 9
    assert calls == [(["a", "b"], 3), (["c"], 3)], "whole groups, six of seven at a time"
    assert sampler.batch([]) == [] and calls[-1] == ([], 3), "ranks call the engine together"


def test_what_cannot_become_a_prompt_fails_alone_and_for_good(random_model_folder: Path) -> None:
    some = [make_problem("short", sizes=()), make_problem("long", "why " * 9000, sizes=())]
    with open_sampler(str(random_model_folder), SAMPLING, rows=4) as sampler:
        short, long = sorted(sampler.samples(map(Request.of, some)), key=lambda s: s.id, reverse=True)
    assert "limit" in long.error and long.stop is StopReason.ERROR and not long.retryable
    assert not short.error and short.prompt_tokens > 5 and 0 < short.tokens <= 6


def test_requests_are_drawn_as_they_are_needed_and_a_stop_ends_it(vlm: Vlm, chat: Chat) -> None:
    sampler = EngineSampler(LocalEngine(vlm, chat, max_rows=8), chat, SAMPLING, batch_size=2)
    drawn, stop = [], StopFlag()

    def requests():  # type: ignore[no-untyped-def]
        for problem in problems(10):
            drawn.append(problem.id)
            yield Request.of(problem)

    for sample in sampler.samples(requests(), stop=stop):
        stop.is_set = sample.id == "p3"
    assert drawn == ["p0", "p1", "p2", "p3"]


def test_a_server_is_a_sampler_too(tmp_path: Path) -> None:
    with LoopbackServer() as server:
        endpoint = Endpoint(base_url=server.url, model="m")
        with open_sampler(endpoint, replace(SAMPLING, temperature=0.0)) as sampler:
            (greedy,) = sampler.samples([Request.of(problems(1)[0], system="Think.")])
        with open_sampler(endpoint, SAMPLING) as sampler:
            list(sampler.samples(Request.of(problems(1)[0], index=i, turn=t) for i in (0, 1) for t in (0, 1)))
    assert greedy.text == "The answer is \\boxed{4}." and greedy.stop is StopReason.EOS
    first, *others = server.seen
    assert "seed" not in first and [m["role"] for m in first["messages"]] == ["system", "user"]
    assert len({body["seed"] for body in others}) == 4, "every request has a seed of its own"


# --- the log --------------------------------------------------------------------------------------


def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    path, some = tmp_path / "samples.jsonl", problems(2)
    with SampleLog(path, digests(some)) as log:
        log.add(answered("p0", text="h\ud83d\u2028"), {"correct": True})
        log.add(answered("p1", 1))
        log.add(Sample(id="p1", index=2, error="too long"))
        log.add(Sample(id="p1", index=3, error="busy", retryable=True))
    with SampleLog(path, digests(some)) as again:
        assert again.entries == log.entries and len(again.entries) == 3, "what may pass is no answer"
        assert again.entries["p0", 0, 0] == Entry(
            sample=answered(text="h\ud83d\u2028"), added={"correct": True}
        )
        requests = [Request.of(some[1], index=i) for i in range(5)]
        assert [request.index for request in again.unanswered(requests)] == [0, 3, 4]


def test_a_row_has_the_sample_s_text_as_response_and_beside_it_what_was_composed(tmp_path: Path) -> None:
    path, some = tmp_path / "samples.jsonl", problems(2)
    with SampleLog(path, digests(some)) as log:
        log.add(answered("p0", text="raw"), {"composed": "made of two", "reward": 1.0, "correct": True})
        log.add(answered("p1", text="raw"))
    assert [row["response"] for row in read_jsonl(path)] == ["raw", "raw"]
    with SampleLog(path, digests(some)) as again:
        first, second = again.entries.values()
    assert (first.response, first.sample.text, first.grade.correct) == ("made of two", "raw", True)
    assert (second.response, second.grade.scored) == ("raw", False)


def test_a_torn_line_is_cut_off_and_asked_again(tmp_path: Path) -> None:
    path, some = tmp_path / "samples.jsonl", problems(3)
    with SampleLog(path, digests(some)) as log:
        for problem in some:
            log.add(answered(problem.id))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with SampleLog(path, digests(some)) as log:
        (left,) = log.unanswered(map(Request.of, some))
        assert left.id == "p2"
        log.add(answered("p2"))
    assert path.read_bytes() == whole


@pytest.mark.fault("locks", "answers that two processes wrote twice", "each counts once")
def test_answers_that_stand_twice_count_once_and_are_taken_out(tmp_path: Path) -> None:
    path, some = tmp_path / "samples.jsonl", problems(3)
    with SampleLog(path, digests(some)) as log:
        for problem in some:
            log.add(answered(problem.id, text="first"))
    whole = path.read_bytes()
    last = whole.replace(b"first", b"again")
    path.write_bytes(whole + last)
    with SampleLog(path, digests(some)) as log:
        assert [entry.sample.text for entry in log.entries.values()] == ["again"] * 3
        assert not [*log.unanswered(map(Request.of, some))]
    assert path.read_bytes() == last


@pytest.mark.parametrize("change", [{"tokens": "many"}, {"stop": "tired"}])
def test_a_line_that_is_no_sample_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    path, some = tmp_path / "samples.jsonl", problems(1)
    with SampleLog(path, digests(some)) as log:
        log.add(answered())
    path.write_text(json.dumps(read_jsonl(path)[0] | change) + "\n")
    with pytest.raises(DataError, match="sample 1 cannot be read"), SampleLog(path, digests(some)):
        pass


def test_other_settings_are_refused_unless_nothing_was_answered(tmp_path: Path) -> None:
    path, some = tmp_path / "samples.jsonl", problems(1)
    with SampleLog(path, digests(some), settings={"model": "typo", "seed": 1}):
        pass
    with SampleLog(path, digests(some), settings={"model": "m", "seed": 1}) as log:
        log.add(answered())
    with (
        pytest.raises(RunFolderError, match="model was 'm', is 'n'"),
        SampleLog(path, digests(some), settings={"model": "n", "seed": 1}),
    ):
        pass
    assert read_json(tmp_path / "settings.json") == {"model": "m", "seed": 1}


def test_an_answer_to_an_edited_problem_is_refused_or_asked_again(tmp_path: Path) -> None:
    path, some = tmp_path / "samples.jsonl", problems(2)
    with SampleLog(path, digests(some)) as log:
        log.add(answered("p0"))
        log.add(answered("p1"))
    some[0] = replace(some[0], question="What is 7 + 2 ?")
    with pytest.raises(UserError, match="'p0' is to another question"), SampleLog(path, digests(some)):
        pass
    with SampleLog(path, digests(some), may_change=True) as log:
        assert [request.id for request in log.unanswered(map(Request.of, some))] == ["p0"]
        log.add(answered("p0", text="9"))
    with SampleLog(path, digests(some), may_change=True) as log:
        assert log.entries["p0", 0, 0].sample.text == "9"
    with SampleLog(path, digests(some[1:])) as log:
        assert list(log.entries) == [("p1", 0, 0)], "answers to other problems stay in the file"
    assert len(read_jsonl(path)) == 3


def test_a_finished_log_takes_further_columns(tmp_path: Path) -> None:
    path, some = tmp_path / "samples.jsonl", problems(2)
    with SampleLog(path, digests(some)) as log:
        log.add(answered("p0"))
        log.add(answered("p1"), {"correct": False})
    annotate(path, {("p1", 0, 0): {"rules": {"own": 1}}})
    with SampleLog(path, digests(some)) as log:
        assert dict(log.entries["p1", 0, 0].added) == {"correct": False, "rules": {"own": 1}}
        assert not log.entries["p0", 0, 0].added


PROGRAM = """
import sys
from pathlib import Path
from rlcs.generation import SampleLog, open_sampler
from rlcs.recipe.schema import Endpoint
from rlcs.records import Problem, Request, Sampling

url, path = sys.argv[1:]
some = [Problem(id=f"p{n}", source="mine", question=f"What is {n} + 1 ?", answer="1") for n in range(150)]
server = Endpoint(base_url=url, model="m", concurrency=8)
with open_sampler(server, Sampling(max_new_tokens=9)) as sampler:
    with SampleLog(Path(path), {p.id: p.digest for p in some}, settings={"model": "m"}) as log:
        for sample in sampler.samples(log.unanswered(Request.of(p, index=i) for p in some for i in range(2))):
            log.add(sample)
"""


def test_killed_and_started_again_nothing_answered_is_asked_twice(tmp_path: Path) -> None:
    path, script = tmp_path / "samples.jsonl", tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    with LoopbackServer(answer=last_text, faults={"is 7 ": ["500"]}, delay_s=0.03) as server:
        command = [sys.executable, "-W", "ignore", str(script), server.url, str(path)]
        for wanted in (60, 160):
            process = warm.Popen(command)
            while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < wanted):
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        warm.run(command, check=True)
        asked = Counter((last_text(body), body["seed"]) for body in server.seen)
        assert 300 <= len(server.seen) <= 300 + 1 + 2 * 2 * 8, "what was under way at a kill, and one fault"
        assert len(asked) == 300
    rows = read_jsonl(path)
    assert len({(row["id"], row["index"]) for row in rows}) == len(rows) == 300
    assert all(f"What is {row['id'][1:]} + 1 ?" in row["response"] for row in rows)
    assert path.read_text().count("\n") == 300 and json.loads(path.read_text().splitlines()[-1])
