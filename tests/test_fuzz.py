"""Nothing lost, whatever comes: broken folders, checkpoints and flags, and signals at random moments.

    python tests/test_fuzz.py --cases 300 --kills 30      (the long version; the test suite runs a few of each)

A case breaks a copy of a good folder or run, or makes up flags, and calls a stage's real command line: it must end
with exit code 0 or 2, without a traceback, and leave the data and the runs made before it as they were. The kill test
sends SIGTERM, SIGINT, SIGUSR1 and SIGKILL at random times to a tiny run.sh chain or to the stage that runs in it, gives
the same command again until it is done, and compares every weight, image and figure with an undisturbed chain.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import shapes  # noqa: E402

import common  # noqa: E402
import denoise  # noqa: E402
import pretrain  # noqa: E402
import probe  # noqa: E402

CPU = ["--device", "cpu", "--workers", "0", "--log_steps", "1", "--preset", "demo"]
words = str.split
STAGES = {
    "train": [*CPU, *words("--width 2 --batch_size 4 --patch 8 --epochs 1")],
    "apply": CPU,
    "pretrain": [*CPU, *words("--arch 8,1,1 --head_hidden 8 --head_bottleneck 4 --prototypes 16 --patch_size 8 "
                              "--global_size 16 --local_size 8 --batch_size 4 --curriculum denoised:1,noisy:1 "
                              "--anchor 1")],
    "probe": [*CPU, *words("--iterations 2 --img_size 16 --resize 16 --batch_size 4")]}


def call(main, argv):
    """(exit code, all output) of a stage's main in this process."""
    out = io.StringIO()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    argv_before, sys.argv = sys.argv, ["stage", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about damaged files
            common.run(main)
    except SystemExit as stopped:
        return stopped.code, out.getvalue()
    finally:
        sys.argv = argv_before
        for s, handler in handlers.items():
            signal.signal(s, handler)


MAINS = {"train": denoise.main, "apply": denoise.main, "pretrain": pretrain.main, "probe": probe.main,
         "check": probe.main, "report": probe.main}


def arguments(stage, base, data, out):
    """The flags of a stage on `data`, with what it needs of the runs in `base`."""
    if stage == "report":
        return ["report", base]
    flags = ["--data", data, "--out", out, *STAGES.get(stage, CPU)]
    flags = [stage, *flags] if stage in ("train", "apply", "check") else flags
    more = {"apply": ["--denoiser", base / "denoiser"], "pretrain": ["--denoised", base / "denoised"],
            "probe": ["--run", base / "pretrain/nct-seed0"], "check": ["--run", "-"]}
    return [*flags, *more.get(stage, [])]


# ======================================================================================================
# a good folder and good runs, and ways to break them
# ======================================================================================================


def picture(rng, height=16, width=20, channels=3, dtype=np.uint8):
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze().astype(dtype)


def good(root):
    """A data folder and one run of each stage on it, in root/data and root/runs."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 3)):
        for k in ("cat", "dog"):
            (root / "data" / split / k).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(picture(rng)).save(root / "data" / split / k / f"{i}{('.png', '.jpg')[i % 2]}")
    for stage, out in (("train", "denoiser"), ("apply", "denoised"), ("pretrain", "pretrain/nct-seed0"),
                       ("probe", "probe/nct-seed0.json"), ("report", "")):
        code, text = call(MAINS[stage], arguments(stage, root / "runs", root / "data", root / "runs" / out))
        assert code == 0, text
    return root


def bomb(path):
    """A PNG that says it has 10 000 million pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def flip(path, rng, n=20):
    """Change n bytes of a file."""
    data = bytearray(path.read_bytes())
    for i in rng.integers(0, len(data), n) if data else []:
        data[i] = rng.integers(256)
    path.write_bytes(data)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("code was run",)


def some_file(data, rng):
    files = sorted(p for p in data.rglob("*") if p.is_file() and not p.is_symlink())
    return files[rng.integers(len(files))] if files else data / "new.png"


def new(data, rng, name):
    folders = sorted(p for p in data.rglob("*") if p.is_dir() and not p.is_symlink()) or [data]
    return folders[rng.integers(len(folders))] / name


def save(path, x, **kw):
    np.save(path, x, allow_pickle=True) if path.suffix == ".npy" else Image.fromarray(x).save(path, **kw)


def animated(path, rng):
    frames = [Image.fromarray(picture(rng)) for _ in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def oriented(path, rng):
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(1, 10))
    Image.fromarray(picture(rng)).save(path, exif=exif)


def in_bytes(folder, name):
    """A name that is no UTF-8, as old archives hold them."""
    return os.fsdecode(os.fsencode(folder) + b"/\xff" + name)


FOLDER = {  # name -> break(data folder, rng)
    "zero": lambda d, r: some_file(d, r).write_bytes(b""),
    "text": lambda d, r: some_file(d, r).write_text("no picture"),
    "truncated": lambda d, r: (p := some_file(d, r)).write_bytes(p.read_bytes()[:int(r.integers(1, 400))]),
    "flipped": lambda d, r: flip(some_file(d, r), r),
    "cmyk": lambda d, r: Image.fromarray(picture(r)).convert("CMYK").save(new(d, r, "cmyk.jpg")),
    "palette": lambda d, r: Image.fromarray(picture(r)).convert("P").save(new(d, r, "palette.gif")),
    "alpha": lambda d, r: save(new(d, r, "alpha.png"), picture(r, channels=4)),
    "animated": lambda d, r: animated(new(d, r, "animated.gif"), r),
    "1 x 1": lambda d, r: Image.new("RGB", (1, 1), "red").save(new(d, r, "one.png")),
    "wide": lambda d, r: save(new(d, r, "wide.png"), picture(r, 3, 5000)),
    "rotated": lambda d, r: oriented(new(d, r, f"rotated{('.png', '.jpg')[r.integers(2)]}"), r),
    "grey": lambda d, r: save(new(d, r, "grey.png"), picture(r, channels=1)),
    "16 bit": lambda d, r: save(new(d, r, "deep.png"), picture(r, channels=1, dtype=np.uint16) * 257),
    "nan": lambda d, r: save(new(d, r, "nan.npy"), np.full((9, 9, 3), [0.5, np.nan, np.inf][r.integers(3)])),
    "range": lambda d, r: save(new(d, r, "range.npy"), np.full((9, 9, 3), 1.5)),
    "channels": lambda d, r: save(new(d, r, "five.npy"), picture(r, channels=5)),
    "object": lambda d, r: save(new(d, r, "object.npy"), np.array([[Hostile()]])),
    "flat array": lambda d, r: save(new(d, r, "flat.npy"), np.zeros(7)),
    "archive": lambda d, r: new(d, r, "archive.npy").write_bytes(pickle.dumps(Hostile())),
    "unicode": lambda d, r: save(new(d, r, "ä 字 \u202e🐱.png"), picture(r)),
    "bytes": lambda d, r: save(Path(in_bytes(new(d, r, "x").parent, b".png")), picture(r)),
    "loop": lambda d, r: os.symlink(d, new(d, r, "loop")),
    "dangling": lambda d, r: os.symlink("nothing", new(d, r, "dangling.png")),
    "directory": lambda d, r: new(d, r, "folder.png").mkdir(),
    "bomb": lambda d, r: bomb(new(d, r, "bomb.png")),
    "same name": lambda d, r: save(some_file(d, r).with_suffix(".bmp"), picture(r)),
    "unknown class": lambda d, r: (d / "val/cat").rename(d / "val/bird"),
    "one image": lambda d, r: [p.unlink() for p in sorted((d / "train/cat").iterdir())[1:]],
    "empty class": lambda d, r: [p.unlink() for p in (d / "train/dog").iterdir()],
    "empty val": lambda d, r: (shutil.rmtree(d / "val"), (d / "val").mkdir()),
    "empty train": lambda d, r: (shutil.rmtree(d / "train"), (d / "train").mkdir()),
    "no val": lambda d, r: shutil.rmtree(d / "val"),
    "no train": lambda d, r: shutil.rmtree(d / "train"),
    "no data": lambda d, r: shutil.rmtree(d),
    "lost": lambda d, r: some_file(d, r).unlink()}


def resave(path, change):
    state = torch.load(path, weights_only=False)
    torch.save(change(state), path)


def without(state, rng):
    return {k: v for k, v in state.items() if k != sorted(state)[rng.integers(len(state))]}


CHECKPOINT = {  # name -> break(a file of a run, rng); checkpoints alone for the last ones
    "zero": lambda p, r: p.write_bytes(b""),
    "text": lambda p, r: p.write_text("{} no state"),
    "truncated": lambda p, r: p.write_bytes(p.read_bytes()[:int(r.integers(1, max(2, p.stat().st_size)))]),
    "flipped": lambda p, r: flip(p, r),
    "garbage": lambda p, r: p.write_bytes(r.bytes(3000)),
    "list": lambda p, r: p.write_text("[1, 2]") if p.suffix != ".pth" else torch.save([1, 2], p),
    "empty": lambda p, r: p.write_text("{}") if p.suffix != ".pth" else torch.save({}, p),
    "gone": lambda p, r: p.unlink(),
    "hostile": lambda p, r: torch.save({"model": Hostile(), "epoch": 1}, p),
    "pickle": lambda p, r: p.write_bytes(pickle.dumps(Hostile())),
    "lacking": lambda p, r: resave(p, lambda s: without(s, r)),
    "nan": lambda p, r: resave(p, lambda s: {k: v * float("nan") if torch.is_tensor(v) else v for k, v in s.items()})}

FLAGS = {  # flag -> values, good and bad
    "--lr": ["0", "-1", "nan", "1e30", "1e-9", "x"], "--epochs": ["0", "1", "2", "-3", "1.5"],
    "--batch_size": ["0", "1", "3", "1000", "-4"], "--seed": ["1", "-1", "99999999999999999999"],
    "--noise": ["gauss100", "gauss", "gauss-1", "gauss50-20", "shot3", "impulse2", "", "gauss1e3", "none"],
    "--noise_seed": ["7", "-7"], "--device": ["cpu", "cuda", "cuda:9", "tpu", ""],
    "--amp": ["bf16", "fp16", "off", "x"], "--workers": ["0", "1", "-1"], "--cache_gb": ["0", "nan", "1"],
    "--log_steps": ["0", "3"], "--save_minutes": ["0", "-1", "inf"], "--preset": ["tiny", "huge"],
    "--data": ["nowhere", "/dev/null", ""], "--out": ["/dev/null/x", "/proc/none/x"], "--nonsense": ["1"],
    "--tile": ["31", "0", "32"], "--patch": ["1", "0", "999"], "--width": ["1", "0"], "--init_scale": ["0", "1"],
    "--ramp": ["0", "-1"], "--denoiser": ["nowhere", "/dev/null"], "--denoised": ["nowhere", "/dev/null"],
    "--run": ["nowhere"], "--views": ["1", "-1"], "--iterations": ["0", "1"], "--img_size": ["8", "12", "0", "64"],
    "--resize": ["4", "32"], "--arch": ["8,1,1", "8,1,3", "vit_huge", "0,0,0", "8,1"],
    "--curriculum": ["noisy:0", "noisy:1", "clean:1", "noisy:2/1", "foggy:1", "", "denoised:1,denoised:1"],
    "--arm": ["nct", "random", "none"], "--anchor": ["0", "-1", "2", "nan"], "--anchor_head": ["live", "dead"],
    "--anchor_from": ["nowhere"], "--init": ["nowhere"], "--init_backbone": ["nowhere", "/dev/null"],
    "--fork": ["nowhere"], "--patch_size": ["4", "0", "7"], "--registers": ["2", "-1"], "--layer_scale": ["0", "1"],
    "--drop_path": ["0.5", "1", "2"], "--prototypes": ["1", "0", "9999", "99999999999"], "--head_hidden": ["0", "1"],
    "--head_bottleneck": ["1"], "--global_size": ["8", "20", "0"], "--local_size": ["8", "9"],
    "--local_crops": ["0", "1", "-1"], "--global_scale": ["1,0.3", "0.5", "0.3,1", "0,1", "x,1", "1,1"],
    "--local_scale": ["0.05,0.32", "2,3"], "--warmup_epochs": ["", "0", "1,2", "-1", "inf", "900"],
    "--weight_decay": ["0.1", "0,0", "-1,2"], "--layer_decay": ["0", "2"], "--clip": ["0", "0.1"],
    "--freeze_last_epochs": ["0", "9"], "--momentum": ["1.5", "0", "1"], "--teacher_temp": ["0", "0.001", "5"],
    "--teacher_temp_warmup_epochs": ["0", "3,1", "nan"], "--centering": ["sinkhorn", "none"],
    "--ibot_weight": ["0", "-1"], "--koleo_weight": ["0", "5"], "--no-restart": [None]}

DENOISER = [f"denoiser/{name}" for name in ("checkpoint.pth", "checkpoint.pth.previous", "quality.json", "log.jsonl")]
RUN = [f"pretrain/nct-seed0/{name}" for name in (
    "checkpoint.pth", "checkpoint.pth.previous", "log.jsonl", "backbone.pth", "config.json", "summary.json")]
FILES = {"train": DENOISER, "apply": [DENOISER[0], "denoised/made_by.json", "denoised/train/cat/0.png"],
         "pretrain": [*RUN, "denoised/val/dog/1.png"], "probe": RUN[3:],
         "report": [*RUN[2:], "probe/nct-seed0.json", "denoiser/quality.json"]}
OUTS = {"train": "denoiser", "apply": "denoised", "pretrain": "pretrain/nct-seed0", "probe": "probe/nct-seed0.json"}


@functools.cache
def own_flags(stage):
    """FLAGS that a stage has, and a few more."""
    text = call(MAINS[stage], [*([stage] if MAINS[stage] is denoise.main else []), "--help"])[1]
    return [f for f in FLAGS if f"{f} " in text or f"{f}]" in text] + ["--nonsense"]


def contents(*folders):
    return {p: (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).digest())
            for folder in folders for p in folder.rglob("*") if p.is_file()}


def case(number, base, scratch):
    """Make up and run case `number`; gives what was done and its exit code. base: what good() made."""
    rng = np.random.default_rng(number)
    kind = ("folder", "checkpoint", "flags")[number % 3]
    stages = {"folder": ["check", *STAGES], "checkpoint": [*FILES], "flags": [*STAGES]}[kind]
    stage = stages[rng.integers(len(stages))]
    data, runs, out, done = base / "data", base / "runs", scratch / "out", []
    if kind == "folder":  # one to three things are wrong with the images, or with the denoised ones
        denoised = stage == "pretrain" and rng.random() < 0.3
        shutil.copytree(runs / "denoised" if denoised else data, copy := scratch / "data", symlinks=True)
        for name in rng.choice(sorted(FOLDER), rng.integers(1, 4), replace=False):
            with contextlib.suppress(FileNotFoundError, FileExistsError, NotADirectoryError):  # one excludes another
                FOLDER[name](copy, rng)
                done.append(str(name))
        argv = arguments(stage, runs, data if denoised else copy, out)
        argv += ["--denoised", copy] * denoised
    elif kind == "checkpoint":  # a run is damaged and the same command given again, or a stage that reads it
        shutil.copytree(runs, copy := scratch / "runs")
        if rng.random() < 0.5:  # not quite done
            for unfinished in ("denoiser/quality.json", "pretrain/nct-seed0/backbone.pth"):
                (copy / unfinished).unlink() if stage in ("train", "pretrain") else None
        path = copy / FILES[stage][rng.integers(len(FILES[stage]))]
        breaks = sorted(CHECKPOINT)[:None if path.suffix == ".pth" else 0] or sorted(
            set(CHECKPOINT) - {"hostile", "pickle", "lacking", "nan"})
        name = breaks[rng.integers(len(breaks))]
        with contextlib.suppress(FileNotFoundError):
            CHECKPOINT[name](path, rng)
        done = [str(path.relative_to(copy)), name]
        argv = arguments(stage, copy, data, copy / OUTS.get(stage, "none"))
        argv += ["--denoised", runs / "denoised"] if stage == "pretrain" and path.suffix != ".png" else []
    else:  # random flags, on a new folder or on that of a run made with others
        out = out if rng.random() < 0.5 else runs / OUTS[stage]
        argv = arguments(stage, runs, data, out)
        for flag in rng.choice(own_flags(stage), rng.integers(1, 4), replace=False):
            value = FLAGS[flag][rng.integers(len(FLAGS[flag]))]
            argv += [str(flag), *([value] if value is not None else [])]
            done.append(f"{flag} {value}")
        if out != scratch / "out" and stage == "probe":  # writes its one file anew
            argv += ["--out", scratch / "out"]
    before = contents(base)
    here = os.getcwd()
    os.chdir(scratch)
    try:
        code, text = call(MAINS[stage], argv)
    finally:
        os.chdir(here)
    what = f"case {number}: {stage}, {kind}: {', '.join(done)}"
    assert code in (0, 2), f"{what}: exit code {code}\n{text}"
    assert "Traceback" not in text, f"{what}\n{text}"
    errors = [line for line in text.splitlines() if "error: " in line]
    assert len(errors) == (code == 2), f"{what}\n{text}"
    assert contents(base) == before, f"{what}: changed {set(contents(base).items()) ^ set(before.items())}"
    assert not (scratch / "code was run").exists(), what
    return what, code, (errors or [""])[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return good(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("number", range(36))
def test_broken_input_ends_with_code_0_or_2_without_a_traceback_and_changes_no_earlier_file(base, tmp_path, number):
    case(number, base, tmp_path)


# ======================================================================================================
# signals at random moments
# ======================================================================================================

CHAIN = ["--noise", "gauss50", "--preset", "demo", "--arms", "noisy nct"]
TINY = str.split("--device cpu --workers 1 --log_steps 1 --epochs 4 --switch 2 --arch 16,2,2 --head_hidden 16 "
                 "--head_bottleneck 8 --prototypes 16 --patch_size 8 --global_size 32 --local_size 16 --batch_size 8")


def environment(folder):
    """python3 is this Python."""
    folder.mkdir(exist_ok=True)
    (folder / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python3").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def results(out):
    """Everything that a chain leaves and that must not depend on interruptions, as digests or numbers."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".pth" and path.name in ("checkpoint.pth", "backbone.pth"):
            state = torch.load(path, weights_only=True)
            parts = {k: v for k, v in state.items() if k not in ("position", "seconds", "config", "data")}
            found[name] = digest(parts)
        elif path.suffix == ".png" and "denoised" in path.parts:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "log.jsonl":
            clock = ("seconds", "images_s")
            found[name] = [{k: v for k, v in r.items() if k not in clock} for r in common.read_log(path)]
        elif path.parent.name == "probe":
            r = json.loads(path.read_text())
            found[name] = [r.get(k) for k in ("linear", "knn", "map", "clean_linear", "sweep")]
    return found


def digest(x):
    """One number for the bits of all tensors in nested dicts and lists."""
    if torch.is_tensor(x):
        return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(x, dict):
        return hashlib.sha256(repr([(str(k), digest(x[k])) for k in sorted(x, key=str)]).encode()).hexdigest()
    return repr([digest(v) for v in x]) if isinstance(x, (list, tuple)) else repr(x)


def children(pid):
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def disturbed(command, env, folder, rng, moment):
    """Run a command and send a random signal to it, or to what it runs, after `moment` seconds. Gives its exit code
    and, if the signal came in time, a description of what was hit."""
    with open(folder / "output", "w") as output, subprocess.Popen(
            command, env=env, cwd=folder, stdout=output, stderr=output) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
            return process.returncode, None
        name = rng.choice(["SIGTERM", "SIGINT", "SIGUSR1", "SIGKILL"])
        below = children(process.pid)
        target = rng.choice([process.pid, *below[:1]])
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, getattr(signal, name))
        process.wait(900)  # a signal to a stage that is just ending, or not yet listening, lets the chain go on
        stages = [line for line in (folder / "output").read_text().splitlines() if line.startswith("== ")]
        where = "the stage" if target != process.pid else "the command"
        return process.returncode, f"{name} to {where} after {moment:.1f} s, in: {(stages or ['== start'])[-1][:110]}"


def kill_chain(root, kills, seed=0, say=print):
    """`kills` signals to chains of run.sh, each compared with an undisturbed one when it is done."""
    rng, env = random.Random(seed), environment(root / "bin")
    shapes.write(root / "data", 40, 20, size=32)

    def command(out):
        return ["bash", str(ROOT / "run.sh"), "--data", str(root / "data"), *CHAIN, "--out", str(out), "--", *TINY]

    begun = time.time()
    subprocess.run(command(root / "whole"), env=env, cwd=root, check=True, capture_output=True)
    length, expected = time.time() - begun, results(root / "whole")
    done, chain, codes = 0, 0, {}
    while done < kills:
        out = root / f"chain{chain}"
        while True:
            moment, begun = rng.uniform(0, length) if done < kills else 1e6, time.time()
            code, hit = disturbed(command(out), env, root, rng, moment)
            if not hit:  # a busy machine may have become a faster one
                length = min(length, time.time() - begun)
            text = (root / "output").read_text()
            assert "Traceback" not in text.replace("KeyboardInterrupt", ""), text
            if hit:
                done += 1
                codes[code] = codes.get(code, 0) + 1
                say(f"{done}: {hit}: exit code {code}", flush=True)
                assert code in (0, 75, 137, -9, 143, 130, 138), text
            if code == 0:
                break
        got = results(out)
        assert got == expected, [k for k in got.keys() | expected.keys() if got.get(k) != expected.get(k)]
        chain += 1
        say(f"chain {chain}: {len(expected)} weights, logs, images and figures are those of the undisturbed chain")
    return chain, codes, len(expected)


def test_pretraining_killed_again_and_again_ends_with_the_same_bits(base, tmp_path):
    """SIGKILL at random steps, the same command again: weights, optimiser, centres, log are the undisturbed run's."""
    rng, env = random.Random(0), {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = [*STAGES["pretrain"], "--curriculum", "denoised:6,noisy:6", "--save_minutes", "0.001"]
    flags = ["--data", base / "data", "--denoised", base / "runs/denoised", *flags]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    code, text = call(pretrain.main, [*flags, "--out", tmp_path / "whole"])
    torch.set_num_threads(threads)
    assert code == 0, text
    command = [sys.executable, ROOT / "pretrain.py", *flags, "--out", tmp_path / "killed"]
    log, steps = tmp_path / "killed/log.jsonl", sorted(rng.sample(range(4, 30), 2))
    for step in steps:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([*map(str, command)], env=env, **quiet) as process:
            while process.poll() is None and not (log.exists() and f'"step": {step},' in log.read_text()):
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -9, "came too late"
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job, and then by all it starts
    torch.set_num_threads(1)
    failed, codes = [], {0: 0, 2: 0}
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        if args.cases:
            base = good(root / "good")
        for number in range(args.first, args.first + args.cases):
            scratch = root / f"case{number}"
            scratch.mkdir()
            try:
                what, code, error = case(number, base, scratch)
                codes[code] += 1
                print(what, "->", code, error, flush=True)
            except Exception as error:
                failed.append(number)
                print(f"FAILED {number}: {error}", flush=True)
            shutil.rmtree(scratch)
        print(f"{args.cases} cases: {codes[0]} ended with 0, {codes[2]} with 2, {len(failed)} failed {failed}")
        if args.kills:
            chains, codes, n = kill_chain(root, args.kills)
            print(f"{args.kills} signals survived, exit codes {codes}; {chains} chains with the same bits ({n} items)")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
