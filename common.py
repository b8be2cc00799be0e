"""Everything that the three stages share, in reading order: noise, images, crops, ViT, losses, schedules, runtime.

Shapes in comments: B images, C channels, H x W pixels, N patches, D width, K prototypes, M masked patches. Sections
are those of "Ditch the Denoiser" (arXiv 2505.12191); DINOv2 is arXiv 2304.07193.
"""

import argparse
import functools
import hashlib
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
from collections import OrderedDict
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

class UserError(Exception):
    """Bad input: one line that says what is wrong, which file or flag, what to do."""

# ==== noise: x in [0, 1], one fixed draw per image (section 3 of the paper, and two models that real fields meet) ====
NOISES = {}  # name -> (function, inverse, most)

def noise(name, inverse=False, most=math.inf):
    """Register a noise model `f(x, level, rng) -> x with noise`.
    x: float32 (H, W, C) in [0, 1], clipped later; level: the number in the spec; rng: numpy Generator of this image.
    inverse: a smaller level is worse. most: the largest level that makes sense."""
    return lambda function: NOISES.setdefault(name, (function, inverse, most))[0]

@noise("gauss")  # level: sigma on the 0-255 scale
def gauss(x, level, rng):
    return x + level / 255 * rng.standard_normal(x.shape, np.float32)

@noise("shot", inverse=True, most=1e9)  # level: photons at full brightness
def shot(x, level, rng):
    return rng.poisson(x * level) / level

@noise("speckle")  # level: standard deviation of the multiplicative noise
def speckle(x, level, rng):
    return x + x * level * rng.standard_normal(x.shape, np.float32)

@noise("rician")  # magnitude MRI; level: sigma of each of the two channels on the 0-255 scale
def rician(x, level, rng):
    return np.hypot(gauss(x, level, rng), gauss(np.zeros_like(x), level, rng))

@noise("impulse", most=1)  # salt and pepper; level: fraction of values replaced, half by 0 and half by 1
def impulse(x, level, rng):
    return np.where((u := rng.random(x.shape, np.float32)) < level, u < level / 2, x)

def parse_noise(spec):
    """'gauss100' -> ('gauss', 100.0, 100.0); 'gauss50-255' -> ('gauss', 50.0, 255.0); 'none' -> None.
    Raises UserError for an unknown name or a level that is not a positive number."""
    if spec == "none":
        return None
    names = "|".join(sorted(NOISES, key=len, reverse=True))
    match = re.fullmatch(rf"({names})(\d*\.?\d+)(?:-(\d*\.?\d+))?", spec)
    if not match:
        raise UserError(f"--noise {spec}: unknown noise; use none, or a level of {', '.join(NOISES)}: gauss100")
    name, low, high = match[1], float(match[2]), float(match[3] or match[2])
    if not 0 < low <= high <= NOISES[name][2]:
        raise UserError(f"--noise {spec}: levels must be more than 0, up to {NOISES[name][2]:g}, the lower one first")
    return name, low, high

def noise_draw(spec, key, seed=0):
    """(model, level, rng) of one image: the generator is a hash of base seed and relative path, never of order."""
    name, low, high = parse_noise(spec)
    digest = hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogateescape")).digest()
    rng = np.random.default_rng(np.frombuffer(digest, "<u4"))
    level = low if low == high else rng.uniform(low, high)
    return NOISES[name][0], level, rng

def add_noise(image, spec, key, seed=0):
    """Noise of `spec` on one image: float32 (H, W, C) in [0, 1] to the same, clipped, before 8-bit rounding.
    key: the image's path relative to the data folder ('train/cat/1.png'): the same key and seed give the same bits."""
    if spec == "none":
        return image
    model, level, rng = noise_draw(spec, key, seed)
    return np.clip(model(image, level, rng), 0, 1).astype(np.float32)

# ==== images: a folder is a sorted list of relative paths; reading gives uint8 (H, W, C) ============================
Image.init()
SUFFIXES = {s for s, f in Image.registered_extensions().items() if f in Image.OPEN and f != "MPEG"} | {".npy"}
CACHE = Path(torch.hub.get_dir()).with_name("ditch-denoiser")  # of scans, where torch keeps its own; may be deleted
LARGE = 10_000  # images of a folder whose scan is kept

def list_images(root):
    """Relative posix paths of all images below root, sorted; what is hidden is passed over, links followed once."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        # sorted: the same path on every machine where a link leads to a folder twice
        subfolders[:] = sorted(f for f in subfolders if f[0] != ".")
        if os.path.realpath(folder) in seen:  # a link in a loop
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        base = Path(folder).relative_to(root)
        found += [(base / f).as_posix() for f in files if f[0] != "." and os.path.splitext(f)[1].lower() in SUFFIXES]
    return sorted(found)

def ends_whole(path):
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        return file.read().endswith((b"\xff\xd9", b"IEND\xaeB`\x82"))  # JPEG, PNG

def read_image(path, header=False):
    """One file, upright: (H, W, C) of any real dtype, in its own depth but for colour, of which Pillow gives 8 bit;
    palette, alpha and CMYK become RGB. Raises UserError for what is no whole image. header: zeros of the shape for a
    PNG or JPEG that ends as it should."""
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise OSError("not a file" if path.exists() else "it is gone, or a link to nothing; was the folder moved?")
        if path.stat().st_size == 0:
            raise OSError("empty file")
        if path.suffix.lower() == ".npy":
            with open(path, "rb") as file:
                x = np.lib.format.read_array(file, allow_pickle=False)
            if x.ndim not in (2, 3) or 0 in x.shape:
                raise ValueError(f"shape {x.shape} is neither (H, W) nor (H, W, C)")
        else:
            with Image.open(path) as image:
                grey = image.mode[0] in "1LIF" and image.mode != "LAB"
                # the orientation as it stands before the pixels: a PNG's own getexif() would decode it whole
                turned = Image.Image.getexif(image).get(0x0112) in (5, 6, 7, 8)
                if header and image.format in ("PNG", "JPEG") and ends_whole(path):
                    size = image.size if turned else image.size[::-1]
                    return np.broadcast_to(np.uint8(0), (*size, 1 if grey else 3))
                image = ImageOps.exif_transpose(image)
                if image.mode in ("LA", "1"):
                    image = image.convert("L")
                elif not grey:
                    image.info.pop("transparency", None)  # alpha is dropped; Pillow would warn
                    image = image.convert("RGB")
                x = np.array(image)
                if image.mode == "I":  # Pillow's container for 16-bit files
                    if x.min() < 0 or x.max() > 65535:
                        raise ValueError("32-bit integers have no known range; save 16 bit or .npy")
                    x = x.astype(np.uint16)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{path}: not a readable image ({error}); repair it or move it out of the folder") from None
    if x.dtype.kind not in "iu":
        to_float(x, path)  # checks the type and the values
    return x[:, :, None] if x.ndim == 2 else x

def to_float(x, path=""):
    """Any dtype to float32 [0, 1] by the dtype's range; floats as they are, checked. Raises UserError."""
    if x.dtype == np.uint8:
        return x / np.float32(255)  # the same in float32, fast
    if x.dtype.kind in "iu":
        low, high = float(np.iinfo(x.dtype).min), float(np.iinfo(x.dtype).max)
        return ((x - low) / (high - low)).astype(np.float32)
    if x.dtype.kind not in "fb":
        raise UserError(f"{path}: dtype {x.dtype} is not an image; save integers or floats in [0, 1]")
    x = x.astype(np.float32)
    if not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        raise UserError(f"{path}: float values must be finite and in [0, 1], found {x.min():g} to {x.max():g}; rescale")
    return x

def to_uint8(x):
    return np.rint(x * np.float32(255)).astype(np.uint8)  # [0, 1] to 0..255, rounded

def parallel(function, items, name, workers=None):
    """[function(i) for i in items] by threads, with a progress bar; the first error ends it."""
    size = 1 + len(items) // 10_000  # of a task: a million of them would need memory
    parts = thread_map(lambda start: [function(i) for i in items[start:start + size]], range(0, len(items), size),
                       max_workers=workers, desc=name, leave=False, disable=None)
    return [x for part in parts for x in part]

def scan(root, paths):
    """Height, width, channels and bytes of all files: array (N, 4). A large folder's is kept in CACHE, named by a
    fingerprint of paths, sizes, times of change: the next start reads no image, a changed folder is scanned anew."""
    def stat(path):
        with suppress(OSError):
            return os.stat(f"{root}/{path}")
        read_image(root / path)  # raises what is wrong with it
    stats = parallel(stat, paths, "list")
    if large := len(paths) >= LARGE:
        names = [f"{path} {s.st_size} {s.st_mtime_ns}" for path, s in zip(paths, stats, strict=True)]
        kept = CACHE / f"{digest(names)}.pth"
        with suppress(UserError):  # none yet, or damaged
            return load_checkpoint(kept)["infos"].numpy()
        say(f"{root}: reading the headers of {len(paths)} images; kept in {kept}")
    shapes = parallel(lambda path: read_image(root / path, header=True).shape, paths, "scan")
    infos = np.column_stack([shapes, [s.st_size for s in stats]])
    if large:
        with suppress(UserError):  # no room for it: the next start scans again
            write_atomic(kept, lambda file: torch.save({"infos": torch.from_numpy(infos)}, file))
    return infos

def digest(names):
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:32]

class Folder:
    """The images of one split. `read(i, source)` gives uint8 (H, W, C) of source noisy, clean or denoised.
    data: DIR with train/ and val/, or, for split 'train', any folder of images. spec: synthetic noise put on at
    reading, 'none' where the images are noisy already. denoised: folder of the same relative paths, any suffix.
    channels: of the training images, where this is another split; grey serves as colour."""
    def __init__(self, data, split="train", spec="none", seed=0, denoised=None, channels=None):
        parse_noise(spec)
        self.data, self.spec, self.seed = Path(data), spec, seed
        if not self.data.is_dir():
            raise UserError(f"--data {data}: no such folder")
        root = self.data / split
        if split == "train" and not root.is_dir():
            root = self.data
            if (root / "val").is_dir():
                raise UserError(f"{root}: has val/, but no train/")
        self.paths = [(root.relative_to(self.data) / p).as_posix() for p in list_images(root)]
        if not self.paths:
            raise UserError(f"{root}: no images found; no such folder, or no .png, .jpg, .tif, .npy or the like in it")
        infos = scan(self.data, self.paths)
        self.sizes, self.bytes = torch.from_numpy(infos[:, :2]), infos[:, 3].tolist()  # (N, 2) height, width
        found = {int(k): self.paths[i] for k, i in zip(*np.unique(infos[:, 2], return_index=True), strict=True)}
        self.channels = channels or max(found)
        if set(found) - {self.channels, 1 if self.channels == 3 else self.channels}:
            raise UserError(f"{root}: files differ in their number of channels, "
                            + ", ".join(f"{p} has {c}" for c, p in sorted(found.items()))
                            + (f", the training images {channels}" if channels else ""))
        self.denoised = denoised and self.match(Path(denoised))

    def match(self, root):
        """The denoised file of each image. Raises UserError where one is missing, of another size than the image, or
        made by denoise.py of other noise."""
        if (note := root / "made_by.json").exists():
            check_config(read_json(note), {"noise": self.spec, "noise_seed": self.seed}, {"denoiser"}, root)
        found, stems = {os.path.splitext(p)[0]: p for p in list_images(root)}, self.stems()
        if lacking := [p for p, stem in zip(self.paths, stems, strict=True) if stem not in found]:
            raise UserError(f"{root}: {len(lacking)} of {len(self)} denoised images are missing, {lacking[0]} "
                            "first; denoise.py apply makes those that are missing")
        paths = [found[stem] for stem in stems]
        for i, info in enumerate(scan(root, paths).tolist()):
            self.check(i, root / paths[i], info[:3])
        return [root / p for p in paths]

    def check(self, i, path, shape):
        """Raises UserError unless a file of this shape can be image i; grey serves as colour."""
        expected = (*self.sizes[i].tolist(), self.channels)
        if tuple(shape) not in {expected, (*expected[:2], 1 if self.channels == 3 else self.channels)}:
            raise UserError(f"{path}: is {tuple(shape)}, but its image {self.paths[i]} is {expected} "
                            "(height, width, channels)")

    def __len__(self):
        return len(self.paths)

    def stems(self):
        """Paths without suffix, which name the denoised images. Raises UserError where two are the same."""
        paths = {}
        for p in self.paths:
            if (other := paths.setdefault(os.path.splitext(p)[0], p)) != p:
                raise UserError(f"{self.data}: {other} and {p} would share a denoised image; rename one of them")
        return list(paths)

    def read(self, i, source="noisy"):
        """Image i as uint8 (H, W, C). Raises UserError for a file that cannot be used."""
        key = self.paths[i]
        path = self.denoised[i] if source == "denoised" else self.data / key
        x = read_image(path)
        self.check(i, path, x.shape)
        if x.shape[2] < self.channels:  # a grey image among colour ones
            x = np.broadcast_to(x, (*x.shape[:2], self.channels))
        if source == "noisy" and self.spec != "none":
            return to_uint8(add_noise(to_float(x, path), self.spec, key, self.seed))
        return np.ascontiguousarray(x) if x.dtype == np.uint8 else to_uint8(to_float(x, path))

    def __str__(self):
        """The same for the same names and sizes of files, wherever they lie: a checkpoint's value of --data."""
        names = [f"{p} {size}" for p, size in zip(self.paths, self.bytes, strict=True)]
        return f"{len(self)} images of {self.channels} channels, {digest(names)}"

    def labels(self):
        """Class name of each image: the folder below the split."""
        if any(p.count("/") < 2 for p in self.paths):
            raise UserError(f"{self.data}: labels need a folder a class: train/<class>/ and val/<class>/")
        return [p.split("/")[1] for p in self.paths]

    def stats(self, most=2000):
        """Per-channel mean and standard deviation of the noisy images in [0, 1], from up to `most` of them."""
        picks = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int))
        def moments(i):  # (3, C): pixels, sum, sum of squares
            x = self.read(i).reshape(-1, self.channels) / 255.0
            return np.stack([np.full(self.channels, len(x)), x.sum(0), (x * x).sum(0)])
        count, first, second = sum(parallel(moments, picks, "statistics"))
        mean = first / count
        return mean.tolist(), np.sqrt(np.maximum(second / count - mean**2, 1e-8)).tolist()

class Batches:
    """uint8 batches of a Folder: list of one (B, C, H, W) tensor per source, and sizes (B, 2).
    Sets of at most cache_gb are decoded once and stay on the device; larger ones stream through a DataLoader.
    Images are padded right and below to the largest of the batch."""
    def __init__(self, folder, sources, device, cache_gb=4.0, workers=2):
        self.folder, self.sources, self.device, self.workers = folder, sources, device, workers
        (height, width), extreme = folder.sizes.amax(0).tolist(), [folder.paths[i] for i in folder.sizes.argmax(0)]
        if height * width > max(1e8, 4 * folder.sizes.prod(1).max()):
            raise UserError(f"{' and '.join(extreme)}: cannot be padded to a common {height} x {width}; take one away")
        size = len(folder) * folder.channels * height * width
        self.cache = None
        if size * len(sources) <= cache_gb * 1e9:
            items = parallel(self.__getitem__, range(len(folder)), "read", max(1, workers))
            self.cache = [x.to(device) for x in pad_batch(items)[0]]

    def epoch(self, batches):
        """Yield (images, sizes) for every list of indices in `batches`."""
        if self.cache is not None:
            for index in batches:
                sizes = self.folder.sizes[index]
                height, width = sizes.amax(0).tolist()
                where = torch.as_tensor(index, device=self.device)
                yield [c[where, :, :height, :width] for c in self.cache], sizes
            return
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=batches, collate_fn=pad_batch, num_workers=self.workers,
            pin_memory=self.device.type == "cuda", multiprocessing_context="fork" if self.workers else None,
            worker_init_fn=functools.partial(end_with, os.getpid()))
        for images, sizes in loader:
            yield [x.to(self.device, non_blocking=True) for x in images], sizes

    def __getitem__(self, i):
        return [self.folder.read(i, s) for s in self.sources]

def end_with(parent, _):
    """A worker ends with its process; torch's own watch misses one that dies while the worker starts."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()

def pad_batch(items):
    """[per image: [uint8 (H, W, C) per source]] -> [uint8 (B, C, Hmax, Wmax) per source], sizes (B, 2)."""
    sizes = torch.tensor([i[0].shape[:2] for i in items])
    height, width = sizes.amax(0).tolist()
    batch = [torch.zeros(len(items), i.shape[2], height, width, dtype=torch.uint8) for i in items[0]]
    for b, item in enumerate(items):
        for out, x in zip(batch, item, strict=True):
            out[b, :, :x.shape[0], :x.shape[1]] = torch.tensor(x).permute(2, 0, 1)
    return batch, sizes

# ==== crops: parameters are drawn on the CPU for the global batch, applied as batched operations on the device ======
def draw_boxes(sizes, scale, gen, aspect=(3 / 4, 4 / 3), tries=10):
    """Random resized crop: sizes (B, 2) of the images to integer boxes (B, 4) of top, left, height, width.
    Area uniform in `scale` of the image, aspect log-uniform, the first of ten tries that fits, else the largest
    central box of an allowed aspect (torchvision's rule)."""
    height, width = sizes.double().split(1, dim=1)  # (B, 1)
    area = height * width * torch.empty(len(sizes), tries, dtype=torch.double).uniform_(*scale, generator=gen)
    ratio = torch.empty_like(area).uniform_(*map(math.log, aspect), generator=gen).exp()
    w, h = (area * ratio).sqrt().round().clamp(min=1), (area / ratio).sqrt().round().clamp(min=1)  # (B, tries)
    fits = (w <= width) & (h <= height)
    first, found = fits.int().argmax(1, keepdim=True), fits.any(1, keepdim=True)
    w = torch.where(found, w.gather(1, first), width.minimum((height * aspect[1]).round()))
    h = torch.where(found, h.gather(1, first), height.minimum((width / aspect[0]).round()))
    place = torch.rand(2, len(sizes), 1, dtype=torch.double, generator=gen).where(found, torch.tensor(0.5).double())
    top, left = (place[0] * (height - h + 1)).floor(), (place[1] * (width - w + 1)).floor()
    return torch.cat([top, left, h, w], 1)

def draw_view(sizes, scale, gen, blur_p, solarize_p=0.0, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, grey_p=0.2):
    """All random parameters of one view of B images (DINOv2's augmentation): dict of CPU tensors (B, ...)."""
    n, chance = len(sizes), lambda p: torch.rand(len(sizes), generator=gen) < p
    factors = (torch.rand(n, 4, generator=gen) * 2 - 1) * torch.tensor(jitter)  # brightness, contrast, saturation, hue
    factors += torch.tensor([1.0, 1.0, 1.0, 0.0])
    return {"boxes": draw_boxes(sizes, scale, gen), "flip": chance(0.5), "jitter": chance(jitter_p), "factors": factors,
            "order": torch.rand(n, 4, generator=gen).argsort(1), "grey": chance(grey_p), "blur": chance(blur_p),
            "sigma": torch.empty(n).uniform_(0.1, 2.0, generator=gen), "solarize": chance(solarize_p)}

def bicubic_taps(size, start, length, flip, out):
    """Antialiased bicubic interpolation (Pillow's, a = -0.5) along one axis. size, start, length (B,): extent of the
    image and of the box; flip (B,) mirrors the output. Gives the first and one past the last sample of each output
    (B, out) and the weights from the first on (B, out, taps). Samples beyond the box are used, beyond the image not."""
    size, start, length = (v[:, None].float() for v in (size, start, length))  # (B, 1)
    index = torch.arange(out).expand(len(size), out)
    index = torch.where(flip[:, None], out - 1 - index, index)
    step = length / out
    stretch = step.clamp(min=1)  # downsampling widens the kernel: antialias
    centre = start + (index + 0.5) * step  # (B, out)
    low, high = (centre - 2 * stretch + 0.5).floor().clamp(min=0), (centre + 2 * stretch + 0.5).floor().minimum(size)
    x = low[..., None] + torch.arange(int((high - low).max()))
    d = ((x + 0.5 - centre[..., None]) / stretch[..., None]).abs()
    w = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2)
    w *= (x < high[..., None]) & (d < 2)
    return low.long(), high.long(), w / w.sum(-1, keepdim=True)

def bicubic_matrix(low, weights, first, length):
    """The taps as one matrix per image over the samples from `first` on: (B, out, length)."""
    index = (low[..., None] + torch.arange(weights.shape[-1], device=low.device) - first).clamp(max=length - 1)
    return weights.new_zeros(*low.shape, length).scatter_add_(2, index, weights)

def resample(images, sizes, boxes, flips, out, top=None):
    """Crop, resize and flip: exactly Pillow's `resize((out, out), BICUBIC, box=...)`, horizontal pass first.
    images (B, C, H, W), padded right and below; sizes (B, 2) height, width of each; boxes (B, 4) top, left, height,
    width; flips (B,) bool. Gives float (B, C, out, out). top: the largest value, at which Pillow clips after each
    pass; by default 255 where the images exceed 1, else 1."""
    top = top or (255.0 if images.max() > 1 else 1.0)
    (B, C, H, W), device, result = images.shape, images.device, []
    sizes, boxes, flips = sizes.cpu(), boxes.cpu(), flips.cpu()
    taps = [bicubic_taps(sizes[:, k], boxes[:, k], boxes[:, k + 2], flips & (k == 1), out) for k in range(2)]
    # large images one by one on a CPU, where reading only what the box needs pays; on GPUs as many as fit into 1 GB
    each = (1 if H * W > 2**15 else B) if device.type == "cpu" else max(1, min(B, 2**28 // (C * H * W)))
    for i in range(0, B, each):
        part, matrices = images[i:i + each], []
        for axis, (low, high, weights) in enumerate(taps):
            first = int(low[i:i + each].min()) if each < B else 0
            length = (int(high[i:i + each].max()) if each < B else part.shape[2 + axis]) - first
            part = part.narrow(2 + axis, first, length)
            low, weights = (v[i:i + each].to(device, non_blocking=True) for v in (low, weights))
            matrices.append(bicubic_matrix(low, weights, first, length))
        rows, columns = matrices
        x = part.float().reshape(len(part), -1, part.shape[3]) @ columns.mT  # (B, C H, out)
        x = rows[:, None] @ x.clamp_(0, top).unflatten(1, (C, -1))  # (B, C, out, out)
        result.append(x.clamp_(0, top))
    return torch.cat(result)

def luma(x):
    """Grey value (B, 1, H, W): ITU-R 601 weights for RGB, the mean for any other number of channels."""
    weights = [0.299, 0.587, 0.114] if x.shape[1] == 3 else [1 / x.shape[1]] * x.shape[1]
    return sum(w * channel for w, channel in zip(weights, x.split(1, dim=1), strict=True))

def adjust_hue(x, f):
    """Turn the hue of RGB images (B, 3, H, W) in [0, 1] by f (B, 1, 1, 1) full circles, in HSV space."""
    value, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - least
    r, g, b = x.split(1, dim=1)
    hue = torch.where(g == value, 2 + (b - r) / chroma, 4 + (r - g) / chroma)  # in sixths of the circle
    hue = torch.where(r == value, (g - b) / chroma, hue).nan_to_num_(0).add_(6 * f).remainder_(6)
    near = (hue - x.new_tensor([0.0, 2.0, 4.0])[:, None, None]).abs_().sub_(3).abs_()  # to red, green, blue: 3 to 0
    return torch.addcmul(least, chroma, near.sub_(1).clamp_(0, 1))

def gaussian_blur(x, sigma, radius=4):
    """Blur (B, C, S, S) by sigma (B,) pixels, kernel 2 radius + 1, reflected borders: a convolution along each axis."""
    B, C, S, _ = x.shape
    radius = min(radius, S - 1)
    kernel = torch.exp(-torch.arange(-radius, radius + 1, device=x.device) ** 2 / (2 * sigma[:, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)  # (B C, 2 radius + 1)
    x = F.pad(x, (radius,) * 4, mode="reflect").flatten(0, 1)[None]  # (1, B C, ...): each channel has its own kernel
    x = F.conv2d(F.conv2d(x, kernel[:, None, None, :], groups=B * C), kernel[:, None, :, None], groups=B * C)
    return x.view(B, C, S, S)

def augment(images, sizes, view, out):
    """One view of a batch: uint8 (B, C, H, W) to float (B, C, out, out) in [0, 1], with parameters of draw_view.
    The same parameters on a denoised batch give its paired crops. Channels other than 3: no hue, saturation, grey
    or solarise. Order: crop and flip, jitter in each image's own order, grey, blur, solarise."""
    x = resample(images, sizes, view["boxes"], view["flip"], out, top=255.0) / 255
    rgb = x.shape[1] == 3
    def some(where, f, *parameters):  # f of some of the images
        if where.any():
            index, *chosen = (p.to(x.device, non_blocking=True) for p in (
                where.nonzero()[:, 0], *(p[where] for p in parameters)))
            x.index_copy_(0, index, f(x.index_select(0, index), *chosen))
    for kinds in view["order"].T:  # 0 brightness, 1 contrast, 2 saturation, 3 hue
        # the first three mix the image with black, its mean grey, its grey: f x + (1 - f) other; f = 1 changes nothing
        mixed = view["jitter"] & (kinds < (3 if rgb else 2))
        f = torch.where(mixed, view["factors"].gather(1, kinds[:, None])[:, 0], 1.0)
        grey, (f, kind) = luma(x), (v.to(x.device, non_blocking=True)[:, None, None, None] for v in (f, kinds))
        other = torch.where(kind == 2, grey, grey.mean((2, 3), keepdim=True)) * (kind > 0)
        x = torch.lerp(other, x, f).clamp_(0, 1)
        some(view["jitter"] & (kinds == 3) & rgb, adjust_hue, view["factors"][:, 3, None, None, None])
    some(view["grey"] & rgb, lambda y: luma(y).expand_as(y))
    some(view["blur"], gaussian_blur, view["sigma"])
    some(view["solarize"] & rgb, lambda y: torch.where(y >= 0.5, 1 - y, y))
    return x

def draw_masks(crops, grid, gen, ratio=(0.1, 0.5), p=0.5, least=4, aspect=(0.3, 1 / 0.3), rounds=10, tries=10):
    """iBOT's block-wise masks for `crops` crops of grid = (rows, columns) patches: bool (crops, rows * columns).
    A share p of the crops is masked, their ratios stratified over `ratio`; blocks of at least `least` patches and of
    log-uniform aspect, the first of `tries` that fits, are added until the number is reached, or for `rounds`: a crop
    may fall a few patches short, but not below the lowest ratio. All crops in one batched rejection loop."""
    (rows, columns), patches = grid, math.prod(grid)
    n = int(crops * p)
    low, high = math.ceil(ratio[0] * patches), int(ratio[1] * patches)
    low, least = min(max(low, least), high), min(least, high)  # small grids: a block, but never more than the most
    masks = torch.zeros(crops, rows, columns, dtype=torch.bool)
    strata = (torch.arange(n) + torch.rand(n, generator=gen)) / n  # one uniform draw in each of n equal strata
    goal = ((ratio[0] + strata * (ratio[1] - ratio[0])) * patches).round().clamp(low, high)[:, None]
    chosen = torch.randperm(crops, generator=gen)[:n]
    mask = masks[chosen]  # (n, rows, columns)
    r, c = torch.arange(rows)[:, None], torch.arange(columns)
    for turn in range(100 * rounds):
        left = goal - mask.sum((1, 2))[:, None]  # (n, 1)
        if not (left > (0 if turn < rounds else goal - low)).any():
            break
        u = torch.rand(4, n, tries, generator=gen)
        area = least + u[0] * (left - least).clamp(min=0)
        shape = (math.log(aspect[0]) + u[1] * (math.log(aspect[1]) - math.log(aspect[0]))).exp()
        h, w = (area * shape).sqrt().round().clamp(1, rows), (area / shape).sqrt().round().clamp(1, columns)
        y, x = (u[2] * (rows - h + 1)).floor(), (u[3] * (columns - w + 1)).floor()
        y, x, h, w = (v[..., None, None] for v in (y, x, h, w))
        block = (r >= y) & (r < y + h) & (c >= x) & (c < x + w)  # (n, tries, rows, columns)
        new = (block & ~mask[:, None]).sum((2, 3))
        fits = (new > 0) & (new <= left) & (block.sum((2, 3)) >= least)
        first = fits & (fits.cumsum(1) == 1)
        mask |= (block & first[..., None, None]).any(1)
    masks[chosen] = mask
    return masks.flatten(1)

# ==== ViT: state-dict keys of DINOv2 and timm =======================================================================
class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, gamma):
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D / heads)
        return scaled_linear(self.proj, gamma, x.transpose(1, 2).reshape(B, N, D))

def scaled_linear(linear, gamma, x):
    """gamma (D,) times linear(x), LayerScale: multiplied into the weights, which are fewer than the tokens."""
    if torch.get_autocast_dtype(x.device.type) == torch.float16 and torch.is_autocast_enabled(x.device.type):
        return gamma * linear(x)  # 1e-5 times a weight is below float16's normal numbers
    return F.linear(x, gamma[:, None] * linear.weight, gamma * linear.bias)

class Block(nn.Module):
    def __init__(self, dim, num_heads, init_values, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn, hidden = Attention(dim, num_heads), 4 * dim
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)))
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.full((dim,), init_values)}) for _ in range(2))
        self.drop_path = drop_path

    def drop(self, x, u):
        """Stochastic depth: in training, drop the branch of a sample where u (B,) < drop_path; mean kept."""
        if not self.training or self.drop_path == 0:
            return x
        return x * (u >= self.drop_path)[:, None, None] / (1 - self.drop_path)

    def forward(self, x, u, rows=None):
        """Tokens (B, N, D), uniform numbers u (2, B) for the drop path. rows (R,): flat indices of the tokens that are
        asked for; the MLP leaves out the others, and the result is (R, 1, D)."""
        x = x + self.drop(self.attn(self.norm1(x), self.ls1["gamma"]), u[0])
        if rows is not None:
            x, u = x.flatten(0, 1)[rows, None], u[:, rows // x.shape[1]]
        hidden = self.mlp.act(self.mlp.fc1(self.norm2(x)))
        return x + self.drop(scaled_linear(self.mlp.fc2, self.ls2["gamma"], hidden), u[1])

@functools.lru_cache
def resize_matrix(old, new, device):
    """Bicubic resizing (no antialias) of a grid old = (h, w) to new as one matrix (new, old): exact, deterministic."""
    with torch.inference_mode(False):  # the cached matrix also serves training
        basis = torch.eye(old[0] * old[1], device=device).reshape(-1, 1, *old)
        return F.interpolate(basis, size=new, mode="bicubic", align_corners=False).reshape(len(basis), -1).T

def resize_pos_embed(pos_embed, new):
    """Position embedding (1, 1 + h h, D) of a square grid to one of new = (rows, columns)."""
    old = math.isqrt(pos_embed.shape[1] - 1)
    if (old, old) == tuple(new):
        return pos_embed
    with torch.autocast(pos_embed.device.type, enabled=False):
        patches = resize_matrix((old, old), tuple(new), pos_embed.device) @ pos_embed[0, 1:].float()
    return torch.cat([pos_embed[:, :1], patches[None]], 1)

class VisionTransformer(nn.Module):
    """ViT with LayerScale. `model(x)`: (B, C, H, W) to normed class tokens (B, D); H and W multiples of patch_size.
    `forward_features(x, masks)` gives {'cls': (B, D), 'patches': (B, N, D)}, both normed; picked (M,), flat indices of
    patches, asks for these alone, at less cost: 'patches' is (M, D) then. masks (B, N) bool puts the
    mask token in place of patches before the position embedding is added."""
    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=384, depth=12, num_heads=6, init_values=1e-5,
                 drop_path=0.0, registers=0):
        super().__init__()
        self.patch_size, self.embed_dim, self.registers = patch_size, embed_dim, registers
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.register_tokens = nn.Parameter(torch.randn(1, registers, embed_dim) * 1e-6) if registers else None
        blocks = (Block(embed_dim, num_heads, init_values, drop_path) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, 1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        self.apply(init_linear)

    def tokens(self, x, masks=None):
        """Images (B, C, H, W) to the blocks' input (B, 1 + registers + N, D)."""
        if x.shape[2] % self.patch_size or x.shape[3] % self.patch_size:
            raise ValueError(f"image of {tuple(x.shape[2:])} pixels is no multiple of the patch size {self.patch_size}")
        grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # (B, N, D)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + resize_pos_embed(self.pos_embed, grid)
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        return x

    def last_layers(self, x, n=1, masks=None, drop=None, picked=None):
        """forward_features after each of the last n blocks, the last one first; drop: uniform numbers (2 depth, B)
        that decide the drop path, drawn here if not given."""
        x, outputs, depth = self.tokens(x, masks), [], len(self.blocks)
        (B, N), rows = x.shape[:2], None
        patches = N - 1 - self.registers
        drop = torch.rand(2 * depth, B, device=x.device) if drop is None else drop
        if picked is not None:  # of the last block only these patches and the class tokens
            start = torch.arange(B, device=x.device) * N
            rows = torch.cat([start, start[picked // patches] + N - patches + picked % patches])
        for i, block in enumerate(self.blocks):
            x = block(x, drop[2 * i:2 * i + 2], rows if i == depth - 1 else None)
            outputs = [x, *outputs[:n - 1]]
        if picked is not None:
            x = self.norm(x[:, 0])
            return [{"cls": x[:B], "patches": x[B:]}]
        return [{"cls": y[:, 0], "patches": y[:, N - patches:]} for y in map(self.norm, outputs)]

    def forward_features(self, x, masks=None, drop=None, picked=None):
        return self.last_layers(x, 1, masks, drop, picked)[0]

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
        dim, depth, heads = ARCHS.get(arch) or (int(v) for v in arch.split(","))
        if min(dim, depth, heads) < 1 or dim % heads:
            raise ValueError
    except ValueError:
        raise UserError(f"--arch {arch}: use one of {', '.join(ARCHS)}, or WIDTH,DEPTH,HEADS: 128,4,4") from None
    return VisionTransformer(patch_size=patch_size, embed_dim=dim, depth=depth, num_heads=heads, **kw)

vit_tiny, vit_small, vit_base, vit_large = (functools.partial(make_vit, arch) for arch in ARCHS)

# ==== head and losses: softmax, cross-entropy and KoLeo in float32, whatever the autocast ===========================
STUDENT_TEMP = 0.1  # DINOv2 default

class DINOHead(nn.Module):
    """Tokens (..., in_dim) to prototype logits (..., out_dim): three-layer MLP, L2 normalise, weight-normed linear."""
    def __init__(self, in_dim, out_dim=65536, hidden_dim=2048, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
                                 nn.Linear(hidden_dim, bottleneck_dim))
        self.apply(init_linear)
        self.last_layer = nn.ParameterDict({"weight_g": torch.ones(out_dim, 1),  # keys of torch's weight_norm
                                            "weight_v": torch.empty(out_dim, bottleneck_dim)})
        nn.init.trunc_normal_(self.last_layer["weight_v"], std=0.02)

    def forward(self, x):
        g, v = self.last_layer["weight_g"], self.last_layer["weight_v"]
        return F.linear(F.normalize(self.mlp(x).float(), dim=-1), v * (g / v.norm(dim=1, keepdim=True)))

def softmax_center(logits, center, temp):
    """Teacher targets (M, K): softmax((logits - centre) / temp)."""
    return F.softmax((logits.float() - center).div_(temp), dim=-1)

def update_center(center, logits, momentum=0.9):
    """EMA of the mean teacher output over the rows of all processes: (1, K). After the targets were made."""
    total = all_reduce(F.pad(logits.float().sum(0), (0, 1), value=float(len(logits))))  # the last value: rows
    mean, rows = total[None, :-1] / total[-1].clamp(min=1), total[-1]
    return torch.where(rows > 0, center * momentum + mean * (1 - momentum), center)

def sinkhorn(logits, temp, iterations=3):
    """Sinkhorn-Knopp targets (M, K): rows sum to 1, prototypes used equally; rows of all processes; in log space."""
    log_q = logits.float() / temp
    for _ in range(iterations):
        most = F.pad(log_q, (0, 0, 0, 1), value=-1e30).amax(0, keepdim=True)  # also where this process has no row
        most = all_reduce(most, "MAX")
        log_q = log_q - most - all_reduce((log_q - most).exp().sum(0, keepdim=True)).log()
        log_q = F.log_softmax(log_q, dim=-1)
    return log_q.exp()

def cross_entropy(targets, logits):
    """-sum of targets * log softmax(logits / student temperature) per row: (..., K), (..., K) to (...). targets may be
    the sum of several."""
    return -(targets * F.log_softmax(logits.float() / STUDENT_TEMP, dim=-1)).sum(-1)

def dino_loss(student_logits, targets):
    """Cross-view class-token loss (DINOv2). student_logits: list of (B, K), the two global crops first, then the
    locals; targets (2, B, K), one per global view. Sum over the pairs of different views, divided by their number."""
    both = targets.sum(0)  # local crops meet both global views, a global crop the other one
    losses = [cross_entropy(targets[1 - s] if s < 2 else both, x).mean() for s, x in enumerate(student_logits)]
    return sum(losses) / (2 * len(student_logits) - 2)

def ibot_loss(student_logits, targets, weights, n_crops):
    """Masked-patch loss (iBOT). (M, K), (M, K), weights (M,) = 1 / masked patches of the row's crop; n_crops = 2B."""
    return (weights * cross_entropy(targets, student_logits)).sum() / n_crops

def koleo_loss(x):
    """-mean log distance to the nearest neighbour of L2-normalised rows (B, D), one view; in float32. 0 if alone."""
    if len(x) < 2:
        return x.sum() * 0.0
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1, eps=1e-8)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
        return -(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).log().mean()

def anchor_loss(student_logits, student_patches, targets, patch_targets, weights, n_crops):
    """Anchor: (DINO, iBOT) of the student on noisy crops against a frozen teacher's targets on the same crops denoised.
    Same pairs, divisors and masks as the live losses; no KoLeo."""
    return dino_loss(student_logits, targets), ibot_loss(student_patches, patch_targets, weights, n_crops)

# ==== schedules and parameter groups ================================================================================
def cosine(step, base, final, total, warmup=0, start=0.0):
    """Value at `step`: linear from start to base over `warmup` steps, then a cosine to final at `total`, then final."""
    if step >= total:
        return final
    if step < warmup:
        return start + (base - start) * step / max(1, warmup - 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

def param_multipliers(name, depth, layer_decay=0.9, patch_embed_mult=0.2):
    """(learning-rate multiplier, weight-decay multiplier) of a backbone parameter; the final norm's rate is whole."""
    block = re.match(r"blocks\.(\d+)", name)
    layer = int(block[1]) + 1 if block else depth + 1 if name.startswith("norm") else 0
    lr = layer_decay ** (depth + 1 - layer) * (patch_embed_mult if name.startswith("patch_embed") else 1)
    return lr, 0.0 if name.endswith("bias") or "norm" in name or "gamma" in name else 1.0

def param_groups(backbone, head, layer_decay=0.9, patch_embed_mult=0.2):
    """AdamW groups of parameters with the same multipliers; 'last' marks the head's freezable last layer."""
    groups = {}
    named = [(*param_multipliers(n, len(backbone.blocks), layer_decay, patch_embed_mult), False, p)
             for n, p in backbone.named_parameters()]
    named += [(1.0, 0.0 if n.endswith("bias") else 1.0, "last_layer" in n, p) for n, p in head.named_parameters()]
    for lr, wd, last, p in named:
        groups.setdefault((lr, wd, last), []).append(p)
    return [{"params": p, "lr_mult": lr, "wd_mult": wd, "last": last} for (lr, wd, last), p in groups.items()]

# ==== runtime: processes, precision, checkpoints, logs, signals, flags ==============================================
now = time.perf_counter
EXIT_STOPPED = 75  # a signal came: saved, the same command goes on (sysexits' EX_TEMPFAIL)

def on_signal(act):
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(s, act)

def leave(*_):
    """What a signal does outside of the loops: files are written whole or not at all, so the process may just end."""
    os.write(2, b"stopped; the same command goes on\n")
    os._exit(EXIT_STOPPED)

def world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)  # rank, processes

def setup(device="auto"):
    """Join the processes of torchrun, if any, and pick the device. Raises UserError. Gives torch.device."""
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: must be auto, cpu, cuda or cuda:N")
    if device == "cuda":
        device += f":{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's own protocol
    if device != "cpu":
        if int(device[5:]) >= (count := torch.cuda.device_count()):
            raise UserError(f"--device {device}: this machine has {count} CUDA devices; use cpu, or fewer processes")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device)

def all_reduce(x, op="SUM"):
    """x reduced over the processes, in place; x itself where there is one."""
    if world()[1] > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x

def gather_rows(x):
    """Rows (B, ...) of all processes in rank order (world * B, ...); only this process's rows carry a gradient."""
    rank, size = world()
    rows = [torch.empty_like(x) for _ in range(size)]
    if size > 1:
        dist.all_gather(rows, x.detach().contiguous())
    rows[rank] = x
    return torch.cat(rows)

def share(n, images):
    """Global batch of n, or of all images where there are fewer, this process's slice of it, and steps an epoch. Raises
    UserError where it does not divide by the processes."""
    rank, size = world()
    if images < n:
        say(f"warning: --batch_size {n} is larger than the set of {images} images; using {images}")
        n = images
    if n % size:
        raise UserError(f"--batch_size {n} does not divide by the number of processes, {size}")
    return n, slice(rank * n // size, (rank + 1) * n // size), images // n

def generator(*key):
    """CPU generator keyed by (seed, phase, epoch, step, ...): random draws need no saved state."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([len(key), *key]).generate_state(1)[0]))

def autocast(device, amp):
    """(autocast context factory, gradient scaler: the identity but for fp16) of --amp auto, bf16, fp16 or off."""
    if amp == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "off" if device.type == "cpu" else "bf16" if native else "fp16"
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16: is for GPUs; use bf16 or off")
    dtype = torch.bfloat16 if amp == "bf16" else torch.float16
    context = nullcontext if amp == "off" else functools.partial(torch.autocast, device.type, dtype)
    return context, torch.amp.GradScaler(device.type, enabled=amp == "fp16")

def write_atomic(path, write, sync=True):
    """write(file) into a temporary file beside path, flush, rename: path is whole or untouched. Raises UserError."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"{path}: cannot be written ({error}); what was there before is intact") from None
    finally:
        with suppress(OSError):
            tmp.unlink()

def write_json(path, data):
    write_atomic(path, lambda f: f.write((json.dumps(data, indent=1) + "\n").encode()))

def read_json(path, needs=()):
    try:
        data = json.loads(Path(path).read_text())
        if not isinstance(data, dict) or set(needs) - set(data):
            raise ValueError("not what the stage wrote")
        return data
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None

def save_checkpoint(path, state):
    """Atomic; the checkpoint before stays beside it as NAME.previous. Raises UserError where a value is not finite."""
    def ill(part, name=""):  # names of the tensors, at any depth, that are not finite
        for k, x in part.items():
            if isinstance(x, dict):
                yield from ill(x, f"{name}{k}.")
            elif torch.is_tensor(x) and not x.isfinite().all():
                yield f"{name}{k}"
    if bad := next(ill(state), None):
        raise UserError(f"{path}: {bad} is not finite; the last good checkpoint is kept; use a lower --lr")
    new = Path(f"{path}.new")
    for left in new.parent.glob(f".{new.name}.*.tmp"):  # by a killed process
        left.unlink(missing_ok=True)
    write_atomic(new, lambda f: torch.save(state, f))
    if os.path.exists(path):
        os.replace(path, f"{path}.previous")
    os.replace(new, path)

def load_checkpoint(path, required=True, needs=()):
    """State saved by save_checkpoint, on the CPU, without running code in it; the one before where this is damaged.
    None where there is none and required is False. needs: keys of this stage's checkpoints. Raises UserError."""
    problem = None
    for candidate in (f"{path}.new", path, f"{path}.previous"):  # .new: the process was killed before the renaming
        if os.path.exists(candidate):
            try:
                if zipfile.is_zipfile(candidate) and (part := zipfile.ZipFile(candidate).testzip()):
                    raise ValueError(f"{part} has a wrong checksum")  # at which torch does not look
                state = torch.load(candidate, map_location="cpu", weights_only=True)
                if lacking := set(needs) - set(state):
                    raise ValueError(f"another stage's: it has no {', '.join(sorted(lacking))}")
                if problem:
                    print(f"warning: {problem}; going on from {candidate}", file=sys.stderr)
                return state
            except Exception as error:  # torch.load raises many kinds for a damaged or hostile file
                reason = (str(error) or type(error).__name__).splitlines()[0][:120]
                problem = problem or f"{candidate}: cannot be loaded ({reason})"
    if problem or required:
        raise UserError(f"{problem}; move it away to start anew" if problem else f"{path}: no such checkpoint")

PATHS = {"denoised", "denoiser", "run", "anchor_from", "init", "init_backbone"}  # the same however a path is spelled

def check_config(saved, now, free, where):
    """A run goes on only with the settings it was started with. Raises UserError naming each field that differs."""
    saved, now = ({k: os.path.realpath(v) if k in PATHS and v else v for k, v in c.items()} for c in (saved, now))
    changed = [k for k in sorted(set(saved) | set(now)) if k not in free and saved.get(k) != now.get(k)]
    if changed:
        raise UserError(f"{where} holds a run with other settings; use the same flags or another --out: "
                        + ", ".join(f"--{k} {saved.get(k)} (now {now.get(k)})" for k in changed))

def read_log(path):
    """Records of a log.jsonl, [] where there is none; lines that a crash cut short or garbled are passed over."""
    records = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and "step" in r]

class Loop:
    """The clockwork of training: progress bar, log.jsonl, losses kept on the device, checkpoints, signals. SIGTERM,
    SIGINT and SIGUSR1 stop all processes after the step, saved. save() writes the checkpoint; it runs on rank 0."""
    def __init__(self, args, total, step, seconds, save):
        self.args, self.step, self.save, self.losses, self.asked = args, step, save, [], []
        on_signal(lambda *_: self.asked.append(1))
        self.began, self.saved, self.logged = now() - seconds, now(), (step, now())
        self.path = Path(args.out) / "log.jsonl"
        if all_reduce(torch.tensor([step, -step]), "MAX").sum():
            raise UserError(f"--out {args.out}: processes found different checkpoints; nodes must share this folder")
        if world()[0] == 0:  # on resume the lines after the checkpoint are dropped
            kept = [json.dumps(r) + "\n" for r in read_log(self.path) if r["step"] <= step]
            write_atomic(self.path, lambda f: f.write("".join(kept).encode()))
        self.bar = tqdm(total=total, initial=step, disable=world()[0] > 0 or None, unit="step")

    def means(self):
        """Means over steps and processes of the losses since the last reading; only here we wait for the device.
        Raises UserError at the first term that is not finite."""
        if not self.losses:
            return {}
        names, first = list(self.losses[0]), self.step - len(self.losses) + 1
        values = torch.stack([torch.stack(list(terms.values())).float() for terms in self.losses])  # (steps, terms)
        values, self.losses = (all_reduce(values) / world()[1]).cpu(), []
        if len(bad := (~values.isfinite()).nonzero()):
            step, term = max(bad[bad[:, 0] == bad[0, 0]].tolist())  # the last one: the total, their sum, comes first
            raise UserError(f"loss term {names[term]} is not finite at step {first + step}; the last good checkpoint "
                            "is kept; use a lower --lr, or --amp off")
        return dict(zip(names, values.mean(0).tolist(), strict=True))

    def tick(self, losses, batch, record):
        """After a step of `batch` images: losses, a dict of scalar tensors; record: what else a log line holds.
        True after a signal: saved, leave with EXIT_STOPPED."""
        self.losses.append({k: v.detach() for k, v in losses.items()})
        self.step += 1
        self.bar.update()
        if self.step % self.args.log_steps == 0:
            line = {"step": self.step, **self.means(), **record, "seconds": now() - self.began,
                    "images_s": (self.step - self.logged[0]) * batch / (now() - self.logged[1])}
            self.logged = self.step, now()
            self.bar.set_postfix({k: f"{line[k]:.3g}" for k in ("total", "entropy", "rank", "images_s") if k in line})
            if world()[0] == 0:
                line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
                try:
                    with open(self.path, "a") as f:
                        f.write(json.dumps(line) + "\n")
                except OSError as error:
                    raise UserError(f"{self.path}: cannot be written ({error}); the last checkpoint is kept") from None
        due = now() - self.saved > 60 * self.args.save_minutes
        stop, due = all_reduce(torch.tensor([float(bool(self.asked)), float(due)]), "MAX").bool().tolist()
        if stop or due:
            self.checkpoint(f"stopped at step {self.step}, saved; the same command goes on" if stop else "")
        return stop

    def checkpoint(self, text=""):
        """Save, unless a loss was not finite; all processes wait for it: one that ends before ends the others."""
        self.means()
        if world()[0] == 0:
            self.save(now() - self.began)
        all_reduce(torch.zeros(1))
        self.saved = now()
        if text:
            say(f"{Path(self.args.out).name}: {text}, {now() - self.began:.0f} s")

    def close(self):
        self.bar.close()
        on_signal(leave)

def say(*text):
    if world()[0] == 0:
        tqdm.write(" ".join(map(str, text)))  # above any progress bar

def floats(text):
    return [float(v) for v in text.split(",")]  # '10,5' -> [10.0, 5.0], the type of a flag

def span(text):
    if len(pair := floats(text)) != 2 or pair != sorted(pair):
        raise argparse.ArgumentTypeError(f"{text}: must be two numbers, the smaller one first")
    return pair

FREE = {"out", "preset", "device", "amp", "workers", "cache_gb", "log_steps", "save_minutes"}  # change no result

class Parser(argparse.ArgumentParser):
    """argparse with the flags of every stage and presets: `--preset NAME` sets defaults that flags override. Unknown
    flags are errors. `add(group, flag, default, help)`: one flag a field, its type the default's."""
    def __init__(self, doc, presets):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.presets, self.groups, running = presets, {}, "running (changes no result but rounding)"
        self.add("data", "--preset", "demo", "a set of defaults; flags override it", choices=presets)
        self.add("data", "--data", "", "folder of images, or DIR with train/ and val/", required=True)
        self.add("data", "--out", "", "what to write", required=True)
        self.add("data", "--noise", "none", "synthetic noise: gauss100, shot3 ...; none: the images are noisy already")
        self.add("data", "--noise_seed", 0, "base seed of the noise; the same in every stage")
        self.add("data", "--seed", 0, "of everything but the noise")
        self.add(running, "--device", "auto", "cuda, cuda:1, cpu")
        self.add(running, "--amp", "auto", "auto: bf16 on GPUs that have it, fp16 on others, off on CPUs",
                 choices=["auto", "bf16", "fp16", "off"])
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.add(running, "--workers", max(1, min(16, share)), "decoding workers of each process")
        self.add(running, "--cache_gb", 4.0, "sets up to this size are decoded once and kept on the device")
        self.add(running, "--log_steps", 10, "steps between two lines of log.jsonl")
        self.add(running, "--save_minutes", 10.0, "between two checkpoints; one at every epoch's end too")

    def add(self, group, flag, default, text, **kw):
        if group not in self.groups:
            self.groups[group] = self.add_argument_group(group)
        if isinstance(default, bool):
            kw["action"] = argparse.BooleanOptionalAction
        else:
            kw = {"type": str if default is None else type(default)} | kw
        text = text.replace("%", "%%") + ("" if kw.get("required") else " (default %(default)s)")
        self.groups[group].add_argument(flag, default=default, help=text, **kw)

    def read(self, argv=None, positive=("log_steps",)):
        """The flags with the preset's defaults. Raises UserError for negative numbers, and for 0 in `positive`."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # --help shows the preset's defaults
        first.add_argument("--preset", default=self.get_default("preset"))
        self.set_defaults(**self.presets.get(first.parse_known_args(argv)[0].preset, {}))
        args = self.parse_args(argv)
        for name, value in vars(args).items():
            if name in ("data", "out") and not value:
                raise UserError(f"--{name}: must not be empty")
            numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, (int, float))]
            most = 2**63 if isinstance(value, int) else math.inf
            if not all(0 <= v < most for v in numbers) or name in positive and not value:
                least = "more than" if name in positive else "at least"
                raise UserError(f"--{name} {value}: must be {least} 0 and less than {most:.2g}")
        return args

def run(main):
    """Call main() and exit: bad input, a full disk or memory ends with one line and code 2, without a traceback. Of
    several processes one that fails waits for no other: they may be in a collective, from which torchrun frees them."""
    on_signal(leave)
    try:
        code = main() or 0
    except Exception as error:
        lines, code = str(error).strip().splitlines() or [type(error).__name__], 2
        if isinstance(error, (UserError, OSError, MemoryError)) or "allocate" in lines[0]:
            line = lines[-1] if isinstance(error, UserError) else lines[0]  # a worker's has its traceback before it
            print(f"error: {line.removeprefix('common.UserError: ')}", file=sys.stderr)
        elif world()[1] == 1:
            raise
        else:
            lost = isinstance(error, dist.DistError) or re.search("gloo|NCCL", str(error))
            print("stopped: another process has failed" if lost else traceback.format_exc(), file=sys.stderr)
    if dist.is_initialized():
        if not code:
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)  # not through the interpreter's end, where Gloo's threads now and then abort the process
    sys.exit(code)
