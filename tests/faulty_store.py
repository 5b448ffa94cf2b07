"""A real S3 server (moto) on loopback whose answers can be made to fail as those of stores do."""

import time
from collections.abc import Callable
from threading import Thread
from typing import Any

from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

ONCE = "retries=1"  # of a request by pyarrow, so that ours are seen
CODES = {301: "PermanentRedirect", 403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}


class FaultyStore:
    """S3, with a fault in front.

    Attributes:
        requests: method and path of each, and whether it was signed.
        fault: of method and path; gives None, a status to answer with, seconds to wait, or bytes after which the connection is cut.
        query: options of its URLs.
        bytes_put: of the bodies of all PUT requests.
    """

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.query = f"scheme=http&endpoint_override=127.0.0.1:{self._server.server_port}&region=us-east-1"
        self.reset()
        Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.requests: list[tuple[str, str, bool]] = []
        self.bytes_put = 0
        self.fault: Callable[[str, str], Any] = lambda method, path: None

    def fail_first(self, count: int, fault: Any, method: str = "GET", action: Callable[[], Any] = lambda: None) -> None:
        """The fault for so many requests, after an action; then none."""
        left = [fault] * count

        def answer(asked: str, path: str) -> Any:
            if asked != method or not left:
                return None
            action()
            return left.pop()

        self.fault = answer

    def count(self, method: str) -> int:
        return sum(asked == method for asked, *_ in self.requests)

    def stop(self) -> None:
        self._server.shutdown()

    def _answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path, "HTTP_AUTHORIZATION" in environ))
        if method == "PUT":  # of a body in chunks the header says its length before that
            self.bytes_put += int(
                environ.get("HTTP_X_AMZ_DECODED_CONTENT_LENGTH") or environ.get("CONTENT_LENGTH") or 0
            )
        fault = self.fault(method, path)
        match fault:
            case ("status", status):
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                body = f"<Error><Code>{CODES[status]}</Code><Message>injected</Message></Error>".encode()
                start_response(
                    f"{status} Injected", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
                )
                return [body]
            case ("wait", seconds):
                time.sleep(seconds)
            case ("cut", num_bytes):
                return self._cut(b"".join(self._app(environ, start_response)), num_bytes)
        return self._app(environ, start_response)

    def _cut(self, body: bytes, num_bytes: int):
        yield body[:num_bytes]
        raise ConnectionError


class _Quiet(MotoRequestHandler):
    def log_request(self, *_: Any, **__: Any) -> None:
        pass
