"""A model that reads images in the app of the tests: its tokens, its chat format, and pictures for it."""

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI
from PIL import Image

from persimmon.model.chat import Chat
from persimmon.model.chat_prompt import ImageTokens
from persimmon.model.config import PersimmonConfig, VisionConfig
from persimmon.model.images import ImageLimits, ImageReader, ImageSettings
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.engine.client import EngineClient
from persimmon.server.http.app import create_app
from persimmon.server.http.generation.image_loader import ImageLoader
from tests.fuyu import SPEAKER, VOCAB_SIZE, write_tokenizer

PATCH = 2
"""Height and width of a patch, so that pictures are small."""

SETTINGS = ImageSettings(patch_size=PATCH, max_height=20, max_width=40)
LIMITS = ImageLimits(max_bytes=10_000, max_pixels=10_000)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """[height, width, 3] uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(height: int, width: int, seed: int = 0) -> bytes:
    """The file of `pixels`."""
    file = io.BytesIO()
    Image.fromarray(pixels(height, width, seed)).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def part(data: bytes | str) -> dict[str, Any]:
    """A content part with an image: of a file, or at a URL."""
    return {"type": "image_url", "image_url": {"url": data if isinstance(data, str) else data_url(data)}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def user(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def row_pixels(height: int, width: int, seed: int = 0) -> list[bytes]:
    """Those of each row of patches of `pixels`, whose sides are whole patches."""
    patches = pixels(height, width, seed).reshape(height // PATCH, PATCH, width // PATCH, PATCH, 3).swapaxes(1, 2)
    return [row.tobytes() for row in patches]


def reading(config: PersimmonConfig) -> PersimmonConfig:
    """The same network as one that reads images."""
    return replace(
        config, vocab_size=VOCAB_SIZE, vision=VisionConfig(patch_size=PATCH, num_channels=3, image_token_id=SPEAKER)
    )


def tokenizer_in(folder: Path) -> Tokenizer:
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def loader(**options: Any) -> ImageLoader:
    return ImageLoader(ImageReader(SETTINGS, LIMITS), LIMITS.max_bytes, **options)


def app_with_images(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig, **options: Any
) -> FastAPI:
    """An app whose model reads images; `options` are those of create_app."""
    model = reading(config)
    assert model.vision is not None
    chat = Chat.fuyus(tokenizer, ImageTokens.of(model.vision, tokenizer))
    arguments: dict[str, Any] = {"chat": chat, "images": loader()} | options
    return create_app(engine_client, tokenizer, model, "demo", **arguments)


class Urls:
    """Fetches made-up URLs, when it may.

    Attributes:
        asked: what was to be fetched.
        cancelled: of these, what was given up.
        may_go_on: lets all of them come.
        ended: set when one has been given up.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.may_go_on = asyncio.Event()
        self.ended = asyncio.Event()
        self._changed = asyncio.Condition()

    async def fetch(self, url: str) -> bytes:
        self.asked.append(url)
        async with self._changed:
            self._changed.notify_all()
        try:
            await self.may_go_on.wait()
        except asyncio.CancelledError:
            self.cancelled.append(url)
            self.ended.set()
            raise
        return png(2, 2)

    async def until_asked(self, count: int) -> None:
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(lambda: len(self.asked) >= count)


@asynccontextmanager
async def serving_images(
    engine_client: EngineClient, tokenizer: Tokenizer, config: PersimmonConfig, **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `app_with_images`."""
    app = app_with_images(engine_client, tokenizer, config, **options)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client
