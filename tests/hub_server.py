"""A Hub on 127.0.0.1 for the real client: it serves folders, takes commits, and fails where a test tells it to."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, unquote, urlparse

import yaml

LFS_SUFFIXES = (".safetensors", ".mp4", ".png")
LFS_SIZE = 10 * 2**20


@dataclass
class Repository:
    """Commits (id -> path -> content), what the branches point at, and who may see it.

    `history` tells of each commit its parent, and its description.
    """

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    history: dict[str, tuple[str | None, str]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str, description: str = "") -> str:
        digests = [f"{path} {hashlib.sha1(content).hexdigest()}" for path, content in sorted(files.items())]
        identity = hashlib.sha1("\n".join([str(len(self.commits)), *digests]).encode()).hexdigest()
        self.history[identity] = self.branches.get(branch, self.branches.get("main")), description
        self.commits[identity], self.branches[branch] = files, identity
        self.messages.append(message)
        return identity

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        identity = self.branches.get(revision, revision)
        return (identity, self.commits[identity]) if identity in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        """What is on `main`."""
        return self.at("main")[1]


class Hub(ThreadingHTTPServer):
    """`tokens` seen, `requests` made, `repositories` pushed, `parts` of files given, each path, first and last byte.

    `token`, if set, is the only one that may write.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.url = Path(root), f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[list] = []
        self.tokens, self.requests, self.parts = set(), [], []
        self.token, self.private_by_default = None, False

    def fail(self, pattern: str, how: int | str, times: int = 1) -> None:
        """Answer the next `times` requests that look like `pattern` ("METHOD /path") with a status, or "cut" them."""
        self.faults.append([pattern, how, times])

    def fault(self, request: str) -> int | str | None:
        for fault in self.faults:
            if fault[2] > 0 and re.search(fault[0], request):
                fault[2] -= 1
                return fault[1]
        return None

    def repository(self, name: str) -> Repository | None:
        """One that was pushed, or that lies in the folder that is served."""
        if name in self.repositories or not (self.root / name).is_dir():
            return self.repositories.get(name)
        folder, found = self.root / name, Repository()
        paths = [path for path in folder.rglob("*") if path.is_file()]
        found.commit("main", {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}, "folder")
        return found

    def handle_error(self, *_):
        """A client that hangs up is none of the tests' business."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def _handle(self):
        self.server.tokens.add(self.headers.get("Authorization"))
        url = urlparse(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        fault = self.server.fault(request)
        if fault == "cut":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self.connection.close()
        self.body = self._read_body()
        if fault is not None:
            return self._send(fault, b"{}", {"X-Error-Message": "told to fail"})
        for pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, request)
            if match:
                return answer(self, *match.groups())
        return self._send(404, b"{}")

    do_HEAD = do_GET = do_POST = do_PUT = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, answer, status: int = 200):
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _refused(self) -> bool:
        """Whether the token may not write; then that has been said."""
        if self.server.token is None or self.headers.get("Authorization") == f"Bearer {self.server.token}":
            return False
        self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        return True

    def _at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files, or `None` once it has been said why there are none."""
        repository = self.server.repository(name)
        if repository is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repository.gated:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        return repository.at(revision) or self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

    # --- reading -----------------------------------------------------------------------------------------------------
    def describe(self, name: str, revision: str | None):
        found = self._at(name, revision or "main")
        if found:
            siblings = [{"rfilename": path} for path in sorted(found[1])]
            private = self.server.repository(name).private
            self._json({"id": name, "sha": found[0], "private": private, "siblings": siblings})

    def tree(self, name: str, revision: str, below: str | None = None):
        found = self._at(name, revision)
        if found:
            entries = [_entry(path, content) for path, content in sorted(found[1].items())]
            self._json([entry for entry in entries if below is None or entry["path"].startswith(f"{below}/")])

    def paths_info(self, name: str, revision: str):
        found = self._at(name, revision)
        if found:
            wanted = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
            self._json([_entry(path, found[1][path]) for path in wanted if path in found[1]])

    def resolve(self, name: str, revision: str, path: str):
        found = self._at(name, revision)
        if not found:
            return None
        if path not in found[1]:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]})
        content = found[1][path]
        tag = _oid(path, content)
        linked = {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))} if _is_lfs(path, content) else {}
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{tag}"', **linked}
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if part is None:
            return self._send(200, content, headers)
        first, last = int(part[1]), min(int(part[2]), len(content) - 1)
        self.server.parts.append((path, first, last))
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._send(206, content[first : last + 1], headers)

    def commits(self, name: str, revision: str):
        found = self._at(name, revision)
        if not found:
            return
        listed, identity = [], found[0]
        while identity is not None:
            parent, description = self.server.repository(name).history[identity]
            entry = {"id": identity, "title": "", "message": description, "authors": []}
            listed.append(entry | {"date": "2024-01-01T00:00:00.000Z"})
            identity = parent
        self._json(listed)

    # --- writing -----------------------------------------------------------------------------------------------------
    def create(self):
        if self._refused():
            return None
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name.startswith("others/"):
            return self._send(403, b"{}", {"X-Error-Message": "You don't have the rights to create a model there"})
        if self.server.repository(name) is not None:
            return self._json({"url": f"{self.server.url}/{name}"}, 409)
        visibility = wanted.get("visibility", "private" if self.server.private_by_default else "public")
        repository = self.server.repositories[name] = Repository(private=visibility == "private")
        repository.commit("main", {}, "initial commit")
        return self._json({"url": f"{self.server.url}/{name}"})

    def validate(self):
        front_matter = json.loads(self.body)["content"].split("---\n")[1]
        try:
            errors = [] if isinstance(yaml.safe_load(front_matter), dict) else ["not a mapping"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        self._json({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    def branch(self, name: str, branch: str):
        repository = self.server.repositories[name]
        if branch in repository.branches:
            return self._json({}, 409)
        repository.branches[branch] = repository.branches["main"]
        return self._json({})

    def preupload(self, name: str, revision: str):
        found = self._at(name, revision)
        if found and not self._refused():
            files = [
                {"path": file["path"], "uploadMode": "lfs" if _is_lfs(**file) else "regular", "shouldIgnore": False}
                | ({"oid": _oid(file["path"], found[1][file["path"]])} if file["path"] in found[1] else {})
                for file in json.loads(self.body)["files"]
            ]
            self._json({"files": files})

    def batch(self, name: str):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            actions = {"upload": f"/lfs/{wanted['oid']}", "verify": "/verify"}
            actions = {key: {"href": self.server.url + path, "header": {}} for key, path in actions.items()}
            objects.append(wanted if wanted["oid"] in self.server.lfs else wanted | {"actions": actions})
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, digest: str):
        complete = hashlib.sha256(self.body).hexdigest() == digest
        if complete:
            self.server.lfs[digest] = self.body
        self._send(200 if complete else 400)

    def verify(self):
        wanted = json.loads(self.body)
        self._json({}, 200 if len(self.server.lfs.get(wanted["oid"], b"")) == wanted["size"] else 404)

    def commit(self, name: str, revision: str):
        found = self._at(name, revision)
        if not found or self._refused():
            return
        files, message, description = dict(found[1]), "", ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message, description = value["summary"], value.get("description", "")
                if value.get("parentCommit") not in (None, found[0]):
                    return self._send(412, b"{}", {"X-Error-Message": "A commit has happened since"})
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
        pull_request = "create_pr" in self.query
        branch = "refs/pr/1" if pull_request else revision
        identity = self.server.repositories[name].commit(branch, files, message, description)
        answer = {"commitUrl": f"{self.server.url}/{name}/commit/{identity}", "commitOid": identity}
        self._json(answer | ({"pullRequestUrl": f"{self.server.url}/{name}/discussions/1"} if pull_request else {}))


_KIND, _ID = "(?:models|datasets)", "([^/]+/[^/]+)"
_ROUTES = (
    (rf"GET /api/{_KIND}/{_ID}(?:/revision/(.+))?", _Handler.describe),
    (rf"GET /api/{_KIND}/{_ID}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    (rf"POST /api/{_KIND}/{_ID}/paths-info/([^/]+)", _Handler.paths_info),
    (rf"GET /api/models/{_ID}/commits/([^/]+)", _Handler.commits),
    (rf"(?:GET|HEAD) /(?:datasets/)?{_ID}/resolve/(refs/pr/\d+|[^/]+)/(.+)", _Handler.resolve),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_ID}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(\w+)", _Handler.upload),
    (r"POST /verify", _Handler.verify),
    (rf"POST /api/models/{_ID}/commit/(.+)", _Handler.commit),
)


def _is_lfs(path: str, sample: bytes = b"", size: int = 0) -> bool:
    return path.endswith(LFS_SUFFIXES) or max(size, len(sample)) > LFS_SIZE


def _oid(path: str, content: bytes) -> str:
    if _is_lfs(path, content):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}


@contextmanager
def hub_server(root: Path):
    """Serve `root/owner/name`, and what is pushed, as the repositories of the Hub while the context is open."""
    from huggingface_hub import constants

    server = Hub(root)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    thread = threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        with (
            mock.patch.object(constants, "ENDPOINT", server.url),
            mock.patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template),
            mock.patch.object(constants, "HF_HUB_DISABLE_XET", True),
            mock.patch("huggingface_hub.hf_api.api.endpoint", server.url),
        ):
            yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
