"""fp32: new weights in a running engine, by the ways that vLLM has for plain models; on both runners.

Tokens are those of plain vLLM with the new weights, and mask rows say what the trainer says with them: mask
embeddings, prompt tokens and low-rank deltas are still there.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bita_kernels import cpu_kernels
from e2e.engines import generate, make_adapter, run
from e2e.inspection import compare_with_trainer, recorded_groups
from safetensors.torch import load_file
from testbed.engines import ON_GPU_RUNNER, engine
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams

from bita_vllm.runner import cpu
from bita_vllm.runner import cpu_linear as linear_cpu

pytestmark = [pytest.mark.slow] if ON_GPU_RUNNER else []
OPTIONS = {"max_model_len": 128, "max_num_seqs": 4}
SMALL = {"num_hidden_layers": 2, "num_key_value_heads": 1}
# name -> architecture and its config; with a tied head the input embedding's weights are the output head's
MODELS = {
    "llama": ("llama", {}),
    "tied head": ("qwen2", {"tie_word_embeddings": True}),
    "tied head, one module": ("gemma2", {}),
}
if ON_GPU_RUNNER:
    # The interpreter's worker is vLLM's CPU worker, whose own tied head keeps the old weights (runner/cpu_reload.py).
    del MODELS["tied head"]


def shuffled(model, folder, but=0.0):
    """The model with the rows of every matrix in another order, and a second layer larger by the part `but`."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(parameter[torch.randperm(len(parameter), generator=generator)])
        for parameter in base.model.layers[1].parameters():
            parameter.mul_(1 + but)
    base.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def requests():
    rng = np.random.default_rng(2)
    kinds = ({"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0})
    return [
        (
            rng.integers(3, 500, length).tolist(),
            SamplingParams(max_tokens=10, ignore_eos=True, **kind),
        )
        for length, kind in zip((4, 30, 50), kinds, strict=True)
    ]


def tokens_of(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module", params=MODELS)
def case(request, tiny_model, tmp_path_factory):
    """A model, its adapter, the model with other weights; plain vLLM's tokens with both."""
    architecture, config = MODELS[request.param]
    model = tiny_model(architecture, **SMALL, **config)
    other = shuffled(model, tmp_path_factory.mktemp("other"))
    adapter = make_adapter(model, tmp_path_factory.mktemp("adapter"), lora_rank=4)
    plain = [tokens_of(run(folder, requests(), **OPTIONS)) for folder in (model, other)]
    assert plain[0] != plain[1]
    return model, adapter, other, *plain


def from_disk(llm, folder):
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})


def as_tensors(llm, folder):
    """As a trainer sends them, in the checkpoint's format and names."""
    weights = list(load_file(folder / "model.safetensors").items())
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})


@pytest.mark.parametrize("reload", [from_disk, as_tensors])
def test_tokens_and_mask_rows_follow_the_new_weights(case, reload):
    model, adapter, other, old, new = case
    bita = {"model": str(adapter), "tree": "2,1"}
    with engine(model, bita, **OPTIONS) as llm:
        assert tokens_of(generate(llm, requests())) == old
        reload(llm, other)
        assert llm.reset_prefix_cache()
        with recorded_groups(3) as groups:
            outputs = generate(llm, requests())
        assert tokens_of(outputs) == new
        reload(llm, model)
        assert llm.reset_prefix_cache()
        assert tokens_of(generate(llm, requests())) == old
    compared, worst = compare_with_trainer(other, adapter, outputs, groups)
    print(f"{compared} groups, largest difference {worst:.1e}")
    assert compared > 5 and worst < 1e-3


@pytest.mark.skipif(ON_GPU_RUNNER, reason="packed layers are the CPU runner's")
@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_packed_layers_follow_the_new_weights(tiny_model, tmp_path, monkeypatch, eager):
    """The first weights are exact in bfloat16, and packed so; some layers of the others are not."""
    assert cpu_kernels.register()
    for module in (cpu, linear_cpu):
        monkeypatch.setattr(module, "cpu_gains", lambda: True)
    model = tiny_model("qwen2", dtype="bfloat16", tie_word_embeddings=True, **SMALL)
    other = shuffled(model, tmp_path / "other", but=torch.finfo(torch.bfloat16).eps / 4)
    adapter = make_adapter(model, tmp_path / "adapter", lora_rank=4)
    options = {**OPTIONS, "enforce_eager": eager}
    old, new = (tokens_of(run(folder, requests(), **OPTIONS)) for folder in (model, other))
    bita = {"model": str(adapter), "tree": "2,1"}
    with engine(model, bita, **options) as llm:
        (kinds,) = llm.apply_model(packed_types)
        assert kinds == {torch.bfloat16}
        assert tokens_of(generate(llm, requests())) == old
        from_disk(llm, other)
        assert llm.reset_prefix_cache()
        assert tokens_of(generate(llm, requests())) == new
        (kinds,) = llm.apply_model(packed_types)
        assert kinds == {torch.bfloat16, torch.float32}


def packed_types(model):
    return {m.packed_weight.dtype for m in model.modules() if hasattr(m, "packed_weight")}


def test_requests_that_run_go_on(case):
    model, adapter, other, old, _ = case
    bita = {"model": str(adapter), "tree": "2,1"}
    finished = {}
    with engine(model, bita, **OPTIONS) as llm:
        core = llm.llm_engine
        for i, (prompt, params) in enumerate(requests()):
            core.add_request(str(i), {"prompt_token_ids": prompt}, params)
        for step in range(100):
            if step == 3:
                from_disk(llm, other)
            finished.update({o.request_id: o for o in core.step() if o.finished})
            if not core.has_unfinished_requests():
                break
    answers = tokens_of(finished[str(i)] for i in range(len(old)))
    assert [len(answer) for answer in answers] == [10] * len(old)
    assert answers != old and all(a[0] == b[0] for a, b in zip(answers, old, strict=True))


def test_names_of_parameters_are_the_models(case):
    """By which trainers and checkpoints find them."""

    def names(model):
        return sorted(name for name, _ in model.named_parameters()), sorted(model.state_dict())

    model, adapter, *_ = case
    found = []
    for bita in (None, {"model": str(adapter), "tree": "2,1"}):
        with engine(model, bita, **OPTIONS) as llm:
            found += llm.apply_model(names)
    assert found[0] == found[1]


@pytest.mark.skipif(ON_GPU_RUNNER, reason="only the CPU runner has two forms of a model")
def test_trainers_get_the_same_model_whatever_step_was_last(case):
    def look(model):
        return id(model), sorted(name for name, _ in model.named_buffers())

    model, adapter, *_ = case
    with engine(model, {"model": str(adapter), "tree": "2,1"}, **OPTIONS) as llm:
        loaded = llm.apply_model(look)
        generate(llm, requests())
        assert llm.apply_model(look) == loaded


@pytest.mark.skipif(ON_GPU_RUNNER, reason="only the CPU runner has two forms of a model")
def test_weights_are_freed_when_the_engine_ends(case):
    model, adapter, *_ = case
    held = []
    with engine(model, {"model": str(adapter), "tree": "2,1"}, **OPTIONS) as llm:
        generate(llm, requests()[:1])

        def hold(worker):
            held.append(worker.model_runner)

        llm.collective_rpc(hold)
    (runner,) = held
    forms = (value for value in vars(runner).values() if isinstance(value, torch.nn.Module))
    assert not [form for form in forms if next(form.parameters(), None) is not None]
