"""How fast every part is, in one run, beside what this machine could do and what others' code does with the same work.

    python tests/bench.py                                          tiny preset on built-in 64 x 64 images
    python tests/bench.py --preset imagenet100 --data PHOTOGRAPHS  ViT-S/16, ten crops, K 65536 on real photographs
    python tests/bench.py --peers                                  beside timm + lightly + torchvision, if installed
    python tests/bench.py --growth                                 against images, workers, processes, K and batch
    options: --batch_size N, --repeats N, --device cpu, --amp bf16, --compile, --json FILE

Each figure is the median of --repeats measurements, taken in turns where two are compared. Timings depend on what else
runs on the machine: ratios within one run are worth more than the figures themselves.
"""

import argparse
import copy
import itertools
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import shapes

import common as c
import denoise
import pretrain
import probe

ROOT = Path(__file__).parents[1]


class Bench:
    """Timing with warm-up and the table of what was measured."""

    def __init__(self, args):
        self.args, self.rows = args, []
        self.device = c.setup(args.device)
        self.context, _ = c.autocast(self.device, args.amp)

    def sync(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, *functions, repeats=None, least=0.2):
        """Median seconds of one call of each function, measured in turns; short ones are called several times."""
        calls = []
        for f in functions:  # also the warm-up
            for _ in range(2):
                start = time.perf_counter()
                f()
                self.sync()
                took = time.perf_counter() - start
                if took > 3:
                    break
            calls.append(max(1, math.ceil(least / max(1e-6, took))))
        times = [[] for _ in functions]
        for _ in range(repeats or self.args.repeats):
            for f, n, t in zip(functions, calls, times, strict=True):
                self.sync()
                start = time.perf_counter()
                for _ in range(n):
                    f()
                self.sync()
                t.append((time.perf_counter() - start) / n)
        medians = [statistics.median(t) for t in times]
        return medians[0] if len(medians) == 1 else medians

    def row(self, part, images, seconds, of=None, flops=None, traffic=None, note=""):
        """A line of the table: images a second; share of the seconds `of` a step; flops or bytes against the limit."""
        limit = ""
        if flops:
            limit = f"{flops / seconds / 1e9:.0f} GFLOP/s, {100 * flops / seconds / self.flops:.0f} % of matmul"
        elif traffic:
            limit = f"{traffic / seconds / 1e9:.1f} GB/s, {100 * traffic / seconds / self.bandwidth:.0f} % of copy"
        self.rows.append({"part": part, "ms": 1e3 * seconds, "images_s": images / seconds,
                          "share": seconds / of if of else None, "limit": limit, "note": note})
        r = self.rows[-1]
        share = f"{100 * r['share']:.0f} %" if of else ""
        print(f"| {part} | {r['ms']:.2f} | {r['images_s']:.1f} | {share} | {limit} | {note} |", flush=True)

    def title(self, text):
        print(f"\n**{text}**\n\n| part | ms | images/s | share | of the limit | |\n" + "|---" * 6 + "|", flush=True)
        self.rows.append({"title": text})

    def limits(self):
        """The machine: a large matrix product in the step's dtype, and a copy of 256 MB."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.args.amp, torch.float32)
        if self.args.amp == "auto" and self.device.type == "cuda":
            dtype = torch.bfloat16
        n = 8192 if self.device.type == "cuda" else 2048
        a = torch.randn(n, n, device=self.device, dtype=dtype)
        x, y = (torch.empty(2**26, device=self.device) for _ in range(2))
        product, copy = self.seconds(lambda: a @ a, lambda: y.copy_(x))
        self.flops, self.bandwidth = 2 * n**3 / product, 2 * 4 * len(x) / copy
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else f"{torch.get_num_threads()} CPU cores"
        print(f"{name}, {platform.machine()}, torch {torch.__version__}: matmul {n} x {n} {str(dtype)[6:]} "
              f"{self.flops / 1e9:.0f} GFLOP/s, copy {self.bandwidth / 1e9:.1f} GB/s", flush=True)
        self.rows.append({"device": name, "torch": torch.__version__, "gflops": self.flops / 1e9,
                          "copy_gb_s": self.bandwidth / 1e9})


def flops(f):
    """Multiplications and additions of the matrix products of f(), attention's included on every device."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        f()
    return counter.get_total_flops()


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def quiet():
    with open(os.devnull, "w") as f, redirect_stdout(f), redirect_stderr(f):
        yield


def environment(name):
    """The variables that run.sh sets for a stage."""
    script = (ROOT / "run.sh").read_text()
    exports = "\n".join(re.findall(r"^(?:export|keep=).*", script, re.M))
    last = "GLIBC_TUNABLES=$keep env -0" if name == "pretrain.py" else "env -0"
    text = subprocess.run(["bash", "-c", f"{exports}\n{last}"], capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in text.split("\0") if line)


def stage(name, *argv):
    """Run a stage in a process of its own; gives seconds and its peak memory in GB."""
    start = time.perf_counter()
    code = ("import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as e: assert not e.code, e.code\n"
            "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / name), *map(str, argv)], capture_output=True,
                          text=True, env=environment(name))
    if done.returncode:
        raise SystemExit(f"{name} {' '.join(map(str, argv))}: {done.stdout}{done.stderr}")
    return time.perf_counter() - start, int(done.stdout.split("PEAK")[1]) / 1e6


def streaming_memory(data, workers):
    """Peak memory in GB of one pass over a folder that streams through workers: all processes, shared pages once."""
    code = ("import sys, torch, common as c\n"
            "folder = c.Folder(c.Path(sys.argv[1]), 'train', 'gauss100')\n"
            "batches = torch.arange(len(folder) // 16 * 16).view(-1, 16).tolist()\n"
            "for _ in c.Batches(folder, ['noisy'], torch.device('cpu'), 0.0, int(sys.argv[2])).epoch(batches): pass")
    process, peak = subprocess.Popen([sys.executable, "-c", code, str(data), str(workers)], cwd=ROOT), 0
    while process.poll() is None:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            texts = [Path(f"/proc/{p}/smaps_rollup").read_text() for p in [str(process.pid), *children]]
            peak = max(peak, sum(int(t.split("Pss:")[1].split()[0]) for t in texts))
        except (OSError, IndexError):  # a process that ends just now
            pass
        time.sleep(0.05)
    return peak / 1e6


def config(bench, data, out, *flags):
    args = bench.args
    flags = ["--preset", args.preset, "--data", data, "--out", out, "--noise", "gauss100", "--device", args.device,
             "--amp", args.amp, *(["--batch_size", args.batch_size] if args.batch_size else []),
             *(["--compile"] if args.compile else []), *flags]
    return [str(f) for f in flags]


# ---- the parts -------------------------------------------------------------------------------------------
def inputs(bench, folder):
    """Decoding and noise, a core each."""
    bench.title("input, per core")
    if Path("/proc/self/smaps_rollup").exists():
        memory = streaming_memory(folder.data, 4)
        print(f"streaming {len(folder)} images with 4 workers, all processes: {memory:.2f} GB at most\n", flush=True)
        bench.rows.append({"streaming_gb": memory})
    index = itertools.cycle(range(min(64, len(folder))))
    floats = [c.to_float(folder.read(i, "clean")) for i in range(min(16, len(folder)))]
    some = itertools.cycle(floats)
    with one_thread():
        bench.row("decode", 1, bench.seconds(lambda: folder.read(next(index), "clean")))
        bench.row("decode + gauss noise", 1, bench.seconds(lambda: folder.read(next(index), "noisy")))
        noise = bench.seconds(lambda: c.add_noise(next(some), "gauss100", "train/a/1.png"))
        bench.row("gauss noise", 1, noise)
        x = np.random.default_rng(0).random((375, 500, 3), dtype=np.float32)
        bench.row("gauss noise, 500 x 375", 1, bench.seconds(lambda: c.add_noise(x, "gauss100", "train/a/1.png")))


def step_parts(bench, folder, argv):
    """One step of NC, then of NCT, taken apart on a batch that is decoded already."""
    args = pretrain.read_config(argv)
    run = pretrain.Run(args, folder.channels, bench.device)
    batch = min(args.batch_size, len(folder))
    source = c.Batches(folder, ["noisy"], bench.device, 0.0, 0)
    images, sizes = next(source.epoch([list(range(batch))]))
    depth = len(run.network.backbone.blocks)
    mean, std = (torch.full((folder.channels, 1, 1), v, device=bench.device) for v in (0.45, 0.25))
    draws = itertools.count()

    def draw():
        return pretrain.draw_step(args, sizes, depth, 0, 0, next(draws))

    def crop(views):
        return pretrain.make_crops(args, images[0], sizes, views, mean, std)

    views, masks, drop = draw()
    crops = crop(views)
    picked = masks.flatten().nonzero()[:, 0].to(bench.device)
    hidden = masks.to(bench.device)

    def losses(anchor=None):
        with run.context():
            return pretrain.step_losses(args, run, crops, anchor, masks, 0.04, drop)[0]["total"]

    def teacher():
        with torch.no_grad(), run.context():
            return run.teacher(crops[:1], picked)

    def student():
        with run.context():
            return run.student(crops, picked, hidden, drop=drop)

    def forward_backward():
        out = student()
        torch.autograd.backward([out[0], out[1]], [torch.ones_like(out[0]), torch.ones_like(out[1])])
        run.optimizer.zero_grad(set_to_none=True)

    logits, patch_logits, cls = (x.detach().requires_grad_() for x in student())
    seen = teacher()
    weights = torch.full((len(picked),), 1 / max(1, len(picked)), device=bench.device)

    def only_losses():
        targets, patch_targets = pretrain.teacher_targets(*seen[:2], dict(run.centers), 0.04, args.centering)
        n = len(masks)
        total = c.dino_loss(logits.split(n // 2), targets) + c.ibot_loss(patch_logits, patch_targets, weights, n)
        (total + sum(c.koleo_loss(v) for v in cls.chunk(2))).backward()

    values = {"lr": 1e-6, "weight_decay": 0.04, "momentum": 0.99, "frozen": False}

    def update():  # a loss whose gradients cost one pass over the memory
        run.update(sum(0.0 * p.flatten()[0] for p in run.network.parameters()), values)

    def step(anchored=False):
        nonlocal crops, masks, drop
        views, masks, drop = draw()
        crops = crop(views)
        anchor = crop(views[:2])[0] if anchored else None
        run.update(losses(anchor), values)

    counted = flops(forward_backward) + flops(teacher)
    whole = bench.seconds(step)
    run.set_anchor(run.teacher.state_dict(), run.centers)
    bench.title(f"one step of {args.arch}/{args.patch_size}, batch {batch}, K {args.prototypes}, "
                f"2 x {args.global_size} + {args.local_crops} x {args.local_size}, on decoded images")
    bench.row("whole step", batch, whole, whole, flops=counted, note=f"{counted / 1e9:.0f} GFLOP counted")
    bench.row("draw parameters and masks", batch, bench.seconds(draw), whole)
    bench.row("crops", batch, bench.seconds(lambda: crop(views)), whole)
    bench.row("teacher forward", batch, bench.seconds(teacher), whole, flops=flops(teacher))
    both = bench.seconds(forward_backward)
    bench.row("student forward", batch, bench.seconds(student), whole, flops=flops(student))
    bench.row("student forward and backward", batch, both, whole, flops=flops(forward_backward))
    kept = run.anchor
    run.anchor = None
    bench.row("targets, losses and their gradients", batch, bench.seconds(only_losses), whole)
    parameters = sum(p.numel() for p in run.network.parameters())
    bench.row("clip, AdamW, EMA", batch, bench.seconds(update), whole, traffic=4 * 14 * parameters)
    nc, nct = [], []
    for _ in range(bench.args.repeats):
        for anchor, times in ((None, nc), (kept, nct)):
            run.anchor = anchor
            times.append(bench.seconds(lambda anchor=anchor: step(anchor is not None), repeats=1))
    ratios = sorted(b / a for a, b in zip(nc, nct, strict=True))
    bench.row("whole step with the anchor (NCT)", batch, statistics.median(nct), None,
              note=f"{statistics.median(ratios):.2f} times NC ({', '.join(f'{r:.2f}' for r in ratios)})")
    with one_thread():
        views = draw()[0]
        bench.row("crops, per core", batch, bench.seconds(lambda: crop(views)))


def training(bench, argv, epochs):
    """Throughput of the stage itself after its first three steps, data, noise, logging and saving included; its peak
    memory in GB."""
    with tempfile.TemporaryDirectory() as out:
        _, peak = stage("pretrain.py", *argv, "--out", out, "--epochs", epochs, "--log_steps", 3)
        log, config = c.read_log(Path(out) / "log.jsonl"), c.read_json(Path(out) / "config.json")
    batch = min(config["batch_size"], config["images"])
    return (log[-1]["step"] - log[0]["step"]) * batch / (log[-1]["seconds"] - log[0]["seconds"]), peak


def denoising(bench, folder, argv, out):
    """Neighbor2Neighbor's step and the application of its U-Net."""
    args = denoise.read_config(["train", *argv])
    patch, depth = denoise.patch_plan(folder.sizes, args.patch)
    model = denoise.UNet(folder.channels, args.width, depth).to(bench.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-6, fused=True)
    y = torch.rand(args.batch_size, folder.channels, patch, patch, device=bench.device)
    y = y.contiguous(memory_format=torch.channels_last)
    pairs = denoise.draw_pairs(len(y), patch, patch, c.generator(0)).to(bench.device)

    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)

    def step(losses=denoise.n2n_losses, model=model, y=y, optimizer=optimizer):
        with bench.context():
            loss = sum(losses(model, y, pairs, 1.0))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    theirs = y.contiguous(), torch.optim.Adam(plain.parameters(), 1e-6)

    bench.title(f"denoiser of width {args.width}, patches of {patch}, batch {args.batch_size}")
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(
        denoise.n2n_losses(model, y, pairs, 1.0), plain_losses(plain, theirs[0], pairs, 1.0), strict=True))
    ours, other = bench.seconds(step, lambda: step(plain_losses, plain, *theirs))
    bench.row("training step", len(y), ours, flops=flops(step))
    bench.row("the same with boolean masks, a channel at a time", len(y), other, note=f"{other / ours:.2f} times ours")
    state = {"model": model.state_dict(), "epoch": 1, "config": {**vars(args), "epochs": 1}, "optimizer": {},
             "scaler": {}, "step": 0, "seconds": 0, "data": {"channels": folder.channels, "depth": depth}}
    c.save_checkpoint(out / "denoiser" / "checkpoint.pth", state)
    model.eval()
    apply_args = ["apply", *argv, "--denoiser", out / "denoiser"]
    n = len(folder) + (len(c.list_images(folder.data / "val")) if (folder.data / "val").is_dir() else 0)
    times = {"ours": [], "plain": []}
    for k in range(max(1, bench.args.repeats // 2)):
        config = denoise.read_config([*map(str, apply_args), "--out", str(out / f"denoised{k}")])
        with quiet():
            start = time.perf_counter()
            denoise.apply(config, bench.device)
            times["ours"].append((time.perf_counter() - start) / n)
        start = time.perf_counter()
        some = range(0, len(folder), max(1, len(folder) // 64))
        for i in some:
            plain_apply(bench, plain, folder, i, out / "plain" / f"{i}.png")
        times["plain"].append((time.perf_counter() - start) / len(some))
    ours, other = (statistics.median(t) for t in times.values())
    bench.row("apply, files to files", 1, ours)
    note = f"{other / ours:.2f} times ours"
    bench.row("the same one by one: read, pad to a square, denoise, write", 1, other, note=note)


def plain_losses(model, y, pairs, ramp):
    """Neighbor2Neighbor as it is usually written: a boolean mask of the picked pixels, channel after channel."""
    n, channels, h, w = y.shape
    picks = []
    for k in range(2):
        mask = torch.zeros(n * (h // 2) * (w // 2), 4, dtype=torch.bool, device=y.device)
        mask[torch.arange(len(mask), device=y.device), denoise.PAIRS.to(y.device)[pairs][..., k].flatten()] = True
        picks.append(mask.flatten())

    def sub_image(x, mask):
        out = torch.zeros(n, channels, h // 2, w // 2, device=y.device)
        for i in range(channels):
            cells = torch.nn.functional.unfold(x[:, i:i + 1].float(), 2, stride=2)  # (B, 4, cells)
            out[:, i] = cells.permute(0, 2, 1).flatten()[mask].view(n, h // 2, w // 2)
        return out

    with torch.no_grad():
        whole = model(y)
    (g1, g2), (h1, h2) = ([sub_image(x, m) for m in picks] for x in (y, whole))
    d = model(g1).float() - g2
    return (d**2).mean(), ramp * ((d - (h1 - h2)) ** 2).mean()


def plain_apply(bench, model, folder, i, target):
    from PIL import Image
    x = torch.from_numpy(folder.read(i)).permute(2, 0, 1).to(bench.device).float()[None] / 255
    h, w = x.shape[2:]
    side = math.ceil(max(h, w) / 32) * 32
    x = torch.nn.functional.pad(x, (0, side - w, 0, side - h), mode="replicate")
    with torch.no_grad(), bench.context():
        y = model(x)[0, :, :h, :w].float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(y).save(target)


def probing(bench, folder, argv, out):
    """Features of every image, and the 52 heads of the linear probe on 4,000 cached features."""
    bench.title("probe")
    model = c.make_vit("vit_small", 16).to(bench.device).eval()
    x = torch.rand(32, 3, 224, 224, device=bench.device)

    def forward():
        with torch.no_grad(), bench.context():
            model.last_layers(x, 4)

    bench.row("features, ViT-S/16 at 224", 32, bench.seconds(forward), flops=flops(forward))
    gen = torch.Generator().manual_seed(0)
    for width in (128, 384):
        f, y = torch.randn(1, 4000, 5 * width, generator=gen), torch.randint(10, (4000,), generator=gen)
        start = time.perf_counter()
        probe.train_heads(f, y, 10, probe.RATES, probe.head_inputs(width), 1250, 128, 0)
        bench.row(f"52 heads, 1,250 steps of 128 of 4,000, width {width}, 10 classes", 1250 * 128,
                  time.perf_counter() - start)


# ---- growth ----------------------------------------------------------------------------------------------
def growth(bench, out):
    """Time against images, workers, processes, prototypes and batch."""
    argv = config(bench, out / "many1000", out / "run", "--arm", "noisy")
    bench.title("growth: scanning and reading small files")
    base = list(shapes_folder(out / "shapes", 200, 10).glob("train/*/*.png"))
    for n in (1_000, 10_000, 100_000):
        data = out / f"many{n}"
        for i in range(n):
            target = data / "train" / f"{i % 10}" / f"{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(base[i % len(base)], target)
        for name in ("first start", "next start"):
            with quiet():
                start = time.perf_counter()
                folder = c.Folder(data, "train", "gauss100")
                took = time.perf_counter() - start
            bench.row(f"{name} on {n} files: scan", n, took)
        if n <= 10_000:
            with quiet():
                start = time.perf_counter()
                source = c.Batches(folder, ["noisy"], bench.device, 99.0, c.os.cpu_count())
                took = time.perf_counter() - start
            bench.row(f"read {n} into the cache", n, took)
            for workers in (0, 1, 2, 4):
                source = c.Batches(folder, ["noisy"], bench.device, 0.0, workers)
                start = time.perf_counter()
                for _ in source.epoch(list(torch.arange(1000).view(-1, 50).tolist())):
                    pass
                bench.row(f"stream 1,000 of {n}, {workers} workers", 1000, time.perf_counter() - start)
    bench.title("growth: memory of apply and of the probe, each in a process of its own")
    stage("pretrain.py", *config(bench, out / "many1000", out / "random", "--arm", "random"))
    stage("denoise.py", "train", *config(bench, out / "many1000", out / "denoiser", "--epochs", 1))
    for n in (1_000, 10_000):
        data = out / f"many{n}"
        (data / "val").symlink_to(out / "many1000" / "train")
        took, peak = stage("denoise.py", "apply", *config(bench, data, out / f"apply{n}", "--denoiser",
                                                          out / "denoiser"))
        bench.row(f"apply on {n} + 1,000 files", n + 1000, took, note=f"{peak:.2f} GB at most")
        took, peak = stage("probe.py", *config(bench, data, out / f"probe{n}.json", "--run", out / "random",
                                               "--iterations", 10))
        bench.row(f"probe on {n} + 1,000 files", n + 1000, took, note=f"{peak:.2f} GB at most")
    bench.title("growth: one step against prototypes and batch")
    folder = c.Folder(out / "many1000", "train", "gauss100")
    for flag, values in (("--prototypes", (512, 2048, 8192, 32768)), ("--batch_size", (16, 32, 64, 128))):
        for value in values:
            step = make_step(bench, folder, [*argv, flag, str(value)])
            args = pretrain.read_config([*argv, flag, str(value)])
            bench.row(f"{flag} {value}", args.batch_size, bench.seconds(step))
    bench.title("growth: processes of one thread each, same global batch, whole training")
    for n in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), "--"]
        command = [sys.executable, *launch, str(ROOT / "pretrain.py"), *config(
            bench, out / "many1000", out / f"processes{n}", "--arm", "noisy", "--epochs", "4", "--log_steps", "3")]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        summary = c.read_json(out / f"processes{n}" / "summary.json")
        torch.set_num_threads(n)
        a = torch.randn(2048, 2048)
        rate = 2 * 2048**3 / bench.seconds(lambda a=a: a @ a) / 1e9
        bench.row(f"{n} processes", summary["images_s"], 1.0, note=f"matmul in {n} threads: {rate:.0f} GFLOP/s")


def make_step(bench, folder, argv):
    """A function that does one whole step on a decoded batch."""
    args = pretrain.read_config(argv)
    run, batch = pretrain.Run(args, folder.channels, bench.device), args.batch_size
    images, sizes = next(c.Batches(folder, ["noisy"], bench.device, 0.0, 0).epoch([list(range(batch))]))
    mean, std = (torch.full((folder.channels, 1, 1), v, device=bench.device) for v in (0.45, 0.25))
    count = itertools.count()

    def step():
        views, masks, drop = pretrain.draw_step(args, sizes, 0, 0, 0, next(count))
        crops = pretrain.make_crops(args, images[0], sizes, views, mean, std)
        with run.context():
            losses, _, _ = pretrain.step_losses(args, run, crops, None, masks, 0.04, drop)
        run.update(losses["total"], {"lr": 1e-6, "weight_decay": 0.04, "momentum": 0.99, "frozen": False})
    return step


def shapes_folder(folder, train, val):
    if not folder.exists():
        shapes.write(folder, train, val)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=["tiny", "demo", "imagenet100", "imagenet1k"])
    parser.add_argument("--data", help="folder of images; default: built-in ones of 64 x 64")
    parser.add_argument("--batch_size", type=int, help="of pretraining; default: the preset's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", default="input,step,training,denoiser,probe", help="some of these parts")
    parser.add_argument("--peers", action="store_true", help="the same work with timm, lightly and torchvision")
    parser.add_argument("--growth", action="store_true", help="only the tables of growth")
    parser.add_argument("--json", help="write all figures to this file, too")
    args = parser.parse_args()
    bench, only = Bench(args), args.only.split(",")
    bench.limits()
    with tempfile.TemporaryDirectory() as out:
        out = Path(out)
        if args.growth:
            c.CACHE = out / "scans"
            growth(bench, out)
        else:
            data = Path(args.data) if args.data else shapes_folder(out / "data", 2000, 500)
            folder = c.Folder(data, "train", "gauss100")
            argv = config(bench, data, out / "run", "--arm", "noisy")
            if "input" in only:
                inputs(bench, folder)
            if "step" in only:
                step_parts(bench, folder, argv)
            if args.peers:
                import peers
                peers.compare(bench, folder, argv, training)
            elif "training" in only:
                bench.title("training, data included")
                batch = pretrain.read_config(argv).batch_size
                images_s, peak = training(bench, argv, max(1, math.ceil(24 * batch / len(folder))))
                bench.row("pretrain.py", images_s, 1.0, note=f"{peak:.2f} GB at most")
            if "denoiser" in only:
                flags = [a for a in config(bench, data, out / "run") if a != "--compile"]
                if args.batch_size:  # pretraining's
                    where = flags.index("--batch_size")
                    del flags[where:where + 2]
                denoising(bench, folder, flags, out)
            if "probe" in only:
                probing(bench, folder, argv, out)
    peak = (torch.cuda.max_memory_allocated() if bench.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(f"\npeak memory of this process {peak / 1e9:.2f} GB")
    bench.rows.append({"peak_gb": peak / 1e9})
    if args.json:
        said = {"command": [Path(a).name for a in sys.argv[1:]], "date": time.strftime("%Y-%m-%d"), "rows": bench.rows}
        Path(args.json).write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
