"""Batch files in OpenAI's format, answered by the engine without a server that listens."""
