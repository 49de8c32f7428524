"""The prototype of remembered perturbations does what its head says, and its runs go on after a cut as if uncut."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import batch, build, gradients

from benchmarks import remembered, ten_times, ten_times_table
from benchmarks.remembered import BOUNDARY, OUTLIER, ROBUST, PlainMemory, Recipe, Rows, recipe_of, rows_by_arithmetic
from benchmarks.ten_times import METHODS, Config, Training
from bt_fast import PGD, BulletTrain, PerSample, Placement, TRADESLoss, perturb
from bt_fast.augment import CropAndFlip, crop
from bt_fast.lab.data import load_dataset

pytestmark = pytest.mark.any_torch
EPSILON = 0.1
quick = settings(max_examples=60, deadline=None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def made(recipe, model, x, y, *, fraction=0.5, delta=None, seed=0):
    given = {"epsilon": EPSILON, "fraction": fraction, "delta": delta, "generator": seeded(seed)}
    return remembered.minibatch(model, x, y, recipe_of(recipe) if isinstance(recipe, str) else recipe, **given)


# Against the package


def test_ten_steps_for_all_are_trades():
    (x, y), ours, theirs = batch(), build(), build()
    criterion = TRADESLoss(PGD(EPSILON, EPSILON / 4, 10), beta=6.0, engine="exact", clean_updates=1)
    expected = criterion(theirs, x, y, generator=seeded())
    result = made("10", ours, x, y)
    expected.backward()
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(result.x_adv, criterion.last.x_adv, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@quick
@given(st.integers(0, 10_000), st.floats(0, 1), st.integers(2, 6))
def test_groups_are_those_of_bullettrain(seed, fraction, classes):
    logits = 2 * torch.randn(24, classes, generator=seeded(seed), dtype=torch.float64)
    y = torch.where(torch.rand(24, generator=seeded(seed)) < 0.7, logits.argmax(dim=1), 0)
    bullet = BulletTrain()
    bullet.robust_fraction.fill_(fraction)
    assert torch.equal(remembered.groups(logits, y, fraction), bullet.plan(logits, y).group)


@pytest.mark.parametrize(("steps", "boundary_size"), [((10, 2, 0), 0.25), ((3, 2, 1), 1.7 / 3)])
def test_an_attack_by_groups_is_that_of_the_package(steps, boundary_size):
    model, (x, y) = build(), batch(16)
    recipe = Recipe(steps, mining=True)
    group = torch.arange(16) % 3
    counts = remembered._by_group(group, steps).long()
    sizes = EPSILON * remembered._by_group(group, recipe.step_sizes)
    assert float(sizes[1]) == pytest.approx(EPSILON * boundary_size)
    start = (x + 0.001 * torch.randn(x.shape, dtype=x.dtype, generator=seeded())).clamp(0, 1)
    target = model.eval()(x).detach().softmax(dim=1)
    x_adv = remembered.attack(model, x, start, target, y, counts, sizes, EPSILON, 0.0)
    own = PerSample(counts, start=start, step_size=sizes.clamp(min=1e-9))
    expected = perturb(model, x, y, PGD(EPSILON, 0.01, 10, inner="kl"), per_sample=own)
    moved = counts > 0
    torch.testing.assert_close(x_adv[moved], expected[moved], rtol=0, atol=1e-12)
    assert torch.equal(x_adv[~moved], start[~moved])


def test_the_margin_term_climbs_the_margin():
    model, (x, y) = build(), batch(16)
    target = model.eval()(x).detach().softmax(dim=1)
    steps, sizes = torch.ones(16, dtype=torch.int64), torch.full((16,), 0.05, dtype=torch.float64)
    x_adv = remembered.attack(model, x, x + 0, target, y, steps, sizes, EPSILON, 1e9)
    own = PerSample(steps, start=x, step_size=sizes)
    expected = perturb(model, x, y, PGD(EPSILON, 0.05, 1, inner="margin"), per_sample=own)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)


# What the options do


def test_a_remembered_start_is_clipped_and_a_sample_without_steps_stays():
    model, (x, y) = build(), batch(16)
    delta = torch.where(torch.rand(x.shape, generator=seeded()) < 0.5, EPSILON, -EPSILON).to(x.dtype)
    result = made("1/1/0,remember,sizes=0/0/0", model, x, y, delta=delta)
    away = (result.x_adv - x).abs()
    assert float(away.max()) <= EPSILON + 1e-12
    assert float(away[result.steps > 0].mean()) > 0.5 * EPSILON  # the rest is clipped at black and white
    assert (result.group == OUTLIER).any()
    assert torch.equal(result.x_adv[result.group == OUTLIER], x[result.group == OUTLIER])
    assert result.remembers.all()
    assert torch.equal(result.moved, result.group != OUTLIER)
    assert not result.perturbation(x, recipe_of("1/1/0"), EPSILON)[result.group == OUTLIER].any()


def test_steps_of_remembered_starts_have_the_prototypes_sizes():
    for text, sizes in (("1/1/0", (1.0, 1.0)), ("2/1/0", (0.5, 0.6)), ("2/2/0", (0.5, 0.5))):
        assert recipe_of(f"{text},remember").step_sizes[:2] == sizes


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_half_of_the_robust_samples_stand_for_all(n):
    group = torch.tensor([ROBUST] * n + [BOUNDARY, OUTLIER])
    drawn = torch.stack([remembered.half_of(group, seeded(k)) for k in range(400)])
    assert torch.allclose(drawn.sum(dim=1), torch.tensor(float(len(group))))
    assert (drawn[:, n:] == 1).all()
    assert ((drawn[:, :n] > 0).sum(dim=1) == (n + 1) // 2).all()
    assert n == 0 or (drawn[:, :n].mean(dim=0) - 1).abs().max() < 5 / 400**0.5  # unbiased


@pytest.mark.parametrize("half", ["half", "half-before"])
def test_those_left_out_run_no_adversarial_forward(half):
    model, (x, y) = build(), batch(32)
    result = made(f"1/1/0,remember,skip,{half}", model, x, y, delta=torch.zeros_like(x))
    left_out = result.weights == 0
    assert left_out.any()
    expected = ((result.group != OUTLIER) & ~left_out).nonzero().flatten()
    assert torch.equal(result.kept, expected)
    before = half == "half-before"
    assert torch.equal(result.steps[left_out] == 0, torch.full((int(left_out.sum()),), before))
    assert torch.equal(result.remembers, ~left_out if before else torch.ones(32, dtype=torch.bool))


@pytest.mark.parametrize("recipe", ["10/2/0", "1/1/0,remember,skip", "1/1/0,remember,skip,half,one-clean"])
def test_f_r_moves_by_weighted_samples_of_which_none_left_out_counts_as_robust(recipe):
    model, (x, y) = build(), batch(32)
    result = made(recipe, model, x, y, fraction=0.4)
    twin = build()
    with torch.no_grad():  # the update's forwards again, from the same buffers
        z, correct = twin(x), torch.zeros(32)
        correct[result.kept] = (twin(result.x_adv[result.kept]).argmax(dim=1) == y[result.kept]).float()
    unperturbed = torch.ones(32, dtype=torch.bool)
    unperturbed[result.kept] = False
    correct[unperturbed] = (z.argmax(dim=1) == y)[unperturbed].float()
    mean = float((result.weights * correct).sum()) / 32
    assert result.fraction == pytest.approx(0.9 * 0.4 + 0.1 * 0.8 * mean, abs=1e-12)


def test_the_step_of_the_updates_gradient_climbs_the_loss_within_the_ball():
    model, (x, y) = build(), batch(16)
    recipe = recipe_of("1/1/0,remember,skip,gradient=0.5")
    result = made(recipe, model, x, y, delta=torch.zeros_like(x))
    result.loss.backward()
    plain, further = (result.perturbation(x, r, EPSILON) for r in (recipe_of("1"), recipe))
    rows = torch.zeros(16, dtype=torch.bool)
    rows[result.kept] = True
    assert torch.equal(plain[~rows], further[~rows])
    assert (further - plain)[rows].mul(gradient_at(result, rows)).sum() > 0
    assert float(further.abs().max()) <= EPSILON + 1e-12


def gradient_at(result, rows):
    whole = torch.zeros_like(result.x_adv)
    whole[rows] = result.kept_adv.grad
    return whole[rows]


def test_in_16_bits_the_forwards_alone_are():
    (x, y), exact, rounded = batch(16, dtype=torch.float32), build(dtype=torch.float32), build(dtype=torch.float32)
    of_output = []
    rounded[-1].register_forward_hook(lambda module, given, output: of_output.append(output.dtype))
    recipe = "1/1/0,remember"
    results = [made(f"{recipe}{end}", m, x, y, delta=0 * x) for end, m in (("", exact), (",bf16", rounded))]
    assert set(of_output) == {torch.bfloat16}
    for result in results:
        result.loss.backward()
        assert result.loss.dtype == torch.float32
    assert float(results[1].loss.detach()) == pytest.approx(float(results[0].loss.detach()), rel=0.02)
    assert results[0].loss != results[1].loss
    assert all(p.grad.dtype == torch.float32 for p in rounded.parameters())


# Forward-pass equivalents

RECIPES = sorted({part.split(":")[-1] for text in METHODS.values() for part in text.split(";")} - {"authors"})


@pytest.mark.parametrize("recipe", [*RECIPES, "1/1/0,remember,half-before", "3/0/2,skip", "2/1/1,half"])
def test_the_rows_that_are_run_are_those_of_the_arithmetic(recipe):
    model, (x, y) = build(), batch(32)
    delta = torch.zeros_like(x) if "remember" in recipe else None
    with Rows(model) as rows:
        result = made(recipe, model, x, y, delta=delta)
        result.loss.backward()
    assert rows.count == rows_by_arithmetic(recipe_of(recipe), result.group)
    model(x).sum().backward()
    assert rows.count == rows_by_arithmetic(recipe_of(recipe), result.group)  # only in its block


def test_the_arithmetic_is_that_of_the_published_rows():
    group = torch.tensor([BOUNDARY] * 18 + [ROBUST] * 32 + [OUTLIER] * 50)
    cases = {
        "10": 27.0,
        "authors": 39.0,
        "10/2/0": 1 + 2 * (1.8 + 0.64) + 6,
        "1,remember": 9.0,
        "1/1/0,remember": 1 + 2 * 0.5 + 6,
        "1/1/0,remember,skip": 6.5,
        "1/1/0,remember,skip,half,one-clean": 3 + 2 * (0.18 + 0.32) + 3 * (0.18 + 0.32 / 2),
        "0/0/0,remember,skip,one-clean,gradient=1": 4.5,
    }
    for text, expected in cases.items():
        assert rows_by_arithmetic(recipe_of(text), group) / 100 == pytest.approx(expected)


# What is remembered


@quick
@given(st.integers(0, 10_000), st.booleans())
def test_a_memory_shows_what_a_crop_of_it_shows_and_keeps_the_rest(seed, int8):
    x = torch.rand(5, 2, 7, 6, generator=seeded(seed))
    _, at = CropAndFlip(padding=3)(x[:3], seeded(seed))
    indices, memory = torch.tensor([4, 0, 2]), PlainMemory(x.shape, EPSILON, int8=int8)
    delta = EPSILON * (2 * torch.rand(3, 2, 7, 6, generator=seeded(seed + 1)) - 1)
    memory.write(torch.arange(5), still(5), EPSILON * (2 * x - 1), torch.ones(5).bool())
    whole = memory.read(torch.arange(5), still(5))
    torch.testing.assert_close(whole, EPSILON * (2 * x - 1), rtol=0, atol=EPSILON / 254 + 1e-7 if int8 else 1e-7)
    assert torch.equal(memory.read(indices, at), crop(whole[indices], at))
    memory.write(indices, at, delta, torch.ones(3).bool())
    after = memory.read(torch.arange(5), still(5))
    shown = crop(torch.ones_like(delta), at) == 1
    torch.testing.assert_close(memory.read(indices, at)[shown], delta[shown], rtol=0, atol=EPSILON / 254 + 1e-7)
    where = torch.arange(1, 1 + 2 * 7 * 6).float().view(1, 2, 7, 6).expand(3, -1, -1, -1)
    for k, number in enumerate(indices.tolist()):
        seen = torch.isin(where[0], crop(where, at)[k])
        assert torch.equal(after[number][~seen], whole[number][~seen])
    others = [1, 3]
    assert torch.equal(after[others], whole[others])
    memory.write(indices, at, delta, torch.tensor([True, False, True]))
    assert torch.equal(memory.stored[0], torch.zeros_like(memory.stored[0]))
    assert torch.equal(memory.read(torch.tensor([4, 2]), still(2)), after[[4, 2]])


def still(m):
    return Placement(torch.zeros(m).long(), torch.zeros(m).long(), torch.zeros(m).bool())


# Runs

TINY = {"train": 20, "test": 6, "curve": 4, "epochs": 3, "batch": 8, "width": 2, "padding": 2, "epsilon": 0.2}
METHOD = "1/1/0,remember,skip,half,one-clean,beta=12;0.6:10/2/0"


class CutError(Exception):
    pass


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits").take(TINY["train"], TINY["test"])


def started(digits, folder, method=METHOD, **changes):
    return Training(Config(method, **TINY | changes), digits, folder / "run", folder / "checkpoint.pt")


def outcome(folder):
    records = ten_times.records_of(folder / "run" / "metrics.jsonl")
    timeless = [{k: v for k, v in r.items() if not k.endswith("seconds")} for r in records]
    return timeless, torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def uncut(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut")
    started(digits, folder).train()
    return outcome(folder)


CUTS = {  # a method, and before which of its calls
    "in the first minibatch": ("step", 0),
    "within an epoch": ("step", 5),
    "in the second phase": ("step", 7),
    "after an epoch's record, before its checkpoint": ("save", 5),
    "before the judgement": ("append", 3),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_run_that_was_cut_ends_as_if_it_were_not(cut, digits, uncut, tmp_path, monkeypatch):
    method, calls = CUTS[cut]
    monkeypatch.setattr(ten_times, "SECONDS", -1.0)  # a checkpoint after each step
    original, left = getattr(Training, method), [calls]

    def cut_off(self, *args, **options):
        if not left[0]:
            raise CutError
        left[0] -= 1
        return original(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Training, method, cut_off)
        with pytest.raises(CutError):
            started(digits, tmp_path).train()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "epo')
    started(digits, tmp_path).train()
    records, weights = outcome(tmp_path)
    assert records == uncut[0]
    torch.testing.assert_close(weights, uncut[1], rtol=0, atol=0)


def test_a_run_has_a_record_for_each_epoch_and_a_judgement(uncut):
    records, _ = uncut
    assert [r["kind"] for r in records] == ["config", "epoch", "epoch", "epoch", "judged"]
    config, first, _, last, judged = records
    assert first["F"] == first["F_by_arithmetic"] < last["F"] == last["F_by_arithmetic"]
    assert last["boundary"] + last["robust"] + last["outlier"] == pytest.approx(1)
    assert judged["images"] == 6
    assert judged["pgd50_margin"] <= judged["clean"]
    assert not any("/" in str(v) for k, v in config.items() if k != "method")  # no path of a machine


def test_an_ended_run_is_left_alone(digits, tmp_path):
    started(digits, tmp_path, "1", epochs=1).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    started(digits, tmp_path, "1", epochs=1).train()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_an_ended_run_can_be_judged_harder_once(digits, tmp_path):
    started(digits, tmp_path, "1", epochs=1).train()
    for _ in range(2):
        again = started(digits, tmp_path, "1", epochs=1)
        again.train()
        again.judge_hard()
    *_, judged, hard = ten_times.records_of(again.metrics)
    assert (judged["kind"], hard["kind"]) == ("judged", "hard")
    assert hard["clean"] == judged["clean"]
    assert hard["pgd100_margin"] <= judged["pgd50_margin"] + 1 / 6
    ((line,),) = ten_times_table.lines_of(tmp_path).values()
    assert line.spread("pgd100_margin") == f"{100 * hard['pgd100_margin']:.1f}"
    again.checkpoint.unlink()
    lines = again.metrics.read_text().splitlines(keepends=True)
    again.metrics.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="no such file, and the weights of the run are nowhere else"):
        started(digits, tmp_path, "1", epochs=1).judge_hard()


def test_a_folder_with_another_run_is_refused(digits, tmp_path):
    started(digits, tmp_path, "1")
    with pytest.raises(ValueError, match="a run with another method, lr"):
        started(digits, tmp_path, "2", lr=0.2)


def test_the_authors_code_takes_39_forward_passes(digits, tmp_path):
    run = started(digits, tmp_path, "authors")
    run.step(torch.arange(8), run.config.recipe(0))
    assert run.tally.record()["F"] == run.tally.record()["F_by_arithmetic"] == 39.0


def test_phases_begin_at_their_share_of_the_epochs():
    config = Config("1/1/0,remember,beta=12;0.4:2/1/0,remember;0.8:10/2/0", epochs=10)
    begun = [epoch for epoch in range(10) if epoch == 0 or config.recipe(epoch) != config.recipe(epoch - 1)]
    assert begun == [0, 4, 8]
    assert config.recipe(0).beta == 12


def test_the_rate_rises_and_falls_once():
    rates = [ten_times.rate(0.1, k / 100) for k in range(101)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.1)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ten", "expected to begin with steps"),
        ("1/2", "expected to begin with steps"),
        ("1/1/0,fast", "is no option of a recipe"),
        ("1/1/0,beta=x", "expected a number in it, got 'x'"),
        ("1,half", "half of the robust samples needs robust samples with steps"),
        ("1/0/0,half", "half of the robust samples needs robust samples with steps"),
        ("1,int8", "write remember, too"),
        ("authors,skip", "no option but beta"),
        ("1;0.8", "expected SHARE:RECIPE"),
        ("1;0.8:2;0.5:3", "with shares that grow below 1"),
    ],
)
def test_what_is_no_method_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        Config(text)


def test_the_command_trains_and_shows_its_table(tmp_path, capsys):
    tiny = [f"--{name}={value}" for name, value in TINY.items()]
    places = [f"--out={tmp_path / 'out'}", f"--checkpoints={tmp_path / 'checkpoints'}"]
    seeds = ["--seed=0", "--seed=1"]
    assert ten_times.main(["--method=remembered", *seeds, *tiny, "--epochs=1", "--hard", *places]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"digits-20-cnn5-2-1ep-1_remember-s{seed}" for seed in (0, 1)]
    first = json.loads((tmp_path / "out" / names[0] / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["flip"], first["epsilon"]) == (False, 0.2)
    assert ten_times.main(["--table", *places]) == 0
    assert "| remembered: `1,remember` | 2 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").read_text().endswith("(curves-1.png)\n")
    assert (tmp_path / "out" / "curves-1.png").stat().st_size > 10_000
    assert ten_times.main([*places]) == 2
    assert ten_times.main(["--method=ten", *tiny, *places]) == 2


def judged_run(folder, method, accuracies, **changes):
    """Writes the records of a run of two epochs, judged at these accuracies: clean, CE, margin."""
    config = dataclasses.asdict(Config(method)) | changes
    epoch = {"kind": "epoch", "F": 27.0, "cpu_seconds": 5.0, "boundary": 1.0, "robust": 0.0, "outlier": 0.0}
    judged = {"kind": "judged", "pgd20": 0.3} | dict(zip(("clean", "pgd50", "pgd50_margin"), accuracies, strict=True))
    folder.mkdir()
    lines = [{"kind": "config", **config}, epoch, epoch, judged]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def rows_of(folder):
    text = ten_times_table.table(folder)
    return text, [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]


def test_the_table_is_of_means_over_seeds_and_apart_by_training(tmp_path):
    for k, (seed, train, clean) in enumerate([(0, 100, 0.5), (1, 100, 0.6), (0, 200, 0.7)]):
        judged_run(tmp_path / str(k), "10", (clean, 0.25, 0.2), seed=seed, train=train)
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / "metrics.jsonl").write_text(json.dumps({"kind": "config"}) + "\n")
    text, (_, first, _, second) = rows_of(tmp_path)
    assert first[:5] == ["| trades: `10`", "2", "55.0 ± 7.1", "30.0 ± 0.0", "25.0 ± 0.0"]
    assert first[6] == "–"
    assert first[-4:] == ["1.00 / .00 / .00", "27.0", "1.44×", "10 |"]
    assert second[:3] == ["| trades: `10`", "1", "70.0"]
    assert text.count("## digits") == 2


def test_a_method_is_compared_with_the_line_through_trades_own_points(tmp_path):
    judged_run(tmp_path / "a", "10,beta=3", (0.60, 0.20, 0.16))
    judged_run(tmp_path / "b", "10,beta=6", (0.50, 0.30, 0.24))
    judged_run(tmp_path / "c", "1/1/0,remember", (0.55, 0.26, 0.18))
    judged_run(tmp_path / "d", "1,remember", (0.62, 0.26, 0.10))
    above = {row[0]: row[7] for row in rows_of(tmp_path)[1]}
    assert above["| remembered-1-1: `1/1/0,remember`"] == "+1.0 / -2.0"
    assert above["| remembered: `1,remember`"] == "– / –"
    assert above["| `10,beta=6`"] == "+0.0 / +0.0"
