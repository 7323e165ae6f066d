"""BiTA in vLLM's Model Runner V2: everything of a step on the device, in fixed shapes.

A step with blocks: positions follow the tree, tree attention, node rows' logits, the targets' walk,
accepted rows to their KV slots, the chosen mask rows' logits, the next blocks. Nothing is read back.
Source of the hooks: vllm/v1/worker/gpu/{model_runner,model_states/interface,spec_decode/speculator}.py.
"""

from __future__ import annotations

from typing import Any

import torch
from bita_kernels.add_mask_lora import add_mask_lora
from bita_kernels.attention_config import AttentionConfig
from bita_kernels.build_block import build_block, workspace_shape
from bita_kernels.move_kv import LayerCaches, move_kv
from bita_kernels.tree_table import TreeTable
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.worker.gpu import model_runner as v2
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator
from vllm.v1.worker.gpu_worker import Worker

from bita_vllm.attention.gpu import TreeTritonAttentionBackend, TreeTritonAttentionImpl
from bita_vllm.config import BitaSettings, get_settings
from bita_vllm.runner.gpu_targets import NodeRows, TreeSampler
from bita_vllm.runner.gpu_trees import StepTrees
from bita_vllm.runner.loading import attention_backend, put_in_adapter, replaced
from bita_vllm.runner.mask_lora import opaque_operation
from bita_vllm.tree import TemplateTable


def _add_mask_lora_to_blocks(
    output: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    parts: torch.Tensor,
    mask_rows: torch.Tensor,
    num_mask_rows: torch.Tensor,
) -> None:
    """As add_mask_lora, but nothing is launched where the host knows that there are none (prefill)."""
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, dict) and not next(iter(metadata.values())).may_have_mask_rows:
        return
    add_mask_lora(output, x, lora_a, lora_b, parts, mask_rows, num_mask_rows)


add_mask_lora_to_blocks = opaque_operation("add_mask_lora_gpu", _add_mask_lora_to_blocks)


class BitaGPUWorker(Worker):
    """vLLM's GPU worker with our runner in it."""

    def _make_model_runner(self) -> BitaGPUModelRunner:
        return BitaGPUModelRunner(self.vllm_config, self.device)


class BlockSpeculator(BaseSpeculator):
    """Hands out the blocks that the sampler stage has already made; there is no draft model."""

    draft_logits = None
    supports_mm_inputs = False
    enable_adaptive_verification = False

    def __init__(self, max_num_reqs: int, num_drafts: int, device: torch.device) -> None:
        # [max_num_reqs, R-1] the next block of each request of the step, in batch order
        self.draft_tokens = torch.zeros(max_num_reqs, num_drafts, dtype=torch.int64, device=device)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Nothing of its own to capture."""

    def capture(self) -> None:
        """Nothing of its own to capture."""

    def propose(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`[num_reqs, R-1]` int64."""
        return self.draft_tokens[: input_batch.num_reqs]


class BitaModelState(DefaultModelState):
    """Positions of the tree, and the step's trees for the attention layers."""

    trees: StepTrees
    max_captured: int  # rows of the largest CUDA graph

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Stock metadata with the step's trees in it; positions become tree depths.

        A graph is captured with trees: what they are it reads from their persistent buffers.
        """
        trees = self.trees
        trees.begin(input_batch, block_tables)
        metadata = super().prepare_attn(input_batch, cudagraph_mode, block_tables, *args, **kwargs)
        has_trees = input_batch.num_draft_tokens > 0 or kwargs.get("for_capture", False)
        # vLLM captures piecewise graphs, which may replay with trees, in steps without.
        may_be_captured = input_batch.num_tokens_after_padding <= self.max_captured
        for shared in metadata.values():
            shared.trees = trees if has_trees else None
            shared.may_have_mask_rows = has_trees or may_be_captured
        return metadata


class BitaGPUModelRunner(v2.GPUModelRunner):
    """Runs one step block a request: the model verifies the last drafts and makes the next ones."""

    attention_backend = AttentionBackendEnum.TRITON_ATTN
    model_state: BitaModelState
    speculator: BlockSpeculator

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
            vllm_config.scheduler_config.max_num_seqs, self.settings.num_speculative_tokens, device
        )

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the base model with tree attention in its layers, then the adapter."""
        with (
            attention_backend(self.attention_backend, TreeTritonAttentionBackend),
            replaced(v2, "init_model_state", self._make_model_state),
        ):
            super().load_model(*args, **kwargs)
        table = self.model_state.trees.table
        self.tree_sampler = TreeSampler(self.sampler, table.parent, table.max_depth)
        self.block_workspace = torch.empty(
            workspace_shape(self.max_num_reqs, self.vocab_size, table),
            dtype=torch.int64,
            device=self.device,
        )

    def _make_model_state(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device
    ) -> BitaModelState:
        """vLLM's model state for the loaded model; the adapter goes into the model."""
        lora_rows = put_in_adapter(
            model,
            vllm_config,
            self.settings,
            TreeTritonAttentionImpl,
            self.dtype,
            add_mask_lora_to_blocks,
            device,
        )
        for layer in get_layers_from_vllm_config(vllm_config, Attention).values():
            layer.impl.config = AttentionConfig.choose(
                layer.impl.head_size,
                self.dtype,
                layer.impl.num_queries_per_kv,
                self.settings.template.num_rows,
                self.max_model_len,
            )
        state = BitaModelState(vllm_config, model, encoder_cache, device)
        table = TreeTable.of(TemplateTable(self.settings.template), device)
        state.trees = StepTrees(table, self.max_num_reqs, device)
        state.trees.lora_rows = lora_rows
        state.max_captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        return state

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Stock, then the addresses of every layer's cache, for the moves."""
        super().initialize_kv_cache(*args, **kwargs)
        context = self.compilation_config.static_forward_context
        self.layer_caches = []
        for group in self.kv_cache_config.kv_cache_groups:
            caches = [
                context[name].kv_cache.transpose(1, 2).chunk(2, dim=-1)
                for name in group.layer_names
            ]
            self.layer_caches.append(LayerCaches.of(*zip(*caches, strict=True)))

    def sample(
        self,
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        """Logits of node rows, targets, walk, KV moves; then logits of the chosen mask rows, blocks.

        hidden_states is `[rows, H]`; the sampler output holds `[B, max_depth + 1]` tokens.
        """
        trees = self.model_state.trees
        if input_batch.num_draft_tokens == 0:
            trees.next_line[: input_batch.num_reqs] = 0
            self._make_blocks(hidden_states, input_batch)
            return super().sample(hidden_states, input_batch, grammar_output)
        num_requests = input_batch.num_reqs
        rows = trees.node_rows(num_requests)
        logits = self.model.compute_logits(hidden_states[rows.flatten()])
        nodes = NodeRows(
            rows, input_batch.input_ids[rows].long(), input_batch.positions[rows], logits
        )
        targets, path_logits = self.tree_sampler(nodes, trees.line[:num_requests], input_batch)
        trees.walk(targets, input_batch)
        for caches, block_table in zip(self.layer_caches, trees.block_tables, strict=True):
            move_kv(
                caches,
                block_table[:num_requests],
                trees.context_len[:num_requests],
                trees.path[:num_requests],
                trees.num_emitted[:num_requests],
            )
        self._make_blocks(hidden_states, input_batch)
        tokens = trees.tokens[:num_requests]
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            trees.num_emitted[:num_requests].clone(),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.req_states.prefill_len.gpu,
        )
        output = SamplerOutput(
            sampled_token_ids=tokens.clone(),  # copied to the host while the next step runs
            logprobs_tensors=self.tree_sampler.logprobs(
                path_logits, trees.path[:num_requests], tokens, input_batch
            ),
            num_nans=get_num_nans(logits[:: rows.shape[1]]) if self.sampler.compute_nans else None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )
        return output, num_sampled, num_rejected

    def _make_blocks(self, hidden_states: torch.Tensor, input_batch: InputBatch) -> None:
        """The next block of each request, into the speculator's buffer; its line, by request slot."""
        trees, num_requests = self.model_state.trees, input_batch.num_reqs
        next_line = trees.next_line[:num_requests]
        mask_rows = trees.mask_rows[:num_requests]
        num_logits = mask_rows.numel()
        if input_batch.num_draft_tokens:
            logits = self.model.compute_logits(hidden_states[mask_rows.flatten().clamp(min=0)])
        else:  # no candidates: no row of the logits is read
            logits = hidden_states.new_empty(1, self.vocab_size).expand(num_logits, -1)
        trees.line_of_slot[input_batch.idx_mapping] = next_line
        build_block(
            logits,
            trees.logits_rows[:num_requests],
            next_line,
            self.vocab_size,
            trees.table,
            self.block_workspace[:num_logits],
            self.speculator.draft_tokens[:num_requests],
        )
