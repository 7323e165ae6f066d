"""`bita eval`: how good an adapter's drafts are, without the engine and with it."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bita_vllm.training.base_model import DTYPES
from bita_vllm.training.configs import GenerateConfig

if TYPE_CHECKING:
    from bita_vllm.adapter.config import AdapterConfig
    from bita_vllm.training.samples import Sample
    from bita_vllm.tree.template_set import TemplateSet

DEFAULT_TREES = ("1,1,1", "5,4,3", "auto")
SHOWN_RANKS = (1, 2, 3, 5, 10)


def add_parser(subparsers: Any) -> None:
    """Add `eval` to the `bita` command."""
    parser = subparsers.add_parser(
        "eval",
        help="measure an adapter: accuracy of each mask, accepted length of trees",
        description="Measure an adapter on the base model's own greedy answers, and save the acceptance statistics "
        "that choosing a tree needs in the adapter's config.",
    )
    add = parser.add_argument
    add("adapter", help="adapter directory or hub name")
    add("--model", help="base model (default: the one that the adapter names)")
    add("--revision", help="revision of the model on the hub")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="data file of 'bita data': its answers are used as they are")
    source.add_argument(
        "--prompts", help="prompts, in any form that 'bita data' takes, to be answered first"
    )
    add("--num-prompts", type=int, help="use the first so many prompts or samples (default: all)")
    add(
        "--max-answer-tokens",
        type=int,
        default=GenerateConfig.max_answer_tokens,
        help="of answers made here (default: %(default)s)",
    )
    add(
        "--max-positions",
        type=int,
        default=20000,
        help="answer tokens to evaluate (default: %(default)s)",
    )
    add(
        "--tree",
        action="append",
        metavar="TREE",
        help="tree to simulate: '5,4,3', 'auto', 'auto:24' (at most 24 rows) or a template file; may be given again "
        f"(default: {' and '.join(DEFAULT_TREES)})",
    )
    add("--engine", action="store_true", help="measure every tree in the engine too")
    add(
        "--concurrency",
        type=int,
        default=8,
        help="requests in flight with --engine (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the base model, as 'bita train' (default: auto)",
    )
    add("--engine-args", default="{}", metavar="JSON", help="more arguments for vLLM's LLM class")
    add(
        "--no-save",
        action="store_true",
        help="leave the adapter's config as it is, and choose trees by the statistics that it has",
    )
    add("--csv", type=Path, help="write a table with one row a tree")
    add("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print; returns the exit code. Raises AdapterError, DataError or TemplateError."""
    result = evaluate(args)
    if args.csv:
        _write_csv(args.csv, result)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print_tables(result)
    return 0


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """The result as `--json` prints it. Raises AdapterError, DataError or TemplateError."""
    from bita_vllm.adapter.checkpoint import resolve_adapter_dir
    from bita_vllm.adapter.config import AdapterConfig
    from bita_vllm.training.base_model import (
        choose_device,
        choose_dtype,
        load_base,
        load_tokenizer,
    )
    from bita_vllm.training.data_command import parse_engine_args, require_at_least
    from bita_vllm.training.evaluate import (
        acceptance_statistics,
        accepted_lengths,
        answer_predictions,
        budget_of,
        chosen_lengths,
        mask_accuracy,
        parse_tree,
        save_acceptance,
    )
    from bita_vllm.training.mask_model import MaskModel
    from bita_vllm.training.provenance import portable_name, versions
    from bita_vllm.training.samples import DataError, check_tokenizer, check_tokens
    from bita_vllm.training.set_search import find_sets
    from bita_vllm.tree.ladder_search import BUDGETS
    from bita_vllm.tree.search import acceptance_table

    limits = {"num_prompts": 1, "max_answer_tokens": 8, "max_positions": 1, "concurrency": 1}
    require_at_least(args, limits)
    engine_args = parse_engine_args(args)
    adapter_dir = resolve_adapter_dir(args.adapter)
    config = AdapterConfig.load(adapter_dir)
    trees = args.tree or [tree for tree in DEFAULT_TREES if _fits(tree, config)]
    for tree in trees:
        parse_tree(tree, config, None)  # what cannot be is refused before anything is computed
    model = args.model or config.verifier
    tokenizer, revision = load_tokenizer(model, args.revision)
    dtype = choose_dtype(args.dtype, choose_device("auto"))  # of the decoder and the engines
    samples = _answers(args, model, dtype, tokenizer, engine_args)
    if args.data:
        check_tokens(samples, config.model.vocab_size, args.data)
        check_tokenizer(samples, tokenizer, args.data)

    base = load_base(model, args.revision, "auto", dtype)
    decoder = MaskModel.from_adapter(base, adapter_dir)
    predictions = answer_predictions(decoder, samples, args.max_positions)
    ranks = predictions.ranks
    samples = samples[: len(ranks)]
    accuracy = mask_accuracy(ranks)
    if not accuracy.num_positions.all():
        raise DataError(
            f"The answers of {args.data or args.prompts} are too short for {config.num_mask_tokens} mask tokens; "
            "take longer ones."
        )
    origin = {
        "model": model,
        "revision": revision,
        "dtype": dtype,
        "data": args.data or args.prompts,
        "num_answers": len(samples),
        "num_answer_tokens": sum(map(len, ranks)),
        "versions": versions(),
    }
    del decoder, base
    acceptance = {
        **acceptance_statistics(ranks),
        **origin,
        "model": portable_name(model),
        "data": portable_name(args.data or args.prompts),
    }
    if args.no_save and config.acceptance:
        acceptance = config.acceptance
    else:
        budgets = {*BUDGETS, config.speculative_tokens + 1, *filter(None, map(budget_of, trees))}
        acceptance["template_sets"] = find_sets(budgets, acceptance, predictions)
    table = acceptance_table(acceptance, config.num_mask_tokens)
    chosen = {tree: parse_tree(tree, config, acceptance) for tree in trees}
    if not args.no_save:
        save_acceptance(adapter_dir, acceptance)
    rows = []
    for tree, templates in chosen.items():
        alone = accepted_lengths(templates.first, ranks)
        lengths = chosen_lengths(templates, table, predictions) if templates.has_choice else alone
        row = {
            "tree": tree,
            "rows": templates.first.num_rows,
            "trees": len(templates.templates),
            "steps": sum(map(len, lengths)),
            "simulated": _mean([length for answer in lengths for length in answer]),
            "first_alone": _mean([length for answer in alone for length in answer]),
        }
        if args.engine:
            steps = [len(answer) for answer in lengths]
            row |= _engine_row(
                args, model, dtype, adapter_dir, templates, samples, steps, engine_args
            )
        rows.append(row)
    return {
        "adapter": args.adapter,
        **origin,
        "accuracy": {
            f"m{j}": [round(p, 6) for p in top] for j, top in enumerate(accuracy.top.tolist(), 1)
        },
        "acceptance": acceptance,
        "trees": rows,
    }


def _fits(tree: str, config: AdapterConfig) -> bool:
    return tree == "auto" or tree.count(",") < config.num_mask_tokens


def _answers(
    args: argparse.Namespace, model: str, dtype: str, tokenizer: Any, engine_args: dict[str, Any]
) -> list[Sample]:
    """From the data file, or made now, as `bita data` makes them."""
    from bita_vllm.training.base_model import start_engine
    from bita_vllm.training.generate import Generator
    from bita_vllm.training.samples import SampleWriter, read_prompts, read_samples

    if args.data:
        return read_samples(args.data)[: args.num_prompts]
    prompts = read_prompts(args.prompts)[: args.num_prompts]
    config = GenerateConfig(max_prompt_tokens=1024, max_answer_tokens=args.max_answer_tokens)
    options = {
        "max_model_len": config.max_prompt_tokens + config.max_answer_tokens,
        "revision": args.revision,
        "dtype": dtype,
        **engine_args,
    }
    with tempfile.TemporaryDirectory() as folder, start_engine(model, **options) as llm:
        path = Path(folder) / "answers.jsonl"
        writer = SampleWriter(path, {"model": model, "revision": args.revision, "settings": {}})
        Generator(llm, tokenizer, config).write_given(writer, prompts, len(prompts))
        return read_samples(path)


def _engine_row(
    args: argparse.Namespace,
    model: str,
    dtype: str,
    adapter_dir: Path,
    templates: TemplateSet,
    samples: list[Sample],
    steps: list[int],
    engine_args: dict[str, Any],
) -> dict[str, Any]:
    """Accepted length in the engine; `same_answers` counts answers that came out token for token as
    they were known, `same_steps` those of them that took as many steps as the simulation says."""
    from bita_vllm.training.base_model import start_engine
    from bita_vllm.training.engine_lengths import engine_answers
    from bita_vllm.tree.ladder import Ladder

    longest = max(len(s.prompt_ids) + len(s.answer_ids) for s in samples)
    with tempfile.TemporaryDirectory() as folder:
        ladder = Path(folder) / "ladder.json"
        Ladder.fixed(templates).save(ladder)
        options = {
            "revision": args.revision,
            "dtype": dtype,
            "max_model_len": longest + templates.first.num_rows,
            "speculative_config": {
                "method": "bita",
                "model": str(adapter_dir),
                "ladder": str(ladder),
                "copies": False,  # it measures masks
            },
            **engine_args,
        }
        with start_engine(model, **options) as llm:
            answers = engine_answers(llm, samples, args.concurrency)
    same = [a.token_ids == s.answer_ids for a, s in zip(answers, samples, strict=True)]
    return {
        "engine": sum(len(a.token_ids) - 1 for a in answers)
        / max(sum(a.steps for a in answers), 1),
        "engine_steps": sum(a.steps for a in answers),
        "same_answers": sum(same),
        "same_steps": sum(
            a.steps == n for a, n, is_same in zip(answers, steps, same, strict=True) if is_same
        ),
    }


def _mean(values: list[int]) -> float:
    return sum(values) / max(len(values), 1)


def _write_csv(path: Path, result: dict[str, Any]) -> None:
    """Write one row a tree: its figures, accuracies, and where all of it comes from. Raises DataError."""
    from bita_vllm.system.atomic_write import write_csv
    from bita_vllm.training.samples import DataError

    shared = {key: result[key] for key in result if not isinstance(result[key], dict | list)}
    shared |= {
        f"{mask}_top{r}": top[r - 1] for mask, top in result["accuracy"].items() for r in (1, 5, 10)
    }
    shared |= result["versions"]
    rows = [{**row, **shared} for row in result["trees"]]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(path, rows)
    except OSError as error:
        raise DataError(f"The table could not be written to {path} ({error}).") from error


def _print_tables(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{result['num_answers']} answers, {result['num_answer_tokens']} tokens, {result['dtype']}",
        highlight=False,
    )
    accuracy = Table(box=None, pad_edge=False)
    accuracy.add_column("mask")
    for r in SHOWN_RANKS:
        accuracy.add_column(f"top-{r}", justify="right")
    accuracy.add_column("accepted given earlier", justify="right")
    given = result["acceptance"]["rank_probability"]
    for (mask, top), ranks in zip(result["accuracy"].items(), given, strict=True):
        shown = [f"{top[r - 1]:.3f}" for r in SHOWN_RANKS]
        accuracy.add_row(mask, *shown, " ".join(f"{p:.3f}" for p in ranks[:4]) + " ...")
    console.print(accuracy)
    trees = Table(box=None, pad_edge=False)
    names = [name for name in result["trees"][0] if name != "tree"]
    trees.add_column("tree")
    for name in names:
        trees.add_column(name.replace("_", " "), justify="right")
    for row in result["trees"]:
        values = (row[name] for name in names)
        trees.add_row(
            row["tree"], *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values)
        )
    console.print(trees)
