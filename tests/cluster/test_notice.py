"""A pod that is told to end tells Ray: KubeRay starts a node by a shell, which must not keep the signal to itself."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# As KubeRay v1.7.0 starts a container: utils.GetContainerCommand, and args of common/pod.go, which end in `ray start`.
SHELL = ["/bin/bash", "-c", "--"]
START = "ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-256}}; {ray}  --block  --num-cpus=0 "

NODE = """\
    import os, signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("drained"))  # as `ray start --block` has a handler of its own
    print(os.getpid(), flush=True)
    time.sleep(60)
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not Path(SHELL[0]).exists(), reason="of the image's shell, bash on Linux"
)


@pytest.mark.parametrize(
    ("command", "arrives"), [(START, True), (START + "; true", False)], ids=["KubeRay's", "with more after it"]
)
def test_sigterm_arrives_at_what_kuberay_starts(command, arrives, tmp_path):
    file = tmp_path / "node.py"
    file.write_text(textwrap.dedent(NODE))
    shell = subprocess.Popen(
        [*SHELL, command.format(ray=f"{sys.executable} {file}")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        node = int(shell.stdout.readline())
        shell.send_signal(signal.SIGTERM)
        code = shell.wait(20)
        assert (node == shell.pid, code) == ((True, 1) if arrives else (False, -signal.SIGTERM))
        assert not arrives or shell.stderr.read().strip() == "drained"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.communicate()
