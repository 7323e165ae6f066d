"""fp32, models that vLLM runs in another way: tokens are plain vLLM's; on both runners.

Its Transformers backend, where ids come as [1, rows], a dense Granite 4 in a class for hybrids, and a mixture whose
shared expert is called by way of vLLM's table of layers. The adapters have low-rank deltas as large as the weights.
"""

import numpy as np
import pytest
from e2e.engines import generate, make_adapter, run
from e2e.inspection import compare_with_trainer, known, oracle, recorded_groups, recorded_steps
from testbed.engines import ON_GPU_RUNNER, engine
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.model_executor.models.transformers.base import Base

pytestmark = [pytest.mark.slow] if ON_GPU_RUNNER else []
OPTIONS = {"max_model_len": 192, "max_num_seqs": 4, "max_num_batched_tokens": 96}
TRANSFORMERS = ["olmo2", "smollm3", "starcoder2", "gpt_neox", "phi", "llama"]
LAYERS = {"num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def classes_of_transformers_as_before(monkeypatch):
    """vLLM's Transformers backend makes transformers' own decoder class one of vLLM's, for the whole process."""
    decorate, changed = Base._decorate_cls_for_torch_compile, []

    def remember_and_decorate(self, cls, **options):
        changed.append((cls, cls.__bases__, dict(vars(cls))))
        decorate(self, cls, **options)

    monkeypatch.setattr(Base, "_decorate_cls_for_torch_compile", remember_and_decorate)
    yield
    for cls, bases, attributes in reversed(changed):
        cls.__bases__ = bases
        for name in vars(cls).keys() - attributes.keys():
            delattr(cls, name)
        cls.__init__ = attributes["__init__"]


def requests():
    rng = np.random.default_rng(4)
    kinds = ({"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0}) * 2
    return [
        (
            rng.integers(3, 500, length).tolist(),
            SamplingParams(max_tokens=12, ignore_eos=True, **kind),
        )
        for length, kind in zip((4, 30, 110, 17, 1, 9), kinds, strict=True)
    ]


@pytest.mark.parametrize(
    ("architecture", "backend"),
    [*((name, "transformers") for name in TRANSFORMERS), ("granitemoehybrid", "vllm")],
)
def test_tokens_equal_plain_vllm(tiny_model, tmp_path, architecture, backend):
    config = dict(LAYERS)
    if architecture == "granitemoehybrid":
        config["layer_types"] = ["attention"] * 2
    model = tiny_model(architecture, **config)
    adapter = make_adapter(model, tmp_path / "adapter", lora_rank=4)
    options = {**OPTIONS, "model_impl": backend}
    plain = run(model, requests(), **options)
    bita = {"model": str(adapter), "tree": "2,1"}
    with recorded_steps() as steps, oracle(known(plain)), engine(model, bita, **options) as llm:
        outputs = generate(llm, requests())
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]
    assert any(step.path != list(range(len(step.path))) for step in steps), "no row moved"


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.skipif(ON_GPU_RUNNER, reason="the GPU's kernel of experts is not interpreted")
def test_deltas_of_a_shared_expert_reach_mask_rows(tiny_model, tmp_path, eager):
    model = tiny_model("qwen2_moe", **LAYERS)
    adapter = make_adapter(model, tmp_path / "adapter", lora_rank=4)
    options = {**OPTIONS, "enforce_eager": eager}
    plain = run(model, requests(), **options)
    bita = {"model": str(adapter), "tree": "2,1"}
    with recorded_groups(3) as groups, engine(model, bita, **options) as llm:
        outputs = generate(llm, requests())
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]
    compared, worst = compare_with_trainer(model, adapter, outputs, groups)
    print(f"{compared} groups, largest difference {worst:.1e}")
    assert compared > 5 and worst < 1e-3


def test_the_trainer_still_loads_its_model(tiny_model):
    AutoModelForCausalLM.from_pretrained(tiny_model("llama", **LAYERS))
