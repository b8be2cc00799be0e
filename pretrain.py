"""Stage 2: DINOv2 over a curriculum of noisy, denoised or clean images, with or without the denoised-teacher anchor.

    python pretrain.py --preset tiny --data DIR --noise gauss100 --arm nct --denoised OUT/denoised --out OUT/nct
    torchrun --nproc_per_node 8 pretrain.py --preset imagenet100 --data DIR --curriculum noisy:200 --out OUT/noisy

In: any folder of images, or DIR/train, and its denoised copy. Out: checkpoint.pth, log.jsonl, config.json, and at the
end backbone.pth (the teacher's ViT) and summary.json. Interrupted, it exits with code 75; the same command goes on, on
CPUs bit for bit.
"""

import copy
import functools
import math
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import common as c
from common import UserError

# ==== config: presets are defaults that flags override ==============================================================
# short runs of a narrow ViT: a high rate in every layer, LayerScale 1, a sharp teacher, or nothing is learnt in time
SMALL = {"arch": "128,4,4", "patch_size": 16, "global_size": 64, "local_size": 32, "local_crops": 2, "batch_size": 64,
         "prototypes": 512, "head_hidden": 256, "head_bottleneck": 64, "layer_scale": 1.0, "lr": 0.008,
         "layer_decay": 1.0, "patch_embed_lr": 1.0, "momentum": 0.99, "teacher_temp": 0.04, "ibot_weight": 0.5,
         "warmup_epochs": "2,1", "teacher_temp_warmup_epochs": "0"}
PRESETS = {
    "demo": {**SMALL, "epochs": 12, "switch": 8},
    "tiny": {**SMALL, "patch_size": 8, "global_size": 48, "local_size": 24, "lr": 0.004, "epochs": 10,
             "switch": 6},
    "imagenet100": {"epochs": 200, "switch": 140, "batch_size": 40},  # the paper's tables; the rest are the flags' own
    "imagenet1k": {"arch": "vit_base", "epochs": 100, "switch": 30, "batch_size": 512, "drop_path": 0.1,
                   "warmup_epochs": "10,5", "teacher_temp_warmup_epochs": "30,15"},
}
ANCHORS = {"imagenet100": {"gauss100": 4.0, "gauss255": 1.1, "shot1": 5.0, "speckle1.0": 2.0},  # the paper's weights
           "imagenet1k": {"gauss100": 2.0, "gauss255": 1.6}, "demo": {"none": 4.0}, "tiny": {"none": 4.0}}  # none: any
ARMS = {"random": "noisy:0", "noisy": "noisy:{epochs}", "denoised": "denoised:{epochs}", "clean": "clean:{epochs}",
        "phase1": "denoised:{switch}/{epochs}", "nc": "denoised:{switch}/{epochs},noisy:{rest}",
        "nct": "denoised:{switch}/{epochs},noisy:{rest}"}
FREE, FORK_FREE = c.FREE | {"compile", "fork"}, {"curriculum", "anchor", "anchor_from", "anchor_head"}
NETWORKS = {"student", "teacher", "centers"}  # what a checkpoint holds
STATE = NETWORKS | {"anchor", "anchor_centers", "optimizer", "scaler", "data", "position", "config"}

def read_config(argv=None):
    """The resolved configuration: one field a flag, the arm spelled out as its curriculum. Raises UserError."""
    parser = c.Parser(__doc__, PRESETS)
    cur, model, crops, opt = (functools.partial(parser.add, g) for g in ("curriculum", "model", "crops", "training"))
    parser.add("data", "--denoised", None, "folder of denoised images, same relative paths")
    cur("--arm", "nct", "an arm of the paper, made of --epochs and --switch", choices=ARMS)
    cur("--epochs", 200, "epochs of an arm in all")
    cur("--switch", 140, "epochs on denoised images in nc and nct; 0.3-0.8 of all is usual")
    cur("--curriculum", None, "instead of --arm: SOURCE:EPOCHS[/SCHEDULE],...; noisy, denoised or clean")
    cur("--restart", True, "optimiser and schedules start anew at a switch; essential in the paper")
    cur("--anchor", None, "weight of the denoised teacher, 1-5 is usual; if not given, the preset's in nct", type=float)
    cur("--anchor_from", None, "checkpoint whose teacher is the anchor, instead of the previous phase's")
    cur("--anchor_head", "frozen", "its own or the live teacher's", choices=["frozen", "live"])
    cur("--init", None, "checkpoint whose student, teacher, heads and centres start the first phase")
    cur("--init_backbone", None, "ViT weights (ours, DINOv2's, timm's) that start student and teacher")
    cur("--fork", None, "checkpoint of a run that is this curriculum's beginning")
    model("--arch", "vit_small", "vit_tiny, vit_small, vit_base, vit_large or WIDTH,DEPTH,HEADS")
    model("--patch_size", 16, "pixels; divides both crop sizes")
    model("--registers", 0, "register tokens")
    model("--layer_scale", 1e-5, "initial LayerScale; 0.1-1 for runs of a few thousand steps")
    model("--drop_path", 0.0, "stochastic depth of the student; 0.1 for ImageNet-1k")
    model("--prototypes", 65536, "outputs of the head, K; far more than images x 10 are of no use")
    model("--head_hidden", 2048, "hidden width of the head")
    model("--head_bottleneck", 256, "width before the prototypes")
    crops("--global_size", 224, "pixels of the two global crops")
    crops("--local_size", 96, "pixels of the local crops")
    crops("--local_crops", 8, "number of local crops")
    crops("--global_scale", "0.32,1", "area of a global crop, as a part of the image", type=c.span)
    crops("--local_scale", "0.05,0.32", "area of a local crop", type=c.span)
    opt("--batch_size", 64, "images a step over all processes")
    opt("--lr", 0.004, "at batch 1024; scaled by sqrt(batch / 1024)")
    opt("--warmup_epochs", "10", "linear warm-up; a value a phase: 10,5", type=c.floats)
    opt("--weight_decay", "0.04,0.4", "at the start and, along a cosine, at the end", type=c.span)
    opt("--layer_decay", 0.9, "learning-rate factor from block to block")
    opt("--patch_embed_lr", 0.2, "learning-rate factor of the patch embedding; 1 for runs of a few thousand steps")
    opt("--clip", 3.0, "gradient norm of backbone and of head, each")
    opt("--freeze_last_epochs", 1, "epochs in which the prototypes do not learn")
    opt("--momentum", 0.992, "teacher's EMA at the start, 1 at the end; lower for short runs (0.99)")
    opt("--teacher_temp", 0.07, "after its warm-up from 0.04; above 0.07 is unstable")
    opt("--teacher_temp_warmup_epochs", "30", "a value a phase: 30,15", type=c.floats)
    opt("--centering", "center", "of the teacher's outputs", choices=["center", "sinkhorn"])
    opt("--ibot_weight", 1.0, "weight of the masked-patch loss")
    opt("--koleo_weight", 0.1, "weight of the nearest-neighbour spreading loss")
    parser.add("running (changes no result but rounding)", "--compile", False, "slow start, faster on GPUs")
    args = parser.read(argv, ("batch_size", "patch_size", "prototypes", "log_steps", "head_hidden", "head_bottleneck",
                              "lr", "global_size", "local_size", "clip", "teacher_temp"))
    if args.curriculum is None:
        args.curriculum = ARMS[args.arm].format(epochs=args.epochs, switch=args.switch, rest=args.epochs - args.switch)
        weights = {None: 1.0} | {c.parse_noise(k): w for k, w in ANCHORS.get(args.preset, {}).items()}
        args.anchor = weights.get(c.parse_noise(args.noise), weights[None]) if args.anchor is None else args.anchor
        args.anchor *= args.arm == "nct"
    args.anchor = args.anchor or 0.0
    del args.arm, args.epochs, args.switch  # the curriculum says it all
    phases = parse_curriculum(args.curriculum)
    sources = {p.source for p in phases}
    if "clean" in sources and args.noise == "none":
        raise UserError("--curriculum clean: with --noise none no clean images are known")
    if ("denoised" in sources or args.anchor) and not args.denoised:
        raise UserError(f"--curriculum {args.curriculum}: needs --denoised DIR, which denoise.py apply writes")
    if args.anchor and not any(anchored(args, phases, p) for p in range(len(phases))):
        raise UserError("--anchor: works in a noisy phase after a denoised one, or with --anchor_from CKPT")
    if wrong := [k for k in ("global_size", "local_size") if getattr(args, k) % args.patch_size]:
        raise UserError(f"--{wrong[0]} {getattr(args, wrong[0])}: is no multiple of --patch_size {args.patch_size}")
    if args.momentum > 1 or args.drop_path >= 1:
        raise UserError(f"--momentum {args.momentum} --drop_path {args.drop_path}: must be at most 1, and below 1")
    return args

def parse_curriculum(text):
    """'denoised:140/200,noisy:60' -> phases: source, epochs, schedule (the epochs that its schedules are made for)."""
    phases = []
    for part in text.split(","):
        match = re.fullmatch(r"(noisy|denoised|clean):(\d+)(?:/(\d+))?", part)
        if not match or int(match[2]) > int(match[3] or match[2]):
            raise UserError(f"--curriculum {part}: must be SOURCE:EPOCHS or SOURCE:EPOCHS/SCHEDULE with SOURCE noisy, "
                            "denoised or clean and EPOCHS at most SCHEDULE")
        phases.append(SimpleNamespace(source=match[1], epochs=int(match[2]), schedule=int(match[3] or match[2])))
    return phases

def anchored(args, phases, p):
    """Whether the anchor acts in phase p: on noisy images, once there is a denoised teacher."""
    denoised_teacher = args.anchor_from or (p > 0 and phases[p - 1].source == "denoised")
    return bool(args.anchor and phases[p].source == "noisy" and denoised_teacher)

# ==== model: student and teacher are each a backbone with a head ====================================================
class Network(nn.Module):
    """Backbone and head. forward: crops to prototype logits; each of them run once."""
    def __init__(self, args, channels):
        super().__init__()
        self.backbone = c.make_vit(args.arch, args.patch_size, img_size=args.global_size, in_chans=channels,
                                   init_values=args.layer_scale, drop_path=args.drop_path, registers=args.registers)
        self.head = c.DINOHead(self.backbone.embed_dim, args.prototypes, args.head_hidden, args.head_bottleneck)

    def forward(self, crops, picked, masks=None, head=None, drop=None):
        """crops: [global (2B, C, S, S), local (LB, C, s, s) if any]; picked (M,): flat indices of masked patches; masks
        (2B, N): what the student does not see, None for a teacher; head: another head than its own. Gives logits of
        class tokens (2B + LB, K) and of picked patches (M, K), and the global class tokens (2B, D)."""
        drop = [u.to(crops[0].device, non_blocking=True) for u in drop] if drop else [None] * len(crops)
        asked = (masks, picked), (None, picked[:0])  # of global, of local crops: these have their class tokens alone
        out = [self.backbone.forward_features(x, m, u, p) for x, u, (m, p) in zip(crops, drop, asked, strict=False)]
        tokens = torch.cat([*(o["cls"] for o in out), out[0]["patches"]])  # (2B + LB + M, D)
        logits = (head or self.head)(tokens)
        return *logits.split([len(tokens) - len(picked), len(picked)]), out[0]["cls"]

def load_weights(module, state):
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the checkpoint is of another model: {str(error).splitlines()[-1].strip()}") from None

def load_backbone(model, state):
    """Weights of DINOv2, timm or our own into `model`, position embedding resized, LayerScale 1 where they have none;
    gives a message on what was left. Raises UserError where a shape does not fit."""
    own = model.state_dict()
    state = {k.removeprefix("module.").removeprefix("backbone.").replace("reg_token", "register_tokens"): v
             for k, v in state.items() if torch.is_tensor(v)}
    if (pos := state.get("pos_embed")) is not None:
        if math.isqrt(pos.shape[1]) ** 2 == pos.shape[1]:  # timm's with registers: cls_token holds its own position
            pos = nn.functional.pad(pos, (0, 0, 1, 0))  # (1, 1 + N, D)
        old, side = (math.isqrt(p.shape[1] - 1) for p in (pos, own["pos_embed"]))
        if old**2 + 1 == pos.shape[1]:
            state["pos_embed"] = c.resize_pos_embed(pos.float(), (side, side))
    if wrong := [k for k, v in state.items() if k in own and v.shape != own[k].shape]:
        raise UserError(f"--init_backbone: other shapes: {', '.join(wrong)}; use the weights' --arch and --patch_size")
    if not set(own) & set(state):
        raise UserError("--init_backbone: holds no weight of a ViT; give a flat dict of tensors, as backbone.pth is")
    scales = {k for k in own if k.endswith(".gamma")}
    if "blocks.0.norm1.weight" in state and not scales & set(state):  # a ViT without LayerScale: it is 1
        state |= {k: torch.ones_like(own[k]) for k in scales}
    missing, unexpected = model.load_state_dict(state, strict=False)
    return f"--init_backbone: missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'}"

# ==== targets and losses of one step ================================================================================
def teacher_targets(logits, patch_logits, centers, temp, centering):
    """Targets of one teacher, (2, B, K) and (M, K); its centres then move on."""
    targets = []
    for name, x in (("cls", logits), ("patch", patch_logits)):
        if centering == "sinkhorn":
            targets.append(c.sinkhorn(x, temp))
        else:
            targets.append(c.softmax_center(x, centers[name], temp))
            centers[name] = c.update_center(centers[name], x)
    return targets[0].unflatten(0, (2, -1)), targets[1]

def step_losses(args, run, crops, anchor_crops, masks, temp, drop=None):
    """All losses of one step as a dict of scalars, 'total' their weighted sum; targets and class tokens. crops: [global
    (2B, C, S, S), local (LB, C, s, s)]; anchor_crops: the global ones denoised, or None; masks (2B, N) bool, CPU."""
    picked = masks.flatten().nonzero()[:, 0]  # (M,)
    weights = (1 / masks.sum(1).clamp(min=1)).repeat_interleave(masks.sum(1))  # (M,): 1 / masked patches of its crop
    picked, weights, masks = (v.to(crops[0].device, non_blocking=True) for v in (picked, weights, masks))
    n = len(masks)  # 2B
    with torch.no_grad():
        logits, patch_logits, _ = run.teacher(crops[:1], picked)
        targets, patch_targets = teacher_targets(logits, patch_logits, run.centers, temp, args.centering)
        if run.anchor is not None:
            head = run.teacher.head if args.anchor_head == "live" else None
            logits, patch_logits, _ = run.anchor([anchor_crops], picked, head=head)
            anchored_to = teacher_targets(logits, patch_logits, run.anchor_centers, temp, args.centering)
    logits, patch_logits, cls = run.student(crops, picked, masks, drop=drop)
    views = logits.split(n // 2)  # two global, then the local crops, each (B, K)
    losses = {"dino": c.dino_loss(views, targets), "ibot": c.ibot_loss(patch_logits, patch_targets, weights, n)}
    # neighbours in the batch of all processes: each has the gradient of its own rows only, hence the factor on it
    koleo, size = sum(c.koleo_loss(c.gather_rows(view)) for view in cls.chunk(2)), c.world()[1]
    losses["koleo"] = size * koleo - (size - 1) * koleo.detach()
    total = losses["dino"] + args.ibot_weight * losses["ibot"] + args.koleo_weight * losses["koleo"]
    if run.anchor is not None:
        losses["anchor_dino"], losses["anchor_ibot"] = c.anchor_loss(views, patch_logits, *anchored_to, weights, n)
        total = total + args.anchor * (losses["anchor_dino"] + args.ibot_weight * losses["anchor_ibot"])
    return {"total": total, **losses}, targets, cls

def monitors(losses, targets, cls):
    """Collapse monitors: teacher entropy (nats), KL teacher to student, spread and effective rank of class tokens, of
    the global batch."""
    means = torch.stack([-torch.xlogy(targets, targets).sum(-1).mean(), losses["dino"].detach()])
    entropy, dino = (c.all_reduce(means) / c.world()[1]).tolist()
    x = nn.functional.normalize(cls.detach().float().nan_to_num(), dim=-1)  # the losses say that it is not finite
    x = c.gather_rows(x)
    p = torch.linalg.svdvals(x - x.mean(0))
    p = p / p.sum().clamp(min=1e-12)
    return {"entropy": entropy, "kl": dino - entropy,
            "cls_std": (x.std(0).mean() * x.shape[1] ** 0.5).item(), "rank": torch.xlogy(p, p).sum().neg().exp().item()}

def collapse(record, prototypes):
    """What the monitors of a log line say is wrong, with what usually helps; '' of a healthy run."""
    share = record["entropy"] / math.log(max(2, prototypes))  # of the largest entropy that there is
    if share < 0.02:
        return "the teacher gives all images one prototype: use a higher --teacher_temp or --centering sinkhorn"
    if share > 0.99:
        return "the teacher stays uniform: use --teacher_temp 0.04, a higher --lr or fewer --prototypes"
    same = "all images get the same features: use a lower --lr, longer --warmup_epochs or a larger --batch_size"
    return same if record["rank"] < 1.5 else ""

# ==== data of one step: all random parameters from a generator keyed by (seed, phase, epoch, step) ==================
def draw_step(args, sizes, depth, phase, epoch, step, mine=slice(None)):
    """All random parameters of one step, drawn for the global batch, images of sizes (B, 2), of which `mine` is cut.
    Gives views (list of dicts of draw_view), masks (2B, N) and, with drop path, uniform numbers per kind of crop."""
    gen = c.generator(args.seed, phase, epoch, step)
    big, small, side = args.global_scale, args.local_scale, args.global_size // args.patch_size
    views = [c.draw_view(sizes, big, gen, blur_p=1.0), c.draw_view(sizes, big, gen, blur_p=0.1, solarize_p=0.2)]
    views += [c.draw_view(sizes, small, gen, blur_p=0.5) for _ in range(args.local_crops)]
    views = [{k: v[mine] for k, v in view.items()} for view in views]
    masks = c.draw_masks(2 * len(sizes), (side, side), gen).unflatten(0, (2, -1))[:, mine].flatten(0, 1)
    if not args.drop_path:
        return views, masks, None
    drop = torch.rand(2 * depth, len(views), len(sizes), generator=gen)[..., mine]
    return views, masks, [u.flatten(1) for u in (drop[:, :2], drop[:, 2:]) if u.shape[1]]

def make_crops(args, images, sizes, views, mean, std):
    """uint8 (B, C, H, W) to [global (2B, C, S, S), local (LB, C, s, s)], normalised."""
    out = [c.augment(images, sizes, v, args.global_size if i < 2 else args.local_size) for i, v in enumerate(views)]
    return [torch.cat(x).sub_(mean).div_(std) for x in (out[:2], out[2:]) if x]

# ==== the run: state, schedules, loop ===============================================================================
class Run:
    """Everything that training changes; `state()` is what a checkpoint holds. init: to start from --init,
    --init_backbone; not where a checkpoint is loaded afterwards, which then needs neither file."""
    def __init__(self, args, channels, device, init=True):
        torch.manual_seed(args.seed)
        self.args, self.device, self.network = args, device, Network(args, channels).to(device)
        if args.init_backbone and init:
            c.say(load_backbone(self.network.backbone, c.load_checkpoint(args.init_backbone)))
        self.teacher = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.centers = {k: torch.zeros(1, args.prototypes, device=device) for k in ("cls", "patch")}
        self.anchor = self.anchor_centers = None
        if args.init and init:
            self.load_networks(c.load_checkpoint(args.init, needs=NETWORKS))
        self.restart()
        self.context, self.scaler = c.autocast(device, args.amp)
        self.phase = self.epoch = self.step = self.total = self.seconds = 0  # step of the epoch, total of all phases
        self.student = nn.parallel.DistributedDataParallel(self.network) if c.world()[1] > 1 else self.network
        for block in [*self.network.backbone.blocks, *self.teacher.backbone.blocks] * args.compile:
            block.compile()

    def restart(self):
        """A new optimiser: its moments start at zero."""
        parts = self.network.backbone, self.network.head
        groups = c.param_groups(*parts, self.args.layer_decay, self.args.patch_embed_lr)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)

    def set_anchor(self, teacher, centers):
        """Freeze a teacher's weights as the anchor; its centres start from that teacher's and go their own way."""
        self.anchor = copy.deepcopy(self.teacher)
        load_weights(self.anchor, teacher)
        for block in [*self.anchor.backbone.blocks] * self.args.compile:
            block.compile()
        self.anchor_centers = {k: v.clone().to(self.device) for k, v in centers.items()}

    def load_networks(self, state):
        load_weights(self.network, state["student"])
        load_weights(self.teacher, state["teacher"])
        self.centers = {k: v.to(self.device) for k, v in state["centers"].items()}

    def load(self, state):
        self.load_networks(state)
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if state["anchor"]:
            self.set_anchor(state["anchor"], state["anchor_centers"])
        self.phase, self.epoch, self.step, self.total, self.seconds = state["position"]

    def state(self, data, seconds):
        self.seconds = seconds
        return {"student": self.network.state_dict(), "teacher": self.teacher.state_dict(), "centers": self.centers,
                "anchor": self.anchor and self.anchor.state_dict(), "anchor_centers": self.anchor_centers,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "data": data,
                "position": (self.phase, self.epoch, self.step, self.total, self.seconds),
                "config": vars(self.args) | {"data": data["files"]}}

    def update(self, loss, values):
        """Backward, clip per submodule, AdamW, then the teacher's EMA; values: what schedules() gives."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0 if values["frozen"] and group["last"] else values["lr"] * group["lr_mult"]
            group["weight_decay"] = values["weight_decay"] * group["wd_mult"]
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        for part in (self.network.backbone, self.network.head):
            nn.utils.clip_grad_norm_(part.parameters(), self.args.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            teacher, student = list(self.teacher.parameters()), list(self.network.parameters())
            torch._foreach_lerp_(teacher, student, 1 - values["momentum"])

def length(args, phases, phase):
    """Epochs that the schedules of a phase are made for: its own, or, without restart, those of one over all phases."""
    return phases[phase].schedule if args.restart else max(phases[0].schedule, sum(p.epochs for p in phases))

def schedules(args, phases, phase, step, steps, batch):
    """Values at `step` of a phase with `steps` an epoch: lr, weight_decay, momentum, temp, frozen (last layer)."""
    first = phase if args.restart else 0  # without restart one schedule runs over all phases
    step += steps * sum(p.epochs for p in phases[first:phase])
    total = steps * length(args, phases, phase)
    warmup, temp_warmup = (round(steps * v[min(first, len(v) - 1)])
                           for v in (args.warmup_epochs, args.teacher_temp_warmup_epochs))
    return {"lr": c.cosine(step, args.lr * math.sqrt(batch / 1024), 1e-6, total, warmup),
            "weight_decay": c.cosine(step, *args.weight_decay, total),
            "momentum": c.cosine(step, args.momentum, 1.0, total),
            "temp": c.cosine(step, args.teacher_temp, args.teacher_temp, temp_warmup, temp_warmup, start=0.04),
            "frozen": step < args.freeze_last_epochs * steps}

def start(args, phases, run, out, data, state):
    """Resume this run from its state, or, without one, take over the beginning that another run with the same settings
    has trained (--fork)."""
    if not state and args.fork:
        state = c.load_checkpoint(args.fork, needs=STATE)
        config, (p, epoch, step) = SimpleNamespace(**state["config"]), state["position"][:3]
        theirs = parse_curriculum(config.curriculum)
        both = (config, theirs), (args, phases)
        begun = any(anchored(a, q, i) for a, q in both for i in range(len(q[:p + 1])))  # it goes on with its anchor
        free = FREE | ({"curriculum"} if begun else FORK_FREE)
        c.check_config(state["config"], vars(args) | {"data": data["files"]}, free, args.fork)
        lengths = {length(a, q, min(p, len(q) - 1)) for a, q in both}
        for q in theirs[p:p + 1]:  # its last phase may go on here
            q.epochs = max([epoch + (step > 0), *[q.epochs for q in phases[p:p + 1]]])
        if theirs[:p + 1] != phases[:p + 1] or len(lengths) > 1:
            raise UserError(f"--fork {args.fork}: {config.curriculum} is no beginning of {args.curriculum}")
        if c.world()[0] == 0 and (log := Path(args.fork).with_name("log.jsonl")).exists():
            c.write_atomic(out / "log.jsonl", lambda f: f.write(log.read_bytes()))
    if state:
        run.load(state)
        data |= {k: state["data"][k] for k in ("mean", "std")}

def train(args, phases, run, folder, out, data):
    """Run the curriculum from the run's position; gives the exit code."""
    batch, mine, steps = c.share(args.batch_size, len(folder))
    if args.prototypes > (useful := min(10 * len(folder), 2000 * batch)):
        c.say(f"warning: --prototypes {args.prototypes}: more than about {useful} are of no use for {len(folder)} "
              f"images in batches of {batch}")
    depth = len(run.network.backbone.blocks)
    mean, std = (torch.tensor(data[k], device=run.device)[:, None, None] for k in ("mean", "std"))
    total, ill = steps * sum(p.epochs for p in phases), 0  # ill: steps since the monitors were last in order
    loop = c.Loop(args, total, run.total, run.seconds,
                  lambda seconds: c.save_checkpoint(out / "checkpoint.pth", run.state(data, seconds)))
    while run.phase < len(phases):
        phase, use_anchor = phases[run.phase], anchored(args, phases, run.phase)
        if run.phase > 0 and run.epoch == run.step == 0 and args.restart:
            run.restart()
        run.anchor = run.anchor if use_anchor else None
        if use_anchor and run.anchor is None:
            own = run.state(data, run.seconds)
            source = c.load_checkpoint(args.anchor_from, needs=NETWORKS) if args.anchor_from else own
            run.set_anchor(source["teacher"], source["centers"])
        if run.epoch < phase.epochs:
            sources = [phase.source] + ["denoised"] * use_anchor
            batches = c.Batches(folder, sources, run.device, args.cache_gb, args.workers)
        while run.epoch < phase.epochs:
            order = torch.randperm(len(folder), generator=c.generator(args.seed, run.phase, run.epoch))
            order = order[:steps * batch].view(steps, batch)
            for images, sizes in batches.epoch(order[run.step:, mine].tolist()):
                everyone = folder.sizes[order[run.step]]  # sizes of the global batch
                views, masks, drop = draw_step(args, everyone, depth, run.phase, run.epoch, run.step, mine)
                crops = make_crops(args, images[0], sizes, views, mean, std)
                anchor_crops = make_crops(args, images[1], sizes, views[:2], mean, std)[0] if use_anchor else None
                values = schedules(args, phases, run.phase, run.epoch * steps + run.step, steps, batch)
                with run.context():
                    losses, targets, cls = step_losses(args, run, crops, anchor_crops, masks, values["temp"], drop)
                run.update(losses["total"], values)
                run.step, run.total = run.step + 1, run.total + 1
                record = monitors(losses, targets, cls) if run.total % args.log_steps == 0 else {}
                if record:
                    ill = ill + args.log_steps if (trouble := collapse(record, args.prototypes)) else 0
                    if ill - args.log_steps < max(100, total / 10) <= ill:  # once
                        c.say(f"warning: since {ill} steps {trouble}")
                record |= {"phase": run.phase, "epoch": run.epoch, "source": phase.source, **values}
                if loop.tick(losses, batch, record):
                    return c.EXIT_STOPPED
            run.epoch, run.step = run.epoch + 1, 0
            loop.checkpoint(f"phase {run.phase} ({phase.source}) epoch {run.epoch}/{phase.epochs}")
        run.phase, run.epoch = run.phase + 1, 0
    if not run.total:
        loop.checkpoint()
    loop.close()
    return 0

def main(argv=None):
    args = read_config(argv)
    phases, out, device = parse_curriculum(args.curriculum), Path(args.out), c.setup(args.device)
    folder = c.Folder(args.data, "train", args.noise, args.noise_seed, args.denoised)
    files = str(folder)
    if state := c.load_checkpoint(out / "checkpoint.pth", False, STATE):
        c.check_config(state["config"], vars(args) | {"data": files}, FREE, out)
        phase, epoch = state["position"][:2]
        if sum(p.epochs for p in phases[phase:]) <= epoch and (out / "backbone.pth").exists():
            c.say(f"{out}: complete, nothing to do")
            return 0
    elif (out / "backbone.pth").exists():
        raise UserError(f"{out}: holds a backbone.pth without its checkpoint; move it away, or name another --out")
    mean, std = folder.stats()
    data = {"mean": mean, "std": std, "channels": folder.channels, "images": len(folder), "files": files}
    run = Run(args, folder.channels, device, init=not (state or args.fork))
    start(args, phases, run, out, data, state)
    del state  # memory
    if c.world()[0] == 0:
        c.write_json(out / "config.json", {**vars(args), **data})
    code = train(args, phases, run, folder, out, data)
    if code == 0 and c.world()[0] == 0:
        gpu, rates = device.type == "cuda", sorted(r["images_s"] for r in c.read_log(out / "log.jsonl"))
        memory = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        device = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU cores"
        c.write_json(out / "summary.json", {"seconds": run.seconds, "steps": run.total, "device": device,
                     "images_s": rates[len(rates) // 2] if rates else None, "peak_gb": memory / 1e9})
        c.write_atomic(out / "backbone.pth", lambda f: torch.save(run.teacher.backbone.state_dict(), f))
        c.say(f"{out / 'backbone.pth'}: the teacher's backbone after {run.total} steps, {run.seconds:.0f} s")
    return code

if __name__ == "__main__":
    c.run(main)
