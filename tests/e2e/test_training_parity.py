"""What is trained is what is served: mask-row logits of the trainer and of vLLM, fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from e2e.engines import generate, make_adapter, random_mask_lora
from e2e.inspection import compare_with_trainer, recorded_groups
from testbed.architectures import TRAINED
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams

K = 3
TOLERANCE = 1e-3


@pytest.mark.skipif(ON_GPU_RUNNER, reason="test_gpu_runner.py has one of them")
@pytest.mark.parametrize("architecture", TRAINED)
def test_mask_logits_equal_vllms(architecture, tiny_model, tmp_path):
    folder = tiny_model(architecture)
    adapter = make_adapter(folder, tmp_path / "adapter", K, lora_rank=4)
    rng = np.random.default_rng(5)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    requests = [(rng.integers(3, 512, length).tolist(), params) for length in (3, 30, 75)]
    with (
        recorded_groups(K) as recorded,
        engine(folder, {"model": str(adapter), "tree": "2,1"}, max_model_len=128) as llm,
    ):
        outputs = generate(llm, requests)

    compared, worst = compare_with_trainer(folder, adapter, outputs, recorded)
    print(f"\n{architecture}: {compared} groups, largest difference {worst:.1e}")
    assert compared >= 20
    assert worst < TOLERANCE


def test_vllms_lora_loader_reads_the_deltas(tiny_model, tmp_path):
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    weights = random_mask_lora(tiny_model("llama"), 8)
    weights.save(tmp_path, "tiny", 3)
    helper = PEFTHelper.from_local_dir(str(tmp_path), max_position_embeddings=1024)
    loaded = LoRAModel.from_local_checkpoint(
        str(tmp_path), set(weights.targets), helper, device="cpu", dtype=torch.float32
    )
    assert set(loaded.loras) == set(weights.modules)
    for name, (a, b) in weights.modules.items():
        theirs = loaded.loras[name]
        theirs.optimize()  # as the engine does: the scale goes into B
        torch.testing.assert_close(theirs.lora_a, a)
        torch.testing.assert_close(theirs.lora_b, 2 * b)
