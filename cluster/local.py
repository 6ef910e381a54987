"""A Ray cluster of two nodes on this machine with the service on it, until Ctrl-C.

    make cluster                                                    # with a PostgreSQL that ends with it
    python -m cluster.local --database postgresql://me@/t2v         # with one of yours, whose jobs stay

The nodes are begun with `ray start`, as on machines of their own; the head is given no work that needs the model.
SQLite is for one node: a database that several nodes write needs a server.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from cluster.ray_nodes import SERVE, RayNodes, http_status
from cluster.render import Changes, Config, Source, serve_config

logger = logging.getLogger("cluster.local")

_READY_WITHIN_S = 180.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--database", help="postgresql://...; without one, a PostgreSQL of the test extra is started")
    parser.add_argument("--store", type=Path, default=Path("outputs/store"), help="the folder of the videos")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--once", action="store_true", help="end as soon as the service is ready")
    arguments = parser.parse_args()
    if arguments.database is not None and not arguments.database.startswith("postgresql://"):
        parser.error(f"--database {arguments.database}: several nodes share it; name a postgresql:// one")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        database = arguments.database or stack.enter_context(_database())
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="t2v-")))  # short: Ray's sockets are in it
        nodes = stack.enter_context(_two_nodes(folder))
        _deploy(nodes, database, arguments.store.absolute(), arguments.port)
        logger.info("serving on http://127.0.0.1:%d, Ray's dashboard is %s", arguments.port, nodes.dashboard)
        logger.info("other commands reach the cluster with: export %s", nodes.exports())
        if not arguments.once:
            logger.info("Ctrl-C ends it")
            threading.Event().wait()


@contextlib.contextmanager
def _database() -> Iterator[str]:
    try:
        from databases import running_postgresql  # type: ignore[import-not-found]  # of the tests
    except ImportError:
        sys.exit("no --database: name a postgresql:// one, or run `make cluster`, which brings its own")
    with running_postgresql() as server, server.database() as url:
        yield url


@contextlib.contextmanager
def _two_nodes(folder: Path) -> Iterator[RayNodes]:
    nodes = RayNodes(folder)
    cores = os.cpu_count() or 1
    try:
        nodes.start_head("--num-cpus=1", "--labels=pool=head")
        nodes.start_worker(f"--num-cpus={max(2, cores)}", "--labels=pool=work")
        yield nodes
    finally:
        nodes.close()


def configuration(database: str, store: Path, port: int) -> Config:
    """cluster/serve/local.yaml, with storage that both nodes reach, and what needs the model off the head."""
    work = {"label_selector": {"pool": "work"}}
    storage = {"database": database, "artifacts": str(store)}
    args = {"storage": storage, "text_encoder": work, "denoiser": work, "decoder": work}
    return serve_config(Source(base="local.yaml", changes=Changes(http_options={"port": port}, args=args)))


def _deploy(nodes: RayNodes, database: str, store: Path, port: int) -> None:
    """As on any cluster: a file for `serve deploy`, whose status is then asked for."""
    file = nodes.folder / "serve.yaml"
    file.write_text(yaml.safe_dump(configuration(database, store, port)))
    nodes.run(SERVE, "deploy", str(file))
    deadline = time.monotonic() + _READY_WITHIN_S
    while http_status(f"http://127.0.0.1:{port}/readyz") != 200:
        if time.monotonic() > deadline:
            sys.exit(f"not ready after {_READY_WITHIN_S:.0f} s: {nodes.run(SERVE, 'status')}")
        time.sleep(0.5)


if __name__ == "__main__":
    main()
