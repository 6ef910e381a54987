"""Fixtures of the service's tests."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
from api_service import Files, Service, running
from databases import database_url, postgresql  # noqa: F401  # fixtures

from serve_app.api import Limits
from serve_app.job_logs import OURS
from t2v_core.media import encode_video
from t2v_core.pictures import encode_spritesheet, encode_thumbnail


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def own_loggers() -> Iterator[None]:
    """A replica that is built in a test gives our lines to Serve's logger: not those of the next test too."""
    yield
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def files() -> Files:
    frames = torch.randint(0, 256, (8, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Files(encode_video(frames, fps=4), encode_thumbnail(frames), encode_spritesheet(frames))


RunService = Callable[..., Awaitable[Service]]


@pytest.fixture
async def run_service(tmp_path: Path, files: Files) -> AsyncIterator[RunService]:
    """Start a service with these keys and limits; it ends with the test."""
    async with AsyncExitStack() as stack:

        async def run(
            *,
            keys: str = "",
            key: str | None = None,
            limits: Limits | None = None,
            ready: dict[str, bool] | None = None,
        ) -> Service:
            return await stack.enter_async_context(running(tmp_path, files, keys, key, limits, ready))

        yield run


@pytest.fixture
async def service(run_service: RunService) -> Service:
    return await run_service()


@pytest.fixture(scope="module")
async def shared_service(tmp_path_factory: pytest.TempPathFactory, files: Files) -> AsyncIterator[Service]:
    """One for all tests whose calls are refused."""
    async with running(tmp_path_factory.mktemp("shared"), files) as service:
        yield service
