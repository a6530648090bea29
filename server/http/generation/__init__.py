"""From requests to prompts and constraints, and from the engine's tokens to text."""
