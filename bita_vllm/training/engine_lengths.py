"""Accepted length in the real engine, request by request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from bita_vllm.training.samples import Sample

if TYPE_CHECKING:
    from vllm import LLM


@dataclass
class EngineAnswer:
    """What the engine made of one prompt.

    Attributes:
        token_ids: the answer.
        steps: engine steps after prefill that it took.
    """

    token_ids: list[int]
    steps: int


def engine_answers(llm: LLM, samples: Sequence[Sample], concurrency: int) -> list[EngineAnswer]:
    """Answer every prompt greedily, up to the length of the answer that is known already.

    Every output of a request belongs to one engine step; the first is its prefill's.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    answers = [EngineAnswer([], -1) for _ in samples]
    waiting = list(enumerate(samples))[::-1]
    in_flight = 0
    with tqdm(total=len(samples), desc="engine", unit="prompt") as bar:
        while waiting or in_flight:
            while waiting and in_flight < concurrency:
                index, sample = waiting.pop()
                params = SamplingParams(
                    temperature=0.0,
                    max_tokens=len(sample.answer_ids),
                    output_kind=RequestOutputKind.DELTA,
                    detokenize=False,
                )
                engine.add_request(str(index), {"prompt_token_ids": sample.prompt_ids}, params)
                in_flight += 1
            for output in engine.step():
                answer = answers[int(output.request_id)]
                if tokens := output.outputs[0].token_ids:
                    answer.token_ids += tokens
                    answer.steps += 1
                if output.finished:
                    in_flight -= 1
                    bar.update()
    return answers
