"""Fixtures for the comparisons with the reference implementations."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield
