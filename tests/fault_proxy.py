"""An HTTP proxy between a program and a real S3 server that spoils what passes, and keeps count.

The program is given the proxy's address as its S3 endpoint. Signatures stay valid, for the Host
header is passed on as it came. Which request is spoilt is a function of the seed, the fault, the
method, the key, the range and how often that was asked for, and of nothing else: not of the order
in which threads or processes ask. What is done with each request is kept in ``seen``.

``watch`` calls a function when a request passes, before or after the server has it: the way to
kill something at an exact moment, while the product knows nothing of tests.
"""

import contextlib
import hashlib
import http.client
import re
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

BEFORE = ("500 before", "503 before", "409 before", "412 before", "cut before")
"""The server never hears of the request; 409 and 412 are then untrue: nothing is there."""
AFTER = ("409 after", "412 after", "cut after", "silent after")
"""The server has done what was asked; the answer is another one, or none."""
BODY = ("short", "short, framed", "short, unframed")
"""Half of the body: under the Content-Length of all, of the half, or without one."""
KINDS = (*BEFORE, *AFTER, *BODY, "stale", "slow")

CODES = {
    "500": "InternalError",
    "503": "SlowDown",
    "409": "ConditionalRequestConflict",
    "412": "PreconditionFailed",
}
HOP_BY_HOP = ("connection", "expect", "transfer-encoding", "keep-alive")


@dataclass(frozen=True)
class Fault:
    """What is done to which requests."""

    kind: str
    method: str = "GET|PUT|POST|HEAD|DELETE"
    key: str = ""
    """Pattern that is searched in ``key?query``."""
    probability: float = 1.0
    times: int | None = None
    """At most so often; None: no limit."""
    most: int | None = 2
    """No request is spoilt more often than this, whatever by; None: no limit."""
    seconds: float = 0.05
    """How long a slow answer takes longer, and silence lasts."""

    def __post_init__(self) -> None:
        assert self.kind in KINDS, f"{self.kind!r} is none of {KINDS}"

    def fits(self, request: "Seen") -> bool:
        """Whether this is a request to be spoilt."""
        named = re.search(self.key, request.name) is not None
        return named and re.fullmatch(self.method, request.method) is not None


@dataclass(frozen=True)
class Seen:
    """One request and what became of it."""

    method: str
    key: str
    query: str
    span: str = ""
    """The range that is asked for."""
    fault: str | None = None
    status: int | None = None
    """What the server answered; None where it was not asked, or is away."""

    @property
    def name(self) -> str:
        """What patterns are searched in."""
        return f"{self.key}?{self.query}"


@dataclass
class Watch:
    """Something that happens when a request passes."""

    method: str
    key: str
    moment: str
    """"before" or "after" the server has the request."""
    action: Callable[[Seen], bool | None]
    """True: the request, or its answer, goes no further."""


@dataclass(frozen=True)
class Answer:
    """What the server said."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


class FaultProxy:
    """Passes requests on to ``target`` and spoils some of them. A context manager."""

    def __init__(
        self,
        target: str,
        *faults: Fault,
        seed: int = 0,
        keep: str | None = None,
        keep_host: bool = True,
    ) -> None:
        """``keep``: bodies of what is put under keys with this pattern are kept in ``kept``.

        ``keep_host=False`` tells the server its own address, for one that answers to no other.
        """
        self._keep_host = keep_host
        self.aim(target)
        self.faults = list(faults)
        self.seed = seed
        self.seen: list[Seen] = []
        self.flying: list[Seen] = []
        """What has come and is not answered yet."""
        self.kept: dict[str, bytes] = {}
        self.watches: list[Watch] = []
        self._keep = keep
        self._lock = threading.Lock()
        self._asked: Counter[Seen] = Counter()
        self._suffered: Counter[Seen] = Counter()
        self._spoilt: Counter[Fault] = Counter()
        self._listings: defaultdict[str, list[Answer]] = defaultdict(list)

    def aim(self, target: str) -> None:
        """Pass requests on to another server, or to one that came back elsewhere."""
        split = urlsplit(target)
        self.target = (split.hostname or "", split.port or 80)
        self.host = None if self._keep_host else split.netloc

    def __enter__(self) -> "FaultProxy":
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        """Address to be given to a program as its S3."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def watch(
        self, method: str, key: str, moment: str, action: Callable[[Seen], bool | None]
    ) -> Iterator[None]:
        """Call a function with each request that fits, as long as the block runs."""
        watch = Watch(method, key, moment, action)
        self.watches.append(watch)
        try:
            yield
        finally:
            self.watches.remove(watch)

    def now(self, *faults: Fault) -> None:
        """Do this from here on, and no more of what was done before."""
        with self._lock:
            self.faults[:] = faults
            self._spoilt.clear()
            self._suffered.clear()

    def count(self, kind: str) -> int:
        """How often a fault occurred."""
        return sum(one.fault == kind for one in list(self.seen))

    def under_way(self, method: str, key: str) -> bool:
        """Whether such a request has come and is not answered yet."""
        fits = Fault("slow", method=method, key=key).fits
        return any(fits(one) for one in list(self.flying))

    def keep_body(self, request: Seen, body: bytes) -> None:
        """Keep what is put, where that was asked for."""
        if self._keep and request.method == "PUT" and re.search(self._keep, request.name):
            self.kept[request.key] = body

    def requests(self, method: str = "", key: str = "") -> list[Seen]:
        """What was asked for so far."""
        fits = Fault("slow", method=method or Fault.method, key=key).fits
        return [one for one in list(self.seen) if fits(one)]

    def most_asked(self, *, again: bool = False) -> int:
        """How often the request was made that was made most often.

        Of those that a program has one reason for, or, ``again``, of those that every checkpoint is
        a reason for: its lease is renewed, and the folder listed.
        """
        asked = (
            (one.method, one.name, one.span)
            for one in list(self.seen)
            if again == bool(re.search(r"lease\.json|list-type", one.name))
        )
        return max(Counter(asked).values(), default=0)

    # -- what is done with a request ------------------------------------------------------------

    def chosen(self, request: Seen) -> Fault | None:
        """The first fault that befalls a request."""
        with self._lock:
            number = self._asked[request]
            self._asked[request] += 1
            for index, fault in enumerate(self.faults):
                drawn = self._draw(index, request, number) < fault.probability
                if drawn and fault.fits(request) and not self._spared(fault, request):
                    self._spoilt[fault] += 1
                    self._suffered[request] += 1
                    return fault
        return None

    def _spared(self, fault: Fault, request: Seen) -> bool:
        """Whether a request has suffered enough, or the fault was done often enough."""
        if fault.kind == "stale" and not self._listings[request.name]:
            return True
        done = fault.times is not None and self._spoilt[fault] >= fault.times
        return done or (fault.most is not None and self._suffered[request] >= fault.most)

    def _draw(self, index: int, request: Seen, number: int) -> float:
        """A number from [0, 1) for this request alone."""
        told = f"{self.seed} {index} {request.method} {request.name} {request.span} {number}"
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") / 2**64

    def alert(self, request: Seen, moment: str) -> bool:
        """Tell whoever watches; whether the request ends here."""
        stops = [
            watch.action(request)
            for watch in list(self.watches)
            if watch.moment == moment and Fault("slow", watch.method, watch.key).fits(request)
        ]
        return any(stops)

    def remember(self, request: Seen, answer: Answer) -> None:
        """Keep a listing, to be told again when it is out of date."""
        if "list-type" in request.query and answer.status == 200:
            with self._lock:
                self._listings[request.name].append(answer)

    def oldest_listing(self, request: Seen) -> Answer:
        """What was there when this was first asked for."""
        return self._listings[request.name][0]

    def note(self, request: Seen, fault: Fault | None, status: int | None) -> None:
        """Keep what became of a request."""
        self.seen.append(replace(request, fault=fault.kind if fault else None, status=status))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever asked may be dead: that is what these tests are about. Anything else is told."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _pass_on(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:
            # Whoever asks has died in the middle: nothing of it reaches the server.
            self._cut()
            return
        split = urlsplit(self.path)
        key = unquote(split.path).lstrip("/").partition("/")[2]
        request = Seen(self.command, key, unquote(split.query), self.headers.get("Range", ""))
        self.proxy.keep_body(request, body)
        self.proxy.flying.append(request)
        try:
            self._serve(request, body)
        finally:
            self.proxy.flying.remove(request)

    def _serve(self, request: Seen, body: bytes) -> None:
        fault = self.proxy.chosen(request)
        kind = fault.kind if fault else ""
        if self.proxy.alert(request, "before"):
            self.proxy.note(request, fault, None)
            self._cut()
        elif fault and kind in BEFORE:
            self.proxy.note(request, fault, None)
            self._refuse(kind.partition(" ")[0])
        elif fault and kind == "stale":
            self.proxy.note(request, fault, None)
            self._reply(self.proxy.oldest_listing(request))
        else:
            self._ask_server(request, fault, body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = _pass_on

    def _ask_server(self, request: Seen, fault: Fault | None, body: bytes) -> None:
        kind = fault.kind if fault else ""
        if fault and kind == "slow":
            time.sleep(fault.seconds)
        try:
            answer = self._forward(body)
        except (OSError, http.client.HTTPException):
            self.proxy.note(request, fault, None)
            self._cut()
            return
        self.proxy.remember(request, answer)
        self.proxy.note(request, fault, answer.status)
        if self.proxy.alert(request, "after"):
            self._cut()
        elif fault and kind == "silent after":
            time.sleep(fault.seconds)
            self._cut()
        elif kind in AFTER:
            self._refuse(kind.partition(" ")[0])
        elif kind in BODY:
            self._shorten(answer, kind)
        else:
            self._reply(answer)

    def _forward(self, body: bytes) -> Answer:
        server = http.client.HTTPConnection(*self.proxy.target, timeout=120)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                told = self.proxy.host if name.lower() == "host" else None
                if name.lower() not in HOP_BY_HOP:
                    server.putheader(name, told or value)
            server.endheaders(body)
            answer = server.getresponse()
            return Answer(answer.status, answer.getheaders(), answer.read())
        finally:
            server.close()

    def _reply(self, answer: Answer, body: bytes | None = None, *, framed: bool = True) -> None:
        """Send an answer; with another body under the old headers where one is given."""
        self.send_response_only(answer.status)
        told = {name.lower() for name, _ in answer.headers}
        if "content-length" not in told and framed and self.command != "HEAD":
            # It came in chunks.
            self.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers:
            if name.lower() not in (*HOP_BY_HOP, *(() if framed else ("content-length",))):
                self.send_header(name, value)
        self._send(answer.body if body is None else body)

    def _shorten(self, answer: Answer, kind: str) -> None:
        half = answer.body[: len(answer.body) // 2]
        if kind == "short, framed":
            headers = [(n, v) for n, v in answer.headers if n.lower() != "content-length"]
            self._reply(
                replace(answer, headers=[*headers, ("Content-Length", str(len(half)))]), half
            )
        else:
            self._reply(answer, half, framed=kind == "short")
            self._cut()

    def _refuse(self, status: str) -> None:
        if status == "cut":
            self._cut()
            return
        body = f"<Error><Code>{CODES[status]}</Code><Message>by the proxy</Message></Error>"
        self.send_response_only(int(status))
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self._send(b"" if self.command == "HEAD" else body.encode())

    def _send(self, body: bytes) -> None:
        with contextlib.suppress(OSError):
            self.end_headers()
            self.wfile.write(body)

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what passed is in ``seen``."""
