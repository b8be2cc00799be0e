"""Images deeper than 8 bit, files of several images, files of other formats: what a person's own noisy
images hold reaches the crops. Files are made here, by Pillow, numpy or by hand."""

import inspect
import math
import re
import struct
import sys
import warnings
import zlib
from pathlib import Path

import cells
import numpy as np
import pytest
import torch
from PIL import Image

import common
import denoise
import pretrain
import probe
from common import UserError

PLAIN = ["--workers", 0, "--device", "cpu"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Relative paths of a test lie in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def save(path, x, **kw):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, x)
    else:
        Image.fromarray(x).save(path, **kw)


def save_stack(path, pages):
    first, *others = map(Image.fromarray, pages)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    first.save(path, save_all=True, append_images=others)


def smooth(seed, height=48, width=40):
    """A smooth picture in [0, 1] with a little noise, float64 (H, W)."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:height, :width]
    shape = np.sin(row / rng.uniform(4, 9) + seed) + np.cos(column / rng.uniform(4, 9))
    x = (shape + 2) / 4 + 0.03 * rng.standard_normal(shape.shape)
    return x.clip(0, 1)


def counts(seed, low, high, dtype=np.uint16):
    return np.rint(low + (high - low) * smooth(seed)).astype(dtype)


def by_hand_fits(path, x):
    """A FITS file: cards of 80 letters, blocks of 2,880 bytes, big-endian."""
    bits = {np.dtype("int16"): 16, np.dtype("float32"): -32}[x.dtype]
    height, width = x.shape
    numbers = {"BITPIX": bits, "NAXIS": 2, "NAXIS1": width, "NAXIS2": height}
    cards = [f"{'SIMPLE':8}= {'T':>20}", *(f"{name:8}= {n:>20}" for name, n in numbers.items()), "END"]
    header = "".join(card.ljust(80) for card in cards)
    data = x[::-1].astype(x.dtype.newbyteorder(">")).tobytes()  # the lowest row comes first
    Path(path).write_bytes(header.ljust(2880).encode() + data.ljust(-(-len(data) // 2880) * 2880, b"\0"))


def by_hand_tiff(path, x, planar=False):
    """An uncompressed TIFF of (H, W) or (H, W, 3), whatever its integers; planar: a channel after the other."""
    height, width = x.shape[:2]
    channels = x.size // (height * width)
    planes = channels if planar else 1
    data = (np.moveaxis(x, 2, 0) if planar else x).tobytes()
    size, signed = len(data) // planes, 2 if x.dtype.kind == "i" else 1
    tags = {256: [width], 257: [height], 258: [8 * x.itemsize] * channels, 259: [1], 262: [2 if channels == 3 else 1],
            273: [8 + k * size for k in range(planes)], 277: [channels], 278: [height], 279: [size] * planes,
            284: [2 if planar else 1], 339: [signed] * channels}
    end = 8 + len(data) + 2 + 12 * len(tags) + 4
    entries, tail = b"", b""
    for tag, values in tags.items():
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            packed, tail = struct.pack("<I", end + len(tail)), tail + packed
        entries += struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0) + tail
    Path(path).write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)


def by_hand_png(path, x, kind):
    """A PNG of 16 bits a channel; kind 2: RGB, 4: grey with alpha."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in x)
    header = struct.pack(">IIBBBBB", x.shape[1], x.shape[0], 16, kind, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    chunks = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
              for name, data in parts.items()]
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def by_hand_pgm(path, x):
    Path(path).write_bytes(f"P5 {x.shape[1]} {x.shape[0]} 65535\n".encode() + x.astype(">u2").tobytes())


def levels(x, low, high):
    """Values as the 16 bits of a range, by the definition, one after the other."""
    shares = [min(1, max(0, (float(v) - low) / (high - low))) for v in np.ravel(x)]
    return np.array([round(65535 * share) for share in shares]).reshape(np.shape(x))


# ==== values ======================================================================================
SOURCES = {  # name of the files -> (values of picture k, what writes them)
    "microscope.png": (lambda k: counts(k, 90, 400), save),
    "microscope.tif": (lambda k: counts(k, 90, 400), save),
    "camera of 12 bit.png": (lambda k: counts(k, 0, 4095), save),
    "camera of 12 bit.pgm": (lambda k: counts(k, 0, 4095), by_hand_pgm),
    "all 16 bit.png": (lambda k: counts(k, 0, 65535), save),
    "ct.npy": (lambda k: counts(k, -1000, 400, np.int16), save),
    "ct.tif": (lambda k: counts(k, -1000, 400, np.int16), by_hand_tiff),
    "telescope.fits": (lambda k: counts(k, 0, 4000, np.int16), by_hand_fits),
    "signed telescope.fits": (lambda k: counts(k, -300, 4000, np.int16), by_hand_fits),
    "counts.npy": (lambda k: counts(k, 20, 900, np.float32), save),
    "counts.tif": (lambda k: counts(k, 20, 900, np.float32), save),
    "half.npy": (lambda k: counts(k, 0, 255, np.float16), save),
    "flux.npy": (lambda k: (1e-9 * counts(k, 0, 5000)).astype(">f4"), save),
    "int8.npy": (lambda k: counts(k, -128, 127, np.int8), save),
    "sums.npy": (lambda k: counts(k, 10**9, 10**9 + 20_000, np.uint32), save),
    "sums.tif": (lambda k: counts(k, -70_000, -60_000, np.int32), save),
}


@pytest.mark.parametrize("name", SOURCES)
def test_values_of_deep_files_stay_distinct_up_to_the_crop(name):
    """And in their order: the crop of a whole image in its own size is the image."""
    make, write = SOURCES[name]
    pictures = [make(k) for k in range(3)]
    for k, x in enumerate(pictures):
        write(f"{k} {name}", x)
    folder = common.Folder(".")
    low, high = folder.limits
    values = np.concatenate([x.ravel() for x in pictures])
    read = []
    for k, x in enumerate(pictures):
        image = folder.read(k)
        assert image.dtype == torch.uint16
        assert image.shape == (1, *x.shape)
        crop = common.cut(image[:, :40], (0, 0, 40, 40), False, 40)
        assert torch.equal(crop, image[:, :40])
        read.append(image.numpy().ravel())
    read = np.concatenate(read).astype(int)
    inside = (values >= low) & (values <= high)
    assert inside.mean() > 0.999
    source = np.unique(values[inside])
    assert len(np.unique(read[inside])) >= 0.95 * len(source)
    order = np.argsort(values, kind="stable")
    assert (np.diff(read[order]) >= 0).all()
    np.testing.assert_allclose(read, levels(values, low, high), atol=1)


def test_16_bit_pages_of_a_set_have_one_range_not_one_each():
    save("dim.png", counts(0, 100, 200))
    save("bright.png", counts(1, 100, 1000))
    folder = common.Folder(".")
    assert folder.paths == ["bright.png", "dim.png"]
    dim, bright = folder.read(1).float(), folder.read(0).float()
    assert dim.max() < 0.2 * 65535
    assert bright.max() > 0.95 * 65535


def test_range_is_what_most_values_span_and_half_as_much_as_far_as_there_are_values():
    values = np.arange(10_001.0)  # 0.1 % below 10, 0.1 % above 9,990
    assert common.robust_range(values) == (0, 10_000)
    far = np.concatenate([values, [-1e6, 1e6]])
    low, high = common.robust_range(far)
    assert low == pytest.approx(10 - 4990, abs=20)
    assert high == pytest.approx(9990 + 4990, abs=20)
    rare = np.array([0.0] * 9999 + [7.0])
    assert common.robust_range(rare) == (0, 7)


def test_hot_pixels_do_not_spoil_the_range_and_are_said_to_be_clipped(capsys):
    for k in range(4):
        x = counts(k, 90, 400)
        x[5 + k, 7] = 65535
        save(f"{k}.tif", x)
    folder = common.Folder(".")
    low, high = folder.limits
    assert low <= 90 and 400 <= high < 700
    assert folder.read(0)[0, 5, 7] == 65535
    said = capsys.readouterr().out
    assert said == f"train: values from {low:g} to {high:g} become black to white, {4 / 76.8:.2g} % are clipped\n"


def test_given_range_is_black_to_white_and_what_lies_outside_is_clipped_and_said(capsys):
    x = np.array([[0, 100, 150], [200, 201, 1000]], np.uint16)
    save("a.png", x)
    folder = common.Folder(".", limits=[100, 200])
    assert folder.limits == [100, 200]
    assert folder.read(0)[0].tolist() == [[0, 0, 32768], [65535, 65535, 65535]]
    assert "50 % are clipped" in capsys.readouterr().out


def test_range_of_a_large_set_is_measured_on_images_and_pixels_spread_over_it():
    """The last image has the high values; of each image random pixels count, not the first ones."""
    save("a.npy", np.zeros((100, 100)))
    for name in "bcdef":
        save(f"{name}.npy", np.repeat(np.arange(100.0), 100).reshape(100, 100))
    save("g.npy", np.repeat(np.arange(400.0, 500.0), 100).reshape(100, 100))
    folder = common.Folder(".", limits=[0, 1])
    assert folder.measure(None, most=3) == [0, 499]
    low, high = folder.measure(None, most=3, values=200)
    assert low == 0 and 495 <= high <= 499


def test_constant_images_are_refused():
    save("a.npy", np.full((9, 9), 5.0))
    with pytest.raises(UserError, match="all values are 5"):
        common.Folder(".")


def test_noise_on_deep_images_is_that_of_their_share_of_the_range():
    """Sigma 51 of 255 is a fifth of the range, in 16 bits."""
    save("a.npy", np.full((80, 80), 150.0))
    save("b.npy", np.full((80, 80), 100.0))
    save("c.npy", np.full((80, 80), 200.0))
    folder = common.Folder(".", spec="gauss51", limits=[100, 200])
    x = folder.read(0).double() / 65535
    assert x.mean() == pytest.approx(0.5, abs=0.01)
    assert x.std() == pytest.approx(0.2, rel=0.04)  # a little is clipped
    assert len(x.unique()) > 4000
    clean = torch.full((80, 80, 1), 32768 / 65535)
    expected = common.add_noise(clean, "gauss51", "a.npy")[..., 0]
    assert torch.equal(folder.read(0)[0], (65535 * expected).round().to(torch.uint16))


def test_sets_of_16_bit_take_twice_the_memory_of_their_8_bit_selves():
    sizes = {}
    for name, dtype in (("shallow", np.uint8), ("deep", np.uint16)):
        for k in range(3):
            save(f"{name}/{k}.png", counts(k, 0, 255, dtype))
        folder = common.Folder(name)
        need = 3 * 48 * 40 * (2 if name == "deep" else 1) / 1e9
        folder.hold(["noisy"], 0.999 * need, 1)
        assert not folder.memory
        folder.hold(["noisy"], 1.001 * need, 1)
        sizes[name] = sum(x.nbytes for x in folder.memory["noisy"])
    assert sizes["deep"] == 2 * sizes["shallow"]


def test_statistics_of_deep_images_are_those_of_their_share_of_the_range():
    pictures = [counts(k, 90, 400) for k in range(3)]
    for k, x in enumerate(pictures):
        save(f"{k}.png", x)
    folder = common.Folder(".", limits=[90, 490])
    mean, std = folder.stats()
    shares = (np.stack(pictures) - 90) / 400
    assert mean == pytest.approx([shares.mean()], abs=1e-4)
    assert std == pytest.approx([shares.std()], abs=1e-4)


@pytest.mark.parametrize("size", [16, 24, 64])
def test_crops_of_deep_images_are_those_of_their_8_bit_selves_but_finer(size):
    shallow = torch.from_numpy(counts(0, 0, 255, np.uint8))[None]
    deep = (shallow.int() * 257).to(torch.uint16)
    box = (3, 5, 30, 33)
    for flip in (False, True):
        fine = common.cut(deep, box, flip, size)
        coarse = common.cut(shallow, box, flip, size)
        assert fine.dtype == torch.uint16
        torch.testing.assert_close(fine / 257, coarse.float(), rtol=0, atol=2)  # Pillow's way rounds twice
        assert len(fine.unique()) > 1.5 * len(coarse.unique())
    numbers = torch.tensor([[*common.UNCHANGED * 7, 0.0, 0.0, 0.0]])
    colours = common.color(common.cut(deep, box, False, 24)[None], numbers)
    torch.testing.assert_close(colours, common.cut(deep, box, False, 24)[None] / 65535, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("train", "val"), [("8", "16"), ("16", "8")])
def test_val_of_another_depth_than_train_is_refused(train, val):
    types = {"8": np.uint8, "16": np.uint16}
    save("train/a.png", counts(0, 0, 255, types[train]))
    save("val/b.png", counts(1, 0, 255, types[val]))
    folder = common.Folder(".")
    with pytest.raises(UserError, match=r"val/b\.png: is .*8 bit, but other images.* save all images alike"):
        common.Folder(".", "val", channels=1, limits=folder.limits)


@pytest.mark.parametrize(("odd", "others", "words"), [
    (np.uint8, np.uint16, "is 8 bit"), (np.uint16, np.uint8, "is deeper than 8 bit"),
])
def test_file_of_another_depth_than_most_is_refused_by_name(odd, others, words):
    for name in "abcd":
        save(f"{name}.png", counts(0, 0, 255, odd if name == "c" else others))
    with pytest.raises(UserError, match=rf"c\.png: {words}"):
        common.Folder(".")


def test_8_bit_sets_have_no_range_and_none_is_given_to_them():
    save("a.png", counts(0, 0, 255, np.uint8))
    assert common.Folder(".").limits == []
    with pytest.raises(UserError, match=r"a\.png: is 8 bit, but .* or --range are deeper"):
        common.Folder(".", limits=[0, 100])


def test_deep_file_beyond_the_checked_is_refused_when_it_is_read(monkeypatch):
    monkeypatch.setattr(common, "CHECKED", 2)
    for name in "abc":
        save(f"{name}.png", counts(0, 0, 255, np.uint8))
    save("b.png", counts(0, 0, 255))
    with pytest.raises(UserError, match=r"b\.png: is deeper than 8 bit"):
        common.Folder(".").read(1)


# ==== dead pixels =================================================================================
def test_dead_pixels_are_the_mean_of_their_neighbours_that_are_alive(capsys):
    x = np.random.default_rng(0).uniform(5, 9, (30, 30, 2)).astype(np.float32)
    holes = x.copy()
    holes[0, 0, 0] = np.nan  # a corner
    holes[10, 10, 0], holes[10, 11, 0] = np.inf, -np.inf  # side by side
    holes[20:23, 20:23, 1] = np.nan  # its middle has no neighbour that is alive
    save("a.npy", holes)
    save("b.npy", x)
    filled = common.read_image(Path("a.npy"))
    dead = ~np.isfinite(holes)
    assert np.array_equal(filled[~dead], x[~dead])
    assert filled[0, 0, 0] == pytest.approx((x[0, 1, 0] + x[1, 0, 0] + x[1, 1, 0]) / 3)
    around = [x[i, j, 0] for i in (9, 10, 11) for j in (9, 10, 11) if not dead[i, j, 0]]
    assert len(around) == 7
    assert filled[10, 10, 0] == pytest.approx(np.mean(around))
    rim = [filled[i, j, 1] for i in (20, 21, 22) for j in (20, 21, 22) if (i, j) != (21, 21)]
    assert filled[21, 21, 1] == pytest.approx(np.mean(rim))
    common.Folder(".")
    assert "; 12 dead pixels of 1 images are filled from their neighbours\n" in capsys.readouterr().out


@pytest.mark.parametrize(("dead", "refused"), [(1, False), (2, True)])
def test_image_with_more_than_a_hundredth_of_dead_pixels_is_refused(dead, refused):
    x = smooth(0, 10, 10)[..., None].repeat(4, 2)
    x[3, :dead, 2] = np.nan  # one or two of the hundred of one channel
    save("a.npy", x)
    if refused:
        with pytest.raises(UserError, match=r"a\.npy: 2 % of its pixels are NaN or infinite, at most 1 %"):
            common.Folder(".")
    else:
        assert common.Folder(".").read(0).shape == (4, 10, 10)


# ==== what a file holds ===========================================================================
def test_pages_of_a_stack_are_images_of_their_own():
    pages = [counts(k, 90, 400) for k in range(8)]
    save_stack("train/cat/stack.tif", pages)
    save("train/cat/single.tif", counts(9, 90, 400))
    folder = common.Folder(".", spec="gauss20")
    names = [f"train/cat/stack.tif#{k}" for k in range(1, 9)]
    assert folder.paths == ["train/cat/single.tif", *names]
    assert folder.labels() == ["cat"] * 9
    noise = []
    for k, page in enumerate(pages):
        clean = folder.read(1 + k, "clean")
        np.testing.assert_array_equal(clean[0], levels(page, *folder.limits))
        noise.append(folder.read(1 + k).double()[0] - clean.double()[0])
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1
    assert folder.fingerprint().startswith("9 images")


def test_order_of_many_pages_is_that_of_the_file():
    save_stack("stack.tif", [counts(k, 90, 400) for k in range(11)])
    assert common.Folder(".").paths == [f"stack.tif#{page}" for page in range(1, 12)]


@pytest.mark.parametrize("name", ["film.gif", "film.webp", "film.apng"])
def test_frames_of_an_animation_are_images_of_their_own(name):
    frames = [np.full((20, 30, 3), level, np.uint8) for level in (10, 120, 230)]
    options = {"lossless": True} if name == "film.webp" else {}
    first, *others = map(Image.fromarray, frames)
    first.save(name, save_all=True, append_images=others, **options)
    folder = common.Folder(".")
    assert folder.paths == [f"{name}#{k}" for k in (1, 2, 3)]
    for k, level in enumerate((10, 120, 230)):
        assert (folder.read(k).float() - level).abs().max() <= 4  # a palette's colour


def test_animated_png_is_refused_since_png_files_are_not_opened_to_count():
    first, second = (Image.fromarray(np.full((20, 30, 3), level, np.uint8)) for level in (10, 120))
    first.save("film.png", save_all=True, append_images=[second])
    with pytest.raises(UserError, match=r"film\.png: .*animated PNG must be named \.apng"):
        common.Folder(".")


@pytest.mark.parametrize("how", ["end", "pointer"])
def test_damaged_stack_is_refused_not_taken_for_the_pages_before(how):
    """The end is missing; or the first page points nowhere instead of at the second."""
    save_stack("stack.tif", [counts(k, 90, 400) for k in range(3)])
    data = bytearray(Path("stack.tif").read_bytes())
    if how == "end":
        data = data[:len(data) * 9 // 10]
    else:
        first, = struct.unpack_from("<I", data, 4)
        tags, = struct.unpack_from("<H", data, first)
        struct.pack_into("<I", data, first + 2 + 12 * tags, len(data) + 1000)
    Path("stack.tif").write_bytes(data)
    with warnings.catch_warnings(), pytest.raises(UserError, match=r"stack\.tif"):
        warnings.simplefilter("ignore")  # Pillow warns before it raises
        common.Folder(".")


def test_denoised_copies_of_pages_are_found_by_page_in_files_or_in_a_stack():
    pages = [counts(k, 90, 400) for k in range(3)]
    save_stack("data/stack.tif", pages)
    better = [counts(10 + k, 90, 400) for k in range(3)]
    for k, x in enumerate(better):
        save(f"files/stack#{k + 1}.npy", x.astype(np.float32))
    save_stack("stacked/stack.tif", better)
    for copy in ("files", "stacked"):
        folder = common.Folder("data", denoised=copy)
        for k, x in enumerate(better):  # in the units of the images
            np.testing.assert_array_equal(folder.read(k, "denoised")[0], levels(x, *folder.limits))


def test_page_and_file_that_would_share_a_denoised_image_are_refused():
    save_stack("stack.tif", [counts(k, 90, 400) for k in range(2)])
    save("stack#2.png", counts(3, 90, 400))
    with pytest.raises(UserError, match="would share a denoised image"):
        common.Folder(".").stems()


@pytest.mark.parametrize("name", ["a#1.png", "b#/1.png", "#.png", "#5.png"])
def test_names_with_a_number_sign_are_names_like_any_other(name):
    save(name, counts(0, 0, 255, np.uint8))
    folder = common.Folder(".")
    assert folder.paths == [name]
    assert folder.read(0).shape == (1, 48, 40)


def test_denoised_copies_of_another_depth_are_refused_at_the_start():
    save("deep/a.png", counts(0, 0, 255))
    save("shallow/a.png", counts(0, 0, 255, np.uint8))
    with pytest.raises(UserError, match=r"shallow/a\.png: is 8 bit"):
        common.Folder("deep", denoised="shallow")
    with pytest.raises(UserError, match=r"deep/a\.png: is deeper than 8 bit"):
        common.Folder("shallow", denoised="deep")


@pytest.mark.parametrize(("shape", "words"), [
    ((12, 64, 64), "12 frames?"), ((3, 40, 40), "channels first?"), ((1, 40, 30), "channels first?"),
    ((100, 64, 64), "100 frames?"), ((8, 64, 64, 3), "frames?"), ((7,), "neither"),
])
def test_shapes_of_frames_and_of_channels_first_are_refused_by_what_they_look_like(shape, words):
    save("odd.npy", np.random.default_rng(0).random(shape))
    with pytest.raises(UserError) as error:
        common.Folder(".")
    assert "odd.npy" in str(error.value)
    assert str(shape) in str(error.value)
    assert words in str(error.value)
    assert "(H, W, C)" in str(error.value)


@pytest.mark.parametrize("shape", [(64, 64, 12), (145, 145, 220), (9, 9, 200), (50, 20, 3), (3, 9, 4)])
def test_images_of_many_channels_are_images(shape):
    save("cube.npy", np.random.default_rng(0).random(shape))
    assert common.Folder(".").read(0).shape == (shape[2], *shape[:2])


DEEP_COLOUR = {
    "a.tif": by_hand_tiff,
    "planes.tif": lambda path, x: by_hand_tiff(path, x, planar=True),
    "a.png": lambda path, x: by_hand_png(path, x, 2),
    "alpha.png": lambda path, x: by_hand_png(path, x[..., :2], 4),
    "a.ppm": lambda path, x: Path(path).write_bytes(b"P6 5 6 1023\n" + (x % 1024).astype(">u2").tobytes()),
}


@pytest.mark.parametrize("name", DEEP_COLOUR)
def test_colour_of_which_pillow_would_keep_8_of_16_bit_is_refused(name):
    x = np.random.default_rng(0).integers(0, 65536, (6, 5, 3)).astype(np.uint16)
    DEEP_COLOUR[name](name, x)
    with pytest.raises(UserError, match=rf"{name}: .*colour of more than 8 bit.*save \.npy"):
        common.Folder(".")


def test_files_by_hand_are_read_by_pillow():
    """8-bit colour of the same writers is no error."""
    x = np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8)
    by_hand_tiff("a.tif", x)
    by_hand_tiff("b.tif", x, planar=True)
    Path("c.ppm").write_bytes(b"P6 5 6 255\n" + x.tobytes())
    folder = common.Folder(".")
    for k in range(3):
        assert np.array_equal(folder.read(k).permute(1, 2, 0), x)


# ==== readers =====================================================================================
@pytest.fixture
def readers(monkeypatch):
    monkeypatch.setattr(common, "READERS", dict(common.READERS))


def readme_reader():
    """The lines of README from @reader to the end of its block."""
    text = Path(common.__file__).with_name("README.md").read_text()
    block, = re.findall(r"```python\n(@reader.*?)```", text, re.DOTALL)
    return block


def test_the_reader_of_the_readme_works_as_printed(readers):
    block = readme_reader()
    assert len(block.splitlines()) == 3
    exec(block, vars(common) | {"np": np})
    x = np.random.default_rng(0).integers(0, 4096, (3, 480, 640)).astype("<u2")
    Path("train/cat").mkdir(parents=True)
    Path("train/cat/film.raw").write_bytes(x.tobytes())
    folder = common.Folder(".")
    assert folder.paths == [f"train/cat/film.raw#{k}" for k in (1, 2, 3)]
    for k in range(3):
        share = (x[k] - folder.limits[0]) / np.diff(folder.limits)
        np.testing.assert_array_equal(folder.read(k)[0], np.rint(65535 * share.clip(0, 1)))


def test_a_reader_gives_one_array_or_a_list_and_the_last_one_of_a_suffix_counts(readers):
    @common.reader(".raw")
    def first(path):
        return np.zeros((2, 2))

    @common.reader(".raw")
    def second(path):
        return np.flipud(np.frombuffer(path.read_bytes(), np.uint8).reshape(4, 6))  # not to be written to

    x = np.arange(24, dtype=np.uint8)
    Path("A.RAW").write_bytes(x.tobytes())
    folder = common.Folder(".")
    assert folder.paths == ["A.RAW"]
    np.testing.assert_array_equal(folder.read(0)[0], x.reshape(4, 6)[::-1])

    @common.reader(".raw")
    def shallow(path):
        return [np.full((4, 5, 3), 7, np.uint8)]

    assert common.Folder(".").read(0).unique().tolist() == [7]


@pytest.mark.parametrize("answer", [[], [np.zeros(3)], "text", None, np.array([["a"]]), 1 / 3])
def test_what_a_reader_gives_that_is_no_image_is_refused_with_the_file(readers, answer):
    common.reader(".raw")(lambda path: answer)
    Path("a.raw").write_text("something")
    with pytest.raises(UserError, match=r"a\.raw: not a readable image"):
        common.Folder(".")


# ==== stages ======================================================================================
def call(stage, *argv):
    """Run a stage as its script does; gives the exit code."""
    main = stage.main
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["stage.py", *map(str, argv)])
        common.run(main)
    return stopped.value.code


def refused(capsys, stage, *argv):
    """Run a stage; it must end with exit code 2. Gives the line that it wrote."""
    capsys.readouterr()
    assert call(stage, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


UNET = ["--epochs", 1, "--width", 4, "--patch", 16, "--batch_size", 2, *PLAIN]
VIT = ["--arch", "16,2,2", "--head_hidden", 16, "--head_bottleneck", 8, "--prototypes", 16, "--global_size", 32,
       "--local_size", 16, "--patch_size", 8, "--batch_size", 4, "--log_steps", 1, *PLAIN]
HEADS = ["--img_size", 32, "--resize", 32, "--iterations", 5, *PLAIN]


def make_set(root, low=90, high=400):
    """Two classes of a stack of three pages and a file, in train/ and val/."""
    for s, split in enumerate(("train", "val")):
        for k, name in enumerate(("cell", "dust")):
            pages = [counts(100 * s + 10 * k + i, low, high) for i in range(4)]
            save_stack(f"{root}/{split}/{name}/stack.tif", pages[:3])
            save(f"{root}/{split}/{name}/one.png", pages[3])


def test_every_stage_has_the_range_of_the_training_images(capsys):
    make_set("data")
    save("data/val/cell/one.png", counts(7, 90, 2000))  # val's values do not count
    data = ["--data", "data"]
    assert call(denoise, "train", *data, *UNET, "--out", "denoiser") == 0
    limits = common.read_json("denoiser/config.json")["range"]
    assert limits[0] <= 90 and 400 <= limits[1] < 900
    assert call(denoise, "apply", *data, *PLAIN, "--denoiser", "denoiser", "--out", "copy") == 0
    assert common.read_json("copy/made_by.json")["range"] == limits
    flags = [*data, *VIT, "--denoised", "copy"]
    assert call(pretrain, *flags, "--source", "denoised", "--epochs", 2, "--stop", 1, "--out", "first") == 0
    nct = ["--source", "noisy", "--epochs", 1, "--init", "first/epoch1.pth", "--anchor", 1]
    assert call(pretrain, *flags, *nct, "--out", "nct") == 0
    for run in ("first", "nct"):
        assert common.read_json(f"{run}/config.json")["range"] == limits
        assert common.load_checkpoint(run)["config"]["range"] == limits
    assert call(probe, *data, *HEADS, "--run", "nct", "--out", "probe/nct-seed0.json") == 0
    assert call(probe, *data, *HEADS, "--pixels", "--out", "probe/pixels-seed0.json") == 0
    copy = ["--denoised", "copy", "--denoiser", "denoiser"]
    assert call(probe, *data, *HEADS, "--run", "first", *copy, "--out", "probe/denoised-seed0.json") == 0
    for path in Path("probe").glob("*.json"):
        assert common.read_json(path)["range"] == limits


def test_denoised_copies_are_as_deep_as_the_images_and_named_by_page():
    make_set("data")
    assert call(denoise, "train", "--data", "data", *UNET, "--out", "denoiser") == 0
    assert call(denoise, "apply", "--data", "data", *PLAIN, "--denoiser", "denoiser", "--out", "copy") == 0
    train = common.Folder("data", denoised="copy")
    made = sorted(p.name for p in Path("copy/train/cell").iterdir())
    assert made == ["one.png", "stack#1.png", "stack#2.png", "stack#3.png"]
    model, _ = denoise.load_denoiser("denoiser", torch.device("cpu"))
    for i in range(len(train)):
        with Image.open(train.denoised[i]) as file:
            assert file.mode == "I;16"
            stored = np.array(file)
        expected = denoise.denoise(model, train.read(i)[None], torch.device("cpu"))[0, 0]
        np.testing.assert_allclose(stored, expected, atol=1)  # the levels of the range
        np.testing.assert_array_equal(train.read(i, "denoised")[0], stored)
    before = {path: path.stat().st_mtime_ns for path in Path("copy").rglob("*.png")}
    assert call(denoise, "apply", "--data", "data", *PLAIN, "--denoiser", "denoiser", "--out", "copy") == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path("copy").rglob("*.png")}


def test_stages_that_contradict_each_other_are_refused_with_both_ranges(capsys):
    make_set("data")
    make_set("other", 20, 900)
    given = ["--data", "data", "--range", "50,500"]
    assert call(denoise, "train", *given, *UNET, "--out", "denoiser") == 0
    apply = ["apply", *PLAIN, "--denoiser", "denoiser"]
    error = refused(capsys, denoise, *apply, "--data", "data", "--range", "0,500", "--out", "copy")
    assert "denoiser: was trained on values from 50.0 to 500.0, these images are values from 0.0 to 500.0" in error
    assert "--range=50.0,500.0" in error
    assert not Path("copy").exists()
    assert call(denoise, *apply, "--data", "data", "--out", "copy") == 0  # the denoiser's range
    assert common.read_json("copy/made_by.json")["range"] == [50, 500]
    assert call(denoise, *apply, "--data", "other", "--out", "copy of others") == 0  # of other images, too
    run = [*VIT, "--epochs", 1, "--source", "denoised", "--denoised", "copy", "--out", "run"]
    assert "--range [50.0, 500.0] (now [9" in refused(capsys, pretrain, "--data", "data", *run)
    assert call(pretrain, *given, *run) == 0
    other = ["--data", "data", "--range", "50,501"]
    assert "--range [50.0, 500.0] (now [50.0, 501.0])" in refused(capsys, pretrain, *other, *run)
    start = [*VIT, "--epochs", 1, "--init", "run", "--out", "second"]
    assert "run: was trained on values from 50.0 to 500.0" in refused(capsys, pretrain, "--data", "data", *start)
    probing = [*HEADS, "--run", "run", "--out", "probe.json"]
    assert "run: was trained on" in refused(capsys, probe, *other, *probing)
    assert call(probe, "--data", "data", *probing) == 0  # the run's range
    assert common.read_json("probe.json")["range"] == [50, 500]


def test_backbone_of_8_bit_images_is_not_probed_on_deep_ones(capsys):
    make_set("data")
    for path in Path("data").rglob("*.png"):
        save(f"shallow/{path.relative_to('data')}", counts(len(path.parts), 0, 255, np.uint8))
        save(f"shallow/{path.relative_to('data')}".replace("one", "two"), counts(1, 0, 255, np.uint8))
    assert call(pretrain, "--data", "shallow", *VIT, "--batch_size", 2, "--epochs", 1, "--out", "run") == 0
    assert common.read_json("run/config.json")["range"] == []
    error = refused(capsys, probe, "--data", "data", *HEADS, "--run", "run", "--out", "probe.json")
    assert "is deeper than 8 bit" in error


BROKEN = {
    "frames.npy": lambda path: save(path, np.zeros((12, 64, 64))),
    "first.npy": lambda path: save(path, np.zeros((3, 40, 40))),
    "holes.npy": lambda path: save(path, np.full((40, 40), np.nan)),
    "colour.png": lambda path: by_hand_png(path, np.zeros((9, 9, 3), np.uint16), 2),
    "shallow.png": lambda path: save(path, np.zeros((9, 9), np.uint8)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_stage_refuses_what_is_no_image_in_one_line_before_it_trains(name, capsys):
    make_set("data")
    BROKEN[name](f"data/train/cell/{name}")
    stages = [(denoise, "train", *UNET), (pretrain, *VIT), (probe, *HEADS, "--pixels"),
              (pretrain, "check"), (probe, "check")]
    for stage, *argv in stages:
        where = [] if argv == ["check"] and stage is probe else ["--out", "out"]
        assert f"train/cell/{name}" in refused(capsys, stage, *argv, "--data", "data", *where)
        assert not Path("out").exists()


@pytest.mark.parametrize("value", ["5", "5,5", "5,4", "1,2,3", "nan,1", "0,inf", "a,b"])
def test_ranges_that_are_none_are_refused(value, capsys):
    make_set("data")
    assert "--range" in refused(capsys, pretrain, "--data", "data", f"--range={value}", "--out", "out", *VIT)


def test_negative_ranges_are_given_with_an_equals_sign():
    args = pretrain.read_config(["--data", "d", "--out", "o", "--range=-1000,400"])
    assert args.range == [-1000, 400]
    assert "--range=-1000,400" in inspect.getsource(common)  # as the flag's help says
    assert math.isfinite(sum(args.range))


def test_quality_and_pictures_of_deep_images():
    for k in range(3):
        save(f"data/{k}.npy", counts(k, 90, 400, np.float32))
    folder = common.Folder("data", spec="gauss25")
    half = torch.nn.Identity()
    half.depth, half.stride = 1, (1, 1)
    q = denoise.quality(half, folder, torch.device("cpu"))
    assert q["noisy_clean"] == pytest.approx(q["denoised_clean"], abs=1e-3)
    assert q["noisy_clean"] == pytest.approx(20.2, abs=0.4)  # -20 log10(25 / 255)
    sheet = probe.grid({"noisy": [folder.read(0)], "clean": [folder.read(0, "clean")]})
    assert sheet.getextrema()[0] == (0, 255)
    shown = np.asarray(denoise.picture(folder.read(0, "clean")))
    assert np.array_equal(shown, np.rint(folder.read(0, "clean")[0].numpy() / 257))


# ==== the simulated microscope ====================================================================
def test_simulated_cells_are_16_bit_stacks_with_the_noise_of_photons_and_reading():
    cells.write("cells", train=6, val=3, size=48, pages=4)
    train = common.Folder("cells")
    assert train.labels() == [kind for kind in sorted(cells.KINDS) for _ in range(6)]
    assert train.paths[:6] == [f"train/discs/00.tif#{k}" for k in (1, 2, 3, 4)] + [
        f"train/discs/01.tif#{k}" for k in (1, 2)]
    counts, means = (np.stack([common.read_image(Path(root, path)) for path in train.paths]).astype(float)
                     for root in ("cells", "cells-means"))
    noise, photons = counts - means, means - cells.OFFSET
    assert abs(noise.mean()) < 0.3
    for low, high in ((0, 10), (30, 80), (100, 300)):
        level = (photons >= low) & (photons < high)
        variance = photons[level].mean() + cells.READING**2
        assert noise[level].var() == pytest.approx(variance, rel=0.15)
