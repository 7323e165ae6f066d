"""A real `vllm serve` process with bita, and OpenAI clients."""

import asyncio
import json
import re
import signal
import time
from pathlib import Path

import openai
import psutil
import pytest
from e2e.servers import ANSWER_TIMEOUT_S, running_server

from bita_vllm.tree.copy_templates import chains_within

pytestmark = pytest.mark.slow

ADAPTER = Path(__file__).parents[2] / "adapters" / "smollm2-135m-instruct"
MODEL = "smollm2"
CLIENTS = 32
CHATS = [
    [{"role": "user", "content": content}]
    for content in (
        "What is the capital of France?",
        "Count from one to twenty in words.",
        "Write a short poem about the sea.",
        "Explain in two sentences why the sky is blue.",
    )
]
FRONT_END_STOPPED_ENGINE = "[shutdown] MPClient: engine manager stopped"
GREEDY = {"model": MODEL, "temperature": 0.0, "max_tokens": 40}


@pytest.fixture(scope="module")
def server(embedded_model, tmp_path_factory):
    flags = ["--max-model-len", "1024", "--max-num-seqs", "16"]
    flags += ["--kv-cache-memory-bytes", str(512 << 20)]
    flags += ["--speculative-method", "bita", "--speculative-model", str(ADAPTER)]
    flags += ["--speculative-tokens", "15"]  # blocks of 16 rows at every load
    with running_server(embedded_model, MODEL, flags, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(autouse=True)
def show_log_on_failure(server):
    """pytest prints what a failed test's teardown prints."""
    start = server.log.stat().st_size
    yield
    print(server.log.read_text()[start:][-6000:])


def chat(server, messages=CHATS[0], **options):
    return server.client.chat.completions.create(messages=messages, **{**GREEDY, **options})


@pytest.fixture(scope="module")
def alone(server):
    """Text of each chat while nothing else runs."""
    return [chat(server, messages).choices[0].message.content for messages in CHATS]


def test_chat_is_the_base_models_own_greedy_text(server, alone, embedded_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype="float32")
    for messages, text in list(zip(CHATS, alone, strict=True))[:2]:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, do_sample=False, max_new_tokens=GREEDY["max_tokens"])[
            0, prompt["input_ids"].shape[1] :
        ]
        assert text == tokenizer.decode(output, skip_special_tokens=True)


def test_completion_of_the_rendered_chat_is_the_chat(server, alone, embedded_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    prompt = tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True, tokenize=False)
    completion = server.client.completions.create(prompt=prompt, **GREEDY)
    assert completion.choices[0].text == alone[0]
    assert 0 < completion.usage.completion_tokens <= GREEDY["max_tokens"]


@pytest.mark.parametrize("which", range(len(CHATS)))
def test_streamed_chunks_concatenate_to_the_text(server, alone, which):
    stream = chat(server, CHATS[which], stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == alone[which]
    usage = chunks[-1].usage
    assert 0 < usage.completion_tokens <= GREEDY["max_tokens"]


def test_streamed_completion_concatenates_to_the_text(server):
    request = {**GREEDY, "prompt": "Once upon a time"}
    whole = server.client.completions.create(**request).choices[0].text
    parts = [c.choices[0].text for c in server.client.completions.create(**request, stream=True)]
    assert "".join(parts) == whole


def test_logprobs_come_with_every_token(server, alone):
    answer = chat(server, CHATS[1], logprobs=True, top_logprobs=3)
    assert answer.choices[0].message.content == alone[1]
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token  # greedy
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0


def test_structured_output_follows_its_schema(server, alone):
    properties = {"capital": {"enum": ["Paris", "Rome"]}, "sunny": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    content = chat(server, response_format=wanted, max_tokens=64).choices[0].message.content
    assert json.loads(content).keys() == properties.keys()
    assert chat(server).choices[0].message.content == alone[0]


async def stream_some(client: openai.AsyncOpenAI, messages, max_chunks: int | None) -> str:
    """The streamed text; closed by the client after `max_chunks`."""
    text, count = "", 0
    stream = await client.chat.completions.create(messages=messages, **GREEDY, stream=True)
    async with stream:
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            count += 1
            if count == max_chunks:
                break
    return text


def test_many_clients_of_which_half_abort_leave_the_server_as_it_was(server, alone):
    async def run():
        async with openai.AsyncOpenAI(**server.openai, timeout=ANSWER_TIMEOUT_S) as client:
            streams = [
                stream_some(client, CHATS[i // 2 % len(CHATS)], max_chunks=4 if i % 2 else None)
                for i in range(CLIENTS)
            ]
            return await asyncio.gather(*streams)

    for i, text in enumerate(asyncio.run(run())):
        whole = alone[i // 2 % len(CHATS)]
        if i % 2:
            assert len(text) < len(whole)
            assert whole.startswith(text)
        else:
            assert text == whole
    assert server.is_healthy()
    assert chat(server).choices[0].message.content == alone[0]
    names = ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while any(server.metric(f"vllm:{name}") for name in names) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert {name: server.metric(f"vllm:{name}") for name in names} == dict.fromkeys(names, 0)


def test_spec_decode_metrics_count_depths_not_rows(server, alone):
    block = re.search(r"step block of (\d+) rows: .*\(([\d,]+) by depth\)", server.log.read_text())
    assert block is not None
    max_depth = max(len(block[2].split(",")), *chains_within(int(block[1])))
    metrics = server.metrics()
    drafts, drafted, accepted = (
        sum(value for _, value in metrics[f"vllm:spec_decode_{name}_total"])
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    )
    assert drafts > 0
    assert 0 < accepted <= drafted <= max_depth * drafts
    by_position = {
        int(re.search(r'position="(\d+)"', labels)[1]): value
        for labels, value in metrics["vllm:spec_decode_num_accepted_tokens_per_pos_total"]
    }
    assert sorted(by_position) == list(range(max_depth))
    counts = [by_position[position] for position in sorted(by_position)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] <= drafts
    assert sum(counts) == accepted


def test_sigterm_ends_every_process(server):
    """Last in this file: the server is gone afterwards."""
    processes = server.processes()
    assert len(processes) > 1
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(ANSWER_TIMEOUT_S) == 0
    left = psutil.wait_procs(processes, timeout=ANSWER_TIMEOUT_S)[1]
    assert [f"{process.pid} {process.status()}" for process in left] == []
    before, stopped, after = server.log.read_text().partition(FRONT_END_STOPPED_ENGINE)
    assert "Traceback" not in before
    assert stopped, "the engine went by itself"
    check_only_the_reader_failed(after)


def check_only_the_reader_failed(log: str) -> None:
    """Plain vLLM does it too, more often the busier the machine is.

    `AsyncLLM.shutdown` runs in a thread: it closes the sockets on the event loop, and then cancels the task that
    reads them. If the loop is quicker, the task finds its queue closed, and logs EngineDeadError.
    """
    errors = [line for line in log.splitlines() if "ERROR" in line or "Traceback" in line]
    assert all("[async_llm.py:" in line for line in errors), errors
    if errors:
        assert errors[0].endswith("AsyncLLM output_handler failed.")
        assert "EngineDeadError" in errors[-1]
        assert sum("Traceback" in line for line in errors) == 1
