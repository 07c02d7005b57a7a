"""A local HTTP server for tests of downloads."""

import http.server
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        """Send the response body whose name is the last part of the URL path, or the complete response of that name.

        The body named ``cut`` is always truncated to half its length; the body named ``once`` only at the first request.
        """
        self.server.requests.append(self.path)
        name = self.path.split("?")[0].strip("/").split("/")[-1]
        self.server.authorizations.append(self.headers["Authorization"])
        if name in self.server.responses:
            self.wfile.write(self.server.responses[name])
            return
        if name not in self.server.bodies:
            self.send_error(404, "Not Found")
            return
        body = self.server.bodies[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        truncate = name == "cut" or (name == "once" and self.server.requests.count(self.path) == 1)
        self.wfile.write(body[: len(body) // 2] if truncate else body)

    def log_message(self, *_):
        pass


@contextmanager
def serve(
    bodies: Mapping[str, bytes], responses: Mapping[str, bytes] | None = None
) -> Iterator[http.server.ThreadingHTTPServer]:
    """Serve response bodies by name, at ``<server.url>/<name>``. ``server.requests`` lists the requested paths.

    Args:
        responses: complete responses by name: status line, headers and body.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.bodies = bodies
    server.responses = responses or {}
    server.requests, server.authorizations = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/f"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
