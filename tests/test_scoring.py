"""A teacher on a server: ids with images in, logprobs of the answer out, through sockets, with faults."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
import torch
from PIL import Image

from conftest import make_problem
from rlcs.engines import openai_client
from rlcs.engines.vllm.scoring import ScoringServer
from rlcs.errors import EndpointError
from rlcs.model.packing import pack
from rlcs.model.policy import score
from rlcs.recipe.objectives import OnlineTeacher
from rlcs.records.trees import Branch, Tree

KEY = "sk-very-secret-key"


@contextmanager
def server(vlm, chat, *, faults=(), change=lambda reply: reply):
    """vLLM's endpoint as far as it is used, over the model: placeholders expand to what an image's size says.

    Each of `faults` answers one request: a status, or `cut` for a reply that ends early.
    """
    seen, left = [], list(faults)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers["Authorization"], body))
            fault = left.pop(0) if left else 200
            if self.path != "/inference/v1/generate":
                fault = 404
            text = json.dumps(self.scored(body) if fault == 200 else {"error": {"message": f"no, {KEY}"}})
            self.send_response(200 if fault == "cut" else fault)
            self.send_header("Content-Length", str(len(text) + 100 * (fault == "cut")))
            self.end_headers()
            self.wfile.write(text.encode())

        def scored(self, body):
            urls = iter(part["url"] for part in body["content_parts"])
            ids = []
            for index in body["token_ids"]:
                size = 1
                if index == chat.image_id:
                    image = Image.open(BytesIO(base64.b64decode(next(urls).partition(",")[2])))
                    size = (image.width // 28) * (image.height // 28)
                ids += [index] * size
            entries = [None, *({str(i): {"logprob": -0.01 * (i % 97) - 0.001 * k}} for k, i in
                               enumerate(ids[1:], 1))]  # fmt: skip
            assert body["sampling_params"] == {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
            return change({"prompt_token_ids": ids, "prompt_logprobs": entries})

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", seen
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def packs_of(chat):
    """Two packs: an image, two with answers that begin alike, and a text with an answer that forks."""
    plain = [Branch(ids=ids, weights=(1.0,) * len(ids)) for ids in ((30, 31, 32), (40, 41))]
    forked = [Branch(ids=(30, 31), weights=(1.0, 1.0)), Branch(ids=(50,), weights=(1.0,), parent=0)]
    alike = [Branch(ids=(*range(30, 50), last), weights=(1.0,) * 21) for last in (60, 61)]
    trees = [
        Tree(
            prompt=chat.prompt(make_problem(name, sizes=sizes)),
            branches=tuple(branches),
            merges=branches is alike,
        )
        for name, sizes, branches in (
            ("a", ((56, 84),), plain), ("b", ((84, 56), (56, 56)), alike), ("c", (), forked)
        )
    ]  # fmt: skip
    assert trees[1].num_tokens == len(trees[1].prompt.ids) + 22
    return [pack(trees[:2], chat.patches), pack(trees[2:], chat.patches)], trees


def opened(url, chat, **settings):
    endpoint = OnlineTeacher(base_url=url, model="teacher", key_env="TEACHER_API_KEY", **settings).endpoint
    return ScoringServer(endpoint, chat)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    monkeypatch.setattr(openai_client, "FIRST_WAIT_S", 0.01)


def test_every_token_gets_its_own_logprob_behind_its_own_path(vlm, chat):
    """Also after faults that pass; images come in the size in which the policy sees them."""
    packs, trees = packs_of(chat)
    with server(vlm, chat, faults=(503, "cut", 429)) as (url, seen):
        found = opened(url, chat, concurrency=3).logprobs(packs, temperature=1.0)
    expected = []
    for tree in trees:
        for index in range(len(tree.branches)):
            path = [i for k in tree.path(index) for i in tree.branches[k].ids]
            ids = [*tree.prompt.ids, *path]
            own = len(tree.branches[index].ids)
            expected += [-0.01 * (i % 97) - 0.001 * k for k, i in enumerate(ids)][-own:]
    torch.testing.assert_close(torch.cat(found), torch.tensor(expected))
    assert [len(each) for each in found] == [p.num_targets for p in packs]
    assert len(seen) == 6 + 3 and {headers for _, headers, _ in seen} == {f"Bearer {KEY}"}
    assert [score(vlm, p).logprobs.shape for p in packs] == [each.shape for each in found]


@pytest.mark.parametrize(
    ("faults", "change", "message"),
    [
        ((404,), None, "HTTP 404.*no model 'teacher'"),
        ((401,), None, "the server refuses the key"),
        ((400,), None, "does not score an answer: HTTP 400"),
        ((503,) * 3, None, r"does not score an answer: HTTP 503.*, in 2 attempts"),
        ((), lambda r: {**r, "prompt_token_ids": r["prompt_token_ids"][1:]}, "or as other ones"),
        ((), lambda r: {**r, "prompt_logprobs": None}, "the reply has no logprobs of the prompt"),
        ((), lambda r: {**r, "prompt_logprobs": [{}] * len(r["prompt_logprobs"])}, "no logprob of a token"),
    ],
)
def test_a_server_that_cannot_teach_is_an_error_without_its_key(vlm, chat, faults, change, message):
    packs, _ = packs_of(chat)
    with (
        server(vlm, chat, faults=faults, change=change or (lambda reply: reply)) as (url, _),
        pytest.raises(EndpointError, match=message) as raised,
    ):
        opened(url, chat, concurrency=1, max_retries=1).logprobs(packs, temperature=1.0)
    assert KEY not in f"{raised.value} {raised.value.fix}"


def test_a_server_that_is_not_there_is_named(chat):
    packs, _ = packs_of(chat)
    with pytest.raises(EndpointError, match=r"does not score an answer: .*in 2 attempts"):
        opened("http://127.0.0.1:9/v1", chat, max_retries=1).logprobs(packs, temperature=1.0)
