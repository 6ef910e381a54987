"""The dev overlay's service works as its manifest confines it: no root, a read-only file system, a token, HAProxy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.manifests import groups
from cluster.render import ROOT

HERE = Path(__file__).parent
NEEDED = ("unshare", "setpriv", "mount", "ip")
NAMESPACES = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]


def confinable() -> bool:
    """Whether this machine lets us make namespaces at all; containers often do not."""
    if os.geteuid() != 0 or not all(map(shutil.which, NEEDED)):
        return False
    trial = [*NAMESPACES, "sh", "-c", "mount --make-rprivate / && mount -t tmpfs tmpfs /mnt && ip link set lo up"]
    return subprocess.run(trial, capture_output=True).returncode == 0


@pytest.mark.service
@pytest.mark.skipif(not confinable(), reason="needs root, and namespaces of mounts, network and processes")
def test_a_confined_pod_serves(trees, tmp_path):
    (service,) = (m for m in trees["overlays/dev"].manifests if m["kind"] == "RayService")
    (head,) = groups(service["spec"]["rayClusterConfig"])
    config = tmp_path / "serve.yaml"
    config.write_text(service["spec"]["serveConfigV2"])
    mounts = head.ray["volumeMounts"]
    user = head.pod.spec["securityContext"]["runAsUser"]
    visible = [Path(sys.prefix), Path(sys.base_prefix), ROOT.parent, tmp_path]
    above = {folder for path in visible for folder in (path, *path.parents)}
    closed = [folder for folder in above if not folder.stat().st_mode & 0o001 and folder not in visible]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/tmp",
        "RAY_AUTH_MODE": "token",  # these two KubeRay sets, of authOptions
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        **head.environment,
        "VISIBLE": ":".join(map(str, visible)),
        "CLOSED": ":".join(map(str, closed)),
        "WRITABLE": ":".join(["/dev/shm", *(m["mountPath"] for m in mounts if not m.get("readOnly"))]),
    }
    tmp_path.chmod(0o755)
    command = [*NAMESPACES, "bash", HERE / "confined.sh", str(user), sys.executable, HERE / "in_pod.py", config]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    assert (seen["uid"], seen["root"], seen["tmp"]) == (user, False, True)
    assert seen["without the token"] != 0
    assert (seen["deployed"], seen["video"]) == (0, 0)
    assert seen["bytes"] > 1000
    assert seen["metrics"]
    assert "success" in seen["worker's probe"]  # what KubeRay looks for
    assert "success" in seen["head's probe"]
