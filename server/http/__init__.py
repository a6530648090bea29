"""The HTTP surface: OpenAI-style requests in, text out."""
