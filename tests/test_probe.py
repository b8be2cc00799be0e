"""probe.py held to DINOv2's protocol and to its own promises: torch.optim, plain loops, Pillow,
hooks; and the whole stage, report included, on a small folder."""

import copy
import hashlib
import json
import math
import os
import shutil
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
import denoise
import pretrain
import probe
from common import UserError

CPU = torch.device("cpu")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PLAIN = ["--workers", "0", "--device", "cpu", "--amp", "off"]  # float32, whatever the CPU
SIZE = ["--img_size", "32", "--resize", "32"]
QUICK = [*PLAIN, *SIZE, "--iterations", "20"]
NOISE = ["--noise", "gauss50"]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed))


def randint(high, *shape, seed=0):
    return torch.randint(high, shape, generator=gen(seed))


def random_bytes(*shape, seed=0):
    return randint(256, *shape, seed=seed).to(torch.uint8)


@pytest.fixture(autouse=True, scope="module")
def undisturbed():
    """The stages set signal handlers."""
    handlers = {s: signal.getsignal(s) for s in SIGNALS}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Relative paths of a test lie in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def save(path, x):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def call(stage, *argv):
    """Run a stage as its script does; gives the exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["stage.py", *map(str, argv)])
        common.run(stage.main)
    return stopped.value.code


def refused(capsys, *argv):
    """Run probe.py; it must end with exit code 2. Gives the line that it wrote."""
    capsys.readouterr()
    assert call(probe, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# ==== linear heads ================================================================================
X = randn(2, 40, 5, 3)  # two views of 40 images, 5 tokens of width 3
Y = randint(3, 40, seed=1)
KEEP = torch.arange(40).remainder(5).nonzero().flatten()  # 32 of the images


def protocol(**kw):
    return SimpleNamespace(**{"iterations": 30, "batch_size": 16, "seed": 4, **kw})


def test_heads_are_13_rates_times_4_inputs():
    rates = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]
    assert pytest.approx(rates, rel=1e-12) == probe.RATES
    assert len(rates) * len(probe.INPUTS) == 52


@pytest.mark.parametrize(("name", "seen"), [
    ("1 block", [10]), ("1 block + patches", [10, 50]),
    ("4 blocks", [10, 20, 30, 40]), ("4 blocks + patches", [10, 20, 30, 40, 50])])
def test_heads_see_the_class_tokens_of_the_last_blocks_with_and_without_patches(name, seen):
    # class tokens of block -1, -2, -3, -4, the mean patch token
    features = torch.tensor([10.0, 20, 30, 40, 50]).view(1, 5, 1).expand(1, 5, 2)
    tokens = probe.INPUTS[name]
    picking = torch.eye(2 * len(tokens))[:, None]  # one head, a class for each input
    logits = probe.head_logits(features, tokens, picking, torch.zeros(1, 2 * len(tokens)))
    assert logits.flatten().tolist() == [value for value in seen for _ in range(2)]


def test_logits_of_every_head_are_its_own_weights_times_the_features():
    x, tokens = X[0], [0, 4]
    weight, bias = randn(6, 13, 3), randn(13, 3)
    logits = probe.head_logits(x, tokens, weight, bias)
    for k in range(13):
        expected = x[:, tokens].flatten(1) @ weight[:, k] + bias[k]
        torch.testing.assert_close(logits[:, k], expected)


@pytest.fixture
def drawn(monkeypatch):
    """What train_heads draws: (image, view) of every step."""
    seen, randint = [], torch.randint

    def watched(*args, **kw):
        seen.append(randint(*args, **kw))
        return seen[-1]

    monkeypatch.setattr(torch, "randint", watched)
    return seen


def train_alone(x, y, start, rate, steps):
    """(weight, bias) of one head by torch's own SGD and cosine; x (V, N, F), start (F, classes),
    steps: (images, views) of every step."""
    head = torch.nn.Linear(*start.shape)
    head.weight.data = start.T.clone()
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(steps))
    for images, views in steps:
        optimizer.zero_grad()
        logits = head(x[views, images])
        F.cross_entropy(logits, y[images]).backward()
        optimizer.step()
        schedule.step()
    return head.weight.detach().T, head.bias.detach()


@pytest.mark.parametrize("name", probe.INPUTS)
@pytest.mark.parametrize(("batch", "size"), [(16, 16), (100, 32)])  # never larger than the set
def test_heads_trained_together_equal_each_trained_alone_by_torchs_sgd(drawn, name, batch, size):
    tokens, args = probe.INPUTS[name], protocol(batch_size=batch)
    start, zero = probe.train_heads(X, Y, 3, tokens, protocol(iterations=0), KEEP)
    assert start.shape == (3 * len(tokens), 13, 3)
    assert zero.shape == (13, 3)
    drawn.clear()
    weight, bias = probe.train_heads(X, Y, 3, tokens, args, KEEP)
    assert len(drawn) == 30
    assert drawn[0].shape == (2, size)
    steps = [(KEEP[image], view.remainder(2)) for image, view in drawn]
    for k, rate in enumerate(probe.RATES):
        assert torch.equal(start[:, k], start[:, 0])
        alone = train_alone(X[:, :, tokens].flatten(2), Y, start[:, k], rate * size / 256, steps)
        torch.testing.assert_close((weight[:, k], bias[k]), alone, rtol=1e-4, atol=1e-6)
    assert len(bias.unique(dim=0)) == 13


def test_heads_use_all_views_and_all_images_to_train_on(drawn):
    probe.train_heads(X, Y, 3, [0], protocol(iterations=50), KEEP)
    images, views = torch.cat(drawn, 1)
    assert set(images.tolist()) == set(range(32))
    assert set(views.remainder(2).tolist()) == {0, 1}


def test_heads_start_from_normal_weights_of_a_hundredth_which_the_seed_draws():
    def start(seed):
        x = torch.zeros(1, 1, 5, 400)
        args = protocol(iterations=0, seed=seed)
        return probe.train_heads(x, Y[:1], 5, [0], args, torch.tensor([0]))[0][:, 0]

    assert start(1).std().item() == pytest.approx(0.01, rel=0.05)  # as DINOv2's
    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_accuracy_is_the_share_of_right_answers_of_every_head():
    x, y = randn(2100, 5, 3), randint(4, 2100, seed=2)  # more than two chunks
    weight, bias = randn(6, 3, 4), randn(3, 4)
    answers = probe.predict(x, [0, 4], weight, bias)
    for h in range(3):
        right = 0
        for features, label in zip(x, y, strict=True):
            logits = features[[0, 4]].flatten() @ weight[:, h] + bias[h]
            right += int(logits.argmax() == label)
        assert probe.accuracy(answers[:, h], y) == pytest.approx(right / 21)


def test_balanced_accuracy_is_the_mean_of_the_recalls_of_the_classes_that_there_are():
    y = torch.tensor([0] * 6 + [1] * 3 + [3])  # none of class 2
    answers = torch.tensor([0, 0, 0, 0, 0, 2, 1, 0, 3, 3])
    expected = 100 * np.mean([5 / 6, 1 / 3, 1])
    assert probe.balanced_accuracy(answers, y) == pytest.approx(expected)
    always_the_largest = torch.zeros_like(y)
    assert probe.accuracy(always_the_largest, y) == 60
    assert probe.balanced_accuracy(always_the_largest, y) == pytest.approx(100 / 3)


def test_balanced_accuracy_of_classes_of_one_size_is_the_accuracy_to_the_bit():
    y = torch.arange(7).repeat(11)
    for seed in range(50):
        answers = randint(7, 77, seed=seed)
        assert probe.balanced_accuracy(answers, y) == probe.accuracy(answers, y)


def test_hold_out_is_a_tenth_of_every_class_and_reproducible():
    counts = [30, 10, 104, 5, 2, 1]
    y = torch.arange(6).repeat_interleave(torch.tensor(counts))
    y = y[torch.randperm(len(y), generator=gen())]
    held = probe.hold_out(y, 3)
    assert y[held].bincount(minlength=6).tolist() == [3, 1, 10, 1, 1, 0]  # a lone image is kept
    assert torch.equal(held, probe.hold_out(y, 3))
    assert not torch.equal(held, probe.hold_out(y, 4))
    often = sum(probe.hold_out(y, seed).int() for seed in range(300))
    of_first = often[y == 0]  # each image 30 times of 300, within five deviations
    assert of_first.min() > 8
    assert of_first.max() < 58


@pytest.mark.parametrize("seed", [5, 6, 8])  # for which plain accuracy would choose another
def test_head_is_chosen_by_balanced_accuracy_on_the_central_view_of_held_out_images(seed):
    """And trained on the others."""
    y = torch.arange(3).repeat_interleave(torch.tensor([80, 20, 20]))
    centres = 0.3 * randn(3, 5, 3, seed=1)
    x = randn(2, 120, 5, 3) + centres[y]
    args = protocol(seed=seed, iterations=40, batch_size=32)
    held = probe.hold_out(y, seed)
    keep = (~held).nonzero().flatten()
    heads, plain = [], []
    for name, tokens in probe.INPUTS.items():
        weight, bias = probe.train_heads(x, y, 3, tokens, args, keep)
        answers = probe.predict(x[0, held], tokens, weight, bias)
        for k in range(13):
            score = probe.balanced_accuracy(answers[:, k], y[held])
            chosen = {"head": name, "rate": probe.RATES[k], "held_out": score}
            heads.append((chosen, tokens, weight[:, k], bias[k]))
            plain.append(probe.accuracy(answers[:, k], y[held]))
    scores = [chosen["held_out"] for chosen, *_ in heads]
    assert len(set(scores)) > 3
    assert scores.index(max(scores)) != plain.index(max(plain))
    expected, *head = heads[scores.index(max(scores))]  # the first of the best
    (tokens, weight, bias), chosen = probe.linear_probe(x, y, 3, args)
    assert chosen == expected
    torch.testing.assert_close([tokens, weight[:, 0], bias[0]], head)


# ==== k-NN and retrieval ==========================================================================
def cosines(a, b):
    """Cosine similarities (N, M) of the rows of (N, D) and (M, D), in float64."""
    a, b = a.double(), b.double()
    lengths = a.norm(dim=1)[:, None] * b.norm(dim=1)
    return a @ b.T / lengths


def plain_knn(train_x, train_y, x, y, k):
    right = 0
    for similarity, label in zip(cosines(x, train_x).tolist(), y.tolist(), strict=True):
        nearest = sorted(zip(similarity, train_y.tolist(), strict=True), reverse=True)[:k]
        votes = [0.0] * 4
        for s, kind in nearest:
            votes[kind] += math.exp(s / 0.07)
        right += votes.index(max(votes)) == label
    return 100 * right / len(y)


def test_knn_equals_plain_loops():
    assert probe.NEIGHBORS == (10, 20, 100, 200)
    train_y, y = randint(4, 60, seed=1), randint(4, 530, seed=2)  # two chunks
    centres = randn(4, 8, seed=3)
    train_x, x = randn(60, 8) + centres[train_y], randn(530, 8, seed=5) * 3 + centres[y]
    train_x *= 0.5 + torch.rand(60, 1, generator=gen(6))  # lengths must not matter
    neighbors = (1, 10, 20, 200)  # 200: more than there are
    expected = {k: plain_knn(train_x, train_y, x, y, k) for k in neighbors}
    answers = probe.knn(train_x, train_y, x, 4, neighbors)
    assert {k: probe.accuracy(answers[k], y) for k in answers} == pytest.approx(expected)
    assert len(set(expected.values())) >= 3


def plain_map(x, y):
    similarity, values = cosines(x, x), []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        others.sort(key=lambda j: -similarity[i, j].item())  # noqa: B023
        precisions, found = [], 0
        for rank, j in enumerate(others, 1):
            if y[j] == y[i]:
                found += 1
                precisions.append(found / rank)
        if precisions:
            values.append(np.mean(precisions))
    return 100 * np.mean(values)


def plain_retrieval(x, y):
    """Every figure of retrieval by loops over queries and answers, in %."""
    scores = {name: [] for name in ("map", "map_r", "recall1", "recall5", "recall10")}
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        others.sort(key=lambda j: -float(x[i] @ x[j] / (x[i].norm() * x[j].norm())))
        right = [bool(y[j] == y[i]) for j in others]
        if not any(right):
            continue
        precisions = [sum(right[:k]) / k for k in range(1, len(right) + 1)]
        found = sum(right)
        scores["map"].append(sum(p for p, hit in zip(precisions, right, strict=True) if hit) / found)
        first = zip(precisions[:found], right, strict=False)
        scores["map_r"].append(sum(p for p, hit in first if hit) / found)
        for k in (1, 5, 10):
            scores[f"recall{k}"].append(any(right[:k]))
    return {name: 100 * np.mean(values) for name, values in scores.items()}


def test_retrieval_equals_plain_loops_and_leaves_out_queries_without_partner():
    y = torch.arange(4).repeat_interleave(torch.tensor([20, 15, 2, 1]))
    centres = 0.5 * randn(4, 6, seed=1)
    x = randn(38, 6) + centres[y]
    expected = plain_retrieval(x, y)
    assert probe.retrieval(x, y) == pytest.approx(expected)
    assert expected["map"] == pytest.approx(plain_map(x, y))
    assert len({round(value, 6) for value in expected.values()}) == 5
    without = probe.retrieval(x[:37], y[:37])["map"]
    assert without != pytest.approx(expected["map"])  # the last one, alone of its class, is a distractor
    assert probe.retrieval(x[:4], torch.arange(4)) == {}


def test_retrieval_of_two_classes_in_turn_on_a_circle():
    """Of the 599 others, the places of an image's class are known."""
    angle = torch.arange(600, dtype=torch.double) * 2 * math.pi / 600
    angle += 1e-4 * torch.rand(600, generator=gen())
    x, y = torch.stack([angle.cos(), angle.sin()], 1), torch.arange(600) % 2
    # both neighbours are of the other class, the next two of the same one, and so on
    ranks = [rank for rank in range(1, 600) if rank % 4 in (3, 0)]
    precisions = [k / rank for k, rank in enumerate(ranks, 1)]
    found = probe.retrieval(x, y)
    assert found["map"] == pytest.approx(100 * np.mean(precisions), rel=1e-9)
    first = [p for p, rank in zip(precisions, ranks, strict=True) if rank <= 299]
    assert found["map_r"] == pytest.approx(100 * sum(first) / 299, rel=1e-9)
    assert found["recall1"] == 0
    assert found["recall5"] == found["recall10"] == 100


@pytest.mark.parametrize(("spec", "levels", "others"), [
    ("gauss100", [25, 50, 75, 100, 150, 200], []),
    ("speckle0.4", [0.1, 0.2, 0.3, 0.4, 0.6, 0.8], []),
    ("shot3", [12, 6, 4, 3, 2, 1.5], []),
    ("impulse0.6", [0.15, 0.3, 0.45, 0.6, 0.9, 1], []),
    ("camera30,5", [120, 60, 40, 30, 20, 15], [5]),
    ("gauss50-250", [37.5, 75, 112.5, 150, 225, 300], []),
])
def test_sweep_scales_the_strength_of_the_noise(spec, levels, others):
    name, ranges = common.parse_noise(spec)
    specs = probe.sweep_specs(spec)
    assert list(specs) == [0, 0.25, 0.5, 0.75, 1, 1.5, 2]
    assert specs.pop(0) == "none"
    for tested, level in zip(specs.values(), levels, strict=True):
        numbers = [pytest.approx([v, v]) for v in (level, *others)]
        assert common.parse_noise(tested) == (name, numbers)
    if "-" not in spec:
        assert specs[1] == spec


# ==== few labels ==================================================================================
def test_draw_takes_so_many_images_of_every_class_and_all_of_a_smaller_one():
    y = torch.arange(4).repeat_interleave(torch.tensor([30, 12, 3, 1]))
    y = y[torch.randperm(46, generator=gen())]
    picked = probe.draw_shots(y, 5, gen(1))
    assert y[picked].bincount().tolist() == [5, 5, 3, 1]
    assert len(picked.unique()) == 14
    assert torch.equal(picked, probe.draw_shots(y, 5, gen(1)))
    assert set(picked.tolist()) < set(probe.draw_shots(y, 10, gen(1)).tolist())
    often = sum(torch.zeros(46).index_fill(0, probe.draw_shots(y, 5, gen(k)), 1) for k in range(300))
    of_first = often[y == 0]  # each image 50 times of 300, within five deviations
    assert of_first.min() > 18
    assert of_first.max() < 82


def test_logistic_regression_is_the_minimum_of_cross_entropy_and_half_the_squared_weights():
    y = randint(3, 60, seed=1)
    x = randn(60, 8) + randn(3, 8, seed=2)[y]
    weight, bias = probe.logistic_regression(x, y, 3)

    def slope(weight, bias):
        """Largest derivative of the objective, in float64."""
        weight, bias = (p.double().requires_grad_() for p in (weight, bias))
        logits = x.double() @ weight + bias
        loss = -logits.log_softmax(1)[torch.arange(60), y].sum() + (weight**2).sum() / 2
        return max(g.abs().max().item() for g in torch.autograd.grad(loss, (weight, bias)))

    assert slope(torch.zeros(8, 3), torch.zeros(3)) > 10
    assert slope(weight, bias) < 0.01


@pytest.fixture
def clusters():
    """Features and classes of 60 images to train on, and of 40 others, of unequal classes."""
    centres = 1.5 * randn(3, 6)
    y = torch.arange(3).repeat(20)
    val_y = torch.arange(3).repeat_interleave(torch.tensor([25, 10, 5]))
    x = 7 + torch.arange(1, 7) * (centres[y] + randn(60, 6, seed=1))  # not standardised
    val_x = 7 + torch.arange(1, 7) * (centres[val_y] + randn(40, 6, seed=2))
    return x, y, val_x, val_y


def test_few_shots_are_mean_and_deviation_of_ten_draws_of_logistic_regression_and_1_nn(clusters):
    x, y, val_x, val_y = clusters
    few = probe.few_shots(x, y, val_x, val_y, 3, protocol(shots=[2, 5]))
    assert list(few) == ["2", "5"]
    scaled, val_scaled = ((z - x.mean(0)) / x.std(0) for z in (x, val_x))
    for shots, figures in few.items():
        for draw in range(10):
            picked = probe.draw_shots(y, int(shots), common.generator(4, "shots", draw))
            weight, bias = probe.logistic_regression(scaled[picked], y[picked], 3)
            nearest = cosines(val_x, x[picked]).argmax(1)
            answers = {"linear": (val_scaled @ weight + bias).argmax(1), "nn": y[picked][nearest]}
            for name, answer in answers.items():
                assert figures[name]["draws"][draw] == probe.accuracy(answer, val_y)
                balanced = probe.balanced_accuracy(answer, val_y)
                assert figures[f"balanced_{name}"]["draws"][draw] == balanced
        for figure in figures.values():
            assert len(figure["draws"]) == 10
            assert figure["mean"] == pytest.approx(np.mean(figure["draws"]))
            assert figure["std"] == pytest.approx(np.std(figure["draws"], ddof=1))
            assert figure["std"] > 0
    assert few["5"]["linear"]["mean"] > few["2"]["linear"]["mean"] + 3
    assert few["2"]["nn"]["mean"] > 50  # by chance 33


# ==== features on disk ============================================================================
HALF = {"rtol": 2**-11 + 1e-4, "atol": 1e-5}  # what half precision rounds, and as much again as float32


def on_disk(x, dtype=torch.half, split=7):
    """Features of the rows of a tensor, written in parts."""
    features = probe.Features(Path("features"), dtype)
    for part in x.split(split):
        features.append(part)
    return features


def everything(views):
    """(V, N, 5, D) of a list of Features."""
    return torch.stack([x[torch.arange(len(x))] for x in views])


@pytest.mark.parametrize("dtype", [torch.half, torch.float])
def test_features_on_disk_are_the_rows_of_the_tensor_in_any_order_and_as_often(dtype):
    x = randn(40, 5, 3)
    features = on_disk(x.mT.contiguous().mT, dtype)  # in any layout
    assert features.shape == (40, 5, 3)
    assert len(features) == 40
    for images in ([0, 39, 3, 3, 17], [], range(40)):
        got = features[torch.tensor(images, dtype=torch.long)]
        assert got.dtype == torch.float
        assert torch.equal(got, x[list(images)].to(dtype).float())


def test_features_beyond_half_precision_are_its_largest_value():
    x = torch.tensor([[1e5, -1e9, 65504.0, math.inf]])
    assert on_disk(x)[torch.tensor([0])].tolist() == [[65504.0, -65504.0, 65504.0, 65504.0]]


def test_features_have_no_name_and_are_gone_with_their_object():
    features = on_disk(randn(40, 5, 3))
    descriptor = features.file.fileno()
    assert list(Path("features").iterdir()) == []
    assert os.fstat(descriptor).st_size == 40 * 5 * 3 * 2
    del features
    with pytest.raises(OSError):
        os.fstat(descriptor)


class Full:
    """Stands for a file on a disk with room for so many bytes."""
    def __init__(self, room):
        self.room = room

    def write(self, part):
        written = min(len(part), self.room)
        self.room -= written
        if not written:
            raise OSError(28, "No space left on device")
        return written


def test_full_disk_is_one_line_that_names_the_folder_and_what_to_do():
    features = on_disk(randn(4, 5, 3))
    features.file = Full(150)
    features.append(randn(5, 5, 3))
    with pytest.raises(UserError) as error:
        features.append(randn(1, 5, 3))
    assert str(error.value) == ("features: features cannot be written there ([Errno 28] No space left on device); "
                                "free some space, or use another --out")


@pytest.mark.parametrize("name", probe.INPUTS)
def test_heads_trained_from_disk_are_those_trained_from_memory_to_the_bit(name):
    views = [on_disk(view) for view in X]
    x = X.half().float()
    args, tokens = protocol(), probe.INPUTS[name]
    made, expected = (probe.train_heads(z, Y, 3, tokens, args, KEEP) for z in (views, x))
    assert torch.equal(made[0], expected[0])
    assert torch.equal(made[1], expected[1])


@pytest.mark.parametrize("block", [7, 40, 1000])
def test_answers_do_not_depend_on_the_size_of_blocks(monkeypatch, block):
    x, val_x, val_y = X[0].half().float(), randn(30, 5, 3, seed=7), randint(3, 30, seed=8)
    args = protocol(shots=[2, 5])
    head = [0, 4], randn(6, 13, 3), randn(13, 3)
    answers = probe.predict(x, *head)
    few = probe.few_shots(x[:, 0], Y, val_x[:, 0], val_y, 3, args)
    chosen = probe.nearest_tokens(x, Y, 3, 0)
    monkeypatch.setattr(probe, "BLOCK", block)
    features = on_disk(x)
    assert torch.equal(probe.predict(features, *head), answers)
    assert torch.equal(probe.predict(features, *head, images=KEEP), answers[KEEP])
    vectors = probe.Vectors(features, [0])
    assert torch.equal(vectors[:], x[:, 0])
    assert probe.few_shots(vectors, Y, val_x[:, 0], val_y, 3, args) == few
    assert probe.nearest_tokens(features, Y, 3, 0) == chosen


@pytest.mark.parametrize("size", [1, 3, 7, 59, 60, 1000])
def test_most_similar_rows_do_not_depend_on_the_size_of_blocks(size):
    train_x, x = randn(60, 8), randn(530, 8, seed=5) * 3
    best, index = probe.most_similar(train_x, x, 20, size)
    expected, order = cosines(x, train_x).topk(20)
    torch.testing.assert_close(best.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(index, order)


def test_standardiser_is_that_of_the_rows_of_float64():
    x = 100 + randn(3000, 4) * torch.tensor([1.0, 10, 100, 0])  # the last one is constant
    z = probe.standardiser(x)(x)
    torch.testing.assert_close(z[:, :3].mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(z[:, :3].std(0), torch.ones(3), rtol=1e-5, atol=0)
    assert z[:, 3].tolist() == [0.0] * 3000


# ==== features ====================================================================================
@pytest.mark.parametrize(("resize", "size"), [(256, 224), (36, 32), (32, 32)])
@pytest.mark.parametrize(("height", "width"), [
    (300, 450), (450, 300), (128, 256), (64, 64), (20, 30)])  # sides stay whole when resized
def test_central_crop_equals_pillows_resize_of_the_short_side_and_crop(
        resize, size, height, width):
    coarse = random_bytes(height // 4, width // 4, 3).numpy()
    image = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    got = probe.central_crop(x, resize, size).permute(1, 2, 0)
    short = min(height, width)
    new = image.resize((width * resize // short, height * resize // short), Image.BICUBIC)
    left, top = (new.width - size) // 2, (new.height - size) // 2
    expected = np.array(new.crop((left, top, left + size, top + size)))
    error = np.abs(got.numpy().astype(int) - expected)
    assert got.dtype == torch.uint8
    assert got.shape == (size, size, 3)
    assert error.max() <= 2
    assert error.mean() < 0.6


def test_first_view_is_the_central_crop_and_the_others_depend_on_seed_and_path_alone():
    args = SimpleNamespace(seed=1, img_size=32, resize=36)
    x = random_bytes(3, 40, 60)
    views = probe.crop_views(args, x, 3, "a.png")
    assert views.shape == (4, 3, 32, 32)
    assert torch.equal(views[0], probe.central_crop(x, 36, 32))
    assert torch.equal(views, probe.crop_views(args, x, 3, "a.png"))
    assert torch.equal(views[:3], probe.crop_views(args, x, 2, "a.png"))
    args.seed = 2
    other = probe.crop_views(args, x, 3, "a.png")
    another = probe.crop_views(args, x, 3, "b.png")
    everything = torch.cat([views, other[1:], another[1:]])
    assert len(everything.unique(dim=0)) == 10


def test_random_views_are_boxes_of_8_to_100_percent_of_the_image_half_of_them_mirrored(
        monkeypatch):
    boxes, cut = [], common.cut

    def watched(image, box, flip, size):
        boxes.append((box, flip, size))
        return cut(image, box, flip, size)

    monkeypatch.setattr(common, "cut", watched)
    args = SimpleNamespace(seed=0, img_size=32, resize=32)
    probe.crop_views(args, random_bytes(3, 200, 200), 400, "a.png")
    shares = np.array([h * w / 200**2 for (_, _, h, w), _, _ in boxes])
    assert shares.min() == pytest.approx(0.08, abs=0.02)
    assert shares.max() > 0.9
    assert sum(flip for _, flip, _ in boxes) == pytest.approx(200, abs=50)  # five deviations
    assert {size for _, _, size in boxes} == {32}


def small_vit(depth=6):
    torch.manual_seed(depth)
    return common.VisionTransformer(32, 8, 3, 16, depth, 2, init_values=1.0).eval()


def backbone_of(model, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 1.0)):
    Path("weights").write_bytes(b"weights")
    return probe.Backbone(model, mean, std, "weights", CPU, {"pretrain": {}})


def test_features_are_class_tokens_of_the_last_4_blocks_last_first_then_the_mean_patch_token():
    vit, crops = small_vit(), random_bytes(3, 3, 32, 32)
    outputs = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    backbone = backbone_of(vit)
    got = backbone.embed(crops)
    tokens = [vit.norm(x) for x in outputs]
    expected = [tokens[k][:, 0] for k in (5, 4, 3, 2)]
    expected.append(tokens[5][:, 1:].mean(1))
    torch.testing.assert_close(got, torch.stack(expected, 1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 1.0)))
    torch.testing.assert_close(got[:, 0], vit((crops / 255 - mean) / std))
    assert not any(p.requires_grad for p in vit.parameters())


def test_of_a_backbone_of_2_blocks_the_first_is_repeated():
    got = backbone_of(small_vit(2)).embed(random_bytes(3, 3, 32, 32))
    last, first, again, once_more, _ = got.unbind(1)
    assert torch.equal(first, again)
    assert torch.equal(first, once_more)
    assert not torch.equal(last, first)


def test_backbone_is_known_by_the_hash_of_its_file():
    about = backbone_of(small_vit()).about
    assert about == {"pretrain": {}, "backbone": sha256("weights")}


# ==== a file of ViT weights =======================================================================
def probe_args(data, *flags):
    argv = ["--data", data, "--out", "out.json", *QUICK, *flags]
    return probe.read_config([str(v) for v in argv])


def probed(data, *flags):
    return probe.evaluate(probe_args(data, *flags), CPU, {})


@pytest.fixture
def weights():
    """(file, the ViT in it)."""
    vit = small_vit()
    torch.save(vit.state_dict(), "vit.pth")
    return "vit.pth", vit


IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize(("flags", "mean", "std"), [
    ([], *IMAGENET),
    (["--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,1"], [0.1, 0.2, 0.3], [0.4, 0.5, 1.0]),
])
def test_weights_give_the_features_of_the_vit_in_the_file(small, weights, flags, mean, std):
    """By default with ImageNet's normalisation."""
    file, vit = weights
    args = probe_args(small.data, "--weights", file, "--heads", 2, *flags)
    backbone = probe.load_backbone(args, CPU)
    direct = backbone_of(vit, mean, std)
    folder = common.Folder(small.data, "val")
    got, expected = (probe.embed_folder(args, b, CPU, folder, "noisy") for b in (backbone, direct))
    torch.testing.assert_close(everything(got), everything(expected))


def test_result_of_weights_has_every_figure_and_the_hash_of_the_file(small, weights):
    file, _ = weights
    result = probed(small.data, "--weights", file, "--heads", 2, *NOISE)
    assert {"linear", "knn", "map", "clean_linear", "sweep", "cosine"} <= set(result)
    assert result["backbone"] == sha256(file)
    assert "pretrain" not in result


@pytest.mark.parametrize(("flags", "reason"), [
    ([], "give --run"), (["--run", "RUN", "--weights", "FILE"], "give --run"),
    (["--run", "RUN", "--heads", "3"], "a run has its own"),
    (["--run", "RUN", "--mean", "0.5"], "a run has its own"),
    (["--run", "RUN", "--std", "0.5"], "a run has its own"),
    (["--run", "RUN", "--denoiser", "DIR"], "no effect without --denoised"),
    (["--run", "RUN", "--resize", "16"], "--resize 16: must be at least --img_size 32"),
    (["--run", "RUN", "--tile", "32"], "unrecognized arguments: --tile 32"),
    (["--run", "RUN", "--shots", "5,0"], "--shots: must be whole numbers from 1"),
    (["--run", "RUN", "--shots", "2.5"], "--shots: must be whole numbers from 1"),
    (["--run", "RUN", "--shots", "few"], "--shots: invalid floats value: 'few'"),
])
def test_flags_that_contradict_each_other_or_would_do_nothing_are_refused(flags, reason):
    with pytest.raises(UserError, match=reason):
        probe_args("data", *flags)


@pytest.mark.parametrize(("flags", "reason"), [
    ([], "give --heads"), (["--heads", "3"], "3"),
    (["--heads", "2", "--mean", "0.5"], "must have 3 values"),
    (["--heads", "2", "--std", "1,1"], "must have 3 values"),
])
def test_flags_that_do_not_fit_the_weights_are_refused(small, weights, flags, reason):
    file, _ = weights
    with pytest.raises(UserError, match=reason):
        probed(small.data, "--weights", file, *flags)


# ==== the whole stage =============================================================================
CLASSES = ["cat", "dog", "emu"]


def pretrained(data, out, *flags):
    code = call(pretrain, "--data", data, "--out", out, *flags, *PLAIN, "--source", "noisy",
                "--epochs", 1, "--arch", "16,2,2", "--head_hidden", 16, "--head_bottleneck", 8,
                "--prototypes", 16, "--global_size", 32, "--local_size", 16, "--patch_size", 8,
                "--batch_size", 8, "--log_steps", 1)
    assert code == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """data: three classes of 12 + 8 pictures of several sizes; run: pretrained on it, gauss50."""
    root = tmp_path_factory.mktemp("probe")
    data, run = root / "data", root / "run"
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 8)):
        for k, name in enumerate(("dog", "cat", "emu")):
            for i in range(n):
                level = 100 + 28 * k + rng.normal(0, 12)
                x = rng.normal(level, 25, (32 + 2 * (i % 4), 40, 3))
                save(data / split / name / f"{i}.png", x.clip(0, 255).astype(np.uint8))
    pretrained(data, run, *NOISE)
    return SimpleNamespace(data=data, run=run)


@pytest.fixture(scope="module")
def result(small):
    return probed(small.data, "--run", small.run, *NOISE, "--out", small.data.parent / "out.json")


def labels(folder):
    return torch.tensor([CLASSES.index(path.split("/")[1]) for path in folder.paths])


class Stage:
    """The parts of evaluate() by themselves, with the same flags."""

    def __init__(self, small, *flags):
        self.args = probe_args(small.data, "--run", small.run, *flags)
        self.backbone = probe.load_backbone(self.args, CPU)

    def folder(self, split, spec="gauss50"):
        return common.Folder(self.args.data, split, spec, 0, self.args.denoised)

    def embed(self, folder, source="noisy", **kw):
        """Features of the central view (N, 5, D)."""
        return everything(probe.embed_folder(self.args, self.backbone, CPU, folder, source, **kw))[0]

    def accuracy(self, head, folder, source="noisy", **kw):
        """Top-1 on a folder of a head of linear_probe."""
        answers = probe.predict(self.embed(folder, source, **kw), *head)
        return probe.accuracy(answers[:, 0], labels(folder))


def test_features_of_an_image_do_not_depend_on_its_batch(small):
    stage = Stage(small, *NOISE)
    folder = stage.folder("val")
    assert len(np.unique(folder.shapes, axis=0)) == 4
    together = stage.embed(folder)
    for i in (0, 3, 17):
        crop = probe.central_crop(folder.read(i), 32, 32)
        alone = stage.backbone.embed(crop[None])
        torch.testing.assert_close(together[i], alone[0], **HALF)


def test_features_of_views_are_those_of_crop_views_in_the_order_of_the_images(small):
    stage = Stage(small, *NOISE)
    args, folder = stage.args, stage.folder("train")
    assert len(folder) == 36
    got = everything(probe.embed_folder(args, stage.backbone, CPU, folder, "noisy", views=2))
    assert got.shape == (3, 36, 5, 16)
    for i in (0, 35):
        crops = probe.crop_views(args, folder.read(i), 2, folder.paths[i])
        torch.testing.assert_close(got[:, i], stage.backbone.embed(crops), **HALF)


def test_each_image_goes_through_the_backbone_once_per_view_and_test_noise(small, monkeypatch):
    """Heads, few labels, k-NN and retrieval add none; the cosine of patches, which nothing keeps, two of val."""
    seen, embed = [], probe.Backbone.embed

    def watched(self, crops, dense=False):
        seen.append(len(crops))
        return embed(self, crops, dense)

    monkeypatch.setattr(probe.Backbone, "embed", watched)
    probed(small.data, "--run", small.run, "--views", 2, "--shots", "2,5", *NOISE)
    train, val = 36 * 3, 24 * 7  # val under each noise of the sweep, its own among them
    assert sum(seen) == train + val + 24 * 2


def numbers(value):
    """All numbers in nested dicts and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, float) else []


def test_result_holds_every_figure_and_each_is_the_figure_of_its_features(small, result):
    stage = Stage(small, *NOISE)
    train, val = stage.folder("train"), stage.folder("val")
    y, val_y = labels(train), labels(val)
    x = stage.embed(train)
    head, chosen = probe.linear_probe(x[None], y, 3, stage.args)
    assert result["chosen"] == chosen
    for prefix, source in (("", "noisy"), ("clean_", "clean")):
        z = stage.embed(val, source)
        cls = z[:, 0]
        linear = probe.predict(z, *head)[:, 0]
        nearest = probe.knn(x[:, 0], y, cls, 3)
        for figure, value in plain_retrieval(cls, val_y).items():
            assert result[prefix + figure] == pytest.approx(value, rel=1e-3)
        for name, score in (("", probe.accuracy), ("balanced_", probe.balanced_accuracy)):
            assert result[f"{prefix}{name}linear"] == score(linear, val_y)
            of_neighbours = {str(k): score(answers, val_y) for k, answers in nearest.items()}
            assert result[f"{prefix}{name}knn"] == of_neighbours
    assert list(result["knn"]) == ["10", "20", "100", "200"]
    assert result["class_sizes"] == [8, 8]
    assert result["few_shots"] == {}  # without --shots
    assert result["map"] != pytest.approx(result["clean_map"], rel=2e-3)
    counts = [result[name] for name in ("classes", "train", "val")]
    assert counts == [3, 36, 24]
    assert result["linear"] > 50  # the classes differ in brightness: not a matter of luck


def test_cosine_is_that_of_the_class_tokens_of_noisy_and_clean_val_images(small, result):
    stage = Stage(small, *NOISE)
    val = stage.folder("val")
    noisy, clean = stage.embed(val)[:, 0], stage.embed(val, "clean")[:, 0]
    expected = cosines(noisy, clean).diag().mean()
    assert result["cosine"] == pytest.approx(expected.item(), rel=1e-4)
    assert result["cosine"] < 0.99999


def test_result_can_be_read_back_and_says_what_was_probed(small, result):
    assert json.loads(json.dumps(result)) == result
    assert np.isfinite(numbers(result)).all()
    assert result["pretrain"] == common.read_json(small.run / "config.json")
    assert result["summary"] == common.read_json(small.run / "summary.json")
    assert result["config"]["noise"] == "gauss50"
    assert result["backbone"] == sha256(small.run / "backbone.pth")
    train, val = common.Folder(small.data), common.Folder(small.data, "val")
    assert result["files"] == [train.fingerprint(), val.fingerprint()]


def test_sweep_tests_the_same_head_at_every_level(small, result):
    specs = {row["strength"]: row["noise"] for row in result["sweep"]}
    linear = {row["noise"]: row["linear"] for row in result["sweep"]}
    assert specs == probe.sweep_specs("gauss50")
    assert linear["gauss50"] == result["linear"]
    assert linear["none"] == result["clean_linear"]
    stage = Stage(small, *NOISE)
    train = stage.folder("train")
    head, _ = probe.linear_probe(stage.embed(train)[None], labels(train), 3, stage.args)
    for spec in ("gauss25", "gauss100"):
        assert linear[spec] == stage.accuracy(head, stage.folder("val", spec))


def test_head_is_chosen_without_val(small, result):
    """Another order of the classes in val changes the accuracy, not the head."""
    turned = {"dog": "cat", "cat": "emu", "emu": "dog"}
    Path("turned/val").mkdir(parents=True)
    Path("turned/train").symlink_to(small.data / "train")
    for name, other in turned.items():
        Path("turned/val", other).symlink_to(small.data / "val" / name)
    other = probed("turned", "--run", small.run, *NOISE)
    assert other["chosen"] == result["chosen"]
    assert abs(other["linear"] - result["linear"]) > 20


@pytest.fixture(scope="module")
def unequal(small, tmp_path_factory):
    """The images of small, but one emu alone to train on, and of dogs two in val."""
    data = tmp_path_factory.mktemp("unequal") / "data"
    shutil.copytree(small.data, data)
    for i in range(1, 12):
        (data / f"train/emu/{i}.png").unlink()
    for i in range(2, 8):
        (data / f"val/dog/{i}.png").unlink()
    return data


@pytest.mark.parametrize("what", ["run", "pixels"])
def test_class_of_one_image_is_no_obstacle_and_gives_that_image_to_few_labels(
        small, unequal, what, capsys):
    source = ["--run", small.run] if what == "run" else ["--pixels"]
    result = probed(unequal, *source, "--shots", "1,5")
    assert np.isfinite(numbers(result)).all()
    assert result["class_sizes"] == [2, 8]
    assert result["linear"] != result["balanced_linear"]
    assert list(result["few_shots"]) == ["1", "5"]
    warned = "warning: --shots 5: 1 of 3 classes have fewer images, and give all of them\n"
    assert capsys.readouterr().out == warned


def test_few_shots_of_the_result_are_those_of_the_class_tokens_of_its_central_views(small):
    result = probed(small.data, "--run", small.run, "--shots", "5,2", "--views", 1, *NOISE)
    stage = Stage(small, *NOISE, "--shots", "2,5")
    train, val = stage.folder("train"), stage.folder("val")
    x, val_x = stage.embed(train)[:, 0], stage.embed(val)[:, 0]
    expected = probe.few_shots(x, labels(train), val_x, labels(val), 3, stage.args)
    assert result["few_shots"] == expected
    assert list(expected) == ["2", "5"]


def test_real_noise_has_neither_clean_figures_nor_sweep(small):
    result = probed(small.data, "--run", small.run, "--noise", "none")
    assert not {"sweep", "clean_linear", "clean_map", "clean_knn", "cosine"} & set(result)
    assert 0 <= result["linear"] <= 100
    assert 0 < result["map"] <= 100


# ==== a result that is already there ==============================================================
@pytest.fixture
def again(small, capsys):
    """A function that probes a copy of the run once more; whether it did something. data, run."""
    shutil.copytree(small.data, "data")
    shutil.copytree(small.run, "run")

    def probe_it(*flags):
        capsys.readouterr()
        flags = ["--data", "data", "--run", "run", "--out", "out.json", *NOISE, *QUICK, *flags]
        assert call(probe, *flags) == 0
        return "complete, nothing to do" not in capsys.readouterr().out

    assert probe_it()
    return probe_it


def test_result_of_the_same_images_and_backbone_is_skipped(again):
    before = Path("out.json").stat().st_mtime_ns
    assert not again()
    assert not again("--workers", "1")  # which changes no result
    assert Path("out.json").stat().st_mtime_ns == before


def test_folder_that_was_moved_has_the_same_images(again):
    Path("data").rename("moved")
    Path("data").symlink_to("moved")
    assert not again()
    assert not again("--data", "moved")


@pytest.mark.parametrize("path", ["data/train/cat/new.png", "data/val/cat/new.png"])
def test_result_of_other_images_is_made_again(again, path):
    save(path, np.zeros((32, 32, 3), np.uint8))
    assert again()
    assert not again()


def test_result_of_another_backbone_is_made_again(again):
    old = common.read_json("out.json")
    weights = torch.load("run/backbone.pth")
    torch.save({name: 2 * p for name, p in weights.items()}, "run/backbone.pth")
    assert again()
    assert common.read_json("out.json")["backbone"] != old["backbone"]
    assert not again()


def test_result_of_another_denoised_copy_or_denoiser_is_made_again(again, cleaned):
    shutil.copytree(cleaned.copy, "copy")
    shutil.copy(cleaned.file, "denoiser.pth")
    flags = ["--denoised", "copy", "--denoiser", "denoiser.pth", "--out", "denoised.json"]
    assert again(*flags)
    assert not again(*flags)
    save("copy/train/cat/0.png", np.zeros((32, 40, 3), np.uint8))
    assert again(*flags)
    assert not again(*flags)
    weights = torch.load("denoiser.pth")
    torch.save({name: 1.5 * p for name, p in weights.items()}, "denoiser.pth")
    assert again(*flags)
    assert not again(*flags)


def test_result_gets_its_few_labels_later(again):
    """Without --shots they stay what they are."""
    before = common.read_json("out.json")
    assert again("--shots", "2,5")
    assert not again("--shots", "5,2")
    after = common.read_json("out.json")
    assert list(after["few_shots"]) == ["2", "5"]
    for name in ("chosen", "linear", "knn", "map", "sweep"):
        assert after[name] == before[name]


def test_result_of_other_settings_is_not_overwritten(again, capsys):
    before = Path("out.json").read_bytes()
    error = refused(capsys, "--data", "data", "--run", "run", "--out", "out.json", *NOISE, *QUICK,
                    "--views", 1)
    assert "--views 0 (now 1)" in error
    assert Path("out.json").read_bytes() == before


# ==== the same noise everywhere ===================================================================
@pytest.fixture
def noises(monkeypatch):
    """{(spec, key): all bits that add_noise gave}, from here on."""
    seen, add_noise = {}, common.add_noise

    def watched(image, spec, key, seed=0):
        x = add_noise(image, spec, key, seed)
        seen.setdefault((spec, key), set()).add(x.numpy().tobytes())
        return x

    monkeypatch.setattr(common, "add_noise", watched)
    return seen


def test_every_stage_sees_the_same_noise_of_an_image(small, noises):
    """Fixed by --noise_seed and the image's path, whatever --seed is."""
    def seen():
        """Paths of the images that the stage drew noise for, checked bit by bit."""
        for (spec, key), bits in noises.items():
            x = common.to_float(torch.from_numpy(common.read_image(small.data / key)))
            expected = original(x, spec, key, 7)
            assert bits == {expected.numpy().tobytes()}, (spec, key)
        keys = {key for _, key in noises}
        noises.clear()
        return keys

    train, val = (set(common.Folder(small.data, split).paths) for split in ("train", "val"))
    flags = ["--data", small.data, *NOISE, "--noise_seed", 7, *PLAIN]
    small_unet = ["--epochs", 1, "--width", 4, "--patch", 16]
    assert call(denoise, "train", *flags, "--seed", 3, *small_unet, "--out", "denoiser") == 0
    assert seen() == train | val
    assert call(denoise, "apply", *flags, "--denoiser", "denoiser", "--out", "denoised") == 0
    assert seen() == train | val
    pretrained(small.data, "run", *NOISE, "--noise_seed", 7, "--seed", 3)
    assert seen() == train
    probed(small.data, "--run", "run", *NOISE, "--noise_seed", 7, "--seed", 3)
    assert seen() == train | val


original = common.add_noise


# ==== the denoised arm ============================================================================
@pytest.fixture(scope="module")
def cleaned(small, tmp_path_factory):
    """Flags of the denoised arm: the copy that a denoiser of random weights made, and that
    denoiser."""
    root = tmp_path_factory.mktemp("cleaned")
    torch.manual_seed(0)
    model = denoise.UNet(3, 4, 2, init_scale=1.0)
    with torch.no_grad():
        y = model(torch.rand(1, 3, 64, 64))
        std, mean = torch.std_mean(y, (0, 2, 3))
        model.nin_c.weight *= 0.2 / std[:, None, None, None]
        model.nin_c.bias.copy_(0.5 - mean * 0.2 / std)
    file, copy = root / "FILE.pth", root / "denoised"
    torch.save(model.state_dict(), file)
    flags = ["--data", small.data, *NOISE, "--denoiser", file, *PLAIN]
    assert call(denoise, "apply", *flags, "--out", copy) == 0
    return SimpleNamespace(file=file, copy=copy)


def test_denoised_arm_sends_every_test_image_through_its_denoiser(small, cleaned):
    stage = Stage(small, *NOISE, "--denoised", cleaned.copy, "--denoiser", cleaned.file)
    denoiser, _ = denoise.load_denoiser(cleaned.file, CPU)
    train, val = stage.folder("train"), stage.folder("val")
    stored = stage.embed(val, "denoised")
    again = stage.embed(val, "noisy", denoiser=denoiser)
    torch.testing.assert_close(again, stored, rtol=0, atol=0.02)  # up to the rounding of ties
    assert (stage.embed(val) - stored).abs().max() > 0.3
    x = stage.embed(train, "denoised")
    head, chosen = probe.linear_probe(x[None], labels(train), 3, stage.args)
    result = probe.evaluate(stage.args, CPU, {})
    assert result["chosen"] == chosen
    assert result["linear"] == stage.accuracy(head, val, "denoised")
    for row in result["sweep"]:
        tested = common.Folder(small.data, "val", row["noise"])
        assert row["linear"] == stage.accuracy(head, tested, denoiser=denoiser)


def test_without_the_denoiser_other_test_images_have_no_answer(small, cleaned):
    result = probed(small.data, "--run", small.run, *NOISE, "--denoised", cleaned.copy)
    assert not {"sweep", "clean_linear", "cosine"} & set(result)


# ==== averaged pixels =============================================================================
def test_pixels_are_means_of_areas_standardised_by_the_training_images(small):
    args = probe_args(small.data, "--pixels", *NOISE)
    pixels = probe.load_backbone(args, CPU)
    folder = common.Folder(small.data, "train", "gauss50")
    crops = torch.stack([probe.central_crop(folder.read(i), 32, 32) for i in range(len(folder))])
    tokens = pixels.embed(crops)
    assert tokens.shape == (36, 5, 192)
    torch.testing.assert_close(tokens.mean(0), torch.zeros(5, 192), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.std(0), torch.ones(5, 192), atol=1e-4, rtol=0)
    for side, areas in ((8, tokens[:, :1]), (16, tokens[:, 1:])):
        size = 32 // side
        means = torch.zeros(36, 3, side, side)
        for row in range(side):
            for column in range(side):
                part = crops[:, :, row * size:(row + 1) * size, column * size:(column + 1) * size]
                means[:, :, row, column] = part.float().mean((2, 3))
        expected = means.flatten(1)
        expected = (expected - expected.mean(0)) / expected.std(0)
        torch.testing.assert_close(areas.flatten(1), expected, atol=1e-3, rtol=0)


def test_neighbours_of_pixels_are_chosen_on_the_held_out_images():
    y = torch.arange(2).repeat(60)
    good, bad = torch.eye(2)[y], randn(120, 2)
    for k, tokens in enumerate(probe.PIXELS.values()):
        x = bad[:, None].repeat(1, 5, 1)
        x[:, tokens] = good[:, None]
        assert probe.nearest_tokens(x, y, 2, 0) == list(probe.PIXELS.values())[k]


def test_result_of_pixels_has_every_figure_of_the_same_heads(small, result):
    pixels = probed(small.data, "--pixels", *NOISE)
    assert set(result) - set(pixels) == {"pretrain", "summary", "backbone"}
    assert set(pixels) <= set(result)
    assert pixels["chosen"]["head"] in probe.PIXELS
    assert len(pixels["sweep"]) == len(result["sweep"])
    assert np.isfinite(numbers(pixels)).all()
    assert pixels["linear"] > 45  # by chance 33: the classes differ in brightness


def test_pixels_of_denoised_images_are_read_from_them(small, cleaned):
    noisy = probe.load_backbone(probe_args(small.data, "--pixels", *NOISE), CPU)
    denoised = probe_args(small.data, "--pixels", *NOISE, "--denoised", cleaned.copy)
    assert (probe.load_backbone(denoised, CPU).std < noisy.std).double().mean() > 0.9


def test_patches_of_denoised_pixels_are_standardised_by_the_denoised_training_images(small, cleaned):
    pixels = probe.load_backbone(probe_args(small.data, "--pixels", *NOISE, "--denoised", cleaned.copy), CPU)
    folder = common.Folder(small.data, "train", "gauss50", 0, cleaned.copy)
    every = torch.cat([folder.read(i, "denoised").flatten(1).double() / 255 for i in range(len(folder))], 1)
    mean, std = pixels.normal
    torch.testing.assert_close(mean.flatten().double(), every.mean(1), atol=1e-3, rtol=0)
    torch.testing.assert_close(std.flatten().double(), every.std(1), atol=1e-3, rtol=0)


# ==== embed =======================================================================================
def embedded(*flags):
    """What probe.py embed writes."""
    flags = [*flags, "--out", "out.npz", *PLAIN]
    assert call(probe, "embed", *flags) == 0
    with np.load("out.npz") as file:
        return dict(file)


@pytest.mark.parametrize("patches", [False, True])
def test_embeddings_are_the_features_of_all_images_of_the_folder_by_their_paths(small, patches):
    """With the noise that the other stages give each image."""
    flags = ["--patches"] if patches else []
    got = embedded("--run", small.run, "--data", small.data, *NOISE, *SIZE, *flags)
    stage = Stage(small, *NOISE)
    train, val = stage.folder("train"), stage.folder("val")
    assert got["paths"].tolist() == [*train.paths, *val.paths]
    tokens = torch.cat([stage.embed(train), stage.embed(val)])
    assert got["cls"].dtype == got["patch_mean"].dtype == np.float32
    # the probe has them in half precision
    assert np.array_equal(got["cls"].astype(np.float16), tokens[:, 0])
    assert np.array_equal(got["patch_mean"].astype(np.float16), tokens[:, 4])
    assert ("patches" in got) == patches
    if patches:
        assert got["patches"].shape == (60, 16, 16)
        crop = probe.central_crop(val.read(5), 32, 32)
        expected = stage.backbone.last_layers(crop[None], 1)[0]["patches"][0]
        np.testing.assert_allclose(got["patches"][36 + 5], expected, rtol=1e-4, atol=1e-5)


def test_weights_embed_any_folder_without_labels_of_grey_images_too(weights):
    file, vit = weights
    grey = random_bytes(2, 32, 32)
    save("any/2.png", grey[0].numpy())
    save("any/val/deep/er/ü 1.png", grey[1].numpy())  # no train/ is needed
    got = embedded("--weights", file, "--heads", 2, "--data", "any", *SIZE)
    assert got["paths"].tolist() == ["2.png", "val/deep/er/ü 1.png"]
    expected = backbone_of(vit, *IMAGENET).embed(grey[:, None].expand(2, 3, 32, 32))[:, 0]
    np.testing.assert_allclose(got["cls"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("flags", "sizes"), [
    (["--run", "large"], (224, 256)), (["--run", "small"], (64, 64)), (["--weights", "file"], (224, 256)),
    (["--run", "large", "--preset", "tiny"], (64, 64)), (["--weights", "file", "--preset", "demo"], (64, 64)),
    (["--run", "large", "--img_size", "96"], (96, 256))])
def test_images_are_embedded_at_the_size_of_the_runs_preset_unless_flags_say_otherwise(flags, sizes):
    common.write_json("large/config.json", {"preset": "imagenet100"})
    common.write_json("small/config.json", {"preset": "tiny"})
    args = probe.read_embed_config([*flags, "--data", "data", "--out", "out.npz"])
    assert (args.img_size, args.resize) == sizes


@pytest.mark.parametrize(("flags", "reason"), [
    ([], "give --run, a folder of pretrain.py, or --weights, a file of ViT weights\n"),
    (["--run", "RUN", "--weights", "FILE"], "give --run"),
    (["--run", "RUN", "--heads", "2"], "a run has its own"),
    (["--run", "RUN", "--resize", "16"], "--resize 16: must be at least --img_size 64"),
    (["--run", "RUN", "--denoised", "DIR"], "unrecognized arguments: --denoised DIR"),
    (["--run", "RUN", "--pixels"], "unrecognized arguments: --pixels"),
    (["--run", "RUN", "--views", "2"], "unrecognized arguments: --views 2"),
    (["--run", "nowhere"], "nowhere/config.json: cannot be read"),
    (["--run", "RUN", "--data", "gone"], "--data gone: no such folder"),
])
def test_embed_refuses_flags_that_contradict_each_other_or_would_do_nothing(
        small, capsys, flags, reason):
    flags = [small.run if flag == "RUN" else flag for flag in flags]
    assert reason in refused(capsys, "embed", "--data", small.data, "--out", "out.npz", *flags)
    assert not list(Path().iterdir())


def test_images_of_other_channels_than_the_backbones_are_not_embedded(small, capsys):
    Path("any").mkdir()
    np.save("any/1.npy", np.zeros((32, 32, 4), np.uint8))
    error = refused(capsys, "embed", "--run", small.run, "--data", "any", "--out", "out.npz")
    assert "any/1.npy: files differ in their number of channels, it has 4" in error


def test_embeddings_that_are_there_are_not_overwritten(small, capsys):
    Path("out.npz").write_text("kept")
    flags = ["--run", small.run, "--data", small.data, "--out", "out.npz"]
    assert "out.npz: exists; move it away" in refused(capsys, "embed", *flags)
    assert Path("out.npz").read_text() == "kept"


def test_embedding_that_fails_leaves_nothing_behind(small, capsys):
    """The last image is damaged where its header does not show it."""
    shutil.copytree(small.data, "data")
    path = Path("data/val/emu/7.png")
    damaged = bytearray(path.read_bytes())
    damaged[60:1500] = bytes(1440)
    path.write_bytes(damaged)
    Path("out").mkdir()
    error = refused(capsys, "embed", "--run", small.run, "--data", "data", "--out", "out/x.npz", *PLAIN)
    assert "val/emu/7.png: not a readable image" in error
    assert not list(Path("out").iterdir())


GREEDY = """
import resource, sys
sys.path.insert(0, {root!r})
import torch, common, probe
{before}
sys.argv = ["probe.py", *{flags!r}]
probe.main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak_megabytes(*flags, before=""):
    """Memory that probe.py with these flags takes at most, in a process of its own."""
    script = GREEDY.format(root=str(Path(probe.__file__).parent), before=before, flags=[*flags, *PLAIN])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def test_memory_of_embedding_does_not_grow_with_the_number_of_images():
    """Patch tokens of 1,920 images are 252 MB, those of 640 a third."""
    torch.manual_seed(0)
    vit = common.VisionTransformer(32, 2, 3, 128, 1, 2)
    torch.save(vit.state_dict(), "vit.pth")
    image = random_bytes(32, 32, 3).numpy()
    save("1.png", image)
    megabytes = []
    for n in (640, 1920):
        for i in range(n):
            link(f"data{n}/{i}.png", Path("1.png").resolve())
        flags = ["--weights", "vit.pth", "--heads", "2", "--data", f"data{n}", *SIZE, "--out", f"{n}.npz"]
        megabytes.append(peak_megabytes("embed", *flags, "--patches"))
    assert Path("1920.npz").stat().st_size > 250e6
    assert megabytes[1] < megabytes[0] + 60


WIDE = """
def blocks(args, embeds, folder, source, device, denoiser=None):  # random, as if of a wide ViT
    rng = torch.Generator().manual_seed(0)
    for part in torch.arange(len(folder)).split(probe.CHUNK):
        yield [torch.randn(len(part), 5, 512, generator=rng) for _ in embeds]
probe.embed_blocks = blocks
"""


def test_memory_of_the_whole_probe_does_not_grow_with_the_number_of_images(small):
    """Features of 8,000 images and two views are 82 MB on disk, 164 in float32; of 2,000 a quarter."""
    megabytes = []
    for n in (2000, 8000):
        for i in range(n):
            name = CLASSES[i % 2]
            link(f"data{n}/train/{name}/{i}.png", small.data / f"train/{name}/0.png")
        link(f"data{n}/val", small.data / "val")
        link(f"data{n}/train/emu", small.data / "train/emu")
        flags = ["--run", str(small.run), "--data", f"data{n}", "--out", f"{n}.json", *SIZE,
                 "--iterations", "20", "--views", "1", "--shots", "5", *NOISE]
        megabytes.append(peak_megabytes(*flags, before=WIDE))
    assert megabytes[1] < megabytes[0] + 40


# ==== check, bad input ============================================================================
def test_check_passes_on_good_folders_and_says_nothing(small, capsys):
    assert call(probe, "check", "--data", small.data, *NOISE) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("folder", ["", "images/", "images/2026/"])
def test_check_of_images_without_classes_has_code_3(small, capsys, folder):
    """One folder for all is no class. A file that is no image makes none."""
    link(f"data/train/{folder}1.png", small.data / "train/cat/1.png")
    link(f"data/val/{folder}2.png", small.data / "val/cat/2.png")
    link("data/val/notes/read.txt", small.data / "val/cat/2.png")
    assert call(probe, "check", "--data", "data") == 3
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flag", ["--run", "--weights", "--workers", "--views"])
def test_check_takes_the_flags_of_the_data_alone(small, capsys, flag):
    error = refused(capsys, "check", "--data", small.data, flag, "1")
    assert f"unrecognized arguments: {flag} 1" in error


@pytest.fixture(params=["check", "probe"])
def said(small, request, capsys):
    """A function: what check, or the probe itself, says against the folder 'data'."""
    def refuse(*more):
        flags = ["check", "--data", "data"]
        if request.param == "probe":
            flags = ["--data", "data", "--run", small.run, "--out", "out.json", *QUICK]
        error = refused(capsys, *flags, *more)
        assert not Path("out.json").exists()
        return error

    return refuse


def link(path, target):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_class_unknown_to_train_is_named(small, said):
    for name in ("train/dog", "train/cat", "val/cat"):
        link(f"data/{name}", small.data / name)
    link("data/val/gnu", small.data / "val/emu")
    assert "gnu: class unknown to train" in said()


def test_val_is_needed(small, said):
    link("data/train", small.data / "train")
    assert "data/val: no images found" in said()


def test_class_folders_are_needed(small, said):
    link("data/train", small.data / "train")
    link("data/val", small.data / "val/cat")  # images, but no classes
    assert "labels need a folder a class" in said()


def test_one_class_alone_is_refused(small, capsys):
    """Where val has others, as where it has none: check and probe read the same labels."""
    for split in ("train", "val"):
        link(f"data/{split}/cat", small.data / split / "cat")
    flags = ["--data", "data", "--run", small.run, "--out", "out.json", *QUICK]
    assert "data/train: has one class, cat; two are the least" in refused(capsys, *flags)
    assert not Path("out.json").exists()


def test_a_class_of_two_images_is_needed(small, said):
    for name in CLASSES:
        link(f"data/train/{name}/0.png", small.data / "train" / name / "0.png")
    link("data/val", small.data / "val")
    assert "no class has two images" in said()


def test_more_shots_than_any_class_has_images_are_refused(small, said):
    link("data", small.data)
    error = said("--shots", "5,13")
    assert "--shots 13: no class in data/train has so many images; the largest has 12" in error


def test_unfinished_runs_are_refused(small):
    with pytest.raises(UserError, match="nowhere: no backbone.pth; finish the run"):
        probed(small.data, "--run", "nowhere")


def test_weights_that_are_not_finite_are_refused(small):
    shutil.copytree(small.run, "broken")
    weights = torch.load("broken/backbone.pth")
    weights["norm.bias"][0] = float("nan")
    torch.save(weights, "broken/backbone.pth")
    with pytest.raises(UserError, match="broken/backbone.pth: norm.bias is not finite"):
        probed(small.data, "--run", "broken")


def test_sweep_looks_at_the_headers_of_val_once(small, monkeypatch):
    seen, read_shape = [], common.read_shape
    monkeypatch.setattr(common, "read_shape", lambda path: seen.append(path) or read_shape(path))
    probed(small.data, "--run", small.run, *NOISE)
    assert len(seen) == len(set(seen)) == 36 + 24


def test_grey_images_for_a_backbone_of_colour_are_refused(small):
    for split in ("train", "val"):
        save(f"grey/{split}/cat/1.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(UserError, match="grey: 1 channels, the backbone has 3"):
        probed("grey", "--run", small.run)


def test_image_size_that_the_patches_do_not_divide_is_refused(small):
    with pytest.raises(UserError, match="--img_size 30: is no multiple of the patch size 8"):
        probed(small.data, "--run", small.run, "--img_size", 30)


# ==== report ======================================================================================
@pytest.fixture
def runs(small, result):
    """runs/: noisy and nct, two seeds each."""
    linear = {"noisy-seed0": 50.0, "noisy-seed1": 53.0, "nct-seed0": 61.5, "nct-seed1": 61.5}
    for k, (name, value) in enumerate(linear.items()):
        made = copy.deepcopy(result)
        made |= {"linear": value, "cosine": 0.5 + k % 2 / 10}
        made["sweep"][-1]["linear"] = value - 20
        made["summary"] |= {"seconds": 60.0 + 120 * (k % 2), "images_s": 7.0, "peak_gb": 0.25}
        common.write_json(f"runs/probe/{name}.json", made)
        link(f"runs/pretrain/{name}", small.run)
    return linear


def table_rows(text):
    """{arm: [its line's cells in each table]}."""
    rows = {}
    for line in text.splitlines():
        if line.startswith(("| noisy ", "| nct ")):
            arm, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows.setdefault(arm, []).append(cells)
    return rows


def test_report_gives_mean_and_deviation_over_seeds(runs, result, capsys):
    assert call(probe, "report", "runs") == 0
    text = Path("runs/results.md").read_text()
    rows = table_rows(text)
    assert list(rows) == ["noisy", "nct"]  # in the paper's order
    knn, mean = result["knn"]["20"], result["map"]
    clean = f"{result['clean_linear']:.1f} ± 0.0"
    rest = [clean, f"{knn:.1f} ± 0.0", f"{mean:.1f} ± 0.0", "0.55 ± 0.07"]
    cost = ["2.0 ± 1.4", "7.0 ± 0.0", "0.25 ± 0.00"]  # minutes, images/s, peak GB
    figures, more, sweep = rows["noisy"]
    assert figures == ["2", "51.5 ± 2.1", *rest, *cost]  # of a sample: 3 / sqrt(2)
    assert sweep[0] == clean
    assert sweep[-1] == "31.5 ± 2.1"  # the strongest noise comes last
    figures, *_ = rows["nct"]
    assert figures == ["2", "61.5 ± 0.0", *rest, *cost]
    assert "| noisy | 2 | 51.5" in capsys.readouterr().out
    stored = common.read_json("runs/results.json")
    seen = {name: r["linear"] for arm in stored.values() for name, r in arm.items()}
    assert seen == runs


def header_of(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def test_report_shows_balanced_accuracy_where_classes_differ_in_size(runs, result):
    assert call(probe, "report", "runs") == 0
    text = Path("runs/results.md").read_text()
    assert "balanced" not in text
    for name in runs:
        path = f"runs/probe/{name}.json"
        unequal = common.read_json(path) | {"class_sizes": [2, 8], "balanced_linear": 44.25}
        unequal["balanced_knn"]["20"] = 33.5
        common.write_json(path, unequal)
    assert call(probe, "report", "runs") == 0
    text = Path("runs/results.md").read_text()
    assert "| linear | linear, balanced | linear, clean val | 20-NN | 20-NN, balanced |" in text
    figures, *_ = table_rows(text)["noisy"]
    assert figures[1:3] == ["51.5 ± 2.1", "44.2 ± 0.0"]
    assert figures[5] == "33.5 ± 0.0"
    assert "A class has 2 to 8 validation images" in text


def test_report_leaves_out_columns_without_a_figure(runs):
    """Real noise has no clean images."""
    for name in runs:
        path = f"runs/probe/{name}.json"
        known = common.read_json(path)
        for figure in ("clean_linear", "clean_map", "clean_knn", "cosine", "sweep"):
            del known[figure]
        common.write_json(path, known)
    assert call(probe, "report", "runs") == 0
    header = header_of(Path("runs/results.md").read_text(), "| arm ")
    columns = "arm | seeds | linear | 20-NN | retrieval mAP | minutes | images/s | peak GB"
    assert header == f"| {columns} |"


def test_report_explains_the_columns_of_its_second_table_that_there_are(runs):
    said = {"Retrieval: every image": ["map_r", "recall1", "recall5", "recall10"],
            "patch tokens": ["patch_cosine"], "Linear CKA": []}  # no run is of clean images
    for sentence, figures in said.items():
        assert call(probe, "report", "runs") == 0
        assert (sentence in Path("runs/results.md").read_text()) == bool(figures)
        for name in runs:
            path = f"runs/probe/{name}.json"
            known = common.read_json(path)
            common.write_json(path, {k: v for k, v in known.items() if k not in figures})
        assert call(probe, "report", "runs") == 0
        assert sentence not in Path("runs/results.md").read_text()


def test_report_has_a_table_of_each_head_on_few_labels_over_draws_of_all_seeds(runs):
    assert call(probe, "report", "runs") == 0
    assert "labels a class" not in Path("runs/results.md").read_text()
    for k, name in enumerate(("noisy-seed0", "noisy-seed1")):
        path = f"runs/probe/{name}.json"
        few = {}
        for shots in ("5", "20"):
            few[shots] = {"balanced_linear": {"draws": [60.0 + k, 62.0 + k]},
                          "balanced_nn": {"draws": [30.0, 30.0 + 2 * k]}}
        common.write_json(path, common.read_json(path) | {"few_shots": few})
    assert call(probe, "report", "runs") == 0
    text = Path("runs/results.md").read_text()
    assert text.index("Logistic regression on so many labels a class") < text.index("Nearest neighbour on")
    assert header_of(text, "| arm | 5 ") == "| arm | 5 | 20 |"
    *_, linear, nearest = table_rows(text)["noisy"]
    assert linear == ["61.5 ± 1.3"] * 2  # of 60, 62, 61, 63
    assert nearest == ["30.5 ± 1.0"] * 2
    assert table_rows(text)["nct"][3:] == [["-", "-"]] * 2  # not probed on few labels


def test_report_shows_four_pictures(runs):
    assert call(probe, "report", "runs") == 0
    text = Path("runs/results.md").read_text()
    sizes = {"samples": (2, 6), "features": (3, 6)}  # noisy, clean; input and two arms
    for name in ("samples", "features", "robustness", "curves"):
        assert f"({name}.png)" in text
        with Image.open(f"runs/{name}.png") as image:
            assert np.array(image).std() > 5
            if name in sizes:
                rows, columns = sizes[name]
                assert image.size == (columns * 166, rows * 183)


def test_report_of_images_that_were_moved_away_has_the_other_pictures(runs, capsys):
    for path in Path("runs/probe").iterdir():
        result = common.read_json(path)
        result["config"]["data"] = "gone"
        common.write_json(path, result)
    assert call(probe, "report", "runs") == 0
    assert "no samples.png and features.png: --data gone" in capsys.readouterr().err
    assert {p.name for p in Path("runs").glob("*.png")} == {"robustness.png", "curves.png"}


def test_report_leaves_out_a_result_of_weights_and_names_its_file(runs, result, capsys):
    of_weights = {k: v for k, v in result.items() if k not in ("pretrain", "summary")}
    common.write_json("runs/probe/noisy-seed2.json", of_weights)
    assert call(probe, "report", "runs") == 0
    assert "runs/probe/noisy-seed2.json: left out" in capsys.readouterr().err
    assert set(common.read_json("runs/results.json")["noisy"]) == {"noisy-seed0", "noisy-seed1"}


def test_report_of_a_denoised_copy_of_train_alone_shows_training_images(runs, small):
    """val/ of the copy is for the arm denoised alone."""
    link("copy/train", small.data / "train")
    path = "runs/probe/nct-seed0.json"
    known = common.read_json(path)
    known["pretrain"]["denoised"] = "copy"
    common.write_json(path, known)
    assert call(probe, "report", "runs") == 0
    with Image.open("runs/samples.png") as image:
        assert image.height == 3 * 183  # noisy, denoised, clean


@pytest.fixture
def unprobed(small):
    """runs/pretrain: noisy, two seeds; nct; the first phase of nct; and a run that goes on. The images
    lie in one flat folder."""
    for k, path in enumerate(sorted(small.data.glob("train/*/*.png"))):
        link(f"flat/{k}.png", path)
    for k, name in enumerate(("noisy-seed0", "noisy-seed1", "nct-seed0", "denoised-seed0", "nc-seed0")):
        run = Path("runs/pretrain", name)
        shutil.copytree(small.run, run)
        config = common.read_json(run / "config.json") | {"data": "flat"}
        if name == "denoised-seed0":
            config |= {"epochs": 4, "stop": 1}
        common.write_json(run / "config.json", config)
        if name == "nc-seed0":
            (run / "summary.json").unlink()
        log = common.read_log(run / "log.jsonl")
        log[-1] |= {"rank": 7.0 + k, "entropy": 2.125}
        common.write_text(run / "log.jsonl", "".join(json.dumps(r) + "\n" for r in log))


def test_report_without_labels_has_the_last_losses_and_monitors_of_the_finished_arms(unprobed, capsys):
    assert call(probe, "report", "runs") == 0
    text = Path("runs/results.md").read_text()
    columns = ("DINO loss | iBOT loss | teacher entropy, nats | KL teacher to student | effective rank | "
               "minutes | images/s | peak GB")
    assert header_of(text, "| arm ") == f"| arm | seeds | {columns} |"
    assert "36 training images without labels, noise gauss50, 16,2,2, on " in text
    rows = table_rows(text)
    assert list(rows) == ["noisy", "nct"]
    last = common.read_log("runs/pretrain/nct-seed0/log.jsonl")[-1]
    assert last["step"] == 4
    [figures] = rows["nct"]
    losses = [f"{last[name]:.2f}" for name in ("dino", "ibot")]
    assert figures[:6] == ["1", *losses, "2.12", f"{last['kl']:.2f}", "9.00"]
    [figures] = rows["noisy"]
    assert figures[0] == "2"
    assert figures[5] == "7.50 ± 0.71"
    stored = common.read_json("runs/results.json")
    assert {arm: list(found) for arm, found in stored.items()} == {
        "noisy": ["noisy-seed0", "noisy-seed1"], "nct": ["nct-seed0"]}
    assert capsys.readouterr().err == ""


def test_report_without_labels_shows_training_images_features_and_curves(unprobed):
    assert call(probe, "report", "runs") == 0
    assert {p.name for p in Path("runs").glob("*.png")} == {"samples.png", "features.png", "curves.png"}
    text = Path("runs/results.md").read_text()
    for name, rows in (("samples", 2), ("features", 3)):  # noisy, clean; input and two arms
        assert f"({name}.png)" in text
        with Image.open(f"runs/{name}.png") as image:
            assert image.size == (6 * 166, rows * 183)


def test_report_without_labels_shows_deep_images_in_the_range_of_the_run(unprobed):
    """Values of 0 to 1,000 in a range of 8,000 are dark."""
    for k, path in enumerate(sorted(Path("flat").iterdir())):
        path.unlink()
        np.save(path.with_suffix(".npy"), randint(1000, 32, 32, 3, seed=k).numpy().astype(np.uint16))
    for run in Path("runs/pretrain").iterdir():
        config = common.read_json(run / "config.json")
        common.write_json(run / "config.json", config | {"noise": "none", "range": [0.0, 8000.0]})
    assert call(probe, "report", "runs") == 0
    with Image.open("runs/samples.png") as picture:
        shown = np.array(picture.convert("L"))[25:180, 10:150]
    assert shown.mean() < 30


def test_report_shows_pixels_first_without_cost_and_without_a_picture_of_features(runs, result):
    of_pixels = {k: v for k, v in result.items() if k not in ("pretrain", "summary", "backbone")}
    of_pixels["config"] = {**result["config"], "pixels": True}
    common.write_json("runs/probe/pixels-seed0.json", {**of_pixels, "linear": 12.5})
    assert call(probe, "report", "runs") == 0
    lines = Path("runs/results.md").read_text().splitlines()
    arms = [line.split()[1] for line in lines if line.startswith("|")]
    assert arms[:5] == ["arm", "---", "pixels", "noisy", "nct"]
    row = next(line for line in lines if line.startswith("| pixels "))
    assert row.startswith("| pixels | 1 | 12.5 |")
    assert row.endswith("| - | - | - |")  # minutes, images/s, peak GB
    with Image.open("runs/features.png") as image:
        assert image.height == 3 * 183  # input and two arms


def test_report_of_pixels_alone_has_nothing_to_compare(result, capsys):
    config = {**result["config"], "pixels": True}
    of_pixels = {k: v for k, v in result.items() if k not in ("pretrain", "summary")}
    common.write_json("runs/probe/pixels-seed0.json", of_pixels | {"config": config})
    assert "no results to report" in refused(capsys, "report", "runs")


def test_report_on_an_empty_folder_is_one_line_with_code_2(capsys):
    Path("empty").mkdir()
    assert "empty: no results to report" in refused(capsys, "report", "empty")
    assert not list(Path("empty").iterdir())
    assert "usage: " in refused(capsys, "report")


@pytest.mark.parametrize(("values", "text"), [
    ([3.0], "3.0"), ([], "-"), ([None], "-"), ([None, 2.0], "2.0"), ([1.0, 3.0], "2.0 ± 1.4")])
def test_one_seed_has_no_deviation_and_none_is_a_dash(values, text):
    assert probe.spread(values) == text


# ==== charts ======================================================================================
RANGES = [[0, 1], [0, 2], [-3, 7], [0.3, 0.7], [60.1, 60.4], [0.0011, 0.0013], [-900, -20],
          [0, 1000], [1234, 98765]]
EQUAL = [[3.2], [3.2345, 3.2345], [0], [-5], [1e6], [1e6, 1e6 + 1], [2e-5]]  # or nearly so


@pytest.mark.parametrize("values", RANGES + EQUAL)
def test_ticks_are_round_and_enclose_the_values(values):
    ticks, place = probe.axis(values, 100, 300)
    steps = np.diff(ticks)
    power = 10.0 ** round(math.log10(steps[0]))
    assert steps == pytest.approx(power, rel=1e-4)
    multiples = ticks / power
    assert multiples == pytest.approx(multiples.round(), abs=1e-6)
    slack = 1e-6 * power
    assert ticks[0] <= min(values) + slack
    assert ticks[-1] >= max(values) - slack
    assert 2 <= len(ticks) <= 12
    placed = [place(v) for v in (ticks[0], ticks.mean(), ticks[-1])]
    assert placed == pytest.approx([100, 200, 300], abs=1e-3)


@pytest.mark.parametrize("values", RANGES)
def test_values_fill_at_least_a_third_of_the_axis(values):
    _, place = probe.axis(values, 100, 300)
    assert place(max(values)) - place(min(values)) > 200 / 3.01


RED, GREEN = [0xD6, 0x27, 0x28], [0x2C, 0xA0, 0x2C]  # noisy, nct
WIDTH, HEIGHT = 470, 270  # of the plot, whose corner is at (57, 33)


def pixels(lines, color):
    """(x, y) from the plot's lower left corner of the pixels of a colour, without the texts."""
    sheet = np.array(probe.chart({"title": lines}))
    assert sheet.shape == (340, 620, 3)
    plot = sheet[30:307, 54:531].astype(int)
    distance = np.abs(plot - color).sum(2)
    rows, columns = (distance < 150).nonzero()
    return columns - 3, 273 - rows


def test_chart_draws_the_values_where_they_belong():
    lines = {"noisy": [(0, 1), (1, 1)], "nct": [(0, 0), (1, 2)]}
    x, y = pixels(lines, RED)
    assert (x.min(), x.max()) == pytest.approx((0, WIDTH), abs=3)
    assert (y.min(), y.max()) == pytest.approx((HEIGHT / 2, HEIGHT / 2), abs=2.5)
    x, y = pixels(lines, GREEN)
    assert (x.min(), x.max()) == pytest.approx((0, WIDTH), abs=3)
    assert y / HEIGHT == pytest.approx(x / WIDTH, abs=0.02)


def test_chart_of_one_point_shows_it():
    """A run of one log line is seen, too."""
    x, y = pixels({"noisy": [(10, 1)]}, RED)
    assert len(x) > 10
    assert max(np.ptp(x), np.ptp(y)) <= 6


def test_charts_stand_two_in_a_row_and_those_without_a_point_are_left_out():
    point = {"noisy": [(0, 1)]}
    assert probe.chart({"a": point, "b": {"nct": []}}).size == (620, 340)
    assert probe.chart({"a": point, "b": point, "c": point}).size == (1240, 680)
    assert probe.chart({"a": {"nct": []}, "b": {}}) is None
