"""The web server of `make vote`, on the loopback interface. It serves one page and accepts requests from it alone."""

import json
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from stages.runtime.errors import UserError
from stages.runtime.run import describe_error
from stages.text import printable

if TYPE_CHECKING:
    from tools.vote import Ballot

HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("vote.html")
MAX_REQUEST = 10_000  # bytes
ANSWERS = ("1", "2", "0", "skip")  # the first answer is better, the second, equal


def serve(ballot: "Ballot", port: int) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: the port is in use, or may not be used.
    """
    with VoteServer(ballot, port) as server:
        print(f"Vote on http://{HOST}:{server.server_port} (Ctrl-C ends)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
        print()


class VoteServer(ThreadingHTTPServer):
    """A server that does not run yet; port 0 is any free port."""

    def __init__(self, ballot: "Ballot", port: int):
        self.ballot, self.lock = ballot, Lock()  # each request has a thread
        self.page = PAGE.read_text(encoding="utf-8")
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            reason = f"port {port} can't be opened: {error.strerror}"
            raise UserError(
                f"{reason}; close the program that uses it, or choose another: make vote PORT=..."
            ) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the page was closed before it had the reply
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: VoteServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if not self.is_own_host():
            self.send(403, "text/plain", "this page is served on loopback only")
        elif self.path == "/":
            nonce = secrets.token_urlsafe(16)
            policy = (
                f"default-src 'none'; form-action 'none'; connect-src 'self'; script-src 'nonce-{nonce}'; "
                f"style-src 'nonce-{nonce}'; frame-ancestors 'none'"
            )
            self.send(200, "text/html; charset=utf-8", self.server.page.replace("NONCE", nonce), policy)
        elif self.path == "/state":
            self.send_state()
        else:
            self.send(404, "text/plain", "not found")

    def do_POST(self) -> None:
        # A page of another site can send requests here, but not with this origin and this type.
        is_own = self.is_own_host() and self.headers.get("Origin") == f"http://{self.headers.get('Host')}"
        if not is_own or self.headers.get("Content-Type") != "application/json":
            self.send(403, "text/plain", "only the page itself may send votes")
            return
        try:
            request = json.loads(self.rfile.read(min(int(self.headers.get("Content-Length", 0)), MAX_REQUEST)))
            ballot = self.server.ballot
            changes = {"/undo": ballot.undo, "/reveal": ballot.reveal}
            if self.path == "/vote" and request["answer"] in ANSWERS:
                change: Callable[[], None] = partial(ballot.vote, str(request["id"]), request["answer"])
            else:
                change = changes[self.path]
        except (ValueError, KeyError, TypeError):
            self.send(400, "text/plain", "not a vote")
        else:
            self.send_state(change)

    def is_own_host(self) -> bool:
        """Whether the request was sent to this host by its own name; other names that resolve to it are refused."""
        names = [f"{name}:{self.server.server_port}" for name in (HOST, "localhost")]
        return self.headers.get("Host") in names

    def send_state(self, change: Callable[[], None] = lambda: None) -> None:
        """Make a change and send what the page shows then, or why that is not possible."""
        try:
            with self.server.lock:
                change()
                state = self.server.ballot.state()
            reply = 200, "application/json", json.dumps(state)
        except (UserError, OSError) as error:  # such as a full disk, or a vote file that was edited meanwhile
            reply = 409, "text/plain; charset=utf-8", printable(describe_error(error) or str(error))
        self.send(*reply)

    def send(self, status: int, kind: str, text: str, policy: str = "default-src 'none'") -> None:
        content = text.encode()
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Content-Security-Policy": policy}
        headers |= {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
