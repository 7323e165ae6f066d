"""`bita train`: an adapter from the data that `bita data` made."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from bita_vllm.training.base_model import DTYPES
from bita_vllm.training.configs import CHUNK_ROWS, TrainConfig

if TYPE_CHECKING:
    from bita_vllm.training.distributed import Processes
    from bita_vllm.training.trainer import Trainer

# torch and transformers are imported where they are used: `bita --help` answers at once.


def add_parser(subparsers: Any) -> None:
    """Add `train` to the `bita` command."""
    parser = subparsers.add_parser(
        "train",
        help="train an adapter",
        description="Train an adapter for a base model on the model's own answers, as 'bita data' "
        "writes them. The adapter directory also holds the checkpoint to resume from, and the "
        "curves (training.csv, training.png).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="base model: directory or hub name")
    parser.add_argument("--data", required=True, nargs="+", help="files made by 'bita data'")
    parser.add_argument("--out", required=True, help="adapter directory to write")
    parser.add_argument("--revision", help="revision of the model on the hub")
    parser.add_argument(
        "--verifier",
        metavar="NAME",
        help="base model that the adapter names, as where its users find it (if not given: the model)",
    )
    add = parser.add_argument
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--start-from", metavar="ADAPTER", help="start from this adapter's weights, not afresh")

    shape = parser.add_argument_group("the adapter")
    shape.add_argument("--mask-tokens", type=int, default=3, metavar="K")
    shape.add_argument("--prompt-tokens", type=int, default=16, metavar="P")
    shape.add_argument("--lora-rank", type=int, default=0, help="of the deltas; 0 for none")
    shape.add_argument("--lora-alpha", type=float, help="the rank if not given: scale 1")
    shape.add_argument("--lora-targets", help="as in q_proj,v_proj; all linear layers if not given")
    shape.add_argument("--lora-layers", help="as in 0-14,20; all layers if not given")

    run_group = parser.add_argument_group("the run")
    number = run_group.add_argument
    number("--steps", type=int)
    number("--batch-size", type=int, help="sequences a step")
    number("--groups", type=int, help="mask groups a sequence and step")
    number("--max-length", type=int, help="tokens of a sequence that are used")
    number("--lr", type=float, help="of mask embeddings and prompt tokens")
    number("--lora-lr", type=float, help="of the low-rank deltas")
    number("--warmup", type=int, help="steps")
    number("--weight-decay", type=float)
    number("--clip", type=float, help="largest norm of the gradient")
    number("--distill", type=float, help="share of KL to the model's own distribution")
    number("--mask-decay", type=float, help="weight of a mask against the one before")
    number(
        "--reach-power",
        type=float,
        metavar="Q",
        help="a row counts by the probability, to the power of Q, that its mask and those before it "
        "give to the text's tokens; 0: all alike",
    )
    number("--ema", type=float, help="save averaged weights with this decay")
    number("--seed", type=int)
    number("--time-limit", type=float, metavar="MINUTES", help="save and stop then; see --resume")
    number("--save-every", type=int, default=100, metavar="STEPS")

    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the base model; auto: bfloat16 where the device multiplies it fast, else float32",
    )
    machine.add_argument("--device", default="auto", help="auto: the GPU if there is one")
    machine.add_argument("--threads", type=int, help="CPU threads, torch's choice if not given")
    machine.add_argument(
        "--checkpoint-activations", action="store_true", help="less memory, slower"
    )
    machine.add_argument(
        "--no-shard",
        action="store_true",
        help="under torchrun every process holds the whole base model: faster where it fits",
    )
    machine.add_argument(
        "--chunk-rows", type=int, default=CHUNK_ROWS, help="rows of logits at a time"
    )
    parser.set_defaults(run=run, **asdict(TrainConfig()))


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code. Raises AdapterError, DataError and TrainingError."""
    import torch

    from bita_vllm.training.base_model import choose_device
    from bita_vllm.training.distributed import Processes
    from bita_vllm.training.trainer import TrainingError

    processes = Processes.join(choose_device(args.device))
    try:
        trainer = make_trainer(args, processes)
        limit = None if args.time_limit is None else 60 * args.time_limit
        done = trainer.train(limit, args.save_every)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"Out of memory ({str(error).splitlines()[0]}); lower --batch-size, --groups or "
            "--chunk-rows, or add --checkpoint-activations. What was saved can be resumed."
        ) from None
    finally:
        processes.leave()
    if processes.rank > 0:
        return 0
    state = "trained" if done else f"stopped at step {trainer.step}; go on with --resume"
    print(f"{args.out}: {state}. {trainer.curve.summary()}")
    return 0


def make_trainer(args: argparse.Namespace, processes: Processes) -> Trainer:
    """Everything that can be refused is refused here. Raises AdapterError, DataError and
    TrainingError."""
    import torch

    from bita_vllm.adapter.config import AdapterConfig, AdapterError
    from bita_vllm.training.base_model import load_base, load_tokenizer
    from bita_vllm.training.distributed import shard_layers
    from bita_vllm.training.initial import new_model
    from bita_vllm.training.mask_lora import MaskLora
    from bita_vllm.training.mask_model import MaskModel
    from bita_vllm.training.provenance import portable_name, versions
    from bita_vllm.training.samples import (
        check_tokenizer,
        check_tokens,
        read_samples,
    )
    from bita_vllm.training.trainer import Trainer, TrainingError

    check_arguments(args)
    if find_spec("matplotlib") is None:
        raise TrainingError(
            "'bita train' draws its curves with matplotlib, which is not installed here; "
            "install it (pip install matplotlib)."
        )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    tokenizer, revision = load_tokenizer(args.model, args.revision)
    samples = []
    for path in args.data:
        part = read_samples(path)
        check_tokenizer(part, tokenizer, path)
        samples += part
    base = load_base(args.model, args.revision, args.device, args.dtype)
    check_tokens(samples, base.config.get_text_config().vocab_size, args.data[0])

    if args.start_from:
        model = MaskModel.from_adapter(base, args.start_from)
        if model.num_masks != args.mask_tokens:
            raise AdapterError(
                f"--start-from has {model.num_masks} mask tokens, but --mask-tokens is "
                f"{args.mask_tokens}; give the same number."
            )
    else:
        text = [token for s in samples[:64] for token in (*s.prompt_ids, *s.answer_ids)]
        name = os.path.abspath(args.model) if os.path.isdir(args.model) else args.model
        verifier = args.verifier or name
        model = new_model(base, args.mask_tokens, args.prompt_tokens, args.seed, text, verifier)
    if args.lora_rank and model.lora is not None:
        if args.lora_targets or args.lora_layers or args.lora_alpha:
            raise AdapterError(
                f"--start-from has low-rank deltas ({model.lora}); --lora-targets, --lora-layers and --lora-alpha are "
                "of new ones: leave them out."
            )
        model.lora.grow(args.lora_rank, args.seed)
    elif args.lora_rank:
        model.add_lora(
            MaskLora.for_model(
                base,
                args.lora_rank,
                args.lora_alpha,
                args.lora_targets.split(",") if args.lora_targets else None,
                parse_layers(args.lora_layers) if args.lora_layers else None,
                args.seed,
            )
        )
    if args.checkpoint_activations:
        model.checkpoint_activations()
    if processes.size > 1 and not args.no_shard:
        shard_layers(base)
    config = TrainConfig(**{field.name: getattr(args, field.name) for field in fields(TrainConfig)})
    provenance = {
        "model": portable_name(args.model),
        "revision": revision,
        "data": [_portable_header(path) for path in args.data],
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(),
    }
    if args.start_from:
        before = AdapterConfig.load(args.start_from).raw.get("training", {})
        provenance["started_from"] = {"adapter": portable_name(args.start_from), **before}
    trainer = Trainer(model, samples, config, args.out, provenance, args.chunk_rows, processes)
    if args.resume:
        trainer.resume()
    elif trainer.checkpoint_path.exists():
        raise AdapterError(
            f"{args.out} holds a training run already; go on with it (--resume), or give --out "
            "another directory."
        )
    return trainer


def _portable_header(path: str) -> dict[str, Any]:
    """The provenance header of a data file, without this machine's folders."""
    from bita_vllm.training.provenance import portable_name
    from bita_vllm.training.samples import read_header

    header = read_header(path)
    settings = header.get("settings", {})
    names = {key: portable_name(str(settings[key])) for key in ("prompts",) if settings.get(key)}
    return {
        "file": portable_name(path),
        **header,
        "model": portable_name(str(header.get("model"))),
        "settings": {**settings, **names},
    }


def check_arguments(args: argparse.Namespace) -> None:
    """Raises TrainingError for a value out of range."""
    from bita_vllm.training.trainer import TrainingError

    if args.verifier and args.start_from:
        raise TrainingError(
            f"--verifier is {args.verifier!r}, but --start-from keeps the name in the adapter that it "
            "starts from; leave it out."
        )
    bounds = {
        "steps": (1, None),
        "batch_size": (1, None),
        "groups": (1, None),
        "max_length": (3, None),
        "lora_rank": (0, None),
        "warmup": (0, None),
        "distill": (0, 1),
        "reach_power": (0, None),
        "ema": (0, 0.999999),
        "save_every": (1, None),
        "chunk_rows": (1, None),
    }
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value < low or (high is not None and value > high):
            span = f"at least {low}" if high is None else f"between {low} and {high}"
            raise TrainingError(f"--{name.replace('_', '-')} is {value}, but must be {span}.")


def parse_layers(text: str) -> list[int]:
    """'0-14,20' -> [0, ..., 14, 20]. Raises TrainingError."""
    from bita_vllm.training.trainer import TrainingError

    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            layers.update(range(int(first), int(last or first) + 1))
        except ValueError:
            raise TrainingError(
                f"--lora-layers is {text!r}, but must be numbers and ranges such as 0-14,20."
            ) from None
    return sorted(layers)
