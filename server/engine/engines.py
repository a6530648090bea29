"""Several engines behind one API worker: each prompt goes to one of them, and one's end is not the others'.

Knows no sockets; which engine gets a prompt is decided in `routing`.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from persimmon.model.vocabulary import VocabularyMap
from persimmon.server.engine.blocks import salted_with_length
from persimmon.server.engine.client import EngineClient, EngineDeadError, EngineNotReadyError, SequenceStream
from persimmon.server.engine.load import Load
from persimmon.server.engine.messages import Ready, Submit
from persimmon.server.engine.routing import Route, Router, tokens_to_compute


class Engines:
    """A worker's connections to several engines, with the interface of an `EngineClient`.

    Args:
        addresses: the engines' ZeroMQ endpoints, in the order of their numbers.
        vocabulary: of a trimmed checkpoint: callers speak in token ids, engines in rows of its embedding.
        load: where it counts what it wants of the engines.
        warm_up: what each engine must do before it is ready.
        block_size: tokens in a block of the engines' KV caches.
        prefix_caching: whether engines keep the blocks of prompts for other prompts.
        worker: this worker's number.
        max_chunks_per_second: how often the streams of each engine together get tokens, at most; None for any number.

    Attributes:
        engines: the connection to each engine.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        vocabulary: VocabularyMap | None,
        load: Load,
        warm_up: Submit,
        *,
        block_size: int,
        prefix_caching: bool = True,
        worker: int = 0,
        max_chunks_per_second: float | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._prefix_caching = prefix_caching
        self._router = Router(len(addresses), block_size, first=worker)
        self.load = load
        self.engines: Sequence[EngineClient] = [
            EngineClient(
                address=address,
                vocabulary=vocabulary,
                load=load,
                warm_up=warm_up,
                number=number,
                router=self._router,
                max_chunks_per_second=max_chunks_per_second,
            )
            for number, address in enumerate(addresses)
        ]

    @property
    def ready(self) -> bool:
        """Whether an engine serves now."""
        return any(engine.ready for engine in self.engines)

    @property
    def info(self) -> Ready | None:
        """The description of the serving engine whose sequences have the lowest maximum length; None while none serves.

        A request that it can run can be run by all.
        """
        serving = [engine.info for engine in self.engines if engine.ready and engine.info is not None]
        return min(serving, key=lambda info: info.max_model_len, default=None)

    @property
    def open_streams(self) -> int:
        """Sequences submitted and neither finished nor aborted."""
        return sum(engine.open_streams for engine in self.engines)

    async def start(self) -> None:
        """Connects to all engines."""
        for engine in self.engines:
            await engine.start()

    async def wait_until_ready(self) -> None:
        """Returns when an engine has loaded its model and done its warm-up."""
        waiting = [asyncio.create_task(engine.wait_until_ready()) for engine in self.engines]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    async def close(self) -> None:
        """Disconnects.  Streams still open end with EngineDeadError."""
        for engine in self.engines:
            await engine.close()

    @contextlib.contextmanager
    def submit(self, submit: Submit) -> Iterator[list[SequenceStream]]:
        """Starts the samples of one prompt, all at one engine; leaving the block aborts those that have not finished.

        Args:
            submit: what is wanted; its `sequence_id` is chosen here.

        Raises:
            EngineNotReadyError: the model is still loading.
            EngineDeadError: no engine serves, or the one that has the prompt has ended.
        """
        self.check_ready()
        route = self._route(submit)
        self._router.begin(route)
        try:
            with self.engines[route.engine].submit(submit, route.cached_tokens) as streams:
                yield streams
        finally:
            self._router.end(route)

    def check_ready(self) -> Ready:
        """As `info`.

        Raises:
            EngineNotReadyError: no engine serves, and one is still loading the model for the first time.
            EngineDeadError: no engine serves; all have ended.
        """
        info = self.info
        if info is not None:
            return info
        if all(engine.dead for engine in self.engines):
            raise EngineDeadError("all engines have stopped")
        raise EngineNotReadyError("the model is still loading")

    def _route(self, submit: Submit) -> Route:
        loads = {}
        for number, engine in enumerate(self.engines):
            if engine.ready:
                load = self.load.of_engine(number)
                loads[number] = tokens_to_compute(load.prompt_tokens, load.sequences)
        token_ids, salt = self._cacheable(submit)
        return self._router.route(token_ids, loads, salt, submit.spans)

    def _cacheable(self, submit: Submit) -> tuple[Sequence[int], bytes]:
        """The tokens of a prompt that engines may have cached, as they number them, and the salt before them."""
        token_ids, salt = submit.token_ids, submit.cache_salt
        if not (self._prefix_caching and submit.reads_cache):
            return (), salt
        limit = next(engine.info.rope_limit for engine in self.engines if engine.ready and engine.info is not None)
        if limit is not None and len(token_ids) > limit:
            salt = salted_with_length(salt, len(token_ids))
        return token_ids if self._vocabulary is None else self._vocabulary.to_rows(token_ids), salt


EngineAccess = EngineClient | Engines
"""How an API worker reaches the engine, or one of several."""


def connected(
    addresses: Sequence[str],
    vocabulary: VocabularyMap | None,
    load: Load,
    warm_up: Submit,
    *,
    block_size: int,
    prefix_caching: bool,
    worker: int,
    max_chunks_per_second: float | None,
) -> EngineAccess:
    """Access to the engines at these addresses; see `Engines` for the arguments."""
    if len(addresses) == 1:
        return EngineClient(
            address=addresses[0],
            vocabulary=vocabulary,
            load=load,
            warm_up=warm_up,
            max_chunks_per_second=max_chunks_per_second,
        )
    return Engines(
        addresses,
        vocabulary=vocabulary,
        load=load,
        warm_up=warm_up,
        block_size=block_size,
        prefix_caching=prefix_caching,
        worker=worker,
        max_chunks_per_second=max_chunks_per_second,
    )
