#!/bin/sh
# torch 2.13.0, gloo: with three or more ranks, all_reduce gives a row of a matrix other bits when other rows are reduced with it.
#
# Guess, before running it: each element is summed over the ranks in one fixed order, such as that of the ranks, so that
# a row's sum has the same bits whether it is reduced alone or among 64 rows.
#
# Seen: with 3 and 4 ranks all 64 rows of [64, 512] float32 differ in some bits from the same rows reduced one at a
# time, and elements differ from the sum in the order of ranks; calls with the same shape repeat their bits.  With 2
# ranks, where there is one order up to commutation, all are equal.  So tensor parallelism over all_reduce makes an answer
# depend on what else is in the batch, though nothing is random.
#
# Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install torch==2.13.0 numpy==2.3.5
cat > "$folder/reduce.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def summed(tensor):
    result = tensor.clone()
    dist.all_reduce(result)
    return result


def run(rank, ranks, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    own = torch.randn(64, 512, generator=torch.Generator().manual_seed(rank))
    together, again = summed(own), summed(own)
    alone = torch.stack([summed(row) for row in own])
    parts = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(parts, own)
    in_order = parts[0].clone()
    for part in parts[1:]:
        in_order += part
    if rank == 0:
        results.put(
            (
                int((together != alone).any(1).sum()),
                int((together != in_order).sum()),
                int((together != again).sum()),
            )
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    seen = {}
    for ranks in (2, 3, 4):
        context = mp.get_context("spawn")
        results = context.Queue()
        processes = [
            context.Process(target=run, args=(rank, ranks, f"{sys.argv[1]}/{ranks}", results)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        seen[ranks] = results.get()
        for process in processes:
            process.join()
        rows, elements, repeated = seen[ranks]
        print(
            f"  {ranks} ranks: {rows} of 64 rows differ alone and together, {elements} elements from the sum in the order "
            f"of ranks, {repeated} from the same call again"
        )
    raise SystemExit(
        seen[2] != (0, 0, 0) or any(seen[n][0] == 0 or seen[n][1] == 0 or seen[n][2] != 0 for n in (3, 4))
    )
PYTHON
"$folder/venv/bin/python" "$folder/reduce.py" "$folder" 2> /dev/null
