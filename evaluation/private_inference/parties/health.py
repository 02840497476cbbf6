"""Says by HTTP whether a server lives, for those who watch it."""

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from entropy_gpt.evaluation.errors import PrivateInferenceError

from .channel import show_address, shut_down


# What a connection may take in all, and how many there may be at once; further ones are closed.
DEADLINE_SECONDS, MOST_CONNECTIONS = 5, 8


class Health:
    """
    Answers each GET with the state as JSON, from a thread of its own, for a bounded number of connections and time.

    Args:
        host (`str`), port (`int`): Where; port 0 takes a free one.
        state (`Callable`): Gives it; a state whose "status" is not "ok" is answered with 503.

    Raises:
        `PrivateInferenceError`: If the port can't be listened on.
    """

    def __init__(self, host: str, port: int, state: Callable[[], dict]):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                found = state()
                content = json.dumps(found).encode()
                self.send_response(200 if found["status"] == "ok" else 503)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        class Watched(ThreadingHTTPServer):
            daemon_threads = True
            free = threading.BoundedSemaphore(MOST_CONNECTIONS)
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

            def process_request(self, request, client_address):
                if self.free.acquire(blocking=False):
                    super().process_request(request, client_address)
                else:
                    self.shutdown_request(request)

            def process_request_thread(self, request, client_address):
                deadline = threading.Timer(DEADLINE_SECONDS, shut_down, [request])
                deadline.start()
                try:
                    super().process_request_thread(request, client_address)
                finally:
                    deadline.cancel()
                    self.free.release()

            def handle_error(self, request, client_address):
                pass  # who watches may leave when it likes

        try:
            self._server = Watched((host, port), Handler)
        except OSError as error:
            shown = show_address(host, port)
            raise PrivateInferenceError(f"{shown} can't be listened on: {error.strerror}.") from error
        self.address = self._server.server_address[:2]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
