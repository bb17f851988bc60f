"""A hub with one dataset. Like the real one, it answers `resolve` by a redirect to a signed URL of a store on another port."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c0ffee" * 6 + "c0ff"
NAME = "owner/robot"
_ENDLESS = str(1 << 50)


class SigningHub:
    """Serves a folder as hf://datasets/owner/robot. `url`: the hub. Counts `resolved` and `reads` by path.

    signature  that signed URLs must have; changing it makes all earlier ones expire
    whole      whether the store ignores ranges, and sends each file over and over again without an end
    limited    answers 429 to so many requests, each with a quota that is renewed at once
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signature, self.limited, self.whole = "one", 0, False
        self.resolved: list[str] = []
        self.reads: list[tuple[str, str]] = []
        self.keys: list[str] = []  # what the store was sent as Authorization
        self._servers = [self._serve(self._hub), self._serve(self._store)]
        self.url, self._store_url = (f"http://127.0.0.1:{s.server_address[1]}" for s in self._servers)

    def _serve(self, answer: Any) -> ThreadingHTTPServer:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                status, headers, body = answer(self)
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(ConnectionError):
                    while self.command == "GET":
                        self.wfile.write(body)
                        if headers.get("Content-Length") != _ENDLESS:
                            break

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def __enter__(self) -> SigningHub:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}

    def _hub(self, request: Any) -> tuple[int, dict[str, str], bytes]:
        path = unquote(urlsplit(request.path).path)
        if found := re.fullmatch(rf"/datasets/{NAME}/resolve/(\w+)/(.*)", path):
            if self.limited:
                self.limited -= 1
                return 429, {"RateLimit": '"resolvers";r=0;t=0'}, b""
            self.resolved.append(found[2])
            data = self._files().get(found[2])
            if data is None:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data)), "X-Linked-Etag": _etag(data)}
            return 302, headers | {"Location": f"{self._store_url}/{found[2]}?Signature={self.signature}"}, b""
        if path.startswith(f"/api/datasets/{NAME}/tree/"):
            entries = [
                {"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in sorted(self._files().items())
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        if path.startswith(f"/api/datasets/{NAME}"):
            return 200, {"Content-Type": "application/json"}, json.dumps({"id": NAME, "sha": COMMIT}).encode()
        return 404, {}, b""

    def _store(self, request: Any) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(request.path)
        self.keys.append(request.headers.get("Authorization", ""))
        if parts.query != f"Signature={self.signature}":
            return 403, {}, b""
        path = unquote(parts.path)[1:]
        data, wanted = self._files()[path], request.headers["Range"]
        self.reads.append((path, wanted))
        if self.whole:
            return 200, {"Content-Length": _ENDLESS}, data
        first, last = (int(x) for x in re.findall(r"\d+", wanted))
        part = data[first : last + 1]
        return 206, {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"}, part


@contextmanager
def hub_of(folder: Path) -> Iterator[SigningHub]:
    """A hub that serves a folder, and the environment that names it."""
    with SigningHub(folder) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_TOKEN", "hf_owner_secret")
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield server


def _etag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()}"'
