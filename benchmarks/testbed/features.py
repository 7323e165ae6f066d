"""The features of the support matrix as data: the test that shows each, or why it is refused, by runner."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Feature:
    """One row of the support matrix.

    Attributes:
        cpu, gpu: on vLLM's CPU runner and on its V2 runner: empty where it works, else why it is refused.
        test: 'file::function' under tests/ that shows what works, and what is refused.
    """

    name: str
    test: str
    cpu: str = ""
    gpu: str = ""


_LOSSLESS = "e2e/test_lossless_architectures.py::test_tokens_equal_plain_vllm"
_REQUESTS = "e2e/test_request_features.py::test_output_equals_plain_vllm"
_MODELS = "unit/test_refusals.py::test_model_is_refused_by_name"
_KINDS = "unit/test_refusals.py::test_kind_of_model_is_refused_by_name"
_ARGUMENTS = "unit/test_refusals.py::test_argument_is_refused_by_name"
_FIELDS = "unit/test_refusals.py::test_field_of_the_config_is_refused_by_name"
_ENGINE = "unit/test_refusals.py::test_engine_that_cannot_serve_bita_is_refused"
_LAYERS = "unit/test_loading.py::test_layers_that_attend_otherwise_are_refused_by_name"
_LATE = "e2e/test_refused_models.py::test_layers_that_attend_otherwise"
_FP8 = "e2e/test_gpu_runner.py::test_tokens_equal_plain_v2_with_an_fp8_cache"


def refused(name: str, test: str, reason: str) -> Feature:
    """A feature that neither runner has."""
    return Feature(name, test, reason, reason)


FEATURES: tuple[Feature, ...] = (
    Feature("greedy decoding, prefill in chunks, preemption, prefix cache", _LOSSLESS),
    Feature("low-rank deltas for mask rows", _LOSSLESS),
    Feature(
        "copies of text already seen, without an adapter",
        "e2e/test_no_adapter.py::test_tokens_equal_plain_vllm",
        gpu="its runner drafts copies beside masks only, for now",
    ),
    Feature("seeded sampling, top-k, top-p, min-p, n", _REQUESTS),
    Feature("penalties, bias, allowed and bad words, min_tokens, stops", _REQUESTS),
    Feature("logprobs, of prompts too", _REQUESTS),
    Feature("structured output", "e2e/test_structured_output.py::test_output_equals_plain_vllm"),
    Feature(
        "thinking budgets",
        "e2e/test_thinking_budget.py::test_thinking_ends_where_plain_vllm_ends_it",
    ),
    Feature(
        "tensor parallelism",
        "e2e/test_tensor_parallel.py::"
        "test_two_ranks_say_what_plain_vllm_says_and_draft_what_one_rank_would",
    ),
    Feature(
        "weights reloaded into a running engine",
        "e2e/test_weight_reload.py::test_tokens_and_mask_rows_follow_the_new_weights",
    ),
    Feature(
        "rows by load (a ladder)",
        "e2e/test_ladder.py::test_a_ramp_through_all_widths_returns_plain_vllms_tokens",
    ),
    Feature(
        "async scheduling",
        "e2e/test_async_budget.py::test_blocks_left_out_change_no_token",
        cpu="each step is scheduled after the last one",
    ),
    Feature(
        "custom logits processors",
        "e2e/test_logits_processors.py::test_output_equals_plain_vllm",
        cpu="those of vLLM's V1 runner may count steps, and a step with drafts is several",
    ),
    Feature("an fp8 (e4m3) KV cache", _FP8, cpu="it is not implemented"),
    Feature(
        "weight transfer",
        "unit/test_config.py::test_gpu_takes_weight_transfer_and_logits_processors",
        cpu="packed layers would not follow; reload_weights works",
    ),
    refused("other quantised KV caches (kv_cache_dtype)", _ARGUMENTS, "not implemented"),
    refused(
        "a KV cache quantised in some layers only",
        "unit/test_config.py::test_gpu_takes_fp8_caches_and_refuses_the_others_by_name",
        "not implemented",
    ),
    refused("the user's own LoRA (enable_lora)", _ENGINE, "not implemented"),
    refused("pipeline parallelism", _ARGUMENTS, "not implemented"),
    refused("data parallelism", _ARGUMENTS, "not implemented"),
    refused("prefill context parallelism", _FIELDS, "not implemented"),
    refused("decode context parallelism", _FIELDS, "not implemented"),
    refused(
        "ranks that are started from outside",
        _ARGUMENTS,
        "every rank has a scheduler of its own, which would choose other widths",
    ),
    refused(
        "sampling in shards of the batch",
        _FIELDS,
        "every rank makes the next blocks of all requests",
    ),
    refused("returned experts of a mixture", _FIELDS, "a block's rows are not the tokens sent"),
    refused("text watermarking", _FIELDS, "not implemented"),
    refused("KV connectors", _ARGUMENTS, "not implemented"),
    refused("fast prefill over shared KV", _FIELDS, "not implemented"),
    refused("prompt embeddings", _ARGUMENTS, "not implemented"),
    refused("sampling masks", _ARGUMENTS, "not implemented"),
    refused("replayed traces", _ARGUMENTS, "not implemented"),
    refused("images and other media", _KINDS, "text alone works: --language-model-only"),
    refused("models with multi-axis rotary positions", _KINDS, "not implemented"),
    refused("encoder-decoder models", _KINDS, "only decoders have mask rows"),
    refused("diffusion models", _KINDS, "they draft in another way"),
    refused("pooling models", _MODELS, "they send no tokens"),
    refused("models without attention", _MODELS, "a state follows one path, not a tree"),
    refused("hybrid or state-space models", _MODELS, "a state follows one path, not a tree"),
    refused("multi-head latent attention", _MODELS, "not implemented"),
    Feature(
        "chunked local attention (Llama 4)",
        "unit/test_refusals.py::test_chunked_attention_is_refused_on_a_gpu",
        gpu="not implemented",
    ),
    refused(
        "layers of two head sizes (Gemma 4)",
        "unit/test_refusals.py::test_layers_of_two_head_sizes_are_refused",
        "prompt tokens have one shape in all layers",
    ),
    refused("ALiBi (BLOOM, MPT)", _LATE, "not implemented"),
    refused(
        "embeddings by layer (Gemma 3n)", _LATE, "a model with one token embedding is expected"
    ),
    refused("KV caches shared between layers", _LAYERS, "not implemented"),
    Feature(
        "attention heads above 256, or no multiple of 16",
        _LAYERS,
        gpu="not implemented",
    ),
)
