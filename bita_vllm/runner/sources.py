"""Sources of drafts: what one gets of a step and gives for the next blocks, and which one an engine uses.

A source changes time, never tokens: each draft is verified, wherever it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vllm.utils.import_utils import resolve_obj_by_qualname

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from bita_kernels.candidates import Candidates
    from vllm.config import VllmConfig

    from bita_vllm.runner.cpu_step import CPUStep
    from bita_vllm.runner.gpu_step import GPUStep
    from bita_vllm.step.device import StepTrees
    from bita_vllm.tree.template_set import TemplateSet


@dataclass(frozen=True)
class Source:
    """A source of drafts by the names of its classes, as each runner can import its own only.

    Attributes:
        cpu: a `CPUSource`.
        gpu: a `GPUSource`.
    """

    cpu: str
    gpu: str


# By the name that settings have for it.
SOURCES = {
    "masks": Source(
        cpu="bita_vllm.runner.cpu_masks.CPUMasks", gpu="bita_vllm.runner.gpu_masks.GPUMasks"
    ),
    "masks and copies": Source(
        cpu="bita_vllm.runner.cpu_copies.CPUMasksAndCopies",
        gpu="bita_vllm.runner.gpu_copies.GPUMasksAndCopies",
    ),
    # config.py refuses these on a GPU
    "copies": Source(cpu="bita_vllm.runner.cpu_copies.CPUCopies", gpu=""),
}


class CPUSource(Protocol):
    """A source on the CPU runner, which makes one when it is made itself."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        # [n, H] -> [n, V], of the form of the model that the step runs
        compute_logits: Callable[[torch.Tensor], torch.Tensor],
    ) -> None: ...

    def __call__(
        self,
        step: CPUStep,
        # [rows of the step, H]
        hidden_states: torch.Tensor,
        # that the next blocks are of
        templates: TemplateSet,
    ) -> Candidates:
        """Return the candidates of the step's requests: one depth or more, as many ranks as the templates or more."""
        ...


class GPUSource(Protocol):
    """A source on the V2 runner, made when the model is loaded.

    vLLM's sleep keeps what lies in tensors that are attributes of the source itself; other tensors lose theirs.
    """

    def __init__(
        self,
        # [n, H] -> [n, V]
        compute_logits: Callable[[torch.Tensor], torch.Tensor],
        # line and walk of each request of the step, in batch order
        trees: StepTrees,
        # vLLM's RequestState: tokens of each request by slot (`all_token_ids`, `total_len`), this step's included
        req_states: Any,
        vocab_size: int,
    ) -> None: ...

    def __call__(
        self,
        step: GPUStep,
        # [rows of the step, H]
        hidden_states: torch.Tensor,
        # that the next blocks are of
        set_index: int,
    ) -> Candidates:
        """Return the candidates of the step's requests, in buffers that persist, of as many ranks as the table.

        Nothing waits for the device, and the launches depend on shapes alone.
        """
        ...


def cpu_source(name: str, *args: Any) -> CPUSource:
    """Make a source for a CPU runner, of the arguments of `CPUSource`."""
    return resolve_obj_by_qualname(SOURCES[name].cpu)(*args)


def gpu_source(name: str, *args: Any) -> GPUSource:
    """Make a source for a V2 runner, of the arguments of `GPUSource`."""
    return resolve_obj_by_qualname(SOURCES[name].gpu)(*args)
