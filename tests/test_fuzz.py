"""Nothing lost, whatever comes: broken folders, checkpoints and flags, signals at random moments.

    python tests/test_fuzz.py --cases 300 --kills 30      (the test suite runs a few of each)

A case breaks a copy of a good folder or run, or makes up flags, and calls a stage's command line:
it must end with exit code 0 or 2, without a traceback, and leave the data and the runs made before
it as they were. The kill test sends SIGTERM, SIGINT, SIGUSR1 and SIGKILL at random times to a tiny
run.sh chain or to the stage that runs in it, gives the same command again until it is done, and
compares every weight, image, log and figure with an undisturbed chain.
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
import shlex
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

# ==== the stages, called in this process ==========================================================
CPU = "--device cpu --workers 0 --preset demo"
TRAINING = f"{CPU} --log_steps 1 --batch_size 4"
NETWORK = (f"{TRAINING} --arch 8,1,1 --head_hidden 8 --head_bottleneck 4 --prototypes 16 "
           "--patch_size 8 --global_size 16 --local_size 8")
FLAGS_OF = {  # stage -> its flags; BASE is the folder of the runs that it needs
    "check": "--preset demo",
    "train": f"{TRAINING} --width 2 --patch 8 --epochs 1",
    "apply": f"{CPU} --denoiser BASE/denoiser",
    "first": f"{NETWORK} --source denoised --denoised BASE/denoised --epochs 2 --stop 1",
    "pretrain": f"{NETWORK} --source noisy --denoised BASE/denoised --epochs 2 --anchor 1 "
                "--init BASE/pretrain/denoised-seed0/epoch1.pth",
    "probe": f"{CPU} --iterations 2 --img_size 16 --resize 16 --batch_size 4 "
             "--run BASE/pretrain/nct-seed0",
}
SCRIPTS = {"check": probe, "train": denoise, "apply": denoise, "first": pretrain,
           "pretrain": pretrain, "probe": probe, "report": probe}
COMMANDS = ("check", "train", "apply", "report")  # the first word of a command line
OUTS = {"train": "denoiser", "apply": "denoised", "first": "pretrain/denoised-seed0",
        "pretrain": "pretrain/nct-seed0", "probe": "probe/nct-seed0.json"}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def arguments(stage, base, data, out, *more):
    """The command line of a stage on `data`, with what it needs of the runs in `base`."""
    if stage == "report":
        return ["report", str(base)]
    flags = [flag.replace("BASE", str(base)) for flag in FLAGS_OF[stage].split()]
    if stage != "check":
        flags += ["--out", out]
    command = [stage] if stage in COMMANDS else []
    return [*command, "--data", str(data), *map(str, flags), *map(str, more)]


def call(stage, argv):
    """(exit code, all output) of a stage's command line in this process."""
    out = io.StringIO()
    handlers = {s: signal.getsignal(s) for s in SIGNALS}
    argv_before, sys.argv = sys.argv, ["stage", *map(str, argv)]
    try:
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(out),
              warnings.catch_warnings()):
            warnings.simplefilter("ignore")  # Pillow's about damaged files
            common.run(SCRIPTS[stage].main)
    except SystemExit as stopped:
        return stopped.code, out.getvalue()
    finally:
        sys.argv = argv_before
        for s, handler in handlers.items():
            signal.signal(s, handler)


def run_stage(stage, base, data, out, *more):
    """(exit code, all output) of a stage with its usual flags and some more."""
    return call(stage, arguments(stage, base, data, out, *more))


def good(root):
    """A data folder and one run of each stage on it, in root/data and root/runs."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 3)):
        for k in ("cat", "dog"):
            (root / "data" / split / k).mkdir(parents=True)
            for i in range(n):
                suffix = ".jpg" if i % 2 else ".png"
                write_picture(root / "data" / split / k / f"{i}{suffix}", rng)
    for stage, out in [*OUTS.items(), ("report", "")]:
        code, text = run_stage(stage, root / "runs", root / "data", root / "runs" / out)
        assert code == 0, text
    return root


def contents(*folders):
    """{file: (time of its change, digest)}."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).digest()
                found[path] = path.stat().st_mtime_ns, digest
    return found


def digest(x):
    """One text for the bits of all tensors in nested dicts and lists."""
    if torch.is_tensor(x):
        return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(x, dict):
        return repr([(k, digest(x[k])) for k in sorted(x, key=str)])
    if isinstance(x, (list, tuple)):
        return repr([digest(v) for v in x])
    return repr(x)


def results(out):
    """All that stages leave below `out` and that must not depend on interruptions, by name."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".pth":
            state = torch.load(path, weights_only=True)
            for other in ("config", "data"):  # which hold paths
                state.pop(other, None)
            if "position" in state:  # the time is another one
                state["position"] = state["position"][:2]
            found[name] = hashlib.sha256(digest(state).encode()).hexdigest()
        elif path.suffix == ".png" and "denoised" in path.parts:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "quality.json":
            found[name] = path.read_text()
        elif path.name == "log.jsonl":
            found[name] = log_without_clock(path)
        elif path.suffix == ".npz":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.parent.name == "probe":
            figures = json.loads(path.read_text())
            kept = ("linear", "knn", "map", "iou", "clean_linear", "sweep")
            found[name] = [figures.get(k) for k in kept]
    return found


def log_without_clock(path):
    records = common.read_log(path)
    for record in records:
        del record["seconds"], record["images_s"]
    return records


# ==== ways to break a folder of images ============================================================
def picture(rng, height=16, width=20, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def write_picture(path, rng, mode=None, frames=1, turned=0, **shape):
    """A random picture; mode: Pillow's; turned: the tag of its orientation."""
    images = [Image.fromarray(picture(rng, **shape)) for _ in range(frames)]
    if mode:
        images = [image.convert(mode) for image in images]
    more = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    if turned:
        more["exif"] = Image.Exif()
        more["exif"][0x0112] = turned
    images[0].save(path, **more)


def bomb(path, rng=None):
    """A PNG that says it has 10 000 million pixels."""
    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


class Hostile:
    """Unpickled, it makes a folder in the working directory."""
    def __reduce__(self):
        return os.mkdir, ("code was run",)


PICTURES = {  # kind -> (name of a new file, what write_picture gets)
    "cmyk": ("cmyk.jpg", {"mode": "CMYK"}),
    "palette": ("palette.gif", {"mode": "P"}),
    "alpha": ("alpha.png", {"channels": 4}),
    "animated": ("animated.gif", {"frames": 3}),
    "1 x 1": ("one.bmp", {"height": 1, "width": 1}),
    "wide": ("wide.png", {"height": 3, "width": 5000}),
    "tall": ("tall.png", {"height": 5000, "width": 3}),
    "turned png": ("turned.png", {"turned": 6}),
    "turned jpg": ("turned.jpg", {"turned": 3}),
    "grey": ("grey.png", {"channels": 1}),
    "16 bit": ("deep.png", {"channels": 1, "mode": "I;16"}),
    "unicode": ("ä 字 \u202e🐱.png", {}),
    "bytes": ("\udcff.png", {}),  # a name that is no UTF-8, as old archives hold them
}
ARRAYS = {  # kind -> contents of a new .npy file
    "nan": np.full((9, 9, 3), np.nan),
    "infinite": np.full((9, 9, 3), np.inf),
    "range": np.full((9, 9, 3), 1.5),
    "channels": np.zeros((9, 9, 5), np.uint8),
    "object": np.array([[Hostile()]]),
    "flat array": np.zeros(7),
}
OTHERS = {  # kind -> (name of something new, what makes it of a path)
    "bomb": ("bomb.png", bomb),
    "archive": ("archive.npy", lambda path: path.write_bytes(pickle.dumps(Hostile()))),
    "loop": ("loop", lambda path: path.symlink_to(path.parent.resolve())),
    "dangling": ("dangling.png", lambda path: path.symlink_to("nothing")),
    "directory": ("folder.png", Path.mkdir),
}


def empty(path, rng):
    path.write_bytes(b"")


def text(path, rng):
    path.write_text("{} no picture and no state")


def truncate(path, rng):
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:rng.integers(1, max(2, size))])


def flip(path, rng, n=20):
    """Change n bytes of a file."""
    data = bytearray(path.read_bytes())
    for i in rng.integers(0, len(data), n) if data else []:
        data[i] = rng.integers(256)
    path.write_bytes(data)


def remove(path, rng):
    path.unlink()


def double(path, rng):
    write_picture(path.with_suffix(".bmp"), rng)


SPOILED = {"zero": empty, "text": text, "truncated": truncate, "flipped": flip, "lost": remove,
           "same name": double}  # kind -> what is done to a file that is there


def all_but(n, folder):
    for path in sorted(folder.iterdir())[n:]:
        path.unlink()


def hollow(folder):
    shutil.rmtree(folder)
    folder.mkdir()


WHOLE = {  # kind -> what is done to the whole data folder
    "unknown class": lambda data: (data / "val/cat").rename(data / "val/bird"),
    "one image": lambda data: all_but(1, data / "train/cat"),
    "empty class": lambda data: all_but(0, data / "train/dog"),
    "empty val": lambda data: hollow(data / "val"),
    "empty train": lambda data: hollow(data / "train"),
    "no val": lambda data: shutil.rmtree(data / "val"),
    "no train": lambda data: shutil.rmtree(data / "train"),
    "no data": shutil.rmtree,
}
KINDS = [*PICTURES, *ARRAYS, *OTHERS, *SPOILED, *WHOLE]


def break_folder(kind, data, rng, where=None):
    """One thing of KINDS goes wrong in a data folder; where: below this folder of it."""
    paths = sorted((where or data).rglob("*"))
    folders = [p for p in paths if p.is_dir() and not p.is_symlink()] or [where or data]
    files = [p for p in paths if p.is_file() and not p.is_symlink()] or [data / "none.png"]
    folder, file = folders[rng.integers(len(folders))], files[rng.integers(len(files))]
    if kind in PICTURES:
        name, how = PICTURES[kind]
        write_picture(folder / name, rng, **how)
    elif kind in ARRAYS:
        np.save(folder / f"{kind}.npy", ARRAYS[kind], allow_pickle=True)
    elif kind in OTHERS:
        name, make = OTHERS[kind]
        make(folder / name)
    elif kind in SPOILED:
        SPOILED[kind](file, rng)
    else:
        WHOLE[kind](data)


# ==== ways to break a file of a run ===============================================================
def garbage(path, rng):
    path.write_bytes(rng.bytes(3000))


def array_of_two(path, rng):
    if path.suffix == ".pth":
        torch.save([1, 2], path)
    else:
        path.write_text("[1, 2]")


def empty_dict(path, rng):
    if path.suffix == ".pth":
        torch.save({}, path)
    else:
        path.write_text("{}")


def hostile(path, rng):
    torch.save({"model": Hostile(), "position": (1, 0, 0.0)}, path)


def hostile_pickle(path, rng):
    path.write_bytes(pickle.dumps(Hostile()))


def lacking(path, rng):
    state = torch.load(path, weights_only=True)
    del state[sorted(state)[rng.integers(len(state))]]
    torch.save(state, path)


def with_nan(path, rng):
    state = torch.load(path, weights_only=True)
    for weights in [state, *state.values()]:
        for name, value in weights.items() if isinstance(weights, dict) else []:
            if torch.is_tensor(value):
                weights[name] = value * float("nan")
    torch.save(state, path)


DAMAGE = (empty, text, truncate, flip, garbage, array_of_two, empty_dict, remove)
DAMAGE_OF_CHECKPOINTS = (*DAMAGE, hostile, hostile_pickle, lacking, with_nan)
CHECKPOINTS = ("checkpoint.pth", "checkpoint.pth.previous", "log.jsonl", "config.json")
ENDED = ("backbone.pth", "summary.json")
OWN_FILES = {  # stage -> files in its own folder; damaged, and the same command given again
    "train": (*CHECKPOINTS, "quality.json"),
    "apply": ("made_by.json", "train/cat/0.png"),
    "first": (*CHECKPOINTS, *ENDED, "epoch1.pth"),
    "pretrain": (*CHECKPOINTS, *ENDED),
}
INPUTS = {  # stage -> files that it reads; damaged, and the stage called for a new folder
    "apply": ("denoiser/checkpoint.pth",),
    "first": ("denoised/made_by.json", "denoised/train/dog/1.png"),
    "pretrain": ("pretrain/denoised-seed0/epoch1.pth", "denoised/train/cat/0.png"),
    "probe": [f"pretrain/nct-seed0/{name}" for name in (*ENDED, "config.json")],
    "report": ("pretrain/nct-seed0/log.jsonl", "pretrain/nct-seed0/backbone.pth",
               "probe/nct-seed0.json", "denoiser/quality.json"),
}

# ==== made-up flags ===============================================================================
FLAGS = """
--lr 0 -1 nan 1e30 1e-9 x
--epochs 0 1 2 -3 1.5
--batch_size 0 1 3 1000 -4
--seed 1 -1 99999999999999999999
--noise gauss100 gauss gauss-1 gauss50-20 shot3 impulse2 '' gauss1e3 none camera30,5 camera30
--noise_seed 7 -7
--device cpu cuda cuda:9 tpu ''
--amp bf16 fp16 off x
--workers 0 1 -1
--cache_gb 0 nan 1
--log_steps 0 3
--save_minutes 0 -1 inf
--preset tiny huge
--data nowhere /dev/null ''
--out /dev/null/x /proc/none/x ''
--nonsense 1
--tile 31 0 32
--patch 1 0 999
--subset 3 -1 99999
--width 1 0
--init_scale 0 1
--ramp 0 -1
--denoiser nowhere /dev/null ''
--denoised nowhere /dev/null ''
--run nowhere ''
--weights nowhere /dev/null
--heads 2 -1
--mean 0.5,0.5,0.5 0.5 x
--std 1,1,1 0
--views 1 -1
--iterations 0 1
--img_size 8 12 0 64
--resize 4 32
--arch 8,1,1 8,1,3 vit_huge 0,0,0 8,1
--source noisy denoised clean foggy ''
--stop 0 1 3 -1
--anchor 0 -1 2 nan
--anchor_head live dead
--anchor_from nowhere
--init nowhere /dev/null ''
--init_backbone nowhere /dev/null
--patch_size 4 0 7
--patch_embed_lr 0 1
--registers 2 -1
--layer_scale 0 1
--drop_path 0.5 1 2
--prototypes 1 0 9999 99999999999
--head_hidden 0 1
--head_bottleneck 1
--global_size 8 20 0
--local_size 8 9
--local_crops 0 1 -1
--global_scale 1,0.3 0.5 0.3,1 0,1 x,1 1,1
--local_scale 0.05,0.32 2,3
--warmup_epochs '' 0 1,2 -1 inf 900
--weight_decay 0.1 0,0 -1,2
--layer_decay 0 2
--clip 0 0.1
--freeze_last_epochs 0 9
--momentum 1.5 0 1
--teacher_temp 0 0.001 5
--teacher_temp_warmup_epochs 0 3,1 nan
--centering sinkhorn none
--ibot_weight 0 -1
--koleo_weight 0 5
--no-compile
"""


@functools.cache
def own_flags(stage):
    """[flag, values] of FLAGS that a stage has, and two that none has."""
    command = [stage] if stage in COMMANDS else []
    known = call(stage, [*command, "--help"])[1]
    rows = [shlex.split(line) for line in FLAGS.strip().splitlines()]
    return [row for row in rows if f"  {row[0]} " in known or row[0].startswith("--no")]


# ==== cases =======================================================================================
def choose(rng, options):
    options = list(options)
    return options[rng.integers(len(options))]


def folder_case(rng, base, scratch):
    """One to three things are wrong with the images, or with the denoised ones."""
    stage = choose(rng, ("check", "train", "apply", "first", "pretrain", "probe"))
    images = stage in ("check", "train", "apply", "probe") or rng.random() < 0.5
    source = base / "data" if images else base / "runs/denoised"
    copy = scratch / source.name
    shutil.copytree(source, copy, symlinks=True)
    done = []
    for kind in rng.choice(KINDS, rng.integers(1, 4), replace=False):
        with contextlib.suppress(OSError):  # one excludes another
            break_folder(kind, copy, rng)
            done.append(str(kind))
    if images:
        return stage, arguments(stage, base / "runs", copy, scratch / "out"), done
    more = "--denoised", copy
    return stage, arguments(stage, base / "runs", base / "data", scratch / "out", *more), done


def run_case(rng, base, scratch):
    """A file of a run is damaged and the same command given again, or the stage that reads it."""
    copy = scratch / "runs"
    shutil.copytree(base / "runs", copy)
    if rng.random() < 0.6:
        stage = choose(rng, OWN_FILES)
        out, inputs = copy / OUTS[stage], base / "runs"
        path = out / choose(rng, OWN_FILES[stage])
        if rng.random() < 0.5 and stage != "apply":  # as if it had ended before it was done
            for name in ("quality.json", *ENDED):
                (out / name).unlink(missing_ok=True)
    else:
        stage = choose(rng, INPUTS)
        out, inputs = scratch / "out", copy
        path = copy / choose(rng, INPUTS[stage])
    damage = choose(rng, DAMAGE_OF_CHECKPOINTS if path.suffix == ".pth" else DAMAGE)
    with contextlib.suppress(FileNotFoundError):
        damage(path, rng)
    done = [str(path.relative_to(copy)), damage.__name__]
    return stage, arguments(stage, inputs, base / "data", out), done


def flags_case(rng, base, scratch):
    """Random flags, for a new folder or for that of a run made with others."""
    stage = choose(rng, ("train", "apply", "first", "pretrain", "probe"))
    out = scratch / "out"
    if rng.random() < 0.5 and stage != "first":  # which would rightly go on
        out = base / "runs" / OUTS[stage]
    flags = []
    known = own_flags(stage)
    for k in rng.choice(len(known), rng.integers(1, 4), replace=False):
        name, *values = known[k]
        flags += [name, choose(rng, values)] if values else [name]
    return stage, arguments(stage, base / "runs", base / "data", out, *flags), flags


CASES = (folder_case, run_case, flags_case)


@contextlib.contextmanager
def working_in(folder):
    here = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def case(number, base, scratch):
    """Make up and run case `number`; gives what was done, its exit code and its error. base: what
    good() made."""
    rng = np.random.default_rng(number)
    make = CASES[number % len(CASES)]
    stage, argv, done = make(rng, base, scratch)
    what = f"case {number}: {make.__name__}, {stage}: {', '.join(done)}"
    before = contents(base)
    with working_in(scratch):
        code, text = call(stage, argv)
    errors = [line for line in text.splitlines() if "error: " in line]
    changed = {path for path, _ in before.items() ^ contents(base).items()}
    without_labels = stage == "check" and code == probe.NO_TARGETS
    assert code in (0, 2) or without_labels, f"{what}: exit code {code}\n{text}"
    assert "Traceback" not in text, f"{what}\n{text}"
    assert len(errors) == (1 if code == 2 else 0), f"{what}\n{text}"
    assert not changed, f"{what}: changed {changed}"
    assert not (scratch / "code was run").exists(), what
    return what, code, "".join(errors)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """data and runs of every stage, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield good(tmp_path_factory.mktemp("good"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("number", range(36))
def test_broken_input_ends_with_0_or_2_without_a_traceback_and_changes_no_earlier_file(
        base, tmp_path, number):
    case(number, base, tmp_path)


# ==== signals at random moments ===================================================================
CHAIN = str.split("--noise gauss50 --preset demo --out out -- --device cpu --workers 1 "
                  "--log_steps 1 --epochs 4 --arch 16,2,2 --head_hidden 16 --head_bottleneck 8 "
                  "--prototypes 16 --patch_size 8 --global_size 32 --local_size 16 --batch_size 8")
ARMS = ["--arms", "noisy denoised nct"]


def environment(folder):
    """One in which python3 is this Python, on one thread."""
    script = folder / "bin/python3"
    script.parent.mkdir(parents=True, exist_ok=True)
    if not script.exists():
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        script.chmod(0o755)
    path = f"{script.parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def disturbed(command, env, folder, rng, moment):
    """Run a command and send a random signal to it, or to what it runs, after `moment` seconds.
    Gives its exit code and, if the signal came in time, a description of what was hit."""
    output = folder / "output"
    with (open(output, "w") as file,
          subprocess.Popen(command, env=env, cwd=folder, stdout=file, stderr=file) as process):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
            return process.returncode, None
        name = rng.choice(["SIGTERM", "SIGINT", "SIGUSR1", "SIGKILL"])
        below = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        target = rng.choice([process.pid, *below[:1]])
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(target), getattr(signal, name))
        process.wait(900)  # a stage that ends just now, or does not yet listen, lets it go on
    stages = [line for line in output.read_text().splitlines() if line.startswith("== ")]
    stage = stages[-1] if stages else "== start"
    where = "the command" if target == process.pid else "the stage"
    return process.returncode, f"{name} to {where} after {moment:.1f} s, in: {stage[:110]}"


def kill_chain(root, kills, seed=0):
    """`kills` signals to chains of run.sh, each compared with an undisturbed one when it is done.
    Gives the number of chains, how often each exit code came, and the number of items compared."""
    rng, env = random.Random(seed), environment(root)
    shapes.write(root / "data", 40, 20, size=32)
    whole, out = root / "whole", root / "out"
    script = ["bash", str(ROOT / "run.sh"), "--data", "data", *ARMS]
    command = [*script, *CHAIN, "--switch", "2"]
    begun = time.time()
    subprocess.run(command, env=env, cwd=root, check=True, capture_output=True)
    length = time.time() - begun
    out.rename(whole)
    expected, done, chains, codes = results(whole), 0, 0, {}
    while done < kills:
        code = None
        while code != 0:
            moment = rng.uniform(0, length) if done < kills else 1e6
            begun = time.time()
            code, hit = disturbed(command, env, root, rng, moment)
            text = (root / "output").read_text()
            assert "Traceback" not in text.replace("KeyboardInterrupt", ""), text
            if hit:
                done += 1
                codes[code] = codes.get(code, 0) + 1
                print(f"{done}: {hit}: exit code {code}", flush=True)
                assert code in (0, 75, 137, -9, 143, 130, 138), text
            else:  # a busy machine may have become a faster one
                length = min(length, time.time() - begun)
        found = results(out)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
        shutil.rmtree(out)
        chains += 1
        print(f"chain {chains}: {len(expected)} weights, logs, images and figures are the same")
    return chains, codes, len(expected)


def test_pretraining_killed_again_and_again_ends_with_the_same_bits(base, tmp_path):
    """SIGKILL in the middle of two epochs of three steps, the same command again: weights,
    optimiser, centres and log are the undisturbed run's."""
    more = ["--epochs", "12", "--save_minutes", "0"]  # a checkpoint after every step
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, text = run_stage("pretrain", base / "runs", base / "data", whole, *more)
    assert code == 0, text
    argv = arguments("pretrain", base / "runs", base / "data", killed, *more)
    command, env = [sys.executable, str(ROOT / "pretrain.py"), *argv], environment(tmp_path)
    log = killed / "log.jsonl"
    for step in (8, 20):
        with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                if log.exists() and f'"step": {step},' in log.read_text():
                    break
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -9, "came too late"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = results(killed)
    assert found.keys() == {"checkpoint.pth", "backbone.pth", "log.jsonl"}
    assert found == results(whole)


# ==== the long version ============================================================================
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    # ignored in a background job, and then by all it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    failed = []
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        if args.cases:
            failed = run_cases(root, range(args.first, args.first + args.cases))
        if args.kills:
            chains, codes, items = kill_chain(root, args.kills)
            print(f"{args.kills} signals survived, exit codes {codes}; {chains} chains with the "
                  f"same bits ({items} items)")
    sys.exit(1 if failed else 0)


def run_cases(root, numbers):
    """Run these cases and say what came of each; gives the numbers of those that failed."""
    base, failed, codes = good(root / "good"), [], {0: 0, 2: 0}
    for number in numbers:
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
    print(f"{len(numbers)} cases: {codes[0]} ended with 0, {codes[2]} with 2, "
          f"{len(failed)} failed {failed}")
    return failed


if __name__ == "__main__":
    main()
