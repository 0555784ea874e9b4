"""Search times of every index format, and scores against float64: see index.sh."""

from __future__ import annotations

import sys
import time
from statistics import median

import torch

import colqwen_lab as lab
from colqwen_lab.analysis.index import SearchTimes
from colqwen_lab.analysis.render import text
from colqwen_lab.measure.environment import pick_device
from colqwen_lab.measure.timing import measured_limits
from colqwen_lab.retrieval.index import Format, Index, kernels_of
from colqwen_lab.retrieval.search import synthetic, unit

BOTH = "bfloat16,int8,binary"  # by the kernel and by torch
KERNEL_ONLY = "float16,hamming,pool3,dims128,int8-pool3,binary-pool3"
LENGTHS = (1260, 1, 40, 701)  # of the pages whose scores are checked
LARGEST_ERROR = 2e-4
# Query tokens and vectors of a program, stages, warps.
TILES = [(32, 64, stages, 4) for stages in (2, 3, 4)]
TILES += [(32, 32, 4, 4), (32, 128, 2, 4), (32, 128, 2, 8), (32, 128, 3, 8)]
WIDE_TILES = [(64, 64, 2, 4), (64, 64, 3, 4), (64, 128, 2, 8), (128, 64, 2, 4), (128, 64, 3, 4)]
WIDE_TILES += [(128, 128, 2, 8), (256, 64, 2, 8)]


def check(device: torch.device) -> None:
    """Print the largest error of each format and kernel against float64; exit if it is large."""
    pages = [unit(count, 320, device, seed).cpu() for seed, count in enumerate(LENGTHS)]
    queries = [
        unit(count, 320, device, 9 + seed).bfloat16() for seed, count in enumerate((20, 7, 120))
    ]
    for name in f"{BOTH},{KERNEL_ONLY}".split(","):
        form = Format.parse(name)
        index = Index.build(form, pages, [str(number) for number in range(len(pages))]).to(device)
        values = form.codes(index.vectors, index.dims).double() * form.factor(index.dims)
        values = values if index.scales is None else values * index.scales.double()
        exact = torch.tensor(
            [
                [float((query.double() @ page.T).amax(1).sum()) for page in values.split(lengths)]
                for query in form.queries(queries).vectors.split([20, 7, 120])
                for lengths in [index.lengths.tolist()]
            ]
        )
        for kernel in kernels_of(device):
            # All query tokens need a wide tile of the kernel, those of one query a narrow one.
            results = torch.cat([index.scores(some, kernel) for some in (queries, queries[:1])])
            error = float((results.cpu() - torch.cat([exact, exact[:1]])).abs().max())
            print(f"{name:14} {kernel:7} largest error of a score {error:.1e}", file=sys.stderr)
            if not error < LARGEST_ERROR:
                sys.exit(f"{name} by {kernel} is wrong: {error:g}")


def time_tiles(device: torch.device) -> None:
    """Print the time of a search for tiles of the kernel."""
    from colqwen_lab.runtime import triton_kernels

    limit = measured_limits(device).bytes_per_s
    for name in BOTH.split(","):
        index = synthetic(Format.parse(name), 10_000, 1260, 320, device)
        for count, tiles in ((1, TILES), (64, WIDE_TILES)):
            queries = [unit(20, 320, device, seed) for seed in range(count)]
            for tile in tiles:
                triton_kernels.MAXSIM_TILES = (tile,)
                times = []
                try:
                    for _ in range(12):
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                        index.scores(queries, "triton")
                        torch.cuda.synchronize()
                        times.append(time.perf_counter() - start)
                except Exception as error:
                    print(f"{name:9} {count:2} {tile}: {error!s:.60}")
                    continue
                seconds = median(times[2:])
                share = index.stored_bytes / seconds / limit
                print(f"{name:9} {count:2} {tile}: {1000 * seconds:7.3f} ms, {share:.0%} of copy")
        del index


def main() -> None:
    file, *flags = sys.argv[1:]
    device = pick_device()
    if flags == ["--tiles"]:
        return time_tiles(device)
    check(device)
    kernels = ",".join(kernels_of(device))
    lab.search_times(BOTH, kernel=kernels, max_s=0.5, output=file)
    lab.search_times(KERNEL_ONLY, max_s=0.5, output=file)
    times = SearchTimes.load(file)
    table = times.table()
    print(times.conditions())
    print(text(table[table["pages"] == table["pages"].max()].drop(columns="pages"), 100))
    print(text(times.million(), 100))
    return print(times.verdict())


if __name__ == "__main__":
    main()
