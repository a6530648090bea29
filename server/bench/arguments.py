"""The arguments of `persimmon bench`, and what they mean together.

Light to import: the command line shows them without bringing what measures.
"""

import argparse
from pathlib import Path


def number_range(text: str) -> tuple[int, int]:
    """Reads 64 or 32:512, for argparse."""
    least, _, most = text.partition(":")
    return int(least), int(most or least)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _rates(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


# What argparse says of a text that one of these cannot read: "invalid N[:M] value".
number_range.__name__ = "N[:M]"
_numbers.__name__ = "N,N,…"
_rates.__name__ = "R,R,…"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments; their names are those of `persimmon.server.bench.command.bench`."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url", default="http://127.0.0.1:8000", metavar="URL", help="with or without /v1. Default: %(default)s"
    )
    server.add_argument("--model", metavar="NAME", help="name in requests. Default: the first of /v1/models")
    server.add_argument(
        "--api-key",
        metavar="KEY",
        help="bearer token; never written anywhere. Default: the environment's OPENAI_API_KEY",
    )
    server.add_argument(
        "--endpoint",
        choices=("completions", "chat"),
        help="Default: completions; with --prompts, what each line's field is of",
    )
    load = parser.add_argument_group("load")
    loop = load.add_mutually_exclusive_group()
    loop.add_argument(
        "--streams",
        type=_numbers,
        metavar="N,N,…",
        help="closed loop: so many requests in flight, one number after the other. Default: 8",
    )
    loop.add_argument(
        "--rates",
        "--rate",
        type=_rates,
        metavar="R,R,…",
        help="open loop: so many requests a second at random (Poisson) times, one rate after the other",
    )
    load.add_argument(
        "--num-requests",
        type=int,
        metavar="N",
        help="requests of each load. Default: the file's prompts, or 128; without end if there is a --duration",
    )
    load.add_argument("--duration", type=float, metavar="S", help="seconds in which each load sends requests")
    load.add_argument(
        "--warm-up",
        type=int,
        metavar="N",
        help="requests sent before and not measured, with prompts of their own. Default: one a stream, or 8",
    )
    load.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="a longer answer has failed. Default: %(default)g"
    )
    load.add_argument("--seed", type=int, default=0, help="of prompts and arrivals. Default: %(default)s")
    workload = parser.add_argument_group("workload")
    workload.add_argument(
        "--input-len",
        type=number_range,
        default=(64, 64),
        metavar="N[:M]",
        help="tokens of a prompt, fixed or mixed: uniform from a range. Default: 64",
    )
    workload.add_argument(
        "--output-len",
        type=number_range,
        default=(128, 128),
        metavar="N[:M]",
        help='tokens of an answer; with --prompts the most, where a line has no "max_tokens". Default: 128',
    )
    workload.add_argument(
        "--prefix-len", type=int, default=0, metavar="N", help="tokens that prompts share before their own. Default: 0"
    )
    workload.add_argument(
        "--prefixes", type=int, default=1, metavar="N", help="how many such beginnings there are. Default: 1"
    )
    workload.add_argument(
        "--token-ids",
        type=number_range,
        default=(300, 4000),
        metavar="FIRST:END",
        help="ids that prompts are made of; where the server takes none, common words are sent. Default: 300:4000",
    )
    workload.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='send these instead: JSON lines with "prompt" or "messages", and perhaps "max_tokens"',
    )
    workload.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="ask for answers of exactly the length (a field of vLLM's and this server's). "
        "Default: on; off with --prompts",
    )
    results = parser.add_argument_group("results")
    results.add_argument("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    results.add_argument(
        "--plot", type=Path, metavar="FILE", help="write latency against load as PNG; for several --rates or --streams"
    )
