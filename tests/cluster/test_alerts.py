"""Alerts fire when they should, and only then, by Prometheus' own judgement: alerts.yaml says when."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

CASES = Path(__file__).with_name("alerts.yaml")


@pytest.fixture
def rules(trees):
    (rule,) = (m for m in trees["overlays/gpu-pool"].manifests if m["kind"] == "PrometheusRule")
    return rule["spec"]


def test_each_alert_is_seen_firing(rules):
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    firing = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert firing == {alert["alert"] for group in rules["groups"] for alert in group["rules"]}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of the package prometheus, is not installed")
def test_alerts_fire_when_they_should(rules, tmp_path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    shutil.copy(CASES, tmp_path)
    ran = subprocess.run(["promtool", "test", "rules", "alerts.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
