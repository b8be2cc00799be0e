"""Check all stages on one GPU and time them, in at most 8 minutes.

    python tests/gpu.py [--data DIR] [--out results/gpu.json]
    python tests/gpu.py --toy        the same at toy size on a CPU, in half a minute

It needs nothing: the images are the built-in ones, or for timing those of any folder, --data.
Every section is a process of its own: one that fails or hangs is reported, and the others run. A
fork may not use the GPU if its parent has: this process never does, nor do `stages`, `processes`.
Out: a table and a JSON file of its lines. Exit code 1: a check or a section failed.
"""

import argparse
import datetime
import functools
import gc
import importlib
import itertools
import math
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

import bench
import shapes

import common as c
import denoise
import pretrain
import probe
from common import UserError

ROOT = Path(__file__).parents[1]
FORK = multiprocessing.get_context("fork")
FULL = SimpleNamespace(
    device=torch.device("cuda:0"),
    few={"train": 40, "val": 20, "size": 256},  # images of the three steps of every stage
    many={"train": 320, "val": 10, "size": 432},  # for timing: of as many pixels as ImageNet's
    denoise="--preset imagenet100 --batch_size 40",
    pretrain="--preset imagenet100",  # of batch 40
    probe="--preset imagenet100",
    compare=8,  # images of the step that is compared with the CPU's
    matrix=8192,  # side of the matrices whose product is timed
    steps=10,  # that are timed
    networks={"ViT-S/16 at 40": ("--preset imagenet100", 40),
              "ViT-S/16 at 256": ("--preset imagenet100", 256),
              "ViT-B/16 at 64": ("--preset imagenet1k", 64)},
    denoisers={"batch 4": "--preset imagenet100", "batch 8": "--preset imagenet1k"},
    heads=(384, 1000, 200),  # width, classes, steps
)
TINY = ("--arch 16,2,2 --prototypes 16 --head_hidden 16 --head_bottleneck 8 --global_size 32 "
        "--local_size 16 --local_crops 2 --batch_size 20 --workers 1")
TOY = SimpleNamespace(
    device=torch.device("cpu"),
    few={"train": 20, "val": 10, "size": 32},
    many={"train": 10, "val": 10, "size": 32},
    denoise="--preset tiny --width 4 --batch_size 20 --workers 1",
    pretrain=TINY,
    probe="--preset tiny --img_size 32 --resize 32 --workers 1",
    compare=4,
    matrix=128,
    steps=2,
    networks={"ViT at 4": (TINY, 4)},
    denoisers={"batch 4": "--preset tiny --width 4"},
    heads=(16, 10, 2),
)
# largest relative difference of the losses and of the gradient. A step of bf16 is 0.4 %; on CPUs the
# gradient of a ViT-S differs by 1.2 %
PRECISIONS = {"off": (1e-4, 1e-4), "bf16": (1e-2, 3e-2), "fp16": (1e-2, 1e-2)}


# ==== processes, lines of the table ===============================================================
class Table:
    """The lines of one section, dicts."""
    def __init__(self, section):
        self.section, self.lines = section, []

    def figure(self, what, value, unit="", limit=None, ok=True):
        line = {"section": self.section, "what": what, "value": value, "unit": unit}
        self.lines.append({**line, "limit": limit, "ok": ok})

    def check(self, what, value, most, unit=""):
        """A figure that must not be larger; NaN is."""
        self.figure(what, value, unit, most, value <= most)


def in_child(log, seconds, function, *args):
    """Call a function in a process of its own, its output in a file. Raises UserError with the last
    line of that, if it fails or takes too long. The process ends with this one."""
    parent = os.getpid()

    def work():
        c.end_with(parent, None)
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        function(*args)

    process = FORK.Process(target=work)
    process.start()
    try:
        process.join(seconds)
        ended = not process.is_alive()
    finally:
        process.kill()
        process.join()
    if not ended:
        raise UserError(f"took longer than {seconds:.0f} s")
    if process.exitcode:
        lines = Path(log).read_text(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        raise UserError(f"exit code {process.exitcode}: {(said or ['no output'])[-1]}")


def run_python(runner, name, flags):
    """What `python name flags` does; runner: runpy's run_path or run_module."""
    sys.argv = [name, *flags]
    runner(name, run_name="__main__")


def stage(s, script, flags, device=None):
    """Run a command line of a stage. Gives the seconds that it took. Raises UserError."""
    started, words = c.now(), [*flags.split(), "--device", (device or s.device).type]
    in_child(s.folder / "stage.txt", None, run_python, runpy.run_path, str(ROOT / script), words)
    return c.now() - started


def one_section(section, name, s, file):
    """In its process: a section's lines go into a file, also those before a failure."""
    table = Table(name)
    try:
        section(s, table)
    finally:
        c.write_json(file, {"lines": table.lines})


def run_sections(sections, s, save, seconds, longest=200):
    """Run all sections, one after the other, within so many seconds, of which one may take `longest`.
    Gives their lines; prints and saves what there is after each."""
    lines, end = [], c.now() + seconds
    for name, section in sections.items():
        file, started, last = s.folder / f"{name.replace('/', '')}.json", c.now(), Table(name)
        try:
            left = max(0.0, min(longest, end - started))
            in_child(file.with_suffix(".txt"), left, one_section, section, name, s, file)
        except UserError as error:
            last.figure("error", str(error), ok=False)
        last.figure("whole section", c.now() - started, "s")
        found = c.read_json(file)["lines"] if file.exists() else []
        lines += found + last.lines
        print(*map(shown, found + last.lines), sep="\n", flush=True)
        save(lines)
    return lines


def shown(line):
    value, limit = line["value"], line["limit"]
    words = [value if isinstance(value, str) else f"{value:.4g}", line["unit"]]
    if limit is not None:
        words.append(f"(at most {limit:g})")
    if not line["ok"]:
        words.append("FAILED")
    return f"{line['section']:24} {line['what']:56} {' '.join(filter(None, words))}"


# ==== timing ======================================================================================
def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_a_call(function, s):
    """Mean over s.steps calls; three more warm up."""
    for _ in range(3):
        function()
    wait(s.device)
    started = c.now()
    for _ in range(s.steps):
        function()
    wait(s.device)
    return (c.now() - started) / s.steps


def matrix_rate(s):
    """FLOP/s of a large bf16 matrix product."""
    x = torch.randn(s.matrix, s.matrix, device=s.device).bfloat16()
    return 2 * s.matrix**3 / seconds_a_call(lambda: x @ x, s)


def device_work(function, device):
    """[(name, start, end)] in seconds of what the device does while a function runs: kernels and
    copies; on a CPU operators, and their parts again."""
    kind = getattr(ProfilerActivity, device.type.upper())
    with profile(activities=[kind]) as profiler:
        function()
        wait(device)
    work = []
    for event in profiler.events():
        on_device = event.device_type.name.lower() == device.type
        if on_device and not event.is_user_annotation:
            work.append((event.name, event.time_range.start / 1e6, event.time_range.end / 1e6))
    return work


def busy(work):
    """Seconds in which at least one of (name, start, end) runs."""
    total, reached = 0.0, -math.inf
    for _, start, end in sorted(work, key=lambda row: row[1]):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def longest_kernels(work, most=20):
    """[(name, seconds, calls)], the longest first."""
    seconds, calls = Counter(), Counter()
    for name, start, end in work:
        seconds[name] += end - start
        calls[name] += 1
    return [(name, total, calls[name]) for name, total in seconds.most_common(most)]


# ==== sections: the same results as on the CPU ====================================================
def machine(s, table):
    names = f"{bench.cpu_name()}, {c.cores} cores"
    if s.device.type == "cuda":
        memory = torch.cuda.get_device_properties(s.device).total_memory
        names = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}; {names}"
        table.figure("memory of the GPU", memory / 1e9, "GB")
    table.figure("device", names)
    table.figure("torch, CUDA", f"{torch.__version__}, {torch.version.cuda}")
    table.figure("bf16 matrix product", matrix_rate(s) / 1e12, "TFLOP/s")


def gradient(run, loss):
    """Of all weights (P,), on the CPU, as the scaler gives it. With fp16 the scale falls until the
    gradient is finite; its steps before change nothing."""
    for _ in range(20):
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward(retain_graph=True)
        run.scaler.unscale_(run.optimizer)
        flat = torch.cat([p.grad.flatten() for p in run.network.parameters()]).cpu()
        if flat.isfinite().all() or not run.scaler.is_enabled():
            break
        run.scaler.step(run.optimizer)
        run.scaler.update()
    return flat


def one_step(s, device, amp):
    """Crops, losses and gradient of a step of NCT, on the CPU. LayerScale starts at 1: at 1e-5 all
    class tokens are nearly the same, and KoLeo takes the logarithm of rounding errors."""
    flags = f"{s.pretrain} --layer_scale 1 --amp {amp} --data {s.few_images} --out none"
    args = pretrain.read_config(flags.split())
    folder = c.Folder(args.data, "train", "gauss100")
    training = bench.Training(args, folder, s.compare, device)
    crops = training.crops("noisy", "denoised")
    losses = training.losses(crops)
    values = torch.stack(list(losses.values())).detach().cpu()
    seen = torch.cat([x.flatten() for x in itertools.chain(*crops.values())])
    return seen.cpu(), values, gradient(training.run, losses["total"])


def values(s, table):
    torch.backends.cudnn.allow_tf32 = False  # that of matrix products is off by default
    crops, losses, whole = one_step(s, torch.device("cpu"), "off")
    for amp, (most, most_gradient) in PRECISIONS.items():
        if amp == "fp16" and s.device.type == "cpu":
            continue
        found = one_step(s, s.device, amp)
        if amp == "off":
            table.check("crops, largest difference", (found[0] - crops).abs().max().item(), most)
        difference = ((found[1] - losses) / losses).abs().max().item()
        table.check(f"losses with --amp {amp}, relative difference", difference, most)
        difference = ((found[2] - whole).norm() / whole.norm()).item()
        table.check(f"gradient with --amp {amp}, relative difference", difference, most_gradient)


def denoised_images(s, table):
    """As denoise.py apply makes them: in float32, with what torch does to it by default."""
    folder = c.Folder(s.few_images, "train", "gauss100")
    images = torch.stack([folder.read(i) for i in range(4)])
    made = []
    for device in (torch.device("cpu"), s.device):
        torch.manual_seed(0)
        model = denoise.UNet(depth=4, init_scale=1.0).to(device, memory_format=torch.channels_last)
        made.append(denoise.denoise(model, images, device).float())
    table.check("denoised images, largest difference", (made[1] - made[0]).abs().max().item(), 1, "levels")


# ==== sections: all stages ========================================================================
def last_line(out):
    return c.read_log(Path(out, "log.jsonl"))[-1]


def stages(s, table):
    """Three steps of every stage, one an epoch, and a checkpoint that goes from device to device."""
    out = s.folder / "stages"
    shared = f"--data {s.few_images} --noise gauss100"
    denoiser = f"{shared} {s.denoise}"
    noisy = f"{shared} {s.pretrain} --epochs 3 --warmup_epochs 1 --log_steps 1"
    denoised = f"{noisy} --source denoised --denoised {out}/copies"
    copies = f"{shared} --workers 1 --denoiser {out}/denoiser --out {out}/copies"
    anchored = f"{noisy} --init {out}/moved/epoch1.pth --anchor 4 --denoised {out}/copies"
    tested = f"{shared} {s.probe} --iterations 3 --run {out}/nct"
    here, cpu = s.device, torch.device("cpu")
    commands = {
        "denoise.py train": (f"train {denoiser} --epochs 3 --log_steps 1 --out {out}/denoiser", here),
        "denoise.py apply": (f"apply {copies}", here),
        "pretrain.py denoised": (f"{denoised} --out {out}/denoised", here),
        "pretrain.py, epoch 1": (f"{denoised} --out {out}/moved --stop 1", here),
        "pretrain.py, epoch 2 on the CPU": (f"{denoised} --out {out}/moved --stop 2", cpu),
        "pretrain.py, epoch 3": (f"{denoised} --out {out}/moved", here),
        "pretrain.py noisy with anchor": (f"{anchored} --out {out}/nct", here),
        "probe.py": (f"{tested} --out {out}/probe.json", here),
    }
    for name, (flags, device) in commands.items():
        script = name.split(" ")[0].rstrip(",")
        table.figure(name, stage(s, script, flags, device), "s")
    for name in ("denoiser", "denoised", "moved", "nct"):
        table.check(f"{name}: steps missing of three", 3 - last_line(out / name)["step"], 0)
    alone, moved = last_line(out / "denoised")["total"], last_line(out / "moved")["total"]
    table.check("loss after the CPU's epoch, relative difference", abs(moved / alone - 1), 1e-2)
    table.figure("linear probe", c.read_json(out / "probe.json")["linear"], "%")


def processes(s, table):
    """Collective operations and a run under torchrun, by two GPUs if there are two; or one."""
    flags = (f"{s.pretrain} --data {s.few_images} --noise gauss100 --epochs 3 --warmup_epochs 1 --log_steps 1 "
             f"--device {s.device.type}")
    alone, together = s.folder / "alone", s.folder / "together"
    stage(s, "pretrain.py", f"{flags} --out {alone}")
    count = 2 if s.device.type == "cpu" else min(2, torch.cuda.device_count())
    launch = f"--standalone --nproc_per_node {count} -- {__file__} worker {flags} --out {together}"
    log = s.folder / "torchrun.txt"
    in_child(log, None, run_python, runpy.run_module, "torch.distributed.run", launch.split())
    table.figure("processes", count)
    difference = last_line(together)["total"] / last_line(alone)["total"] - 1
    table.check("loss, relative difference to one process", abs(difference), 1e-2)


def worker(flags):
    """One of torchrun's processes: the collective operations that the stages use, then pretrain.py."""
    device = c.setup(flags[flags.index("--device") + 1])
    rank, size = c.world()
    total = size * (size + 1) / 2  # of 1, 2, ..., size
    mine = torch.full((2,), rank + 1.0, device=device)
    found = {}
    for op, expected in (("SUM", total), ("MAX", size)):
        x = mine.clone()
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
        found[op] = x, expected
    rows = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(rows, mine)
    found["gather"] = torch.stack(rows).sum(0), total
    host = torch.ones(2)  # as the loop's, beside those on the device
    dist.all_reduce(host)
    found["host"] = host, size
    layer = nn.parallel.DistributedDataParallel(nn.Linear(2, 1).to(device))
    layer(mine).backward()
    found["DDP"] = layer.module.weight.grad[0], total / size
    for name, (x, expected) in found.items():
        if x.tolist() != [expected] * 2:
            raise UserError(f"{name} gives {x.tolist()} instead of {expected}")
    sys.argv = ["pretrain.py", *flags]
    return pretrain.main()


# ==== sections: speed =============================================================================
def timing_folder(s):
    return c.Folder(s.many_images, "train", "gauss100")


def pretrain_args(flags, *more):
    return pretrain.read_config([*flags.split(), "--data", "none", "--out", "none", *more])


def fitting(args, folder, batch, s):
    """(training of the largest batch that fits the memory, of batch, batch / 2, ...; seconds a step)"""
    while True:
        training = None
        gc.collect()
        if s.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            training = bench.Training(args, folder, batch, s.device)
            return training, seconds_a_call(training.step, s)
        except torch.cuda.OutOfMemoryError:
            batch //= 2


def training(flags, batch, s, table):
    """Steps of NCT on a batch that is on the device already."""
    args, folder = pretrain_args(flags), timing_folder(s)
    small = bench.Training(args, folder, 2, s.device)
    flops = bench.count_flops(small.step) / 2  # an image
    del small
    run, seconds = fitting(args, folder, batch, s)
    table.figure("batch", run.batch, "images")
    rate = run.batch / seconds
    table.figure("speed", rate, "images/s")
    table.figure("work", flops / 1e9, "GFLOP an image")
    table.figure("of the rate of bf16 matrix products", 100 * rate * flops / matrix_rate(s), "%")
    if s.device.type == "cuda":
        table.figure("peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
    work = device_work(run.step, s.device)
    if not work:
        raise UserError("torch.profiler has seen no kernel")
    table.figure("the device waits", 100 * (1 - busy(work) / seconds), "% of the time")
    total = sum(end - start for _, start, end in work)
    for name, kernel, calls in longest_kernels(work):
        table.figure(f"{calls} x {name[:80]}", 100 * kernel / total, "% of the kernels' time")


def compiled(s, table):
    """Two epochs of four steps, each with another number of masked patches; then the speed."""
    if s.device.type == "cpu":  # the traced graphs as they are: C++ takes too long to compile
        torch.compile = functools.partial(torch.compile, backend="eager")
    counters, graphs, update = torch._dynamo.utils.counters, [], pretrain.Run.update

    def counted(*args):
        update(*args)
        graphs.append(counters["stats"]["unique_graphs"])

    pretrain.Run.update = counted
    batch = s.few["train"] // 4
    where = f"--device {s.device.type} --out {s.folder}/compiled"
    flags = (f"{s.pretrain} --batch_size {batch} --data {s.few_images} --noise gauss100 --epochs 2 "
             f"--warmup_epochs 1 --drop_path 0.1 --compile {where}")
    sys.argv = ["pretrain.py", *flags.split()]
    pretrain.main()
    table.figure("steps", len(graphs))
    table.check("graphs", graphs[-1], torch._dynamo.config.recompile_limit - 1)
    table.check("graphs compiled after the first epoch", graphs[-1] - graphs[len(graphs) // 2 - 1], 0)
    table.check("graph breaks", sum(counters["graph_break"].values()), 0)
    pretrain.Run.update = update
    torch._dynamo.reset()
    folder, batch = timing_folder(s), next(iter(s.networks.values()))[1]
    for flag in ("--no-compile", "--compile"):
        run = bench.Training(pretrain_args(s.pretrain, flag), folder, batch, s.device)
        table.figure(f"speed with {flag}", batch / seconds_a_call(run.step, s), "images/s")


def data(s, table):
    """What the workers deliver to the device: decoded, with noise, cut; NCT needs two copies."""
    args, folder = pretrain_args(s.pretrain), timing_folder(s)
    batch, workers = min(args.batch_size, len(folder)), args.workers
    order = torch.arange(len(folder)).split(batch)
    indices = order[0].tolist()
    table.figure("workers", workers)
    for arm, sources in (("NC", ["noisy"]), ("NCT", ["noisy", "clean"])):  # decoded as denoised ones are
        make = functools.partial(pretrain.make_batch, args, folder, sources, slice(None))
        keys = [(0, step, indices) for step in range(5 * workers)]
        for step, _ in enumerate(c.prefetch(make, keys, s.device, workers)):
            if step == 2 * workers - 1:  # so many are made ahead
                started = c.now()
        seconds = c.now() - started
        table.figure(f"speed for {arm}", 3 * workers * batch / seconds, "images/s")


def denoiser(s, table):
    folder = timing_folder(s)
    for name, flags in s.denoisers.items():
        argv = ["train", *flags.split(), "--data", "none", "--out", "none"]
        step, count, side, model = bench.denoiser_step(denoise.read_config(argv)[1], folder, s.device)
        speed = count / seconds_a_call(step, s)
        table.figure(f"train, {name}", speed, f"patches of {side} px/s")
    chunk = [folder.read(i % len(folder)) for i in range(denoise.CHUNK)]
    for amp in ("off", "auto"):
        context, _ = c.autocast(s.device, amp)
        apply = functools.partial(denoise.denoise_list, model.eval(), chunk, s.device, 1024, context)
        table.figure(f"apply --amp {amp}", len(chunk) / seconds_a_call(apply, s), "images/s")


def heads(s, table):
    width, classes, steps = s.heads
    args = probe.read_config(["--data", "none", "--out", "none", "--run", "none"])
    args.iterations = steps
    train = bench.heads_training(args, width, classes, s.device)
    train()
    started = c.now()
    train()
    wait(s.device)
    table.figure(f"52 heads, {classes} classes", steps / (c.now() - started), "steps/s")


# ==== main ========================================================================================
def sections(s):
    networks = {f"training {name}": functools.partial(training, *how) for name, how in s.networks.items()}
    return {"machine": machine, "values": values, "denoised images": denoised_images, "stages": stages,
            "processes": processes, "data": data, **networks, "denoiser": denoiser, "heads": heads,
            "compile": compiled}


def find_gpu(s):
    """Raises UserError where there is none that works."""
    def use():
        torch.zeros(1, device=s.device)

    try:
        in_child(s.folder / "gpu.txt", 60, use)
    except UserError as error:
        raise UserError(f"no GPU that works ({error}); --toy runs everything at toy size on a CPU") from None


def read_options():
    parser = c.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="any folder of images, for timing")
    parser.add_argument("--out", default="", help="default results/gpu.json; with --toy no file")
    parser.add_argument("--toy", action="store_true", help="at toy size on a CPU")
    return parser.parse_args()


def main():
    if sys.argv[1:2] == ["worker"]:
        return worker(sys.argv[2:])
    options, began = read_options(), c.now()
    c.on_signal(lambda *_: sys.exit(c.EXIT_STOPPED))  # clears the folder and ends the processes
    with tempfile.TemporaryDirectory() as folder:
        s = SimpleNamespace(**vars(TOY if options.toy else FULL), folder=Path(folder))
        if options.toy:
            importlib.import_module("torch._dynamo")  # once: each process would need a second for it
        else:
            find_gpu(s)
        s.few_images, s.many_images = f"{folder}/few", options.data or f"{folder}/many"
        shapes.write(s.few_images, **s.few)
        if not options.data:
            shapes.write(s.many_images, **s.many)
        out = options.out or (not options.toy and ROOT / "results/gpu.json")
        about = {"date": str(datetime.date.today()), "toy": options.toy, "data": bool(options.data)}

        def save(lines):
            if out:
                c.write_json(out, {**about, "lines": lines})

        lines = run_sections(sections(s), s, save, began + 8 * 60 - c.now())
    return 0 if all(line["ok"] for line in lines) else 1


if __name__ == "__main__":
    c.run(main)
