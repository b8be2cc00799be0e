"""Noise, images, batches made ahead, and the runtime of common.py: every test is a claim, checked
against closed forms, Pillow, hashes by hand, or files that were broken on purpose."""

import argparse
import contextlib
import hashlib
import itertools
import math
import os
import pickle
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import UserError

ROOT = Path(common.__file__).parent
CPU = torch.device("cpu")


def close(a, b, rtol=1e-4, atol=0.0):
    a = np.asarray(a, dtype=np.float64)
    b = np.asarray(b, dtype=np.float64)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def frequency(events, p):
    """The share of True in a bool tensor is p, within the scatter of so many draws."""
    scatter = math.sqrt(p * (1 - p) / events.numel())
    close(events.double().mean(), p, rtol=0, atol=4.5 * scatter + 1e-9)


def correlation(a, b):
    return abs(np.corrcoef(a.ravel(), b.ravel())[0, 1])


class Hostile:
    """Makes a folder when it is unpickled."""
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


# ==== noise =======================================================================================
NORMAL = statistics.NormalDist()
MODELS = ["gauss100", "shot3", "speckle0.7", "rician80", "impulse0.4", "camera30,5"]
RANGES = ["gauss50-255", "shot1-10", "camera10-30,5-20"]


def clipped_gaussian(mean, sigma):
    """Mean and standard deviation of clip(N(mean, sigma), 0, 1)."""
    if sigma == 0:
        return mean, 0.0
    a = -mean / sigma
    b = (1 - mean) / sigma
    inside = NORMAL.cdf(b) - NORMAL.cdf(a)
    above = 1 - NORMAL.cdf(b)
    pa = NORMAL.pdf(a)
    pb = NORMAL.pdf(b)
    first = mean * inside + sigma * (pa - pb) + above
    second = (mean**2 + sigma**2) * inside + above
    second += 2 * mean * sigma * (pa - pb)
    second += sigma**2 * (a * pa - b * pb)
    return first, math.sqrt(second - first**2)


def clipped_poisson(x, photons):
    """Mean and standard deviation of min(Poisson(photons x) / photons, 1)."""
    k = np.arange(100)
    factorials = np.array([math.factorial(n) for n in range(100)], dtype=float)
    rate = photons * x
    p = math.exp(-rate) * rate**k / factorials
    values = np.minimum(k / photons, 1)
    first = (p * values).sum()
    second = (p * values**2).sum()
    return first, math.sqrt(second - first**2)


def noisy(x, spec, key="a.png", seed=0, shape=(200, 200, 3)):
    """Noise on an image of one value: float32 tensor."""
    return common.add_noise(torch.full(shape, x), spec, key, seed)


def check_moments(values, mean, deviation):
    assert values.dtype == torch.float32
    assert values.min() >= 0
    assert values.max() <= 1
    scatter = deviation / math.sqrt(values.numel())
    close(values.double().mean(), mean, rtol=0, atol=4.5 * scatter + 1e-7)
    close(values.double().std(), deviation, rtol=0.02, atol=1e-7)


@pytest.mark.parametrize("x", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("level", [50, 100, 255])
def test_gaussian_noise_has_the_moments_of_a_clipped_gaussian(level, x):
    mean, deviation = clipped_gaussian(x, level / 255)
    check_moments(noisy(x, f"gauss{level}"), mean, deviation)


def test_gauss255_moves_black_to_0_316_and_white_to_0_684():
    close(noisy(0.0, "gauss255").mean(), 0.3156, rtol=0, atol=0.005)
    close(noisy(1.0, "gauss255").mean(), 0.6845, rtol=0, atol=0.005)


@pytest.mark.parametrize("x", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("photons", [10, 3, 1, 0.5])
def test_shot_noise_has_the_moments_of_a_clipped_poisson(photons, x):
    values = noisy(x, f"shot{photons}")
    mean, deviation = clipped_poisson(x, photons)
    check_moments(values, mean, deviation)
    counts = values[values < 1] * photons
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-5)  # whole photons


@pytest.mark.parametrize("x", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("level", [0.4, 0.7, 1.0])
def test_speckle_noise_is_proportional_to_the_pixel(level, x):
    mean, deviation = clipped_gaussian(x, x * level)
    check_moments(noisy(x, f"speckle{level}"), mean, deviation)


def test_rician_noise_has_the_moments_of_a_magnitude():
    sigma = 10 / 255
    mean = sigma * math.sqrt(math.pi / 2)
    deviation = sigma * math.sqrt(2 - math.pi / 2)
    check_moments(noisy(0.0, "rician10"), mean, deviation)
    values = noisy(0.5, "rician10").double()
    scatter = 2 * 0.5 * sigma / math.sqrt(values.numel())
    close((values**2).mean(), 0.25 + 2 * sigma**2, rtol=0, atol=4.5 * scatter)
    close(values.std(), sigma, rtol=0.02)  # Gaussian far from 0


@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
def test_impulse_noise_replaces_its_fraction_half_by_black_half_by_white(level):
    values = noisy(0.3, f"impulse{level}")
    kept = (values == 0.3).sum()
    black = values == 0
    white = values == 1
    assert kept + black.sum() + white.sum() == values.numel()
    frequency(black, level / 2)
    frequency(white, level / 2)


@pytest.mark.parametrize("x", [0.4, 0.5])
@pytest.mark.parametrize(("photons", "sigma"), [(100, 20), (100, 5), (400, 20)])
def test_camera_noise_has_the_variances_of_photons_and_reading_added(photons, sigma, x):
    variance = x / photons + (sigma / 255) ** 2  # far from clipping
    check_moments(noisy(x, f"camera{photons},{sigma}"), x, math.sqrt(variance))


def test_camera_noise_of_a_black_image_is_that_of_reading_alone():
    mean, deviation = clipped_gaussian(0.0, 40 / 255)
    check_moments(noisy(0.0, "camera30,40"), mean, deviation)


def test_all_registered_models_are_tested():
    assert {model.rstrip("0123456789.,") for model in MODELS} == set(common.NOISES)


@pytest.mark.parametrize("spec", MODELS)
def test_noise_is_independent_between_channels_pixels_and_images(spec):
    a = noisy(0.5, spec).numpy()
    other_image = noisy(0.5, spec, "b.png").numpy()
    other_seed = noisy(0.5, spec, seed=1).numpy()
    pairs = [
        (a[..., 0], a[..., 1]),
        (a[..., 0], a[..., 2]),
        (a[..., 1], a[..., 2]),
        (a[:, 1:], a[:, :-1]),
        (a[1:], a[:-1]),
        (a[1:, 1:], a[:-1, :-1]),
        (a, other_image),
        (a, other_seed),
    ]
    for p, q in pairs:
        assert correlation(p, q) < 4.5 / math.sqrt(p.size)


@pytest.mark.parametrize("spec", [*MODELS, *RANGES])
def test_noise_is_fixed_by_key_and_seed(spec):
    x = torch.rand((9, 8, 3), generator=common.generator("x"))
    before = x.clone()
    first = common.add_noise(x, spec, "train/a/1.png", 3)
    noisy(0.1, spec, "between")
    assert torch.equal(first, common.add_noise(x, spec, "train/a/1.png", 3))
    assert torch.equal(x, before)  # the image itself stays
    others = [
        ("train/a/2.png", 3),
        ("val/a/1.png", 3),
        ("train/a/1.png", 4),
        ("3:train/a/1.png", 0),
    ]
    for key, seed in others:
        assert not torch.equal(first, common.add_noise(x, spec, key, seed)), (key, seed)


@pytest.mark.parametrize("spec", [*MODELS, *RANGES])
def test_noise_of_arrays_and_tensors_in_any_memory_order_has_the_same_bits(spec):
    x = torch.rand((67, 59, 3), generator=common.generator("x"))
    expected = common.add_noise(x, spec, "a.png")
    planes = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    columns = np.asfortranarray(x.numpy())
    for image in (x.numpy(), planes, columns):
        result = common.add_noise(image, spec, "a.png")
        assert torch.is_tensor(result)
        assert torch.equal(result, expected)


NOISE_HASHES = """
import hashlib, sys, torch, common
x = torch.rand((150, 151, 3), generator=common.generator("x"))
for threads in (1, 3):
    torch.set_num_threads(threads)
    for spec in sys.argv[1:]:
        bits = common.add_noise(x, spec, "train/a/1.png", 7).numpy().tobytes()
        print(hashlib.sha256(bits).hexdigest())
"""


def test_noise_has_the_same_bits_in_another_process_and_on_any_number_of_threads():
    x = torch.rand((150, 151, 3), generator=common.generator("x"))
    specs = [*MODELS, *RANGES]
    expected = []
    for spec in specs:
        bits = common.add_noise(x, spec, "train/a/1.png", 7).numpy().tobytes()
        expected.append(hashlib.sha256(bits).hexdigest())
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", NOISE_HASHES, *specs]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected * 2


def test_noise_is_drawn_from_the_hash_of_base_seed_and_relative_path():
    """By hand: another version of this code gives the same, so that results stay comparable."""
    digest = hashlib.sha256(b"7:train/caf\xc3\xa9/1.png").digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    expected = 0.5 + 100 / 255 * torch.randn((6, 5, 3), generator=rng)
    found = noisy(0.5, "gauss100", "train/café/1.png", 7, (6, 5, 3))
    assert torch.equal(found, expected.clamp(0, 1))


def test_a_range_draws_a_level_for_each_image_within_it():
    """The level is read off the share of clipped values of mid-grey: P(|n| > 0.5) at sigma."""
    levels = []
    for i in range(60):
        values = noisy(0.5, "gauss50-255", f"{i}.png", shape=(64, 64, 3))
        clipped = ((values == 0) | (values == 1)).double().mean().item()
        sigma = 0.5 / NORMAL.inv_cdf(1 - clipped / 2)
        levels.append(255 * sigma)
    assert 50 * 0.95 < min(levels) < 65
    assert 240 < max(levels) < 255 * 1.05
    scatter = 205 / math.sqrt(12 * 60)
    close(np.mean(levels), 152.5, rtol=0, atol=4 * scatter)
    assert len({round(v, 3) for v in levels}) == 60


def test_each_parameter_of_a_model_has_a_range_of_its_own():
    drawn = []
    for i in range(100):
        function, levels, _ = common.noise_draw("camera10-30,5-20", f"{i}.png")
        assert function is common.camera
        drawn.append(levels)
    photons, sigma = np.array(drawn).T
    close([photons.min(), photons.max()], [10, 30], rtol=0, atol=1)
    close([sigma.min(), sigma.max()], [5, 20], rtol=0, atol=1)
    assert correlation(photons, sigma) < 4 / math.sqrt(100)


def test_noise_none_is_the_image_itself():
    x = np.random.default_rng(0).random((5, 4, 3), dtype=np.float32)
    result = common.add_noise(x, "none", "a")
    assert torch.is_tensor(result)
    assert np.array_equal(result, x)
    assert common.parse_noise("none") is None


BAD_SPECS = [
    "gaus100", "gauss", "gauss-5", "gauss0", "gauss255-50", "gaussnan", "gaussinf", "gauss1e999",
    "gauss10-", "gauss10-20-30", "100", "", "None", "gauss 1 2", "impulse1.5", "impulse0.5-1.5",
    "shot0-3", "shot99999999999999999999", "gauss100,5", "camera30", "camera30,", "camera,5",
    "camera30,0", "camera0,5", "camera30,5,2", "camera30,20-5",
]


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_bad_noise_specs_are_refused_by_name(spec):
    with pytest.raises(UserError, match="--noise") as error:
        common.parse_noise(spec)
    assert spec in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("spec", "name", "levels"), [
    ("gauss100", "gauss", [(100, 100)]),
    ("gauss50-255", "gauss", [(50, 255)]),
    ("speckle0.4", "speckle", [(0.4, 0.4)]),
    ("impulse1", "impulse", [(1, 1)]),
    ("camera30,5", "camera", [(30, 30), (5, 5)]),
    ("camera10-30,.5", "camera", [(10, 30), (0.5, 0.5)]),
])
def test_noise_specs_parse_to_name_and_levels(spec, name, levels):
    assert common.parse_noise(spec) == (name, levels)


@pytest.mark.parametrize(("low", "high"), [
    ("gauss20", "gauss60"), ("shot3", "shot30"), ("speckle0.1", "speckle0.5"),
    ("rician20", "rician60"), ("impulse0.1", "impulse0.4"), ("camera3,5", "camera30,5"),
])
def test_models_say_whether_a_smaller_level_is_stronger(low, high):
    weaker = (noisy(0.5, low) - 0.5).square().mean()
    stronger = (noisy(0.5, high) - 0.5).square().mean()
    name, _ = common.parse_noise(low)
    assert (weaker > stronger) == common.NOISES[name].inverse


@pytest.fixture
def noises(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(common, "NOISES", dict(common.NOISES))


def test_the_noise_model_of_the_readme_works_as_printed(noises):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    block, = [b for b in blocks if b.startswith("@noise")]
    assert len(block.splitlines()) == 3
    exec(block, dict(vars(common)))  # as a part of common.py
    x = noisy(0.5, "stripes40", shape=(4, 5000, 3))
    column = x[:1, :, :1]
    assert torch.equal(x, column.expand_as(x))
    scatter = 40 / 255 / math.sqrt(5000)
    close(column.mean(), 0.5, rtol=0, atol=4.5 * scatter)
    close(column.std(), 40 / 255, rtol=0.05)


def test_an_added_model_is_parsed_by_the_same_rule_as_the_others(noises):
    @common.noise("gaussbands", most=1)  # begins with another model's name
    def bands(x, level, width, rng):
        return x + level * width

    assert common.parse_noise("gaussbands0.5,1") == ("gaussbands", [(0.5, 0.5), (1, 1)])
    assert common.parse_noise("gauss0.5")[0] == "gauss"
    with pytest.raises(UserError, match="up to 1"):
        common.parse_noise("gaussbands2,1")
    with pytest.raises(UserError, match="takes 2 numbers"):
        common.parse_noise("gaussbands1")
    x = noisy(0.5, "gaussbands0.1-0.2,1")
    assert 0.6 <= x.min() == x.max() <= 0.7


def test_a_name_that_is_registered_again_is_replaced(noises):
    @common.noise("gauss", most=5)
    def other(x, level, rng):
        return x * 0 + level / 10

    assert (noisy(0.5, "gauss3") == torch.tensor(0.3)).all()
    with pytest.raises(UserError, match="up to 5"):
        common.parse_noise("gauss100")


# ==== images: kinds of files ======================================================================
SIZES = [(60, 80), (97, 41), (33, 120), (50, 50), (120, 96), (17, 23), (41, 97)]


def picture(seed, height, width, channels=3):
    """Random uint8 (H, W, C)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path, x, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, x)
    else:
        Image.fromarray(x).save(path, **kw)
    return path


def hwc(x, dtype=torch.uint8):
    """Tensor (C, H, W) of Folder.read to an array (H, W, C)."""
    assert x.dtype == dtype
    return x.permute(1, 2, 0).numpy()


def only(folder, dtype=torch.uint8, **kw):
    """The one image of a folder as Folder reads it: array (H, W, C)."""
    found = common.Folder(folder, **kw)
    assert len(found) == 1
    x = hwc(found.read(0), dtype)
    assert x.shape == (*found.shapes[0, :2], found.channels)  # as its header says
    return x


def test_8_bit_png_is_read_as_it_is(tmp_path):
    x = picture(0, 7, 9)
    save(tmp_path / "a.png", x)
    assert np.array_equal(only(tmp_path), x)


@pytest.mark.parametrize("transparency", [None, 3, bytes([255, 0, 128])])
def test_palette_image_becomes_rgb_by_its_colours(tmp_path, transparency):
    index = picture(0, 6, 5, 1)[..., 0] % 4
    palette = np.array([[255, 0, 0], [0, 200, 10], [9, 8, 7], [255, 255, 255]], np.uint8)
    image = Image.frombytes("P", (5, 6), index.tobytes())
    image.putpalette(palette.ravel().tolist())
    extra = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **extra)
    assert np.array_equal(only(tmp_path), palette[index])


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_dropped(tmp_path, channels):
    x = picture(0, 7, 9, channels)
    save(tmp_path / "a.png", x)
    assert np.array_equal(only(tmp_path), x[..., :-1])


def test_cmyk_becomes_rgb(tmp_path):
    x = np.zeros((8, 8, 4), np.uint8)
    x[:4, :, 0] = 255  # cyan above
    x[4:, :, 3] = 255  # black below
    Image.fromarray(x, "CMYK").save(tmp_path / "a.tif")
    out = only(tmp_path)
    assert (out[:4] == [0, 255, 255]).all()
    assert (out[4:] == 0).all()


def test_bilevel_image_is_black_and_white(tmp_path):
    x = np.random.default_rng(0).random((9, 8)) < 0.5
    save(tmp_path / "a.png", x)
    assert np.array_equal(only(tmp_path)[..., 0], np.where(x, 255, 0))


TURNS = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
    8: np.rot90,
    9: lambda x: x,  # no such orientation
}


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_rotated_image_is_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a{suffix}", picture(0, 16, 32), exif=exif)
    with Image.open(path) as image:
        stored = np.array(image)
    assert stored.shape == (16, 32, 3)
    assert np.array_equal(only(tmp_path), TURNS[orientation](stored))


def test_grey_image_among_rgb_is_grey_in_three_channels_with_independent_noise(tmp_path):
    grey = 100 + picture(0, 40, 50, 1) // 5  # far from clipping
    save(tmp_path / "a.png", grey[..., 0])
    save(tmp_path / "b.png", picture(1, 8, 9))
    folder = common.Folder(tmp_path)
    assert folder.channels == 3
    assert np.array_equal(hwc(folder.read(0)), np.repeat(grey, 3, axis=2))
    read = hwc(common.Folder(tmp_path, spec="gauss20").read(0))
    noise = read.astype(float) - grey
    close(noise.std((0, 1)), [20] * 3, rtol=0.1)
    assert correlation(noise[..., 0], noise[..., 1]) < 0.1


@pytest.mark.parametrize(("shape", "channels"), [
    ((6, 7), 1), ((6, 7, 1), 1), ((6, 7, 3), 3), ((6, 7, 5), 5),
])
def test_npy_arrays_have_any_number_of_channels(tmp_path, shape, channels):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    save(tmp_path / "a.npy", x)
    out = only(tmp_path)
    assert out.shape == (6, 7, channels)
    assert np.array_equal(out.reshape(shape), x)


def test_bool_npy_is_black_and_white(tmp_path):
    save(tmp_path / "a.npy", np.array([[True, False, True]]))
    assert only(tmp_path)[..., 0].tolist() == [[255, 0, 255]]


def break_file(path, how):
    if how == "zero":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("this is no image\n")
    elif how == "truncated":
        data = path.read_bytes()
        path.write_bytes(data[:len(data) // 2])


@pytest.mark.parametrize("how", ["zero", "text", "truncated"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".npy", ".bmp", ".gif", ".webp"])
def test_unreadable_files_are_refused_with_their_name(tmp_path, suffix, how):
    path = save(tmp_path / f"broken{suffix}", picture(0, 64, 64))
    break_file(path, how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about truncated TIFFs before it raises
        with pytest.raises(UserError, match=rf"broken\{suffix}") as error:
            common.Folder(tmp_path)
    assert ("empty file" in str(error.value)) == (how == "zero")


ODD = {
    "1-D": np.zeros(5),
    "4-D": np.zeros((2, 3, 4, 5)),
    "empty": np.zeros((0, 4, 3)),
    "complex": np.zeros((4, 4), complex),
    "objects": np.array([[object()]]),
}


@pytest.mark.parametrize("kind", ODD)
def test_arrays_that_are_no_images_are_refused_with_their_name(tmp_path, kind):
    np.save(tmp_path / "odd.npy", ODD[kind], allow_pickle=True)
    with pytest.raises(UserError, match=r"odd\.npy"):
        common.Folder(tmp_path)


def test_array_with_code_in_it_is_refused_and_not_run(tmp_path):
    path = tmp_path / "odd.npy"
    marker = tmp_path / "was run"
    np.save(path, np.array([[Hostile(str(marker))]]), allow_pickle=True)
    with pytest.raises(UserError, match=r"odd\.npy"):
        common.Folder(tmp_path)
    assert not marker.exists()
    np.load(path, allow_pickle=True)
    assert marker.exists()  # the file is hostile indeed


def test_archive_named_npy_is_refused_with_its_name(tmp_path):
    with open(tmp_path / "odd.npy", "wb") as file:
        np.savez(file, x=np.zeros((4, 4)))
    with pytest.raises(UserError, match=r"odd\.npy"):
        common.Folder(tmp_path)


# ==== images: folders =============================================================================
def test_nested_and_flat_folders_and_their_keys(tmp_path):
    """A folder with train/ keys its images by train/...; any other by the path below it."""
    paths = ["train/b/2.png", "train/a/1.JPG", "train/a/deep/er/3.png", "val/a/9.png"]
    for i, path in enumerate(paths):
        save(tmp_path / path, picture(i, 5, 6 + i))
    folder = common.Folder(tmp_path)
    assert folder.paths == ["train/a/1.JPG", "train/a/deep/er/3.png", "train/b/2.png"]
    assert folder.labels() == ["a", "a", "b"]
    assert folder.shapes.tolist() == [[5, 7, 3], [5, 8, 3], [5, 6, 3]]
    assert common.Folder(tmp_path, "val").paths == ["val/a/9.png"]
    train = tmp_path / "train"
    assert common.Folder(train).paths == ["a/1.JPG", "a/deep/er/3.png", "b/2.png"]
    assert common.Folder(train / "a/deep/er").paths == ["3.png"]
    with pytest.raises(UserError, match="class"):
        common.Folder(train / "b").labels()


def test_folders_without_images_are_refused_by_name(tmp_path):
    save(tmp_path / "train" / "a.png", picture(0, 5, 6))
    (tmp_path / "void").mkdir()
    save(tmp_path / "half" / "val" / "a.png", picture(0, 5, 6))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        common.Folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="val: no images found; no such folder"):
        common.Folder(tmp_path, "val")
    with pytest.raises(UserError, match="void: no images found"):
        common.Folder(tmp_path / "void")
    with pytest.raises(UserError, match="half: has val/, but no train/"):
        common.Folder(tmp_path / "half")


def test_hidden_and_other_files_are_passed_over(tmp_path):
    save(tmp_path / "a.png", picture(0, 5, 6))
    save(tmp_path / ".b.png", picture(0, 5, 6))
    (tmp_path / "._c.png").write_bytes(b"resource fork")
    (tmp_path / "labels.txt").write_text("a 1")
    (tmp_path / "Thumbs.db").write_bytes(b"")
    save(tmp_path / ".ipynb_checkpoints" / "a.png", picture(0, 5, 6))
    assert common.Folder(tmp_path).paths == ["a.png"]


def test_links_are_followed_once_and_loops_end(tmp_path):
    save(tmp_path / "data" / "a.png", picture(0, 5, 6))
    save(tmp_path / "far" / "b.png", picture(1, 5, 6))
    os.symlink(tmp_path / "data", tmp_path / "data" / "loop")
    os.symlink(tmp_path / "far", tmp_path / "data" / "link")
    os.symlink(tmp_path / "data", tmp_path / "far" / "back")
    assert common.Folder(tmp_path / "data").paths == ["a.png", "link/b.png"]


@pytest.mark.parametrize("reverse", [False, True])
def test_images_do_not_depend_on_the_order_in_which_the_disk_lists(tmp_path, monkeypatch, reverse):
    """Of a folder and a link to it, the same one counts on every machine: it is the noise's key."""
    save(tmp_path / "a" / "1.png", picture(0, 5, 6))
    save(tmp_path / "a" / "2.png", picture(0, 5, 6))
    os.symlink(tmp_path / "a", tmp_path / "b")
    real = os.walk

    def walk(*args, **kw):
        for folder, subfolders, files in real(*args, **kw):
            subfolders.sort(reverse=reverse)  # in place: os.walk goes on in this order
            files.sort(reverse=reverse)
            yield folder, subfolders, files

    monkeypatch.setattr(os, "walk", walk)
    assert common.list_images(tmp_path) == ["a/1.png", "a/2.png"]


def test_file_names_that_are_not_utf8_are_keys_like_any_other(tmp_path):
    names = [os.fsdecode(b"\xfe.png"), os.fsdecode(b"\xff.png")]
    for name in names:
        save(tmp_path / name, np.full((40, 40, 3), 128, np.uint8))
    folder = common.Folder(tmp_path, spec="gauss20")
    assert folder.paths == names
    first, second = hwc(folder.read(0)), hwc(folder.read(1))
    assert first.std() > 15
    assert correlation(first, second) < 0.1
    assert folder.fingerprint().startswith("2 images of 3 channels, ")


@pytest.mark.parametrize(("trained", "other"), [(5, 3), (3, 5), (1, 3)])
def test_files_of_another_channel_count_are_refused_with_both_counts(tmp_path, trained, other):
    save(tmp_path / "train" / "a.npy", picture(0, 4, 4, trained))
    save(tmp_path / "val" / "b.npy", picture(0, 4, 4, other))
    channels = common.Folder(tmp_path).channels
    assert channels == trained
    with pytest.raises(UserError, match=rf"b\.npy.* it has {other}, .* have {trained}"):
        common.Folder(tmp_path, "val", channels=channels)


def test_one_folder_of_several_channel_counts_is_refused(tmp_path):
    save(tmp_path / "a.npy", picture(0, 4, 4, 5))
    save(tmp_path / "b.png", picture(0, 5, 6))
    with pytest.raises(UserError, match=r"b\.png.* it has 3, others .* have 5"):
        common.Folder(tmp_path)


def test_grey_val_serves_as_colour(tmp_path):
    grey = picture(0, 5, 6, 1)
    save(tmp_path / "val" / "a.png", grey[..., 0])
    folder = common.Folder(tmp_path, "val", channels=3)
    assert np.array_equal(hwc(folder.read(0)), np.repeat(grey, 3, axis=2))


def test_fingerprint_is_of_names_and_sizes_wherever_they_lie(tmp_path):
    here = tmp_path / "here"
    for i in range(3):
        save(here / f"{i}.bmp", picture(i, 5, 6))
    first = common.Folder(here).fingerprint()
    assert first.startswith("3 images of 3 channels, ")
    shutil.copytree(here, tmp_path / "there")
    assert common.Folder(tmp_path / "there").fingerprint() == first
    (here / "1.bmp").rename(here / "7.bmp")
    renamed = common.Folder(here).fingerprint()
    save(here / "7.bmp", picture(1, 5, 9))
    resized = common.Folder(here).fingerprint()
    assert len({first, renamed, resized}) == 3


# ==== images: large folders =======================================================================
@pytest.fixture
def large(tmp_path, monkeypatch):
    """Nine images 0.png to 8.png, of which 0, 2, 5 and 8 are checked at the start."""
    monkeypatch.setattr(common, "CHECKED", 4)
    for i in range(9):
        save(tmp_path / "data" / f"{i}.png", picture(i, 5 + i, 6))
    return tmp_path / "data"


def test_headers_of_a_large_folder_are_read_of_images_spread_over_it(large):
    folder = common.Folder(large)
    assert len(folder) == 9
    assert folder.checked == [0, 2, 5, 8]
    assert folder.shapes.tolist() == [[5, 6, 3], [7, 6, 3], [10, 6, 3], [13, 6, 3]]


def test_of_imagenet_ten_thousand_evenly_spread_images_are_checked():
    folder = common.Folder.__new__(common.Folder)
    folder.paths = range(1_281_167)
    picks = folder.spread(common.CHECKED)
    assert len(picks) == 10_000
    assert (picks[0], picks[-1]) == (0, 1_281_166)
    gaps = np.diff(picks)
    assert gaps.max() - gaps.min() == 1
    folder.paths = range(10_000)
    assert folder.spread(common.CHECKED) == list(range(10_000))


def test_broken_file_among_the_checked_is_refused_at_the_start(large):
    break_file(large / "5.png", "truncated")
    with pytest.raises(UserError, match=r"5\.png: not a readable image"):
        common.Folder(large)


def test_broken_file_beyond_the_checked_is_refused_when_it_is_read(large):
    break_file(large / "4.png", "truncated")
    folder = common.Folder(large)
    assert folder.read(3).shape == (3, 8, 6)
    with pytest.raises(UserError, match=r"4\.png: not a readable image"):
        folder.read(4)


def test_other_channels_beyond_the_checked_are_refused_when_they_are_read(large):
    (large / "4.png").unlink()
    save(large / "4.npy", picture(0, 5, 6, 5))
    folder = common.Folder(large)
    with pytest.raises(UserError, match=r"4\.npy: files differ in their number of channels"):
        folder.read(4)


# ==== images: denoised copies =====================================================================
@pytest.fixture
def colour(tmp_path):
    """DIR/train/{a,b}/*.png of several sizes."""
    for i, size in enumerate(SIZES):
        save(tmp_path / "data" / "train" / "ab"[i % 2] / f"{i}.png", picture(i, *size))
    return tmp_path / "data"


def denoise_all(data, target, suffixes=(".png",)):
    """A denoised copy of a folder: other pictures of the same sizes. Gives them as arrays."""
    pictures = []
    for i, path in enumerate(common.list_images(data)):
        with Image.open(data / path) as image:
            width, height = image.size
        pictures.append(picture(100 + i, height, width))
        suffix = suffixes[i % len(suffixes)]
        save((target / path).with_suffix(suffix), pictures[i])
    return pictures


def test_denoised_images_are_matched_by_path_without_suffix(colour, tmp_path):
    pictures = denoise_all(colour, tmp_path / "denoised", (".npy", ".bmp", ".png"))
    folder = common.Folder(colour, spec="gauss100", denoised=tmp_path / "denoised")
    assert len(folder) == len(pictures) == 7
    for i, x in enumerate(pictures):
        assert np.array_equal(hwc(folder.read(i, "denoised")), x)


def test_missing_denoised_images_are_counted_and_the_first_is_named(colour, tmp_path):
    denoise_all(colour, tmp_path / "denoised")
    paths = common.Folder(colour).paths
    for path in [*paths[1:3], *paths[4:]]:
        (tmp_path / "denoised" / path).unlink()
    with pytest.raises(UserError, match=f"5 of 7 .*{paths[1]}"):
        common.Folder(colour, denoised=tmp_path / "denoised")
    with pytest.raises(UserError, match="nowhere"):
        common.Folder(colour, denoised=tmp_path / "nowhere")


def test_denoised_image_missing_beyond_the_checked_is_refused_at_the_start(large, tmp_path):
    denoise_all(large, tmp_path / "denoised")
    (tmp_path / "denoised" / "4.png").unlink()
    with pytest.raises(UserError, match=r"1 of 9 .*4\.png"):
        common.Folder(large, denoised=tmp_path / "denoised")


def test_denoised_image_of_another_size_is_refused_at_the_start_with_both_names(large, tmp_path):
    denoise_all(large, tmp_path / "denoised", (".bmp",))
    save(tmp_path / "denoised" / "5.bmp", picture(0, 8, 8))
    with pytest.raises(UserError, match=r"denoised/5\.bmp: is \(8, 8, 3\).* 5\.png is \(10, 6, 3\)"):
        common.Folder(large, denoised=tmp_path / "denoised")


def test_denoised_image_of_another_size_beyond_the_checked_is_refused_by_copies(large, tmp_path):
    denoise_all(large, tmp_path / "denoised", (".bmp",))
    save(tmp_path / "denoised" / "4.bmp", picture(0, 8, 8))
    folder = common.Folder(large, denoised=tmp_path / "denoised")
    with pytest.raises(UserError, match=r"denoised/4\.bmp: is of another size than 4\.png"):
        folder.copies(4, ["noisy", "denoised"])


def test_copies_are_one_image_from_several_sources(colour, tmp_path):
    pictures = denoise_all(colour, tmp_path / "denoised")
    folder = common.Folder(colour, spec="gauss100", denoised=tmp_path / "denoised")
    noisy_image, denoised, clean = folder.copies(3, ["noisy", "denoised", "clean"])
    assert torch.equal(noisy_image, folder.read(3))
    assert np.array_equal(hwc(denoised), pictures[3])
    assert np.array_equal(hwc(clean), np.asarray(Image.open(colour / folder.paths[3])))


def note_noise(denoised, noise, seed):
    note = {"denoiser": "0", "noise": noise, "noise_seed": seed}
    common.write_json(denoised / "made_by.json", note)


@pytest.mark.parametrize(("spec", "seed", "message"), [
    ("gauss100", 0, "--noise gauss50 (now gauss100)"),
    ("gauss50", 5, "--noise_seed 0 (now 5)"),
])
def test_denoised_copy_of_other_noise_is_refused(colour, tmp_path, spec, seed, message):
    denoise_all(colour, tmp_path / "denoised")
    note_noise(tmp_path / "denoised", "gauss50", 0)
    with pytest.raises(UserError) as error:
        common.Folder(colour, spec=spec, seed=seed, denoised=tmp_path / "denoised")
    assert message in str(error.value)
    assert str(tmp_path / "denoised") in str(error.value)


def test_denoised_copy_of_the_same_noise_is_used(colour, tmp_path):
    pictures = denoise_all(colour, tmp_path / "denoised")
    note_noise(tmp_path / "denoised", "gauss50", 3)
    folder = common.Folder(colour, spec="gauss50", seed=3, denoised=tmp_path / "denoised")
    assert np.array_equal(hwc(folder.read(0, "denoised")), pictures[0])


def test_images_that_differ_in_suffix_alone_do_not_share_a_denoised_image(tmp_path):
    save(tmp_path / "data" / "1.png", picture(0, 8, 8))
    save(tmp_path / "data" / "1.bmp", picture(1, 8, 8))
    save(tmp_path / "denoised" / "1.png", picture(2, 8, 8))
    with pytest.raises(UserError, match=r"1\.bmp and 1\.png would share"):
        common.Folder(tmp_path / "data", denoised=tmp_path / "denoised")


# ==== images: statistics, memory, batches made ahead ==============================================
@pytest.mark.parametrize("spec", ["none", "gauss100"])
def test_stats_are_mean_and_deviation_of_all_noisy_pixels(colour, spec):
    folder = common.Folder(colour, spec=spec)
    rows = [hwc(folder.read(i)).reshape(-1, 3) for i in range(len(folder))]
    pixels = np.concatenate(rows) / 255
    mean, deviation = folder.stats()
    close(mean, pixels.mean(0), rtol=1e-9)
    close(deviation, pixels.std(0), rtol=1e-7)


def test_stats_of_a_large_folder_come_from_images_spread_over_it(tmp_path):
    for i in range(9):
        save(tmp_path / f"{i}.png", np.full((3, 3), i * 20, np.uint8))
    mean, deviation = common.Folder(tmp_path).stats(most=3)  # images 0, 4 and 8
    close(mean, [80 / 255], rtol=1e-9)
    close(deviation, [np.std([0, 80, 160]) / 255], rtol=1e-7)


def expected_noisy(folder, i, spec, seed=0):
    """The image on disk, noise put on by its path, rounded to 8 bit: array (H, W, C)."""
    with Image.open(folder.data / folder.paths[i]) as image:
        clean = np.asarray(image, dtype=np.float32) / np.float32(255)
    x = common.add_noise(clean, spec, folder.paths[i], seed)
    return np.rint(x.numpy() * np.float32(255)).astype(np.uint8)


@pytest.mark.parametrize("spec", ["gauss100", "shot1-10", "camera30,5"])
def test_noisy_images_are_the_same_in_any_order_thread_and_worker(colour, spec):
    folder = common.Folder(colour, spec=spec, seed=5)
    expected = [expected_noisy(folder, i, spec, 5) for i in range(len(folder))]
    order = [3, 0, 6, 6, 2, 5, 1, 4, 0]
    for i in order:
        assert np.array_equal(hwc(folder.read(i)), expected[i])
    with ThreadPoolExecutor(4) as pool:
        for i, x in zip(order * 3, pool.map(folder.read, order * 3), strict=True):
            assert np.array_equal(hwc(x), expected[i])
    keys = [(i,) for i in order]
    for workers in (0, 2):
        made = common.prefetch(folder.read, keys, CPU, workers)
        for i, x in zip(order, made, strict=True):
            assert np.array_equal(hwc(x), expected[i])
    clean = np.asarray(Image.open(colour / folder.paths[1]))
    assert np.array_equal(hwc(folder.read(1, "clean")), clean)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("gigabytes", [0, 1])
def test_batches_in_memory_and_streamed_are_the_same(colour, tmp_path, gigabytes, workers):
    pictures = denoise_all(colour, tmp_path / "denoised")
    sources = ["noisy", "denoised", "clean"]
    folder = common.Folder(colour, spec="gauss100", denoised=tmp_path / "denoised")
    folder.hold(sources, gigabytes, workers)
    assert len(folder.memory) == (3 if gigabytes else 0)

    def make(*indices):
        copies = [folder.copies(i, sources) for i in indices]
        return {"indices": torch.tensor(indices), "copies": copies}

    keys = [(4, 1), (0, 2, 3), (5,), (6, 6)]
    made = list(common.prefetch(make, iter(keys), CPU, workers))
    assert [tuple(batch["indices"].tolist()) for batch in made] == keys
    for batch in made:
        for i, copies in zip(batch["indices"].tolist(), batch["copies"], strict=True):
            clean = np.asarray(Image.open(colour / folder.paths[i]))
            expected = [expected_noisy(folder, i, "gauss100"), pictures[i], clean]
            for x, y in zip(copies, expected, strict=True):
                assert np.array_equal(hwc(x), y)


@pytest.mark.parametrize("gigabytes", [0, 1])
def test_images_without_noise_make_batches_too(tmp_path, gigabytes):
    """--noise none, the real use: 8-bit files straight from Pillow."""
    pictures = [picture(i, 6, 7) for i in range(3)]
    for i, x in enumerate(pictures):
        save(tmp_path / f"{i}.png", x)
    folder = common.Folder(tmp_path)
    folder.hold(["noisy"], gigabytes, 1)
    made = common.prefetch(folder.read, [(2,), (0,), (1,)], CPU, 0)
    for i, x in zip((2, 0, 1), made, strict=True):
        assert np.array_equal(hwc(x), pictures[i])


@pytest.mark.parametrize("workers", [0, 2])
def test_images_in_memory_are_decoded_once(colour, workers):
    folder = common.Folder(colour, spec="gauss100")
    expected = [folder.read(i) for i in range(len(folder))]
    folder.hold(["noisy"], 1, workers)
    shutil.rmtree(colour)
    for i, x in enumerate(expected):
        assert torch.equal(folder.read(i), x)
    with pytest.raises(UserError, match="it is gone"):
        folder.read(0, "clean")  # this source was not asked for


@pytest.mark.parametrize(("share", "kept"), [(1.001, 2), (0.999, 0)])
def test_memory_holds_all_sources_or_none(colour, share, kept):
    folder = common.Folder(colour, spec="gauss100")
    pixels = sum(height * width for height, width in SIZES)
    gigabytes = share * 2 * 3 * pixels / 1e9  # two sources of three channels
    folder.hold(["noisy", "clean"], gigabytes, 1)
    assert len(folder.memory) == kept


def test_need_of_a_large_folder_is_told_from_its_checked_images(large):
    folder = common.Folder(large)
    guess = 9 * np.mean([5, 7, 10, 13]) * 6 * 3 / 1e9
    folder.hold(["noisy"], 0.999 * guess, 1)
    assert not folder.memory
    folder.hold(["noisy"], 1.001 * guess, 1)
    assert len(folder.memory["noisy"]) == 9


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_the_order_of_their_keys(workers):
    def make(epoch, step):
        time.sleep(0.02 * (step % 3 == 0))  # some take longer
        return [torch.tensor([epoch, step])]

    keys = list(itertools.product(range(2), range(7)))
    made = common.prefetch(make, iter(keys), CPU, workers)
    assert [tuple(x.tolist()) for x, in made] == keys


def test_all_tensors_of_a_batch_go_to_the_device():
    def make(i):
        x = torch.ones(2)
        return {"one": x, "list": [x, x], "dict": {"deep": [x]}}

    batch, = common.prefetch(make, [(0,)], torch.device("meta"), 0)
    tensors = [batch["one"], *batch["list"], *batch["dict"]["deep"]]
    assert [x.device.type for x in tensors] == ["meta"] * 4


def first_error(batches):
    """Message of the UserError that ends them. Its frames are let go at once: workers that are only
    freed by a later garbage collection are waited for in vain, 5 seconds each."""
    try:
        list(batches)
    except UserError as error:
        traceback.clear_frames(error.__traceback__)
        return str(error)
    return "none"


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_file_stops_memory_and_stream_with_its_name(tmp_path, workers):
    for i in range(4):
        save(tmp_path / f"{i}.jpg", picture(i, 64, 64))
    folder = common.Folder(tmp_path)
    break_file(tmp_path / "2.jpg", "truncated")
    with pytest.raises(UserError, match=r"2\.jpg"):
        folder.hold(["noisy"], 1, workers)
    keys = [(0,), (1,), (2,), (3,)]
    assert "2.jpg: not a readable image" in first_error(
        common.prefetch(folder.read, keys, CPU, workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_input_met_in_a_worker_ends_with_one_line_too(tmp_path, workers, capsys):
    save(tmp_path / "a.jpg", picture(0, 64, 64))
    folder = common.Folder(tmp_path)
    break_file(tmp_path / "a.jpg", "zero")

    def main():
        raise UserError(first_error(common.prefetch(folder.read, [(0,)], CPU, workers)))

    with pytest.raises(SystemExit) as stopped:
        common.run(main)
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {tmp_path / 'a.jpg'}: not a readable image (empty file)")
    assert line.count("\n") == 1


# ==== runtime: random numbers, processes, precision ===============================================
def draw(key):
    return tuple(torch.rand(3, generator=common.generator(*key)).tolist())


def test_generators_are_deterministic_and_differ_between_keys():
    keys = list(itertools.product(range(3), range(3), range(4), range(30)))
    draws = [draw(key) for key in keys]
    assert len(set(draws)) == len(keys)
    assert [draw(key) for key in keys[::50]] == draws[::50]
    values = np.array(draws)
    scatter = 1 / math.sqrt(12 * len(keys))
    close(values.mean(0), [0.5] * 3, rtol=0, atol=4 * scatter)
    neighbours = correlation(values[1:, 0], values[:-1, 0])  # of steps one after another
    assert neighbours < 4 / math.sqrt(len(keys))


def test_generators_differ_between_keys_of_other_lengths():
    """An epoch's order, of a shorter key, is not drawn from the same numbers as its step 0."""
    keys = [(1,), (1, 0), (1, 0, 0), (1, 0, 0, 0), (0, 1), (1, 1), (10,), (1, "order", 0)]
    assert len({draw(key) for key in keys}) == len(keys)


def act_as(monkeypatch, rank, size):
    """This process takes itself for one of several, which all hold the same values."""
    monkeypatch.setattr(common, "world", lambda: (rank, size))
    monkeypatch.setattr(common, "all_reduce", lambda x, op="SUM": x * size if op == "SUM" else x)


def test_shares_of_one_process_are_everything():
    assert common.world() == (0, 1)
    assert common.share(7, 15) == (7, slice(0, 7))
    x = torch.rand(3, 2, generator=common.generator("x"))
    assert torch.equal(common.gather_rows(x), x)
    assert torch.equal(common.all_reduce(x.clone()), x)
    assert torch.equal(common.all_reduce(x.clone(), "MAX"), x)


def test_shares_of_several_processes_are_equal_and_in_rank_order(monkeypatch):
    for rank in range(4):
        act_as(monkeypatch, rank, 4)
        assert common.share(12, 100) == (12, slice(3 * rank, 3 * rank + 3))
    with pytest.raises(UserError, match="--batch_size 10 does not divide by .* processes, 4"):
        common.share(10, 100)


def test_batch_larger_than_the_set_is_the_set_and_said(capsys):
    assert common.share(64, 15) == (15, slice(0, 15))
    assert "--batch_size 64 is larger than the set of 15 images" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0", "", "cuda:99"])
def test_devices_that_are_not_there_are_refused_by_name(device):
    with pytest.raises(UserError, match=f"--device {device}"):
        common.setup(device)


@pytest.mark.parametrize(("capabilities", "fast"), [
    ({"amx_bf16": True}, "bf16"), ({"amx_bf16": False, "avx512_bf16": True}, "off"), ({}, "off")])
def test_auto_is_bf16_on_cpus_with_matrix_units_for_it(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert common.fast_amp(CPU) == fast
    context, _ = common.autocast(CPU, "auto")
    with context():
        assert torch.is_autocast_enabled("cpu") == (fast == "bf16")
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert common.fast_amp(CPU) == "off"


def test_amp_off_is_float32_and_bf16_is_bf16():
    linear = torch.nn.Linear(2, 2)
    for amp, dtype in [("off", torch.float32), ("bf16", torch.bfloat16)]:
        context, scaler = common.autocast(CPU, amp)
        with context():
            assert linear(torch.ones(1, 2)).dtype == dtype
        assert not scaler.is_enabled()
    with pytest.raises(UserError, match="--amp fp16: is for GPUs"):
        common.autocast(CPU, "fp16")


# ==== runtime: files ==============================================================================
def test_checkpoint_is_loaded_bit_for_bit_and_the_one_before_is_kept(tmp_path):
    path = tmp_path / "run" / "checkpoint.pth"
    for step in (1, 2, 3):
        state = {"step": step, "w": torch.full((3,), 0.1 * step), "config": {"lr": 1e-3}}
        common.save_checkpoint(path, state)
    loaded = common.load_checkpoint(path, needs={"step", "w"})
    assert torch.equal(loaded.pop("w"), state.pop("w"))
    assert loaded == state == {"step": 3, "config": {"lr": 1e-3}}
    assert common.load_checkpoint(f"{path}.previous")["step"] == 2
    assert common.load_checkpoint(path.parent)["step"] == 3  # of a run's folder
    names = sorted(p.name for p in path.parent.iterdir())
    assert names == ["checkpoint.pth", "checkpoint.pth.previous"]


@pytest.mark.parametrize("how", ["truncated", "zero", "text"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, how, capsys):
    path = tmp_path / "checkpoint.pth"
    for step in (1, 2):
        common.save_checkpoint(path, {"step": step, "w": torch.arange(1000.0)})
    break_file(path, how)
    assert common.load_checkpoint(path)["step"] == 1
    assert f"warning: {path}: cannot be loaded" in capsys.readouterr().err
    break_file(tmp_path / "checkpoint.pth.previous", how)
    with pytest.raises(UserError, match=r"checkpoint\.pth: .*; move it away to start anew"):
        common.load_checkpoint(path, required=False)


@pytest.mark.parametrize("renaming", [1, 2])
def test_crash_at_either_renaming_loses_one_checkpoint_at_most(tmp_path, monkeypatch, renaming):
    path = tmp_path / "checkpoint.pth"
    common.save_checkpoint(path, {"step": 1})
    real = os.replace
    calls = []

    def crash(a, b):
        calls.append(b)
        if len(calls) > renaming:  # the first one ends the writing
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        common.save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert common.load_checkpoint(path)["step"] == 2  # it was written whole
    common.save_checkpoint(path, {"step": 3})
    assert common.load_checkpoint(path)["step"] == 3


def test_missing_checkpoint_is_none_or_an_error(tmp_path):
    assert common.load_checkpoint(tmp_path / "no.pth", required=False) is None
    with pytest.raises(UserError, match=r"no\.pth: no such checkpoint"):
        common.load_checkpoint(tmp_path / "no.pth")


def test_checkpoint_of_another_stage_is_refused_with_what_it_lacks(tmp_path):
    path = tmp_path / "checkpoint.pth"
    common.save_checkpoint(path, {"step": 1})
    with pytest.raises(UserError, match=r"checkpoint\.pth: .*it has no student, teacher"):
        common.load_checkpoint(path, needs={"teacher", "student", "step"})


def test_names_of_values_that_are_not_finite_are_found_in_nested_states():
    bad = torch.tensor([1.0, math.nan])
    moments = {0: {"exp_avg": torch.tensor(math.inf), "step": torch.tensor(3)}}
    state = {"w": torch.ones(3), "student": {"head": bad}, "optimizer": {"state": moments}}
    state["seconds"] = math.nan  # no tensor
    names = list(common.not_finite(state))
    assert names == ["student.head", "optimizer.state.0.exp_avg"]


def test_checkpoint_with_a_value_that_is_not_finite_is_never_written(tmp_path):
    path = tmp_path / "checkpoint.pth"
    common.save_checkpoint(path, {"step": 1})
    before = path.read_bytes()
    bad = {"step": 2, "student": {"w": torch.tensor([math.inf])}}
    with pytest.raises(UserError, match=r"student\.w is not finite"):
        common.save_checkpoint(path, bad)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path, writer):
    path = tmp_path / "checkpoint.pth"
    marker = str(tmp_path / "was run")
    state = {"step": 1, "w": Hostile(marker)}
    if writer == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state))
    with pytest.raises(UserError, match=r"checkpoint\.pth"):
        common.load_checkpoint(path)
    assert not os.path.exists(marker)
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert os.path.exists(marker)  # the file is hostile indeed


def test_parts_are_loaded_from_a_checkpoints_state_dicts():
    saved = torch.nn.Linear(2, 3)
    model = torch.nn.Linear(2, 3)
    scaler = torch.amp.GradScaler("cpu")
    state = {"student": saved.state_dict(), "scaler": {}, "epoch": 3}  # saved by a run in bf16
    common.load_parts({"student": model, "scaler": scaler}, state)
    assert torch.equal(model.weight, saved.weight)
    assert torch.equal(model.bias, saved.bias)


@pytest.mark.parametrize("state", [
    {"student": torch.nn.Linear(2, 4).state_dict()},
    {"student": torch.nn.Linear(2, 3, bias=False).state_dict()},
    {"teacher": torch.nn.Linear(2, 3).state_dict()},
], ids=["shape", "names", "none"])
def test_parts_of_another_model_are_refused_by_name(state):
    with pytest.raises(UserError, match="the checkpoint's student is of another model") as error:
        common.load_parts({"student": torch.nn.Linear(2, 3)}, state)
    assert "\n" not in str(error.value)


def test_optimiser_of_another_model_is_refused_by_name():
    one = torch.optim.SGD([torch.ones(1)], lr=0.1)
    two = torch.optim.SGD([torch.ones(1), torch.ones(1)], lr=0.1)
    with pytest.raises(UserError, match="the checkpoint's optimizer is of another model"):
        common.load_parts({"optimizer": one}, {"optimizer": two.state_dict()})


def test_config_check_names_each_field_and_both_values(tmp_path):
    saved = {"lr": 0.004, "batch_size": 40, "noise": "gauss100", "workers": 2}
    current = {"lr": 0.002, "batch_size": 40, "noise": "gauss255", "workers": 8, "anchor": 1.1}
    with pytest.raises(UserError) as error:
        common.check_config(saved, current, {"workers"}, tmp_path)
    text = str(error.value)
    assert text.startswith(f"{tmp_path} holds a run with other settings")
    assert "--lr 0.004 (now 0.002)" in text
    assert "--noise gauss100 (now gauss255)" in text
    assert "--anchor None (now 1.1)" in text
    assert "workers" not in text
    assert "batch_size" not in text
    common.check_config(saved, saved | {"workers": 8}, {"workers"}, tmp_path)


def test_config_check_takes_a_path_however_it_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = {"denoised": "denoised", "init": ""}
    common.check_config(saved, {"denoised": f"{tmp_path}/x/../denoised", "init": ""}, (), "here")
    with pytest.raises(UserError, match="--denoised"):
        common.check_config(saved, {"denoised": "other", "init": ""}, (), "here")
    with pytest.raises(UserError, match="--init"):
        common.check_config(saved, {"denoised": "denoised", "init": "."}, (), "here")


@pytest.mark.parametrize(("error", "raised"), [
    (OSError("disk full"), UserError),
    (RuntimeError("disk full"), UserError),
    (ValueError("bug"), ValueError),
    (KeyboardInterrupt(), KeyboardInterrupt),
], ids=lambda v: getattr(v, "__name__", type(v).__name__))
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error, raised):
    path = tmp_path / "results.json"
    common.write_json(path, {"a": 1})

    def fail(file):
        file.write(b"half of it")
        raise error

    with pytest.raises(raised) as caught:
        common.write_atomic(path, fail)
    if raised is UserError:
        assert f"{path}: cannot be written (disk full)" in str(caught.value)
    assert common.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_half_of_a_file_that_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path / ".results.json.tmp").write_bytes(b"half of it, longer than the whole of the next")
    common.write_json(tmp_path / "results.json", {"a": 1})
    assert common.read_json(tmp_path / "results.json") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_written_json_is_read_back_and_bad_json_is_refused(tmp_path):
    path = tmp_path / "new" / "a.json"
    common.write_json(path, {"x": [1, 2.5, None]})
    assert common.read_json(path, needs={"x"}) == {"x": [1, 2.5, None]}
    with pytest.raises(UserError, match=r"a\.json: cannot be read"):
        common.read_json(path, needs={"y"})
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.json").write_text("[1]")
    for name in ("b.json", "c.json", "missing.json"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            common.read_json(tmp_path / name)


def test_log_lines_that_a_crash_garbled_are_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    assert common.read_log(path) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2, "di\n[3]\n4\n\xff\xfe\n{"no": 5}\n\n{"step": 6}\n')
    assert common.read_log(path) == [{"step": 1}, {"step": 6}]


# ==== runtime: the training loop's clockwork ======================================================
ONE = torch.tensor(1.0)


class Loops:
    """start(epoch, step, ...) gives a Loop that goes on from there; `saved`: positions it saved."""
    def __init__(self, out):
        self.out = out
        self.log = out / "log.jsonl"
        self.saved = []

    def start(self, epoch=0, step=0, images=100, seconds=0.0, **flags):
        args = {"seed": 0, "batch_size": 4, "epochs": 3, "out": str(self.out), "workers": 0,
                "log_steps": 1, "save_minutes": 1e9}
        args = argparse.Namespace(**args | flags)
        position = (epoch, step, seconds)
        return common.Loop(args, images, position, CPU, self.saved.append)

    def records(self):
        return common.read_log(self.log)


@pytest.fixture
def loops(tmp_path):
    return Loops(tmp_path)


def test_loop_has_whole_batches_alone_in_an_epoch(loops):
    loop = loops.start(epoch=2, step=5, images=30, batch_size=4)
    assert loop.batch == 4
    assert loop.steps == 7
    assert loop.total == 2 * 7 + 5
    assert loops.start(images=30, batch_size=64).batch == 30


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("images", [24, 30])  # of 30, other 6 are left out in every epoch
def test_every_image_is_seen_once_an_epoch_by_any_number_of_processes(
        loops, monkeypatch, images, size):
    alone = list(loops.start(images=images, batch_size=8).keys(2))
    seen = [[] for _ in alone]
    for rank in range(size):
        act_as(monkeypatch, rank, size)
        loop = loops.start(images=images, batch_size=8)
        for row, (_, _, indices) in zip(seen, loop.keys(2), strict=True):
            row += indices[loop.mine]
    assert seen == [indices for _, _, indices in alone]  # whoever takes them
    first = sum(seen[:3], [])
    second = sum(seen[3:], [])
    assert len(set(first)) == len(set(second)) == 24
    assert set(first) | set(second) <= set(range(images))
    assert first != second


def test_images_left_out_of_one_epoch_come_in_others(loops):
    loop = loops.start(images=10, batch_size=8)
    rows = [indices for _, _, indices in loop.keys(20)]
    seen = np.bincount(sum(rows, []), minlength=10)
    assert len(rows) == 20
    assert seen.min() > 0


def test_order_is_fixed_by_seed_and_epoch(loops):
    first = list(loops.start(seed=1).keys(3))
    assert list(loops.start(seed=1).keys(3)) == first
    assert list(loops.start(seed=2).keys(3)) != first
    steps = list(itertools.product(range(3), range(25)))
    assert [(epoch, step) for epoch, step, _ in first] == steps


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 3), (1, 0), (1, 6), (2, 1)])
def test_keys_from_a_position_on_are_the_rest_of_the_same_keys(loops, epoch, step):
    whole = list(loops.start(images=30).keys(3))
    rest = list(loops.start(epoch, step, images=30).keys(3))
    assert rest == whole[7 * epoch + step:]
    assert list(loops.start(3, 0, images=30).keys(3)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_at_the_step_that_they_were_made_for(loops, workers):
    loop = loops.start(1, 2, images=12, workers=workers)

    def make(epoch, step, indices):
        return torch.tensor([epoch, step, *indices])

    expected = [[epoch, step, *indices] for epoch, step, indices in loop.keys(4)]
    seen = []
    for batch in loop.batches(make, 4):
        assert batch[:2].tolist() == [loop.epoch, loop.step]
        seen.append(batch.tolist())
        loop.tick({"total": ONE}, {})
    assert seen == expected
    assert len(seen) == 1 + 3 + 3
    assert (loop.epoch, loop.step) == (4, 0)


def test_checkpoint_is_saved_at_every_epochs_end(loops, capsys):
    loop = loops.start(images=12, epochs=2)
    for _ in loop.keys(2):
        assert not loop.tick({"total": ONE}, {})
    positions = [(epoch, step) for epoch, step, _ in loops.saved]
    assert positions == [(1, 0), (2, 0)]
    assert "epoch 1/2" in capsys.readouterr().out


def test_log_drops_the_lines_after_the_step_it_goes_on_from(loops):
    first = loops.start()
    for step in range(1, 6):
        first.tick({"dino": ONE / step}, {})
    with open(loops.log, "a") as file:
        file.write('{"step": 2, "di')  # cut short by a crash
    loops.start(step=3).tick({"dino": torch.tensor(9.5)}, {})
    records = loops.records()
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    close([r["dino"] for r in records], [1, 0.5, 1 / 3, 9.5], rtol=1e-5)
    assert len(loops.log.read_text().splitlines()) == 4


def numbered(step):
    return {"dino": torch.tensor(float(step)), "koleo": torch.tensor(-2.0 * step)}


def test_log_holds_the_means_of_the_steps_since_the_line_before(loops):
    loop = loops.start(log_steps=3)
    for step in range(1, 8):
        loop.tick(numbered(step), {"lr": step / 8})
    lines = [(r["epoch"], r["step"], r["dino"], r["koleo"], r["lr"]) for r in loops.records()]
    assert lines == [(0, 3, 2, -4, 3 / 8), (0, 6, 5, -10, 6 / 8)]


def test_log_line_after_a_checkpoint_is_that_of_a_run_that_goes_on_from_it(loops):
    loop = loops.start(images=16, log_steps=3)  # four steps an epoch
    for step in range(1, 7):
        loop.tick(numbered(step), {})
    expected = (1, 6, 5.5, -11)  # means of steps 5 and 6
    lines = [(r["epoch"], r["step"], r["dino"], r["koleo"]) for r in loops.records()]
    assert lines == [(0, 3, 2, -4), expected]
    loop = loops.start(epoch=1, images=16, log_steps=3)
    for step in (5, 6):
        loop.tick(numbered(step), {})
    lines = [(r["epoch"], r["step"], r["dino"], r["koleo"]) for r in loops.records()]
    assert lines == [(0, 3, 2, -4), expected]


def test_log_holds_the_means_over_processes(loops, monkeypatch):
    act_as(monkeypatch, 0, 2)
    others = torch.tensor([[3.0], [5.0]])  # the other process's losses of two steps

    def add_others(x, op="SUM"):
        return x + others if x.shape == others.shape else x

    monkeypatch.setattr(common, "all_reduce", add_others)
    loop = loops.start(log_steps=2)
    loop.tick({"dino": torch.tensor(1.0)}, {})
    loop.tick({"dino": torch.tensor(7.0)}, {})
    record, = loops.records()
    assert record["dino"] == (1 + 3 + 7 + 5) / 4


def test_log_keeps_the_digits_of_small_numbers(loops):
    loops.start().tick({"dino": torch.tensor(2.5e-7)}, {"lr": 1.30428e-06})
    record, = loops.records()
    close([record["lr"], record["dino"]], [1.30428e-06, 2.5e-7], rtol=1e-3)


def test_log_holds_seconds_of_the_run_and_images_a_second(loops, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(common, "now", lambda: clock[0])
    loop = loops.start(step=1, seconds=60.0, log_steps=2)
    for _ in range(3):
        clock[0] += 10
        loop.tick({"dino": ONE}, {})
    lines = [(r["step"], r["seconds"], r["images_s"]) for r in loops.records()]
    assert lines == [(2, 70, 0.4), (4, 90, 0.4)]
    assert loop.position() == (0, 4, 90)


def test_loop_knows_before_a_step_whether_it_is_logged(loops):
    loop = loops.start(step=1, log_steps=3)
    for _ in range(8):
        before = len(loops.records())
        expected = loop.logs_next()
        loop.tick({"dino": ONE}, {})
        assert (len(loops.records()) > before) == expected


def test_first_process_alone_writes(loops, monkeypatch):
    act_as(monkeypatch, 1, 2)
    loop = loops.start(images=8)
    for _ in range(2):
        loop.tick({"dino": ONE}, {})
    assert not loops.saved
    assert not loops.log.exists()


def test_processes_that_found_different_checkpoints_are_refused(loops, monkeypatch):
    other = torch.tensor(5)  # the step that it stands at
    extremes = {"MIN": torch.minimum, "MAX": torch.maximum}

    def reduce(x, op):
        return extremes[op](x, other)

    monkeypatch.setattr(common, "all_reduce", reduce)
    for step in (4, 6):
        with pytest.raises(UserError, match="processes found different checkpoints"):
            loops.start(step=step)
    assert loops.start(step=5).total == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_named_with_its_step_and_never_saved(loops, value):
    loop = loops.start(step=10, log_steps=100)
    for step in range(11, 15):
        koleo = torch.tensor(value if step >= 13 else 1.0)
        loop.tick({"total": 1 + koleo, "dino": ONE, "koleo": koleo}, {})
    with pytest.raises(UserError, match="koleo is not finite at step 13"):
        loop.checkpoint()
    assert not loops.saved


def test_loss_that_is_not_finite_stops_the_run_at_the_next_log_line(loops):
    loop = loops.start(log_steps=2)
    loop.tick({"dino": torch.tensor(math.nan)}, {})
    with pytest.raises(UserError, match="dino is not finite at step 1"):
        loop.tick({"dino": ONE}, {})
    assert not loops.records()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_stops_after_the_step_saved(loops, name, capsys):
    loop = loops.start()
    assert not loop.tick({"dino": ONE}, {})
    assert not loops.saved
    os.kill(os.getpid(), getattr(signal, name))
    assert loop.tick({"dino": ONE}, {})
    (epoch, step, _), = loops.saved
    assert (epoch, step) == (0, 2)
    assert "stopped at step 2, saved; the same command goes on" in capsys.readouterr().out


def test_signal_of_another_process_stops_this_one_too(loops, monkeypatch):
    loop = loops.start()

    def signalled(x, op="SUM"):
        assert op == "MAX" or loops.saved  # the wait for the saving
        return torch.tensor([1, 0])

    monkeypatch.setattr(common, "all_reduce", signalled)
    monkeypatch.setattr(loop, "means", dict)
    assert loop.tick({"dino": ONE}, {})
    assert len(loops.saved) == 1


def test_signal_after_the_loop_ends_the_process(loops):
    loops.start().close()
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        assert signal.getsignal(name) is common.leave


def test_checkpoint_is_due_after_the_given_minutes(loops, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(common, "now", lambda: clock[0])
    loop = loops.start(save_minutes=2.0)
    saves = []
    for _ in range(10):
        clock[0] += 50
        assert not loop.tick({"dino": ONE}, {})
        saves.append(len(loops.saved))
    assert saves == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert loops.saved == [(0, 3, 150), (0, 6, 300), (0, 9, 450)]


# ==== runtime: errors, flags ======================================================================
@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (75, 75)])
def test_code_of_a_stage_is_what_main_gives(result, code):
    with pytest.raises(SystemExit) as stopped:
        common.run(lambda: result)
    assert stopped.value.code == code


@pytest.mark.parametrize(("error", "line"), [
    (UserError("--data nowhere: no such folder"), "--data nowhere: no such folder"),
    (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    (MemoryError(), "MemoryError"),
    (RuntimeError("tried to allocate 9 GB\nmore"), "tried to allocate 9 GB"),
])
def test_bad_input_and_full_disk_or_memory_end_with_one_line_and_code_2(error, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        common.run(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_defects_of_ours_keep_their_traceback(capsys):
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        common.run(main)
    assert not capsys.readouterr().err


def test_of_several_processes_the_one_that_failed_is_told_from_the_others(monkeypatch, capsys):
    act_as(monkeypatch, 0, 2)
    common.report_error(ValueError("a bug"))
    assert "ValueError: a bug" in capsys.readouterr().err
    lost = "stopped: another process has failed\n"
    common.report_error(torch.distributed.DistError("reset by peer"))
    assert capsys.readouterr().err == lost
    common.report_error(RuntimeError("[gloo/transport] closed"))
    assert capsys.readouterr().err == lost


PRESETS = {
    "demo": {},
    "large": {"epochs": 200, "compile": True, "scale": [0.5, 1.0]},
}
FLAGS = {
    "epochs": (10, "passes over the images"),
    "lr": (0.004, "learning rate; 50 % more is too much"),
    "compile": (False, "faster"),
    "scale": ([0.3, 1.0], "of the crops"),
    "mode": ("slow", "of two"),
}


def read(*argv, needed=("--data", "somewhere", "--out", "elsewhere")):
    groups = {"data": common.DATA_FLAGS, "train": FLAGS, "running": common.RUNNING_FLAGS}
    choices = {"mode": ["slow", "fast"]}
    positive = ("epochs", "scale")
    return common.read_flags([*needed, *argv], "What it is.", PRESETS, groups, choices, positive)


@pytest.mark.parametrize(("argv", "epochs", "compile", "lr"), [
    ([], 10, False, 0.004),
    (["--preset", "large", "--lr", "0.1"], 200, True, 0.1),
    (["--epochs", "3", "--preset", "large", "--no-compile"], 3, False, 0.004),
    (["--preset=large", "--epochs=3"], 3, True, 0.004),
])
def test_presets_set_defaults_that_flags_override(argv, epochs, compile, lr):
    args = read(*argv)
    assert (args.epochs, args.compile, args.lr) == (epochs, compile, lr)
    assert (args.data, args.out, args.noise, args.amp) == ("somewhere", "elsewhere", "none", "auto")


def test_flags_have_the_type_of_their_default():
    args = read("--epochs", "3", "--lr", "1", "--compile", "--scale", "1,2.5,.5", "--mode", "fast")
    assert args.epochs == 3
    assert isinstance(args.lr, float)
    assert args.compile is True
    assert args.scale == [1.0, 2.5, 0.5]
    assert args.mode == "fast"
    assert read().scale == [0.3, 1.0]
    assert read("--preset", "large").scale == [0.5, 1.0]


@pytest.mark.parametrize(("flag", "value"), [
    ("--epohcs", "3"), ("--epoch", "3"), ("--preset", "huge"), ("--mode", "medium"),
    ("--amp", "fp8"), ("--epochs", "3.5"), ("--epochs", "many"), ("--lr", "fast"),
    ("--scale", "1,x"), ("--scale", ""), ("--compile=yes", ""),
])
def test_unknown_flags_presets_and_values_are_errors(flag, value):
    with pytest.raises(UserError, match=flag.split("=")[0]):
        read(flag, value)


@pytest.mark.parametrize("flag", [
    "--epochs=-1", "--epochs=99999999999999999999", "--lr=nan", "--lr=-0.1", "--lr=inf",
    "--scale=0.1,-1", "--scale=nan,1", "--noise_seed=-1", "--workers=-1",
])
def test_numbers_that_are_negative_or_not_finite_are_refused_with_their_flag(flag):
    name, value = flag.split("=")
    with pytest.raises(UserError, match=f"{name} .*must be (at least|more than) 0 and less than"):
        read(flag)


@pytest.mark.parametrize("flag", ["--epochs=0", "--scale=0,1"])
def test_zero_is_refused_where_a_flag_must_be_positive(flag):
    name, value = flag.split("=")
    with pytest.raises(UserError, match=f"{name} .*more than 0"):
        read(flag)
    assert read("--lr=0", "--workers=0").lr == 0


@pytest.mark.parametrize("needed", [
    ["--out", "x"], ["--data", "x"], ["--data", "", "--out", "x"], ["--data", "x", "--out", ""],
])
def test_data_and_out_are_needed(needed):
    with pytest.raises(UserError, match="--(data|out) is needed, and not empty"):
        read(needed=needed)


@pytest.mark.parametrize(("preset", "epochs"), [("demo", 10), ("large", 200)])
def test_help_shows_the_defaults_of_the_preset(preset, epochs, capsys):
    with pytest.raises(SystemExit) as stopped:
        read("--preset", preset, "--help", needed=[])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "What it is." in text
    assert f"passes over the images (default {epochs})" in text
    assert "50 % more is too much (default 0.004)" in text


def test_flags_that_change_no_result_are_free_in_a_run_that_goes_on():
    free = {*common.RUNNING_FLAGS, *common.TRAINING_FLAGS} - {"seed"}
    assert free <= common.FREE
    assert not common.FREE & {"data", "noise", "noise_seed", "seed"}
