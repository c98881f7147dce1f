"""The documentation names files that exist, and the README's Python runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import PurePosixPath

import pytest

from support import REPO, run_python

PAGES = ["README.md", "tools/README.md", *(f"docs/{p.name}" for p in (REPO / "docs").glob("*.md"))]
SOURCE = r"[\w./*-]+\.(?:py|cpp|cu|cuh|h|md|toml)"
# Files of other projects, of model folders and of installations.
ELSEWHERE = {
    "configuration_NAME.py", "modeling_NAME.py", "server.py", "exl_loader_webui_start.py",
    "main.py", "start.py", "exl_loader_tabbyapi_start.py",
    "platform.py", "llama.cpp", "transformer.h",
}


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=REPO,
        capture_output=True, text=True,
    )
    if listed.returncode != 0:
        pytest.skip("no git checkout")
    return [name for name in listed.stdout.split() if (REPO / name).exists()]


def exists(name: str, files: list[str]) -> bool:
    """Tell whether a page's file name is the end of a file's path, from a folder on."""
    name = name.removeprefix("./")
    if "*" in name:
        pattern = re.compile(r"(^|.*/)" + re.escape(name).replace(r"\*", r"[^/]*") + "$")
        return any(map(pattern.match, files))
    return any(file == name or file.endswith("/" + name) for file in files)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    text, files = (REPO / page).read_text(encoding="utf-8"), tracked()
    names = set(re.findall(rf"(?<![\w./-])({SOURCE})(?!\w)", text)) - ELSEWHERE
    missing = {name for name in names if not name.startswith("../") and not exists(name, files)}
    assert not missing
    assert "../shared" not in text, "a page points outside of the repository"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file(page):
    text = (REPO / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)|(?:src|srcset)=\"([^\"]+)\"", text)
    folder = (REPO / page).parent
    for link in map("".join, links):
        if "://" not in link:
            assert (folder / link).exists(), link


def test_every_folder_that_the_architecture_names_exists():
    text = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = set(re.findall(r"`((?:[\w.]+/)+)`", text))
    assert folders
    tree = {f"/{parent}/" for file in tracked() for parent in PurePosixPath(file).parents}
    for folder in folders:
        assert any(known.endswith(f"/{folder}") for known in tree), folder


def test_the_python_of_the_readme_runs():
    pytest.importorskip("torch")
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text("utf-8"), re.S)
    printed = run_python(code)
    assert "does not fit" in printed and "bytes fit" in printed
