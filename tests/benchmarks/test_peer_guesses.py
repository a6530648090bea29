import json
from itertools import product
from pathlib import Path

from benchmarks.instruction_sets import INSTRUCTION_SETS
from benchmarks.peer_guesses import BEGUN, GUESSES, SEEDS, TEXTS, _parser, workloads
from benchmarks.peer_servers import OURS, Field, Installed, Limits
from benchmarks.serve import WARM_UP_SEED_OFFSET
from benchmarks.speculation import workload
from persimmon.model.tokenizer import Tokenizer


def test_a_prompt_ends_with_the_beginning_of_its_answer(demo_checkpoint: Path) -> None:
    arguments = _parser().parse_args(["--streams", "2", "--texts", "quote", "--output-len", "9"])
    (own,) = workloads(arguments, round_number=1)
    bodies = [json.loads(each.body) for each in own.requests("demo")]
    prompt, answer = workload("quote", Tokenizer.from_folder(demo_checkpoint), own.seed)
    assert bodies[0]["prompt"] == prompt + answer[:BEGUN]
    assert {body["max_tokens"] for body in bodies} == {9}
    assert len(bodies) == 2 * arguments.prompts_per_stream


def test_no_round_has_prompts_of_another_or_of_a_warm_up() -> None:
    arguments = _parser().parse_args(["--streams", "1", "8"])
    rounds = [own for number in (1, 2, 3) for own in workloads(arguments, number)]
    assert {(own.streams, own.text) for own in rounds} == set(product((1, 8), TEXTS))
    seeds = {own.seed for own in rounds}
    assert len(seeds) == 2 * 3
    assert all(abs(one - other) >= SEEDS for one, other in product(seeds, seeds) if one != other)
    assert max(own.prompts for own in rounds) <= SEEDS
    assert max(seeds) + SEEDS < WARM_UP_SEED_OFFSET


def test_flags_with_braces_reach_a_server(tmp_path: Path) -> None:
    field = Field(
        installed=Installed(flags={OURS: GUESSES[OURS]}),
        checkpoint=tmp_path,
        limits=Limits("64", "4"),
        level=INSTRUCTION_SETS["native"],
        scratch=tmp_path,
    )
    (contender,) = field.contenders("float32")
    command = contender.server.command(tmp_path, 8000)
    assert json.loads(command[command.index("--speculative-config") + 1]) == {"method": "auto"}
