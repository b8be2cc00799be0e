"""pretrain.py held to the paper: losses recomputed by plain calls, runs compared to the bit, runs
stopped and continued. Networks of 16 features on 24 images of 32 x 32."""

import copy
import functools
import itertools
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import pretrain
from common import UserError

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
RUNNING = "--preset tiny --device cpu --amp off --workers 0 --log_steps 1 --noise gauss50 --seed 0"
MODEL = """--arch 16,2,2 --patch_size 8 --layer_scale 1 --prototypes 16 --head_hidden 16
    --head_bottleneck 8 --global_size 32 --local_size 16 --local_crops 2"""
TRAINING = """--batch_size 8 --lr 0.02 --layer_decay 0.9 --patch_embed_lr 0.2 --warmup_epochs 0
    --momentum 0.9 --teacher_temp 0.07 --teacher_temp_warmup_epochs 1 --ibot_weight 0.5
    --centering center"""
TINY = f"{RUNNING} {MODEL} {TRAINING}".split()
STEPS = 3  # an epoch
WEIGHT = 2.0  # of the anchor
FEW_CORES = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")


# ==== images, runs and what they leave ============================================================
def write_images(folder, sizes, channels=3, seed=0):
    """Smooth random pictures, train/NN.png or, for 5 channels, .npy."""
    rng = np.random.default_rng(seed)
    (folder / "train").mkdir(parents=True)
    for i, (height, width) in enumerate(sizes):
        y, x = np.mgrid[:height, :width][..., None]
        wave, level, phase = rng.uniform(0.1, 0.6, (3, channels))
        picture = 127 + 120 * level * np.sin(wave * x + phase * y + 9 * level)
        picture = np.rint(picture).astype(np.uint8)
        file = folder / f"train/{i:02d}"
        if channels == 5:
            np.save(file.with_suffix(".npy"), picture)
        else:
            Image.fromarray(picture.squeeze()).save(file.with_suffix(".png"))
    return folder


class Images:
    """A folder of images and one that passes for its denoised copy; the flags of runs on them."""
    def __init__(self, root, sizes, channels=3):
        self.data = write_images(root / "data", sizes, channels)
        self.copy = write_images(root / "denoised", sizes, channels, seed=1)
        data, denoised = ["--data", str(self.data)], ["--denoised", str(self.copy)]
        self.noisy = [*data, "--source", "noisy"]
        self.clean = [*data, "--source", "clean"]
        self.denoised = [*data, "--source", "denoised", *denoised]
        self.anchored = [*self.noisy, *denoised, "--anchor", str(WEIGHT)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return Images(tmp_path_factory.mktemp("images"), [(32, 32)] * 24)


def call(out, *flags):
    """Run pretrain.py in this process; gives its exit code."""
    argv = ["pretrain.py", *TINY, "--out", out, *flags]
    with mock.patch.object(sys, "argv", [str(word) for word in argv]):
        return pretrain.main() or 0


def train(out, *flags):
    """Run pretrain.py to its end; gives the checkpoint."""
    assert call(out, *flags) == 0
    return common.load_checkpoint(out / "checkpoint.pth")


def config(*flags):
    return pretrain.read_config([*TINY, "--out", "none", *map(str, flags)])


def backbone_of(out):
    return torch.load(out / "backbone.pth", weights_only=True)


def log(out):
    """Records of a run's log without what the clock wrote."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_s")
    return [{k: v for k, v in r.items() if k not in clock} for r in records]


def leaves(value, name=""):
    """{name: tensor or number} of nested dicts, lists and tuples."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    found = {}
    for key, part in items:
        found |= leaves(part, f"{name}/{key}")
    return found


def differences(a, b):
    """Names of all entries of two nested states whose bits differ, but for flags and wall time."""
    a, b = leaves(a), leaves(b)
    different = []
    for name in sorted(a.keys() | b.keys()):
        x, y = a.get(name), b.get(name)
        tensors = torch.is_tensor(x) and torch.is_tensor(y)
        same = torch.equal(x, y) if tensors else x == y
        aside = name.startswith("/config/") or name == "/position/2"
        if not (same or aside):
            different.append(name)
    return different


def part_of(state, prefix):
    """The entries of a state dict below a prefix, which is cut off."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def networks(run):
    """A copy of a run's student, teacher and, where there is one, anchor."""
    names = [name for name in ("student", "teacher", "anchor") if name in run.parts]
    return copy.deepcopy(run.state(names))


@pytest.fixture
def steps(monkeypatch):
    """Watch every step of runs: `before(run)` is called ahead of its losses, `after(run, values)`
    when it is done. Both may be replaced."""
    watch = SimpleNamespace(before=lambda run: None, after=lambda run, values: None)
    step_losses, update = pretrain.step_losses, pretrain.Run.update

    def watched_losses(args, run, *rest):
        watch.before(run)
        return step_losses(args, run, *rest)

    def watched_update(run, loss, values):
        update(run, loss, values)
        watch.after(run, values)

    monkeypatch.setattr(pretrain, "step_losses", watched_losses)
    monkeypatch.setattr(pretrain.Run, "update", watched_update)
    return watch


@pytest.fixture
def interrupt(steps):
    """interrupt(step, out, *flags): a run that a signal stops in that step, counted from 1."""
    def run(step, out, *flags, kind=signal.SIGTERM):
        count = itertools.count(1)

        def after(run, values):
            if next(count) == step:
                os.kill(os.getpid(), kind)

        steps.after = after
        assert call(out, *flags) == 75
        steps.after = lambda run, values: None

    return run


# undisturbed runs that many tests compare with; drop path makes them draw on the device, too
DENOISED = ["--epochs", 3, "--drop_path", 0.1]
NOISY = ["--epochs", 2, "--drop_path", 0.1]


class Finished:
    """A run, its flags and its checkpoint."""
    def __init__(self, out, *flags):
        self.out, self.flags = out, flags
        self.state = train(out, *flags)
        self.teacher, self.student = self.state["teacher"], self.state["student"]


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """The curriculum: `denoised`, whole; `first`, that run stopped after an epoch; `nc` and `nct`
    start from it."""
    root = tmp_path_factory.mktemp("runs")
    init = ["--init", root / "first/epoch1.pth"]
    return SimpleNamespace(
        root=root, init=init,
        denoised=Finished(root / "denoised", *images.denoised, *DENOISED),
        first=Finished(root / "first", *images.denoised, *DENOISED, "--stop", 1),
        nc=Finished(root / "nc", *images.noisy, *NOISY, *init),
        nct=Finished(root / "nct", *images.anchored, *NOISY, *init))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


# ==== presets and flags ===========================================================================
PAPER = {
    "patch_size": 16, "registers": 0, "layer_scale": 1e-5, "prototypes": 65536,
    "head_hidden": 2048, "head_bottleneck": 256, "global_size": 224, "local_size": 96,
    "local_crops": 8, "global_scale": [0.32, 1], "local_scale": [0.05, 0.32], "lr": 0.004,
    "warmup_epochs": 10, "weight_decay": [0.04, 0.4], "layer_decay": 0.9, "patch_embed_lr": 0.2,
    "clip": 3.0, "freeze_last_epochs": 1, "momentum": 0.992, "teacher_temp": 0.07,
    "teacher_temp_warmup_epochs": 30, "centering": "center", "ibot_weight": 1.0,
    "koleo_weight": 0.1, "anchor": 0, "anchor_head": "frozen", "stop": 0,
}


@pytest.mark.parametrize("preset, own", [
    ("imagenet100", {"arch": "vit_small", "epochs": 200, "batch_size": 40, "drop_path": 0.0}),
    ("imagenet1k", {"arch": "vit_base", "epochs": 100, "batch_size": 512, "drop_path": 0.1}),
])
def test_presets_hold_the_papers_numbers(preset, own):
    args = vars(pretrain.read_config(["--preset", preset, "--data", "d", "--out", "o"]))
    expected = PAPER | own
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("flags, message", [
    # contradictions
    ("--source clean --noise none", "--source clean: with --noise none no clean images are known"),
    ("--source denoised", "need --denoised DIR"),
    ("--anchor 1 --init i", "need --denoised DIR"),
    ("--anchor 1 --denoised d", "--anchor: needs a denoised teacher, of --init or of --anchor_"),
    ("--source denoised --denoised d --anchor 1 --init i", "--anchor: is for --source noisy"),
    ("--source clean --denoised d --anchor 1 --init i", "--anchor: is for --source noisy"),
    ("--init i --init_backbone b", "--init and --init_backbone: give one of them"),
    ("--epochs 3 --stop 4", "--stop 4: is beyond --epochs 3"),
    ("--epochs 0 --stop 1", "--stop 1: is beyond --epochs 0"),
    ("--momentum 1.1", "--momentum 1.1: must be at most 1"),
    ("--drop_path 1", "--drop_path 1.0: must be below 1"),
    ("--global_size 30", "--global_size: is no multiple of --patch_size 8"),
    ("--local_size 12", "--local_size: is no multiple of --patch_size 8"),
    ("--global_scale 1,0.3", "--global_scale: must be two numbers, the smaller one first"),
    ("--local_scale 0.3", "--local_scale: must be two numbers, the smaller one first"),
    ("--weight_decay 0.4,0.04", "--weight_decay: must be two numbers, the smaller one first"),
    # what would have no effect
    ("--denoised d", "--denoised: has no effect on --source noisy without --anchor"),
    ("--source clean --denoised d", "--denoised: has no effect on --source clean"),
    ("--anchor_from a", "--anchor_from and --anchor_head: have no effect without --anchor"),
    ("--anchor_head live", "--anchor_from and --anchor_head: have no effect without --anchor"),
    # values
    ("--batch_size 0", "--batch_size 0: must be more than 0"),
    ("--lr -1", "--lr -1.0: must be more than 0"),
    ("--anchor -1", "--anchor -1.0: must be at least 0"),
    ("--source blurred", "--source: invalid choice: 'blurred'"),
    ("--curriculum noisy:1", "unrecognized arguments: --curriculum noisy:1"),
])
def test_flags_that_contradict_or_do_nothing_are_named(flags, message):
    with pytest.raises(UserError) as error:
        config("--data", "d", *flags.split())
    assert message in str(error.value)


@pytest.mark.parametrize("flags", [
    "--source noisy --noise none",
    "--source clean",
    "--source denoised --denoised d --epochs 3 --stop 3",
    "--denoised d --anchor 1 --init i",
    "--denoised d --anchor 1 --init_backbone b --anchor_from a --anchor_head live",
    "--anchor 0 --init i",
])
def test_flags_that_make_sense_are_taken(flags):
    config("--data", "d", *flags.split())


# ==== schedules ===================================================================================
def schedule(flags, steps, batch, *numbers):
    """schedules() at some steps of a run with `steps` an epoch."""
    args = pretrain.read_config(["--data", "d", "--out", "o", *flags.split()])
    return [pretrain.schedules(args, number, steps, batch) for number in numbers]


LATER_1K = "--preset imagenet1k --epochs 70 --warmup_epochs 5 --teacher_temp_warmup_epochs 15"


@pytest.mark.parametrize("flags, steps, batch, expected", [
    # epoch: rate, weight decay, momentum, temperature; from the paper's formulas, by hand
    ("--preset imagenet100", 1250, 40, {
        0: (0, 0.04, 0.992, 0.04),
        5: (0.0003953163, 0.04055488, 0.9920123, 0.04500013),
        10: (0.0007905694, 0.0422161, 0.9920492, 0.05000027),
        105: (0.0003957847, 0.2341226, 0.9963138, 0.07),
        139: (0.0001853519, 0.3235009, 0.9983, 0.07)}),
    ("--preset imagenet100 --epochs 60", 1250, 40, {
        0: (0, 0.04, 0.992, 0.04),
        5: (0.0003953163, 0.04613335, 0.9921363, 0.04500013),
        10: (0.0007905694, 0.06411543, 0.9925359, 0.05000027),
        35: (0.0003957847, 0.2665874, 0.9970353, 0.07),
        59: (1.779017e-06, 0.3997533, 0.9999945, 0.07)}),
    ("--preset imagenet1k", 2500, 512, {
        0: (0, 0.04, 0.992, 0.04),
        5: (0.00141427, 0.0422161, 0.9920492, 0.04500007),
        10: (0.002828427, 0.04880983, 0.9921958, 0.05000013),
        29: (0.002528735, 0.1096767, 0.9935484, 0.06900039),
        99: (1.861196e-06, 0.3999112, 0.999998, 0.07)}),
    (LATER_1K, 2500, 512, {
        0: (0, 0.04, 0.992, 0.04),
        3: (0.001697192, 0.04162904, 0.9920362, 0.04600016),
        5: (0.002828427, 0.04451298, 0.9921003, 0.05000027),
        15: (0.002666495, 0.07927033, 0.9928727, 0.07),
        69: (2.650897e-06, 0.3998188, 0.999996, 0.07)}),
], ids=["imagenet100 first", "imagenet100 noisy", "imagenet1k first", "imagenet1k noisy"])
def test_schedules_have_the_papers_values(flags, steps, batch, expected):
    numbers = [epoch * steps for epoch in expected]
    for values, row in zip(schedule(flags, steps, batch, *numbers), expected.values(), strict=True):
        found = (values["lr"], values["weight_decay"], values["momentum"], values["temp"])
        assert found == pytest.approx(row, rel=1e-6)


def test_warm_ups_end_at_the_top_and_the_last_layer_is_frozen_for_an_epoch():
    """4 steps an epoch, warm-ups of 10 and 30 epochs, the rate's to 0.004 sqrt(256 / 1024)."""
    values = schedule("--preset imagenet1k", 4, 256, *range(400))
    rates = np.array([v["lr"] for v in values])
    temps = np.array([v["temp"] for v in values])
    frozen = np.array([v["frozen"] for v in values])
    np.testing.assert_allclose(rates[:40], np.linspace(0, 0.002, 40))
    np.testing.assert_allclose(temps[:120], np.linspace(0.04, 0.07, 120))
    assert rates[40] == rates.max()
    assert (np.diff(rates[40:]) < 0).all()
    assert (temps[120:] == 0.07).all()
    assert frozen.nonzero()[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("batch", [64, 1024, 4096])
def test_learning_rate_grows_with_the_root_of_the_batch(batch):
    top, = schedule("--preset imagenet1k", 4, batch, 40)
    assert top["lr"] == pytest.approx(0.004 * math.sqrt(batch / 1024))


# ==== losses of one step, against plain calls of the run's own networks ===========================
B = 4  # images of a step
MASKED = [0.5, 0, 0.3, 0, 0.4, 0, 0, 0.2]  # share of the patches of each global crop


def make_step(images, *flags, anchor=WEIGHT, seed=0):
    """A run whose networks and centres all differ, with the inputs of one step."""
    kind = [*images.anchored, "--anchor", anchor, "--init", "unused"] if anchor else images.noisy
    args = config(*kind, *flags)
    run = pretrain.Run(args, 3, CPU)
    gen = torch.Generator().manual_seed(seed)
    for network in (run.network, run.teacher, run.anchor):
        if network:
            for p in network.parameters():
                p.data += 0.2 * torch.randn(p.shape, generator=gen)
            for center in network.buffers():
                center += 0.05 * torch.randn(center.shape, generator=gen)
    crops = {"noisy": [torch.randn(2 * B, 3, size, size, generator=gen) for size in (32, 16)],
             "denoised": [torch.randn(2 * B, 3, 32, 32, generator=gen)]}
    masks = torch.rand(2 * B, 16, generator=gen) < torch.tensor(MASKED)[:, None]
    data = {"masks": masks, "picked": masks.flatten().nonzero()[:, 0]}
    return SimpleNamespace(args=args, run=run, crops=crops, masks=masks, data=data)


def losses_of(step, keep=(None, None)):
    return pretrain.step_losses(step.args, step.run, step.crops, step.data, 0.05, keep)


@torch.no_grad()
def plain_targets(backbone, head, teacher, crops):
    """Probabilities of class tokens (2, B, K) and of all patches (2B, N, K) of unmasked crops."""
    tokens = backbone.forward_features(crops)
    cls = (head(tokens["cls"]) - teacher.cls_center) / 0.05
    patches = (head(tokens["patches"]) - teacher.patch_center) / 0.05
    return cls.softmax(-1).unflatten(0, (2, B)), patches.softmax(-1)


def plain_losses(step, targets):
    """dino and ibot of the student against such targets, with loops."""
    cls_targets, patch_targets = targets
    backbone, head = step.run.network.backbone, step.run.network.head
    seen = backbone.forward_features(step.crops["noisy"][0], step.masks)
    local = backbone.forward_features(step.crops["noisy"][1])["cls"]
    views = (head(torch.cat([seen["cls"], local])) / 0.1).log_softmax(-1).split(B)
    pairs = []
    for t in range(2):
        for s, view in enumerate(views):
            if s != t:
                pairs.append(-(cls_targets[t] * view).sum(-1).mean())
    patches = (head(seen["patches"]) / 0.1).log_softmax(-1)
    ibot = 0
    for crop, mask in enumerate(step.masks):
        if mask.any():
            entropies = -(patch_targets[crop, mask] * patches[crop, mask]).sum(-1)
            ibot = ibot + entropies.mean() / (2 * B)
    return sum(pairs) / len(pairs), ibot


@torch.no_grad()
def plain_koleo(step):
    tokens = step.run.network.backbone.forward_features(step.crops["noisy"][0], step.masks)["cls"]
    total = 0
    for view in F.normalize(tokens, dim=-1).split(B):
        for i, x in enumerate(view):
            others = [y for j, y in enumerate(view) if j != i]
            nearest = min((x - y).norm() for y in others)
            total = total - torch.log(nearest + 1e-8) / B
    return total


@pytest.mark.parametrize("anchor, head", [(0, ""), (3, "frozen"), (3, "live")])
def test_total_is_the_weighted_sum_of_losses_recomputed_by_plain_calls(images, anchor, head):
    """The targets are of unmasked global crops: a teacher that saw the mask would differ. The
    anchor's weight is that of both its losses."""
    flags = ["--ibot_weight", 0.7, "--koleo_weight", 0.3]
    step = make_step(images, *flags, *(["--anchor_head", head] if head else []), anchor=anchor)
    live, frozen = step.run.teacher, step.run.anchor
    targets = plain_targets(live.backbone, live.head, live, step.crops["noisy"][0])
    dino, ibot = plain_losses(step, targets)
    koleo = plain_koleo(step)
    expected = {"total": dino + 0.7 * ibot + 0.3 * koleo,
                "dino": dino, "ibot": ibot, "koleo": koleo}
    if anchor:
        used = live.head if head == "live" else frozen.head
        targets = plain_targets(frozen.backbone, used, frozen, step.crops["denoised"][0])
        dino, ibot = plain_losses(step, targets)
        expected["total"] = expected["total"] + 3 * (dino + ibot)
        expected |= {"anchor_dino": dino, "anchor_ibot": ibot}
    losses = losses_of(step)[0]
    assert list(losses) == list(expected)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-4, atol=0)


def test_losses_of_a_step_in_bf16_equal_float32_to_a_hundredth(images):
    full = losses_of(make_step(images))[0]
    with torch.autocast("cpu", torch.bfloat16):
        low = losses_of(make_step(images))[0]
    assert len(full) == 6
    assert {v.dtype for v in low.values()} == {torch.float32}
    assert low["dino"] != full["dino"]
    for name in full:
        assert low[name].item() == pytest.approx(full[name].item(), rel=1e-2), name


def test_both_teachers_are_sharpened_by_the_scheduled_temperature(
        images, runs, out, monkeypatch):
    seen, softmax = [], common.softmax_center

    def watched(logits, center, temp):
        seen.append(temp)
        return softmax(logits, center, temp)

    monkeypatch.setattr(common, "softmax_center", watched)
    train(out, *images.anchored, "--epochs", 2, *runs.init)
    calls = 4  # a step: class tokens and patches of two teachers
    expected = [0.04, 0.055, 0.07, 0.07, 0.07, 0.07]
    assert seen == pytest.approx(np.repeat(expected, calls).tolist())


def test_sinkhorn_targets_do_not_depend_on_the_centres(images):
    step = make_step(images, "--centering", "sinkhorn", anchor=0)
    teacher = step.run.teacher
    assert teacher.cls_center.abs().max() > 0.05
    before = copy.deepcopy(teacher.state_dict())
    targets = losses_of(step)[1]
    with torch.no_grad():
        logits = teacher.head(teacher.backbone(step.crops["noisy"][0]))
        expected = common.sinkhorn(logits, 0.05)
    torch.testing.assert_close(targets.flatten(0, 1), expected)
    assert not differences(before, teacher.state_dict())


def test_centres_move_a_tenth_to_the_teachers_mean_output_after_use(images):
    """That they move after their use is in the test of the total: it takes the old ones."""
    step = make_step(images)
    pairs = [(step.run.teacher, "noisy"), (step.run.anchor, "denoised")]
    old = [dict(teacher.named_buffers()) for teacher, _ in pairs]
    losses_of(step)
    for (teacher, source), before in zip(pairs, old, strict=True):
        with torch.no_grad():
            tokens = teacher.backbone.forward_features(step.crops[source][0])
            cls = teacher.head(tokens["cls"]).mean(0, keepdim=True)
            patches = teacher.head(tokens["patches"][step.masks]).mean(0, keepdim=True)
        close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
        close(teacher.cls_center, 0.9 * before["cls_center"] + 0.1 * cls)
        close(teacher.patch_center, 0.9 * before["patch_center"] + 0.1 * patches)


def test_drop_path_acts_in_the_student_alone(images):
    results = []
    for seed in (0, 0, 1):
        step = make_step(images, "--drop_path", 0.5, anchor=0)
        gen = torch.Generator().manual_seed(seed)
        keep = [torch.rand(2, 2, 2 * B, generator=gen) for _ in range(2)]  # (depth, 2, rows)
        torch.manual_seed(seed)  # of what a teacher in training would draw
        losses, targets, _ = losses_of(step, keep)
        results.append((losses["dino"], [targets, step.run.teacher.state_dict()]))
    (first, teacher), (again, _), (other, same_teacher) = results
    assert first == again != other
    assert not differences(teacher, same_teacher)


@pytest.mark.parametrize("size", ["global", "local"])
def test_drop_path_has_numbers_for_each_size_of_crops(images, size):
    keep = {"global": torch.ones(2, 2, 2 * B), "local": torch.ones(2, 2, 2 * B)}
    plain = losses_of(make_step(images, "--drop_path", 0.5, anchor=0), list(keep.values()))[0]
    keep[size][:, 0] = 0
    changed = losses_of(make_step(images, "--drop_path", 0.5, anchor=0), list(keep.values()))[0]
    assert plain["dino"] != changed["dino"]
    assert (plain["ibot"] == changed["ibot"]) == (size == "local")  # patches are of global crops


# ==== anchor ======================================================================================
def test_anchor_weight_scales_its_gradient_linearly(images):
    gradients = []
    for weight in (0, 1, 3):
        step = make_step(images)
        step.args.anchor = weight
        losses_of(step)[0]["total"].backward()
        parameters = step.run.network.parameters()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    one, three = gradients[1] - gradients[0], gradients[2] - gradients[0]
    assert one.norm() > 0.01 * gradients[0].norm()
    assert (three - 3 * one).norm() < 1e-5 * three.norm()


def changed_losses(images, change, *flags):
    """Names of the losses, and of the anchor's centres, that differ after change(step)."""
    results = []
    for act in (lambda step: None, change):
        step = make_step(images, *flags)
        act(step)
        losses = losses_of(step)[0]
        results.append(losses | dict(step.run.anchor.named_buffers()))
    return {name.removeprefix("/") for name in differences(*results)}


def test_anchor_targets_come_from_denoised_crops_and_the_student_sees_noisy_ones(images):
    def change(source, size):
        changed = changed_losses(images, lambda step: step.crops[source][size].mul_(-1))
        return changed & {"anchor_dino", "anchor_ibot", "cls_center", "patch_center"}

    assert change("noisy", 0) == {"anchor_dino", "anchor_ibot"}
    assert change("noisy", 1) == {"anchor_dino"}
    assert change("denoised", 0) == {"anchor_dino", "anchor_ibot", "cls_center", "patch_center"}
    denoised = changed_losses(images, lambda step: step.crops["denoised"][0].mul_(-1))
    assert not denoised & {"dino", "ibot", "koleo"}


@pytest.mark.parametrize("head, used", [("frozen", "anchor"), ("live", "teacher")])
def test_anchor_uses_the_head_that_the_flag_says_and_always_its_own_backbone(images, head, used):
    def matters(network, part):
        def change(step):
            for p in getattr(getattr(step.run, network), part).parameters():
                p.data *= 1.5
        return "anchor_dino" in changed_losses(images, change, "--anchor_head", head)

    assert [n for n in ("anchor", "teacher") if matters(n, "head")] == [used]
    assert [n for n in ("anchor", "teacher") if matters(n, "backbone")] == ["anchor"]


@pytest.mark.parametrize("flag", ["--init", "--anchor_from"])
def test_anchor_starts_from_that_teacher_and_its_centres_and_only_the_centres_move(
        images, runs, out, steps, flag):
    """--anchor_from, where it is given, beside --init: the finished denoised run."""
    expected, flags = runs.first.teacher, runs.init
    if flag == "--anchor_from":
        expected = runs.denoised.teacher
        flags = [*flags, flag, runs.denoised.out / "checkpoint.pth"]
    seen = []
    steps.before = lambda run: seen.append(networks(run)["anchor"])
    last = train(out, *images.anchored, "--epochs", 2, *flags)
    assert len(seen) == 2 * STEPS
    assert not differences(seen[0], expected)
    centers = ["/cls_center", "/patch_center"]
    for a, b in itertools.pairwise([*seen, last["anchor"]]):
        assert differences(a, b) == centers
    live = last["teacher"]
    assert differences(last["anchor"]["cls_center"], live["cls_center"])


def test_anchor_from_needs_no_init(images, runs, tmp_path, steps):
    seen = []
    steps.before = lambda run: seen.append(networks(run))
    train(tmp_path, *images.anchored, "--epochs", 1, "--anchor_from", runs.first.out)
    fresh = pretrain.Run(config(*images.noisy), 3, CPU)
    assert not differences(seen[0]["anchor"], runs.first.teacher)
    assert not differences(seen[0]["student"], fresh.network.state_dict())


@pytest.mark.parametrize("weight", ["0", "1e-300"])
def test_anchor_of_weight_zero_equals_nc_bit_for_bit(images, runs, tmp_path, weight):
    """1e-300 takes all of the anchor's path, and in float32 is 0."""
    flags = [*NOISY, *runs.init, "--anchor", weight]
    kind = images.noisy if weight == "0" else images.anchored
    state = train(tmp_path, *kind, *flags)
    assert ("anchor" in state) == (weight != "0")
    state.pop("anchor", None)
    assert not differences(state, runs.nc.state)
    plain = [{k: v for k, v in r.items() if "anchor" not in k} for r in log(tmp_path)]
    assert plain == log(runs.nc.out)


def test_anchor_changes_the_student(runs):
    assert differences(runs.nct.student, runs.nc.student)
    assert "anchor" not in runs.nc.state


# ==== one update ==================================================================================
VALUES = {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.75, "temp": 0.05, "frozen": False}


def test_teacher_is_the_moving_average_of_the_student_after_the_step(images, tmp_path, steps):
    before, momenta = [], []

    def check(run, values):
        old, new, m = before[-1], networks(run), values["momentum"]
        for name, weight in new["student"].items():
            expected = m * old["teacher"][name].double() + (1 - m) * weight.double()
            found = new["teacher"][name].double()
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        assert differences(old["student"], new["student"])
        momenta.append(m)

    steps.before = lambda run: before.append(networks(run))
    steps.after = check
    train(tmp_path, *images.noisy, "--epochs", 2)
    angles = np.arange(2 * STEPS) * np.pi / (2 * STEPS)
    expected = 1 - 0.1 * (1 + np.cos(angles)) / 2
    assert momenta == pytest.approx(expected.tolist())


def test_last_layer_is_frozen_in_the_first_epoch_of_every_run(runs, tmp_path, steps):
    """Also of one that starts from another run's networks."""
    before, moved = [], []

    def check(run, values):
        changed = " ".join(differences(before[-1]["student"], networks(run)["student"]))
        moved.append({part for part in ("last_layer", "mlp.0", "qkv") if part in changed})

    steps.before = lambda run: before.append(networks(run))
    steps.after = check
    train(tmp_path, *runs.nc.flags)
    assert moved == [{"mlp.0", "qkv"}] * STEPS + [{"last_layer", "mlp.0", "qkv"}] * STEPS


def test_update_is_adamw_with_betas_of_0_9_and_0_999(images):
    run = make_step(images, "--clip", 1e9, anchor=0).run
    weight = run.network.head.mlp[0].weight
    gen = torch.Generator().manual_seed(0)
    expected, first, second = weight.detach().double().clone(), 0, 0
    for t in range(1, 4):
        gradient = torch.randn(weight.shape, generator=gen)
        run.update((weight * gradient).sum(), VALUES)
        gradient = gradient.double()
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9**t), second / (1 - 0.999**t)
        decay = 0.1 * 0.5  # rate x weight decay
        expected = expected * (1 - decay) - 0.1 * mean / (square.sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped_for_backbone_and_head_each(images):
    gradients = {}
    for clip in (1e9, 0.01):
        step = make_step(images, "--clip", clip, anchor=0)
        step.run.update(losses_of(step)[0]["total"], VALUES)
        for part in ("backbone", "head"):
            parameters = getattr(step.run.network, part).parameters()
            gradients[part, clip] = torch.cat([p.grad.flatten() for p in parameters])
    for part in ("backbone", "head"):
        whole, cut = gradients[part, 1e9], gradients[part, 0.01]
        assert whole.norm() > 0.1
        torch.testing.assert_close(cut, whole * (0.01 / whole.norm()), rtol=1e-4, atol=1e-9)


def test_weight_decay_spares_biases_norms_and_layer_scale(images):
    """With gradients of zero AdamW does nothing but decay: by rate x weight decay x the layer's
    factor. Blocks count from the output: the embeddings lie below both."""
    run = make_step(images, "--registers", 1, anchor=0).run
    before = copy.deepcopy(run.network.state_dict())
    run.update(sum((p * 0).sum() for p in run.network.parameters()), VALUES)
    for name, now in run.network.state_dict().items():
        depth = 3
        if name.startswith(("head", "backbone.norm")):
            depth = 0
        elif "blocks" in name:
            depth = 2 if "blocks.0" in name else 1
        rate = 0.1 * 0.9**depth
        if "patch_embed" in name:
            rate *= 0.2
        spared = "norm" in name or "gamma" in name or name.endswith("bias")
        factor = 1 if spared else 1 - rate * 0.5
        torch.testing.assert_close(now, before[name] * factor, rtol=1e-6, atol=1e-9)


# ==== start from another run ======================================================================
def test_init_takes_networks_and_centres_and_starts_optimiser_and_schedules_anew(
        images, runs, tmp_path, out, steps):
    """The paper's restart."""
    seen, moments = [], []

    def before(run):
        seen.append(networks(run))
        moments.append({int(s["step"]) for s in run.optimizer.state.values()})

    steps.before = before
    train(out, *images.noisy, "--epochs", 2, *runs.init)
    state = runs.first.state
    assert not differences(seen[0], {name: state[name] for name in ("student", "teacher")})
    assert state["teacher"]["cls_center"].abs().max() > 0
    assert moments == [set(), {1}, {2}, {3}, {4}, {5}]
    train(tmp_path / "fresh", *images.noisy, "--epochs", 2)
    scheduled = ("step", "epoch", "lr", "weight_decay", "momentum", "temp", "frozen")
    after_init, from_scratch = (
        [{name: record[name] for name in scheduled} for record in log(tmp_path / out)]
        for out in ("run", "fresh"))
    assert after_init == from_scratch


@pytest.mark.parametrize("path", ["denoised/checkpoint.pth", "denoised"])
def test_init_may_be_a_file_or_a_folder(images, runs, path):
    run = pretrain.Run(config(*images.noisy, "--seed", 9, "--init", runs.root / path), 3, CPU)
    run.start()
    state = runs.denoised.state
    assert not differences(networks(run), {name: state[name] for name in ("student", "teacher")})


@pytest.mark.parametrize("flags, message", [
    (["--prototypes", 32, "--init", "first"], "student is of another model: .*last_layer"),
    (["--init", "first/backbone.pth"], "backbone.pth: cannot be loaded .*it has no position"),
    (["--init", "nowhere"], "nowhere: no such checkpoint"),
])
def test_init_that_does_not_fit_is_refused(images, runs, flags, message):
    flags[-1] = runs.root / flags[-1]
    run = pretrain.Run(config(*images.noisy, *flags), 3, CPU)
    with pytest.raises(UserError, match=message):
        run.start()


@pytest.mark.parametrize("flag, file", [
    ("--init", "first/epoch1.pth"), ("--init_backbone", "first/backbone.pth"),
    ("--anchor_from", "denoised/checkpoint.pth")])
def test_run_that_goes_on_needs_its_start_no_more(
        images, runs, tmp_path, out, interrupt, flag, file):
    path = Path(shutil.copy(runs.root / file, tmp_path))
    kind = images.anchored if flag == "--anchor_from" else images.noisy
    command = [out, *kind, "--epochs", 1, flag, path]
    interrupt(1, *command)
    path.rename(tmp_path / "moved")
    assert train(*command)["position"][:2] == (1, 0)


def test_seconds_include_those_of_all_runs_before(images, runs, tmp_path, out, interrupt):
    """Also those of a run that went on, and in a chain of three runs those of the first."""
    state = torch.load(runs.first.out / "epoch1.pth", weights_only=True)
    state["position"] = (1, 0, 1000.0)
    torch.save(state, tmp_path / "init.pth")
    command = [out, *images.noisy, "--epochs", 1, "--init", tmp_path / "init.pth"]
    interrupt(2, *command)
    state = train(*command)
    summary = json.loads((out / "summary.json").read_text())
    assert 1000 < summary["seconds"] < 1000 + 60
    assert summary["seconds"] == pytest.approx(state["position"][2], abs=5)
    assert summary["epochs"] == 1
    third = train(tmp_path / "third", *images.noisy, "--epochs", 1, "--init", out)
    assert third["position"][2] > state["position"][2]


# ==== --stop ======================================================================================
def test_stop_then_the_rest_equals_one_run_bit_for_bit(runs, out):
    """The schedules are those of the whole run from the first step on."""
    shutil.copytree(runs.first.out, out)
    assert log(out) == log(runs.denoised.out)[:STEPS]
    kept = (out / "epoch1.pth").read_bytes()
    state = train(out, *runs.denoised.flags)
    assert not differences(state, runs.denoised.state)
    assert log(out) == log(runs.denoised.out)
    assert not differences(backbone_of(out), backbone_of(runs.denoised.out))
    assert (out / "epoch1.pth").read_bytes() == kept


def test_file_of_a_stop_holds_the_networks_of_that_moment(runs, tmp_path, steps):
    ends = []
    steps.after = lambda run, values: ends.append(networks(run))
    train(tmp_path, *runs.denoised.flags)
    file = torch.load(runs.first.out / "epoch1.pth", weights_only=True)
    assert file.pop("position")[:2] == (1, 0)
    assert not differences(file, ends[STEPS - 1])
    assert not differences(backbone_of(runs.first.out),
                           part_of(file["teacher"], "backbone."))


@pytest.mark.parametrize("rest", [1, 2, 3], ids=["at once", "after going on", "after the end"])
def test_stop_again_is_complete(runs, out, capsys, rest):
    shutil.copytree(runs.first.out, out)
    train(out, *runs.denoised.flags, "--stop", rest)
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    train(out, *runs.first.flags)
    assert "complete, nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_signal_in_the_last_step_before_a_stop_loses_nothing(runs, out, interrupt):
    interrupt(STEPS, out, *runs.first.flags)
    assert not (out / "epoch1.pth").exists()
    assert not differences(train(out, *runs.first.flags), runs.first.state)
    files = [torch.load(run / "epoch1.pth", weights_only=True) for run in (out, runs.first.out)]
    assert not differences(*files)


@pytest.mark.parametrize("end", ["complete", "interrupted"])
def test_stop_that_a_run_has_already_passed_is_refused(runs, out, interrupt, end):
    """epoch1.pth can no longer be had: no other networks may take its place, nor may the run be
    called complete without it."""
    if end == "complete":
        shutil.copytree(runs.denoised.out, out)
    else:
        interrupt(STEPS + 1, out, *runs.denoised.flags)
    with pytest.raises(UserError, match="--stop 1"):
        call(out, *runs.first.flags)
    assert not (out / "epoch1.pth").exists()


def test_stop_at_the_end_of_a_complete_run_writes_its_file(runs, out):
    shutil.copytree(runs.denoised.out, out)
    train(out, *runs.denoised.flags, "--stop", 3)
    file = torch.load(out / "epoch3.pth", weights_only=True)
    assert not differences(file["teacher"], runs.denoised.teacher)


# ==== resume, processes ===========================================================================
@FEW_CORES
@pytest.mark.parametrize("step, kind, flags", [
    (1, "SIGTERM", []), (STEPS, "SIGUSR1", []), (STEPS + 2, "SIGINT", []),
    (STEPS + 1, "SIGTERM", ["--workers", 2]),
], ids=["within an epoch", "at its end", "in the second", "other workers"])
def test_run_that_a_signal_stopped_goes_on_to_the_same_bits(
        runs, out, interrupt, step, kind, flags):
    """Also with another number of workers."""
    command = [out, *runs.nct.flags]
    interrupt(step, *command, kind=getattr(signal, kind))
    stopped = common.load_checkpoint(out / "checkpoint.pth")
    assert stopped["position"][:2] == divmod(step, STEPS)
    assert not (out / "backbone.pth").exists()
    assert not differences(train(*command, *flags), runs.nct.state)
    assert log(out) == log(runs.nct.out)
    assert not differences(backbone_of(out), backbone_of(runs.nct.out))


def test_crash_between_checkpoints_goes_on_to_the_same_bits_and_log(runs, tmp_path, steps):
    count = itertools.count(1)

    def crash(run, values):
        if next(count) == STEPS + 2:
            raise KeyboardInterrupt

    steps.after = crash
    command = [tmp_path, *runs.nct.flags]
    with pytest.raises(KeyboardInterrupt):
        train(*command)
    assert log(tmp_path)[-1]["step"] == STEPS + 1  # a step that the checkpoint does not hold
    steps.after = lambda run, values: None
    assert not differences(train(*command), runs.nct.state)
    assert log(tmp_path) == log(runs.nct.out)


def test_log_steps_may_change_on_the_way(runs, tmp_path, interrupt):
    command = [tmp_path, *runs.nct.flags]
    interrupt(2, *command)
    assert not differences(train(*command, "--log_steps", 2), runs.nct.state)
    assert [record["step"] for record in log(tmp_path)] == [1, 2, 4, 6]


def test_resume_refuses_other_settings_and_names_field_and_both_values(runs):
    out = runs.nct.out
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError) as error:
        call(out, *runs.nct.flags, "--epochs", 3, "--koleo_weight", 0.5, "--anchor_head", "live")
    message = str(error.value)
    assert "--epochs 2 (now 3)" in message
    assert "--koleo_weight 0.1 (now 0.5)" in message
    assert "--anchor_head frozen (now live)" in message
    assert "--lr" not in message
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_resume_refuses_other_images(images, runs, tmp_path, out):
    shutil.copytree(runs.nc.out, out)
    other = write_images(tmp_path / "other", [(32, 32)] * 23)
    with pytest.raises(UserError, match=r"--data 24 images .*\(now 23 images"):
        call(out, *runs.nc.flags, "--data", other)


def test_folder_with_a_backbone_but_no_checkpoint_is_left_alone(runs, tmp_path):
    shutil.copy(runs.nc.out / "backbone.pth", tmp_path)
    with pytest.raises(UserError, match=r"backbone\.pth without its checkpoint"):
        call(tmp_path, *runs.nc.flags)
    assert [path.name for path in tmp_path.iterdir()] == ["backbone.pth"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # tracing
def test_compiled_run_equals_the_plain_one_and_is_not_compiled_anew_each_step(
        images, runs, tmp_path, steps, monkeypatch):
    """Both crop sizes, another number of masked patches each step, live and frozen teacher; more
    blocks than torch keeps versions of a function. The graphs that torch traces run as they are,
    without its code generator."""
    deep = ["--arch", "16,10,2", "--drop_path", 0.1]
    train(tmp_path / "first", *images.denoised, *deep, "--epochs", 1)
    command = [*images.anchored, *deep, "--epochs", 2, "--init", tmp_path / "first"]
    plain = train(tmp_path / "plain", *command)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    counters, graphs = torch._dynamo.utils.counters, []
    counters.clear()
    steps.after = lambda run, values: graphs.append(counters["stats"]["unique_graphs"])
    compiled = train(tmp_path / "compiled", *command, "--compile")
    assert len(graphs) == 2 * STEPS
    assert 0 < graphs[STEPS - 1] == graphs[-1]
    assert graphs[-1] < torch._dynamo.config.recompile_limit  # at which torch silently gives up
    assert not counters["graph_break"]
    assert not differences(compiled, plain)


TWO_PROCESSES = """
import sys
sys.path.insert(0, {root!r})
import common, pretrain
for out, flags in {commands!r}.items():
    sys.argv = ["pretrain.py", *flags, "--out", out]
    assert pretrain.main() == 0
common.run(lambda: 0)
"""


def test_two_processes_give_the_losses_and_monitors_of_one(images, runs, tmp_path):
    """Global batch and seed fix the result: also the anchor, drop path's draws, Sinkhorn's sums."""
    base = [*images.anchored, "--epochs", 2, *runs.init]
    kinds = {"anchor": [], "drop": ["--drop_path", 0.1], "sinkhorn": ["--centering", "sinkhorn"]}
    commands = {}
    for kind, flags in kinds.items():
        commands[str(tmp_path / f"two {kind}")] = [*TINY, *map(str, [*base, *flags])]
    script = tmp_path / "both.py"
    script.write_text(TWO_PROCESSES.format(root=str(ROOT), commands=commands))
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, script], capture_output=True, text=True, timeout=300,
                          env=environment)
    assert done.returncode == 0, done.stderr
    last = set()
    for kind, flags in kinds.items():
        train(tmp_path / f"one {kind}", *base, *flags)
        one, two = log(tmp_path / f"one {kind}"), log(tmp_path / f"two {kind}")
        assert len(one) == 2 * STEPS
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys() > {"anchor_dino", "anchor_ibot", "entropy", "rank"}
            for name in a.keys() - {"source"}:
                # kl is a small difference of large numbers
                close = pytest.approx(a[name], rel=1e-4, abs=1e-4 * (name == "kl"))
                assert b[name] == close, (kind, name)
        last.add(one[-1]["dino"])
    assert len(last) == 3


def test_two_nodes_give_the_losses_of_one_process_and_go_on_after_one_was_lost(images, tmp_path):
    """Two agents of torchrun, as on two machines; the second and its process are killed on the way."""
    flags = [*images.noisy, "--epochs", 20]
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--rdzv_backend", "c10d",
              "--rdzv_endpoint", f"localhost:{port}", "--", str(ROOT / "pretrain.py")]
    command = [sys.executable, *launch, *TINY, *flags, "--out", tmp_path / "nodes"]

    def start():
        with open(tmp_path / "said", "wb") as said:
            return [subprocess.Popen([*map(str, command)], stdout=said, stderr=subprocess.STDOUT,
                                     env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]

    first, second = start()
    written = tmp_path / "nodes/log.jsonl"
    while first.poll() is None and len(common.read_log(written)) < 4:
        time.sleep(0.05)
    subprocess.run(["pkill", "-KILL", "-P", str(second.pid)], check=True)
    second.kill()
    assert first.wait(60) != 0
    assert "another process has failed" in (tmp_path / "said").read_text()
    assert not (tmp_path / "nodes/summary.json").exists()
    second.wait()

    assert [node.wait(60) for node in start()] == [0, 0]
    train(tmp_path / "one", *flags)
    one, two = log(tmp_path / "one"), log(tmp_path / "nodes")
    assert len(one) == len(two) == 20 * STEPS
    for a, b in zip(one[:30], two[:30], strict=True):  # later, rounding has grown
        assert b["total"] == pytest.approx(a["total"], rel=1e-4)


def test_bf16_gives_the_losses_of_float32_but_for_rounding(images, runs, tmp_path):
    """In the first step, of the same weights."""
    losses = []
    for amp in ("off", "bf16"):
        train(tmp_path / amp, *images.anchored, *runs.init, "--epochs", 1, "--amp", amp)
        losses.append(log(tmp_path / amp)[0])
    for name in ("total", "dino", "ibot", "koleo", "anchor_dino", "anchor_ibot", "entropy"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=3e-2), name
        assert losses[1][name] != losses[0][name]


# ==== data of one step ============================================================================
class Pictures:
    """Stands for a folder of n images without noise, every source the same."""
    channels = 3

    def __init__(self, n, size=32):
        self.paths = [f"train/{i}.png" for i in range(n)]
        gen = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=gen)

    def copies(self, i, sources):
        return [self.images[i] for _ in sources]


def draw(images, *flags, mine=slice(None), epoch=0, step=0, indices=range(8)):
    args = config(*images.noisy, *flags)
    folder = Pictures(8)
    return pretrain.make_batch(args, folder, [args.source], mine, epoch, step, list(indices))


def test_batch_has_the_crops_of_a_step_view_by_view(images):
    batch = draw(images, "--local_crops", 3)
    shapes = {name: tuple(x.shape) for name, x in batch.items()}
    picked = shapes.pop("picked")
    assert shapes == {
        "noisy_global": (16, 3, 32, 32), "noisy_local": (24, 3, 16, 16),
        "global_color": (16, 24), "local_color": (24, 24), "masks": (16, 16)}
    assert batch["noisy_global"].dtype == batch["noisy_local"].dtype == torch.uint8
    assert picked == (batch["masks"].sum(),)
    assert batch["masks"].flatten()[batch["picked"]].all()


@pytest.mark.parametrize("other, unchanged", [
    ({}, {"global", "local", "global_color", "local_color", "masks"}),
    ({"flags": ["--seed", 1]}, set()),
    ({"flags": ["--source", "clean"]}, set()),
    ({"epoch": 1}, set()),
    ({"step": 1}, {"global", "local", "global_color", "local_color"}),
], ids=["same", "seed", "source", "epoch", "step"])
def test_draws_are_fixed_by_seed_source_epoch_and_step(images, other, unchanged):
    flags = other.pop("flags", [])
    first, second = draw(images), draw(images, *flags, **other)
    same = set()
    for kind in ("global", "local"):
        sources = [f"{name}_{kind}" for name in ("noisy", "clean")]
        a, b = (next(x[name] for name in sources if name in x) for x in (first, second))
        if torch.equal(a, b):
            same.add(kind)
    for name in ("global_color", "local_color", "masks"):
        if torch.equal(first[name], second[name]):
            same.add(name)
    assert same == unchanged


def test_draws_of_an_image_are_fixed_by_its_path_not_by_its_place_in_the_batch(images):
    forward, backward = draw(images), draw(images, indices=reversed(range(8)))
    for name in ("noisy_global", "noisy_local", "global_color", "local_color"):
        views, mirrored = (batch[name].unflatten(0, (2, 8)) for batch in (forward, backward))
        assert torch.equal(views, mirrored.flip(1))
    sigmas = forward["global_color"][:8, 22]  # of the first view, which is always blurred
    assert len(sigmas.unique()) == 8  # each image has its own


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_of_one(images, processes):
    whole, each = draw(images), 8 // processes
    for rank in range(processes):
        mine = slice(rank * each, (rank + 1) * each)
        part = draw(images, mine=mine)
        for name in whole.keys() - {"picked"}:
            expected = whole[name].unflatten(0, (2, 8))[:, mine].flatten(0, 1)
            assert torch.equal(part[name], expected), name
        assert torch.equal(part["picked"], part["masks"].flatten().nonzero()[:, 0])


def keep_of(images, *flags, epoch=0, step=0, mine=slice(None)):
    args = config(*images.noisy, *flags)
    loop = SimpleNamespace(epoch=epoch, step=step, batch=8, mine=mine, device=CPU)
    return pretrain.draw_keep(args, 2, loop)


def test_drop_path_is_drawn_by_seed_epoch_and_step_for_the_global_batch(images):
    drop = ["--drop_path", 0.5]
    first = keep_of(images, *drop)
    assert [tuple(x.shape) for x in first] == [(2, 2, 16), (2, 2, 16)]  # (depth, 2, rows)
    assert not differences(first, keep_of(images, *drop))
    others = [keep_of(images, *drop, "--seed", 1), keep_of(images, *drop, epoch=1),
              keep_of(images, *drop, step=1)]
    for other in others:
        assert differences(first, other) == ["/0", "/1"]
    half = keep_of(images, *drop, mine=slice(4, 8))  # the second process of two
    for whole, part in zip(first, half, strict=True):
        expected = whole.unflatten(2, (2, 8))[..., 4:].flatten(2)
        assert torch.equal(part, expected)
    assert keep_of(images) == (None, None)


def draws_of(images, n, views, monkeypatch):
    """What make_batch draws for n images of 500 x 500: {name: (views, n)}, and its masks."""
    flips, areas = [], []

    def cut(image, box, flip, size, turns):
        flips.append(flip)
        areas.append(box[2] * box[3] / 500**2)
        return torch.zeros(1, 1, 1)

    monkeypatch.setattr(common, "cut", cut)
    image = torch.empty(3, 500, 500)
    folder = SimpleNamespace(channels=3, paths=list(map(str, range(n))),
                             copies=lambda i, sources: [image])
    args = config(*images.noisy, "--local_crops", views - 2)
    batch = pretrain.make_batch(args, folder, ["noisy"], slice(None), 0, 0, list(range(n)))
    numbers = torch.cat([batch["global_color"], batch["local_color"]])
    mixes, hue, sigma, solarize = numbers.split([21, 1, 1, 1], dim=1)
    changes = (mixes.unflatten(1, (7, 3)) != torch.tensor([1.0, 0, 0])).any(2)
    jitter = torch.cat([changes[:, :6], hue != 0], 1)
    drawn = {"flip": torch.tensor(flips), "area": torch.tensor(areas), "jitter": jitter.any(1),
             "grey": changes[:, 6], "blur": sigma[:, 0] > 0, "solarize": solarize[:, 0] > 0}
    return {name: x.double().view(views, n) for name, x in drawn.items()}, batch["masks"]


def test_every_view_is_drawn_with_dinov2s_frequencies_and_areas(images, monkeypatch):
    """Global view 1 is always blurred, view 2 seldom and it alone solarised: not the other way
    round."""
    n = 3000
    drawn, masks = draws_of(images, n, 5, monkeypatch)
    expected = {"flip": [0.5] * 5, "jitter": [0.8] * 5, "grey": [0.2] * 5,
                "blur": [1, 0.1, 0.5, 0.5, 0.5], "solarize": [0, 0.2, 0, 0, 0]}
    for name, shares in expected.items():
        for view, p in enumerate(shares):
            error = math.sqrt(p * (1 - p) / n)
            share = drawn[name][view].mean()
            assert abs(share - p) <= 4 * error, (name, view)
    least, most = drawn["area"].aminmax(dim=1)
    assert least.tolist() == pytest.approx([0.32] * 2 + [0.05] * 3, rel=0.05)
    assert most.tolist() == pytest.approx([1.0] * 2 + [0.32] * 3, rel=0.05)
    assert len(drawn["flip"].unique(dim=0)) == 5  # each view its own
    masked = masks.any(1)
    assert masked.sum() == pytest.approx(n, rel=0.05)  # half of the 2n crops
    assert 0 < masked[:n].sum() < n


def test_each_source_is_cut_from_its_own_images(images, monkeypatch):
    monkeypatch.setattr(common, "cut", lambda image, *rest: image)
    folder = common.Folder(images.data, "train", "gauss50", denoised=images.copy)
    for source in ("noisy", "denoised", "clean"):
        args = SimpleNamespace(**vars(config(*images.denoised)) | {"source": source})
        batch = pretrain.make_batch(args, folder, [source], slice(None), 0, 0, [5])
        root = images.copy if source == "denoised" else images.data
        image = torch.from_numpy(np.array(Image.open(root / "train/05.png"))).permute(2, 0, 1)
        for crop in (*batch[f"{source}_global"], *batch[f"{source}_local"]):
            if source == "noisy":
                noise = (crop.float() - image.float()).std()
                assert 35 < noise < 60  # sigma 50, some of it clipped
            else:
                assert torch.equal(crop, image)


def paired_crops(data, denoised, *flags):
    """Crops of four images as a run with an anchor gets them."""
    args = config("--data", data, "--denoised", denoised, "--anchor", 1, "--init", "unused", *flags)
    folder = common.Folder(data, denoised=denoised)
    sources = ["noisy", "denoised"]
    batch = pretrain.make_batch(args, folder, sources, slice(None), 0, 0, [0, 1, 2, 3])
    mean, std = torch.full((3, 1, 1), 0.25), torch.full((3, 1, 1), 0.5)
    return pretrain.make_crops(batch, sources, mean, std)


def test_anchor_crops_are_the_noisy_ones_cut_from_the_denoised_images(images, tmp_path):
    """Denoised images equal to the noisy ones: the same crops to the bit. Black ones: black crops
    for the anchor, but for those that are solarised, and noisy ones as before."""
    same = paired_crops(images.data, images.data)
    assert len(same["denoised"]) == 1  # no local ones
    assert torch.equal(same["noisy"][0], same["denoised"][0])
    for i in range(24):
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / f"train/{i:02d}.png")
    black = paired_crops(images.data, tmp_path)
    assert not differences(black["noisy"], same["noisy"])
    torch.testing.assert_close(black["denoised"][0], torch.full((8, 3, 32, 32), -0.5))


def symmetries(images, monkeypatch, *flags):
    """How often each symmetry of the square comes in the crops of 50 epochs: {its corners: number}."""
    square = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.uint8)
    monkeypatch.setattr(common, "resize", lambda *_: square)
    found = Counter()
    for epoch in range(50):
        batch = draw(images, *flags, epoch=epoch)
        for crop in (*batch["noisy_global"], *batch["noisy_local"]):
            found[tuple(crop.flatten().tolist())] += 1
    return found


def test_crops_are_mirrored_and_with_rotate_turned_as_often_into_each_of_eight_symmetries(
        images, monkeypatch):
    assert set(symmetries(images, monkeypatch)) == {(0, 1, 2, 3), (1, 0, 3, 2)}
    found = symmetries(images, monkeypatch, "--rotate")
    corners = {(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0), (1, 3, 0, 2)}  # turned
    corners |= {(b, a, d, c) for a, b, c, d in corners}  # and mirrored
    assert set(found) == corners
    crops = found.total()
    error = math.sqrt(crops * 1 / 8 * 7 / 8)
    for number in found.values():
        assert abs(number - crops / 8) < 4 * error


def test_rotated_crops_of_an_image_are_turned_alike_for_the_anchor(images):
    same = paired_crops(images.data, images.data, "--rotate")
    assert torch.equal(same["noisy"][0], same["denoised"][0])
    plain = paired_crops(images.data, images.data)
    assert not torch.equal(same["noisy"][0], plain["noisy"][0])


def test_crops_are_normalised_after_their_colours():
    gen = torch.Generator().manual_seed(0)
    batch = {}
    for kind, size in (("global", 8), ("local", 4)):
        batch[f"noisy_{kind}"] = torch.randint(256, (3, 3, size, size), generator=gen).byte()
        numbers = common.draw_color(random.Random(0), True, 1.0)
        batch[f"{kind}_color"] = torch.tensor([numbers] * 3)
    mean, std = torch.rand(2, 3, 1, 1, generator=gen)
    crops = pretrain.make_crops(batch, ["noisy"], mean, std)
    for crop, kind in zip(crops["noisy"], ("global", "local"), strict=True):
        expected = common.color(batch[f"noisy_{kind}"], batch[f"{kind}_color"])
        torch.testing.assert_close(crop * std + mean, expected)


MIXED = [(32, 32), (20, 45), (64, 16), (33, 31)] * 4  # height, width


@FEW_CORES
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_images_of_any_size_and_channels_train_the_same_from_memory_and_from_disk(
        tmp_path, channels, steps):
    images = Images(tmp_path, MIXED, channels)
    train(tmp_path / "first", *images.denoised, "--epochs", 1)
    before = []
    steps.before = lambda run: before.append(networks(run)["student"])
    command = [*images.anchored, "--epochs", 1, "--init", tmp_path / "first"]
    memory = train(tmp_path / "memory", *command, "--cache_gb", 1)
    disk = train(tmp_path / "disk", *command, "--cache_gb", 0, "--workers", 2)
    assert not differences(memory, disk)

    folder = common.Folder(images.data, "train", "gauss50")
    pixels = torch.cat([folder.read(i).flatten(1) for i in range(len(MIXED))], 1) / 255.0
    mean, std = pixels.double().mean(1), pixels.double().std(1, unbiased=False)
    assert memory["data"]["mean"] == pytest.approx(mean.tolist(), rel=1e-6)
    assert memory["data"]["std"] == pytest.approx(std.tolist(), rel=1e-6)

    name = "backbone.patch_embed.proj.weight"  # (D, channels, 8, 8)
    moved = (memory["student"][name] - before[0][name]).abs().amax((0, 2, 3))
    assert len(moved) == channels
    assert moved.min() > 1e-5


# ==== --init_backbone =============================================================================
def started(images, path, *flags):
    """A new run that starts from a file of weights."""
    run = pretrain.Run(config(*images.noisy, *flags, "--init_backbone", path), 3, CPU)
    run.start()
    return run


def vit(**kw):
    """Of the tiny runs' shape, with random weights, so that no two are equal."""
    model = common.make_vit("16,2,2", 8, **{"img_size": 32, "init_values": 1.0, **kw}).eval()
    gen = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=gen)
    return model


def save(tmp_path, state):
    torch.save(state, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def resized(pos_embed, side):
    """Position embedding (1, 1 + 16, D) on a grid of side x side."""
    grid = pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).mT], 1)


def test_init_backbone_starts_student_and_teacher_with_a_resized_position_embedding(
        images, runs, capsys):
    run = started(images, runs.nct.out / "backbone.pth", "--seed", 9, "--global_size", 48)
    expected = backbone_of(runs.nct.out)
    position = resized(expected.pop("pos_embed"), 6)
    for network in (run.network, run.teacher):
        state = network.backbone.state_dict()
        torch.testing.assert_close(state.pop("pos_embed"), position, rtol=1e-5, atol=1e-6)
        assert not differences(state, expected)
    fresh = pretrain.Run(config(*images.noisy, "--seed", 9, "--global_size", 48), 3, CPU)
    for network in (run.network, run.teacher):
        assert not differences(network.head.state_dict(), fresh.network.head.state_dict())
    assert "not used: none" in capsys.readouterr().out


@pytest.mark.parametrize("entry, prefix", [
    (None, ""), (None, "module.backbone."), ("teacher", "backbone."), ("model", ""),
    ("state_dict", "module.")])
def test_init_backbone_finds_the_weights_in_files_of_other_code(images, tmp_path, entry, prefix):
    model = vit()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    path = save(tmp_path, {entry: state} if entry else state)
    run = started(images, path)
    assert not differences(run.network.backbone.state_dict(), model.state_dict())


def test_init_backbone_says_what_it_does_not_use(images, tmp_path, capsys):
    state = vit().state_dict() | {"norm_pre.weight": torch.zeros(16), "head.bias": torch.zeros(3)}
    started(images, save(tmp_path, state))
    assert "not used: norm_pre.weight\n" in capsys.readouterr().out  # a classifier goes without


def test_init_backbone_takes_timms_registers_and_positions(images, tmp_path):
    """timm's ViTs with registers: another name, no mask token, and the class token holds its own
    position."""
    model = vit(registers=2)
    state = model.state_dict()
    state["reg_token"] = state.pop("register_tokens")
    state["pos_embed"] = state["pos_embed"][:, 1:]
    del state["mask_token"]
    run = started(images, save(tmp_path, state), "--registers", 2, "--global_size", 48)
    found = run.network.backbone.state_dict()
    assert torch.equal(found["register_tokens"], model.register_tokens)
    assert (found["mask_token"] == 0).all()
    assert (found["pos_embed"][:, 0] == 0).all()
    expected = resized(model.pos_embed.detach(), 6)[:, 1:]
    torch.testing.assert_close(found["pos_embed"][:, 1:], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_init_backbone_without_layer_scale_gives_the_features_of_a_vit_that_has_none(
        images, tmp_path):
    """That is one whose LayerScale is 1, whatever --layer_scale says."""
    theirs = vit()
    for block in theirs.blocks:
        block.ls1.gamma.fill_(1)
        block.ls2.gamma.fill_(1)
    state = {k: v for k, v in theirs.state_dict().items() if "gamma" not in k}
    run = started(images, save(tmp_path, state), "--layer_scale", 1e-5)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(run.teacher.backbone(x), theirs(x))


@pytest.mark.parametrize("name, value, message", [
    ("blocks.1.mlp.fc1.bias", None, r"does not fit .*blocks\.1\.mlp\.fc1\.bias"),
    ("patch_embed.proj.weight", torch.zeros(16, 1, 8, 8), r"not fit .*patch_embed\.proj\.weight"),
    ("blocks.0.norm1.weight", None, r"no weights of a ViT, blocks\.0\.norm1\.weight is missing"),
    ("pos_embed", torch.zeros(1, 22, 16), "pos_embed has 22 positions"),
    ("pos_embed", torch.zeros(1, 12, 16), "pos_embed has 12 positions"),
])
def test_init_backbone_that_does_not_fit_is_refused(images, tmp_path, name, value, message):
    state = vit().state_dict()
    if value is None:
        del state[name]
    else:
        state[name] = value
    path = save(tmp_path, state)
    with pytest.raises(UserError, match=rf"weights\.pth: .*{message}"):
        started(images, path)


@pytest.mark.parametrize("name, patch, registers", [
    ("vit_small_patch16_224", 16, 0), ("vit_base_patch16_224", 16, 0),
    ("vit_small_patch14_reg4_dinov2", 14, 4)])
@torch.no_grad()
def test_init_backbone_takes_timms_weights_and_gives_timms_features(
        tmp_path, name, patch, registers):
    timm = pytest.importorskip("timm", reason="timm is not installed, or its torchvision")
    torch.manual_seed(0)
    theirs = timm.create_model(name, init_values=1e-5, num_classes=0, img_size=112).eval()
    for p in theirs.parameters():
        p.add_(0.02 * torch.randn(p.shape))
    path = save(tmp_path, theirs.state_dict())
    arch = name[:name.index("_patch")]
    ours = common.make_vit(arch, patch, img_size=112, registers=registers).eval()
    assert common.load_backbone(ours, common.read_backbone(path), path) == []
    x = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    tokens, found = theirs.forward_features(x), ours.forward_features(x)
    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
    close(found["cls"], tokens[:, 0])
    close(found["patches"], tokens[:, 1 + registers:])


# ==== what a run says and leaves ==================================================================
def test_backbone_file_is_the_teachers_backbone(runs):
    weights, state = backbone_of(runs.nct.out), runs.nct.state
    assert "blocks.1.attn.qkv.weight" in weights
    assert not differences(weights, part_of(state["teacher"], "backbone."))
    assert differences(weights, part_of(state["student"], "backbone."))


def test_run_leaves_its_settings_and_a_summary(runs):
    saved = json.loads((runs.nct.out / "config.json").read_text())
    assert saved["anchor"] == WEIGHT
    assert saved["init"].endswith("epoch1.pth")
    assert (saved["images"], saved["channels"]) == (24, 3)
    assert len(saved["mean"]) == len(saved["std"]) == 3
    summary = json.loads((runs.nct.out / "summary.json").read_text())
    assert summary["epochs"] == 2
    assert summary["images_s"] > 0
    assert "CPU" in summary["device"]
    assert 0.05 < summary["peak_gb"] < 50
    first = json.loads((runs.first.out / "summary.json").read_text())
    assert first["epochs"] == 1


def test_seeds_give_other_weights(images, runs, tmp_path):
    other = train(tmp_path, *runs.first.flags, "--seed", 1)
    assert differences(other["teacher"], runs.first.teacher)


def test_random_run_of_no_epochs_writes_the_untrained_backbone(images, tmp_path):
    train(tmp_path, *images.noisy, "--epochs", 0, "--seed", 3)
    fresh = pretrain.Run(config(*images.noisy, "--seed", 3), 3, CPU)
    assert not differences(backbone_of(tmp_path), fresh.network.backbone.state_dict())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["epochs"] == 0
    assert summary["images_s"] is None


def test_random_run_of_no_epochs_is_complete_the_next_time(images, tmp_path, capsys):
    command = [tmp_path, *images.noisy, "--epochs", 0]
    train(*command)
    capsys.readouterr()
    train(*command)
    assert "complete, nothing to do" in capsys.readouterr().out


def test_batch_larger_than_the_set_warns_and_takes_the_set(images, tmp_path, capsys):
    state = train(tmp_path, *images.noisy, "--epochs", 2, "--batch_size", 64)
    text = capsys.readouterr().out
    assert "warning: --batch_size 64 is larger than the set of 24 images; using 24" in text
    assert state["position"][:2] == (2, 0)
    first, last = log(tmp_path)
    assert first["lr"] == pytest.approx(0.02 * math.sqrt(24 / 1024), rel=1e-5)
    assert last["step"] == 2


@pytest.mark.parametrize("prototypes, warns", [(240, False), (241, True)])
def test_more_prototypes_than_are_of_use_are_warned_of(
        images, tmp_path, capsys, prototypes, warns):
    train(tmp_path, *images.noisy, "--epochs", 1, "--prototypes", prototypes)
    text = capsys.readouterr().out
    assert ("warning: --prototypes 241: more than about 240 are of no use" in text) == warns
    assert ("--prototypes" in text) == warns


def test_loss_that_is_not_finite_stops_the_run_at_the_last_checkpoint(
        runs, tmp_path, monkeypatch, capsys):
    calls, koleo = itertools.count(1), common.koleo_loss

    def broken(x):
        views = 2  # a step
        return koleo(x) * (math.nan if next(calls) > views * (STEPS + 1) else 1)

    monkeypatch.setattr(common, "koleo_loss", broken)
    with pytest.raises(SystemExit) as code:
        common.run(lambda: call(tmp_path, *runs.denoised.flags, "--log_steps", 100))
    assert code.value.code == 2
    error, = [line for line in capsys.readouterr().err.splitlines() if line]
    assert error.startswith(f"error: loss term koleo is not finite at step {STEPS + 2};")
    kept = common.load_checkpoint(tmp_path / "checkpoint.pth")
    assert kept["position"][:2] == (1, 0)
    assert not (tmp_path / "backbone.pth").exists()
    assert not differences(kept["student"], runs.first.student)


def test_log_holds_losses_schedules_and_collapse_monitors_of_every_step(runs):
    for name in ("first", "nc", "nct"):
        for r in log(runs.root / name):
            total = r["dino"] + 0.5 * r["ibot"] + 0.1 * r["koleo"]
            if name == "nct":
                total += WEIGHT * (r["anchor_dino"] + r["anchor_ibot"])
            assert r["total"] == pytest.approx(total, rel=1e-4)
            assert r["kl"] == pytest.approx(r["dino"] - r["entropy"], abs=1e-4)
            assert 0 < r["entropy"] <= math.log(16)
            assert 1 <= r["rank"] <= 16
            assert r["source"] == ("denoised" if name == "first" else "noisy")
            assert r.keys() >= {"epoch", "lr", "weight_decay", "momentum", "temp", "frozen"}


def test_monitors_tell_collapse_from_spread():
    """Equal class tokens: no spread; an orthogonal set: the rank of its centred rows."""
    targets = torch.full((2, 4, 16), 1 / 16)
    losses = {"dino": torch.tensor(3.0)}
    spread = pretrain.monitors(losses, targets, torch.eye(16)[:8])
    assert spread["rank"] == pytest.approx(7, rel=1e-4)
    assert spread["entropy"] == pytest.approx(math.log(16))
    assert spread["kl"] == pytest.approx(3 - math.log(16), rel=1e-5)
    collapsed = pretrain.monitors(losses, targets, torch.ones(8, 16))
    assert collapsed["cls_std"] < 1e-5 < spread["cls_std"]
    assert collapsed["rank"] == pytest.approx(1)


@pytest.mark.parametrize("share, rank, said", [
    (0.01, 8, "gives all images one prototype"), (0.03, 8, ""), (0.98, 8, ""),
    (0.995, 8, "the teacher stays uniform"), (0.5, 1.4, "all images get the same features"),
    (0.5, 1.6, "")])
def test_collapse_says_what_is_wrong_and_what_helps(share, rank, said):
    text = pretrain.collapse({"entropy": share * math.log(512), "rank": rank}, 512)
    assert said in text
    assert bool(text) == bool(said)
    assert ("use " in text) == bool(said)


@pytest.mark.parametrize("ill, warned", [
    ("yyyyyy", [100]), ("ynynyn", []), ("nyynyy", [100, 100]), ("yy----", [100]), ("y-----", [])])
def test_collapse_is_told_once_it_has_lasted(images, tmp_path, monkeypatch, capsys, ill, warned):
    """For 100 steps, here two lines of the log; again only after the monitors were in order. The
    run itself is cut down to its loop. ill: whether they complain, line by line."""
    losses = {"total": torch.tensor(1.0)}, None, None
    verdicts = iter(ill)
    monkeypatch.setattr(pretrain, "make_batch", lambda *_: {})
    monkeypatch.setattr(pretrain, "make_crops", lambda *_: {})
    monkeypatch.setattr(pretrain, "step_losses", lambda *_: losses)
    monkeypatch.setattr(pretrain, "monitors", lambda *_: {"entropy": 1.0, "rank": 2.0})
    monkeypatch.setattr(pretrain.Run, "update", lambda *_: None)

    def collapse(record, prototypes):
        return "all is lost" if next(verdicts) == "y" else ""

    monkeypatch.setattr(pretrain, "collapse", collapse)
    train(tmp_path, *images.noisy, "--batch_size", 1, "--epochs", 13, "--log_steps", 50)
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if line.startswith("warning: since")]
    assert told == [f"warning: since {steps} steps all is lost" for steps in warned]
