"""Where a run stands: weights, optimizer state and step, in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from bita_vllm.adapter.config import AdapterError, first_line
from bita_vllm.system.atomic_write import written_whole


def save_checkpoint(
    path: Path,
    parameters: dict[str, nn.Parameter],
    states: dict[str, dict[str, Any]],
    average: dict[str, torch.Tensor],
    config: dict[str, Any],
    step: int,
) -> None:
    """Write all of it whole, so that a crash leaves the checkpoint before.

    `states`: of the optimizers, by name of the parameter. Raises AdapterError if it cannot be written.
    """
    tensors = {f"parameter/{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"average/{name}": tensor for name, tensor in average.items()}
    for name, state in states.items():
        for key, value in state.items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"config": json.dumps(config), "step": str(step)}
    try:
        with written_whole(path) as scratch:
            save_file(tensors, scratch, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"The checkpoint could not be written to {path} ({first_line(error)}); the one before is kept."
        ) from error


def load_checkpoint(
    path: Path,
    parameters: dict[str, nn.Parameter],
    states: dict[str, dict[str, Any]],
    average: dict[str, torch.Tensor],
    config: dict[str, Any],
) -> int:
    """Put everything back in place, `states` included, and return the step.

    Raises AdapterError if the file is missing or damaged, or its run was configured differently.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        saved, step = json.loads(metadata["config"]), int(metadata["step"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"There is no training to resume in {path} ({type(error).__name__}: {error}); start "
            "without --resume."
        ) from error
    different = [
        f"{name} was {saved.get(name)!r} and is now {value!r}"
        for name, value in config.items()
        if saved.get(name) != value
    ]
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    saved_shapes = {
        name.removeprefix("parameter/"): list(tensor.shape)
        for name, tensor in tensors.items()
        if name.startswith("parameter/")
    }
    different += [
        f"{name} had shape {saved_shapes.get(name)} and now has {shapes.get(name)}"
        for name in sorted(set(shapes) | set(saved_shapes))
        if shapes.get(name) != saved_shapes.get(name)
    ]
    if different:
        raise AdapterError(
            f"{path} is of a run with another configuration ({'; '.join(different[:4])}); resume "
            "with the same options, or start in another directory."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
        for name, tensor in average.items():
            tensor.copy_(tensors[f"average/{name}"])
    for place, value in tensors.items():
        if place.startswith("optimizer/"):
            _, key, name = place.split("/")
            states[name][key] = value if key == "step" else value.to(parameters[name].device)
    return step
