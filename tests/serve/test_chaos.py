"""Some of the kills of `make chaos`."""

import pytest
from chaos import chaos
from running import config, ray_started, running

pytestmark = pytest.mark.service


def test_eight_kills_under_load_lose_and_double_nothing(tmp_path):
    with ray_started(), running(config(tmp_path)) as service:
        report = chaos(service, kills=8, seed=0)
    print(report)  # noqa: T201 - the figures, with pytest -s
    report.check()
    assert report.kills.total() >= 6
