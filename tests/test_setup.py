"""The installation compiles llama.cpp without what the compiler would break (A1), and a test that
native code ends costs no other its result."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


def flags(
    tmp_path: Path, *, version: str, machine: str, knows: bool = True, compiler: str = "c++"
) -> str:
    """Ask jobs/setup.sh for its flags, with a compiler and a machine of that kind."""
    scripts = {
        compiler: f'case "$*" in *dumpversion*) echo {version} ;; *--version*) echo "g++ {version}"'
        f" ;; *) exit {0 if knows else 1} ;; esac",
        "uname": f"echo {machine}",
    }
    for name, body in scripts.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    command = "source jobs/setup.sh; safe_compiler_flags"
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment |= {} if compiler == "c++" else {"CXX": compiler}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], env=environment, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("version", "said"), [("12", AMX), ("11.4.0", AMX), ("13", ""), ("14.2", "")]
)
def test_gcc_before_13_leaves_amx_out(tmp_path: Path, version: str, said: str) -> None:
    assert flags(tmp_path, version=version, machine="x86_64") == said


def test_the_compiler_of_the_environment_is_looked_at(tmp_path: Path) -> None:
    for name, version, said in (("g++-12", "12", AMX), ("g++-14", "14", "")):
        assert flags(tmp_path, version=version, machine="x86_64", compiler=name) == said


def test_no_flag_that_a_compiler_does_not_know(tmp_path: Path) -> None:
    assert flags(tmp_path, version="12", machine="aarch64") == ""
    assert flags(tmp_path, version="10", machine="x86_64", knows=False) == ""


def test_bytecode_is_compiled_once_for_a_list_of_packages(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a==1")
    for name in ("first", "second"):
        venv = tmp_path / name
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        (site,) = venv.glob("lib/python*/site-packages")
        (site / "module.py").write_text("answer = 42")
        os.utime(site / "module.py", (1e9, 1e9))
        script = 'source jobs/setup.sh; provide_bytecode "$0"; echo "${!:-none}"; wait'
        environment = os.environ | {"LLAVA_RAY_VENV": str(venv), "LLAVA_RAY_CACHE": str(tmp_path)}
        done = subprocess.run(
            ["bash", "-euc", script, tmp_path / "list.txt"], env=environment, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        compiled = list(site.glob("__pycache__/module.*.pyc"))
        assert len(compiled) == 1
        assert (done.stdout.strip() == "none") == (name == "second")
    # The copy is taken as it is: Python would write it anew if it did not fit.
    before = compiled[0].read_bytes()
    python = tmp_path / "second" / "bin" / "python"
    subprocess.run([python, "-c", "import module"], check=True)
    assert compiled[0].read_bytes() == before


def test_a_crash_in_a_test_leaves_the_closing_line(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(
        "import os, signal\n\n"
        "def test_dies():\n    os.kill(os.getpid(), signal.SIGSEGV)\n\n"
        "def test_lives():\n    pass\n"
    )
    options = re.search(r"python -m pytest (.*) \"\$@\"", Path("tests/run.sh").read_text())
    assert options is not None
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options[1].split(), "-p", "no:cacheprovider", "."],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "crashed while running 'test_one.py::test_dies'" in done.stdout
    assert re.search(r"1 failed, 1 passed in ", done.stdout.splitlines()[-1])


def test_the_locks_hold_what_the_project_asks_for_and_no_address() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["gguf"], *extras["scene-text"]]
    platforms = ("linux-x86_64", "linux-aarch64")
    locks = {name: [] for name in platforms} | {f"dev-{name}": extras["dev"] for name in platforms}
    for name, more in locks.items():
        text = Path(f"jobs/requirements/{name}.txt").read_text()
        assert "://" not in text
        pins = dict(re.findall(r"^([a-z0-9-]+)==([^ ]+) ", text, re.MULTILINE))
        assert text.count("==") <= len(pins) + 2 < text.count("--hash=sha256:")
        for requirement in map(Requirement, [*asked, *more]):
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PYTHON": "/nonexistent/python"}, "looked at /nonexistent/python"),
        ({"PYTHON": "/bin/ls"}, "looked at /bin/ls"),
        ({"LLAVA_RAY_VENV": "/tmp/a folder/venv"}, "path with spaces, /tmp/a folder/venv"),
    ],
)
def test_what_cannot_be_installed_with_is_refused(variables: dict[str, str], said: str) -> None:
    script = (
        "source jobs/setup.sh; venv=${LLAVA_RAY_VENV:-/nonexistent/venv};"
        "install_environment dev-linux-$(uname -m)"
    )
    done = subprocess.run(
        ["bash", "-euc", script], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert len(done.stderr.splitlines()) == 1
