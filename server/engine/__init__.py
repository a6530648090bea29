"""The engine: a process of its own that batches sequences and runs the model."""
