"""Stage 3: what a frozen backbone is worth on noisy images: linear probe, k-NN, retrieval, masks; the report.

    python probe.py --preset tiny --data DIR --noise gauss100 --run OUT/nct --out OUT/nct.json
    python probe.py --preset imagenet1k --data DIR --noise gauss255 --weights FILE --out FILE.json
    torchrun --nproc_per_node 8 -- probe.py ...   (each process embeds its share of the images)
    python probe.py check --data DIR              (labels, masks, headers; exit code 3: no labels, no masks)
    python probe.py report runs/NAME              (results.md, results.json, pictures)
    python probe.py embed --run OUT/nct --data DIR --out FILE.npz     (features of any images)

In: DIR/{train,val}/<class>/*, DIR/masks/{train,val}/**.png or both, and a finished run of pretrain.py
or a file of ViT weights: ours, DINOv2's, the paper's teacher checkpoints, timm's. Out: a JSON file,
and .npz beside it for the report. Labels and masks are used here alone; embed needs none.
"""

import argparse
import colorsys
import functools
import hashlib
import math
import os
import random
import shutil
import sys
import tempfile
import weakref
import zipfile
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import common as c
import denoise
from common import UserError

SMALL = {"iterations": 2000, "img_size": 64, "resize": 64}
PRESETS = {"demo": SMALL | {"iterations": 1000}, "tiny": SMALL,
           "small": SMALL | {"img_size": 128, "resize": 128},
           "imagenet100": {"views": 10}, "imagenet1k": {"views": 4}}
BACKBONE_FLAGS = {
    "run": ("", "folder of a finished run: backbone.pth, config.json, summary.json"),
    "weights": ("", "instead of --run: a file of ViT weights, whose shapes tell the architecture"),
    "heads": (0, "with --weights: attention heads; 0: as usual for the width"),
    "mean": ([], "with --weights: of its normalisation; if not given, ImageNet's"),
    "std": ([], "with --weights: of its normalisation; if not given, ImageNet's"),
    "img_size": (224, "pixels that the backbone sees"),
    "resize": (256, "short side before the central crop of --img_size"),
}
PROBE_FLAGS = {
    "pixels": (False, "instead of --run: averaged pixels as features, what pretraining must beat"),
    "denoised": ("", "probe on these denoised images instead of the noisy ones (arm denoised)"),
    "denoiser": ("", "with --denoised: what clean and other test images go through"),
    "seed": (0, "of held-out images, heads, views and the draws of --shots"),
    "views": (0, "randomly cropped views of each training image besides the central one"),
    "iterations": (12500, "steps of the linear heads"),
    "batch_size": (128, "of the linear heads"),
    "shots": ([], "also heads on so few labels a class, as 5,10,20,50"),
}
EMBED_FLAGS = {"patches": (False, "also every patch token: at 224 pixels 196 times as much")}
SHARED = {"data": c.DATA_FLAGS, "backbone": BACKBONE_FLAGS, "running": c.RUNNING_FLAGS}
GROUPS = SHARED | {"probe": PROBE_FLAGS}
EMBED_GROUPS = SHARED | {"embed": EMBED_FLAGS}
CHECK_FLAGS = {
    "shots": PROBE_FLAGS["shots"],
    "img_size": BACKBONE_FLAGS["img_size"],
    "resize": BACKBONE_FLAGS["resize"],
    "patch_size": (0, "of the runs that will be probed; 0: the preset's"),
}
CHECK_GROUPS = {"data": c.DATA_FLAGS, "probe": CHECK_FLAGS}
SOURCES = {"run": "--run, a folder of pretrain.py", "weights": "--weights, a file of ViT weights",
           "pixels": "--pixels"}


def read_config(argv):
    args = c.read_flags(argv, __doc__, PRESETS, GROUPS, positive=("iterations", "batch_size", "img_size"))
    check_backbone(args)
    if args.denoiser and not args.denoised:
        raise UserError("--denoiser: has no effect without --denoised")
    args.shots = whole_shots(args.shots)
    return args


def read_embed_config(argv):
    """The flags of embed. --preset is by default that of the run; of --weights, imagenet100."""
    args = c.read_flags(argv, __doc__, PRESETS, EMBED_GROUPS)
    preset = "imagenet100"
    if args.run:
        preset = c.read_json(f"{args.run}/config.json", {"preset"})["preset"]
    argv = ["--preset", preset, *argv]
    args = c.read_flags(argv, __doc__, PRESETS, EMBED_GROUPS, positive=("img_size",))
    check_backbone(args)
    return args


def check_backbone(args):
    """Raises UserError where the flags of the backbone contradict each other."""
    sources = [name for name in SOURCES if name in args]
    if sum(bool(getattr(args, name)) for name in sources) != 1:
        raise UserError(f"give {', or '.join(SOURCES[name] for name in sources)}")
    if not args.weights and (args.heads or args.mean or args.std):
        raise UserError("--heads, --mean, --std: are for --weights; a run has its own")
    check_sizes(args)


def check_sizes(args, *patch_sizes):
    """Raises UserError unless images are as large as their crops and crops are whole patches."""
    if args.resize < args.img_size:
        raise UserError(f"--resize {args.resize}: must be at least --img_size {args.img_size}")
    for size in patch_sizes:
        if args.img_size % size:
            raise UserError(f"--img_size {args.img_size}: is no multiple of the patch size {size}")


def whole_shots(shots):
    """--shots as whole numbers. Raises UserError."""
    if any(n < 1 or n % 1 for n in shots):
        raise UserError("--shots: must be whole numbers from 1, separated by commas: 5,10,20,50")
    return sorted({int(n) for n in shots})


# ==== backbone ====================================================================================
INPUTS = {"1 block": [0], "1 block + patches": [0, 4], "4 blocks": [0, 1, 2, 3],
          "4 blocks + patches": [0, 1, 2, 3, 4]}  # tokens that the heads see
PIXELS = {"8 x 8 pixels": [0], "16 x 16 pixels": [1, 2, 3, 4]}
DENSE = {"1 block": [0], "4 blocks": [0, 1, 2, 3]}  # tokens of a patch that dense heads see
DENSE_PIXELS = {"its pixels": [0], "3 x 3 patches": [0, 1]}


def patch_size_of(args):
    """The patch size of --pixels: that of the preset's ViT."""
    return 8 if args.preset in ("demo", "tiny") else 16


class Backbone:
    """A frozen ViT with its normalisation. about: what is known of its training, for the report."""
    inputs, dense_inputs = INPUTS, DENSE
    limits = None  # the range of values that it was trained on, where this is known

    def __init__(self, model, mean, std, file, device, about):
        self.model = model.to(device).eval().requires_grad_(False)
        self.channels, self.patch_size = model.patch_embed["proj"].in_channels, model.patch_size
        if {len(mean), len(std)} != {self.channels}:
            raise UserError(f"--mean, --std: must have {self.channels} values, one a channel")
        for name in c.not_finite(model.state_dict()):
            raise UserError(f"{file}: {name} is not finite")
        self.mean, self.std = torch.tensor([mean, std], device=device)[..., None, None]
        self.about = {**about, "backbone": hashlib.sha256(Path(file).read_bytes()).hexdigest()}

    def last_layers(self, crops, n):
        """Of crops (B, C, S, S) the outputs of the last n blocks, the last first; with fewer blocks
        the first is repeated."""
        layers = self.model.last_layers((c.to_float(crops) - self.mean) / self.std, n)
        return layers + layers[-1:] * (n - len(layers))

    def embed(self, crops, dense=False):
        """Crops (B, C, S, S) to (B, 5, D) float32: the class tokens of the last 4 blocks, the
        last first; the last block's mean patch token. With dense (B, 5 + 4 P, D): then patch after
        patch its tokens of these blocks."""
        layers = self.last_layers(crops, 4)
        tokens = [layer["cls"] for layer in layers]
        tokens = torch.stack([*tokens, layers[0]["patches"].mean(1)], 1)
        if dense:
            patches = torch.stack([layer["patches"] for layer in layers], 2)  # (B, P, 4, D)
            tokens = torch.cat([tokens, patches.flatten(1, 2)], 1)
        return tokens.float()

    def tokens(self, crops):
        """Crops (B, C, S, S) to (B, 2 + N, D) float32, of the last block: the class token,
        the mean patch token, all patch tokens."""
        last = self.last_layers(crops, 1)[0]
        patches = last["patches"]
        return torch.cat([last["cls"][:, None], patches.mean(1, keepdim=True), patches], 1).float()


class Pixels:
    """In place of a backbone: area-averaged pixels, standardised. What pretraining must beat."""
    inputs, dense_inputs, about, limits = PIXELS, DENSE_PIXELS, {}, None

    def __init__(self, args):
        folder, source = self.seen = open_folder(args, "train")
        self.patch_size = patch_size_of(args)
        self.channels, self.mean, self.std = folder.channels, 0.0, 1.0
        crops = (central_crop(folder.read(i, source), args.resize, args.img_size) for i in folder.spread(2000))
        tokens = torch.cat([self.embed(crop[None]) for crop in crops])
        self.mean, self.std = tokens.mean(0), tokens.std(0).clamp(min=1e-6)

    @functools.cached_property
    def normal(self):
        """Mean and deviation of its pixels, (C, 1, 1) each; read where patches are asked for."""
        folder, source = self.seen
        return torch.tensor(folder.stats(source))[..., None, None]

    def embed(self, crops, dense=False):
        """Crops (B, C, S, S) to (B, 5, 64 C): means of 8 x 8 areas; in four parts, of 16 x 16. With
        dense (B, 5 + 2 P, 64 C): then of every patch 8 x 8 areas, and those of it with its eight
        neighbours, zeros outside."""
        x = c.to_float(crops).cpu()
        areas = [F.adaptive_avg_pool2d(x, side).flatten(1) for side in (8, 16)]
        tokens = (torch.cat(areas, 1).unflatten(1, (5, -1)) - self.mean) / self.std
        if dense:
            mean, std = self.normal
            patches = self.patches((x - mean) / std)
            tokens = torch.cat([tokens, patches.unflatten(0, (len(x), -1)).flatten(1, 2)], 1)
        return tokens

    def patches(self, x):
        """Images (B, C, S, S) to (B P, 2, 64 C)."""
        p, channels = self.patch_size, x.shape[1]
        around = F.unfold(x, 3 * p, padding=p, stride=p)  # (B, 9 C p p, P)
        around = around.mT.reshape(-1, channels, 3 * p, 3 * p)
        itself = around[..., p:2 * p, p:2 * p]
        areas = [F.adaptive_avg_pool2d(pixels, 8).flatten(1) for pixels in (itself, around)]
        return torch.stack(areas, 1)


def load_backbone(args, device):
    """The backbone of --run or --weights, or --pixels. Raises UserError."""
    backbone = Pixels(args) if args.pixels else load_vit(args, device)
    check_sizes(args, backbone.patch_size)
    return backbone


def load_vit(args, device):
    """The backbone of --run or --weights. Raises UserError."""
    if args.run:
        backbone = load_run(args.run, device)
    else:
        mean = args.mean or [0.485, 0.456, 0.406]
        std = args.std or [0.229, 0.224, 0.225]
        model = c.vit_of(args.weights, args.heads)
        backbone = Backbone(model, mean, std, args.weights, device, {})
    return backbone


def load_run(folder, device):
    """The backbone of a finished run of pretrain.py. Raises UserError."""
    file = Path(folder, "backbone.pth")
    if not file.exists():
        raise UserError(f"--run {folder}: no backbone.pth; finish the run with pretrain.py")
    config = c.read_json(f"{folder}/config.json", {"arch", "channels", "mean", "std", "source"})
    summary = c.read_json(f"{folder}/summary.json", {"seconds", "device"})
    model = c.make_vit(config["arch"], config["patch_size"], img_size=config["global_size"],
                       in_chans=config["channels"], registers=config["registers"])
    c.load_parts({"backbone": model}, {"backbone": c.load_checkpoint(file)})
    backbone = Backbone(model, config["mean"], config["std"], file, device, {"pretrain": config, "summary": summary})
    backbone.limits = config.get("range", [])
    return backbone


# ==== features: on disk ===========================================================================
BLOCK = 1024  # rows that are read at once


@contextmanager
def writing(folder):
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: features cannot be written there ({error}); "
                        "free some space, or use another --out") from None


class Features:
    """Rows of one shape, by default in half precision, in a file without a name: memory has those alone that
    are asked for, and a killed process leaves nothing. As of a tensor, x[images] are float32 (B, ...).

    They are read, not mapped: pages of a map would count as memory until they are given back."""
    def __init__(self, folder, dtype=torch.half):
        self.folder, self.dtype, self.shape = folder, dtype, (0,)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self.file.close)

    def __len__(self):
        return self.shape[0]

    def append(self, rows):
        """Write rows (B, ...); what lies beyond half precision becomes its largest value. Raises
        UserError."""
        largest = torch.finfo(self.dtype).max
        values = rows.clamp(-largest, largest).to(self.dtype)
        left = values.flatten().view(torch.uint8).numpy()
        with writing(self.folder):
            while len(left):  # a disk that is nearly full takes a part
                left = left[self.file.write(left):]
        self.shape = (len(self) + len(rows), *rows.shape[1:])

    def __getitem__(self, images):  # their indices (B,)
        rows = torch.empty(len(images), *self.shape[1:], dtype=self.dtype)
        parts = rows.numpy()
        if (images.diff() == 1).all():  # one after the other: read at once
            parts, images = parts[None], images[:1]
        for part, i in zip(parts, images.tolist(), strict=False):
            os.preadv(self.file.fileno(), [part], rows[:1].nbytes * i)
        return rows.float()


def blocks(x, images=None):
    """Yield rows of a tensor or of Features, of these images or all, up to BLOCK at a time."""
    images = torch.arange(len(x)) if images is None else images
    for part in images.split(BLOCK):
        yield x[part]


class Vectors:
    """Some tokens side by side of features x (N, T, D): rows (F,) of these images, or of all, read
    when asked for. [:] are all of them."""
    def __init__(self, x, tokens, images=None):
        self.x, self.tokens = x, tokens
        self.images = torch.arange(len(x)) if images is None else images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        parts = blocks(self.x, self.images[rows])
        return torch.cat([part[:, self.tokens].flatten(1) for part in parts])


# ==== features: each image goes through the backbone once per view ================================
CHUNK = 64  # consecutive images that are embedded together, the same in any number of processes


def central_crop(image, resize, size):
    """(C, H, W): the short side resized to `resize`, then the centre (C, size, size)."""
    H, W = (resize * side // min(image.shape[1:]) for side in image.shape[1:])
    top, left = (H - size) // 2, (W - size) // 2
    return c.resize(image, H, W)[:, top:top + size, left:left + size]


def crop_views(args, image, views, path):
    """The central crop of an image and random views of it: (1 + views, C, S, S)."""
    crops = [central_crop(image, args.resize, args.img_size)]
    rng = random.Random(f"{args.seed}:{path}") if views else None
    for _ in range(views):
        box = c.draw_box(*image.shape[1:], (0.08, 1), rng)
        crops.append(c.cut(image, box, rng.random() < 0.5, args.img_size))
    return torch.stack(crops)


def embed_folder(args, backbone, device, folder, source, denoiser=None, views=0, dense=False):
    """Features of every image in order, on the first process; none on the others: of its central
    crop and each of its views (N, 5, D); with dense, last, of the patches of its central crop
    (N P, T, D). denoiser: a model that the images go through first."""
    kept = 1 + views + dense if c.world()[0] == 0 else 0
    features = [Features(Path(args.out).parent) for _ in range(kept)]
    patches = (args.img_size // backbone.patch_size) ** 2
    embeds = [functools.partial(backbone.embed, dense=dense), *[backbone.embed] * views]
    for block in embed_blocks(args, embeds, folder, source, device, denoiser):
        if dense:
            of_patches = block[0][:, 5:].unflatten(1, (patches, -1)).flatten(0, 1)
            block = [block[0][:, :5], *block[1:], of_patches]
        for rows, written in zip(block, features, strict=False):  # no features on other processes
            written.append(rows)
    return features


def embed_blocks(args, embeds, folder, source, device, denoiser=None):
    """Yield what the first of `embeds` makes of the central crops of all images in order, and the
    others of random views: blocks, lists of (up to CHUNK, tokens, D). Each is a function of crops. Each
    process embeds its share, and gets the blocks of all."""
    rank, size = c.world()
    context, _ = c.autocast(device, args.amp)

    def crop(chunk, images):  # (1 + views, B, C, S, S)
        crops = []
        for i, x in zip(chunk, images, strict=True):
            crops.append(crop_views(args, x, len(embeds) - 1, folder.paths[i]))
        return torch.stack(crops, 1)

    def read(*chunk):  # by the workers
        images = [folder.read(i, source) for i in chunk]
        return images if denoiser else crop(chunk, images)

    chunks = [chunk.tolist() for chunk in torch.arange(len(folder)).split(CHUNK)]
    chunks += chunks[-1:] * (-len(chunks) % size)  # as many for every process
    mine = chunks[rank::size]
    made = c.prefetch(read, mine, torch.device("cpu"), args.workers)
    bar = tqdm(made, f"embed {folder.split} {folder.spec}", len(mine), leave=False, disable=rank > 0 or None)
    left = len(folder)
    for chunk, batch in zip(mine, bar, strict=True):
        if denoiser:
            batch = crop(chunk, denoise.denoise_list(denoiser, batch, device))
        gathered = []  # of all processes, (size, CHUNK, tokens, D) each
        for embed, view in zip(embeds, batch, strict=True):
            with context():
                embedded = embed(view.to(device)).cpu()
            whole = F.pad(embedded, (0, 0, 0, 0, 0, CHUNK - len(chunk)))
            gathered.append(c.gather_rows(whole[None]))
        for parts in zip(*gathered, strict=True):
            if left > 0:
                yield [part[:left] for part in parts]
            left -= CHUNK


# ==== embed: the features of any images, without labels ===========================================
def write_embeddings(args, device):
    """Write --out, an .npz file: paths (N,), cls (N, D) and patch_mean (N, D), float32; with
    --patches also patches (N, patches, D). Features go to nameless files as they come, then into
    the .npz: memory stays flat, and a killed process leaves nothing under the final name. Raises
    UserError."""
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out}: exists; move it away, or name another --out")
    backbone = load_vit(args, device)
    check_sizes(args, backbone.patch_size)
    limits = args.range or backbone.limits
    folder = c.Folder(args.data, "", args.noise, args.noise_seed, None, backbone.channels, limits)
    c.check_range(folder.limits, backbone.limits, args.run)
    parts = {"cls": 0, "patch_mean": 1}
    if args.patches:
        parts["patches"] = slice(2, None)

    def wanted(crops):
        tokens = backbone.tokens(crops)
        return tokens if args.patches else tokens[:, :2]

    features = {}
    if c.world()[0] == 0:  # the process that writes
        features = {name: Features(out.parent, torch.float) for name in parts}
    for (block,) in embed_blocks(args, [wanted], folder, "noisy", device):
        for name, rows in features.items():
            rows.append(block[:, parts[name]])
    if features:
        c.write_atomic(out, lambda file: write_npz(file, folder.paths, features))
    c.say(f"{out}: {', '.join(['paths', *parts])} of {len(folder)} images")


def write_npz(file, paths, features):
    """What numpy.savez would write, of float32 Features by name."""
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("paths.npy", "w") as member:
            np.lib.format.write_array(member, np.array(paths))
        for name, rows in features.items():
            header = {"descr": "<f4", "fortran_order": False, "shape": rows.shape}
            rows.file.seek(0)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                shutil.copyfileobj(rows.file, member)


# ==== linear probe: the heads of DINOv2's protocol ================================================
RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]  # x batch/256


def head_logits(x, tokens, weight, bias):
    """Logits (B, heads, classes) of features (B, T, D); weight (F, heads, classes), bias (heads, classes)."""
    inputs = x[:, tokens].flatten(1).to(weight.device)  # (B, F)
    return logits_of(inputs, weight, bias)


def logits_of(inputs, weight, bias):
    return torch.tensordot(inputs, weight, 1) + bias


def pick(x, view, images):
    """Features (B, 5, D) of images (B,), each of its view (B,): x of V views, each (N, 5, D)."""
    batch = torch.empty(len(images), *x[0].shape[1:])
    for v, of_view in enumerate(x):
        mine = view == v
        batch[mine] = of_view[images[mine]]
    return batch


def train_heads(x, y, classes, tokens, args, keep, device="cpu", rates=RATES):
    """A linear head for each of the rates, all at once: SGD 0.9 without weight decay, cosine to 0.

    x features of V views, each (N, T, D), on the host; y (N,) classes, or (N, classes) the share of
    each; tokens: of T those that the heads see; keep: rows to train on. Gives weight (F, rates,
    classes), bias (rates, classes)."""
    gen = torch.Generator().manual_seed(args.seed)
    views, width = len(x), x[0].shape[-1]
    images, heads = len(keep), len(rates)
    size = min(args.batch_size, images)
    rates = torch.tensor(rates, device=device)[:, None] * size / 256
    start = 0.01 * torch.randn(len(tokens) * width, 1, classes, generator=gen)  # DINOv2's scale
    weight = start.tile(heads, 1).to(device)
    bias = torch.zeros(heads, classes, device=device)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for i in range(args.iterations):
        picked, view = torch.randint(images, (2, size), generator=gen)  # view: modulo their number
        picked = keep[picked]
        inputs = pick(x, view % views, picked)[:, tokens].flatten(1).to(device)  # (B, F)
        target = y[picked]
        if target.dim() == 1:
            target = F.one_hot(target, classes)
        # of the cross-entropy of every head
        slope = (logits_of(inputs, weight, bias).softmax(2) - target[:, None].to(device)) / size
        gradients = torch.tensordot(inputs.T, slope, 1), slope.sum(0)
        rate = c.cosine(i, rates, 0, args.iterations)
        for p, v, g in zip((weight, bias), velocity, gradients, strict=True):
            v.mul_(0.9).add_(g)
            p.sub_(rate * v)
    return weight, bias


def predict(x, tokens, weight, bias, images=None):
    """The class (N, heads) that every head answers, of these rows or of all: x (N, T, D)."""
    answers = [head_logits(part, tokens, weight, bias).argmax(2).cpu() for part in blocks(x, images)]
    return torch.cat(answers)


def accuracy(answers, y):
    """Top-1 in %: the share of the answers (N,) that are the classes y (N,)."""
    return 100 * (answers == y).double().mean().item()


def balanced_accuracy(answers, y):
    """Mean of the recalls of the classes in y, in %: each class counts as much as the largest one.
    Where all are of one size it is the accuracy, to the bit."""
    sizes = y.bincount().double()
    weight = sizes.max() / sizes[y]
    right = weight * (answers == y)
    return 100 * (right.sum() / weight.sum()).item()


def hold_out(y, seed, share=0.1):
    """Bool (N,): a tenth of every class of more than one image, to choose the head on."""
    held = torch.zeros(len(y), dtype=torch.bool)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    for k in y.unique():
        members = order[y[order] == k]
        count = max(1, round(len(members) * share))
        if len(members) > 1:
            held[members[:count]] = True
    return held


def split(y, seed):
    """Indices of the images to train on, and of those that are held out."""
    held = hold_out(y, seed)
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def choose_head(x, y, classes, args, keep, held, score, inputs, device="cpu", rates=RATES):
    """Train a head for each of `rates` and `inputs` on rows `keep` of V times (N, T, D) features;
    choose the one whose answers to rows `held` have the highest score. Gives its (tokens, weight,
    bias), and what was chosen."""
    best = {"held_out": -1}
    for name, tokens in inputs.items():
        weight, bias = train_heads(x, y, classes, tokens, args, keep, device, rates)
        answers = predict(x[0], tokens, weight, bias, held)
        scores = [score(of_head) for of_head in answers.T]
        k = scores.index(max(scores))
        if scores[k] > best["held_out"]:
            best = {"head": name, "rate": rates[k], "held_out": scores[k]}
            head = tokens, weight[:, k, None], bias[k, None]
    return head, best


def linear_probe(x, y, classes, args, device="cpu", inputs=INPUTS):
    """The best of 52 heads (13 rates, 4 inputs; of pixels 26) on V times (N, 5, D) features, trained on
    nine tenths and chosen on the rest; val has no part in it. The best has the highest balanced
    accuracy: plain accuracy would choose a head that always answers the largest class."""
    keep, held = split(y, args.seed)

    def score(answers):
        return balanced_accuracy(answers, y[held])

    return choose_head(x, y, classes, args, keep, held, score, inputs, device)


# ==== dense probe: the class of every pixel =======================================================
DENSE_RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]  # x batch/256
BANK = 5000  # patches of training images that k-NN looks at
SHOWN = 6  # images of a row of the report's pictures


def crop_mask(args, mask):
    """The square of a mask (H, W) that central_crop shows of its image, (S, S) at its own size."""
    side = round(min(mask.shape) * args.img_size / args.resize)
    top, left = ((length - side) // 2 for length in mask.shape)
    return mask[top:top + side, left:left + side]


def patch_shares(mask, grid, classes):
    """Of each patch the share of every class among its known pixels, or zeros: mask (S, S) of a crop
    to float32 (grid grid, classes)."""
    row = np.arange(len(mask)) * grid // len(mask)
    patch = row[:, None] * grid + row
    known = mask != 255
    places = patch[known] * classes + mask[known]
    counts = np.bincount(places, minlength=grid**2 * classes).reshape(-1, classes)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    return torch.from_numpy(shares).float()


def read_shares(args, folder, grid, classes):
    """(shares of every patch of every image (N P, classes), those of known pixels (N P,))"""
    shares, known = Features(Path(args.out).parent), []
    for i in tqdm(range(len(folder)), "masks", leave=False, disable=None):
        of_image = patch_shares(crop_mask(args, folder.mask(i)), grid, classes)
        shares.append(of_image)
        known.append(of_image.sum(1) > 0)
    return shares, torch.cat(known)


def confusion(answers, y, classes):
    """How often each class of y, a row, was answered by each class, a column; unknown pixels, where y is
    255, do not count."""
    counts = (y.long() * classes + answers).flatten().bincount(minlength=classes**2)
    return counts[:classes**2].view(classes, classes)  # 255 lies behind all classes


def class_iou(counts):
    """Intersection over union (classes,) in % of a confusion matrix; NaN for a class that neither is
    nor was answered."""
    right = counts.diagonal().double()
    return 100 * right / (counts.sum(0) + counts.sum(1) - right)


def mean_iou(counts):
    return class_iou(counts).nanmean().item()


def answer_pixels(logits, side):
    """The class (side, side) of every pixel: logits (P, classes) of its image's patches, enlarged."""
    grid = math.isqrt(len(logits))
    maps = logits.T.unflatten(1, (grid, grid))[None]
    largest = F.interpolate(maps, (side, side), mode="bilinear")[0].max(0)
    return largest.indices  # argmax takes five times as long


def count_pixels(args, folder, classes, heads):
    """{name: confusion matrix over all known pixels of a folder} of heads {name: function of some images
    that gives the logits (images, P, classes) of their patches}."""
    counts = {name: torch.zeros(classes, classes, dtype=torch.long) for name in heads}
    for images in torch.arange(len(folder)).split(16):
        masks = [torch.from_numpy(crop_mask(args, folder.mask(i))) for i in images.tolist()]
        for name, logits in heads.items():
            for of_image, mask in zip(logits(images), masks, strict=True):
                answers = answer_pixels(of_image, len(mask))
                counts[name] += confusion(answers, mask, classes)
    return counts


def dense_probe(args, backbone, classes, train, val, x, tests, device="cpu"):
    """Mean IoU in % of a linear head on patch tokens, chosen as linear_probe does, and of 20-NN. x of
    train, tests of val by strength of its noise: (N P, T, D) each. Patches learn the shares of their
    classes; logits are enlarged to the masks. Gives figures, {strength: mean IoU}, the answers
    for the pictures of the report, uint8 (pictures, S, S)."""
    grid = args.img_size // backbone.patch_size
    patches, inputs = grid**2, backbone.dense_inputs
    y, known = read_shares(args, train, grid, classes)

    def of_images(images):  # rows of their patches
        return (images[:, None] * patches + torch.arange(patches)).flatten()

    keep, held = map(of_images, split(torch.zeros(len(train)), args.seed))
    keep, held = keep[known[keep]], held[known[held]]
    if not (len(keep) and len(held)):
        raise UserError(f"{args.data}/masks/train: too few images with known pixels, those that are not 255: "
                        "some must train the heads, others choose one")
    held_y = torch.cat([part.argmax(1) for part in blocks(y, held)])

    def score(answers):
        return mean_iou(confusion(answers, held_y, classes))

    # twice the batch, half the steps: as many patches as linear_probe sees images
    steps = {"batch_size": 2 * args.batch_size, "iterations": args.iterations // 2}
    steps = argparse.Namespace(**{**vars(args), **steps})
    head, chosen = choose_head([x], y, classes, steps, keep, held, score, inputs, device, DENSE_RATES)
    order = torch.randperm(len(keep), generator=torch.Generator().manual_seed(args.seed))
    bank, token = keep[order[:BANK]], next(iter(inputs.values()))
    bank_x, bank_y = Vectors(x, token, bank)[:], y[bank].argmax(1)

    def linear(z, images):  # logits (images, P, classes)
        logits = head_logits(z[of_images(images)], *head)
        return logits[:, 0].cpu().unflatten(0, (-1, patches))

    def nearest(z, images):
        vectors = z[of_images(images)][:, token].flatten(1)
        answers = knn(bank_x, bank_y, vectors, classes, (20,))[20]
        return F.one_hot(answers, classes).float().unflatten(0, (-1, patches))

    heads = {("", strength): functools.partial(linear, z) for strength, z in tests.items()}
    for strength in PREFIXES:
        if strength in tests:
            heads["knn_", strength] = functools.partial(nearest, tests[strength])
    result, sweep = {"dense_chosen": chosen}, {}
    for (kind, strength), counts in count_pixels(args, val, classes, heads).items():
        mean = mean_iou(counts)
        if kind == "":
            sweep[strength] = mean
        if strength in PREFIXES:
            result[f"{PREFIXES[strength]}{kind}iou"] = mean
            by_class = [None if iou.isnan() else iou.item() for iou in class_iou(counts)]
            result[f"{PREFIXES[strength]}{kind}class_iou"] = by_class
    shown = linear(tests[""], torch.tensor(val.spread(SHOWN)))
    answers = torch.stack([answer_pixels(logits, args.img_size) for logits in shown])
    return result, sweep, answers.byte()


# ==== k-NN, retrieval =============================================================================
NEIGHBORS = (10, 20, 100, 200)


def most_similar(train_x, x, most, size=16384):
    """Cosine similarities (M, most) of the rows of x (M, D) to those of train_x (N, D) that are most like
    them, and their indices. Train_x is read once, so many rows at a time."""
    x = F.normalize(x)
    best = x.new_full((len(x), most), -math.inf)
    index = torch.zeros(len(x), most, dtype=torch.long)
    for images in torch.arange(len(train_x)).split(size):
        block = F.normalize(train_x[images])
        for rows in torch.arange(len(x)).split(512):
            similarity, place = (x[rows] @ block.T).topk(min(most, len(block)))
            similarity = torch.cat([best[rows], similarity], 1)
            candidates = torch.cat([index[rows], images[place]], 1)
            best[rows], place = similarity.topk(most)
            index[rows] = candidates.gather(1, place)
    return best, index


def knn(train_x, train_y, x, classes, neighbors=NEIGHBORS, temp=0.07):
    """{k: the class (M,) that weighted k-NN answers} on L2-normalised class tokens, train_x (N, D)
    and x (M, D); a neighbour's weight is exp(similarity / temp)."""
    similarity, index = most_similar(train_x, x, min(max(neighbors), len(train_x)))
    weights, labels = (similarity / temp).exp(), train_y[index]
    answers = {}
    for k in neighbors:
        votes = weights.new_zeros(len(x), classes)
        votes.scatter_add_(1, labels[:, :k], weights[:, :k])
        answers[k] = votes.argmax(1)
    return answers


def nearest_tokens(x, y, classes, seed):
    """Of PIXELS the tokens with the best 20-NN on the held-out images; x (N, 5, D)."""
    keep, held = split(y, seed)
    scores = {}
    for name, tokens in PIXELS.items():
        queries = Vectors(x, tokens, held)[:]
        answers = knn(Vectors(x, tokens, keep), y[keep], queries, classes, (20,))
        scores[name] = balanced_accuracy(answers[20], y[held])
    return PIXELS[max(scores, key=scores.get)]


def retrieval(x, y):
    """Leave-one-out retrieval in %: every image is a query against all others of its set; (N, D), (N,).
    Queries without another image of their class are left out.

    "map": mean average precision. "map_r": the same over the first R answers alone, R others of its
    class. "recall1", 5, 10: queries with one of its class among so many answers (Musgrave et al. 2020)."""
    x = F.normalize(x)
    rank = torch.arange(1, len(x))
    figures = defaultdict(list)
    for i, label in enumerate(y):
        similarity = x @ x[i]
        similarity[i] = -math.inf  # the query itself comes last
        order = similarity.argsort(descending=True, stable=True)[:-1]
        hit = (y[order] == label).double()
        others = int(hit.sum())
        if not others:
            continue
        precise = hit.cumsum(0) / rank * hit
        figures["map"].append(precise.sum() / others)
        figures["map_r"].append(precise[:others].sum() / others)
        for k in (1, 5, 10):
            figures[f"recall{k}"].append(hit[:k].max())
    return {name: 100 * torch.stack(values).mean().item() for name, values in figures.items()}


# ==== few labels ==================================================================================
DRAWS = 10  # of the labelled images


def draw_shots(y, shots, rng):
    """Indices of so many random images of every class; a smaller class gives all that it has."""
    order = torch.randperm(len(y), generator=rng)
    return torch.cat([order[y[order] == k][:shots] for k in y.unique()])


def logistic_regression(x, y, classes, device="cpu"):
    """Weight (D, classes) and bias (classes,) of least summed cross-entropy plus half the squared
    weights, scikit-learn's default; x (N, D) standardised features, y (N,)."""
    x, y = x.to(device), y.to(device)
    weight = x.new_zeros(x.shape[1], classes, requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        misfit = F.cross_entropy(x @ weight + bias, y, reduction="sum")
        value = misfit + weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach().cpu(), bias.detach().cpu()


def standardiser(x):
    """A function that standardises features (M, D) by mean and deviation of the rows of x (N, D)."""
    total = sum(part.double().sum(0) for part in blocks(x))
    squares = sum(part.double().square().sum(0) for part in blocks(x))
    mean = total / len(x)
    variance = (squares - len(x) * mean.square()) / (len(x) - 1)
    std = variance.clamp(min=1e-12).sqrt()
    return lambda z: ((z - mean) / std).float()


def few_shots(x, y, val_x, val_y, classes, args, device="cpu"):
    """What --shots labels a class are worth: logistic regression and 1-NN on x (N, D), tested on
    val_x (M, D). Nothing is chosen. A draw of more shots has those of fewer among its own.

    Gives {shots: {figure: {"mean", "std", "draws"}}} in %; figures: linear, nn, balanced_linear,
    balanced_nn."""
    if not args.shots:
        return {}
    scaled = standardiser(x)  # on all training images: that needs no labels
    val_scaled, result = scaled(val_x), {}
    for shots in args.shots:
        small = (y.bincount() < shots).sum()
        if small:
            c.say(f"warning: --shots {shots}: {small} of {classes} classes have fewer images, "
                  "and give all of them")
        scores = defaultdict(list)
        for draw in range(DRAWS):
            picked = draw_shots(y, shots, c.generator(args.seed, "shots", draw))
            few, few_y = x[picked], y[picked]
            weight, bias = logistic_regression(scaled(few), few_y, classes, device)
            linear = (val_scaled @ weight + bias).argmax(1)
            nearest = knn(few, few_y, val_x, classes, (1,))[1]
            for name, answers in {"linear": linear, "nn": nearest}.items():
                scores[name].append(accuracy(answers, val_y))
                scores[f"balanced_{name}"].append(balanced_accuracy(answers, val_y))
        result[str(shots)] = {}
        for name, draws in scores.items():
            mean, deviation = np.mean(draws), np.std(draws, ddof=1)
            result[str(shots)][name] = {"mean": mean, "std": deviation, "draws": draws}
    return result


# ==== all figures of one backbone =================================================================
def has_labels(*folders):
    """Whether images lie in folders of more than one class."""
    paths = [path.split("/") for folder in folders for path in folder.paths]
    return len({parts[1] for parts in paths if len(parts) > 2}) > 1


def read_labels(train, val, shots=()):
    """(number of classes, train labels (N,), val labels). Raises UserError where the class folders
    do not agree, or no class has so many images."""
    names, y = np.unique(train.labels(), return_inverse=True)
    val_names = val.labels()
    for name in np.setdiff1d(val_names, names):
        raise UserError(f"{val.data}/val/{name}: class unknown to train; "
                        "without labels, put all images right into train/ and val/")
    classes = len(names)
    if classes == 1:
        raise UserError(f"{train.data}/train: has one class, {names[0]}; two are the least")
    if classes == len(y):
        raise UserError(f"{train.data}/train: no class has two images; the head is chosen on a held-out tenth")
    largest = np.bincount(y).max()
    if max(shots, default=0) > largest:
        raise UserError(f"--shots {max(shots)}: no class in {train.data}/train has so many images; "
                        f"the largest has {largest}")
    return classes, torch.from_numpy(y), torch.from_numpy(np.searchsorted(names, val_names))


def read_targets(train, val, shots=()):
    """(what read_labels gives, or None without class folders; number of classes of the masks, or 0
    without masks). Raises UserError where there are neither."""
    labels, classes = None, 0
    masked = train.has_masks() or val.has_masks()
    if has_labels(train, val) or not masked:
        labels = read_labels(train, val, shots)
    elif shots:
        raise UserError(f"--shots: {train.data} has masks, but no labels: train/<class>/ and val/<class>/")
    if masked:
        names = train.mask_classes()
        if len(names) < 2:
            raise UserError(f"{train.data}/masks/train: has pixels of classes {names.tolist()}; two are the least")
        for name in np.setdiff1d(val.mask_classes(), names):
            raise UserError(f"{val.data}/masks/val: class {name} is in no mask of train/")
        classes = int(names.max()) + 1
    return labels, classes


def sweep_specs(spec):
    """Test noise of the robustness curve: {strength relative to the pretraining level: spec}. The
    first parameter is scaled, up to its limit; ranges are taken at their middle."""
    name, ranges = c.parse_noise(spec)
    model = c.NOISES[name]
    specs = {0: "none"}
    first, *others = (sum(levels) / 2 for levels in ranges)
    for strength in (0.25, 0.5, 0.75, 1, 1.5, 2):
        level = min(first / strength if model.inverse else first * strength, model.most)
        numbers = [np.format_float_positional(v, 6, trim="-") for v in (level, *others)]
        specs[strength] = f"{name}{','.join(numbers)}"
    return specs


def open_folder(args, split, channels=None, limits=None):
    """(images of a split, the source that the probe reads). Raises UserError."""
    folder = c.Folder(args.data, split, args.noise, args.noise_seed, args.denoised, channels, args.range or limits)
    return folder, "denoised" if args.denoised else "noisy"


PREFIXES = {"": "", 0: "clean_"}  # of figures by strength of the test noise, "" as it is


def test_sets(args, val, source, denoiser):
    """What is tested: {"": val as it is, strength: val under other noise}, each (images, source, model
    that they go through first). Denoised images need a denoiser for other noise."""
    tests = {"": (val, source, None)}
    if args.noise != "none" and (denoiser or not args.denoised):
        for strength, spec in sweep_specs(args.noise).items():
            tests[strength] = (val.under(spec), "noisy", denoiser)
            if spec == args.noise and not denoiser:
                tests[strength] = tests[""]
    return tests


def embed_patches(args, backbone, device, folder, source, denoiser):
    """Yield the patch tokens of one of test_sets, patch after patch: (B, 1, D) of the last block."""
    patches = (args.img_size // backbone.patch_size) ** 2

    def embed(crops):
        tokens = backbone.embed(crops, dense=True)[:, 5:]
        return tokens.unflatten(1, (patches, -1))[:, :, 0]

    for (block,) in embed_blocks(args, [embed], folder, source, device, denoiser):
        yield block.flatten(0, 1)[:, None]


def patch_cosine(noisy, clean):
    """Mean cosine similarity of the last block's patch tokens, the first of each patch: noisy and clean
    yield the tokens (B, T, D) of the same patches."""
    cosines = [F.cosine_similarity(a[:, 0], b[:, 0]) for a, b in zip(noisy, clean, strict=True)]
    return torch.cat(cosines).mean().item()


def label_figures(args, backbone, labels, x, tests, device):
    """Linear probe, k-NN, retrieval and few labels: x features of train, V times (N, 5, D); tests of val by
    strength of its noise, (M, 5, D) each. Gives figures, {strength: linear probe}."""
    classes, y, val_y = labels
    head, chosen = linear_probe(x, y, classes, args, device, backbone.inputs)
    tokens = [0]  # of k-NN, retrieval and few labels: the class token
    if args.pixels:  # chosen on all labels, with few labels, too: in favour of pixels
        tokens = nearest_tokens(x[0], y, classes, args.seed)

    train_x = Vectors(x[0], tokens)
    _, sizes = val_y.unique(return_counts=True)
    result = {"chosen": chosen, "classes": classes}
    result["class_sizes"] = [sizes.min().item(), sizes.max().item()]  # of val
    sweep = {}
    for strength, z in tests.items():
        linear = predict(z, *head)[:, 0]
        sweep[strength] = accuracy(linear, val_y)
        if strength not in PREFIXES:
            continue
        prefix, vectors = PREFIXES[strength], Vectors(z, tokens)[:]
        nearest = knn(train_x, y, vectors, classes)
        for name, score in {"": accuracy, "balanced_": balanced_accuracy}.items():
            result[f"{prefix}{name}linear"] = score(linear, val_y)
            result[f"{prefix}{name}knn"] = {str(k): score(nearest[k], val_y) for k in nearest}
        for name, value in retrieval(vectors, val_y).items():
            result[prefix + name] = value
    val_x = Vectors(tests[""], tokens)[:]
    result["few_shots"] = few_shots(train_x, y, val_x, val_y, classes, args, device)
    return result, sweep


def arrays_of(out):
    """The file beside a result that has what the report compares: class tokens of val (M, D), and what the
    dense probe answers for SHOWN images of val."""
    return Path(out).with_suffix(".npz")


def origin_of(args, train, val, classes, denoiser):
    """What a result is of, besides its settings and the backbone: another needs another result."""
    folders = train, val
    origin = {"range": train.limits, "shots": args.shots, "masks": []}
    origin["files"] = [folder.fingerprint() for folder in folders]
    if classes:
        origin["masks"] = [folder.fingerprint([*map(folder.mask_file, folder.paths)]) for folder in folders]
    if args.denoised:
        origin["copies"] = [folder.fingerprint(folder.denoised) for folder in folders]
    if denoiser:
        origin["denoiser"] = denoise.weights_hash(denoiser)
    return origin


def evaluate(args, device, saved):
    """All figures of one backbone as a dict; of several processes the first gives it, the others
    None. None, too, where `saved`, an earlier result, is of the same images and backbone."""
    started = c.now()
    backbone = load_backbone(args, device)
    denoiser, trained = None, {}
    if args.denoiser:
        denoiser, trained = denoise.load_denoiser(args.denoiser, device)
    train, source = open_folder(args, "train", limits=backbone.limits)
    c.check_range(train.limits, backbone.limits, args.run)
    c.check_range(train.limits, trained.get("range"), args.denoiser)
    if train.channels != backbone.channels:
        raise UserError(f"{args.data}: {train.channels} channels, the backbone has {backbone.channels}")
    val, _ = open_folder(args, "val", train.channels, train.limits)
    labels, classes = read_targets(train, val, args.shots)
    origin = {**backbone.about, **origin_of(args, train, val, classes, denoiser)}
    if origin.items() <= saved.items() and arrays_of(args.out).exists():
        c.say(f"{args.out}: complete, nothing to do")
        return None
    tests = test_sets(args, val, source, denoiser)

    dense = classes > 0
    x = embed_folder(args, backbone, device, train, source, views=args.views, dense=dense)
    different = dict.fromkeys(tests.values())  # strength 1 is val as it is
    made = {test: embed_folder(args, backbone, device, *test, dense=dense) for test in different}
    val_x = {strength: made[test] for strength, test in tests.items()}
    result, sweeps, arrays = {"train": len(train), "val": len(val)}, {}, {}

    def patches_of(strength):
        if dense:  # on the disk of the first process; without masks none are kept
            return blocks(val_x[strength][-1])
        return embed_patches(args, backbone, device, *tests[strength])

    if 0 in tests and (x or not dense):
        result["patch_cosine"] = patch_cosine(patches_of(""), patches_of(0))
    if not x:
        return None
    if labels:
        central = {strength: z[0] for strength, z in val_x.items()}
        figures, sweeps["linear"] = label_figures(args, backbone, labels, x[:1 + args.views], central, device)
        result |= figures
    if classes:
        patches = {strength: z[-1] for strength, z in val_x.items()}
        figures, sweeps["iou"], arrays["answers"] = dense_probe(
            args, backbone, classes, train, val, x[-1], patches, device)
        result |= figures
    cls = Vectors(val_x[""][0], [0])[:]
    if 0 in tests:
        clean_cls = Vectors(val_x[0][0], [0])[:]
        result["cosine"] = F.cosine_similarity(cls, clean_cls).mean().item()
        result["sweep"] = []
    for strength, (folder, *_) in tests.items():
        if strength != "":
            point = {name: sweep[strength] for name, sweep in sweeps.items()}
            result["sweep"].append({"strength": strength, "noise": folder.spec, **point})
    arrays["cls"] = cls.half()
    c.write_atomic(arrays_of(args.out), lambda file: np.savez(file, **arrays))
    return {**result, "seconds": c.now() - started, "config": vars(args), **origin}


# ==== report: tables ==============================================================================
COLORS = {"pixels": "#000000", "pixels_denoised": "#8c564b", "random": "#888888",
          "noisy": "#d62728", "nc": "#ff9f1c", "nct": "#2ca02c", "denoised": "#1f77b4",
          "clean": "#9467bd"}  # in the order of the table
MONITORS = {"dino": "DINO loss", "ibot": "iBOT loss", "anchor_dino": "anchor loss (DINO part)",
            "entropy": "teacher entropy, nats", "kl": "KL teacher to student", "rank": "effective rank"}
COLUMNS = {"linear": "linear", "balanced_linear": "linear, balanced", "clean_linear": "linear, clean val",
           "knn20": "20-NN", "balanced_knn20": "20-NN, balanced", "map": "retrieval mAP",
           "iou": "mean IoU", "clean_iou": "mean IoU, clean val", "knn_iou": "mean IoU, 20-NN",
           "cosine": "cosine noisy-clean", **MONITORS,
           "minutes": "minutes", "images_s": "images/s", "peak_gb": "peak GB"}
MORE_COLUMNS = {"map_r": "mAP@R", "recall1": "Recall@1", "recall5": "Recall@5", "recall10": "Recall@10",
                "patch_cosine": "cosine noisy-clean of patches", "cka": "CKA with clean"}
MORE = {"map_r": "Retrieval: every image of val is a query against all others.",
        "patch_cosine": "Cosine of the patch tokens of the same images noisy and clean.",
        "cka": "Linear CKA of the class tokens with those of the arm `clean`."}
DIGITS = dict.fromkeys(["cosine", "patch_cosine", "cka", "peak_gb", *MONITORS], 2)  # of other columns 1
SWEEPS = {"linear": "Linear probe", "iou": "Mean IoU"}
ABOUT = """{train} training and {val} validation images, noise {config[noise]}, {pretrain[arch]}, \
on {device}. Figures in %, on the noisy validation set unless said; mean ± standard deviation over seeds; nothing is \
selected on val. `pixels`: averaged pixels instead of features. `denoised` needs its denoiser at test time; `clean` is \
tested on clean images."""
LABELS = " There are {classes} classes."
BALANCED = """ A class has {class_sizes[0]} to {class_sizes[1]} validation images; balanced: the mean of \
the classes' recalls."""
UNLABELLED = """{pretrain[images]} training images without labels, noise {config[noise]}, {pretrain[arch]}, \
on {device}. Losses and monitors at the end of training; mean ± standard deviation over seeds. They tell \
a collapse, not what the features are worth."""
FEW = {"balanced_linear": "Logistic regression", "balanced_nn": "Nearest neighbour"}
FEW_LABELS = "{} on so many labels a class: balanced accuracy, mean ± standard deviation over {} draws a seed:"


def spread(values, digits=1):
    """'mean ± standard deviation' over seeds; the value alone for one seed; '-' for none."""
    values = [v for v in values if v is not None]
    text = f"{np.mean(values):.{digits}f}" if values else "-"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    return text


def table(header, rows):
    lines = [header, ["---" for _ in header], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def read_results(out):
    """{ARM-seedK: result} of out/probe, none where none is of a run. Raises UserError."""
    results, trained = {}, False
    for path in sorted(out.glob("probe/*-seed*.json")):
        result = c.read_json(path, {"files", "train", "val", "config"})
        figures = {f"{name}20": result[name]["20"] for name in ("knn", "balanced_knn") if name in result}
        if "summary" in result:
            trained = True
            figures |= cost(result["summary"])
        elif not result["config"].get("pixels"):
            print(f"warning: {path}: left out, it is of --weights, not of a run", file=sys.stderr)
            continue
        results[path.stem] = {**figures, **result}
    add_cka(out, results)
    return results if trained else {}


def add_cka(out, results):
    """Compare the class tokens of val of every run with those of `clean`, of its seed if there is one."""
    references = sorted(name for name in results if name.startswith("clean-seed"))
    for name, result in results.items():
        same_seed = f"clean-seed{name.rpartition('-seed')[2]}"
        reference = same_seed if same_seed in references else min(references, default=None)
        if reference in (None, name) or results[reference]["files"] != result["files"]:
            continue
        x, y = (read_array(out, run, "cls") for run in (name, reference))
        if x is not None and y is not None:
            result["cka"] = linear_cka(torch.from_numpy(x).float(), torch.from_numpy(y).float())


def read_array(out, run, name):
    """An array that evaluate left beside the result of a run; None where there is none."""
    file = arrays_of(out / f"probe/{run}.json")
    return np.load(file).get(name) if file.exists() else None


def linear_cka(x, y):
    """Linear centred kernel alignment of features (M, D) and (M, E) of the same images, from 0 to 1;
    rotation and scale do not count (Kornblith et al. 2019)."""
    x, y = ((z - z.mean(0)).double() for z in (x, y))
    return ((x.T @ y).square().sum() / (x.T @ x).norm() / (y.T @ y).norm()).item()


def cost(summary):
    """The figures of a run's summary.json."""
    return {**summary, "minutes": summary["seconds"] / 60}


def read_runs(out):
    """{ARM-seedK: the last losses and monitors} of the finished runs in out/pretrain, of images
    without labels. Raises UserError."""
    results = {}
    for path in sorted(out.glob("pretrain/*-seed*/summary.json")):
        summary = c.read_json(path, {"epochs", "seconds", "device"})
        config = c.read_json(path.with_name("config.json"), {"data", "noise", "noise_seed", "denoised",
                                                             "epochs", "images", "channels", "arch"})
        if summary["epochs"] < config["epochs"]:  # the first phase of nc and nct is no arm
            continue
        log = c.read_log(path.with_name("log.jsonl")) or [{}]
        last = {key: log[-1].get(key) for key in MONITORS}
        about = {"summary": summary, "pretrain": config, "config": config}
        results[path.parent.name] = {**last, **cost(summary), **about}
    return results


def by_arm(results):
    """{arm: {ARM-seedK: result}}, in the order of COLORS."""
    arms = {arm: {} for arm in COLORS}
    for name, result in results.items():
        arm, _, _ = name.rpartition("-seed")
        arms.setdefault(arm, {})[name] = result
    return {arm: runs for arm, runs in arms.items() if runs}


def shown_columns(results, columns=COLUMNS):
    """The columns of which there is a figure; balanced ones where val's classes differ in size."""
    keys = [key for key in columns if any(result.get(key) is not None for result in results)]
    if not any(len(set(result.get("class_sizes", []))) > 1 for result in results):
        keys = [key for key in keys if not key.startswith("balanced")]
    return keys


def figures_table(arms, columns, keys):
    """Lines of a table of these figures, arm by arm."""
    rows = []
    for arm, runs in arms.items():
        seeds = list(runs.values())
        cells = [spread([result.get(key) for result in seeds], DIGITS.get(key, 1)) for key in keys]
        rows.append([arm, str(len(seeds)), *cells])
    return table(["arm", "seeds", *(columns[key] for key in keys)], rows)


def sweep_tables(arms):
    """Lines of a table for each figure of the noise sweep."""
    text = []
    for key, title in SWEEPS.items():
        rows, noises = [], []
        for arm, runs in arms.items():
            sweeps = [result["sweep"] for result in runs.values() if key in (result.get("sweep") or [{}])[0]]
            cells = [spread([point[key] for point in points]) for points in zip(*sweeps, strict=True)]
            if cells:
                rows.append([arm, *cells])
                noises = [point["noise"] for point in sweeps[0]]
        if rows:
            text += [f"{title} tested at other noise levels:", "", *table(["arm", *noises], rows), ""]
    return text


def class_table(arms, most=20):
    """Lines of a table of the IoU of every class, where they are few."""
    rows, classes = [], 0
    for arm, runs in arms.items():
        seeds = [result["class_iou"] for result in runs.values() if "class_iou" in result]
        if seeds:
            classes = len(seeds[0])
            rows.append([arm, *(spread(of_class) for of_class in zip(*seeds, strict=True))])
    if not 0 < classes <= most:
        return []
    return ["IoU of every class of the masks:", "", *table(["arm", *map(str, range(classes))], rows), ""]


def few_shot_tables(arms):
    """Lines of a table of balanced accuracy for each head on few labels; none without --shots."""
    text = []
    for name, title in FEW.items():
        draws = {arm: defaultdict(list) for arm in arms}  # of each number of labels
        for arm, runs in arms.items():
            for result in runs.values():
                for shots, figures in result.get("few_shots", {}).items():
                    draws[arm][int(shots)] += figures[name]["draws"]
        sizes = sorted(set().union(*draws.values()))
        rows = [[arm, *(spread(found[n]) for n in sizes)] for arm, found in draws.items()]
        if sizes:
            header = ["arm", *map(str, sizes)]
            text += [FEW_LABELS.format(title, DRAWS), "", *table(header, rows), ""]
    return text


def report(out):
    """results.md, results.json and pictures from out/probe/ARM-seedK.json and out/pretrain; of
    images without labels, which no probe has seen, from out/pretrain alone. Raises UserError."""
    arms = by_arm(read_results(out) or read_runs(out))
    if not arms:
        raise UserError(f"{out}: no results to report; run.sh makes them")
    everything = [result for runs in arms.values() for result in runs.values()]
    results = [result for result in everything if "pretrain" in result]
    results.sort(key=lambda result: "sweep" not in result)  # those of noisy images come first
    columns, more = shown_columns(everything), shown_columns(everything, MORE_COLUMNS)
    about = ABOUT if "train" in results[0] else UNLABELLED
    if "linear" in columns:
        about += LABELS
    if "balanced_linear" in columns:
        about += BALANCED
    figures = figures_table(arms, COLUMNS, columns)
    text = [f"# {out.name}", "", about.format(**results[0]), "", *figures, ""]
    if more:
        told = " ".join(MORE[key] for key in more if key in MORE)
        text += [told, "", *figures_table(arms, MORE_COLUMNS, more), ""]
    text += sweep_tables(arms) + class_table(arms) + few_shot_tables(arms)
    for name, picture in pictures(out, arms, results).items():
        if picture:
            picture.save(f"{out}/{name}.png")
            text += [f"![{name}]({name}.png)"]
    c.write_text(f"{out}/results.md", "\n".join([*text, ""]))
    c.write_json(f"{out}/results.json", arms)
    print(*figures, "", f"report: {out}/results.md", sep="\n")


# ==== report: pictures ============================================================================
def pictures(out, arms, results):
    """{name: picture or None}, of each arm's first seed; results: one on noisy images first."""
    robustness, curves = {}, {}
    for arm, runs in arms.items():
        run = min(runs)
        sweep = runs[run].get("sweep", [])
        for key, title in SWEEPS.items():
            lines = robustness.setdefault(f"{title}, % against test noise (1: as trained)", {})
            lines[arm] = [(p["strength"], p[key]) for p in sweep if key in p]
        log = c.read_log(f"{out}/pretrain/{run}/log.jsonl")
        for key, title in MONITORS.items():
            lines = curves.setdefault(f"{title} against step", {})
            lines[arm] = [(r["step"], r[key]) for r in log if key in r]
    made = {}
    try:
        made |= sample_pictures(out, arms, results)
    except UserError as error:  # images moved away: the figures are still worth a report
        print(f"warning: no samples.png and features.png: {error}", file=sys.stderr)
    return {**made, "robustness": chart(robustness), "curves": chart(curves)}


def sample_pictures(out, arms, results):
    """Six val images, noisy, denoised and clean, and what the backbone of each arm makes of them;
    training images where there are no others, or no denoised copies of them."""
    first = results[0]
    config, channels = first["config"], first["pretrain"]["channels"]
    copy = max(result["pretrain"]["denoised"] for result in results)  # "" where there is none
    has_val = [Path(root, "val").is_dir() for root in (config["data"], copy) if root]
    split = "val" if all(has_val) else "train"
    limits = first["pretrain"].get("range")
    folder = c.Folder(config["data"], split, config["noise"], config["noise_seed"], copy, channels, limits)
    images = {}
    for source, exists in {"noisy": True, "denoised": copy, "clean": folder.spec != "none"}.items():
        if exists:
            images[source] = [folder.read(i, source) for i in folder.spread(SHOWN)]
    features = {"input": images["noisy"]}
    for arm, runs in arms.items():
        run = min(runs)
        if "pretrain" not in runs[run]:  # averaged pixels
            continue
        seen = images.get(arm, images["noisy"])  # arms denoised and clean see their own
        features[run] = principal_components(f"{out}/pretrain/{run}", seen)
    made = {"samples": grid(images), "features": grid(features)}
    if any("iou" in result for result in results):
        val = c.Folder(config["data"], "val", config["noise"], config["noise_seed"], None, channels, limits)
        made["masks"] = mask_picture(out, arms, argparse.Namespace(**config), val)
    return made


def mask_picture(out, arms, args, folder):
    """Six val images, their masks and what the dense probe of each arm answers, one colour a class."""
    shown = folder.spread(SHOWN)
    rows = {"input": [central_crop(folder.read(i), args.resize, args.img_size) for i in shown],
            "mask": [paint(crop_mask(args, folder.mask(i))) for i in shown]}
    for arm, runs in arms.items():
        answers = read_array(out, min(runs), "answers")
        if answers is not None:
            rows[arm] = [paint(of_image) for of_image in answers]
    return grid(rows)


def paint(classes):
    """Colours (3, S, S) of the classes (S, S) of pixels: 0 is black, unknown is white."""
    palette = np.array([colorsys.hsv_to_rgb(0.618 * k % 1, 0.7, 1) for k in range(256)])
    palette[[0, 255]] = [[0], [1]]
    return torch.from_numpy(255 * palette[classes]).byte().permute(2, 0, 1)


def principal_components(folder, images, side=16):
    """First three principal components of the patch tokens as colours, (3, side, side) an image."""
    backbone = load_run(folder, torch.device("cpu"))
    size = side * backbone.model.patch_size
    crops = torch.stack([c.resize(image, size, size) for image in images])
    tokens = backbone.last_layers(crops, 1)[0]["patches"]  # (B, N, D)
    scores, _, _ = torch.pca_lowrank(tokens.flatten(0, 1), 3)  # (B N, 3)
    colours = torch.sigmoid(scores / scores.std(0))
    return c.to_levels(colours).view(len(images), side, side, 3).movedim(3, 1)


def tile(panels, across):
    """Pictures of one size on one sheet, so many in a row."""
    width, height = panels[0].size
    sheet = Image.new("RGB", (across * width, math.ceil(len(panels) / across) * height), "white")
    for k, panel in enumerate(panels):
        sheet.paste(panel, (k % across * width, k // across * height))
    return sheet


def grid(rows, size=160):
    """{title: images (C, H, W)} to one picture, a row each."""
    font = ImageFont.load_default(14)
    panels = []
    for title, images in rows.items():
        for x in images:
            picture = ImageOps.pad(denoise.picture(x).convert("RGB"), (size, size), color="white")
            panel = ImageOps.expand(picture, (3, 20, 3, 3), "white")
            ImageDraw.Draw(panel).text((3, 2), title, "black", font)
            panels.append(panel)
            title = ""  # once a row
    return tile(panels, len(images))


def chart(panels):
    """Line charts, two in a row: {title: {name: [(x, y), ...]}}. None where there is no point."""
    drawn = [draw_panel(title, lines) for title, lines in panels.items() if any(lines.values())]
    return tile(drawn, min(2, len(drawn))) if drawn else None


def axis(values, start, end):
    """(round ticks over all values, function that places a value between pixels start and end)."""
    low = min(values)
    high = max(*values, low + abs(low) / 1e3 + 1e-9)
    step = 10.0 ** math.floor(math.log10(high - low))
    ticks = step * np.arange(math.floor(low / step), math.ceil(high / step) + 1)
    return ticks, lambda value: np.interp(value, ticks[[0, -1]], (start, end))


def draw_panel(title, lines):
    """One chart of 620 x 340 pixels; the same colour for a name in every panel."""
    sheet = Image.new("RGB", (1860, 1020), "white")  # three times as large: lines become smooth
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(36)
    xs, ys = zip(*sum(lines.values(), []), strict=True)
    x_ticks, across = axis(xs, 170, 1580)
    y_ticks, up = axis(ys, 910, 100)
    draw.text((170, 20), title, "black", font)
    for x in x_ticks:
        draw.text((across(x), 930), f"{x:.6g}", "#555555", font, anchor="ma")
    for y in y_ticks:
        height = up(y)
        draw.line([170, height, 1580, height], "#dddddd", 3)
        draw.text((150, height), f"{y:.6g}", "#555555", font, anchor="rm")
    top = 100  # of the next name
    for name, line in lines.items():
        color = COLORS.get(name, "black")
        points = [(across(x), up(y)) for x, y in line]
        if points:
            draw.line(points, color, 6, joint="curve")
            draw.circle(points[-1], 6, color)  # a line of one point is seen, too
            draw.text((1610, top), name, color, font)
            top += 48
    return sheet.resize((620, 340), Image.LANCZOS)


def main():
    match sys.argv[1:]:
        case ["report", folder]:
            report(Path(folder))
        case ["report", *_]:
            raise UserError("usage: python probe.py report runs/NAME")
        case ["embed", *flags]:
            args = read_embed_config(flags)
            write_embeddings(args, c.setup(args.device))
        case ["check", *flags]:
            flags += ["--out", "none"]
            return check(c.read_flags(flags, __doc__, PRESETS, CHECK_GROUPS, positive=("img_size",)))
        case flags:
            probe(read_config(flags))


NO_TARGETS = 3  # exit code of check: neither labels nor masks


def check(args):
    """Look at labels, masks and images before the long stages. Gives the exit code. Raises UserError."""
    train = c.Folder(args.data, "train", args.noise, limits=args.range or None)
    val = c.Folder(args.data, "val", args.noise, channels=train.channels, limits=train.limits)
    if not (has_labels(train, val) or train.has_masks() or val.has_masks()):
        return NO_TARGETS
    pixels = patch_size_of(args)
    check_sizes(args, args.patch_size or pixels, pixels)
    read_targets(train, val, whole_shots(args.shots))
    return 0


def probe(args):
    saved = {}
    if Path(args.out).exists():
        saved = c.read_json(args.out, {"config"})
        c.check_config(saved["config"], vars(args), c.FREE | {"data", "shots"}, args.out)
    result = evaluate(args, c.setup(args.device), saved)
    if result:
        c.write_json(args.out, result)
        told = [f"{COLUMNS[key]} {result[key]:.1f}" for key in ("linear", "iou") if key in result]
        c.say(f"{args.out}: {', '.join(told)}")


if __name__ == "__main__":
    c.run(main)
