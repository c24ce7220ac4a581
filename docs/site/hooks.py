"""What MkDocs needs to build the site from pages that are written to be read in the repository.

README, CONTRIBUTING and CHANGELOG become pages. Files of the project to which pages link become pages with the file's
text, or are copied. Every public module of the rooms below becomes a page of the API reference.
"""

from __future__ import annotations

import ast
import re
from os.path import relpath
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
AT_THE_TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ROOMS = ("mocae", "routing", "experts", "training", "baselines", "data", "models", "config", "evaluation", "export")
SHOWN = {".yaml": "yaml", ".py": "python", ".sh": "bash", ".toml": "toml"}  # files that become pages, by their language
FILES, REFERENCE = "files", "reference"
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
EXTERNAL = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|url\([\"']?((?:https?:)?//[^)\"']+)|@import [\"']((?:https?:)?//[^\"']+)"
)


def modules(room: str) -> list[Path]:
    """Those of a room with something public that has a docstring."""
    found = []
    for path in sorted((ROOT / "alignx_ds" / room).rglob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
        if any(ast.get_docstring(node) for node in public):
            found.append(path)
    return found


def reference_page(module: Path) -> str:
    return f"{REFERENCE}/{module.relative_to(ROOT / 'alignx_ds').with_suffix('.md')}"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    assert config.nav is not None
    rooms: list[Any] = [{room: [{path.stem: reference_page(path)} for path in modules(room)]} for room in ROOMS]
    config.nav.append({"API reference": rooms})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "site.css", abs_src_path=str(Path(__file__).with_name("site.css"))))
    for source, page in AT_THE_TOP.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in (path for room in ROOMS for path in modules(room)):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        files.append(File.generated(config, reference_page(path), content=f"# {name}\n\n::: {name}\n"))
    for page in [*files.documentation_pages()]:
        for _, target, _ in LINK.findall(FENCE.sub("", page.content_string)):
            if project_file := outside_of_docs(page.src_uri, target):
                add_project_file(project_file, files, config)
    return files


def outside_of_docs(page: str, target: str) -> Path | None:
    """The file of the project that a link leads to, if it is no page and nothing beside the pages."""
    if "://" in target:
        return None
    top = next((name for name, made in AT_THE_TOP.items() if made == page), None)
    path = ((ROOT / top if top else ROOT / "docs" / page).parent / target).resolve()
    inside = path.is_relative_to(ROOT / "docs") or (path.name in AT_THE_TOP and path.parent == ROOT)
    return None if inside or not path.exists() else path


def place_of(path: Path) -> str:
    """The name of a project's file in the site's sources."""
    name = f"{FILES}/{path.relative_to(ROOT)}"
    return f"{name}/index.md" if path.is_dir() else f"{name}.md" if path.suffix in SHOWN else name


def add_project_file(path: Path, files: Files, config: MkDocsConfig) -> None:
    place, name = place_of(path), path.relative_to(ROOT)
    if files.get_file_from_path(place):
        return
    hidden = "---\nsearch: {exclude: true}\n---\n"
    if path.is_dir():
        listed = sorted(entry for entry in path.iterdir() if entry.is_file())
        lines = "\n".join(f"- [{entry.name}]({entry.name})" for entry in listed)
        files.append(File.generated(config, place, content=f"{hidden}# {name}\n\n{lines}\n"))
        for entry in listed:
            add_project_file(entry, files, config)
    elif path.suffix in SHOWN:
        text = path.read_text(encoding="utf-8")
        content = f"{hidden}# {name}\n\n`````{SHOWN[path.suffix]}\n{text}\n`````\n"
        files.append(File.generated(config, place, content=content))
    else:
        files.append(File.generated(config, place, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them."""

    def moved(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        path = outside_of_docs(page.file.src_uri, target)
        if path:
            target = relpath(place_of(path), Path(page.file.src_uri).parent)
        elif page.file.src_uri in AT_THE_TOP.values():
            target = AT_THE_TOP.get(target, target.removeprefix("docs/"))
        return f"{before}{target}{after}"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


def on_post_build(config: MkDocsConfig) -> None:
    """Fail where a page would load something from elsewhere."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for found in EXTERNAL.finditer(path.read_text(encoding="utf-8")):
                if 'rel="canonical"' not in found[0]:
                    raise PluginError(f"{path}: loads {next(filter(None, found.groups()))}")
