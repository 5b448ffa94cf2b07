"""Servers on loopback: one that answers as the Hugging Face hub does to huggingface_hub, and a web server with faults."""

import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a1B2c3D4e5" * 4  # one that the hub knows, and that may read what is gated
STRANGER = "hf_" + "x9Y8z7W6v5" * 4  # one that it knows, of an account that has not accepted terms
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LoopbackServer:
    """A server with an address, stopped with its block."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "LoopbackServer":
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def hub(repositories: Mapping[str, Mapping[str, bytes]], gated: tuple[str, ...] = ()) -> LoopbackServer:
    """A hub with the files of data sets, by OWNER/NAME; those that are gated ask for a token."""

    class Handler(Quiet):
        requests: ClassVar[list[str]] = []

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            self.requests.append(path)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            parts = path.removeprefix("/api").strip("/").split("/")
            name = "/".join(parts[1:3])
            if token not in ("", TOKEN, STRANGER):
                self.answer(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
            elif parts[0] != "datasets" or name not in repositories:
                self.answer(401 if not token else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif name in gated and token != TOKEN and "resolve" in parts:
                self.answer(403 if token else 401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
            else:
                self._show(repositories[name], parts[3:])

        do_HEAD = do_GET

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer(200, b"[]")

        def _show(self, files: Mapping[str, bytes], parts: list[str]) -> None:
            match parts:
                case [] | ["revision", "main"]:
                    about = {"id": "x/y", "sha": COMMIT, "siblings": [], "tags": [], "private": False, "downloads": 0}
                    self._json({**about, "likes": 0, "gated": False, "disabled": False})
                case ["revision" | "tree", revision, *_] if revision != "main":
                    self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                case ["tree", "main", *folder]:
                    prefix = "/".join([*folder, ""])
                    names = [name for name in files if name.startswith(prefix) and "/" not in name[len(prefix) :]]
                    entries = [{"type": "file", "path": n, "size": len(files[n]), "oid": COMMIT} for n in names]
                    self._json(entries)
                case ["resolve", "main", *path] if "/".join(path) in files:
                    self._file(files["/".join(path)])
                case _:
                    self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

        def _json(self, content: Any) -> None:
            self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _file(self, data: bytes) -> None:
            about = {"ETag": '"abc"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            self.answer(200, data, about)

    server = LoopbackServer(Handler)
    server.requests = Handler.requests
    return server
