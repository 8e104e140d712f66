"""The digest of measured code changes with what behaves, and with nothing else."""

import re
from pathlib import Path

import pytest

from llava_ray.artifacts.code_digest import ENTRIES, code_digest, digest_of
from llava_ray.errors import ConfigError

CODE = {
    "bench": "from house.middle import twice\n\ndef measure():\n    return twice(2)\n",
    "middle": "def twice(x):\n    from house.deep import factor\n    return x * factor()\n",
    "deep": "def factor():\n    return 2\n",
    "apart": "def other():\n    return 3\n",
}


def digest(home: Path, entry: str = "house.bench", **changes: str) -> str:
    """Write the modules below a fresh folder and return what measures with `entry`."""
    for name, text in (CODE | changes).items():
        path = home.joinpath("house", *name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return digest_of((entry,), home)


@pytest.mark.parametrize(
    "changes",
    [
        {"deep": "def factor():\n    return 3\n"},
        {"deep": "def factor():\n    return 2\n\nSETTING = 1\n"},
        {"middle": "def twice(x):\n    from house.deep import factor\n    return factor() * x\n"},
        {"bench": CODE["bench"].replace("twice(2)", "twice('2')")},
    ],
)
def test_a_statement_that_is_reached_changes_it(tmp_path: Path, changes: dict[str, str]) -> None:
    assert digest(tmp_path / "a") != digest(tmp_path / "b", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"deep": '"""Text."""\n\n\ndef factor():\n    """Two."""\n    # So.\n    return (2)\n'},
        {"apart": "def other():\n    return 4\n"},
        {"bench": "if TYPE_CHECKING:\n    from house import apart\n" + CODE["bench"]},
        # The file has another name.
        {"middle": CODE["middle"].replace("house.deep", "house.below.deeper"), "deep": "",
         "below__deeper": CODE["deep"]},
        # The function has moved to the module that uses it.
        {"bench": "from house.deep import factor, twice\n\ndef measure():\n    return twice(2)\n",
         "deep": CODE["deep"] + "def twice(x):\n    return x * factor()\n", "middle": ""},
        {"bench": "import house.middle\nfrom house import middle\n" + CODE["bench"]},
    ],
)  # fmt: skip
def test_what_does_not_behave_leaves_it(tmp_path: Path, changes: dict[str, str]) -> None:
    assert digest(tmp_path / "a") == digest(tmp_path / "b", **changes)


def test_an_entry_may_be_renamed(tmp_path: Path) -> None:
    renamed = digest(tmp_path / "b", "house.clock", bench="", clock=CODE["bench"])
    assert digest(tmp_path / "a") == renamed


def test_an_entry_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no module 'house\.gone'"):
        digest(tmp_path, "house.gone")


def test_every_results_file_has_entries_that_are_there() -> None:
    names = {path.stem for path in Path("jobs/results").glob("*.json")}
    assert names <= set(ENTRIES)
    assert all(len(code_digest(name)) == 12 for name in ENTRIES)


def test_what_is_started_by_its_name_counts_too() -> None:
    started = re.compile(r'"(llava_ray\.[a-z_.]+)"')
    for path in (Path("llava_ray/quantize/awq.py"), Path("llava_ray/inference/llama_cpp/trial.py")):
        for name in started.findall(path.read_text()):
            reached = {*ENTRIES["quickstart_report"], "llava_ray.inference.llama_cpp.trial"}
            assert name in reached, f"{path} starts {name}"
    assert set(ENTRIES["costs"]) & set(ENTRIES["serving"]) >= {"llava_ray.server.replica"}
