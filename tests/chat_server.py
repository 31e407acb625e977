"""A chat-completions server for tests: a deterministic upstream, or a real one, behind a proxy that makes faults."""

import hashlib
import json
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def echo(payload: dict[str, Any]) -> dict[str, Any]:
    """An upstream whose answer depends on the messages, the seed and the limit, and on nothing else."""
    told = json.dumps([payload["messages"], payload.get("seed"), payload.get("temperature")], sort_keys=True)
    digest = hashlib.sha256(told.encode()).hexdigest()
    words = [f"word{digest[i : i + 2]}" for i in range(0, 24, 2)]
    limit = payload.get("max_tokens") or payload.get("max_completion_tokens")
    return completion(" ".join(words[:limit]), "length" if limit < len(words) else "stop", min(limit, len(words)))


def completion(text: str, finish_reason: str = "stop", tokens: int = 3, **choice: Any) -> dict[str, Any]:
    """A chat completion with ten prompt tokens."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, **choice}],
        "usage": {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens},
    }


def forward(url: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An upstream that is a real server; `url` ends in /v1."""

    def ask(payload: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/chat/completions", json.dumps(payload).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read())

    return ask


class ChatServer:
    """Listens on a free port until the block ends.

    Args:
        upstream: what answers.
        faults: the n-th different request fails in the n-th way the first time it is asked (None: not at all); around again.
            "down" fails every time.
    """

    def __init__(
        self, upstream: Callable[[dict[str, Any]], dict[str, Any]] = echo, faults: Sequence[str | None] = (None,)
    ) -> None:
        self.upstream, self.faults = upstream, faults
        self.asked: Counter[str] = Counter()
        self.payloads: list[dict[str, Any]] = []
        self.times: list[float] = []  # by the monotonic clock, when they came
        self.keys: set[str | None] = set()
        self.failed: Counter[str] = Counter()
        self.busiest = 0
        self.patience = 9.0  # seconds after which a request that is to time out is dropped
        self._busy, self._lock = 0, threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """The address with its version path."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, body: bytes, key: str | None) -> str | None:
        """Notes a request and says how it is to fail."""
        name = hashlib.sha256(body).hexdigest()
        with self._lock:
            self.keys.add(key)
            self.payloads.append(json.loads(body))
            self.times.append(time.monotonic())
            first = name not in self.asked
            self.asked[name] += 1
            fault = self.faults[list(self.asked).index(name) % len(self.faults)]
            fault = fault if first or fault == "down" else None
            if fault:
                self.failed[fault] += 1
            return fault

    def enter(self, by: int) -> None:
        """Counts the requests under way."""
        with self._lock:
            self._busy += by
            self.busiest = max(self.busiest, self._busy)


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            return None

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.enter(1)
            try:
                self._respond(body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                server.enter(-1)

        def _respond(self, body: bytes) -> None:
            key = self.headers.get("Authorization")
            fault = server.fault(body, key)
            echoed = {"error": {"message": f"failed for {key}", "type": "fault", "code": None}}
            if fault in ("500", "down"):
                self._send(500 if fault == "500" else 503, json.dumps(echoed).encode())
            elif fault == "429":
                self._send(429, json.dumps(echoed).encode(), {"Retry-After": "0.3"})
            elif fault == "time-out":
                time.sleep(server.patience)
                self.close_connection = True
            elif fault == "hang-up":
                self.close_connection = True
            else:
                out = server.upstream(json.loads(body))
                self._answer(fault, out if isinstance(out, tuple) else (200, out))

        def _answer(self, fault: str | None, out: tuple[int, dict[str, Any]]) -> None:
            status, answer = out
            text = json.dumps(answer).encode()
            if fault == "cut json":
                self._send(200, text[: len(text) // 2])
            elif fault == "cut body":
                self._head(200, len(text))
                self.wfile.write(text[: len(text) // 2])
                self.close_connection = True
            elif fault in ("slow body", "endless body"):
                self._head(200, len(text))
                for byte in text:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.001 if fault == "slow body" else 0.1)
            else:
                self._send(status, text)

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self._head(status, len(body), headers)
            self.wfile.write(body)

        def _head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(length))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()

    return Handler
