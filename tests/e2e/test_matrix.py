"""fp32, every architecture of the support matrix: with bita the tokens are plain vLLM's; on both runners.

Greedy and seeded requests, prefill in chunks. Drafts come from an oracle and from a random adapter, whose low-rank
deltas are as large as the weights. Mask-row logits are the trainer's. CI runs some architectures, `make matrix` all.
"""

import numpy as np
import pytest
import torch
from e2e.engines import generate, make_adapter, run
from e2e.inspection import compare_with_trainer, known, oracle, recorded_groups, recorded_steps
from testbed.architectures import ARCHITECTURES, WORKS
from testbed.engines import ON_GPU_RUNNER, engine
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.model_executor.models.transformers.base import Base

from bita_vllm.adapter.config import AdapterError

pytestmark = [pytest.mark.slow] if ON_GPU_RUNNER else []
IN_CI = ["gpt_oss"]
if not ON_GPU_RUNNER:
    IN_CI += ["llama4_text", "granitemoehybrid", "stablelm", "cohere", "glm4_moe", "falcon"]
    IN_CI += ["olmo2", "smollm3", "vaultgemma", "starcoder2", "gpt_neox", "phi"]
OPTIONS = {"max_model_len": 192, "max_num_seqs": 4, "max_num_batched_tokens": 96}
LAYERS = {"num_hidden_layers": 2}
NUM_MASKS = 3


def pytest_generate_tests(metafunc):
    if "model_impl" not in metafunc.fixturenames:
        return
    names = ARCHITECTURES if metafunc.config.getoption("matrix") else IN_CI
    if ON_GPU_RUNNER:
        names = [name for name in names if ARCHITECTURES[name].gpu_runner == WORKS]
    cells = [(name, "auto") for name in names]
    metafunc.parametrize(("architecture", "model_impl"), [*cells, ("llama", "transformers")])


@pytest.fixture(autouse=True)
def without_compiler():
    """Cohere's norm is compiled, which the interpreter's stand-in driver cannot."""
    with torch.compiler.set_stance("force_eager" if ON_GPU_RUNNER else "default"):
        yield


@pytest.fixture(autouse=True)
def classes_of_transformers_as_before(monkeypatch):
    """vLLM's Transformers backend makes transformers' own decoder class one of vLLM's, for the whole process."""
    decorate, changed = Base._decorate_cls_for_torch_compile, []

    def remember_and_decorate(self, cls, **options):
        changed.append((cls, cls.__bases__, dict(vars(cls))))
        decorate(self, cls, **options)

    def put_back():
        for cls, bases, attributes in reversed(changed):
            cls.__bases__ = bases
            for name in vars(cls).keys() - attributes.keys():
                delattr(cls, name)
            cls.__init__ = attributes["__init__"]
        changed.clear()

    monkeypatch.setattr(Base, "_decorate_cls_for_torch_compile", remember_and_decorate)
    yield put_back
    put_back()


def requests():
    rng = np.random.default_rng(4)
    greedy, seeded = {"temperature": 0}, {"temperature": 1.0, "seed": 3}
    # On a CPU plain vLLM stops at a seeded prompt that is prefilled in parts.
    kinds = [(30, seeded), (110, greedy), (1, seeded)]
    if not ON_GPU_RUNNER:  # which is interpreted
        kinds = [(4, greedy), *kinds, (17, greedy), (9, greedy)]
    max_tokens = 8 if ON_GPU_RUNNER else 12
    return [
        (
            rng.integers(3, 500, length).tolist(),
            SamplingParams(max_tokens=max_tokens, ignore_eos=True, **kind),
        )
        for length, kind in kinds
    ]


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def check(model, adapter, options):
    """Tokens are plain vLLM's with both drafts; return what a random adapter's run said of its mask groups."""
    plain = run(model, requests(), **options)
    bita = {"model": str(adapter), "tree": "2,1"}
    with recorded_steps() as steps, oracle(known(plain)), engine(model, bita, **options) as llm:
        outputs = generate(llm, requests())
    assert tokens(outputs) == tokens(plain)
    assert any(step.path != list(range(len(step.path))) for step in steps), "no row moved"
    with recorded_groups(NUM_MASKS) as groups, engine(model, bita, **options) as llm:
        outputs = generate(llm, requests())
    assert tokens(outputs) == tokens(plain)
    return outputs, groups


def test_tokens_equal_plain_vllm_and_mask_logits_the_trainers(
    tiny_model, tmp_path, classes_of_transformers_as_before, architecture, model_impl
):
    model = tiny_model(architecture)
    adapter = make_adapter(model, tmp_path / "adapter", NUM_MASKS, lora_rank=4)
    outputs, groups = check(model, adapter, {**OPTIONS, "model_impl": model_impl})
    classes_of_transformers_as_before()
    training = ARCHITECTURES[architecture].training
    if training.startswith("refused"):
        with pytest.raises(AdapterError, match="not supported by bita's training"):
            compare_with_trainer(model, adapter, outputs, groups)
    if training != WORKS:
        return
    # On the V2 runner a prompt of one token has a block at once, without mask ids.
    for served in groups.values():
        served.pop(0, None)
    compared, worst = compare_with_trainer(model, adapter, outputs, groups)
    print(f"{compared} groups, largest difference {worst:.1e}")
    assert compared > 10 and worst < 1e-3


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.skipif(ON_GPU_RUNNER, reason="the GPU's kernel of experts is not interpreted")
def test_deltas_of_a_shared_expert_reach_mask_rows(tiny_model, tmp_path, eager):
    model = tiny_model("qwen2_moe", **LAYERS)
    adapter = make_adapter(model, tmp_path / "adapter", lora_rank=4)
    options = {**OPTIONS, "enforce_eager": eager}
    plain = run(model, requests(), **options)
    bita = {"model": str(adapter), "tree": "2,1"}
    with recorded_groups(NUM_MASKS) as groups, engine(model, bita, **options) as llm:
        outputs = generate(llm, requests())
    assert tokens(outputs) == tokens(plain)
    compared, worst = compare_with_trainer(model, adapter, outputs, groups)
    print(f"{compared} groups, largest difference {worst:.1e}")
    assert compared > 5 and worst < 1e-3


def test_the_trainer_still_loads_its_model(tiny_model):
    AutoModelForCausalLM.from_pretrained(tiny_model("llama", **LAYERS))
