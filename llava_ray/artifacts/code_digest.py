"""A digest of the code that measured a results file, so that a table can say that it is older.

Of the modules that the entry modules import, directly or not, only what behaves counts: neither
comments, docstrings and layout nor which file holds a statement, hence no import either.
"""

import ast
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from llava_ray.errors import ConfigError

_NOT_FOLLOWED = "llava_ray.pipeline"
"""It imports every stage; which of them a file rests on is said in ENTRIES."""
_MEASURED = (
    "llava_ray.prepare", "llava_ray.train", "llava_ray.merge", "llava_ray.quantize",
    # Run by its name, so that no import leads to it.
    "llava_ray.quantize.awq_calibration",
    "llava_ray.benchmark",
)  # fmt: skip
_SERVED = ("llava_ray.server.replica", "llava_ray.server.loading")
"""What Serve starts by the name of the application."""
_REPORT = (_NOT_FOLLOWED, *_MEASURED, "llava_ray.choose.decision", "llava_ray.report.rows")
_LINE = (_NOT_FOLLOWED, *_MEASURED, "llava_ray.choose", "llava_ray.deploy", *_SERVED)
ENTRIES: Mapping[str, tuple[str, ...]] = {
    "awq_calibration": ("llava_ray.bench.compare", *_MEASURED),
    "costs": ("llava_ray.bench.measure", "llava_ray.cluster.local", *_LINE),
    "decode_h100": ("llava_ray.bench.decode",),
    **dict.fromkeys(("drill", "node_kills"), ("llava_ray.sweep", *_LINE)),
    "elsewhere": ("llava_ray.bench.elsewhere", *_MEASURED),
    **dict.fromkeys(("embedded", "hqq_recovery"), ("llava_ray.bench.embedded", *_MEASURED)),
    **dict.fromkeys(("families", "instruct", "smollm2"), _LINE),
    "families_h100": ("llava_ray.inference.torch.engine",),
    "llama_amx": ("llava_ray.inference.llama_cpp.trial",),
    **dict.fromkeys(("llava_7b_h100", "photographs_report", "quickstart_report"), _REPORT),
    "mixed_rows_h100": ("llava_ray.train.worker",),
    "prepare": ("llava_ray.prepare",),
    "pretrain": ("llava_ray.embedded.pretrain.scores",),
    "report": _REPORT,
    **dict.fromkeys(("serving", "serving_7b_h100"), ("llava_ray.bench.serving", *_SERVED)),
    "serving_faults": _SERVED,
    "serving_memory_h100": ("llava_ray.server.memory", "llava_ray.inference.torch.engine"),
    "storage": ("llava_ray.bench.storage",),
    "sweep": ("llava_ray.sweep",),
    "train_h100": ("llava_ray.bench.train",),
}
"""By results file, without `.json`: the modules that measure it. `report` is choose's own."""
_HOME = Path(__file__).parents[2]


def code_digest(results: str) -> str:
    """Return the digest of today's code for a results file, named as in ENTRIES."""
    return digest_of(ENTRIES[results])


def with_digests(tree: Mapping[str, Any], rows: str) -> list[dict[str, Any]]:
    """Return the rows of an earlier file, each with the digest of the code that measured it."""
    return [{"code_digest": tree.get("code_digest")} | row for row in tree[rows]]


def older_digests(results: str, tree: dict[str, Any]) -> set[str | None]:
    """Return the digests in a results file that are not today's; None where one is missing."""
    lists = (part for part in tree.values() if isinstance(part, list))
    rows = [row for part in lists for row in part if isinstance(row, dict)]
    return {(tree | row).get("code_digest") for row in rows or [{}]} - {code_digest(results)}


@cache
def digest_of(entries: tuple[str, ...], home: Path = _HOME) -> str:
    """Hash the statements of all modules that the entries reach.

    Names of modules begin in the folder `home`. A package's own file counts only where something
    of it is imported. Raises ConfigError for an entry that is not there.
    """
    if missing := [entry for entry in entries if _file(entry, home) is None]:
        raise ConfigError(f"no module {missing[0]!r} in {home}: correct code_digest.ENTRIES")
    left, seen, statements = list(entries), set[Path](), set[bytes]()
    own = {entry.partition(".")[0] for entry in entries}
    while left:
        name = left.pop()
        # What follows the last dot is a module, or a name in one.
        path = _file(name, home) or _file(name.rpartition(".")[0], home)
        if path is None or path in seen or path == Path(__file__):
            continue
        seen.add(path)
        bare = _Bare()
        for node in bare.visit(ast.parse(path.read_text(encoding="utf-8"))).body:
            # Python 3.12 has this field, 3.11 has not.
            text = ast.dump(node).replace(", type_params=[]", "")
            statements.add(hashlib.sha256(text.encode()).digest())
        if path != _file(_NOT_FOLLOWED, home):
            left += [name for name in bare.imported if name.partition(".")[0] in own]
    return hashlib.sha256(b"".join(sorted(statements))).hexdigest()[:12]


class _Bare(ast.NodeTransformer):
    """Takes out what does not behave, and notes what is imported to run."""

    def __init__(self) -> None:
        self.imported: list[str] = []

    def visit_Import(self, node: ast.Import) -> None:
        self.imported += [alias.name for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "relative imports are not followed"
        self.imported += [f"{node.module}.{alias.name}" for alias in node.names]

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """Drop docstrings, those of attributes too."""
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        """Drop imports for types alone."""
        typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if typing else self.generic_visit(node)


def _file(name: str, home: Path) -> Path | None:
    """Return a module's file."""
    base = home.joinpath(*name.split("."))
    paths = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in paths if path.is_file()), None)
