import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_training import blobs

from bt_fast.lab.cli import cli
from bt_fast.lab.corruptions import CORRUPTIONS
from bt_fast.lab.methods import Method
from bt_fast.lab.studies import groups, sweeps, tables
from bt_fast.lab.studies.catalogue import STUDIES
from bt_fast.lab.studies.study import SCALES, Findings, open_run

SEEDS = ["--seed", "0", "--seed", "1"]
CPU = torch.device("cpu")
SMALL = ["--width", "2", "--epochs", "1", "--batch-size", "4", "--curve-size", "4", "--eval-steps", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An npz of three classes of 16x16 images, and the layout of CIFAR-10-C with its test images in it."""
    folder = tmp_path_factory.mktemp("data")
    result = blobs(train=40, test=12)
    arrays = {name: getattr(result, name).numpy() for name in ("x_train", "y_train", "x_test", "y_test")}
    np.savez(folder / "blobs.npz", **arrays)
    (folder / "corrupted").mkdir()
    np.save(folder / "corrupted" / "labels.npy", np.tile(arrays["y_test"], 5))
    for name in CORRUPTIONS:
        np.save(folder / "corrupted" / f"{name}.npy", np.tile(np.moveaxis(arrays["x_test"], 1, 3), (5, 1, 1, 1)))
    return folder


def study(name, data, out, *options):
    arguments = ["study", name, "--data", data / "blobs.npz", "--out", out, *SMALL, *options]
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def conducted(data, tmp_path_factory):
    """Returns a study's folder by its name; each study is conducted once."""
    done = {}

    def conduct(name):
        if name not in done:
            out = tmp_path_factory.mktemp("studies") / name
            corrupted = ["--corruptions-dir", data / "corrupted"] if STUDIES[name].corruptions else []
            result = study(name, data, out, *corrupted, *SEEDS)
            assert result.exit_code == 0, result.output
            done[name] = out
        return done[name]

    return conduct


def test_there_is_a_study_for_every_figure_with_an_experiment_and_every_table():
    assert list(STUDIES) == [*(f"fig{n}" for n in range(2, 8)), *(f"table{n}" for n in range(1, 5))]


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_study_has_a_sound_configuration_at_either_scale(name, scale):
    STUDIES[name].config(scale).check()


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_leaves_answers_a_picture_and_every_run(name, conducted):
    folder = conducted(name)
    result = json.loads((folder / f"{name}.json").read_text())
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert result["study"] == name
    assert result["seeds"] == [0, 1]
    assert [run["config"]["seed"] for run in result["runs"]] == [0, 1]
    assert list(result["runs"][0]["methods"]) == list(STUDIES[name].laptop.methods)
    assert result["answers"]


def test_the_same_command_goes_on_with_a_study_and_repeats_nothing(conducted, data, monkeypatch):
    folder = conducted("fig7")
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    monkeypatch.setattr("bt_fast.lab.training.evaluate", None)  # nothing is evaluated again
    result = study("fig7", data, folder, *SEEDS)
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before


def test_a_study_with_another_option_does_not_go_on(conducted, data):
    result = study("fig7", data, conducted("fig7"), "--seed", 0, "--epsilon", 0.1)
    assert result.exit_code == 2
    assert "epsilon: 0.1 against 0.2" in result.stderr


def test_one_more_seed_is_one_more_run(conducted, data):
    folder = conducted("fig6")
    result = study("fig6", data, folder, *SEEDS, "--seed", "2")
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "fig6.json").read_text())["seeds"] == [0, 1, 2]


def test_a_study_of_corruptions_without_any_asks_for_them_before_it_trains(data, tmp_path, monkeypatch):
    monkeypatch.setattr("bt_fast.lab.make_corruptions.LIBRARY", "no-such-library")
    result = study("table1", data, tmp_path / "out")
    assert result.exit_code == 2
    assert "bt-fast[corruptions]" in result.stderr
    assert not (tmp_path / "out").exists()


def test_robust_in_table_1_is_the_accuracy_under_corruption(conducted):
    for run in json.loads((conducted("table1") / "table1.json").read_text())["runs"]:
        for entry in run["methods"].values():  # the corrupted images of this test are the clean ones
            assert entry["robust"] == pytest.approx(entry["clean"])
            assert set(entry["errors"]) == set(CORRUPTIONS)


def test_a_corrupted_test_set_is_measured_once_and_another_one_anew(conducted, data, tmp_path):
    """A corrupted test set is identified by its content, not by its path."""

    def measured(corrupted):
        result = study("table1", data, folder, "--corruptions-dir", corrupted, "--seed", 0)
        assert result.exit_code == 0, result.output
        lines = (folder / "seed0" / "metrics.jsonl").read_text().splitlines()
        actual = json.loads((folder / "table1.json").read_text())["runs"][0]["methods"]
        return [json.loads(line) for line in lines if '"corruptions"' in line], actual

    folder, other, moved = tmp_path / "study", tmp_path / "other", tmp_path / "moved"
    shutil.copytree(conducted("table1"), folder)
    shutil.copytree(data / "corrupted", moved)
    shutil.copytree(data / "corrupted", other)
    np.save(other / "labels.npy", 0 * np.load(other / "labels.npy"))
    methods = len(STUDIES["table1"].laptop.methods)
    first, before = measured(moved)
    assert len(first) == methods
    second, after = measured(other)
    assert second[:methods] == first
    assert len(second) == 2 * methods
    assert after != before
    third, again = measured(moved)
    assert again == before
    assert [r["errors"] for r in third[2 * methods :]] == [
        r["errors"] for r in first
    ]  # the last are those of the study


def test_corruptions_that_a_study_has_no_use_for_are_refused(data, tmp_path):
    result = study("fig7", data, tmp_path / "out", "--corruptions-dir", data / "corrupted")
    assert result.exit_code == 2
    assert "--corruptions-dir: fig7 has no corruptions, table1 has; leave it away" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_seed_that_cannot_go_on_is_reported_before_another_is_trained(conducted, data, tmp_path, monkeypatch):
    shutil.copytree(conducted("fig7") / "seed1", tmp_path / "out" / "seed1")
    monkeypatch.setattr("bt_fast.lab.training.Run.train", None)
    result = study("fig7", data, tmp_path / "out", *SEEDS, "--epsilon", 0.1)
    assert result.exit_code == 2
    assert "seed1/checkpoint.pt: of another configuration (epsilon: 0.1 against 0.2" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["seed1"]


# The configurations of the studies


def test_figure_2_leaves_out_each_group_in_turn_at_the_papers_step_sizes():
    methods = [Method.parse(name).changes for name in STUDIES["fig2"].paper.methods]
    assert len(methods) == 3 * 64 - 3 * 8 + 1 + 1  # planes less their common axes, the origin, the baseline
    steps = {(m["boundary_steps"], m["outlier_steps"], m["robust_steps"]) for m in methods}
    assert all(0 in counts or counts == (7, 7, 7) for counts in steps)
    for method in methods:
        assert method["policy"] == "oracle"
        if method["boundary_steps"]:
            assert method["step_size"] == pytest.approx(1.7 * 0.3 / method["boundary_steps"], rel=1e-5)


def test_figure_6_and_7_vary_one_option():
    gammas = [Method.parse(name).changes for name in STUDIES["fig6"].paper.methods]
    assert gammas == [{"gamma": g} for g in (0.65, 0.7, 0.75, 0.8, 0.85, 0.9)]
    assert [Method.parse(name).changes for name in STUDIES["fig7"].paper.methods] == [
        {"robust_steps": n} for n in range(6)
    ]


def test_the_papers_configurations_are_its_own():
    assert STUDIES["table2"].paper.model == "wrn-34-10"
    assert (STUDIES["table2"].paper.epsilon, STUDIES["table2"].paper.steps, STUDIES["table2"].paper.beta) == (
        0.031,
        10,
        6.0,
    )
    assert (STUDIES["table1"].paper.model, STUDIES["table1"].paper.loss) == ("wrn-40-2", "augmix")
    assert STUDIES["table3"].paper.loss == "mart"
    fig2 = STUDIES["fig2"].paper
    assert (fig2.data, fig2.epochs, fig2.epsilon, fig2.eval_steps, fig2.eval_restarts) == ("mnist", 10, 0.3, 100, 20)


# The answers


def summary(**methods):
    """Returns a run's summary with the entries that the answers read."""
    entries = {
        name: {"label": name, "clean": 0.9, "robust": robust, "theoretical_speedup": theory, "speedup": {}}
        for name, (robust, theory) in methods.items()
    }
    for name, entry in entries.items():
        entry["speedup"] = {other: 2.0 for other in entries if other != name}
    return {"config": {"epochs": 1}, "methods": entries}


def findings(name, *summaries, records=()):
    return Findings(name, name, "laptop", summaries, records)


def test_a_table_compares_with_its_baseline():
    result = findings(
        "table3",
        summary(reference=(0.5, 1.0), bullet=(0.6, 2.0)),
        summary(reference=(0.7, 1.0), bullet=(0.6, 3.0)),
    )
    _, row = STUDIES["table3"].answers(result)["rows"]
    assert row["robust over the baseline"] == pytest.approx(0.0)
    assert row["robust of each seed"] == [0.6, 0.6]
    assert row["theoretical speedup"] == 2.5
    assert row["wall-clock speedup"] == 2.0


def test_fast_is_dominated_by_what_is_no_slower_and_no_less_robust():
    robust = dict(zip(tables.FAST_METHODS, ((0.3, 3.0), (0.4, 2.5), (0.5, 2.2), (0.6, 1.8)), strict=True))
    robust |= dict(zip(tables.BULLET_METHODS, ((0.35, 3.0), (0.39, 2.9), (0.45, 2.6), (0.5, 2.3)), strict=True))
    dominated = STUDIES["table4"].answers(findings("table4", summary(**robust)))["dominated by"]
    b3, _, b5, b6 = tables.BULLET_METHODS
    assert list(dominated.values()) == [[b3], [b5], [b6], []]


def test_figure_2_ranks_the_groups_by_the_best_that_is_left_without_them():
    methods = {}
    for name in STUDIES["fig2"].laptop.methods:
        changes = Method.parse(name).changes
        counts = [changes[f"{group}_steps"] for group in ("boundary", "robust", "outlier")]
        methods[name] = (sum(weight * n for weight, n in zip((9, 3, 1), counts, strict=True)) / 100, 1.0)
    answers = STUDIES["fig2"].answers(findings("fig2", summary(**methods)))
    assert answers["baseline"] == pytest.approx(91.0)
    assert answers["best robust accuracy"] == pytest.approx({"N_B = 0": 28.0, "N_R = 0": 70.0, "N_O = 0": 84.0})
    assert answers["most missed first"] == ["N_B = 0", "N_R = 0", "N_O = 0"]


def test_a_sweep_says_how_far_accuracy_moves():
    methods = dict(zip(STUDIES["fig6"].laptop.methods, [(0.80, 1.0), (0.85, 1.1)] * 3, strict=True))
    answers = STUDIES["fig6"].answers(findings("fig6", summary(**methods)))
    assert answers["range of robust"] == pytest.approx(0.05)
    assert answers["range of clean"] == 0.0


def observation(iteration, outlier, boundary, robust, svar, chance=0.5):
    names = ("outlier", "boundary", "robust")
    shares = dict(zip(names, (outlier, boundary, robust), strict=True))
    return {
        "kind": "groups",
        "iteration": iteration,
        "shares": shares,
        "svar": dict(zip(names, svar, strict=True)),
        "boundary_below_robust": chance,
    }


def test_figure_3_compares_the_first_and_the_last_fifth():
    records = [observation(10 * i, 0.9 - 0.1 * i, 0.0, 0.1 + 0.1 * i, (-1, 0, 1)) for i in range(5)]
    answers = STUDIES["fig3"].answers(findings("fig3", summary(), records=[records]))
    assert answers["outlier"] == pytest.approx({"first fifth": 0.9, "last fifth": 0.5, "rises": False})
    assert answers["robust"]["rises"]


def test_figure_4_counts_the_observations_in_the_papers_order():
    records = [
        observation(10, 0.3, 0.3, 0.4, (-0.1, 0.0, 0.1), 1.0),
        observation(20, 0.3, 0.3, 0.4, (-0.1, 0.1, 0.0), 0.5),
        observation(30, 0.0, 0.3, 0.7, (None, 0.1, 0.0), None),
    ]
    answers = STUDIES["fig4"].answers(findings("fig4", summary(), records=[records]))
    assert list(answers.values()) == [2, 0.5, 0.75]


def test_figure_5_counts_the_samples_by_their_steps():
    records = [{"kind": "allocation", "threshold": 0.05, "svar": [0.0] * 4, "steps": [2, 10, 0, 10]}]
    answers = STUDIES["fig5"].answers(findings("fig5", summary(), records=[records]))
    assert answers["of each seed"] == [{"threshold": 0.05, "samples by steps": {"0": 1, "2": 1, "10": 2}}]


# Looking at a run


def test_the_groups_are_those_of_an_attack_on_each_sample_and_nothing_is_disturbed(tmp_path):
    config = dataclasses.replace(
        STUDIES["fig5"].laptop, width=2, epochs=12, batch_size=8, decay_epochs=(), curve_size=4, eval_steps=1
    )
    plain = dataclasses.replace(STUDIES["fig5"], observe=None)
    runs = [open_run(s, config, blobs(), tmp_path / name, CPU) for s, name in ((STUDIES["fig5"], "a"), (plain, "b"))]
    for run in runs:
        for _ in run.train():
            pass
    observed, unobserved = runs
    for name, value in observed.contestants[0].model.state_dict().items():
        assert torch.equal(value, unobserved.contestants[0].model.state_dict()[name])
    for name, value in observed.contestants[0].bullet.state_dict().items():
        assert torch.equal(value, unobserved.contestants[0].bullet.state_dict()[name])
    assert [r["kind"] for r in observed.records() if r["iteration"] == 60] == [
        "fractions",
        "groups",
        "allocation",
        "epoch",
    ]
    x, y = observed.minibatch
    group, svar = groups.oracle_groups(observed, x, y)
    clean = observed.contestants[0].model.eval()(x).argmax(dim=1)
    assert torch.equal(group == 0, clean != y)
    assert torch.equal(svar < 0, clean != y)
    assert set(group.tolist()) <= {0, 1, 2}


def test_svar_separates_by_the_share_of_pairs_in_order():
    low, high = torch.tensor([0.0, 0.2]), torch.tensor([0.1, 0.2])
    assert groups._chance_below(low, high) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert groups._chance_below(low[:0], high) is None


def test_a_laptops_figure_2_has_the_baselines_steps_among_its_own():
    assert sweeps.MOST_STEPS in sweeps.LAPTOP_STEPS
