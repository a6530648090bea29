"""How images of requests are read: in threads, several at once, each once, within bounds; and ended with the client."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import cast

import pytest

from persimmon.model.images import ImagePatches, ImageReader
from persimmon.server.http.errors import ApiError
from persimmon.server.http.generation import image_loader
from persimmon.server.http.generation.image_loader import ImageLoader
from persimmon.server.http.schemas.chat_message import ChatMessage
from persimmon.server.http.transport.media_fetcher import MediaFetcher
from persimmon.server.metrics import Metrics
from tests.server.http.images import LIMITS, SETTINGS, Urls, data_url, part, png, user

pytestmark = pytest.mark.anyio

CONTEXT = 2048


class WatchedReader(ImageReader):
    """Remembers what it has read, and may wait before it reads."""

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        super().__init__(SETTINGS, LIMITS)
        self.read_in: list[int] = []
        self._wait = wait

    def read(self, data: bytes) -> ImagePatches:
        self.read_in.append(threading.get_ident())
        self._wait()
        return super().read(data)


def messages(*images: bytes | str) -> Sequence[ChatMessage]:
    return [ChatMessage.model_validate(user(*map(part, images)))]


async def load(loader: ImageLoader, *images: bytes | str) -> list[ImagePatches]:
    return [*(await loader.load(messages(*images), CONTEXT, Metrics([], ""))).values()]


async def test_images_are_read_in_threads_and_come_in_their_order() -> None:
    reader = WatchedReader()
    loader = ImageLoader(reader, LIMITS.max_bytes)
    images = await load(loader, png(2, 4), png(6, 8), png(4, 6))
    assert [(image.height, image.width) for image in images] == [(2, 4), (6, 8), (4, 6)]
    assert len(reader.read_in) == 3
    assert threading.get_ident() not in reader.read_in


async def test_an_image_that_comes_again_is_not_decoded_again() -> None:
    reader = WatchedReader()
    loader = ImageLoader(reader, LIMITS.max_bytes)
    (first,) = await load(loader, png(4, 6))
    again, other = await load(loader, png(4, 6), png(4, 6, seed=1))
    assert again is first
    assert other.pixels != first.pixels
    assert len(reader.read_in) == 2


async def test_the_images_that_are_kept_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_loader, "MAX_CACHED_BYTES", 2 * 4 * 6 * 3)
    reader = WatchedReader()
    loader = ImageLoader(reader, LIMITS.max_bytes)
    one, two, three = (png(4, 6, seed) for seed in range(3))
    for image in (one, two, one, three, one):
        await load(loader, image)
    assert len(reader.read_in) == 3
    await load(loader, two)
    assert len(reader.read_in) == 4


async def test_urls_of_a_request_are_fetched_at_once() -> None:
    urls = Urls()
    loader = ImageLoader(WatchedReader(), LIMITS.max_bytes, fetcher=cast(MediaFetcher, urls))
    loading = asyncio.create_task(load(loader, "https://a.test/1", "https://a.test/2", png(4, 6)))
    await urls.until_asked(2)
    urls.may_go_on.set()
    assert [image.height for image in await loading] == [2, 2, 4]


async def test_a_client_that_leaves_ends_what_is_fetched() -> None:
    urls = Urls()
    loader = ImageLoader(WatchedReader(), LIMITS.max_bytes, fetcher=cast(MediaFetcher, urls))
    loading = asyncio.create_task(load(loader, "https://a.test/1", "https://a.test/2"))
    await urls.until_asked(2)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert sorted(urls.cancelled) == ["https://a.test/1", "https://a.test/2"]


async def test_a_bad_image_ends_what_else_is_fetched() -> None:
    urls = Urls()
    loader = ImageLoader(WatchedReader(), LIMITS.max_bytes, fetcher=cast(MediaFetcher, urls))
    with pytest.raises(ApiError) as error:
        await load(loader, "https://a.test/1", b"no image")
    assert error.value.body.error.param == "messages[0].content[1]"
    assert urls.cancelled == urls.asked


async def test_images_wait_in_bounded_memory() -> None:
    loop, may_read, reading = asyncio.get_running_loop(), threading.Event(), asyncio.Event()

    def wait() -> None:
        loop.call_soon_threadsafe(reading.set)
        may_read.wait()

    image = png(4, 6)
    loader = ImageLoader(WatchedReader(wait), LIMITS.max_bytes, max_body_bytes=len(data_url(image)) // 4 + 1)
    try:
        first = asyncio.create_task(load(loader, image))
        await reading.wait()
        with pytest.raises(ApiError) as error:
            await load(loader, image)
        assert error.value.status == 429
    finally:
        may_read.set()
    await first
    assert len(await load(loader, image)) == 1


async def test_a_request_keeps_no_url_once_its_image_is_read() -> None:
    given = messages(png(4, 6))
    assert given[0].images[0].url_length > 0
    await ImageLoader(WatchedReader(), LIMITS.max_bytes).load(given, CONTEXT, Metrics([], ""))
    assert given[0].images[0].url_length == 0
