"""What is trained is what is served: mask-row logits of the trainer and of vLLM, fp32."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from e2e.engines import ON_GPU_RUNNER, engine, generate, make_adapter, random_mask_lora
from tiny_models import ARCHITECTURES
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from bita_vllm.training.mask_model import MaskModel

K = 3
TOLERANCE = 1e-3
# request -> {position of a root: [k, V] logits of its mask group}
Recorded = dict[str, dict[int, torch.Tensor]]


@contextmanager
def recorded_groups() -> Iterator[Recorded]:
    """Logits of the group under every block's root, as vLLM's CPU runner computes them."""
    from bita_vllm.runner.cpu import BitaCPUModelRunner

    recorded: Recorded = defaultdict(dict)
    propose = BitaCPUModelRunner.propose_draft_token_ids

    def recording(
        self: BitaCPUModelRunner,
        scheduler_output: Any,
        token_ids: Any,
        metadata: Any,
        hidden_states: torch.Tensor,
        *args: Any,
    ) -> Any:
        blocks = self._blocks
        for request, line, first in zip(
            self.input_batch.req_ids, blocks.line, blocks.first_row, strict=True
        ):
            if line >= 0:
                parent, is_mask = self.table.parent[line], self.table.mask_index[line] >= 0
                rows, row = [], 0
                while len(rows) < K:
                    (row,) = np.flatnonzero(is_mask & (parent == row))
                    rows.append(int(first + row))
                logits = self.model.compute_logits(hidden_states[rows])
                recorded[request.split("-")[0]][int(self.positions[first])] = logits.clone()
        return propose(self, scheduler_output, token_ids, metadata, hidden_states, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BitaCPUModelRunner, "propose_draft_token_ids", recording)
        yield recorded


@pytest.mark.skipif(ON_GPU_RUNNER, reason="looks into the CPU runner")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mask_logits_equal_vllms(architecture, tiny_model, tmp_path):
    folder = tiny_model(architecture)
    adapter = make_adapter(folder, tmp_path / "adapter", K, lora_rank=4)
    rng = np.random.default_rng(5)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    requests = [(rng.integers(3, 512, length).tolist(), params) for length in (3, 30, 75)]
    with (
        recorded_groups() as recorded,
        engine(folder, {"model": str(adapter), "tree": "2,1"}, max_model_len=128) as llm,
    ):
        outputs = generate(llm, requests)

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = MaskModel.from_adapter(base, adapter)
    worst, compared = 0.0, 0
    for output in outputs:
        groups = recorded[output.request_id]
        ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]])
        roots = torch.tensor([sorted(position for position in groups if position < ids.shape[1])])
        with torch.no_grad():
            logits = model.mask_logits(model.context(ids), roots)[0]
        served = torch.stack([groups[position] for position in roots[0].tolist()])
        worst = max(worst, float((logits - served).abs().max()))
        compared += roots.shape[1]
        assert float(served.std()) > 0.1, "logits that say nothing"
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
