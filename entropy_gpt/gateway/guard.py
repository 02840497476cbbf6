"""What every request has to pass before it is read: host, origin, token, type and size of the body."""

import hmac
import ipaddress
import re
from urllib.parse import SplitResult, urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ProtocolError, of_the_gateway


MAX_BODY_BYTES = 2**20
# A body that is too large is read up to here and forgotten: clients read the answer only when they have sent all.
MAX_DISCARDED_BYTES = 2**26
# What anybody may ask for: whether the gateway lives, and the page, which asks for the token.
OPEN = ("/health", "/")
HEADERS = {
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """
    Stands before an application. It adds no header that would let another site read an answer (CORS).

    Args:
        app: The application.
        token (`str`, *optional*): That a request has to bring. Without one, only names of this machine's loopback are
            answered to, so that no other site can have its own name lead here.
    """

    def __init__(self, app: ASGIApp, token: str | None):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        begun = False

        async def answer(message: Message):
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
            if scope["method"] == "POST":
                receive = await _within_limits(receive)
        except ProtocolError as error:
            await JSONResponse(error.content(), error.status, error.headers)(scope, receive, answer)
            return
        try:
            await self.app(scope, receive, answer)
        except Exception as error:  # who logs it further up would log its message
            failure = of_the_gateway(error)
            if not begun:
                await JSONResponse(failure.content(), failure.status, failure.headers)(scope, receive, answer)

    def _check(self, method: str, path: str, headers: Headers):
        host = headers.get("host", "")
        if self.token is None and not is_loopback(_split(f"//{host}").hostname or ""):
            raise ProtocolError(403, f"{_shown(host)} is no name of this machine's loopback.", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            raise ProtocolError(
                403,
                f"pages of {_shown(origin)} may not use this gateway.",
                code="wrong_origin",
            )
        if self.token is not None and path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode(), self.token.encode())
            if scheme.lower() != "bearer" or not same:
                raise ProtocolError(
                    401,
                    "the token is missing or wrong: send it as the API key (Authorization: Bearer TOKEN).",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        if method == "POST":
            _check_body(headers)


def _check_body(headers: Headers):
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ProtocolError(415, "the body has to be JSON: Content-Type: application/json.", code="wrong_type")
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ProtocolError(415, f"send the body as it is, not as {_shown(encoding)}.", code="wrong_encoding")


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _within_limits(receive: Receive) -> Receive:
    """
    The whole body, as one message.

    Raises:
        `ProtocolError`: If it is too large.
    """
    body, read, more = b"", 0, True
    while more and read <= MAX_DISCARDED_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        part, more = message.get("body", b""), message.get("more_body", False)
        read += len(part)
        if read <= MAX_BODY_BYTES:
            body += part
    if read > MAX_BODY_BYTES:
        raise ProtocolError(
            413, f"the body is larger than {MAX_BODY_BYTES:,} bytes, the most here.", code="body_too_large"
        )
    sent = False

    async def whole() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return whole


def _split(url: str) -> SplitResult:
    """The parts of a URL; none of what is no URL."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _shown(text: str) -> str:
    return re.sub(r"[^\w.:/\[\]-]", "?", text)[:100] or "nothing"
