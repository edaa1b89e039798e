"""A training script as ``torchrun --max-restarts`` starts it again, in which a process is killed in each of the first
starts. Writes the final weights.

    torchrun --nproc-per-node 2 --max-restarts 3 restarted.py RUN WEIGHTS KILLS SEED REPLICAS
"""

from __future__ import annotations

import os
import random
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed.mesh_programs import dropping
from tests.engine.models import minibatches
from tests.engine.pipelines import pipeline

STEPS, EVERY = 60, 5


def main(run: str, weights: str, kills: int, seed: int, replicas: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    start, rank, size = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("dp", "pp"))
    with pipeline(dropping(4), mesh=mesh) as pipe:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(pipe.optimizer, 0.97)
        extra = pipe.resume(run, missing_ok=True)
        if extra:
            scheduler.load_state_dict(extra["scheduler"])
        done = extra.get("step", 0)
        chosen = random.Random(f"{seed} {start}")
        victim, at = chosen.randrange(size), done + 1 + chosen.randrange(2 * EVERY)
        for step, (x, y) in enumerate(minibatches(STEPS)[done:], start=done + 1):
            if start < kills and rank == victim and step == min(at, STEPS):
                os.kill(os.getpid(), signal.SIGKILL)
            pipe.step(x.chunk(replicas)[pipe.replica], y.chunk(replicas)[pipe.replica])
            scheduler.step()
            if step % EVERY == 0:
                pipe.checkpoint(run, sharded=not run.endswith(".pt"), step=step, scheduler=scheduler.state_dict())
        pipe.drain()
        state = pipe.state_dict()
    if rank == 0:
        torch.save({"state": state, "starts": start + 1}, Path(weights))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
