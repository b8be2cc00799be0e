"""What sub-lattices are worth: a table of PSNR on photographs under noise that is correlated by construction.

    python tests/strides.py --data KODAK --out runs/strides

Gaussian noise of sigma 50, blurred by (1, 2, 1) / 4 across or along both axes, on clean images. A denoiser of
width 24 trains 600 steps on each stride; then it is applied in several ways to 8 of the images. Finished training
is not repeated. results/README.md has the table.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

import common as c
import denoise

STRIDES = {"across": ["1,1", "1,2", "1,3"], "both": ["1,1", "2,2", "3,3"]}
CPU = torch.device("cpu")
TRAINING = ["--preset", "tiny", "--epochs", "100", "--patch", "64", "--device", "cpu", "--workers", "0"]


def blurred(noise, axes):
    """Noise (C, H, W) blurred by (1, 2, 1) / 4 across, or along both axes; reflected at the border."""
    for axis in (2,) if axes == "across" else (2, 1):
        x = noise.movedim(axis, 2)
        x = F.pad(x, (1, 1), mode="reflect")
        noise = ((x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4).movedim(2, axis)
    return noise


def make_noisy(clean, axes, out):
    """Noisy copies of the images of a Folder, 8-bit PNG. Gives the folder of these."""
    for i, path in enumerate(clean.paths):
        noise = torch.randn(clean.read(i).shape, generator=c.generator(axes, path)) * 50 / 255
        x = (clean.read(i) / 255 + blurred(noise, axes)).clamp(0, 1)
        denoise.write_image(Path(out, path).with_suffix(".png"), c.to_levels(x))
    return c.Folder(out)


def plain(model, noisy):
    return denoise.denoise(model, noisy[None], CPU)[0]


def shifted(model, noisy):
    """Mean of four results: the image moved against the network's poolings by 0 or 3 pixels of a sub-lattice."""
    results = []
    for down in (0, 3 * model.stride[0]):
        for across in (0, 3 * model.stride[1]):
            moved = F.pad(noisy[None].float(), (across, 0, down, 0), mode="reflect").to(torch.uint8)
            results.append(denoise.denoise(model, moved, CPU)[0, :, down:, across:].float())
    return torch.stack(results).mean(0)


def triangle(stride):
    """Weights of linear interpolation between pixels that lie `stride` apart, as a mean: (2 stride - 1,)."""
    distance = torch.arange(1 - stride, stride).abs()
    return (stride - distance) / stride**2


def smoothed(model, noisy):
    """Every sub-lattice interpolated to all pixels, and their mean: the result, smoothed by a triangle."""
    down, across = model.stride
    x = plain(model, noisy)[:, None].float()  # (C, 1, H, W)
    x = F.pad(x, (across - 1, across - 1, down - 1, down - 1), mode="reflect")
    weights = torch.outer(triangle(down), triangle(across))
    return F.conv2d(x, weights[None, None])[:, 0]


def mean_psnr(function, pairs):
    """Mean PSNR in dB of function(noisy) against clean over the pairs (noisy, clean), uint8 (C, H, W)."""
    values = []
    for noisy, clean in pairs:
        values.append(denoise.psnr(function(noisy) / 255, clean / 255))
    return np.mean(values)


def compare(clean, axes, out):
    """Yield (trained on stride, applied with stride, how, PSNR) for one noise."""
    data = out / f"noisy-{axes}"
    noisy = make_noisy(clean, axes, data)
    pairs = [(noisy.read(i), clean.read(i)) for i in clean.spread(8)]
    yield "-", "-", "noisy", mean_psnr(lambda x: x, pairs)
    strides = STRIDES[axes]
    for k, trained in enumerate(strides):
        run = out / f"{axes}-{trained}"
        denoise.main(["train", "--data", str(data), "--out", str(run), "--stride", trained, *TRAINING])
        model, _ = denoise.load_denoiser(run, CPU)
        for applied in strides[:k + 1]:
            model.stride = denoise.parse_stride(applied)
            yield trained, applied, "interleaved", mean_psnr(functools.partial(plain, model), pairs)
        for how in (shifted, smoothed):
            yield trained, applied, how.__name__, mean_psnr(functools.partial(how, model), pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="clean images")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    clean = c.Folder(options.data)
    print("| blur | trained on stride | applied with stride | how | PSNR |\n|---|---|---|---|---|")
    for axes in STRIDES:
        for trained, applied, how, value in compare(clean, axes, options.out):
            print(f"| {axes} | {trained} | {applied} | {how} | {value:.2f} |", flush=True)


if __name__ == "__main__":
    main()
