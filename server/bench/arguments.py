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
    server.add_argument(
        "--model", metavar="NAME", help="model name to send. Default: the first one that /v1/models lists"
    )
    server.add_argument(
        "--api-key",
        metavar="KEY",
        help="API key, sent as a bearer token and never stored. Default: the environment variable OPENAI_API_KEY",
    )
    server.add_argument(
        "--endpoint",
        choices=("completions", "chat"),
        help="Default: completions; with --prompts, the one that each line's field belongs to",
    )
    load = parser.add_argument_group("load")
    loop = load.add_mutually_exclusive_group()
    loop.add_argument(
        "--streams",
        type=_numbers,
        metavar="N,N,…",
        help="closed loop: number of requests in flight; several numbers are measured in turn. Default: 8",
    )
    loop.add_argument(
        "--rates",
        "--rate",
        type=_rates,
        metavar="R,R,…",
        help="open loop: requests per second, sent at Poisson arrival times; several rates are measured in turn",
    )
    load.add_argument(
        "--num-requests",
        type=int,
        metavar="N",
        help="requests per load. Default: the file's prompts, or 128; unlimited with --duration",
    )
    load.add_argument("--duration", type=float, metavar="S", help="seconds during which each load sends requests")
    load.add_argument(
        "--warm-up",
        type=int,
        metavar="N",
        help="warm-up requests, with other prompts and not measured. Default: one per stream, or 8",
    )
    load.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds after which a request counts as failed. Default: %(default)g",
    )
    load.add_argument("--seed", type=int, default=0, help="seed of prompts and arrival times. Default: %(default)s")
    workload = parser.add_argument_group("workload")
    workload.add_argument(
        "--input-len",
        type=number_range,
        default=(64, 64),
        metavar="N[:M]",
        help="tokens per prompt: a number, or a range to draw from uniformly. Default: 64",
    )
    workload.add_argument(
        "--output-len",
        type=number_range,
        default=(128, 128),
        metavar="N[:M]",
        help='tokens per answer; with --prompts, the maximum for lines without "max_tokens". Default: 128',
    )
    workload.add_argument(
        "--prefix-len",
        type=int,
        default=0,
        metavar="N",
        help="length of the prefix that prompts share, in tokens. Default: 0",
    )
    workload.add_argument(
        "--prefixes", type=int, default=1, metavar="N", help="number of different shared prefixes. Default: 1"
    )
    workload.add_argument(
        "--token-ids",
        type=number_range,
        default=(300, 4000),
        metavar="FIRST:END",
        help="range of token ids that prompts consist of; servers that do not accept token ids get common words. "
        "Default: 300:4000",
    )
    workload.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='send the prompts of this file instead: JSON lines with "prompt" or "messages", and optionally '
        '"max_tokens"',
    )
    workload.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="ask for answers of exactly the given length (ignore_eos, which vLLM and this server have). "
        "Default: on; off with --prompts",
    )
    results = parser.add_argument_group("results")
    results.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    results.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot latency against load as PNG; needs several --rates or --streams"
    )
