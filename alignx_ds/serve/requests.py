"""What comes from a client: its key, its body within limits of size and time, and whether it is still there."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request

from alignx_ds.serve.protocol import ApiError

LOOPBACK = ("127.0.0.1", "::1", "localhost")  # this machine's own names
BODY_SECONDS = 30.0  # within which a body has to be here
Result = TypeVar("Result")


def check_host(request: Request) -> None:
    """Raises ApiError unless the request is addressed to this machine by a name of its own.

    Where no key is asked for, a page of another site could otherwise let its name resolve to this machine, and use the
    server from its visitor's browser.
    """
    host = request.headers.get("host", "")
    with suppress(ValueError):
        if urlsplit(f"//{host}").hostname in LOOPBACK:
            return
    raise ApiError(403, f"the host is {host!r}; ask for localhost, or start the server with a key", code="wrong_host")


def check_key(request: Request, key: str | None) -> None:
    """Raises ApiError unless the request brings the server's key, if that has one."""
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        message = "this server needs its API key: send the header `Authorization: Bearer KEY`"
        raise ApiError(401, message, code="invalid_api_key")


async def read_body(request: Request, most: int) -> bytes:
    """Raises ApiError for a body that is no JSON by its header, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also what keeps other sites' pages in a browser from sending requests
        raise ApiError(415, f"the content type is {kind!r}; send JSON with `Content-Type: application/json`")
    too_large = ApiError(413, f"the body has more than {most} bytes; shorten it, or start the server with --max-body")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError as error:
        message = f"the body was not complete after {BODY_SECONDS:g} seconds; send it faster"
        raise ApiError(408, message, retry=True) from error
    return bytes(body)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work. Cancels it and raises ClientDisconnect once the client is gone; its body was read."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
