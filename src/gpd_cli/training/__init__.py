"""Training: the LightningModule, its objective, optimizers, metrics and callbacks."""
