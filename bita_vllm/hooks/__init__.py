"""Spots of vLLM that bita builds on: what its worker, runners, attention and scheduler override.

Checked against the installed vLLM, and against the source of every supported version (tests).
"""

from bita_vllm.hooks.cpu import CPU_OVERRIDES
from bita_vllm.hooks.deltas import DELTA_HOOKS
from bita_vllm.hooks.gpu import GPU_OVERRIDES, PLAIN_HOOKS
from bita_vllm.hooks.hook import Function, Hook, Problem

OVERRIDES = CPU_OVERRIDES + GPU_OVERRIDES + DELTA_HOOKS

__all__ = ["OVERRIDES", "PLAIN_HOOKS", "Function", "Hook", "Problem"]
