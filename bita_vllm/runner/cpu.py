"""vLLM's CPU runner with step blocks: positions, tree attention, walk, KV moves, next blocks.

Source of the hooks: vllm/v1/worker/{cpu_worker,cpu_model_runner,gpu_model_runner}.py (V1 runner).
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import vllm.v1.worker.cpu_worker as cpu_worker
from bita_kernels import cpu_kernels
from bita_kernels.add_mask_lora_cpu_naive import pack_mask_lora
from vllm.config import CompilationMode, VllmConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.outputs import DraftTokenIds, SamplerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner, _set_global_compilation_settings

from bita_vllm.attention.cpu import (
    TreeCPUAttentionBackend,
    TreeCPUAttentionImpl,
    TreeMetadata,
)
from bita_vllm.runner.cpu_block_form import block_form, plain_config
from bita_vllm.runner.cpu_linear import (
    blocks_gain,
    cpu_gains,
    multiply_packed,
    packing,
    renew_block_form,
)
from bita_vllm.runner.cpu_reload import renewed_products
from bita_vllm.runner.cpu_sampling import GreedyTargets, SampledTargets, constrain_nodes
from bita_vllm.runner.cpu_step import CPUStep
from bita_vllm.runner.loading import (
    put_in_adapter,
    put_in_no_adapter,
    replaced,
    tree_attention_models,
)
from bita_vllm.runner.sources import cpu_source
from bita_vllm.step.block_drafts import BlockDrafts
from bita_vllm.step.host import StepBlocks, Walk, fill_blocks
from bita_vllm.step.settings import DrafterSeat, get_settings
from bita_vllm.tree import NO_BLOCK
from bita_vllm.tree.chain_choice import ChainChoice
from bita_vllm.tree.choice import LineChoice
from bita_vllm.tree.ladder import PLAIN_WIDTH

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

# Up to here one pass over the output head for node and mask rows costs less than two with fewer rows:
# measured on SmolLM2's head (49152 x 576, fp32, one core): 4 rows 12 ms against 10 + 9, 16 rows 29
# against 18 + 9.
MAX_ROWS_IN_ONE_LOGITS_PASS = 16


class BitaCPUWorker(cpu_worker.CPUWorker):
    """vLLM's CPU worker with our runner in it."""

    def init_device(self) -> None:
        # vLLM 0.32 cannot load what it saves of a compiled model on a CPU ("'function' object has no attribute
        # 'finalize_loading'"), and compiles at each start. Without it, a start takes Inductor's own cache.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
        with replaced(cpu_worker, "CPUModelRunner", BitaCPUModelRunner):
            super().init_device()


class BitaCPUModelRunner(CPUModelRunner):
    """Runs one step block a request: the model verifies the last drafts and makes the next ones."""

    model: Any  # the form of it that the step runs
    _plain_model: Any
    _block_model: Any

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        settings = get_settings(vllm_config)
        assert settings is not None
        # Built as a plain runner: no drafter, and all of vLLM's logits processors, which
        # build_logitsprocs leaves out when it sees a speculative config.
        with replaced(vllm_config, "speculative_config", None):
            super().__init__(vllm_config, device)
        self.speculative_config = vllm_config.speculative_config
        self.drafter = DrafterSeat(vllm_config)
        self.num_spec_tokens = settings.num_speculative_tokens
        self.settings = settings
        self.table = settings.ladder.table
        self.choice = (
            ChainChoice(settings.ladder, settings.row_share)
            if settings.adapter_dir is None
            else LineChoice(settings.ladder, settings.acceptance, torch.device("cpu"))
        )
        self.vocab_size = self.model_config.get_vocab_size()
        self.source = cpu_source(
            settings.source, vllm_config, lambda rows: self.model.compute_logits(rows)
        )
        self._step = CPUStep(self.input_batch)

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Load the base model with tree attention in its layers, then the adapter.

        Without an adapter one form of the model runs all steps, as there is nothing of ours in it.
        """
        has_kernels = cpu_kernels.register()
        packs, has_bf16 = has_kernels and cpu_gains(), has_kernels and blocks_gain()
        packs_for_blocks = has_bf16 and self.settings.adapter_dir is not None
        # what tree attention computes in
        attention_dtype = self.model_config.dtype if has_bf16 else torch.float32
        self.speculative_config.packs_linear_layers = packs or packs_for_blocks
        self._packing = partial(packing, packs, packs_for_blocks)
        tree_attention = tree_attention_models(
            AttentionBackendEnum.CPU_ATTN, TreeCPUAttentionBackend, self.vllm_config, self.settings
        )
        as_plain = replaced(self, "vllm_config", plain_config(self.vllm_config, packs))
        with self._packing(), tree_attention as adapter, as_plain:
            super().load_model(load_dummy_weights)
        self._plain_model = self._block_model = self.model
        self._step_mask_rows = None
        if adapter is None:
            put_in_no_adapter(
                self.model,
                self.vllm_config,
                self.settings,
                TreeCPUAttentionImpl,
                attention_dtype,
            )
            return
        self._block_model = block_form(self.model, self.vllm_config)
        self._step_mask_rows = put_in_adapter(
            self._block_model,
            adapter,
            self.vllm_config,
            self.settings,
            TreeCPUAttentionImpl,
            attention_dtype,
            torch.ops.bita.add_mask_lora_cpu,
            pack_mask_lora,
            self.device,
        )
        if packs_for_blocks:
            multiply_packed(self._block_model)

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Stock; packed weights, a tied output head and the form for blocks follow the new weights."""
        with self._packing(), renewed_products(self._plain_model):
            super().reload_weights(*args, **kwargs)
        renew_block_form(self._plain_model, self._block_model)

    def get_model(self) -> Any:
        """The form that plain vLLM loaded, whatever the last step ran: what trainers look at and load into."""
        return self._plain_model

    def shutdown(self) -> None:
        """Stock; neither form's weights stay in memory."""
        super().shutdown()
        self._plain_model = self._block_model = None

    def warming_up_model(self) -> None:
        """Stock, for each form of the model: nothing is compiled while requests wait."""
        super().warming_up_model()
        has_two_forms = self._block_model is not self._plain_model
        if has_two_forms and self.compilation_config.mode != CompilationMode.NONE:
            with (
                replaced(self, "model", self._block_model),
                _set_global_compilation_settings(self.vllm_config),
            ):
                self._dummy_run(self.max_num_tokens, is_profile=True)

    def may_reinitialize_input_batch(self, *args: Any, **kwargs: Any) -> None:
        """Stock; a batch that is made anew is a plain runner's, too, as its thinking budgets look at no drafts."""
        with replaced(self, "num_spec_tokens", 0):
            super().may_reinitialize_input_batch(*args, **kwargs)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Stock. If neither this step nor the next has blocks, it is plain vLLM's step, which sees no drafter."""
        self._step = CPUStep(self.input_batch)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        is_plain = not drafts and scheduler_output.num_spec_tokens_to_schedule == PLAIN_WIDTH
        self.speculative_config = None if is_plain else self.vllm_config.speculative_config
        self.model = self._block_model if drafts else self._plain_model
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # The profile run samples as a plain runner: the walk calls the same sampler, never more rows at once
        # than requests.
        with replaced(self, "speculative_config", None):
            return super()._dummy_sampler_run(hidden_states)

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> tuple:
        """Stock inputs; then positions follow the tree, and logits are asked for node rows.

        If all rows are few, logits of mask rows are computed together with them, in the same pass. Otherwise the
        chosen groups get theirs after the walk. A step without any block stays stock to its end.
        """
        with replaced(self, "speculative_config", None):  # stock's layout of draft rows is not ours
            last_rows, *_ = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        # Stock sampling also draws for partial prefills, and rewinds their generators afterwards.
        if not drafts and not self.discard_request_mask.np[: self.input_batch.num_reqs].any():
            return last_rows, None, 1
        requests: dict[str, Any] = self.requests
        lines = [
            requests[i].bita_line if i in drafts else NO_BLOCK for i in self.input_batch.req_ids
        ]
        blocks = StepBlocks.build(
            self.table, np.array(lines, dtype=np.int64), num_scheduled_tokens.astype(np.int64)
        )
        offset = torch.from_numpy(blocks.depth_of_rows())
        self.positions[: len(offset)] += offset
        self._step.blocks = blocks
        if self._step_mask_rows is not None:
            self._step_mask_rows.set(blocks.mask_rows())
        rows = np.concatenate([blocks.node_rows(), blocks.mask_rows()])
        if len(rows) > MAX_ROWS_IN_ONE_LOGITS_PASS:
            rows = blocks.node_rows()
        return torch.from_numpy(rows), None, int(blocks.num_nodes.max())

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> tuple:
        """Stock metadata, with the step's blocks in it."""
        metadata, common = super()._build_attention_metadata(*args, **kwargs)
        blocks = self._step.blocks
        if blocks is not None and self._step.has_blocks:
            context_len = self.input_batch.num_computed_tokens_cpu[: len(blocks.line)]
            for index, group in enumerate(self.kv_cache_config.kv_cache_groups):
                # Not the metadata's own, in which stock cuts chunked attention into requests of a chunk.
                block_table = self.input_batch.block_table[index].get_device_tensor(
                    len(blocks.line)
                )
                tree = TreeMetadata(blocks, context_len, block_table)
                for name in group.layer_names:
                    metadata[name].tree = tree
        return metadata, common

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """Stock. The output also tells the scheduler each request's line, where its walk stopped, and the CPU time.

        In a step with blocks there is a bitmask for every node. `_sample` applies them, as stock would miscount rows.
        """
        step = self._step
        step.grammar = grammar_output if step.has_blocks else None
        output = super().sample_tokens(None if step.has_blocks else grammar_output)
        self._step = CPUStep(self.input_batch)  # vLLM's dummy steps have no blocks
        if output is not None and step.blocks is not None and step.walk is not None:
            output.block_lines = step.blocks.line.tolist()
            output.last_nodes = step.walk.last_node.tolist()
        if output is not None:
            output.cpu_clock = time.process_time()
        return output

    def _sample(self, logits: torch.Tensor, spec_decode_metadata: None) -> SamplerOutput:
        """Walk every tree; accepted rows move to their KV slots."""
        batch, step = self.input_batch, self._step
        blocks = step.blocks
        if blocks is None:
            return super()._sample(logits, spec_decode_metadata)
        num_node_rows = int(blocks.num_nodes.sum())
        if len(logits) > num_node_rows:
            logits, step.mask_logits = logits[:num_node_rows], logits[num_node_rows:]
        if step.grammar is not None:
            constrain_nodes(logits, blocks, batch.req_ids, step.grammar)
        node_tokens = self.input_ids.np[blocks.node_rows()]
        emitting = ~self.discard_request_mask.np[: batch.num_reqs]
        targets: GreedyTargets | SampledTargets
        if GreedyTargets.fits(batch.sampling_metadata):
            targets = GreedyTargets(logits)
        else:
            targets = SampledTargets(self.sampler, batch, logits)
        try:
            walk = step.walk = blocks.walk(node_tokens, targets, emitting)
        finally:
            targets.close()
        self._move_accepted(walk)
        longest = max(int(walk.num_emitted.max()), 1)
        return SamplerOutput(
            sampled_token_ids=torch.from_numpy(walk.tokens[:, :longest].astype(np.int32)),
            logprobs_tensors=targets.logprobs,
        )

    def _move_accepted(self, walk: Walk) -> None:
        request, row, place = walk.moves()
        if not len(request):
            return
        base = self.input_batch.num_computed_tokens_cpu[request]
        for group, kv_caches in enumerate(self._kv_caches_by_group()):
            block_size = kv_caches[0].shape[2]
            block_ids = self.input_batch.block_table[group].block_table.np
            slots = [
                block_ids[request, position // block_size].astype(np.int64) * block_size
                + position % block_size
                for position in (base + row, base + place)
            ]
            torch.ops.bita.move_kv_cpu(kv_caches, *map(torch.from_numpy, slots))

    def _kv_caches_by_group(self) -> list[list[torch.Tensor]]:
        context = self.compilation_config.static_forward_context
        return [
            [context[name].kv_cache for name in group.layer_names]
            for group in self.kv_cache_config.kv_cache_groups
        ]

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> tuple:
        # Partial prefills drew nothing from their generators, so there is nothing to rewind
        # (stock rewinds by an offset that CPU generators do not have).
        generators = self.input_batch.generators
        discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])
        if not len(discarded):
            return super()._bookkeeping_sync(*args, **kwargs)
        kept = {int(i): generators.pop(int(i)) for i in discarded if int(i) in generators}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(kept)

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # Blocks that do not fit below max_model_len are cut by the scheduler; any prefix of one is valid.
        return True

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: Any,
        sampling_metadata: Any,
        hidden_states: torch.Tensor,
        *args: Any,
    ) -> list[list[int]]:
        """Return the draft tokens of the next blocks: candidates, and mask ids."""
        if self._step_mask_rows is not None:
            self._step_mask_rows.num.zero_()  # vLLM's dummy steps have none
        # The scheduler chose it for the next blocks.
        width = scheduler_output.num_spec_tokens_to_schedule
        if width == PLAIN_WIDTH:
            return [[] for _ in range(self.input_batch.num_reqs)]
        index = self.settings.ladder.widths.index(width)
        templates = self.settings.ladder.template_sets[index]
        candidates = self.source(self._step, hidden_states, templates)
        line = self.choice(index, candidates.depths, candidates.chance).numpy()
        drafts = fill_blocks(self.table, line, candidates.tokens.numpy(), self.vocab_size)
        # The line is kept in vLLM's state of the request, which ends with the request even in steps without its rows.
        requests: dict[str, Any] = self.requests
        for request_id, own in zip(self.input_batch.req_ids, line.tolist(), strict=True):
            requests[request_id].bita_line = own
        return drafts

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Stock; every block's line goes along."""
        drafts = super().take_draft_token_ids()
        if drafts is None:
            return None
        requests: dict[str, Any] = self.requests
        lines = [
            requests[request_id].bita_line if tokens else NO_BLOCK
            for request_id, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True)
        ]
        return BlockDrafts(drafts.req_ids, drafts.draft_token_ids, lines)
