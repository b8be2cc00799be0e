"""run.sh from end to end, as a user calls it: bad input, a tiny chain, the same chain again, and a chain that a signal
interrupts; and shapes.py, the demonstration data."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import shapes
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
ARMS = ["--noise", "gauss50", "--preset", "demo", "--arms", "noisy nct"]
TINY = str.split("--device cpu --workers 1 --log_steps 1 --epochs 4 --switch 2 --arch 16,2,2 --head_hidden 16 "
                 "--head_bottleneck 8 --prototypes 16 --patch_size 8 --global_size 32 --local_size 16 --batch_size 8")


def environment(tmp_path):
    """python3 is the Python of these tests."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    if not (folder / "python3").exists():
        (folder / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (folder / "python3").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def bash(tmp_path, *flags):
    return subprocess.run(["bash", str(ROOT / "run.sh"), *map(str, flags)], env=environment(tmp_path), cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)


def files(folder):
    return {p.relative_to(folder): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    shapes.write(root, 40, 20, size=32)
    return root


# ======================================================================================================
# bad input
# ======================================================================================================

def no_image(data):
    for p in data.rglob("*.png"):
        p.unlink()


def corrupt(data):
    (data / "train/dots/0001.png").write_bytes(b"no picture")


def unknown_class(data):
    (data / "val/rings").rename(data / "val/circles")


@pytest.mark.parametrize("flags, spoil, message", [
    (["--nose", "gauss100"], None, "unknown argument --nose"),
    (["--noise"], None, "--noise needs a value"),
    (["--", "--epochs", "3", "--seed", "1"], None, "-- --seed: differs from run to run; use --arms, --seeds"),
    (["--", "--curriculum=noisy:3"], None, "-- --curriculum=noisy:3: differs from run to run"),
    (["--", "--noise_seed", "1"], None, "-- --noise_seed: is for all stages"),
    (["--noise", "gaus100"], None, "--noise gaus100: unknown noise"),
    (["--data", "nowhere"], None, "--data nowhere: no such folder"),
    ([], no_image, "no images found"),
    ([], corrupt, "0001.png: not a readable image"),
    ([], unknown_class, "circles: class unknown to train"),
    (["--gpus", "2"], None, "--gpus 2: this machine has"),
    (["--arms", "foo"], None, "--arms foo: unknown"),
    (["--noise", "none", "--arms", "clean"], None, "--arms clean: with --noise none")])
def test_bad_input_ends_with_one_line_and_writes_nothing(data, tmp_path, flags, spoil, message):
    if flags[:1] == ["--gpus"] and torch.cuda.device_count() > 1:
        pytest.skip("has the GPUs")
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept.txt").write_text("kept")
    if spoil:
        spoil(tmp_path / "data")
    before = files(tmp_path / "out"), files(tmp_path / "data")
    done = bash(tmp_path, "--data", "data", "--out", "out", *flags)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert (files(tmp_path / "out"), files(tmp_path / "data")) == before


# ======================================================================================================
# the chain
# ======================================================================================================

@pytest.fixture(scope="module")
def chain(data, tmp_path_factory):
    """(flags, its output, folder) of an undisturbed chain."""
    out = tmp_path_factory.mktemp("chain") / "out"
    flags = ["--data", data, *ARMS, "--out", out, "--", *TINY]
    done = bash(out.parent, *flags)
    assert done.returncode == 0, done.stderr
    return flags, done, out


def figures(out):
    """What the probes measured, by run."""
    results = json.loads((out / "results.json").read_text())
    return {run: {k: r[k] for k in ("linear", "knn", "map", "clean_linear", "sweep")}
            for arm in results.values() for run, r in arm.items()}


def test_chain_prints_the_table_and_leaves_report_and_pictures(chain):
    _, done, out = chain
    found = figures(out)
    assert found.keys() == {"noisy-seed0", "nct-seed0"}
    report = (out / "results.md").read_text()
    for run, r in found.items():
        shown = (r["linear"], r["clean_linear"], r["knn"]["20"])
        line = " | ".join([f"| {run.removesuffix('-seed0')} | 1", *(f"{v:.1f}" for v in shown)])
        assert line in done.stdout and line in report
    for name in ("samples", "features", "robustness", "curves"):
        assert f"({name}.png)" in report
        with Image.open(out / f"{name}.png") as picture:
            assert np.asarray(picture).std() > 5  # something is drawn
    assert found["noisy-seed0"]["map"] != found["nct-seed0"]["map"]


def test_pictures_are_the_same_where_denoised_and_clean_are_the_only_arms(chain, tmp_path):
    """The clean arm's probe knows of no noise, but the pictures show it."""
    shutil.copytree(chain[2], out := tmp_path / "out")
    for source, arm, change in (("noisy", "clean", {"noise": "none"}), ("nct", "denoised", {"denoised": "there"})):
        result = json.loads((out / f"probe/{source}-seed0.json").read_text())
        result["config"] |= change
        (out / f"probe/{arm}-seed0.json").write_text(json.dumps(result))
        (out / f"probe/{source}-seed0.json").unlink()
        (out / f"pretrain/{source}-seed0").rename(out / f"pretrain/{arm}-seed0")
    (out / "samples.png").unlink()
    subprocess.run([sys.executable, ROOT / "probe.py", "report", out], check=True, cwd=chain[2].parent)
    assert (out / "samples.png").read_bytes() == (chain[2] / "samples.png").read_bytes()


def test_chain_trains_the_shared_first_phase_once(chain):
    _, done, out = chain
    assert done.stdout.count("--arm phase1") == 1
    steps = {r: json.loads((out / f"pretrain/{r}-seed0/summary.json").read_text())["steps"] for r in
             ("phase1", "noisy", "nct")}
    assert steps == {"phase1": 10, "noisy": 20, "nct": 20}
    logs = [(out / f"pretrain/{r}-seed0/log.jsonl").read_text() for r in ("phase1", "nct")]
    assert logs[0] and logs[1].startswith(logs[0])


def test_same_command_again_trains_nothing_and_reports_the_same(chain):
    flags, _, out = chain
    weights = {p: v for p, v in files(out).items() if p.suffix == ".pth"}
    assert len(weights) >= 7  # denoiser, three runs with two files each
    results = (out / "results.json").read_bytes()
    done = bash(out.parent, *flags)
    assert done.returncode == 0, done.stderr
    assert (out / "results.json").read_bytes() == results
    checkpoints = {p for p in weights if p.name == "checkpoint.pth"}
    now = files(out)
    assert {p for p in checkpoints if now[p][0] != weights[p][0]} == set()
    assert {p for p in weights if now[p][1] != weights[p][1]} == set()


def test_chain_that_a_signal_interrupted_goes_on_to_the_same_figures(chain, tmp_path):
    flags, _, undisturbed = chain
    out = tmp_path / "out"
    flags = [*flags[:flags.index("--out")], "--arms", "noisy", "--out", out, "--", *TINY]
    command = ["bash", str(ROOT / "run.sh"), *map(str, flags)]
    log = out / "pretrain/noisy-seed0/log.jsonl"
    with open(tmp_path / "output", "w") as output, subprocess.Popen(
            command, env=environment(tmp_path), cwd=tmp_path, stdout=output, stderr=output) as process:
        while process.poll() is None and not (log.exists() and '"step": 11' in log.read_text()):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, (tmp_path / "output").read_text()
    assert "saved; the same command goes on" in (tmp_path / "output").read_text()
    assert not (log.parent / "backbone.pth").exists() and not (out / "results.json").exists()
    done = bash(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert figures(out)["noisy-seed0"] == figures(undisturbed)["noisy-seed0"]


def test_flat_folder_without_classes_is_pretrained_without_probes(data, tmp_path):
    (tmp_path / "flat").mkdir()
    for i, path in enumerate(sorted(data.glob("train/*/*.png"))[:16]):
        shutil.copy(path, tmp_path / f"flat/{i}.png")
    done = bash(tmp_path, "--data", "flat", "--preset", "demo", "--arms", "noisy", "--out", "out", "--", *TINY)
    assert done.returncode == 0, done.stderr
    assert "pretraining without probes" in done.stdout and not (tmp_path / "out/probe").exists()
    assert json.loads((tmp_path / "out/pretrain/noisy-seed0/summary.json").read_text())["steps"] == 8
    weights = torch.load(tmp_path / "out/pretrain/noisy-seed0/backbone.pth", weights_only=True)
    assert weights["patch_embed.proj.weight"].shape == (16, 3, 8, 8)


# ======================================================================================================
# the test command
# ======================================================================================================

WHOLE = "-m pytest --cov --cov-report=term-missing --cov-fail-under=90"


def recorded(tmp_path, *flags, lacks="nothing"):
    """What a copy of run.sh calls python3 for: one that does nothing, has every package but one, and two GPUs."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(f"""#!/bin/sh
case " $* " in
  *" -c "*device_count*) echo 2; exit 0 ;;
  *" -c "*" {lacks} "*) exit 1 ;;
  *" -c "* | *" pip --version "*) exit 0 ;;
  *" venv "*) mkdir -p "{tmp_path}/.venv/bin"; cp "$0" "{tmp_path}/.venv/bin/python" ;;
esac
echo "$*" >>"{tmp_path}/ran"
echo "$(basename "$1") $GLIBC_TUNABLES" >>"{tmp_path}/tunables"
""")
    (tmp_path / "bin/python3").chmod(0o755)
    done = subprocess.run(["bash", str(tmp_path / "run.sh"), *flags], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    return (tmp_path / "ran").read_text().replace(f"{tmp_path}/", "").splitlines()


@pytest.mark.parametrize("lacks, flags, ran", [
    ("nothing", [], [WHOLE]),
    ("nothing", ["-k", "noise"], ["-m pytest -k noise"]),  # a part of the suite: no figure
    ("pytest_cov", [], ["-m pytest"]),
    ("pytest", [], ["-m venv --system-site-packages .venv", "-m pip install -q pytest pytest-cov", WHOLE])])
def test_test_command_measures_coverage_and_installs_only_into_an_environment_of_its_own(tmp_path, lacks, flags, ran):
    assert recorded(tmp_path, "test", *flags, lacks=lacks) == ran


# ======================================================================================================
# what each arm is
# ======================================================================================================

def calls(tmp_path, *flags):
    """Stages of a chain on data/ into out/, as run.sh calls them."""
    for folder in ("data/train", "data/val", "out/denoiser"):
        (tmp_path / folder).mkdir(parents=True)
    return recorded(tmp_path, "--data", "data", "--noise", "gauss50", "--out", "out", *flags)


def pretraining(arm, flags, seed=0, base="--data data --noise gauss50 --preset tiny"):
    return f"pretrain.py {base} --arm {arm} --seed {seed} --out out/pretrain/{arm}-seed{seed}{flags} --epochs 9"


def probing(arm, flags="", seed=0, base="--data data --noise gauss50 --preset tiny"):
    return f"probe.py {base} --run out/pretrain/{arm}-seed{seed} --out out/probe/{arm}-seed{seed}.json{flags}"


def test_every_arm_is_pretrained_and_probed_on_the_images_of_its_kind(tmp_path):
    """Clean images for the upper bound, denoised ones and a denoiser for the arm that keeps it, noisy for the rest."""
    base, seen = "--data data --noise gauss50 --preset tiny", " --denoised out/denoised"
    fork = f"{seen} --fork out/pretrain/phase1-seed0/checkpoint.pth"
    assert calls(tmp_path, "--preset", "tiny", "--", "--epochs", "9") == [
        f"probe.py check {base} --run none --out none",
        f"denoise.py train {base} --out out/denoiser",
        f"denoise.py apply {base} --denoiser out/denoiser --out out/denoised",
        pretraining("phase1", seen),
        pretraining("random", ""), probing("random"),
        pretraining("noisy", ""), probing("noisy"),
        pretraining("denoised", fork), probing("denoised", f"{seen} --denoiser out/denoiser"),
        pretraining("nc", fork), probing("nc"),
        pretraining("nct", fork), probing("nct"),
        pretraining("clean", ""), probing("clean", " --noise none"),
        "probe.py report out"]


def test_anchor_of_imagenet1k_is_the_finished_denoised_teacher(tmp_path):
    ran = calls(tmp_path, "--preset", "imagenet1k", "--arms", "nct", "--denoised", "mine", "--", "--epochs", "9")
    base, fork = "--data data --noise gauss50 --preset imagenet1k", " --fork out/pretrain/phase1-seed0/checkpoint.pth"
    anchor = " --anchor_from out/pretrain/denoised-seed0/checkpoint.pth"
    assert ran[1:] == [pretraining("phase1", " --denoised mine", base=base),
                       pretraining("denoised", " --denoised mine" + fork, base=base),
                       pretraining("nct", " --denoised mine" + fork + anchor, base=base),
                       probing("nct", base=base), "probe.py report out"]


def test_each_seed_is_a_run_of_its_own_and_each_gpu_a_process(tmp_path):
    ran = calls(tmp_path, "--preset", "tiny", "--arms", "noisy", "--seeds", "0 3", "--gpus", "2", "--", "--epochs", "9")
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 -- "
    assert ran[1:-1] == [launch + pretraining("noisy", ""), launch + probing("noisy"),
                         launch + pretraining("noisy", "", 3), launch + probing("noisy", seed=3)]


@pytest.mark.parametrize("own, shared", [(None, "glibc.malloc.hugetlb=1"), ("glibc.malloc.perturb=0",) * 2])
def test_pretraining_alone_keeps_freed_memory_and_a_users_own_settings_stay(tmp_path, monkeypatch, own, shared):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    calls(tmp_path, "--preset", "tiny", "--arms", "nc")
    kept = f"{shared}:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
    assert set((tmp_path / "tunables").read_text().splitlines()) == {
        f"denoise.py {shared}", f"pretrain.py {kept}", f"probe.py {shared}"}


# ======================================================================================================
# shapes.py
# ======================================================================================================

def test_shapes_are_the_same_bits_each_time_and_balanced(tmp_path):
    for name in ("a", "b"):
        shapes.write(tmp_path / name, 25, 13, size=32)
    first, second = ({p: v[1] for p, v in files(tmp_path / n).items()} for n in ("a", "b"))
    assert first == second and len(first) == len(set(first.values())) == 38
    for split, total in (("train", 25), ("val", 13)):
        counts = [len(list((tmp_path / "a" / split / c).iterdir())) for c in shapes.CLASSES]
        assert len(counts) == 10 and sum(counts) == total and max(counts) - min(counts) <= 1


def test_mean_colour_of_a_shape_is_no_clue_to_its_class():
    """Nearest class mean colour, 50 training and 50 other pictures a class: chance is 10 %."""
    train, val = (np.array([[shapes.image(c, split, i, size=32).mean((0, 1)) for i in range(50)] for c in range(10)])
                  for split in shapes.SPLITS)  # (class, picture, RGB)
    nearest = np.linalg.norm(val[:, :, None] - train.mean(1), axis=-1).argmin(-1)
    assert (nearest == np.arange(10)[:, None]).mean() < 0.2


def test_shapes_refuse_a_folder_with_other_things(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    command = [sys.executable, str(ROOT / "tests/shapes.py"), str(tmp_path), "--train", "10", "--val", "10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error:") and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
