"""The gateway as an application of HTTP."""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.private_inference.parties.turns import LONGEST_LINE, LONGEST_WAIT
from entropy_gpt.workflows.private_client import PrivateClient

from .completions import Completion, Cost, Delta, Writer
from .errors import ProtocolError
from .guard import Guard
from .line import Job, Line, Waiting
from .metrics import Metrics
from .requests import read_object, read_prompts, read_request


PAGE = Path(__file__).with_name("page.html")
# A stream without news for the first of these says so, lest a proxy take it for dead.
KEEP_ALIVE_SECONDS, PRESENCE_SECONDS = 15, 0.5
CANCELLED_STATUS = 499
DONE = "data: [DONE]\n\n"

# Measures a text with a copy of the model in the clear. It returns `entropies`, the heads' mean entropies of shape
# (layers, heads), and `uniform`, the entropy of uniform attention, both in nats.
Twin = Callable[[str], dict]


def make_app(
    client: PrivateClient,
    *,
    name: str = "private",
    token: str | None = None,
    longest_line: int = LONGEST_LINE,
    longest_wait: float = LONGEST_WAIT,
    twin: Twin | None = None,
) -> FastAPI:
    """
    Args:
        client ([`PrivateClient`]): Whom prompts are put to; it has a tokenizer.
        name (`str`): The model's, in the protocol.
        token (`str`, *optional*): That requests have to bring; without it, the loopback alone is answered to.
        longest_line (`int`), longest_wait (`float`): Requests that may wait, and for how many seconds.
        twin (`Callable`, *optional*): For the head entropies on the page.
    """
    line = Line(client, longest_line, longest_wait)
    gateway = Gateway(client, line, name, twin)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(line.close)

    # Its own pages would fetch scripts from other hosts, and its redirections have no error of the protocol.
    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Guard, token=token)
    for path, answer in (
        ("/", gateway.page),
        ("/health", gateway.health),
        ("/metrics", gateway.show_metrics),
        ("/v1/models", gateway.models),
        ("/v1/models/{wanted:path}", gateway.model),
    ):
        app.add_api_route(path, answer, methods=["GET", "HEAD"], response_model=None)
    app.add_api_route("/v1/completions", gateway.complete, methods=["POST"], response_model=None)
    app.add_api_route("/entropies", gateway.entropies, methods=["POST"], response_model=None)
    app.add_exception_handler(UserError, _describe_mistake)
    app.add_exception_handler(HTTPException, _describe_path)
    return app


class Gateway:
    """What the paths answer; arguments as of [`make_app`]."""

    def __init__(self, client: PrivateClient, line: Line, name: str, twin: Twin | None):
        self.client, self.line, self.name, self.twin = client, line, name, twin
        self.metrics = Metrics(line)
        self._twin_is_free = asyncio.Semaphore(1)
        self.created = int(time.time())
        page = PAGE.read_text(encoding="utf-8")
        self._page = HTMLResponse(page, headers={"content-security-policy": _policy(page)})

    async def page(self) -> Response:
        return self._page

    async def health(self) -> dict:
        return {"status": "ok", "waiting": self.line.length, "busy": self.line.active is not None}

    async def show_metrics(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> dict:
        return {"object": "list", "data": [self._describe()]}

    async def model(self, wanted: str) -> dict:
        self._check_name(wanted)
        return self._describe()

    async def complete(self, request: Request) -> Response:
        completion = None
        try:
            asked = read_request(await request.body())
            self._check_name(asked.model)
            completion = Completion(asked, await asyncio.to_thread(read_prompts, asked, self.client))
            news = self._ask(completion)
            if asked.stream:
                return await self._stream(completion, news)
            return await self._whole(completion, news, request)
        except ProtocolError as error:
            self.metrics.note(error.status, completion)
            return _refuse(error)

    async def entropies(self, request: Request) -> dict:
        """The mean entropy of each head over a text, in the twin; the text stays on this machine."""
        if self.twin is None:
            raise ProtocolError(404, "no twin of the model was given: --twin MODEL.", code="no_twin")
        text = read_object(await request.body()).get("text")
        if not isinstance(text, str):
            raise ProtocolError(400, 'send {"text": "..."}.', "text")
        async with self._twin_is_free:
            return await asyncio.to_thread(self.twin, text)

    def _describe(self) -> dict:
        terms = self.client.terms
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "private server",
            "notation": terms.notation,
            "max_model_len": terms.config.n_positions,
            "answer": terms.settings.answer,
            "protocol": terms.settings.protocol,
            "twin": self.twin is not None,
        }

    def _check_name(self, wanted: str):
        if wanted != self.name:
            raise ProtocolError(
                404, f"there is no model {wanted[:100]!r} here, only {self.name!r}.", "model", "model_not_found"
            )

    def _ask(self, completion: Completion) -> "News":
        news = News()
        news.job = Job(completion.work, news.put)
        self.line.join(news.job)
        return news

    async def _whole(self, completion: Completion, news: "News", request: Request) -> Response:
        deltas, looked = [], time.monotonic()
        try:
            while (item := await news.next(PRESENCE_SECONDS)) is not END:
                if time.monotonic() - looked >= PRESENCE_SECONDS:
                    looked = time.monotonic()
                    if await request.is_disconnected():
                        self.metrics.note(CANCELLED_STATUS, completion)
                        return Response(status_code=CANCELLED_STATUS)
                if isinstance(item, Delta):
                    deltas.append(item)
        finally:
            news.job.cancelled.set()
        self.metrics.note(200, completion)
        return JSONResponse(Writer(self.name).whole(completion, deltas))

    async def _stream(self, completion: Completion, news: "News") -> Response:
        """Begins with the first news: if that is an error, it is the answer."""
        try:
            first = await news.next(None)
        except BaseException:
            news.job.cancelled.set()
            raise
        return StreamingResponse(self._events(completion, news, first), media_type="text/event-stream")

    async def _events(self, completion: Completion, news: "News", item: object) -> AsyncIterator[str]:
        writer, options, status = Writer(self.name), completion.request.stream_options, CANCELLED_STATUS
        try:
            while item is not END:
                if isinstance(item, Delta):
                    yield _event(writer.chunk(item))
                elif isinstance(item, Cost) and options and options.include_costs:
                    yield _event(writer.cost(item))
                elif isinstance(item, Waiting):
                    yield f": {item}\n\n"
                elif item is None:
                    yield ": it goes on\n\n"
                item = await news.next(KEEP_ALIVE_SECONDS)
            if options and options.include_usage:
                yield _event(writer.end(completion))
            status = 200
            yield DONE
        except ProtocolError as error:
            status = error.status
            yield _event(error.content())
        finally:
            news.job.cancelled.set()
            self.metrics.note(status, completion)


END = object()


class News:
    """
    What a job says, from its thread to the loop of this one.

    Attributes:
        job ([`Job`]): Who says it.
    """

    job: Job

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[object] = asyncio.Queue()

    def put(self, item: object):
        """An item, or last of all an error or `None`."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._items.put_nowait, END if item is None else item)

    async def next(self, seconds: float | None) -> object:
        """
        The next item; `END` after the last, `None` if there was none for these seconds.

        Raises:
            `ProtocolError`: If the job has failed.
        """
        try:
            item = await asyncio.wait_for(self._items.get(), seconds)
        except TimeoutError:
            return None
        if isinstance(item, ProtocolError):
            raise item
        return item


def _event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _refuse(error: ProtocolError) -> JSONResponse:
    return JSONResponse(error.content(), error.status, error.headers)


async def _describe_mistake(request: Request, error: UserError) -> JSONResponse:
    return _refuse(error if isinstance(error, ProtocolError) else ProtocolError(400, str(error)))


async def _describe_path(request: Request, error: HTTPException) -> JSONResponse:
    if error.status_code == 405:
        allowed = ", ".join(sorted(error.headers["Allow"].split(", ")))
        message = f"{request.method} is not possible here, but {allowed} is."
        return _refuse(ProtocolError(405, message, code="wrong_method", headers={"allow": allowed}))
    return _refuse(
        ProtocolError(
            error.status_code,
            "there is no such path. A private model is asked at /v1/completions; it has no chat.",
            code="unknown_path",
        )
    )


def _policy(page: str) -> str:
    """Of a page that runs and shows what is written in it, and asks its own gateway alone."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
