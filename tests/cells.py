"""A simulated microscope: cells of four kinds in 16-bit TIFF stacks, few photons, no clean images.

    python tests/cells.py DIR [--train 250] [--val 100] [--seed 0] [--size 64] [--pages 25]

writes DIR/{train,val}/<kind>/NN.tif, so many images a kind, and beside it DIR-means, the same stacks
without noise, to measure with. A pixel is 100 counts of offset, Poisson photons and Gaussian noise of
reading, sigma 12. The kinds differ in shape alone; places, sizes, directions and brightness (peaks of
30 to 300 photons) are drawn the same way for all.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

OFFSET, READING, BACKGROUND = 100, 12.0, 5.0  # counts
# (u, v): coordinates around a cell's middle in its radii -> brightness from 0 to 1
KINDS = {
    "discs": lambda u, v: soft(1 - np.hypot(u, v)),
    "rings": lambda u, v: soft(0.3 - np.abs(np.hypot(u, v) - 0.8)),
    "rods": lambda u, v: soft(np.minimum(0.35 - np.abs(v), 1.3 - np.abs(u))),
    "pairs": lambda u, v: soft(0.55 - np.hypot(np.abs(u) - 0.75, v)),
}


def soft(inside):
    return 1 / (1 + np.exp(-8 * inside))  # the microscope's own blur


def draw(kind, size, rng):
    """(mean, counts) of one image: float64 and uint16 (size, size)."""
    row, column = np.mgrid[:size, :size]
    photons = np.full((size, size), BACKGROUND)
    for _ in range(rng.integers(3, 7)):
        y, x = rng.uniform(0.1, 0.9, 2) * size
        radius, turn = rng.uniform(0.09, 0.16) * size, rng.uniform(0, 2 * np.pi)
        u = ((column - x) * np.cos(turn) + (row - y) * np.sin(turn)) / radius
        v = ((row - y) * np.cos(turn) - (column - x) * np.sin(turn)) / radius
        peak = 30 * 10 ** rng.uniform(0, 1)
        photons = np.maximum(photons, BACKGROUND + peak * KINDS[kind](u, v))
    counts = OFFSET + rng.poisson(photons) + rng.normal(0, READING, photons.shape)
    return OFFSET + photons, np.rint(counts).clip(0, 65535).astype(np.uint16)


def save_stack(path, pages):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = map(Image.fromarray, pages)
    first.save(path, save_all=True, append_images=others)


def write(root, train=250, val=100, seed=0, size=64, pages=25):
    for s, (split, images) in enumerate({"train": train, "val": val}.items()):
        for k, kind in enumerate(KINDS):
            for number, start in enumerate(range(0, images, pages)):
                rng = np.random.default_rng([seed, s, k, number])
                drawn = [draw(kind, size, rng) for _ in range(min(pages, images - start))]
                means, counts = zip(*drawn, strict=True)
                save_stack(Path(root, split, kind, f"{number:02}.tif"), counts)
                save_stack(Path(f"{root}-means", split, kind, f"{number:02}.tif"),
                           [mean.astype(np.float32) for mean in means])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    for name, default in {"train": 250, "val": 100, "seed": 0, "size": 64, "pages": 25}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    write(**vars(parser.parse_args()))
