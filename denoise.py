"""Stage 1: Neighbor2Neighbor on noisy images alone (arXiv 2101.02824), then a denoised copy of the data set.

    python denoise.py train --preset tiny --data DIR --noise gauss100 --out OUT/denoiser
    python denoise.py apply --preset tiny --data DIR --noise gauss100 --denoiser OUT/denoiser --out OUT/denoised
    torchrun --nproc_per_node 4 -- denoise.py train ...     (processes divide the batch; apply: they share the files)

In: DIR/{train,val}/... or any folder of images. Out of train: checkpoint.pth, log.jsonl, config.json, quality.json.
Out of apply: the same relative paths below OUT/denoised, 8-bit .png (.npy where channels are not 1 or 3).
Both go on where they stopped when the same command is given again; an interrupted run exits with code 75.
"""

import hashlib
import io
import math
import sys
from concurrent.futures import ThreadPoolExecutor
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
    "imagenet100": {},  # the paper's: the flags' own defaults
    "imagenet1k": {"batch_size": 8},
}
FREE = c.FREE | {"command", "tile", "denoiser"}
STATE = {"model", "optimizer", "scaler", "epoch", "step", "seconds", "config", "data"}  # what a checkpoint holds

def read_config(argv=None):
    parser = c.Parser(__doc__, PRESETS)
    parser.add_argument("command", choices=["train", "apply"])
    add = parser.add
    add("apply", "--denoiser", None, "folder of a trained denoiser")
    add("apply", "--tile", 1024, "larger images go through in overlapping tiles of this size; less needs less memory")
    add("train", "--epochs", 100, "passes over the images; even one is useful for the curriculum")
    add("train", "--batch_size", 4, "patches a step over all processes")
    add("train", "--patch", 256, "pixels of a training patch, rounded up as the poolings need; less for small images")
    add("train", "--lr", 3e-4, "halved at the epochs' borders at 20, 40, 60 and 80 % of training")
    add("train", "--ramp", 2.0, "final weight of the regulariser")
    add("train", "--width", 48, "features of the U-Net; 24 is 4 times faster")
    add("train", "--init_scale", 0.1, "factor on the Kaiming-normal weights; 1 for short runs, which stay grey at 0.1")
    args = parser.read(argv, ("tile", "epochs", "batch_size", "patch", "width", "lr", "log_steps"))
    if args.tile % 32:
        raise UserError(f"--tile {args.tile}: must be a multiple of 32")
    if args.command == "apply" and not args.denoiser:
        raise UserError("apply needs --denoiser, the folder that denoise.py train wrote")
    return args

# ==== model: Noise2Noise's U-Net ====================================================================================
class UNet(nn.Module):
    """Noisy (B, C, H, W) to denoised, same shape; H and W multiples of 2 ** depth. 1,259,475 weights at 3, 48, 5."""

    def __init__(self, channels=3, width=48, depth=5, init_scale=0.1):
        super().__init__()
        self.depth = depth
        wide = 2 * width
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.encoder = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth + 1))
        ups, firsts, seconds = [], [], []
        for level in range(depth):  # from the coarsest; the last joins the input itself
            below, skip = (width if level == 0 else wide), (channels if level == depth - 1 else width)
            ups.append(nn.ConvTranspose2d(below, below, 2, stride=2))
            firsts.append(nn.Conv2d(below + skip, wide, 3, padding=1))
            seconds.append(nn.Conv2d(wide, wide, 3, padding=1))
        self.ups, self.firsts, self.seconds = nn.ModuleList(ups), nn.ModuleList(firsts), nn.ModuleList(seconds)
        self.mix = nn.ModuleList(nn.Conv2d(wide if depth else width, wide, 1) if i == 0 else nn.Conv2d(wide, wide, 1)
                                 for i in range(2))
        self.last = nn.Conv2d(wide, channels, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight)
                module.weight.data *= init_scale
                nn.init.zeros_(module.bias)

    def forward(self, x):
        def act(x):
            return F.leaky_relu(x, 0.1)

        skips = [x]
        x = act(self.encoder[0](act(self.first(x))))
        for conv in self.encoder[1:]:
            x = F.max_pool2d(x, 2)
            skips.append(x)
            x = act(conv(x))
        for up, first, second, skip in zip(self.ups, self.firsts, self.seconds, skips[-2::-1], strict=True):
            x = act(second(act(first(torch.cat([up(x), skip], 1)))))
        for conv in self.mix:
            x = act(conv(x))
        return self.last(x)

# ==== Neighbor2Neighbor =============================================================================================
# in a 2 x 2 cell numbered 0 1 / 2 3: the 8 ordered pairs of adjacent pixels (no diagonals)
PAIRS = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 0], [1, 3], [3, 1], [2, 3], [3, 2]])

def draw_pairs(n, height, width, gen):
    """A random pair for each 2 x 2 cell: (n, H/2, W/2) indices into PAIRS, the same for all channels."""
    return torch.randint(len(PAIRS), (n, height // 2, width // 2), generator=gen)

def neighbors(x, pairs):
    """The two sub-images g1, g2 (B, C, H/2, W/2) of x (B, C, H, W): one pixel of every cell each, adjacent ones."""
    cells = F.pixel_unshuffle(x, 2).unflatten(1, (x.shape[1], 4))  # (B, C, 4, H/2, W/2)
    index = PAIRS.to(x.device)[pairs][:, None].expand(-1, x.shape[1], -1, -1, -1)  # (B, C, H/2, W/2, 2)
    return [cells.gather(2, index[..., k][:, :, None])[:, :, 0] for k in range(2)]

def n2n_losses(model, y, pairs, ramp):
    """Neighbor2Neighbor's two terms (its equation 11), y (B, C, H, W) noisy: reconstruction and ramp * regulariser."""
    g1, g2 = neighbors(y, pairs)
    d = model(g1).float() - g2
    with torch.no_grad():
        h1, h2 = neighbors(model(y).float(), pairs)
    return (d**2).mean(), ramp * ((d - (h1 - h2)) ** 2).mean()

def patch_plan(sizes, most):
    """(patch, depth): training patch in pixels and number of poolings that the median image allows."""
    side = min(most, int(sizes.min(1).values.median()))
    depth = max(1, min(5, int(math.log2(max(2, side // 2)))))
    cell = 2 ** (depth + 1)
    return math.ceil(side / cell) * cell, depth

def random_positions(sizes, patch, gen):
    """Corners (B, 2) of random patches in images of sizes (B, 2); 0 where a side is shorter than the patch."""
    return (torch.rand(len(sizes), 2, generator=gen) * ((sizes - patch).clamp(min=0) + 1)).long()

def cut_patches(images, sizes, corners, patch):
    """uint8 (B, C, H, W) to float (B, C, patch, patch) in [0, 1] at corners (B, 2); short sides are reflected."""
    index = reflect(corners[..., None] + torch.arange(patch), sizes[..., None]).to(images.device)  # (B, 2, patch)
    b = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[b, index[:, 0, :, None], index[:, 1, None, :]].permute(0, 3, 1, 2) / 255

def reflect(i, n):
    """Indices reflected into [0, n) without repeating the edge; any distance, any n. Tensors broadcast."""
    period = (2 * (n - 1)).clamp(min=1)
    i = i % period
    return torch.minimum(i, period - i).minimum(n - 1)

# ==== application and quality =======================================================================================
MARGIN = 160  # pixels of context around a tile: the U-Net's reach (157), rounded up to its largest pooling

@torch.no_grad()
def denoise(model, images, tile=1024, context=c.nullcontext):
    """uint8 (B, C, H, W) of any size to the same, denoised: reflected to multiples of 2**depth, large ones tiled."""
    height, width = images.shape[2:]
    cell = 2**model.depth
    rows, columns = (reflect(torch.arange(math.ceil(n / cell) * cell), torch.tensor(n)).to(images.device)
                     for n in (height, width))
    x = images[:, :, rows][:, :, :, columns]
    out = torch.empty_like(x)
    for top in range(0, x.shape[2], tile):
        for left in range(0, x.shape[3], tile):
            t, s = max(0, top - MARGIN), max(0, left - MARGIN)
            piece = x[:, :, t:top + tile + MARGIN, s:left + tile + MARGIN]
            with context():
                y = model((piece / 255).contiguous(memory_format=torch.channels_last)).float()
            y = y.clamp(0, 1).mul(255).round().to(torch.uint8)
            out[:, :, top:top + tile, left:left + tile] = y[:, :, top - t:top - t + tile, left - s:left - s + tile]
    return out[:, :, :height, :width]

def denoise_ragged(model, images, sizes, context):
    """denoise() for a padded batch: images of equal size together, so that the padding is never seen."""
    out = torch.zeros_like(images)
    for size in sizes.unique(dim=0):
        same = (sizes == size).all(1).nonzero()[:, 0].to(images.device)
        h, w = size.tolist()
        out[same, :, :h, :w] = denoise(model, images[same, :, :h, :w], context=context)
    return out

def load_denoiser(folder, device):
    """(U-Net in evaluation mode, the checkpoint's state) from a folder that `train` finished. Raises UserError."""
    state = c.load_checkpoint(Path(folder) / "checkpoint.pth", needs={"model", "epoch", "config", "data"})
    if state["epoch"] < state["config"]["epochs"]:
        raise UserError(f"{folder}: its training stopped in epoch {state['epoch']}; finish it")
    model = UNet(state["data"]["channels"], state["config"]["width"], state["data"]["depth"]).to(device).eval()
    model.load_state_dict(state["model"])
    return model.to(memory_format=torch.channels_last), state

def psnr(a, b):
    """Peak signal-to-noise ratio in dB of float images in [0, 1]."""
    return -10 * math.log10(max(float(np.mean((a - b) ** 2, dtype=np.float64)), 1e-10))

def expected_noisy(image, spec, key, seed=0, draws=8192):
    """E[noisy | clean], what Neighbor2Neighbor can learn where clipping biases the noise: (H, W, C) to the same.
    Measured, so that it holds for added noise models too: 256 clean levels, `draws` draws of each."""
    model, level, _ = c.noise_draw(spec, key, seed)
    clean = np.repeat(np.linspace(0, 1, 256, dtype=np.float32), draws).reshape(256, draws, 1)
    mean = np.clip(model(clean, level, np.random.default_rng(0)), 0, 1).mean((1, 2))
    return np.interp(image, np.linspace(0, 1, 256), mean).astype(np.float32)

def autocorrelation(residual):
    """Lag-1 autocorrelation of (H, W, C), mean of both axes; 0 for spatially independent noise."""
    r = residual - residual.mean((0, 1))
    power = max(float((r * r).mean()), 1e-12)
    return 0.5 * float((r[1:] * r[:-1]).mean() + (r[:, 1:] * r[:, :-1]).mean()) / power

def quality(model, folder, device, context, most=32):
    """Mean over up to `most` images: PSNR (dB) of noisy and denoised against clean and against E[noisy | clean], where
    synthetic noise makes them known, and the residual's autocorrelation."""
    rows = []
    for i in np.unique(np.linspace(0, len(folder) - 1, min(most, len(folder))).astype(int)):
        noisy = folder.read(i)
        out = denoise(model, torch.from_numpy(noisy).permute(2, 0, 1)[None].to(device), context=context)[0]
        out, noisy = out.permute(1, 2, 0).cpu().numpy() / 255.0, noisy / 255.0
        row = {"autocorrelation": autocorrelation(noisy - out) if min(noisy.shape[:2]) > 1 else 0.0}
        if folder.spec != "none":
            clean = folder.read(i, "clean") / 255.0
            expected = expected_noisy(clean, folder.spec, folder.paths[i], folder.seed)
            row |= {"noisy_clean": psnr(noisy, clean), "denoised_clean": psnr(out, clean),
                    "noisy_expected": psnr(noisy, expected), "denoised_expected": psnr(out, expected)}
        rows.append(row)
    return {k: round(sum(r[k] for r in rows) / len(rows), 3) for k in rows[0]}

# ==== train =========================================================================================================
def train(args, device):
    out, rank = Path(args.out), c.world()[0]
    config = {k: v for k, v in vars(args).items() if k not in FREE}
    folder = c.Folder(args.data, "train", args.noise, args.noise_seed)
    config["data"] = str(folder)
    state = c.load_checkpoint(out / "checkpoint.pth", required=False, needs=STATE)
    if state:
        c.check_config(state["config"], config, FREE, out)
        if state["epoch"] == args.epochs and (out / "quality.json").exists():
            c.say(f"{out}: complete, nothing to do")
            return 0
    val = folder
    if (Path(args.data) / "val").is_dir():
        val = c.Folder(args.data, "val", args.noise, args.noise_seed, channels=folder.channels)
    patch, depth = patch_plan(folder.sizes, args.patch)
    batch, mine, steps = c.share(args.batch_size, len(folder))
    torch.manual_seed(args.seed)
    model = UNet(folder.channels, args.width, depth, args.init_scale).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    context, scaler = c.autocast(device, args.amp)
    epoch = step = 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where it was not fp16
            scaler.load_state_dict(state["scaler"])
        epoch, step = state["epoch"], state["step"]
    net = nn.parallel.DistributedDataParallel(model) if c.world()[1] > 1 else model
    batches = c.Batches(folder, ["noisy"], device, args.cache_gb, args.workers)

    def save(seconds):
        c.save_checkpoint(out / "checkpoint.pth", {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            "epoch": epoch, "step": step, "seconds": seconds, "config": config,
            "data": {"channels": folder.channels, "depth": depth, "patch": patch}})

    if rank == 0:
        c.write_json(out / "config.json", vars(args))
    loop = c.Loop(args, args.epochs * steps, epoch * steps + step, state["seconds"] if state else 0.0, save)
    while epoch < args.epochs:
        order = torch.randperm(len(folder), generator=c.generator(args.seed, 0, epoch))[:steps * batch].view(-1, batch)
        rate = args.lr * 0.5 ** sum(epoch >= args.epochs * k / 5 for k in range(1, 5))  # halved at 20, 40, 60, 80 %
        for group in optimizer.param_groups:
            group["lr"] = rate
        ramp = args.ramp * (epoch + 1) / args.epochs
        for (images,), sizes in batches.epoch(order[step:, mine].tolist()):
            gen = c.generator(args.seed, 1, epoch, step)
            corners = random_positions(folder.sizes[order[step]], patch, gen)[mine]  # drawn for the global batch
            pairs = draw_pairs(batch, patch, patch, gen)[mine].to(device)
            y = cut_patches(images, sizes, corners, patch).contiguous(memory_format=torch.channels_last)
            with context():
                reconstruction, regulariser = n2n_losses(net, y, pairs, ramp)
            loss = reconstruction + regulariser
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            step += 1
            losses = {"total": loss, "reconstruction": reconstruction, "regulariser": regulariser}
            if loop.tick(losses, batch, {"epoch": epoch, "lr": rate}):
                return c.EXIT_STOPPED
        epoch, step = epoch + 1, 0
        loop.checkpoint(f"epoch {epoch}/{args.epochs}")
    loop.close()
    if rank == 0:
        report(args, model.eval(), val, out, device, context)
    return 0

def report(args, model, folder, out, device, context):
    """Measure the finished denoiser on val, or on train where there is no val, and say what to expect of it."""
    q = quality(model, folder, device, context)
    c.write_json(out / "quality.json", q)
    if args.noise != "none":
        split = "val  " if folder.paths[0].startswith("val/") else "train"
        c.say(f"{split} PSNR in dB    noisy  denoised\n"
              f"against clean     {q['noisy_clean']:7.2f} {q['denoised_clean']:8.2f}\n"
              f"against E[noisy]  {q['noisy_expected']:7.2f} {q['denoised_expected']:8.2f}")
    if q["autocorrelation"] > 0.25:
        print(f"warning: the residual's lag-1 autocorrelation is {q['autocorrelation']:.2f}: the noise looks spatially "
              "correlated (resized, compressed or demosaiced images?); Neighbor2Neighbor keeps such noise. Bring "
              "denoised images of your own with --denoised, or noisy images at native resolution", file=sys.stderr)

# ==== apply =========================================================================================================
def encode(x):
    """uint8 (H, W, C) to (suffix, bytes): PNG, or .npy where PNG has no such number of channels."""
    buffer = io.BytesIO()
    if x.shape[2] in (1, 3):
        Image.fromarray(x[:, :, 0] if x.shape[2] == 1 else x).save(buffer, "PNG", compress_level=3)
        return ".png", buffer.getvalue()
    np.save(buffer, x)
    return ".npy", buffer.getvalue()

def apply(args, device):
    out, (rank, size) = Path(args.out), c.world()
    splits = [s for s in ("train", "val") if (Path(args.data) / s).is_dir()]
    roots = [Path(args.data, s).resolve() for s in splits or ["."]]
    if out.resolve() == Path(args.data).resolve() or any(out.resolve().is_relative_to(root) for root in roots):
        raise UserError(f"--out {out}: is in the data folder, among the noisy images; name another one")
    model, state = load_denoiser(args.denoiser, device)
    config = state["config"]
    for k in ("noise", "noise_seed"):
        if config[k] != getattr(args, k):
            c.say(f"warning: the denoiser was trained with --{k} {config[k]}, now {getattr(args, k)}")
    weights = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())).hexdigest()
    maker = {"denoiser": weights[:32], "noise": args.noise, "noise_seed": args.noise_seed}
    strangers = c.list_images(out)
    if (out / "made_by.json").exists():
        c.check_config(c.read_json(out / "made_by.json"), maker, set(), out)
    elif strangers:
        raise UserError(f"--out {out}: holds images that apply did not make, {strangers[0]} first; name another folder")
    elif rank == 0:
        c.write_json(out / "made_by.json", maker)
    (context, _), channels = c.autocast(device, args.amp), None
    for split in splits or ["train"]:
        folder = c.Folder(args.data, split, args.noise, args.noise_seed, channels=channels)
        if (channels := folder.channels) != state["data"]["channels"]:
            raise UserError(f"{args.data}: {channels} channels, not the denoiser's {state['data']['channels']}")
        suffix = ".png" if folder.channels in (1, 3) else ".npy"
        targets = [out / (stem + suffix) for stem in folder.stems()]

        def made(i, folder=folder, targets=targets):  # whole: a crash of the machine may have left anything
            try:
                folder.check(i, targets[i], c.read_image(targets[i], header=True).shape)
            except UserError:
                return False
            return True

        todo = {i for i, done in enumerate(c.parallel(made, range(len(folder)), "made")) if not done}
        c.say(f"{split}: {len(folder) - len(todo)} of {len(folder)} already denoised")
        # buckets of equal size, so that a batch needs no padding; a fixed number of pixels a batch bounds the memory;
        # the same batches whatever is already made, and by how many processes: they give the same bits
        budget, batches, pixels = 2**22 if device.type == "cuda" else 2**17, [], 0
        for i in sorted(range(len(folder)), key=lambda i: (*folder.sizes[i].tolist(), i)):
            area = int(folder.sizes[i].prod())
            if not batches or (folder.sizes[batches[-1][0]] != folder.sizes[i]).any() or pixels + area > budget:
                batches.append([])
                pixels = 0
            batches[-1].append(i)
            pixels += area
        batches = [batch for batch in batches[rank::size] if todo.intersection(batch)]

        def write(i, x, targets=targets, todo=todo):
            if i in todo:
                c.write_atomic(targets[i], lambda f: f.write(encode(np.ascontiguousarray(x))[1]), sync=False)

        source = c.Batches(folder, ["noisy"], device, 0.0, args.workers)  # streamed: each image is needed once
        bar = tqdm(total=sum(map(len, batches)), desc=f"denoise {split}", disable=rank > 0 or None, unit="image")
        with ThreadPoolExecutor(max(1, args.workers)) as pool:
            writing = []  # the batch before is encoded while the device works on the next
            for index, ((images,), _) in zip(batches, source.epoch(batches), strict=True):
                result = denoise(model, images, args.tile, context).permute(0, 2, 3, 1).cpu().numpy()
                list(writing)
                writing = pool.map(write, index, result)
                bar.update(len(index))
            list(writing)
        bar.close()
    return 0

def main(argv=None):
    args = read_config(argv)
    device = c.setup(args.device)
    return train(args, device) if args.command == "train" else apply(args, device)

if __name__ == "__main__":
    c.run(main)
