"""An HTTP/1.1 proxy in front of an S3 server that does to requests what networks and busy servers do.

A rule is {"fault": F, "method": regex, "path": regex, "header": regex, "skip": K, "count": N, ...}: it lets the first K
matching requests pass and strikes the next N (for ever without a count). The faults and their further settings:

    status (code, s3code)     an error reply; the server never sees the request
    ok_error (s3code)         the same with status 200, as S3 does for some requests
    delay (seconds)           passed on late
    blackhole (seconds)       taken whole, never answered
    reset, close              the connection ends before a reply
    req_reset, req_stall, req_corrupt (at)             at that byte of the request's body
    reset_mid, fin_mid, stall_mid, corrupt (at)        at that byte of the reply's body
    short_length (at)         a reply that ends there, whose Content-Length agrees, and that is the connection's last
    reset_after               carried out by the server; the reply is lost
    stall_after (seconds)     the same, but the connection stays open for so long
    throttle (bytes_per_s)    replies share a line of this speed

A rule with a "chance" strikes that share of its requests, drawn from a seed, in place of all. `proxy.refuse(seconds)` is
no rule: nobody listens for so long, and open connections are reset.
"""

import asyncio
import contextlib
import gc
import math
import random
import re
import socket
import struct
import threading
import warnings
from collections.abc import AsyncIterator
from typing import Any

Rule = dict[str, Any]
Headers = dict[str, str]

_LONG_S = 600.0


class FaultProxy:
    """`with FaultProxy(upstream=port) as proxy:` listens on proxy.port; proxy.log lists the requests seen."""

    def __init__(self, *, upstream: int, host: str = "127.0.0.1") -> None:
        self._upstream, self._host = upstream, host
        self._rules: list[Rule] = []
        self._seen: dict[int, int] = {}
        self._dice = random.Random(0)
        self._line_free_at = 0.0
        self._exchanges: set[asyncio.Task[None]] = set()
        self.log: list[dict[str, Any]] = []
        self.port = 0

    def strike(self, *rules: Rule) -> None:
        """Replaces the rules and forgets the log."""
        self._rules, self._seen, self._dice, self.log = list(rules), {}, random.Random(0), []

    def refuse(self, *, seconds: float) -> None:
        """Returns once connections are refused."""
        asyncio.run_coroutine_threadsafe(self._stop_listening(seconds), self._loop).result(10)

    async def _stop_listening(self, seconds: float) -> None:
        self._server.close()
        for exchange in self._exchanges:
            exchange.cancel()
        self._loop.call_later(seconds, lambda: self._loop.create_task(self._listen()))

    async def _listen(self) -> None:
        listener = _bound(self._host, self.port)
        self._server = await asyncio.start_server(self._handle, sock=listener, limit=1 << 20)

    def __enter__(self) -> "FaultProxy":
        started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        with warnings.catch_warnings():  # who was accepted at the very end is no matter of a later test
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        with _bound(
            self._host, 0
        ) as reserved:  # bound but not listening: the port stays ours while connections are refused
            self.port = reserved.getsockname()[1]
            self._loop.run_until_complete(self._listen())
            started.set()
            self._loop.run_forever()
        self._server.close()
        self._loop.run_until_complete(asyncio.sleep(0.01))  # who was accepted last has a transport by then
        open_requests = asyncio.all_tasks(self._loop)
        for request in open_requests:
            request.cancel()
        self._loop.run_until_complete(asyncio.gather(*open_requests, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0.01))  # transports close their sockets in the loop's next rounds
        self._loop.close()

    def _rule_for(self, method: str, target: str, head: bytes) -> Rule:
        for index, rule in enumerate(self._rules):
            if not re.fullmatch(rule.get("method", ".*"), method) or not re.search(rule.get("path", ""), target):
                continue
            if "header" in rule and not re.search(rule["header"], head.decode("latin1"), re.IGNORECASE):
                continue
            self._seen[index] = self._seen.get(index, 0) + 1
            nth = self._seen[index] - rule.get("skip", 0)
            if nth > 0 and nth <= rule.get("count", nth) and self._dice.random() < rule.get("chance", 1):
                return rule
        return {}

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: list[asyncio.StreamWriter] = []
        this = asyncio.current_task()
        assert this
        self._exchanges.add(this)
        this.add_done_callback(self._exchanges.discard)
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream, limit=1 << 20)
            upstream.append(up_writer)
            while await self._exchange(reader, writer, up_reader, up_writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError, _Reset):
            _reset(writer, *upstream)
        finally:
            for each in (writer, *upstream):
                with contextlib.suppress(OSError):
                    each.close()

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> bool:
        """One request and its reply; False when the connection is to be closed."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin1").split(" ", 2)
        headers, rule = _headers(head), self._rule_for(method, target, head)
        fault = rule.get("fault")
        self.log.append({"method": method, "target": target, "range": headers.get("range"), "fault": fault})
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?im)^expect:[^\r\n]*\r\n", b"", head)
        if fault == "delay":
            await asyncio.sleep(rule["seconds"])
        if fault == "reset":
            raise _Reset
        if fault == "close":
            return False
        local = fault in ("status", "ok_error", "blackhole")
        if not local:
            up_writer.write(head)
        async for chunk in _struck_request(_body(reader, headers, is_reply=False), headers, rule):
            if not local:
                up_writer.write(chunk)
                await up_writer.drain()
        if fault == "blackhole":
            await asyncio.sleep(rule.get("seconds", _LONG_S))
            raise _Reset
        if local:
            writer.write(_error_reply(method, rule))
            await writer.drain()
            return True
        return await self._pass_reply(method, headers, rule, up_reader, writer)

    async def _pass_reply(
        self, method: str, asked: Headers, rule: Rule, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        head = await up_reader.readuntil(b"\r\n\r\n")
        while (status := int(head.split(b" ", 2)[1])) == 100:
            head = await up_reader.readuntil(b"\r\n\r\n")
        if rule.get("fault") in ("reset_after", "stall_after"):
            await asyncio.sleep(0 if rule["fault"] == "reset_after" else rule.get("seconds", _LONG_S))
            raise _Reset
        headers = _headers(head)
        has_body = method != "HEAD" and status not in (204, 304)
        if rule.get("fault") == "short_length" and has_body:
            ends_at = b"Connection: close\r\nContent-Length: %d" % _at(rule, headers)
            head = re.sub(rb"(?im)^content-length:[^\r\n]*", ends_at, head)
        writer.write(head)
        if has_body:
            async for chunk in _struck_reply(_body(up_reader, headers, is_reply=True), headers, rule):
                for bit in [chunk] if rule.get("fault") != "throttle" else _bits(chunk, rule["bytes_per_s"]):
                    await self._wait_for_line(len(bit) / rule.get("bytes_per_s", math.inf))
                    writer.write(bit)
                    await writer.drain()
        await writer.drain()
        ended = rule.get("fault") in ("fin_mid", "short_length")
        return not ended and "close" not in (asked.get("connection", "").lower(), headers.get("connection", "").lower())

    async def _wait_for_line(self, seconds: float) -> None:
        if seconds:
            now = self._loop.time()
            self._line_free_at = max(now, self._line_free_at) + seconds
            await asyncio.sleep(self._line_free_at - now)


def _bits(chunk: bytes, bytes_per_s: float) -> list[bytes]:
    """What the line carries in a twentieth of a second, each."""
    size = max(1, int(bytes_per_s / 20))
    return [chunk[first : first + size] for first in range(0, len(chunk), size)]


def _bound(host: str, port: int) -> socket.socket:
    """A socket that shares its port with others that are ours."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind((host, port))
    return bound


class _Reset(Exception):  # noqa: N818
    """The connection is to be reset."""


async def _struck_request(chunks: AsyncIterator[bytes], headers: Headers, rule: Rule) -> AsyncIterator[bytes]:
    fault, at, done = rule.get("fault"), _at(rule, headers), 0
    async for chunk in chunks:
        reached = done <= at < done + len(chunk)
        if reached and fault in ("req_reset", "req_stall"):
            await asyncio.sleep(0 if fault == "req_reset" else rule.get("seconds", _LONG_S))
            raise _Reset
        yield _flipped(chunk, at - done) if reached and fault == "req_corrupt" else chunk
        done += len(chunk)


async def _struck_reply(chunks: AsyncIterator[bytes], headers: Headers, rule: Rule) -> AsyncIterator[bytes]:
    fault, at, done = rule.get("fault"), _at(rule, headers), 0
    async for chunk in chunks:
        reached = done <= at < done + len(chunk)
        if reached and fault in ("reset_mid", "fin_mid", "stall_mid", "short_length"):
            yield chunk[: at - done]
            if fault in ("fin_mid", "short_length"):
                return
            await asyncio.sleep(0.2 if fault == "reset_mid" else rule.get("seconds", _LONG_S))
            raise _Reset
        yield _flipped(chunk, at - done) if reached and fault == "corrupt" else chunk
        done += len(chunk)


def _at(rule: Rule, headers: Headers) -> int:
    """The byte of the body where the fault strikes; counted from its end if negative."""
    size, at = int(headers.get("content-length", 0)), int(rule.get("at", 0))
    return min(at, size) if at >= 0 else max(0, size + at)


def _flipped(chunk: bytes, index: int) -> bytes:
    return chunk[:index] + bytes([chunk[index] ^ 0xFF]) + chunk[index + 1 :]


def _error_reply(method: str, rule: Rule) -> bytes:
    code = rule.get("code", 503) if rule["fault"] == "status" else 200
    xml = f"<?xml version='1.0'?><Error><Code>{rule.get('s3code', 'SlowDown')}</Code><Message>struck</Message></Error>"
    head = f"HTTP/1.1 {code} X\r\nContent-Type: application/xml\r\nContent-Length: {len(xml)}\r\n\r\n"
    return (head + ("" if method == "HEAD" else xml)).encode()


def _headers(head: bytes) -> Headers:
    lines = head.decode("latin1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def _reset(*writers: asyncio.StreamWriter) -> None:
    for writer in writers:
        with contextlib.suppress(OSError, AttributeError):
            linger = struct.pack("ii", 1, 0)  # closing sends RST and drops what was not sent
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()


async def _body(reader: asyncio.StreamReader, headers: Headers, *, is_reply: bool) -> AsyncIterator[bytes]:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        async for chunk in _chunked(reader):
            yield chunk
    elif "content-length" in headers:
        left = int(headers["content-length"])
        while left:
            data = await reader.read(min(left, 65536))
            if not data:
                raise _Reset
            left -= len(data)
            yield data
    elif is_reply:
        while data := await reader.read(65536):
            yield data


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        line = await reader.readline()
        size = int(line.split(b";")[0], 16)
        yield line + await reader.readexactly(size + 2 if size else 0)
        if not size:
            while (trailer := await reader.readline()) not in (b"\r\n", b""):
                yield trailer
            yield trailer
            return
