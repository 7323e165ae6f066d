"""What is refused before any process starts: every feature of `refusals.py` is provoked, its sentence is one line."""

import json
import re
from operator import attrgetter

import pytest
import vllm.envs as envs
from transformers import AutoConfig
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry
from vllm.platforms import CpuArchEnum

from bita_vllm import plugin, refusals
from bita_vllm.adapter.checkpoint import random_adapter, save_adapter
from bita_vllm.adapter.config import ModelShape
from bita_vllm.config import check_engine
from bita_vllm.step.settings import get_settings
from bita_vllm.system import platform

plugin.register()


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base = tiny_model("llama")
    shape = ModelShape.from_hf_config(json.loads((base / "config.json").read_text()))
    save_adapter(folder, random_adapter(shape, 3, 4, 0, verifier=str(base)))
    return folder


@pytest.fixture
def make(tiny_model, adapter, monkeypatch):
    """Build the engine config of a bita run whose block has 52 rows."""
    # vLLM looks at a model's class in a process of its own, which imports for seconds.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())

    def factory(**engine):
        speculative = {"method": "bita", "model": str(adapter), "tree": "5,4,3"}
        engine = {"model": str(tiny_model("llama")), "max_model_len": 256, **engine}
        return EngineArgs(**engine, speculative_config=speculative).create_engine_config()

    return factory


def refused(build) -> str:
    """The one sentence `build` is refused with."""
    with pytest.raises(ValueError) as error:
        build()
    message = str(error.value)
    assert "\n" not in message and "validation error" not in message
    return message


SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
# feature -> (model type, architecture, its config)
MODELS = {
    "pooling models": ("bert", "BertModel", SIZES),
    "models without attention": ("mamba", "MambaForCausalLM", SIZES),
    "hybrid or state-space models": ("falcon_h1", "FalconH1ForCausalLM", SIZES),
    "multi-head latent attention": ("deepseek_v3", "DeepseekV3ForCausalLM", SIZES),
}
# feature -> a property of vLLM's ModelConfig, where no class of such a model can be imported everywhere
PROPERTIES = {
    "images and other media": "supports_multimodal_inputs",
    "encoder-decoder models": "is_encoder_decoder",
    "diffusion models": "is_diffusion",
    "models with multi-axis rotary positions": "uses_mrope",
}
# feature -> (engine arguments, what the sentence says besides)
ARGUMENTS = {
    "prompt embeddings": ({"enable_prompt_embeds": True}, []),
    "sampling masks": ({"return_sampling_mask": True}, []),
    "replayed traces": ({"enable_trace_replay": True}, []),
    "custom logits processors": (
        {"logits_processors": ["mine:Processor"]},
        ["mine:Processor", "on CPU", "may count steps"],
    ),
    "pipeline parallelism": ({"pipeline_parallel_size": 2}, ["pipeline_parallel_size 2"]),
    "data parallelism": ({"data_parallel_size": 2}, ["data_parallel_size 2"]),
    "ranks that are started from outside": (
        {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"},
        ["'external_launcher'"],
    ),
    "weight transfer": (
        {"weight_transfer_config": {"backend": "ipc"}},
        ["on CPU", "reload_weights"],
    ),
    "KV connectors": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        ["kv_transfer_config"],
    ),
    "kv_cache_dtype": ({"kv_cache_dtype": "fp8_e5m2"}, ["'fp8_e5m2' on CPU"]),
}
# feature -> (field of the finished config, its value)
FIELDS = {
    "prefill context parallelism": ("parallel_config.prefill_context_parallel_size", 2),
    "decode context parallelism": ("parallel_config.decode_context_parallel_size", 2),
    "sampling in shards of the batch": ("parallel_config.enable_batch_sharded_sampling", True),
    # A block's rows are not the tokens that went out.
    "returned experts of a mixture": ("aux_output_config.enable_return_routed_experts", True),
    "text watermarking": ("watermark_config", {}),
    "fast prefill over shared KV": ("cache_config.kv_sharing_fast_prefill", True),
}
# In tests of their own, here and in test_config.py.
ON_GPU_ONLY = {"chunked local attention", "a KV cache quantised in some layers only"}


def test_every_feature_is_in_a_table(make):
    config = make()
    features = [
        *refusals._unsupported_model(config.model_config),
        *refusals._unsupported_engine(config),
    ]
    assert not any(present for _, present in features)
    names = {re.split(r" ?[(']", feature)[0] for feature, _ in features}
    assert names == {*MODELS, *PROPERTIES, *ARGUMENTS, *FIELDS, *ON_GPU_ONLY}


def saved(folder, kind, architecture, config):
    AutoConfig.for_model(kind, architectures=[architecture], **config).save_pretrained(folder)
    return {"model": str(folder), "skip_tokenizer_init": True}


@pytest.mark.parametrize("feature", MODELS)
def test_model_is_refused_by_name(make, tmp_path, feature):
    kind, architecture, config = MODELS[feature]
    message = refused(lambda: make(**saved(tmp_path, kind, architecture, config)))
    assert feature in message
    assert architecture in message or feature == "pooling models"


def test_chunked_attention_is_refused_on_a_gpu(make, tmp_path, monkeypatch):
    arguments = saved(tmp_path, "llama4_text", "Llama4ForCausalLM", SIZES)
    assert "was trained for another model" in refused(lambda: make(**arguments))
    monkeypatch.setattr(platform, "on_gpu", lambda: True)
    message = refused(lambda: make(**arguments))
    assert "chunked local attention (Llama4ForCausalLM) on a GPU" in message


@pytest.mark.parametrize("head_size, sentence", [(64, "differ in head_dim"), (32, "trained for")])
def test_layers_of_two_head_sizes_are_refused(make, tmp_path, head_size, sentence):
    config = {**SIZES, "head_dim": 32, "global_head_dim": head_size, "sliding_window": 64}
    arguments = saved(tmp_path, "gemma4_text", "Gemma4ForCausalLM", config)
    assert sentence in refused(lambda: make(**arguments))


@pytest.mark.parametrize("feature", PROPERTIES)
def test_kind_of_model_is_refused_by_name(make, monkeypatch, feature):
    model_config = make().model_config
    monkeypatch.setattr(ModelConfig, PROPERTIES[feature], True)
    vars(model_config).pop(PROPERTIES[feature], None)  # what it remembers
    message = refused(lambda: refusals.refuse_model(model_config))
    assert feature in message
    assert feature != "images and other media" or "language_model_only=True" in message


@pytest.mark.parametrize("feature", ARGUMENTS)
def test_argument_is_refused_by_name(make, feature):
    engine, facts = ARGUMENTS[feature]
    message = refused(lambda: make(**engine))
    assert all(fact in message for fact in (feature, *facts)), message


@pytest.mark.parametrize("feature", FIELDS)
def test_field_of_the_config_is_refused_by_name(make, feature):
    config = make()
    path, value = FIELDS[feature]
    owner, _, name = path.rpartition(".")
    setattr(attrgetter(owner)(config) if owner else config, name, value)
    message = refused(lambda: check_engine(config, get_settings(config)))
    assert feature in message and name in message


# Not by a feature's name: what is given, what was expected.
ENGINE = {
    "model length": ({"max_model_len": 52}, ["max_model_len is 52", "52 rows", "at least 53"]),
    "token budget": (
        {"max_num_batched_tokens": 51, "max_num_seqs": 4},
        ["max_num_batched_tokens is 51", "52 rows"],
    ),
    "async scheduling": ({"async_scheduling": True}, ["async_scheduling"]),
    "worker class": ({"worker_cls": "mine.Worker"}, ["worker_cls", "'mine.Worker'"]),
    "scheduler class": (
        {"scheduler_cls": "mine.Scheduler"},
        ["scheduler_cls", "'mine.Scheduler'"],
    ),
    "LoRA": ({"enable_lora": True, "max_lora_rank": 8}, ["LoRA"]),
}


@pytest.mark.parametrize(("engine", "facts"), ENGINE.values(), ids=ENGINE.keys())
def test_engine_that_cannot_serve_bita_is_refused(make, engine, facts):
    message = refused(lambda: make(**engine))
    assert all(fact in message for fact in facts), message


def test_model_runner_v2_on_cpu_is_refused(make, monkeypatch):
    monkeypatch.setattr(envs, "VLLM_USE_V2_MODEL_RUNNER", True, raising=False)
    assert "VLLM_USE_V2_MODEL_RUNNER=1" in refused(make)


def test_gpu_refuses_the_v1_runner(make, monkeypatch):
    monkeypatch.setattr(platform, "on_gpu", lambda: True)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert "VLLM_USE_V2_MODEL_RUNNER=0 is set" in refused(make)


def test_other_platforms_are_refused(make, monkeypatch):
    here = type(platform.current_platform)
    monkeypatch.setattr(here, "get_cpu_architecture", classmethod(lambda cls: CpuArchEnum.ARM))
    assert "x86-64" in refused(make)
    monkeypatch.setattr(here, "is_cpu", lambda self: False)
    assert "CUDA and CPU platforms" in refused(make)
