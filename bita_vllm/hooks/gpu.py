"""Spots of vLLM that the GPU path overrides, on its Model Runner V2."""

from bita_vllm.hooks.hook import Hook

_V2 = "vllm.v1.worker.gpu"
_V2_RUNNER = f"{_V2}.model_runner:GPUModelRunner"
_TRITON_ATTENTION = "vllm.v1.attention.backends.triton_attn"
_FLASH_ATTENTION = "vllm.v1.attention.backends.flash_attn"

GPU_OVERRIDES = (
    Hook(
        "vllm.v1.worker.gpu_worker:Worker._make_model_runner",
        "our worker makes our runner",
        "(self)",
    ),
    Hook(f"{_V2_RUNNER}.__init__", "takes our speculator", "(self, vllm_config, device)"),
    Hook(
        f"{_V2_RUNNER}.load_model",
        "takes our model state, and our attention backend",
        "(self, load_dummy_weights=, *args, model=, **kwargs)",
    ),
    Hook(
        f"{_V2_RUNNER}.initialize_kv_cache",
        "addresses of the KV caches",
        "(self, kv_cache_config, is_profiling=, kv_cache_allocation_context=)",
    ),
    Hook(f"{_V2_RUNNER}.shutdown", "addresses of the KV caches go with them", "(self)"),
    Hook(
        f"{_V2_RUNNER}.execute_model",
        "which piecewise graphs a step replays",
        "(self, scheduler_output, intermediate_tensors=, dummy_run=, skip_attn_for_dummy_run=, "
        "is_profile=, context_len=, valid_dummy_state_slots=, randomize_inputs=)",
    ),
    Hook(
        f"{_V2_RUNNER}.sample",
        "the walk, and the next blocks",
        "(self, hidden_states, input_batch, grammar_output)",
    ),
    Hook(
        f"{_V2}.spec_decode.speculator:BaseSpeculator.propose",
        "hands out the next blocks",
        "(self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, "
        "num_sampled, num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, "
        "dp_sync_state=, dummy_run=, skip_attn_for_dummy_run=, mm_inputs=, is_profile=, "
        "num_speculative_tokens=)",
    ),
    Hook(
        f"{_V2}.cudagraph_utils:ModelCudaGraphManager.__init__",
        "is replaced by one that knows several widths",
        "(self, vllm_config, device, cudagraph_mode, decode_query_len, lora_capture_cases=, "
        "varlen_decode=, ubatch_runner=)",
    ),
    Hook(
        f"{_V2}.cudagraph_utils:CudaGraphManager._init_candidates",
        "a FULL graph of its width for every decode batch",
        "(self)",
    ),
    Hook(
        f"{_V2}.cudagraph_utils:ModelCudaGraphManager.capture",
        "piecewise graphs with deltas, and without",
        "(self, model, model_state, input_buffers, intermediate_tensors, block_tables, attn_groups, "
        "kv_cache_config, pcp_manager=, has_lora=, use_aux_hidden_state_outputs=, lora_capture_hook=, "
        "progress_bar_desc=)",
    ),
    Hook(
        f"{_V2}.cudagraph_utils:CudaGraphManager.dispatch",
        "piecewise graphs with deltas, and without",
        "(self, num_reqs, num_tokens, uniform_token_count, num_active_loras, max_query_len=, "
        "num_ubatches=)",
    ),
    Hook(
        f"{_V2_RUNNER}.sample_tokens",
        "the output says which line each block had",
        "(self, grammar_output)",
    ),
    Hook(
        f"{_V2_RUNNER}._dummy_sampler_run",
        "profiles the most logits that a step holds",
        "(self, hidden_states)",
    ),
    Hook(
        f"{_V2}.async_utils:AsyncOutput.get_output",
        "the output says which line each block had",
        "(self)",
    ),
    Hook(
        f"{_V2}.structured_outputs:StructuredOutputsWorker.apply_grammar_bitmask",
        "forbids at every node what its grammar forbids",
        "(self, logits, input_batch, grammar_req_ids, grammar_bitmask)",
    ),
    Hook(
        f"{_V2}.spec_decode.utils:DraftTokensHandler.set_draft_tokens",
        "tells the scheduler each block's line",
        "(self, input_batch, draft_tokens)",
    ),
    Hook(
        f"{_V2}.spec_decode.utils:DraftTokensHandler.get_draft_tokens",
        "tells the scheduler each block's line",
        "(self)",
    ),
    Hook(
        f"{_V2}.spec_decode.rejection_sampler:get_max_chunk_logits",
        "bounds the logits held at once",
        "(vocab_size)",
    ),
    Hook(
        "vllm.v1.spec_decode.dynamic.utils:build_dynamic_sd_schedule_lookup",
        "capture sizes for every width",
        "(num_speculative_tokens_per_batch_size, vllm_max_batch_size, vllm_num_speculative_tokens)",
    ),
    Hook(
        "vllm.config.compilation:CompilationConfig.post_init_cudagraph_sizes",
        "capture sizes for every width",
        "(self)",
    ),
    Hook(
        f"{_V2}.spec_decode:init_speculator", "our speculator", "(vllm_config, device, req_states)"
    ),
    Hook(
        f"{_V2}.model_states:init_model_state",
        "our model state",
        "(vllm_config, model, encoder_cache, device)",
    ),
    Hook(
        f"{_V2}.model_states.default:DefaultModelState.prepare_attn",
        "tree positions, and the trees for the attention layers",
        "(self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, "
        "kv_cache_config, for_capture=, ubatch_idx=, model_specific_attn_metadata=)",
    ),
    Hook(
        f"{_V2}.sample.sampler:Sampler.sample",
        "every emitted token is a draw of vLLM's own sampler",
        "(self, logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids, "
        "expanded_local_pos, seq_lens_upper_bound_np, return_logprobs=)",
    ),
    Hook(
        f"{_V2}.sample.sampler:Sampler.get_logprobs_dims",
        "logprobs of the emitted tokens",
        "(self, idx_mapping_np, include_token_ids=)",
    ),
    Hook(
        f"{_V2}.sample.logprob:compute_topk_scores",
        "logprobs of the emitted tokens",
        "(logits, num_logprobs, sampled_token_ids, cu_num_logits=, logprob_token_ids_state=, "
        "expanded_idx_mapping=, max_per_req_token_ids=, logits_mode=)",
    ),
    Hook(
        f"{_V2}.input_batch:get_num_sampled_and_rejected",
        "partial prefills emit nothing",
        "(num_sampled, seq_lens, cu_num_logits, idx_mapping, prefill_len)",
    ),
    Hook(
        f"{_TRITON_ATTENTION}:TritonAttentionImpl.forward",
        "attention over step blocks",
        "(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=, "
        "output_block_scale=)",
    ),
    Hook(
        f"{_TRITON_ATTENTION}:TritonAttentionImpl.fused_output_quant_supported",
        "tree attention does not quantise its output",
        "(self, quant_key)",
    ),
    Hook(
        f"{_TRITON_ATTENTION}:TritonAttentionImpl.do_kv_cache_update",
        "layout of the KV cache",
        "(self, layer, key, value, kv_cache, slot_mapping)",
    ),
    Hook(
        f"{_TRITON_ATTENTION}:TritonAttentionMetadataBuilder.__init__",
        "metadata of requests without blocks",
        "(self, kv_cache_spec, layer_names, vllm_config, device)",
    ),
    Hook(
        f"{_TRITON_ATTENTION}:TritonAttentionMetadataBuilder.build",
        "metadata of requests without blocks",
        "(self, common_prefix_len, common_attn_metadata, fast_build=)",
    ),
    Hook(
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build_for_cudagraph_capture",
        "a FULL graph holds blocks only, or none",
        "(self, common_attn_metadata)",
    ),
    Hook(
        "vllm.v1.attention.backend:AttentionImplBase.get_impl_variants",
        "FlashAttention's metadata follows the windows of all layers",
        "(self)",
    ),
    Hook(
        f"{_V2}.model_states.interface:ModelSpecificAttnMetadata.get_extra_attn_kwargs",
        "tells the metadata builders where a step splits",
        "(self, attn_metadata_builder, num_reqs)",
    ),
    Hook(
        f"{_V2}.model_runner:sort_batch_req_ids",
        "requests with blocks come first in a step",
        "(num_tokens_per_req, draft_tokens, decode_query_len)",
    ),
    Hook("vllm.forward_context:get_forward_context", "whether a step holds blocks", "()"),
)

# Not needed to serve: where one does not hold, rows of no block stay in vLLM's Triton attention.
PLAIN_HOOKS = (
    Hook(
        f"{_FLASH_ATTENTION}:FlashAttentionImpl.__init__",
        "prefill and plain decoding in FlashAttention",
        "(self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, "
        "kv_cache_dtype, logits_soft_cap=, attn_type=, kv_sharing_target_layer_name=, sinks=)",
    ),
    Hook(
        f"{_FLASH_ATTENTION}:FlashAttentionImpl.forward",
        "prefill and plain decoding in FlashAttention",
        "(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=, "
        "output_block_scale=)",
    ),
    Hook(
        f"{_FLASH_ATTENTION}:FlashAttentionImpl.do_kv_cache_update",
        "writes the KV cache as plain vLLM does",
        "(self, layer, key, value, kv_cache, slot_mapping)",
    ),
    Hook(
        f"{_FLASH_ATTENTION}:FlashAttentionMetadataBuilder.__init__",
        "metadata of prefill and plain decoding",
        "(self, kv_cache_spec, layer_names, vllm_config, device)",
    ),
    Hook(
        f"{_FLASH_ATTENTION}:FlashAttentionMetadataBuilder.build",
        "metadata of prefill and plain decoding",
        "(self, common_prefix_len, common_attn_metadata, fast_build=)",
    ),
    Hook(
        "vllm.v1.attention.backend:AttentionBackend.validate_configuration",
        "whether FlashAttention takes a layer",
        "(cls, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, "
        "use_mm_prefix, use_per_head_quant_scales, device_capability, attn_type, "
        "has_sliding_window=, use_non_causal=, use_batch_invariant=, use_kv_connector=, use_pcp=, "
        "use_adaptive_verification=, use_dcp=, use_rswa=)",
    ),
)
