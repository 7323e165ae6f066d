"""Spots of vLLM that the CPU path and the scheduler of both paths override."""

from bita_vllm.hooks.hook import Hook

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_STRUCTURED = "vllm.v1.structured_output:StructuredOutputManager"

CPU_OVERRIDES = (
    Hook(
        "vllm.v1.worker.cpu_worker:CPUWorker.init_device",
        "our worker makes our runner",
        "(self)",
    ),
    Hook(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.__init__",
        "our runner is built as a plain one",
        "(self, vllm_config, device)",
    ),
    Hook(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model",
        "the embedding of mask ids is put in after loading",
        "(self, load_dummy_weights=)",
    ),
    Hook(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.get_model",
        "whoever asks for the model gets the form that was loaded",
        "(self)",
    ),
    Hook(f"{_RUNNER}.shutdown", "frees both forms of the model", "(self)"),
    Hook(
        f"{_RUNNER}.reload_weights",
        "packed weights follow the new ones",
        "(self, weights_iterator=, weights_path=, is_checkpoint_format=)",
    ),
    Hook(
        "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        "gives a linear layer the product that it computes with",
        "(layer, remove_weight)",
    ),
    Hook(
        f"{_RUNNER}.may_reinitialize_input_batch",
        "thinking budgets look at no drafts",
        "(self, kv_cache_config)",
    ),
    Hook(
        "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.update_state",
        "thinking budgets along the walk",
        "(self, output_token_ids, spec_token_ids, repeat_indices=)",
    ),
    Hook(
        "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.apply_to_logits",
        "thinking budgets along the walk",
        "(self, logits, predict_bonus_token, spec_token_ids)",
    ),
    Hook(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.warming_up_model",
        "compiles both forms of the model",
        "(self)",
    ),
    Hook(
        "vllm.compilation.wrapper:TorchCompileWithNoGuardsWrapper.__init__",
        "gives the form for blocks a compiled graph of its own",
        "(self, compile_prefix=, is_encoder=)",
    ),
    Hook(
        "vllm.compilation.backends:set_model_tag",
        "keeps the two compiled graphs apart",
        "(tag, is_encoder=)",
    ),
    Hook(
        f"{_RUNNER}.execute_model",
        "chooses the form of the model",
        "(self, scheduler_output, intermediate_tensors=)",
    ),
    Hook(
        f"{_RUNNER}._prepare_inputs",
        "positions are tree depths",
        "(self, scheduler_output, num_scheduled_tokens)",
    ),
    Hook(f"{_RUNNER}._sample", "the walk", "(self, logits, spec_decode_metadata)"),
    Hook(
        f"{_RUNNER}._build_attention_metadata",
        "hands the step's blocks to the attention layers",
        "(self, num_tokens, num_reqs, max_query_len, num_tokens_padded=, num_reqs_padded=, "
        "ubatch_slices=, logits_indices=, max_num_sampled_tokens=, use_spec_decode=, "
        "for_cudagraph_capture=, num_scheduled_tokens=, slot_mappings=)",
    ),
    Hook(f"{_RUNNER}._dummy_sampler_run", "profiles as a plain run", "(self, hidden_states)"),
    Hook(
        f"{_RUNNER}._input_fits_in_drafter",
        "blocks are cut near max_model_len, not dropped",
        "(self, common_attn_metadata)",
    ),
    Hook(f"{_RUNNER}.sample_tokens", "calls walk and proposal", "(self, grammar_output)"),
    Hook(
        f"{_RUNNER}.propose_draft_token_ids",
        "hands out the next block",
        "(self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, "
        "sample_hidden_states, aux_hidden_states, spec_decode_metadata, common_attn_metadata, "
        "slot_mappings)",
    ),
    Hook(
        f"{_RUNNER}.take_draft_token_ids",
        "tells the scheduler each block's line",
        "(self)",
    ),
    Hook(
        f"{_RUNNER}._bookkeeping_sync",
        "tokens and logprobs of the walk",
        "(self, scheduler_output, sampler_output, logits, hidden_states, num_scheduled_tokens)",
    ),
    Hook(
        "vllm.v1.sample.sampler:Sampler.forward",
        "every emitted token is a draw of vLLM's own sampler",
        "(self, logits, sampling_metadata, predict_bonus_token=, logprobs_mode_override=)",
    ),
    Hook(
        "vllm.v1.attention.backends.registry:register_backend",
        "puts our attention backend in",
        "(backend, class_path=, is_mamba=)",
    ),
    Hook(
        f"{_CPU_ATTENTION}:CPUAttentionBackendImpl.forward",
        "attention over step blocks",
        "(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=, "
        "output_block_scale=)",
    ),
    Hook(
        f"{_CPU_ATTENTION}:CPUAttentionBackendImpl.do_kv_cache_update",
        "layout of the KV cache",
        "(self, layer, key, value, kv_cache, slot_mapping)",
    ),
    Hook(
        f"{_CPU_ATTENTION}:CPUAttentionMetadataBuilder._set_isa_to_layers",
        "pins the layout of the KV cache",
        "(self, layer_names)",
    ),
    Hook(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.create_model",
        "refuses what a model's layers have and bita does not support, before weights are read",
        "(self, vllm_config, model_config, prefix=)",
    ),
    Hook(
        "vllm.v1.attention.selector:_cached_get_attn_backend",
        "is cleared around loading, so that our backend is seen by bita's model only",
        "(backend, attn_selector_config, num_heads=, *, _run_kv_cache_dtype=)",
    ),
    Hook(
        f"{_CPU_ATTENTION}:CPUAttentionMetadataBuilder.build",
        "metadata of step blocks",
        "(self, common_prefix_len, common_attn_metadata, fast_build=)",
    ),
    Hook(
        f"{_SCHEDULER}.schedule",
        "blocks take no token from root rows and prefill",
        "(self, throttle_prefills=)",
    ),
    Hook(
        f"{_SCHEDULER}.add_request",
        "a request's own draft metrics count by depth",
        "(self, request)",
    ),
    Hook(
        f"{_SCHEDULER}.make_spec_decoding_stats",
        "metrics count by depth, never rows",
        "(self, spec_decoding_stats, num_draft_tokens, num_accepted_tokens, "
        "num_invalid_spec_tokens, request_id)",
    ),
    Hook(
        f"{_SCHEDULER}.update_from_output",
        "takes the emitted tokens",
        "(self, scheduler_output, model_runner_output)",
    ),
    Hook(
        f"{_SCHEDULER}.update_draft_token_ids",
        "requests whose blocks do not pay go without",
        "(self, draft_token_ids)",
    ),
    Hook(
        f"{_SCHEDULER}.update_draft_token_ids_in_output",
        "the grammar learns each block's line",
        "(self, draft_token_ids, scheduler_output)",
    ),
    Hook(
        f"{_STRUCTURED}.grammar_bitmask",
        "advances a grammar along each path of a tree",
        "(self, requests, structured_output_request_ids, scheduled_spec_decode_tokens)",
    ),
    Hook(
        f"{_STRUCTURED}.validate_tokens",
        "says how far a grammar follows a path; a block is not cut by it",
        "(self, request, spec_tokens)",
    ),
    Hook(
        "vllm.transformers_utils.configs.speculators.algos:register_speculator",
        "makes vLLM read an adapter's config.json",
        "(name)",
    ),
)
