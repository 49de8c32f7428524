"""Brings into the site what lies outside docs/: the pages of the repository's root, and all files that pages link to.

A link is written as it works in the repository, `docs/guide.md` in README.md and `../examples/trades_awp.py` in docs/;
the site's pages have it as it works there. Programs become pages of code, folders lists of their files, and the rest
is copied. The site's generator calls `on_files` and `on_page_markdown`.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OF_ROOT = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
COPIES = "repository"  # the site's folder of the files that pages link to
CODE = {".py": "python", ".txt": "text"}
CODE_OR_LINK = re.compile(r"(?s)(```.*?```|`[^`]*`)|(?<=\]\()([^)\s#]+)(?=[)#])")
SCHEMAS = "<!-- the schemas of tests/public_api.txt -->"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and what they and those of docs/ link to."""
    sources = [Path(source) for source in OF_ROOT]
    sources += [Path("docs", file.src_uri) for file in files.documentation_pages()]
    for source, page in OF_ROOT.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    linked = {target for source in sources for target in links((ROOT / source).read_text(encoding="utf-8"), source)}
    for target in sorted(linked):
        if in_site(target).startswith(f"{COPIES}/"):
            for path in [target, *contents(target)]:
                add(files, config, path)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace each link to a file of the repository by one to its place in the site."""
    uri = page.file.src_uri
    source = of_page(uri)

    def replaced(match: re.Match[str]) -> str:
        target = match[2] and of_repository(match[2], source)
        return posixpath.relpath(in_site(target), posixpath.dirname(uri) or ".") if target else match[0]

    return CODE_OR_LINK.sub(replaced, markdown).replace(SCHEMAS, schemas())


def links(markdown: str, source: Path) -> Iterator[Path]:
    """Yield the files and folders of the repository that a page links to."""
    for match in CODE_OR_LINK.finditer(markdown):
        target = match[2] and of_repository(match[2], source)
        if target:
            yield target


def of_repository(link: str, source: Path) -> Path | None:
    """Return the path in the repository that a link in the file `source` leads to; None where there is no such file."""
    if ":" in link:
        return None
    path = Path(posixpath.normpath(posixpath.join(source.parent.as_posix(), link)))
    return path if (ROOT / path).exists() else None


def of_page(uri: str) -> Path:
    """Return the path in the repository of a page's source; of a page made of a folder, one in that folder."""
    of_root = {place: source for source, place in OF_ROOT.items()}
    if uri.startswith(f"{COPIES}/"):
        return Path(uri).relative_to(COPIES)
    return Path(of_root.get(uri, f"docs/{uri}"))


def in_site(path: Path) -> str:
    """Return the place in the site of a file or folder of the repository."""
    if path.as_posix() in OF_ROOT:
        return OF_ROOT[path.as_posix()]
    if path.parts[0] == "docs":
        return path.relative_to("docs").as_posix()
    if (ROOT / path).is_dir():
        return f"{COPIES}/{path.as_posix()}/index.md"
    return f"{COPIES}/{path.as_posix()}{'.md' if path.suffix in CODE else ''}"


def contents(folder: Path) -> list[Path]:
    """Return all files in a folder and its folders, sorted; none where it is a file."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())


def add(files: Files, config: MkDocsConfig, path: Path) -> None:
    """Add a file or folder of the repository to the site, once."""
    place = in_site(path)
    if files.get_file_from_path(place) is not None:
        return
    if (ROOT / path).is_dir():
        inside = [inner.relative_to(path).as_posix() for inner in contents(path)]
        body = "\n".join(f"- [{name}]({name})" for name in inside)
        files.append(File.generated(config, place, content=made_page(path, body)))
    elif path.suffix in CODE:
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=made_page(path, f"`````{CODE[path.suffix]}\n{text}`````\n")))
    else:
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))


def made_page(path: Path, body: str) -> str:
    """Return a page that the search leaves out, with a path for its title."""
    return f"---\ntitle: {path.as_posix()}\nsearch:\n  exclude: true\n---\n\n# `{path.as_posix()}`\n\n{body}\n"


def schemas() -> str:
    """Return the schemas of torch's operations, as the snapshot of the public API has them."""
    text = (ROOT / "tests" / "public_api.txt").read_text(encoding="utf-8")
    return "```text\n" + "\n".join(re.findall(r"^torch\.ops\..*$", text, re.MULTILINE)) + "\n```"
