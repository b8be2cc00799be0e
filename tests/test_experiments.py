"""experiments.py: the stages accept its commands, and the results hold every figure that is quoted."""

import json
import re
from pathlib import Path

import experiments
import pytest
import shapes

import common
import denoise
import pretrain
import probe

STAGES = {"denoise.py": denoise, "pretrain.py": pretrain, "probe.py": probe}
RESULTS = experiments.ROOT / "results"


def commands(script):
    """All different commands of a stage in the plan, as lists of words."""
    found = {command for run in experiments.plan().values() for command in run}
    return [command.split()[1:] for command in sorted(found) if command.startswith(script)]


@pytest.mark.parametrize("script", STAGES)
def test_every_command_of_the_plan_is_accepted_by_its_stage(script):
    found = commands(script)
    assert len(found) > 15
    for flags in found:
        STAGES[script].read_config(flags)


def test_the_plan_has_every_arm_and_ablation():
    names = set(experiments.plan())
    for base in ("gauss100", "gauss255"):
        assert f"{base}-pixels-seed0" in names and f"{base}-pixels-seed1" not in names
        for arm in ("random", "noisy", "nc", "nct", "denoised"):
            assert {f"{base}-{arm}-seed{seed}" for seed in (0, 1, 2)} <= names
    ablated = {"gauss100-switch9", "gauss100-live", "gauss100-anchor0.5", "weak-gauss100-nct-seed0",
               "gauss255-switch30", "impulse0.3-nct-seed0", "search-lr0.004-clean"}
    assert ablated <= names


def test_every_init_is_what_an_earlier_command_leaves():
    """--init is epochS.pth of a denoised run that stopped at S, of the same model, seed and data."""
    same = ("noise", "seed", "data", "patch_size", "global_size", "lr", "prototypes", "arch")
    count = 0
    for run in experiments.plan().values():
        left = {}  # file: settings of the run that leaves it
        for command in run:
            script, *flags = command.split()
            if script != "pretrain.py":
                continue
            args = pretrain.read_config(flags)
            if args.stop:
                left[f"{args.out}/epoch{args.stop}.pth"] = args
            if args.init:
                first = left[args.init]
                for name in same:
                    assert getattr(args, name) == getattr(first, name)
                assert (first.source, args.source) == ("denoised", "noisy")
                assert args.epochs + first.stop == first.epochs
                assert not args.denoised or args.denoised == first.denoised
                count += 1
    assert count > 40


def test_a_denoised_run_never_has_to_go_back():
    """Whatever runs of the plan are made first: a run's stops come in order, and none is left out."""
    stops = {}  # of each denoised run, by the runs that share it
    for run in experiments.plan().values():
        configs = [pretrain.read_config(c.split()[1:]) for c in run if c.startswith("pretrain.py")]
        for out in {args.out for args in configs if args.source == "denoised" and args.stop}:
            ends = [args.stop or args.epochs for args in configs if args.out == out]
            assert ends == sorted(ends)
            stops.setdefault(out, []).append(ends)
    assert len(stops) > 10
    for shared in stops.values():
        longest = max(shared, key=len)
        assert all(ends == longest[:len(ends)] for ends in shared)


def test_every_denoised_folder_is_made_by_an_earlier_command():
    for run in experiments.plan().values():
        made = set()
        for command in run:
            words = command.split()
            for flag in ("--denoised", "--denoiser"):
                assert flag not in words or words[words.index(flag) + 1] in made
            made.add(words[words.index("--out") + 1])


def test_search_holds_a_part_of_train_out_and_never_sees_val(tmp_path):
    shapes.write(tmp_path / "data", 40, 20, size=32)
    experiments.make_search(tmp_path / "data", tmp_path / "search")
    links = {split: list((tmp_path / "search" / split).glob("*/*")) for split in ("train", "val")}
    targets = {split: {link.resolve() for link in links[split]} for split in links}
    assert targets["val"] and not targets["val"] & targets["train"]
    assert targets["val"] | targets["train"] == set((tmp_path / "data/train").glob("*/*"))
    for name, run in experiments.plan().items():
        if name.startswith("search-"):
            assert all("--data OUT/search " in command for command in run)


def probe_result(linear, **more):
    return {
        "linear": linear, "clean_linear": linear - 1,
        "knn": {"20": 30.0}, "clean_knn": {"20": 31.0}, "cosine": 0.5,
        "summary": {"seconds": 60.0}, "sweep": [{"strength": 1, "linear": linear}], **more}


def test_tables_give_mean_and_deviation_over_seeds(tmp_path):
    path = tmp_path / "experiments.jsonl"
    for seed, linear in enumerate((40.0, 44.0, 48.0)):
        experiments.save(path, f"gauss100-noisy-seed{seed}", probe_result(linear))
    experiments.save(path, "gauss100-nct-seed2", probe_result(49.5))
    text, panels = experiments.tables(experiments.read_results(path))
    figures = "44.0 ± 4.0 | 43.0 ± 4.0 | 30.0 ± 0.0 | 31.0 ± 0.0 | 0.50 ± 0.00"
    assert f"| gauss100-noisy | 3 | {figures} |" in text
    assert "| gauss100-nct minus noisy | 1 | 1.5 | 1.5 | 0.0 | 0.0 | 0.00 |" in text  # of seed 2
    assert panels == {"gauss100: linear probe in %, by test noise": {"noisy": [(1, 44.0)]}}


def test_retrieval_is_of_those_seeds_that_were_probed_for_it():
    ranks = {"map": 20.0, "map_r": 8.0, "recall1": 40.0, "recall5": 70.0, "recall10": 90.0}
    results = {f"gauss100-nct-seed{k}": probe_result(40.0) for k in range(3)}
    results["gauss100-nct-seed1"] |= ranks
    results["gauss100-nct-seed2"] |= {**ranks, "recall1": 42.0}
    results["gauss100-noisy-seed0"] = probe_result(30.0)
    text, _ = experiments.tables(results)
    assert "| retrieval | seeds | mAP | mAP@R | Recall@1 | Recall@5 | Recall@10 |" in text
    rows = [line for line in text.splitlines() if "90.0" in line]
    assert rows == ["| gauss100-nct | 2 | 20.0 ± 0.0 | 8.0 ± 0.0 | 41.0 ± 1.4 | 70.0 ± 0.0 | 90.0 ± 0.0 |"]


def test_minutes_are_those_of_the_whole_curriculum_and_monitors_those_of_the_end(tmp_path):
    """A run's summary counts the runs before it, too (tests of pretrain.py)."""
    log = [{"step": 1, "entropy": 6.0, "rank": 3.0}, {"step": 2, "entropy": 5.0, "rank": 7.0}]
    common.write_text(tmp_path / "run/log.jsonl", "\n".join(map(json.dumps, log)))
    common.write_json(tmp_path / "run.json", probe_result(50.0, config={}, pretrain={}))
    row = experiments.columns(experiments.figures(tmp_path / "run.json", tmp_path / "run"))
    assert row["minutes"] == 1.0 and row["effective rank"] == 7.0


def test_a_run_replaces_its_own_line_alone(tmp_path):
    path = tmp_path / "experiments.jsonl"
    for name, seconds in (("b", 1.0), ("a", 1 / 3), ("b", 2.0)):
        experiments.save(path, name, {"seconds": seconds})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["name"], line["seconds"]) for line in lines] == [("a", 0.333333), ("b", 2.0)]
    assert all(line["date"] and line["torch"] and line["hardware"] for line in lines)


def test_a_finished_run_is_saved_with_its_commands_and_not_made_again(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(experiments, "call", lambda *command: called.append(command))
    monkeypatch.setattr(experiments, "figures", lambda result, folder: probe_result(50.0))
    name = "gauss100-noisy-seed0"
    flags = ["--data", "D", "--out", "O", "--results", str(tmp_path), "--only", name]
    monkeypatch.setattr("sys.argv", ["experiments.py", *flags])
    experiments.main()
    experiments.main()
    assert [command[0] for command in called] == ["pretrain.py", "probe.py"]
    assert called[0][-1] == f"O/{name}"
    result = experiments.read_results(tmp_path / "experiments.jsonl")[name]
    assert result["commands"] == [f"python {command}" for command in experiments.plan()[name]]
    assert "gauss100-noisy | 1 | 50.0" in (tmp_path / "experiments.md").read_text()


@pytest.mark.parametrize("flags", [
    "nonsense --data D", "gauss100-nc-seed0", "denoiser-gauss25-kodak --data D"])
def test_runs_that_cannot_be_made_are_refused_by_name(flags, monkeypatch):
    words = flags.split()
    monkeypatch.setattr("sys.argv", ["experiments.py", "--only", *words])
    with pytest.raises(common.UserError, match=words[0]):
        experiments.main()


# ==== what is kept ================================================================================
def test_the_tables_are_made_of_the_results():
    text, panels = experiments.tables(experiments.read_results(RESULTS / "experiments.jsonl"))
    assert text == (RESULTS / "experiments.md").read_text()
    assert panels and (RESULTS / "robustness.png").exists()


def test_every_figure_of_the_page_is_in_the_tables():
    tables = (RESULTS / "experiments.md").read_text()
    page = (RESULTS / "README.md").read_text().split("\n## Speed")[0]  # speed is of bench-*.json
    page = page.split("\n### Correlated noise")[0]  # which tests/strides.py prints
    rows = [line for line in page.splitlines() if line.startswith("|")]
    rows = [row for row in rows if row.count("|") > 3]  # without those of prose
    assert len(rows) > 50
    assert set(rows) <= set(tables.splitlines())
    quoted = set(re.findall(r"-?\d+\.\d+ ± \d+\.\d+", page))
    assert len(quoted) > 30
    assert not [figure for figure in quoted if figure not in tables]


@pytest.mark.parametrize("name", ["star_galaxy", "mstar10", "nuclei-gauss100", "nuclei-shot3"])
def test_every_figure_of_real_noise_and_of_masks_is_that_of_its_file(name):
    arms = common.read_json(RESULTS / f"{name}.json")
    results = [result for runs in arms.values() for result in runs.values()]
    made = probe.figures_table(arms, probe.COLUMNS, probe.shown_columns(results)) + probe.few_shot_tables(arms)
    rows = [line for line in made if line.startswith("| ")]
    page = (RESULTS / "README.md").read_text().split("\n## Real noise")[1].splitlines()
    assert len(rows) >= 4
    assert set(rows) <= set(page)


def test_results_are_sorted_whole_and_name_no_path_of_a_machine():
    lines = (RESULTS / "experiments.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    names = [result["name"] for result in results]
    assert names == sorted(set(names)) and len(names) > 150
    for result in results:
        assert result["date"] and ("hardware" in result or "note" in result)
    for path in Path(RESULTS).glob("*.json*"):
        assert '"/' not in path.read_text() and " /" not in path.read_text()
