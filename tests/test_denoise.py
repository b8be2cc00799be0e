"""denoise.py held to Neighbor2Neighbor and to its own promises: plain loops, images whose answer is known, and the
command line on small folders: what is written, skipped, refused and resumed."""

import itertools
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
from torch import nn

import common
import denoise
from common import UserError

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["--workers", "0", "--log_steps", "1", "--device", "cpu", "--width", "4", "--batch_size", "2", "--patch", "16"]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True, scope="module")
def undisturbed():
    """One thread, for equal bits in this and other processes; main() sets signal handlers."""
    threads, signals = torch.get_num_threads(), (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = {s: signal.getsignal(s) for s in signals}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for s, handler in handlers.items():
        signal.signal(s, handler)


def picture(seed, height, width, channels=3, top=255, dtype=np.uint8):
    """A smooth random picture (H, W, C)."""
    rng = np.random.default_rng(seed)
    coarse = torch.tensor(rng.random((1, channels, 3, 3)))
    x = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)[0]
    return np.rint(x.permute(1, 2, 0).numpy() * top).astype(dtype)


def save(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, x) if path.suffix == ".npy" else Image.fromarray(x[:, :, 0] if x.shape[2] == 1 else x).save(path)


def train(data, out, *flags):
    return denoise.main(["train", "--data", str(data), "--out", str(out), *SMALL, *flags])


def apply(data, denoiser, out, *flags):
    return denoise.main(["apply", "--data", str(data), "--denoiser", str(denoiser), "--out", str(out), *SMALL, *flags])


def refused(main, capsys):
    """Run main() as the script does; it must end with exit code 2. Gives the line that it wrote."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        common.run(main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


# ======================================================================================================
# sub-images and losses
# ======================================================================================================

ADJACENT = [(a, b) for a, b in itertools.permutations(range(4), 2)  # of the cell 0 1 / 2 3
            if abs(a // 2 - b // 2) + abs(a % 2 - b % 2) == 1]


def test_pairs_are_the_8_ordered_pairs_of_adjacent_pixels():
    assert len(ADJACENT) == 8
    assert sorted(map(tuple, denoise.PAIRS.tolist())) == sorted(ADJACENT)


def test_all_8_pairs_are_drawn_equally_often_and_each_cell_on_its_own():
    pairs = denoise.draw_pairs(40, 100, 60, gen()).flatten()  # 60,000 cells
    counts = torch.bincount(pairs, minlength=8).double()
    expected = len(pairs) / 8
    assert len(counts) == 8 and ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees: p = 0.001
    both = torch.bincount(pairs[1:] * 8 + pairs[:-1], minlength=64).double()  # of neighbouring cells
    expected = (len(pairs) - 1) / 64
    assert ((both - expected) ** 2 / expected).sum() < 103.4  # 63 degrees: p = 0.001


def test_sub_images_take_two_adjacent_pixels_of_each_cell_the_same_in_every_channel():
    B, C, H, W = 3, 5, 10, 14
    x = torch.arange(B * C * H * W, dtype=torch.float64).reshape(B, C, H, W)  # unique values
    pairs = denoise.draw_pairs(B, H, W, gen(1))
    assert pairs.shape == (B, H // 2, W // 2)
    g1, g2 = denoise.neighbors(x, pairs)
    for b, i, j in itertools.product(range(B), range(H // 2), range(W // 2)):
        first, second = denoise.PAIRS[pairs[b, i, j]].tolist()
        for g, pixel in ((g1, first), (g2, second)):
            assert g[b, :, i, j].tolist() == x[b, :, 2 * i + pixel // 2, 2 * j + pixel % 2].tolist()


class Tiny(nn.Module):
    """A small nonlinear network, in float64, whose gradients can be compared."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1)).double()
        self.calls = []

    def forward(self, x):
        out = self.body(x)
        self.calls.append((x.shape[2], out.requires_grad))
        return out.clone()


def test_loss_terms_equal_plain_loops():
    model, y, pairs = Tiny(), torch.rand(2, 2, 6, 8, generator=gen(2)).double(), denoise.draw_pairs(2, 6, 8, gen(5))
    reconstruction, regulariser = denoise.n2n_losses(model, y, pairs, 0.7)

    def sub(x, k):
        out = np.empty((2, 2, 3, 4))
        for b, ch, i, j in np.ndindex(*out.shape):
            pixel = int(denoise.PAIRS[pairs[b, i, j]][k])
            out[b, ch, i, j] = x[b, ch, 2 * i + pixel // 2, 2 * j + pixel % 2]
        return out

    with torch.no_grad():
        whole, half = model(y), model(torch.from_numpy(sub(y, 0))).numpy()
    d, h = half - sub(y, 1), sub(whole, 0) - sub(whole, 1)
    squares = sum(d[i] ** 2 for i in np.ndindex(*d.shape)) / d.size
    changed = sum((d[i] - h[i]) ** 2 for i in np.ndindex(*d.shape)) / d.size
    np.testing.assert_allclose([reconstruction.item(), regulariser.item()], [squares, 0.7 * changed], rtol=1e-5)
    assert abs(regulariser.item() - 0.7 * squares) > 1e-3 * squares  # the two terms differ here


def test_no_gradient_goes_through_the_pass_over_the_whole_image():
    y, pairs = torch.rand(2, 2, 8, 8, generator=gen(4)).double(), denoise.draw_pairs(2, 8, 8, gen(6))

    def gradients(detach):
        model = Tiny()
        g1, g2 = denoise.neighbors(y, pairs)
        h1, h2 = denoise.neighbors(model(y).detach() if detach else model(y), pairs)
        ((model(g1) - g2 - (h1 - h2)) ** 2).mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    model = Tiny()
    denoise.n2n_losses(model, y, pairs, 1.0)[1].backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(got, gradients(detach=True), rtol=1e-4, atol=1e-6)
    assert (got - gradients(detach=False)).abs().max() > 1e-3
    assert sorted(model.calls) == [(4, True), (8, False)]


# ======================================================================================================
# U-Net
# ======================================================================================================


def plain_unet(state, x, depth):
    """Noise2Noise's network written down once more, layer by layer."""
    def conv(x, name):
        w = state[f"{name}.weight"]
        return F.conv2d(x, w, state[f"{name}.bias"], padding=w.shape[-1] // 2)

    def act(x):
        return torch.where(x > 0, x, 0.1 * x)

    pooled = [x]
    x = act(conv(act(conv(x, "first")), "encoder.0"))
    for level in range(depth):
        x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
        pooled.append(x)
        x = act(conv(x, f"encoder.{level + 1}"))
    for level in range(depth):
        x = F.conv_transpose2d(x, state[f"ups.{level}.weight"], state[f"ups.{level}.bias"], stride=2)
        x = torch.cat([x, pooled[depth - 1 - level]], 1)
        x = act(conv(act(conv(x, f"firsts.{level}")), f"seconds.{level}"))
    return conv(act(conv(act(conv(x, "mix.0")), "mix.1")), "last")


@pytest.mark.parametrize(("channels", "depth"), [(3, 5), (1, 2), (4, 1)])
def test_unet_equals_noise2noises_network(channels, depth):
    model = denoise.UNet(channels, 6, depth).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=gen(p.numel()))
    x = torch.rand(2, channels, 32, 64, generator=gen()).double()
    torch.testing.assert_close(model(x), plain_unet(model.state_dict(), x, depth))


def test_unet_has_1259475_parameters_of_the_papers_shapes():
    model = denoise.UNet()
    assert sum(p.numel() for p in model.parameters()) == 1_259_475
    assert [tuple(u.weight.shape) for u in model.ups] == [(48, 48, 2, 2)] + [(96, 96, 2, 2)] * 4
    assert [tuple(u.weight.shape) for u in model.firsts] == [(96, 96, 3, 3)] + [(96, 144, 3, 3)] * 3 + [(96, 99, 3, 3)]


def test_unet_starts_kaiming_normal_times_a_tenth_with_zero_biases():
    torch.manual_seed(0)
    layers = [m for m in denoise.UNet().modules() if hasattr(m, "weight")]
    assert len(layers) == 2 + 5 + 3 * 5 + 3
    for m in layers:
        w = m.weight.detach()
        deviation = 0.1 * math.sqrt(2 / (w.shape[1] * w.shape[2] * w.shape[3]))
        assert abs(w.std() / deviation - 1) < 4 / math.sqrt(2 * w.numel())
        assert abs(w.mean()) < 4 * deviation / math.sqrt(w.numel())
        assert (m.bias == 0).all()


def test_margin_of_a_tile_is_the_unets_reach_rounded_up_to_its_largest_pooling():
    model = denoise.UNet(1, 1, 5).double()
    for p in model.parameters():
        nn.init.constant_(p, 0.3)  # positive: what a pixel can reach, it does reach
    columns = torch.arange(32)  # every position in the largest pooling cell
    x = torch.zeros(32, 1, 32, 512, dtype=torch.double)
    x[columns, 0, :, 240 + columns] = 1
    with torch.no_grad():
        changed = (model(x) != model(0 * x[:1])).any(2)[:, 0]
    reach = max(abs(int(i) - 240 - int(b)) for b, i in changed.nonzero())
    assert reach == 157 and denoise.MARGIN == 160 and denoise.MARGIN % 2**5 == 0


# ======================================================================================================
# patches
# ======================================================================================================


@pytest.mark.parametrize(("side", "patch", "depth"), [(256, 256, 5), (500, 256, 5), (64, 64, 5), (70, 128, 5),
                                                      (32, 32, 4), (28, 32, 3), (20, 32, 3)])
def test_small_images_get_smaller_patches_and_fewer_poolings(side, patch, depth):
    sizes = torch.tensor([[side, side + 40], [side + 7, side], [side, side]])
    assert denoise.patch_plan(sizes, 256) == (patch, depth)
    assert patch % 2 ** (depth + 1) == 0  # the sub-images divide by the poolings


def test_patches_are_cut_at_their_corners_and_short_sides_reflected():
    shapes, patch = [(40, 33), (16, 50), (9, 12), (1, 40), (3, 2)], 16
    images = torch.full((len(shapes), 2, 40, 50), 255, dtype=torch.uint8)  # the padding must not be seen
    pictures = [torch.randint(0, 200, (2, *s), generator=gen(i), dtype=torch.uint8) for i, s in enumerate(shapes)]
    for image, x in zip(images, pictures, strict=True):
        image[:, :x.shape[1], :x.shape[2]] = x
    corners = denoise.random_positions(torch.tensor(shapes), patch, gen(7))
    got = denoise.cut_patches(images, torch.tensor(shapes), corners, patch)
    for x, (top, left), out in zip(pictures, corners.tolist(), got, strict=True):
        grown = np.pad(x.numpy(), [(0, 0), (0, max(0, patch - x.shape[1])), (0, max(0, patch - x.shape[2]))], "reflect")
        expected = grown[:, top:top + patch, left:left + patch].astype(np.float32) / 255
        assert np.array_equal(out.numpy(), expected)


def test_every_position_inside_an_image_is_drawn_and_none_outside():
    sizes = torch.tensor([[20, 16], [5, 18]]).repeat(400, 1)
    corners = denoise.random_positions(sizes, 16, gen())
    assert [set(corners[b::2, axis].tolist()) for b in (0, 1) for axis in (0, 1)] == [
        {0, 1, 2, 3, 4}, {0}, {0}, {0, 1, 2}]


# ======================================================================================================
# application and quality
# ======================================================================================================


def wild(channels, depth):
    """A U-Net of random weights, its answers spread over the grey levels."""
    torch.manual_seed(1)
    model = denoise.UNet(channels, 4, depth).eval()
    for m in model.modules():
        if hasattr(m, "weight"):
            nn.init.kaiming_normal_(m.weight)
            nn.init.normal_(m.bias, std=0.05)
    with torch.no_grad():
        y = model(torch.rand(1, channels, 128, 128, generator=gen()))
        scale = 0.2 / y.std((0, 2, 3))
        model.last.weight *= scale[:, None, None, None]
        model.last.bias.copy_((model.last.bias - y.mean((0, 2, 3))) * scale + 0.5)
    return model


def rounded(got, exact):
    """Whether uint8 `got` is `exact` (B, C, H, W), cropped, clipped and rounded, whichever way a tie was broken."""
    exact = exact.detach()[:, :, :got.shape[2], :got.shape[3]].clamp(0, 1) * 255
    assert got.dtype == torch.uint8 and exact.std() > 15  # an answer worth comparing
    return got.shape == exact.shape and (got - exact).abs().max() < 0.501


@pytest.mark.parametrize(("height", "width"), [(37, 51), (64, 96), (3, 2), (1, 40)])
def test_image_of_any_size_is_reflected_to_a_multiple_of_32_and_keeps_its_size(height, width):
    model, x = wild(3, 5), torch.randint(0, 256, (2, 3, height, width), generator=gen(), dtype=torch.uint8)
    grown = np.pad(x, [(0, 0), (0, 0), (0, -height % 32), (0, -width % 32)], "reflect") / np.float32(255)
    got = denoise.denoise(model, x)
    assert got.shape == x.shape and rounded(got, model(torch.from_numpy(grown)))


def test_tiles_agree_with_the_whole_image_everywhere():
    model, x = wild(3, 5), torch.randint(0, 256, (1, 3, 400, 700), generator=gen(), dtype=torch.uint8)
    exact = model(torch.from_numpy(np.pad(x, [(0, 0), (0, 0), (0, 16), (0, 4)], "reflect")) / 255)
    assert rounded(denoise.denoise(model, x), exact)
    assert rounded(denoise.denoise(model, x, tile=256), exact)


def test_psnr_of_known_errors():
    a = np.full((4, 5, 3), 0.5)
    assert denoise.psnr(a, a + 0.1) == pytest.approx(20)
    assert denoise.psnr(np.zeros((2, 1, 1)), np.array([1.0, 0.0]).reshape(2, 1, 1)) == pytest.approx(10 * math.log10(2))


def test_autocorrelation_is_0_for_white_noise_and_high_for_resized_noise():
    white = np.random.default_rng(0).standard_normal((200, 200, 3))
    assert abs(denoise.autocorrelation(white + 5)) < 4 / math.sqrt(2 * white.size)
    # each value doubled: half of the neighbours are equal, half independent
    assert abs(denoise.autocorrelation(white.repeat(2, 0).repeat(2, 1)) - 0.5) < 0.02
    for axis in (0, 1):  # both directions count alike
        assert abs(denoise.autocorrelation(white.repeat(2, axis)) - 0.25) < 0.02
    smooth = (white[1:] + white[:-1])[:, 1:] + (white[1:] + white[:-1])[:, :-1]
    assert abs(denoise.autocorrelation(smooth) - 0.5) < 0.02


def test_expected_noisy_is_the_mean_of_clipped_noise():
    def density(t):
        return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)

    def below(t):
        return 0.5 * (1 + math.erf(t / math.sqrt(2)))

    x = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16, 1)
    mean = denoise.expected_noisy(x, "gauss255", "a.png")
    # E[clip(x + n, 0, 1)] for n ~ N(0, 1)
    exact = np.vectorize(lambda v: density(v) - density(1 - v) + v * (below(1 - v) - below(-v)) + 1 - below(1 - v))(x)
    assert exact.flat[0] == pytest.approx(0.3156, abs=1e-4) and exact.flat[-1] == pytest.approx(0.6844, abs=1e-4)
    error = mean - exact  # of 8192 draws of deviation below 0.45
    assert np.abs(error).max() < 4.5 * 0.45 / math.sqrt(8192) and abs(error.mean()) < 4 * 0.45 / math.sqrt(8192 * 256)


def test_expected_noisy_uses_the_level_drawn_for_the_image():
    black = np.zeros((1, 1, 1), np.float32)
    for key in ("a.png", "b.png"):
        level = common.noise_draw("gauss50-255", key, 3)[1]  # E[max(0, n)] while n stays below 1
        mean = denoise.expected_noisy(black, f"gauss{level}", key)
        assert np.array_equal(denoise.expected_noisy(black, "gauss50-255", key, 3), mean)


class Half(nn.Module):
    """Answers 128/255 everywhere."""

    depth = 1

    def forward(self, x):
        return torch.full_like(x, 128 / 255)


def test_quality_is_measured_against_clean_and_against_the_expectation(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", np.full((64, 64, 1), 128, np.uint8))
    q = denoise.quality(Half(), common.Folder(tmp_path, spec="gauss25"), CPU, common.nullcontext)
    assert q["noisy_clean"] == pytest.approx(-20 * math.log10(25 / 255), abs=0.15)
    assert q["noisy_expected"] == pytest.approx(q["noisy_clean"], abs=0.05)  # nothing is clipped in the middle
    assert q["denoised_clean"] == 100 and q["denoised_expected"] > 50 and abs(q["autocorrelation"]) < 0.03
    assert set(denoise.quality(Half(), common.Folder(tmp_path), CPU, common.nullcontext)) == {"autocorrelation"}


@pytest.mark.parametrize("correlated", [False, True])
def test_spatially_correlated_noise_is_warned_of(tmp_path, capsys, correlated):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 1), dtype=np.uint8)
    save(tmp_path / "data" / "1.png", noise.repeat(2, 0).repeat(2, 1) if correlated else noise)
    args = SimpleNamespace(data=str(tmp_path / "data"), noise="none", noise_seed=0)
    denoise.report(args, Half(), common.Folder(args.data), tmp_path, CPU, common.nullcontext)
    assert ("correlated" in capsys.readouterr().err) == correlated


# ======================================================================================================
# the command line
# ======================================================================================================


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(data, a denoiser trained on it): files of several sizes and formats, nested; 4 epochs of 5 steps."""
    root = tmp_path_factory.mktemp("denoise")
    shapes = {"train/a/1.png": (24, 24), "train/a/deep/2.bmp": (30, 20), "train/b/1.png": (24, 24),
              "train/b/3.tif": (37, 51), "val/a/1.png": (24, 24), "val/b/4.png": (9, 70)}
    shapes |= {f"train/c/{i}.png": (24, 24) for i in range(7)}
    for i, (path, shape) in enumerate(shapes.items()):
        save(root / "data" / path, picture(i, *shape))
    assert train(root / "data", root / "denoiser", *RUN) == 0
    return root / "data", root / "denoiser"


def scramble(denoiser, out):
    """A denoiser like `denoiser` of random weights: training this short gives nearly black pictures."""
    state = common.load_checkpoint(denoiser / "checkpoint.pth")
    model = wild(state["data"]["channels"], state["data"]["depth"])
    common.save_checkpoint(out / "checkpoint.pth", {**state, "model": model.state_dict()})
    return out, model.eval()


@pytest.fixture(scope="module")
def denoised(folder, tmp_path_factory):
    """(data, denoiser of random weights, the copy that it made)."""
    root = tmp_path_factory.mktemp("denoised")
    denoiser, _ = scramble(folder[1], root / "denoiser")
    assert apply(folder[0], denoiser, root / "out", *RUN[:2]) == 0
    return folder[0], denoiser, root / "out"


RUN = ["--noise", "gauss50", "--epochs", "4"]


def test_denoiser_comes_near_the_local_mean_on_images_of_known_answer(tmp_path):
    for i, level in enumerate(np.random.default_rng(0).uniform(0.35, 0.65, 96)):
        save(tmp_path / "data" / f"{i}.png", np.full((16, 16, 1), round(255 * level), np.uint8))
    train(tmp_path / "data", tmp_path / "out", "--noise", "gauss60", "--epochs", "60", "--batch_size", "8", "--lr",
          "0.005", "--width", "8", "--log_steps", "50", "--patch", "8", "--init_scale", "0.1")
    q = common.read_json(tmp_path / "out" / "quality.json")
    # better than the mean of 3 x 3 pixels, and than the mean grey level of all images, which is 8.4 dB better
    assert q["denoised_clean"] > q["noisy_clean"] + 10 * math.log10(9)


def test_ramp_rises_to_2_and_the_rate_is_halved_at_each_fifth(tmp_path, monkeypatch):
    save(tmp_path / "data" / "1.png", picture(0, 16, 16))
    ramps, losses = [], denoise.n2n_losses
    monkeypatch.setattr(denoise, "n2n_losses", lambda m, y, p, ramp: ramps.append(ramp) or losses(m, y, p, ramp))
    train(tmp_path / "data", tmp_path / "out", "--epochs", "10", "--lr", "0.001")
    assert ramps == pytest.approx([2 * epoch / 10 for epoch in range(1, 11)])
    log = common.read_log(tmp_path / "out" / "log.jsonl")
    assert [r["lr"] for r in log] == pytest.approx([0.001 / 2**k for k in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)], rel=1e-5)
    for r in log:
        assert r["total"] == pytest.approx(r["reconstruction"] + r["regulariser"], rel=1e-4)
    group, = common.load_checkpoint(tmp_path / "out" / "checkpoint.pth")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.001 / 16) and group["betas"] == (0.9, 0.999)


def files(root):
    return {p.relative_to(root).as_posix(): p.stat().st_mtime_ns for p in root.rglob("*.*") if p.is_file()}


def test_denoised_copy_has_the_same_paths_and_what_the_denoiser_says(denoised):
    data, denoiser, out = denoised
    assert set(files(out)) == {Path(p).with_suffix(".png").as_posix() for p in files(data)} | {"made_by.json"}
    model = denoise.load_denoiser(denoiser, CPU)[0]
    for split in ("train", "val"):
        folder = common.Folder(data, split, "gauss50", denoised=out)
        for i in range(len(folder)):
            noisy, got = (torch.from_numpy(folder.read(i, k)).permute(2, 0, 1)[None] for k in ("noisy", "denoised"))
            height, width = (-n % 8 for n in noisy.shape[2:])  # three poolings
            grown = np.pad(noisy, [(0, 0), (0, 0), (0, height), (0, width)], "reflect")
            assert rounded(got, model(torch.from_numpy(grown) / 255))


def test_finished_files_are_skipped_and_a_deleted_one_is_made_again(denoised, capsys):
    data, denoiser, out = denoised
    first, victim = files(out), out / "train/b/3.png"
    content = victim.read_bytes()
    apply(data, denoiser, out, *RUN[:2])
    assert files(out) == first
    victim.unlink()
    apply(data, denoiser, out, *RUN[:2])
    again = files(out)
    assert victim.read_bytes() == content and set(again) == set(first)
    assert [p for p in first if again[p] != first[p]] == ["train/b/3.png"]


def test_process_that_starts_late_leaves_out_no_image(denoised, tmp_path, monkeypatch):
    """Each process looks for what is already made on its own, and others may have made some by then."""
    data, denoiser, out = denoised
    for rank in (0, 1):
        monkeypatch.setattr(common, "world", lambda rank=rank: (rank, 2))
        assert apply(data, denoiser, tmp_path, *RUN[:2]) == 0
    whole = files(out)
    assert set(files(tmp_path)) == set(whole)
    assert all((tmp_path / p).read_bytes() == (out / p).read_bytes() for p in whole)


def test_missing_image_is_made_again_in_the_batch_of_a_whole_copy(denoised, tmp_path, monkeypatch):
    """The same shapes for the same images: results must not depend on what an interrupted copy had already made."""
    data, denoiser, _ = denoised
    shapes, real = [], denoise.denoise
    monkeypatch.setattr(denoise, "denoise", lambda m, x, *a: shapes.append(tuple(x.shape)) or real(m, x, *a))
    assert apply(data, denoiser, tmp_path, *RUN[:2]) == 0
    whole, before = set(shapes), files(tmp_path)
    victim = min(p for p in before if p.endswith(".png"))
    (tmp_path / victim).unlink()
    shapes.clear()
    assert apply(data, denoiser, tmp_path, *RUN[:2]) == 0
    assert len(shapes) == 1 and shapes[0] in whole and shapes[0][0] > 1
    after = files(tmp_path)
    assert set(after) == set(before) and [p for p in after if after[p] != before[p]] == [victim]


def test_foreign_images_are_never_taken_for_denoised_ones(denoised, tmp_path, capsys):
    data, denoiser, _ = denoised
    save(tmp_path / "out" / "train" / "a" / "1.png", picture(0, 16, 16))
    error = refused(lambda: apply(data, denoiser, tmp_path / "out", *RUN[:2]), capsys)
    assert "images that apply did not make, train/a/1.png first" in error
    assert set(files(tmp_path / "out")) == {"train/a/1.png"}


@pytest.mark.parametrize("out", ["", "val", "train/denoised"])
def test_denoised_images_never_go_among_the_noisy_ones(denoised, out, capsys):
    data, denoiser, _ = denoised
    before = files(data)
    assert "among the noisy images" in refused(lambda: apply(data, denoiser, data / out, *RUN[:2]), capsys)
    assert files(data) == before


def test_copy_made_by_another_denoiser_or_of_other_noise_is_not_mixed(folder, denoised, capsys):
    data, denoiser, out = denoised
    victim = out / "val/a/1.png"
    content = victim.read_bytes()
    victim.unlink()
    before = files(out)
    error = refused(lambda: apply(data, folder[1], out, *RUN[:2]), capsys)  # of the same settings, other weights
    assert str(out) in error and "denoiser" in error
    assert "gauss20" in refused(lambda: apply(data, denoiser, out, "--noise", "gauss20"), capsys)
    assert files(out) == before
    assert apply(data, denoiser, out, *RUN[:2]) == 0 and victim.read_bytes() == content


def test_two_files_that_differ_in_suffix_only_are_refused(folder, tmp_path, capsys):
    for suffix in ("png", "bmp"):
        save(tmp_path / "data" / f"same.{suffix}", picture(0, 24, 24))
    error = refused(lambda: apply(tmp_path / "data", folder[1], tmp_path / "out"), capsys)
    assert "same.png" in error and "same.bmp" in error


def test_unfinished_and_unfit_denoisers_and_changed_settings_are_refused(folder, tmp_path, capsys):
    data, denoiser = folder
    save(tmp_path / "grey" / "1.png", picture(0, 24, 24, 1))
    assert "channels" in refused(lambda: apply(tmp_path / "grey", denoiser, tmp_path / "out"), capsys)
    state = common.load_checkpoint(denoiser / "checkpoint.pth")
    common.save_checkpoint(tmp_path / "half" / "checkpoint.pth", {**state, "epoch": 3})
    assert "half" in refused(lambda: apply(data, tmp_path / "half", tmp_path / "out"), capsys)
    assert "--epochs 4 (now 5)" in refused(lambda: train(data, denoiser, *RUN[:2], "--epochs", "5"), capsys)
    assert "--out" in refused(lambda: apply(data, denoiser, data), capsys)  # it would overwrite the noisy images
    assert "--tile 100" in refused(lambda: apply(data, denoiser, tmp_path / "out", "--tile", "100"), capsys)
    assert "--amp fp16" in refused(lambda: apply(data, denoiser, tmp_path / "out", "--amp", "fp16"), capsys)
    with pytest.raises(UserError, match="--denoiser"):
        denoise.main(["apply", "--data", str(data), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(("channels", "suffix", "top", "dtype", "made"), [
    (1, ".png", 65535, np.uint16, ".png"), (5, ".npy", 1, np.float32, ".npy"), (2, ".npy", 4095, np.uint16, ".npy")])
def test_real_noisy_images_of_any_depth_and_channels_need_no_clean_ones(tmp_path, channels, suffix, top, dtype, made):
    rng = np.random.default_rng(0)
    for i in range(2):
        x = picture(i, 24, 20, channels, 1, float) * 0.5 + rng.uniform(0, 0.5, (24, 20, channels))
        save(tmp_path / "data" / f"{i}{suffix}", (x * top).astype(dtype))
    train(tmp_path / "data", tmp_path / "denoiser", "--epochs", "1")
    assert set(common.read_json(tmp_path / "denoiser" / "quality.json")) == {"autocorrelation"}
    other, model = scramble(tmp_path / "denoiser", tmp_path / "other")
    apply(tmp_path / "data", other, tmp_path / "out")
    noisy = common.Folder(tmp_path / "data", denoised=tmp_path / "out")
    assert set(files(tmp_path / "out")) == {"made_by.json", f"0{made}", f"1{made}"}
    for i in range(2):
        x, got = (torch.from_numpy(noisy.read(i, k)).permute(2, 0, 1)[None] for k in ("noisy", "denoised"))
        assert rounded(got, model(torch.from_numpy(np.pad(x, [(0, 0), (0, 0), (0, 0), (0, 4)], "reflect")) / 255))
        assert common.read_image(tmp_path / "out" / f"{i}{made}").shape == (24, 20, channels)


STOP = """
import os, signal, sys
import common, denoise
losses, calls = denoise.n2n_losses, []
def counted(*a):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGTERM)
    return losses(*a)
denoise.n2n_losses = counted
common.run(denoise.main)
"""


def test_run_stopped_by_sigterm_and_resumed_equals_an_uninterrupted_one_bit_for_bit(folder, tmp_path):
    data, denoiser = folder
    stopped = subprocess.run([sys.executable, "-c", STOP, "train", "--data", data, "--out", tmp_path, *SMALL, *RUN],
                             cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert stopped.returncode == 75, stopped.stderr
    state = common.load_checkpoint(tmp_path / "checkpoint.pth")
    assert (state["epoch"], state["step"]) == (1, 3)  # in the middle of an epoch
    assert train(data, tmp_path, *RUN) == 0
    whole, resumed = (common.load_checkpoint(f / "checkpoint.pth") for f in (denoiser, tmp_path))
    assert whole["epoch"] == resumed["epoch"] == 4
    for k, v in whole["model"].items():
        assert torch.equal(v, resumed["model"][k])
    assert not torch.equal(whole["model"]["last.weight"], state["model"]["last.weight"])
    for k, v in whole["optimizer"]["state"].items():
        assert all(torch.equal(v[n], resumed["optimizer"]["state"][k][n]) for n in v)
    one, two = ([(r["step"], r["epoch"], r["total"]) for r in common.read_log(f / "log.jsonl")]
                for f in (denoiser, tmp_path))
    assert one == two and [r[0] for r in one] == list(range(1, 21))


def test_two_processes_give_the_losses_of_one(folder, tmp_path):
    data, denoiser = folder
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, "denoise.py", "train", "--data", data, "--out", tmp_path, *SMALL, *RUN],
                          cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (common.read_log(f / "log.jsonl") for f in (denoiser, tmp_path))
    assert [r["step"] for r in one] == [r["step"] for r in two] == list(range(1, 21))
    for k in ("total", "reconstruction", "regulariser"):
        np.testing.assert_allclose([r[k] for r in two], [r[k] for r in one], rtol=1e-4)
