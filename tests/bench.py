"""How long each part of the three stages takes on a CPU, in milliseconds or images a second.

    python tests/bench.py --data DIR [--preset tiny] [--noise gauss100] [--out FILE.json]

A figure is the median of --repeats calls. A machine's speed changes from minute to minute: what is
compared is called in turns, and a ratio is the median over pairs.
"""

import datetime
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import common as c
import denoise
import pretrain
import probe

PRESETS = dict.fromkeys(["demo", "tiny", "imagenet100"], {})  # the stages have the values
FLAGS = {
    "data": ("", "any folder of images, of which a batch is used"),
    "noise": ("gauss100", "as in the stages"),
    "batch_size": (0, "of pretraining; 0: the preset's"),
    "repeats": (5, "calls of each part; turns of --against"),
    "threads": (1, "of everything but a worker, which has one"),
    "out": ("none", "JSON file for figures, hardware and command; none: no file"),
    "against": ("", "another checkout, whose bench.py is run in turns with this one"),
}

def in_turns(repeats, parts):
    """{part: milliseconds of every call} of {part: function}; the first calls only warm up."""
    times = {part: [] for part in parts}
    for _ in range(1 + repeats):
        for part, function in parts.items():
            started = c.now()
            function()
            times[part].append(1000 * (c.now() - started))
    return {part: row[1:] for part, row in times.items()}

def medians(times):
    return {f"{part}, ms": median(row) for part, row in times.items()}

def median_ratio(above, below):
    return median(a / b for a, b in zip(above, below, strict=True))

# ==== pretraining =================================================================================
class Training:
    """A run of pretrain.py with an anchor, and a batch of a folder, whose clean images stand in for
    denoised ones: step() does with it what train() does."""
    def __init__(self, args, folder, batch, device):
        args.anchor = 1.0
        self.args, self.folder, self.device, self.batch = args, folder, device, batch
        self.run = pretrain.Run(args, folder.channels, device)
        self.anchor = self.run.anchor
        self.indices = [i % len(folder) for i in range(batch)]
        folder.memory["denoised"] = {i: folder.read(i, "clean") for i in self.indices}
        self.mean = self.std = torch.full((folder.channels, 1, 1), 0.5, device=device)
        self.data = c.to_device(self.make("noisy", "denoised"), device)

    def make(self, *sources):
        """A worker's part."""
        return pretrain.make_batch(self.args, self.folder, sources, slice(None), 0, 0, self.indices)

    def crops(self, *sources):
        return pretrain.make_crops(self.data, sources, self.mean, self.std)

    def losses(self, crops, temp=0.04):
        loop = SimpleNamespace(epoch=0, step=0, batch=self.batch, mine=slice(None), device=self.device)
        keep = pretrain.draw_keep(self.args, len(self.run.network.backbone.blocks), loop)
        with self.run.context():
            losses, *_ = pretrain.step_losses(self.args, self.run, crops, self.data, temp, keep)
        return losses

    def step(self, anchored=True):
        """A step of NCT, or else of NC."""
        sources = ["noisy", "denoised"] if anchored else ["noisy"]
        self.run.anchor = self.anchor if anchored else None
        values = pretrain.schedules(self.args, 1, 100, self.batch)
        losses = self.losses(self.crops(*sources), values["temp"])
        self.run.update(losses["total"], values)

def count_flops(function):
    """Of the matrix products and convolutions. (Of attention's kernels, torch counts not all.)"""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()

def vit_step(run, crops):
    """What a step of NC asks of the ViT; the head is left out."""
    for x in crops:  # one tensor a size
        run.network.backbone(x).sum().backward()
    with torch.no_grad():
        run.teacher.backbone(crops[0])

def pretraining(options, flags, folder):
    args = pretrain.read_config(flags)
    batch = min(options.batch_size or args.batch_size, len(folder))
    training = Training(args, folder, batch, torch.device("cpu"))
    run, data = training.run, training.data

    def teacher():
        return run.teacher.targets(crops[0], data["picked"], args.teacher_temp)

    def student():
        logits, patch_logits, cls = run.student(crops, data["picked"], data["masks"])
        pretrain.distillation(logits, patch_logits, targets, data["masks"], data["picked"])
        for view in cls.chunk(2):
            pretrain.global_koleo(view)

    crops = training.crops("noisy")["noisy"]
    targets, matrix = teacher(), torch.randn(2048, 2048)
    torch.set_num_threads(1)  # as in a worker
    work = in_turns(options.repeats, {"worker: decode + noise + crops": lambda: training.make("noisy")})
    torch.set_num_threads(options.threads)
    times = work | in_turns(options.repeats, {
        "colour operations": lambda: training.crops("noisy"),
        "teacher": teacher,
        "student forward + losses": student,
        "whole step (NC)": lambda: training.step(anchored=False),
        "whole step (NCT)": training.step,
        "matrix product": lambda: matrix @ matrix,
    })
    figures = medians(times)
    for part in ("worker: decode + noise + crops", "whole step (NC)"):
        figures[f"{part}, images/s"] = 1000 * batch / figures[f"{part}, ms"]
    nc, products = times["whole step (NC)"], times["matrix product"]
    figures["step of NCT / step of NC"] = median_ratio(times["whole step (NCT)"], nc)
    work = count_flops(lambda: vit_step(run, crops)) / (2 * len(matrix) ** 3)  # in such products
    figures["ViT, share of the matrix product's rate"] = median_ratio(products, nc) * work
    return figures

# ==== the other stages ============================================================================
def denoiser_step(args, folder, device):
    """(a step of denoise.py train on patches that are cut already, how many they are, their side in
    pixels, the model)"""
    patch, depth = denoise.patch_plan(folder.shapes[:, :2], args.patch)
    model = denoise.UNet(folder.channels, args.width, depth, args.init_scale)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    context, scaler = c.autocast(device, args.amp)
    chosen = list(range(min(args.batch_size, len(folder))))
    batch = denoise.make_batch(args, folder, chosen, patch, (1, 1), slice(None), 0, 0, chosen)
    batch = c.to_device(batch, device)
    loop = SimpleNamespace(epoch=0, batches=lambda *_: [batch], tick=lambda *_: False, close=lambda: None)

    def step():
        denoise.fit(args, loop, None, context, model, optimizer, scaler)

    return step, len(chosen), patch, model

def denoising(options, flags, folder):
    _, args = denoise.read_config(["train", *flags])
    step, count, patch, _ = denoiser_step(args, folder, torch.device("cpu"))
    return medians(in_turns(options.repeats, {f"denoiser step, {count} x {patch} px": step}))

def heads_training(args, width, classes, device="cpu"):
    """All 52 linear heads on random features, as a function."""
    x = torch.randn(1, 1000, 5, width)  # (views, images, tokens, D)
    y = torch.arange(1000) % classes

    def train():
        for tokens in probe.INPUTS.values():
            probe.train_heads(x, y, classes, tokens, args, torch.arange(1000), device)

    return train

def heads(options, flags):
    args = probe.read_config([*flags, "--run", "none"])
    args.iterations = 20
    width = c.make_vit(pretrain.read_config(flags).arch).embed_dim
    train = heads_training(args, width, 10)
    return medians(in_turns(options.repeats, {"52 heads, 10 classes, 20 steps": train}))

def measure(options):
    """{part with its unit: figure}."""
    torch.set_num_threads(options.threads)
    flags = ["--out=none", f"--data={options.data}", f"--noise={options.noise}",
             f"--preset={options.preset}", "--amp=off"]  # as the matrix product that is compared with
    folder = c.Folder(options.data, "train", options.noise)
    figures = denoising(options, flags, folder) | heads(options, flags)
    return pretraining(options, flags, folder) | figures

# ==== two checkouts, main =========================================================================
def against(options):
    """{part: figure of this checkout / of the other one: each turn, then min, median, max}."""
    ratios = {}
    for _ in range(options.repeats):
        pair = []
        for script in (__file__, Path(options.against, "tests/bench.py")):
            with tempfile.NamedTemporaryFile() as out:
                flags = [*sys.argv[1:], "--against", "", "--out", out.name]  # the last one counts
                subprocess.run([sys.executable, script, *flags], check=True, stdout=sys.stderr)
                pair.append(c.read_json(Path(out.name), {"figures"})["figures"])
        for name, figure in pair[0].items():
            ratios.setdefault(name, []).append(figure / pair[1][name])
    return {name: [*r, min(r), median(r), max(r)] for name, r in ratios.items()}

def cpu_name():
    info = Path("/proc/cpuinfo")
    if info.exists() and "model name" in info.read_text():
        return info.read_text().split("model name\t: ")[1].splitlines()[0]
    return platform.processor() or platform.machine()

def read_options(argv=None):
    return c.read_flags(argv, __doc__, PRESETS, {"bench": FLAGS}, positive=("repeats", "threads"))

def main():
    options = read_options()
    figures = against(options) if options.against else measure(options)
    about = {"date": str(datetime.date.today()), "cpu": cpu_name(), "cores": c.cores,
             "threads": options.threads, "torch": torch.__version__,
             "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""), "command": " ".join(sys.argv)}
    print(about)
    for name, figure in figures.items():
        values = figure if options.against else [figure]
        print(f"{name:44}", *(f"{value:9.3f}" for value in values))
    if options.out != "none":
        c.write_json(Path(options.out), {**about, "figures": figures})

if __name__ == "__main__":
    c.run(main)
