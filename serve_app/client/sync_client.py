"""The client that blocks."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx2

from serve_app.client import calls
from serve_app.client.calls import Call, Order, Retries
from serve_app.client.errors import ApiError, error_of, transport_explained
from serve_app.client.models import Ended, Event, Variant, Video, VideoPage, VideoSettings

_Result = TypeVar("_Result")


class Client:
    """Calls the service at `base_url`; threads may share one. Close it, or use it in a `with` block.

    `timeout_s` bounds how long the service may say nothing. A call whose connection fails, and one that is answered
    429 or 503, is made again up to `max_retries` times. Every method raises ApiError.
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
        self._http = httpx2.Client(**calls.options_of(base_url, api_key))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def create(self, prompt: str, *, idempotency_key: str | None = None, **settings: Unpack[VideoSettings]) -> Video:
        """Queue a video. With the idempotency key of an earlier call of the same settings, that call's video.

        A key is drawn where none is given, so that a retry never makes a second video.
        """
        return self._video(calls.create_call(prompt, settings, idempotency_key))

    def edit(
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
        return self._video(calls.edit_call(prompt, video, strength, settings, idempotency_key))

    def remix(self, video_id: str, prompt: str, *, idempotency_key: str | None = None) -> Video:
        """Queue a video with the seed and the settings of another one, and this prompt."""
        return self._video(calls.remix_call(video_id, prompt, idempotency_key))

    def retrieve(self, video_id: str) -> Video:
        """The video as it is now."""
        return self._video(calls.retrieve_call(video_id))

    def list(self, *, order: Order = "desc", after: str | None = None, page_size: int = 100) -> Iterator[Video]:
        """All videos behind `after`, by time of creation. Those given may be deleted meanwhile."""
        has_more = True
        while has_more:
            page = self._page(calls.list_call(after, order, page_size))
            yield from page.data
            after, has_more = page.last_id, page.has_more

    def cancel(self, video_id: str) -> Video:
        """Stop a video: at once while it is queued, at its next step while it is made."""
        return self._video(calls.cancel_call(video_id))

    def delete(self, video_id: str) -> None:
        """Remove a video and its files. One that has not ended is cancelled first."""
        self._answer(calls.delete_call(video_id), _read)

    def content(self, video_id: str, variant: Variant = "video") -> bytes:
        """The file of a completed video."""
        return self._answer(calls.content_call(video_id, variant), lambda response: _read(response).content)

    def download(self, video_id: str, path: Path | str, variant: Variant = "video") -> Path:
        """Write the file of a completed video, whole or not at all. Raises OSError as well."""
        path = Path(path)
        with calls.written_whole(path) as file:

            def save(response: httpx2.Response) -> None:
                file.seek(0)
                file.truncate()
                for chunk in response.iter_bytes():
                    file.write(chunk)

            self._answer(calls.content_call(video_id, variant), save)
        return path

    def events(self, video_id: str, *, last_event_id: str | None = None) -> Iterator[Event]:
        """What happens to a video, up to completed, failed or cancelled. A lost connection goes on where it broke."""
        retries = Retries(self._max_retries)
        while True:
            try:
                with self._open(calls.events_call(video_id, last_event_id)) as response:
                    if response.status_code == 204:  # the last event was seen
                        return
                    calls.check_is_stream(response)
                    retries.opened()
                    for sent in httpx2.EventSource(response):
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
            time.sleep(pause_s)

    def wait(self, video_id: str) -> Video:
        """The video once it has ended: as completed, failed or cancelled."""
        for event in self.events(video_id):
            if isinstance(event, Ended):
                return event.video
        return self.retrieve(video_id)

    def make(self, prompt: str, *, idempotency_key: str | None = None, **settings: Unpack[VideoSettings]) -> Video:
        """Queue a video and wait until it has ended."""
        return self.wait(self.create(prompt, idempotency_key=idempotency_key, **settings).id)

    def _video(self, call: Call) -> Video:
        return self._answer(call, lambda response: calls.model_of(_read(response), Video))

    def _page(self, call: Call) -> VideoPage:
        return self._answer(call, lambda response: calls.model_of(_read(response), VideoPage))

    def _answer(self, call: Call, read: Callable[[httpx2.Response], _Result]) -> _Result:
        """What `read` makes of the answer, at the first try that gets a whole one."""
        retries = Retries(self._max_retries, is_repeatable=call.is_repeatable)
        while True:
            try:
                with self._open(call) as response:
                    return read(response)
            except ApiError as error:
                pause_s = retries.pause_s(error)
            time.sleep(pause_s)

    @contextmanager
    def _open(self, call: Call) -> Iterator[httpx2.Response]:
        """A good answer, its body still to be read."""
        with transport_explained(self.base_url):
            response = self._http.send(call.request(self._http, self._timeout_s), stream=True)
            try:
                if not response.is_success:
                    raise error_of(_read(response))
                yield response
            finally:
                response.close()


def _read(response: httpx2.Response) -> httpx2.Response:
    response.read()
    return response
