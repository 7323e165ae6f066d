"""The training loop: batches in, an adapter directory out, resumable at every step."""

from __future__ import annotations

import math
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bita_vllm.adapter.checkpoint import save_adapter
from bita_vllm.system.errors import UserError
from bita_vllm.training.batches import (
    IGNORED,
    BatchPlan,
    MaskBatch,
    TokenSample,
    make_batch,
    usable_roots,
)
from bita_vllm.training.checkpoint import load_checkpoint, save_checkpoint
from bita_vllm.training.configs import CHUNK_ROWS, TrainConfig
from bita_vllm.training.curves import Curve
from bita_vllm.training.distributed import Processes
from bita_vllm.training.loss import LossResult, mask_loss, mask_weights
from bita_vllm.training.mask_attention import use_flex
from bita_vllm.training.mask_model import MaskModel
from bita_vllm.training.muon import Muon

CHECKPOINT_FILE = "training_state.safetensors"


class TrainingError(UserError):
    """Training that cannot start or go on; the message is one sentence that says what to do."""


class Trainer:
    """Trains the parameters of a `MaskModel` and writes the adapter to `out`."""

    def __init__(
        self,
        model: MaskModel,
        samples: Sequence[TokenSample],
        config: TrainConfig,
        out: str | Path,
        provenance: dict[str, Any] | None = None,
        chunk_rows: int = CHUNK_ROWS,
        processes: Processes | None = None,
    ) -> None:
        """`provenance` (model, data, versions, command) goes into the adapter's config; logits
        exist for `chunk_rows` rows at a time.

        Raises TrainingError if no sample has room for a mask group, or there are fewer sequences a
        step than processes.
        """
        self.processes = processes or Processes()
        self.model, self.config, self.out = model, config, Path(out)
        self.provenance, self.chunk_rows = provenance or {}, chunk_rows
        self.samples = [s for s in samples if len(usable_roots(s, config.max_length))]
        if not self.samples:
            raise TrainingError(
                f"None of the {len(samples)} samples has an answer of three tokens or more within "
                f"the first {config.max_length}; generate longer answers or raise --max-length."
            )
        if (batch_size := min(config.batch_size, len(self.samples))) < self.processes.size:
            raise TrainingError(
                f"{self.processes.size} processes share {batch_size} sequences a step; raise "
                "--batch-size (and have as many samples) or start fewer processes."
            )
        lengths = [len(s.prompt_ids) + len(s.answer_ids) for s in self.samples]
        self.plan = BatchPlan(lengths, config.batch_size, config.seed)
        self.parameters = dict(model.named_parameters())
        self.optimizers = _optimizers(self.parameters, config)
        self.average = (
            {name: p.detach().clone() for name, p in self.parameters.items()} if config.ema else {}
        )
        self.step = 0
        self.curve = Curve(self.out, model.num_masks)
        self._stop = False

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to be resumed."""
        lora = self.model.lora
        return {
            **asdict(self.config),
            "base model": type(self.model.base).__name__,
            "samples": len(self.samples),
            "low-rank deltas": None if lora is None else str(lora),
            "optimizers": ", ".join(type(optimizer).__name__ for optimizer, _ in self.optimizers),
        }

    @property
    def checkpoint_path(self) -> Path:
        return self.out / CHECKPOINT_FILE

    def resume(self) -> None:
        """Go on from the checkpoint in `out`. Raises TrainingError if it is of another run."""
        self.step = load_checkpoint(
            self.checkpoint_path,
            self.parameters,
            self._optimizer_states(),
            self.average,
            self.identity,
        )
        self.curve.cut(self.step)

    def train(self, time_limit: float | None = None, save_every: int = 100) -> bool:
        """Train to the last step; False if `time_limit` seconds or an interrupt came first.

        The adapter and a checkpoint are saved in any case but one: TrainingError, when the loss is
        no longer finite; then what `save_every` saved stays.
        """
        deadline = None if time_limit is None else time.monotonic() + time_limit
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=self.processes.rank > 0,
        )
        with self._interruptible(), bar:
            try:
                while self.step < self.config.steps:
                    self._train_step(bar)
                    late = deadline is not None and time.monotonic() > deadline
                    if self.processes.any(self._stop or late):
                        break
                    if self.step % save_every == 0:
                        self.save()
            except TrainingError:
                raise  # diverged: what was saved before is better
            except BaseException:
                self.save()
                raise
            self.save()
        if self.processes.rank == 0:
            self.curve.plot()
        return self.step == self.config.steps

    def _train_step(self, bar: tqdm) -> None:
        start = time.perf_counter()
        config = self.config
        batch = self._batch(self.step)
        share = schedule(self.step, config.steps, config.warmup)
        for optimizer, peak_lr in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * peak_lr
        result = self.loss(batch)
        total = result.loss.detach().clone()
        self.processes.sum([total, result.statistics])
        loss = float(total)
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss became {loss} at step {self.step + 1}: training diverged; resume from "
                "the checkpoint with a lower --lr or --lora-lr."
            )
        for parameter in self.parameters.values():
            parameter.grad = None
        result.loss.backward()
        self.processes.sum([p.grad for p in self.parameters.values() if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), config.clip)
        for optimizer, _ in self.optimizers:
            optimizer.step()
        if self.average:
            last = [self.parameters[name].detach() for name in self.average]
            torch._foreach_lerp_(list(self.average.values()), last, 1 - config.ema)
        self.step += 1
        row = self.curve.add(
            step=self.step,
            loss=loss,
            result=result,
            grad_norm=float(norm),
            lr=share * config.lr,
            seconds=time.perf_counter() - start,
            sequences=len(batch.input_ids),
        )
        bar.update()
        bar.set_postfix(self.curve.recent(row))

    def loss(self, batch: MaskBatch) -> LossResult:
        """This process's share of the loss of a batch, with gradient."""
        weights = mask_weights(self.model.num_masks, self.config.mask_decay)
        counts = (batch.targets != IGNORED).sum(dim=(0, 1)).cpu()
        batch = MaskBatch(*map(self.processes.part, vars(batch).values()))
        context = self.model.context(batch.input_ids)
        hidden = self.model.mask_hidden(context, batch.roots)
        return mask_loss(
            self.model,
            context,
            hidden,
            batch,
            weights,
            float((weights * counts).sum()),
            self.config.distill,
            self.config.reach_power,
            self.chunk_rows,
        )

    def _batch(self, step: int) -> MaskBatch:
        config = self.config
        weights = self.model.mask_embeddings
        batch = make_batch(
            [self.samples[index] for index in self.plan[step]],
            self.model.num_masks,
            config.groups,
            config.max_length,
            random.Random(f"{config.seed}/roots/{step}"),
            padded=use_flex(weights),
        )
        return MaskBatch(*(tensor.to(weights.device) for tensor in vars(batch).values()))

    def _optimizer_states(self) -> dict[str, dict[str, Any]]:
        """By name of the parameter, and live: what is put in counts."""
        state_of = {
            parameter: optimizer.state[parameter]
            for optimizer, _ in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        return {name: state_of[parameter] for name, parameter in self.parameters.items()}

    def save(self) -> None:
        """Write checkpoint, adapter (averaged weights if there are any) and curve."""
        if self.processes.rank > 0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        save_checkpoint(
            self.checkpoint_path,
            self.parameters,
            self._optimizer_states(),
            self.average,
            self.identity,
            self.step,
        )
        self.curve.write()
        with self._averaged():
            adapter = self.model.adapter()
            raw = {
                **adapter.config.raw,
                "training": {
                    **self.provenance,
                    "arguments": asdict(self.config),
                    "steps_done": self.step,
                    "num_samples": len(self.samples),
                    "last": self.curve.summary(),
                },
            }
            # Deltas in half the bytes; what goes on training is in the checkpoint.
            mask_lora = adapter.mask_lora and adapter.mask_lora.to(torch.bfloat16)
            config = replace(adapter.config, raw=raw)
            save_adapter(self.out, replace(adapter, config=config, mask_lora=mask_lora))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the last ones."""
        last = {name: self.parameters[name].detach().clone() for name in self.average}
        with torch.no_grad():
            for name, average in self.average.items():
                self.parameters[name].copy_(average)
            yield
            for name, parameter in last.items():
                self.parameters[name].copy_(parameter)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM ends training after the step at hand; a second one at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop = True
            for signal_number, handler in before.items():
                signal.signal(signal_number, handler)

        before: dict[signal.Signals, Any] = {}
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            before[signal_number] = signal.signal(signal_number, stop)
        try:
            yield
        finally:
            for signal_number, handler in before.items():
                signal.signal(signal_number, handler)


def _optimizers(
    parameters: dict[str, nn.Parameter], config: TrainConfig
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the deltas, AdamW for the rest, each with its peak learning rate."""
    deltas = [p for name, p in parameters.items() if name.startswith("lora.")]
    rest = [p for name, p in parameters.items() if not name.startswith("lora.")]
    adamw = torch.optim.AdamW(rest, weight_decay=config.weight_decay)
    muon = [(Muon(deltas, config.weight_decay), config.lora_lr)] if deltas else []
    return [(adamw, config.lr), *muon]


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then half a cosine to zero."""
    return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * step / steps))
