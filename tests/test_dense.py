"""Masks beside the images, and what patch features are worth: held to plain loops over pixels."""

import numpy as np
import pytest
from PIL import Image

import common
from common import UserError

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
