"""
A Hub of our own: what `huggingface_hub` asks of https://huggingface.co, answered over HTTP on this machine and from
memory. It has one user, keeps every commit for ever, and fails on demand.
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER = "somebody"
TOKEN = "hf_of_somebody"
WRONG_TOKEN = "hf_of_nobody"
# Every repository of the Hub begins with it, and `huggingface_hub` never deletes it.
FIRST_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
# Variables of this process that would lead another one elsewhere.
ASTRAY = ("HF_", "HUGGING", "TRANSFORMERS_", "TQDM_")
REPOSITORY = r"(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"


def neutral_environment() -> dict[str, str]:
    """This process's variables without those that would lead another one elsewhere."""
    names = {name: name.upper() for name in os.environ}
    astray = {name for name, upper in names.items() if upper.startswith(ASTRAY) or upper.endswith("_PROXY")}
    return {name: value for name, value in os.environ.items() if name not in astray}


class Refusal(Exception):
    """An answer that says no."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}


@dataclass(frozen=True)
class Commit:
    """All files of a repository at one time."""

    hash: str
    message: str
    parent: str | None
    files: Mapping[str, bytes]


@dataclass
class Repository:
    """Commits, and the branches and pull requests (`refs/pr/1`) that name the last ones, as hashes."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: Mapping[str, bytes], message: str, parent: str | None = None) -> Commit:
        """Adds a commit and lets `ref` name it."""
        content = repr((len(self.commits), parent, message, sorted(files))).encode()
        commit = Commit(hashlib.sha1(content).hexdigest(), message, parent, MappingProxyType(dict(files)))
        self.commits[commit.hash] = commit
        self.refs[ref] = commit.hash
        return commit

    @property
    def pull_requests(self) -> int:
        """How many there have been."""
        return sum(ref.startswith("refs/pr/") for ref in self.refs)

    def find(self, revision: str) -> Commit:
        """The commit that a branch, a pull request or a hash names."""
        try:
            return self.commits[self.refs.get(revision, revision)]
        except KeyError:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None


@dataclass(frozen=True)
class Request:
    """What was asked and how it was answered: with an HTTP status, or `None` where the connection was dropped."""

    method: str
    path: str
    token: str | None
    status: int | None


@dataclass
class Answer:
    """What is sent back."""

    body: bytes
    status: int = 200
    headers: dict[str, str | None] = field(default_factory=dict)


@dataclass
class Failure:
    """What happens to the next requests of one kind; a `status` of `None` drops the connection, after some seconds."""

    pattern: str
    status: int | None
    times: float
    is_late: bool
    seconds: float = 0.0


class HubServer:
    """
    The server, which runs while the `with` block does:

    ```python
    with HubServer() as hub:
        hub.put_folder("openai-community/gpt2", folder)
        subprocess.run(command, env=hub.environment(tmp_path / "home"))
        assert hub.files("somebody/model")["config.json"]
    ```

    Attributes:
        endpoint (`str`): Its address, for `HF_ENDPOINT`.
        repositories (`dict[str, Repository]`): Everything that it holds.
        requests (`list[Request]`): Everything that it was asked, in order.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self._failures: list[Failure] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    # For tests

    def environment(self, home: Path, token: str | None = TOKEN, **more: str) -> dict[str, str]:
        """
        Variables of a process for which this is the Hub.

        Args:
            home (`Path`): Its `HF_HOME`; a new folder is a cold cache.
            token (`str`, *optional*): Whose it is; `None` is nobody's.
            more (`str`): Further variables.
        """
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**neutral_environment(), **own, **({"HF_TOKEN": token} if token else {}), **more}

    def put_folder(self, repo_id: str, folder: Path, branch: str = "main", private: bool = False) -> str:
        """Makes a folder's files the next commit of a repository, and all that it holds. Returns the commit's hash."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        with self._lock:
            repository = self.repositories.setdefault(repo_id, Repository(private))
            parent = repository.refs.get(branch)
            return repository.commit(branch, FIRST_FILES | files, f"Put {folder.name} here", parent).hash

    def files(self, repo_id: str, revision: str = "main") -> Mapping[str, bytes]:
        """What a repository holds at a branch, a pull request or a commit."""
        return self.repositories[repo_id].find(revision).files

    @property
    def changes(self) -> list[Request]:
        """The requests that may have changed something here: neither reading nor asking for advice."""
        advice = ("/api/validate-yaml", "/preupload/")
        asked = [request for request in self.requests if request.method not in ("GET", "HEAD")]
        return [request for request in asked if not any(part in request.path for part in advice)]

    def fail(self, pattern: str, status: int = 503, times: float = 1):
        """Answers the next `times` requests with an error; `pattern` is searched for in `POST /api/...`."""
        self._failures.append(Failure(pattern, status, times, is_late=False))

    def drop(self, pattern: str, times: float = 1, is_late: bool = False):
        """Closes the connection of such requests: before they are read, or when what they ask for is done."""
        self._failures.append(Failure(pattern, None, times, is_late))

    def be_silent(self, pattern: str, times: float = 1, seconds: float = 10):
        """Lets such requests wait, and answers none of them."""
        self._failures.append(Failure(pattern, None, times, is_late=False, seconds=seconds))

    def mend(self):
        """Ends all failures."""
        self._failures.clear()

    # Answers

    def next_failure(self, line: str) -> Failure | None:
        """The failure that a request meets, which is then used up by one."""
        with self._lock:
            for failure in self._failures:
                if failure.times > 0 and re.search(failure.pattern, line):
                    failure.times -= 1
                    return failure
        return None

    def answer(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """What a request brings about, whole or not at all."""
        parts = urlsplit(url)
        for methods, pattern, respond in _ROUTES:
            if method in methods and (match := re.fullmatch(pattern, parts.path)):
                try:
                    with self._lock:
                        arguments = {name: unquote(value) for name, value in (match.groupdict(default="")).items()}
                        user = self._authenticate(headers)
                        answer = respond(self, user, body, parse_qs(parts.query), **arguments)
                except Refusal as refusal:
                    return _json({"error": str(refusal)}, refusal.status, refusal.headers)
                return answer if isinstance(answer, Answer) else _json(answer)
        return _json({"error": f"{method} {url} is not spoken here"}, 501)

    def _authenticate(self, headers: Mapping[str, str]) -> str | None:
        token = token_of(headers)
        if token not in (None, TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USER if token else None

    def _find(self, user: str | None, repo_id: str) -> Repository:
        """A repository, if this user may know of it: strangers are told the same of private ones and of none."""
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and not _owns(user, repo_id)):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def _find_own(self, user: str | None, repo_id: str) -> Repository:
        """A repository that this user may change."""
        _require_somebody(user)
        repository = self._find(user, repo_id)
        if not _owns(user, repo_id):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository

    def _tell_who(self, user, body, query):
        _require_somebody(user)
        return {"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {"type": "access_token"}}

    def _create(self, user, body, query):
        _require_somebody(user)
        wanted = json.loads(body)
        namespace = wanted.get("organization") or user
        repo_id = f"{namespace}/{wanted['name']}"
        if namespace != user:
            message = f'You don\'t have the rights to create a model under the namespace "{namespace}"'
            raise Refusal(403, message)
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.repositories:
            return _json({**answer, "error": "You already created this model repo"}, 409)
        repository = self.repositories[repo_id] = Repository(wanted.get("visibility") == "private")
        repository.commit("main", FIRST_FILES, "initial commit")
        return answer

    def _validate_yaml(self, user, body, query):
        match = re.match(r"---\n(.*?)\n---\s*\n", json.loads(body)["content"], re.DOTALL)
        if match is None:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            is_mapping = isinstance(yaml.safe_load(match.group(1)), dict)
        except yaml.YAMLError:
            is_mapping = False
        if not is_mapping:
            return _json({"errors": [{"message": "the metadata is no YAML mapping"}], "warnings": []}, 400)
        return {"errors": [], "warnings": []}

    def _preupload(self, user, body, query, repo_id, revision):
        _require_somebody(user)
        held = self._find(user, repo_id).find(revision).files
        paths = [file["path"] for file in json.loads(body)["files"]]
        oids = {path: _git_hash(held[path]) for path in paths if path in held}
        answers = [
            {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": oids.get(path)} for path in paths
        ]
        return {"files": answers}

    def _commit(self, user, body, query, repo_id, revision):
        opens_pull_request = "create_pr" in query
        _require_somebody(user)
        is_proposal = opens_pull_request or revision.startswith("refs/pr/")
        repository = (self._find if is_proposal else self._find_own)(user, repo_id)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        parent = repository.find(revision)
        if header["value"].get("parentCommit") not in (None, parent.hash):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        if revision not in repository.refs:
            raise Refusal(400, f"{revision} is no branch")
        files = _apply(operations, parent.files)
        number = repository.pull_requests + 1
        ref = f"refs/pr/{number}" if opens_pull_request else revision
        commit = repository.commit(ref, files, header["value"]["summary"], parent.hash)
        url = f"{self.endpoint}/{repo_id}"
        answer = {"success": True, "commitOid": commit.hash, "commitUrl": f"{url}/commit/{commit.hash}"}
        return answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if opens_pull_request else {})

    def _open_pull_request(self, user, body, query, repo_id):
        _require_somebody(user)
        repository = self._find(user, repo_id)
        number = repository.pull_requests + 1
        repository.refs[f"refs/pr/{number}"] = repository.refs["main"]
        return {"num": number}

    def _tell_of_pull_request(self, user, body, query, repo_id, number):
        self._find(user, repo_id).find(f"refs/pr/{number}")
        return {
            "num": int(number),
            "title": "A pull request",
            "author": {"name": USER},
            "createdAt": "2025-01-01T00:00:00.000Z",
            "status": "draft",
            "repo": {"name": repo_id, "type": "model"},
            "isPullRequest": True,
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
            "events": [],
        }

    def _create_branch(self, user, body, query, repo_id, revision):
        repository = self._find_own(user, repo_id)
        if revision.startswith("refs/"):
            raise Refusal(400, f"Invalid reference for a branch: {revision}")
        if revision in repository.refs:
            raise Refusal(409, f"Reference refs/heads/{revision} already exists")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repository.refs[revision] = repository.find(start).hash
        return {}

    def _tell_of_model(self, user, body, query, repo_id, revision="main"):
        repository = self._find(user, repo_id)
        commit = repository.find(revision)
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": _git_hash(content)}
            for path, content in commit.files.items()
        ]
        owner = repo_id.partition("/")[0]
        known = {"id": repo_id, "modelId": repo_id, "author": owner, "sha": commit.hash, "tags": []}
        return {**known, "private": repository.private, "siblings": siblings}

    def _tell_refs(self, user, body, query, repo_id):
        refs = self._find(user, repo_id).refs
        entries = {True: [], False: []}
        for name, commit in refs.items():
            is_pull_request = name.startswith("refs/")
            ref = name if is_pull_request else f"refs/heads/{name}"
            entries[is_pull_request].append({"name": name, "ref": ref, "targetCommit": commit})
        return {"branches": entries[False], "pullRequests": entries[True], "converts": [], "tags": []}

    def _tell_tree(self, user, body, query, repo_id, revision, path=""):
        commit = self._find(user, repo_id).find(revision)
        inside = f"{path}/" if path else ""
        is_recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for name, content in commit.files.items():
            if name.startswith(inside):
                folders = [f"{inside}{part}" for part in _parents(name.removeprefix(inside))]
                shown = folders if is_recursive else folders[:1]
                entries |= {folder: {"type": "directory", "path": folder, "oid": "", "size": 0} for folder in shown}
                if is_recursive or not folders:
                    file = {"type": "file", "path": name, "oid": _git_hash(content), "size": len(content)}
                    entries[name] = file
        if path and not entries:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound", commit.hash)
        return [*entries.values()]

    def _resolve(self, user, body, query, repo_id, revision, path):
        commit = self._find(user, repo_id).find(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit.hash)
        content = commit.files[path]
        headers = {
            "X-Repo-Commit": commit.hash,
            "ETag": f'"{_git_hash(content)}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        return Answer(content, headers=headers)


_ROUTES = [
    (("GET",), "/api/whoami-v2", HubServer._tell_who),
    (("POST",), "/api/repos/create", HubServer._create),
    (("POST",), "/api/validate-yaml", HubServer._validate_yaml),
    (("POST",), f"/api/models/{REPOSITORY}/preupload/{REVISION}", HubServer._preupload),
    (("POST",), f"/api/models/{REPOSITORY}/commit/{REVISION}", HubServer._commit),
    (("POST",), f"/api/models/{REPOSITORY}/discussions", HubServer._open_pull_request),
    (("GET",), f"/api/models/{REPOSITORY}/discussions/(?P<number>[0-9]+)", HubServer._tell_of_pull_request),
    (("POST",), f"/api/models/{REPOSITORY}/branch/{REVISION}", HubServer._create_branch),
    (("GET",), f"/api/models/{REPOSITORY}", HubServer._tell_of_model),
    (("GET",), f"/api/models/{REPOSITORY}/revision/{REVISION}", HubServer._tell_of_model),
    (("GET",), f"/api/models/{REPOSITORY}/refs", HubServer._tell_refs),
    (("GET",), f"/api/models/{REPOSITORY}/tree/{REVISION}(/(?P<path>.+))?", HubServer._tell_tree),
    (("GET", "HEAD"), f"/{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)", HubServer._resolve),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer

    def _serve(self):
        failure = self.hub.next_failure(f"{self.command} {self.path}")
        if failure and failure.status is None and not failure.is_late:
            return self._drop(failure.seconds)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if failure and failure.status is not None:
            return self._send(_json({"error": "The Hub fails"}, failure.status))
        answer = self.hub.answer(self.command, self.path, self.headers, body)
        return self._drop() if failure else self._send(_in_range(answer, self.headers.get("Range")))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _drop(self, seconds: float = 0):
        self._record(None)  # before the wait: whoever asked gives up sooner, and the next test may have begun
        time.sleep(seconds)
        self.close_connection = True

    def _send(self, answer: Answer):
        self._record(answer.status)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _record(self, status: int | None):
        self.hub.requests.append(Request(self.command, self.path, token_of(self.headers), status))

    def log_message(self, *arguments):
        """Nowhere."""


def token_of(headers: Mapping[str, str]) -> str | None:
    """The token that a request came with."""
    return headers.get("Authorization", "").removeprefix("Bearer ") or None


def _owns(user: str | None, repo_id: str) -> bool:
    return repo_id.partition("/")[0] == user


def _require_somebody(user: str | None):
    if user is None:
        raise Refusal(401, "Invalid username or password.")


def _json(content, status: int = 200, headers: Mapping[str, str | None] = MappingProxyType({})) -> Answer:
    return Answer(json.dumps(content).encode(), status, {**headers, "Content-Type": "application/json"})


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _parents(path: str) -> list[str]:
    """The folders that a file is in, the outermost first."""
    parts = path.split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _apply(operations: list[dict], files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files after a commit's operations, as its lines give them."""
    result = dict(files)
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        path = value["path"]
        if kind == "file":
            result[path] = base64.b64decode(value["content"])
        elif kind == "deletedFile" and path in result:
            del result[path]
        elif kind == "deletedFolder":
            inside = f"{path.rstrip('/')}/"
            result = {name: content for name, content in result.items() if not name.startswith(inside)}
        else:
            raise Refusal(404, f"{kind} of {path}: a file with this name doesn't exist", "EntryNotFound")
    return result


def _in_range(answer: Answer, wanted: str | None) -> Answer:
    """The part of an answer that a `Range` header asks for."""
    if answer.status != 200 or wanted is None:
        return answer
    size = len(answer.body)
    first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted).groups()
    start = int(first) if first else size - int(last)
    end = min(int(last), size - 1) if first and last else size - 1
    if start > end:
        return Answer(b"", 416, {"Content-Range": f"bytes */{size}"})
    headers = {**answer.headers, "Content-Range": f"bytes {start}-{end}/{size}"}
    return Answer(answer.body[start : end + 1], 206, headers)
