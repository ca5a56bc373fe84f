"""A server that speaks vLLM's protocol and computes with a real model, with the faults that a test gives it.

Requests are answered by our own engine: ids with one placeholder an image are expanded as the server's own
image processor says, images are decoded from the request, weights are loaded from the folder that is sent.
"""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from rlcs.data.images import image_from_bytes
from rlcs.engines.local import LocalEngine
from rlcs.model import loading
from rlcs.recipe.schema import Images, Model
from rlcs.records import ImageRef, Message, Prompt, Sampling

CPU = torch.device("cpu")
LOADING = threading.Lock()
"""Transformers loads one model at a time."""


class ModelServer:
    """`changed` sees each image before the model; `stale`: weights are named, but not loaded."""

    def __init__(
        self,
        folder: str,
        *,
        images: Images | None = None,
        changed: Callable[[ImageRef], ImageRef] = lambda ref: ref,
        stale: bool = False,
    ) -> None:
        self.version, self.well, self.asked = "default", True, 0
        self._images, self._changed, self._stale = images or Images(), changed, stale
        self._load(folder)

    def _load(self, folder: str) -> None:
        with LOADING:
            vlm = loading.load(Model(name=folder), device=CPU)
        self._chat = loading.make_chat(vlm, images=self._images)
        self._engine = LocalEngine(vlm, self._chat, max_rows=8)

    def get(self, path: str) -> dict[str, Any]:
        return {
            "/health": {},
            "/version": {"version": "0.32.0"},
            "/weight_info": {"weight_version": self.version},
            "/server_info": {
                "vllm_config": {
                    "model_config": {
                        "logprobs_mode": "processed_logprobs",
                        "max_model_len": 1 << 20,
                        "dtype": "torch.float32",
                        "quantization": None,
                    }
                }
            },
        }[path]

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/inference/v1/generate":
            return self._generate(body)
        if path == "/collective_rpc" and not self._stale:
            self._load(body["kwargs"]["weights_path"])
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        return {}

    def _prompt(self, body: dict[str, Any]) -> Prompt:
        files = [base64.b64decode(part["url"].partition(",")[2]) for part in body["content_parts"]]
        images = [image_from_bytes(data, limit=10**7, where="request") for data in files]
        grids = [
            self._chat.conversation([Message(role="user", parts=(i,))], name="").grids[0] for i in images
        ]
        ids, spans, left = list[int](), list[tuple[int, int]](), iter(grids)
        for index in body["token_ids"]:
            size = 1
            if index == self._chat.image_id:
                frames, height, width = next(left)
                size = frames * height * width // 4
                spans.append((len(ids), len(ids) + size))
            ids += [index] * size
        return Prompt(
            problem_id="request",
            ids=tuple(ids),
            images=tuple(map(self._changed, images)),
            grids=tuple(grids),
            spans=tuple(spans),
            image_token_id=self._chat.image_id,
            merge_size=2,
        )

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked += 1
        params, prompt = body["sampling_params"], self._prompt(body)
        sampling = Sampling(
            max_new_tokens=params["max_tokens"],
            stop_ids=tuple(params["stop_token_ids"]),
            banned_ids=tuple(map(int, params["logit_bias"])),
            temperature=params["temperature"],
            seed=params["seed"],
        )
        [view] = self._engine.inspect([prompt], sampling, candidates=params["logprobs"])
        [seen] = view.prompts
        content = [
            {
                "token_id": row[0][0],
                "logprob": row[0][1],
                "top_logprobs": [{"token_id": i, "logprob": x} for i, x in row[: params["logprobs"]]],
            }
            for row in seen.candidates
        ]
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "token_ids": seen.ids,
            "logprobs": {"content": content},
            "weight_versions": [{"version": self.version}],
        }
        return {"prompt_token_ids": seen.prompt_ids, "choices": [choice], "model": "served"}


@contextmanager
def serving(*servers: ModelServer) -> Iterator[tuple[str, ...]]:
    """Serve on ports of their own; yields the URLs."""
    listening = []
    for server in servers:

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            model = server

            def log_message(self, *args: object) -> None:
                pass

            def _reply(self, found: dict[str, Any]) -> None:
                data = json.dumps(found).encode()
                self.send_response(200 if self.model.well else 503)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self._reply(self.model.get(self.path.partition("?")[0]))

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                self._reply(self.model.post(self.path.partition("?")[0], body))

        listening.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=listening[-1].serve_forever, daemon=True).start()
    try:
        yield tuple(f"http://127.0.0.1:{each.server_address[1]}" for each in listening)
    finally:
        for each in listening:
            each.shutdown()
            each.server_close()
