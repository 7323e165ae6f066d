"""Models that no engine can serve with bita are refused in one sentence, before their weights are read."""

import pytest
from e2e.engines import make_adapter
from testbed.engines import engine
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

OPTIONS = {"max_model_len": 192, "max_num_seqs": 4}
MODELS = {
    "bloom": "does not support ALiBi (layer transformer.h.0",
    "gemma3n_text": "has 2; this model is not supported",
}


@pytest.fixture
def weights_read(monkeypatch):
    """The models whose weights were read."""
    read = []
    monkeypatch.setattr(
        DefaultModelLoader, "load_weights", lambda self, model, config: read.append(model)
    )
    return read


def refused(model, adapter):
    with (
        pytest.raises(ValueError) as error,
        engine(model, {"model": str(adapter), "tree": "2,1"}, **OPTIONS),
    ):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("architecture", MODELS)
def test_layers_that_attend_otherwise(tiny_model, tmp_path, weights_read, architecture):
    model = tiny_model(architecture)
    adapter = make_adapter(model, tmp_path / "adapter")
    assert MODELS[architecture] in refused(model, adapter)
    assert not weights_read


def test_deltas_of_another_model(tiny_model, tmp_path, weights_read):
    """Of the same dimensions, but of other modules."""
    adapter = make_adapter(tiny_model("gpt_neox"), tmp_path / "adapter", lora_rank=2)
    model = tiny_model("llama", num_key_value_heads=4)
    assert "LlamaForCausalLM has no such linear layer" in refused(model, adapter)
    assert not weights_read
