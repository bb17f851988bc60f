"""A small hub on loopback. It has the part of the Hugging Face Hub's HTTP interface that `huggingface_hub` needs to create a
repository, upload to it, list it and download from it. Everything is kept in memory.

    with Hub() as hub:
        hub.url, hub.repositories["owner/name"].files()

A key is `hf_OWNER_…`. Its user may write only to the repositories of OWNER, and sees private ones only there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin")  # stored by git-lfs


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


@dataclass
class Repository:
    name: str
    private: bool
    count: int = 0  # of all commits that there ever were
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)  # (id, file -> content), newest last

    titles: list[str] = field(default_factory=list)  # of the commits
    tags: dict[str, str] = field(default_factory=dict)  # name -> id of a commit

    def commit(self, files: dict[str, bytes], title: str = "initial commit") -> str:
        self.count += 1
        digest = hashlib.sha1(json.dumps([self.count, sorted(files)]).encode()).hexdigest()
        self.commits.append((digest, files))
        self.titles.append(title)
        return digest

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.at(revision)[1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        if revision == "main":
            return self.commits[-1]
        for commit in self.commits:
            if commit[0] == self.tags.get(revision, revision):
                return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Hub:
    """The server. `requests` logs (method, path, status). `refuse` maps the beginning of a path to the status of its answer."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.refuse: dict[str, int] = {}
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        self.body = self._read()
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.status = 0
        try:
            for start, status in self.hub.refuse.items():
                if parts.path.startswith(start):
                    raise Refused(status, "refused on purpose")
            for method, pattern, answer in _ROUTES:
                found = re.fullmatch(pattern, parts.path)
                if found and self.command in method.split("|"):
                    with self.hub.lock:
                        answer(self, *map(unquote, found.groups()))
                    break
            else:
                raise Refused(404, f"no route {self.command} {parts.path}")
        except Refused as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self._send(error.status, {"error": error.message}, headers)
        self.hub.requests.append((self.command, self.path, self.status))

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _send(
        self, status: int, value: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None
    ) -> None:
        data = raw if raw is not None else json.dumps(value).encode()
        self.status = status
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- users and their rights ---------------------------------------------------------------------------------------

    def _user(self) -> str:
        found = re.fullmatch(r"Bearer hf_([a-z]+)_\w+", self.headers.get("Authorization", ""))
        return found[1] if found else ""

    def _writable(self, name: str) -> None:
        if not self._user():
            raise Refused(401, "Invalid credentials in Authorization header")
        if name.split("/")[0] != self._user():
            raise Refused(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")

    def _repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self._user() != name.split("/")[0]):
            raise Refused(404 if self._user() else 401, "Repository not found", "RepoNotFound")
        return found

    # -- repositories -------------------------------------------------------------------------------------------------

    def _whoami(self) -> None:
        if not self._user():
            raise Refused(401, "Invalid credentials in Authorization header")
        self._send(200, {"type": "user", "name": self._user(), "orgs": [], "auth": {}})

    def _create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or self._user()}/{wanted['name']}"
        self._writable(name)
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": url})
            return
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        repository = self.hub.repositories[name] = Repository(name, private)
        repository.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self._send(200, {"url": url, "name": name, "id": name})

    def _info(self, name: str, revision: str = "main") -> None:
        repository = self._repository(name)
        commit, files = repository.at(revision)
        self._send(
            200,
            {
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": repository.private,
                "siblings": [{"rfilename": path} for path in sorted(files)],
                "tags": [],
            },
        )

    def _tree(self, name: str, revision: str) -> None:
        files = self._repository(name).files(revision)
        self._send(200, [self._entry(path, data) for path, data in sorted(files.items())])

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    # -- upload -------------------------------------------------------------------------------------------------------

    def _preupload(self, name: str, revision: str) -> None:
        self._writable(name)
        commit, files = self._repository(name).at(revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in files:
                data = files[path]
                answer["oid"] = hashlib.sha256(data).hexdigest() if mode == "lfs" else _git(data)
            answers.append(answer)
        self._send(200, {"files": answers, "commitOid": commit})

    def _lfs(self, name: str) -> None:
        self._writable(name)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/blobs/{wanted['oid']}"}}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _blob(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refused(400, "the content does not have this digest")
        self.hub.blobs[digest] = self.body
        self._send(200, {})

    def _commit(self, name: str, revision: str) -> None:
        self._writable(name)
        repository = self._repository(name)
        files, header = dict(repository.files(revision)), json.loads(self.body.splitlines()[0])["value"]
        if header.get("parentCommit", repository.commits[-1][0]) != repository.commits[-1][0]:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        for line in self.body.splitlines()[1:]:
            what, value = (json.loads(line)[k] for k in ("key", "value"))
            if what == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif what == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif what == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise Refused(400, f"unsupported operation {what}")
        commit = repository.commit(files, header["summary"])
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def _commits(self, name: str, revision: str) -> None:
        found = self._repository(name).commits
        self._send(
            200,
            [
                {"id": commit, "title": title, "date": "2026-01-01T00:00:00.000Z", "message": "", "authors": []}
                for title, (commit, _) in reversed([*zip(self._repository(name).titles, found)])
            ],
        )

    def _squash(self, name: str, revision: str) -> None:
        self._writable(name)
        repository = self._repository(name)
        files = repository.files(revision)
        repository.commits.clear()
        repository.titles.clear()
        repository.commit(files, "Super-squash branch 'main'")
        self._send(200, {})

    def _yaml(self) -> None:
        self._send(200, {"errors": [], "warnings": []})

    # -- download -----------------------------------------------------------------------------------------------------

    def _resolve(self, name: str, revision: str, path: str) -> None:
        commit, files = self._repository(name).at(revision)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self._send(404, {"error": "Entry not found"}, headers | missing)
            return
        data = files[path]
        digest = hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else _git(data)
        headers["ETag"] = f'"{digest}"'
        if path.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        self._send(200, raw=data, headers=headers | {"Content-Type": "application/octet-stream"})


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler._whoami),
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._yaml),
    ("GET", f"/api/models/{_NAME}", _Handler._info),
    ("GET", f"/api/models/{_NAME}/revision/([^/]+)", _Handler._info),
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)", _Handler._tree),
    ("POST", f"/api/models/{_NAME}/preupload/([^/]+)", _Handler._preupload),
    ("POST", f"/api/models/{_NAME}/commit/([^/]+)", _Handler._commit),
    ("GET", f"/api/models/{_NAME}/commits/([^/]+)", _Handler._commits),
    ("POST", f"/api/models/{_NAME}/super-squash/([^/]+)", _Handler._squash),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler._lfs),
    ("PUT", "/blobs/([0-9a-f]{64})", _Handler._blob),
    ("GET|HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler._resolve),
]
