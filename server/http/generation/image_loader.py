"""From the images of a request to patches: out of data: URLs or fetched, decoded in threads, each only once.

Knows the fields of messages and the limits on images; nothing of formats, prompts or tokens.
"""

import asyncio
import base64
import binascii
import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from persimmon.model.images import ImageError, ImagePatches, ImageReader
from persimmon.server.http.errors import ApiError, FetchError, bad_request, overloaded
from persimmon.server.http.schemas.chat_message import ChatMessage, ImagePart
from persimmon.server.metrics import Metrics
from persimmon.server.settings.engine import BODIES_TOGETHER, MAX_BODY_BYTES

if TYPE_CHECKING:
    from persimmon.server.http.transport.media_fetcher import MediaFetcher

MAX_CACHED_BYTES = 64 * 2**20
"""Pixels of images that are kept for the next request with the same image: clients send a conversation's again in each
turn.  The largest that Fuyu-8B reads takes 6 MB."""

_THREADS = min(4, os.cpu_count() or 1)
_FETCHED_AT_ONCE = 8
"""Images of all requests that are being fetched, or are waiting for a thread then."""

_MIN_TOKENS = 3
"""Of an image: a patch, the end of its row, and BOS."""

_RETRY_SECONDS = 2


class ImageLoader:
    """Reads the images of requests.

    Args:
        reader: decodes them.
        max_bytes: of an image.
        max_images: of a request; None for any number.
        fetcher: for http(s) URLs; None where none are fetched.
        max_body_bytes: of a request: the data: URLs of several of these may wait at a time.
    """

    def __init__(
        self,
        reader: ImageReader,
        max_bytes: int,
        max_images: int | None = None,
        fetcher: "MediaFetcher | None" = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._reader = reader
        self._max_bytes = max_bytes
        self._max_images = max_images
        self._fetcher = fetcher
        self._room = BODIES_TOGETHER * max_body_bytes
        self._threads = ThreadPoolExecutor(_THREADS, "images")
        self._fetching = asyncio.Semaphore(_FETCHED_AT_ONCE)
        self._cache = _Cache()

    async def load(
        self, messages: Sequence[ChatMessage], max_tokens: int, metrics: Metrics
    ) -> dict[ImagePart, ImagePatches]:
        """The images of a conversation, in their order.  Cancelled, it begins no further one.

        Args:
            messages: their URLs are taken out of them.
            max_tokens: of a prompt.
            metrics: where images are counted.

        Raises:
            ApiError: there are more images than allowed, or more than the model's context holds; one cannot be fetched
                or read; or the server has no memory for them now.
        """
        named = {
            part: f"messages[{number}].content[{part.number}]"
            for number, message in enumerate(messages)
            for part in message.images
        }
        if not named:
            return {}
        if self._max_images is not None and len(named) > self._max_images:
            raise bad_request(
                f"'messages' has {len(named)} image{'s' if len(named) > 1 else ''}; a request to this server may have "
                f"at most {self._max_images} (--limit-mm-per-prompt).",
                "messages",
            )
        if len(named) * _MIN_TOKENS > max_tokens:
            raise _too_many_tokens(max_tokens)
        images: dict[ImagePart, ImagePatches] = {}
        num_tokens = 0

        async def load(part: ImagePart, place: str) -> None:
            nonlocal num_tokens
            try:
                images[part] = image = await self._load(part.take_url())
            except (ImageError, FetchError) as error:
                raise bad_request(f"Invalid '{place}': {error}.", place, quotation=f": {error}") from None
            num_tokens += image.num_tokens
            if num_tokens > max_tokens:
                raise _too_many_tokens(max_tokens)

        started = time.perf_counter()
        with self._waiting(sum(part.url_length for part in named)):
            await _all_or_none([load(part, place) for part, place in named.items()])
        metrics.observe_images(len(images), num_tokens, time.perf_counter() - started)
        return {part: images[part] for part in named}

    async def _load(self, url: str) -> ImagePatches:
        scheme, _, rest = url.partition(":")
        scheme = scheme[:8].lower()
        if scheme == "data":
            return await self._in_thread(rest)
        if scheme not in ("http", "https"):
            raise FetchError("its URL must be a data: URL with the image in base64, or an http or https URL")
        if self._fetcher is None:
            raise FetchError(
                "its URL is not a data: URL, and this server fetches no images (--allowed-media-domains is not set); "
                "send the image itself in a data: URL"
            )
        async with self._fetching:
            return await self._in_thread(await self._fetcher.fetch(url))

    async def _in_thread(self, data: bytes | str) -> ImagePatches:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._patches, data)

    def _patches(self, data: bytes | str) -> ImagePatches:
        if isinstance(data, str):
            data = _decoded(data, self._max_bytes)
        digest = blake2b(data, digest_size=32).digest()
        image = self._cache.get(digest)
        if image is None:
            image = self._reader.read(data)
            self._cache.put(digest, image)
        return image

    @contextlib.contextmanager
    def _waiting(self, count: int) -> Iterator[None]:
        """Keeps room for the data: URLs of a request, whose body counts no more, for the length of a block."""
        if count > self._room:
            raise overloaded("The server has no memory for more images", _RETRY_SECONDS)
        self._room -= count
        try:
            yield
        finally:
            self._room += count


class _Cache:
    """Images by the digests of their files, the least recently used ones forgotten first.  Safe in several threads."""

    def __init__(self) -> None:
        self._images: OrderedDict[bytes, ImagePatches] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> ImagePatches | None:
        """The image of a file; None where it is not there."""
        with self._lock:
            if digest in self._images:
                self._images.move_to_end(digest)
            return self._images.get(digest)

    def put(self, digest: bytes, image: ImagePatches) -> None:
        """Keeps an image, as long as there is room."""
        with self._lock:
            if digest in self._images:
                return
            self._images[digest] = image
            self._bytes += _size(image)
            while self._bytes > MAX_CACHED_BYTES:
                _, oldest = self._images.popitem(last=False)
                self._bytes -= _size(oldest)


def _size(image: ImagePatches) -> int:
    return sum(map(len, image.pixels))


def _decoded(rest: str, max_bytes: int) -> bytes:
    """The bytes in a data: URL.

    Args:
        rest: of the URL, after "data:".
        max_bytes: that there may be.

    Raises:
        ImageError: it is not base64, or there are more.
    """
    kind, comma, text = rest.partition(",")
    if not comma or not kind.lower().endswith(";base64"):
        raise ImageError(
            "its data: URL does not hold base64; send one that begins like data:image/png;base64, and then the data"
        )
    text = "".join(text.split())
    if len(text) // 4 * 3 > max_bytes + 2:
        raise ImageError(f"the image has about {len(text) // 4 * 3:,} bytes; expected at most {max_bytes:,}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ImageError(
            "the base64 in its data: URL is damaged; expected letters, digits, +, / and = as padding"
        ) from None


async def _all_or_none(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs coroutines at once; when one fails, the others are cancelled and its error is raised."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _too_many_tokens(limit: int) -> ApiError:
    return bad_request(
        f"This model's maximum context length is {limit} tokens, and the images of this request alone take more. "
        "Please send fewer or smaller images.",
        "messages",
        "context_length_exceeded",
    )
