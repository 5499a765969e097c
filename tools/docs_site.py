"""Hooks of the docs site: pages from the repository's root, an API page, links between them.

Docstrings are read, not imported: neither torch nor the built package is needed.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Page of the site -> where the repository has it.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "emulator.md": "emulator/README.md",
}
# Packages whose public names the API page documents.
PACKAGES = ("less", "less.hf", "less.fit")
_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=linked(text, source)))
    files.append(File.generated(config, "api.md", content=api()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links of docs/ that lead out of it to pages of the site."""
    path = page.file.src_uri
    return markdown if path in (*PAGES, "api.md") else linked(markdown, f"docs/{path}")


def linked(text: str, source: str) -> str:
    """A page's text whose links lead to pages of the site; what is no page there loses its link."""
    where = {source: page for page, source in PAGES.items()}

    def changed(found: re.Match[str]) -> str:
        target, _, anchor = found["target"].partition("#")
        if "://" in target or not target:
            return found[0]
        file = ((ROOT / source).parent / target).resolve().relative_to(ROOT).as_posix()
        if source.startswith("docs/") and file.startswith("docs/"):
            return found[0]
        page = where.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        if page is None:
            return found["text"][1:-1]
        return f"{found['text']}({page}{'#' * bool(anchor)}{anchor})"

    return _LINK.sub(changed, text)


def api() -> str:
    """The API page: every public name of every package."""
    out = ["# API\n"]
    for package in PACKAGES:
        file = ROOT / package.replace(".", "/") / "__init__.py"
        out.append(f"## {package}\n")
        out += [f"::: {package}.{name}\n" for name in public(file) if not name.startswith("__")]
    return "\n".join(out)


def public(file: Path) -> list[str]:
    """The names in a module's ``__all__``: read, not imported."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return []
