"""README and the other pages: the tree, the links and the Python in them are true."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from snr_ray.usage import PURPOSE

REPOSITORY = Path(__file__).parent.parent


def test_readme_names_what_exists() -> None:
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 260
    tree = re.search(r"```\n(pyproject\.toml.*?)```", text, re.DOTALL)
    assert tree
    package = REPOSITORY / "snr_ray"
    ground = re.findall(r"\b(\w+\.py)\b", tree.group(1).partition("snr_ray/\n")[2])
    assert ground == sorted(p.name for p in package.glob("[!_]*.py"))
    rooms, room = {}, ""
    for line in tree.group(1).partition("snr_ray/\n")[2].splitlines():
        if found := re.match(r" {2}(\w+)/ ", line):
            room = found[1]
            rooms[room] = ""
        elif found := re.match(r" {4}(\w+)/ +(.*)", line):
            rooms[f"{room}/{found[1]}"] = found[2]
        elif found := re.match(r" {17}(.*)", line):
            rooms[room] = found[1]
    with_code = {str(p.parent.relative_to(package)) for p in package.glob("*/**/__init__.py")}
    assert set(rooms) == {*with_code, "presets", "shipped"}
    for room, modules in rooms.items():
        assert modules.split() == sorted(p.stem for p in (package / room).glob("[!_]*.py")), room
    for command in re.findall(r"^snr (\w+)", text, re.MULTILINE):
        assert command in PURPOSE
    with Image.open(REPOSITORY / ".pictures" / "glyphs.png") as picture:
        assert np.asarray(picture).std() > 10


def test_links_of_all_pages_resolve() -> None:
    pages = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("cluster/*.md")]
    for page in [*pages, *REPOSITORY.glob("snr_ray/**/*.md")]:
        text = page.read_text()
        anchors = {
            re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        }
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in anchors, f"{page}: {target}"
            elif "://" not in target:
                assert (page.parent / target.partition("#")[0]).exists(), f"{page}: {target}"


def test_python_of_the_readme_runs() -> None:
    text = (REPOSITORY / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    for name in ("blind", "told"):
        assert names[name].shape == names["clean"].shape
