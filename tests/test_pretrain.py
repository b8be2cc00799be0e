"""pretrain.py held to the paper: losses recomputed by plain calls, curricula compared to the bit, runs stopped and
continued. Networks of 16 features on 24 images of 32 x 32."""

import copy
import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
words = str.split
TINY = words("--preset tiny --device cpu --workers 0 --log_steps 1 --arch 16,2,2 --head_hidden 16 --head_bottleneck 8 "
             "--prototypes 16 --patch_size 8 --global_size 32 --local_size 16 --local_crops 2 --batch_size 8 --lr 0.02 "
             "--layer_scale 1 --layer_decay 0.9 --patch_embed_lr 0.2 --warmup_epochs 0 --momentum 0.9 --noise gauss50 "
             "--teacher_temp 0.07 --teacher_temp_warmup_epochs 1 --ibot_weight 0.5")
STEPS = 3  # an epoch


@pytest.fixture(autouse=True)
def signals():
    """Training takes the signals over; give them back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def write_images(folder, sizes, channels=3, seed=0):
    """Smooth random pictures, train/NN.png or, for 5 channels, .npy."""
    rng = np.random.default_rng(seed)
    (folder / "train").mkdir(parents=True)
    for i, (h, w) in enumerate(sizes):
        y, x = np.mgrid[:h, :w][..., None]
        wave, level, phase = rng.uniform(0.1, 0.6, (3, channels))
        picture = np.rint(127 + 120 * level * np.sin(wave * x + phase * y + 9 * level)).astype(np.uint8)
        if channels == 5:
            np.save(folder / f"train/{i:02d}.npy", picture)
        else:
            Image.fromarray(picture[:, :, 0] if channels == 1 else picture).save(folder / f"train/{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Flags that name 24 images, and 24 others that pass for their denoised copies."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "data", [(32, 32)] * 24)
    write_images(root / "denoised", [(32, 32)] * 24, seed=1)
    return ["--data", str(root / "data"), "--denoised", str(root / "denoised")]


def train(images, out, *flags):
    """Run pretrain.py in this process to its end; gives the checkpoint, None where there is none."""
    assert pretrain.main([*TINY, *images, "--out", str(out), *map(str, flags)]) == 0
    return common.load_checkpoint(out / "checkpoint.pth", required=False)


def differences(a, b, name=""):
    """Names of all entries of two nested states whose bits differ; wall time and flags set aside."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = (a.keys() | b.keys()) - ({"config"} if not name else set())
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{name}/{k}")]
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        count = 4 if name == "/position" else len(a)  # the fifth is the wall time
        return [d for i in range(count) for d in differences(a[i], b[i], f"{name}/{i}")]
    same = torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a == b
    return [] if same else [name]


def log(out):
    """Records of a run's log without what the clock wrote."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_s")} for r in records]


def config(images, *flags):
    return pretrain.read_config([*TINY, *images, "--out", "none", *map(str, flags)])


@pytest.fixture
def steps(monkeypatch):
    """Watch every step of a run: step_losses and Run.update call the functions put in before, losses and after."""
    watch = SimpleNamespace(before=lambda run: None, losses=lambda run, result: None, after=lambda run, values: None)
    step_losses, update = pretrain.step_losses, pretrain.Run.update

    def watched_losses(args, run, *rest):
        watch.before(run)
        result = step_losses(args, run, *rest)
        watch.losses(run, result)
        return result

    def watched_update(run, loss, values):
        update(run, loss, values)
        watch.after(run, values)

    monkeypatch.setattr(pretrain, "step_losses", watched_losses)
    monkeypatch.setattr(pretrain.Run, "update", watched_update)
    return watch


def snapshot(run):
    return copy.deepcopy({"student": run.network.state_dict(), "teacher": run.teacher.state_dict(),
                          "centers": run.centers})


# ======================================================================================================
# curricula, arms, presets
# ======================================================================================================

@pytest.mark.parametrize("text, phases", [
    ("noisy:200", [("noisy", 200, 200)]),
    ("noisy:0", [("noisy", 0, 0)]),
    ("denoised:140/200,noisy:60", [("denoised", 140, 200), ("noisy", 60, 60)]),
    ("clean:1,denoised:2/2,noisy:3/9", [("clean", 1, 1), ("denoised", 2, 2), ("noisy", 3, 9)])])
def test_curriculum_is_sources_epochs_and_schedules(text, phases):
    assert [(p.source, p.epochs, p.schedule) for p in pretrain.parse_curriculum(text)] == phases


@pytest.mark.parametrize("text", ["", "noisy", "noisy:", "noisy:-1", "noisy:1.5", "blurred:3", "noisy:3/2", "noisy:1,",
                                  "noisy:1;denoised:2", "Noisy:1", "noisy:1/", "noisy:1/2/3"])
def test_curriculum_that_makes_no_sense_is_an_error_that_quotes_it(text):
    with pytest.raises(UserError, match=r"^--curriculum .*SOURCE:EPOCHS") as error:
        pretrain.parse_curriculum(text)
    assert text.split(",")[-1] in str(error.value)


@pytest.mark.parametrize("arm, curriculum, anchor", [
    ("random", "noisy:0", 0), ("noisy", "noisy:200", 0), ("denoised", "denoised:200", 0), ("clean", "clean:200", 0),
    ("phase1", "denoised:140/200", 0), ("nc", "denoised:140/200,noisy:60", 0),
    ("nct", "denoised:140/200,noisy:60", 1.1)])
def test_arms_are_curricula_and_only_nct_has_an_anchor(arm, curriculum, anchor):
    flags = words("--preset imagenet100 --data d --denoised d --out o --noise gauss255 --arm")
    args = pretrain.read_config([*flags, arm])
    assert (args.curriculum, args.anchor) == (curriculum, anchor)


@pytest.mark.parametrize("preset, noise, weight", [
    ("imagenet100", "gauss100", 4.0), ("imagenet100", "gauss255", 1.1), ("imagenet100", "shot1", 5.0),
    ("imagenet100", "speckle1.0", 2.0), ("imagenet1k", "gauss100", 2.0), ("imagenet1k", "gauss255", 1.6)])
def test_anchor_weight_is_the_papers(preset, noise, weight):
    flags = ["--preset", preset, "--noise", noise, *words("--data d --denoised d --out o --arm nct")]
    assert pretrain.read_config(flags).anchor == weight
    assert pretrain.read_config([*flags, "--anchor", "0.25"]).anchor == 0.25


PAPER = {
    "patch_size": 16, "registers": 0, "layer_scale": 1e-5, "prototypes": 65536, "head_hidden": 2048,
    "head_bottleneck": 256, "global_size": 224, "local_size": 96, "local_crops": 8, "global_scale": [0.32, 1],
    "local_scale": [0.05, 0.32], "lr": 0.004, "weight_decay": [0.04, 0.4], "layer_decay": 0.9,
    "patch_embed_lr": 0.2, "clip": 3.0, "freeze_last_epochs": 1, "momentum": 0.992, "teacher_temp": 0.07,
    "centering": "center", "ibot_weight": 1.0, "koleo_weight": 0.1, "restart": True, "anchor_head": "frozen"}


@pytest.mark.parametrize("preset, own, phases", [
    ("imagenet100", {"arch": "vit_small", "batch_size": 40, "drop_path": 0.0,
                     "curriculum": "denoised:140/200,noisy:60"}, [(10, 30), (10, 30)]),
    ("imagenet1k", {"arch": "vit_base", "batch_size": 512, "drop_path": 0.1,
                    "curriculum": "denoised:30/100,noisy:70"}, [(10, 30), (5, 15)])])
def test_presets_hold_the_papers_numbers(preset, own, phases):
    flags = words("--data d --denoised d --out o --noise gauss100 --arm nct --preset")
    args = pretrain.read_config([*flags, preset])
    assert {k: getattr(args, k) for k in PAPER | own} == PAPER | own
    for p, warmups in enumerate(phases):
        pair = args.warmup_epochs, args.teacher_temp_warmup_epochs
        assert tuple(v[min(p, len(v) - 1)] for v in pair) == warmups


@pytest.mark.parametrize("flags, message", [
    ("--curriculum clean:1 --noise none", "no clean images are known"),
    ("--curriculum denoised:1", "needs --denoised DIR"),
    ("--curriculum noisy:1 --denoised d --anchor 1", "--anchor: works in a noisy phase after a denoised one"),
    ("--curriculum denoised:1,denoised:1 --denoised d --anchor 1", "--anchor: works in a noisy phase after"),
    ("--curriculum denoised:1 --denoised d --anchor 1 --anchor_from c", "--anchor: works in a noisy phase"),
    ("--arm noisy --global_size 30", "--global_size 30: is no multiple of --patch_size 8"),
    ("--arm noisy --local_size 12", "--local_size 12: is no multiple of --patch_size 8"),
    ("--arm noisy --batch_size 0", "--batch_size 0: must be more than 0"),
    ("--arm noisy --lr -1", "--lr -1.0: must be more than 0")])
def test_flags_that_contradict_are_named(flags, message):
    with pytest.raises(UserError) as error:
        pretrain.read_config([*TINY, "--data", "d", "--out", "o", *flags.split()])
    assert message in str(error.value)


# ======================================================================================================
# schedules
# ======================================================================================================

def series(curriculum, phase, *flags, per_epoch=4, batch=256):
    """schedules() at every step of a phase."""
    base = words("--data d --denoised d --out o --noise gauss50 --preset imagenet1k --curriculum")
    args = pretrain.read_config([*base, curriculum, *flags])
    phases = pretrain.parse_curriculum(curriculum)
    count = phases[phase].epochs * per_epoch
    return [pretrain.schedules(args, phases, phase, s, per_epoch, batch) for s in range(count)]


def test_cut_phase_follows_the_beginning_of_the_long_schedule_to_the_bit():
    cut, whole = series("denoised:40/100", 0), series("denoised:100", 0)
    assert cut == whole[:160] != series("denoised:40", 0)


def test_switch_restarts_every_schedule():
    second = series("denoised:40/100,noisy:60", 1, "--warmup_epochs", "10", "--teacher_temp_warmup_epochs", "30")
    assert second == series("noisy:60", 0)
    expected = {"lr": 0.0, "weight_decay": 0.04, "momentum": 0.992, "temp": 0.04, "frozen": True}
    assert second[0] == pytest.approx(expected, rel=1e-12)
    assert [v["frozen"] for v in second] == [True] * 4 + [False] * 236


def test_without_restart_one_schedule_runs_over_all_phases():
    parts = [series("denoised:40/100,noisy:60", p, "--no-restart") for p in (0, 1)]
    assert parts[0] + parts[1] == series("noisy:100", 0)
    assert parts[0] == series("denoised:40/100", 0, "--no-restart")  # a first phase that is trained alone


def test_schedules_have_the_papers_values():
    """Peak 0.004 sqrt(batch / 1024) after 10 epochs, then a cosine to 1e-6; temperature 0.04 to 0.07 in 30 epochs."""
    values = series("noisy:100", 0)
    peak = 0.004 * 0.5
    assert values[20]["lr"] == pytest.approx(peak * 20 / 39)
    assert values[39]["lr"] == values[40]["lr"] == pytest.approx(peak) == max(v["lr"] for v in values)
    assert values[220]["lr"] == pytest.approx((peak + 1e-6) / 2)
    assert values[200]["momentum"] == pytest.approx(0.996)
    assert values[200]["weight_decay"] == pytest.approx(0.22)
    assert values[399]["momentum"] > 0.9999 and values[399]["weight_decay"] > 0.3999 and values[399]["lr"] < 2e-6
    assert values[60]["temp"] == pytest.approx(0.04 + 0.03 * 60 / 119)
    assert {v["temp"] for v in values[120:]} == {0.07}


@pytest.mark.parametrize("phase, warmup, temp_warmup", [(0, 10, 30), (1, 5, 15), (2, 5, 15)])
def test_each_phase_has_its_own_warmups_and_later_ones_the_last(phase, warmup, temp_warmup):
    values = series("denoised:30/100,noisy:70,denoised:70", phase)  # imagenet1k: 10,5 and 30,15
    rates, temps = [v["lr"] for v in values], [v["temp"] for v in values]
    assert rates.index(max(rates)) == 4 * warmup - 1
    assert len([t for t in temps if t < 0.07]) == min(len(temps), 4 * temp_warmup - 1)


@pytest.mark.parametrize("batch", [64, 1024, 4096])
def test_learning_rate_grows_with_the_root_of_the_batch(batch):
    assert max(v["lr"] for v in series("noisy:20", 0, batch=batch)) == pytest.approx(0.004 * (batch / 1024) ** 0.5)


# ======================================================================================================
# losses of one step, against plain calls of the run's own networks
# ======================================================================================================

def make_step(images, *flags, seed=0):
    """A run whose teacher, anchor and centres all differ, with the inputs of one step."""
    args = config(images, *flags)
    run = pretrain.Run(args, 3, CPU)
    gen = torch.Generator().manual_seed(seed)
    run.set_anchor(run.teacher.state_dict(), run.centers)
    if not args.anchor:
        run.anchor = run.anchor_centers = None
    for network in (run.network, run.teacher, run.anchor):
        for p in network.parameters() if network else ():
            p.data += 0.2 * torch.randn(p.shape, generator=gen)
    for centers in (run.centers, run.anchor_centers or {}):
        centers |= {k: 0.05 * torch.randn(v.shape, generator=gen) for k, v in centers.items()}
    crops = [torch.randn(8, 3, 32, 32, generator=gen), torch.randn(8, 3, 16, 16, generator=gen)]
    anchor_crops = torch.randn(8, 3, 32, 32, generator=gen) if args.anchor else None
    masks = torch.rand(8, 16, generator=gen) < torch.tensor([[0.5], [0], [0.3], [0], [0.4], [0], [0], [0.2]])
    return args, run, crops, anchor_crops, masks


def plain_targets(backbone, head, crops, centers, temp):
    """Teacher probabilities of class tokens (2, B, K) and of all patches (2B, N, K) of unmasked crops."""
    with torch.no_grad():
        tokens = backbone.forward_features(crops)
        cls = ((head(tokens["cls"]) - centers["cls"]) / temp).softmax(-1)
        return cls.unflatten(0, (2, -1)), ((head(tokens["patches"]) - centers["patch"]) / temp).softmax(-1)


def plain_losses(run, crops, masks, targets):
    """(dino, ibot, koleo) with loops."""
    masked = run.network.backbone.forward_features(crops[0], masks)
    local = run.network.backbone.forward_features(crops[1])["cls"]
    log_p = (run.network.head(torch.cat([masked["cls"], local])) / 0.1).log_softmax(-1).split(4)
    pairs = [-(targets[0][t] * log_p[s]).sum(-1).mean() for t in range(2) for s in range(len(log_p)) if s != t]
    patches = (run.network.head(masked["patches"]) / 0.1).log_softmax(-1)
    ibot = sum(-(targets[1][i, m] * patches[i, m]).sum(-1).mean() for i, m in enumerate(masks) if m.any()) / len(masks)
    koleo = 0
    for view in F.normalize(masked["cls"], dim=-1).split(4):
        for i, x in enumerate(view):
            koleo -= math.log(min((x - y).norm().item() for j, y in enumerate(view) if j != i) + 1e-8) / 4
    return sum(pairs) / len(pairs), ibot, torch.tensor(koleo)


@pytest.mark.parametrize("anchor, head", [(0, "frozen"), (3, "frozen"), (3, "live")])
def test_total_is_the_weighted_sum_of_losses_recomputed_by_plain_calls(images, anchor, head):
    """The teachers' targets are computed here on unmasked global crops: a teacher that saw the mask would differ."""
    args, run, crops, anchor_crops, masks = make_step(
        images, "--arm", "nct", "--anchor", anchor, "--anchor_head", head, "--ibot_weight", 0.7, "--koleo_weight", 0.3)
    targets = plain_targets(run.teacher.backbone, run.teacher.head, crops[0], run.centers, 0.05)
    dino, ibot, koleo = plain_losses(run, crops, masks, targets)
    expected = {"dino": dino, "ibot": ibot, "koleo": koleo, "total": dino + 0.7 * ibot + 0.3 * koleo}
    if anchor:
        used = run.teacher.head if head == "live" else run.anchor.head
        targets = plain_targets(run.anchor.backbone, used, anchor_crops, run.anchor_centers, 0.05)
        expected["anchor_dino"], expected["anchor_ibot"], _ = plain_losses(run, crops, masks, targets)
        expected["total"] = expected["total"] + 3 * (expected["anchor_dino"] + 0.7 * expected["anchor_ibot"])
    losses = pretrain.step_losses(args, run, crops, anchor_crops, masks, 0.05)[0]
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_losses_of_a_step_in_bf16_equal_float32_to_a_hundredth(images):
    steps = [make_step(images, "--arm", "nct", "--anchor", 2) for _ in range(2)]
    full = pretrain.step_losses(*steps[0], 0.05)[0]
    with torch.autocast("cpu", torch.bfloat16):
        low = pretrain.step_losses(*steps[1], 0.05)[0]
    assert len(full) == 6 and {v.dtype for v in low.values()} == {torch.float32} and low["dino"] != full["dino"]
    assert {k: v.item() for k, v in low.items()} == pytest.approx({k: v.item() for k, v in full.items()}, rel=1e-2)


def test_both_teachers_are_sharpened_by_the_scheduled_temperature(images, tmp_path, monkeypatch):
    seen, softmax = [], common.softmax_center
    monkeypatch.setattr(common, "softmax_center", lambda *a: seen.append(a[2]) or softmax(*a))
    train(images, tmp_path / "run", "--curriculum", "denoised:2,noisy:1", "--anchor", 1)
    warm = [0.04, 0.055, 0.07]
    live, both = np.repeat([*warm, 0.07, 0.07, 0.07], 2), np.repeat(warm, 4)  # class tokens and patches of a teacher
    assert seen == pytest.approx([*live, *both])


def test_sinkhorn_targets_do_not_depend_on_the_centres(images):
    args, run, crops, _, masks = make_step(images, "--arm", "noisy", "--centering", "sinkhorn")
    assert run.centers["cls"].abs().max() > 0.05
    _, targets, _ = pretrain.step_losses(args, run, crops, None, masks, 0.05)
    with torch.no_grad():
        expected = common.sinkhorn(run.teacher.head(run.teacher.backbone(crops[0])), 0.05)
    torch.testing.assert_close(targets.flatten(0, 1), expected)


def test_centres_move_a_tenth_to_the_teachers_mean_output_after_use(images):
    args, run, crops, anchor_crops, masks = make_step(images, "--arm", "nct", "--anchor", 1)
    old = {"live": copy.deepcopy(run.centers), "anchor": copy.deepcopy(run.anchor_centers)}
    pretrain.step_losses(args, run, crops, anchor_crops, masks, 0.05)
    for name, teacher, x, new in (("live", run.teacher, crops[0], run.centers),
                                  ("anchor", run.anchor, anchor_crops, run.anchor_centers)):
        with torch.no_grad():
            tokens = teacher.backbone.forward_features(x)
            outputs = {"cls": teacher.head(tokens["cls"]), "patch": teacher.head(tokens["patches"][masks])}
        for kind, y in outputs.items():
            torch.testing.assert_close(new[kind], 0.9 * old[name][kind] + 0.1 * y.mean(0), rtol=1e-4, atol=1e-6)


def test_drop_path_acts_in_the_student_alone(images):
    args, run, crops, _, masks = make_step(images, "--arm", "noisy", "--drop_path", 0.5)
    centers, results = run.centers, []
    for seed in (0, 0, 1):
        run.centers = dict(centers)
        gen = torch.Generator().manual_seed(seed)
        losses, targets, _ = pretrain.step_losses(args, run, crops, None, masks, 0.05, [
            torch.rand(4, 8, generator=gen), torch.rand(4, 8, generator=gen)])
        results.append((losses["dino"].item(), targets, run.centers))
    assert results[0][0] == results[1][0] != results[2][0]
    assert not differences(list(results[0][1:]), list(results[2][1:]), "teacher")


# ======================================================================================================
# anchor
# ======================================================================================================

def test_anchor_weight_scales_its_gradient_linearly(images):
    gradients = []
    for weight in (0, 1, 3):
        args, run, crops, anchor_crops, masks = make_step(images, "--arm", "nct", "--anchor", 1)
        args.anchor = weight
        pretrain.step_losses(args, run, crops, anchor_crops, masks, 0.05)[0]["total"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in run.network.parameters() if p.grad is not None]))
    one, three = gradients[1] - gradients[0], gradients[2] - gradients[0]
    assert one.norm() > 0.01 * gradients[0].norm()
    assert (three - 3 * one).norm() < 1e-5 * three.norm()


def anchor_terms(images, change=lambda run, crops, anchor_crops: None, head="frozen"):
    """Losses and anchor centres of the same step, after a change of its inputs."""
    args, run, crops, anchor_crops, masks = make_step(images, "--arm", "nct", "--anchor", 1, "--anchor_head", head)
    change(run, crops, anchor_crops)
    losses = pretrain.step_losses(args, run, crops, anchor_crops, masks, 0.05)[0]
    return {k: v.item() for k, v in losses.items()}, run.anchor_centers


def test_anchor_targets_come_from_denoised_crops_and_the_student_sees_noisy_ones(images):
    plain, centers = anchor_terms(images)
    noisy_locals, same_centers = anchor_terms(images, lambda run, crops, denoised: crops[1].mul_(-1))
    assert noisy_locals["anchor_dino"] != plain["anchor_dino"] and noisy_locals["anchor_ibot"] == plain["anchor_ibot"]
    assert not differences(centers, same_centers, "centers")
    noisy_globals, same_centers = anchor_terms(images, lambda run, crops, denoised: crops[0].mul_(-1))
    assert noisy_globals["anchor_ibot"] != plain["anchor_ibot"]
    assert not differences(centers, same_centers, "centers")
    denoised, other_centers = anchor_terms(images, lambda run, crops, denoised: denoised.mul_(-1))
    assert [k for k in plain if denoised[k] != plain[k]] == ["total", "anchor_dino", "anchor_ibot"]
    assert len(differences(centers, other_centers, "centers")) == 2


@pytest.mark.parametrize("head, used", [("frozen", "anchor"), ("live", "teacher")])
def test_anchor_uses_the_head_that_the_flag_says_and_always_its_own_backbone(images, head, used):
    plain, _ = anchor_terms(images, head=head)

    def changes(network, part):
        def change(run, crops, denoised):
            for p in getattr(getattr(run, network), part).parameters():
                p.data *= 1.5
        return anchor_terms(images, change, head)[0]["anchor_dino"] != plain["anchor_dino"]

    assert {n for n in ("anchor", "teacher") if changes(n, "head")} == {used}
    assert {n for n in ("anchor", "teacher") if changes(n, "backbone")} == {"anchor"}


def test_frozen_teacher_and_its_centres_start_from_the_checkpoint_and_only_the_centres_move(images, tmp_path, steps):
    first = train(images, tmp_path / "phase1", "--curriculum", "denoised:1")
    seen = []
    steps.before = lambda run: seen.append(run.anchor and copy.deepcopy((run.anchor.state_dict(), run.anchor_centers)))
    last = train(images, tmp_path / "nct", "--curriculum", "denoised:1,noisy:2", "--anchor", 2)
    assert seen[:STEPS] == [None] * STEPS and len(seen) == 3 * STEPS
    assert not differences(seen[STEPS][1], first["centers"], "centers")
    for weights in [w for w, _ in seen[STEPS:]] + [last["anchor"]]:
        assert not differences(weights, first["teacher"], "anchor")
    centers = [c for _, c in seen[STEPS:]] + [last["anchor_centers"]]
    assert all(len(differences(a, b, "centers")) == 2 for a, b in zip(centers, centers[1:], strict=False))
    assert differences(last["anchor_centers"], last["centers"], "centers")


def test_anchor_from_takes_teacher_and_centres_of_another_run(images, tmp_path, steps):
    other = train(images, tmp_path / "other", "--curriculum", "denoised:2", "--seed", 5)
    seen = []
    steps.before = lambda run: seen.append(copy.deepcopy((run.anchor.state_dict(), run.anchor_centers)))
    train(images, tmp_path / "run", "--curriculum", "noisy:1", "--anchor", 1, "--anchor_from",
          tmp_path / "other/checkpoint.pth")
    assert not differences(seen[0], (other["teacher"], other["centers"]), "anchor")
    assert not differences(seen[-1][0], other["teacher"], "anchor")


def test_anchor_zero_equals_nc_bit_for_bit(images, tmp_path):
    arms = {name: train(images, tmp_path / name, *f"--epochs 3 --switch 1 {flags}".split()) for name, flags in
            {"nc": "--arm nc", "zero": "--arm nct --anchor 0", "nct": "--arm nct --anchor 2"}.items()}
    assert not differences(arms["nc"], arms["zero"])
    assert log(tmp_path / "nc") == log(tmp_path / "zero")
    assert differences(arms["nc"]["student"], arms["nct"]["student"], "student")


def test_anchor_crops_are_the_noisy_ones_cut_from_the_denoised_images(images, tmp_path, monkeypatch):
    """Denoised images equal to the noisy ones: the same crops to the bit. Black ones: black crops for the anchor."""
    seen = []
    step_losses = pretrain.step_losses
    monkeypatch.setattr(pretrain, "step_losses", lambda args, run, crops, anchor_crops, *rest: (
        seen.append((crops[0], anchor_crops)), step_losses(args, run, crops, anchor_crops, *rest))[1])
    for i in range(24):
        (tmp_path / "black/train").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / f"black/train/{i:02d}.png")
    for denoised in (Path(images[1]), tmp_path / "black"):
        state = train([*images[:2], "--denoised", str(denoised)], tmp_path / f"run {denoised.name}", "--noise", "none",
                      "--curriculum", "denoised:1,noisy:1", "--anchor", 1)
    same, black = seen[STEPS:2 * STEPS], seen[3 * STEPS:]
    assert len(same) == len(black) == STEPS and all(torch.equal(a, b) for a, b in same)
    zero = (-torch.tensor(state["data"]["mean"]) / torch.tensor(state["data"]["std"]))[:, None, None]
    for noisy, anchor in black:
        torch.testing.assert_close(anchor, zero.expand_as(anchor))
        assert (noisy - zero).abs().mean() > 0.5
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(same, black, strict=True))


# ======================================================================================================
# one update, and what goes on at a switch
# ======================================================================================================

VALUES = {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.75, "temp": 0.05, "frozen": False}


def test_teacher_is_the_moving_average_of_the_student_after_the_step(images, tmp_path, steps):
    before, momenta, number = [], [], iter(range(100))

    def check(run, values):
        old, new, i = before[-1], snapshot(run), next(number)
        momenta.append(values["momentum"])
        assert momenta[-1] == pytest.approx(1 + (0.9 - 1) * 0.5 * (1 + math.cos(math.pi * i / (2 * STEPS))))
        for k, v in new["teacher"].items():
            expected = momenta[-1] * old["teacher"][k].double() + (1 - momenta[-1]) * new["student"][k].double()
            torch.testing.assert_close(v.double(), expected, rtol=1e-6, atol=1e-7)
        assert differences(old["student"], new["student"], "student")

    steps.before, steps.after = lambda run: before.append(snapshot(run)), check
    train(images, tmp_path / "run", "--curriculum", "noisy:2")
    assert len(momenta) == 2 * STEPS


def test_last_layer_is_frozen_in_the_first_epoch_of_each_phase(images, tmp_path, steps):
    before, moved = [], {"last_layer": [], "mlp": []}

    def check(run, values):
        changed = differences(before[-1]["student"], snapshot(run)["student"], "student")
        for part, record in moved.items():
            record.append(any(part in k and "head" in k for k in changed))

    steps.before, steps.after = lambda run: before.append(snapshot(run)), check
    train(images, tmp_path / "run", "--curriculum", "denoised:2,noisy:2")
    assert moved["last_layer"] == ([False] * STEPS + [True] * STEPS) * 2
    assert moved["mlp"] == [True] * 4 * STEPS


def test_update_is_adamw_with_betas_of_0_9_and_0_999(images):
    _, run, *_ = make_step(images, "--arm", "noisy", "--clip", 1e9)
    weight, gen = run.network.head.mlp[0].weight, torch.Generator().manual_seed(0)
    expected, first, second = weight.detach().double().clone(), 0, 0
    for t in range(1, 4):
        gradient = torch.randn(weight.shape, generator=gen)
        run.update((weight * gradient).sum(), VALUES)
        gradient = gradient.double()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        step = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * step  # decoupled decay: rate x weight decay
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped_for_backbone_and_head_each(images):
    directions = {}
    for clip in (1e9, 0.01):
        args, run, crops, _, masks = make_step(images, "--arm", "noisy", "--clip", clip)
        run.update(pretrain.step_losses(args, run, crops, None, masks, 0.05)[0]["total"], VALUES)
        for part in ("backbone", "head"):
            directions[part, clip] = torch.cat([p.grad.flatten() for p in getattr(run.network, part).parameters()])
    for part in ("backbone", "head"):
        whole, cut = directions[part, 1e9], directions[part, 0.01]
        assert whole.norm() > 0.1
        torch.testing.assert_close(cut, whole * (0.01 / whole.norm()), rtol=1e-4, atol=1e-9)


def test_weight_decay_spares_biases_norms_and_layer_scale(images):
    """With gradients of zero AdamW does nothing but decay: by lr x weight decay x the layer's factor."""
    args, run, *_ = make_step(images, "--arm", "noisy", "--registers", 1)
    before = copy.deepcopy(run.network.state_dict())
    run.update(sum((p * 0).sum() for p in run.network.parameters()), VALUES)
    for name, now in run.network.state_dict().items():
        below = 0 if name.startswith(("head", "backbone.norm")) else 3
        below = {"backbone.blocks.0": 2, "backbone.blocks.1": 1}.get(name[:17], below)
        factor = 1 - 0.05 * 0.9**below * (0.2 if "patch_embed" in name else 1)
        if "norm" in name or "gamma" in name or name.endswith("bias"):
            factor = 1.0
        torch.testing.assert_close(now, before[name] * factor, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("flag, kept", [("--restart", False), ("--no-restart", True)])
def test_switch_keeps_networks_and_centres_and_restarts_the_optimiser(images, tmp_path, steps, flag, kept):
    ends, starts, moments = [], [], []
    steps.after = lambda run, values: ends.append(snapshot(run))

    def start(run):
        starts.append(snapshot(run))
        moments.append({int(s["step"]) for s in run.optimizer.state.values()})

    steps.before = start
    train(images, tmp_path / "run", "--curriculum", "denoised:1,noisy:1", flag)
    assert not differences(ends[STEPS - 1], starts[STEPS])
    assert moments == [set(), {1}, {2}, *([{3}, {4}, {5}] if kept else [set(), {1}, {2}])]


# ======================================================================================================
# fork, stop, resume, processes
# ======================================================================================================

ARMS = {"denoised": "--arm denoised", "nc": "--arm nc", "nct": "--arm nct --anchor 2"}
LENGTH = words("--epochs 3 --switch 1")


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """Undisturbed runs of every arm and of the first phase: (folder, checkpoints)."""
    root = tmp_path_factory.mktemp("runs")
    arms = {**ARMS, "phase1": "--arm phase1"}
    return root, {arm: train(images, root / arm, *LENGTH, *flags.split()) for arm, flags in arms.items()}


@pytest.mark.parametrize("arm", ARMS)
def test_fork_of_the_first_phase_equals_one_run_bit_for_bit(images, runs, tmp_path, arm):
    root, whole = runs
    forked = train(images, tmp_path / arm, *LENGTH, *ARMS[arm].split(), "--fork", root / "phase1/checkpoint.pth")
    assert not differences(forked, whole[arm])
    assert log(tmp_path / arm) == log(root / arm)
    assert log(tmp_path / arm)[:STEPS] == log(root / "phase1")
    assert [r["step"] for r in log(tmp_path / arm)] == list(range(1, 3 * STEPS + 1))


def test_fork_without_restart_equals_one_run_bit_for_bit(images, tmp_path):
    flags = [*LENGTH, "--no-restart"]
    train(images, tmp_path / "phase1", *flags, "--arm", "phase1")
    forked = train(images, tmp_path / "nc", *flags, "--arm", "nc", "--fork", tmp_path / "phase1/checkpoint.pth")
    assert not differences(forked, train(images, tmp_path / "whole", *flags, "--arm", "nc"))
    with pytest.raises(UserError, match="denoised:1/3 is no beginning of denoised:1/3,noisy:5"):  # a longer schedule
        train(images, tmp_path / "long", "--no-restart", "--curriculum", "denoised:1/3,noisy:5",
              "--fork", tmp_path / "phase1/checkpoint.pth")


@pytest.mark.parametrize("begun, flags, message", [
    ("--curriculum denoised:3", "--curriculum denoised:1/3,noisy:2", "denoised:3 is no beginning"),
    (ARMS["nct"], ARMS["nc"], "--anchor 2.0 (now 0.0)"), (ARMS["nc"], ARMS["nct"], "--anchor 0.0 (now 2.0)"),
    (ARMS["nct"], f"{ARMS['nct']} --anchor_head live", "--anchor_head frozen (now live)")])
def test_fork_beyond_the_switch_has_the_same_switch_and_anchor(images, tmp_path, steps, begun, flags, message):
    steps.after = lambda run, values: run.total == STEPS + 1 and os.kill(os.getpid(), signal.SIGTERM)
    assert pretrain.main([*TINY, *images, *LENGTH, *begun.split(), "--out", str(tmp_path / "begun")]) == 75
    steps.after = lambda run, values: None
    with pytest.raises(UserError) as error:
        train(images, tmp_path / "run", *LENGTH, *flags.split(), "--fork", tmp_path / "begun/checkpoint.pth")
    assert message in str(error.value)


@pytest.mark.parametrize("flags, message", [
    ("--arm nc --seed 1", "--seed 0 (now 1)"), ("--arm nc --lr 0.5", "--lr 0.02 (now 0.5)"),
    ("--arm noisy", "denoised:1/3 is no beginning of noisy:3"),
    ("--curriculum denoised:1,noisy:2", "denoised:1/3 is no beginning of denoised:1,noisy:2")])
def test_fork_of_a_run_with_other_settings_is_refused(images, runs, tmp_path, flags, message):
    with pytest.raises(UserError) as error:
        train(images, tmp_path / "run", *LENGTH, *flags.split(), "--fork", runs[0] / "phase1/checkpoint.pth")
    assert message in str(error.value)
    assert not (tmp_path / "run/checkpoint.pth").exists()


@pytest.mark.parametrize("stop", [1, STEPS, STEPS + 2], ids=["within an epoch", "at a switch", "in the anchored phase"])
@pytest.mark.parametrize("kind", ["SIGTERM", "SIGUSR1"])
def test_run_that_a_signal_stopped_goes_on_to_the_same_bits(images, runs, tmp_path, steps, stop, kind):
    out, flags = tmp_path / "run", [*LENGTH, *ARMS["nct"].split()]
    steps.after = lambda run, values: run.total == stop - 1 and os.kill(os.getpid(), getattr(signal, kind))
    assert pretrain.main([*TINY, *images, "--out", str(out), *flags]) == 75
    assert common.load_checkpoint(out / "checkpoint.pth")["position"][3] == stop
    assert not (out / "backbone.pth").exists()
    steps.after = lambda run, values: None
    assert not differences(train(images, out, *flags), runs[1]["nct"])
    assert log(out) == log(runs[0] / "nct")
    weights = torch.load(out / "backbone.pth", weights_only=True)
    assert not differences(weights, torch.load(runs[0] / "nct/backbone.pth", weights_only=True), "backbone")


def test_crash_between_checkpoints_goes_on_to_the_same_bits_and_log(images, runs, tmp_path, steps):
    def crash(run, values):
        if run.total == STEPS + 1:
            raise KeyboardInterrupt

    out, flags = tmp_path / "run", [*LENGTH, *ARMS["nct"].split()]
    steps.after = crash
    with pytest.raises(KeyboardInterrupt):
        train(images, out, *flags)
    assert [r["step"] for r in log(out)][-1] == STEPS + 1  # a step that the checkpoint does not hold
    steps.after = lambda run, values: None
    assert not differences(train(images, out, *flags), runs[1]["nct"])
    assert log(out) == log(runs[0] / "nct")


def test_resume_refuses_other_settings_and_names_field_and_both_values(images, tmp_path):
    before = train(images, tmp_path, "--curriculum", "noisy:1")
    with pytest.raises(UserError) as error:
        train(images, tmp_path, "--curriculum", "noisy:2", "--koleo_weight", 0.5)
    assert "--curriculum noisy:1 (now noisy:2)" in str(error.value)
    assert "--koleo_weight 0.1 (now 0.5)" in str(error.value) and "--lr" not in str(error.value)
    assert not differences(before, common.load_checkpoint(tmp_path / "checkpoint.pth"))


def test_resume_goes_on_with_other_workers_and_log_steps(images, runs, tmp_path, steps):
    out, flags = tmp_path / "run", [*LENGTH, *ARMS["nct"].split()]
    steps.after = lambda run, values: run.total == 3 and os.kill(os.getpid(), signal.SIGTERM)
    assert pretrain.main([*TINY, *images, "--out", str(out), *flags]) == 75
    steps.after = lambda run, values: None
    assert not differences(train(images, out, *flags, "--workers", 3, "--log_steps", 2), runs[1]["nct"])
    assert [r["step"] for r in log(out)] == [1, 2, 3, 4, 6, 8]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, of its tracing
def test_compiled_run_equals_the_plain_one_and_is_not_compiled_anew_each_step(images, tmp_path, steps, monkeypatch):
    """Both crop sizes, another number of masked patches each step, live and frozen teacher; more blocks than torch
    keeps versions of a function. The graphs that torch traces run as they are, without its code generator."""
    flags = ["--curriculum", "denoised:2,noisy:2", "--anchor", "1", "--arch", "16,10,2", "--drop_path", "0.1"]
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    counters, graphs = torch._dynamo.utils.counters, []
    counters.clear()
    steps.after = lambda run, values: graphs.append(counters["stats"]["unique_graphs"])
    compiled = train(images, tmp_path / "compiled", *flags, "--compile")
    assert len(graphs) == 4 * STEPS and 0 < graphs[STEPS - 1] == graphs[-1]
    assert graphs[-1] < torch._dynamo.config.recompile_limit  # at which torch gives up, without a word
    assert not counters["graph_break"]
    assert not differences(compiled, train(images, tmp_path / "plain", *flags))


def test_two_processes_give_the_losses_and_monitors_of_one(images, tmp_path):
    """Global batch and seed fix the result; also the drop path's draws, the anchor and Sinkhorn's sums."""
    kinds = {"anchor": "", "drop": "--drop_path 0.1", "sinkhorn": "--centering sinkhorn"}
    base = [*TINY, *images, *words("--curriculum denoised:1,noisy:1 --anchor 2")]
    flags = {kind: [*base, *more.split()] for kind, more in kinds.items()}
    script = tmp_path / "both.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport common, pretrain\n"
                      f"for k, flags in {flags!r}.items():\n"
                      f"    assert pretrain.main([*flags, '--out', {str(tmp_path)!r} + '/two ' + k]) == 0\n"
                      "common.run(lambda: 0)\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, env=threads)
    assert done.returncode == 0, done.stderr
    for k, f in flags.items():
        assert pretrain.main([*f, "--out", str(tmp_path / f"one {k}")]) == 0
        one, two = log(tmp_path / f"one {k}"), log(tmp_path / f"two {k}")
        assert [r["step"] for r in two] == list(range(1, 2 * STEPS + 1))
        for a, b in zip(one, two, strict=True):
            names = ["total", "dino", "ibot", "koleo"] + ["anchor_dino", "anchor_ibot"] * (a["phase"] == 1)
            names += ["entropy", "cls_std", "rank"]
            assert {n: b[n] for n in names} == pytest.approx({n: a[n] for n in names}, rel=1e-4), (k, a["step"])
    assert log(tmp_path / "one anchor")[-1]["dino"] != log(tmp_path / "one drop")[-1]["dino"]


# ======================================================================================================
# what goes in and out
# ======================================================================================================

def test_backbone_file_is_the_teachers_backbone(runs):
    weights = torch.load(runs[0] / "nct/backbone.pth", weights_only=True)
    networks = [runs[1]["nct"][n] for n in ("teacher", "student")]
    teacher, student = ({k[9:]: v for k, v in n.items() if k.startswith("backbone.")} for n in networks)
    assert "blocks.1.attn.qkv.weight" in weights and not differences(weights, teacher, "backbone")
    assert differences(weights, student, "backbone")


def test_init_starts_from_student_teacher_heads_and_centres(images, runs):
    run = pretrain.Run(config(images, "--arm", "noisy", "--seed", 9, "--init", runs[0] / "nct/checkpoint.pth"), 3, CPU)
    state = runs[1]["nct"]
    assert not differences(snapshot(run), {k: state[k] for k in ("student", "teacher", "centers")})
    assert run.optimizer.state_dict()["state"] == {} and run.total == 0


@pytest.mark.parametrize("flag, file", [("--init", "checkpoint.pth"), ("--init_backbone", "backbone.pth")])
def test_run_that_goes_on_needs_its_init_no_more(images, runs, tmp_path, steps, flag, file):
    path, out = tmp_path / file, tmp_path / "run"
    path.write_bytes((runs[0] / "nct" / file).read_bytes())
    steps.after = lambda run, values: os.kill(os.getpid(), signal.SIGTERM)
    flags = ["--curriculum", "noisy:1", flag, str(path)]
    assert pretrain.main([*TINY, *images, *flags, "--out", str(out)]) == 75
    steps.after = lambda run, values: None
    path.rename(tmp_path / "moved")
    assert train(images, out, *flags)["position"][3] == STEPS


def test_init_from_another_model_is_refused(images, runs):
    flags = ["--arm", "noisy", "--prototypes", 32, "--init", runs[0] / "nct/checkpoint.pth"]
    with pytest.raises(UserError, match="another model: .*last_layer"):
        pretrain.Run(config(images, *flags), 3, CPU)


def test_init_backbone_starts_student_and_teacher_with_a_resized_position_embedding(images, runs, capsys):
    path = runs[0] / "nct/backbone.pth"
    args = config(images, "--arm", "noisy", "--seed", 9, "--global_size", 48, "--init_backbone", path)
    run, fresh = pretrain.Run(args, 3, CPU), pretrain.Run(config(images, "--arm", "noisy", "--seed", 9), 3, CPU)
    expected = torch.load(path, weights_only=True)
    grid = expected["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).flatten(2).mT
    expected["pos_embed"] = torch.cat([expected["pos_embed"][:, :1], grid], 1)
    for network in (run.network, run.teacher):
        state = network.backbone.state_dict()
        torch.testing.assert_close(state.pop("pos_embed"), expected["pos_embed"], rtol=1e-5, atol=1e-6)
        assert not differences(state, {k: expected[k] for k in state}, "backbone")
    assert not differences(run.network.head.state_dict(), run.teacher.head.state_dict(), "head")
    assert run.network.head.state_dict().keys() == fresh.network.head.state_dict().keys()
    assert "missing: none; unexpected: none" in capsys.readouterr().out


def test_init_backbone_names_what_is_missing_and_unexpected():
    model = common.make_vit("16,2,2", 8, img_size=32, registers=2)
    state = {f"module.backbone.{k}": v + 1 for k, v in model.state_dict().items() if k != "mask_token"}
    state["module.backbone.reg_token"] = state.pop("module.backbone.register_tokens")  # timm's name
    expected = model.state_dict()["register_tokens"] + 1
    message = pretrain.load_backbone(model, {**state, "head.weight": torch.zeros(3, 16)})
    assert message.endswith("missing: mask_token; unexpected: head.weight")
    assert torch.equal(model.state_dict()["register_tokens"], expected)


@torch.no_grad()
def test_init_backbone_without_layer_scale_gives_the_features_of_a_vit_that_has_none():
    """That is one whose LayerScale is 1, whatever --layer_scale says."""
    torch.manual_seed(0)
    theirs, ours = (common.make_vit("16,2,2", 8, img_size=32, init_values=v).eval() for v in (1.0, 1e-5))
    message = pretrain.load_backbone(ours, {k: v for k, v in theirs.state_dict().items() if "gamma" not in k})
    assert message.endswith("missing: none; unexpected: none")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))
    only_patches = {k: v for k, v in theirs.state_dict().items() if k.startswith("patch_embed")}
    other = common.make_vit("16,2,2", 8, img_size=32, init_values=1e-5)
    pretrain.load_backbone(other, only_patches)
    assert (other.blocks[0].ls1.gamma == 1e-5).all()


def test_init_backbone_of_a_file_without_a_vit_is_refused():
    model = common.make_vit("16,2,2", 8, img_size=32)
    with pytest.raises(UserError, match="no weight of a ViT"):
        pretrain.load_backbone(model, {"teacher": model.state_dict()})


@pytest.mark.parametrize("name, patch, registers", [
    ("vit_small_patch16_224", 16, 0), ("vit_base_patch16_224", 16, 0), ("vit_small_patch14_reg4_dinov2", 14, 4)])
@torch.no_grad()
def test_init_backbone_takes_timms_weights_and_gives_timms_features(name, patch, registers):
    timm = pytest.importorskip("timm", reason="timm is not installed, or the torchvision that it needs")
    torch.manual_seed(0)
    theirs = timm.create_model(name, init_values=1e-5, num_classes=0, img_size=112).eval()
    for p in theirs.parameters():
        p.add_(0.02 * torch.randn(p.shape))
    ours = common.make_vit(name[:name.index("_patch")], patch, img_size=112, registers=registers).eval()
    message = pretrain.load_backbone(ours, theirs.state_dict())
    assert message.endswith("missing: mask_token; unexpected: none")
    x = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    tokens, out = theirs.forward_features(x), ours.forward_features(x)
    torch.testing.assert_close(out["cls"], tokens[:, 0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(out["patches"], tokens[:, 1 + registers:], rtol=1e-3, atol=1e-4)


def test_init_backbone_takes_a_position_embedding_without_the_class_token():
    """timm's ViTs with registers: the class token holds its own position."""
    model = common.make_vit("16,2,2", 8, img_size=48, registers=2)
    pos = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    grid = F.interpolate(pos.unflatten(1, (4, 4)).permute(0, 3, 1, 2), size=(6, 6), mode="bicubic", align_corners=False)
    pretrain.load_backbone(model, {"pos_embed": pos})
    assert (model.pos_embed[:, 0] == 0).all()
    torch.testing.assert_close(model.pos_embed[:, 1:].detach(), grid.flatten(2).mT, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1 + 4 + 16, 12])
def test_init_backbone_with_a_position_embedding_of_no_square_is_refused(tokens):
    with pytest.raises(UserError, match="--init_backbone: .*pos_embed"):
        pretrain.load_backbone(common.make_vit("16,2,2", 8, img_size=48), {"pos_embed": torch.zeros(1, tokens, 16)})


def test_init_backbone_of_another_shape_is_refused():
    model = common.make_vit("16,2,2", 8, img_size=32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"--init_backbone: .*patch_embed\.proj\.weight"):
        pretrain.load_backbone(model, common.make_vit("16,2,2", 8, img_size=32, in_chans=1).state_dict())
    assert not differences(before, model.state_dict(), "backbone")


def test_draws_are_fixed_by_seed_phase_epoch_and_step(images):
    sizes = torch.tensor([[32, 32], [20, 40]] * 4)

    def draw(seed, *key, mine=slice(None)):
        return pretrain.draw_step(config(images, "--arm", "noisy", "--seed", seed, "--drop_path", 0.1),
                                  sizes, 2, *key, mine)

    first = draw(0, 0, 0, 0)
    assert not differences(first, draw(0, 0, 0, 0), "draw")
    for other in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        changed = differences(first, draw(*other), "draw")
        assert set(words("draw/0/0/boxes draw/0/3/boxes draw/0/1/factors draw/1 draw/2/0 draw/2/1")) <= set(changed)
    half = draw(0, 0, 0, 0, mine=slice(4, 8))  # the second process of two
    assert torch.equal(half[0][2]["boxes"], first[0][2]["boxes"][4:])
    assert torch.equal(half[1].view(2, 4, 16), first[1].view(2, 8, 16)[:, 4:])
    assert torch.equal(half[2][1].view(4, 2, 4), first[2][1].view(4, 2, 8)[:, :, 4:])


def test_every_view_is_drawn_with_dinov2s_frequencies_and_areas(images):
    """Global view 1 is always blurred, view 2 seldom and it alone solarised: not the other way round."""
    n = 10_000
    args = config(images, "--arm", "noisy", "--local_crops", 3)
    views, masks, _ = pretrain.draw_step(args, torch.full((n, 2), 500), 2, 0, 0, 0)
    kinds = [(1.0, 0.0, (0.32, 1)), (0.1, 0.2, (0.32, 1)), *[(0.5, 0.0, (0.05, 0.32))] * 3]
    for view, (blur, solarize, scale) in zip(views, kinds, strict=True):
        for key, p in {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": blur, "solarize": solarize}.items():
            assert view[key].double().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n)), key
        area = view["boxes"][:, 2:].prod(1) / 500**2
        assert scale[0] * 0.98 < area.min() < scale[0] * 1.05 and scale[1] * 0.95 < area.max() < scale[1] * 1.02
    assert len({v["flip"].double().dot(torch.arange(n).double()).item() for v in views}) == 5  # each view its own
    assert masks.any(1).sum() == n and 0 < masks[:n].any(1).sum() < n  # half of the crops of both views


def test_seeds_give_other_weights(images, runs, tmp_path):
    other = train(images, tmp_path, *LENGTH, *ARMS["nct"].split(), "--seed", 1)
    assert differences(other["teacher"], runs[1]["nct"]["teacher"], "teacher")


MIXED = [(32, 32), (20, 45), (64, 16), (33, 31)] * 4


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_images_of_any_size_and_channels_train_the_same_from_memory_and_from_disk(tmp_path, channels, steps):
    data, denoised = (write_images(tmp_path / n, MIXED, channels, s) for n, s in (("data", 0), ("denoised", 1)))
    before = []
    steps.before = lambda run: before.append(snapshot(run))
    flags = ["--curriculum", "denoised:1,noisy:1", "--anchor", 1]
    states = [train(["--data", str(data), "--denoised", str(denoised)], tmp_path / str(gb), *flags, "--cache_gb", gb,
                    "--workers", 2) for gb in (1, 0)]
    assert not differences(*states)
    folder = common.Folder(data, "train", "gauss50")
    pixels = np.concatenate([folder.read(i).reshape(-1, channels) for i in range(len(MIXED))]) / 255
    assert states[0]["data"]["mean"] == pytest.approx(pixels.mean(0), rel=1e-9)
    assert states[0]["data"]["std"] == pytest.approx(pixels.std(0), rel=1e-9)
    first, last = before[0]["student"], states[0]["student"]
    moved = (last["backbone.patch_embed.proj.weight"] - first["backbone.patch_embed.proj.weight"]).abs().amax((0, 2, 3))
    assert len(moved) == channels and moved.min() > 1e-5


def test_padding_never_enters_a_crop(images):
    args = config(images, "--arm", "noisy")
    sizes = torch.tensor(MIXED[:8])
    views, _, _ = pretrain.draw_step(args, sizes, 2, 0, 0, 0)
    batch = torch.randint(256, (8, 3, 64, 45), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded = batch.clone()
    for i, (h, w) in enumerate(MIXED[:8]):
        padded[i, :, h:], padded[i, :, :, w:] = 255, 0
    mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    crops = [pretrain.make_crops(args, x, sizes, views, mean, std) for x in (batch, padded)]
    assert not differences(*crops, "crops")


def test_loss_that_is_not_finite_stops_the_run_at_the_last_checkpoint(images, runs, tmp_path, monkeypatch, capsys):
    calls, koleo = [], common.koleo_loss

    def broken(x):
        calls.append(1)
        return koleo(x) * (math.nan if len(calls) > 2 * (STEPS + 1) else 1)  # two views a step: from step 5 on

    monkeypatch.setattr(common, "koleo_loss", broken)
    argv = [*TINY, *images, "--out", str(tmp_path), *LENGTH, "--arm", "denoised", "--log_steps", "100"]
    with pytest.raises(SystemExit) as code:
        common.run(lambda: pretrain.main(argv))
    error = capsys.readouterr().err.strip().splitlines()
    assert code.value.code == 2
    assert len(error) == 1 and error[0].startswith(f"error: loss term koleo is not finite at step {STEPS + 2};")
    kept = common.load_checkpoint(tmp_path / "checkpoint.pth")
    assert kept["position"][:4] == (0, 1, 0, STEPS) and not (tmp_path / "backbone.pth").exists()
    assert not differences(kept["student"], runs[1]["phase1"]["student"], "student")


def test_batch_larger_than_the_set_warns_and_takes_the_set(images, tmp_path, capsys):
    state = train(images, tmp_path, "--curriculum", "noisy:2", "--batch_size", 64)
    assert "warning: --batch_size 64 is larger than the set of 24 images; using 24" in capsys.readouterr().out
    assert state["position"][3] == 2
    assert log(tmp_path)[0]["lr"] == pytest.approx(0.02 * math.sqrt(24 / 1024), rel=1e-5)


def test_random_arm_writes_the_untrained_backbone(images, tmp_path):
    train(images, tmp_path, "--arm", "random", "--seed", 3)
    fresh = pretrain.Run(config(images, "--arm", "random", "--seed", 3), 3, CPU)
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert not differences(weights, fresh.network.backbone.state_dict(), "backbone")
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 0


def test_log_holds_losses_schedules_and_collapse_monitors_of_every_step(images, runs):
    for r in log(runs[0] / "nct"):
        assert r["total"] == pytest.approx(r["dino"] + 0.5 * r["ibot"] + 0.1 * r["koleo"] + (
            2 * (r["anchor_dino"] + 0.5 * r["anchor_ibot"]) if r["phase"] else 0), rel=1e-4)
        assert r["kl"] == pytest.approx(r["dino"] - r["entropy"], abs=1e-4) and 0 < r["entropy"] <= math.log(16)
        assert 1 <= r["rank"] <= 16 and r["source"] == ["denoised", "noisy"][r["phase"]]


def test_monitors_tell_collapse_from_spread():
    """Equal class tokens: no spread; an orthogonal set: the rank of its centred rows."""
    targets = torch.full((2, 4, 16), 1 / 16)
    spread = pretrain.monitors({"dino": torch.tensor(3.0)}, targets, torch.eye(16)[:8])
    assert spread["rank"] == pytest.approx(7, rel=1e-4) and spread["entropy"] == pytest.approx(math.log(16))
    assert spread["kl"] == pytest.approx(3 - math.log(16), rel=1e-5)
    collapsed = pretrain.monitors({"dino": torch.tensor(3.0)}, targets, torch.ones(8, 16))
    assert collapsed["cls_std"] < 1e-5 < spread["cls_std"]
