"""Built-in demonstration data: small RGB pictures of ten kinds of texture and shape.

    python tests/shapes.py DIR [--train 2000] [--val 1000] [--seed 0] [--size 64]

writes an ordinary image folder, DIR/{train,val}/<class>/NNNN.png. A class is a layout (stripes, rings,
triangles, ...) and nothing else: colours, contrast, position, rotation and scale are drawn the same way
for all ten, so neither colour jitter, cropping nor flipping removes the label, and the mean colour does
not give it away. Strokes are at least about 4 px wide at 64 px, so that they drown in strong noise but
come back when neighbouring pixels are averaged.
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


# ---- Patterns --------------------------------------------------------------------------------------------
# (rng, x, y), two (S, S) coordinate fields in units -> (S, S) signed distance, > 0 inside.
# The coordinates arrive already shifted, rotated and scaled; (0, 0) is near the middle of the picture.


def bands(t, period, duty=0.5):
    """Distance inside bands of width duty * period that repeat along t; one is centred on t = period / 2."""
    return duty * period / 2 - np.abs(t % period - period / 2)


def tiles(rng, x, y, pitch, jitter=2.0):
    """Coordinates local to each cell of a square grid, every cell with its own shift and rotation.

    A figure of radius up to pitch / 2 - jitter stays whole inside its cell.
    """
    n = 16  # tables larger than any grid in view; the modulo only keeps the indices legal
    cx, cy = np.floor(x / pitch), np.floor(y / pitch)
    cell = (cx % n).astype(int) * n + (cy % n).astype(int)
    dx, dy = rng.uniform(-jitter, jitter, (2, n * n))
    turn = rng.uniform(0, 2 * np.pi, n * n)
    u, v = x - (cx + 0.5) * pitch - dx[cell], y - (cy + 0.5) * pitch - dy[cell]
    c, s = np.cos(turn)[cell], np.sin(turn)[cell]
    return c * u + s * v, c * v - s * u


def stripes(rng, x, y):
    return bands(y, rng.uniform(11, 16), rng.uniform(0.4, 0.6))


def waves(rng, x, y):
    bend = rng.uniform(4, 6) * np.sin(2 * np.pi * x / rng.uniform(24, 32))
    return bands(y + bend, rng.uniform(12, 16), rng.uniform(0.4, 0.6))


def checks(rng, x, y):
    cell = rng.uniform(8, 12)
    return cell / np.pi * np.sin(np.pi * x / cell) * np.sin(np.pi * y / cell)


def dots(rng, x, y):
    pitch = rng.uniform(14, 19)
    u, v = tiles(rng, x, y, pitch, jitter=1.0)
    return rng.uniform(0.28, 0.36) * pitch - np.hypot(u, v)


def rings(rng, x, y):
    return bands(np.hypot(x, y), rng.uniform(11, 15), rng.uniform(0.4, 0.6))


def spokes(rng, x, y):
    arms = rng.integers(5, 9)
    return np.hypot(x, y) * np.sin(arms * np.arctan2(y, x)) / arms


def blobs(rng, x, y):
    """Level set of a random smooth field: waves of one length running in all directions."""
    angle, phase = rng.uniform(0, 2 * np.pi, (2, 8, 1, 1))
    length = rng.uniform(20, 28)
    field = np.cos(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + phase).sum(0) / 2
    return (field - rng.uniform(-0.2, 0.4)) * length / (2 * np.pi)


def triangles(rng, x, y):
    pitch = rng.uniform(21, 26)
    u, v = tiles(rng, x, y, pitch)
    edges = np.maximum(np.abs(u) * np.sqrt(0.75) + v / 2, -v)  # an inscribed circle of radius 1 at edges = 1
    return rng.uniform(0.24, 0.30) * pitch - edges


def crosses(rng, x, y):
    pitch = rng.uniform(21, 26)
    u, v = np.abs(tiles(rng, x, y, pitch))
    half, arm = rng.uniform(2.2, 2.9), rng.uniform(0.38, 0.44) * pitch
    return np.minimum(half - np.minimum(u, v), arm - np.maximum(u, v))


def frames(rng, x, y):
    pitch = rng.uniform(21, 26)
    u, v = np.abs(tiles(rng, x, y, pitch))
    return rng.uniform(2.0, 2.6) - np.abs(np.maximum(u, v) - rng.uniform(0.27, 0.32) * pitch)


PATTERNS = (stripes, waves, checks, dots, rings, spokes, blobs, triangles, crosses, frames)
CLASSES = [pattern.__name__ for pattern in PATTERNS]


# ---- Pictures --------------------------------------------------------------------------------------------


def colour(rng, luma):
    """A random colour (3,) of the given luma, 0-255 scale: the class must not hang on the hue."""
    tint = rng.uniform(-26, 26, 3)
    return luma + tint - LUMA @ tint


def shading(rng, x, y):
    """Low-frequency colour blobs and gradients (S, S, 3) around zero, on the 0-255 scale."""
    angle, phase = rng.uniform(0, 2 * np.pi, (2, 3, 1, 1))
    length = rng.uniform(60, 180, (3, 1, 1))
    field = np.cos(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + phase)
    return np.tensordot(field, rng.uniform(-16, 16, (3, 3)), (0, 0))


def image(cls, split, index, seed=0, size=64):
    """The picture (size, size, 3), uint8 0-255, number `index` of class `cls` (0-9) in "train" or "val".

    Its randomness depends on these arguments alone, never on what was drawn before.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), cls, index])
    axis = ((np.arange(size) + 0.5) / size - 0.5) * UNITS
    x0, y0 = axis[None, :], axis[:, None]
    shift, turn, zoom = rng.uniform(-10, 10, 2), rng.uniform(-0.3, 0.3), rng.uniform(1.2, 1.6)
    c, s = np.cos(turn) / zoom, np.sin(turn) / zoom
    x, y = c * (x0 - shift[0]) + s * (y0 - shift[1]), c * (y0 - shift[1]) - s * (x0 - shift[0])

    # Light on dark or dark on light with equal odds: the covered area does not show in the mean colour. The
    # contrasts are such that, under noise of sigma 100, some pictures stay readable and others do not.
    middle, contrast = rng.uniform(90, 165), rng.uniform(40, 120) * rng.choice((-1, 1))
    back, fore = colour(rng, middle - contrast / 2), colour(rng, middle + contrast / 2)
    # Shading lies over figure and ground alike: the contrast between them stays the same everywhere.
    light = shading(rng, x0, y0)

    edge = 1.5 * max(1.0, UNITS / size)  # the edge's ramp, never narrower than 1.5 pixels
    mask = np.clip(0.5 + PATTERNS[cls](rng, x, y) * zoom / edge, 0, 1)[..., None]
    return np.clip(np.rint(back + mask * (fore - back) + light), 0, 255).astype(np.uint8)


# ---- The image folder ------------------------------------------------------------------------------------


def plan(train, val):
    """(relative path, class, split, index) of every file; the classes' sizes differ by one at most."""
    for split, total in zip(SPLITS, (train, val), strict=True):
        for n in range(total):
            index, cls = divmod(n, len(CLASSES))
            yield Path(split, CLASSES[cls], f"{index:04d}.png"), cls, split, index


def complete(root, files, seed, size):
    """Whether `root` holds exactly the planned files; one picture is compared to tell seed and size apart."""
    if {p.relative_to(root) for p in root.rglob("*") if not p.is_dir()} != {path for path, *_ in files}:
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
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image(cls, split, index, seed, size)).save(made / path)
        os.rename(made, root)  # fails, rather than overwrites, where something has appeared meanwhile
    return f"{root}: wrote {train} train and {val} val pictures in {len(CLASSES)} classes"


def main():
    parser = argparse.ArgumentParser(description="Write the demonstration data set of ten pattern classes.")
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
