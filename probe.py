"""Stage 3: what a frozen backbone is worth on noisy images: linear probe, k-NN, retrieval,
robustness; the report.

    python probe.py --preset tiny --data DIR --noise gauss100 --run OUT/nct --out OUT/nct.json
    python probe.py --preset imagenet1k --data DIR --noise gauss255 --weights FILE --out FILE.json
    torchrun --nproc_per_node 8 -- probe.py ...   (each process embeds its share of the images)
    python probe.py check --data DIR              (labels and headers, before the long stages)
    python probe.py report runs/NAME              (results.md, results.json, four pictures)

In: DIR/{train,val}/<class>/*, and a finished run of pretrain.py or a file of ViT weights: ours,
DINOv2's, the paper's teacher checkpoints, timm's. Out: one JSON file. Labels are used here alone.
"""

import hashlib
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
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
IMAGES_FLAGS = {
    "run": ("", "folder of a finished run: backbone.pth, config.json, summary.json"),
    "weights": ("", "instead of --run: a file of ViT weights, whose shapes tell the architecture"),
    "heads": (0, "with --weights: attention heads; 0: as usual for the width"),
    "mean": ([], "with --weights: of its normalisation; if not given, ImageNet's"),
    "std": ([], "with --weights: of its normalisation; if not given, ImageNet's"),
    "denoised": ("", "probe on these denoised images instead of the noisy ones (arm denoised)"),
    "denoiser": ("", "with --denoised: what clean and other test images go through"),
}
PROTOCOL_FLAGS = {
    "seed": (0, "of held-out images, heads and views"),
    "img_size": (224, "pixels that the backbone sees"),
    "resize": (256, "short side before the central crop of --img_size"),
    "views": (0, "randomly cropped views of each training image besides the central one"),
    "iterations": (12500, "steps of the linear heads"),
    "batch_size": (128, "of the linear heads"),
}
GROUPS = {
    "data": c.DATA_FLAGS | IMAGES_FLAGS,
    "protocol": PROTOCOL_FLAGS,
    "running": c.RUNNING_FLAGS,
}


def read_config(argv):
    args = c.read_flags(
        argv, __doc__, PRESETS, GROUPS, positive=("iterations", "batch_size", "img_size")
    )
    if bool(args.run) == bool(args.weights):
        raise UserError("give --run, a folder of pretrain.py, or --weights, a file of ViT weights")
    if args.run and (args.heads or args.mean or args.std):
        raise UserError("--heads, --mean, --std: are for --weights; a run has its own")
    if args.denoiser and not args.denoised:
        raise UserError("--denoiser: has no effect without --denoised")
    if args.resize < args.img_size:
        raise UserError(f"--resize {args.resize}: must be at least --img_size {args.img_size}")
    return args


# ==== backbone ====================================================================================
class Backbone:
    """A frozen ViT with its normalisation. about: what is known of its training, for the report."""

    def __init__(self, model, mean, std, file, device, about):
        self.model = model.to(device).eval().requires_grad_(False)
        self.channels = model.patch_embed["proj"].in_channels
        if not len(mean) == len(std) == self.channels:
            raise UserError(f"--mean, --std: must have {self.channels} values, one a channel")
        for name in c.not_finite(model.state_dict()):
            raise UserError(f"{file}: {name} is not finite")
        self.mean, self.std = torch.tensor([mean, std], device=device)[..., None, None]
        self.about = {**about, "backbone": hashlib.sha256(Path(file).read_bytes()).hexdigest()}

    @torch.no_grad()
    def embed(self, crops):
        """uint8 crops (B, C, S, S) to (B, 5, D) float32: the class tokens of the last 4 blocks, the last first (with
        fewer blocks the first is repeated); the last block's mean patch token."""
        layers = self.model.last_layers((crops / 255 - self.mean) / self.std, 4)
        tokens = [layer["cls"] for layer in layers]
        tokens += tokens[-1:] * (4 - len(tokens))
        return torch.stack([*tokens, layers[0]["patches"].mean(1)], 1).float()


def load_backbone(args, device):
    """The backbone of --run or --weights. Raises UserError."""
    if args.run:
        return load_run(args.run, device)
    mean, std = args.mean or [0.485, 0.456, 0.406], args.std or [0.229, 0.224, 0.225]
    return Backbone(c.vit_of(args.weights, args.heads), mean, std, args.weights, device, {})


def load_run(folder, device):
    """The backbone of a finished run of pretrain.py. Raises UserError."""
    file = Path(folder, "backbone.pth")
    if not file.exists():
        raise UserError(f"--run {folder}: no backbone.pth; finish the run with pretrain.py")
    config = c.read_json(Path(folder, "config.json"), {"arch", "channels", "mean", "std", "source"})
    summary = c.read_json(Path(folder, "summary.json"), {"seconds", "device"})
    model = c.make_vit(
        config["arch"],
        config["patch_size"],
        img_size=config["global_size"],
        in_chans=config["channels"],
        registers=config["registers"],
    )
    c.load_parts({"backbone": model}, {"backbone": c.load_checkpoint(file)})
    about = {"pretrain": config, "summary": summary}
    return Backbone(model, config["mean"], config["std"], file, device, about)


# ==== features: each image goes through the backbone once per view ================================
CHUNK = 64  # consecutive images that are embedded together, the same in any number of processes


def central_crop(image, resize, size):
    """uint8 (C, H, W): the short side resized to `resize`, then the centre (C, size, size)."""
    _, H, W = image.shape
    short = min(H, W)
    x = c.resize(image, resize * H // short, resize * W // short)
    top = (x.shape[1] - size) // 2
    left = (x.shape[2] - size) // 2
    return x[:, top : top + size, left : left + size]


def crop_views(args, image, views, path):
    """The central crop of an image and random views of it: uint8 (1 + views, C, S, S)."""
    crops = [central_crop(image, args.resize, args.img_size)]
    rng = random.Random(f"{args.seed}:{path}")
    for _ in range(views):
        box = c.draw_box(*image.shape[1:], (0.08, 1), rng)
        crops.append(c.cut(image, box, rng.random() < 0.5, args.img_size))
    return torch.stack(crops)


def embed_folder(args, backbone, folder, source, device, views=0, denoiser=None):
    """Features of every image in order, (1 + views, N, 5, D), on the first process; None on the
    others. denoiser: a model that the images go through first."""
    rank, size = c.world()
    context, _ = c.autocast(device, args.amp)

    def read(*chunk):  # by the workers
        images = [folder.read(i, source) for i in chunk]
        return images if denoiser else crops_of(chunk, images)

    def crops_of(chunk, images):  # (1 + views, B, C, S, S)
        crops = [
            crop_views(args, x, views, folder.paths[i]) for i, x in zip(chunk, images, strict=True)
        ]
        return torch.stack(crops, 1)

    def embed(chunk, crops):  # (1 + views, CHUNK, 5, D), zeros beyond the images
        if denoiser:
            images = denoise.denoise_list(denoiser, crops, device, context=context)
            crops = crops_of(chunk, images).to(device)
        with context():
            embedded = [backbone.embed(view) for view in crops]
        embedded = torch.stack(embedded).cpu()
        return F.pad(embedded, (0, 0, 0, 0, 0, CHUNK - len(chunk)))

    chunks = [chunk.tolist() for chunk in torch.arange(len(folder)).split(CHUNK)]
    mine = chunks[rank::size]
    made = c.prefetch(read, mine, torch.device("cpu") if denoiser else device, args.workers)
    features = []
    rounds = range(0, len(chunks), size)
    for start in tqdm(rounds, f"embed {folder.split} {folder.spec}", leave=False, disable=rank > 0 or None):
        block = torch.zeros(1 + views, CHUNK, 5, backbone.model.embed_dim)
        if start + rank < len(chunks):
            block = embed(chunks[start + rank], next(made))
        blocks = c.gather_rows(block[None])  # of all processes
        if rank == 0:
            features += blocks
    if rank > 0:
        return None
    return torch.cat(features, 1)[:, : len(folder)]


# ==== linear probe: the 52 heads of DINOv2's protocol =============================================
RATES = [k * 10.0**n for n in range(-5, -1) for k in (1, 2, 5)] + [0.1]  # 13; times batch / 256
INPUTS = {
    "1 block": [0],
    "1 block + patches": [0, 4],
    "4 blocks": [0, 1, 2, 3],
    "4 blocks + patches": [0, 1, 2, 3, 4],
}  # the tokens that the heads see


def head_logits(x, tokens, weight, bias):
    """Logits (B, heads, classes) of features (B, 5, D); weight (F, heads, classes), bias (heads, classes)."""
    flat = x[:, tokens].flatten(1).to(weight.device)  # (B, F)
    return (flat @ weight.flatten(1)).unflatten(1, bias.shape) + bias


def train_heads(x, y, classes, tokens, args, keep, device="cpu"):
    """A linear head for each of RATES, all at once: SGD 0.9 without weight decay, cosine to 0.

    x (V, N, 5, D) features of V views, y (N,) classes, on the host; tokens: of the 5 those that the
    heads see; keep: images to train on. Gives weight (F, rates, classes) and bias (rates, classes).
    """
    gen = torch.Generator().manual_seed(args.seed)
    size = min(args.batch_size, len(keep))
    rates = torch.tensor(RATES, device=device)[:, None] * size / 256
    inputs = len(tokens) * x.shape[-1]
    start = 0.01 * torch.randn(inputs, 1, classes, generator=gen)  # DINOv2's scale, for every rate
    weight = start.repeat(1, len(RATES), 1).to(device).requires_grad_()
    bias = torch.zeros(len(RATES), classes, device=device, requires_grad=True)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for i in range(args.iterations):
        picked, view = torch.randint(len(keep), (2, size), generator=gen)
        picked = keep[picked]
        features = x[view % len(x), picked]
        logits = head_logits(features, tokens, weight, bias).transpose(1, 2)
        target = y[picked].to(device)[:, None].expand(-1, len(RATES))
        loss = F.cross_entropy(logits, target, reduction="sum") / size  # each head has its own
        gradients = torch.autograd.grad(loss, (weight, bias))
        lr = rates * 0.5 * (1 + math.cos(math.pi * i / args.iterations))
        with torch.no_grad():
            for p, v, g in zip((weight, bias), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(lr * v)
    return weight.detach(), bias.detach()


def accuracy(x, y, *head):
    """Top-1 in % of every head: x (N, 5, D), y (N,), head: tokens, weight, bias."""
    right = [head_logits(part, *head).argmax(-1).cpu() for part in x.split(1024)]
    return (torch.cat(right) == y[:, None]).double().mean(0) * 100


def hold_out(y, seed, share=0.1):
    """Bool (N,): a tenth of every class of more than one image, to choose the head on."""
    held = torch.zeros(len(y), dtype=torch.bool)
    gen = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=gen)
    for k in y.unique():
        members = order[y[order] == k]
        count = max(1, round(len(members) * share))
        if len(members) > 1:
            held[members[:count]] = True
    return held


def linear_probe(x, y, classes, args, device="cpu"):
    """Train the 52 heads on nine tenths of (V, N, 5, D) features, choose one on the rest; val is
    never seen. Gives (tokens, weight, bias) of that head, and what was chosen."""
    held, best = hold_out(y, args.seed), None
    keep = (~held).nonzero()[:, 0]
    for name, tokens in INPUTS.items():
        weight, bias = train_heads(x, y, classes, tokens, args, keep, device)
        score, k = accuracy(x[0, held], y[held], tokens, weight, bias).max(0)
        if best is None or score > best["held_out"]:
            best = {"head": name, "rate": RATES[k], "held_out": score.item()}
            head = tokens, weight[:, k : k + 1], bias[k : k + 1]
    return head, best


# ==== k-NN, retrieval =============================================================================
NEIGHBORS = (10, 20, 100, 200)


def knn(train_x, train_y, x, y, classes, temp=0.07):
    """{k: top-1 in %} of weighted k-NN on L2-normalised class tokens (N, D); weights
    exp(similarity / temp)."""
    train_x, x = F.normalize(train_x, dim=-1), F.normalize(x, dim=-1)
    most = min(NEIGHBORS[-1], len(train_x))
    right = dict.fromkeys(NEIGHBORS, 0)
    for xb, yb in zip(x.split(512), y.split(512), strict=True):
        similarity, nearest = (xb @ train_x.T).topk(most)
        weights = (similarity / temp).exp()
        votes = F.one_hot(train_y[nearest], classes) * weights[..., None]
        for k in NEIGHBORS:  # votes (B, neighbours, classes)
            predicted = votes[:, :k].sum(1).argmax(1)
            right[k] += (predicted == yb).sum().item()
    return {str(k): 100 * n / len(y) for k, n in right.items()}


def retrieval_map(x, y):
    """Leave-one-out mean average precision in %: every image is a query against all others of its
    set; (N, D), (N,). Queries without another image of their class are left out."""
    x = F.normalize(x, dim=-1)
    rank = torch.arange(1, len(x))
    values = []
    for i, label in enumerate(y):
        similarity = x @ x[i]
        similarity[i] = -math.inf  # the query itself comes last
        order = similarity.argsort(descending=True, stable=True)[:-1]
        hit = (y[order] == label).double()
        precision = hit.cumsum(0) / rank
        if hit.any():
            values.append((precision * hit).sum() / hit.sum())
    if not values:
        return None
    return 100 * torch.stack(values).mean().item()


# ==== all figures of one backbone =================================================================
def read_labels(train, val):
    """(class names, train labels (N,), val labels). Raises UserError where the class folders do not agree."""
    names = sorted(set(train.labels()))
    number = {name: k for k, name in enumerate(names)}
    unknown = sorted(set(val.labels()) - set(names))
    if unknown:
        raise UserError(f"{val.data}/val/{unknown[0]}: class unknown to train; both need the same")
    y, val_y = (torch.tensor([number[k] for k in f.labels()]) for f in (train, val))
    if y.bincount().max() < 2:
        raise UserError(
            f"{train.data}/train: no class has two images; the head is chosen on a held-out tenth"
        )
    return names, y, val_y


def sweep_specs(spec):
    """Test noise of the robustness curve: {strength relative to the pretraining level: spec}. The
    first parameter is scaled, up to its limit; ranges are taken at their middle."""
    name, ranges = c.parse_noise(spec)
    model, specs = c.NOISES[name], {0: "none"}
    first, *others = (sum(levels) / 2 for levels in ranges)
    for strength in (0.25, 0.5, 0.75, 1, 1.5, 2):
        level = min(first / strength if model.inverse else first * strength, model.most)
        specs[strength] = name + ",".join(
            f"{v:.6f}".rstrip("0").rstrip(".") for v in (level, *others)
        )
    return specs


def open_folder(args, backbone, split):
    """A split of the images, of the backbone's channels. Raises UserError."""
    known = backbone.channels if split == "val" else None  # grey val images may serve as colour
    folder = c.Folder(args.data, split, args.noise, args.noise_seed, args.denoised, known)
    if folder.channels != backbone.channels:
        raise UserError(
            f"{args.data}: {folder.channels} channels, the backbone has {backbone.channels}"
        )
    return folder


def evaluate(args, device, saved):
    """All figures of one backbone as a dict; of several processes the first gives it, the others None. None, too, where
    `saved`, an earlier result, is of the same images and backbone."""
    started, backbone, denoiser = c.now(), load_backbone(args, device), None
    patch = backbone.model.patch_size
    if args.img_size % patch:
        raise UserError(f"--img_size {args.img_size}: is no multiple of the patch size {patch}")
    if args.denoiser:
        denoiser, _ = denoise.load_denoiser(args.denoiser, device)
    train, val = (open_folder(args, backbone, split) for split in ("train", "val"))
    of = {"files": [train.fingerprint(), val.fingerprint()], **backbone.about}
    if of.items() <= saved.items():
        c.say(f"{args.out}: complete, nothing to do")
        return None
    names, y, val_y = read_labels(train, val)
    source, specs = "denoised" if args.denoised else "noisy", {}
    if args.noise != "none" and (denoiser or not args.denoised):
        specs = sweep_specs(args.noise)
    x = embed_folder(args, backbone, train, source, device, args.views)
    val_x = embed_folder(args, backbone, val, source, device)
    tests = {}
    for strength, spec in specs.items():  # through the denoised arm's own denoiser
        tests[strength] = val_x
        if denoiser or spec != args.noise:
            other = val.under(spec)
            tests[strength] = embed_folder(args, backbone, other, "noisy", device, denoiser=denoiser)
    if x is None:
        return None
    head, chosen = linear_probe(x, y, len(names), args, device)

    def figures(z, prefix):
        z = z[0]
        return {
            f"{prefix}linear": accuracy(z, val_y, *head).item(),
            f"{prefix}knn": knn(x[0, :, 0], y, z[:, 0], val_y, len(names)),
            f"{prefix}map": retrieval_map(z[:, 0], val_y),
        }

    result = {
        **figures(val_x, ""),
        "chosen": chosen,
        "classes": len(names),
        "train": len(y),
        "val": len(val_y),
    }
    if tests:
        result |= figures(tests[0], "clean_")
        result["cosine"] = F.cosine_similarity(val_x[0, :, 0], tests[0][0, :, 0]).mean().item()
        result["sweep"] = [
            {"strength": k, "noise": specs[k], "linear": accuracy(z[0], val_y, *head).item()}
            for k, z in tests.items()
        ]
    return {**result, "seconds": c.now() - started, "config": vars(args), **of}


# ==== report: tables ==============================================================================
COLORS = {
    "random": "#888888",
    "noisy": "#d62728",
    "nc": "#ff9f1c",
    "nct": "#2ca02c",
    "denoised": "#1f77b4",
    "clean": "#9467bd",
}  # in the order of the table
COLUMNS = {
    "linear": "linear",
    "clean_linear": "linear, clean val",
    "knn20": "20-NN",
    "map": "retrieval mAP",
    "cosine": "cosine noisy-clean",
    "minutes": "minutes",
    "images_s": "images/s",
    "peak_gb": "peak GB",
}


def spread(values, digits=1):
    """'mean ± standard deviation' over seeds; the value alone for one seed; '-' for none."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def read_results(out):
    """{arm: {ARM-seedK: result}} of out/probe, in the order of COLORS. Raises UserError."""
    arms = {arm: {} for arm in COLORS}
    needed = {"linear", "knn", "map", "classes", "train", "val", "config", "pretrain", "summary"}
    for path in sorted((out / "probe").glob("*-seed*.json")):
        result = c.read_json(path, needed)
        minutes = result["summary"]["seconds"] / 60
        result = result["summary"] | {"knn20": result["knn"]["20"], "minutes": minutes} | result
        arms.setdefault(path.stem.rpartition("-seed")[0], {})[path.stem] = result
    arms = {arm: runs for arm, runs in arms.items() if runs}
    if not arms:
        raise UserError(f"{out}/probe: no results to report; run.sh makes them")
    return arms


def report(out):
    """results.md, results.json and four pictures from out/probe/ARM-seedK.json and out/pretrain."""
    arms = read_results(out)
    rows, sweeps, results = [], [], []
    for arm, runs in arms.items():
        runs = list(runs.values())
        results += runs
        digits = {"cosine": 2, "peak_gb": 2}
        rows.append(
            [
                arm,
                str(len(runs)),
                *(spread([r.get(k) for r in runs], digits.get(k, 1)) for k in COLUMNS),
            ]
        )
        if "sweep" in runs[0]:
            points = zip(*(r["sweep"] for r in runs), strict=True)
            sweeps.append([arm, *(spread([p["linear"] for p in point]) for point in points)])
    first = max(results, key=lambda r: "sweep" in r)
    figures = table(["arm", "seeds", *COLUMNS.values()], rows)
    text = [
        f"# {out.name}",
        "",
        f"{first['classes']} classes, {first['train']} training and {first['val']} validation images, noise "
        f"{first['config']['noise']}, {first['pretrain']['arch']}, on {first['summary']['device']}. Figures in %, "
        "on the noisy validation set unless said; mean ± standard deviation over seeds; nothing is selected on "
        "val. `denoised` needs its denoiser at test time; `clean` is tested on clean images.",
        "",
        *figures,
        "",
    ]
    if sweeps:
        header = ["arm", *(point["noise"] for point in first["sweep"])]
        text += ["Linear probe tested at other noise levels:", "", *table(header, sweeps), ""]
    quality = out / "denoiser" / "quality.json"
    if quality.exists() and sweeps:
        q = c.read_json(quality, {"noisy_clean"})
        text += [
            f"Denoiser: PSNR against clean {q['noisy_clean']:.2f} dB noisy, {q['denoised_clean']:.2f} denoised; "
            f"against E[noisy | clean] {q['noisy_expected']:.2f} and {q['denoised_expected']:.2f} dB.",
            "",
        ]
    for name, picture in pictures(out, arms, first["config"]).items():
        picture.save(out / f"{name}.png")
        text.append(f"![{name}]({name}.png)")
    c.write_text(out / "results.md", "\n".join(text) + "\n")
    c.write_json(out / "results.json", arms)
    print("\n".join([*figures, "", f"report: {out / 'results.md'}"]))


# ==== report: pictures ============================================================================
PANELS = {
    "dino": "DINO loss",
    "ibot": "iBOT loss",
    "anchor_dino": "anchor loss (DINO part)",
    "entropy": "teacher entropy, nats",
    "kl": "KL teacher to student",
    "rank": "effective rank",
}


def pictures(out, arms, config):
    """{name: picture} of the first seed of every arm; config: of a probe on noisy images."""
    panels, curves, runs = {}, {}, {}
    for arm, of_arm in arms.items():
        run, result = next(iter(of_arm.items()))
        runs[out / "pretrain" / run] = result
        curves[arm] = [(p["strength"], p["linear"]) for p in result.get("sweep", [])]
        log = c.read_log(out / "pretrain" / run / "log.jsonl")
        for key, title in PANELS.items():
            line = [(r["step"], r[key]) for r in log if key in r]
            panels.setdefault(f"{title} against step", {})[arm] = line
    made = {}
    try:
        made |= sample_pictures(runs, config)
    except UserError as error:  # images moved away: the figures are still worth a report
        print(f"warning: no samples.png and features.png: {error}", file=sys.stderr)
    made["robustness"] = chart({"linear probe, % against test noise (1: as trained)": curves})
    made["curves"] = chart(panels)
    return {name: picture for name, picture in made.items() if picture}


def sample_pictures(runs, config):
    """Six val images, noisy, denoised and clean; and what the backbone of every run makes of them."""
    channels, sources, copy = 3, ["noisy"], ""
    for result in runs.values():
        channels, copy = result["pretrain"]["channels"], result["pretrain"]["denoised"] or copy
    sources += ["denoised"] * bool(copy) + ["clean"] * (config["noise"] != "none")
    folder = c.Folder(config["data"], "val", config["noise"], config["noise_seed"], copy, channels)
    images = {source: [folder.read(i, source) for i in folder.spread(6)] for source in sources}
    features = {"input": images["noisy"]}
    for run, result in runs.items():
        seen = "denoised" if result["config"]["denoised"] else "noisy"
        features[run.name] = principal_components(run, images[seen])
    return {"samples": grid(images), "features": grid(features)}


@torch.no_grad()
def principal_components(run, images, side=16):
    """First three principal components of the patch tokens as colours, (3, side, side) an image."""
    backbone = load_run(run, torch.device("cpu"))
    size = side * backbone.model.patch_size
    crops = torch.stack([c.resize(image, size, size) for image in images])
    x = (crops / 255 - backbone.mean) / backbone.std
    tokens = backbone.model.forward_features(x)["patches"]  # (B, N, D)
    _, _, axes = torch.pca_lowrank(tokens.flatten(0, 1), 3)
    colours = tokens @ axes  # (B, N, 3)
    bounds = torch.tensor([0.02, 0.98])
    low, high = colours.flatten(0, 1).quantile(bounds, dim=0)
    colours = (colours - low) / (high - low).clamp(min=1e-6)
    return c.to_uint8(colours.clamp(0, 1)).mT.unflatten(2, (side, side))


def grid(columns, cell=160, gap=6):
    """{title: uint8 images (C, H, W)} to one picture, a column each."""
    step = cell + gap
    rows = max(map(len, columns.values()))
    size = len(columns) * step + gap, rows * step + 30
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for k, (title, images) in enumerate(columns.items()):
        left = k * step + gap
        draw.text((left, 8), title, "black", font)
        for j, x in enumerate(images):
            picture = denoise.picture(x).convert("RGB")
            thumbnail = ImageOps.pad(picture, (cell, cell), color="white")
            sheet.paste(thumbnail, (left, j * step + 30))
    return sheet


def chart(panels):
    """Line charts, two in a row: {title: {name: [(x, y), ...]}}. None where there is no point."""
    drawn = [draw_panel(title, lines) for title, lines in panels.items() if any(lines.values())]
    if not drawn:
        return None
    width, height = 620, 340
    across, down = min(2, len(drawn)), math.ceil(len(drawn) / 2)
    sheet = Image.new("RGB", (across * width, down * height), "white")
    for k, panel in enumerate(drawn):
        row, column = divmod(k, 2)
        small = panel.resize((width, height), Image.LANCZOS)  # drawn larger: lines become smooth
        sheet.paste(small, (column * width, row * height))
    return sheet


def axis(values, start, end):
    """(round ticks over all values, function that places a value between pixels start and end)."""
    low, high = min(values), max(values)
    extent = max(high - low, abs(high) / 1e3, 1e-9)
    step = 10.0 ** math.floor(math.log10(extent))
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    ticks = np.arange(first, last + 1) * step

    def place(value):
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return start + share * (end - start)

    return ticks, place


def draw_panel(title, lines):
    """One chart of 1860 x 1020 pixels; the same colour for a name in every panel."""
    sheet = Image.new("RGB", (1860, 1020), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(36)
    left, top, right, bottom = 170, 100, 1580, 910
    xs, ys = zip(*sum(lines.values(), []), strict=True)
    x_ticks, across = axis(xs, left, right)
    y_ticks, up = axis(ys, bottom, top)
    draw.text((left, 20), title, "black", font)
    for x in x_ticks:
        draw.text((across(x), bottom + 20), f"{x:.6g}", "#555555", font, anchor="ma")
    for y in y_ticks:
        height = up(y)
        draw.line([left, height, right, height], "#dddddd", 3)
        draw.text((left - 20, height), f"{y:.6g}", "#555555", font, anchor="rm")
    for name, line in lines.items():
        color = COLORS.get(name, "black")
        points = [(across(x), up(y)) for x, y in line]
        if points:
            draw.line(points, color, 6, joint="curve")
            draw.circle(points[-1], 6, color)  # a line of one point is seen, too
            draw.text((right + 30, top), name, color, font)
            top += 48
    return sheet


def main():
    command, *rest = sys.argv[1:] or [""]
    if command == "report":
        if len(rest) != 1:
            raise UserError("usage: python probe.py report runs/NAME")
        return report(Path(rest[0]))
    if command == "check":
        args = c.read_flags([*rest, "--out", "none"], __doc__, PRESETS, {"data": c.DATA_FLAGS})
        train = c.Folder(args.data, "train", args.noise)
        read_labels(train, c.Folder(args.data, "val", args.noise, channels=train.channels))
        return 0
    args, saved = read_config(sys.argv[1:]), {}
    out = Path(args.out)
    if out.exists():
        saved = c.read_json(out, {"config"})
        c.check_config(saved["config"], vars(args), c.FREE | {"data"}, out)
    result = evaluate(args, c.setup(args.device), saved)
    if result:
        c.write_json(out, result)
        shown = [f"{k} {result[k]:.1f}" for k in ("linear", "clean_linear") if k in result]
        c.say(f"{out.stem}: {' '.join(shown)}")
    return 0


if __name__ == "__main__":
    c.run(main)
