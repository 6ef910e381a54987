"""What schemathesis makes of /openapi.json: whatever is sent, the answer is declared there, and no failure of ours."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from api_service import Files, running

from serve_app.api import Limits

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


async def test_no_request_makes_it_fail_or_answer_what_is_not_declared(tmp_path: Any, files: Files) -> None:
    limits = Limits(max_queued=50, max_body_bytes=64_000, max_pixel_frames=64 * 64 * 64)
    async with running(tmp_path, files, limits=limits) as service:
        service.gpu.may_finish.set()
        async with service.working():
            command = [
                *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{service.url}/openapi.json"),
                *(
                    "--checks",
                    CHECKS,
                    "--max-examples",
                    "15",
                    "--seed",
                    "1",
                    "--request-timeout",
                    "20",
                    "--workers",
                    "2",
                ),
                *("--exclude-path-regex", "/events$"),  # streams, for as long as a job lives
            ]
            process = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=tmp_path
            )
            output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-6000:]
    assert b"Tested: 13" in output
