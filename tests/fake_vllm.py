#!/usr/bin/env python3
"""A program that is called like `vllm serve`, speaks its protocol, and misbehaves when told to.

`serve FOLDER --port N ...`: the answer to a prompt is the name of the weights folder that it loaded, letter
by letter, as ids, or of the adapter's folder where one was asked for by its name. Beside that folder's parent
lies `behaviour.json`, or where FAKE_VLLM says: `{"die_after": 3, ...}`. With `varied` answers depend on the
seed alone; with `tail: [8, 2.0]` one prompt in eight takes two seconds.
"""

import base64
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

if sys.argv[1:] == ["--version"]:
    sys.stdout.write("INFO: some library says something first\n0.32.1\n")
    sys.exit()
FOLDER = Path(sys.argv[2])
PORT = int(sys.argv[sys.argv.index("--port") + 1])
BEHAVIOUR = Path(os.environ.get("FAKE_VLLM", FOLDER.parent.parent / "behaviour.json"))
STATE = {"folder": str(FOLDER), "version": "default", "paused": False, "asked": 0, "adapters": {}}
SLEEPS = "--enable-sleep-mode" in sys.argv
ASLEEP = {"weights": False, "kv_cache": False}
RANK = int(sys.argv[sys.argv.index("--max-lora-rank") + 1]) if "--enable-lora" in sys.argv else 0
SWITCH = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def behaviour() -> dict:
    return json.loads(BEHAVIOUR.read_text()) if BEHAVIOUR.exists() else {}


def once(name: str) -> bool:
    """Whether this misdeed is due: after `name` requests, once in the run."""
    due = behaviour().get(name)
    mark = BEHAVIOUR.with_name(f"{name}.done")
    if due is None or STATE["asked"] < due:
        return False
    try:
        mark.touch(exist_ok=False)  # by one thread of one server
    except FileExistsError:
        return False
    return True


def tokens_of(url: str) -> int:
    """Tokens of the PNG in a data URI, for an image that needs no resizing."""
    head = base64.b64decode(url.partition(",")[2][:64])
    width, height = struct.unpack(">II", head[16:24])
    return (width // 28) * (height // 28)


def routes(tokens: int) -> dict[str, str]:
    """Experts of so many tokens, the last of each layer, in the format of NumPy, where they are wanted."""
    if "--enable-return-routed-experts" not in sys.argv:
        return {}
    text = json.loads((FOLDER / "config.json").read_text())["text_config"]
    few, layers = text["num_experts_per_tok"], text["num_hidden_layers"]
    row = bytes(range(8 - few, 8)) * layers
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({tokens}, {layers}, {few}), }}".ljust(117)
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + head.encode() + b"\n" + row * tokens
    return {"routed_experts": base64.b64encode(data).decode()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def note(self, kind, folder):
        with BEHAVIOUR.with_name("loaded.txt").open("a") as file:
            file.write(f"{kind} {Path(folder).name}\n")

    def reply(self, obj, status=200, raw=False):
        data = obj.encode() if raw else json.dumps(obj).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/weight_info" and once("deaf_after"):  # its engine died, and the rest waits for it
            STATE["deaf"] = True
            time.sleep(120)
        if path == "/health" and "deaf" in STATE:
            return self.reply({}, 503)
        known = {
            "/health": {},
            "/version": {"version": behaviour().get("version", "0.32.1")},
            "/weight_info": {"weight_version": STATE["version"]},
            "/server_info": {
                "vllm_config": {
                    "model_config": {
                        "logprobs_mode": behaviour().get("mode", "processed_logprobs"),
                        "max_model_len": behaviour().get("room", 1 << 20),
                    },
                    "lora_config": {"max_lora_rank": RANK} if RANK else None,
                },
                "vllm_env": {SWITCH: os.environ.get(SWITCH) == "1"},
            },
            "/v1/models": {
                "data": [
                    {"id": STATE["folder"], "parent": None},
                    *({"id": name, "parent": STATE["folder"]} for name in STATE["adapters"]),
                ]
            },
        }
        self.reply(known.get(path, {}), 200 if path in known else 404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        path, _, words = self.path.partition("?")
        query = dict(pair.split("=") for pair in words.split("&") if pair)
        if path == "/inference/v1/generate":
            return self.generate(body)
        if path == "/collective_rpc":
            assert STATE["paused"] and body["method"] == "reload_weights" and not ASLEEP["weights"]
            STATE["folder"] = body["kwargs"]["weights_path"]
            assert (Path(STATE["folder"]) / "model.safetensors").exists()
            self.note("model", STATE["folder"])
        elif path == "/v1/load_lora_adapter":
            folder = Path(body["lora_path"])
            rank = json.loads((folder / "adapter_config.json").read_text())["r"]
            assert STATE["paused"] and rank <= RANK and (folder / "adapter_model.safetensors").exists()
            assert not STATE["adapters"], "vLLM would make room for one by dropping another"
            STATE["adapters"][body["lora_name"]] = body["lora_path"]
            self.note("adapter", body["lora_path"])
            return self.reply("Success: the answer is no JSON", raw=True)
        elif path == "/v1/unload_lora_adapter":
            del STATE["adapters"][body["lora_name"]]
        elif path == "/init_weight_transfer_engine":
            assert "--weight-transfer-config" in sys.argv and "connected" not in STATE
            STATE["connected"] = body["init_info"]
        elif path == "/shutdown_weight_transfer_engine":
            del STATE["connected"]
        elif path == "/start_weight_update":
            assert STATE["paused"] and not ASLEEP["weights"] and STATE["connected"]
            STATE["received"] = []
        elif path == "/update_weights":
            if once("dead_receiving"):
                os._exit(1)
            STATE["received"] += body["update_info"]["names"]
        elif path == "/finish_weight_update":
            STATE.update(version=body["weight_version"], folder=f"/sent/{body['weight_version']}")
            BEHAVIOUR.with_name("received.json").write_text(json.dumps(STATE.pop("received")))
            self.note("sent", STATE["folder"])
        elif path == "/update_weight_version":
            STATE["version"] = body["new_version"]
        elif path in ("/pause", "/resume"):
            STATE["paused"] = path == "/pause"
            self.tell(path[1:])
        elif path == "/sleep":
            return self.sleep(int(query["level"]))
        elif path == "/wake_up":
            assert ASLEEP[query["tags"]]
            if once("dead_waking"):
                os._exit(1)
            ASLEEP[query["tags"]] = False
            STATE["paused"] = any(ASLEEP.values())
            self.tell(f"wake {query['tags']}")
        self.reply({})

    def tell(self, what):
        with BEHAVIOUR.with_name("paused.txt").open("a") as file:
            file.write(f"{what}\n")

    def sleep(self, level):
        """Level 2 forgets the weights; asking before they are loaded again is a mistake."""
        assert SLEEPS and not any(ASLEEP.values())
        if once("dead_sleeping"):
            os._exit(1)
        if level == 2:
            assert STATE["version"] == "discarded"
            STATE["folder"] = "/forgotten"
        ASLEEP.update(weights=True, kv_cache=True)
        STATE["paused"] = True
        self.tell(f"sleep {level}")
        self.reply({"status": "sleeping"})

    def generate(self, body):
        assert not STATE["paused"] and not any(ASLEEP.values())
        STATE["asked"] += 1
        if once("die_after"):
            os.kill(os.getpid(), signal.SIGKILL)
        if once("hang_after"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if once("forget_after"):  # what a restart from outside looks like
            STATE.update(version="default", adapters={})
        if once("fail_after"):
            return self.reply({"error": "busy"}, 503)
        if "refuse" in behaviour():
            return self.reply({"error": "too long"}, 400)
        if body.get("model", STATE["folder"]) not in [STATE["folder"], *STATE["adapters"]]:
            return self.reply({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        params = body["sampling_params"]
        every, seconds = behaviour().get("tail", (1, behaviour().get("slow", 0.01)))
        time.sleep(seconds if params["seed"] % every == 0 else behaviour().get("slow", 0.01))
        placeholder = behaviour().get("placeholder")
        sizes = iter([tokens_of(part["url"]) for part in body["content_parts"]])
        prompt = []
        for index in body["token_ids"]:
            prompt += [index] * (behaviour().get("expand") or next(sizes) if index == placeholder else 1)
        by = STATE["adapters"].get(body.get("model"), STATE["folder"])
        named = [ord(letter) for letter in Path(by).name]
        choices = []
        for index in reversed(range(params["n"])):
            ids = named
            if "varied" in behaviour():  # other ones for each seed, whatever the weights
                draw = random.Random(params["seed"] + index)
                ids = [draw.randrange(60, 123) for _ in range(draw.randrange(3, 24))]
            choices.append(
                {
                    "index": index,
                    "finish_reason": "abort" if once("abort_after") else "stop",
                    "token_ids": ids,
                    "logprobs": {
                        "content": [{"token_id": i, "logprob": -0.5, "top_logprobs": []} for i in ids]
                    },
                    "weight_versions": [{"version": STATE["version"], "start": 0, "end": len(ids)}],
                    **routes(len(prompt) + len(ids) - 1),
                }
            )
        model = body.get("model", STATE["folder"])
        self.reply({"prompt_token_ids": prompt, "choices": choices, "pid": os.getpid(), "model": model})


if __name__ == "__main__":
    (BEHAVIOUR.parent / f"started-{os.getpid()}.json").write_text(
        json.dumps({"argv": sys.argv, "devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid()})
    )
    if "engine" in behaviour():  # a child that outlives us
        engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
        (BEHAVIOUR.parent / f"engine-{engine.pid}").touch()
    if "mute" in behaviour():  # what a mistyped flag does
        sys.exit("vllm: error: unrecognized arguments: --mistyped")
    if "first_alone" in behaviour() and "vllm-1" in str(Path("/proc/self/fd/1").readlink()):
        time.sleep(600)  # never up
    if "broken" in behaviour():
        told = behaviour()["broken"]
        last = "ValueError: no such model architecture" if told is True else told
        sys.exit(f"{last}\nRuntimeError: something failed")
    ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
