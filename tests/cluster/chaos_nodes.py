"""Nodes are killed, drained and replaced under load: every accepted job ends, none twice, and no file is left over.

    make chaos-cluster

starts four Ray nodes on this machine with the service on them, PostgreSQL and an S3 endpoint, and takes a node away 20
times: a GPU's, with notice or without, the one of all that needs no GPU, or the head. Another comes for each.
"""

import argparse
import logging
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from chaos import Report, fill_up, finish
from clustered import LONG_S, Clustered, bucket, clustered
from databases import running_postgresql
from four_nodes import CPUS, GPU, HEAD, NUM_GPUS, app_config, four_nodes
from running import wait_for

from cluster.ray_nodes import RayNode

logger = logging.getLogger(__name__)

LOSSES = ("GPU killed", "GPU killed", "GPU drained", "GPU drained", "CPUs killed", "head killed")
_PAUSE_S = (2.0, 8.0)


def chaos(service: Clustered, *, losses: int, seed: int) -> Report:
    """Take nodes away at random while jobs come in, then wait until every job has ended."""
    draw, report, began = random.Random(seed), Report(), time.monotonic()
    nodes = {"head": service.nodes.nodes[0], "CPUs": service.nodes.nodes[1]}
    accepted: list[str] = []
    for _ in range(losses):
        fill_up(service, accepted)
        time.sleep(draw.uniform(*_PAUSE_S))
        loss = draw.choice(LOSSES)
        kind = loss.split()[0]
        if kind == "head":
            nodes["head"].kill()
            nodes["head"] = service.nodes.start_head(*HEAD)
        elif kind == "CPUs":
            nodes["CPUs"].kill()
            nodes["CPUs"] = service.nodes.start_worker(*CPUS)
        else:
            victim = draw.choice(_gpu_nodes(service, nodes))
            service.nodes.start_worker(*GPU)
            if loss == "GPU drained":
                victim.terminate()
            else:
                victim.kill()
        report.kills[loss] += 1
        logger.info("%s: losses=%d jobs=%d", loss, report.kills.total(), len(accepted))
        wait_for(lambda: service.client.get("/readyz").json()["ready"], LONG_S, every_s=0.5)
    finish(service, accepted, report)
    report.seconds = time.monotonic() - began
    return report


def _gpu_nodes(service: Clustered, others: dict[str, RayNode]) -> list[RayNode]:
    """Those that live; one that is being drained still does, and may be killed all the same."""
    live = [node for node in service.nodes.nodes if node.process.poll() is None]
    return [node for node in live if node not in others.values()][-NUM_GPUS:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for noisy in ("httpx2", "ray", "ray.serve", "botocore", "aiobotocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with (
        TemporaryDirectory(prefix="t2v-") as folder,
        running_postgresql() as server,
        server.database() as database,
        bucket() as artifacts,
        four_nodes(Path(folder)) as nodes,
        clustered(nodes, app_config({"database": database, **artifacts})) as service,
    ):
        report = chaos(service, losses=arguments.losses, seed=arguments.seed)
    logger.info("%s", report)
    report.check()


if __name__ == "__main__":
    main()
