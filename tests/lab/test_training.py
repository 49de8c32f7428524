import dataclasses
import json
import math

import pytest
import torch

from bt_fast import Engine
from bt_fast.lab.checkpoint import load_checkpoint, save_checkpoint
from bt_fast.lab.config import PRESETS, RunConfig
from bt_fast.lab.data import ImageDataset
from bt_fast.lab.training import Run, median_speedup

CPU = torch.device("cpu")
METHODS = ("reference", "optimised", "bullet", "optimised-fast", "optimised-bf16", "bullet-fast", "bullet-bf16")


def blobs(train=40, test=12):
    """Three classes of 16x16 images that differ in where they are bright."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(train + test) % 3
    x = torch.randint(0, 60, (train + test, 1, 16, 16), generator=generator, dtype=torch.uint8)
    for i, label in enumerate(y):
        x[i, :, 5 * label : 5 * label + 5] += 150
    return ImageDataset("blobs", x[:train], y[:train], x[train:], y[train:], 3)


CONFIG = dataclasses.replace(
    PRESETS["digits"],
    methods=METHODS,
    engine="exact",
    data="blobs",
    width=2,
    epochs=2,
    batch_size=16,
    steps=3,
    boundary_steps=3,
    robust_steps=1,
    decay_epochs=(1,),
    eval_steps=2,
    curve_size=8,
)


def run_to_the_end(folder, config=CONFIG, **options):
    run = Run(folder, config, blobs(), CPU, **options)
    for _ in run.train():
        pass
    return run


def weights(run):
    return {c.method: c.model.state_dict() for c in run.contestants}


def assert_same_run(one, other):
    for method, state in weights(one).items():
        for name, value in state.items():
            assert torch.equal(value, weights(other)[method][name]), (method, name)
    for mine, theirs in zip(one.contestants, other.contestants, strict=True):
        if mine.bullet is not None:
            for name, value in mine.bullet.state_dict().items():
                assert torch.equal(value, theirs.bullet.state_dict()[name]), name
    without_clock = [{k: v for k, v in r.items() if k != "seconds"} for r in one.records()]
    assert without_clock == [{k: v for k, v in r.items() if k != "seconds"} for r in other.records()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_to_the_end(tmp_path_factory.mktemp("runs") / "whole")


def test_all_methods_see_the_same_minibatches_and_start_from_the_same_weights(tmp_path):
    run = Run(tmp_path / "run", CONFIG, blobs(), CPU)
    seen = {}
    for contestant in run.contestants:
        contestant.step = lambda x, y, *_, method=contestant.method: seen.setdefault(method, []).append((x, y))
    start = weights(run)
    for _ in range(3):
        run._step(torch.arange(5) + run.iteration)
    for method in METHODS:
        for (x, y), (x0, y0) in zip(seen[method], seen["reference"], strict=True):
            assert torch.equal(x, x0)
            assert torch.equal(y, y0)
        for name, value in start[method].items():
            assert torch.equal(value, start["reference"][name])


def test_a_method_trains_the_same_alone_as_in_company(finished, tmp_path):
    alone = run_to_the_end(tmp_path / "alone", dataclasses.replace(CONFIG, methods=("bullet",)))
    for name, value in weights(alone)["bullet"].items():
        assert torch.equal(value, weights(finished)["bullet"][name]), name


def test_records_tell_accuracy_time_and_fractions(finished):
    epochs = [r for r in finished.records() if r["kind"] == "epoch"]
    assert [(r["epoch"], r["method"]) for r in epochs] == [(e, m) for e in (1, 2) for m in METHODS]
    assert all(0 <= r["robust"] <= r["clean"] <= 1 and r["seconds"] > 0 and r["loss"] > 0 for r in epochs)


def test_the_fractions_recorded_are_the_shares_of_each_group(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=4, methods=("bullet",))
    run = run_to_the_end(tmp_path / "run", config)
    (record,) = (r for r in run.records() if r["kind"] == "fractions")
    assert record["iteration"] == 10
    counted = dict(zip(("outlier", "boundary", "robust"), run.contestants[0].counted.tolist(), strict=True))
    total = sum(counted.values())
    assert total == 3 * 40 + 16
    assert {group: record[group] for group in counted} == {group: n / total for group, n in counted.items()}


def test_after_each_epoch_the_steps_of_each_sample_are_recorded(finished):
    result = [r for r in finished.records() if r["kind"] == "allocation"]
    assert [r["method"] for r in result] == ["bullet", "bullet-fast", "bullet-bf16"] * 2
    for record in result:
        assert len(record["svar"]) == len(record["steps"]) == 40 % 16
        for svar, steps in zip(record["svar"], record["steps"], strict=True):
            assert steps == (0 if svar < 0 else 3 if svar <= record["threshold"] else 1)


def test_an_oracles_steps_are_not_recorded_for_they_take_an_attack(tmp_path):
    methods = ("bullet,policy=oracle", "bullet")
    run = run_to_the_end(tmp_path / "run", dataclasses.replace(CONFIG, epochs=1, methods=methods))
    assert [r["method"] for r in run.records() if r["kind"] == "allocation"] == ["bullet"]


def test_each_method_runs_on_the_engine_that_its_name_or_the_run_says(finished):
    engines = {c.method: c.criterion.engine.name for c in finished.contestants if c.criterion is not None}
    assert engines == {
        **{name: "exact" for name in ("optimised", "bullet")},
        **{f"{name}-{engine}": engine for name in ("optimised", "bullet") for engine in ("fast", "bf16")},
    }


def test_a_runs_engine_has_options(tmp_path):
    config = dataclasses.replace(CONFIG, methods=("bullet", "bullet-exact"), engine="exact,fold=on", epochs=1)
    run = run_to_the_end(tmp_path / "run", config)
    assert [c.engine for c in run.contestants] == [Engine(fold=True), Engine()]


def test_the_fast_engine_moves_the_weights_by_rounding_only(finished):
    for objective, view, most in (("optimised", "fast", 1e-3), ("bullet", "fast", 1e-3), ("bullet", "bf16", 0.05)):
        for name, exact in weights(finished)[objective].items():
            result = weights(finished)[f"{objective}-{view}"][name]
            torch.testing.assert_close(result, exact, rtol=0, atol=most)
    assert not torch.equal(weights(finished)["bullet-bf16"]["classifier.fc1.weight"], exact_fc1(finished))


def exact_fc1(run):
    return weights(run)["bullet"]["classifier.fc1.weight"]


@pytest.mark.parametrize("stop_after", range(1, 6))
def test_a_run_stopped_anywhere_resumes_to_the_same_end(finished, tmp_path, stop_after):
    first = Run(tmp_path / "run", CONFIG, blobs(), CPU)
    for at in first.train():
        if at.iteration == stop_after:
            first.save()
            break
    resumed = run_to_the_end(tmp_path / "run", resume=True)
    assert_same_run(resumed, finished)
    assert all(len(c.seconds) == finished.iterations for c in resumed.contestants)


def test_what_was_recorded_after_the_last_checkpoint_is_recorded_once(finished, tmp_path):
    first = Run(tmp_path / "run", CONFIG, blobs(), CPU)
    for at in first.train():
        if at.iteration == 2:
            first.save()
            first.save = lambda: None  # killed before it could save again
        if at.iteration == 4:
            break
    assert_same_run(run_to_the_end(tmp_path / "run", resume=True), finished)


def test_a_run_killed_before_its_first_iteration_can_be_resumed(finished, tmp_path):
    Run(tmp_path / "run", CONFIG, blobs(), CPU)
    assert_same_run(run_to_the_end(tmp_path / "run", resume=True), finished)


def test_a_record_cut_off_while_it_was_written_is_written_again(finished, tmp_path):
    first = Run(tmp_path / "run", CONFIG, blobs(), CPU)
    for at in first.train():
        if at.iteration == 4:
            first.save()
            break
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 5, "kind": "fra')
    assert_same_run(run_to_the_end(tmp_path / "run", resume=True), finished)


def test_a_metrics_file_that_is_another_thing_is_named(tmp_path):
    run = Run(tmp_path / "run", CONFIG, blobs(), CPU)
    (tmp_path / "run" / "metrics.jsonl").write_text("no record\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: a line is not a record"):
        run.records()


def test_a_checkpoint_whose_model_lacks_a_weight_is_named(tmp_path):
    run = Run(tmp_path / "run", CONFIG, blobs(), CPU)
    config, state = load_checkpoint(run.checkpoint_path)
    state["contestants"]["bullet"]["model"].popitem()
    save_checkpoint(run.checkpoint_path, config, state)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: does not fit this run"):
        Run(tmp_path / "run", CONFIG, blobs(), CPU, resume=True)


def test_a_folder_that_holds_a_run_is_not_overwritten(finished):
    with pytest.raises(ValueError, match="already holds a run"):
        Run(finished.folder, CONFIG, blobs(), CPU)


def test_a_checkpoint_of_another_configuration_is_refused_and_nothing_changes(finished):
    before = finished.checkpoint_path.read_bytes()
    with pytest.raises(ValueError, match=r"another configuration \(epsilon: 0.5 against"):
        Run(finished.folder, dataclasses.replace(CONFIG, epsilon=0.5), blobs(), CPU, resume=True)
    assert finished.checkpoint_path.read_bytes() == before


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1])
def test_a_truncated_checkpoint_is_named_in_the_error(finished, tmp_path, keep):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(finished.checkpoint_path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not a readable checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run_it(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "checkpoint.pt"
    torch.save({"bt_fast": 1, "config": Malicious(), "state": {}}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": torch.ones(1)}, "found format none"),
        (torch.ones(2), "found format Tensor"),
        ({"bt_fast": 99, "config": "{}", "state": {}}, "found format 99, expected 1"),
        ({"bt_fast": 1, "config": "{}", "state": {}}, "not a run configuration"),
        ({"bt_fast": 1, "config": "{", "state": {}}, "checkpoint.pt"),
        ({"bt_fast": 1}, "parts missing"),
        ({"bt_fast": 1, "config": CONFIG.to_json(), "state": {}}, "parts missing"),
        ({"bt_fast": 1, "config": CONFIG.to_json().replace('"epochs": 2', '"epochs": "x"'), "state": {}}, "epochs"),
        ({"bt_fast": 1, "config": CONFIG.to_json(), "state": {"contestants": {m: {} for m in METHODS}}}, "without"),
    ],
)
def test_a_file_that_is_another_thing_is_refused(tmp_path, content, message):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_a_configuration_with_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="must be one of trades, mart, pgd, augmix, got 'free'"):
        RunConfig.from_json(dataclasses.replace(CONFIG, loss="free").to_json())


@pytest.mark.parametrize("loss", ["mart", "pgd"])
def test_of_another_objective_reference_and_ours_take_the_same_first_step(tmp_path, loss):
    config = dataclasses.replace(CONFIG, loss=loss, methods=("reference", "optimised"))
    run = Run(tmp_path / "run", config, blobs(), CPU)
    for contestant in run.contestants:  # without MART's runner-up, which ties: this network starts with logits of 0
        torch.manual_seed(0)
        torch.nn.init.normal_(list(contestant.model.double().parameters())[-2], std=0.3)
    x, y = run.dataset.x_train[:8].double() / 255, run.dataset.y_train[:8]
    for contestant in run.contestants:
        contestant.step(x, y)
    reference, ours = run.contestants
    assert ours.loss_sum.item() == pytest.approx(reference.loss_sum.item(), rel=1e-9)
    for name, value in weights(run)["reference"].items():
        torch.testing.assert_close(weights(run)["optimised"][name], value, rtol=1e-8, atol=1e-9)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "nothing.pt")


def test_checkpoint_and_configuration_come_back_as_they_were(tmp_path):
    path = tmp_path / "checkpoint.pt"
    models = {method: {"model": {}} for method in METHODS}
    save_checkpoint(path, CONFIG, {"iteration": 3, "tensor": torch.arange(4), "contestants": models})
    config, state = load_checkpoint(path)
    assert config == CONFIG
    assert state["iteration"] == 3
    assert torch.equal(state["tensor"], torch.arange(4))
    assert RunConfig.from_json(json.dumps(json.loads(CONFIG.to_json()))) == CONFIG


def test_speedup_is_the_median_of_pairs_after_the_first_iterations():
    assert median_speedup([9.0, 9.0, 9.0, 2.0, 4.0, 6.0], [1.0, 1.0, 1.0, 1.0, 1.0, 2.0]) == 3.0
    assert median_speedup([2.0], [1.0]) == 2.0


def test_yopo_of_plain_adversarial_training_takes_the_mean_of_its_propagations(tmp_path):
    config = dataclasses.replace(CONFIG, loss="pgd", methods=("yopo-3-1",))
    contestant = Run(tmp_path / "run", config, blobs(), CPU).contestants[0]
    x, y = torch.rand(4, 1, 16, 16), torch.arange(4) % 3
    assert float(contestant._loss(x, y).detach()) == pytest.approx(math.log(3))  # new networks have logits of 0
