"""Nothing is lost: odd files and folders, damaged checkpoints, full disks, moved folders, signals,
failing processes. Broken input at random and kills at random moments are in test_fuzz.py."""

import json
import math
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from test_fuzz import (
    ARRAYS,
    KINDS,
    OTHERS,
    OUTS,
    PICTURES,
    ROOT,
    SCRIPTS,
    SPOILED,
    WHOLE,
    arguments,
    break_folder,
    contents,
    environment,
    good,
    picture,
    results,
    run_stage,
    write_picture,
)

import common
import pretrain
from common import UserError

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
TWO = str.split("-m torch.distributed.run --standalone --nproc_per_node 2 --")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """data and runs of every stage, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield good(tmp_path_factory.mktemp("good"))
    torch.set_num_threads(threads)


def process(argv, launch=(), folder=ROOT):
    """Run a Python command line in a process of its own."""
    command = [sys.executable, *launch, *argv]
    return subprocess.run([*map(str, command)], env=ENV, cwd=folder, capture_output=True,
                          text=True, timeout=120)


def script(stage, argv, launch=(), before=""):
    """A stage in a process of its own, or in several; `before` is code that runs first."""
    name = SCRIPTS[stage].__name__
    start = [ROOT / f"{name}.py"]
    if before:
        start = ["-c", f"import common, {name}\n{before}\ncommon.run({name}.main)"]
    return process([*start, *argv], launch)


def one_line(text):
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def accepted(done, *words):
    """The output of run_stage(), where it ended with 0 and says these words."""
    code, text = done
    assert code == 0, text
    assert all(word in text for word in words), text
    return text


def refused(done, *words):
    """The error line of run_stage(), where it ended with 2 and the line has these words."""
    code, text = done
    assert code == 2, text
    line = one_line(text)
    assert all(word in line for word in words), line
    return line


def images(folder, n=4, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        write_picture(folder / f"{i}{suffix}", np.random.default_rng(i))
    return folder


def train(data, out):
    return run_stage("train", out, data, out)


# ==== every kind of file and folder has a decided answer ==========================================
REFUSED = {  # kind -> what the line says; all others are used
    "zero": "empty file",
    "text": "cannot identify",
    "truncated": "not a readable image",
    "nan": "NaN or infinite",
    "infinite": "NaN or infinite",
    "range": "range.npy: is deeper than 8 bit",
    "16 bit": "deep.png: is deeper than 8 bit",
    "channels": "differ in their number of channels",
    "archive": "magic string",
    "object": "allow_pickle=False",
    "flat array": "is neither",
    "dangling": "link to nothing",
    "bomb": "decompression bomb",
    "unknown class": "bird: class unknown",
    "empty class": "dog: class unknown",
    "empty val": "no images found",
    "empty train": "no images found",
    "no val": "no images found",
    "no train": "has val/, but no train/",
    "no data": "no such folder",
}


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "flipped"])  # which may still be a JPEG
def test_every_kind_of_file_is_used_or_refused_by_name_before_training(base, tmp_path, kind):
    data = tmp_path / "data"
    shutil.copytree(base / "data", data)
    break_folder(kind, data, np.random.default_rng(0), data / "train/cat")
    before = contents(tmp_path)
    done = run_stage("check", base / "runs", data, "")
    assert contents(tmp_path) == before
    if kind in REFUSED:
        refused(done, REFUSED[kind], str(data))
        return
    accepted(done)
    folder = common.Folder(data)
    if kind in PICTURES:
        assert len(folder) == (15 if kind == "animated" else 13)  # of three frames
    for i in range(len(folder)):
        x = folder.read(i)
        assert x.dtype == torch.uint8 and len(x) == 3


def test_the_kinds_are_all_that_the_lists_hold():
    assert {*KINDS} >= {*REFUSED}
    assert len(KINDS) == len({*PICTURES} | {*ARRAYS} | {*OTHERS} | {*SPOILED} | {*WHOLE})


def grey(folder):
    for path in folder.rglob("*.*"):
        Image.open(path).convert("L").save(path)


def test_grey_val_serves_as_colour_in_every_stage(base, tmp_path):
    data, runs = tmp_path / "data", tmp_path / "runs"
    shutil.copytree(base / "data", data)
    grey(data / "val")
    accepted(run_stage("check", runs, data, ""))
    for stage, out in [*OUTS.items(), ("report", "")]:
        text = accepted(run_stage(stage, runs, data, runs / out))
        assert "no samples.png" not in text


def test_colour_val_of_grey_training_images_is_refused_before_training(base, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(base / "data", data)
    grey(data / "train")
    for stage in ("check", "train"):
        done = run_stage(stage, base / "runs", data, tmp_path / stage)
        refused(done, "it has 3, others or the training images have 1")
        assert not (tmp_path / stage).exists()


# ==== the check of a folder =======================================================================
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_check_decodes_no_pixel_of_whole_png_and_jpeg_files(tmp_path, monkeypatch, suffix):
    images(tmp_path, suffix=suffix)
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    assert common.Folder(tmp_path).shapes.tolist() == [[16, 20, 3]] * 4


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".npy", ".webp"])
def test_truncated_file_is_named_before_training_starts(tmp_path, suffix):
    path = images(tmp_path) / f"a{suffix}"
    x = picture(np.random.default_rng(0), 64, 64)
    if suffix == ".npy":
        np.save(path, x)
    else:
        Image.fromarray(x).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:2 * len(data) // 3])
    refused(train(tmp_path, tmp_path / "out"), f"a{suffix}: not a readable image")
    assert not (tmp_path / "out").exists()


def test_pipe_with_the_name_of_an_image_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(images(tmp_path / "data") / "5.png")
    with pytest.raises(UserError, match=r"5\.png: not a readable image \(not a file\)"):
        common.Folder(tmp_path / "data")


def test_of_a_large_folder_so_many_files_are_checked_spread_evenly(tmp_path, monkeypatch):
    images(tmp_path, 9)
    monkeypatch.setattr(common, "CHECKED", 5)
    opened, read = [], common.read_shape

    def watched(path):
        opened.append(path.name)
        return read(path)

    monkeypatch.setattr(common, "read_shape", watched)
    folder = common.Folder(tmp_path)
    assert sorted(opened) == ["0.png", "2.png", "4.png", "6.png", "8.png"]
    assert len(folder) == 9 and len(folder.shapes) == 5
    monkeypatch.setattr(common, "CHECKED", 9)
    opened.clear()
    assert len(common.Folder(tmp_path).shapes) == len(opened) == 9
    assert common.Folder(tmp_path).fingerprint() == folder.fingerprint()


@pytest.mark.parametrize("broken", ["4.png", "3.png"])
def test_broken_file_is_named_at_the_start_if_checked_else_when_it_is_read(
        tmp_path, monkeypatch, broken):
    """Here all are read at the start: for the measures of the noise and for the statistics."""
    monkeypatch.setattr(common, "CHECKED", 5)  # the even ones
    images(tmp_path / "data", 9)
    (tmp_path / "data" / broken).write_bytes(b"no image")
    for stage, out in (("train", "denoiser"), ("pretrain", "run")):
        argv = [] if stage == "train" else ["--denoised", "", "--anchor", "0", "--init", ""]
        done = run_stage(stage, tmp_path, tmp_path / "data", tmp_path / out, *argv)
        refused(done, f"{broken}: not a readable image", "move it out of the folder")
    assert not (tmp_path / "denoiser").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_worker_that_meets_a_broken_file_ends_the_run_with_its_one_line(
        base, tmp_path, monkeypatch, workers):
    """Of other channels, which only reading shows; the statistics do not see it."""
    images(tmp_path / "data", 9)
    np.save(tmp_path / "data/3.npy", np.zeros((9, 9, 5), np.uint8))
    (tmp_path / "data/3.png").unlink()
    monkeypatch.setattr(common, "CHECKED", 5)
    more = "--cache_gb", "0", "--workers", workers
    done = run_stage("train", tmp_path, tmp_path / "data", tmp_path / "out", *more)
    refused(done, "3.npy: files differ in their number of channels, it has 5")


def test_images_of_extreme_shapes_go_through_every_stage_together(base, tmp_path):
    data, rng = tmp_path / "data", np.random.default_rng(0)
    shutil.copytree(base / "data", data)
    write_picture(data / "train/cat/one.png", rng, height=1, width=1)
    write_picture(data / "train/cat/wide.png", rng, height=3, width=20_000)
    write_picture(data / "train/dog/tall.png", rng, height=20_000, width=3)
    for stage, out in OUTS.items():
        accepted(run_stage(stage, tmp_path, data, tmp_path / out))
    for name, shape in (("one", (1, 1)), ("wide", (3, 20_000))):
        with Image.open(tmp_path / f"denoised/train/cat/{name}.png") as made:
            assert made.size == shape[::-1]


# ==== checkpoints =================================================================================
def test_checkpoint_with_a_changed_byte_is_reported_and_the_one_before_used(tmp_path, capsys):
    """torch.load itself does not look at the checksums."""
    path, w = tmp_path / "checkpoint.pth", torch.arange(1000.0)
    for step in (1, 2):
        common.save_checkpoint(path, {"step": step, "w": w})
    data = bytearray(path.read_bytes())
    data[data.index(w.numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["step"] == 2
    assert common.load_checkpoint(path)["step"] == 1
    assert "wrong checksum" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    path = tmp_path / "checkpoint.pth"
    common.save_checkpoint(path, {"model": {"w": torch.ones(2)}})
    moments = {"state": {0: {"w": torch.tensor(math.inf)}}}
    for state in ({"model": {"w": torch.tensor([1, math.nan])}},
                  {"model": {}, "optimizer": moments}):
        with pytest.raises(UserError, match="w is not finite; the last good checkpoint is kept"):
            common.save_checkpoint(path, state)
    assert common.load_checkpoint(path)["model"]["w"].tolist() == [1, 1]


def test_checkpoint_of_another_stage_is_refused(base):
    before = contents(base)
    for stage, out in (("pretrain", "denoiser"), ("train", "pretrain/nct-seed0")):
        done = run_stage(stage, base / "runs", base / "data", base / "runs" / out)
        refused(done, "another stage's: it has no")
    assert contents(base) == before


def test_killed_before_the_renaming_loses_nothing_and_leftovers_go(tmp_path):
    path = tmp_path / "checkpoint.pth"
    common.save_checkpoint(path, {"step": 1})
    torch.save({"step": 2}, f"{path}.new")
    (tmp_path / ".checkpoint.pth.new.tmp").write_bytes(b"half of it")
    assert common.load_checkpoint(path)["step"] == 2
    common.save_checkpoint(path, {"step": 3})
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["checkpoint.pth", "checkpoint.pth.previous"]


@pytest.mark.parametrize("stage", ["train", "first", "pretrain"])
def test_complete_run_is_left_as_it_is_and_other_images_are_refused(base, tmp_path, stage):
    same, other = tmp_path / "same", tmp_path / "other"
    for copy in (same, other):
        shutil.copytree(base / "data", copy)
    path = next((other / "train").rglob("*.png"))
    path.write_bytes(path.read_bytes() + b"\0")
    before, out = contents(base / "runs"), base / "runs" / OUTS[stage]
    accepted(run_stage(stage, base / "runs", same, out), "complete, nothing to do")
    refused(run_stage(stage, base / "runs", other, out), "--data ", "other settings")
    refused(run_stage(stage, base / "runs", same, out, "--seed", "7"), "--seed 0 (now 7)")
    assert contents(base / "runs") == before


def test_complete_run_of_no_epochs_is_left_as_it_is(base, tmp_path):
    out = tmp_path / "run"
    more = "--epochs", "0", "--stop", "0"
    accepted(run_stage("first", base / "runs", base / "data", out, *more))
    before = contents(out)
    done = run_stage("first", base / "runs", base / "data", out, *more)
    accepted(done, "complete, nothing to do")
    assert contents(out) == before


def test_backbone_without_its_checkpoint_is_not_overwritten(base, tmp_path):
    (tmp_path / "backbone.pth").write_bytes(b"trained for days")
    done = run_stage("pretrain", base / "runs", base / "data", tmp_path)
    refused(done, "backbone.pth without its checkpoint")
    assert (tmp_path / "backbone.pth").read_bytes() == b"trained for days"


def test_probe_of_other_settings_is_not_overwritten(base, tmp_path):
    out = tmp_path / "p.json"
    shutil.copy(base / "runs/probe/nct-seed0.json", out)
    before = contents(tmp_path)
    done = run_stage("probe", base / "runs", base / "data", out, "--seed", "7")
    refused(done, "--seed 0 (now 7)")
    assert contents(tmp_path) == before


@pytest.fixture
def half(base, tmp_path):
    """A copy of the run of pretrain.py that was stopped after its first epoch of two."""
    out = tmp_path / "half"
    shutil.copytree(base / "runs/pretrain/nct-seed0", out)
    (out / "checkpoint.pth.previous").rename(out / "checkpoint.pth")
    for ended in ("backbone.pth", "summary.json"):
        (out / ended).unlink()
    assert common.load_checkpoint(out / "checkpoint.pth")["position"][0] == 1
    return out


def checkpoint(out):
    return results(out)["checkpoint.pth"]


def whole(base):
    return checkpoint(base / "runs/pretrain/nct-seed0")


def test_run_goes_on_where_its_images_were_moved_to_and_however_a_path_is_spelled(
        base, half, monkeypatch):
    shutil.copytree(base / "data", half / "moved")
    monkeypatch.chdir(base)
    more = "--denoised", "runs/../runs/denoised"
    accepted(run_stage("pretrain", base / "runs", half / "moved", half, *more))
    assert checkpoint(half) == whole(base)


def test_run_on_other_images_is_not_gone_on_with(base, half):
    other = half / "other"
    shutil.copytree(base / "data", other)
    (other / "train/cat/0.png").unlink()
    before = contents(half)
    done = run_stage("pretrain", base / "runs", other, half)
    refused(done, "--data 12 images", "(now 11 images")
    assert contents(half) == before


@pytest.mark.parametrize("stage", ["train", "pretrain"])
def test_run_of_an_fp16_gpu_goes_on_on_the_cpu(base, half, stage):
    """Such a checkpoint holds a scaler's state and an optimiser that was fused."""
    out, steps = half, 6
    if stage == "train":
        out, steps = half.parent / "denoiser", 3
        shutil.copytree(base / "runs/denoiser", out)
        (out / "quality.json").unlink()
    state = common.load_checkpoint(out / "checkpoint.pth")
    state["scaler"] = torch.amp.GradScaler("cpu", enabled=True).state_dict()
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = True
    if stage == "train":
        state["position"] = (0, 1, 0.0)
    common.save_checkpoint(out / "checkpoint.pth", state)
    accepted(run_stage(stage, base / "runs", base / "data", out, "--amp", "bf16"))
    log = common.read_log(out / "log.jsonl")
    assert [r["step"] for r in log] == list(range(1, steps + 1))


# ==== disks =======================================================================================
FULL = """import atexit, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
# what coverage writes at the end is not the stage's
atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))"""


def test_full_disk_ends_with_one_line_and_the_last_checkpoint_intact(base, half):
    before = checkpoint(half)
    argv = arguments("pretrain", base / "runs", base / "data", half)
    done = script("pretrain", argv, before=FULL)
    assert done.returncode == 2, done.stderr
    assert "checkpoint.pth.new: cannot be written" in one_line(done.stderr)
    assert checkpoint(half) == before
    assert not [p for p in half.iterdir() if p.suffix in (".tmp", ".new")]
    accepted(run_stage("pretrain", base / "runs", base / "data", half))
    assert checkpoint(half) == whole(base)


def test_disk_without_room_for_features_is_one_line_and_nothing_is_left(base, tmp_path):
    argv = arguments("probe", base / "runs", base / "data", tmp_path / "out/p.json")
    done = script("probe", argv, before=FULL.replace("20_000", "100"))
    assert done.returncode == 2, done.stderr
    assert "out: features cannot be written there ([Errno 27] File too large)" in one_line(done.stderr)
    assert not list((tmp_path / "out").iterdir())


def test_log_that_cannot_be_written_is_named(base, half, monkeypatch):
    log, update, before = half / "log.jsonl", pretrain.Run.update, checkpoint(half)

    def in_the_way(*args):
        update(*args)
        log.unlink()
        log.mkdir()

    monkeypatch.setattr(pretrain.Run, "update", in_the_way)
    done = run_stage("pretrain", base / "runs", base / "data", half)
    refused(done, "log.jsonl: cannot be written", "the last checkpoint is kept")
    log.rmdir()
    assert checkpoint(half) == before


def test_more_memory_than_there_is_is_one_line(base, tmp_path):
    more = "--prototypes", "99999999999999"
    refused(run_stage("first", base / "runs", base / "data", tmp_path, *more), "allocate")


@pytest.mark.parametrize("stage", ["train", "apply", "first", "pretrain", "probe"])
def test_folder_that_cannot_be_written_is_one_line(base, tmp_path, stage):
    (tmp_path / "file").write_text("in the way")
    done = run_stage(stage, base / "runs", base / "data", tmp_path / "file/out")
    refused(done, "cannot be written")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_vanish_while_training_are_one_line_and_the_checkpoint_is_kept(
        base, half, monkeypatch, workers):
    data, update, before = half / "data", pretrain.Run.update, checkpoint(half)
    shutil.copytree(base / "data", data)
    shutil.rmtree(half / "data/val")

    def vanish(*args):
        update(*args)
        shutil.rmtree(data, ignore_errors=True)

    monkeypatch.setattr(pretrain.Run, "update", vanish)
    more = "--cache_gb", "0", "--workers", workers, "--epochs", "2"
    done = run_stage("pretrain", base / "runs", data, half, *more)
    if workers == 0:  # a worker may have made all batches before
        refused(done, "is gone")
        assert checkpoint(half) == before
    elif done[0] == 2:
        refused(done, "is gone")
    else:
        accepted(done)


def test_half_image_is_made_again_and_foreign_images_are_never_taken_for_denoised_ones(
        base, tmp_path):
    out = tmp_path / "denoised"
    shutil.copytree(base / "runs/denoised", out)
    before = results(tmp_path)
    broken = sorted(out.rglob("*.png"))[:3]
    broken[0].write_bytes(b"")
    broken[1].write_bytes(broken[1].read_bytes()[:100])
    broken[2].unlink()
    accepted(run_stage("apply", base / "runs", base / "data", out), "9 of 12 already denoised")
    assert len(before) == 18 and results(tmp_path) == before
    (out / "made_by.json").unlink()
    refused(run_stage("apply", base / "runs", base / "data", out), "images that apply did not make")


def test_denoised_images_never_go_among_the_noisy_ones(base, tmp_path):
    data = images(tmp_path / "flat")
    for out in (data, data / "denoised"):
        refused(run_stage("apply", base / "runs", data, out), "is in the data folder")
    assert len(list(data.iterdir())) == 4


# ==== training ====================================================================================
@pytest.mark.parametrize("entropy, rank, words", [
    (0.001, 9, "one prototype"),
    (math.log(16), 9, "stays uniform"),
    (1.4, 1.1, "the same features"),
    (1.4, 9, ""),
])
def test_collapse_is_told_by_entropy_and_rank(entropy, rank, words):
    text = pretrain.collapse({"entropy": entropy, "rank": rank}, 16)
    assert words in text and bool(text) == bool(words)


@pytest.mark.parametrize("ill, warnings", [(150, 1), (90, 0)])
def test_collapsed_run_warns_once_and_only_after_long(base, tmp_path, monkeypatch, ill, warnings):
    steps, monitors = [], pretrain.monitors

    def watched(*args):
        steps.append(1)
        entropy = 0.0 if len(steps) <= ill else 1.4
        return monitors(*args) | {"entropy": entropy, "rank": 5.0}

    monkeypatch.setattr(pretrain, "monitors", watched)
    more = str.split("--epochs 16 --stop 0 --batch_size 1")
    text = accepted(run_stage("first", base / "runs", base / "data", tmp_path, *more))
    warning = "warning: since 100 steps the teacher gives all images one prototype"
    assert text.count(warning) == text.count("warning: since") == warnings


@pytest.mark.parametrize("prototypes, told", [(120, False), (121, True)])
def test_more_prototypes_than_useful_are_told_at_the_start(base, tmp_path, prototypes, told):
    more = "--prototypes", prototypes
    text = accepted(run_stage("first", base / "runs", base / "data", tmp_path, *more))
    assert (f"--prototypes {prototypes}: more than about 120" in text) == told


def test_rate_that_makes_features_infinite_stops_with_the_loss_and_the_step(base, tmp_path):
    more = "--lr", "1e30", "--warmup_epochs", "0"
    done = run_stage("first", base / "runs", base / "data", tmp_path, *more)
    refused(done, "is not finite at step", "use a lower --lr")


# ==== signals =====================================================================================
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_outside_of_the_loops_ends_at_once_with_75(base, tmp_path, name):
    kill = f"os.kill(os.getpid(), signal.{name})"
    before = f"import os, signal\ncommon.Folder = lambda *a, **k: {kill}"
    argv = arguments("probe", base / "runs", base / "data", tmp_path / "p.json")
    done = script("probe", argv, before=before)
    assert done.returncode == 75 and done.stderr == "stopped; the same command goes on\n"


STOP_APPLY = """import os, signal
real, calls = denoise.denoise_list, []
def second(*args):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)
denoise.denoise_list, denoise.CHUNK = second, 4"""


def test_apply_stopped_by_a_signal_goes_on_to_the_same_images(base, tmp_path):
    out = tmp_path / "denoised"
    argv = arguments("apply", base / "runs", base / "data", out)
    done = script("apply", argv, before=STOP_APPLY)
    assert done.returncode == 75, done.stderr
    made = len(common.list_images(out))
    assert made < 9
    text = accepted(run_stage("apply", base / "runs", base / "data", out))
    assert f"train: {made} of 12" in text
    first = {k: v for k, v in results(base / "runs").items() if k.startswith("denoised/")}
    assert len(first) == 18 and results(tmp_path) == first


def test_signals_stop_the_chain_between_two_stages_too(base, tmp_path):
    """run.sh forgets no signal: one that comes while no stage runs, or before a stage listens,
    ends it with 75."""
    env = environment(tmp_path)
    python = tmp_path / "bin/python3"
    kill = 'case "$*" in *check*) kill -TERM $PPID;; esac'
    python.write_text(f'#!/bin/sh\n{kill}\nexec "{sys.executable}" "$@"\n')
    command = ["bash", ROOT / "run.sh", "--data", base / "data", "--preset", "demo",
               "--out", tmp_path / "out"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75 and not (tmp_path / "out").exists(), done.stderr


# ==== processes ===================================================================================
BLIND = """import os, sys, torch, common
class Blind:
    def is_alive(self): return True
torch.utils.data._utils.worker.ManagerWatchdog = Blind
folder = common.Folder(sys.argv[1])
batches = common.prefetch(folder.read, [(0,), (1,), (2,), (3,)], torch.device("cpu"), 1)
next(batches)
os._exit(0)"""


def test_worker_ends_with_its_process_even_if_torch_does_not_see_it_die(tmp_path):
    """Its output ends when the last process that holds it does."""
    done = process(["-c", BLIND, images(tmp_path)])
    assert done.returncode == 0, done.stderr


SMALL_CHUNKS = """import sys
sys.path.insert(0, {root!r})
import common, denoise
denoise.CHUNK = 4
common.run(denoise.main)
"""


def test_two_processes_denoise_as_one_to_the_bit(base, tmp_path):
    argv = arguments("apply", base / "runs", base / "data", tmp_path / "denoised")
    small = tmp_path / "small.py"
    small.write_text(SMALL_CHUNKS.format(root=str(ROOT)))
    done = process([small, *argv], TWO)
    assert done.returncode == 0, done.stderr
    made = results(tmp_path)
    first = {k: v for k, v in results(base / "runs").items() if k in made}
    assert len(first) == 18 and made == first


def test_run_of_two_processes_goes_on_with_one(base, tmp_path):
    argv = arguments("pretrain", base / "runs", base / "data", tmp_path)
    done = script("pretrain", argv, TWO)
    assert done.returncode == 0, done.stderr
    (tmp_path / "checkpoint.pth.previous").rename(tmp_path / "checkpoint.pth")
    (tmp_path / "summary.json").unlink()
    accepted(run_stage("pretrain", base / "runs", base / "data", tmp_path), "epoch 2/2")
    one, two = (common.read_log(out / "log.jsonl")
                for out in (base / "runs/pretrain/nct-seed0", tmp_path))
    assert [r["step"] for r in one] == [r["step"] for r in two] == list(range(1, 7))
    totals = [[r["total"] for r in log] for log in (two, one)]
    np.testing.assert_allclose(*totals, rtol=1e-3)


def test_two_processes_probe_as_one_to_the_bit(base, tmp_path):
    for split in ("train", "val"):
        for k in ("cat", "dog"):
            images(tmp_path / "data" / split / k, 70)  # three chunks of 64: two and one
    data, out = tmp_path / "data", tmp_path / "probe"
    argv = arguments("probe", base / "runs", data, out / "two.json", "--views", "1")
    done = script("probe", argv, TWO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linear") == 1
    accepted(run_stage("probe", base / "runs", data, out / "one.json", "--views", "1"))
    figures = results(tmp_path)
    assert figures["probe/two.json"] == figures["probe/one.json"]


FAILING = """import os, sys
sys.path.insert(0, {root!r})
import common, pretrain
update, steps = pretrain.Run.update, []
def fail(run, *args):
    steps.append(1)
    if len(steps) == 3 and common.world()[0] == 1:
        {what}
    update(run, *args)
pretrain.Run.update = fail
common.run(pretrain.main)
"""


@pytest.mark.parametrize("what, cause", [
    ("raise common.UserError('train/1.png: not an image')", "error: train/1.png: not an image"),
    ("raise IndexError('a bug')", "IndexError: a bug"),
    ("os._exit(9)", "exitcode  : 9"),
])
def test_process_that_fails_ends_the_job_soon_with_the_cause_on_top(base, tmp_path, what, cause):
    failing = tmp_path / "failing.py"
    failing.write_text(FAILING.format(root=str(ROOT), what=what))
    argv = arguments("pretrain", base / "runs", base / "data", tmp_path / "run")
    begun = time.time()
    done = process([failing, *argv], TWO)
    assert done.returncode == 1 and time.time() - begun < 60
    assert cause in done.stderr and done.stderr.count("Traceback") <= 2, done.stderr
    if "UserError" in what:
        starts = ("error:", "stopped:", "Traceback")
        ours = [line for line in done.stderr.splitlines() if line.startswith(starts)]
        assert ours[0] == cause
    assert (tmp_path / "run/config.json").exists()


def test_every_image_is_seen_once_in_an_epoch_whatever_the_number_of_processes(monkeypatch):
    order = torch.randperm(24).view(-1, 8)
    for size in (1, 2, 4, 8):
        seen = []
        for rank in range(size):
            monkeypatch.setattr(common, "world", lambda rank=rank, size=size: (rank, size))
            seen.append(order[:, common.share(8, 24)[1]])
        assert torch.equal(torch.cat(seen, 1), order)


# ==== probes and configs ==========================================================================
def test_probe_is_made_again_only_where_its_images_or_its_backbone_changed(base, tmp_path):
    for part in ("data", "runs"):
        shutil.copytree(base / part, tmp_path / part)
    out, run = tmp_path / "figures.json", tmp_path / "runs/pretrain/nct-seed0"

    def probed():
        before = contents(tmp_path)
        text = accepted(run_stage("probe", tmp_path / "runs", tmp_path / "data", out))
        changed = contents(tmp_path) != before
        assert ("complete, nothing to do" in text) == (not changed)
        return changed

    assert probed() and not probed()
    rng = np.random.default_rng(9)
    write_picture(tmp_path / "data/val/cat/0.png", rng, height=20, width=24)
    assert probed() and not probed()
    summary = common.read_json(run / "summary.json")
    common.write_json(run / "summary.json", {**summary, "seconds": 99.0})  # trained anew
    assert probed() and not probed()


def test_config_files_are_json_of_what_was_asked_for(base):
    config = json.loads((base / "runs/pretrain/nct-seed0/config.json").read_text())
    assert config["data"] == str(base / "data")
    assert config["files"].startswith("12 images of 3 channels, ")
    assert config["source"] == "noisy" and config["anchor"] == 1
