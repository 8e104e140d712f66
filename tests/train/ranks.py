"""Run training loops on this machine without Ray: python ranks.py RANK WORLD_SIZE PORT JOBS.

JOBS is a JSON list of {task, resume_from, out}; each report with a checkpoint goes to
OUT/step_<n>, as Ray would merge it.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

rank, world_size, port, jobs = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
os.environ |= {
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank),
    "WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cpu",
}  # fmt: skip

import torch  # noqa: E402
import torch.distributed  # noqa: E402

from llava_ray.train.worker import DistributedContext, Loop, WorkerTask  # noqa: E402

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
for job in json.loads(Path(jobs).read_text()):
    out = Path(job["out"])
    out.mkdir(exist_ok=True)

    def report(values: dict[str, Any], folder: Path | None, out: Path = out) -> None:
        if rank == 0:
            with (out / "reports.jsonl").open("a") as stream:
                stream.write(json.dumps(values) + "\n")
        if folder is not None:
            shutil.copytree(folder, out / f"step_{values['step']}", dirs_exist_ok=True)
        torch.distributed.barrier()

    context = DistributedContext(rank, world_size, torch.device("cpu"), report)
    resume = Path(job["resume_from"]) if job["resume_from"] else None
    Loop(WorkerTask.model_validate(job["task"]), context, resume).run()
torch.distributed.destroy_process_group()
