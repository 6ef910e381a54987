"""The client that awaits: method for method the one that blocks."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx2

from serve_app.client import calls
from serve_app.client.calls import Call, Order, Retries
from serve_app.client.errors import ApiError, error_of, transport_explained
from serve_app.client.models import Ended, Event, Variant, Video, VideoPage, VideoSettings

_Result = TypeVar("_Result")


class AsyncClient:
    """Calls the service at `base_url`; tasks of one event loop may share it. Use it in an `async with` block.

    Options, retries and errors are those of Client.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        timeout_s: float = 60.0,
        *,
        max_retries: int = 3,
    ) -> None:
        self.base_url = base_url
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._http = httpx2.AsyncClient(**calls.options_of(base_url, api_key))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def create(
        self, prompt: str, *, idempotency_key: str | None = None, **settings: Unpack[VideoSettings]
    ) -> Video:
        """Queue a video. With the idempotency key of an earlier call of the same settings, that call's video.

        A key is drawn where none is given, so that a retry never makes a second video.
        """
        return await self._video(calls.create_call(prompt, settings, idempotency_key))

    async def edit(
        self,
        prompt: str,
        video: str | Path | bytes,
        *,
        strength: float | None = None,
        idempotency_key: str | None = None,
        **settings: Unpack[VideoSettings],
    ) -> Video:
        """Queue a video that is made of another one: a completed video by its id, a file, or a file's bytes.

        `strength`, from above 0 to 1, says how much of it is made anew.
        """
        return await self._video(calls.edit_call(prompt, video, strength, settings, idempotency_key))

    async def remix(self, video_id: str, prompt: str, *, idempotency_key: str | None = None) -> Video:
        """Queue a video with the seed and the settings of another one, and this prompt."""
        return await self._video(calls.remix_call(video_id, prompt, idempotency_key))

    async def retrieve(self, video_id: str) -> Video:
        """The video as it is now."""
        return await self._video(calls.retrieve_call(video_id))

    async def list(
        self, *, order: Order = "desc", after: str | None = None, page_size: int = 100
    ) -> AsyncIterator[Video]:
        """All videos behind `after`, by time of creation. Those given may be deleted meanwhile."""
        has_more = True
        while has_more:
            page = await self._page(calls.list_call(after, order, page_size))
            for video in page.data:
                yield video
            after, has_more = page.last_id, page.has_more

    async def cancel(self, video_id: str) -> Video:
        """Stop a video: at once while it is queued, at its next step while it is made."""
        return await self._video(calls.cancel_call(video_id))

    async def delete(self, video_id: str) -> None:
        """Remove a video and its files. One that has not ended is cancelled first."""
        await self._answer(calls.delete_call(video_id), _read)

    async def content(self, video_id: str, variant: Variant = "video") -> bytes:
        """The file of a completed video."""
        return (await self._answer(calls.content_call(video_id, variant), _read)).content

    async def download(self, video_id: str, path: Path | str, variant: Variant = "video") -> Path:
        """Write the file of a completed video, whole or not at all. Raises OSError as well."""
        path = Path(path)
        with calls.written_whole(path) as file:

            async def save(response: httpx2.Response) -> None:
                file.seek(0)
                file.truncate()
                async for chunk in response.aiter_bytes():
                    await asyncio.to_thread(file.write, chunk)

            await self._answer(calls.content_call(video_id, variant), save)
        return path

    async def events(self, video_id: str, *, last_event_id: str | None = None) -> AsyncGenerator[Event, None]:
        """What happens to a video, up to completed, failed or cancelled. A lost connection goes on where it broke.

        Who leaves earlier closes it: `async with contextlib.aclosing(client.events(video_id)) as events`.
        """
        retries = Retries(self._max_retries)
        while True:
            try:
                async with self._open(calls.events_call(video_id, last_event_id)) as response:
                    if response.status_code == 204:  # the last event was seen
                        return
                    calls.check_is_stream(response)
                    retries.opened()
                    async for sent in httpx2.EventSource(response):
                        last_event_id = sent.id or last_event_id
                        event = calls.received(response, sent)
                        if event is None:
                            continue
                        retries.renew()
                        yield event
                        if isinstance(event, Ended):
                            return
                raise calls.stream_ended(self.base_url)
            except ApiError as error:
                pause_s = retries.pause_s(error)
            await asyncio.sleep(pause_s)

    async def wait(self, video_id: str) -> Video:
        """The video once it has ended: as completed, failed or cancelled."""
        async with aclosing(self.events(video_id)) as events:
            async for event in events:
                if isinstance(event, Ended):
                    return event.video
        return await self.retrieve(video_id)

    async def make(
        self, prompt: str, *, idempotency_key: str | None = None, **settings: Unpack[VideoSettings]
    ) -> Video:
        """Queue a video and wait until it has ended."""
        return await self.wait((await self.create(prompt, idempotency_key=idempotency_key, **settings)).id)

    async def _video(self, call: Call) -> Video:
        return await self._answer(call, _video)

    async def _page(self, call: Call) -> VideoPage:
        return await self._answer(call, _page)

    async def _answer(self, call: Call, read: Callable[[httpx2.Response], Awaitable[_Result]]) -> _Result:
        """What `read` makes of the answer, at the first try that gets a whole one."""
        retries = Retries(self._max_retries, is_repeatable=call.is_repeatable)
        while True:
            try:
                async with self._open(call) as response:
                    return await read(response)
            except ApiError as error:
                pause_s = retries.pause_s(error)
            await asyncio.sleep(pause_s)

    @asynccontextmanager
    async def _open(self, call: Call) -> AsyncIterator[httpx2.Response]:
        """A good answer, its body still to be read."""
        with transport_explained(self.base_url):
            response = await self._http.send(call.request(self._http, self._timeout_s), stream=True)
            try:
                if not response.is_success:
                    raise error_of(await _read(response))
                yield response
            finally:
                await response.aclose()


async def _read(response: httpx2.Response) -> httpx2.Response:
    await response.aread()
    return response


async def _video(response: httpx2.Response) -> Video:
    return calls.model_of(await _read(response), Video)


async def _page(response: httpx2.Response) -> VideoPage:
    return calls.model_of(await _read(response), VideoPage)
