"""What the paper's presets cost: steps, FLOPs, traffic, memory, disk, decoding cores, GPU hours.

    python tests/scale.py                 results/scale.md, of what is stored in results/scale.json
    python tests/scale.py --data DIR      measures anew before that: five minutes on a core

DIR: any folder of photographs as large as ImageNet's. A core's speed and the copies' size are
measured; the rest is computed from the stages' own presets. Nothing needs a GPU.
"""

import argparse
import datetime
import functools
import random
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import bench

import common as c
import denoise
import pretrain
import probe

ROOT = Path(__file__).parents[1]
IMAGES = {"imagenet100": (50_000, 5_000), "imagenet1k": (1_281_167, 50_000)}  # train, val: the paper's
GPU = "NVIDIA H100 SXM"
RATE = 989e12  # its FLOP/s in dense bf16 matrix products, by the data sheet
SHARES = (0.25, 0.35, 0.5)  # of that rate, which training may reach; tests/gpu.py measures it
GPUS = (1, 4, 8)
FLOAT, HALF = 4, 2  # bytes of float32 and of half precision
NOISE = "gauss100"
DENOISER = "--preset small --epochs 10"  # that makes the copies whose size is measured


# ==== presets =====================================================================================
def curriculum(preset):
    """(epochs of an arm, those of them on denoised images, whether NCT's anchor is the finished
    denoised run), as run.sh has them."""
    text = (ROOT / "run.sh").read_text()
    length, part = re.search(rf"^ *{preset}\)\s+length=(\d+) part=(\d+)", text, re.M).groups()
    finished = re.findall(r'\[ "\$preset" = (\w+) \] && \[ \$\{#pull\[@\]\} -gt 0 \]', text)
    return int(length), int(part), preset in finished


def describe(preset):
    """The settings of a preset and what follows from them."""
    flags = ["--preset", preset, "--data", "none", "--out", "none"]
    args = pretrain.read_config(flags)
    _, denoiser = denoise.read_config(["train", *flags])
    views = probe.read_config([*flags, "--run", "none"]).views
    length, part, finished = curriculum(preset)
    train, val = IMAGES[preset]
    p = SimpleNamespace(name=preset, args=args, denoiser=denoiser, views=views, train=train, val=val)
    p.steps = train // args.batch_size  # an epoch
    p.denoised_epochs = length if finished else part
    p.noisy_epochs = length - part
    p.masked = masked_patches(args)
    p.weights = vit_parameters(args) + head_parameters(args)
    return p


def masked_patches(args, images=1000):
    """An image, the mean over many draws: one of its two global crops is masked."""
    side = args.global_size // args.patch_size
    masks = c.draw_masks(2 * images, side, side, random.Random(0))
    return masks.sum().item() / images


# ==== formulas: parameters, FLOPs =================================================================
def tokens(args, size):
    return (size // args.patch_size) ** 2 + 1  # with the class token


def vit_parameters(args, channels=3):
    D, L, _ = c.ARCHS[args.arch]
    block = 12 * D**2 + 15 * D  # weights; biases, norms, LayerScale
    patch_embed = channels * args.patch_size**2 * D + D
    positions = tokens(args, args.global_size) * D
    return L * block + patch_embed + positions + 4 * D  # class and mask token, last norm


def head_parameters(args):
    D, h, b, K = c.ARCHS[args.arch][0], args.head_hidden, args.head_bottleneck, args.prototypes
    return D * h + h + h * h + h + h * b + b + K * b + K


def vit_flops(args, size, channels=3):
    """(FLOPs of one crop forward, those of its patch embedding)"""
    (D, L, _), T = c.ARCHS[args.arch], tokens(args, size)
    patch_embed = 2 * (T - 1) * channels * args.patch_size**2 * D
    return L * (24 * T * D**2 + 4 * T**2 * D) + patch_embed, patch_embed


def head_flops(args, rows):
    D, h, b, K = c.ARCHS[args.arch][0], args.head_hidden, args.head_bottleneck, args.prototypes
    return 2 * rows * (D * h + h * h + h * b + b * K)


def image_flops(args, masked, teachers):
    """Of an image in a step. teachers: 1, with an anchor 2. The backward pass costs twice the
    forward pass, but no gradient of the pixels is needed."""
    whole, whole_embed = vit_flops(args, args.global_size)
    local, local_embed = vit_flops(args, args.local_size)
    n = args.local_crops
    student = 3 * (2 * whole + n * local) - (2 * whole_embed + n * local_embed)
    student += 3 * head_flops(args, 2 + n + masked)
    teacher = 2 * whole + head_flops(args, 2 + masked)
    return student + teachers * teacher


def denoiser_flops(args):
    """(of a training patch, of a pixel that is denoised), counted on the meta device."""
    meta = torch.device("meta")
    with meta:
        model = denoise.UNet(width=args.width)
        y = torch.empty(1, 3, args.patch, args.patch)
        pairs = torch.empty(1, 2, args.patch // 2, args.patch // 2, dtype=torch.long)
    trained = bench.count_flops(lambda: sum(denoise.n2n_losses(model, y, pairs, 1.0)).backward())
    with torch.no_grad():
        applied = bench.count_flops(lambda: model(y))
    return trained, applied / args.patch**2


# ==== formulas: bytes =============================================================================
def activation_bytes(args, images, width=HALF):
    """What the student's blocks keep for the backward pass. Of a token these are the float32 inputs
    of two norms (2 D), and in the precision of the products 16 D values: the inputs of qkv, proj, fc1
    (3 D) and fc2 (4 D); q, k, v (3 D); GELU's input (4 D); what LayerScale multiplies (2 D)."""
    D, L, _ = c.ARCHS[args.arch]
    crops = 2 * tokens(args, args.global_size) + args.local_crops * tokens(args, args.local_size)
    return images * crops * L * D * (2 * FLOAT + 16 * width)


def logit_bytes(args, images, masked, teachers):
    """(kept for the backward pass, all). Kept are in float32 of every teacher its targets, their sum
    over both views, and the student's log softmax. Beside them are the student's logits and two
    temporary arrays of the patches' rows."""
    student, teacher = 2 + args.local_crops + masked, 2 + masked  # rows an image
    kept = FLOAT * teachers * (student + teacher + 1)
    everything = kept + HALF * student + 2 * FLOAT * masked
    return images * args.prototypes * kept, images * args.prototypes * everything


def state_bytes(weights, teachers, gpus=1):
    """On a GPU: weights of student and teachers, the gradient, AdamW's two moments, in float32; and
    the buckets in which DDP sends the gradient."""
    buckets = gpus > 1
    return FLOAT * weights * (1 + teachers + 1 + 2 + buckets)


def gpu_bytes(p, gpus):
    """Memory of NCT on each of so many GPUs."""
    images = p.args.batch_size / gpus
    _, logits = logit_bytes(p.args, images, p.masked, 2)
    return state_bytes(p.weights, 2, gpus) + activation_bytes(p.args, images) + logits


def checkpoint_bytes(args, weights, teachers):
    """Without the gradient, with the two centres of every teacher."""
    centers = FLOAT * 2 * args.prototypes * teachers
    return state_bytes(weights, teachers) - FLOAT * weights + centers


def ring_bytes(weights, gpus):
    """That a GPU sends in a step."""
    return FLOAT * weights * 2 * (gpus - 1) / gpus


# ==== measurements ================================================================================
def measure(data):
    """Images a second of a core, bytes a pixel of denoised copies, pixels an image."""
    with tempfile.TemporaryDirectory() as out:
        shared = ["--data", data, "--noise", NOISE]
        denoise.main(["train", *DENOISER.split(), *shared, "--out", f"{out}/denoiser"])
        denoise.main(["apply", *shared, "--denoiser", f"{out}/denoiser", "--out", f"{out}/copies"])
        folder = c.Folder(data, "train", NOISE, denoised=f"{out}/copies")
        pixels = folder.shapes[:, :2].prod(1).sum().item()
        sizes = [path.stat().st_size for path in folder.denoised]
        speed = core_speed(folder)
        quality = c.read_json(f"{out}/denoiser/quality.json")
    return {"date": str(datetime.date.today()), "cpu": bench.cpu_name(), "torch": torch.__version__,
            "images": len(folder), "pixels": pixels / len(folder), "images_s": speed,
            "copy_bytes_a_pixel": sum(sizes) / pixels, "copy_psnr": quality["denoised_clean"]}


def core_speed(folder, repeats=5):
    """{phase: images/s that a worker of one thread decodes, with noise, and cuts}"""
    torch.set_num_threads(1)
    indices = folder.spread(40)
    makers = {}
    for phase, sources in (("denoised", ["denoised"]), ("NCT", ["noisy", "denoised"])):
        args = describe("imagenet100").args
        args.source = sources[0]
        batch = (args, folder, sources, slice(None), 0, 0, indices)
        makers[phase] = functools.partial(pretrain.make_batch, *batch)
    times = bench.medians(bench.in_turns(repeats, makers))
    return {phase: 1000 * len(indices) / times[f"{phase}, ms"] for phase in makers}


# ==== the page ====================================================================================
INTRODUCTION = """# What the paper's presets cost

`python tests/scale.py` makes this page. Nothing on it was measured on a GPU: `python tests/gpu.py` does that.

N images, B batch, n local crops, M masked patches of an image; a ViT of width D with L blocks, T tokens
a crop (patches of p x p pixels and the class token); a head of widths h and b with K prototypes; P weights
of both; t teachers: 1 in the denoised phase, 2 in NCT, with the anchor. A multiplication with its addition
is 2 FLOPs.

- *Counted*: by running the code; FLOPs by torch's counter.
- *Computed*: by the formula, which a test holds to the code.
- *Estimated*: by the formula; the head's hidden layers, the crops and the allocator's gaps are left out.
"""
MEASURED = """
Measured on {images} photographs of ImageNet with {noise}, by one thread beside other work,
{cpu}, torch {torch}, {date} (`scale.json`):

- {pixels:,.0f} pixels an image.
- {copy_bytes_a_pixel:.2f} bytes a pixel of its denoised PNG copy, of {copy_psnr:.1f} dB against the clean image, by
  `denoise.py train {denoiser}`.
- A core makes the crops of {denoised:.1f} images/s in the denoised phase, where it decodes a PNG copy, and of
  {nct:.1f} images/s in NCT, where it decodes an image, adds its noise and decodes its copy.
"""
SPEED = """
## If a GPU reaches a share of {rate}

That is the rate of an {gpu} in dense bf16 matrix products, by the vendor's data sheet. The shares
are assumed. Images/s of a GPU = share x rate / FLOPs of an image. Its cores = images/s / measured
images/s of a core. Hours of pretraining = its FLOPs / (share x rate x GPUs), if cores and network
keep up.
"""


def si(value, unit):
    """12345, 'B' -> '12.3 kB'"""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}"


def pretraining_flops(p):
    """Of NCT: the denoised phase, then the noisy one."""
    images = p.steps * p.args.batch_size  # an epoch
    denoised = p.denoised_epochs * image_flops(p.args, p.masked, 1)
    return images * (denoised + p.noisy_epochs * image_flops(p.args, p.masked, 2))


def work_rows(p):
    """[quantity, formula, value, where it is from] of steps and FLOPs."""
    args = p.args
    steps = p.steps * (p.denoised_epochs + p.noisy_epochs)
    crop, _ = vit_flops(args, args.global_size)
    image = image_flops(args, p.masked, 1)
    anchored = image_flops(args, p.masked, 2)
    return [
        ["N to train on, of val", "", f"{p.train:,}, {p.val:,}", "the paper"],
        ["network, B", "", f"{args.arch}, {args.batch_size}", "preset"],
        ["epochs, denoised + noisy", "", f"{p.denoised_epochs} + {p.noisy_epochs}", "run.sh"],
        ["steps", "N / B an epoch, rounded down", f"{steps:,}", "computed"],
        ["images seen", "steps x B", f"{steps * args.batch_size:,}", "computed"],
        ["M", "mean of 1,000 draws", f"{p.masked:.1f}", "counted"],
        ["FLOPs of a global crop", "F = L (24 T D² + 4 T² D) + 6 (T - 1) p² D",
         si(crop, "FLOP"), "computed"],
        ["FLOPs of a row of the head", "H = 2 (D h + h² + h b + b K)",
         si(head_flops(args, 1), "FLOP"), "computed"],
        ["FLOPs of an image, denoised phase", "3 [2 F(global) + n F(local) + (2 + n + M) H] + "
         "t [2 F(global) + (2 + M) H], less 6 (T - 1) p² D a crop", si(image, "FLOP"), "computed"],
        ["FLOPs of an image, NCT", "the same with t = 2", si(anchored, "FLOP"), "computed"],
        ["FLOPs of pretraining", "images seen x FLOPs of an image, of both phases",
         si(pretraining_flops(p), "FLOP"), "computed"],
    ]


def denoiser_rows(p):
    args = p.denoiser
    patch, pixel = denoiser_flops(args)
    patches = args.epochs * (args.subset or p.train)
    return [
        ["denoiser: patches seen", "epochs x images", f"{patches:,}", "computed"],
        ["denoiser: FLOPs of a patch", f"a step on {args.patch} x {args.patch} pixels",
         si(patch, "FLOP"), "counted"],
        ["denoiser: FLOPs of training", "patches x FLOPs of a patch",
         si(patches * patch, "FLOP"), "computed"],
        ["denoiser: FLOPs of a pixel of the copy", "", si(pixel, "FLOP"), "counted"],
    ]


def memory_rows(p):
    args = p.args
    vit = vit_parameters(args)
    sent = [si(p.steps * ring_bytes(p.weights, gpus), "B") for gpus in GPUS[1:]]
    memory = [si(gpu_bytes(p, gpus), "B") for gpus in GPUS]
    _, logits = logit_bytes(args, 1, p.masked, 2)
    several, all_of_them = (" / ".join(map(str, gpus)) for gpus in (GPUS[1:], GPUS))
    return [
        ["parameters of ViT, of head", "", f"{si(vit, '')}, {si(p.weights - vit, '')}", "computed"],
        [f"gradient that each of {several} GPUs sends an epoch", "steps x 4 P x 2 (GPUs - 1) / GPUs: "
         "ring all-reduce", " / ".join(sent), "computed"],
        ["memory: weights, gradient, AdamW", "4 P (student + t + gradient + 2 moments), t = 2",
         si(state_bytes(p.weights, 2), "B"), "computed"],
        ["memory: activations of an image", "L D (2 x 4 + 16 x 2) for each token of its crops: in a "
         "block two float32 inputs of norms and 16 values in bf16",
         si(activation_bytes(args, 1), "B"), "estimated"],
        ["memory: logits of an image, NCT", "K [4 t (5 + n + 2 M) + 2 (2 + n + M) + 8 M]: targets and "
         "log softmax of each teacher, the logits, two temporary arrays", si(logits, "B"), "estimated"],
        [f"memory: each of {all_of_them} GPUs, NCT", "the sum, of B / GPUs images; on several GPUs 4 P "
         "more, DDP's buckets", " / ".join(memory), "estimated"],
    ]


def disk_rows(p, measured):
    width = c.ARCHS[p.args.arch][0]
    copies = (p.train + p.val) * measured["pixels"] * measured["copy_bytes_a_pixel"]
    checkpoints = 2 * checkpoint_bytes(p.args, p.weights, 2)
    features = p.train * (1 + p.views) * 5 * width * HALF
    return [
        ["disk: denoised copy", "images x pixels x bytes a pixel",
         si(copies, "B"), "measured, scaled up"],
        ["disk: checkpoint.pth and the one before, NCT",
         "2 x 4 [P (student + t + 2 moments) + 2 K t]", si(checkpoints, "B"), "computed"],
        ["disk: backbone.pth", "4 bytes a parameter",
         si(FLOAT * vit_parameters(p.args), "B"), "computed"],
        ["views of the probe", "", str(p.views), "preset"],
        ["disk: features of the probe, while it runs", "N (1 + views) x 5 tokens x 2 D",
         si(features, "B"), "computed"],
    ]


def speed_rows(p, measured):
    """A row a share: images/s of a GPU and cores for it in both phases, hours of so many GPUs."""
    rows = []
    for share in SHARES:
        row = [p.name, f"{100 * share:g} %"]
        for teachers, phase in ((1, "denoised"), (2, "NCT")):
            images = share * RATE / image_flops(p.args, p.masked, teachers)
            row += [f"{images:,.0f}", f"{images / measured['images_s'][phase]:.0f}"]
        hours = pretraining_flops(p) / (share * RATE) / 3600
        row += [f"{hours / gpus:.1f}" for gpus in GPUS]
        rows.append(row)
    return rows


def page(measured):
    """The text of scale.md."""
    presets = [describe(name) for name in IMAGES]
    columns = []
    for p in presets:
        columns.append(work_rows(p) + denoiser_rows(p) + memory_rows(p) + disk_rows(p, measured))
    rows = []
    for same in zip(*columns, strict=True):  # the row of each preset
        quantity, formula, _, origin = same[0]
        rows.append([quantity, formula, *(row[2] for row in same), origin])
    heads = ["preset", "share", "denoised phase: images/s of a GPU", "its cores",
             "NCT: images/s of a GPU", "its cores"]
    heads += [f"hours on {gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS]
    speeds = [row for p in presets for row in speed_rows(p, measured)]
    speed = measured["images_s"]
    about = MEASURED.format(**measured, noise=NOISE, denoiser=DENOISER,
                            denoised=speed["denoised"], nct=speed["NCT"])
    text = [INTRODUCTION, *probe.table(["quantity", "formula", *IMAGES, "from"], rows)]
    text += [about.rstrip("\n"), SPEED.format(rate=si(RATE, "FLOP/s"), gpu=GPU), *probe.table(heads, speeds), ""]
    return "\n".join(text)


def main():
    parser = c.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="measure anew, on this folder")
    options, stored = parser.parse_args(), ROOT / "results/scale.json"
    if options.data:
        c.write_json(stored, measure(options.data))
    c.write_text(stored.with_suffix(".md"), page(c.read_json(stored)))


if __name__ == "__main__":
    c.run(main)
