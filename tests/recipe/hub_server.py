"""A Hugging Face Hub on this machine: enough of its HTTP for huggingface_hub to fetch from it and to push to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

__all__ = ["HubServer", "Repository"]


@dataclass
class Repository:
    """What the server holds of one repository.

    Attributes:
        files: by path, on the branch ``main``.
        revisions: other branches and tags, by name.
        refusal: the status and ``X-Error-Code`` of every answer about its files, as for a gated one.
        is_private: as asked for when it was created.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusal: tuple[int, str] | None = None
    is_private: bool | None = None

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision is, and its files."""
        for name, files in {"main": self.files, **self.revisions}.items():
            sha = hashlib.sha1(json.dumps({path: _etag(data) for path, data in files.items()}).encode()).hexdigest()
            if revision in {name, sha}:
                return sha, files
        return None


class HubServer:
    """The server, on a free port, and what was asked of it.

    Attributes:
        repositories: by ``org/name``.
        requests: method and path of each, in order.
        bytes_served: of files, by path.
        failure: the status of every answer, while set.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.bytes_served: dict[str, int] = {}
        self.failure: int | None = None
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def endpoint(self) -> str:
        """What ``HF_ENDPOINT`` should be."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        """Have huggingface_hub ask this Hub, from caches in ``directory``, as somebody who is logged in."""
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory / "cache"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(directory / "assets"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_somebody")

    def add(self, name: str, files: Mapping[str, bytes], **options: Any) -> Repository:
        """A repository with these files."""
        self.repositories[name] = Repository(dict(files), **options)
        return self.repositories[name]

    def forget(self) -> None:
        """Start counting anew."""
        self.requests.clear()
        self.bytes_served.clear()

    def asked(self, method: str = "", ending: str = "") -> list[str]:
        """The requests of this method whose path ends so."""
        return [request for request in self.requests if request.startswith(method) and request.endswith(ending)]


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def hub(self) -> HubServer:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._dispatch()

    do_HEAD = do_POST = do_GET  # noqa: N815 - names of http.server

    def _dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.failure is not None:
            return self._answer(self.hub.failure, b"{}")
        for pattern, answer in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                return answer(self, **match.groupdict())
        return self._answer(404, b"{}")

    def _answer(self, status: int, body: bytes, **headers: object) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: object, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), Content_Type="application/json")

    def _found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and files, or None once the refusal has been sent."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._answer(401, b"{}", X_Error_Code="RepoNotFound")
            return None
        found = repository.at(revision)
        if found is None:
            self._answer(404, b"{}", X_Error_Code="RevisionNotFound")
        return found

    def info(self, name: str, revision: str | None = None) -> None:
        found = self._found(name, revision or "main")
        if found is None:
            return
        sha, files = found
        siblings = [
            {"rfilename": path, "size": len(data), "blobId": _etag(data)} for path, data in sorted(files.items())
        ]
        self._json({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": [], "downloads": 0})

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self._found(name, revision)
        if found is None:
            return None
        sha, files = found
        if refusal := self.hub.repositories[name].refusal:
            return self._answer(refusal[0], b"{}", X_Error_Code=refusal[1])
        if path not in files:
            return self._answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        data = files[path]
        facts = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self._answer(200, data, **facts)
        return self._content(path, data, facts)

    def _content(self, path: str, data: bytes, facts: dict[str, str]) -> None:
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            facts["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        self.hub.bytes_served[path] = self.hub.bytes_served.get(path, 0) + len(data)
        self._answer(status, data, **facts)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name.startswith("forbidden/"):
            return self._answer(403, b'{"error": "You have no rights here"}')
        if name in self.hub.repositories:
            return self._json({"url": f"{self.hub.endpoint}/{name}"}, status=409)
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.add(name, {}, is_private=private)
        return self._json({"url": f"{self.hub.endpoint}/{name}"})

    def preupload(self, name: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        self._json(
            {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
        )

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        repository = self.hub.repositories[name]
        for line in lines:
            if line["key"] == "file":
                repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        found = repository.at("main")
        assert found is not None
        self._json(
            {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{found[0]}", "commitOid": found[0], "success": True}
        )

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})


_NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES: dict[str, Any] = {
    rf"/api/models/{_NAME}": _Handler.info,
    rf"/api/models/{_NAME}/revision/(?P<revision>.+)": _Handler.info,
    rf"/api/models/{_NAME}/preupload/(?P<revision>.+)": _Handler.preupload,
    rf"/api/models/{_NAME}/commit/(?P<revision>.+)": _Handler.commit,
    "/api/repos/create": _Handler.create,
    "/api/validate-yaml": _Handler.validate,
    rf"/{_NAME}/resolve/(?P<revision>[^/]+|refs/pr/\d+)/(?P<path>.+)": _Handler.resolve,
}
