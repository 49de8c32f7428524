"""The README's scripts run as printed; the documents' links lead to existing targets, their commands exist."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import click
import pytest
import small_models
import torch

import bt_fast
from bt_fast.baselines.trades_reference import trades_reference_loss
from bt_fast.lab.cli import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OF_ROOT = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
DOCUMENTS = [*OF_ROOT, *sorted((ROOT / "docs").rglob("*.md"))]
OF_OTHERS = {"--help", "--full", "--rehearse", "--table", "--mining"}  # of every command, the benchmarks, an example
AUTHORS = SimpleNamespace(trades_loss=trades_reference_loss)  # in place of the authors' module `trades`


def names(**more):
    model, (x, y) = small_models.build("conv_bn"), small_models.batch(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "device": torch.device("cpu")} | {
        name: value(x, y) for name, value in more.items()
    }


def test_the_script_of_twelve_lines_trains(capsys):
    script = re.search(r"<!-- script -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(script.splitlines()) == 12
    given = names(loader=lambda x, y: [(x, y)] * 3, epochs=lambda *_: 2)
    before = [p.clone() for p in given["model"].parameters()]
    exec(script, given)
    assert any(not torch.equal(a, b) for a, b in zip(before, given["model"].parameters(), strict=True))
    assert given["criterion"].mining.group_counts.sum() == 2 * 3 * 8
    assert "folded view: yes" in capsys.readouterr().out


def diff(side):
    """Returns the lines of the README's diff before ("-") or after it ("+")."""
    lines = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1].splitlines()
    return "\n".join(line[1:] for line in lines if line[0] in f" {side}" and line.strip() != "...")


def run(script):
    torch.manual_seed(0)
    args = SimpleNamespace(step_size=0.03, epsilon=0.1, num_steps=10, beta=6.0)
    given = names(data=lambda x, _: x, target=lambda _, y: y, args=lambda *_: args)
    with mock.patch.dict(sys.modules, {"trades": AUTHORS}):
        exec(script, given)
    given["loss"].backward()
    return given


def test_another_import_alone_keeps_the_result_of_a_trades_script():
    before = diff("-")
    swapped = before.replace("from trades import trades_loss", "from bt_fast import trades_loss")
    assert swapped != before
    authors, ours = run(before), run(swapped)
    assert ours["loss"].item() == pytest.approx(authors["loss"].item(), rel=1e-10)
    for a, b in zip(authors["model"].parameters(), ours["model"].parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-10)


def test_the_diff_of_a_trades_script_runs_with_bullettrain():
    result = run(diff("+"))
    assert result["bullet"].group_counts.sum() == 8
    assert result["loss"].isfinite()


def test_the_readme_is_a_front_page():
    assert len(README.splitlines()) <= 150


def anchors(path):
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_exist(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in (link for link in links if not link.startswith(("http://", "https://"))):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def command_lines(text):
    """Returns the arguments of each `bt-fast`, without the comment behind them, and without "COMMAND --help"."""
    lines = re.findall(r"(?:bt-fast|-m bt_fast) +(?!COMMAND)([^`\n]*)", text)
    return [shlex.split(line, comments=True) for line in lines]


def check_command(name, *arguments):
    """Raises where click knows no such command or option, or a word or number is not one that the option takes."""
    context = click.Context(cli.commands[name], info_name=name)
    values, rest, _ = context.command.make_parser(context).parse_args(list(arguments))
    assert not set(rest) - {"..."}
    for parameter in context.command.params:
        given = values.get(parameter.name)
        if isinstance(given, str | list) and not isinstance(parameter.type, click.Path):
            for value in [given] if isinstance(given, str) else given:
                if not value.isupper() and value != "...":  # no placeholder
                    parameter.type.convert(value, parameter, context)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_and_options_exist(page):
    text = page.read_text(encoding="utf-8")
    if page.name != "CHANGELOG.md":  # which names those that are gone
        for arguments in command_lines(text):
            check_command(*arguments)
    options = {name for command in cli.commands.values() for option in command.params for name in option.opts}
    assert not set(re.findall(r"`(--[a-z-]+)", text)) - options - OF_OTHERS


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("trian", KeyError),
        ("train --modle small-cnn", click.NoSuchOption),
        ("train --loss trade", click.BadParameter),
        ("evaluate FILE --steps 0", click.BadParameter),
        ("evaluate FILE OTHER", AssertionError),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(arguments, error):
    with pytest.raises(error):
        check_command(*arguments.split())


def test_the_guides_lines_for_other_scripts_run_as_printed():
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").split("## Other scripts")[1]
    parts = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].split("# all of the above\n")
    small = dict(vars(bt_fast), F=torch.nn.functional) | names(x=lambda x, _: x.float(), y=lambda _, y: y)
    small |= {"model": small_models.build("conv_bn", dtype=torch.float32)}
    small |= {"helper": small_models.build("conv_bn", seed=1, dtype=torch.float32).eval()}
    of_losses = re.split(r"(?m)^(?=# )", parts[0])
    assert len(of_losses) == 7  # one of them empty, before the first
    for lines in of_losses[1:]:
        exec(lines + parts[1].split("# torchattacks")[0], small)
        assert small["loss"].isfinite()
        assert small["clean_and_adversarial"][1].shape == (8, small_models.CLASSES)
    for lines in re.split(r"(?m)^(?=# )", parts[1])[1:]:
        exec(lines, small)
        assert 0.0 < (small["x_adv"] - small["x"]).abs().max() <= 8 / 255 + 1e-6
