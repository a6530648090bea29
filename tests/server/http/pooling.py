"""A fake engine's answers to who asks for numbers, and an app for each kind of model."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import numpy as np

from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient
from persimmon.server.engine.messages import SequenceOutput
from persimmon.server.http.app import create_app
from tests.server.http.fake_engine import Sample, Script

LABELS = ("calm", "glad", "sad")


def chunked(sample: Sample, rows: np.ndarray, pieces: int = 2) -> list[SequenceOutput]:
    """A sequence's rows in several outputs, as an engine reports them chunk by chunk."""
    *parts, last = [part.astype("<f4").tobytes() for part in np.array_split(rows, pieces)]
    ids = sample.sequence_id
    return [SequenceOutput(ids, [], pooled=part) for part in parts] + [SequenceOutput(ids, [], "length", pooled=last)]


def gives(rows: Sequence[Sequence[float]] | np.ndarray) -> Script:
    """A script: these rows, whatever is asked."""
    return lambda sample: chunked(sample, np.array(rows))


def states(token_id: int, width: int) -> np.ndarray:
    """[width] float32 that identifies the token, in place of a network's."""
    return np.random.default_rng(token_id).standard_normal(width).astype(np.float32)


def pools(width: int) -> Script:
    """A script: what is asked for of each token's `states`."""

    def script(sample: Sample) -> list[SequenceOutput]:
        rows = np.stack([states(token_id, width) for token_id in sample.token_ids])
        match sample.whole.pooling:
            case "last":
                return chunked(sample, rows[-1:], 1)
            case "sum":
                return chunked(sample, np.stack([half.sum(0) for half in np.array_split(rows, 2)]))
            case _:
                return chunked(sample, rows, 3)

    return script


def model_of(config: PersimmonConfig, architecture: Architecture, **changes: object) -> PersimmonConfig:
    """The same network with another head."""
    labels = () if architecture is Architecture.CAUSAL_LM else LABELS
    return replace(config, architecture=architecture, labels=labels, **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def serving(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app that serves this model as "demo"."""
    app = create_app(engine_client, tokenizer, config, "demo")
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client
