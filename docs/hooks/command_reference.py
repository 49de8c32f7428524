"""Writes every command of bt-fast with its options, as `--help` has them, into the page that asks for it."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import click

from bt_fast.lab.cli import cli

PLACE = "<!-- every command and its options -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the comment in a page by the reference."""
    return markdown.replace(PLACE, "\n".join(reference())) if PLACE in markdown else markdown


def reference() -> Iterator[str]:
    """Yield the lines of all commands, sorted by name."""
    above = click.Context(cli, info_name="bt-fast")
    for name, command in sorted(cli.commands.items()):
        context = click.Context(command, info_name=name, parent=above)
        yield f"## bt-fast {name}\n"
        yield f"{escaped(inspect.cleandoc(command.help or ''))}\n"
        yield f"```\n{' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n```\n"
        yield "| option | what it does |\n| --- | --- |"
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
            if record:
                yield f"| {code(record[0])} | {escaped(' '.join(record[1].split()))} |"
        yield ""


def code(text: str) -> str:
    """Return text as code in a cell of a table."""
    return f"`{text}`"


def escaped(text: str) -> str:
    """Return text whose signs mean nothing in Markdown; options in it are code."""
    text = re.sub(r"([\\`*_|\[\]])", r"\\\1", text).replace("<", "&lt;")
    return re.sub(r"(?<!\S)--[a-z][a-z-]*", lambda match: f"`{match[0]}`", text)
