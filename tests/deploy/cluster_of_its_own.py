"""A Ray cluster in a process of its own, which serves through HAProxy and does what stdin says."""

import os
import signal
import sys
from pathlib import Path

import ray
from askers import replica_pids
from served_variant import make_chosen

from llava_ray import deploy
from llava_ray.config.run import RunConfig


def main(folder: Path, port: int) -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve = {"port": port, "proxy": "haproxy", "cpus_per_replica": 0.5, "context": 512}
    config = RunConfig.model_validate({"storage": {"uri": str(folder)}, "serve": serve})
    chosen = make_chosen(config)
    deploy.run(config, chosen)
    print("serves", flush=True)
    for line in sys.stdin:
        if line.strip() == "kill the replica":
            os.kill(replica_pids()[0], signal.SIGKILL)
        elif line.strip() == "scale up":
            more = config.serve.model_copy(update={"min_replicas": 2, "max_replicas": 2})
            deploy.run(config.model_copy(update={"serve": more}), chosen)
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
