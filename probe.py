"""Stage 3: what a frozen backbone is worth on noisy images: linear probe, k-NN, retrieval, robustness; the report.

    python probe.py --preset tiny --data DIR --noise gauss100 --run OUT/nct --out OUT/nct.json
    torchrun --nproc_per_node 8 -- probe.py ...          (each process embeds its share of the images)
    python probe.py check --data DIR --run - --out -     (labels and headers only, before the long stages)
    python probe.py report runs/NAME                     (results.md, results.json, four pictures)

In: DIR/{train,val}/<class>/*, a finished run of pretrain.py. Out: one JSON file. Labels are used here alone.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import common as c
import denoise
from common import UserError

PRESETS = {
    "demo": {"iterations": 2000, "img_size": 64, "resize": 64},
    "tiny": {"iterations": 2000, "img_size": 64, "resize": 64},
    "imagenet100": {"views": 10},
    "imagenet1k": {"views": 4},
}
RATES = [base * 10.0**power for power in range(-5, -1) for base in (1, 2, 5)] + [0.1]  # times batch / 256: 13
NEIGHBORS = (10, 20, 100, 200)

def read_config(argv=None):
    parser = c.Parser(__doc__, PRESETS)
    add = parser.add
    add("data", "--run", "", "folder of a finished run: backbone.pth, config.json, summary.json", required=True)
    add("data", "--denoised", None, "probe on these denoised images instead of the noisy ones (arm denoised)")
    add("data", "--denoiser", None, "with --denoised: the denoiser that clean and other test images go through")
    add("protocol", "--img_size", 224, "pixels that the backbone sees")
    add("protocol", "--resize", 256, "short side before the central crop of --img_size")
    add("protocol", "--views", 0, "randomly cropped views of each training image besides the central one")
    add("protocol", "--iterations", 12500, "steps of the linear heads")
    add("protocol", "--batch_size", 128, "of the linear heads")
    args = parser.read(argv, ("iterations", "batch_size", "img_size"))
    if args.resize < args.img_size:
        raise UserError(f"--resize {args.resize}: must be at least --img_size {args.img_size}")
    return args

# ==== features: each image goes through the backbone once per view ==================================================
def load_run(folder, device):
    """(backbone in evaluation mode, config) of a finished run. Raises UserError."""
    folder = Path(folder)
    if not (folder / "backbone.pth").exists():
        raise UserError(f"--run {folder}: no backbone.pth; finish the run with pretrain.py")
    config, weights = c.read_json(folder / "config.json"), c.load_checkpoint(folder / "backbone.pth")
    try:
        model = c.make_vit(config["arch"], config["patch_size"], img_size=config["global_size"],
                           in_chans=config["channels"], registers=config["registers"])
        model.load_state_dict(weights)
        if not all(x.isfinite().all() for x in weights.values()):
            raise RuntimeError("weights that are not finite")
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"--run {folder}: config.json and backbone.pth do not fit ({str(error)[:99]})") from None
    return model.to(device).eval().requires_grad_(False), config

def central_boxes(sizes, resize, crop):
    """Resize the short side to `resize`, centre crop: boxes (B, 4) in the image of sizes (B, 2)."""
    side = sizes.min(1, keepdim=True).values * (crop / resize)
    return torch.cat([(sizes - side) / 2, side, side], 1)

class Features:
    """Reads a split and gives features: 5 tokens of width D an image, the class tokens of the last 4 blocks, the last
    first, then the last block's mean patch token. With fewer blocks the first one is repeated."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.model, self.config = load_run(args.run, device)
        self.summary = c.read_json(Path(args.run) / "summary.json", {"seconds", "device"})
        self.context, _ = c.autocast(device, args.amp)
        self.denoiser = denoise.load_denoiser(args.denoiser, device)[0] if args.denoiser else None
        if args.img_size % self.config["patch_size"]:
            raise UserError(f"--img_size {args.img_size}: is no multiple of patch size {self.config['patch_size']}")
        self.mean, self.std = (torch.tensor(self.config[k], device=device)[:, None, None] for k in ("mean", "std"))

    def folder(self, split, spec, denoised=None):
        known = self.config["channels"]
        expected = known if split == "val" else None
        folder = c.Folder(self.args.data, split, spec, self.args.noise_seed, denoised, expected)
        if folder.channels != known:
            raise UserError(f"{self.args.data}: {folder.channels} channels, the backbone has {known}")
        return folder

    @torch.no_grad()
    def embed(self, x):
        """Crops (B, C, S, S) in [0, 1] to (B, 5, D) float32."""
        with self.context():
            layers = self.model.last_layers((x - self.mean) / self.std, 4)
        layers += layers[-1:] * (4 - len(layers))
        return torch.stack([*(y["cls"] for y in layers), layers[0]["patches"].mean(1)], 1).float()

    def __call__(self, folder, source, name, views=0, through_denoiser=False):
        """Features of every image in order: (1 + views, N, 5, D), the central crop first; on the first process only."""
        args, size = self.args, self.args.img_size
        rank, processes = c.world()
        batches = torch.arange(len(folder)).split(64)  # the same in any number of processes
        shares = [batches[r::processes] for r in range(processes)]
        out = torch.empty(1 + views, len(folder), 5, self.model.embed_dim) if rank == 0 else None
        loader = c.Batches(folder, [source], self.device, 0.0, args.workers)  # streamed: each image is needed once
        for k, (index, ((images,), sizes)) in enumerate(zip(
                tqdm(shares[rank], name, leave=False, disable=rank > 0 or None),
                loader.epoch([b.tolist() for b in shares[rank]]), strict=True)):
            if through_denoiser:
                images = denoise.denoise_ragged(self.denoiser, images, sizes, self.context)
            flips = torch.zeros(len(index), dtype=torch.bool)
            crops = [c.resample(images, sizes, central_boxes(sizes, args.resize, size), flips, size, 255.0)]
            for v in range(views):
                gen = c.generator(args.seed, 2, v, int(index[0]))
                boxes, flips = c.draw_boxes(sizes, (0.08, 1), gen), torch.rand(len(index), generator=gen) < 0.5
                crops.append(c.resample(images, sizes, boxes, flips, size, 255.0))
            block = torch.stack([self.embed(x / 255) for x in crops]).cpu()  # (1 + views, B, 5, D)
            if rank > 0:
                dist.send(block, 0)
                continue
            out[:, index] = block
            for r in range(1, processes):  # the batches that the others have made meanwhile
                for index in shares[r][k:k + 1]:
                    block = torch.empty(1 + views, len(index), *out.shape[2:])
                    dist.recv(block, r)
                    out[:, index] = block
        return out

# ==== linear probe: the 52 heads of DINOv2's protocol, trained at once ==============================================
def head_inputs(dim):
    """Features of each head as a mask (4, 5 dim) over [cls of the last block, of the 3 before it, mean patch token]:
    the last block or the last 4, without and with the mean patch token."""
    blocks = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    return blocks.repeat_interleave(dim, 1).float()

def train_heads(x, y, classes, rates, masks, iterations, batch_size, seed, keep=None, device="cpu"):
    """SGD 0.9 without weight decay, cosine to 0, of len(masks) * len(rates) linear heads as one matrix product.
    x (V, N, F) features of V views, y (N,) classes, both on the CPU; rates: learning rates at batch 256; masks (M, F):
    each head's inputs; keep: images to train on, all by default. Gives weight (M R, F, classes) and bias (M R, classes)
    on the device, heads ordered by mask, then rate."""
    gen, keep = torch.Generator().manual_seed(seed), torch.arange(len(y)) if keep is None else keep
    heads, size = len(masks) * len(rates), min(batch_size, len(keep))
    lr = (torch.tensor(rates) * size / 256).repeat(len(masks)).to(device)[:, None]
    mask = masks.repeat_interleave(len(rates), 0).T.to(device)[..., None]  # (F, heads, 1)
    start = torch.randn(masks.shape[1], classes, generator=gen) * 0.01  # the same for every head, DINOv2's scale
    weight, bias = start.to(device)[:, None] * mask, torch.zeros(heads, classes, device=device)
    speed_w, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for i in range(iterations):
        pick, view = torch.randint(len(keep), (2, size), generator=gen)
        xb, yb = (v.to(device) for v in (x[view % len(x), keep[pick]], y[keep[pick]]))
        logits = (xb @ weight.flatten(1)).view(size, heads, classes) + bias
        grad = (logits.softmax(-1) - F.one_hot(yb, classes)[:, None]) / size  # (B, heads, classes)
        factor = lr * (0.5 * (1 + math.cos(math.pi * i / iterations)))
        speed_w.mul_(0.9).addcmul_((xb.T @ grad.flatten(1)).view_as(weight), mask)
        speed_b.mul_(0.9).add_(grad.sum(0))
        weight.addcmul_(factor, speed_w, value=-1)
        bias -= factor * speed_b
    return weight.transpose(0, 1), bias

def accuracy(x, y, weight, bias):
    """Top-1 in % of every head: x (N, F), y (N,), weight (heads, F, classes), bias (heads, classes)."""
    right = sum(((xb.to(weight.device) @ weight + bias[:, None]).argmax(-1).cpu() == yb).sum(1)
                for xb, yb in zip(x.split(1024), y.split(1024), strict=True))
    return right.double() * (100 / len(y))

def hold_out(y, seed, share=0.1):
    """Bool (N,): a tenth of every class of more than one image, to choose the head on."""
    held = torch.zeros(len(y), dtype=torch.bool)
    gen = torch.Generator().manual_seed(seed)
    for k in y.unique():
        members = (y == k).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=gen)]
        held[members[:max(1, round(len(members) * share)) if len(members) > 1 else 0]] = True
    return held

def linear_probe(x, y, classes, args, device="cpu"):
    """Train the 52 heads on nine tenths of (V, N, 5, D) features, choose one on the rest; val is never seen.
    Gives a function (N, 5, D), (N,) -> accuracy in % of the chosen head, and what was chosen."""
    held, masks, x = hold_out(y, args.seed), head_inputs(x.shape[-1]), x.flatten(2)
    protocol = args.iterations, args.batch_size, args.seed
    keep = (~held).nonzero()[:, 0]
    weight, bias = train_heads(x, y, classes, RATES, masks, *protocol, keep, device)
    scores = accuracy(x[0, held], y[held], weight, bias)
    best = int(scores.argmax())
    chosen = {"head": ["1 block", "1 block + patches", "4 blocks", "4 blocks + patches"][best // len(RATES)],
              "rate": RATES[best % len(RATES)], "held_out": float(scores[best])}
    return lambda f, labels: float(accuracy(f.flatten(1), labels, weight[best:best + 1], bias[best:best + 1])), chosen

# ==== k-NN, retrieval, cosine =======================================================================================
def knn(train_x, train_y, x, y, classes, neighbors=NEIGHBORS, temp=0.07):
    """{k: top-1 in %} of weighted k-NN on L2-normalised class tokens (N, D), weights exp(similarity / temp)."""
    train_x, x = F.normalize(train_x, dim=-1), F.normalize(x, dim=-1)
    right = dict.fromkeys(neighbors, 0)
    for xb, yb in zip(x.split(512), y.split(512), strict=True):
        similarity, nearest = (xb @ train_x.T).topk(min(max(neighbors), len(train_x)), dim=1)
        votes = F.one_hot(train_y[nearest], classes) * (similarity / temp).exp()[..., None]  # (B, k, classes)
        for k in neighbors:
            right[k] += int((votes[:, :k].sum(1).argmax(1) == yb).sum())
    return {k: 100 * n / len(y) for k, n in right.items()}

def retrieval_map(x, y):
    """Leave-one-out mean average precision in %: every image is a query against all others of its set; (N, D), (N,).
    Queries without another image of their class are left out."""
    x, values = F.normalize(x, dim=-1), []
    for start in range(0, len(x), 512):
        similarity = x[start:start + 512] @ x.T
        rows = torch.arange(len(similarity))
        similarity[rows, start + rows] = -math.inf  # the query itself comes last
        order = similarity.argsort(dim=1, descending=True, stable=True)[:, :-1]
        hit = (y[order] == y[start:start + 512, None]).double()  # (B, N - 1)
        precision = hit.cumsum(1) / torch.arange(1, len(x))
        values.append(((precision * hit).sum(1) / hit.sum(1))[hit.sum(1) > 0])
    return 100 * float(torch.cat(values).mean()) if len(torch.cat(values)) else None

def read_labels(train, val):
    """(class names, train labels (N,), val labels). Raises UserError where the class folders do not agree."""
    names = sorted(set(train.labels()))
    if unknown := sorted(set(val.labels()) - set(names)):
        raise UserError(f"{val.data}/val/{unknown[0]}: class unknown to train; both need the same classes")
    y, val_y = (torch.tensor([names.index(k) for k in f.labels()]) for f in (train, val))
    if y.bincount().max() < 2:
        raise UserError(f"{train.data}/train: no class has two images; the head is chosen on a held-out tenth")
    return names, y, val_y

def evaluate(args, device, saved=None):
    """All figures of one backbone as a dict; of several processes the first gives it, the others None. None, too, where
    `saved`, an earlier result, is of the same images and training."""
    features, started = Features(args, device), c.now()
    train, val = (features.folder(split, args.noise, args.denoised) for split in ("train", "val"))
    of = {"files": [str(train), str(val)], "pretrain": features.config, "summary": features.summary}
    if saved and all(saved.get(k) == v for k, v in of.items()):
        return c.say(f"{args.out}: complete, nothing to do")
    names, y, val_y = read_labels(train, val)
    source = "denoised" if args.denoised else "noisy"
    x, val_x, tests = features(train, source, "train", args.views), features(val, source, "val"), []
    if args.noise != "none" and (args.denoiser or not args.denoised):
        # the denoised arm's own pipeline at inference: every test image goes through its denoiser
        tests = [(strength, spec, val_x if strength == 1 and spec == args.noise else features(
                  features.folder("val", spec), "noisy", f"val {spec}", through_denoiser=bool(args.denoised)))
                 for strength, spec in sweep_specs(args.noise)]
    if x is None:
        return None
    val_x = val_x[0]
    linear, chosen = linear_probe(x, y, len(names), args, device)
    def neighbours(z, prefix=""):
        found = knn(x[0, :, 0], y, z[:, 0], val_y, len(names))
        return {f"{prefix}knn": {str(k): v for k, v in found.items()}, f"{prefix}map": retrieval_map(z[:, 0], val_y)}
    result = {"linear": linear(val_x, val_y), "chosen": chosen, **neighbours(val_x),
              "classes": len(names), "train": len(y), "val": len(val_y)}
    for strength, spec, (z,) in tests:
        result.setdefault("sweep", []).append({"strength": strength, "noise": spec, "linear": linear(z, val_y)})
        if spec == "none":
            result |= {"clean_linear": result["sweep"][-1]["linear"], **neighbours(z, "clean_"),
                       "cosine": float(F.cosine_similarity(val_x[:, 0], z[:, 0]).mean())}
    return {**result, "seconds": c.now() - started, "config": vars(args), **of}

def sweep_specs(spec, strengths=(0, 0.25, 0.5, 0.75, 1, 1.5, 2)):
    """Test-noise levels of the robustness curve: [(strength relative to the pretraining level, spec), ...]."""
    name, low, high = c.parse_noise(spec)
    _, inverse, most = c.NOISES[name]
    middle = (low + high) / 2
    levels = {s: min(middle / s if inverse else middle * s, most) for s in strengths if s}
    specs = {s: name + np.format_float_positional(level, 6, fractional=False, trim="-") for s, level in levels.items()}
    return [(0, "none"), *(specs | ({1: spec} if low == high else {})).items()]

# ==== report ========================================================================================================
ORDER = ["random", "noisy", "nc", "nct", "denoised", "clean"]
COLORS = ["#888888", "#d62728", "#ff9f1c", "#2ca02c", "#1f77b4", "#9467bd", "#8c564b", "#17becf"]
COLUMNS = {"linear": "linear", "clean_linear": "linear, clean val", "knn20": "20-NN", "map": "retrieval mAP",
           "cosine": "cosine noisy-clean", "minutes": "minutes", "images_s": "images/s", "peak_gb": "peak GB"}

def spread(values, digits=1):
    """'mean ± standard deviation' over seeds; the value alone for one seed; '-' for none."""
    values = [v for v in values if v is not None]
    text = f"{np.mean(values):.{digits}f}" if values else "-"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")

def report(out):
    """results.md, results.json and the four pictures from out/probe/ARM-seedK.json and out/pretrain/ARM-seedK."""
    arms = {}
    for path in sorted((out / "probe").glob("*-seed*.json")):
        result = c.read_json(path, {"linear", "knn", "map", "classes", "train", "val", "config", "pretrain", "summary"})
        arms.setdefault(path.stem.rpartition("-seed")[0], {})[path.stem] = result
    if not arms:
        raise UserError(f"{out}/probe: no results to report; run.sh makes them")
    arms = dict(sorted(arms.items(), key=lambda a: (ORDER + [a[0]]).index(a[0])))
    rows = {arm: [{**r, **r["summary"], "knn20": r["knn"]["20"], "minutes": r["summary"]["seconds"] / 60}
                  for r in runs.values()] for arm, runs in arms.items()}
    first = next(iter(next(iter(arms.values())).values()))
    table = ["| arm | seeds | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for arm, r in rows.items():
        cells = [spread([x.get(k) for x in r], 2 if k in ("cosine", "peak_gb") else 1) for k in COLUMNS]
        table.append(f"| {arm} | {len(r)} | " + " | ".join(cells) + " |")
    text = [f"# {out.name}", "",
            f"{first['classes']} classes, {first['train']} training and {first['val']} validation images, noise "
            f"{first['config']['noise']}, {first['pretrain']['arch']}, on {first['summary']['device']}. Figures in %, "
            "on the noisy validation set unless said; mean ± standard deviation over seeds; nothing selected on val. "
            "`denoised` needs its denoiser at test time; `clean` is tested on clean images.", "", *table, ""]
    if first.get("sweep"):
        specs = [s["noise"] for s in first["sweep"]]
        text += ["Linear probe tested at other noise levels:", "", "| arm | " + " | ".join(specs) + " |",
                 "|---" * (len(specs) + 1) + "|"]
        text += [f"| {arm} | " + " | ".join(spread([r["sweep"][i]["linear"] for r in runs.values()])
                                            for i in range(len(specs))) + " |"
                 for arm, runs in arms.items() if all("sweep" in r for r in runs.values())] + [""]
    quality = out / "denoiser" / "quality.json"
    if quality.exists() and "noisy_clean" in (q := c.read_json(quality)):
        text += [f"Denoiser: PSNR against clean {q['noisy_clean']:.2f} dB noisy, {q['denoised_clean']:.2f} denoised; "
                 f"against E[noisy | clean] {q['noisy_expected']:.2f} and {q['denoised_expected']:.2f} dB.", ""]
    pictures(out, arms)
    text += [f"![{name}]({name}.png)" for name in ("samples", "features", "robustness", "curves") if
             (out / f"{name}.png").exists()]
    c.write_atomic(out / "results.md", lambda f: f.write(("\n".join(text) + "\n").encode()))
    c.write_json(out / "results.json", arms)
    print("\n".join([*table, "", f"report: {out / 'results.md'}"]))

def pictures(out, arms):
    """samples.png, features.png, robustness.png, curves.png of the first seed of every arm."""
    runs = {arm: next(iter(r)) for arm, r in arms.items()}  # arm -> ARM-seedK
    results = {arm: arms[arm][run] for arm, run in runs.items()}
    # an arm that is probed on noisy images, if there is one; the clean arm's probe knows of no noise
    first = max(results.values(), key=lambda r: (r["config"]["noise"] != "none", not r["config"]["denoised"]))
    config, channels = first["config"], first["pretrain"]["channels"]
    denoised = next((d for r in results.values() if (d := r["pretrain"]["denoised"])), None)
    try:
        folder = c.Folder(config["data"], "val", config["noise"], config["noise_seed"], denoised, channels)
    except UserError as error:  # images moved away: the figures are still worth a report
        print(f"warning: no samples.png and features.png: {error}", file=sys.stderr)
    else:
        picks = np.linspace(0, len(folder) - 1, 6).astype(int)
        kinds = ["noisy"] + ["denoised"] * bool(denoised) + ["clean"] * (config["noise"] != "none")
        images = {k: [folder.read(i, k) for i in picks] for k in kinds}
        grid(images).save(out / "samples.png")
        grid({"input": images["noisy"], **{arm: principal_components(
            out / "pretrain" / run, images["denoised" if results[arm]["config"]["denoised"] else "noisy"])
            for arm, run in runs.items()}}).save(out / "features.png")
    sweeps = {arm: [(s["strength"], s["linear"]) for s in r["sweep"]] for arm, r in results.items() if "sweep" in r}
    if sweeps:
        chart([("linear probe, % against test noise (1 = pretraining level)", sweeps)]).save(out / "robustness.png")
    logs = {arm: c.read_log(out / "pretrain" / run / "log.jsonl") for arm, run in runs.items()}
    panels = {"dino": "DINO loss", "ibot": "iBOT loss", "anchor_dino": "anchor loss (DINO part)",
              "entropy": "teacher entropy, nats", "kl": "KL teacher to student", "rank": "effective rank"}
    lines = [(title + " against step", {arm: points for arm, log in logs.items()
                                        if (points := [(r["step"], r[k]) for r in log if k in r])})
             for k, title in panels.items()]
    chart(lines).save(out / "curves.png")

@torch.no_grad()
def principal_components(run, images, side=16):
    """First three principal components of the patch tokens as colours: images enlarged to side x side patches."""
    model, config = load_run(run, torch.device("cpu"))
    size = side * config["patch_size"]
    x = [(torch.from_numpy(i).permute(2, 0, 1)[None].float(), torch.tensor([i.shape[:2]])) for i in images]
    x = [c.resample(i, hw, torch.cat([0 * hw, hw], 1), torch.tensor([False]), size, 255.0) for i, hw in x]
    mean, std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
    tokens = model.forward_features((torch.cat(x) / 255 - mean) / std)["patches"]  # (B, N, D)
    flat = tokens.flatten(0, 1) - tokens.mean((0, 1))
    flat = flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:3].T
    low, high = flat.quantile(0.02, 0), flat.quantile(0.98, 0)
    rgb = ((flat - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return list(c.to_uint8(rgb.reshape(len(images), side, side, -1).numpy()))

def grid(columns, cell=160):
    """{title: [uint8 (H, W, C)]} to one picture, a column each; other than 1 or 3 channels show their first."""
    rows = max(map(len, columns.values()))
    sheet = Image.new("RGB", (len(columns) * (cell + 6) + 6, rows * (cell + 6) + 30), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (title, images) in enumerate(columns.items()):
        draw.text((10 + k * (cell + 6), 8), title, "black", ImageFont.load_default(14))
        for j, x in enumerate(images):
            image = Image.fromarray(x if x.shape[2] == 3 else x[:, :, 0]).convert("RGB")
            image = ImageOps.contain(image, (cell, cell), Image.NEAREST if max(image.size) < cell else Image.BICUBIC)
            sheet.paste(image, (6 + k * (cell + 6), 30 + j * (cell + 6)))
    return sheet

def chart(panels, width=620, height=340):
    """Line charts, two in a row: panels [(title, {name: [(x, y), ...]})], a colour a name, the same in all panels."""
    panels = [p for p in panels if p[1]] or [("no data", {"-": [(0, 0)]})]
    across = min(2, len(panels))
    sheet = Image.new("RGB", (across * width, math.ceil(len(panels) / across) * height), "white")
    draw, small = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    names = sorted({n for _, series in panels for n in series}, key=lambda n: (ORDER + [n]).index(n))
    for k, (title, series) in enumerate(panels):
        left, top = k % across * width + 50, k // across * height + 30
        w, h = width - 150, height - 70
        xs, ys = zip(*[p for s in series.values() for p in s], strict=True)
        x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1e-9), min(ys), max(max(ys), min(ys) + 1e-9)
        draw.text((left, top - 22), title, "black", ImageFont.load_default(14))
        for i in range(5):
            y, x = top + h - h * i / 4, left + w * i / 4
            draw.line([(left, y), (left + w, y)], "#dddddd")
            draw.text((left - 44, y - 7), f"{y0 + (y1 - y0) * i / 4:.4g}", "#555555", small)
            draw.text((x - 8, top + h + 6), f"{x0 + (x1 - x0) * i / 4:.4g}", "#555555", small)
        for i, name in enumerate(names):
            color = COLORS[(ORDER.index(name) if name in ORDER else i) % len(COLORS)]
            points = [(left + w * (x - x0) / (x1 - x0), top + h - h * (y - y0) / (y1 - y0))
                      for x, y in series.get(name, [])]
            if points:
                draw.line(points, color, 2)
                if len(points) == 1:  # a run of one log line is seen, too
                    draw.ellipse([v + d for d in (-3, 3) for v in points[0]], color)
                draw.text((left + w + 10, top + 16 * i), name, color, small)
    return sheet

def main():
    if sys.argv[1:2] == ["report"]:
        if len(sys.argv) != 3:
            raise UserError("usage: python probe.py report runs/NAME")
        return report(Path(sys.argv[2]))
    checking = sys.argv[1:2] == ["check"]
    args = read_config(sys.argv[1 + checking:])
    if checking:
        train = c.Folder(args.data, "train", args.noise)
        return read_labels(train, c.Folder(args.data, "val", args.noise, channels=train.channels)) and 0
    saved, out = None, Path(args.out)
    if out.exists():
        saved = c.read_json(out, {"config"})
        c.check_config(saved["config"], vars(args), c.FREE | {"data"}, out)
    result = evaluate(args, c.setup(args.device), saved)
    if result:
        c.write_json(out, result)
        c.say(f"{out.stem}:", *(f"{k} {result[k]:.1f}" for k in ("linear", "clean_linear") if k in result))

if __name__ == "__main__":
    c.run(main)
