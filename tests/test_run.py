"""run.sh from end to end, as a user calls it: bad input, a tiny chain, the same chain again, one
that a signal interrupts; which stages it would call, with a python that only records; and
shapes.py, the demonstration data."""

import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cells
import numpy as np
import pytest
import shapes
import torch
from PIL import Image
from test_fuzz import ARMS, CHAIN, ROOT, contents, environment, results

import common
import denoise
import pretrain
import probe

RUN = ["bash", str(ROOT / "run.sh")]


def run_sh(folder, *flags):
    """run.sh with the Python of these tests, in this folder."""
    return subprocess.run([*RUN, *map(str, flags)], env=environment(folder), cwd=folder,
                          capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    shapes.write(root, 40, 20, size=32)
    return root


# ==== bad input ===================================================================================
def no_image(data):
    for path in data.rglob("*.png"):
        path.unlink()


def corrupt(data):
    (data / "train/discs/0001.png").write_bytes(b"no picture")


def unknown_class(data):
    (data / "val/rings").rename(data / "val/circles")


def flat(data):
    shutil.rmtree(data / "masks")
    flat_beside_masks(data)


def flat_beside_masks(data):
    for k, path in enumerate([*data.glob("[tv]*/*/*.png")]):
        path.rename(data / f"{k}.png")
    for split in ("train", "val"):
        shutil.rmtree(data / split)


def without_val(data):
    """mine, a denoised copy: of the training images alone."""
    shutil.copytree(data / "train", data.parent / "mine/train")


def lacking(split):
    """mine, a denoised copy in which one image of a split is missing."""
    def copy(data):
        copied = shutil.copytree(data, data.parent / "mine") / split
        next(copied.rglob("*.png")).unlink()
    return copy


FROM_RUN_TO_RUN = "differs from run to run; use --arms, --seeds, --out"
FOR_ALL = "is for all stages"
BAD = [  # flags, what the error line says, what is wrong with the data
    ("--nose gauss100", "unknown argument --nose"),
    ("--noise", "--noise needs a value"),
    ("--noise gaus100", "--noise gaus100: unknown noise"),
    ("--noise gaus100", "--noise gaus100: unknown noise", flat),
    ("--data nowhere", "--data nowhere: no such folder"),
    ("", "no images found", no_image),
    ("", "0001.png: not a readable image", corrupt),
    ("--preset small", "0001.png: not a readable image", corrupt),
    ("", "circles: class unknown to train", unknown_class),
    ("--range", "--range needs a value"),
    ("--range 5", "--range: must be two numbers"),
    ("--range 0,100", ".png: is 8 bit, but other images, those trained on, or --range are deeper"),
    ("-- --range 0,100", f"-- --range: {FOR_ALL}"),
    ("--preset huge", "--preset huge: use demo, tiny, small, imagenet100 or imagenet1k"),
    ("--arms foo", "--arms foo: unknown"),
    ("--arms clean", "--arms clean: with --noise none"),
    ("--seeds x", "--seeds x: must be whole numbers"),
    ("--gpus 0", "--gpus 0: must be a whole number from 1"),
    ("--gpus 99", "--gpus 99: this machine has"),
    ("--denoised data", "--denoised: none of --arms noisy uses it"),
    ("--stride 1,3", "--stride: is for the denoiser, which is not trained here"),
    ("--arms denoised --denoised mine --stride 1,3", "--stride: is for the denoiser"),
    ("--arms nc --denoised nowhere", "--denoised nowhere: no such folder"),
    ("--arms denoised --denoised mine", "--denoised mine: has no val/", without_val),
    ("--arms denoised --denoised mine", "mine: 1 of 20 denoised images are missing", lacking("val")),
    ("--arms nc --denoised mine", "mine: 1 of 40 denoised images are missing", lacking("train")),
    ("--shots few", "--shots: invalid floats value: 'few'"),
    ("--shots 5", "--shots 5: no class in data/train has so many images; the largest has 4"),
    ("--shots 2", "--shots 2: has no effect without train/<class>/ and val/<class>/ in data", flat),
    ("--img_size 0", "--img_size 0: must be more than 0"),
    ("--img_size 100", "--img_size 100: is no multiple of the patch size 8"),
    ("--img_size 64 -- --patch_size=12", "--img_size 64: is no multiple of the patch size 12"),
    ("--img_size 32", "--img_size 32: has no effect without labels or masks in data", flat),
    ("", "masks/ has no effect without train/, val/, masks/train/ and masks/val/", flat_beside_masks),
    ("-- --epochs 3 --seed 1", f"-- --seed: {FROM_RUN_TO_RUN}"),
    ("-- --source=clean", f"-- --source=clean: {FROM_RUN_TO_RUN}"),
    ("-- --stop 3", f"-- --stop: {FROM_RUN_TO_RUN}"),
    ("-- --init a.pth", f"-- --init: {FROM_RUN_TO_RUN}"),
    ("-- --out b", f"-- --out: {FROM_RUN_TO_RUN}"),
    ("-- --data b", f"-- --data: {FOR_ALL}"),
    ("-- --noise=none", f"-- --noise=none: {FOR_ALL}"),
    ("-- --noise_seed 1", f"-- --noise_seed: {FOR_ALL}"),
    ("-- --preset tiny", f"-- --preset: {FOR_ALL}"),
    ("-- --denoised data", f"-- --denoised: {FOR_ALL}"),
    ("-- --epochs 1.5", "--epochs 1.5"),
    ("--arms nc -- --epochs 4 --switch 4", "--switch 4: must be between 0 and --epochs 4"),
    ("--arms nct -- --epochs 4 --switch 0", "--switch 0: must be between 0 and --epochs 4"),
    ("--arms nc -- --epochs 4", "must be between 0 and --epochs 4"),  # the preset's: 6 of 10
    ("-- --switch 2", "--switch: has no effect"),
    ("--arms nc -- --anchor 2", "-- --anchor: has no effect without the arm nct"),
    ("-- --anchor_head live", "-- --anchor_head: has no effect without the arm nct"),
    ("--arms nct -- --anchor few", "--anchor: invalid float value: 'few'", flat),
    ("--arms nct -- --anchor_head dead", "--anchor_head: invalid choice: 'dead'", flat),
    ("--arms nct -- --anchor 0 --anchor_head live", "--anchor_head: have no effect", flat),
    ("--arms nct -- --anchor_from a.pth", "--anchor_from a.pth: no such file"),
    ("-- --init_backbone a.pth", "--init_backbone a.pth: no such file"),
    ("-- --learning_rate 1", "unrecognized arguments: --learning_rate"),
    ("-- --epochs", "--epochs: expected one argument", flat),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0]} {case[2:]}")
def test_bad_input_ends_with_one_line_and_writes_nothing(data, tmp_path, case):
    flags, message, *spoil = case
    if torch.cuda.device_count() >= 99:
        pytest.skip("has the GPUs")
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept.txt").write_text("kept")
    for break_data in spoil:
        break_data(tmp_path / "data")
    before = contents(tmp_path / "out", tmp_path / "data")
    usual = str.split("--data data --out out --preset tiny --arms noisy")
    done = run_sh(tmp_path, *usual, *flags.split())
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(errors) == 1 and message in errors[0], done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert contents(tmp_path / "out", tmp_path / "data") == before


# ==== the chain ===================================================================================
@pytest.fixture(scope="module")
def chain(data, tmp_path_factory):
    """(flags, its output, folder) of an undisturbed chain."""
    folder = tmp_path_factory.mktemp("chain")
    flags = ["--data", data, *ARMS, *CHAIN, "--switch", "2"]
    done = run_sh(folder, *flags)
    assert done.returncode == 0, done.stderr
    return flags, done, folder / "out"


def figures(out):
    """What the probes measured, by run."""
    arms = json.loads((out / "results.json").read_text())
    found = {}
    for run, result in itertools.chain(*(arm.items() for arm in arms.values())):
        found[run] = {k: result[k] for k in ("linear", "knn", "map")}
        # denoised pixels have no others: they would need the denoiser
        found[run] |= {k: result.get(k) for k in ("clean_linear", "sweep")}
        assert result.get("sweep") or run == "pixels_denoised-seed0"
    return found


def test_chain_prints_the_table_and_leaves_report_and_pictures(chain):
    _, done, out = chain
    found = figures(out)
    assert found.keys() == {"noisy-seed0", "denoised-seed0", "nct-seed0", "pixels-seed0",
                            "pixels_denoised-seed0"}
    report = (out / "results.md").read_text()
    for run, r in found.items():
        shown = [r["linear"], r["clean_linear"], r["knn"]["20"]]
        shown = ["-" if value is None else f"{value:.1f}" for value in shown]
        line = " | ".join(["| " + run.removesuffix("-seed0"), "1", *shown])
        assert line in done.stdout and line in report
    for name in ("samples", "features", "robustness", "curves"):
        assert f"({name}.png)" in report
        with Image.open(out / f"{name}.png") as picture:
            assert np.asarray(picture).std() > 5  # something is drawn
    assert found["noisy-seed0"]["map"] != found["nct-seed0"]["map"]


def test_pictures_show_the_noise_where_the_first_arm_is_the_clean_one(chain, tmp_path, monkeypatch):
    """The clean arm's probe knows of no noise."""
    out = tmp_path / "out"
    shutil.copytree(chain[2], out)
    monkeypatch.chdir(chain[2].parent)
    result = json.loads((out / "probe/noisy-seed0.json").read_text())
    result["config"]["noise"] = "none"
    (out / "probe/clean-seed0.json").write_text(json.dumps(result))
    (out / "pretrain/noisy-seed0").rename(out / "pretrain/clean-seed0")
    for run in ("noisy-seed0", "nct-seed0"):
        (out / f"probe/{run}.json").unlink()
    (out / "samples.png").unlink()
    probe.report(out)
    assert (out / "samples.png").read_bytes() == (chain[2] / "samples.png").read_bytes()


def test_chain_trains_the_denoised_run_once_and_nct_from_its_middle(chain):
    """Of 4 epochs of 5 steps 2 are on denoised images; the denoised arm has all 4 of them."""
    _, done, out = chain
    runs = {"noisy": 20, "denoised": 20, "nct": 10}
    for run, steps in runs.items():
        log = (out / f"pretrain/{run}-seed0/log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == list(range(1, steps + 1))
    for epoch in (1, 2, 3, 4):
        assert done.stdout.count(f"denoised-seed0: epoch {epoch}/4") == 1
    assert (out / "pretrain/denoised-seed0/epoch2.pth").exists()
    seconds = json.loads((out / "pretrain/nct-seed0/summary.json").read_text())["seconds"]
    log = (out / "pretrain/nct-seed0/log.jsonl").read_text().splitlines()
    assert seconds > json.loads(log[-1])["seconds"]  # with those of the first phase


def test_stacks_of_a_microscope_go_through_every_stage_with_16_bits(tmp_path):
    """Every page is an image; one range, measured on train, is that of every stage; denoised pages
    are 16-bit PNG of more levels than 8 bit has."""
    cells.write(tmp_path / "cells", train=12, val=6, size=48, pages=4)
    small = str.split("--epochs 2 --switch 1 --arch 16,2,2 --prototypes 16 --log_steps 1 --rotate")
    done = run_sh(tmp_path, *str.split("--data cells --preset demo --arms nct --shots 5"), "--", *small)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs/cells"
    made = json.loads((out / "denoised/made_by.json").read_text())
    low, high = made["range"]
    assert 40 < low < 100 < 200 < high < 600  # counts
    for file in ("pretrain/nct-seed0/config.json", "probe/nct-seed0.json", "probe/pixels-seed0.json"):
        assert json.loads((out / file).read_text())["range"] == [low, high]
    for split, pages in (("train", 48), ("val", 24)):
        files = common.list_images(out / "denoised" / split)
        assert len(files) == pages and files[2].endswith("discs/00#3.png")
    with Image.open(out / "denoised/train/discs/00#3.png") as page:
        assert page.mode.startswith("I") and len(np.unique(page)) > 300
    report = (out / "results.md").read_text()
    assert all(f"({name}.png)" in report for name in ("samples", "features", "curves"))


def test_stages_are_numbered_with_the_time_that_the_last_one_took(chain):
    _, done, out = chain
    lines = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    titles = ["training the denoiser", "denoising the images",
              "pretraining denoised, first 2 of 4 epochs, seed 0", "pretraining noisy, seed 0",
              "probing noisy, seed 0", "pretraining denoised, seed 0", "probing denoised, seed 0",
              "pretraining nct, seed 0", "probing nct, seed 0", "probing pixels",
              "probing pixels_denoised", "report"]
    assert lines[0] == "== 1/12 training the denoiser =="
    last = r" \(the last took \d+ min \d+ s(, about \d+ min left)?\) =="
    for number, (title, line) in enumerate(zip(titles, lines, strict=True), 1):
        assert number == 1 or re.fullmatch(f"== {number}/12 {title}{last}", line), line
    assert len((out / "commands.log").read_text().splitlines()) == 12


def test_same_command_again_trains_nothing_and_reports_the_same(chain):
    flags, first, out = chain
    before = contents(out)
    done = run_sh(out.parent, *flags)
    assert done.returncode == 0, done.stderr
    after = contents(out)
    assert after.keys() == before.keys()
    assert after[out / "results.json"][1] == before[out / "results.json"][1]
    changed = {p for p in before if before[p] != after[p]}
    assert {p.parent for p in changed} == {out}  # the report, the lock and commands.log
    table = [line for line in first.stdout.splitlines() if line.startswith("|")]
    assert [line for line in done.stdout.splitlines() if line.startswith("|")] == table
    assert done.stdout.count("complete, nothing to do") == 10  # but apply's and the report


def test_chain_that_a_signal_interrupted_goes_on_to_the_same_figures(chain, data, tmp_path):
    flags = ["--data", str(data), "--arms", "noisy", *CHAIN]
    run, output = tmp_path / "out/pretrain/noisy-seed0", tmp_path / "output"
    log = run / "log.jsonl"
    with (open(output, "w") as file,
          subprocess.Popen([*RUN, *flags], env=environment(tmp_path), cwd=tmp_path, stdout=file,
                           stderr=file) as process):
        while process.poll() is None:
            if log.exists() and '"step": 11' in log.read_text():
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, output.read_text()
    assert "saved; the same command goes on" in output.read_text()
    assert not (run / "backbone.pth").exists()
    assert not (tmp_path / "out/results.json").exists()
    done = run_sh(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "out")["noisy-seed0"] == figures(chain[2])["noisy-seed0"]
    mine, undisturbed = results(run), results(chain[2] / "pretrain/noisy-seed0")
    for name in ("checkpoint.pth", "backbone.pth", "log.jsonl"):
        assert mine[name] == undisturbed[name]


@pytest.mark.parametrize("folders", [["."], ["train", "val"]])
def test_images_without_classes_are_pretrained_without_probes_and_get_pictures(
        data, tmp_path, folders):
    for folder in folders:
        (tmp_path / "flat" / folder).mkdir(parents=True)
        for i, path in enumerate(sorted(data.glob("train/*/*.png"))[:16]):
            shutil.copy(path, tmp_path / "flat" / folder / f"{i}.png")
    done = run_sh(tmp_path, "--data", "flat", "--arms", "noisy", *CHAIN)
    assert done.returncode == 0, done.stderr
    assert "pretraining without probes" in done.stdout
    assert not (tmp_path / "out/probe").exists()
    assert "16 training images without labels" in (tmp_path / "out/results.md").read_text()
    for name in ("samples", "features", "curves"):
        with Image.open(tmp_path / f"out/{name}.png") as picture:
            assert np.asarray(picture).std() > 5  # something is drawn
    run = tmp_path / "out/pretrain/noisy-seed0"
    assert json.loads((run / "summary.json").read_text())["epochs"] == 4
    weights = torch.load(run / "backbone.pth", weights_only=True)
    assert weights["patch_embed.proj.weight"].shape == (16, 3, 8, 8)


# ==== what run.sh calls: a python3 that does nothing records it ===================================
RECORDER = """#!/bin/sh
case " $* " in
  *" -c "*device_count*) echo 64; exit 0 ;;
  *" -c "*" LACKS "*) exit 1 ;;
  *" -c "* | *" pip --version "*) exit 0 ;;
  *" venv "*) mkdir -p "HERE/.venv/bin"; cp "$0" "HERE/.venv/bin/python" ;;
esac
echo "$*" >>"HERE/ran"
case " $* " in *"pretrain.py check"*) echo "data of images: ${IMAGES-4000} images to train on" ;; esac
MORE
"""


def recorder(folder, lacks="nothing", more=""):
    """The command and the environment of a copy of run.sh, whose python3 has every package but one
    and 64 GPUs, and does nothing but `more`."""
    shutil.copy(ROOT / "run.sh", folder)
    script = RECORDER.replace("LACKS", lacks).replace("MORE", more)
    (folder / "bin").mkdir()
    (folder / "bin/python3").write_text(script.replace("HERE", str(folder)))
    (folder / "bin/python3").chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return ["bash", str(folder / "run.sh")], {**os.environ, "PATH": path}


def called(folder):
    """(the checks of labels, images and flags, all other calls of the recorder)."""
    lines = (folder / "ran").read_text().replace(f"{folder}/", "").splitlines()
    checks = [line for line in lines if ".py check " in line]
    return checks, [line for line in lines if line not in checks]


def recorded(folder, *flags, lacks="nothing", more=""):
    """What run.sh calls python3 for, but for the checks at the start, and what it prints."""
    command, env = recorder(folder, lacks, more)
    done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return called(folder)[1], done.stdout


WHOLE = "-m pytest --cov --cov-report=term-missing --cov-fail-under=90"
INSTALL = ["-m venv --system-site-packages .venv", "-m pip install -q pytest pytest-cov"]


@pytest.mark.parametrize("lacks, flags, expected", [
    ("nothing", [], [WHOLE]),
    ("nothing", ["-k", "noise"], ["-m pytest -k noise"]),  # a part of the suite: no figure
    ("pytest_cov", [], ["-m pytest"]),
    ("pytest", [], [*INSTALL, WHOLE]),
])
def test_test_command_measures_coverage_and_installs_only_into_an_environment_of_its_own(
        tmp_path, lacks, flags, expected):
    assert recorded(tmp_path, "test", *flags, lacks=lacks)[0] == expected


def parse(line):
    """(words before the script, script, {flag: value}) of a command; of a flag twice the last."""
    words = line.split()
    script = next(k for k, word in enumerate(words) if word.endswith(".py"))
    launch, name, rest = words[:script], words[script], words[script + 1:]
    while rest and not rest[0].startswith("--"):  # a command such as train
        name = f"{name} {rest.pop(0)}"
    for flag in {"--pixels", "--rotate"} & {*rest}:  # which have no value
        rest.insert(rest.index(flag) + 1, "")
    return launch, name, dict(zip(rest[::2], rest[1::2], strict=True))


def images(folder):
    """A data folder with classes, as far as run.sh looks, and files to start from."""
    for split in ("train", "val"):
        (folder / "data" / split / "cat").mkdir(parents=True)
        (folder / "data" / split / "cat/1.png").touch()
    (folder / "mine/val").mkdir(parents=True)
    for name in ("vit.pth", "teacher.pth"):
        (folder / name).touch()


def stages(folder, preset, *flags, noise="gauss50", more=""):
    """The stages of a chain on data/ into out/, parsed."""
    images(folder)
    common = "--data", "data", "--noise", noise, "--preset", preset, "--out", "out"
    commands, _ = recorded(folder, *common, *flags, more=more)
    return [parse(line) for line in commands]


def plan(text, preset, noise="gauss50", seed=0, launch=()):
    """What stages() gives, of lines with the flags that differ. The names of runs become folders:
    NAME> before a pretraining, NAME: before a probe."""
    found = []
    for line in text.strip().splitlines():
        name, _, rest = line.strip().partition(" ")
        run = f"out/pretrain/{name[:-1]}-seed{seed}"
        shared = f"--data data --noise {noise} --preset {preset}"
        if name.endswith(">"):
            line = f"pretrain.py {shared} --seed {seed} --out {run} {rest}"
        elif name.endswith(":"):
            figures = f"out/probe/{name[:-1]}-seed{seed}.json"
            what = "--pixels" if name.startswith("pixels") else f"--run {run}"
            line = f"probe.py {shared} {what} --out {figures} {rest}"
        elif name == "denoise.py":
            line = f"{line} {shared}"
        _, script, flags = parse(line)
        alone = "report" in script
        found.append(([] if alone else list(launch), script, flags))
    return found


def test_every_arm_is_pretrained_and_probed_on_the_images_of_its_kind(tmp_path):
    """Clean images for the arm clean, denoised ones and a denoiser for the arm that keeps it,
    noisy for the rest; nc and nct start where the denoised run was after 18 epochs."""
    assert stages(tmp_path, "tiny") == plan("""
        denoise.py train --out out/denoiser
        denoise.py apply --denoiser out/denoiser --out out/denoised
        denoised> --source denoised --denoised out/denoised --epochs 60 --stop 18
        random> --source noisy --epochs 0
        random:
        noisy> --source noisy --epochs 60
        noisy:
        denoised> --source denoised --denoised out/denoised --epochs 60
        denoised: --denoised out/denoised --denoiser out/denoiser
        nc> --source noisy --epochs 42 --init out/pretrain/denoised-seed0/epoch18.pth \
 --warmup_epochs 1
        nc:
        nct> --source noisy --epochs 42 --init out/pretrain/denoised-seed0/epoch18.pth \
 --warmup_epochs 1 --denoised out/denoised --anchor 4
        nct:
        clean> --source clean --epochs 60
        clean: --noise none
        pixels:
        pixels_denoised: --denoised out/denoised
        probe.py report out""", "tiny")


def test_plan_is_what_commands_log_holds(tmp_path):
    images(tmp_path)
    command = str.split("--data data --noise gauss50 --preset tiny --out out")
    commands, _ = recorded(tmp_path, *command)
    log = (tmp_path / "out/commands.log").read_text().replace(f"{tmp_path}/", "")
    assert [shlex.split(line)[1:] for line in log.splitlines()] == [
        line.split() for line in commands]


def test_labels_images_and_flags_are_checked_before_anything_is_trained(tmp_path):
    stages(tmp_path, "tiny", *str.split("-- --lr 0.1 --anchor 3 --anchor_head live"))
    checks, others = called(tmp_path)
    lines = (tmp_path / "ran").read_text().replace(f"{tmp_path}/", "").splitlines()
    assert lines == checks + others
    labels, flags = map(parse, checks)
    shared = {"--data": "data", "--noise": "gauss50", "--preset": "tiny"}
    nct = {"--denoised": "out/denoised", "--anchor": "3", "--anchor_head": "live"}
    assert labels == ([], "probe.py check", shared)
    assert flags[1] == "pretrain.py check"
    assert flags[2].items() >= (shared | nct | {"--lr": "0.1"}).items()


@pytest.mark.parametrize("given", [["--range", "-1000,400"], ["--range=-1000,400"]])
def test_every_stage_gets_the_range_of_the_values(tmp_path, given):
    images(tmp_path)
    recorded(tmp_path, "--data", "data", "--preset", "tiny", "--out", "out", *given)
    lines = (tmp_path / "ran").read_text().splitlines()
    stages_of_images = [line for line in lines if "--data" in line]
    assert len(stages_of_images) > 10
    assert all(" --range=-1000,400" in line for line in stages_of_images)


def test_images_that_are_noisy_already_have_no_clean_arm(tmp_path):
    ran = stages(tmp_path, "tiny", noise="none")
    runs = {flags.get("--run") for _, _, flags in ran} - {None}
    arms = ("random", "noisy", "denoised", "nc", "nct")
    assert runs == {f"out/pretrain/{arm}-seed0" for arm in arms}


def test_denoised_images_of_ones_own_take_the_place_of_the_denoiser(tmp_path):
    ran = stages(tmp_path, "tiny", "--denoised", "mine", "--arms", "denoised nct")
    assert ran == plan("""
        denoised> --source denoised --denoised mine --epochs 60 --stop 18
        denoised> --source denoised --denoised mine --epochs 60
        denoised: --denoised mine
        nct> --source noisy --epochs 42 --init out/pretrain/denoised-seed0/epoch18.pth \
 --warmup_epochs 1 --denoised mine --anchor 4
        nct:
        pixels:
        pixels_denoised: --denoised mine
        probe.py report out""", "tiny")


def test_stride_is_the_denoisers(tmp_path):
    train, *others = stages(tmp_path, "tiny", "--arms", "nc", "--stride", "1,3")
    assert train[2]["--stride"] == "1,3"
    assert not any("--stride" in flags for _, _, flags in others)


def test_anchor_of_imagenet1k_is_the_finished_denoised_teacher(tmp_path):
    more = str.split("--denoised mine -- --epochs 9 --switch 3")
    ran = stages(tmp_path, "imagenet1k", "--arms", "nct", *more)
    assert ran == plan("""
        denoised> --source denoised --denoised mine --epochs 9 --stop 3
        denoised> --source denoised --denoised mine --epochs 9
        nct> --source noisy --epochs 6 --init out/pretrain/denoised-seed0/epoch3.pth \
 --warmup_epochs 5 --teacher_temp_warmup_epochs 15 --denoised mine --anchor 1 \
 --anchor_from out/pretrain/denoised-seed0
        nct:
        pixels:
        probe.py report out""", "imagenet1k")


def test_flags_after_the_dashes_reach_the_runs_that_they_are_for(tmp_path):
    """--epochs and --switch shape the arms, --anchor... is nct's, --init_backbone of the runs that
    begin with random weights, the rest for all."""
    more = str.split("--denoised mine -- --lr 0.1 --epochs=9 --switch 3 --anchor 2 --anchor_head "
                     "live --anchor_from=teacher.pth --rotate --init_backbone vit.pth --amp off")
    ran = stages(tmp_path, "tiny", "--arms", "random noisy nc nct clean", *more)
    expected = plan("""
        denoised> --source denoised --denoised mine --epochs 9 --stop 3 --init_backbone vit.pth
        random> --source noisy --epochs 0 --init_backbone vit.pth
        noisy> --source noisy --epochs 9 --init_backbone vit.pth
        nc> --source noisy --epochs 6 --init out/pretrain/denoised-seed0/epoch3.pth \
 --warmup_epochs 1
        nct> --source noisy --epochs 6 --init out/pretrain/denoised-seed0/epoch3.pth \
 --warmup_epochs 1 --denoised mine --anchor 2 --anchor_head live --anchor_from teacher.pth
        clean> --source clean --epochs 9 --init_backbone vit.pth""", "tiny")
    for _, _, flags in expected:
        flags |= {"--lr": "0.1", "--rotate": "", "--amp": "off"}
    assert [stage for stage in ran if stage[1] == "pretrain.py"] == expected


def test_flags_after_the_dashes_win_over_those_of_the_noisy_phase(tmp_path):
    ran = stages(tmp_path, "tiny", "--arms", "nc", "--", "--warmup_epochs", "0.5")
    nc = [flags for _, script, flags in ran if script == "pretrain.py"][-1]
    assert nc["--warmup_epochs"] == "0.5"


def test_every_probe_and_the_check_of_labels_get_the_shots(tmp_path):
    ran = stages(tmp_path, "tiny", "--arms", "noisy denoised", "--shots", "5,10")
    probed = [flags for _, script, flags in ran if script == "probe.py"]
    assert [flags["--shots"] for flags in probed] == ["5,10"] * 4  # two arms, pixels of each
    labels, _ = map(parse, called(tmp_path)[0])
    assert labels[1:] == ("probe.py check", {"--data": "data", "--noise": "gauss50",
                                             "--preset": "tiny", "--shots": "5,10"})


def test_every_probe_and_the_check_get_the_size_of_the_images(tmp_path):
    ran = stages(tmp_path, "tiny", "--arms", "noisy denoised", "--img_size", "32",
                 "--", "--patch_size", "16")
    probed = [flags for _, script, flags in ran if script == "probe.py"]
    assert [(flags["--img_size"], flags["--resize"]) for flags in probed] == [("32", "32")] * 4
    trained = [flags for _, script, flags in ran if script == "pretrain.py"]
    assert {flags["--patch_size"] for flags in trained} == {"16"}
    checked = parse(called(tmp_path)[0][0])[2]
    assert checked.items() >= {"--img_size": "32", "--resize": "32", "--patch_size": "16"}.items()


@pytest.mark.parametrize("zero", ["0", "0.0"])
def test_anchor_0_makes_nct_the_run_that_nc_is(tmp_path, zero):
    ran = stages(tmp_path, "imagenet1k", "--arms", "nc nct", "--", "--anchor", zero)
    runs = [flags for _, script, flags in ran if script == "pretrain.py"]
    nc, nct = runs[1], runs[-1]
    assert nc.pop("--out") == "out/pretrain/nc-seed0"
    assert nct.pop("--out") == "out/pretrain/nct-seed0"
    assert nc == nct


def test_each_seed_is_a_run_of_its_own_and_each_gpu_a_process(tmp_path):
    more = str.split("--denoised mine --gpus 2 --seeds")
    ran = stages(tmp_path, "tiny", "--arms", "nc", *more, "0 3")
    launch = str.split("-m torch.distributed.run --standalone --nproc_per_node 2 --")
    expected = []
    for seed in (0, 3):
        init = f"out/pretrain/denoised-seed{seed}/epoch18.pth"
        expected += plan(f"""
            denoised> --source denoised --denoised mine --epochs 60 --stop 18
            nc> --source noisy --epochs 42 --init {init} --warmup_epochs 1
            nc:""", "tiny", seed=seed, launch=launch)
    expected += plan("""
        pixels:
        probe.py report out""", "tiny", launch=launch)
    assert ran == expected


# ==== presets =====================================================================================
def nct_flags(folder, preset, noise):
    """Flags of the first phase and of nct."""
    ran = stages(folder, preset, "--arms", "nct", "--denoised", "mine", noise=noise)
    runs = [flags for _, script, flags in ran if script == "pretrain.py"]
    return runs[0], runs[-1]


@pytest.mark.parametrize("preset, first_phase, warmup, temp_warmup", [
    ("demo", 8, "1", None),
    ("tiny", 18, "1", None),
    ("imagenet100", 140, None, None),  # the paper's, as the next one
    ("imagenet1k", 30, "5", "15"),
])
def test_preset_sets_the_length_of_both_phases_and_the_warm_ups_of_the_noisy_one(
        tmp_path, preset, first_phase, warmup, temp_warmup):
    epochs = pretrain.PRESETS[preset]["epochs"]
    first, nct = nct_flags(tmp_path, preset, "gauss100")
    assert first["--epochs"] == str(epochs)
    assert first["--stop"] == str(first_phase)
    assert nct["--epochs"] == str(epochs - first_phase)
    assert nct.get("--warmup_epochs") == warmup
    assert nct.get("--teacher_temp_warmup_epochs") == temp_warmup
    assert "--warmup_epochs" not in first and "--teacher_temp_warmup_epochs" not in first


@pytest.mark.parametrize("images, epochs, switch", [(1000, 256, 76), (4000, 64, 19), (50000, 20, 6)])
def test_small_trains_4000_steps_and_at_least_20_epochs(tmp_path, monkeypatch, images, epochs, switch):
    monkeypatch.setenv("IMAGES", str(images))
    first, nct = nct_flags(tmp_path, "small", "none")
    assert (first["--epochs"], first["--stop"]) == (str(epochs), str(switch))
    assert nct["--epochs"] == str(epochs - switch)


@pytest.mark.parametrize("preset, noise, weight", [  # METHOD.md, table of the paper
    ("imagenet100", "gauss100", "4"),
    ("imagenet100", "gauss255", "1.1"),
    ("imagenet100", "shot1", "5"),
    ("imagenet100", "speckle1.0", "2"),
    ("imagenet100", "rician60", "1"),
    ("imagenet1k", "gauss100", "2"),
    ("imagenet1k", "gauss255", "1.6"),
    ("imagenet1k", "shot1", "1"),
])
def test_weight_of_the_anchor_is_the_papers_of_the_preset_and_the_noise(
        tmp_path, preset, noise, weight):
    assert nct_flags(tmp_path, preset, noise)[1]["--anchor"] == weight


@pytest.mark.parametrize("preset", denoise.PRESETS)
def test_denoiser_is_trained_by_as_many_processes_as_divide_its_batch(tmp_path, preset):
    usual = denoise.TRAIN_FLAGS["batch_size"][0]
    batch = denoise.PRESETS[preset].get("batch_size", usual)
    for gpus, processes in ((64, batch), (3, 2), (2, 2)):
        folder = tmp_path / str(gpus)
        folder.mkdir()
        train, apply, *_ = stages(folder, preset, "--arms", "denoised", "--gpus", str(gpus))
        assert train[0][-2] == str(processes)
        assert apply[0][-2] == str(gpus)


def test_demonstration_makes_its_images_and_runs_every_arm_on_them(tmp_path):
    images(tmp_path / "runs/demo")
    commands, _ = recorded(tmp_path)
    assert commands[0] == "tests/shapes.py runs/demo/data"
    ran = [parse(line)[1:] for line in commands[1:]]
    assert len(ran) == 18
    for script, flags in ran[:-1]:  # but the report
        assert flags["--data"] == "runs/demo/data" and flags["--preset"] == "demo"
        clean = flags["--out"] == "runs/demo/probe/clean-seed0.json"
        assert flags["--noise"] == ("none" if clean else "gauss100"), script
    runs = [flags["--out"] for script, flags in ran if script == "pretrain.py"]
    arms = ("denoised", "random", "noisy", "denoised", "nc", "nct", "clean")
    assert runs == [f"runs/demo/pretrain/{arm}-seed0" for arm in arms]


# ==== what else run.sh does =======================================================================
def test_images_in_which_the_check_finds_no_classes_have_no_probes(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
    flags = str.split("--data data --preset tiny --out out --arms noisy")
    no_labels = f'case "$*" in *"probe.py check"*) exit {probe.NO_TARGETS} ;; esac'
    commands, text = recorded(tmp_path, *flags, more=no_labels)
    assert [parse(line)[1] for line in commands] == ["pretrain.py", "probe.py report out"]
    assert "no train/<class>/ and val/<class>/, and no masks/, in data: pretraining without probes" in text


def test_time_that_is_left_is_told_once_a_pretraining_took_some(tmp_path):
    (tmp_path / "data").mkdir()
    flags = str.split("--data data --preset tiny --out out --seeds")
    sleep = 'case "$*" in *"--seed 1"*) sleep 5 ;; esac'
    _, text = recorded(tmp_path, *flags, "0 1 2", "--arms", "noisy", more=sleep)
    assert text.splitlines()[2:] == [  # after the checks
        "== 1/4 pretraining noisy, seed 0 ==",
        "== 2/4 pretraining noisy, seed 1 (the last took 0 min 0 s) ==",
        "== 3/4 pretraining noisy, seed 2 (the last took 0 min 5 s, about 1 min left) ==",
        "== 4/4 report (the last took 0 min 0 s, about 1 min left) =="]


def test_two_of_the_same_command_run_one_after_the_other(tmp_path):
    """A process that a killed run left behind may still be writing."""
    for folder in ("data", "out"):
        (tmp_path / folder).mkdir()
    command, env = recorder(tmp_path)
    command += str.split("--data data --preset tiny --out out --arms noisy")
    lock = os.open(tmp_path / "out/.lock", os.O_CREAT | os.O_WRONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with subprocess.Popen(command, env=env, cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE) as process:
        seen = [process.stdout.readline() for _ in range(3)][1:]  # after the checks
        before = called(tmp_path)[1]
        os.close(lock)  # which frees it
        after = process.stdout.read()
    assert seen[1] == "waiting for another run in out\n" and before == []
    assert "pretraining noisy" in after and len(called(tmp_path)[1]) == 2  # with the report
    assert process.returncode == 0


@pytest.mark.parametrize("code", [1, 2, 75])
def test_stage_that_fails_ends_the_chain_with_its_code(tmp_path, code):
    (tmp_path / "data").mkdir()
    command, env = recorder(tmp_path, more=f'case "$*" in *--seed*) exit {code} ;; esac')
    command += str.split("--data data --preset tiny --out out --seeds")
    done = subprocess.run([*command, "0 1", "--arms", "noisy"], env=env, cwd=tmp_path)
    assert done.returncode == code and len(called(tmp_path)[1]) == 1


USUAL = "glibc.malloc.hugetlb=1"
OWN = "glibc.malloc.perturb=0"


@pytest.mark.parametrize("own, shared", [(None, USUAL), (OWN, OWN)])
def test_pretraining_alone_keeps_freed_memory_and_a_users_own_settings_stay(
        tmp_path, monkeypatch, own, shared):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    record = '[ "$2" = check ] || echo "$(basename "$1") $GLIBC_TUNABLES" >>"HERE/tunables"'
    stages(tmp_path, "tiny", "--arms", "nc", more=record)
    kept = f"{shared}:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
    assert {*(tmp_path / "tunables").read_text().splitlines()} == {
        f"denoise.py {shared}", f"pretrain.py {kept}", f"probe.py {shared}"}


# ==== shapes.py ===================================================================================
def test_shapes_are_the_same_bits_each_time_and_balanced(tmp_path):
    made = []
    for name in ("a", "b"):
        shapes.write(tmp_path / name, 25, 13, size=32)
        found = contents(tmp_path / name)
        made.append({p.relative_to(tmp_path / name): v[1] for p, v in found.items()})
    first, second = made
    pictures = {path: bits for path, bits in first.items() if path.parts[0] != "masks"}
    assert first == second and len(pictures) == len({*pictures.values()}) == 38
    assert {Path("masks", path) for path in pictures} == first.keys() - pictures.keys()
    for split, total in (("train", 25), ("val", 13)):
        counts = [len([*(tmp_path / "a" / split / k).iterdir()]) for k in shapes.CLASSES]
        assert len(counts) == 10 and sum(counts) == total
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("k", range(10))
def test_mask_of_a_shape_tells_figure_from_ground(k):
    """Both are flat but for shading of at most 15 levels; their contrast is 65 or more."""
    picture, mask = shapes.draw(k, "val", 3)
    assert {*np.unique(mask)} == {0, k + 1}
    grey = picture @ shapes.LUMA
    figure, ground = grey[mask == k + 1], grey[mask == 0]
    middle = (np.median(figure) + np.median(ground)) / 2
    right = ((grey > middle) == (mask > 0)).mean()
    assert max(right, 1 - right) > 0.95


def mean_colours(split):
    """Of 50 pictures a class: (class, picture, RGB)."""
    return np.array([[shapes.image(k, split, i, size=32).mean((0, 1)) for i in range(50)]
                     for k in range(10)])


def test_mean_colour_of_a_shape_is_no_clue_to_its_class():
    """Nearest class mean colour, 50 training and 50 other pictures a class: chance is 10 %."""
    train, val = map(mean_colours, shapes.SPLITS)
    distances = np.linalg.norm(val[:, :, None] - train.mean(1), axis=-1)
    nearest = distances.argmin(-1)
    assert (nearest == np.arange(10)[:, None]).mean() < 0.2


def test_shapes_refuse_a_folder_with_other_things(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    script = str(ROOT / "tests/shapes.py")
    command = [sys.executable, script, str(tmp_path), "--train", "10", "--val", "10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error:")
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
