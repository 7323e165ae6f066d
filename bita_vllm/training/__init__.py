"""Training: data from the model itself, the mask rows over a frozen base, trainer, evaluation."""
