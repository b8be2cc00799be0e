"""Stage 1: Neighbor2Neighbor (arXiv 2101.02824) on noisy images alone, then a denoised copy of them.

    python denoise.py train --preset tiny --data DIR --noise gauss100 --out OUT/denoiser
    python denoise.py apply --preset tiny --data DIR --noise gauss100 --denoiser OUT/denoiser \\
        --out OUT/denoised
    torchrun --nproc_per_node 4 -- denoise.py train ...   (processes divide the batch, or the files)

In: DIR/{train,val}/... or any folder of images. Out of train: checkpoint.pth, log.jsonl,
config.json, quality.json. Out of apply: the same relative paths, as deep as the images: 8-bit .png,
16-bit .png where they are deeper (0 to 65535 is the range that made_by.json names), .npy where
Pillow cannot write them. Interrupted, both exit with code 75; the same command goes on.
"""

import functools
import hashlib
import itertools
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import common as c
from common import UserError

PRESETS = {
    "demo": {"epochs": 4, "width": 24, "batch_size": 16, "lr": 1e-3, "init_scale": 1.0},
    "tiny": {"epochs": 2, "width": 24, "batch_size": 4, "lr": 1e-3, "init_scale": 1.0},
    "small": {"epochs": 4, "width": 24, "batch_size": 4, "lr": 1e-3, "init_scale": 1.0},
    "imagenet100": {},  # the paper's: the flags' own defaults
    "imagenet1k": {"batch_size": 8, "subset": 100_000},  # about 100 images a class
}
TRAIN_FLAGS = {
    "epochs": (100, "passes over the images; even one is useful for the curriculum"),
    "subset": (0, "train on so many images, spread evenly over the sorted list; 0: on all"),
    "batch_size": (4, "patches a step over all processes"),
    "patch": (256, "pixels of a training patch, rounded up for the poolings; less for small images"),
    "lr": (3e-4, "halved at the epochs' borders at 20, 40, 60 and 80 % of training"),
    "ramp": (2.0, "final weight of the regulariser"),
    "width": (48, "features of the U-Net; 24 is 4 times faster"),
    "stride": ("auto", "V,H: denoise every V-th row and H-th column by itself, as neighbours share noise; "
                       "auto: as the noisy images show"),
    "init_scale": (0.1, "factor on Kaiming-normal weights; 1 for short runs, which stay grey at 0.1"),
}
APPLY_FLAGS = {
    "denoiser": ("", "folder of a trained denoiser, or a file of Neighbor2Neighbor's weights"),
    "tile": (1024, "higher images go through in overlapping strips of so many rows"),
}
EXACT = {"amp": ("off", "bf16 is faster, and keeps 8 bits of the images")}
GROUPS = {
    "train": {"data": c.DATA_FLAGS, "train": TRAIN_FLAGS | c.TRAINING_FLAGS, "running": c.RUNNING_FLAGS},
    "apply": {"data": c.DATA_FLAGS, "apply": APPLY_FLAGS, "running": c.RUNNING_FLAGS | EXACT},
}
POSITIVE = ("epochs", "batch_size", "patch", "width", "lr", "log_steps", "tile")
STATE = {"model", "optimizer", "scaler", "position", "config"}  # what a checkpoint holds


def read_config(argv):
    """(command, its flags). Raises UserError."""
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        print(__doc__)
        sys.exit()
    if command not in GROUPS:
        raise UserError(f"denoise.py {command}: use train or apply; train --help, apply --help")
    presets = PRESETS if command == "train" else dict.fromkeys(PRESETS, {})
    args = c.read_flags(argv[1:], __doc__, presets, GROUPS[command], positive=POSITIVE)
    if command == "train" and not re.fullmatch(r"auto|[1-9]\d*,[1-9]\d*", args.stride):
        raise UserError(f"--stride {args.stride}: use auto, or two whole numbers from 1, down and across: 1,3")
    if command == "apply":
        if not args.denoiser:
            raise UserError("apply needs --denoiser, the folder that denoise.py train wrote")
        if args.tile % 32:
            raise UserError(f"--tile {args.tile}: must be a multiple of 32")
    return command, args


# ==== model =======================================================================================
class UNet(nn.Module):
    """Noise2Noise's U-Net with Neighbor2Neighbor's names: noisy (B, C, H, W) to denoised, H and W
    multiples of 2 ** depth. 1,259,475 weights at 3 channels, width 48, depth 5. stride: of the
    sub-lattices that it is for, down and across."""
    def __init__(self, channels=3, width=48, depth=5, init_scale=0.1, stride=(1, 1)):
        super().__init__()
        self.depth, self.stride = depth, stride
        self.convolution("enc_conv0", channels, width)
        for level in range(1, depth + 2):
            self.convolution(f"enc_conv{level}", width, width)
        below, wide = width, 2 * width
        for level in range(depth, 0, -1):  # from the coarsest; the last joins the input itself
            skip = channels if level == 1 else width
            up = nn.ConvTranspose2d(below, below, 2, stride=2)
            self.add_module(f"up{level}", nn.ModuleDict({"deconv": up}))
            self.convolution(f"dec_conv{level}a", below + skip, wide)
            self.convolution(f"dec_conv{level}b", wide, wide)
            below = wide
        self.convolution("nin_a", wide, wide, size=1)
        self.convolution("nin_b", wide, wide, size=1)
        self.convolution("nin_c", wide, channels, size=1)
        for p in self.parameters():
            if p.ndim == 1:  # biases
                nn.init.zeros_(p)
            else:
                nn.init.kaiming_normal_(p)
                p.data *= init_scale

    def convolution(self, name, channels, out, size=3):
        self.add_module(name, nn.Conv2d(channels, out, size, padding=size // 2))

    def forward(self, x):
        def act(name, x):
            return F.leaky_relu(self.get_submodule(name)(x), 0.2)

        skips = [x]
        x = act("enc_conv1", act("enc_conv0", x))
        for level in range(1, self.depth + 1):
            x = F.max_pool2d(x, 2)
            skips.append(x)
            x = act(f"enc_conv{level + 1}", x)
        for level in range(self.depth, 0, -1):
            x = self.get_submodule(f"up{level}.deconv")(x)
            x = act(f"dec_conv{level}a", torch.cat([x, skips[level - 1]], 1))
            x = act(f"dec_conv{level}b", x)
        return self.nin_c(act("nin_b", act("nin_a", x)))


# ==== Neighbor2Neighbor ===========================================================================
# in a 2 x 2 cell numbered 0 1 / 2 3: the 8 ordered pairs of adjacent pixels (no diagonals)
PAIRS = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 0], [1, 3], [3, 1], [2, 3], [3, 2]])


def draw_pairs(height, width, rng):
    """A random pair for each 2 x 2 cell: places of its two pixels in the cell, (2, H/2, W/2)."""
    choice = torch.randint(len(PAIRS), (height // 2, width // 2), generator=rng)
    return PAIRS[choice].permute(2, 0, 1)


def neighbors(x, pairs):
    """The two sub-images g1, g2 (B, C, H/2, W/2) of x (B, C, H, W): one pixel of every cell each,
    adjacent ones. pairs (B, 2, H/2, W/2) of draw_pairs, the same for all channels."""
    C = x.shape[1]
    cells = F.pixel_unshuffle(x, 2).unflatten(1, (C, 4))  # (B, C, 4, H/2, W/2)
    index = pairs[:, None].expand(-1, C, -1, -1, -1)  # (B, C, 2, H/2, W/2)
    return cells.gather(2, index).unbind(2)


def n2n_losses(model, y, pairs, ramp):
    """Neighbor2Neighbor's two terms (its equation 11), y (B, C, H, W) noisy: reconstruction and ramp * regulariser."""
    g1, g2 = neighbors(y, pairs)
    d = model(g1).float() - g2
    with torch.no_grad():
        h1, h2 = neighbors(model(y).float(), pairs)
    return (d**2).mean(), ramp * ((d - (h1 - h2)) ** 2).mean()


def patch_plan(sizes, most):
    """(patch, depth): training patch in pixels and number of poolings that the median image allows. sizes (N, 2)."""
    side = min(most, int(np.quantile(sizes.min(1), 0.5, method="lower")))
    if side < 1:
        raise UserError("--stride: is larger than most images; use a smaller one")
    depth = int(np.clip(math.log2(side) - 1, 1, 5))
    cell = 2 ** (depth + 1)  # sub-images are half as large
    return math.ceil(side / cell) * cell, depth


def reflect(images, rows, columns):
    """(..., H, W) with so many more rows below and columns on the right, reflected, however far."""
    margins = [(0, 0)] * (images.ndim - 2) + [(0, rows), (0, columns)]
    return torch.from_numpy(np.pad(images.numpy(), margins, mode="reflect"))


def cut_patch(image, patch, rng):
    """A random patch (C, patch, patch) of an image (C, H, W); short sides are reflected."""
    _, H, W = image.shape
    image = reflect(image, max(0, patch - H), max(0, patch - W))
    top, left = (torch.randint(n - patch + 1, (), generator=rng) for n in image.shape[1:])
    return image[:, top:top + patch, left:left + patch]


def make_batch(args, folder, chosen, patch, stride, mine, epoch, step, indices):
    """One process's noisy patches of a step, uint8 or uint16 (B, C, patch, patch), and their pairs. indices:
    the global batch, of places in the list of chosen images; mine: the slice of this process."""
    patches, pairs = [], []
    for k in indices[mine]:
        i = chosen[k]
        rng = c.generator(args.seed, epoch, folder.paths[i])
        image = draw_lattice(folder.read(i), stride, rng)
        patches.append(cut_patch(image, patch, rng))
        pairs.append(draw_pairs(patch, patch, rng))
    return [torch.stack(patches), torch.stack(pairs)]


# ==== correlated noise ============================================================================
# Neighbor2Neighbor needs noise that is independent from pixel to pixel. Where neighbours share it,
# every v-th row and h-th column by itself is a smaller image whose noise is independent: a
# sub-lattice (pixel-shuffle downsampling, arXiv 1904.03485). The denoiser trains on sub-lattices,
# and is applied to each one of an image.
LAGS = 6  # pixels, the largest distance at which the correlation is measured, and the largest stride
GONE = 0.13  # less counts as none: white noise has up to 0.07 at lag 1, a (1, 2, 1) blur 0.16 at lag 2
FAINT = 0.01  # share of an image's variance; where the noise has less, texture passes for it
ROWS, COLUMNS = 8, 16  # of a flat block


def noise_across(x):
    """Noise in flat parts of an image (C, H, W), float: its autocorrelation across at lags 1 to LAGS,
    the variance of its second difference down, and in how many values both were found. None where
    nothing varies.

    The second difference down removes smooth content and keeps the correlation across. A block
    counts as flat if the block beside it hardly varies. Judged by its own variance, it would be
    chosen for noise that happens to be weak, which is less correlated."""
    x = x.diff(n=2, dim=1)
    pairs = x.unfold(1, ROWS, ROWS).unfold(2, 2 * COLUMNS, 2 * COLUMNS)
    pairs = pairs.flatten(0, 2).unflatten(2, (2, COLUMNS))  # (pairs, ROWS, 2, COLUMNS)
    variance = (pairs**2).mean((1, 3))  # (pairs, 2)
    varies = (variance > 0).all(1)  # clipped parts do not
    if not varies.any():
        return None
    variance = variance[varies]
    blocks = pairs[varies].transpose(1, 2).flatten(0, 1)  # (blocks, ROWS, COLUMNS)
    beside = variance.flip(1).flatten()
    order = beside.argsort(stable=True)
    flat = blocks[order[:math.ceil(len(order) / 10)]]
    covariance = []
    for lag in range(LAGS + 1):
        products = flat[:, :, lag:] * flat[:, :, :COLUMNS - lag]
        covariance.append(products.mean())
    correlation = torch.stack(covariance[1:]) / covariance[0]
    return correlation, np.quantile(variance.numpy(), 0.05), flat.numel()


def image_noise(image):
    """Noise of an image (C, H, W): its autocorrelation down and across (2 LAGS,), its share of the
    image's variance in the flattest parts, number of values. None where none shows, or the image
    is too small. The first 1,024 rows and columns suffice."""
    x = image[:, :1024, :1024].float()
    if min(x.shape[1:]) < 2 * COLUMNS:
        return None
    found = noise_across(x.transpose(1, 2)), noise_across(x)
    if None in found:
        return None
    (down, _, _), (across, level, values) = found
    # the second difference down of noise of variance 1 has a variance of 6 - 8 r1 + 2 r2
    gain = 6 - 8 * down[0] + 2 * down[1]
    share = level / gain.clamp(min=0.1) / x.var((1, 2)).mean()
    return torch.cat([down, across]), share.item(), values


def measure_noise(folder, most=128):
    """Noise of up to `most` noisy images: {"down", "across": its autocorrelation at lags 1 to LAGS,
    "share": of the images' variance, "error": of a correlation}; the first three are medians over
    images. None where all images are constant or too small."""
    def measure(i):
        return image_noise(folder.read(i))

    found = c.parallel(measure, folder.spread(most), "measure noise")
    found = [noise for noise in found if noise]
    if not found:
        return None
    correlations, shares, values = zip(*found, strict=True)
    lags = torch.stack(correlations).double().quantile(0.5, 0)
    lags = lags.numpy().round(3).tolist()
    share = round(float(np.median(shares)), 4)
    # 2 standard deviations of white noise after a second difference
    error = round(2 * 1.5 / math.sqrt(sum(values)), 3)
    return {"down": lags[:LAGS], "across": lags[LAGS:], "share": share, "error": error}


def choose_stride(correlation, error):
    """(stride, whether the noise is independent there): the smallest stride at whose multiples the
    autocorrelation, of lags 1 to LAGS, is gone. Else LAGS; but 1 where it hardly falls, as that of
    stripes, which no stride removes."""
    for stride in range(1, LAGS + 1):
        multiples = correlation[stride - 1::stride]
        if max(map(abs, multiples)) < GONE + error:
            return stride, True
    falls = correlation[-1] < correlation[0] / 2
    return LAGS if falls else 1, False


def settle_stride(wanted, noise):
    """The text 'V,H': --stride or, for auto, what measure_noise asks for. Says what was found and chosen."""
    chosen, text = "1,1", "not measured, as the images are constant or smaller than 32 x 32 pixels"
    if noise:
        down, across = (" ".join(f"{r:.2f}" for r in noise[axis]) for axis in ("down", "across"))
        text = (f"{noise['share']:.1%} of the variance; "
                f"correlation at 1 to {LAGS} pixels: {down} down, {across} across")
        if noise["share"] < FAINT:
            text += "; there is little noise to remove"
        else:
            down, gone_down = choose_stride(noise["down"], noise["error"])
            across, gone_across = choose_stride(noise["across"], noise["error"])
            chosen = f"{down},{across}"
            if not (gone_down and gone_across):
                text += "; it reaches so far that some of this noise will stay"
    if wanted != "auto":
        chosen = wanted
    c.say(f"noise in flat parts: {text}; stride {chosen}")
    return chosen


def parse_stride(text):
    down, across = text.split(",")  # '1,3' -> (1, 3)
    return int(down), int(across)


def draw_lattice(image, stride, rng):
    """A random sub-lattice (C, H / v, W / h) of an image (C, H, W). A stride of 1 draws nothing."""
    first = []
    for step, side in zip(stride, image.shape[1:], strict=True):
        most = min(step, side)
        first.append(torch.randint(most, (), generator=rng) if most > 1 else 0)
    (down, across), (top, left) = stride, first
    return image[:, top::down, left::across]


# ==== application =================================================================================
MARGIN = 160  # rows of context around a strip: the U-Net's reach (157), rounded up


@torch.no_grad()
def denoise(model, images, device, tile=1024, context=c.nullcontext):
    """uint8 or uint16 (B, C, H, W) of any size on the host to the same, denoised: each sub-lattice of
    the model's stride by itself, in strips of `tile` rows."""
    result = torch.empty_like(images)
    down, across = model.stride
    for top, left in itertools.product(range(down), range(across)):
        part = images[:, :, top::down, left::across]
        if part.numel():
            result[:, :, top::down, left::across] = denoise_lattice(model, part, device, tile, context)
    return result


def denoise_lattice(model, images, device, tile, context):
    """denoise() of one sub-lattice."""
    H, W = images.shape[2:]
    cell = 2**model.depth
    x = reflect(images, -H % cell, -W % cell)
    strips = []
    for top in range(0, H, tile):
        first = max(0, top - MARGIN)
        strip = c.to_float(x[:, :, first:top + tile + MARGIN].to(device))
        with context():
            y = model(strip.contiguous(memory_format=torch.channels_last)).float()
        y = c.to_levels(y.clamp(0, 1), images.dtype).cpu()
        strips.append(y[:, :, top - first:][:, :, :tile])
    return torch.cat(strips, 2)[:, :, :H, :W]


def denoise_list(model, images, device, tile=1024, context=c.nullcontext):
    """denoise() of a list of images (C, H, W), those of equal size together."""
    results = {}
    for shape in {x.shape for x in images}:
        same = [i for i, x in enumerate(images) if x.shape == shape]
        batch = denoise(model, torch.stack([images[i] for i in same]), device, tile, context)
        results |= zip(same, batch, strict=True)
    return [results[i] for i in sorted(results)]


def load_denoiser(path, device):
    """(U-Net in evaluation mode, {flag: value} of its noise and range) from a folder that `train` finished;
    or from a file of Neighbor2Neighbor's weights, whose noise nobody knows. Raises UserError."""
    noise, stride, state = {}, "1,1", c.load_checkpoint(path)
    if "config" in state:
        config, epoch = state["config"], state["position"][0]
        noise = {k: config[k] for k in ("noise", "noise_seed")} | {"range": config.get("range", [])}
        stride = config.get("stride", stride)
        if epoch < config["epochs"]:
            raise UserError(f"{path}: its training stopped in epoch {epoch}; finish it")
    try:
        weights = {k.removeprefix("module."): v for k, v in state.get("model", state).items()}
        width, channels = weights["enc_conv0.weight"].shape[:2]
        depth = sum(k.startswith("up") for k in weights) // 2  # weight and bias each
        model = UNet(channels, width, depth, stride=parse_stride(stride))
        model.load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise UserError(f"{path}: is no denoiser, no U-Net of Neighbor2Neighbor's layers") from None
    return model.to(device, memory_format=torch.channels_last).eval(), noise


# ==== quality =====================================================================================
def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    return -10 * math.log10(max(F.mse_loss(a.double(), b.double()).item(), 1e-10))


def expected_noisy(image, spec, key, seed=0, draws=8192):
    """E[noisy | clean], what Neighbor2Neighbor can learn where clipping biases the noise: an image in [0, 1] to the
    same. Measured, so that it holds for added models, too: 256 clean levels, `draws` draws of each."""
    function, levels, _ = c.noise_draw(spec, key, seed)
    clean = torch.linspace(0, 1, 256)
    grid = clean[:, None, None].expand(256, draws, 1)
    mean = function(grid, *levels, c.generator(0)).clamp(0, 1).double().mean((1, 2))
    return torch.from_numpy(np.interp(image, clean, mean)).float()


def autocorrelation(residual):
    """Lag-1 autocorrelation of (C, H, W), mean of both axes; 0 for spatially independent noise."""
    r = residual - residual.mean((1, 2), keepdim=True)
    down = (r[:, 1:] * r[:, :-1]).mean()
    across = (r[:, :, 1:] * r[:, :, :-1]).mean()
    share = (down + across) / (2 * (r * r).mean().clamp(min=1e-12))
    return share.nan_to_num().item()  # 0 for an image of one row


def quality(model, folder, device, most=32):
    """Mean over up to `most` images: the residual's autocorrelation on sub-lattices, and, where
    synthetic noise makes them known, PSNR (dB) of noisy and denoised against clean and
    E[noisy | clean]."""
    rows, (down, across) = [], model.stride
    for i in folder.spread(most):
        image = folder.read(i)
        denoised = denoise(model, image[None], device)[0]
        noisy, denoised = c.to_float(image), c.to_float(denoised)
        row = {"autocorrelation": autocorrelation((noisy - denoised)[:, ::down, ::across])}
        if folder.spec != "none":
            clean = c.to_float(folder.read(i, "clean"))
            expected = expected_noisy(clean, folder.spec, folder.paths[i], folder.seed)
            row |= {"noisy_clean": psnr(noisy, clean), "denoised_clean": psnr(denoised, clean),
                    "noisy_expected": psnr(noisy, expected), "denoised_expected": psnr(denoised, expected)}
        rows.append(row)
    means = np.mean([list(row.values()) for row in rows], axis=0)
    return dict(zip(rows[0], means.round(3).tolist(), strict=True))


def report(q, split):
    """Say what to expect of a denoiser with this quality."""
    if "noisy_clean" in q:
        table = ("PSNR in dB    noisy  denoised\n"
                 "against clean     {noisy_clean:7.2f} {denoised_clean:8.2f}\n"
                 "against E[noisy]  {noisy_expected:7.2f} {denoised_expected:8.2f}")
        c.say(f"{split:5} {table.format_map(q)}")
    if q["autocorrelation"] > 0.25:
        print(f"warning: the residual's lag-1 autocorrelation is {q['autocorrelation']:.2f}: the noise "
              "looks correlated farther than the stride (resized, compressed or demosaiced images?); "
              "Neighbor2Neighbor keeps such noise. Use a larger --stride, bring denoised images of "
              "your own with --denoised, or noisy images at native resolution", file=sys.stderr)


# ==== train =======================================================================================
def train(args, device):
    out = Path(args.out)
    tested = folder = c.Folder(args.data, "train", args.noise, args.noise_seed, limits=args.range or None)
    args.range = folder.limits
    if (folder.data / "val").is_dir():
        tested = c.Folder(args.data, "val", args.noise, args.noise_seed, None, folder.channels, folder.limits)
    data, position = folder.fingerprint(), (0, 0, 0.0)
    state = c.load_checkpoint(out / "checkpoint.pth", required=False, needs=STATE)
    if state:
        before = state["config"].setdefault("stride", "1,1")  # which earlier versions did not store
        args.stride = before if args.stride == "auto" else args.stride
        c.check_config(state["config"], vars(args) | {"data": data}, c.FREE, out)
        position = state["position"]
        if position[0] == args.epochs and (out / "quality.json").exists():
            c.say(f"{out}: complete, nothing to do")
            return 0
    noise = measure_noise(folder)
    args.stride = settle_stride(args.stride, noise)
    stride, config = parse_stride(args.stride), vars(args) | {"data": data}
    torch.manual_seed(args.seed)
    patch, depth = patch_plan(folder.shapes[:, :2] // stride, args.patch)
    model = UNet(folder.channels, args.width, depth, args.init_scale, stride)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    context, scaler = c.autocast(device, args.amp)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if state:
        c.load_parts(parts, state)
    if c.world()[0] == 0:
        c.write_json(out / "config.json", vars(args) | {"noise_measured": noise})

    def save(position):
        state = {name: part.state_dict() for name, part in parts.items()}
        c.save_checkpoint(out / "checkpoint.pth", state | {"position": position, "config": config})

    chosen = folder.spread(args.subset or len(folder))
    folder.hold(["noisy"], args.cache_gb, args.workers)
    loop = c.Loop(args, len(chosen), position, device, save)
    make = functools.partial(make_batch, args, folder, chosen, patch, stride, loop.mine)
    if fit(args, loop, make, context, **parts):
        return c.EXIT_STOPPED
    if c.world()[0] == 0:
        measured = quality(model.eval(), tested, device)
        c.write_json(out / "quality.json", measured)
        report(measured, tested.split)
    return 0


def fit(args, loop, make, context, model, optimizer, scaler):
    """Train from the loop's position to the last epoch; True where a signal stopped it."""
    net = nn.parallel.DistributedDataParallel(model) if c.world()[1] > 1 else model
    group, = optimizer.param_groups
    for patches, pairs in loop.batches(make, args.epochs):
        halvings = 5 * loop.epoch // args.epochs  # at 20, 40, 60, 80 % of the epochs
        group["lr"] = args.lr * 0.5**halvings
        ramp = args.ramp * (loop.epoch + 1) / args.epochs
        y = c.to_float(patches).contiguous(memory_format=torch.channels_last)
        with context():
            reconstruction, regulariser = n2n_losses(net, y, pairs, ramp)
        loss = reconstruction + regulariser
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses = {"total": loss, "reconstruction": reconstruction, "regulariser": regulariser}
        if loop.tick(losses, {"lr": group["lr"]}):
            return True
    loop.close()
    return False


# ==== apply =======================================================================================
CHUNK = 16  # consecutive images that go through together, whatever is already made and by whom


def check_place(args, splits):
    """--out must not be among the images. Raises UserError."""
    out, data = Path(args.out), Path(args.data).resolve()
    if any((out.resolve() / split).is_relative_to(data / split) for split in splits or [""]):
        raise UserError(f"--out {out}: is in the data folder, among the noisy images; name another")


def weights_hash(model):
    """The same for the same weights, whatever file they are in."""
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(weights).hexdigest()[:32]


def check_target(args, model, settings):
    """--out must be a copy of the same images by the same denoiser, or new. Raises UserError."""
    out = Path(args.out)
    maker = {"denoiser": weights_hash(model), **settings}
    note, first = out / "made_by.json", c.world()[0] == 0
    if first and note.exists():
        c.check_config(c.read_json(note), maker, (), out)
    elif first:
        found = c.list_images(out)
        if found:
            raise UserError(f"--out {out}: holds images that apply did not make, {found[0]} first; name another folder")
        c.write_json(note, maker)
    c.all_reduce(torch.zeros(1))  # no process writes an image before the first has looked


def picture(x):
    """uint8 or uint16 (C, H, W) as an 8-bit Pillow image; of other than 1 or 3 channels the first."""
    shown = x if len(x) == 3 else x[:1]
    if shown.dtype == torch.uint16:
        shown = c.to_levels(c.to_float(shown))
    return Image.fromarray(shown.permute(1, 2, 0).squeeze(2).numpy())


def write_image(path, x):
    """uint8 or uint16 (C, H, W) as .png or .npy, whole or not at all."""
    x = x.permute(1, 2, 0).contiguous().numpy()  # (H, W, C)
    if path.suffix == ".npy":
        write = functools.partial(np.save, arr=x)
    else:
        image = Image.fromarray(x[:, :, 0] if x.shape[2] == 1 else x)
        write = functools.partial(image.save, format="PNG", compress_level=3)
    c.write_atomic(path, write, sync=False)


def apply(args, device):
    context, _ = c.autocast(device, args.amp)
    model, trained = load_denoiser(args.denoiser, device)
    limits = trained.pop("range", None)
    for k, value in trained.items():
        if value != getattr(args, k):
            c.say(f"warning: the denoiser was trained with --{k} {value}, now {getattr(args, k)}")
    splits = [s for s in ("train", "val") if Path(args.data, s).is_dir()]
    check_place(args, splits)
    channels, wanted = None, model.enc_conv0.in_channels
    for split in splits or ["train"]:
        folder = c.Folder(args.data, split, args.noise, args.noise_seed, None, channels, args.range or limits)
        c.check_range(folder.limits, limits, args.denoiser)
        channels, limits = folder.channels, folder.limits  # grey images of val may serve as colour
        if channels != wanted:
            raise UserError(f"{args.data}: {channels} channels, not the denoiser's {wanted}")
        check_target(args, model, folder.settings())
        apply_split(args, model, folder, device, context)
    return 0


def apply_split(args, model, folder, device, context):
    pictures = [1] if folder.deep else [1, 3]  # channels that Pillow writes
    suffix = ".png" if folder.channels in pictures else ".npy"
    targets = [Path(args.out, stem + suffix) for stem in folder.stems()]

    def is_missing(path):  # or broken: a crash of the machine may have left anything
        with suppress(UserError):
            return not c.read_shape(path)
        return True

    def read(*chunk):
        return [folder.read(i) for i in chunk]

    def write(i, x):
        if missing[i]:
            write_image(targets[i], x)

    missing = torch.tensor(c.parallel(is_missing, targets, "made"))
    total, (rank, size) = len(folder), c.world()
    c.say(f"{folder.split}: {total - missing.sum()} of {total} already denoised")
    chunks = torch.arange(total).split(CHUNK)[rank::size]
    chunks = [chunk.tolist() for chunk in chunks if missing[chunk].any()]
    images = c.prefetch(read, chunks, torch.device("cpu"), args.workers)
    bar = tqdm(chunks, f"denoise {folder.split}", disable=rank > 0 or None, unit=f"{CHUNK} images")
    with ThreadPoolExecutor(args.workers or 1) as pool:
        written = ()  # the chunk before is written while the device works on the next
        for chunk, noisy in zip(bar, images, strict=True):
            results = denoise_list(model, noisy, device, args.tile, context)
            list(written)  # waits, and raises what went wrong
            written = pool.map(write, chunk, results)
        list(written)


def main(argv=None):
    command, args = read_config(sys.argv[1:] if argv is None else argv)
    stage = train if command == "train" else apply
    return stage(args, c.setup(args.device))


if __name__ == "__main__":
    c.run(main)
