"""One of two processes of a DDP step: python ddp_worker.py RANK FOLDER TRAINING.

Takes its half of FOLDER/batch.pt through FOLDER/state.pt's model and writes FOLDER/gradients<RANK>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lowformer

WORLD = 2


def main(rank: int, folder: Path, training: bool) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    model = lowformer.create_model("lowformer_b0", kernels="eager", num_classes=10).double()
    # only rank 0 has the weights: DDP must give them to the other
    if rank == 0:
        lowformer.load_checkpoint(model, folder / "state.pt")
    ddp = DistributedDataParallel(model.train(training))
    x, y = torch.load(folder / "batch.pt", weights_only=True)
    x, y = x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]
    torch.nn.functional.cross_entropy(ddp(x), y).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save(gradients, folder / f"gradients{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "train")
