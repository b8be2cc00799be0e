"""Masks beside the images, and what patch features are worth: held to plain loops over pixels."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_probe import GREEDY, PLAIN, call, cosines, pretrained, randint, randn, refused

import common
import pretrain
import probe
from common import UserError

CPU = torch.device("cpu")
QUICK = [*PLAIN, "--img_size", "32", "--resize", "32", "--iterations", "300"]
NOISE = ["--noise", "gauss50"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Relative paths of a test lie in a folder of its own."""
    monkeypatch.chdir(tmp_path)

def write_image(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(x, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Four grey images of 6 x 8 pixels and their masks, without class folders."""
    rng = np.random.default_rng(0)
    for i in range(4):
        write_image(tmp_path / f"train/{i}.png", rng.integers(256, size=(6, 8)))
        write_image(tmp_path / f"masks/train/{i}.png", rng.choice([0, 3, 255], size=(6, 8)))
    return tmp_path


# ==== masks =======================================================================================
def test_masks_are_found_beside_images_and_are_no_images_themselves(folder):
    images = common.Folder(folder)
    assert images.has_masks()
    assert images.paths == [f"train/{i}.png" for i in range(4)]
    assert common.Folder(folder, "").paths == images.paths
    assert images.mask(1).tolist() == np.array(Image.open(folder / "masks/train/1.png")).tolist()
    assert images.mask_classes().tolist() == [0, 3]
    (folder / "masks").rename(folder / "other")
    assert not common.Folder(folder).has_masks()


def test_a_palette_is_the_classes_and_one_bit_two_of_them(folder):
    classes = np.arange(48, dtype=np.uint8).reshape(6, 8)
    coloured = Image.fromarray(classes)
    coloured.putpalette([7, 7, 7] * 256)
    assert coloured.mode == "P"
    coloured.save(folder / "masks/train/0.png")
    Image.fromarray(classes > 20).save(folder / "masks/train/1.png")
    images = common.Folder(folder)
    assert images.mask(0).tolist() == classes.tolist()
    assert images.mask(1).tolist() == (classes > 20).astype(int).tolist()


@pytest.mark.parametrize("mask, said", [
    (np.zeros((6, 8, 3)), "mode RGB"),
    (np.zeros((8, 6)), r"is \(8, 6\), but its image train/2.png is \(6, 8\)"),
    (None, "no such file"),
    (b"no picture", "cannot identify"),
])
def test_a_mask_that_is_none_is_named(folder, mask, said):
    path = folder / "masks/train/2.png"
    if mask is None:
        path.unlink()
    elif isinstance(mask, bytes):
        path.write_bytes(mask)
    else:
        write_image(path, mask)
    with pytest.raises(UserError, match=said) as error:
        common.Folder(folder).mask_classes()
    assert str(path) in str(error.value)


# ==== from masks to patches and back ==============================================================
@pytest.mark.parametrize("side, grid", [(32, 4), (30, 4), (7, 3), (3, 5)])
def test_shares_of_a_patch_are_those_of_its_known_pixels(side, grid):
    mask = np.random.default_rng(0).choice([0, 1, 2, 2, 255], size=(side, side))
    shares = probe.patch_shares(mask, grid, 4)
    assert shares.shape == (grid**2, 4)
    for row in range(grid):
        for column in range(grid):
            pixels = [mask[y, x] for y in range(side) for x in range(side)
                      if (y * grid // side, x * grid // side) == (row, column) and mask[y, x] != 255]
            expected = [pixels.count(k) / max(1, len(pixels)) for k in range(4)]
            assert shares[row * grid + column].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("height, width", [(96, 128), (192, 128), (128, 128), (262, 180)])
@pytest.mark.parametrize("resize, size", [(128, 128), (160, 128)])
def test_the_part_of_a_mask_is_what_the_crop_of_its_image_shows(height, width, resize, size):
    """A bright disc in the middle of the crop has the same place in both."""
    y, x = np.mgrid[:height, :width]
    disc = np.hypot(y - height / 2, x - width / 2) < min(height, width) / 4
    crop = probe.central_crop(torch.from_numpy(255 * disc.astype(np.uint8))[None], resize, size)
    part = probe.crop_mask(SimpleNamespace(resize=resize, img_size=size), disc.astype(np.uint8))
    assert part.shape == (round(min(height, width) * size / resize),) * 2
    enlarged = common.resize(torch.from_numpy(255 * part)[None], size, size)
    assert ((crop > 127) != (enlarged > 127)).float().mean() < 0.015  # half a pixel


def test_logits_are_enlarged_between_the_middles_of_patches():
    """Two patches a row, with logits 0 and 1 of class 1 against 0.6: it wins from 0.6 of the way on."""
    logits = torch.tensor([[0.6, 0.0], [0.6, 1.0], [0.6, 0.0], [0.6, 1.0]])
    answers = probe.answer_pixels(logits, 100)
    assert answers.shape == (100, 100)
    first = 25 + 0.6 * 50  # the middles are at a quarter and three quarters
    assert answers[0].tolist() == [int(x + 0.5 > first) for x in range(100)]
    assert (answers == answers[0]).all()


def plain_ious(answers, y, classes):
    """Pixel by pixel, of the classes that are there or answered."""
    ious = {}
    for k in range(classes):
        both = sum(a == k and b == k for a, b in zip(answers, y, strict=True))
        either = sum(a == k or b == k for a, b in zip(answers, y, strict=True))
        if either:
            ious[k] = 100 * both / either
    return ious


def test_mean_iou_equals_plain_loops():
    answers, y = randint(4, 300), randint(3, 300, seed=1)  # of five classes the last is nowhere
    expected = plain_ious(answers.tolist(), y.tolist(), 5)
    counts = probe.confusion(answers, y, 5)
    assert counts.sum() == 300
    found = probe.class_iou(counts).tolist()
    assert found[:4] == pytest.approx([expected[k] for k in range(4)])
    assert np.isnan(found[4])
    assert found[3] == 0  # answered, but never right
    assert probe.mean_iou(counts) == pytest.approx(np.mean(list(expected.values())))


# ==== heads on shares =============================================================================
X = randn(1, 200, 4, 3)
ARGS = SimpleNamespace(iterations=40, batch_size=32, seed=4)


def test_heads_trained_together_on_shares_equal_each_alone():
    y, keep = torch.rand(200, 5).softmax(1), torch.arange(150)
    rates = [1e-3, 0.1, 3.0]
    weight, bias = probe.train_heads(X, y, 5, [0, 1], ARGS, keep, rates=rates)
    for k, rate in enumerate(rates):
        alone, its_bias = probe.train_heads(X, y, 5, [0, 1], ARGS, keep, rates=[rate])
        torch.testing.assert_close(weight[:, k], alone[:, 0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias[k], its_bias[0], rtol=1e-4, atol=1e-6)


def test_whole_shares_are_classes():
    y, keep = randint(5, 200), torch.arange(150)
    shares = torch.nn.functional.one_hot(y, 5).float()
    made = [probe.train_heads(X, target, 5, [0, 1], ARGS, keep) for target in (y, shares)]
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [8, 16])
def test_pixels_of_a_patch_and_of_its_neighbours_are_averaged_to_8_x_8_areas(size):
    pixels = object.__new__(probe.Pixels)
    pixels.patch_size, pixels.normal = size, torch.tensor([[0.5], [0.25]])[..., None, None]
    pixels.mean, pixels.std = 0.0, 1.0
    crops = randint(256, 2, 1, 4 * size, 4 * size).byte()
    tokens = pixels.embed(crops, dense=True)
    assert torch.equal(tokens[:, :5], pixels.embed(crops))
    patches = tokens[:, 5:].unflatten(1, (16, 2))  # (B, P, 2, 64)
    wide = torch.zeros(2, 6 * size, 6 * size)
    wide[:, size:5 * size, size:5 * size] = (crops[:, 0] / 255 - 0.5) / 0.25
    for b in range(2):
        for k in range(16):
            top, left = size * (k // 4), size * (k % 4)
            around = wide[b, top:top + 3 * size, left:left + 3 * size]
            itself = around[size:2 * size, size:2 * size]
            for token, x in zip(patches[b, k], (itself, around), strict=True):
                areas = x.unflatten(0, (8, -1)).unflatten(2, (8, -1)).mean((1, 3))
                torch.testing.assert_close(token, areas.flatten())


@pytest.mark.parametrize("preset", ["demo", "tiny", "small", "imagenet100", "imagenet1k"])
def test_patches_of_pixels_are_those_of_the_presets_vit(preset):
    vit = pretrain.read_config(["--preset", preset, "--data", "none", "--out", "none"])
    assert probe.patch_size_of(vit) == vit.patch_size


# ==== the dense probe =============================================================================
def draw_squares(root, count, label):
    """Bright squares (class 1) or dark ones (class 2) on grey ground, images of 40 x 32 pixels; label: whether
    each lies in a folder of its class."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(count):
            mask = np.zeros((40, 32), np.uint8)
            top, left = rng.integers(8, 16, 2)
            kind = i % 2 + 1
            mask[top:top + 12, left:left + 12] = kind
            level = np.array([90, 200, 20])[mask]
            name = f"{split}/{label and CLASSES[i % 2]}/{i}.png"
            write_image(root / name, (level + rng.normal(0, 10, mask.shape)).clip(0, 255))
            mask[:12] = 255  # of the middle 32 rows 8, the first row of patches
            write_image(root / "masks" / name, mask)


CLASSES = ("cat", "dog")


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Images with masks and without labels, a run on them, and the probe of both."""
    root = tmp_path_factory.mktemp("dense")
    draw_squares(root / "data", 100, "")
    pretrained(root / "data", root / "runs/pretrain/noisy-seed0", *NOISE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        shared = ["--data", "data", *NOISE, *QUICK]
        assert call(probe, *shared, "--pixels", "--preset", "tiny", "--out", "runs/probe/pixels-seed0.json") == 0
        run = ["--run", "runs/pretrain/noisy-seed0", "--preset", "tiny"]
        assert call(probe, *shared, *run, "--out", "runs/probe/noisy-seed0.json") == 0
    return root


def read(root, name):
    return common.read_json(root / f"runs/probe/{name}-seed0.json")


def test_masks_alone_give_dense_figures_and_no_others(squares):
    for name in ("pixels", "noisy"):
        result = read(squares, name)
        assert {"iou", "clean_iou", "knn_iou", "clean_knn_iou", "class_iou", "dense_chosen"} <= set(result)
        assert not {"linear", "knn", "map", "few_shots", "classes"} & set(result)
        assert len(result["class_iou"]) == 3
        assert result["iou"] == pytest.approx(np.mean(result["class_iou"]))
        assert [set(point) for point in result["sweep"]] == [{"strength", "noise", "iou"}] * 7
        by_strength = {point["strength"]: point["iou"] for point in result["sweep"]}
        assert by_strength[0] == result["clean_iou"]
        assert by_strength[1] == result["iou"]


def test_pixels_that_tell_the_classes_apart_segment_them_nearly_as_well_as_true_shares(squares):
    folder, answers, right = common.Folder(squares / "data", "val"), [], []
    for i in range(len(folder)):
        mask = folder.mask(i)[4:36]
        known = mask != 255
        answers.append(probe.answer_pixels(probe.patch_shares(mask, 4, 3), 32)[known])
        right.append(torch.from_numpy(mask[known]).long())
    best = probe.mean_iou(probe.confusion(torch.cat(answers), torch.cat(right), 3))
    result = read(squares, "pixels")
    assert 0.8 * best < result["iou"] < best
    assert 0.7 * best < result["knn_iou"] < best


def test_dense_figures_are_those_of_a_plain_loop_over_all_known_pixels(squares, monkeypatch):
    monkeypatch.chdir(squares)
    flags = ["--data", "data", *NOISE, *QUICK, "--pixels", "--preset", "tiny", "--out", "other/x.json"]
    args = probe.read_config(flags)
    heads, choose = [], probe.choose_head

    def watched(x, y, classes, args, keep, held, *more):
        """Of the 16 patches of an image the first four have no known pixel: no head sees them."""
        assert len(keep) + len(held) == 100 * 12
        assert {*(keep % 16).tolist()} == {*(held % 16).tolist()} == {*range(4, 16)}
        assert not {*(keep // 16).tolist()} & {*(held // 16).tolist()}  # nor held-out images
        heads.append(choose(x, y, classes, args, keep, held, *more))
        return heads[0]

    monkeypatch.setattr(probe, "choose_head", watched)
    result = probe.evaluate(args, CPU, {})
    tokens, weight, bias = heads[0][0]
    folder, pixels = common.Folder("data", "val", "gauss50"), probe.Pixels(args)
    found, right = [], []
    for i in range(len(folder)):
        crop = probe.central_crop(folder.read(i), 32, 32)
        patches = pixels.embed(crop[None], dense=True)[0, 5:].unflatten(0, (16, 2))
        x = patches[:, tokens].half().float().flatten(1)
        maps = (x @ weight[:, 0] + bias[0]).T.unflatten(1, (4, 4))
        answers = torch.nn.functional.interpolate(maps[None], (32, 32), mode="bilinear")[0].argmax(0)
        mask = folder.mask(i)[4:36]  # the middle of 40 rows
        known = mask != 255
        found += answers.numpy()[known].tolist()
        right += mask[known].tolist()
    assert len(right) == 100 * 24 * 32
    expected = plain_ious(found, right, 3)
    assert result["class_iou"] == pytest.approx([expected[k] for k in range(3)], abs=0.05)


def test_pixels_outside_of_the_crops_count_nowhere(squares, monkeypatch):
    monkeypatch.chdir(squares)
    expected = read(squares, "pixels")
    for split in ("train", "val"):
        for path in Path(f"data/masks/{split}").rglob("*.png"):
            mask = np.array(Image.open(path))
            mask[:3] = 0  # rows that no crop shows
            write_image(Path("again") / path.relative_to("data"), mask)
        Path("again", split).symlink_to(Path("data", split).resolve())
    flags = ["--data", "again", *NOISE, *QUICK, "--pixels", "--preset", "tiny", "--out", "again.json"]
    assert call(probe, *flags) == 0
    assert common.read_json("again.json")["class_iou"] == expected["class_iou"]


def test_labels_and_masks_give_each_their_figures(tmp_path, squares):
    draw_squares(tmp_path / "data", 30, "labelled")
    run = squares / "runs/pretrain/noisy-seed0"
    flags = ["--data", "data", "--run", run, *NOISE, *QUICK, "--preset", "tiny"]
    assert call(probe, *flags, "--out", "both.json") == 0
    both = common.read_json("both.json")
    (tmp_path / "data/masks").rename(tmp_path / "masks")
    assert call(probe, *flags, "--out", "labels.json") == 0
    labels = common.read_json("labels.json")
    assert "iou" not in labels
    for name in ("linear", "knn", "map", "cosine"):
        assert both[name] == labels[name]
    # with masks of patches that are on disk in half precision, else of patches embedded once more
    assert both["patch_cosine"] == pytest.approx(labels["patch_cosine"], rel=1e-4)
    unlabelled = read(squares, "noisy")  # the same images, in another order
    assert both["iou"] == pytest.approx(unlabelled["iou"], abs=15)


def test_a_result_is_made_again_when_masks_have_changed(tmp_path, capsys):
    draw_squares(tmp_path / "data", 12, "")
    flags = ["--data", "data", "--noise", "none", *QUICK, "--pixels", "--preset", "tiny", "--out", "p.json"]
    for said in ("mean IoU", "complete, nothing to do"):
        assert call(probe, *flags) == 0
        assert said in capsys.readouterr().out
    write_image(tmp_path / "data/masks/train/3.png", np.arange(40 * 32).reshape(40, 32) % 3)
    assert call(probe, *flags) == 0
    assert "mean IoU" in capsys.readouterr().out


def test_patch_cosine_is_that_of_the_patches_of_noisy_and_clean_images(squares, monkeypatch):
    monkeypatch.chdir(squares)
    args = probe.read_config(["--data", "data", "--run", "runs/pretrain/noisy-seed0", *NOISE, *QUICK, "--out", "x"])
    backbone = probe.load_backbone(args, CPU)
    folder, values = common.Folder("data", "val", "gauss50"), []
    for i in range(len(folder)):
        crops = [probe.central_crop(folder.read(i, source), 32, 32) for source in ("noisy", "clean")]
        noisy, clean = backbone.tokens(torch.stack(crops))[:, 2:]
        values.append(cosines(noisy, clean).diag().mean().item())
    assert read(squares, "noisy")["patch_cosine"] == pytest.approx(np.mean(values), rel=1e-4)


# ==== centred kernel alignment ====================================================================
def plain_cka(x, y):
    """By the Gram matrices of centred features."""
    grams = []
    for z in (x, y):
        z = z - z.mean(0)
        grams.append(torch.tensor([[float(a @ b) for b in z] for a in z], dtype=torch.double))
    k, m = grams
    return ((k * m).sum() / (k * k).sum().sqrt() / (m * m).sum().sqrt()).item()


def test_cka_equals_plain_loops_and_ignores_rotation_scale_and_shift():
    x, y = randn(30, 6).double(), randn(30, 4, seed=1).double()
    y[:, 0] += x[:, 0]
    found = probe.linear_cka(x, y)
    assert found == pytest.approx(plain_cka(x, y), rel=1e-9)
    assert 0.05 < found < 0.95
    turned = 3 * x @ torch.linalg.qr(randn(6, 6, seed=2).double())[0] + 5
    assert probe.linear_cka(turned, y) == pytest.approx(found, rel=1e-9)
    assert probe.linear_cka(x, turned) == pytest.approx(1, rel=1e-9)


def test_report_compares_every_arm_with_clean_and_shows_masks(squares, tmp_path):
    for arm in ("noisy", "clean"):
        for folder in ("pretrain", "probe"):
            (tmp_path / "runs" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / f"runs/pretrain/{arm}-seed0").symlink_to(squares / "runs/pretrain/noisy-seed0")
    (tmp_path / "data").symlink_to(squares / "data")
    run = ["--run", "runs/pretrain/noisy-seed0", "--preset", "tiny"]
    for arm, noise in (("noisy", "gauss50"), ("clean", "none")):
        flags = ["--data", "data", "--noise", noise, *QUICK, *run, "--out", f"runs/probe/{arm}-seed0.json"]
        assert call(probe, *flags) == 0
    assert call(probe, "report", "runs") == 0
    features = [torch.from_numpy(np.load(f"runs/probe/{arm}-seed0.npz")["cls"]).float() for arm in ("noisy", "clean")]
    expected = probe.linear_cka(*features)
    text = Path("runs/results.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| noisy ")]
    assert rows[1].endswith(f" {expected:.2f} |")
    result = read(tmp_path, "noisy")
    assert f"| {result['iou']:.1f} |" in rows[0]
    classes = " | ".join(f"{value:.1f}" for value in result["class_iou"])
    assert rows[-1] == f"| noisy | {classes} |"
    assert "Mean IoU tested at other noise levels" in text
    assert "classes." not in text  # there are no labels
    with Image.open("runs/masks.png") as picture:
        assert picture.size[0] > 900
    stored = json.loads(Path("runs/results.json").read_text())
    assert stored["noisy"]["noisy-seed0"]["cka"] == pytest.approx(expected)


def test_picture_of_masks_shows_val_where_the_denoised_copy_has_none(squares, tmp_path, monkeypatch):
    """Its answers are of val, so its images and masks are, too."""
    shutil.copytree(squares / "runs", "runs")
    for name, target in (("data", squares / "data"), ("copy/train", squares / "data/train")):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(target)
    path = Path("runs/probe/noisy-seed0.json")
    known = common.read_json(path)
    known["pretrain"]["denoised"] = "copy"
    common.write_json(path, known)
    asked, mask = [], common.Folder.mask
    monkeypatch.setattr(common.Folder, "mask", lambda self, i: asked.append(self.paths[i]) or mask(self, i))
    assert call(probe, "report", "runs") == 0
    assert len(asked) == probe.SHOWN
    assert all(path.startswith("val/") for path in asked)


# ==== bad input ===================================================================================
@pytest.mark.parametrize("change, said", [
    ("unlearned", "masks/val: class 7 is in no mask of train/"),
    ("one class", r"masks/train: has pixels of classes [0]; two are the least"),
    ("missing", "no such file"),
    ("train alone", "no such file"),
    ("val alone", "no such file"),
])
def test_masks_that_do_not_fit_are_refused_before_anything_is_trained(folder, capsys, change, said):
    for i in range(4):
        write_image(folder / f"val/{i}.png", np.full((6, 8), 9))
        write_image(folder / f"masks/val/{i}.png", np.full((6, 8), 3))
    if change == "unlearned":
        write_image(folder / "masks/val/0.png", np.full((6, 8), 7))
    if change == "one class":
        for i in range(4):
            write_image(folder / f"masks/train/{i}.png", np.zeros((6, 8)))
    if change == "missing":
        (folder / "masks/train/3.png").unlink()
    if change == "train alone":
        (folder / "masks/val").rename(folder / "elsewhere")
    if change == "val alone":
        (folder / "masks/train").rename(folder / "elsewhere")
    assert said in refused(capsys, "check", "--data", folder)


@pytest.mark.parametrize("known", [[], [0]])
def test_masks_that_leave_nothing_to_train_or_to_choose_on_are_refused(folder, capsys, known):
    """Other images have no known pixel in their crop."""
    for i in range(4):
        write_image(folder / f"val/{i}.png", np.full((6, 8), 9))
        mask = np.full((6, 8), 255)
        mask[:, 0] = i % 2  # which no crop shows
        for split in ("train", "val"):
            write_image(folder / f"masks/{split}/{i}.png", np.zeros((6, 8)) if i in known else mask)
    flags = ["--data", folder, "--noise", "none", "--pixels", "--preset", "tiny", "--out", "out.json", *QUICK]
    assert "masks/train: too few images with known pixels" in refused(capsys, *flags)


def test_check_takes_masks_for_labels_but_no_shots_of_them(folder, capsys):
    for i in range(4):
        write_image(folder / f"val/{i}.png", np.full((6, 8), 9))
    (folder / "masks/val").symlink_to(folder / "masks/train")
    assert call(probe, "check", "--data", folder) == 0
    assert "masks, but no labels" in refused(capsys, "check", "--data", folder, "--shots", "5")
    (folder / "masks").rename(folder / "other")
    assert call(probe, "check", "--data", folder) == probe.NO_TARGETS


# ==== memory ======================================================================================
WIDE = """
def blocks(args, embeds, folder, source, device, denoiser=None):  # random, as if of a wide ViT
    rng = torch.Generator().manual_seed(0)
    for part in torch.arange(len(folder)).split(probe.CHUNK):
        yield [torch.randn(len(part), 5 + 16 * 4, 256, generator=rng)]
probe.embed_blocks = blocks
"""


def test_memory_of_the_dense_probe_does_not_grow_with_the_number_of_images(squares):
    """Patch tokens of 3,200 images are 105 MB on disk, 210 in float32; of 800 a quarter."""
    run = squares / "runs/pretrain/noisy-seed0"
    megabytes = []
    for n in (800, 3200):
        root = Path(f"data{n}")
        for folder in (root, root / "masks"):
            (folder / "train").mkdir(parents=True)
            source = squares / "data" / folder.relative_to(root)
            (folder / "val").symlink_to(source / "val")
            for i in range(n):
                (folder / f"train/{i}.png").symlink_to(source / f"train/{i % 100}.png")
        flags = ["--run", str(run), "--data", str(root), "--out", f"{n}.json", "--img_size", "32", "--resize", "32",
                 "--iterations", "20", "--preset", "tiny", *PLAIN]
        script = GREEDY.format(root=str(Path(probe.__file__).parent), before=WIDE, flags=flags)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        megabytes.append(float(done.stdout.split()[-1]))
    assert megabytes[1] < megabytes[0] + 40
