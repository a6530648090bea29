#!/bin/sh
# torch 2.13.0 on a CPU with two threads: logsumexp of one large row has other bits than that of the same row among others.
#
# Guess, before running it (it stood in a docstring): on a CPU torch reduces every row by itself, so the result for a row
# does not depend on how many rows there are.
#
# Seen: with one thread that is so.  With two threads, some of 64 rows of 50,000 and of 262,144 numbers differ in the last
# bit when they are reduced one at a time, but none when they are reduced in pairs; with 1,000 numbers none differs.  A
# single row is split among the threads and its parts are added; several rows are given to one thread each.  So a
# log-probability over a large vocabulary depends on whether another row is computed in the same call.
#
# Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install torch==2.13.0 numpy 2>/dev/null
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import torch

generator = torch.Generator().manual_seed(0)
as_seen = True
print("torch", torch.__version__)
for width in (1_000, 50_000, 262_144):
    rows = 4 * torch.randn(64, width, generator=generator)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        together = rows.logsumexp(-1)
        differing = {
            count: int((torch.cat([part.logsumexp(-1) for part in rows.split(count)]) != together).sum())
            for count in (1, 2)
        }
        print(f"  64 rows of {width}, {threads} threads: {differing[1]} differ one at a time, {differing[2]} in pairs")
        as_seen &= differing[2] == 0 and (differing[1] > 0) == (threads == 2 and width > 32_768)
raise SystemExit(not as_seen)
PYTHON
