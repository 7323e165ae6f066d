"""Templates of step blocks: shape, sets, ladders, the search for the best, and decoding with one, replayed."""

from bita_vllm.tree.template import MAX_ROWS, NO_BLOCK, Template, TemplateError, TemplateTable

__all__ = ["MAX_ROWS", "NO_BLOCK", "Template", "TemplateError", "TemplateTable"]
