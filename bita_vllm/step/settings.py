"""The settings of one run, and their place in vLLM's config.

They lie in `BitaSpeculativeConfig`, a subclass of vLLM's `SpeculativeConfig`: it travels wherever vLLM
sends its config (pickle, copy, replace), and its type is the marker of a run that asked for bita. For
vLLM's own branches it is a method without a draft model and draft KV cache: 'custom_class' on the V1
runner, which schedules each step after the last one, 'ngram_gpu' on the V2 runner, which does not have
to (vllm/config/{speculative,vllm}.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import InstanceOf
from vllm.config import SpeculativeConfig
from vllm.config.utils import config
from vllm.utils.hashing import safe_hash

from bita_vllm import __version__
from bita_vllm.system import platform
from bita_vllm.system.errors import UserError
from bita_vllm.tree import Template
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.template_set import templates_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

METHOD = "bita"
# fp8 with one scale for all keys of a layer and one for all values: what tree attention reads on a GPU.
FP8_CACHES = ("fp8", "fp8_e4m3")


class ConfigError(UserError):
    """A run that cannot use bita as asked; the message is one sentence for the user."""


@dataclass(frozen=True)
class BitaSettings:
    """Settings of one run, the same in every process.

    Attributes:
        adapter_dir: directory of the adapter checkpoint; None without one: then copies alone draft.
        tree: as the user gave it: 'auto', widths per depth such as '5,4,3', or a template file.
        num_speculative_tokens: R-1 of the largest template, what vLLM's scheduler counts as draft tokens.
        ladder: the step blocks, and which of them a step uses; of one template unless there is a ladder.
        num_mask_tokens: k of the adapter; mask ids are V to V+k-1. 0 without one.
        source: of drafts, by its name in `runner/sources.py`.
        acceptance: `[ages, 2, k, ranks]` the adapter's statistics, as `tree.search.acceptance_table` makes them; of a
            mask that is never right without one.
        mask_lora: rank and modules of the adapter's low-rank deltas, if it has any.
        row_share: of copies alone: what a row takes of a step of one row, 0 where the user chose the rows.
    """

    adapter_dir: str | None
    tree: str
    num_speculative_tokens: int
    ladder: Ladder
    num_mask_tokens: int
    source: str
    acceptance: np.ndarray = field(compare=False, repr=False)
    mask_lora: tuple[int, tuple[str, ...]] | None = None
    row_share: float = 0.0

    @property
    def template(self) -> Template:
        """The largest template."""
        return self.ladder.widest

    @property
    def templates(self) -> tuple[Template, ...]:
        """Every template that blocks are made from, by width, each width's first one first."""
        return templates_of(self.ladder.template_sets)

    @property
    def max_depth(self) -> int:
        """Deepest draft node of all templates."""
        return max(template.max_depth for template in self.templates)


class DrafterSeat:
    """Fills vLLM's drafter seat: the runner makes the next block itself, after verification.

    Source: GPUModelRunner.load_model and propose_draft_token_ids (vllm/v1/worker).
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        del vllm_config

    def load_model(self, model: Any) -> None:
        """Nothing to load: the base model drafts."""

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        raise RuntimeError(
            "bita drafts in the base model's forward pass; its runner must not call propose()."
        )


@config
class BitaSpeculativeConfig(SpeculativeConfig):
    """vLLM's speculative config for a run with bita; `bita` holds the settings."""

    bita: InstanceOf[BitaSettings] = None  # type: ignore[assignment]
    # width -> requests of a step that a FULL graph of blocks is captured for; None: at the user's own sizes
    graph_batches: dict[int, list[int]] | None = None
    packs_linear_layers: bool = False  # the CPU runner says so, before the model is compiled
    traces_blocks: bool = (
        True  # False: of the CPU runner's form of the model for steps without blocks
    )

    def __post_init__(self) -> None:
        """What vLLM does for its own method of that name, without a warning or a lookup."""
        self.method = "ngram_gpu" if platform.on_gpu() else "custom_class"
        self.model = f"{DrafterSeat.__module__}.{DrafterSeat.__qualname__}"
        self.prompt_lookup_max = 0
        self.prompt_lookup_min = 0
        self.draft_model_config = self.target_model_config
        self.draft_parallel_config = self.target_parallel_config

    def use_ngram(self) -> bool:
        return False

    def use_ngram_gpu(self) -> bool:
        return False

    def compute_hash(self) -> str:
        """The embedding of mask ids, deltas and packed layers are part of the compiled graph, so of the hash.

        How they lie in memory is this version's. The form without blocks has nothing of the adapter.
        """
        bita = self.bita
        adapter = (bita.num_mask_tokens, bita.mask_lora) if self.traces_blocks else ()
        form = METHOD, __version__, self.packs_linear_layers, self.traces_blocks
        factors = (super().compute_hash(), *adapter, *form)
        return safe_hash(str(factors).encode(), usedforsecurity=False).hexdigest()

    def __repr__(self) -> str:
        return (
            f"SpeculativeConfig(method='{METHOD}', model={self.bita.adapter_dir!r}, "
            f"num_spec_tokens={self.num_speculative_tokens}, tree='{self.bita.tree}')"
        )


def get_settings(vllm_config: VllmConfig) -> BitaSettings | None:
    """The settings of this run, or None if it does not ask for bita."""
    spec = vllm_config.speculative_config
    return spec.bita if isinstance(spec, BitaSpeculativeConfig) else None
