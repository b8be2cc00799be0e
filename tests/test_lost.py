"""Nothing is lost: the scan of a folder and its cache, full disks, moved folders, damaged files, signals, failing
processes. Broken input at random and kills at random moments are in test_fuzz.py."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from test_fuzz import FOLDER, MAINS, STAGES, arguments, bomb, call, contents, good, picture, results

import common
import pretrain
import probe
from common import UserError

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """data and runs of every stage, in this process on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield good(tmp_path_factory.mktemp("good"))
    torch.set_num_threads(threads)


def script(stage, *argv, launch=(), before="", **kw):
    """Run a stage's file in another process; `before` is code that runs first."""
    name = MAINS[stage].__module__
    start = ["-c", f"import common, {name}\n{before}\ncommon.run({name}.main)"] if before else [ROOT / f"{name}.py"]
    command = [sys.executable, *launch, *start, *argv]
    return subprocess.run([*map(str, command)], env=ENV, cwd=ROOT, capture_output=True, text=True, **kw)


def one_line(text):
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def images(folder, n=4, suffix=".png"):
    for i in range(n):
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(np.random.default_rng(i), 16, 20)).save(folder / f"{i}{suffix}")
    return folder


# ======================================================================================================
# every kind of file and folder has a decided answer
# ======================================================================================================
REFUSED = {  # kind -> what the line says; all others are used
    "zero": "empty file", "text": "cannot identify", "truncated": "not a readable image", "nan": "must be finite",
    "range": "must be finite and in", "channels": "differ in their number of channels", "archive": "magic string",
    "object": "allow_pickle=False", "flat array": "is neither", "dangling": "link to nothing",
    "bomb": "decompression bomb", "unknown class": "bird: class unknown", "empty class": "dog: class unknown",
    "empty val": "no images found", "empty train": "no images found", "no val": "no images found",
    "no train": "has val/, but no train/", "no data": "no such folder"}
WHOLE = [k for k in FOLDER if k.split()[0] in ("unknown", "one", "empty", "no")]  # what is wrong with the whole folder


@pytest.mark.parametrize("kind", [k for k in FOLDER if k != "flipped"])  # a JPEG may have other bytes and be one
def test_every_kind_of_file_is_used_or_refused_by_name_before_training(base, tmp_path, kind):
    shutil.copytree(base / "data", data := tmp_path / "data")
    FOLDER[kind](data if kind in WHOLE else data / "train/cat", np.random.default_rng(0))
    before = {*tmp_path.rglob("*")}
    code, text = call(probe.main, arguments("check", base / "runs", data, tmp_path / "out"))
    assert code == (2 if kind in REFUSED else 0), text
    if kind in REFUSED:
        assert REFUSED[kind] in one_line(text) and str(data) in text
    elif kind not in ("directory", "loop", "lost", "one image"):
        n = len(common.Folder(data))
        assert n == 13 and all(x.dtype == np.uint8 and x.shape[2] == 3 for x in map(common.Folder(data).read, range(n)))
    assert {*tmp_path.rglob("*")} == before


def grey(folder):
    for path in folder.rglob("*.*"):
        Image.open(path).convert("L").save(path)


def test_grey_val_serves_as_colour_in_every_stage_and_the_reverse_is_refused_before_training(base, tmp_path):
    shutil.copytree(base, root := tmp_path / "good")
    for part in ("denoiser", "denoised", "pretrain", "probe"):
        shutil.rmtree(root / "runs" / part)
    grey(root / "data/val")
    for stage, out in (("check", "-"), ("train", "denoiser"), ("apply", "denoised"), ("pretrain", "pretrain/nct-seed0"),
                       ("probe", "probe/nct-seed0.json"), ("report", "")):
        code, text = call(MAINS[stage], arguments(stage, root / "runs", root / "data", root / "runs" / out))
        assert code == 0 and "no samples.png" not in text, text
    shutil.copytree(base / "data", reverse := tmp_path / "reverse")
    grey(reverse / "train")
    for stage in ("check", "train"):
        code, text = call(MAINS[stage], arguments(stage, root / "runs", reverse, tmp_path / stage))
        assert code == 2 and "has 3, the training images 1" in one_line(text)
        assert not (tmp_path / stage).exists()


# ======================================================================================================
# the scan
# ======================================================================================================


def test_large_folder_is_read_once_and_again_only_where_it_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "LARGE", 3)
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    images(tmp_path / "data")
    seen, read = [], common.read_image
    monkeypatch.setattr(common, "read_image", lambda path, **kw: seen.append(path.name) or read(path, **kw))

    def scanned():
        seen.clear()
        return common.Folder(tmp_path / "data").sizes.tolist(), len(seen)

    assert scanned() == ([[16, 20]] * 4, 4)
    assert scanned() == ([[16, 20]] * 4, 0)
    Image.fromarray(picture(np.random.default_rng(0), 30, 40)).save(tmp_path / "data/2.png")
    assert scanned() == ([[16, 20], [16, 20], [30, 40], [16, 20]], 4)
    for kept in (tmp_path / "cache").iterdir():  # damaged: cut short, then a byte changed
        kept.write_bytes(kept.read_bytes()[:100])
    assert scanned()[1] == 4 and scanned()[1] == 0
    kept = max((tmp_path / "cache").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(kept.read_bytes())
    data[data.index(np.array([16, 20, 3]).tobytes())] ^= 1
    kept.write_bytes(data)
    assert scanned() == ([[16, 20], [16, 20], [30, 40], [16, 20]], 4)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [f"{i}.png" for i in range(4)]
    monkeypatch.setattr(common, "CACHE", Path("/dev/null/cache"))
    assert scanned()[1] == scanned()[1] == 4  # no room for it


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_scan_decodes_no_pixel_of_whole_png_and_jpeg_files(tmp_path, monkeypatch, suffix):
    images(tmp_path, suffix=suffix)
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    assert common.Folder(tmp_path).sizes.tolist() == [[16, 20]] * 4


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".npy", ".webp"])
def test_truncated_file_is_named_before_training_starts(tmp_path, suffix):
    images(tmp_path)
    np.save(tmp_path / "a.npy", picture(np.random.default_rng(0), 64, 64)) if suffix == ".npy" else Image.fromarray(
        picture(np.random.default_rng(0), 64, 64)).save(tmp_path / f"a{suffix}")
    data = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(data[:-len(data) // 3])
    code, text = call(MAINS["train"], arguments("train", tmp_path, tmp_path, tmp_path / "out"))
    assert code == 2 and f"a{suffix}: not a readable image" in one_line(text)
    assert not (tmp_path / "out").exists()


def test_bombs_and_bad_values_are_named_before_training_starts(tmp_path):
    for name, make, message in [("bomb.png", bomb, "decompression bomb"),
                                ("nan.npy", lambda p: np.save(p, np.full((4, 4, 3), np.nan)), "must be finite"),
                                ("gone.png", lambda p: os.symlink("nowhere", p), "is gone, or a link to nothing")]:
        make(images(tmp_path / name) / name)
        code, text = call(MAINS["train"], arguments("train", tmp_path, tmp_path / name, tmp_path / "out"))
        assert code == 2 and name in one_line(text) and message in text


def test_pipe_with_the_name_of_an_image_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(images(tmp_path / "data") / "5.png")
    with pytest.raises(UserError, match=r"5\.png: not a readable image \(not a file\)"):
        common.Folder(tmp_path / "data")


def test_extreme_shapes_are_used_but_for_two_that_would_be_padded_to_a_gigantic_one(base, tmp_path):
    shutil.copytree(base / "data", data := tmp_path / "data")
    rng = np.random.default_rng(0)
    Image.new("RGB", (1, 1)).save(data / "train/cat/one.png")
    Image.fromarray(picture(rng, 3, 20_000)).save(data / "train/cat/wide.png")
    argv = arguments("pretrain", tmp_path, data, tmp_path / "run")
    for stage, out in (("train", "denoiser"), ("apply", "denoised")):
        assert call(MAINS[stage], arguments(stage, tmp_path, data, tmp_path / out))[0] == 0
    assert call(pretrain.main, argv)[0] == 0
    Image.fromarray(picture(rng, 20_000, 3)).save(data / "train/cat/tall.png")
    code, text = call(MAINS["train"], arguments("train", tmp_path, data, tmp_path / "other"))
    assert code == 2 and "train/cat/tall.png and train/cat/wide.png: cannot be padded to" in one_line(text)


# ======================================================================================================
# checkpoints
# ======================================================================================================


def test_checkpoint_with_a_changed_byte_is_reported_and_the_one_before_used(tmp_path, capsys):
    """torch.load itself does not look at the checksums."""
    path = tmp_path / "checkpoint.pth"
    for step in (1, 2):
        common.save_checkpoint(path, {"step": step, "w": torch.arange(1000.0)})
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["step"] == 2
    assert common.load_checkpoint(path)["step"] == 1
    assert "wrong checksum" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    path = tmp_path / "checkpoint.pth"
    common.save_checkpoint(path, {"model": {"w": torch.ones(2)}})
    for state in ({"model": {"w": torch.tensor([1, math.nan])}},
                  {"model": {}, "optimizer": {"state": {0: {"w": torch.tensor(math.inf)}}}}):
        with pytest.raises(UserError, match=r"w is not finite; the last good checkpoint is kept"):
            common.save_checkpoint(path, state)
    assert common.load_checkpoint(path)["model"]["w"].tolist() == [1, 1]


def test_checkpoint_of_another_stage_is_refused(base):
    code, text = call(MAINS["pretrain"], [*arguments("pretrain", base / "runs", base / "data", base / "runs/denoiser")])
    assert code == 2 and "another stage's: it has no" in one_line(text)


def test_killed_before_the_renaming_loses_nothing_and_leftovers_go(tmp_path):
    path = tmp_path / "checkpoint.pth"
    common.save_checkpoint(path, {"step": 1})
    torch.save({"step": 2}, f"{path}.new")
    (tmp_path / ".checkpoint.pth.new.123.tmp").write_bytes(b"half of it")
    assert common.load_checkpoint(path)["step"] == 2
    common.save_checkpoint(path, {"step": 3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pth", "checkpoint.pth.previous"]


def test_complete_run_is_left_as_it_is_and_other_images_are_refused(base, tmp_path):
    shutil.copytree(base / "data", tmp_path / "same")
    shutil.copytree(base / "data", tmp_path / "other")
    path = next((tmp_path / "other/train").rglob("*.png"))
    path.write_bytes(path.read_bytes() + b"\0")
    before = contents(base / "runs")
    for stage, out in (("train", "denoiser"), ("pretrain", "pretrain/nct-seed0")):
        for data, expected in (("same", 0), ("other", 2)):
            argv = arguments(stage, base / "runs", tmp_path / data, base / "runs" / out)
            code, text = call(MAINS[stage], argv)
            assert code == expected and ("complete, nothing to do" if code == 0 else "--data ") in text
    assert contents(base / "runs") == before


def test_complete_run_of_no_epochs_is_left_as_it_is(base, tmp_path):
    argv = [*arguments("pretrain", base / "runs", base / "data", tmp_path), "--curriculum", "noisy:0",
            "--anchor", "0"]
    code, text = call(pretrain.main, argv)
    assert code == 0, text
    before = contents(tmp_path)
    code, text = call(pretrain.main, argv)
    assert code == 0 and "complete, nothing to do" in text and contents(tmp_path) == before


def test_backbone_without_its_checkpoint_is_not_overwritten(base, tmp_path):
    (tmp_path / "backbone.pth").write_bytes(b"trained for days")
    code, text = call(pretrain.main, arguments("pretrain", base / "runs", base / "data", tmp_path))
    assert code == 2 and "backbone.pth without its checkpoint" in one_line(text)
    assert (tmp_path / "backbone.pth").read_bytes() == b"trained for days"


def test_probe_of_other_settings_is_not_overwritten(base, tmp_path):
    shutil.copy(next((base / "runs/probe").glob("*.json")), out := tmp_path / "p.json")
    before = out.read_bytes()
    argv = [*arguments("probe", base / "runs", base / "data", out), "--seed", "7"]
    code, text = call(probe.main, argv)
    assert code == 2 and "--seed 0 (now 7)" in one_line(text) and out.read_bytes() == before


@pytest.fixture
def half(base, tmp_path):
    """A copy of the run of pretrain.py, stopped after its first phase; the flags that go on with it."""
    shutil.copytree(base / "runs/pretrain/nct-seed0", out := tmp_path / "half")
    shutil.copy(out / "checkpoint.pth.previous", out / "checkpoint.pth")
    (out / "backbone.pth").unlink()
    return out, ["--out", out, *STAGES["pretrain"], "--denoised", base / "runs/denoised"]


def test_run_goes_on_where_its_images_were_moved_to_and_however_a_path_is_spelled(base, half, monkeypatch):
    out, flags = half
    shutil.copytree(base / "data", out / "moved")
    monkeypatch.chdir(base)
    code, text = call(pretrain.main, ["--data", out / "moved", *flags[:-1], "runs/../runs/denoised"])
    assert code == 0, text
    whole = base / "runs/pretrain/nct-seed0"
    assert results(out)["checkpoint.pth"] == results(whole)["checkpoint.pth"]


def test_run_on_other_images_is_not_gone_on_with(base, half):
    out, flags = half
    shutil.copytree(base / "data", out / "other")
    (out / "other/train/cat/0.png").unlink()
    before = contents(out)
    code, text = call(pretrain.main, ["--data", out / "other", *flags])
    assert code == 2 and "--data 12 images" in one_line(text) and "(now 11 images" in text
    assert contents(out) == before


@pytest.mark.parametrize("stage, out", [("train", "denoiser"), ("pretrain", "pretrain/nct-seed0")])
def test_run_of_an_fp16_gpu_goes_on_on_the_cpu(base, tmp_path, stage, out):
    """What such a checkpoint holds: a scaler's state and an optimiser that was fused."""
    shutil.copytree(base / "runs" / out, run := tmp_path / "run")
    state = common.load_checkpoint(run / "checkpoint.pth.previous" if stage == "pretrain" else run / "checkpoint.pth")
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    state["scaler"] = scaler.state_dict()
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = True
    if stage == "train":
        state |= {"epoch": 0, "step": 1}
    common.save_checkpoint(run / "checkpoint.pth", state)
    for done in ("quality.json", "backbone.pth"):
        (run / done).unlink(missing_ok=True)
    code, text = call(MAINS[stage], [*arguments(stage, base / "runs", base / "data", run), "--amp", "bf16"])
    assert code == 0, text
    assert len(common.read_log(run / "log.jsonl")) == (3 if stage == "train" else 6)


# ======================================================================================================
# disks
# ======================================================================================================

LIMIT = """import atexit, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, limits)  # what coverage writes at the end is not the stage's
resource.setrlimit(resource.RLIMIT_FSIZE, ({}, limits[1]))"""


def test_full_disk_ends_with_one_line_and_the_last_checkpoint_intact(base, half):
    out, flags = half
    before = results(out)["checkpoint.pth"]
    done = script("pretrain", "--data", base / "data", *flags, before=LIMIT.format(20_000))
    assert done.returncode == 2 and "checkpoint.pth.new: cannot be written" in one_line(done.stderr), done.stderr
    assert results(out)["checkpoint.pth"] == before
    assert not [p for p in out.iterdir() if p.suffix in (".tmp", ".new")]
    code, text = call(pretrain.main, ["--data", base / "data", *flags])
    assert code == 0, text
    assert results(out)["checkpoint.pth"] == results(base / "runs/pretrain/nct-seed0")["checkpoint.pth"]


def test_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    args = common.argparse.Namespace(out=str(tmp_path), log_steps=1, save_minutes=1e9)
    loop = common.Loop(args, 100, 0, 0.0, lambda seconds: None)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be written"):
        loop.tick({"dino": torch.tensor(1.0)}, 4, {})


def test_more_memory_than_there_is_is_one_line(base, tmp_path):
    argv = [*arguments("pretrain", base / "runs", base / "data", tmp_path), "--prototypes", "99999999999999"]
    code, text = call(pretrain.main, argv)
    assert code == 2 and "allocate" in one_line(text)


@pytest.mark.parametrize("stage", ["train", "apply", "pretrain", "probe"])
def test_folder_that_cannot_be_written_is_one_line(base, tmp_path, stage):
    (tmp_path / "file").write_text("in the way")
    code, text = call(MAINS[stage], arguments(stage, base / "runs", base / "data", tmp_path / "file/out"))
    assert code == 2 and "cannot be written" in one_line(text)


def test_images_that_vanish_while_training_are_one_line_and_the_checkpoint_is_kept(base, half, monkeypatch):
    out, flags = half
    shutil.copytree(base / "data", data := out / "data")
    update = pretrain.Run.update
    monkeypatch.setattr(pretrain.Run, "update", lambda *a: (update(*a), shutil.rmtree(data, ignore_errors=True)))
    before = results(out)["checkpoint.pth"]
    code, text = call(pretrain.main, ["--data", data, *flags, "--cache_gb", "0"])
    assert code == 2 and "is gone" in one_line(text)
    assert results(out)["checkpoint.pth"] == before


def test_half_image_is_made_again_and_foreign_images_are_never_taken_for_denoised_ones(base, tmp_path):
    shutil.copytree(base / "runs/denoised", out := tmp_path / "denoised")
    whole = contents(out)
    broken = sorted(out.rglob("*.png"))[:3]
    broken[0].write_bytes(b"")
    broken[1].write_bytes(broken[1].read_bytes()[:100])
    Image.new("RGB", (3, 3)).save(broken[2])
    flags = arguments("apply", base / "runs", base / "data", out)
    assert call(MAINS["apply"], flags)[0] == 0
    assert {p: v[1] for p, v in contents(out).items()} == {p: v[1] for p, v in whole.items()}
    (out / "made_by.json").unlink()
    code, text = call(MAINS["apply"], flags)
    assert code == 2 and "images that apply did not make" in one_line(text)


def test_denoised_images_never_go_among_the_noisy_ones(base, tmp_path):
    images(tmp_path / "flat")
    for out in ("flat", "flat/denoised"):
        code, text = call(MAINS["apply"], arguments("apply", base / "runs", tmp_path / "flat", tmp_path / out))
        assert code == 2 and "is in the data folder" in one_line(text)
    assert len(list((tmp_path / "flat").iterdir())) == 4


# ======================================================================================================
# training
# ======================================================================================================


@pytest.mark.parametrize("entropy, rank, words", [
    (0.001, 9, "one prototype"), (math.log(16), 9, "stays uniform"), (1.4, 1.1, "the same features"), (1.4, 9, "")])
def test_collapse_is_told_by_entropy_and_rank(entropy, rank, words):
    text = pretrain.collapse({"entropy": entropy, "rank": rank}, 16)
    assert words in text and bool(text) == bool(words)


@pytest.mark.parametrize("ill, warnings", [(150, 1), (90, 0)])
def test_collapsed_run_warns_once_and_only_after_long(base, tmp_path, monkeypatch, ill, warnings):
    calls, monitors = [], pretrain.monitors

    def watched(*a):
        calls.append(1)
        return monitors(*a) | {"entropy": 0.0 if len(calls) <= ill else 1.4, "rank": 5.0}

    monkeypatch.setattr(pretrain, "monitors", watched)
    argv = arguments("pretrain", base / "runs", base / "data", tmp_path)
    argv += ["--curriculum", "denoised:15,noisy:1", "--batch_size", "1"]
    code, text = call(pretrain.main, argv)
    assert code == 0 and text.count("warning: since 100 steps the teacher gives all images one prototype") == warnings


def test_more_prototypes_than_useful_are_told_at_the_start(base, tmp_path):
    for k, told in ((120, False), (121, True)):
        argv = [*arguments("pretrain", base / "runs", base / "data", tmp_path / str(k)), "--prototypes", k]
        code, text = call(pretrain.main, argv)
        assert code == 0 and (f"--prototypes {k}: more than about 120" in text) == told


def test_rate_that_makes_features_infinite_stops_with_the_loss_and_the_step(base, tmp_path):
    argv = [*arguments("pretrain", base / "runs", base / "data", tmp_path), "--lr", "1e30", "--warmup_epochs", "0"]
    code, text = call(pretrain.main, argv)
    assert code == 2 and "is not finite" in one_line(text)


# ======================================================================================================
# signals and processes
# ======================================================================================================


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_outside_of_the_loops_ends_at_once_with_75(base, tmp_path, name):
    kill = f"import os, signal\ncommon.Folder = lambda *a, **k: os.kill(os.getpid(), signal.{name})"
    done = script("probe", *arguments("probe", base / "runs", base / "data", tmp_path / "p.json"), before=kill)
    assert done.returncode == 75 and done.stderr == "stopped; the same command goes on\n"


def test_worker_ends_with_its_process_even_if_torch_does_not_see_it_die(tmp_path):
    code = ("import os, sys, torch, common\n"
            "class Blind:\n"
            "    def is_alive(self): return True\n"
            "torch.utils.data._utils.worker.ManagerWatchdog = Blind\n"
            "source = common.Batches(common.Folder(sys.argv[1]), ['noisy'], torch.device('cpu'), 0.0, 1)\n"
            "batches = source.epoch([[0], [1], [2], [3]])\n"
            "next(batches)\n"
            "os._exit(0)")
    # its output ends when the last process that holds it does
    subprocess.run([sys.executable, "-c", code, images(tmp_path)], env=ENV, cwd=ROOT, stdout=subprocess.PIPE,
                   timeout=60, check=True)


def test_apply_stopped_by_a_signal_goes_on_to_the_same_images(base, tmp_path):
    kill = ("import os, signal\nreal, calls = denoise.denoise, []\n"
            "def second(*a, **k):\n"
            "    calls.append(1)\n"
            "    return real(*a, **k) if len(calls) < 2 else os.kill(os.getpid(), signal.SIGTERM)\n"
            "denoise.denoise = second")
    argv = arguments("apply", base / "runs", base / "data", tmp_path / "out")
    done = script("apply", *argv, before=kill)
    some = list((tmp_path / "out").rglob("*.png"))
    assert done.returncode == 75 and 0 < len(some) < 18, done.stderr
    assert call(MAINS["apply"], argv)[0] == 0
    whole = base / "runs/denoised"
    assert {p.relative_to(tmp_path / "out"): v[1] for p, v in contents(tmp_path / "out").items()} == {
        p.relative_to(whole): v[1] for p, v in contents(whole).items()}


# without the dashes torchrun takes probe.py's --run for a flag of its own
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]


def test_two_processes_denoise_as_one_to_the_bit_and_a_run_of_two_goes_on_with_one(base, tmp_path):
    done = script("apply", *arguments("apply", base / "runs", base / "data", tmp_path / "denoised"), launch=TWO)
    assert done.returncode == 0, done.stderr
    one, two = ({k: v for k, v in results(p).items() if k.endswith(".png")} for p in (base / "runs", tmp_path))
    assert len(one) == 18 and one == two
    argv = arguments("pretrain", base / "runs", base / "data", tmp_path / "run")
    script("pretrain", *argv, launch=TWO)
    run = tmp_path / "run"
    shutil.copy(run / "checkpoint.pth.previous", run / "checkpoint.pth")  # before the last epoch's end
    state = common.load_checkpoint(run / "checkpoint.pth")
    (run / "backbone.pth").unlink()
    code, text = call(pretrain.main, argv)
    assert code == 0, text
    logs = [common.read_log(p / "log.jsonl") for p in (base / "runs/pretrain/nct-seed0", run)]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]] == list(range(1, 7))
    assert 3 <= state["position"][3] < 6
    np.testing.assert_allclose([r["total"] for r in logs[1]], [r["total"] for r in logs[0]], rtol=1e-3)


def test_two_processes_probe_as_one_to_the_bit(base, tmp_path):
    for split, k in itertools.product(("train", "val"), ("cat", "dog")):
        images(tmp_path / "data" / split / k, 70)  # three batches of 64 a split: two and one
    argv = [*arguments("probe", base / "runs", tmp_path / "data", tmp_path / "probe/two.json"), "--views", "1"]
    done = script("probe", *argv, launch=TWO)
    assert done.returncode == 0 and done.stdout.count("linear") == 1, done.stdout + done.stderr
    code, text = call(MAINS["probe"], [*argv, "--out", tmp_path / "probe/one.json"])
    assert code == 0, text
    assert results(tmp_path)["probe/two.json"] == results(tmp_path)["probe/one.json"]


@pytest.mark.parametrize("what, cause", [
    ("raise common.UserError('train/1.png: not a readable image')", "error: train/1.png: not a readable image"),
    ("raise IndexError('a bug')", "IndexError: a bug"), ("os._exit(9)", "exitcode  : 9")])
def test_process_that_fails_ends_the_job_soon_with_the_cause_on_top(base, tmp_path, what, cause):
    (tmp_path / "failing.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport common, pretrain\nupdate = pretrain.Run.update\n"
        "def fail(run, *a):\n    if run.total == 2 and common.world()[0] == 1:\n"
        f"        {what}\n    update(run, *a)\n"
        "pretrain.Run.update = fail\ncommon.run(pretrain.main)\n")
    begun = time.time()
    argv = [*TWO, tmp_path / "failing.py", *arguments("pretrain", base / "runs", base / "data", tmp_path / "run")]
    done = subprocess.run([sys.executable, *map(str, argv)], env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and time.time() - begun < 60
    assert cause in done.stderr and done.stderr.count("Traceback") <= 2, done.stderr
    ours = [line for line in done.stderr.splitlines() if "Traceback" in line or line.startswith(("error:", "stopped:"))]
    if "UserError" in what:
        assert ours[0] == cause
    assert (tmp_path / "run/config.json").exists()


def test_every_image_is_seen_once_in_an_epoch_whatever_the_number_of_processes(monkeypatch):
    order = torch.randperm(24, generator=common.generator(0, 0, 0)).view(-1, 8)
    for size in (1, 2, 4, 8):
        seen = []
        for rank in range(size):
            monkeypatch.setattr(common, "world", lambda rank=rank, size=size: (rank, size))
            seen.append(order[:, common.share(8, 24)[1]])
        assert torch.equal(torch.cat(seen, 1), order)


def test_signals_stop_the_chain_between_two_stages_too(base, tmp_path):
    """run.sh forgets no signal: one that comes while no stage runs, or before a stage listens, ends it with 75."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(
        f'#!/bin/sh\ncase "$*" in *check*) kill -TERM $PPID;; esac\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin/python3").chmod(0o755)
    env = {**ENV, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "run.sh", "--data", base / "data", "--preset", "demo", "--out", tmp_path / "out"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75 and not (tmp_path / "out").exists(), done.stderr


def test_probe_is_made_again_only_where_its_images_or_its_backbone_changed(base, tmp_path):
    for part in ("data", "runs"):
        shutil.copytree(base / part, tmp_path / part)
    out, run = tmp_path / "figures.json", tmp_path / "runs/pretrain/nct-seed0"

    def probed():
        before = out.read_bytes() if out.exists() else b""
        code, text = call(probe.main, arguments("probe", tmp_path / "runs", tmp_path / "data", out))
        assert code == 0 and ("complete, nothing to do" in text) == (out.read_bytes() == before)
        return out.read_bytes() != before

    assert probed() and not probed()
    Image.fromarray(picture(np.random.default_rng(9), 20, 24)).save(tmp_path / "data/val/cat/0.png")
    assert probed() and not probed()
    common.write_json(run / "summary.json", {**common.read_json(run / "summary.json"), "seconds": 99.0})  # trained anew
    assert probed() and not probed()


def test_config_files_are_json_of_what_was_asked_for(base):
    config = json.loads((base / "runs/pretrain/nct-seed0/config.json").read_text())
    assert config["data"] == str(base / "data") and config["files"].startswith("12 images of 3 channels, ")
    assert signal.getsignal(signal.SIGTERM) is not common.leave
