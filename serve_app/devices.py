"""The device and the threads of a replica, from the share of a machine that it was given."""

import os

import torch

from serve_app.config import Scaling


def claim_device(config: Scaling) -> torch.device:
    """The replica's GPU or, where it was given none, the CPU, with as many threads as it may use."""
    threads = max(1, round(config.num_cpus)) if config.num_threads is None else config.num_threads
    torch.set_num_threads(threads or os.cpu_count() or 1)
    return torch.device("cuda" if config.num_gpus else "cpu")
