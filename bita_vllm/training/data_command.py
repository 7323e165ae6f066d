"""`bita data`: training data from the model itself."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields
from typing import Any

from bita_vllm.training.base_model import DTYPES
from bita_vllm.training.configs import GenerateConfig

OPENINGS = ("mixed", "system", "bare")


def add_parser(subparsers: Any) -> None:
    """Add `data` to the `bita` command."""
    parser = subparsers.add_parser(
        "data",
        help="make training data: prompts and the model's own greedy answers",
        description="Make training data with the model itself. Without --prompts the model writes its own prompts. "
        "Samples are appended batch by batch; the same command goes on with a file that is not complete.",
    )
    parser.add_argument("model", help="base model: directory or hub name")
    parser.add_argument("--out", required=True, help="data file to write or to go on with (JSONL)")
    parser.add_argument(
        "--num-samples", type=int, help="samples wanted (default: 2000, or every prompt)"
    )
    parser.add_argument(
        "--prompts",
        help="file of prompts (JSONL or JSON: plain prompts, ShareGPT, Alpaca, chat messages), or a Hugging Face "
        "dataset as NAME or NAME:SPLIT",
    )
    parser.add_argument("--revision", help="revision of the model on the hub")
    add = parser.add_argument
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the model, as 'bita train' (default: auto)",
    )
    add(
        "--max-prompt-tokens",
        type=int,
        help="longer prompts are left out (default: %(default)s)",
    )
    add("--max-answer-tokens", type=int, help="longer answers are cut (default: %(default)s)")
    add("--temperature", type=float, help="of self-written prompts (default: %(default)s)")
    add("--top-p", type=float, help="of self-written prompts (default: %(default)s)")
    add(
        "--opening",
        choices=OPENINGS,
        help="what self-written prompts continue: all that the chat template puts in front of the user's message "
        "(system), the user's header alone (bare), or both in turn (mixed) (default: %(default)s)",
    )
    add("--batch-size", type=int, help="sequences a batch (default: %(default)s)")
    add("--seed", type=int, help="of all random choices (default: %(default)s)")
    add(
        "--engine-args",
        default="{}",
        metavar="JSON",
        help="more arguments for vLLM's LLM class, such as '{\"max_num_seqs\": 128}'",
    )
    parser.set_defaults(run=run, **asdict(GenerateConfig()))


def run(args: argparse.Namespace) -> int:
    """Make the samples; returns the exit code. Raises DataError."""
    try:
        make_data(args)
    except KeyboardInterrupt:
        print(
            f"bita: Interrupted; all full batches are in {args.out}, and the same command goes on.",
            file=sys.stderr,
        )
        return 130
    return 0


def make_data(args: argparse.Namespace) -> None:
    """Everything that can be refused is refused before the engine starts. Raises DataError."""
    from bita_vllm.training.base_model import (
        choose_device,
        choose_dtype,
        load_tokenizer,
        start_engine,
    )
    from bita_vllm.training.generate import Generator
    from bita_vllm.training.own_prompts import UserTurn
    from bita_vllm.training.provenance import versions
    from bita_vllm.training.samples import SampleWriter, read_prompts

    require_at_least(
        args,
        {"num_samples": 1, "max_prompt_tokens": 8, "max_answer_tokens": 8, "batch_size": 1},
    )
    _check_sampling(args)
    engine_args = parse_engine_args(args)
    config = GenerateConfig(**{f.name: getattr(args, f.name) for f in fields(GenerateConfig)})
    prompts = None if args.prompts is None else read_prompts(args.prompts)
    dtype = choose_dtype(args.dtype, choose_device("auto"))
    tokenizer, revision = load_tokenizer(args.model, args.revision)
    if prompts is None:
        UserTurn.of(tokenizer, config.opening)
    header = {
        "model": args.model,
        "revision": revision,
        "settings": {**asdict(config), "dtype": dtype, "prompts": args.prompts},
        "versions": versions(),
    }
    writer = SampleWriter(args.out, header)
    wanted = args.num_samples or (2000 if prompts is None else len(prompts))
    if len(writer.done) >= wanted:
        print(f"{args.out} holds {len(writer.done)} samples already.")
        return
    options = {
        "revision": args.revision,
        "dtype": dtype,
        "max_model_len": config.max_prompt_tokens + config.max_answer_tokens,
        **engine_args,
    }
    with start_engine(args.model, **options) as llm:
        generator = Generator(llm, tokenizer, config)
        if prompts is None:
            generator.write_own(writer, wanted)
            print(generator.filter)
        else:
            generator.write_given(writer, prompts, wanted)
    print(f"{args.out} is complete.")


def _check_sampling(args: argparse.Namespace) -> None:
    from bita_vllm.training.samples import DataError

    if args.temperature <= 0 or not 0 < args.top_p <= 1:
        raise DataError(
            f"--temperature is {args.temperature} and --top-p {args.top_p}; self-written prompts are sampled, which "
            "needs a temperature above 0 and a top-p above 0 and at most 1."
        )


def require_at_least(args: argparse.Namespace, limits: dict[str, int]) -> None:
    """Raise DataError for an option (None counts as not given) below its limit."""
    from bita_vllm.training.samples import DataError

    for name, low in limits.items():
        value = getattr(args, name)
        if value is not None and value < low:
            option = f"--{name.replace('_', '-')}"
            raise DataError(f"{option} is {value}, but must be at least {low}.")


def parse_engine_args(args: argparse.Namespace) -> dict[str, Any]:
    """`--engine-args` as a dict. Raises DataError."""
    from bita_vllm.training.samples import DataError

    try:
        engine_args = json.loads(args.engine_args)
        if not isinstance(engine_args, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise DataError(
            f"--engine-args is {args.engine_args!r}, which is no JSON object ({error}); write it like "
            "'{\"max_num_seqs\": 128}'."
        ) from None
    return engine_args
