"""A hook of mkdocs: pages of the site that docs/ does not hold, so that links to them work there and on GitHub alike.

README.md is the home page; what else of the repository a page links to becomes a page below source/.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:)[^)\s#]+|(?<=src=\")(?!\w+:)[^\"#]+")
ORIGINS: dict[str, Path] = {"index.md": ROOT / "README.md"}
"""What a page of the site is made of, by its name there, where that is not the same file of docs/."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and those that they link to in turn."""
    files.append(File.generated(config, "index.md", content=ORIGINS["index.md"].read_text(encoding="utf-8")))
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for link in _links(page):
            target = (_origin(page).parent / link).resolve()
            if files.get_file_from_path(name := _name(target)) is None:
                ORIGINS[name] = target
                files.append(File.generated(config, name, content=_content(target)))
                waiting.append(files.src_uris[name])
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point each link at its page."""

    def moved(link: re.Match[str]) -> str:
        name = _name((_origin(page.file).parent / link[0]).resolve())
        return get_relative_url(name, page.file.src_uri)

    return LINK.sub(moved, markdown) if _links(page.file) else markdown


def _links(file: File) -> list[str]:
    """What a page of text links to beside itself and other servers; source code links to nothing."""
    return LINK.findall(file.content_string) if _origin(file).suffix == ".md" else []


def _origin(file: File) -> Path:
    return ORIGINS.get(file.src_uri, ROOT / "docs" / file.src_uri)


def _name(target: Path) -> str:
    """The page of a file or folder of the repository."""
    target = target / "README.md" if (target / "README.md").exists() else target
    inside = target.relative_to(ROOT).as_posix()
    if inside == "README.md":
        return "index.md"
    if inside.startswith("docs/") and target.suffix in (".md", ".png", ".jpg"):
        return inside.removeprefix("docs/")
    return "source/" + inside + ("" if target.suffix == ".md" else ".md")


def _content(target: Path) -> str:
    """Markdown as it is, a folder's names, a file's text; of figures only how large they are."""
    name = target.relative_to(ROOT).as_posix()
    if target.is_dir():
        return f"# {name}\n\n" + "\n".join(f"- `{each.name}`" for each in sorted(target.iterdir()))
    if target.suffix == ".md":
        return target.read_text(encoding="utf-8")
    if target.suffix == ".json":
        return f"# {name}\n\nA file of {target.stat().st_size} bytes in the repository."
    return f"# {name}\n\n````{target.suffix.removeprefix('.')}\n{target.read_text(encoding='utf-8')}\n````"
