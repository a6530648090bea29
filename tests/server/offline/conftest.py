"""The application on a fake engine, as the tests of the HTTP surface have it."""

from tests.server.http.conftest import anyio_backend, config, engine, engine_client, tokenizer, tokens

__all__ = ["anyio_backend", "config", "engine", "engine_client", "tokenizer", "tokens"]
