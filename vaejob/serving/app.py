"""The HTTP side: routes, and limits on size and rate. One question is worked on at a time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import resources
from typing import Any

from aiohttp import web

from vaejob.errors import OutsideError, VaejobError
from vaejob.loaded import LoadedModel
from vaejob.serving.answers import QUESTIONS, answer

MAX_BODY_BYTES = 16 * 2**20
QUESTIONS_A_SECOND, QUESTIONS_AT_ONCE = 10.0, 20.0
WAITING = 8
"""Questions that may wait while another is worked on."""

_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Bucketful:
    """A token bucket: so many at once, refilled so many a second."""

    def __init__(self, *, a_second: float, at_once: float) -> None:
        self._a_second, self._at_once = a_second, at_once
        self._left, self._counted_at = at_once, time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self._left = min(self._at_once, self._left + (now - self._counted_at) * self._a_second)
        self._counted_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def make_app(model: LoadedModel, about: dict[str, Any], *, hosts: frozenset[str] | None) -> web.Application:
    """GET / and /api/model, POST /api/VERB with a JSON object.

    about: what /api/model says. hosts: names by which the server may be addressed, so that no page of elsewhere reaches
    one on loopback through a name of its own; None for any.
    """
    app = web.Application(middlewares=[_guard(hosts)], client_max_size=MAX_BODY_BYTES)
    for path, (name, kind) in _PAGE.items():
        text = resources.files("vaejob.serving").joinpath(name).read_text()
        app.router.add_get(path, partial(_text, text=text, kind=kind))
    app.router.add_get("/api/model", partial(_about, about=about))
    working = ThreadPoolExecutor(1, thread_name_prefix="model")
    rate, waiting = Bucketful(a_second=QUESTIONS_A_SECOND, at_once=QUESTIONS_AT_ONCE), asyncio.Semaphore(WAITING + 1)
    for verb in QUESTIONS:
        app.router.add_post(
            f"/api/{verb}", partial(_answer, verb=verb, model=model, working=working, rate=rate, waiting=waiting)
        )
    return app


async def _text(request: web.Request, *, text: str, kind: str) -> web.Response:
    return web.Response(text=text, content_type=kind, charset="utf-8")


async def _about(request: web.Request, *, about: dict[str, Any]) -> web.Response:
    return web.json_response(about)


async def _answer(
    request: web.Request,
    *,
    verb: str,
    model: LoadedModel,
    working: ThreadPoolExecutor,
    rate: Bucketful,
    waiting: asyncio.Semaphore,
) -> web.Response:
    if request.content_type != "application/json":  # what a form of another page cannot send
        return _refusal(415, "send a JSON object, with Content-Type: application/json")
    if not rate.take() or waiting.locked():
        return _refusal(
            429, f"busy: at most {QUESTIONS_A_SECOND:g} questions a second, {WAITING} waiting; ask again in a second"
        )
    async with waiting:
        body = await request.read()
        found = await asyncio.get_running_loop().run_in_executor(working, answer, verb, body, model)
    return web.json_response(found)


def _guard(hosts: frozenset[str] | None) -> Callable[..., Awaitable[web.StreamResponse]]:
    @web.middleware
    async def guard(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            if hosts is not None and request.url.host not in hosts:
                response: web.StreamResponse = _refusal(403, f"this server answers to {', '.join(sorted(hosts))} only")
            else:
                response = await handler(request)
        except VaejobError as error:
            response = _refusal(503 if isinstance(error, OutsideError) else 400, str(error))
        except web.HTTPRequestEntityTooLarge:
            response = _refusal(413, f"at most {MAX_BODY_BYTES // 2**20} MiB can be sent")
        except web.HTTPException as error:
            response = _refusal(error.status, error.reason)
        response.headers.update(_HEADERS)
        return response

    return guard


def _refusal(status: int, line: str) -> web.Response:
    headers = {"Retry-After": "1"} if status == 429 else {}
    return web.json_response({"error": line}, status=status, headers=headers)
