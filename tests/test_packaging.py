"""What `pip install` gives: every package, a console script and the files that they need."""

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())
SHIPPED = PROJECT["tool"]["setuptools"]["package-dir"]


def test_every_package_is_listed() -> None:
    listed = {name for name in PROJECT["tool"]["setuptools"]["packages"] if name not in SHIPPED}
    found = {".".join(path.parent.parts) for path in Path("llava_ray").rglob("__init__.py")}
    assert listed | {"llava_ray"} == found


def test_every_config_and_template_is_shipped() -> None:
    folders = {Path(folder) for folder in SHIPPED.values()}
    needed = [*Path("jobs").rglob("*.py"), *Path("jobs/configs").rglob("*.yaml")]
    needed += [*Path("cluster").rglob("*.yaml"), *Path("serve").iterdir()]
    assert {path.parent for path in needed if "__pycache__" not in path.parts} <= folders


def test_what_the_package_tells_to_run_works_without_the_repository() -> None:
    for path in Path("llava_ray").rglob("*.py"):
        assert not re.findall(r"(?:python|bash) jobs/\S+", path.read_text("utf-8")), path
