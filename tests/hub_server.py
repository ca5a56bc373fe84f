"""A Hugging Face hub on loopback that keeps what it is sent: real HTTP, real client, no disk.

It speaks what an upload needs: create a repository, say which files are large, take those by LFS, a commit of
the rest. `with HubServer() as hub:` and HF_ENDPOINT=hub.url; then `hub.repos`, `hub.files`, `hub.seen`.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

COMMIT = "0" * 40


class HubServer:
    """Serves in a thread of its own; a context manager."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.repos: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.refuse = 0

    def __enter__(self) -> Self:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def answer(self, reply: object, status: int = 200) -> None:
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                hub.seen.append(self.path)
                self.answer({"id": "me/mine", "sha": COMMIT, "siblings": [], "name": "me", "type": "user"})

            def do_PUT(self) -> None:
                hub.seen.append(self.path)
                data = self.rfile.read(int(self.headers["Content-Length"]))
                assert hashlib.sha256(data).hexdigest() == self.path.rsplit("/", 1)[1]
                hub.large[self.path.rsplit("/", 1)[1]] = data
                self.answer({})

            def do_POST(self) -> None:
                hub.seen.append(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if hub.refuse:
                    return self.answer({"error": "not yours"}, hub.refuse)
                self.answer(hub.post(self.path, body))

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def post(self, path: str, body: bytes) -> object:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            visibility = asked.get("visibility")
            private = asked.get("private", visibility == "private")
            self.repos[name] = {"private": private, "type": asked.get("type") or "model"}
            return {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return {"warnings": [], "errors": []}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": mode[f["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for f in files
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {
                "transfer": "basic",
                "objects": [
                    {
                        **o,
                        "authenticated": True,
                        "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}},
                    }
                    for o in objects
                ],
            }
        assert "/commit/" in path, path
        for line in body.splitlines():
            said = json.loads(line)
            value = said["value"]
            if said["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif said["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]
        return {
            "commitUrl": f"{self.url}/me/mine/commit/{COMMIT}",
            "commitOid": COMMIT,
            "pullRequestUrl": None,
        }
