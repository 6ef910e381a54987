"""What the kernels' tests share."""

import random

import pytest
import torch


@pytest.fixture
def seeded():
    """The same random numbers for every test, and no gradients."""
    torch.manual_seed(0)
    random.seed(0)
    with torch.inference_mode():
        yield
