"""The data plane: models in memory, batches, answers."""
