"""A server with OpenAI's interface that answers at once: the base and an adapter for each axis, but no model.

Started by benchmarks/proxy.py: python -m suite.instant AXIS…
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Lists its models, and answers every completion with one token."""

    protocol_version = "HTTP/1.1"  # keeps connections open, as model servers do
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        cards = [{"id": name, "object": "model"} for name in ("base", *sys.argv[1:])]
        self._send({"object": "list", "data": cards})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None}
        head = {"id": "0", "object": "text_completion", "created": 0, "model": body["model"]}
        self._send(head | {"choices": [choice], "usage": {"completion_tokens": 1}})

    def _send(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests are not logged."""


def main() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/v1", file=sys.stderr, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
