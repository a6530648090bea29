"""Conversations whose turns are spread over several engines: how much of their prompts is found in prefix caches?

The schedulers, block pools and the router are the server's; only the model is missing, so a token is random and a step
takes no time.  Each round, every engine runs a step.  Knows nothing of processes.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.routing import Route, Router, tokens_to_compute
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.sequence import Sequence

BLOCK_SIZE = 32
VOCABULARY = 4000


@dataclass(frozen=True)
class Conversations:
    """What is asked.  Ranges are the least and the most, drawn uniformly.

    Attributes:
        count: conversations at a time.
        turns: questions of each.
        opening: tokens of the first question.
        question: tokens of each later one.
        answer: tokens of an answer.
        think: rounds between an answer and the next question.
        seed: of everything random.
    """

    count: int = 64
    turns: int = 8
    opening: tuple[int, int] = (100, 300)
    question: tuple[int, int] = (20, 80)
    answer: tuple[int, int] = (40, 120)
    think: tuple[int, int] = (1, 60)
    seed: int = 0

    @property
    def final_blocks(self) -> int:
        """Blocks that all conversations take at their ends, on average, each cached once."""
        tokens = sum(self.opening) + (self.turns - 1) * sum(self.question) + self.turns * sum(self.answer)
        return self.count * (tokens // 2 // BLOCK_SIZE + 1)


@dataclass
class _Conversation:
    """One of them, as far as it has come."""

    dice: random.Random
    tokens: list[int] = field(default_factory=list)
    turns: int = 0

    def ask(self, asked: Conversations) -> int:
        """Adds a question; the length of the answer that it will get."""
        self.tokens += self.draw(self.dice.randint(*(asked.question if self.turns else asked.opening)))
        self.turns += 1
        return self.dice.randint(*asked.answer)

    def draw(self, count: int) -> list[int]:
        return [self.dice.randrange(VOCABULARY) for _ in range(count)]


@dataclass(frozen=True)
class Hits:
    """What was found in the caches.

    Attributes:
        prompt_tokens: of all prompts.
        cached_tokens: of these, those that were cached at the engine that got the prompt.
        requests: prompts that each engine got.
    """

    prompt_tokens: int
    cached_tokens: int
    requests: list[int]

    @property
    def share(self) -> float:
        """Cached tokens over all."""
        return self.cached_tokens / self.prompt_tokens


class _Engine:
    """A scheduler and its pool."""

    def __init__(self, num_blocks: int, count: int, max_model_len: int) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, tracks_changes=True)
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=count, max_num_batched_tokens=2048, max_model_len=max_model_len
        )

    def step(self, conversations: list[_Conversation]) -> Iterator[Sequence]:
        """Runs a step; yields the sequences that have got a token."""
        plan = self.scheduler.plan()
        if not plan.scheduled:
            return
        samples = [sample for item in plan.scheduled for sample in item.samples]
        drawn = [conversations[_number(sample)].draw(1) for sample in samples]
        for advance in self.scheduler.commit(plan, drawn):
            yield advance.sequence


def _number(sequence: Sequence) -> int:
    """The conversation that a sequence belongs to."""
    key = sequence.key
    if not isinstance(key, int):
        raise TypeError(f"sequences are keyed by the numbers of conversations, not {key!r}")
    return key


def run(asked: Conversations, engines: int, num_blocks: int, *, round_robin: bool = False) -> Hits:
    """Has all conversations answered.

    Args:
        asked: the conversations.
        engines: how many engines there are.
        num_blocks: of all engines' KV caches together.
        round_robin: whether engines get prompts in turn, whatever they have cached.
    """
    max_model_len = asked.opening[1] + (asked.turns - 1) * asked.question[1] + asked.turns * asked.answer[1]
    pool = [_Engine(num_blocks // engines, asked.count, max_model_len) for _ in range(engines)]
    router = Router(engines, BLOCK_SIZE)
    dice = random.Random(asked.seed)
    conversations = [_Conversation(random.Random(f"{asked.seed} {number}")) for number in range(asked.count)]
    due = {number: dice.randint(*asked.think) for number in range(asked.count)}
    routes: dict[int, Route] = {}
    running, to_compute = Counter[int](), Counter[int]()
    requests = [0] * engines
    prompt_tokens = cached_tokens = 0
    now = 0
    while due or routes:
        now += 1
        for number in [number for number, when in due.items() if when <= now]:
            del due[number]
            conversation = conversations[number]
            max_tokens = conversation.ask(asked)
            tokens = list(conversation.tokens)
            loads = {engine: tokens_to_compute(to_compute[engine], running[engine]) for engine in range(engines)}
            route = router.route(tokens, loads)
            if round_robin:
                route = Route(engine=sum(requests) % engines, cached_tokens=0, token_ids=tokens, missing=None)
            router.begin(route)
            routes[number] = route
            requests[route.engine] += 1
            running[route.engine] += 1
            to_compute[route.engine] += len(tokens) - route.cached_tokens
            pool[route.engine].scheduler.add(Sequence(key=number, token_ids=tokens, max_tokens=max_tokens))
        for engine, own in enumerate(pool):
            for sequence in list(own.step(conversations)):
                number = _number(sequence)
                route = routes[number]
                if sequence.num_output_tokens == 1:
                    prompt_tokens += sequence.prompt_length
                    cached_tokens += sequence.cached_tokens or 0
                    to_compute[engine] -= sequence.prompt_length - route.cached_tokens
                if sequence.finished:
                    conversation = conversations[number]
                    conversation.tokens = list(sequence.token_ids)
                    running[engine] -= 1
                    router.end(routes.pop(number))
                    if conversation.turns < asked.turns:
                        due[number] = now + conversation.dice.randint(*asked.think)
            changes = own.pool.take_changes()
            entered = [block_hash for block_hash, present in changes.items() if present]
            router.change(engine, entered, changes.keys() - entered)
    return Hits(prompt_tokens, cached_tokens, requests)
