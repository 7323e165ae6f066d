"""BiTA in vLLM's Model Runner V2: everything of a step on the device, in fixed shapes.

A step with blocks: positions follow the tree, tree attention, node rows' logits, the targets' walk,
accepted rows to their KV slots, the chosen mask rows' logits, the next blocks. Nothing is read back.
Source of the hooks: vllm/v1/worker/gpu/{model_runner,model_states/interface,spec_decode/speculator}.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from bita_kernels.attention_config import AttentionConfig
from bita_kernels.move_kv import LayerCaches, move_kv
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsTensors, ModelRunnerOutput
from vllm.v1.worker.gpu import model_runner as v2
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu_worker import Worker

from bita_vllm.adapter.checkpoint import Adapter
from bita_vllm.attention.gpu import (
    TreeTritonAttentionBackend,
    TreeTritonAttentionImpl,
)
from bita_vllm.attention.gpu_metadata import StepSplit
from bita_vllm.attention.plain import flash_attention
from bita_vllm.attention.workspaces import SharedWorkspaces
from bita_vllm.runner.delta_layers import in_dtype
from bita_vllm.runner.gpu_deltas import CountedMaskRows, add_mask_lora_to_blocks
from bita_vllm.runner.gpu_grammar import BlockDraftsHandler, NodeGrammar
from bita_vllm.runner.gpu_graphs import WidthGraphManager
from bita_vllm.runner.gpu_logits import parts_of, rows_in_one_pass
from bita_vllm.runner.gpu_sampling import NodeRows, TreeSampler
from bita_vllm.runner.gpu_speculator import BlockSpeculator
from bita_vllm.runner.gpu_step import GPUStep
from bita_vllm.runner.loading import (
    keep_through_sleep,
    put_in_adapter,
    replaced,
    tree_attention_models,
)
from bita_vllm.step.device import StepTrees
from bita_vllm.step.settings import BitaSettings, get_settings
from bita_vllm.system.platform import speed_of_first_gpu


class BitaGPUWorker(Worker):
    """vLLM's GPU worker with our runner in it."""

    def _make_model_runner(self) -> BitaGPUModelRunner:
        return BitaGPUModelRunner(self.vllm_config, self.device)


class BitaModelState(DefaultModelState):
    """Positions of the tree, and the step's trees for the attention layers.

    Attributes:
        captures_deltas: whether the piecewise graph that is captured will replay in steps with blocks.
    """

    captures_deltas = False

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: Any,
        device: torch.device,
        trees: StepTrees,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.trees = trees

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Metadata of blocks and of all other rows (`gpu_metadata.py`); positions become tree depths.

        Which lines blocks have a graph reads from a persistent buffer.
        """
        self.trees.begin(input_batch, block_tables)
        kwargs["model_specific_attn_metadata"] = StepSplit.of(input_batch, cudagraph_mode)
        metadata = super().prepare_attn(input_batch, cudagraph_mode, block_tables, *args, **kwargs)
        for shared in {id(each): each for each in metadata.values()}.values():
            if shared.blocks is not None:
                shared.blocks.take(self.trees)
            shared.may_have_mask_rows = shared.blocks is not None or self.captures_deltas
        return metadata


class BitaGPUModelRunner(v2.GPUModelRunner):
    """Runs one step block a request: the model verifies the last drafts and makes the next ones."""

    attention_backend = AttentionBackendEnum.TRITON_ATTN
    model_state: BitaModelState
    speculator: BlockSpeculator
    cudagraph_manager: WidthGraphManager | None

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        settings = get_settings(vllm_config)
        assert settings is not None
        self.settings: BitaSettings = settings
        with replaced(v2, "init_speculator", self._make_speculator):
            super().__init__(vllm_config, device)

    def _make_speculator(
        self, vllm_config: VllmConfig, device: torch.device, req_states: Any
    ) -> BlockSpeculator:
        return BlockSpeculator(
            vllm_config.scheduler_config.max_num_seqs,
            self.settings.num_speculative_tokens,
            vllm_config.model_config.get_vocab_size(),
            req_states,
            self.settings.source,
            device,
        )

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the base model with tree attention in its layers, then the adapter."""
        tree_attention = tree_attention_models(
            self.attention_backend, TreeTritonAttentionBackend, self.vllm_config, self.settings
        )
        with tree_attention as adapter:
            assert adapter is not None  # config.py refuses runs without one
            make_state = partial(self._make_model_state, adapter)
            with replaced(v2, "init_model_state", make_state):
                super().load_model(*args, **kwargs)
        trees = self.model_state.trees
        self.tree_sampler = TreeSampler(self.sampler, trees)
        self.tree_sampler.warm_up()
        self.node_grammar = NodeGrammar(
            self.structured_outputs_worker, trees.most_nodes, self.max_num_reqs
        )
        self.node_grammar.warm_up(self.vocab_size, self.dtype)
        self.speculator.attach(self.model, trees)
        self.draft_tokens_handler = BlockDraftsHandler(self.device, trees.line_of_slot)
        layers = get_layers_from_vllm_config(self.vllm_config, Attention).values()
        keep_through_sleep(
            self.model,
            trees,
            trees.table,
            trees.choice,
            self.speculator.source,
            self.node_grammar,
            self.tree_sampler,
            *(layer.impl for layer in layers),
        )

    def _make_model_state(
        self,
        adapter: Adapter,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: Any,
        device: torch.device,
    ) -> BitaModelState:
        """vLLM's model state for the loaded model; the adapter goes into the model."""
        lora_rows = put_in_adapter(
            model,
            adapter,
            vllm_config,
            self.settings,
            TreeTritonAttentionImpl,
            self.dtype,
            add_mask_lora_to_blocks,
            in_dtype(self.dtype),
            device,
            CountedMaskRows,
        )
        trees = StepTrees(
            self.settings.ladder,
            self.settings.acceptance,
            self.max_num_reqs,
            device,
            lora_rows,
            rows_in_one_pass(
                vllm_config.parallel_config.tensor_parallel_size,
                vllm_config.model_config.get_vocab_size(),
                speed_of_first_gpu(),
            ),
        )
        workspaces = SharedWorkspaces(
            self.settings.template.num_rows, self.max_num_reqs, self.max_model_len, device
        )
        for layer in get_layers_from_vllm_config(vllm_config, Attention).values():
            flash = flash_attention(layer.impl, self.dtype, vllm_config.cache_config.block_size)
            layer.impl.attach(self._attention_config(layer.impl), workspaces, flash)
        return BitaModelState(vllm_config, model, encoder_cache, device, trees)

    def _attention_config(self, impl: TreeTritonAttentionImpl) -> AttentionConfig:
        return AttentionConfig.choose(
            impl.head_size,
            self.dtype,
            impl.num_queries_per_kv,
            self.settings.template.num_rows,
            num_kv_heads=impl.num_kv_heads,
        )

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        """Stock, then the addresses of every layer's cache, for the moves.

        Views keep a cache's memory, so there are none of vLLM's profiling cache, which goes before the real one comes.
        """
        self.layer_caches = []
        with replaced(v2, "ModelCudaGraphManager", WidthGraphManager):
            super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        if is_profiling:
            return
        context = self.compilation_config.static_forward_context
        for group in self.kv_cache_config.kv_cache_groups:
            caches = [
                context[name].kv_cache.transpose(1, 2).chunk(2, dim=-1)
                for name in group.layer_names
            ]
            self.layer_caches.append(LayerCaches.of(*zip(*caches, strict=True)))

    def shutdown(self) -> None:
        """Stock; our views of the KV caches would keep their memory."""
        self.layer_caches = []
        super().shutdown()

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Stock; the graph manager knows whether the step has blocks."""
        if self.cudagraph_manager is not None:
            self.cudagraph_manager.step_has_blocks = bool(
                scheduler_output.scheduled_spec_decode_tokens
            )
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> None:
        """Profile with the most logits that a step holds at once, copied to fp32 as for sampling parameters."""
        super()._dummy_sampler_run(hidden_states)
        trees = self.model_state.trees
        # Parts of smaller trees may hold a few rows more than those of the largest: both are whole requests.
        largest = max(
            nodes * parts_of(self.max_num_reqs, nodes, self.vocab_size)[0].stop
            for nodes in trees.nodes_of_sets
        )
        one_pass = self.max_num_reqs * (trees.most_nodes + trees.most_masks)
        rows = max(largest, min(one_pass, trees.rows_in_one_pass))
        logits = self.model.compute_logits(hidden_states[:1].expand(rows, -1))[:largest]
        zeros = torch.zeros(largest, dtype=torch.int64, device=self.device)
        self.sampler.sample(
            torch.empty_like(logits, dtype=torch.float32).copy_(logits),
            zeros,
            zeros[:1],
            np.zeros(1, dtype=np.intp),
            zeros,
            zeros.int(),
            zeros.int(),
            np.ones(1, dtype=np.int32),
        )

    def sample(
        self,
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        """Logits of node rows, targets, walk; then the KV moves.

        hidden_states is `[rows, H]`; the sampler output holds `[B, max_depth + 3]` tokens, the last
        two columns are the line of each request's block and where its walk stopped (`BlockOutput`).
        """
        trees, n = self.model_state.trees, input_batch.num_reqs
        step = GPUStep(input_batch)
        self.speculator.follow(step)
        if input_batch.num_draft_tokens == 0:
            return super().sample(hidden_states, input_batch, grammar_output)
        # New ones for every step, as they travel to the host while the next step runs.
        steps = trees.table.max_depth + 1
        tokens = torch.empty(n, steps + 2, dtype=torch.int64, device=self.device)
        num_emitted = torch.empty(n, dtype=torch.int32, device=self.device)
        scores = [
            self._walk(hidden_states, step, part, grammar_output, tokens, num_emitted)
            for part in parts_of(n, trees.num_nodes, self.vocab_size)
        ]
        for caches, block_table in zip(self.layer_caches, trees.block_tables, strict=True):
            move_kv(caches, block_table[:n], trees.context_len[:n], trees.path[:n], num_emitted)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            num_emitted,
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.req_states.prefill_len.gpu,
        )
        logprobs, num_nans = zip(*scores, strict=True)
        output = SamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=joined_logprobs(logprobs),
            num_nans=torch.cat(num_nans) if self.sampler.compute_nans else None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )
        return output, num_sampled, num_rejected

    def _walk(
        self,
        # [rows, H]
        hidden_states: torch.Tensor,
        step: GPUStep,
        part: slice,
        grammar_output: GrammarOutput | None,
        # outputs of `StepTrees.walk`, for all requests
        tokens: torch.Tensor,
        num_emitted: torch.Tensor,
    ) -> tuple[LogprobsTensors | None, torch.Tensor | None]:
        """Walk the trees of some requests; logprobs of the emitted tokens, and NaNs, where asked for.

        Logits of mask rows, where they come along, stay for the next blocks: nothing here changes those.
        """
        trees, input_batch = self.model_state.trees, step.batch
        logits = self.model.compute_logits(hidden_states[trees.rows_of(part)])
        if trees.num_masks:
            step.logits = logits
            logits = logits[trees.nodes_of(part)]
        if grammar_output is not None:
            self.node_grammar.constrain(logits, part, input_batch, grammar_output, trees)
        num_nans = get_num_nans(logits[:: trees.num_nodes]) if self.sampler.compute_nans else None
        nodes = NodeRows.of(trees, logits, part, input_batch)
        dims = self.sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        targets, path_logits = self.tree_sampler(nodes, part, dims is not None)
        trees.walk(targets, part, input_batch, tokens, num_emitted)
        if dims is None:
            return None, num_nans
        path, emitted = trees.path[part, : trees.steps], tokens[part, : trees.steps]
        logprobs = self.tree_sampler.logprobs(path_logits(path.long()), emitted, nodes.slots, dims)
        return logprobs, num_nans

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """Stock; the output also says which line each block had and where its walk stopped."""
        output = super().sample_tokens(grammar_output)
        return BlockOutput(output) if isinstance(output, AsyncOutput) else output


class BlockOutput(AsyncModelRunnerOutput):
    """vLLM's output on its way to the host, with lines and last nodes for `scheduler.py`'s statistics."""

    def __init__(self, output: AsyncOutput) -> None:
        self._output = output

    def get_kv_connector_output(self) -> Any:
        """vLLM 0.33 asks for it; 0.32 does not."""
        return self._output.get_kv_connector_output()

    def get_output(self) -> ModelRunnerOutput:
        result, tokens = self._output.get_output(), self._output.sampled_token_ids
        if tokens.shape[1] > 1:  # a step with blocks
            result.block_lines, result.last_nodes = tokens[:, -2:].T.tolist()
        return result


def joined_logprobs(parts: Sequence[LogprobsTensors | None]) -> LogprobsTensors | None:
    """Those of consecutive requests as one."""
    if parts[0] is None or len(parts) == 1:
        return parts[0]
    known = [part for part in parts if part is not None]
    starts = accumulate((part.cu_num_generated_tokens[-1] for part in known[:-1]), initial=0)
    return LogprobsTensors(
        *(torch.cat(columns) for columns in zip(*(part[:3] for part in known), strict=True)),
        cu_num_generated_tokens=[0]
        + [
            start + n
            for start, p in zip(starts, known, strict=True)
            for n in p.cu_num_generated_tokens[1:]
        ],
    )
