"""denoise.py held to Neighbor2Neighbor and to its own promises: its authors' network, plain loops,
images whose answer is known, and the command line on small folders: what is written, skipped,
refused and resumed."""

import functools
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

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
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
QUICK = ["--workers", "0", "--device", "cpu", "--amp", "off"]  # float32, whatever the CPU
SMALL = [*QUICK, "--log_steps", "1", "--width", "4", "--batch_size", "2", "--patch", "16"]
NOISE = ["--noise", "gauss50"]
RUN = [*NOISE, "--epochs", "4"]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True, scope="module")
def undisturbed():
    """One thread, for equal bits in this and other processes; small chunks, to have several. main()
    sets signal handlers."""
    threads = torch.get_num_threads()
    handlers = {s: signal.getsignal(s) for s in SIGNALS}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoise, "CHUNK", 4)
        yield
    torch.set_num_threads(threads)
    for s, handler in handlers.items():
        signal.signal(s, handler)


def picture(seed, height, width, channels=3, top=255, dtype=np.uint8):
    """A smooth random picture (H, W, C)."""
    coarse = torch.from_numpy(np.random.default_rng(seed).random((1, channels, 3, 3)))
    x = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    x = x[0].permute(1, 2, 0).numpy()
    return np.rint(x * top).astype(dtype)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Relative paths of a test lie in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def save(path, x):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, x)
        return
    if x.shape[2] == 1:
        x = x.squeeze(2)
    Image.fromarray(x).save(path)


same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # bit for bit


def random_bytes(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=gen(seed), dtype=torch.uint8)


def main(*argv):
    return denoise.main([str(v) for v in argv])


def train(data, out, *flags):
    return main("train", "--data", data, "--out", out, *SMALL, *flags)


def apply(data, denoiser, out, *flags):
    return main("apply", "--data", data, "--denoiser", denoiser, "--out", out, *QUICK, *flags)


def refused(capsys, command, *args):
    """Run a command as the script does; it must end with exit code 2. Gives the line it wrote."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        common.run(lambda: command(*args))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# ==== sub-images and losses =======================================================================
EDGES = {(0, 1), (2, 3), (0, 2), (1, 3)}  # of the cell 0 1 / 2 3
ADJACENT = EDGES | {(b, a) for a, b in EDGES}


def test_pairs_are_the_8_ordered_pairs_of_adjacent_pixels():
    assert len(denoise.PAIRS) == len(ADJACENT) == 8
    assert set(map(tuple, denoise.PAIRS.tolist())) == ADJACENT


def chi_square(numbers, kinds):
    counts = torch.bincount(numbers, minlength=kinds)
    expected = len(numbers) / kinds
    return sum((counts - expected) ** 2) / expected


def test_all_8_pairs_are_drawn_equally_often_and_each_cell_on_its_own():
    first, second = denoise.draw_pairs(600, 400, gen()).flatten(1)  # 60,000 cells
    kinds, drawn = torch.unique(4 * first + second, return_inverse=True)
    assert len(kinds) == 8
    assert chi_square(drawn, 8) < 24.3  # 7 degrees of freedom: p = 0.001
    of_neighbours = 8 * drawn[1:] + drawn[:-1]
    assert chi_square(of_neighbours, 64) < 103.4  # 63 degrees: p = 0.001


def draw_batch(B, H, W, seed):
    rng = gen(seed)
    return torch.stack([denoise.draw_pairs(H, W, rng) for _ in range(B)])


def plain_sub_image(x, places):
    """Sub-image of x (B, C, H, W) by loops: of each cell the pixel `places` (B, H/2, W/2) names."""
    B, C, H, W = x.shape
    out = np.empty((B, C, H // 2, W // 2))
    for b, i, j in itertools.product(range(B), range(H // 2), range(W // 2)):
        row, column = divmod(int(places[b, i, j]), 2)
        out[b, :, i, j] = x[b, :, 2 * i + row, 2 * j + column]
    return out


def test_sub_images_take_two_adjacent_pixels_of_each_cell_the_same_in_every_channel():
    B, C, H, W = 3, 5, 10, 14
    x = torch.arange(B * C * H * W, dtype=torch.float64).view(B, C, H, W)  # unique values
    pairs = draw_batch(B, H, W, seed=1)
    first, second = pairs.unbind(1)
    assert first.shape == (B, H // 2, W // 2)
    assert set(zip(first.flatten().tolist(), second.flatten().tolist(), strict=True)) == ADJACENT
    g1, g2 = denoise.neighbors(x, pairs)
    assert np.array_equal(g1, plain_sub_image(x, first))
    assert np.array_equal(g2, plain_sub_image(x, second))


class Tiny(nn.Module):
    """A small nonlinear network, in float64, whose gradients can be compared."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        first, last = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
        self.body = nn.Sequential(first, nn.Tanh(), last).double()
        self.calls = []

    def forward(self, x):
        out = self.body(x)
        self.calls.append((x.shape[2], out.requires_grad))
        return out.clone()

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.parameters()])


def test_loss_terms_equal_plain_loops():
    model = Tiny()
    y = torch.rand(2, 2, 6, 8, generator=gen(2)).double()
    pairs = draw_batch(2, 6, 8, seed=5)
    reconstruction, regulariser = denoise.n2n_losses(model, y, pairs, 0.7)
    first, second = pairs.unbind(1)
    g1, g2 = plain_sub_image(y, first), plain_sub_image(y, second)
    with torch.no_grad():
        whole, half = model(y), model(torch.from_numpy(g1)).numpy()
    h1, h2 = plain_sub_image(whole, first), plain_sub_image(whole, second)
    d = half - g2
    squares = np.mean(d**2)
    changed = np.mean((d - (h1 - h2)) ** 2)
    assert reconstruction.item() == pytest.approx(squares, rel=1e-5)
    assert regulariser.item() == pytest.approx(0.7 * changed, rel=1e-5)
    assert changed != pytest.approx(squares, rel=1e-3)  # the two terms differ here


def test_no_gradient_goes_through_the_pass_over_the_whole_image():
    y = torch.rand(2, 2, 8, 8, generator=gen(4)).double()
    pairs = draw_batch(2, 8, 8, seed=6)

    def gradient(detach):
        model = Tiny()
        g1, g2 = denoise.neighbors(y, pairs)
        whole = model(y)
        if detach:
            whole = whole.detach()
        h1, h2 = denoise.neighbors(whole, pairs)
        F.mse_loss(model(g1) - g2, h1 - h2).backward()
        return model.gradient()

    model = Tiny()
    _, regulariser = denoise.n2n_losses(model, y, pairs, 1.0)
    regulariser.backward()
    torch.testing.assert_close(model.gradient(), gradient(detach=True), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(model.gradient(), gradient(detach=False), rtol=0, atol=1e-3)
    assert sorted(model.calls) == [(4, True), (8, False)]


# ==== U-Net =======================================================================================
@pytest.fixture(scope="module")
def golden():
    """Figures of the authors' network; the file says how they were made."""
    return common.read_json(ROOT / "tests/golden_unet.json")


def test_unet_has_the_keys_and_shapes_of_neighbor2neighbors_release(golden):
    state = denoise.UNet().state_dict()
    assert [[name, list(p.shape)] for name, p in state.items()] == golden["keys"]
    assert golden["parameters"] == 1_259_475
    assert sum(p.numel() for p in state.values()) == 1_259_475


def test_unet_answers_what_neighbor2neighbors_release_answers(golden):
    model = denoise.UNet()
    for k, p in enumerate(model.parameters()):
        scale = 0.05
        if p.ndim > 1:
            fan = p[0].numel()
            scale = math.sqrt(3 / fan)
        i = torch.arange(p.numel(), dtype=torch.float64)
        weight = scale * torch.sin(0.37 * i + 0.1 * k)
        p.data = weight.float().view(p.shape)
    i = torch.arange(3 * 64 * 96, dtype=torch.float64)
    x = 0.5 + 0.5 * torch.sin(0.13 * i)
    with torch.no_grad():
        y = model(x.float().view(1, 3, 64, 96))
    values = y.flatten()[golden["indices"]]
    assert values.tolist() == pytest.approx(golden["values"], abs=1e-5)
    assert y.mean().item() == pytest.approx(golden["mean"], abs=1e-5)
    assert y.std().item() == pytest.approx(golden["std"], abs=1e-5)


def plain_unet(state, x, depth):
    """Noise2Noise's network written down once more, layer by layer."""
    def conv(name, x):
        w = state[f"{name}.weight"]
        return F.conv2d(x, w, state[f"{name}.bias"], padding=w.shape[-1] // 2)

    def act(name, x):
        x = conv(name, x)
        return torch.where(x > 0, x, 0.2 * x)

    pooled = [x]
    x = act("enc_conv1", act("enc_conv0", x))
    for level in range(depth):
        x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
        pooled.append(x)
        x = act(f"enc_conv{level + 2}", x)
    pooled.pop()  # the coarsest is nobody's skip
    for level in range(depth, 0, -1):
        up = f"up{level}.deconv"
        x = F.conv_transpose2d(x, state[f"{up}.weight"], state[f"{up}.bias"], stride=2)
        x = torch.cat([x, pooled.pop()], 1)
        x = act(f"dec_conv{level}b", act(f"dec_conv{level}a", x))
    return conv("nin_c", act("nin_b", act("nin_a", x)))


@pytest.mark.parametrize(("channels", "depth"), [(3, 5), (1, 2), (4, 1)])
def test_unet_of_any_depth_and_channels_equals_noise2noises_network(channels, depth):
    model = denoise.UNet(channels, 6, depth).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=gen(p.numel()))
    x = torch.rand(2, channels, 32, 64, generator=gen()).double()
    torch.testing.assert_close(model(x), plain_unet(model.state_dict(), x, depth))


@pytest.mark.parametrize("factor", [0.1, 1.0])
def test_unet_starts_kaiming_normal_times_the_factor_with_zero_biases(factor):
    torch.manual_seed(0)
    layers = [m for m in denoise.UNet(init_scale=factor).modules() if hasattr(m, "weight")]
    assert len(layers) == 2 + 5 + 3 * 5 + 3
    for m in layers:
        fan = m.weight[0].numel()
        z = m.weight / (factor * math.sqrt(2 / fan))
        error = 4 / math.sqrt(z.numel())  # of their mean, four deviations
        assert z.mean().item() == pytest.approx(0, abs=error)
        assert z.std().item() == pytest.approx(1, abs=0.71 * error)
        assert not m.bias.any()


def test_the_factor_of_the_paper_is_a_tenth():
    starts = []
    for kw in ({}, {"init_scale": 0.1}):
        torch.manual_seed(0)
        starts.append(denoise.UNet(3, 4, 1, **kw).enc_conv0.weight)
    assert torch.equal(*starts)
    assert denoise.TRAIN_FLAGS["init_scale"][0] == 0.1
    assert denoise.PRESETS["imagenet100"] == {}


def test_margin_of_a_strip_is_the_unets_reach_rounded_up_to_its_largest_pooling():
    model = denoise.UNet(1, 1, 5).double()
    for p in model.parameters():
        nn.init.constant_(p, 0.3)  # positive: what a pixel can reach, it does reach
    places = torch.arange(32)  # every position in the largest pooling cell
    x = torch.zeros(32, 1, 512, 32, dtype=torch.double)
    x[places, 0, 240 + places] = 1  # a row of ones
    with torch.no_grad():
        changed = model(x) != model(torch.zeros_like(x[:1]))
    image, row = changed[:, 0].any(2).nonzero().T
    assert (row - 240 - image).abs().max() == 157
    assert denoise.MARGIN == 160
    assert denoise.MARGIN % 2**5 == 0


# ==== patches =====================================================================================
@pytest.mark.parametrize(("side", "patch", "depth"), [
    (256, 256, 5), (500, 256, 5), (64, 64, 5), (70, 128, 5), (32, 32, 4), (28, 32, 3), (20, 32, 3)])
def test_small_images_get_smaller_patches_and_fewer_poolings(side, patch, depth):
    sizes = np.array([[side, side + 40], [side + 7, side], [side, side]])
    assert denoise.patch_plan(sizes, 256) == (patch, depth)
    assert patch % 2 ** (depth + 1) == 0  # the sub-images divide by the poolings


def mirrored(i, n):
    """Index i of a line of n pixels that goes on reflected without repeating its edge."""
    if n == 1:
        return 0
    i %= 2 * (n - 1)
    return min(i, 2 * (n - 1) - i)


def grow(x, height, width):
    """(..., H, W) reflected, pixel by pixel, to at least (..., height, width)."""
    H, W = x.shape[-2:]
    rows = [mirrored(i, H) for i in range(max(H, height))]
    columns = [mirrored(j, W) for j in range(max(W, width))]
    return x[..., rows, :][..., columns]


@pytest.mark.parametrize("shape", [(40, 33), (16, 50), (9, 12), (1, 40), (3, 2)])
def test_patch_is_a_window_of_the_image_whose_short_sides_are_reflected(shape):
    image = random_bytes(2, *shape)
    patch = denoise.cut_patch(image, 16, gen(7))
    windows = grow(image, 16, 16).unfold(1, 16, 1).unfold(2, 16, 1)  # (2, rows, columns, 16, 16)
    same = (windows == patch[:, None, None]).all(4).all(3).all(0)
    assert patch.shape == (2, 16, 16)
    assert same.sum() >= 1


@pytest.mark.parametrize(("height", "width", "tops", "lefts"), [
    (20, 18, 5, 3), (5, 18, 1, 3), (20, 16, 5, 1)])
def test_every_window_of_an_image_is_drawn_and_none_outside(height, width, tops, lefts):
    rows, columns = torch.arange(height), torch.arange(width)
    image = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))  # each pixel tells its place
    rng = gen()
    patches = [denoise.cut_patch(image, 16, rng) for _ in range(400)]
    corners = {tuple(patch[:, 0, 0].tolist()) for patch in patches}
    assert corners == set(itertools.product(range(tops), range(lefts)))


@pytest.fixture
def steps(monkeypatch):
    """(y, pairs, ramp) of every training step from here on."""
    seen, losses = [], denoise.n2n_losses

    def watched(model, y, pairs, ramp):
        seen.append((y, pairs, ramp))
        return losses(model, y, pairs, ramp)

    monkeypatch.setattr(denoise, "n2n_losses", watched)
    return seen


def test_patch_and_pairs_of_an_image_depend_on_seed_epoch_and_path_alone(steps):
    """So not on the batch, nor on the number of processes, which each make a part of it."""
    for i in range(6):
        save(f"data/{i}.png", picture(i, 24, 24))

    def drawn(name, *flags):
        """{ramp, which tells the epoch: patches and pairs of its images, sorted}."""
        steps.clear()
        train("data", name, "--epochs", "2", *flags)
        epochs = {}
        for y, pairs, ramp in steps:
            epochs.setdefault(ramp, []).extend(zip(y.tolist(), pairs.tolist(), strict=True))
        return {ramp: sorted(images) for ramp, images in epochs.items()}

    alone = drawn("1", "--batch_size", "1")
    assert alone == drawn("again", "--batch_size", "1")
    assert alone == drawn("3", "--batch_size", "3")
    other = drawn("other", "--seed", "1")
    everything = [*alone[1.0], *alone[2.0], *other[1.0], *other[2.0]]
    places = [pairs for _, pairs in everything]
    assert len(places) == 24
    assert all(places.count(pairs) == 1 for pairs in places)


# ==== application =================================================================================
def wild(channels, depth):
    """A U-Net of random weights, its answers spread over the grey levels."""
    torch.manual_seed(1)
    model = denoise.UNet(channels, 4, depth, init_scale=1.0).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.05)
    last = model.nin_c
    with torch.no_grad():
        y = model(torch.rand(1, channels, 128, 128))
        std, mean = torch.std_mean(y, (0, 2, 3))
        last.weight *= 0.2 / std[:, None, None, None]
        last.bias.copy_(0.5 + (last.bias - mean) * 0.2 / std)
    return model


@torch.no_grad()
def answer(model, x):
    """What the model says to uint8 or uint16 images (B, C, H, W), in grey levels, not rounded."""
    white = {torch.uint8: 255, torch.uint16: 65535}[x.dtype]
    H, W = x.shape[2:]
    cell = 2**model.depth
    grown = grow(x, math.ceil(H / cell) * cell, math.ceil(W / cell) * cell)
    return white * model(grown / white)[:, :, :H, :W].clamp(0, 1)


def assert_rounded(got, exact, dtype=torch.uint8):
    """`got` is `exact` rounded, whichever way a tie was broken; of 16 bits the last is the network's rounding."""
    assert exact.std() > 3  # an answer worth comparing
    assert got.dtype == dtype
    atol = 0.501 if dtype == torch.uint8 else 1
    torch.testing.assert_close(got.float(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(37, 51), (64, 96), (3, 2), (1, 40)])
def test_image_of_any_size_is_reflected_to_a_multiple_of_32_and_keeps_its_size(shape):
    model = wild(3, 5)
    x = random_bytes(2, 3, *shape)
    assert_rounded(denoise.denoise(model, x, CPU), answer(model, x))


def watch(model):
    """The shapes of what goes through the model from here on."""
    shapes = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


def test_strips_agree_with_the_whole_image_everywhere():
    model = wild(3, 5)
    x = random_bytes(1, 3, 700, 70)
    exact = answer(model, x)
    shapes = watch(model)
    assert_rounded(denoise.denoise(model, x, CPU), exact)
    assert shapes == [(1, 3, 704, 96)]
    for tile, strips in ((32, 22), (256, 3)):
        shapes.clear()
        assert_rounded(denoise.denoise(model, x, CPU, tile=tile), exact)
        assert len(shapes) == strips
        for _, _, rows, columns in shapes:
            assert rows <= tile + 2 * denoise.MARGIN  # this bounds the memory
            assert columns == 96


def test_images_of_equal_size_go_through_together_and_come_back_in_their_order():
    sizes = [(32, 40), (17, 23), (32, 40), (30, 9), (17, 23), (40, 32)]
    images = [random_bytes(3, *size, seed=k) for k, size in enumerate(sizes)]
    model = wild(3, 2)
    exact = [answer(model, x[None]) for x in images]
    shapes = watch(model)
    results = denoise.denoise_list(model, images, CPU)
    assert sorted(shape[0] for shape in shapes) == [1, 1, 2, 2]
    for got, expected in zip(results, exact, strict=True):
        assert_rounded(got[None], expected)


def assert_copy(data, spec, out, model, dtype=torch.uint8):
    """The images in `out` are what the model says to those in `data`."""
    splits = [s for s in ("train", "val") if (data / s).is_dir()]
    for split in splits or ["train"]:
        folder = common.Folder(data, split, spec, denoised=out)
        for i in range(len(folder)):
            noisy = folder.read(i)[None]
            assert_rounded(folder.read(i, "denoised")[None], answer(model, noisy), dtype)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_plain_weights_of_neighbor2neighbor_are_a_denoiser(denoised, prefix):
    data, _, _ = denoised
    model = wild(3, 3)
    weights = {prefix + name: p for name, p in model.state_dict().items()}
    torch.save(weights, "FILE.pth")
    loaded, noise = denoise.load_denoiser("FILE.pth", CPU)
    same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert not loaded.training
    assert loaded.stride == (1, 1)
    assert noise == {}  # nobody knows it
    assert apply(data, "FILE.pth", "out", *NOISE) == 0
    assert_copy(data, "gauss50", "out", model)


@pytest.mark.parametrize(("content", "reason"), [
    ({"weight": torch.ones(2)}, "is no denoiser"),
    ({"enc_conv0.weight": torch.ones(4, 3, 3, 3)}, "is no denoiser"),
    ({"enc_conv0.weight": torch.ones(4)}, "is no denoiser"),
    ({1: torch.ones(2)}, "is no denoiser"),
    ({"model": torch.ones(2)}, "is no denoiser"),
    ([torch.ones(2)], "holds no weights"),
])
def test_file_that_is_no_denoiser_is_refused_in_one_line(capsys, content, reason):
    torch.save(content, "FILE.pth")
    error = refused(capsys, denoise.load_denoiser, "FILE.pth", CPU)
    assert "FILE.pth: " in error
    assert reason in error


# ==== correlated noise ============================================================================
def blur(noise, axes):
    """Noise (H, W, C) blurred by (1, 2, 1) / 4 along these axes: correlation 2/3, 1/6 and 0."""
    for axis in axes:
        noise = (np.roll(noise, 1, axis) + 2 * noise + np.roll(noise, -1, axis)) / 4
    return noise


def noisy(seed, sigma, axes=(), height=256, width=256):
    """uint8 (H, W, 1): a smooth picture, on its right half with coarse texture, and noise."""
    rng = np.random.default_rng(seed)
    x = 64 + picture(seed, height, width, 1, 128, float)
    texture = rng.normal(0, 40, (height // 4, width // 8, 1))
    x[:, width // 2:] += texture.repeat(4, 0).repeat(4, 1)
    x += blur(rng.normal(0, sigma, x.shape), axes)
    return x.round().clip(0, 255).astype(np.uint8)


def measured(*images):
    """measure_noise of a folder with these images."""
    for i, x in enumerate(images):
        save(f"measured/{i}.png", x)
    return denoise.measure_noise(common.Folder("measured"))


BLURRED = [2 / 3, 1 / 6, 0, 0, 0, 0]
WHITE = [0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("axes", "down", "across", "chosen"), [
    ((), WHITE, WHITE, "1,1"), ((0,), BLURRED, WHITE, "3,1"),
    ((1,), WHITE, BLURRED, "1,3"), ((0, 1), BLURRED, BLURRED, "3,3")])
def test_noise_is_measured_along_each_axis_on_smooth_and_textured_content(axes, down, across, chosen, capsys):
    found = measured(*(noisy(seed, 50, axes) for seed in range(6)))
    assert found["down"] == pytest.approx(down, abs=0.04)
    assert found["across"] == pytest.approx(across, abs=0.04)
    assert denoise.settle_stride("auto", found) == chosen
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.endswith(f"; stride {chosen}\n")


@pytest.mark.parametrize("axes", [(), (1,), (0, 1)])
def test_share_is_that_of_the_noise_in_the_flattest_parts(axes):
    """So at most its share of the variance, and not much less; whatever its correlation."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(60, 195, 256)[None, :, None]
    noise = blur(rng.normal(0, 20, (256, 256, 1)), axes)
    x = (ramp + noise).round().astype(np.uint8)
    share = noise.var() / x.var()
    assert 0.5 * share < measured(x)["share"] < share


def test_clipped_parts_do_not_count():
    """A border that is black without any noise, as in magnetic resonance."""
    x = noisy(0, 50, (1,), 256, 128)
    black = np.pad(x, [(64, 64), (100, 100), (0, 0)])
    assert measured(black)["across"] == pytest.approx(BLURRED, abs=0.1)


@pytest.mark.parametrize("seed", range(8))
def test_white_noise_on_a_few_small_images_gets_no_stride(seed):
    """A small sample looks correlated by chance."""
    rng = np.random.default_rng(seed)
    found = measured(*rng.integers(0, 256, (3, 32, 32, 1), np.uint8))
    assert max(map(abs, found["down"] + found["across"])) > 0.1
    assert denoise.settle_stride("auto", found) == "1,1"


@pytest.mark.parametrize("axes", [(), (1,)])
def test_nearly_clean_images_get_no_stride_and_a_word(axes, capsys):
    found = measured(*(noisy(seed, 2, axes) for seed in range(3)))
    assert found["across"][0] > 0.3 or not axes
    assert denoise.settle_stride("auto", found) == "1,1"
    assert "there is little noise to remove; stride 1,1" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(31, 200, 1), (200, 31, 1), (1, 1, 1)])
def test_small_images_are_not_measured(shape, capsys):
    found = measured(noisy(0, 50, (1,))[:shape[0], :shape[1]])
    assert found is None
    assert denoise.settle_stride("auto", found) == "1,1"
    assert "not measured" in capsys.readouterr().out


def test_constant_images_are_not_measured():
    assert measured(np.full((64, 64, 3), 7, np.uint8)) is None


@pytest.mark.parametrize(("correlation", "stride", "gone"), [
    ([0, 0, 0, 0, 0, 0], 1, True),
    ([0.46, 0.07, 0, 0, 0, 0], 2, True),  # radar
    ([0.67, 0.36, 0.07, 0, 0, 0], 3, True),  # sonar
    ([-0.4, 0, 0, 0, 0, 0], 2, True),  # sharpened
    ([0, 0.5, 0, 0.4, 0, 0.3], 5, True),  # lag 3 by itself would do, lag 6 does not
    ([0.9, 0.8, 0.6, 0.5, 0.3, 0.2], 6, False),  # the longest helps most
    ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5], 1, False),  # stripes: none helps
])
def test_stride_is_the_smallest_at_whose_multiples_the_correlation_is_gone(correlation, stride, gone, capsys):
    noise = {"down": correlation, "across": WHITE, "share": 0.5, "error": 0.0}
    assert denoise.choose_stride(correlation, 0.0) == (stride, gone)
    assert denoise.settle_stride("auto", noise) == f"{stride},1"
    assert ("will stay" in capsys.readouterr().out) == (not gone)


def test_given_stride_wins_over_the_measured_one():
    noise = {"down": BLURRED, "across": BLURRED, "share": 0.5, "error": 0.0}
    assert denoise.settle_stride("2,1", noise) == "2,1"


def places(height, width):
    """(2, H, W): each pixel tells its row and column."""
    return torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))


@pytest.mark.parametrize(("stride", "kinds"), [((2, 3), 6), ((1, 3), 3), ((9, 2), 10)])
def test_every_sub_lattice_is_drawn(stride, kinds):
    rng, seen = gen(), set()
    for _ in range(200):
        rows, columns = denoise.draw_lattice(places(5, 8), stride, rng)
        top, left = rows[0, 0].item(), columns[0, 0].item()
        same(rows[:, 0], torch.arange(top, 5, stride[0]))
        same(columns[0], torch.arange(left, 8, stride[1]))
        seen.add((top, left))
    assert len(seen) == kinds


def test_stride_of_1_is_the_image_itself_and_draws_nothing():
    rng, x = gen(), random_bytes(3, 5, 8)
    same(denoise.draw_lattice(x, (1, 1), rng), x)
    assert torch.equal(rng.get_state(), gen().get_state())


@pytest.mark.parametrize("stride", [(1, 3), (3, 2), (4, 4)])
@pytest.mark.parametrize("shape", [(37, 51), (96, 64), (3, 2), (1, 40)])
def test_each_sub_lattice_goes_through_by_itself_and_back_to_its_pixels(shape, stride):
    model = wild(3, 3)
    x = random_bytes(2, 3, *shape)
    expected = torch.empty(2, 3, *shape)
    for top, left in itertools.product(range(min(stride[0], shape[0])), range(min(stride[1], shape[1]))):
        step = np.s_[:, :, top::stride[0], left::stride[1]]
        expected[step] = answer(model, x[step])
    model.stride = stride
    assert_rounded(denoise.denoise(model, x, CPU, tile=32), expected)


@pytest.mark.parametrize(("stride", "expected"), [((1, 1), 1 / 3), ((1, 3), 0)])
def test_the_two_sub_images_of_a_sub_lattice_share_no_noise(stride, expected):
    """Half of the pairs lie side by side, where neighbours share 2/3 of this noise, half do not."""
    noise = blur(np.random.default_rng(0).normal(0, 1, (300, 900, 1)), (1,))
    rng = gen()
    patch = denoise.draw_lattice(torch.from_numpy(noise[:, :, 0])[None], stride, rng)
    patch = denoise.cut_patch(patch, 300, rng)
    g1, g2 = denoise.neighbors(patch[None], denoise.draw_pairs(300, 300, rng)[None])
    shared = torch.corrcoef(torch.stack([g1.flatten(), g2.flatten()]))[0, 1]
    assert shared.item() == pytest.approx(expected, abs=0.03)


# ==== quality =====================================================================================
def test_psnr_of_known_errors():
    a = torch.full((3, 4, 5), 0.5)
    assert denoise.psnr(a, a) == 100
    assert denoise.psnr(a, a + 0.1) == pytest.approx(20, abs=1e-5)
    half_wrong = denoise.psnr(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert half_wrong == pytest.approx(3.0103, abs=1e-4)


def test_autocorrelation_is_0_for_white_noise_and_high_for_resized_noise():
    white = torch.randn(3, 200, 200, generator=gen(), dtype=torch.double)
    offset = torch.tensor([1.0, 5.0, 9.0]).view(3, 1, 1)  # of a channel: no correlation
    four_deviations = 4 / math.sqrt(2 * white.numel())
    assert denoise.autocorrelation(white + offset) == pytest.approx(0, abs=four_deviations)
    # each value doubled: half of the neighbours are equal, half independent
    rows = white.repeat_interleave(2, 1)
    columns = white.repeat_interleave(2, 2)
    both = rows.repeat_interleave(2, 2)
    smooth = F.avg_pool2d(white, 2, stride=1)
    for x, expected in ((rows, 0.25), (columns, 0.25), (both, 0.5), (smooth, 0.5)):
        assert denoise.autocorrelation(x) == pytest.approx(expected, abs=0.02)


def test_autocorrelation_of_one_row_is_0():
    assert denoise.autocorrelation(torch.rand(1, 1, 9)) == 0


def clipped_mean(x):
    """E[clip(x + n, 0, 1)] for n ~ N(0, 1)."""
    normal = torch.distributions.Normal(0.0, 1.0)
    low, high = -x, 1 - x  # n between them is not clipped
    density = normal.log_prob(low).exp() - normal.log_prob(high).exp()
    inside = normal.cdf(high) - normal.cdf(low)
    above = normal.cdf(-high)
    return density + x * inside + above


def test_expected_noisy_is_the_mean_of_clipped_noise():
    x = torch.linspace(0, 1, 256).view(1, 16, 16)
    exact = clipped_mean(x)
    assert exact.min().item() == pytest.approx(0.3156, abs=1e-4)
    assert exact.max().item() == pytest.approx(0.6844, abs=1e-4)
    error = denoise.expected_noisy(x, "gauss255", "a.png") - exact
    deviation = 0.45 / math.sqrt(8192)  # of a mean of so many draws, at most
    assert error.abs().max() < 4.5 * deviation
    assert error.mean().abs() < 4 * deviation / 16


@pytest.mark.parametrize("spec", ["gauss50-100", "camera5-30,5-100"])
def test_expected_noisy_uses_the_levels_drawn_for_the_image(spec):
    x = torch.linspace(0, 1, 9).view(1, 3, 3)
    name, _ = common.parse_noise(spec)
    means = []
    for key in ("a.png", "b.png"):
        _, levels, _ = common.noise_draw(spec, key, 3)
        fixed = name + ",".join(map(str, levels))
        means.append(denoise.expected_noisy(x, spec, key, 3))
        same(means[-1], denoise.expected_noisy(x, fixed, key))
        deviation = levels[-1] / 255  # of the Gaussian part, the only one where it is black
        black = deviation / math.sqrt(2 * math.pi)  # E[max(0, n)]
        assert means[-1].min().item() == pytest.approx(black, rel=0.06)
    assert not torch.equal(*means)


class Half(nn.Module):
    """Answers 128/255 everywhere."""

    depth, stride = 1, (1, 1)

    def forward(self, x):
        return torch.full_like(x, 128 / 255)


def measure(data, spec):
    return denoise.quality(Half(), common.Folder(data, spec=spec), CPU)


def test_quality_is_measured_against_clean_and_against_the_expectation():
    for i in range(3):
        save(f"data/{i}.png", np.full((64, 64, 1), 128, np.uint8))
    q = measure("data", "gauss25")
    assert q["noisy_clean"] == pytest.approx(20.17, abs=0.15)  # -20 log10(25 / 255)
    assert q["noisy_expected"] == pytest.approx(q["noisy_clean"], abs=0.05)  # no clipping here
    assert q["denoised_clean"] == 100
    assert q["denoised_expected"] > 50
    assert q["autocorrelation"] == pytest.approx(0, abs=0.03)
    assert list(measure("data", "none")) == ["autocorrelation"]


@pytest.mark.parametrize(("reach", "stride", "warned"), [
    (1, (1, 1), False), (2, (1, 1), True), (2, (2, 2), False), (4, (2, 2), True)])
def test_noise_that_is_correlated_farther_than_the_stride_is_warned_of(capsys, reach, stride, warned):
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 1), dtype=np.uint8)
    noise = noise.repeat(reach, 0).repeat(reach, 1)
    save("data/1.png", noise)
    model = Half()
    model.stride = stride
    measured = denoise.quality(model, common.Folder("data"), CPU)
    denoise.report(measured, "train")
    assert ("correlated" in capsys.readouterr().err) == warned


# ==== train =======================================================================================
SHAPES = {
    "train/a/1.png": (24, 24),
    "train/a/deep/2.bmp": (30, 20),
    "train/b/1.png": (24, 24),
    "train/b/3.tif": (37, 51),
    **{f"train/c/{i}.png": (24, 24) for i in range(7)},
    "val/a/1.png": (24, 24),
    "val/b/4.png": (9, 70),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(data, a denoiser trained on it): 4 epochs of 5 steps."""
    root = tmp_path_factory.mktemp("trained")
    data, denoiser = root / "data", root / "denoiser"
    for k, (path, shape) in enumerate(SHAPES.items()):
        save(data / path, picture(k, *shape))
    assert train(data, denoiser, *RUN) == 0
    return data, denoiser


def checkpoint(folder):
    return common.load_checkpoint(f"{folder}/checkpoint.pth")


def column(folder, name):
    """One value of every line of log.jsonl."""
    return [line[name] for line in common.read_log(f"{folder}/log.jsonl")]


def files(root):
    """{relative path: time of its last change}."""
    found = {}
    for path in Path(root).rglob("*.*"):
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path.stat().st_mtime_ns
    return found


def changes(root, before):
    """Files that changed; none may have come or gone."""
    after = files(root)
    assert set(after) == set(before)
    return [path for path in after if after[path] != before[path]]


def test_denoiser_comes_near_the_local_mean_on_images_of_known_answer():
    levels = np.random.default_rng(0).uniform(0.35, 0.65, 96)
    for i, level in enumerate(levels):
        save(f"data/{i}.png", np.full((16, 16, 1), round(255 * level), np.uint8))
    train("data", "out", "--noise", "gauss60", "--epochs", "60", "--batch_size", "8",
          "--lr", "0.005", "--width", "8", "--log_steps", "50", "--patch", "8",
          "--init_scale", "0.1")
    q = common.read_json("out/quality.json")
    gain = q["denoised_clean"] - q["noisy_clean"]
    assert gain > 8.4  # that of the mean grey level of all images
    assert gain > 10 * math.log10(9)  # that of the mean of 3 x 3 pixels


def test_ramp_rises_to_2_and_the_rate_is_halved_at_each_fifth(steps):
    save("data/1.png", picture(0, 16, 16))
    train("data", "out", "--epochs", "10", "--lr", "0.001")
    ramps = [ramp for _, _, ramp in steps]
    assert ramps == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
    rates = [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4, 1.25e-4, 1.25e-4, 6.25e-5, 6.25e-5]
    assert column("out", "lr") == pytest.approx(rates, rel=1e-5)
    group, = checkpoint("out")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(6.25e-5)
    assert group["betas"] == (0.9, 0.999)


def test_total_is_the_sum_of_both_terms(trained):
    _, denoiser = trained
    first = np.array(column(denoiser, "reconstruction"))
    second = np.array(column(denoiser, "regulariser"))
    assert second.min() > 0
    assert column(denoiser, "total") == pytest.approx(first + second, rel=1e-4)


@pytest.mark.parametrize(("subset", "used"), [
    ("4", [0, 3, 6, 9]), ("3", [0, 4, 9]), ("0", range(10)), ("99", range(10))])
def test_subset_is_spread_evenly_over_the_sorted_images(steps, subset, used):
    for i in range(10):
        save(f"data/{i}.png", np.full((16, 16, 1), i, np.uint8))
    train("data", "out", "--epochs", "2", "--batch_size", "1", "--subset", subset)
    seen = [round(255 * y.mean().item()) for y, _, _ in steps]
    assert sorted(seen[:len(used)]) == list(used)  # each once an epoch
    assert sorted(seen[len(used):]) == list(used)


def test_finished_training_is_not_repeated(trained, capsys):
    data, denoiser = trained
    before = files(denoiser)
    assert train(data, denoiser, *RUN) == 0
    assert "complete, nothing to do" in capsys.readouterr().out
    assert files(denoiser) == before


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


def start(data, out, *script):
    """Train in another process, by this script."""
    command = [sys.executable, *script, "train", "--data", data, "--out", out, *SMALL, *RUN]
    return subprocess.run(command, env=ENV, capture_output=True, text=True)


def test_run_that_a_signal_stopped_goes_on_to_the_same_bits(trained):
    data, denoiser = trained
    stopped = start(data, "out", "-c", STOP)
    assert stopped.returncode == 75, stopped.stderr
    half = checkpoint("out")
    assert half["position"][:2] == (1, 3)  # in the middle of an epoch
    assert train(data, "out", *RUN) == 0
    whole, resumed = checkpoint(denoiser), checkpoint("out")
    assert whole["position"][:2] == resumed["position"][:2] == (4, 0)
    same(whole["model"], resumed["model"])
    same(whole["optimizer"]["state"], resumed["optimizer"]["state"])
    assert not torch.equal(whole["model"]["nin_c.weight"], half["model"]["nin_c.weight"])
    assert column("out", "step") == list(range(1, 21))
    for name in ("step", "epoch", "total"):
        assert column(denoiser, name) == column("out", name)


def test_two_processes_give_the_losses_of_one(trained):
    data, denoiser = trained
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = start(data, "out", *torchrun, ROOT / "denoise.py")
    assert done.returncode == 0, done.stderr
    assert column("out", "step") == list(range(1, 21))
    for name in ("total", "reconstruction", "regulariser"):
        assert column("out", name) == pytest.approx(column(denoiser, name), rel=1e-4)


# ==== apply =======================================================================================
def scramble(denoiser, out):
    """A denoiser like `denoiser` of random weights, in the folder `out`. (Training this short gives
    nearly black pictures.)"""
    like, _ = denoise.load_denoiser(denoiser, CPU)
    model = wild(like.enc_conv0.in_channels, like.depth)
    state = {**checkpoint(denoiser), "model": model.state_dict()}
    common.save_checkpoint(f"{out}/checkpoint.pth", state)
    return model


@pytest.fixture(scope="module")
def denoised(trained, tmp_path_factory):
    """(data, denoiser of random weights, the copy that it made)."""
    data, like = trained
    root = tmp_path_factory.mktemp("denoised")
    denoiser, out = root / "denoiser", root / "out"
    scramble(like, denoiser)
    assert apply(data, denoiser, out, *NOISE) == 0
    return data, denoiser, out


def test_denoised_copy_has_the_same_paths_and_what_the_denoiser_says(denoised):
    data, denoiser, out = denoised
    expected = {Path(path).with_suffix(".png").as_posix() for path in SHAPES}
    assert set(files(out)) == expected | {"made_by.json"}
    model, noise = denoise.load_denoiser(denoiser, CPU)
    assert noise == {"noise": "gauss50", "noise_seed": 0, "range": []}
    assert model.depth == 3
    assert_copy(data, "gauss50", out, model)


@pytest.fixture(scope="module")
def strided(tmp_path_factory):
    """(data with correlated noise, a denoiser whose stride was measured)."""
    root = tmp_path_factory.mktemp("strided")
    data, denoiser = root / "data", root / "denoiser"
    for i in range(6):
        save(data / f"{i}.png", noisy(i, 50, (1,), 64, 96))
    assert train(data, denoiser, "--epochs", "4") == 0
    return data, denoiser


def test_stride_and_measurement_are_stored_with_the_denoiser(strided):
    _, denoiser = strided
    config = common.read_json(f"{denoiser}/config.json")
    assert config["stride"] == checkpoint(denoiser)["config"]["stride"] == "1,3"
    assert config["noise_measured"]["across"][0] > 0.5
    model, _ = denoise.load_denoiser(denoiser, CPU)
    assert model.stride == (1, 3)


def test_training_patches_are_windows_of_sub_lattices(strided, steps):
    data, _ = strided
    train(data, "out", "--epochs", "1")
    windows = []
    for path in sorted(data.iterdir()):
        x = torch.from_numpy(common.read_image(path)[:, :, 0])  # (64, 96)
        lattices = torch.stack([x[:, k::3] for k in range(3)])
        windows.append(lattices.unfold(1, 16, 1).unfold(2, 16, 1))
    windows = torch.stack(windows)  # (images, 3, rows, columns, 16, 16)
    patches = torch.cat([y for y, _, _ in steps])
    lattices = set()
    for patch in (255 * patches).round().to(torch.uint8):
        found = (windows == patch[0]).all(5).all(4).nonzero()
        assert len(found) == 1
        lattices.add(found[0, 1].item())
    assert len(patches) == 6
    assert len(lattices) > 1


def test_run_goes_on_with_the_stride_of_its_checkpoint(strided, capsys, monkeypatch):
    """Whatever would be measured now; a stride that differs is refused."""
    data, denoiser = strided
    shutil.copytree(denoiser, "out")
    Path("out/quality.json").unlink()
    error = refused(capsys, train, data, "out", "--epochs", "4", "--stride", "1,2")
    assert "--stride 1,3 (now 1,2)" in error
    monkeypatch.setattr(denoise, "measure_noise", lambda folder: None)
    assert train(data, "out", "--epochs", "4") == 0
    assert "stride 1,3" in capsys.readouterr().out
    assert Path("out/quality.json").exists()


def test_checkpoint_of_an_earlier_version_has_stride_1(trained, capsys):
    data, denoiser = trained
    state = checkpoint(denoiser)
    assert state["config"].pop("stride") == "1,1"
    common.save_checkpoint("out/checkpoint.pth", state)
    assert train(data, "out", *RUN) == 0
    model, _ = denoise.load_denoiser("out", CPU)
    assert model.stride == (1, 1)


@pytest.mark.parametrize("stride", ["3", "0,1", "1,0", "1,2,3", "a,b", "1, 2", "-1,1", ""])
def test_stride_that_is_none_is_refused(capsys, stride):
    error = refused(capsys, main, "train", "--data", "d", "--out", "o", f"--stride={stride}")
    assert f"--stride {stride}: use auto, or two whole numbers" in error


def test_stride_larger_than_the_images_is_refused(trained, capsys):
    data, _ = trained
    error = refused(capsys, train, data, "out", "--stride", "1,25")
    assert "--stride: is larger than most images" in error
    assert not Path("out").exists()


def test_two_processes_choose_the_stride_of_one(strided):
    data, denoiser = strided
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "denoise.py"]
    command = [sys.executable, *torchrun, "train", "--data", data, "--out", "out", *SMALL, "--epochs", "4"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stride 1,3") == 1
    assert column("out", "total") == pytest.approx(column(denoiser, "total"), rel=1e-4)


def test_denoised_copy_is_made_with_the_denoisers_stride(strided):
    data, like = strided
    model = scramble(like, "denoiser")
    apply(data, "denoiser", "out")
    folder = common.Folder(data, denoised="out")
    for i in range(len(folder)):
        x = folder.read(i)[None]
        for k in range(3):
            got = folder.read(i, "denoised")[None][..., k::3]
            assert_rounded(got, answer(model, x[..., k::3]))


def test_finished_files_are_skipped_and_a_deleted_one_is_made_again(denoised):
    data, denoiser, out = denoised
    before, victim = files(out), out / "train/b/3.png"
    content = victim.read_bytes()
    apply(data, denoiser, out, *NOISE)
    assert files(out) == before
    victim.unlink()
    apply(data, denoiser, out, *NOISE)
    assert changes(out, before) == ["train/b/3.png"]
    assert victim.read_bytes() == content


def test_process_that_starts_late_leaves_out_no_image(denoised, monkeypatch):
    """Each process looks for what is already made on its own, and others may have made some."""
    data, denoiser, out = denoised
    monkeypatch.setattr(common, "all_reduce", lambda x: x)
    monkeypatch.setattr(common, "world", lambda: (0, 2))
    assert apply(data, denoiser, "out", *NOISE) == 0
    by_one = files("out")
    monkeypatch.setattr(common, "world", lambda: (1, 2))
    assert apply(data, denoiser, "out", *NOISE) == 0
    assert set(by_one) < set(files("out")) == set(files(out))
    for path in by_one:
        assert Path("out", path).read_bytes() == (out / path).read_bytes()


def test_process_that_looks_between_the_first_ones_note_and_its_images_refuses_nothing(denoised, monkeypatch):
    """The first process alone judges --out; the others wait until it has, before they write."""
    data, denoiser, out = denoised
    one = next(path for path in files(out) if path != "made_by.json")
    Path("out", one).parent.mkdir(parents=True)
    waited = []

    def wait(x):
        waited.append(len(files("out")))
        return x

    shutil.copy(out / one, Path("out", one))  # of the first process, whose note this one has missed
    monkeypatch.setattr(common, "all_reduce", wait)
    monkeypatch.setattr(common, "world", lambda: (1, 2))
    assert apply(data, denoiser, "out", *NOISE) == 0
    assert waited[0] == 1
    assert len(files("out")) > 1


def test_missing_image_is_made_again_in_the_chunk_of_a_whole_copy(denoised, monkeypatch):
    """The same images together: no result may depend on what an interrupted copy had made."""
    data, denoiser, _ = denoised
    chunks, denoise_list = [], denoise.denoise_list

    def watched(model, images, *args):
        chunks.append([x.tolist() for x in images])
        return denoise_list(model, images, *args)

    monkeypatch.setattr(denoise, "denoise_list", watched)
    assert apply(data, denoiser, "out", *NOISE) == 0
    assert [len(chunk) for chunk in chunks] == [4, 4, 3, 2]  # train, then val
    second, before = chunks[1], files("out")
    Path("out/train/c/1.png").unlink()
    chunks.clear()
    assert apply(data, denoiser, "out", *NOISE) == 0
    assert chunks == [second]
    assert changes("out", before) == ["train/c/1.png"]


def test_foreign_images_are_never_taken_for_denoised_ones(denoised, capsys):
    data, denoiser, _ = denoised
    save("out/train/a/1.png", picture(0, 16, 16))
    error = refused(capsys, apply, data, denoiser, "out", *NOISE)
    assert "images that apply did not make, train/a/1.png first" in error
    assert list(files("out")) == ["train/a/1.png"]


@pytest.mark.parametrize("out", ["", "val", "train/denoised"])
def test_denoised_images_never_go_among_the_noisy_ones(denoised, out, capsys):
    data, denoiser, _ = denoised
    before = files(data)
    error = refused(capsys, apply, data, denoiser, data / out, *NOISE)
    assert "among the noisy images" in error
    assert files(data) == before


def test_copy_made_by_another_denoiser_or_of_other_noise_is_not_mixed(trained, denoised, capsys):
    data, denoiser, out = denoised
    _, other = trained  # of the same settings, other weights
    victim = out / "val/a/1.png"
    content = victim.read_bytes()
    victim.unlink()
    before = files(out)
    error = refused(capsys, apply, data, other, out, *NOISE)
    assert f"{out} holds a run with other settings" in error
    assert "--denoiser" in error
    error = refused(capsys, apply, data, denoiser, out, "--noise", "gauss20")
    assert "--noise gauss50 (now gauss20)" in error
    assert files(out) == before
    assert apply(data, denoiser, out, *NOISE) == 0
    assert victim.read_bytes() == content


def test_other_noise_than_the_denoiser_was_trained_on_is_warned_of(denoised, capsys):
    data, denoiser, _ = denoised
    assert apply(data, denoiser, "out", "--noise", "gauss20") == 0
    assert "was trained with --noise gauss50, now gauss20" in capsys.readouterr().out


def test_two_files_that_differ_in_suffix_only_are_refused(trained, capsys):
    _, denoiser = trained
    save("data/same.png", picture(0, 24, 24))
    save("data/same.bmp", picture(0, 24, 24))
    error = refused(capsys, apply, "data", denoiser, "out")
    assert "same.png" in error
    assert "same.bmp" in error


def test_unfinished_and_unfit_denoisers_are_refused(trained, capsys):
    data, denoiser = trained
    save("grey/1.png", picture(0, 24, 24, 1))
    error = refused(capsys, apply, "grey", denoiser, "out")
    assert "1 channels, not the denoiser's 3" in error
    unfinished = {**checkpoint(denoiser), "position": (3, 0, 1.0)}
    common.save_checkpoint("half/checkpoint.pth", unfinished)
    error = refused(capsys, apply, data, "half", "out")
    assert "half: its training stopped in epoch 3" in error
    error = refused(capsys, apply, data, "nowhere", "out")
    assert "nowhere: no such checkpoint" in error


@pytest.mark.parametrize(("flag", "old", "new"), [
    ("--epochs", 4, 5), ("--subset", 0, 3), ("--ramp", 2.0, 1.0), ("--noise_seed", 0, 1)])
def test_changed_settings_are_refused_on_resume(trained, capsys, flag, old, new):
    data, denoiser = trained
    before = files(denoiser)
    error = refused(capsys, train, data, denoiser, *RUN, flag, new)
    assert f"{flag} {old} (now {new})" in error
    assert files(denoiser) == before


@pytest.mark.parametrize(("command", "flags"), [
    ("apply", denoise.TRAIN_FLAGS | common.TRAINING_FLAGS), ("train", denoise.APPLY_FLAGS)])
def test_flags_of_the_other_command_are_refused(capsys, command, flags):
    for name in flags:
        error = refused(capsys, main, command, "--data", "d", "--out", "o", f"--{name}", "1")
        assert f"unrecognized arguments: --{name} 1" in error


@pytest.mark.parametrize("flag", ["--tile 100", "--amp fp16"])
def test_flags_that_cannot_be_are_refused_before_anything_is_written(trained, capsys, flag):
    error = refused(capsys, apply, *trained, "out", *flag.split())
    assert flag in error
    assert not Path("out").exists()


@pytest.mark.parametrize(("argv", "reason"), [
    ([], "use train or apply"), (["report"], "use train or apply"),
    (["apply", "--data", "d", "--out", "o"], "apply needs --denoiser"),
    (["train", "--data", "d"], "--out is needed"), (["train", "--out", "o"], "--data is needed")])
def test_incomplete_command_lines_say_what_is_missing(argv, reason):
    with pytest.raises(UserError, match=reason):
        main(*argv)


@pytest.mark.parametrize(("channels", "suffix", "top", "dtype", "made"), [
    (1, ".png", 65535, np.uint16, ".png"),
    (5, ".npy", 1, np.float32, ".npy"),
    (2, ".npy", 4095, np.uint16, ".npy"),
])
def test_real_noisy_images_of_any_depth_and_channels_need_no_clean_ones(
        channels, suffix, top, dtype, made):
    rng = np.random.default_rng(0)
    for i in range(2):
        x = picture(i, 24, 20, channels, 0.5 * top, float)
        x += rng.uniform(0, 0.5 * top, x.shape)
        save(f"data/{i}{suffix}", x.astype(dtype))
    train("data", "denoiser", "--epochs", "1")
    quality = common.read_json("denoiser/quality.json")
    assert list(quality) == ["autocorrelation"]
    model = scramble("denoiser", "other")
    apply("data", "other", "out")
    assert set(files("out")) == {"made_by.json", f"0{made}", f"1{made}"}
    assert_copy(Path("data"), "none", "out", model, torch.uint16)
    for path in Path("out").glob("[01].*"):
        assert common.read_image(path).shape == (24, 20, channels)
        assert common.read_image(path).dtype == np.uint16  # as deep as its source
