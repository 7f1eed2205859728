"""The packing crossover: requests of one size and of mixed sizes in one pack, one by one, and padded to the longest.

What is timed are two blocks of Wan 2.1 1.3B. From the times come, in `report`, throughput (tokens a second) and latency: a request that is
packed waits for the whole pack, one that runs alone for those before it.
"""

from .block import ON_CPU, SMALL, case, layers
from .harness import DEFAULT, FULL, QUICK, Case

OP = "packing"
SIZES = {256: (1, 16, 16), 1024: (4, 16, 16), 4096: (4, 32, 32), 16_384: (16, 32, 32)}
NAMES = ("tubelet", "tubelet one by one", "torch", "torch one by one", "torch padded")


def cases() -> list[Case]:
    two, found = layers(SMALL, 2), []
    for tokens, grid in SIZES.items():
        for number in (1, 2, 4, 8, 16):
            level = DEFAULT if number in (1, 4, 16) and tokens != 1024 and tokens * number <= 65_536 else FULL
            series = f"{tokens} tokens each"
            name = f"{number} x {tokens} tokens"
            found.append(case(OP, name, two, [grid] * number, level, 77, series, blocks=True, only=NAMES))
    mixed = [(16, 32, 32), (1, 16, 16), (4, 32, 32), (4, 16, 16), (1, 32, 32), (2, 16, 16), (8, 16, 16), (1, 16, 16)]
    for number, level in ((2, FULL), (4, DEFAULT), (8, QUICK), (16, DEFAULT)):
        name = f"{number} mixed sizes, 256 to 16,384 tokens"
        found.append(case(OP, name, two, (2 * mixed)[:number], level, 77, "mixed sizes", blocks=True, only=NAMES))
    small = layers(ON_CPU, 1)
    for number in (1, 4, 8):
        for tokens, grid in ((64, (1, 8, 8)), (256, (4, 8, 8))):
            name, series = f"{number} x {tokens} tokens", f"{tokens} tokens each"
            found.append(case(OP, name, small, [grid] * number, DEFAULT, 16, series, blocks=True, only=NAMES))
    mixed = [(8, 8, 8), (1, 8, 8), (2, 8, 8), (1, 8, 8)]
    for number, level in ((4, QUICK), (8, DEFAULT)):
        name = f"{number} mixed sizes, 64 to 512 tokens"
        found.append(case(OP, name, small, (2 * mixed)[:number], level, 16, "mixed sizes", blocks=True, only=NAMES))
    return found
