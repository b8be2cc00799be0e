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

def vit_flops(run, crops):
    """Of the ViT's matrix products in a step; the head's are left out."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for x in crops:  # one tensor a size
            run.network.backbone(x).sum().backward()
        with torch.no_grad():
            run.teacher.backbone(crops[0])
    return counter.get_total_flops()

# ==== pretraining =================================================================================
def pretraining(options, flags, folder):
    args = pretrain.read_config(flags)
    args.anchor = 1.0  # a run with an anchor, which step() puts aside for NC
    run = pretrain.Run(args, folder.channels, torch.device("cpu"))
    anchor, batch = run.anchor, min(options.batch_size or args.batch_size, len(folder))
    indices = list(range(batch))
    folder.memory["denoised"] = [folder.read(i, "clean") for i in indices]  # stand-ins
    mean = std = torch.full((folder.channels, 1, 1), 0.5)

    def make(*sources):
        return pretrain.make_batch(args, folder, sources, slice(0, batch), 0, 0, indices)

    def color(*sources):
        return pretrain.make_crops(data, sources, mean, std)

    def teacher():
        return run.teacher.targets(crops[0], data["picked"], args.teacher_temp)

    def student():
        logits, patch_logits, cls = run.student(crops, data["picked"], data["masks"])
        pretrain.distillation(logits, patch_logits, targets, data["masks"], data["picked"])
        for view in cls.chunk(2):
            pretrain.global_koleo(view)

    def step(anchor, *sources):
        run.anchor = anchor
        values = pretrain.schedules(args, 1, 100, batch)
        losses, *_ = pretrain.step_losses(args, run, color(*sources), data, values["temp"])
        run.update(losses["total"], values)

    data = make("noisy", "denoised")
    crops = color("noisy")["noisy"]
    targets, matrix = teacher(), torch.randn(2048, 2048)
    torch.set_num_threads(1)  # as in a worker
    work = in_turns(options.repeats, {"worker: decode + noise + crops": lambda: make("noisy")})
    torch.set_num_threads(options.threads)
    times = work | in_turns(options.repeats, {
        "colour operations": lambda: color("noisy"),
        "teacher": teacher,
        "student forward + losses": student,
        "whole step (NC)": lambda: step(None, "noisy"),
        "whole step (NCT)": lambda: step(anchor, "noisy", "denoised"),
        "matrix product": lambda: matrix @ matrix,
    })
    figures = medians(times)
    for part in ("worker: decode + noise + crops", "whole step (NC)"):
        figures[f"{part}, images/s"] = 1000 * batch / figures[f"{part}, ms"]
    nc, products = times["whole step (NC)"], times["matrix product"]
    figures["step of NCT / step of NC"] = median_ratio(times["whole step (NCT)"], nc)
    work = vit_flops(run, crops) / (2 * len(matrix) ** 3)  # in such products
    figures["ViT, share of the matrix product's rate"] = median_ratio(products, nc) * work
    return figures

# ==== the other stages ============================================================================
def denoising(options, flags, folder):
    """A step of Neighbor2Neighbor on patches that are cut already."""
    _, args = denoise.read_config(["train", *flags])
    patch, depth = denoise.patch_plan(folder.shapes[:, :2], args.patch)
    model = denoise.UNet(folder.channels, args.width, depth, args.init_scale)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    rng, images = c.generator(0), range(min(args.batch_size, len(folder)))
    y = torch.stack([denoise.cut_patch(folder.read(i), patch, rng) for i in images]) / 255
    y = y.contiguous(memory_format=torch.channels_last)
    pairs = torch.stack([denoise.draw_pairs(patch, patch, rng) for _ in images])

    def step():
        optimizer.zero_grad(set_to_none=True)
        sum(denoise.n2n_losses(model, y, pairs, args.ramp)).backward()
        optimizer.step()

    return medians(in_turns(options.repeats, {f"denoiser step, {len(y)} x {patch} px": step}))

def heads(options, flags):
    """Twenty steps of all 52 linear heads on random features of the preset's width."""
    args = probe.read_config([*flags, "--run", "none"])
    args.iterations = 20
    width = c.make_vit(pretrain.read_config(flags).arch).embed_dim
    x, y = torch.randn(1, 1000, 5, width), torch.arange(1000) % 10  # (views, images, tokens, D)

    def train():
        for tokens in probe.INPUTS.values():
            probe.train_heads(x, y, 10, tokens, args, torch.arange(1000))

    return medians(in_turns(options.repeats, {"52 heads, 10 classes, 20 steps": train}))

def measure(options):
    """{part with its unit: figure}."""
    torch.set_num_threads(options.threads)
    flags = ["--out=none", f"--data={options.data}", f"--noise={options.noise}",
             f"--preset={options.preset}"]
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

def read_options(argv=None):
    return c.read_flags(argv, __doc__, PRESETS, {"bench": FLAGS}, positive=("repeats", "threads"))

def main():
    options = read_options()
    figures = against(options) if options.against else measure(options)
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and "model name" in info.read_text():
        cpu = info.read_text().split("model name\t: ")[1].splitlines()[0]
    about = {"date": str(datetime.date.today()), "cpu": cpu, "cores": c.cores,
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
