"""A Hugging Face Hub on the loopback interface, for the real `huggingface_hub` client: create a repository, commit
with LFS, list, resolve.

It keeps everything in memory, and every commit as a whole tree. [`HubServer.fail`] makes it fail as servers and
networks do. The client reads `HF_ENDPOINT` when it is imported, so tests that load models run it in a process of its
own, with [`HubServer.environment`]; for the rest there is [`HubServer.connect`].
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants


TOKEN = "hf_test"
USER = "tester"


@dataclass
class Fault:
    """What the next `times` requests that match get: a status, or, with status 0, a connection that is cut when half
    of their body has arrived."""

    pattern: str
    status: int
    times: int


class HubServer:
    """Used as a context manager; `repositories[repo_id]` is a list of commits `(sha, message, {path: bytes})`."""

    def __init__(self):
        self.repositories: dict[str, list[tuple[str, str, dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.lfs_paths: set[str] = set()
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.pauses: list[float] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def environment(self, home: str | Path) -> dict[str, str]:
        """What a client's process needs: this server as the Hub, a token, an empty cache."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}

    def connect(self, monkeypatch) -> None:
        """Leads the client of this process here, as far as it makes its `HfApi` from now on; pauses take no time."""
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: self.pauses.append(seconds))

    def fail(self, pattern: str, status: int, times: int = 10**9) -> None:
        """Makes requests fail whose `"METHOD /path"` has a regular expression in it; see [`Fault`]."""
        self.faults.append(Fault(pattern, status, times))

    def heal(self) -> None:
        self.faults.clear()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The newest commit's."""
        return self.repositories[repo_id][-1][2]

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if (status := self._fault(f"{self.command} {path}")) is not None:
            return self._fail(status)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for methods, pattern, answer in _ROUTES:
            if self.command in methods and (match := re.fullmatch(pattern, path)):
                token = self.headers.get("Authorization")
                if token not in (None, f"Bearer {TOKEN}") or (token is None and "write" in answer.__name__):
                    return self._json({"error": "Invalid credentials"}, 401)
                return answer(self, body, **match.groupdict())
        self._json({"error": f"no such route: {self.command} {path}"}, 404)

    def _fault(self, request: str) -> int | None:
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                return fault.status
        return None

    def _fail(self, status: int) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if status:
            self.rfile.read(length)
            return self._json({"error": "on purpose"}, status)
        self.rfile.read(length // 2)
        self.close_connection = True
        # Closed at once and for good: the client sees a reset, as when a cable is pulled.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, value, status=200):
        self._bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _bytes(self, content: bytes, status=200, headers=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _commit(self, repo_id, revision):
        """A commit by branch or sha, or an answer that it is missing."""
        for sha, message, files in reversed(self.hub.repositories.get(repo_id, [])):
            if revision in (None, "main", sha):
                return sha, message, files
        code = "RevisionNotFound" if repo_id in self.hub.repositories else "RepoNotFound"
        self._bytes(b"", 404, {"X-Error-Code": code, "X-Error-Message": f"{repo_id}@{revision}: not found"})
        return None

    # --- answers -----------------------------------------------------------------------------------------------------

    def who(self, body):
        self._json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {}})

    def yaml_is_fine(self, body):
        self._json({"warnings": [], "errors": []})

    def write_repository(self, body):
        request = json.loads(body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repositories:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        self.hub.private[repo_id] = request.get("visibility") == "private"
        self.hub.repositories[repo_id] = [(hashlib.sha1(repo_id.encode()).hexdigest(), "initial commit", {})]
        self._json(answer)

    def write_preupload(self, body, repo_id, revision):
        if (commit := self._commit(repo_id, revision)) is None:
            return
        is_large = re.compile(r".*\.(safetensors|bin|png|ckpt)")
        self._json({"files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large.fullmatch(file["path"]) else "regular",
                "shouldIgnore": False,
                **({"oid": self._oid(file["path"], commit[2][file["path"]])} if file["path"] in commit[2] else {}),
            }
            for file in json.loads(body)["files"]
        ]})  # fmt: skip

    def _oid(self, path, content):
        """As git and LFS name contents, so that the client knows what has not changed."""
        if path in self.hub.lfs_paths:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def write_lfs_batch(self, body, repo_id):
        objects = []
        for entry in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}}}
            objects.append({**entry, **({} if entry["oid"] in self.hub.lfs_objects else upload)})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "checksum does not match"}, 400)
        self.hub.lfs_objects[oid] = body
        self._bytes(b"")

    def write_commit(self, body, repo_id, revision):
        if (parent := self._commit(repo_id, revision)) is None:
            return
        files, message = dict(parent[2]), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
                self.hub.lfs_paths.add(value["path"])
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self._json({"error": f"unknown operation {item['key']}"}, 400)
        sha = hashlib.sha1(body + parent[0].encode()).hexdigest()
        self.hub.repositories[repo_id].append((sha, message, files))
        url = f"{self.hub.url}/{repo_id}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def info(self, body, repo_id, revision=None):
        if (commit := self._commit(repo_id, revision)) is not None:
            siblings = [{"rfilename": path} for path in sorted(commit[2])]
            self._json({"id": repo_id, "modelId": repo_id, "sha": commit[0], "siblings": siblings, "tags": [],
                        "private": False, "downloads": 0, "likes": 0})  # fmt: skip

    def tree(self, body, repo_id, revision):
        if (commit := self._commit(repo_id, revision)) is not None:
            self._json([
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(commit[2].items())
            ])  # fmt: skip

    def resolve(self, body, repo_id, revision, path):
        if (commit := self._commit(repo_id, revision)) is None:
            return
        if path not in commit[2]:
            return self._bytes(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit[0]})
        content = commit[2][path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit[0]}
        self._bytes(content, headers=headers)


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = [
    (("GET",), "/api/whoami-v2", _Handler.who),
    (("POST",), "/api/validate-yaml", _Handler.yaml_is_fine),
    (("POST",), "/api/repos/create", _Handler.write_repository),
    (("POST",), f"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.write_preupload),
    (("POST",), f"/{_REPO}\\.git/info/lfs/objects/batch", _Handler.write_lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    (("POST",), f"/api/models/{_REPO}/commit/{_REVISION}", _Handler.write_commit),
    (("GET",), f"/api/models/{_REPO}/revision/{_REVISION}", _Handler.info),
    (("GET",), f"/api/models/{_REPO}/tree/{_REVISION}", _Handler.tree),
    (("GET",), f"/api/models/{_REPO}", _Handler.info),
    (("GET", "HEAD"), f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
