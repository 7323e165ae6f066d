"""More than one process (`torchrun`): the base model sharded, the adapter's weights replicated.

torch's own FSDP2 (`fully_shard`) spreads the decoder's layers over the processes, each gathered
just before it runs; with `--no-shard` every process holds the whole model. Each process takes its
sequences of every batch; gradients of the adapter are summed. Every sum is normalised by the whole
batch, so losses are a single process's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from bita_vllm.training.mask_model import decoder_layers


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; alone by default."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: str) -> Processes:
        """The processes that `torchrun` started, if it did. One GPU a process, or gloo on CPUs."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's share of the lines of `tensor`."""
        return tensor.tensor_split(self.size)[self.rank]

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add up `tensors` over the processes, in place."""
        if self.size > 1 and tensors:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, total in zip(
                tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
            ):
                tensor.copy_(total.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in any process."""
        if self.size == 1:
            return flag
        count = torch.tensor(float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(count)
        return bool(count)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """End of the common work."""
        if self.size > 1:
            dist.destroy_process_group()


def shard_layers(base: PreTrainedModel) -> None:
    """Spread the weights of `base`'s decoder layers over the processes.

    Embeddings, last norm and output head stay whole in each: mask rows need them between passes.
    """
    layers = decoder_layers(base)
    for layer in layers:
        fully_shard(layer)
    inside = {id(parameter) for parameter in layers.parameters()}
    whole = {p for p in base.base_model.parameters() if id(p) not in inside}
    fully_shard(base.base_model, ignored_params=whole)  # the root: layers are fetched ahead
