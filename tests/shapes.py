"""Built-in demonstration data: small RGB pictures of ten figures, scattered.

    python tests/shapes.py DIR [--train 2000] [--val 1000] [--seed 0] [--size 64]

writes an ordinary image folder, DIR/{train,val}/<class>/NNNN.png, and masks of the same names in DIR/masks, where
a pixel is 0 on the ground and 1 to 10 on a figure of the ten classes. A class is a figure (disc, ring, triangle,
...) and nothing else: its places, rotations, size and colours, light on dark or dark on light, are drawn the
same way for all ten. So pixels that are compared place by place hardly tell the classes apart, and neither
colour jitter, cropping nor flipping removes the label. Strokes are at least about 4 px wide at 64 px: they
drown in strong noise, but come back when neighbouring pixels are averaged.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = ("train", "val")
UNITS = 64.0  # lengths below are in 1/64 of the picture's side: pixels at the default size
LUMA = np.array([0.299, 0.587, 0.114])


# ---- Figures ---------------------------------------------------------------------------------------------
# (u, v), coordinates around the figure's middle in its radii -> signed distance in radii, > 0 inside.


def bar(u, v, half, arm):
    return np.minimum(half - np.abs(v), arm - np.abs(u))


def arcs(u, v):
    ring = 0.25 - np.abs(np.hypot(u, v - 0.4) - 0.95)
    return np.minimum(ring, 0.5 - v)


def bars(u, v):
    return bar(u, v, 0.42, 1.0)


def blades(u, v):
    radius = np.hypot(u, v)
    return np.minimum(0.95 - radius, radius * np.sin(3 * np.arctan2(v, u)) / 3)


def corners(u, v):
    return np.maximum(bar(u, v + 0.6, 0.25, 0.85), bar(v, u + 0.6, 0.25, 0.85))


def crosses(u, v):
    return np.maximum(bar(u, v, 0.25, 1.0), bar(v, u, 0.25, 1.0))


def discs(u, v):
    return 0.72 - np.hypot(u, v)


def frames(u, v):
    return 0.2 - np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.66)


def pairs(u, v):
    return bar(u, np.abs(v) - 0.5, 0.22, 1.0)


def rings(u, v):
    return 0.21 - np.abs(np.hypot(u, v) - 0.75)


def triangles(u, v):
    return 0.52 - np.maximum(np.abs(u) * np.sqrt(0.75) + v / 2, -v)


FIGURES = (arcs, bars, blades, corners, crosses, discs, frames, pairs, rings, triangles)
CLASSES = [figure.__name__ for figure in FIGURES]


def scatter(rng, x, y, pitch, jitter=3.0):
    """Coordinates (2, S, S) around the middle of each cell of a square grid, which is shifted and rotated at random.

    A figure of radius up to pitch / 2 - jitter stays whole inside its cell.
    """
    n = 16  # tables larger than any grid in view; the modulo only keeps the indices legal
    column, row = np.floor(x / pitch), np.floor(y / pitch)
    cell = (column % n).astype(int) * n + (row % n).astype(int)
    dx, dy = rng.uniform(-jitter, jitter, (2, n * n))
    turn = rng.uniform(0, 2 * np.pi, n * n)
    u, v = x - (column + 0.5) * pitch - dx[cell], y - (row + 0.5) * pitch - dy[cell]
    c, s = np.cos(turn)[cell], np.sin(turn)[cell]
    return np.stack([c * u + s * v, c * v - s * u])


# ---- Pictures --------------------------------------------------------------------------------------------


def colour(rng, luma):
    """A random colour (3,) of the given luma, 0-255 scale: the class must not hang on the hue."""
    tint = rng.uniform(-8, 8, 3)
    return luma + tint - LUMA @ tint


def shading(rng, x, y):
    """Low-frequency colour blobs and gradients (S, S, 3) around zero, on the 0-255 scale."""
    angle, phase = rng.uniform(0, 2 * np.pi, (2, 3, 1, 1))
    length = rng.uniform(60, 180, (3, 1, 1))
    field = np.cos(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + phase)
    return np.tensordot(field, rng.uniform(-5, 5, (3, 3)), (0, 0))


def draw(cls, split, index, seed=0, size=64):
    """Number `index` of class `cls` (0-9) in "train" or "val": picture (size, size, 3), 0-255, and mask (size, size),
    0 on the ground and cls + 1 on a figure, both uint8.

    Their randomness depends on these arguments alone, never on what was drawn before.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), cls, index])
    axis = ((np.arange(size) + 0.5) / size - 0.5) * UNITS
    x0, y0 = axis[None, :], axis[:, None]
    shift, turn, zoom = rng.uniform(-32, 32, 2), rng.uniform(0, 2 * np.pi), rng.uniform(1.1, 1.6)
    c, s = np.cos(turn) / zoom, np.sin(turn) / zoom
    x, y = c * (x0 - shift[0]) + s * (y0 - shift[1]), c * (y0 - shift[1]) - s * (x0 - shift[0])

    # Light on dark or dark on light with equal odds: the covered area does not show in the mean colour. The
    # contrasts are such that, under noise of sigma 100, some pictures stay readable and others do not.
    middle, contrast = rng.uniform(105, 150), rng.uniform(65, 135) * rng.choice((-1, 1))
    back, fore = colour(rng, middle - contrast / 2), colour(rng, middle + contrast / 2)
    # Shading lies over figure and ground alike: the contrast between them stays the same everywhere.
    light = shading(rng, x0, y0)

    edge = 1.5 * max(1.0, UNITS / size)  # the edge's ramp, never narrower than 1.5 pixels
    pitch = rng.uniform(20, 26)
    radius = 0.4 * pitch
    distance = FIGURES[cls](*scatter(rng, x, y, pitch) / radius) * radius * zoom
    cover = np.clip(0.5 + distance / edge, 0, 1)[..., None]
    picture = np.clip(np.rint(back + cover * (fore - back) + light), 0, 255)
    mask = (cls + 1) * (distance > 0)
    return picture.astype(np.uint8), mask.astype(np.uint8)


def image(cls, split, index, seed=0, size=64):
    """The picture alone."""
    return draw(cls, split, index, seed, size)[0]


# ---- The image folder ------------------------------------------------------------------------------------


def plan(train, val):
    """(relative path, class, split, index) of every picture; the classes' sizes differ by one at most."""
    for split, total in zip(SPLITS, (train, val), strict=True):
        for n in range(total):
            index, cls = divmod(n, len(CLASSES))
            yield Path(split, CLASSES[cls], f"{index:04d}.png"), cls, split, index


def complete(root, files, seed, size):
    """Whether `root` holds exactly the planned files; one picture is compared to tell seed and size apart."""
    pictures = {path for path, *_ in files}
    planned = pictures | {Path("masks", path) for path in pictures}
    if {p.relative_to(root) for p in root.rglob("*") if not p.is_dir()} != planned:
        return False
    path, *key = files[0]
    with Image.open(root / path) as found:
        return np.array_equal(np.asarray(found), image(*key, seed, size))


def write(root, train=2000, val=1000, seed=0, size=64):
    """Write the image folder `root`, all of it or nothing; returns one line that says what was done.

    A complete folder is left alone; one that holds anything else raises FileExistsError.
    """
    if min(train, val) < len(CLASSES):
        raise ValueError(f"train and val must each be at least {len(CLASSES)}, one picture per class")
    root, files = Path(root).resolve(), list(plan(train, val))
    if complete(root, files, seed, size):
        return f"{root}: already complete, nothing to do"
    if root.is_file() or any(root.glob("*")):
        raise FileExistsError(f"{root}: exists and is not this data set; nothing was written")
    root.parent.mkdir(parents=True, exist_ok=True)
    # A sibling folder is on the same file system, so the last step is a plain rename.
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as scratch:
        made = Path(scratch, "data")
        for path, cls, split, index in files:
            picture, mask = draw(cls, split, index, seed, size)
            for file, pixels in ((made / path, picture), (made / "masks" / path, mask)):
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
        os.rename(made, root)  # fails, rather than overwrites, where something has appeared meanwhile
    return f"{root}: wrote {train} train and {val} val pictures in {len(CLASSES)} classes"


def main():
    parser = argparse.ArgumentParser(description="Write the demonstration data set of ten scattered figures.")
    parser.add_argument("root", metavar="DIR", help="the image folder to make")
    parser.add_argument("--train", type=int, default=2000, help="training pictures (default %(default)s)")
    parser.add_argument("--val", type=int, default=1000, help="validation pictures (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data set (default %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side in pixels (default %(default)s)")
    try:
        print(write(**vars(parser.parse_args())))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
