"""probe.py held to DINOv2's protocol and to its own promises: torch.optim, plain loops, Pillow, hooks; and the whole
stage, report included, on a small folder."""

import copy
import itertools
import json
import math
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import denoise
import pretrain
import probe
from common import UserError

CPU = torch.device("cpu")
SIZE = ["--img_size", "32", "--resize", "32"]
QUICK = ["--workers", "0", "--device", "cpu", *SIZE, "--iterations", "20"]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed))


def save(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path)


# ======================================================================================================
# linear heads
# ======================================================================================================


def test_heads_are_13_rates_times_4_inputs():
    rates = [m * 10.0**-p for p in (5, 4, 3, 2) for m in (1, 2, 5)] + [0.1]
    np.testing.assert_allclose(probe.RATES, rates, rtol=1e-12)
    assert len(probe.RATES) * len(probe.head_inputs(3)) == 52


def test_heads_see_the_class_tokens_of_the_last_1_or_4_blocks_with_and_without_the_mean_patch_token():
    features = torch.tensor([10.0, 20, 30, 40, 50]).repeat_interleave(2)  # cls of block -1, -2, -3, -4, patches
    seen = [set((features * mask).unique().tolist()) - {0} for mask in probe.head_inputs(2)]
    assert seen == [{10}, {10, 50}, {10, 20, 30, 40}, {10, 20, 30, 40, 50}]
    assert set(probe.head_inputs(2).unique().tolist()) == {0, 1}


X, Y = randn(2, 40, 15), torch.randint(3, (40,), generator=gen(1))  # two views, 40 images, 5 tokens of width 3
MASKS = probe.head_inputs(3)


def test_the_52_heads_trained_together_equal_each_trained_alone():
    weight, bias = probe.train_heads(X, Y, 3, probe.RATES, MASKS, 30, 16, seed=4)
    assert weight.shape == (52, 15, 3) and bias.shape == (52, 3)
    heads = list(itertools.product(range(4), range(13)))  # by mask, then rate
    for i, (m, r) in enumerate(heads):
        w, b = probe.train_heads(X, Y, 3, probe.RATES[r:r + 1], MASKS[m:m + 1], 30, 16, seed=4)
        assert torch.allclose(weight[i], w[0], rtol=1e-5, atol=1e-5) and torch.allclose(bias[i], b[0], 1e-5, 1e-5)
    assert len({tuple(b.tolist()) for b in bias}) == 52


@pytest.mark.parametrize(("mask", "rate", "batch"), [(0, 0.1, 16), (3, 0.05, 16), (1, 0.1, 100)])
def test_head_equals_torch_sgd_with_momentum_and_a_cosine_to_0(monkeypatch, mask, rate, batch):
    drawn, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: drawn.append(randint(*a, **k)) or drawn[-1])
    weight, bias = probe.train_heads(X, Y, 3, [0.01, rate], MASKS, 25, batch, seed=2)
    monkeypatch.undo()
    assert len(drawn) == 25 and {int(d[1].remainder(2).unique().numel()) for d in drawn} == {2}  # both views are used
    start, _ = probe.train_heads(X, Y, 3, [0.01, rate], MASKS, 0, batch, seed=2)
    inputs = MASKS[mask].nonzero()[:, 0]
    head = torch.nn.Linear(len(inputs), 3)
    with torch.no_grad():
        head.weight.copy_(start[2 * mask + 1][inputs].T)
        head.bias.zero_()
    size = min(batch, 40)  # a batch is never larger than the set
    optimizer = torch.optim.SGD(head.parameters(), lr=rate * size / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=25)
    for pick, view in drawn:
        assert len(pick) == size
        optimizer.zero_grad()
        F.cross_entropy(head(X[view % 2, pick][:, inputs]), Y[pick]).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(weight[2 * mask + 1][inputs].T, head.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bias[2 * mask + 1], head.bias.detach(), rtol=1e-4, atol=1e-6)
    assert (head.bias.abs() > 1e-4).any()
    assert not weight[2 * mask + 1][MASKS[mask] == 0].any()  # a head has no weight on what it does not see


def test_accuracy_is_the_share_of_right_answers_of_every_head():
    x, y, weight, bias = randn(2100, 6), torch.randint(4, (2100,), generator=gen(2)), randn(3, 6, 4), randn(3, 4)
    got = probe.accuracy(x, y, weight, bias)
    for h in range(3):
        right = sum(int((x[i] @ weight[h] + bias[h]).argmax() == y[i]) for i in range(2100))
        assert got[h].item() == pytest.approx(100 * right / 2100)


def test_hold_out_is_a_tenth_of_every_class_and_reproducible():
    counts = [30, 10, 104, 5, 2, 1]
    y = torch.arange(6).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts), generator=gen())]
    held = probe.hold_out(y, 3)
    assert [int(held[y == k].sum()) for k in range(6)] == [3, 1, 10, 1, 1, 0]  # a lone image stays in training
    assert torch.equal(held, probe.hold_out(y, 3)) and not torch.equal(held, probe.hold_out(y, 4))
    often = sum(probe.hold_out(y, seed).double() for seed in range(300))[y == 0]
    assert often.min() > 8 and often.max() < 58  # each image 30 times of 300, within five deviations


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_head_is_chosen_on_the_central_view_of_held_out_images_and_trained_on_the_others(seed):
    y = torch.arange(3).repeat(40)
    x = randn(2, 120, 5, 3) + 0.7 * randn(3, 5, 3, seed=1)[y]
    args = SimpleNamespace(seed=seed, iterations=40, batch_size=32)
    held, flat = probe.hold_out(y, seed), x.flatten(2)
    weight, bias = probe.train_heads(flat[:, ~held], y[~held], 3, probe.RATES, MASKS, 40, 32, seed)
    scores = [float(((flat[0, held] @ w + b).argmax(1) == y[held]).double().mean() * 100)
              for w, b in zip(weight, bias, strict=True)]
    best = scores.index(max(scores))
    measure, chosen = probe.linear_probe(x, y, 3, args)
    names = ["1 block", "1 block + patches", "4 blocks", "4 blocks + patches"]
    assert len(set(scores)) > 3
    assert (chosen["head"], chosen["rate"]) == (names[best // 13], probe.RATES[best % 13])
    assert chosen["held_out"] == pytest.approx(max(scores))
    test_x, test_y = randn(50, 5, 3, seed=9), torch.randint(3, (50,), generator=gen(6))
    right = ((test_x.flatten(1) @ weight[best] + bias[best]).argmax(1) == test_y).double().mean()
    assert measure(test_x, test_y) == pytest.approx(100 * float(right))


# ======================================================================================================
# k-NN and retrieval
# ======================================================================================================


def unit(v):
    v = np.asarray(v, dtype=np.float64)
    return v / np.sqrt((v * v).sum())


def test_knn_equals_plain_loops():
    train_y, y = torch.randint(4, (60,), generator=gen(1)), torch.randint(4, (530,), generator=gen(2))  # two chunks
    centres = randn(4, 8, seed=3)
    train_x, x = randn(60, 8) + centres[train_y], randn(530, 8, seed=5) * 3 + centres[y]
    train_x *= torch.rand(60, 1, generator=gen(6)) + 0.5  # lengths must not matter
    expected = {}
    for k in (1, 10, 20, 200):
        right = 0
        for q, label in zip(x, y.tolist(), strict=True):
            near = sorted(((float(unit(q) @ unit(t)), int(c)) for t, c in zip(train_x, train_y, strict=True)),
                          reverse=True)[:k]
            votes = [sum(math.exp(s / 0.07) for s, c in near if c == kind) for kind in range(4)]
            right += votes.index(max(votes)) == label
        expected[k] = 100 * right / 530
    assert probe.knn(train_x, train_y, x, y, 4, (1, 10, 20, 200)) == pytest.approx(expected)
    assert len(set(expected.values())) >= 3 and probe.NEIGHBORS == (10, 20, 100, 200)


def plain_map(x, y):
    values = []
    for i in range(len(x)):
        order = sorted((j for j in range(len(x)) if j != i), key=lambda j: -float(unit(x[i]) @ unit(x[j])))
        hits = [bool(y[j] == y[i]) for j in order]
        if any(hits):
            values.append(np.mean([sum(hits[:r + 1]) / (r + 1) for r, h in enumerate(hits) if h]))
    return 100 * np.mean(values)


def test_retrieval_map_equals_plain_loops_and_leaves_out_queries_without_partner():
    y = torch.tensor([0] * 20 + [1] * 15 + [2] * 2 + [3])
    x = randn(38, 6) + 0.5 * randn(4, 6, seed=1)[y]
    assert probe.retrieval_map(x, y) == pytest.approx(plain_map(x, y))
    assert probe.retrieval_map(x[:-1], y[:-1]) != pytest.approx(plain_map(x, y))  # as a distractor it counts
    assert probe.retrieval_map(x[-4:], torch.arange(4)) is None


def test_retrieval_map_of_more_queries_than_a_chunk():
    """Two classes in turn on a circle: of the 599 others, the places of an image's class are known."""
    angle = torch.arange(600) * 2 * math.pi / 600 + 1e-4 * torch.rand(600, generator=gen())
    x, y = torch.stack([angle.cos(), angle.sin()], 1).double(), torch.arange(600) % 2
    # both neighbours are of the other class, the next two of the same one, and so on
    hits = ([0, 0, 1, 1] * 150)[:599]
    precision = [sum(hits[:r + 1]) / (r + 1) for r, h in enumerate(hits) if h]
    assert probe.retrieval_map(x, y) == pytest.approx(100 * np.mean(precision), rel=1e-9)


@pytest.mark.parametrize(("spec", "levels"), [
    ("gauss100", [25, 50, 75, 100, 150, 200]), ("speckle0.4", [0.1, 0.2, 0.3, 0.4, 0.6, 0.8]),
    ("shot3", [12, 6, 4, 3, 2, 1.5]), ("impulse0.6", [0.15, 0.3, 0.45, 0.6, 0.9, 1]),
    ("gauss50-250", [37.5, 75, 112.5, 150, 225, 300])])
def test_sweep_scales_the_strength_of_the_noise(spec, levels):
    specs = probe.sweep_specs(spec)
    assert specs[0] == (0, "none") and [s for s, _ in specs[1:]] == [0.25, 0.5, 0.75, 1, 1.5, 2]
    name = spec.rstrip("0123456789.-")
    assert [common.parse_noise(p) for _, p in specs[1:]] == [(name, pytest.approx(v), pytest.approx(v)) for v in levels]
    assert ("-" in spec) or specs[4] == (1, spec)


# ======================================================================================================
# features
# ======================================================================================================


@pytest.mark.parametrize(("resize", "size"), [(256, 224), (36, 32), (32, 32)])
def test_central_crop_equals_pillows_resize_of_the_short_side_and_crop(resize, size):
    rng = np.random.default_rng(0)
    for height, width in [(300, 450), (450, 300), (128, 256), (64, 64), (20, 30)]:  # sides stay whole when resized
        coarse = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
        image = coarse.resize((width, height), Image.BICUBIC)
        sizes, short = torch.tensor([[height, width]]), min(height, width)
        got = common.resample(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float(), sizes,
                              probe.central_boxes(sizes, resize, size), torch.tensor([False]), size, 255.0)[0]
        new = (width * resize // short, height * resize // short)
        left, top = (new[0] - size) // 2, (new[1] - size) // 2
        expected = image.resize(new, Image.BICUBIC).crop((left, top, left + size, top + size))
        error = np.abs(got.permute(1, 2, 0).numpy() - np.asarray(expected, dtype=float))
        assert error.max() <= 2 and error.mean() < 0.6, (height, width)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return common.VisionTransformer(32, 8, 3, 16, 6, 2, init_values=1.0).eval()


def test_features_are_class_tokens_of_the_last_4_blocks_last_first_then_the_mean_patch_token(vit):
    x, mean, std = torch.rand(3, 3, 32, 32, generator=gen()), torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 1])
    mean, std = mean[:, None, None], std[:, None, None]
    stage = object.__new__(probe.Features)
    stage.model, stage.context, stage.mean, stage.std = vit, common.nullcontext, mean, std
    seen = []
    hooks = [b.register_forward_hook(lambda m, i, out: seen.append(out)) for b in vit.blocks]
    got = stage.embed(x)
    for h in hooks:
        h.remove()
    with torch.no_grad():
        direct = vit.forward_features((x - mean) / std)
        expected = [vit.norm(seen[k])[:, 0] for k in (5, 4, 3, 2)] + [vit.norm(seen[5])[:, 1:].mean(1)]
    torch.testing.assert_close(got, torch.stack(expected, 1))
    torch.testing.assert_close(got[:, 0], direct["cls"])
    stage.model = common.VisionTransformer(32, 8, 3, 16, 2, 2).eval()  # fewer blocks: the first one is repeated
    got = stage.embed(x)
    assert torch.equal(got[:, 1], got[:, 2]) and torch.equal(got[:, 1], got[:, 3])
    assert not torch.equal(got[:, 0], got[:, 1])


# ======================================================================================================
# the whole stage
# ======================================================================================================


def pretrained(data, out, *flags):
    assert pretrain.main(["--data", str(data), "--out", str(out), *flags, "--preset", "demo", "--curriculum", "noisy:1",
                          "--arch", "16,2,2", "--head_hidden", "16", "--head_bottleneck", "8", "--prototypes", "16",
                          "--global_size", "32", "--local_size", "16", "--patch_size", "8", "--batch_size", "8",
                          "--layer_scale", "1", "--log_steps", "1", "--workers", "0", "--device", "cpu"]) == 0


def probed(data, run, *flags):
    argv = ["--data", str(data), "--run", str(run), "--out", "-", *QUICK, *flags]
    return probe.evaluate(probe.read_config(argv), CPU)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(data, finished run of pretrain.py): three classes of 12 + 8 pictures of several sizes, gauss50."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    root = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 8)):
        for k, name in enumerate(("dog", "cat", "emu")):
            for i in range(n):
                x = rng.normal(100 + 28 * k + rng.normal(0, 12), 25, (32 + 2 * (i % 4), 40, 3))
                save(root / "data" / split / name / f"{i}.png", x.clip(0, 255).astype(np.uint8))
    pretrained(root / "data", root / "run", "--noise", "gauss50")
    for s, handler in handlers.items():
        signal.signal(s, handler)
    return root / "data", root / "run"


@pytest.fixture(scope="module")
def result(small):
    return probed(*small, "--noise", "gauss50")


def main(monkeypatch, *argv):
    """The script with these arguments; gives its exit code."""
    monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        common.run(probe.main)
    return stopped.value.code


def labels(folder):
    return torch.tensor([["cat", "dog", "emu"].index(path.split("/")[1]) for path in folder.paths])


def features(small, *flags):
    argv = ["--data", str(small[0]), "--run", str(small[1]), "--out", "-", *QUICK, *flags]
    return probe.Features(probe.read_config(argv), CPU)


def test_features_of_an_image_do_not_depend_on_its_batch_or_on_padding(small):
    for cache in ("0", "4"):  # streamed, and padded to the largest of the set
        stage = features(small, "--noise", "gauss50", "--cache_gb", cache)
        folder = stage.folder("val", "gauss50")
        assert len(folder.sizes.unique(dim=0)) == 4
        together = stage(folder, "noisy", "val")[0]
        for i in (0, 3, 17):
            x = torch.from_numpy(folder.read(i)).permute(2, 0, 1)[None].float()
            height, width = x.shape[2:]
            box = torch.tensor([[0, (width - height) / 2, height, height]])  # all are wider than high
            crop = common.resample(x, torch.tensor([[height, width]]), box, torch.tensor([False]), 32, 255.0) / 255
            torch.testing.assert_close(together[i], stage.embed(crop)[0], rtol=1e-4, atol=1e-5)


def test_first_view_is_the_central_crop_and_the_others_are_random_but_reproducible(small):
    stage = features(small, "--noise", "gauss50")
    folder = stage.folder("train", "gauss50")
    views, again, central = (stage(folder, "noisy", "train", n) for n in (2, 2, 0))
    assert views.shape == (3, 36, 5, 16) and torch.equal(views, again) and torch.equal(views[0], central[0])
    different = (views[1:] - views[0]).abs().amax((2, 3)) > 1e-3
    assert different.all() and (views[1] - views[2]).abs().max() > 1e-3


def test_each_image_goes_through_the_backbone_once_per_view_and_test_noise(small, monkeypatch):
    """36 training images in 3 views, 24 of val under each of the sweep's noises; heads, k-NN and retrieval add none."""
    seen, embed = [], probe.Features.embed
    monkeypatch.setattr(probe.Features, "embed", lambda self, x: (seen.append(len(x)), embed(self, x))[1])
    argv = ["--data", small[0], "--run", small[1], "--out", "-", *QUICK, "--noise", "gauss50", "--views", 2]
    probe.evaluate(probe.read_config(list(map(str, argv))), CPU)
    assert sum(seen) == 36 * 3 + 24 * len(probe.sweep_specs("gauss50"))


def test_result_holds_every_figure_and_each_is_the_figure_of_its_features(small, result):
    stage = features(small, "--noise", "gauss50")
    train, val = stage.folder("train", "gauss50"), stage.folder("val", "gauss50")
    y, val_y = labels(train), labels(val)
    x, val_x, clean = (stage(f, s, "")[0] for f, s in ((train, "noisy"), (val, "noisy"), (val, "clean")))
    measure, chosen = probe.linear_probe(x[None], y, 3, stage.args)
    assert result["chosen"] == chosen
    assert result["linear"] == measure(val_x, val_y) and result["clean_linear"] == measure(clean, val_y)
    assert result["map"] == pytest.approx(plain_map(val_x[:, 0], val_y), rel=1e-3)
    assert result["clean_map"] == pytest.approx(plain_map(clean[:, 0], val_y), rel=1e-3)
    assert set(result["knn"]) == set(result["clean_knn"]) == {"10", "20", "100", "200"}
    assert result["map"] != pytest.approx(result["clean_map"], rel=2e-3)
    cosine = np.mean([unit(a) @ unit(b) for a, b in zip(val_x[:, 0], clean[:, 0], strict=True)])
    assert result["cosine"] == pytest.approx(cosine, rel=1e-4) and result["cosine"] < 0.99999
    assert (result["classes"], result["train"], result["val"]) == (3, 36, 24)
    assert result["linear"] > 50  # the classes differ in brightness: not a matter of luck
    assert result["pretrain"]["noise"] == "gauss50" and result["summary"]["steps"] == 4

    def numbers(v):
        return [n for u in (v.values() if isinstance(v, dict) else v) for n in numbers(u)] if isinstance(
            v, (dict, list)) else [v] if isinstance(v, float) else []
    assert np.isfinite(numbers(result)).all() and json.loads(json.dumps(result)) == result


def test_sweep_tests_the_same_head_at_every_level(small, result):
    assert [(s["strength"], s["noise"]) for s in result["sweep"]] == probe.sweep_specs("gauss50")
    by = {s["noise"]: s["linear"] for s in result["sweep"]}
    assert by["gauss50"] == result["linear"] and by["none"] == result["clean_linear"]
    stage = features(small, "--noise", "gauss50")
    train, worst = stage.folder("train", "gauss50"), stage.folder("val", "gauss100")
    measure, _ = probe.linear_probe(stage(train, "noisy", ""), labels(train), 3, stage.args)
    assert by["gauss100"] == measure(stage(worst, "noisy", "")[0], labels(worst))


def test_head_is_chosen_without_val(small, result, tmp_path):
    """Another order of the classes in val changes the accuracy, not the head."""
    data, run = small
    for split, moved in (("train", {}), ("val", {"dog": "cat", "cat": "emu", "emu": "dog"})):
        for name in ("dog", "cat", "emu"):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / moved.get(name, name)).symlink_to(data / split / name)
    other = probed(tmp_path, run, "--noise", "gauss50")
    assert other["chosen"] == result["chosen"] and abs(other["linear"] - result["linear"]) > 20


def test_real_noise_has_neither_clean_figures_nor_sweep(small):
    result = probed(*small, "--noise", "none")
    assert not {"sweep", "clean_linear", "clean_map", "clean_knn", "cosine"} & set(result)
    assert 0 <= result["linear"] <= 100 and 0 < result["map"] <= 100


def test_every_stage_sees_the_same_noise_of_an_image(small, tmp_path, monkeypatch):
    """Fixed by --noise_seed and the image's path, whatever --seed is: training of both kinds, denoised copy, probe."""
    noise = ["--noise", "gauss50", "--noise_seed", "7", "--seed", "3"]
    seen, stage, add_noise = {}, [], common.add_noise

    def watched(image, spec, key, seed=0):
        x = add_noise(image, spec, key, seed)
        seen.setdefault(stage[-1], {}).setdefault((spec, key), set()).add(x.tobytes())
        return x

    monkeypatch.setattr(common, "add_noise", watched)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    quick = ["--data", str(small[0]), *noise, "--workers", "0", "--device", "cpu"]
    denoiser = str(tmp_path / "denoiser")
    stage.append("denoiser")
    denoise.main(["train", *quick, "--out", denoiser, "--epochs", "1", "--width", "4", "--patch", "16"])
    stage.append("denoised copy")
    denoise.main(["apply", *quick, "--out", str(tmp_path / "copy"), "--denoiser", denoiser])
    stage.append("pretraining")
    pretrained(small[0], tmp_path / "run", *noise)
    stage.append("probe")
    probed(small[0], tmp_path / "run", *noise)
    monkeypatch.undo()
    everyone = common.Folder(small[0]).paths + common.Folder(small[0], "val").paths
    for name, images in seen.items():
        drawn = {key for _, key in images}
        assert drawn == {p for p in everyone if name != "pretraining" or p.startswith("train/")}, name
        for (spec, key), bits in images.items():
            x = common.to_float(common.read_image(small[0] / key))
            assert bits == {add_noise(x, spec, key, 7).tobytes()}, (name, key)
    assert {spec for name in seen for spec, _ in seen[name] if name != "probe"} == {"gauss50"}


@pytest.fixture(scope="module")
def cleaned(small, tmp_path_factory):
    """Flags of the denoised arm: the copy that a denoiser of random weights made, and that denoiser."""
    root = tmp_path_factory.mktemp("cleaned")
    torch.manual_seed(0)
    model = denoise.UNet(3, 4, 2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        y = model(torch.rand(1, 3, 64, 64))
        scale = 0.2 / y.std((0, 2, 3))
        model.last.weight *= scale[:, None, None, None]
        model.last.bias.copy_((model.last.bias - y.mean((0, 2, 3))) * scale + 0.5)
    config = {"epochs": 1, "width": 4, "noise": "gauss50", "noise_seed": 0}
    common.save_checkpoint(root / "denoiser" / "checkpoint.pth", {
        "model": model.state_dict(), "epoch": 1, "config": config, "data": {"channels": 3, "depth": 2}})
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    denoise.main(["apply", "--data", str(small[0]), "--noise", "gauss50", "--denoiser", str(root / "denoiser"),
                  "--out", str(root / "denoised"), "--workers", "0", "--device", "cpu"])
    for s, handler in handlers.items():
        signal.signal(s, handler)
    return ["--noise", "gauss50", "--denoised", str(root / "denoised"), "--denoiser", str(root / "denoiser")]


def test_images_go_through_the_denoiser_without_their_padding(cleaned):
    model = denoise.load_denoiser(cleaned[-1], CPU)[0]
    sizes = torch.tensor([[32, 40], [17, 23], [32, 40], [30, 9]])
    images = torch.randint(0, 256, (4, 3, 32, 40), generator=gen(), dtype=torch.uint8)
    out = denoise.denoise_ragged(model, images, sizes, common.nullcontext)
    for x, y, (h, w) in zip(images, out, sizes.tolist(), strict=True):
        alone = denoise.denoise(model, x[None, :, :h, :w])[0]
        assert (y[:, :h, :w].int() - alone.int()).abs().max() <= 1 and alone.float().std() > 10  # rounding ties


def test_denoised_arm_sends_every_test_image_through_its_denoiser(small, cleaned):
    stage = features(small, *cleaned)
    train, val = (stage.folder(split, "gauss50", stage.args.denoised) for split in ("train", "val"))
    worst = stage.folder("val", "gauss100")
    train_x, val_x = stage(train, "denoised", ""), stage(val, "denoised", "")[0]
    again = stage(stage.folder("val", "gauss50"), "noisy", "", through_denoiser=True)[0]
    torch.testing.assert_close(again, val_x, rtol=0, atol=0.02)  # the same as the stored copy, up to its rounding
    assert (stage(val, "noisy", "")[0] - val_x).abs().max() > 0.3
    measure, chosen = probe.linear_probe(train_x, labels(train), 3, stage.args)
    result = probed(*small, *cleaned)
    assert result["chosen"] == chosen and result["linear"] == measure(val_x, labels(val))
    by = {s["noise"]: s["linear"] for s in result["sweep"]}
    assert by["gauss50"] == result["linear"]
    assert by["gauss100"] == measure(stage(worst, "noisy", "", through_denoiser=True)[0], labels(worst))
    assert "sweep" not in probed(*small, *cleaned[:-2])  # without the denoiser other test images have no answer


@pytest.mark.parametrize("command", [["check"], []], ids=["check", "probe"])
def test_class_unknown_to_train_is_named_with_code_2(small, tmp_path, monkeypatch, capsys, command):
    data, run = small
    for name in ("train/dog", "train/cat", "val/cat", "val/gnu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(data / name.replace("gnu", "emu"))
    out = tmp_path / "out.json"
    code = main(monkeypatch, *command, "--data", tmp_path, "--run", run, "--out", out, *QUICK)
    error = capsys.readouterr().err
    assert code == 2 and "gnu" in error and error.count("\n") == 1 and not out.exists()


def test_check_passes_on_good_folders_and_needs_val_and_class_folders(small, tmp_path, monkeypatch, capsys):
    def check(data):
        code = main(monkeypatch, "check", "--data", data, "--run", "-", "--out", "-", "--noise", "gauss50")
        return code, capsys.readouterr().err

    assert check(small[0]) == (0, "")
    (tmp_path / "train").symlink_to(small[0] / "train")
    code, error = check(tmp_path)
    assert code == 2 and "val" in error
    (tmp_path / "val").symlink_to(small[0] / "val" / "cat")  # images, but no classes
    code, error = check(tmp_path)
    assert code == 2 and "class" in error


def test_unfinished_runs_and_unfit_channels_are_refused(small, tmp_path, monkeypatch, capsys):
    data, run = small
    with pytest.raises(UserError, match="nowhere"):
        probed(data, tmp_path / "nowhere")
    with pytest.raises(UserError, match="--resize 16"):
        probed(data, run, "--resize", "16")
    for split in ("train", "val"):
        for name in "ab":
            save(tmp_path / split / name / "1.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(UserError, match="1 channels"):
        probed(tmp_path, run)


# ======================================================================================================
# report
# ======================================================================================================


def test_report_gives_mean_and_deviation_over_seeds_and_four_pictures(small, result, tmp_path, monkeypatch, capsys):
    data, run = small
    linear = {("noisy", 0): 50.0, ("noisy", 1): 53.0, ("nct", 0): 61.5, ("nct", 1): 61.5}
    for (arm, seed), value in linear.items():
        made = copy.deepcopy(result) | {"linear": value, "cosine": 0.5 + seed / 10}
        made["sweep"][-1]["linear"] = value - 20
        made["summary"]["seconds"] = 60.0 * (1 + 2 * seed)
        common.write_json(tmp_path / "probe" / f"{arm}-seed{seed}.json", made)
        (tmp_path / "pretrain").mkdir(exist_ok=True)
        (tmp_path / "pretrain" / f"{arm}-seed{seed}").symlink_to(run)
    assert main(monkeypatch, "report", tmp_path) == 0
    lines = (tmp_path / "results.md").read_text().splitlines()
    rows = [[v.strip() for v in line.split("|")[1:-1]] for line in lines if line.startswith("| n")]
    assert [r[0] for r in rows] == ["noisy", "nct"] * 2  # in the paper's order: the table, then the sweep
    noisy, nct, sweep, _ = (r[1:] for r in rows)
    knn, mean = result["knn"]["20"], result["map"]
    clean = f"{result['clean_linear']:.1f} ± 0.0"
    rest = [f"{knn:.1f} ± 0.0", f"{mean:.1f} ± 0.0", "0.55 ± 0.07", "2.0 ± 1.4"]
    assert noisy[:7] == ["2", "51.5 ± 2.1", clean, *rest]  # the deviation of a sample: 3 / sqrt(2)
    assert nct[:7] == ["2", "61.5 ± 0.0", clean, *rest]
    assert sweep[-1] == "31.5 ± 2.1" and sweep[0] == clean  # the strongest noise comes last
    assert "| noisy | " in capsys.readouterr().out
    stored = common.read_json(tmp_path / "results.json")
    assert {(arm, int(k[-1])): r["linear"] for arm, runs in stored.items() for k, r in runs.items()} == linear
    for name in ("samples", "features", "robustness", "curves"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG" and np.asarray(image.convert("RGB")).std() > 5
        assert f"({name}.png)" in "\n".join(lines)


@pytest.mark.parametrize("values", [[3.0], [], [None, 2.0]])
def test_one_seed_has_no_deviation_and_none_is_a_dash(values):
    known = [v for v in values if v is not None]
    assert probe.spread(values) == (f"{known[0]:.1f}" if known else "-")


def test_chart_draws_the_values_where_they_belong():
    sheet = np.asarray(probe.chart([("t", {"noisy": [(0, 1), (1, 1)], "nct": [(0, 0), (1, 2)]})])).astype(int)
    sheet = sheet[:, :520]  # without the legend
    level, rising = (np.argwhere(np.abs(sheet - c).sum(2) < 30) for c in ([0xD6, 0x27, 0x28], [0x2C, 0xA0, 0x2C]))
    assert np.ptp(level[:, 0]) <= 2 and np.ptp(level[:, 1]) > 400
    assert np.corrcoef(rising.T)[0, 1] < -0.99  # up and to the right
    assert abs(level[:, 0].mean() - (rising[:, 0].min() + rising[:, 0].max()) / 2) < 3


def test_chart_shows_a_single_value():
    sheet = np.asarray(probe.chart([("t", {"noisy": [(10, 1)]})])).astype(int)[:, :520]  # without the legend
    assert (np.abs(sheet - [0xD6, 0x27, 0x28]).sum(2) < 30).sum() > 20


def test_report_on_an_empty_folder_is_one_line_with_code_2(tmp_path, monkeypatch, capsys):
    assert main(monkeypatch, "report", tmp_path) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and error.count("\n") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())
