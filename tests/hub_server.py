"""A small local server with the HTTP API of the Hub, for the real clients.

Repositories are folders `<root>/models/<owner>/<name>` and `<root>/datasets/<owner>/<name>`. Each has one commit.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


@dataclass
class Hub:
    """The state of the server, which a test may change.

    license_id: the license in the card of every repository.
    gated: repositories for which the server returns 401 with the Hub's code for gated ones.
    owners: those in whose name repositories can be created; others get 403.
    interruptions: by file name, how many of the next transfers are interrupted halfway.
    faults: by a part of the path, the status, headers and body of the answer; status 0 is no answer.
    requests: method and path of each request, with its Range header if there is one.
    """

    root: Path
    url: str = ""
    license_id: str = "cc0-1.0"
    gated: set[str] = field(default_factory=set)
    owners: set[str] = field(default_factory=set)
    interruptions: dict[str, int] = field(default_factory=dict)
    faults: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add(self, repo: str, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            path = self.root / repo / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    """Run a server on the loopback interface in a thread; yield its address."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve(root: Path, port: int) -> Iterator[Hub]:
    """Serve the repositories in a folder on a free port of the loopback interface."""
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            lines = self.rfile.read(int(self.headers.get("Content-Length", 0))).splitlines()
            path = urlsplit(self.path).path.strip("/").split("/")
            # The text of a commit is a JSON object per line.
            body = [json.loads(line) for line in lines]
            if path[-1] in ("create", "validate-yaml", "batch") or path[-2] in ("preupload", "commit"):
                hub.requests.append(f"POST {self.path}")
                self.upload(path, body)
            else:
                self.respond(body[0] if body else {})

        def do_PUT(self) -> None:
            """Store the content of a large file."""
            content = self.rfile.read(int(self.headers["Content-Length"]))
            hub.add("large", {self.path.rsplit("/", 1)[1]: content})
            self.json({})

        def upload(self, path: list[str], body: list[dict[str, Any]]) -> None:
            if path[-1] == "create":
                owner = body[0].get("organization", "")
                if owner not in hub.owners:
                    return self.error(403, "Forbidden", "You don't have the rights to create a model here")
                name = f"{owner}/{body[0]['name']}"
                hub.add(f"models/{name}", {".visibility": body[0]["visibility"].encode()})
                self.json({"url": f"{hub.url}/{name}"})
            elif path[-1] == "validate-yaml":
                self.json({"errors": [], "warnings": []})
            elif path[-2] == "preupload":
                modes = {True: "lfs", False: "regular"}
                names = [file["path"] for file in body[0]["files"]]
                files = [{"path": name, "uploadMode": modes[name.endswith(".safetensors")]} for name in names]
                self.json({"files": [{**file, "shouldIgnore": False} for file in files]})
            elif path[-1] == "batch":
                urls = {one["oid"]: f"{hub.url}/large/{one['oid']}" for one in body[0]["objects"]}
                actions = [{**one, "actions": {"upload": {"href": urls[one["oid"]]}}} for one in body[0]["objects"]]
                self.json({"transfer": "basic", "objects": actions})
            else:
                for line in body:
                    value = line["value"]
                    if line["key"] == "file":
                        hub.add("/".join(path[1:4]), {value["path"]: base64.b64decode(value["content"])})
                    elif line["key"] == "lfsFile":
                        content = (hub.root / "large" / value["oid"]).read_bytes()
                        hub.add("/".join(path[1:4]), {value["path"]: content})
                self.json({"commitUrl": f"{hub.url}/{'/'.join(path[2:4])}/commit/{COMMIT}", "commitOid": COMMIT})
            return None

        def do_GET(self) -> None:
            self.respond({})

        def respond(self, body: dict[str, Any]) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path} {self.headers.get('Range') or ''}".strip())
            if fault := next((fault for part, fault in hub.faults.items() if part in path), None):
                status, headers, content = fault
                if status:
                    self.body(status, content, headers)
                else:
                    self.connection.recv(1)  # until the client closes the connection
            elif path.startswith("/api/"):
                self.api(path.removeprefix("/api/"), body)
            else:
                repo, _, rest = path.removeprefix("/").partition("/resolve/")
                self.file(repo if repo.startswith("datasets/") else f"models/{repo}", *rest.split("/", 1))

        def api(self, path: str, body: dict[str, Any]) -> None:
            parts = path.split("/")
            repo, rest = "/".join(parts[:3]), parts[3:]
            if not self.readable(repo, rest[1] if len(rest) > 1 else "main"):
                return
            files = sorted(file for file in (hub.root / repo).rglob("*") if file.is_file())
            names = [str(file.relative_to(hub.root / repo)) for file in files]
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": sha(file)}
                for name, file in zip(names, files, strict=True)
            ]
            if rest[:1] == ["tree"]:
                below = "/".join(rest[2:])
                self.json([entry for entry in entries if str(entry["path"]).startswith(below)])
            elif rest[:1] == ["paths-info"]:
                self.json([entry for entry in entries if entry["path"] in body.get("paths", [])])
            elif rest[:1] in ([], ["revision"]):
                siblings = [{"rfilename": name} for name in names]
                card = {"license": hub.license_id}
                self.json(
                    {"id": "/".join(parts[1:3]), "sha": COMMIT, "siblings": siblings, "cardData": card, "tags": []}
                )
            else:
                self.error(404, "NotFound", path)

        def file(self, repo: str, revision: str, name: str) -> None:
            if not self.readable(repo, revision):
                return None
            path = hub.root / repo / name
            if not path.is_file():
                return self.error(404, "EntryNotFound", name)
            content = path.read_bytes()
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{sha(path)}"')
            self.send_header("Accept-Ranges", "bytes")
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if self.command == "HEAD":
                return None
            if hub.interruptions.get(path.name):
                hub.interruptions[path.name] -= 1
                self.wfile.write(content[start : (start + len(content)) // 2])
                self.close_connection = True
            else:
                self.wfile.write(content[start:])
            return None

        def readable(self, repo: str, revision: str) -> bool:
            if not (hub.root / repo).is_dir():
                self.error(401, "RepoNotFound", "Repository not found")
            elif repo in hub.gated:
                self.error(401, "GatedRepo", f"Access to {repo} is restricted")
            elif revision not in REVISIONS:
                self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                return True
            return False

        def json(self, content: Any) -> None:
            self.body(200, json.dumps(content).encode())

        def error(self, status: int, code: str, message: str) -> None:
            self.body(
                status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message}
            )

        def body(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            defaults = {"Content-Type": "application/json", "Content-Length": str(len(content))}
            for name, value in (defaults | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    with running(ThreadingHTTPServer(("127.0.0.1", port), Handler)) as hub.url:
        yield hub


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
