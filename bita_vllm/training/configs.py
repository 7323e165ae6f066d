"""The settings of `bita data` and `bita train`; their parsers read the defaults here.

Nothing here imports torch, so `bita --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_ROWS = 256  # rows of logits at a time


@dataclass(frozen=True)
class GenerateConfig:
    """The settings that, with the model, decide the samples.

    Attributes:
        max_prompt_tokens: of a prompt with its chat template; longer ones are left out.
        max_answer_tokens: longer answers end there.
        temperature, top_p, opening: of prompts that the model writes itself (`UserTurn.of`).
        batch_size: sequences of one batch; also decides the random seeds.
    """

    max_prompt_tokens: int = 256
    max_answer_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    opening: str = "mixed"
    batch_size: int = 256
    seed: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """What decides the result. A checkpoint can be resumed only with the same values."""

    steps: int = 1000
    batch_size: int = 4  # sequences a step
    groups: int = 64  # mask groups a sequence
    max_length: int = 2048  # tokens of a sequence that are used
    lr: float = 3e-2  # mask embeddings and prompt tokens
    lora_lr: float = 6e-3
    warmup: int = 10  # steps
    weight_decay: float = 0.0
    clip: float = 1.0  # norm of the gradient
    distill: float = 1.0  # share of KL against cross-entropy
    mask_decay: float = 1.0  # weight of Mj is mask_decay^(j-1)
    reach_power: float = 0.0  # loss.py
    ema: float = 0.0  # decay of the averaged weights that are saved; 0: the last weights
    seed: int = 0
