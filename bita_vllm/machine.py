"""Which machine this is: what step cost was measured on, and where a benchmark ran."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """Model name and generation: hypervisors often hide the model, as in 'AMD EPYC'."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = fields.get("model name", platform.processor() or platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']} model {fields['model']})"
    return name
