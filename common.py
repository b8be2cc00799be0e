"""What the three stages share, in reading order: noise, images, crops, ViT, head and losses,
schedules, runtime.

Shapes in comments: B images, C channels, H x W pixels, N patches, D width, K prototypes, M masked
patches. The method is "Ditch the Denoiser" (arXiv 2505.12191) over DINOv2 (arXiv 2304.07193).
"""

import argparse
import copy
import functools
import hashlib
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections import OrderedDict, namedtuple
from contextlib import nullcontext, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

class UserError(Exception):
    """Bad input: one line that says what is wrong, which file or flag, and what to do."""


# ==== noise =======================================================================================
# One fixed draw per image. x is float32 (H, W, C) in [0, 1]; a sigma is on the 0-255 scale.
NoiseModel = namedtuple("NoiseModel", "function parameters inverse most")
NOISES = {}  # name -> NoiseModel


def noise(name, inverse=False, most=math.inf):
    """Register a noise model: a function (x, level, rng) -> x with noise, or (x, a, b, ..., rng).
    x: float32 tensor (H, W, C) in [0, 1]; the result is clipped later. level: the number in the
    spec, several are separated by commas. rng: torch generator of this image. inverse: a smaller
    (first) level means stronger noise. most: the largest level of any parameter."""
    def register(function):
        parameters = len(inspect.signature(function).parameters) - 2  # without x and rng
        NOISES[name] = NoiseModel(function, parameters, inverse, most)
        return function
    return register


@noise("gauss")  # additive Gaussian; sigma
def gauss(x, sigma, rng):
    return x + sigma / 255 * torch.randn(x.shape, generator=rng)


@noise("shot", inverse=True, most=1e9)  # Poisson; photons at full brightness
def shot(x, photons, rng):
    return torch.poisson(x * photons, generator=rng) / photons


@noise("speckle")  # multiplicative Gaussian; standard deviation
def speckle(x, deviation, rng):
    return x + x * deviation * torch.randn(x.shape, generator=rng)


@noise("rician")  # magnitude MRI; sigma of each of its two channels
def rician(x, sigma, rng):
    return torch.hypot(gauss(x, sigma, rng), gauss(torch.zeros_like(x), sigma, rng))


@noise("impulse", most=1)  # salt and pepper; fraction of the values that become 0 or 1
def impulse(x, fraction, rng):
    u = torch.rand(x.shape, generator=rng)
    salt = (u < fraction / 2).float()
    return torch.where(u < fraction, salt, x)


@noise("camera", inverse=True, most=1e9)  # Poisson-Gaussian; photons as shot, sigma of reading
def camera(x, photons, sigma, rng):
    return gauss(shot(x, photons, rng), sigma, rng)


def parse_noise(spec):
    """(name, [(low, high) of each parameter]) of a spec, None of 'none': 'camera30,5-9' (a level an
    image from 5 to 9) -> ('camera', [(30, 30), (5, 9)]). Raises UserError."""
    if spec == "none":
        return None
    number = r"\d*\.?\d+"
    level = f"{number}(?:-{number})?"
    match = re.fullmatch(f"({'|'.join(NOISES)})({level}(?:,{level})*)", spec)
    if not match:
        raise UserError(f"--noise {spec}: unknown noise; use none, or a level of {', '.join(NOISES)}: gauss100")
    name, levels = match.groups()
    model, ranges = NOISES[name], []
    for level in levels.split(","):
        low, _, high = level.partition("-")
        ranges.append((float(low), float(high or low)))
    fit = all(0 < low <= high <= model.most for low, high in ranges)
    if not fit or len(ranges) != model.parameters:
        raise UserError(f"--noise {spec}: {name} takes {model.parameters} numbers separated by commas, "
                        f"more than 0, up to {model.most:g}; of a range, the lower one first")
    return name, ranges


def generator(*key, device="cpu"):
    """Torch generator from the hash of a key such as (seed, epoch, step): resuming needs no more.
    (On CPUs torch takes 32 bits: of a million images, a hundred pairs share their draws.)"""
    text = ":".join(map(str, key)).encode("utf-8", "surrogateescape")
    seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
    return torch.Generator(device).manual_seed(seed)


def noise_draw(spec, key, seed=0):
    """(function, levels, rng) of one image, by base seed and relative path, never by an order."""
    name, ranges = parse_noise(spec)
    rng = generator(seed, key)
    levels = [low if low == high else low + (high - low) * torch.rand((), generator=rng).item()
              for low, high in ranges]
    return NOISES[name].function, levels, rng


def add_noise(image, spec, key, seed=0):
    """Noise of `spec` on an array or tensor of float32 (H, W, C) in [0, 1]: a tensor of the same.
    key: its path in the data folder, 'train/cat/1.png'. Same key and seed, same bits."""
    image = torch.as_tensor(image)
    if spec == "none":
        return image
    function, levels, rng = noise_draw(spec, key, seed)
    return function(image, *levels, rng).clamp(0, 1)


# ==== images: files ===============================================================================
# A path names a file or, where it holds several images, one of them, from 1: 'cat/stack.tif#3'.
FORMATS = {suffix: kind for suffix, kind in Image.registered_extensions().items()
           if kind in Image.OPEN and kind != "MPEG"}
PAGED = (".apng", *(suffix for suffix, kind in FORMATS.items() if kind in ("TIFF", "GIF", "WEBP", "AVIF")))
READERS = {}  # suffix -> function
ENDS = b"IEND\xaeB`\x82", b"\xff\xd9"  # how a whole PNG and a whole JPEG end
CHECKED = 10_000  # images whose headers are read at the start; of a larger folder, so many of them
DEAD = 0.01  # share of a channel that may be NaN or infinite


def reader(suffix):
    """Register a reader of the files with this suffix: a function path -> array (H, W) or (H, W, C)
    of any real dtype, or a list of them, each an image. Of several readers the last one counts."""
    def register(function):
        READERS[suffix] = function
        return function
    return register


@reader(".npy")
def read_array(path):
    with open(path, "rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def split_page(path):
    """(file, page) of a path: 'stack.tif#3' -> ('stack.tif', 3); the page of a file with one image is 0."""
    file, _, page = str(path).rpartition("#")
    return (file, int(page)) if page.isdecimal() else (str(path), 0)


def stem(path):
    """Path without suffix, the name of a denoised image: 'a/1.png' -> 'a/1', 'stack.tif#3' -> 'stack#3'."""
    file, page = split_page(path)
    return os.path.splitext(file)[0] + (f"#{page}" if page else "")


def pages(path):
    """How many images a file holds. 1 for a damaged or empty one: reading it says what is wrong."""
    with suppress(Exception):
        if path.suffix.lower() in READERS:
            x = READERS[path.suffix.lower()](path)
            return max(1, len(x)) if isinstance(x, list) else 1
        with Image.open(path) as image:
            return image.n_frames
    return 1


def list_images(root):
    """Relative posix paths of all images below root, sorted, pages in order; hidden ones and links
    to folders seen left out."""
    found, seen = [], set()
    suffixes = (*FORMATS, *READERS)
    for folder, subfolders, files in os.walk(root, followlinks=True):
        # sorted: of several links to one folder, every machine takes the same
        subfolders[:] = sorted(f for f in subfolders if not f.startswith("."))
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        for name in files:
            if name.lower().endswith(suffixes) and not name.startswith("."):
                found.append(Path(folder, name).relative_to(root).as_posix())
    found.sort()
    several = tuple({*PAGED, *READERS} - {".npy"})
    files = [path for path in found if path.lower().endswith(several)]
    counts = parallel(lambda path: pages(Path(root, path)), files, "pages") if files else []
    counts = dict(zip(files, counts, strict=True))
    images = []
    for path in found:
        count = counts.get(path, 1)
        images += [path] if count == 1 else [f"{path}#{page}" for page in range(1, count + 1)]
    return images


def read_raw(path):
    """One image, upright: (H, W, C) of any real dtype; palette, alpha, CMYK become RGB. Dead pixels
    are NaN or infinite. path: of a file or of one of its images. Raises UserError."""
    name, page = split_page(path)
    file = Path(name)
    try:
        if not file.is_file():  # a pipe would wait for ever
            raise OSError("not a file" if file.exists() else "it is gone, or a link to nothing; was the folder moved?")
        if file.stat().st_size == 0:
            raise OSError("empty file")
        read = READERS.get(file.suffix.lower())
        if not read:
            return as_image(read_picture(file, page))
        x = read(file)
        return as_image(x[max(0, page - 1)] if isinstance(x, list) else x)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{path}: not a readable image ({error}); repair it or move it out of the folder") from None


def as_image(x):
    """An array as (H, W, C). Raises ValueError for what is no image."""
    x = np.require(x, None, ["C", "W"])
    if x.ndim not in (2, 3) or 0 in x.shape:
        frames = "; frames? save each as a file" if x.ndim == 4 else ""
        raise ValueError(f"shape {x.shape} is neither (H, W) nor (H, W, C){frames}")
    x = np.atleast_3d(x)
    H, W, C = x.shape
    if C > 4 and (min(W, C) > H or W == C):
        raise ValueError(f"shape {x.shape}: {H} frames? channels first? save (H, W, C), each frame as a file")
    if x.dtype.kind == "b":
        return x.astype(np.uint8) * np.uint8(255)
    if x.dtype.kind not in "iuf":
        raise ValueError(f"dtype {x.dtype} is not an image's; save integers or floats")
    return x


def is_grey(image):
    return Image.getmodebase(image.mode) == "L"


def check_depth(image):
    """Raises ValueError for an open picture of whose 16-bit colours Pillow would give 8 bit."""
    tile = image.tile[0] if image.tile else None
    cut = ";16" in str(tile) or 16 in getattr(image, "tag_v2", {}).get(258, ())  # bits of a TIFF's samples
    if tile and tile[0] == "ppm":
        cut = tile[3][1] > 255
    if cut and image.mode in ("RGB", "RGBA", "RGBX", "CMYK", "LA", "LAB"):
        raise ValueError("colour of more than 8 bit, of which Pillow reads 8; save .npy (H, W, C)")


def read_picture(path, page=0):
    """What Pillow reads of a file, upright: (H, W) or (H, W, 3). Raises many kinds."""
    with Image.open(path) as image:
        if page:
            image.seek(page - 1)
        elif (path.suffix.lower() in PAGED or image.format == "PNG") and image.n_frames > 1:
            raise ValueError(f"an animation of {image.n_frames} images; an animated PNG must be named .apng")
        check_depth(image)
        signed = image.format == "FITS" and image.mode == "I;16"  # Pillow takes them for unsigned
        image = ImageOps.exif_transpose(image)
        if image.mode in ("LA", "1") or not is_grey(image):
            image.info.pop("transparency", None)  # alpha is dropped; Pillow would warn
            image = image.convert("L" if is_grey(image) else "RGB")
        x = np.array(image)
    return x.view(np.int16) if signed else x


def read_shape(path):
    """(H, W, C, whether it is deeper than 8 bit) of one image. A PNG or JPEG that ends as it should
    is not decoded, so damage in its middle shows only when it is read. Raises UserError."""
    if path.is_file():  # else, and for other formats, read_image says what is wrong
        with suppress(Exception), Image.open(path, formats=("PNG", "JPEG")) as image:
            image.fp.seek(-8, os.SEEK_END)
            if image.fp.read().endswith(ENDS) and getattr(image, "n_frames", 1) == 1:
                check_depth(image)
                # not image.getexif(), which decodes a whole PNG
                turned = Image.Image.getexif(image).get(0x0112) in (5, 6, 7, 8)
                height, width = image.size if turned else reversed(image.size)
                return height, width, 1 if is_grey(image) else 3, image.mode.startswith("I")
    x = read_image(path)
    return *x.shape, x.dtype != np.uint8


# ==== images: values ==============================================================================
# An image is a tensor (C, H, W): of 8-bit files uint8 as they are; of deeper ones uint16, the range
# (low, high) of the whole set mapped to 0..65535.
WHITE = {torch.uint8: 255, torch.uint16: 65535}


def to_float(x):
    return x / WHITE[x.dtype]  # uint8 or uint16 to float32 in [0, 1]


def to_levels(x, dtype=torch.uint8):
    return (x * WHITE[dtype]).round_().to(dtype)  # [0, 1] to uint8 or uint16, rounded (the release truncates)


def to_range(x, low, high):
    """Array of any real dtype to uint16: low to 0, high to 65535; what lies outside is clipped."""
    share = (x.astype(np.float64) - low) / (high - low)
    return np.rint(65535 * share.clip(0, 1)).astype(np.uint16)


def robust_range(values):
    """(low, high) of a sample of values: what the middle 99.8 % span and half as much on either
    side, but no further than the values go. So hot pixels do not count, and noise is not clipped."""
    least, most = values.min(), values.max()
    low, high = np.quantile(values, [0.001, 0.999])
    if low == high:  # nearly all of them are the same
        return least, most
    margin = (high - low) / 2
    return max(least, low - margin), min(most, high + margin)


def fill_dead(x, path):
    """(H, W, C) whose NaN and infinite values become the mean of their finite neighbours, from the
    rim inwards. Raises UserError where too many are dead."""
    if x.dtype.kind != "f":
        return x
    dead = ~np.isfinite(x)
    share = dead.mean((0, 1)).max()
    if share > DEAD:
        raise UserError(f"{path}: {100 * share:.2g} % of its pixels are NaN or infinite, at most {100 * DEAD:g} % are "
                        "filled from their neighbours; repair it or move it out of the folder")
    x = np.where(dead, np.nan, x)
    while dead.any():
        wide = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=np.nan)
        around = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (0, 1))[dead]  # (M, 3, 3)
        with np.errstate(invalid="ignore"):  # 0 / 0 where no neighbour is alive yet
            x[dead] = np.nansum(around, (1, 2), np.float64) / np.isfinite(around).sum((1, 2))
        dead = np.isnan(x)
    return x


def read_image(path):
    """One image as read_raw gives it, its dead pixels filled. Raises UserError."""
    return fill_dead(read_raw(path), path)


def check_range(ours, theirs, owner):
    """Raises UserError unless a network gets the range that it was trained on, [] for 8 bit; None: unknown."""
    if theirs is not None and list(ours) != list(theirs):
        advice = f"use --range={theirs[0]},{theirs[1]}" if ours and theirs else "train one on these images"
        raise UserError(f"{owner}: was trained on {in_words(theirs)}, these images are {in_words(ours)}; {advice}")


def in_words(limits):
    return f"values from {limits[0]} to {limits[1]}" if limits else "8-bit values"


def parallel(function, items, name, workers=None):
    """[function(i) for i in items] by threads, with a progress bar; the first error ends it."""
    with ThreadPool(workers) as pool:
        results = pool.imap(function, items, chunksize=8)
        return list(tqdm(results, name, len(items), leave=False, disable=None))


# ==== images: folders =============================================================================
class Folder:
    """The images of one split, of '' all; read(i, source) gives image i noisy, clean or denoised.

    data: DIR with train/ and val/; or, for split 'train', any folder of images. spec: synthetic
    noise. denoised: folder with the same relative paths, any suffix. channels, limits: those of
    training, where this is another split; grey files may be among colour. limits: (low, high) of
    the values; [] for 8-bit files; None: measured here. Broken or unlike images raise UserError:
    here for up to CHECKED of them, for others when they are read."""
    def __init__(self, data, split="train", spec="none", seed=0, denoised=None, channels=None, limits=None):
        parse_noise(spec)  # a bad spec is named first
        self.data, self.split, self.spec, self.seed = Path(data), split, spec, seed
        if not self.data.is_dir():
            raise UserError(f"--data {data}: no such folder")
        root, prefix = self.data / split, f"{split}/" if split else ""
        if split == "train" and not root.is_dir():
            root, prefix = self.data, ""
            if (root / "val").is_dir():
                raise UserError(f"{root}: has val/, but no train/")
        self.paths = [prefix + path for path in list_images(root)]
        if not prefix and (root / "masks/train").is_dir():
            self.paths = [path for path in self.paths if not path.startswith("masks/")]
        if not self.paths:
            raise UserError(f"{root}: no images found; no such folder, or no .png, .jpg, .tif, .npy or the like in it")
        self.memory = {}  # images by source, where they are kept in memory
        self.checked = self.spread(CHECKED)
        files = [self.data / self.paths[i] for i in self.checked]
        headers = np.array(parallel(read_shape, files, "check"))  # (checked, 4)
        self.shapes = headers[:, :3]  # H, W, C
        self.channels = channels or int(self.shapes[:, 2].max())
        self.deep = bool(headers[:, 3].mean() >= 0.5 if limits is None else limits)  # as most files are
        for file, header in zip(files, headers, strict=True):
            self.check(file, *header[2:])
        self.limits = self.measure(limits) if self.deep else []
        self.denoised = self.match(Path(denoised)) if denoised else None

    def __len__(self):
        return len(self.paths)

    def spread(self, most):
        """Indices of up to `most` images, spread evenly over the sorted list."""
        return np.linspace(0, len(self) - 1, min(most, len(self))).astype(int).tolist()

    def check(self, path, channels, deep):
        """Raises UserError unless an image of so many channels, deeper than 8 bit or not, is of this set."""
        if deep != self.deep:
            it, others = ("deeper than 8 bit", "8 bit") if deep else ("8 bit", "deeper")
            raise UserError(f"{path}: is {it}, but other images, those trained on, or --range are {others}: "
                            "save all images alike")
        if channels != self.channels and (channels, self.channels) != (1, 3):
            raise UserError(f"{path}: files differ in their number of channels, it has {channels}, "
                            f"others or the training images have {self.channels}")

    def measure(self, limits, most=2000, values=4096):
        """The limits, or else those of so many values of up to `most` images each; says what they are and
        what is clipped. Raises UserError."""
        def sample(i):  # (values, number of dead ones) of one image
            x = read_raw(self.data / self.paths[i]).ravel()
            alive = x[np.isfinite(x)].astype(np.float64)
            dead = len(x) - len(alive)
            if len(alive) > values:
                alive = alive[np.random.default_rng(i).integers(len(alive), size=values)]
            return alive, dead

        samples, dead = zip(*parallel(sample, self.spread(most), "values"), strict=True)
        alive = np.concatenate(samples)
        low, high = map(float, limits or robust_range(alive))
        if low >= high:
            raise UserError(f"{self.data}: all values are {low}; nothing can be learned from them")
        outside = 100 * np.mean((alive < low) | (alive > high))
        text = f"{self.split}: values from {low:g} to {high:g} become black to white, {outside:.2g} % are clipped"
        if any(dead):
            images = np.count_nonzero(dead)
            text += f"; {sum(dead)} dead pixels of {images} images are filled from their neighbours"
        say(text)
        return [low, high]

    def match(self, root):
        """The denoised file of each image. Raises UserError."""
        note, self.copy_limits = root / "made_by.json", self.limits
        if note.exists():  # by denoise.py: of the same noise?
            check_config(read_json(note), self.settings(), {"denoiser"}, root)
            self.copy_limits = self.limits and [0, 65535]  # it writes the levels themselves
        found = {stem(p): root / p for p in list_images(root)}
        files = [found.get(stem) for stem in self.stems()]
        if None in files:
            first = self.paths[files.index(None)]
            raise UserError(f"{root}: {files.count(None)} of {len(self)} denoised images are missing, "
                            f"{first} first; write them, or let denoise.py apply make them")
        shapes = parallel(read_shape, [files[i] for i in self.checked], "check")
        for i, shape, seen in zip(self.checked, self.shapes.tolist(), shapes, strict=True):
            self.check(files[i], *seen[2:])
            if list(seen[:2]) != shape[:2]:
                raise UserError(f"{files[i]}: is {seen[:3]}, but its image {self.paths[i]} is {tuple(shape)}: H, W, C")
        return files

    def settings(self):
        """What a denoised copy is of, besides its files."""
        settings = {"noise": self.spec, "noise_seed": self.seed}
        return settings | {"range": self.limits} if self.deep else settings

    def stems(self):
        """{path without suffix: path}: the names of the denoised images. Raises UserError."""
        stems = {}
        for path in self.paths:
            other = stems.setdefault(stem(path), path)
            if other != path:
                raise UserError(f"{self.data}: {other} and {path} would share a denoised image; rename one of them")
        return stems

    def read(self, i, source="noisy"):
        """Image i as uint8 or, of deep files, uint16 (C, H, W). Raises UserError."""
        if source in self.memory:
            return self.memory[source][i]
        path, limits = self.data / self.paths[i], self.limits
        if source == "denoised":
            path, limits = self.denoised[i], self.copy_limits
        x = read_image(path)
        self.check(path, x.shape[2], x.dtype != np.uint8)
        if x.shape[2] < self.channels:  # grey among colour
            x = np.repeat(x, self.channels, axis=2)
        x = torch.from_numpy(to_range(x, *limits) if limits else x)
        if source == "noisy" and self.spec != "none":
            x = to_levels(add_noise(to_float(x), self.spec, self.paths[i], self.seed), x.dtype)
        return x.permute(2, 0, 1)

    def under(self, spec):
        """The same images under other synthetic noise; no file is looked at again."""
        other = copy.copy(self)
        other.spec, other.memory = spec, {}
        return other

    def copies(self, i, sources):
        """Image i from several sources, of one size. Raises UserError."""
        images = [self.read(i, source) for source in sources]
        if len({x.shape for x in images}) > 1:
            raise UserError(f"{self.denoised[i]}: is of another size than {self.paths[i]}")
        return images

    def hold(self, sources, gigabytes, workers):
        """Keep the images of these sources in memory, if they fit: decoded and made noisy once."""
        pixels = self.shapes[:, :2].prod(1).mean() * len(self)
        size = pixels * self.channels * (2 if self.deep else 1)  # bytes
        if size * len(sources) <= gigabytes * 1e9:
            for source in sources:
                read, name = functools.partial(self.read, source=source), f"read {source}"
                self.memory[source] = parallel(read, range(len(self)), name, workers or 1)

    def fingerprint(self, files=None):
        """The same for the same names and sizes of files, wherever they lie: those of the images, or one
        of another kind for each."""
        files = files or [self.data / path for path in self.paths]
        digest = hashlib.sha256()
        for path, file in zip(self.paths, files, strict=True):
            line = f"{path} {os.stat(split_page(file)[0]).st_size}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return f"{len(self)} images of {self.channels} channels, {digest.hexdigest()[:32]}"

    def labels(self):
        """Class name of each image: the folder below the split. Raises UserError."""
        if any(p.count("/") < 2 for p in self.paths):
            raise UserError(f"{self.data}: labels need a folder a class: train/<class>/ and val/<class>/")
        return [p.split("/")[1] for p in self.paths]

    def has_masks(self):
        return (self.data / "masks" / self.split).is_dir()

    def mask_file(self, path):
        """The PNG of the same name in DIR/masks."""
        return self.data / "masks" / f"{stem(path)}.png"

    def mask(self, i):
        """The class of every pixel of image i, uint8 (H, W), 255 where it is unknown. Raises UserError."""
        path = self.mask_file(self.paths[i])
        try:
            with Image.open(path) as image:
                if image.mode not in ("L", "P", "1"):
                    raise ValueError(f"mode {image.mode}; a pixel of a mask is one number, its class, from 0 to 254")
                mask = np.array(image, np.uint8)
        except Exception as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error
            raise UserError(f"{path}: the mask of {self.paths[i]} cannot be read ({reason})") from None
        H, W, *_ = read_shape(self.data / self.paths[i])
        if mask.shape != (H, W):
            raise UserError(f"{path}: is {mask.shape}, but its image {self.paths[i]} is {(H, W)}: H, W")
        return mask

    def mask_classes(self):
        """The classes that the masks have, sorted. Raises UserError."""
        def present(i):
            return np.bincount(self.mask(i).ravel(), minlength=256)

        pixels = sum(parallel(present, range(len(self)), "masks"))
        return np.flatnonzero(pixels[:255])

    def stats(self, source="noisy", most=2000):
        """Mean and standard deviation of each channel of the images in [0, 1], of up to `most`."""
        def moments(i):  # (3, C): pixels, sum, sum of squares
            x = self.read(i, source)
            x = x.flatten(1).double() / WHITE[x.dtype]  # (C, H W)
            return torch.stack([torch.ones_like(x).sum(1), x.sum(1), (x * x).sum(1)])

        count, first, second = sum(parallel(moments, self.spread(most), "statistics"))
        mean = first / count
        variance = second / count - mean**2
        return mean.tolist(), variance.clamp(min=1e-8).sqrt().tolist()


# ==== batches made ahead ==========================================================================
class Made(torch.utils.data.Dataset):
    """make(*key) as a data set: its indices are the keys that a sampler yields."""
    def __init__(self, make):
        self.make = make

    def __getitem__(self, key):
        return self.make(*key)


def prefetch(make, keys, device, workers):
    """Yield make(*key), tensors in lists or dicts, on the device, in order; workers make them ahead."""
    loader = torch.utils.data.DataLoader(
        Made(make), batch_size=None, sampler=keys, num_workers=workers,
        pin_memory=device.type == "cuda", multiprocessing_context="fork" if workers else None,
        worker_init_fn=functools.partial(end_with, os.getpid()))
    if device.type == "cuda":
        yield from copy_ahead(loader, device)
    else:
        for batch in loader:
            yield to_device(batch, device)


def to_device(batch, device):
    return tree_map(lambda x: x.to(device, non_blocking=True), batch)


def copy_ahead(batches, device):
    """Yield batches on a GPU: each is copied, on a stream of its own, while the GPU computes on the
    one before it."""
    side = torch.cuda.Stream(device)

    def arrived(batch):
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(side)
        for x in tree_leaves(batch):
            x.record_stream(compute)  # else a later copy could overwrite what it still reads
        return batch

    copied = []  # the batch that is on its way, if there is one
    for batch in batches:
        ready = [arrived(x) for x in copied]  # asked before the next copy: it waits for its own
        with torch.cuda.stream(side):
            copied = [to_device(batch, device)]
        yield from ready
    yield from map(arrived, copied)


def end_with(parent, _):
    """A worker ends with its process; torch's own watch misses one that dies while it starts."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ==== crops: cut on the host ======================================================================
# DINOv2's augmentation. Random numbers are drawn once an image, for its noisy and denoised copy.
def draw_box(height, width, scale, rng, ratio=(3 / 4, 4 / 3)):
    """Random resized crop (top, left, height, width): area uniform in `scale` of the image, aspect
    log-uniform; the first of ten tries that fits, else the largest central box (torchvision)."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*np.log(ratio)))
        h = round(math.sqrt(area / aspect))
        w = round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    h = min(height, round(width / ratio[0]))
    w = min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image, height, width):
    """uint8 or uint16 (C, H, W) to (C, height, width): bicubic with antialias, as Pillow; it averages noise."""
    x = image if image.dtype == torch.uint8 else to_float(image)
    x = F.interpolate(x[None], (height, width), mode="bicubic", antialias=True)[0]
    return x if image.dtype == torch.uint8 else to_levels(x.clamp_(0, 1), image.dtype)


def cut(image, box, flip, size, turns=0):
    """uint8 or uint16 (C, H, W) to (C, size, size): cut first, then resized, then mirrored, then
    turned by so many quarter turns."""
    top, left, h, w = box
    x = resize(image[:, top:top + h, left:left + w], size, size)
    kind = x.dtype
    if kind == torch.uint16:
        x = x.view(torch.int16)  # of the same bits, which torch can flip
    if flip:
        x = x.flip(-1)
    return x.rot90(turns, (1, 2)).view(kind)


JITTER = {"brightness": 0.4, "contrast": 0.4, "hue": 0.1, "saturation": 0.2}  # largest change
# what an operation mixes the image with: its grey, its mean grey, or black
MIXED = {"brightness": (0, 0), "contrast": (0, 1), "saturation": (1, 0)}
UNCHANGED = (1, 0, 0)  # weights of an image, its grey and its mean grey


def draw_color(rng, rgb, blur_p, solarize_p=0.0):
    """The 24 numbers of one crop's colour operations, for `color`. Brightness, contrast, saturation and
    grey each mix the image, its grey and its mean grey. Jitter (p 0.8) has a random order: up to
    three mixes before the hue, up to three after it; unused ones change nothing. Images that are
    not RGB have no saturation, grey or solarise; `color` ignores their hue."""
    mixes = [UNCHANGED] * 7  # three before the hue, three after it, grey
    hue, place = 0.0, 0
    jittered = rng.random() < 0.8
    for operation in rng.sample(list(JITTER), k=4):
        change = jittered * rng.uniform(-1, 1) * JITTER[operation]
        if operation == "hue":
            hue, place = change, 3
        elif rgb or operation != "saturation":
            grey, mean = MIXED[operation]
            mixes[place] = (1 + change, -change * grey, -change * mean)
            place += 1
    if rng.random() < 0.2 and rgb:
        mixes[6] = (0, 1, 0)
    sigma = rng.uniform(0.1, 2.0) if rng.random() < blur_p else 0.0
    solarize = rng.random() < solarize_p and rgb
    return [*sum(mixes, ()), hue, sigma, float(solarize)]


# ==== crops: colours on the device, one call for all crops of a size ==============================
def luma(x):
    """Grey value (B, 1, H, W): ITU-R 601 weights for RGB, the mean for other channels."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x.split(1, dim=1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def mix(x, weights):
    """Weighted sum of images (B, C, S, S), their grey and mean grey, clipped; weights (B, 3)."""
    image, grey, mean = weights[:, :, None, None, None].unbind(1)  # each (B, 1, 1, 1)
    y = luma(x)
    mixed = torch.addcmul(image * x, grey, y)
    return mixed.addcmul_(mean, y.mean((2, 3), keepdim=True)).clamp_(0, 1)


def adjust_hue(x, turn):
    """Turn the hue (HSV) of RGB images (B, 3, H, W) in [0, 1] by `turn` (B, 1, 1, 1) full circles."""
    value, largest = x.max(1, keepdim=True)
    least = x.amin(1, keepdim=True)
    chroma = value - least
    ahead = (x.roll(-1, 1) - x.roll(-2, 1)).gather(1, largest)  # g - b where red is largest, ...
    hue = 2 * largest + ahead / chroma.clamp(min=1e-12) + 6 * turn  # in sixths of the circle
    primary = torch.arange(0, 6, 2, device=x.device)[:, None, None]  # of red, green, blue
    distance = ((hue - primary).remainder(6) - 3).abs()  # 3 at the primary, 0 opposite to it
    return least + chroma * (distance - 1).clamp(0, 1)


def gaussian_blur(x, sigma, radius=4):
    """Blur (B, C, S, S) by sigma (B, 1) pixels: kernel 9, reflected borders; 0 changes nothing."""
    B, C, S, _ = x.shape
    radius = min(radius, S - 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = F.softmax(-0.5 * (offsets / sigma.clamp(min=1e-2)) ** 2, dim=1)  # (B, taps)
    kernel = kernel.repeat_interleave(C, 0)[:, None, None]  # (B C, 1, 1, taps)
    x = F.pad(x, [radius] * 4, mode="reflect").view(1, B * C, S + 2 * radius, S + 2 * radius)
    x = F.conv2d(x, kernel, groups=B * C)  # each channel of each image has its own kernel
    return F.conv2d(x, kernel.mT, groups=B * C).view(B, C, S, S)


def color(crops, numbers):
    """uint8 or uint16 crops (B, C, S, S) to float in [0, 1]: jitter, grey, blur, solarise by numbers (B, 24)."""
    mixes, hue, sigma, solarize = numbers.split([21, 1, 1, 1], dim=1)
    mixes = mixes.unflatten(1, (7, 3)).unbind(1)
    x = to_float(crops)
    for weights in mixes[:3]:
        x = mix(x, weights)
    if crops.shape[1] == 3:
        x = adjust_hue(x, hue[:, :, None, None])
    for weights in mixes[3:]:
        x = mix(x, weights)
    x = gaussian_blur(x, sigma)
    inverted = (x >= 0.5) & (solarize[:, :, None, None] > 0)
    return torch.where(inverted, 1 - x, x)


# ==== masks =======================================================================================
def draw_masks(crops, rows, columns, rng, ratio=(0.1, 0.5), p=0.5):
    """iBOT's block-wise masks as DINOv2 draws them: bool (crops, rows * columns). A share p of the
    crops is masked; their ratios are stratified over `ratio`, the number of patches truncated."""
    masks = np.zeros((crops, rows, columns), dtype=bool)
    chosen = rng.sample(range(crops), k=int(crops * p))
    for k, crop in enumerate(chosen):
        share = ratio[0] + (ratio[1] - ratio[0]) * (k + rng.random()) / len(chosen)
        add_blocks(masks[crop], int(share * rows * columns), rng)
    return torch.from_numpy(masks).flatten(1)


def add_blocks(mask, left, rng, least=4, aspect=0.3):
    """Add blocks to one mask (rows, columns) until `left` patches are masked or ten tries in a row
    did not fit (BEiT). Areas are uniform from `least` to what is left, aspects log-uniform."""
    rows, columns = mask.shape
    tries = 10
    while left > 0 and tries > 0:
        tries -= 1
        area = rng.uniform(least, left)
        stretch = aspect ** rng.uniform(-1, 1)
        h = round(math.sqrt(area * stretch))
        w = round(math.sqrt(area / stretch))
        if h < rows and w < columns:  # a block never spans the grid
            top, start = rng.randint(0, rows - h), rng.randint(0, columns - w)
            block = mask[top:top + h, start:start + w]
            new = h * w - int(block.sum())
            if 0 < new <= left:
                block[:] = True
                left, tries = left - new, 10


# ==== ViT: state-dict keys of DINOv2 and timm =====================================================
class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        if x.device.type == "cpu":
            qkv = qkv.float()  # of torch's kernels for CPUs, the one for bf16 takes several times as long
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        with torch.autocast("cpu", enabled=False):
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class LayerScale(nn.Module):
    def __init__(self, dim, init_values):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x, keep=None):
        x = self.gamma * x
        return x if keep is None else keep * x


class Block(nn.Module):
    def __init__(self, dim, num_heads, init_values):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        fc1, fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.ls2 = LayerScale(dim, init_values)

    def forward(self, x, keep=(None, None)):
        """Tokens (B, N, D) to the same. keep (2, B, 1, 1): of draw_keep, a factor a branch."""
        x = x + self.ls1(self.attn(self.norm1(x)), keep[0])
        return x + self.ls2(self.mlp(self.norm2(x)), keep[1])


def draw_keep(depth, samples, drop_path, device, rng=None):
    """Drop path: factors (depth, 2, samples) of branches, 0 with probability drop_path, of mean 1."""
    uniform = torch.rand(depth, 2, samples, generator=rng, device=device)
    return (uniform >= drop_path) / (1 - drop_path)


def resize_pos_embed(pos_embed, rows, columns):
    """Position embedding (1, 1 + n n, D) to (1, 1 + rows columns, D): bicubic, no antialias."""
    side = math.isqrt(pos_embed.shape[1] - 1)
    if (side, side) == (rows, columns):
        return pos_embed
    cls, grid = pos_embed.split([1, side * side], dim=1)
    grid = grid.mT.unflatten(2, (side, side)).float()  # (1, D, n, n)
    grid = F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.flatten(2).mT], 1)


class VisionTransformer(nn.Module):
    """ViT with LayerScale. model(x): images (B, C, H, W), sides multiples of patch_size, to normed
    class tokens (B, D). forward_features(x, masks): 'cls' (B, D) and 'patches' (B, N, D), normed;
    the mask token replaces patches of masks (B, N) before the position embedding (iBOT)."""
    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=384, depth=12,
                 num_heads=6, init_values=1e-5, drop_path=0.0, registers=0):
        super().__init__()
        self.patch_size, self.embed_dim, self.registers = patch_size, embed_dim, registers
        self.drop_path = drop_path
        patches = (img_size // patch_size) ** 2
        projection = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.ModuleDict({"proj": projection})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.register_tokens = None
        if registers:
            self.register_tokens = nn.Parameter(1e-6 * torch.randn(1, registers, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, init_values) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, 1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        self.apply(init_linear)

    def tokens(self, x, masks=None):
        """Images (B, C, H, W) to the first block's input (B, 1 + registers + N, D)."""
        B, _, H, W = x.shape
        rows, columns = H // self.patch_size, W // self.patch_size
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"{H} x {W} pixels are no multiple of patch size {self.patch_size}")
        x = self.patch_embed["proj"](x).flatten(2).mT  # (B, N, D)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], 1)
        x = x + resize_pos_embed(self.pos_embed, rows, columns)
        if self.registers:
            cls, patches = x.split([1, rows * columns], dim=1)
            x = torch.cat([cls, self.register_tokens.expand(B, -1, -1), patches], 1)
        return x

    def last_layers(self, x, n=1, masks=None, keep=None):
        """forward_features after each of the last n blocks, the last one first. keep (depth, 2, B):
        of draw_keep; in training drawn here if not given."""
        depth = len(self.blocks)
        if keep is None and self.training and self.drop_path:
            keep = draw_keep(depth, len(x), self.drop_path, x.device)
        factors = [(None, None)] * depth if keep is None else keep[..., None, None]
        x = self.tokens(x, masks)
        outputs = []
        for block, factor in zip(self.blocks, factors, strict=True):
            x = block(x, factor)
            outputs.append(x)
        outputs = [self.norm(y) for y in reversed(outputs[-n:])]
        return [{"cls": y[:, 0], "patches": y[:, 1 + self.registers:]} for y in outputs]

    def forward_features(self, x, masks=None, keep=None):
        return self.last_layers(x, 1, masks, keep)[0]

    def forward(self, x):
        return self.forward_features(x)["cls"]


def init_linear(module):
    """DINOv2's initialisation: truncated normal 0.02, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


ARCHS = {"vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12), "vit_large": (1024, 24, 16)}


def make_vit(arch, patch_size=16, **kw):
    """arch: a name of ARCHS, or 'WIDTH,DEPTH,HEADS'; kw: VisionTransformer's. Raises UserError."""
    try:
        dim, depth, heads = ARCHS.get(arch) or map(int, arch.split(","))
        if min(dim, depth, heads) < 1 or dim % heads:
            raise ValueError
    except ValueError:
        raise UserError(f"--arch {arch}: use one of {', '.join(ARCHS)}, or WIDTH,DEPTH,HEADS: 128,4,4") from None
    return VisionTransformer(patch_size=patch_size, embed_dim=dim, depth=depth, num_heads=heads, **kw)


vit_tiny, vit_small, vit_base, vit_large = (functools.partial(make_vit, arch) for arch in ARCHS)


# ==== ViT weights of other code ===================================================================
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}  # of attention, by width: no weight's shape tells them


def read_backbone(path):
    """A ViT's flat state dict with our names, from a file of ours, of timm, of DINOv2's or the paper's
    code (a 'teacher' entry, 'backbone.' in front, blocks in chunks or not). Raises UserError."""
    state, weights = load_checkpoint(path), {}
    for entry in ("teacher", "model", "state_dict"):
        if isinstance(state.get(entry), dict):
            state = state[entry]
    for name, value in state.items():
        name = re.sub(r"^(module\.|backbone\.)*", "", str(name))
        name = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)  # 'blocks.1.7.': 7, in chunk 1
        name = name.replace("reg_token", "register_tokens")
        if torch.is_tensor(value):
            weights[name] = value.float()
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"):
        if name not in weights:
            raise UserError(f"{path}: holds no weights of a ViT, {name} is missing")
    _, n, dim = weights["pos_embed"].shape
    if math.isqrt(n) ** 2 == n:  # timm's with registers: none of the class token
        weights["pos_embed"] = F.pad(weights["pos_embed"], (0, 0, 1, 0))  # (1, 1 + N, D)
    elif math.isqrt(n - 1) ** 2 != n - 1:
        raise UserError(f"{path}: pos_embed has {n} positions, not a square and one")
    weights.setdefault("mask_token", torch.zeros(1, dim))
    return weights


def load_backbone(model, weights, path):
    """Weights of read_backbone into a ViT, the position embedding resized, LayerScale 1 where they
    have none. Gives the names that the ViT does not have, but for heads'. Raises UserError."""
    side = math.isqrt(model.pos_embed.shape[1] - 1)
    pos_embed = resize_pos_embed(weights["pos_embed"], side, side)
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters() if "gamma" in name}
    weights = {**ones, **weights, "pos_embed": pos_embed}
    try:
        missing, unused = model.load_state_dict(weights, strict=False)
        if missing:
            raise RuntimeError(f"{', '.join(missing)} missing")
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: does not fit --arch, --patch_size or --registers: {reason}") from None
    return [name for name in unused if not re.match(r"(\w*_)?head\.", name)]


def vit_of(path, heads=0):
    """The ViT of a file of weights, told by their shapes; heads: 0 for the usual. Raises UserError."""
    weights = read_backbone(path)
    dim, channels, patch_size, _ = weights["patch_embed.proj.weight"].shape
    heads = heads or HEADS.get(dim)
    if not heads or dim % heads:
        raise UserError(f"{path}: width {dim} and {heads} heads do not fit; give --heads")
    depth = sum(name.endswith(".norm1.weight") for name in weights)
    registers = weights.get("register_tokens", torch.empty(1, 0)).shape[1]
    size = patch_size * math.isqrt(weights["pos_embed"].shape[1] - 1)
    model = VisionTransformer(size, patch_size, channels, dim, depth, heads, registers=registers)
    unused = load_backbone(model, weights, path)
    if unused:
        raise UserError(f"{path}: is no plain ViT, it has {', '.join(unused[:3])}")
    return model


# ==== head and losses: softmax, cross-entropy and KoLeo in float32, whatever the autocast =========
STUDENT_TEMP = 0.1  # DINOv2 default


class DINOHead(nn.Module):
    """Tokens (..., in_dim) to prototype logits (..., out_dim): MLP, L2 normalise, weight-normed linear."""
    def __init__(self, in_dim, out_dim=65536, hidden_dim=2048, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim))
        self.apply(init_linear)
        limit = bottleneck_dim ** -0.5  # as torch's Linear: it sets how fast Adam turns prototypes
        direction = torch.empty(out_dim, bottleneck_dim).uniform_(-limit, limit)
        # the keys of torch's weight_norm: length and direction
        self.last_layer = nn.ParameterDict({"weight_g": torch.ones(out_dim, 1), "weight_v": direction})

    def forward(self, x):
        length, direction = self.last_layer["weight_g"], self.last_layer["weight_v"]
        prototypes = direction * (length / direction.norm(dim=1, keepdim=True))  # (K, bottleneck)
        return F.linear(F.normalize(self.mlp(x).float(), dim=-1), prototypes)


def softmax_center(logits, center, temp):
    """Teacher targets (M, K): softmax((logits - centre) / temp)."""
    return F.softmax((logits.float() - center) / temp, dim=-1)


def update_center(center, logits, momentum=0.9):
    """EMA (1, K) of the mean teacher output over the rows (M, K) of all processes."""
    total = all_reduce(logits.float().sum(0, keepdim=True))
    rows = all_reduce(torch.full((1,), float(len(logits)), device=logits.device))
    mean = total / rows.clamp(min=1)
    return torch.where(rows > 0, momentum * center + (1 - momentum) * mean, center)


def sinkhorn(logits, temp, iterations=3):
    """Sinkhorn-Knopp targets (M, K) over all processes, in log space: prototypes are used equally."""
    log_q = logits.float() / temp
    least = log_q.new_full((1, log_q.shape[1]), -1e30)  # never the largest: where this process has no row
    for _ in range(iterations):
        largest = all_reduce(torch.cat([log_q, least]).amax(0, keepdim=True), "MAX")
        total = all_reduce((log_q - largest).exp().sum(0, keepdim=True))
        log_q = F.log_softmax(log_q - largest - total.log(), dim=-1)
    return log_q.exp()


def cross_entropy(targets, logits):
    """-sum of targets * log softmax(logits / student temperature): (..., K), (..., K) to (...)."""
    return -(targets * F.log_softmax(logits.float() / STUDENT_TEMP, dim=-1)).sum(-1)


def dino_loss(student_logits, targets):
    """Cross-view class-token loss (DINOv2): the mean over pairs of different views. student_logits:
    list of (B, K), the two global crops first, then the locals; targets (2, B, K) of the global."""
    first, second, *local = student_logits
    loss = cross_entropy(targets[1], first).mean() + cross_entropy(targets[0], second).mean()
    both = targets.sum(0)  # a local crop meets both global views
    for logits in local:
        loss = loss + cross_entropy(both, logits).mean()
    return loss / (2 + 2 * len(local))


def ibot_loss(student_logits, targets, weights, n_crops):
    """Masked-patch loss (iBOT). (M, K), (M, K), weights (M,): 1 / masked patches of its crop; n_crops 2B."""
    return (weights * cross_entropy(targets, student_logits)).sum() / n_crops


def koleo_loss(x):
    """-mean log distance to the nearest neighbour of L2-normalised rows (B, D); 0 for one row."""
    if len(x) < 2:
        return x.sum() * 0.0
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1, eps=1e-8)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
        distance = F.pairwise_distance(x, x[nearest], eps=1e-8)
        return -(distance + 1e-8).log().mean()


# ==== schedules and parameter groups ==============================================================
def cosine(step, base, final, total, warmup=0, start=0.0):
    """Linear from start to base over `warmup` steps, then a cosine to final at `total`, then final."""
    if step >= total:
        return final
    if step < warmup:
        return start + (base - start) * step / max(1, warmup - 1)
    angle = math.pi * (step - warmup) / (total - warmup)
    return final + 0.5 * (base - final) * (1 + math.cos(angle))


def param_multipliers(name, depth, layer_decay=0.9, patch_embed_mult=0.2):
    """(learning-rate, weight-decay) multiplier of a backbone parameter; embeddings have the lowest rate."""
    block = re.match(r"blocks\.(\d+)", name)
    layer = 1 + int(block[1]) if block else 0
    if name.startswith("norm"):
        layer = depth + 1
    rate = layer_decay ** (depth + 1 - layer)
    if name.startswith("patch_embed"):
        rate *= patch_embed_mult
    spared = name.endswith("bias") or "norm" in name or "gamma" in name
    return rate, 0.0 if spared else 1.0


def param_groups(backbone, head, layer_decay=0.9, patch_embed_mult=0.2):
    """AdamW groups of parameters with the same multipliers; 'last': the head's last layer."""
    depth, groups = len(backbone.blocks), {}
    for name, p in backbone.named_parameters():
        rate, decay = param_multipliers(name, depth, layer_decay, patch_embed_mult)
        groups.setdefault((rate, decay, False), []).append(p)
    for name, p in head.named_parameters():
        decay = 0.0 if name.endswith("bias") else 1.0
        groups.setdefault((1.0, decay, "last_layer" in name), []).append(p)
    return [{"params": p, "lr_mult": rate, "wd_mult": decay, "last": last} for (rate, decay, last), p in groups.items()]


# ==== runtime: processes, precision ===============================================================
now = time.perf_counter
EXIT_STOPPED = 75  # a signal came: saved, the same command goes on (sysexits' EX_TEMPFAIL)


def world():
    """(rank of this process, number of processes)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def setup(device="auto"):
    """Join the processes of torchrun, if any. Gives the torch.device. Raises UserError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's own protocol
    if not re.fullmatch(r"cpu|cuda:\d+", device):
        raise UserError(f"--device {device}: must be auto, cpu, cuda or cuda:N")
    device, backend = torch.device(device), "gloo"
    if device.type == "cuda":
        count, backend = torch.cuda.device_count(), "cpu:gloo,cuda:nccl"
        if device.index >= count:
            raise UserError(f"--device {device}: this machine has {count} CUDA devices; use cpu, or fewer processes")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(backend)
    return device


def all_reduce(x, op="SUM"):
    """x reduced over the processes, in place."""
    if world()[1] > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x


def gather_rows(x):
    """Rows (B, ...) of all processes in rank order; only this process's carry a gradient."""
    rank, size = world()
    rows = [torch.empty_like(x) for _ in range(size)]
    if size > 1:
        dist.all_gather(rows, x.detach().contiguous())
    rows[rank] = x
    return torch.cat(rows)


def share(n, images):
    """(global batch, this process's slice) of a batch of n or, if fewer, all images. Raises UserError."""
    rank, size = world()
    if images < n:
        say(f"warning: --batch_size {n} is larger than the set of {images} images; using {images}")
        n = images
    each = n // size
    if n % size:
        raise UserError(f"--batch_size {n} does not divide by the number of processes, {size}")
    return n, slice(rank * each, (rank + 1) * each)


def fast_amp(device):
    """The --amp that a device is fastest with. A CPU needs matrix units for bf16 (AMX)."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch before 2.10
    return "bf16" if capabilities.get("amx_bf16") else "off"


def autocast(device, amp):
    """(autocast context factory, gradient scaler: the identity but for fp16). Raises UserError."""
    if amp == "auto":
        amp = fast_amp(device)
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16: is for GPUs; use bf16 or off")
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    if amp == "off":
        return nullcontext, scaler
    dtype = torch.bfloat16 if amp == "bf16" else torch.float16
    return functools.partial(torch.autocast, device.type, dtype), scaler


def say(text):
    if world()[0] == 0:
        tqdm.write(text)  # above any progress bar


# ==== runtime: files ==============================================================================
def write_atomic(path, write, sync=True):
    """write(file) into a hidden file beside path, then rename: path is whole or untouched. The hidden
    file of a killed process is overwritten by the next. Raises UserError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"{path}: cannot be written ({error}); what was there before is intact") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path, text):
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path, data):
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_json(path, needs=()):
    """The dict in a JSON file, with the keys that it needs. Raises UserError."""
    try:
        data = json.loads(Path(path).read_text())
        if not isinstance(data, dict) or set(needs) - set(data):
            raise ValueError("not what the stage wrote")
        return data
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def not_finite(state, name=""):
    """Names of the tensors in nested dicts that hold a value that is not finite."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from not_finite(value, f"{name}{key}.")
        elif torch.is_tensor(value) and not value.isfinite().all():
            yield f"{name}{key}"


def save_checkpoint(path, state):
    """Atomic; the checkpoint before stays beside it as NAME.previous. Raises UserError."""
    for name in not_finite(state):
        raise UserError(f"{path}: {name} is not finite; the last good checkpoint is kept; use a lower --lr")
    new = f"{path}.new"
    write_atomic(new, lambda file: torch.save(state, file))
    if os.path.exists(path):
        os.replace(path, f"{path}.previous")
    os.replace(new, path)


def read_checkpoint(path, needs):
    """The state in one file, without running code in it. Raises many kinds for a bad one."""
    if zipfile.is_zipfile(path):
        damaged = zipfile.ZipFile(path).testzip()  # checksums, at which torch does not look
        if damaged:
            raise ValueError(f"{damaged} has a wrong checksum")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError("holds no weights")
    missing = sorted(set(needs) - set(state))
    if missing:
        raise ValueError(f"another stage's: it has no {', '.join(missing)}")
    return state


def load_checkpoint(path, required=True, needs=()):
    """State of save_checkpoint on the CPU, from its file or a run's folder; where it is damaged, the
    one before; None where there is none and it is not required. needs: its keys. Raises UserError."""
    if os.path.isdir(path):
        path = Path(path, "checkpoint.pth")
    damaged = ""
    candidates = (f"{path}.new", path, f"{path}.previous")  # .new: killed before the renaming
    for file in filter(os.path.exists, candidates):
        try:
            state = read_checkpoint(file, needs)
        except Exception as error:
            reason = str(error).split("\n")[0][:120] or type(error).__name__
            damaged = damaged or f"{file}: cannot be loaded ({reason})"
        else:
            if damaged:
                print(f"warning: {damaged}; going on from {file}", file=sys.stderr)
            return state
    if damaged:
        raise UserError(f"{damaged}; move it away to start anew")
    if required:
        raise UserError(f"{path}: no such checkpoint")
    return None


def check_config(saved, current, free, where):
    """Raises UserError where settings of a run differ; a path is the same however it is spelled."""
    changed = []
    for name in sorted({*saved, *current} - {*free}):
        before, after = saved.get(name), current.get(name)
        same = before == after
        if name in PATHS and before and after:
            same = os.path.realpath(before) == os.path.realpath(after)
        if not same:
            changed.append(f"--{name} {before} (now {after})")
    if changed:
        raise UserError(f"{where} holds a run with other settings; use the same or another --out: {', '.join(changed)}")


def read_log(path):
    """Records of a log.jsonl, if there is one, without lines that a crash cut short or garbled."""
    records = []
    with suppress(FileNotFoundError):
        for line in Path(path).read_text(errors="replace").splitlines():
            with suppress(ValueError):
                records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and "step" in r]


# ==== runtime: signals, the training loop's clockwork =============================================
def on_signal(act):
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(s, act)


def leave(*_):
    """What a signal does outside of the loops: files are whole or untouched, so just end."""
    os.write(2, b"stopped; the same command goes on\n")
    os._exit(EXIT_STOPPED)


class Loop:
    """The clockwork of training: batches in order, progress bar, log.jsonl, checkpoints. SIGTERM,
    SIGINT and SIGUSR1 stop all processes after the step, saved. images: their number. position:
    (epoch, step, seconds) to go on from. save(position) writes a checkpoint, on rank 0. Usage:
    for batch in loop.batches(make, epochs): ...; if loop.tick(losses, record): return"""
    def __init__(self, args, images, position, device, save):
        self.args, self.images, self.device, self.save = args, images, device, save
        self.batch, self.mine = share(args.batch_size, images)
        self.steps = images // self.batch  # an epoch
        self.epoch, self.step, seconds = position
        self.total = self.epoch * self.steps + self.step  # steps of the run
        self.losses, self.signals = [], []
        on_signal(lambda *_: self.signals.append(1))
        self.logged_step, self.logged_time = self.total, now()
        self.saved, self.began = self.logged_time, self.logged_time - seconds
        self.path = Path(args.out, "log.jsonl")
        least = all_reduce(torch.tensor(self.total), "MIN")
        most = all_reduce(torch.tensor(self.total), "MAX")
        if least != most:
            raise UserError(f"--out {args.out}: processes found different checkpoints; nodes must share this folder")
        if world()[0] == 0:  # on resume the lines after the checkpoint are dropped
            kept = [json.dumps(r) + "\n" for r in read_log(self.path) if r["step"] <= self.total]
            write_text(self.path, "".join(kept))
        hidden = world()[0] > 0 or None
        self.bar = tqdm(total=self.steps * args.epochs, initial=self.total, disable=hidden, unit="step")

    def position(self):
        return self.epoch, self.step, now() - self.began

    def keys(self, epochs):
        """Yield (epoch, step, indices of the global batch) from the position on."""
        first = self.step
        for epoch in range(self.epoch, epochs):
            rng = generator(self.args.seed, "order", epoch)
            batches = torch.randperm(self.images, generator=rng).split(self.batch)
            for step in range(first, self.steps):
                yield epoch, step, batches[step].tolist()
            first = 0

    def batches(self, make, epochs):
        """make(epoch, step, indices) of every step up to so many epochs, made ahead."""
        return prefetch(make, self.keys(epochs), self.device, self.args.workers)

    def logs_next(self):
        return (self.total + 1) % self.args.log_steps == 0

    def tick(self, losses, record):
        """After a step: losses, a dict of scalar tensors, 'total' first; record: what else a log line
        holds. True after a signal: saved, leave with EXIT_STOPPED."""
        logs, record = self.logs_next(), {"epoch": self.epoch, **record}
        self.names = list(losses)
        self.losses.append(torch.stack(list(losses.values())).detach())
        self.total += 1
        self.epoch, self.step = divmod(self.total, self.steps)
        self.bar.update()
        if logs:
            self.log(record)
        due = now() - self.saved > 60 * self.args.save_minutes
        stop, due = all_reduce(torch.tensor([len(self.signals), due]), "MAX").tolist()
        if stop:
            self.checkpoint(f"stopped at step {self.total}, saved; the same command goes on")
        elif self.step == 0:
            self.checkpoint(f"epoch {self.epoch}/{self.args.epochs}")
        elif due:
            self.checkpoint()
        return bool(stop)

    def means(self):
        """Means over steps and processes since the last reading: only this waits for the device."""
        if not self.losses:
            return {}
        values = torch.stack(self.losses).float()  # (steps, terms)
        values, self.losses = (all_reduce(values) / world()[1]).cpu(), []
        for step, row in enumerate(values, self.total - len(values) + 1):
            named = zip(self.names, row.isfinite(), strict=True)
            bad = [name for name, finite in named if not finite]
            if bad:  # name the last bad term: the total is listed first
                raise UserError(f"loss term {bad[-1]} is not finite at step {step}; the last good "
                                "checkpoint is kept; use a lower --lr, or --amp off")
        return dict(zip(self.names, values.mean(0).tolist(), strict=True))

    def log(self, record):
        images = (self.total - self.logged_step) * self.batch
        line = {"step": self.total, **self.means(), **record, "seconds": now() - self.began,
                "images_s": images / (now() - self.logged_time)}
        self.logged_step, self.logged_time = self.total, now()
        shown = ("total", "entropy", "rank", "images_s")
        self.bar.set_postfix({k: line[k] for k in shown if k in line})
        if world()[0] > 0:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error}); the last checkpoint is kept") from None

    def checkpoint(self, text=""):
        """Save, if the losses are finite; all processes wait: one that ends early ends the others."""
        self.means()
        if world()[0] == 0:
            self.save(self.position())
        all_reduce(torch.zeros(1))
        self.saved = now()
        if text:
            say(f"{Path(self.args.out).name}: {text}, {now() - self.began:.0f} s")

    def close(self):
        self.bar.close()
        on_signal(leave)


def load_parts(parts, state):
    """State dicts of a checkpoint into {name: module, optimiser or scaler}. Raises UserError."""
    for name, part in parts.items():
        try:
            if state[name]:  # a scaler's is empty where it was not fp16
                part.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"the checkpoint's {name} is of another model: {reason}") from None


# ==== runtime: flags, errors ======================================================================
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # of this process
DATA_FLAGS = {
    "data": ("", "folder of images, or DIR with train/ and val/"),
    "out": ("", "what to write"),
    "noise": ("none", "synthetic: gauss100, shot3, camera30,5 ...; none: images are noisy already"),
    "noise_seed": (0, "base seed of the noise; the same in every stage"),
    "range": ([], "LOW,HIGH: values of files deeper than 8 bit that become black and white (--range=-1000,400); "
                  "if not given, measured on the training images"),
}
RUNNING_FLAGS = {
    "device": ("auto", "cuda, cuda:1, cpu"),
    "amp": ("auto", "auto: bf16 on GPUs and CPUs with units for it, fp16 on other GPUs, else off"),
    "workers": (min(16, cores), "processes that read and cut images, of each process"),
}
TRAINING_FLAGS = {
    "seed": (0, "of everything but the noise"),
    "cache_gb": (4.0, "sets up to this size are decoded once and kept in memory, by each process"),
    "log_steps": (10, "steps between two lines of log.jsonl"),
    "save_minutes": (10.0, "between two checkpoints; one at every epoch's end, too"),
}
CHOICES = {"amp": ["auto", "bf16", "fp16", "off"]}
FREE = {"out", "preset", "workers", "device", "amp", "cache_gb", "log_steps", "save_minutes"}
PATHS = {"denoised", "denoiser", "run", "weights", "anchor_from", "init", "init_backbone"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def floats(text):
    return [float(v) for v in text.split(",")]  # '10,5' -> [10.0, 5.0]


def read_flags(argv, doc, presets, groups, choices=(), positive=()):
    """The flags of a stage as a namespace. presets: {name: {flag: default}}. groups: {title: {flag:
    (default, help)}}; a flag has its default's type. choices: {flag: [values]}. positive: flags that
    must be more than 0; every number is at least 0 and finite. Raises UserError."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="demo", choices=list(presets),
                       help="a set of defaults, the same for every stage; flags override it")
    parser = Parser(parents=[first], description=doc, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = CHOICES | dict(choices)
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for name, (default, text) in flags.items():
            kind = floats if isinstance(default, list) else type(default)
            kw = {"type": kind, "choices": choices.get(name)}
            if kind is bool:
                kw = {"action": argparse.BooleanOptionalAction}
            text = text.replace("%", "%%") + " (default %(default)s)"
            group.add_argument(f"--{name}", default=default, help=text, **kw)
    preset = first.parse_known_args(argv)[0].preset
    parser.set_defaults(**presets[preset])  # before --help shows them
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if name in ("data", "out") and not value:
            raise UserError(f"--{name} is needed, and not empty")
        if name == "range":
            check_limits(value)
            continue
        for number in value if isinstance(value, list) else [value]:
            check_number(name, number, name in positive)
    return args


def check_limits(limits):
    finite = all(map(math.isfinite, limits))
    if limits and (len(limits) != 2 or not finite or limits[0] >= limits[1]):
        raise UserError("--range: must be two numbers, the lower one first: --range=-1000,400")


def check_number(name, value, positive):
    if isinstance(value, str):
        return
    limit = 2**63 if isinstance(value, int) else math.inf
    if not 0 <= value < limit or positive and not value:
        least = "more than" if positive else "at least"
        raise UserError(f"--{name} {value}: must be {least} 0 and less than {limit:.2g}")


def report_error(error):
    """Print what ended a process: in one line, but a defect of ours with its traceback."""
    lines = (str(error) or type(error).__name__).splitlines()
    if isinstance(error, UserError):
        line = lines[-1]  # a worker's has its traceback before it
        print(f"error: {line.removeprefix('common.UserError: ')}", file=sys.stderr)
    elif isinstance(error, (OSError, MemoryError)) or "allocate" in lines[0]:
        print(f"error: {lines[0]}", file=sys.stderr)
    elif world()[1] == 1:
        raise error
    elif isinstance(error, dist.DistError) or re.search("gloo|NCCL", str(error)):
        print("stopped: another process has failed", file=sys.stderr)
    else:
        traceback.print_exception(error)


def run(main):
    """Call main() and exit. Of several processes, one that fails waits for no other: torchrun ends them."""
    on_signal(leave)
    try:
        code = main() or 0
    except Exception as error:
        report_error(error)
        code = 2
    if dist.is_initialized():
        if code == 0:
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)  # not through the interpreter's end: Gloo's threads now and then abort it
    sys.exit(code)
