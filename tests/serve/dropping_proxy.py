"""A proxy between a client and the service that treats its first connections badly, as it is told."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Proxy:
    """What it does to the connections to come: cut the answer after so many bytes, or give these bytes as the answer.

    Those behind the last one are left alone. `received` holds what each connection sent.
    """

    url: str
    plan: list[int | bytes] = field(default_factory=list)
    received: list[bytearray] = field(default_factory=list)

    def header(self, connection: int, name: str) -> str | None:
        found = re.search(rf"^{name}: (.*?)\r$", self.received[connection].decode(), re.MULTILINE | re.IGNORECASE)
        return None if found is None else found[1]


@asynccontextmanager
async def dropping(service_url: str, *plan: int | bytes) -> AsyncIterator[Proxy]:
    upstream = urlsplit(service_url)
    connections: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        fate = proxy.plan.pop(0) if proxy.plan else None
        received = bytearray()
        proxy.received.append(received)
        up_reader, up_writer = await asyncio.open_connection(upstream.hostname, upstream.port)
        asking = asyncio.create_task(copy(reader, up_writer, received, isinstance(fate, bytes)))
        try:
            if isinstance(fate, bytes):
                while b"\r\n\r\n" not in received:  # noqa: ASYNC110  # a test's proxy
                    await asyncio.sleep(0.001)
                writer.write(fate)
                await writer.drain()
                return
            num_left = fate
            while chunk := await up_reader.read(65536):
                writer.write(chunk if num_left is None else chunk[:num_left])
                await writer.drain()
                if num_left is not None:
                    num_left -= len(chunk)
                    if num_left <= 0:
                        return
        except asyncio.CancelledError:
            pass  # streams log it as an error
        finally:
            asking.cancel()
            writer.close()
            up_writer.close()
            connections.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy = Proxy(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", list(plan))
    try:
        yield proxy
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: bytearray, is_kept: bool) -> None:
    while chunk := await reader.read(65536):
        seen += chunk
        if not is_kept:
            writer.write(chunk)
            await writer.drain()
    writer.close()


def answer(status: str, body: bytes = b"", **headers: str) -> bytes:
    """The bytes of an HTTP answer."""
    head = {"content-length": str(len(body)), "connection": "close"} | headers
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in head.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def event_stream(*events: str) -> bytes:
    """The bytes of an answer of these events that stops behind them."""
    return answer("200 OK", "".join(events).encode(), content_type="text/event-stream")
