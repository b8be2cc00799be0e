"""experiments.py: every command of the plan is one that its stage accepts, and the tables say what the files say."""

import json
from pathlib import Path

import experiments
import pytest
import shapes

import common
import denoise
import pretrain
import probe

@pytest.fixture
def runner(tmp_path, monkeypatch):
    """A runner whose commands are not run: runner.calls holds them."""
    shapes.write(tmp_path / "data", 40, 20, size=32)
    args = experiments.parse(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--results", "none"])
    runner = experiments.Runner(args)
    runner.calls = []
    monkeypatch.setattr(runner, "call", lambda *command: runner.calls.append([str(x) for x in command]) or command[0])
    monkeypatch.setattr(runner, "save", lambda name, figures: None)
    monkeypatch.setattr(common, "read_json", lambda path, needs=(): {})
    monkeypatch.setattr(common, "read_log", lambda path: [{"seconds": 1}])
    return runner


def test_every_command_of_the_plan_is_one_that_its_stage_accepts(runner):
    stages = {"denoise.py": denoise, "pretrain.py": pretrain, "probe.py": probe}
    for name in runner.runs:
        runner.run(name)
    runner.run("gauss100-nct-seed0", clean=True)
    assert len(runner.calls) > 100
    for script, *flags in runner.calls:
        stages[script].read_config(flags)


def test_every_fork_is_a_beginning_of_its_run(runner):
    def phases(name):
        runner.pretrain(name)
        return pretrain.parse_curriculum(pretrain.read_config(
            next(c[1:] for c in runner.calls if c[0] == "pretrain.py" and c[-1].endswith(name))).curriculum)

    forks = {name: run.fork for name, run in runner.runs.items() if run.fork}
    assert len(forks) > 30
    for name, fork in forks.items():
        ours, theirs = phases(name), phases(fork)
        last = len(theirs) - 1
        assert ours[:last] == theirs[:last] and ours[last].epochs >= theirs[last].epochs
        assert (ours[last].source, ours[last].schedule) == (theirs[last].source, theirs[last].schedule)


def test_search_holds_a_part_of_train_out_and_never_sees_val(runner):
    found, original = ({p.relative_to(root).as_posix() for p in root.glob("*/*/*")} for root in
                       map(Path, (runner.data("search"), runner.args.data)))
    held = {p.removeprefix("val/") for p in found if p.startswith("val/")}
    kept = {p.removeprefix("train/") for p in found if p.startswith("train/")}
    assert held and not held & kept
    assert held | kept == {p.removeprefix("train/") for p in original if p.startswith("train/")}


def test_redrawn_data_gives_every_copy_a_noise_of_its_own(runner):
    folder = common.Folder(runner.data("redrawn"), "train", "gauss100")
    assert len(folder) == 40 * experiments.EPOCHS
    assert len({folder.read(i).tobytes() for i in range(experiments.EPOCHS)}) == experiments.EPOCHS
    assert len({folder.read(i, "clean").tobytes() for i in range(experiments.EPOCHS)}) == 1


def test_tables_give_mean_and_deviation_over_seeds(tmp_path):
    for seed, linear in enumerate((40.0, 44.0, 48.0)):
        common.write_json(tmp_path / f"gauss100-noisy-seed{seed}.json", {
            "linear": linear, "knn": {"20": 30.0}, "clean_knn": {"20": 31.0}, "cosine": 0.5,
            "summary": {"seconds": 60.0}, "monitors": {}, "sweep": [{"strength": 1, "linear": linear}]})
    experiments.tables(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| noisy | 3 | 44.0 ± 4.0 | - | 30.0 ± 0.0 | 31.0 ± 0.0 | 0.50 ± 0.00 | 1.0 ± 0.0 |" in text
    assert (tmp_path / "robustness.png").exists()


def test_every_row_of_the_readme_is_one_of_the_tables_made_of_the_results():
    tables, text = ((experiments.ROOT / p).read_text() for p in ("results/experiments/README.md", "README.md"))
    section = text.split("\n## Experiments")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|") and line.count("|") > 3]
    assert len(rows) > 10 and set(rows) <= set(tables.splitlines())


def test_results_name_no_path_of_this_machine(runner):
    text = json.dumps([f"{runner.out}/a {runner.args.data}/train", str(experiments.ROOT / "x")])
    assert json.loads(runner.tidy(text)) == ["OUT/a DATA/train", "./x"]


def test_no_result_that_is_kept_names_a_path_of_a_machine():
    files = list((experiments.ROOT / "results").rglob("*.json"))
    assert files and not [p for p in files if '"/' in p.read_text()]
