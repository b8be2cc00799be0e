"""How long the parts of a pretraining step take, on one thread of a CPU.

    python tests/bench.py --data DIR [--preset tiny] [--noise gauss100] [--repeats 5] [--out FILE.json]

Prints the median milliseconds of every part, the images per second of the data path (decode, noise,
crops) and of the whole step, and the share of the machine's own matrix rate that the step reaches.
Timings of one machine differ from minute to minute: compare two commits in turns, not in two days.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import common as c
import pretrain

CPU = torch.device("cpu")


def median_ms(function, repeats):
    function()  # warm
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def block_flops(vit, tokens):
    """Floating-point operations of the matrix products of all blocks, for one image's tokens."""
    dim, depth = vit.embed_dim, len(vit.blocks)
    weights = 12 * dim * dim  # qkv 3, projection 1, MLP 8
    attention = 2 * tokens * dim
    return 2 * depth * tokens * (weights + attention)


def step_flops(args, vit, batch):
    """Of one step without a head: the student's passes count three times, the teacher's once."""
    large = 1 + (args.global_size // args.patch_size) ** 2
    small = 1 + (args.local_size // args.patch_size) ** 2
    student = 2 * block_flops(vit, large) + args.local_crops * block_flops(vit, small)
    return batch * (3 * student + 2 * block_flops(vit, large))


def measure(data, preset, noise, repeats, batch=0):
    """{part: milliseconds or a rate}."""
    flags = ["--preset", preset, "--data", data, "--noise", noise, "--out", "none"]
    args = pretrain.read_config(flags)
    folder = c.Folder(data, "train", noise)
    batch = min(batch or args.batch_size, len(folder))
    indices = list(range(batch))
    run = pretrain.Run(args, folder.channels, CPU)
    mean = std = torch.full((folder.channels, 1, 1), 0.5)

    def make():
        return pretrain.make_batch(args, folder, ["noisy"], slice(0, batch), 0, 0, indices)

    def crop():
        return pretrain.make_crops(made, ["noisy"], mean, std)

    def teacher():
        return run.teacher.targets(crops["noisy"][0], made["picked"], 0.04)

    def losses():
        return pretrain.step_losses(args, run, crops, made, 0.04)[0]["total"]

    def step():
        values = pretrain.schedules(args, 1, 100, batch)
        total = pretrain.step_losses(args, run, crop(), made, values["temp"])[0]["total"]
        run.update(total, values)

    made = make()
    crops = crop()
    matrix = torch.randn(2048, 2048)
    result = {
        "decode, noise, crops": median_ms(make, repeats),
        "colour operations": median_ms(crop, repeats),
        "teacher": median_ms(teacher, repeats),
        "losses, forward": median_ms(losses, repeats),
        "step": median_ms(step, repeats),
    }
    rate = 2 * 2048**3 / median_ms(lambda: matrix @ matrix, repeats)  # operations a millisecond
    result["data path, images/s"] = 1000 * batch / result["decode, noise, crops"]
    result["step, images/s"] = 1000 * batch / result["step"]
    result["share of the matrix rate"] = (
        step_flops(args, run.network.backbone, batch) / result["step"] / rate)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--noise", default="gauss100")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=0, help="0: the preset's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = measure(args.data, args.preset, args.noise, args.repeats, args.batch_size)
    for name, value in figures.items():
        print(f"{name:26} {value:9.2f}")
    if args.out:
        about = {"date": str(datetime.date.today()), "torch": torch.__version__,
                 "machine": platform.processor() or platform.machine(), "threads": args.threads,
                 "preset": args.preset, "noise": args.noise}
        Path(args.out).write_text(json.dumps({**about, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
