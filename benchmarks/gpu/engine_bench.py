"""The engine in one process on a network with random weights, and the mixed requests that it serves.

Needs what the engine process needs: msgspec and pyzmq.  Judges nothing.
"""

import itertools
import random
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
import zmq

from benchmarks.gpu.engine_variants import Mode, Variant
from benchmarks.gpu.model import GREEDY, Machine
from benchmarks.gpu.suite import Setting
from persimmon.model.runner import Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.step_outcome import StepOutcome
from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.core import Engine
from persimmon.server.engine.messages import EngineStats, FromEngine, Hello, PrefixChange, Ready, StepOutput, Submit
from persimmon.server.engine.plan_runner import PlanRunner
from persimmon.server.engine.scheduler import TYPICAL_OUTPUT, Scheduler
from persimmon.server.engine.sequence import Sequence as EngineSequence
from persimmon.server.engine.step_plan import StepPlan
from persimmon.server.engine.step_runner import LaunchedStep

DTYPE = torch.float16
GRAPH_SIZES = (1, 8, 16, 32, 64)
REQUESTS_ALONE = 16
"""Requests of the variant that has one at a time."""

TIE = 0.05
"""Logits this close, in standard deviations of a row of logits, may change places by rounding in 16 bits."""


@dataclass(slots=True)
class Answer:
    """What a sequence has received."""

    tokens: list[int] = field(default_factory=list)
    logprobs: int = 0
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        requests: as they were submitted.
        answers: by sequence.
        stats: the engine's counts.
        seconds: of the whole run.
        host_seconds: of them, those in which the engine did not wait for a step.
    """

    requests: Sequence[Submit]
    answers: dict[int, Answer]
    stats: EngineStats
    seconds: float
    host_seconds: float

    def broken(self) -> list[str]:
        """The sequences that did not end at their length with everything they asked for."""
        found = []
        for request in self.requests:
            for key in request.sequence_ids:
                answer = self.answers[key]
                logprobs = request.max_tokens if request.sampling.logprobs is not None else 0
                if (answer.finish_reason, len(answer.tokens), answer.logprobs) != (
                    "length",
                    request.max_tokens,
                    logprobs,
                ):
                    found.append(f"{key}: {answer}")
        return found


class EngineBench:
    """A network, its graphs and the requests that all variants serve.

    Args:
        setting: the suite.
        mode: how it computes.
    """

    def __init__(self, setting: Setting, mode: Mode) -> None:
        suite = setting.suite
        self.mode, self._setting = mode, setting
        self._requests = _requests(setting)
        self._by_key = {key: request for request in self._requests for key in request.sequence_ids}
        longest = suite.engine_prompt + suite.engine_answer
        self._blocks = (suite.engine_running + 1) * -(-longest // suite.engine_block_size)
        self._machine = Machine.build(
            setting,
            DTYPE,
            num_blocks=self._blocks,
            layers=suite.engine_layers,
            block_size=suite.engine_block_size,
            kernels_type=mode.kernels,
        )
        sizes = [size for size in GRAPH_SIZES if size < suite.engine_running]
        self._executor = self._machine.executor([*sizes, suite.engine_running])
        self.captures = setting.on_gpu
        """Whether steps are graphs at all."""

    def is_greedy(self, key: int) -> bool:
        """Whether a sequence's tokens are those of the highest logits, as the network makes them."""
        asked = self._by_key[key].sampling
        return asked.temperature == 0 and not asked.penalizes

    def run(self, variant: Variant) -> Outcome:
        """Serves all requests."""
        # Shows reads of memory that nothing has written.
        for tensor in self._machine.cache.tensors:
            tensor.fill_(float("nan"))
        requests = self._requests[:REQUESTS_ALONE] if variant.alone else self._requests
        with _Connection() as connection:
            runner = Runner(self._executor) if variant.graphs else self._machine.runner(None)
            watched = _Watched(PlanRunner(runner))
            engine = self._engine(variant, connection, watched)
            began = time.perf_counter()
            answers, stats = connection.serve(engine, requests, at_once=1 if variant.alone else len(requests))
            seconds = time.perf_counter() - began
            engine.close()
        return Outcome(
            requests=requests, answers=answers, stats=stats, seconds=seconds, host_seconds=seconds - watched.waited
        )

    def is_tie(self, key: int, ours: Sequence[int], theirs: Sequence[int]) -> bool:
        """Whether the first two tokens that differ are tied for the highest logit, within rounding."""
        place = next((place for place, pair in enumerate(zip(ours, theirs, strict=False)) if len(set(pair)) > 1), None)
        if place is None:
            return False
        logits = self.logits(key, ours[:place])
        behind = logits.max() - logits[[ours[place], theirs[place]]].min()
        return bool(behind <= TIE * logits.std())

    def logits(self, key: int, answer: Sequence[int]) -> torch.Tensor:
        """[vocab_size] float32, after a sequence's prompt and the beginning of an answer; overwrites the cache."""
        tokens = [*self._by_key[key].token_ids, *answer]
        table = range(-(-len(tokens) // self._machine.cache.block_size))
        runner: Runner = self._machine.runner(None)
        return runner.logits([SequenceInput(token_ids=tokens, start=0, block_table=table, samplings=[GREEDY])])[0]

    def _engine(self, variant: Variant, connection: "_Connection", run: "_Watched") -> Engine:
        suite = self._setting.suite
        longest = -(-(suite.engine_prompt + suite.engine_answer) // suite.engine_block_size)
        blocks = max(longest + 1, self._blocks // 4) if variant.scarce else self._blocks
        pool = BlockPool(blocks, suite.engine_block_size, prefix_caching=variant.prefix_caching)
        chunk = (
            max(suite.engine_running, suite.engine_prompt // 4)
            if variant.chunked
            else max(suite.chunk, 2 * suite.engine_prompt)
        )
        scheduler = Scheduler(
            pool,
            max_num_seqs=suite.engine_running,
            max_num_batched_tokens=chunk,
            max_model_len=suite.engine_prompt + suite.engine_answer,
            # Sequences are preempted where answers are longer than expected.
            typical_output=1 if variant.scarce else TYPICAL_OUTPUT,
        )
        ready = Ready(
            max_model_len=suite.engine_prompt + suite.engine_answer,
            block_size=suite.engine_block_size,
            total_blocks=blocks,
            device="",
            dtype="",
            stats=scheduler.stats(),
        )
        replays = self._executor.replays
        return Engine(
            socket=connection.router,
            scheduler=scheduler,
            run=run,
            limits=ready,
            overlap=variant.overlap,
            graph_replays=lambda: self._executor.replays - replays,
        )


def _requests(setting: Setting) -> list[Submit]:
    """Prompts of all lengths, some with a common beginning; greedy, drawn, truncated, penalised, reported, forked."""
    suite, dice = setting.suite, random.Random(setting.seed)
    vocabulary, keys = suite.config.vocab_size, itertools.count()
    size = suite.engine_block_size
    common = dice.choices(range(vocabulary), k=suite.engine_prompt // size // 2 * size)
    kinds: list[tuple[int, dict[str, Any]]] = [
        (1, {"temperature": 0.0}),
        (1, {"temperature": 0.0, "logprobs": 2}),
        (2, {"temperature": 0.9}),
        (1, {"temperature": 0.0}),
        (1, {"temperature": 0.0, "presence_penalty": 0.5}),
        (1, {"temperature": 0.8, "top_p": 0.9, "top_k": 50}),
    ]
    found = []
    for number in range(suite.engine_requests):
        samples, asked = kinds[number % len(kinds)]
        begin = common if number % 4 < 2 else []
        length = max(dice.randint(1, suite.engine_prompt), len(begin) + 1)
        if number % 2 == 0:
            # The answer needs one more block from its third token on.
            length = -(-length // size) * size - 1
        length = min(length, suite.engine_prompt)
        prompt = (begin + dice.choices(range(vocabulary), k=length))[:length]
        first = next(keys)
        for _ in range(samples - 1):
            next(keys)
        found.append(
            Submit(
                sequence_id=first,
                samples=samples,
                token_ids=prompt,
                max_tokens=dice.randint(max(3, suite.engine_answer // 4), suite.engine_answer),
                sampling=SamplingParams(seed=number, **asked),
            )
        )
    return found


class _Watched:
    """Runs plans, and adds up how long the engine waits for them."""

    def __init__(self, run: PlanRunner) -> None:
        self._run = run
        self.waited = 0.0

    def launch(self, plan: StepPlan) -> LaunchedStep:
        return _WatchedStep(self, self._run.launch(plan))

    def prepare(self, sequence: EngineSequence) -> "Future[Any] | None":
        return self._run.prepare(sequence)


@dataclass(frozen=True, slots=True)
class _WatchedStep:
    owner: _Watched
    launched: LaunchedStep

    def wait(self) -> StepOutcome:
        began = time.perf_counter()
        try:
            return self.launched.wait()
        finally:
            self.owner.waited += time.perf_counter() - began


class _Connection:
    """The engine's socket and that of its only worker."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router, self._worker = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        for socket in (self.router, self._worker):
            socket.set_hwm(0)
        self.router.bind("inproc://engine")
        self._worker.connect("inproc://engine")
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def serve(
        self, engine: Engine, requests: Sequence[Submit], *, at_once: int
    ) -> tuple[dict[int, Answer], EngineStats]:
        """Submits requests, `at_once` together, and takes turns until they are answered and no step is under way."""
        answers = {key: Answer() for request in requests for key in request.sequence_ids}
        self._worker.send(msgspec.msgpack.encode(Hello()))
        engine.turn()
        stats = self._receive(answers)
        for first in range(0, len(requests), at_once):
            for request in requests[first : first + at_once]:
                self._worker.send(msgspec.msgpack.encode(request))
            keys = [key for request in requests[first : first + at_once] for key in request.sequence_ids]
            while engine.has_work or not all(answers[key].finish_reason for key in keys):
                engine.turn()
                stats = self._receive(answers) or stats
        if stats is None:
            raise RuntimeError("the engine has sent nothing")
        return answers, stats

    def _receive(self, answers: dict[int, Answer]) -> EngineStats | None:
        """Takes what the engine has sent; its latest counts."""
        stats = None
        while self._worker.poll(0):
            message = self._decoder.decode(self._worker.recv())
            if isinstance(message, PrefixChange):
                continue  # only where there are several engines
            stats = message.stats
            for output in message.outputs if isinstance(message, StepOutput) else ():
                answer = answers[output.sequence_id]
                answer.tokens += output.token_ids
                answer.logprobs += len(output.logprobs)
                answer.finish_reason = output.finish_reason
        return stats
