"""Stage 2: DINOv2 on one kind of images, noisy, denoised or clean, with or without an anchor: a
frozen teacher that sees the same crops denoised.

    python pretrain.py --preset tiny --data DIR --noise gauss100 --source noisy --out OUT/noisy

A noise curriculum is two runs. The last line, the anchor's, makes it NCT; without it, it is NC.

    python pretrain.py ... --source denoised --denoised DENOISED --epochs 10 --stop 6 --out OUT/first
    python pretrain.py ... --source noisy --epochs 4 --init OUT/first/epoch6.pth --out OUT/nct \\
        --denoised DENOISED --anchor 4

On several GPUs: torchrun --nproc_per_node 8 -- pretrain.py ...
In: any folder of images, or DIR/train, and its denoised copy. Out: checkpoint.pth, log.jsonl,
config.json, and at the end backbone.pth (the teacher's ViT) and summary.json. Interrupted, it exits
with code 75; the same command goes on, on CPUs bit for bit.
"""

import functools
import math
import random
import resource
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

import common as c
from common import UserError

# ==== config: presets are defaults that flags override ============================================
# short runs of a narrow ViT on few images: without a high rate everywhere and LayerScale 1 they learn
# nothing; Sinkhorn's targets and small patches say more than the paper's (results/README.md)
SMALL = {
    "arch": "128,4,4", "patch_size": 8, "global_size": 48, "local_size": 24, "local_crops": 2,
    "batch_size": 64, "prototypes": 512, "head_hidden": 256, "head_bottleneck": 64,
    "layer_scale": 1.0, "lr": 0.008, "layer_decay": 1.0, "patch_embed_lr": 1.0, "momentum": 0.99,
    "teacher_temp": 0.04, "teacher_temp_warmup_epochs": 0.0, "warmup_epochs": 2.0,
    "ibot_weight": 0.5, "centering": "sinkhorn",
}
PRESETS = {
    "demo": SMALL | {"epochs": 12, "global_size": 40},
    "tiny": SMALL | {"epochs": 60, "teacher_temp": 0.02},
    # images of 64 to 256 pixels: as many patches a crop as tiny has; run.sh sets the epochs
    "small": SMALL | {"epochs": 60, "teacher_temp": 0.02, "patch_size": 16, "global_size": 96,
                      "local_size": 48},
    "imagenet100": {"epochs": 200, "batch_size": 40},  # the paper's: the rest are flags' defaults
    "imagenet1k": {"arch": "vit_base", "epochs": 100, "batch_size": 512, "drop_path": 0.1},
}
FLAGS = {
    "data": c.DATA_FLAGS,
    "curriculum": {
        "source": ("noisy", "the images of this run: noisy, denoised or clean"),
        "denoised": ("", "folder of denoised images, same relative paths"),
        "epochs": (200, "length of the run, which its schedules are made for; 0: random weights"),
        "stop": (0, "end after so many epochs, saved as epochN.pth; the same command without it goes on to --epochs"),
        "init": ("", "checkpoint or folder of a run whose networks and centres to start from (restart)"),
        "init_backbone": ("", "ViT weights (ours, DINOv2's, the release's, timm's) to start from"),
        "anchor": (0.0, "weight of the frozen teacher on denoised crops; 1 to 5 is usual"),
        "anchor_from": ("", "as --init, whose teacher is the anchor instead of --init's"),
        "anchor_head": ("frozen", "the anchor's own head (the paper) or the live teacher's (its code)"),
    },
    "model": {
        "arch": ("vit_small", "vit_tiny, vit_small, vit_base, vit_large or WIDTH,DEPTH,HEADS"),
        "patch_size": (16, "pixels; divides both crop sizes"),
        "registers": (0, "register tokens"),
        "layer_scale": (1e-5, "initial LayerScale; 0.1-1 for runs of a few thousand steps"),
        "drop_path": (0.0, "stochastic depth of the student; 0.1 for ImageNet-1k"),
        "prototypes": (65536, "outputs of the head, K; far more than images x 10 are of no use"),
        "head_hidden": (2048, "hidden width of the head"),
        "head_bottleneck": (256, "width before the prototypes"),
    },
    "crops": {
        "global_size": (224, "pixels of the two global crops"),
        "local_size": (96, "pixels of the local crops"),
        "local_crops": (8, "number of local crops"),
        "global_scale": ([0.32, 1.0], "area of a global crop, as a part of the image"),
        "local_scale": ([0.05, 0.32], "area of a local crop"),
        "rotate": (False, "also random quarter turns: for images without an up (cells, stars, radar, satellites)"),
    },
    "optimiser": {
        "batch_size": (64, "images a step over all processes"),
        "lr": (0.004, "at batch 1024; scaled by sqrt(batch / 1024)"),
        "warmup_epochs": (10.0, "linear warm-up of the rate"),
        "weight_decay": ([0.04, 0.4], "at the start and, along a cosine, at the end"),
        "layer_decay": (0.9, "learning-rate factor from block to block"),
        "patch_embed_lr": (0.2, "that of the patch embedding; 1 for runs of a few thousand steps"),
        "clip": (3.0, "gradient norm of backbone and of head, each"),
        "freeze_last_epochs": (1, "epochs in which the prototypes do not learn"),
        "momentum": (0.992, "teacher's EMA at the start, 1 at the end; 0.99 for short runs"),
        "teacher_temp": (0.07, "after its warm-up from 0.04; above 0.07 is unstable"),
        "teacher_temp_warmup_epochs": (30.0, "linear warm-up of the temperature"),
        "centering": ("center", "of the teacher's outputs"),
        "ibot_weight": (1.0, "weight of the masked-patch loss"),
        "koleo_weight": (0.1, "weight of the nearest-neighbour spreading loss"),
    },
    "running": c.RUNNING_FLAGS | c.TRAINING_FLAGS | {"compile": (False, "faster on GPUs")},
}
CHOICES = {"source": ["noisy", "denoised", "clean"], "anchor_head": ["frozen", "live"],
           "centering": ["center", "sinkhorn"]}
POSITIVE = ("batch_size", "patch_size", "prototypes", "log_steps", "head_hidden", "head_bottleneck",
            "lr", "global_size", "local_size", "clip", "teacher_temp")
FREE = c.FREE | {"compile", "stop"}
NETWORKS = ("student", "teacher")
STATE = {*NETWORKS, "optimizer", "scaler", "position", "config", "data"}  # what a checkpoint holds


def read_config(argv=None):
    """The flags, checked for contradictions and for what would have no effect. Raises UserError."""
    args = c.read_flags(argv, __doc__, PRESETS, FLAGS, CHOICES, POSITIVE)
    needs_denoised = args.source == "denoised" or args.anchor
    if args.source == "clean" and args.noise == "none":
        raise UserError("--source clean: with --noise none no clean images are known")
    if needs_denoised and not args.denoised:
        raise UserError("--source denoised and --anchor need --denoised DIR, which denoise.py apply writes")
    if args.denoised and not needs_denoised:
        raise UserError(f"--denoised: has no effect on --source {args.source} without --anchor")
    if args.anchor and not (args.init or args.anchor_from):
        raise UserError("--anchor: needs a denoised teacher, of --init or of --anchor_from")
    if not args.anchor and (args.anchor_from or args.anchor_head == "live"):
        raise UserError("--anchor_from and --anchor_head: have no effect without --anchor WEIGHT")
    if args.anchor and args.source != "noisy":
        raise UserError("--anchor: is for --source noisy, whose features it pulls")
    if args.init and args.init_backbone:
        raise UserError("--init and --init_backbone: give one of them")
    if args.stop > args.epochs:
        raise UserError(f"--stop {args.stop}: is beyond --epochs {args.epochs}")
    if args.momentum > 1:
        raise UserError(f"--momentum {args.momentum}: must be at most 1")
    if args.drop_path >= 1:
        raise UserError(f"--drop_path {args.drop_path}: must be below 1")
    for name in ("global_size", "local_size"):
        if getattr(args, name) % args.patch_size:
            raise UserError(f"--{name}: is no multiple of --patch_size {args.patch_size}")
    for name in ("global_scale", "local_scale", "weight_decay"):
        pair = getattr(args, name)
        if len(pair) != 2 or pair[0] > pair[1]:
            raise UserError(f"--{name}: must be two numbers, the smaller one first")
    return args


# ==== networks ====================================================================================
class Network(nn.Module):
    """A backbone with its head: what student and teacher each are."""
    def __init__(self, args, channels):
        super().__init__()
        self.backbone = c.make_vit(
            args.arch, args.patch_size, img_size=args.global_size, in_chans=channels,
            init_values=args.layer_scale, drop_path=args.drop_path, registers=args.registers)
        self.head = c.DINOHead(self.backbone.embed_dim, args.prototypes, args.head_hidden,
                               args.head_bottleneck)
        if args.compile:
            for block in self.backbone.blocks:
                block.compile()

    def forward(self, crops, picked, masks=None, keep=(None, None), head=None):
        """Logits of class tokens (rows, K) and picked patches (M, K); the global crops' class tokens
        (2B, D). crops: a tensor (rows, C, S, S) a size, the global ones first. picked (M,): flat
        indices of the masked patches. masks (2B, N): what the student does not see, None for a
        teacher. keep: of draw_keep, the student's. head: another one than its own."""
        features = self.backbone.forward_features(crops[0], masks, keep[0])
        local = [self.backbone.forward_features(x, None, keep[1])["cls"] for x in crops[1:]]
        patches = features["patches"].flatten(0, 1)[picked]
        logits = (head or self.head)(torch.cat([features["cls"], *local, patches]))
        rows = len(logits) - len(patches)
        return logits[:rows], logits[rows:], features["cls"]


class Teacher(Network):
    """A network that no gradient reaches, with the centres of its outputs. The live teacher follows
    the student. The anchor's weights are frozen; its centres move as the live teacher's do."""
    def __init__(self, args, channels):
        super().__init__(args, channels)
        self.requires_grad_(False).eval()
        self.centering = args.centering
        self.register_buffer("cls_center", torch.zeros(1, args.prototypes))
        self.register_buffer("patch_center", torch.zeros(1, args.prototypes))

    @torch.no_grad()
    def targets(self, crops, picked, temp, head=None):
        """Targets of the class tokens (2, B, K) and of the picked patches (M, K) of global crops
        (2B, C, S, S), which it sees unmasked. The centres move after their use."""
        cls, patches, _ = self([crops], picked, head=head)
        if self.centering == "sinkhorn":
            targets = c.sinkhorn(cls, temp), c.sinkhorn(patches, temp)
        else:
            targets = (c.softmax_center(cls, self.cls_center, temp),
                       c.softmax_center(patches, self.patch_center, temp))
            self.cls_center = c.update_center(self.cls_center, cls)
            self.patch_center = c.update_center(self.patch_center, patches)
        return targets[0].unflatten(0, (2, -1)), targets[1]

    @torch.no_grad()
    def follow(self, student, momentum):
        """Exponential moving average of the student's weights."""
        torch._foreach_lerp_([*self.parameters()], [*student.parameters()], 1 - momentum)


# ==== losses of one step ==========================================================================
def distillation(logits, patch_logits, targets, masks, picked):
    """DINO and iBOT loss of the student against one teacher, live or anchor: two scalars. logits
    (rows, K) of class tokens, patch_logits (M, K); targets: of Teacher.targets; masks (2B, N)."""
    cls_targets, patch_targets = targets
    views = logits.split(cls_targets.shape[1])  # two global, then the local crops, each (B, K)
    weights = 1 / masks.sum(1)[picked // masks.shape[1]]  # (M,): 1 / masked patches of its crop
    dino = c.dino_loss(views, cls_targets)
    return dino, c.ibot_loss(patch_logits, patch_targets, weights, len(masks))


def step_losses(args, run, crops, data, temp, keep=(None, None)):
    """All losses of one step, a dict of scalars, 'total' their weighted sum; the live teacher's
    targets of the class tokens (2, B, K); the student's class tokens (2B, D).

    crops: of make_crops, by source. The student sees global and local crops of args.source, half of
    the global ones masked. The live teacher sees the same global crops unmasked. The anchor sees
    the same global crops cut from the denoised image, unmasked. Both its terms are multiplied by
    args.anchor, and not by args.ibot_weight. data: masks and picked, of make_batch.

    For a loss of your own change this function, and give the same three. 'total' comes first. If there
    is no 'dino' or there are no targets, change monitors() and collapse(), too."""
    masks, picked = data["masks"], data["picked"]
    seen = crops[args.source]
    live = run.teacher.targets(seen[0], picked, temp)
    logits, patch_logits, cls = run.student(seen, picked, masks, keep)
    dino, ibot = distillation(logits, patch_logits, live, masks, picked)
    koleo = sum(global_koleo(view) for view in cls.chunk(2))
    total = dino + args.ibot_weight * ibot + args.koleo_weight * koleo
    losses = {"dino": dino, "ibot": ibot, "koleo": koleo}
    if run.anchor:
        head = run.teacher.head if args.anchor_head == "live" else None
        pull = run.anchor.targets(crops["denoised"][0], picked, temp, head)
        dino, ibot = distillation(logits, patch_logits, pull, masks, picked)
        total = total + args.anchor * (dino + ibot)
        losses |= {"anchor_dino": dino, "anchor_ibot": ibot}
    return {"total": total, **losses}, live[0], cls


def global_koleo(cls):
    """KoLeo of one view over the batch of all processes. Each has only its own rows' part of the
    gradient, and DDP averages the parts, where a sum is needed: times the number of processes."""
    koleo, processes = c.koleo_loss(c.gather_rows(cls)), c.world()[1]
    return processes * koleo - (processes - 1) * koleo.detach()  # of the same value


def monitors(losses, targets, cls):
    """Collapse monitors of the global batch: teacher entropy (nats), KL teacher to student, spread
    and effective rank of class tokens."""
    entropy = -torch.xlogy(targets, targets).sum(-1).mean()
    sums = c.all_reduce(torch.stack([entropy, losses["dino"].detach()]))
    entropy, dino = (sums / c.world()[1]).tolist()
    x = c.gather_rows(nn.functional.normalize(cls.detach().float().nan_to_num(), dim=-1))
    spread = x.std(0).mean() * math.sqrt(x.shape[1])
    p = torch.linalg.svdvals(x - x.mean(0))
    rank = torch.special.entr(p / p.sum().clamp(min=1e-12)).sum().exp()
    return {"entropy": entropy, "kl": dino - entropy, "cls_std": spread.item(), "rank": rank.item()}


def collapse(record, prototypes):
    """What the monitors of a log line say is wrong, with what usually helps; '' if nothing."""
    share = record["entropy"] / math.log(max(2, prototypes))  # of the largest that there is
    if share < 0.02:
        return "the teacher gives all images one prototype: use a higher --teacher_temp or --centering sinkhorn"
    if share > 0.99:
        return "the teacher stays uniform: use --teacher_temp 0.04, a higher --lr or fewer --prototypes"
    if record["rank"] < 1.5:
        return "all images get the same features: use a lower --lr, longer --warmup_epochs or a larger --batch_size"
    return ""


# ==== data of one step ============================================================================
def make_batch(args, folder, sources, mine, epoch, step, indices):
    """What one process needs for a step, made by a worker on the host. Random numbers come from (seed,
    source, epoch) and an image's path, or the step: the same in any number of processes. indices:
    the images of the global batch, of which `mine` is this process's.

    Gives uint8 or uint16 crops, view by view, the same ones of every source: 'SOURCE_global' (2B, C, S, S),
    'SOURCE_local' (LB, C, s, s); the numbers of their colours, 'global_color', 'local_color';
    'masks' (2B, N); 'picked' (M,), flat indices of the masked patches."""
    key = f"{args.seed}:{args.source}:{epoch}"
    images = [folder.copies(i, sources) for i in indices[mine]]
    rngs = [random.Random(f"{key}:{folder.paths[i]}") for i in indices[mine]]
    batch = defaultdict(list)
    for view in range(2 + args.local_crops):
        kind, cut_sources = "global", sources  # the student's source, the anchor's
        if view >= 2:
            kind, cut_sources = "local", [args.source]  # the anchor sees no local crops
        size, scale = getattr(args, f"{kind}_size"), getattr(args, f"{kind}_scale")
        blur_p, solarize_p = {0: (1.0, 0.0), 1: (0.1, 0.2)}.get(view, (0.5, 0.0))
        for copies, rng in zip(images, rngs, strict=True):
            box, flip = c.draw_box(*copies[0].shape[1:], scale, rng), rng.random() < 0.5
            turns = rng.randrange(4) if args.rotate else 0  # with mirror images: all symmetries of a square
            numbers = c.draw_color(rng, folder.channels == 3, blur_p, solarize_p)
            batch[f"{kind}_color"].append(torch.tensor(numbers))
            for source, image in zip(cut_sources, copies, strict=False):  # local: the student's alone
                batch[f"{source}_{kind}"].append(c.cut(image, box, flip, size, turns))
    side = args.global_size // args.patch_size
    masks = c.draw_masks(2 * len(indices), side, side, random.Random(f"{key}:masks:{step}"))
    masks = masks.unflatten(0, (2, -1))[:, mine].flatten(0, 1)  # of the global batch, this process's
    picked = masks.flatten().nonzero()[:, 0]
    return {k: torch.stack(rows) for k, rows in batch.items()} | {"masks": masks, "picked": picked}


def make_crops(data, sources, mean, std):
    """Colour operations of all crops on the device, normalised: {source: [global (2B, C, S, S),
    local (LB, C, s, s)]}."""
    crops = {source: [] for source in sources}
    for name in data:  # 'noisy_global', then 'noisy_local'; no source: 'global_color', 'masks', ...
        source, _, kind = name.partition("_")
        if source in crops:
            crops[source].append((c.color(data[name], data[f"{kind}_color"]) - mean) / std)
    return crops


def draw_keep(args, depth, loop):
    """The student's drop path for global and for local crops, drawn on the device for the global batch."""
    if not args.drop_path:
        return None, None
    rng = c.generator(args.seed, "drop", loop.epoch, loop.step, device=loop.device)
    views = 2 + args.local_crops
    keep = c.draw_keep(depth, views * loop.batch, args.drop_path, loop.device, rng)
    keep = keep.unflatten(2, (views, loop.batch))[..., loop.mine]  # (depth, 2, views, B)
    return keep[:, :, :2].flatten(2), keep[:, :, 2:].flatten(2)


# ==== the run: what training changes ==============================================================
class Run:
    """Student, teacher, anchor, optimiser: `parts` are what a checkpoint holds."""
    def __init__(self, args, channels, device):
        torch.manual_seed(args.seed)
        self.args, self.device = args, device
        self.network = self.student = Network(args, channels).to(device)
        self.teacher = Teacher(args, channels).to(device)
        self.teacher.load_state_dict(self.network.state_dict(), strict=False)
        groups = c.param_groups(self.network.backbone, self.network.head, args.layer_decay,
                                args.patch_embed_lr)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
        self.context, self.scaler = c.autocast(device, args.amp)
        self.parts = {"student": self.network, "teacher": self.teacher, "scaler": self.scaler,
                      "optimizer": self.optimizer}
        self.anchor = None
        if args.anchor:
            self.anchor = self.parts["anchor"] = Teacher(args, channels).to(device)
        if c.world()[1] > 1:
            self.student = nn.parallel.DistributedDataParallel(self.network)

    def start(self):
        """A new run begins with random weights, a backbone's, or the networks of --init. Gives the
        seconds that these took, with those of all runs before.

        With --init student, teacher, heads and centres stay. Optimiser, schedules, warm-ups and the
        freezing of the prototypes start anew. Mean and standard deviation, for the normalisation,
        are measured from the same noisy images again, with the same result."""
        args, seconds, needs = self.args, 0.0, {*NETWORKS, "position"}
        if args.init_backbone:
            weights = c.read_backbone(args.init_backbone)
            unused = c.load_backbone(self.network.backbone, weights, args.init_backbone)
            c.say(f"--init_backbone: not used: {', '.join(unused) or 'none'}")
            self.teacher.load_state_dict(self.network.state_dict(), strict=False)
        if args.init:
            before = c.load_checkpoint(args.init, needs=needs)
            c.load_parts({"student": self.network, "teacher": self.teacher}, before)
            c.check_range(args.range, before.get("range"), args.init)
            seconds = before["position"][2]
        if args.anchor:
            file = args.anchor_from or args.init
            anchor = c.load_checkpoint(file, needs=needs)
            c.load_parts({"teacher": self.anchor}, anchor)
            c.check_range(args.range, anchor.get("range"), file)
        return seconds

    def state(self, names):
        return {name: self.parts[name].state_dict() for name in names}

    def update(self, loss, values):
        """Backward, clip backbone and head each, AdamW, then the teacher's EMA; values: what schedules() gives."""
        for group in self.optimizer.param_groups:
            frozen = values["frozen"] and group["last"]
            group["lr"] = 0.0 if frozen else values["lr"] * group["lr_mult"]
            group["weight_decay"] = values["weight_decay"] * group["wd_mult"]
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.backbone.parameters(), self.args.clip)
        nn.utils.clip_grad_norm_(self.network.head.parameters(), self.args.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.teacher.follow(self.network, values["momentum"])


def schedules(args, step, steps, batch):
    """Values at `step` of a run with `steps` an epoch: lr, weight_decay, momentum, temp, frozen (last layer)."""
    total = steps * args.epochs
    warmup = round(steps * args.warmup_epochs)
    temp_warmup = round(steps * args.teacher_temp_warmup_epochs)
    lr, temp = args.lr * math.sqrt(batch / 1024), args.teacher_temp
    return {
        "lr": c.cosine(step, lr, 1e-6, total, warmup),
        "weight_decay": c.cosine(step, *args.weight_decay, total),
        "momentum": c.cosine(step, args.momentum, 1.0, total),
        # linear from 0.04 to temp, then constant: the warm-up is as long as the whole schedule
        "temp": c.cosine(step, temp, temp, temp_warmup, temp_warmup, start=0.04),
        "frozen": step < args.freeze_last_epochs * steps,
    }


# ==== train =======================================================================================
def train(args, run, folder, data, position, save):
    """Train from a position to --stop or the last epoch. Gives the loop and whether a signal stopped it."""
    sources = [args.source, "denoised"] if args.anchor else [args.source]
    folder.hold(sources, args.cache_gb, args.workers)
    loop = c.Loop(args, len(folder), position, run.device, save)
    useful = min(10 * len(folder), 2000 * loop.batch)
    if args.prototypes > useful:
        c.say(f"warning: --prototypes {args.prototypes}: more than about {useful} are of no use "
              f"for {len(folder)} images in batches of {loop.batch}")
    mean, std = torch.tensor([data["mean"], data["std"]], device=run.device)[..., None, None]
    depth = len(run.network.backbone.blocks)
    patience = math.ceil(max(100, loop.steps * args.epochs / 10) / args.log_steps)
    ill = 0  # lines of the log in which the monitors have complained, one after the other

    make = functools.partial(make_batch, args, folder, sources, loop.mine)
    for batch in loop.batches(make, args.stop or args.epochs):
        crops = make_crops(batch, sources, mean, std)
        values = schedules(args, loop.total, loop.steps, loop.batch)
        keep = draw_keep(args, depth, loop)
        with run.context():
            losses, targets, cls = step_losses(args, run, crops, batch, values["temp"], keep)
        run.update(losses["total"], values)

        record = {"source": args.source, **values}
        if loop.logs_next():
            record |= monitors(losses, targets, cls)
            trouble = collapse(record, args.prototypes)
            ill = ill + 1 if trouble else 0
            if ill == patience:
                c.say(f"warning: since {ill * args.log_steps} steps {trouble}")
        if loop.tick(losses, record):
            return loop, True
    if loop.total == 0:  # of no epochs
        loop.checkpoint()
    loop.close()
    return loop, False


def finish(args, run, out, position):
    """What the run leaves: the teacher's backbone and a summary; at --stop the networks, too."""
    epoch, _, seconds = position
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = f"{torch.get_num_threads()} CPU cores"
    if run.device.type == "cuda":
        memory, device = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    rates = [r["images_s"] for r in c.read_log(out / "log.jsonl")]
    if args.stop:
        rest = {"position": position, "range": args.range}
        c.save_checkpoint(out / f"epoch{args.stop}.pth", run.state(NETWORKS) | rest)
    backbone = run.teacher.backbone.state_dict()
    c.write_atomic(out / "backbone.pth", lambda file: torch.save(backbone, file))
    c.write_json(out / "summary.json", {  # last: it says that the run is complete
        "epochs": epoch, "seconds": seconds, "peak_gb": memory / 1e9, "device": device,
        "images_s": torch.tensor(rates).median().item() if rates else None})
    c.say(f"{out / 'backbone.pth'}: the teacher's backbone after {epoch} epochs, {seconds:.0f} s")


def is_complete(args, out, position):
    """Whether this command has nothing left to do. Raises UserError where --stop comes too late."""
    summary = out / "summary.json"
    ended = c.read_json(summary, {"epochs"})["epochs"] if summary.exists() else -1
    passed = args.stop and position[:2] > (args.stop, 0)  # the checkpoint is of a later step
    if args.stop and not (out / f"epoch{args.stop}.pth").exists():
        if passed:
            raise UserError(f"--stop {args.stop}: {out} is already beyond it; use another --out")
        return False
    return passed or ended >= (args.stop or args.epochs)


def check(args):
    """Look at the images before the long stages, and with --source denoised at the denoised ones;
    say how many there are to train on."""
    denoised = args.denoised if args.source == "denoised" else None  # an anchor's may yet be made
    train = c.Folder(args.data, "train", args.noise, args.noise_seed, denoised, limits=args.range or None)
    if denoised and (train.data / "val").is_dir() and Path(denoised, "val").is_dir():
        c.Folder(args.data, "val", args.noise, args.noise_seed, denoised, train.channels, train.limits)
    c.say(f"{args.data}: {len(train)} images to train on")
    return 0


def main():
    if sys.argv[1:2] == ["check"]:
        return check(read_config(sys.argv[2:]))
    args = read_config(sys.argv[1:])
    out, device = Path(args.out), c.setup(args.device)
    folder = c.Folder(args.data, "train", args.noise, args.noise_seed, args.denoised, limits=args.range or None)
    args.range = folder.limits
    config = vars(args) | {"data": folder.fingerprint()}
    state = c.load_checkpoint(out / "checkpoint.pth", required=False, needs=STATE)
    if state:
        c.check_config(state["config"], config, FREE, out)
        if is_complete(args, out, state["position"]):
            c.say(f"{out}: complete, nothing to do")
            return 0
    elif (out / "backbone.pth").exists():
        raise UserError(f"{out}: holds a backbone.pth without its checkpoint; move it away, or name another --out")
    run = Run(args, folder.channels, device)
    if state:
        data, position = state["data"], state["position"]
        c.load_parts(run.parts, state)
    else:
        mean, std = folder.stats()
        data = {"mean": mean, "std": std, "channels": folder.channels, "images": len(folder),
                "files": config["data"]}
        position = (0, 0, run.start())
    del state  # memory
    if c.world()[0] == 0:
        c.write_json(out / "config.json", {**vars(args), **data})

    def save(position):
        rest = {"position": position, "config": config, "data": data, "range": args.range}
        c.save_checkpoint(out / "checkpoint.pth", run.state(run.parts) | rest)

    loop, stopped = train(args, run, folder, data, position, save)
    if stopped:
        return c.EXIT_STOPPED
    if c.world()[0] == 0:
        finish(args, run, out, loop.position())
    return 0


if __name__ == "__main__":
    c.run(main)
