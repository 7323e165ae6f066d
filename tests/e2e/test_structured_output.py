"""fp32: structured output is plain vLLM's, token by token, whatever the drafts; on both runners.

50 JSON schemas, a regex and choices, greedy and seeded, next to a request without structure.
"""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from e2e.engines import generate, make_adapter
from e2e.inspection import known, oracle, recorded_steps
from testbed.engines import ON_GPU_RUNNER, engine
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from bita_vllm.adapter.config import AdapterConfig
from bita_vllm.tree import Template
from bita_vllm.tree.ladder import Ladder
from bita_vllm.tree.template_set import TemplateSet, saved_sets

pytestmark = pytest.mark.slow
NUM_SCHEMAS = 50
SHIPPED = Path(__file__).parents[2] / "adapters" / "smollm2-135m-instruct"
TREES = {
    "most nodes in the first tree": TemplateSet(
        tuple(Template.from_widths(widths, 3) for widths in ([2, 1], [1, 1], [3]))
    ),
    "shipped": saved_sets(AdapterConfig.load(SHIPPED).acceptance)[16],
}
OPTIONS = {
    "max_model_len": 128,
    "max_num_seqs": 16 if ON_GPU_RUNNER else 8,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


def schema(i: int) -> dict:
    """Ends by itself, even for a random model."""
    kinds = [
        {"type": "boolean"},
        {"enum": ["north", "south", i]},
        {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 1, "maxItems": 2},
        {"type": "string", "pattern": "^[a-c]{1,4}$"},
    ]
    properties = {f"p{n}": kinds[(i + n) % 4] for n in range(1 + i % 2)}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def make_requests() -> list[tuple[list[int], SamplingParams]]:
    requests = []
    for i in range(NUM_SCHEMAS):
        sampling = {"temperature": 0} if i % 3 else {"temperature": 1.0, "seed": i}
        if i % (50 if ON_GPU_RUNNER else 5) == 0:  # there a sampler call a depth
            sampling["repetition_penalty"] = 1.2
        structure = StructuredOutputsParams(json=schema(i))
        requests.append((structure, sampling))
    requests.append((StructuredOutputsParams(regex="(ab|c)+d"), {"temperature": 0}))
    requests.append((StructuredOutputsParams(choice=["left", "right"]), {"logprobs": 2, "seed": 1}))
    requests.append((None, {"temperature": 0.8, "seed": 2}))
    return [
        (
            [259 + (7 * i + n) % 250 for n in range(4 + i % 5)],  # letters
            SamplingParams(max_tokens=32, structured_outputs=structure, **sampling),
        )
        for i, (structure, sampling) in enumerate(requests)
    ]


@pytest.fixture(scope="module")
def case(tiny_model, tmp_path_factory):
    # The grammar sees no layers and no heads; Triton's interpreter takes its time for each.
    small = {"num_hidden_layers": 1, "num_key_value_heads": 1} if ON_GPU_RUNNER else {}
    model = tiny_model("llama", vocab_size=512, **{"num_hidden_layers": 2, **small})
    adapter = make_adapter(model, tmp_path_factory.mktemp("adapter"))
    with engine(model, **OPTIONS) as llm:
        return model, adapter, generate(llm, make_requests())


@pytest.fixture
def launched_rows(monkeypatch):
    """Bitmask rows of a request, in each launch of the V2 runner's kernel: it is compiled for every number of them."""
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

    rows = []
    apply = StructuredOutputsWorker.apply_grammar_bitmask

    def recording(self, *args):
        rows.append(self.mask_stride)
        return apply(self, *args)

    monkeypatch.setattr(StructuredOutputsWorker, "apply_grammar_bitmask", recording)
    return rows


@pytest.mark.parametrize("trees", ["shipped"] if ON_GPU_RUNNER else TREES)
@pytest.mark.parametrize("drafts", ["oracle"] if ON_GPU_RUNNER else ["oracle", "random adapter"])
def test_output_equals_plain_vllm(case, launched_rows, drafts, trees, tmp_path):
    model, adapter, plain = case
    source = oracle(known(plain)) if drafts == "oracle" else nullcontext()
    Ladder.fixed(TREES[trees]).save(tmp_path / "ladder.json")
    bita = {"model": str(adapter), "ladder": str(tmp_path / "ladder.json")}
    with recorded_steps() as steps, source, engine(model, bita, **OPTIONS) as llm:
        compiled = {*launched_rows, TREES[trees].first.num_rows}  # the second in vLLM's own warm-up
        outputs = generate(llm, make_requests())
    assert {*launched_rows} <= compiled, "a kernel is compiled inside a request"
    for i, (ours, theirs) in enumerate(zip(outputs, plain, strict=True)):
        assert list(ours.outputs[0].token_ids) == list(theirs.outputs[0].token_ids), i
        assert ours.outputs[0].finish_reason == theirs.outputs[0].finish_reason
    first_lines = TREES[trees].first.max_depth + 1
    lines = {step.line for step in steps if step.request.split("-")[0] != outputs[-1].request_id}
    assert max(lines) >= first_lines, "no block with a grammar chose its tree"
    lengths = [len(step.tokens) for step in steps if step.line > 0]
    print(f"{len(lengths)} blocks with candidates, {sum(lengths)} tokens")
    assert sum(lengths) > len(lengths) or drafts != "oracle"


def test_outputs_are_what_was_asked_for(case):
    _, _, plain = case
    for i in range(NUM_SCHEMAS):
        completion = plain[i].outputs[0]
        assert completion.finish_reason == "stop"
        assert json.loads(completion.text).keys() == schema(i)["properties"].keys()
    regex, choice = (plain[NUM_SCHEMAS + n].outputs[0] for n in (0, 1))
    assert re.fullmatch("(ab|c)+d", regex.text) or regex.finish_reason == "length"
    assert choice.text in ("left", "right")
