"""The adapter as files: its config and the base model it fits, its checkpoint, its low-rank deltas."""
