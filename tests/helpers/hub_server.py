"""A small Hugging Face Hub: its HTTP routes as huggingface_hub 2.4 uses them, on a free port of this machine.

    with HubServer() as hub:
        hub.put("model", "meta-llama/Llama-3.2-1B-Instruct", directory)
        hub.fail("PUT", "/storage/", status=500, times=2)
        subprocess.run(..., env=os.environ | hub.environment(cache_directory))

Repositories of models and datasets live in memory. Large files go through LFS: batch, upload,
verify; and come by a redirect to another address, with range requests. It does not offer Xet, so clients need
HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_theTokenOfTheTestsThatMustNotShow"
LFS = (".pt", ".safetensors", ".bin", ".parquet")


@dataclass
class User:
    name: str
    write: bool = True
    gated: tuple = ()  # repositories that it may read though they are gated


@dataclass
class Repo:
    kind: str
    name: str
    gated: bool = False
    private: bool = False
    commits: list = field(default_factory=list)  # of {path: content}; the last is main

    def __post_init__(self):
        self.commits.append({".gitattributes": b"*.pt filter=lfs\n"})

    def sha(self, number=-1):
        number %= len(self.commits)
        return hashlib.sha1(f"{self.kind} {self.name} {number}".encode()).hexdigest()

    def at(self, revision):
        """(commit, files) of a revision; None where there is none."""
        number = len(self.commits) - 1
        if revision != "main":
            number = next((n for n in range(len(self.commits)) if self.sha(n) == revision), None)
        return None if number is None else (self.sha(number), self.commits[number])


@dataclass
class Failure:
    """What to do with a request instead, or on top of answering it.

    Attributes:
        status: answer this, with `headers`.
        cut: close the connection after so many bytes of the body, of the request or of the answer.
        stall: seconds to do nothing for, first.
        wrong: change a byte of the answer.
    """

    method: str
    pattern: str
    status: int | None = None
    headers: dict = field(default_factory=dict)
    cut: int | None = None
    stall: float = 0
    wrong: bool = False
    times: float = 1
    seen: int = 0


class HubServer:
    """Attributes: url; users, dict token -> User; repos; stored, dict SHA-256 -> bytes; requests, a list of (time,
    method, path, status)."""

    def __init__(self):
        self.users = {TOKEN: User("me")}
        self.repos, self.stored = {}, {}
        self.failures, self.requests = [], []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage_url = f"http://localhost:{self.server.server_port}/storage"  # to clients another host

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token=TOKEN):
        """Variables with which a process talks to this Hub."""
        return {
            "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home),
            "HF_TOKEN": token or "", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_OFFLINE": "0",
        }  # fmt: skip

    def put(self, kind, name, directory, **repo):
        """A repository with a directory's files."""
        self.repos[kind, name] = made = Repo(kind, name, **repo)
        files = [path for path in Path(directory).rglob("*") if path.is_file()]
        made.commits.append({str(path.relative_to(directory)): path.read_bytes() for path in files})
        return made

    def files(self, name, kind="model"):
        """{path: content} of a repository's main branch, but for .gitattributes."""
        repo = self.repos.get((kind, name))
        return {path: content for path, content in repo.commits[-1].items() if path[0] != "."} if repo else {}

    def fail(self, method, pattern, **failure):
        """The next `times` requests whose path matches go as the `Failure` says."""
        self.failures.append(Failure(method, pattern, **failure))
        return self.failures[-1]

    def count(self, method, pattern):
        return sum(1 for _, verb, path, _ in self.requests if verb == method and re.search(pattern, path))


class _Answer(Exception):
    def __init__(self, status, body=b"", **headers):
        self.status, self.body, self.headers = status, body, {key.replace("_", "-"): headers[key] for key in headers}


def _error(status, code, message):
    return _Answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)


def _blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_lfs(path, size):
    return size > 0 and (path.endswith(LFS) or size > 10_000_000)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    hub = None

    def log_message(self, *_):
        pass

    def _serve(self):
        started, self.failure = time.time(), None
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        with self.hub.lock:
            for failure in self.hub.failures:
                if failure.method == self.command and failure.times > 0 and re.search(failure.pattern, self.route):
                    failure.times -= 1
                    failure.seen += 1
                    self.failure = failure
                    break
        status = 0
        try:
            if self.failure and self.failure.stall:
                time.sleep(self.failure.stall)
            body = self._read()
            if body is not None:
                if self.failure and self.failure.status:
                    said = self.failure.headers.get("X_Error_Message", "told to fail")
                    raise _Answer(self.failure.status, {"error": said}, **self.failure.headers)
                with self.hub.lock:
                    self._answer(body)
        except _Answer as answer:
            status = answer.status
            self._send(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.hub.requests.append((started, self.command, self.route, status))

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read(self):
        """The request's body; None where the connection is to be cut in it."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if self._cut_upload(sum(map(len, parts))):
                    return None
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        if self.failure and self.failure.cut is not None and self.command != "GET":
            length = min(length, self.failure.cut)
        body = self.rfile.read(length)
        if len(body) < length:  # the client has gone
            self.close_connection = True
            return None
        return None if self._cut_upload(len(body)) else body

    def _cut_upload(self, read):
        cut = self.failure and self.failure.cut is not None and self.command != "GET" and read >= self.failure.cut
        if cut:
            self.close_connection = True
        return cut

    def _send(self, answer):
        body = answer.body
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            answer.headers.setdefault("Content-Type", "application/json")
        if self.failure and self.failure.wrong and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, str(value))
        self.send_header("X-Request-Id", "test")
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.failure and self.failure.cut is not None:
            body = body[: self.failure.cut]
            self.close_connection = True
        self.wfile.write(body)
        self.wfile.flush()

    # ---------------------------------------------------------------------------------------------- routes

    def _answer(self, body):
        for method, pattern, route in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in method:
                self.user = self._user()
                groups = match.groupdict()
                if "name" in groups:
                    kind = "dataset" if (groups.pop("kind", None) or "").startswith("dataset") else "model"
                    groups["repo"] = self._repo(kind, groups.pop("name"))
                getattr(self, route)(body=body, **groups)
                raise AssertionError(f"{route} gave no answer")
        raise _error(404, "NotFound", f"no route {self.command} {self.route}")

    def _user(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and self.route.startswith("/storage"):
            raise _Answer(400, b"<Error><Message>Only one auth mechanism allowed</Message></Error>")
        if token and token not in self.hub.users:
            raise _Answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid username or password.")
        return self.hub.users.get(token)

    def _repo(self, kind, name):
        repo = self.hub.repos.get((kind, name))
        if kind == "dataset" and "/" not in name:
            repo = None  # the bare names of old canonical datasets are gone
        if repo is None or (repo.private and self.user is None):
            raise _error(404 if self.user else 401, "RepoNotFound", "Repository not found")
        return repo

    def _may_read(self, repo):
        if repo.gated and (self.user is None or repo.name not in self.user.gated):
            raise _error(403 if self.user else 401, "GatedRepo", f"Access to {repo.kind} {repo.name} is restricted")

    def _may_write(self, namespace):
        if self.user is None:
            raise _Answer(401, {"error": "Unauthorized"}, X_Error_Message="Invalid username or password.")
        if not self.user.write or namespace != self.user.name:
            message = f"You don't have the rights to write under the namespace {namespace}"
            raise _Answer(403, {"error": message}, X_Error_Message=message)

    def _revision(self, repo, revision):
        found = repo.at(revision)
        if found is None:
            raise _error(404, "RevisionNotFound", f"no revision {revision}")
        return found

    def whoami(self, body):
        if self.user is None:
            raise _Answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid username or password.")
        role = "write" if self.user.write else "read"
        raise _Answer(200, {"name": self.user.name, "type": "user", "auth": {"accessToken": {"role": role}}})

    def create(self, body):
        asked = json.loads(body)
        namespace = asked.get("organization") or (self.user.name if self.user else "")
        self._may_write(namespace)
        kind, name = asked.get("type") or "model", f"{namespace}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repos:
            raise _Answer(409, {"error": "You already created this model repo", "url": url})
        self.hub.repos[kind, name] = Repo(kind, name, private=asked.get("visibility") == "private")
        raise _Answer(200, {"url": url, "name": name})

    def auth_check(self, body, repo, write):
        self._may_read(repo)
        if write:
            self._may_write(repo.name.split("/")[0])
        raise _Answer(200, {})

    def info(self, body, repo, revision=None):
        sha, files = self._revision(repo, revision or "main")
        raise _Answer(200, {
            "_id": "1", "id": repo.name, "sha": sha, "private": repo.private, "gated": repo.gated and "manual",
            "disabled": False, "downloads": 0, "likes": 0, "tags": [], "createdAt": "2024-01-01T00:00:00.000Z",
            "lastModified": "2024-01-01T00:00:00.000Z", "siblings": [self._sibling(*file) for file in files.items()],
        })  # fmt: skip

    def tree(self, body, repo, revision, path=None):
        _, files = self._revision(repo, revision)
        prefix = f"{path}/" if path else ""
        below = sorted(each for each in files if each.startswith(prefix))
        if path and not below:
            raise _error(404, "EntryNotFound", f"{path} does not exist")
        recursive = self.query.get("recursive", ["False"])[0] in ("True", "true", "1")
        entries, folders = [], set()
        for each in below:
            parts = each[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folder = prefix + "/".join(parts[:depth])
                if folder not in folders:
                    folders.add(folder)
                    entries.append({"type": "directory", "path": folder, "oid": "0" * 40, "size": 0})
            if recursive or len(parts) == 1:
                entries.append(self._entry(each, files[each]))
        start, page = int(self.query.get("cursor", ["0"])[0]), 20
        more = {}
        if start + page < len(entries):
            query = f"recursive={recursive}&cursor={start + page}"
            more = {"Link": f'<{self.hub.url}{quote(self.route)}?{query}>; rel="next"'}
        raise _Answer(200, entries[start : start + page], **more)

    def _entry(self, path, content):
        entry = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
        if _is_lfs(path, len(content)):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _sibling(self, path, content):
        sibling = {"rfilename": path}
        if "blobs" in self.query:
            entry = self._entry(path, content)
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            if "lfs" in entry:
                sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}
        return sibling

    def preupload(self, body, repo, revision):
        self._may_write(repo.name.split("/")[0])
        _, files = self._revision(repo, revision)
        raise _Answer(200, {"files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_lfs(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
                "oid": _blob_id(files[file["path"]]) if file["path"] in files else None,
            }
            for file in json.loads(body)["files"]
        ]})  # fmt: skip

    def lfs_batch(self, body, repo):
        self._may_write(repo.name.split("/")[0])
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry = {"oid": oid, "size": size}
            if oid not in self.hub.stored:
                href = f"{self.hub.storage_url}/{oid}?X-Amz-Signature=SignatureThatMustNotShow"
                entry["actions"] = {
                    "upload": {"href": href},
                    "verify": {"href": f"{self.hub.url}/{repo.name}.git/info/lfs/verify"},
                }
            objects.append(entry)
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Answer(400, b"<Error><Code>BadDigest</Code></Error>")
        self.hub.stored[oid] = body
        raise _Answer(200, ETag=f'"{oid}"')

    def lfs_verify(self, body, name_of_repo):
        wanted = json.loads(body)
        if len(self.hub.stored.get(wanted["oid"], b"")) != wanted["size"]:
            raise _Answer(404, {"error": "object not found"})
        raise _Answer(200, {})

    def commit(self, body, repo, revision):
        self._may_write(repo.name.split("/")[0])
        _, before = self._revision(repo, revision)
        files = dict(before)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    raise _Answer(400, {"error": f"LFS object {value['oid']} was not uploaded"})
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] == "deletedFolder":
                files = {path: files[path] for path in files if not path.startswith(value["path"].rstrip("/") + "/")}
        repo.commits.append(files)
        oid = repo.sha()
        raise _Answer(200, {
            "success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo.name}/commit/{oid}",
        })  # fmt: skip

    def resolve(self, body, repo, revision, path):
        sha, files = self._revision(repo, revision)
        self._may_read(repo)
        if path not in files:
            raise _error(404, "EntryNotFound", f"{path} does not exist")
        content = files[path]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not _is_lfs(path, len(content)):
            self._send_content(content, headers | {"ETag": f'"{_blob_id(content)}"'})
        oid = hashlib.sha256(content).hexdigest()
        self.hub.stored.setdefault(oid, content)
        raise _Answer(302, b"", **headers, **{
            "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": len(content), "ETag": f'"{oid}"',
            "Location": f"{self.hub.storage_url}/{oid}",
        })  # fmt: skip

    def storage(self, body, oid):
        if oid not in self.hub.stored:
            raise _Answer(404)
        self._send_content(self.hub.stored[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _send_content(self, content, headers):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            length = {"Content-Length": len(content)} if self.command == "HEAD" else {}
            raise _Answer(200, content, **headers, **length)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start >= len(content):
            raise _Answer(416, b"", **{"Content-Range": f"bytes */{len(content)}"})
        span = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        raise _Answer(206, content[start : end + 1], **headers, **span)


_NAME = r"(?P<name>[\w.-]+(?:/[\w.-]+)?)"
_API = rf"/api/(?P<kind>models|datasets)/{_NAME}"
_ROUTES = (
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("POST",), r"/api/repos/create", "create"),
    (("GET",), rf"{_API}/auth-check(?P<write>/write)?", "auth_check"),
    (("GET",), rf"{_API}/revision/(?P<revision>[^/]+)", "info"),
    (("GET",), rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    (("POST",), rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
    (("POST",), rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
    (("GET",), _API, "info"),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("POST",), r"/(?P<name_of_repo>.+)\.git/info/lfs/verify", "lfs_verify"),
    (("PUT",), r"/storage/(?P<oid>\w{64})", "store"),
    (("GET", "HEAD"), r"/storage/(?P<oid>\w{64})", "storage"),
    (("GET", "HEAD"), rf"/(?:(?P<kind>datasets)/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)
