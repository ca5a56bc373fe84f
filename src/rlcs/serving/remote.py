"""Talks to a model in another program: any OpenAI-compatible server, or a vLLM that is started here.

`rlcs serve` can replace itself by such a vLLM; for `rlcs chat` both kinds answer like a local `Session`.
"""

import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai

from rlcs.data.decoder import ImageDecoder
from rlcs.data.images import DECODE_LIMIT
from rlcs.data.sent_images import SentImages
from rlcs.engines.connection import UnreadableReply, address, connect_blocking
from rlcs.engines.openai_client import content, status_error, status_fault
from rlcs.engines.providers import Fields
from rlcs.engines.vllm.process import Process
from rlcs.engines.vllm.server import RECURRENT_DTYPES, Launch, flags
from rlcs.errors import EndpointError, ModelError, UserError
from rlcs.model.delta_net import is_recurrent
from rlcs.model.loading import default_device, load_config, resolve
from rlcs.patience import OwnTime, Patience
from rlcs.recipe.sampling import Endpoint, Rollouts
from rlcs.recipe.schema import Images
from rlcs.records import Message, Sampling
from rlcs.redaction import without_keys
from rlcs.serving.defaults import SamplingDefaults
from rlcs.serving.image_sources import ImageHosts
from rlcs.serving.session import Settings, as_message

CONNECT_S = 10.0
"""Seconds in which a server must accept the connection."""
NOT_KNOWN = ("--queue", "--max-tokens", "--max-pixels", "--max-body-bytes", "--request-s")
"""Options of the built-in server that vLLM does not have."""
_NO_HOST = ("nowhere.invalid",)
"""Without hosts, images must come as `data:` URLs: the server downloads nothing for its clients."""
_POLL_S = 0.5


class RemoteStream(Iterator[str]):
    """Pieces of one answer as they arrive; separately sent reasoning is put in <think> tags."""

    def __init__(self, chunks: "openai.Stream[Any]", server: Endpoint) -> None:
        """`close` cancels the answer: the server then stops."""
        self._chunks, self._server, self._thinks = chunks, server, False

    def __next__(self) -> str:
        """The next piece that is not empty. Raises EndpointError."""
        while True:
            with _as_endpoint_error(self._server):
                chunk = next(self._chunks)
            delta = chunk.choices[0].delta if chunk.choices else None
            thought = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None) or ""
            text = getattr(delta, "content", None) or ""
            if thought and not self._thinks:
                self._thinks, thought = True, f"<think>{thought}"
            elif text and self._thinks:
                self._thinks, text = False, f"</think>\n{text}"
            if thought or text:
                return f"{thought}{text}"

    def close(self) -> None:
        """Close the connection."""
        self._chunks.close()


class RemoteSession:
    """A model on a server, for several threads at once."""

    def __init__(self, server: Endpoint, *, key: str | None = None) -> None:
        """Without a model's name the server's first is used. Raises EndpointError.

        The key is that of `server.key_env` unless one is given.
        """
        place = address(server.base_url)
        limits = openai.Timeout(server.request_timeout_s, connect=CONNECT_S)
        self._client = connect_blocking(server, place, limits)
        if key is not None:
            self._client.api_key = key
        self._decoder = ImageDecoder()  # a page's visitors give the images
        self._images = SentImages(max_pixels=Images().max_pixels, decode=self._decoder.open_image)
        with _as_endpoint_error(server):
            known = [model.id for model in self._client.models.list()]
        self.name = server.model or next(iter(known), "")
        self._server = server.model_copy(update={"model": self.name})
        self._fields = Fields(self._server)
        if self.name not in known:
            fix = f"it has {', '.join(known) or 'none'}"
            raise EndpointError(f"no model is called {server.model!r}", where=server.base_url, fix=fix)

    def stream(self, messages: Sequence[Message | Mapping[str, Any]], settings: Settings) -> RemoteStream:
        """Answer a conversation, piece by piece: see `Session.stream`. Raises EndpointError, DataError."""
        measure = self._decoder.measured
        turns = [as_message(message, limit=DECODE_LIMIT, measure=measure) for message in messages]
        contents: list[Any] = [{"role": turn.role, "content": content(turn, self._images)} for turn in turns]
        sampling = Sampling(
            temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens
        )
        with _as_endpoint_error(self._server):
            while True:
                fields = self._fields.body(sampling, settings.seed)
                try:
                    chunks = self._client.chat.completions.create(
                        model=self.name, messages=contents, stream=True, extra_body=fields
                    )
                    return RemoteStream(chunks, self._server)
                except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                    if not self._fields.learn(status_fault(error), fields):
                        raise


@contextmanager
def _as_endpoint_error(server: Endpoint) -> Iterator[None]:
    """Turn errors of the client into EndpointError."""
    try:
        yield
    except openai.APIStatusError as error:
        failure = status_error(error, server)
        if not isinstance(failure, EndpointError):
            failure = EndpointError(str(failure), where=server.base_url, fix="change what it names")
        raise failure from error
    except (openai.OpenAIError, httpx.HTTPError, UnreadableReply, ValueError, RecursionError) as error:
        if isinstance(error.__cause__, EndpointError):  # a redirect that is not followed
            raise error.__cause__ from error
        what = f"the server does not answer, or not to the end ({error.__cause__ or error})"[:500]
        fix = "start it, correct the URL and its port, or see its log"
        raise EndpointError(what, where=server.base_url, fix=fix) from error


@dataclass(frozen=True, kw_only=True)
class Serving(Launch):
    """Settings to start vLLM for clients: `name` is the model's name for them, `key` their API key.

    With the `defaults` of the model's folder, requests that leave a setting out get those.
    """

    name: str
    host: str = "127.0.0.1"
    max_images: int = 8
    key: str | None = None
    image_hosts: ImageHosts = field(default_factory=ImageHosts)
    cors_origins: tuple[str, ...] = ()
    tool_parser: str | None = None
    defaults: SamplingDefaults | None = None

    def __post_init__(self) -> None:
        """Raises UserError for image hosts that vLLM would not understand."""
        if odd := [name for name in self.image_hosts.names if "*" in name or ":" in name]:
            fix = "name each host, or take --engine local"
            raise UserError(
                f"vLLM knows hosts by their whole names, not {odd[0]}", where="--image-host", fix=fix
            )

    def command(self, folder: Path, port: int) -> list[str]:
        """The command line, which does not contain the key."""
        address = {"host": self.host, "port": port, "served_model_name": self.name}
        limits = {"limit_mm_per_prompt": {"image": self.max_images, "video": 0, "audio": 0}}
        words = flags({**address, **self.arguments, **limits, **self._sampling, **self._access})
        return [self.settings.executable, "serve", str(folder), *words]

    @property
    def _sampling(self) -> dict[str, Any]:
        """Arguments about requests without sampling settings; vLLM does not read `do_sample: false`."""
        if self.defaults is None:
            return {}
        greedy = {"override_generation_config": {"temperature": 0}}
        return {"generation_config": "auto", **(greedy if self.defaults.temperature == 0 else {})}

    @property
    def _access(self) -> dict[str, Any]:
        """Arguments about who may ask for what."""
        tools = {"enable_auto_tool_choice": True, "tool_call_parser": self.tool_parser}
        return {
            "allowed_media_domains": list(self.image_hosts.names or _NO_HOST),
            "allowed_origins": json.dumps(self.cors_origins),
            **(tools if self.tool_parser else {}),
        }

    def environment(self, index: int) -> dict[str, str]:
        """The environment, with its key alone and without usage statistics and redirects of images."""
        safe = {"VLLM_NO_USAGE_STATS": "1", "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}
        return without_keys(os.environ) | safe | ({"VLLM_API_KEY": self.key} if self.key else {})


def serving(
    program: str, model: str, *, key: str | None, name: str | None = None, share: float | None = None
) -> Serving:
    """Settings to serve a model: in the number format of `load`, with the context length that fits (-1).

    On a CPU vLLM has kernels for some models in another format alone.
    """
    on_cpu = default_device().type == "cpu"
    recurrent = False
    if on_cpu:
        with suppress(ModelError):  # vLLM says what is wrong with a model that cannot be loaded
            recurrent = is_recurrent(load_config(model))
    formats = RECURRENT_DTYPES if recurrent else ("float32",)
    return Serving(
        settings=Rollouts(executable=program, memory_share=share),
        dtype=formats[0] if on_cpu else "bfloat16",
        max_tokens=-1, max_rows=32, on_cpu=on_cpu, name=name or model, key=key, is_recurrent=recurrent,
    )  # fmt: skip


@contextmanager
def open_vllm(program: str, model: str, *, share: float | None) -> Iterator[RemoteSession]:
    """Start a vLLM for this process alone, on a `share` of a GPU, until the end. Raises ModelError."""
    launch = serving(program, model, key=secrets.token_hex(16), share=share)
    with tempfile.TemporaryDirectory() as logs:
        command = partial(launch.command, Path(resolve(model)))
        process = Process(command, launch.environment(0), Path(logs) / "vllm.log")
        try:
            limits = launch.settings
            patience = Patience(OwnTime(process.pid, 1.0), limits.start_limit_s)
            while not _is_well(process.url, limits.health_limit_s):
                if not process.runs or patience.is_over:
                    fix = "--engine local takes the engine that comes with rlcs"
                    raise ModelError(f"vLLM does not start:\n{process.last_errors}", where=model, fix=fix)
                time.sleep(_POLL_S)
            yield RemoteSession(Endpoint(base_url=f"{process.url}/v1", model=model), key=launch.key)
        finally:
            process.end(at_once=False)


def _is_well(url: str, limit_s: float) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=limit_s, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
