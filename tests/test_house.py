"""The rules of the house: who may import whom, how kernels are compiled, what every file needs."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksparse.format import OPS
from blocksparse.runtime.kernels import microkernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "blocksparse"
PARTS_WITHOUT_TORCH = ("format", "runtime", "perf", "cli", "report", "whole_file", "__init__")

# Which parts of blocksparse a part may import, and which packages of others. A part is a
# sub-package or a module directly below blocksparse/. Nobody imports `cli`.
EVERYTHING = {
    "format",
    "runtime",
    "perf",
    "sparsity",
    "training",
    "export",
    "pipeline",
    "report",
    "image_files",
    "whole_file",
}
OURS: dict[str, set[str]] = {
    "__init__": {"format", "runtime"},
    "format": set(),
    "runtime": {"format", "whole_file"},
    "perf": {"format", "runtime", "whole_file"},
    "cli": {"format", "runtime", "perf", "report", "image_files", "whole_file"},
    "sparsity": {"whole_file"},
    "training": {"sparsity", "image_files"},
    "export": {"sparsity", "format", "runtime", "whole_file"},
    "report": {"whole_file"},
    "image_files": set(),
    "whole_file": set(),
    "pipeline": EVERYTHING,
}
TRAINING = {"numpy", "torch", "torchvision", "lightning", "sklearn", "safetensors", "PIL", "rich"}
THEIRS: dict[str, set[str]] = {
    "__init__": set(),
    "format": {"numpy"},
    "runtime": {"numpy", "numba", "llvmlite"},
    "perf": {"numpy", "numba", "llvmlite"},
    "cli": {"numpy", "numba", "rich", "PIL", "matplotlib"},
    "sparsity": {"numpy", "numba", "scipy", "torch", "rich", "yaml"},
    "training": TRAINING,
    "export": {"numpy", "torch"},
    "report": {"rich"},
    "image_files": {"PIL"},
    "whole_file": set(),
    "pipeline": TRAINING | {"hydra", "omegaconf", "matplotlib"},
}


def python_files(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(files + ([] if folders == ("blocksparse",) else list(ROOT.glob("*.py"))))


def text_files() -> list[Path]:
    folders = ("blocksparse", "tests", "benchmarks", "configs", "docs", ".ci")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    found += [path for path in ROOT.iterdir() if path.suffix in {".md", ".py", ".toml", ".in"}]
    skipped = {".pyc", ".safetensors", ".npy", ".npz", ".png", ".nbi", ".nbc"}
    return sorted(path for path in found if path.is_file() and path.suffix not in skipped)


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.Module, path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, wherever the statement stands."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:  # `from blocksparse import runtime` imports a part, too
                yield node.lineno, f"{base}.{alias.name}" if base == "blocksparse" else base
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            first = node.args[0] if node.args else None
            if called in {"import_module", "__import__"} and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def forbidden_imports(tree: ast.Module, path: Path) -> list[str]:
    part = part_of(path)
    problems = []
    for line, name in imported_modules(tree, path):
        top, _, rest = name.partition(".")
        if top == "blocksparse":
            target = rest.split(".")[0]
            is_part = target in OURS  # otherwise a name of blocksparse/__init__.py
            if is_part and target != part and target not in OURS[part]:
                problems.append(f"{label(path)}:{line}: {part} must not import {name}")
        elif top not in sys.stdlib_module_names and top not in THEIRS[part]:
            problems.append(f"{label(path)}:{line}: {part} must not import {name}")
    return problems


def compile_calls(tree: ast.Module) -> Iterator[ast.expr]:
    """Every use of numba's `njit`, `jit` or `vectorize`: as decorator, bare or called."""
    called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_compiler(node.func):
            called.add(id(node.func))
            yield node
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield from (d for d in node.decorator_list if _is_compiler(d) and id(d) not in called)


def _is_compiler(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
    return name in {"njit", "jit", "vectorize", "guvectorize"}


def compile_problems(tree: ast.Module, where: str) -> list[str]:
    """Numba's options: elsewhere than in the kernels, which `objects` keeps and calls."""
    problems = []
    kept = where.startswith("blocksparse/runtime/kernels/")
    for use in compile_calls(tree):
        options = {k.arg: k.value for k in use.keywords} if isinstance(use, ast.Call) else {}
        for option in () if kept else ("cache", "nogil"):
            value = options.get(option)
            if not (isinstance(value, ast.Constant) and value.value is True):
                problems.append(f"{where}:{use.lineno}: njit without {option}=True")
        if isinstance(options.get("fastmath"), ast.Constant) and options["fastmath"].value:
            problems.append(f"{where}:{use.lineno}: fastmath must be the runtime's one constant")
    return problems


def undocumented(tree: ast.Module, where: str) -> list[str]:
    problems = [] if ast.get_docstring(tree) else [f"{where}:1: module without docstring"]
    todo: list[ast.AST] = [tree]
    while todo:
        for node in getattr(todo.pop(), "body", []):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                todo.append(node)
            if not ast.get_docstring(node) and not _is_second_definition(node):
                problems.append(f"{where}:{node.lineno}: {node.name} has no docstring")
    return problems


def _is_second_definition(node: ast.AST) -> bool:
    names = [getattr(d, "attr", getattr(d, "id", "")) for d in getattr(node, "decorator_list", [])]
    return bool({"setter", "deleter", "overload"} & set(names))


def test_every_part_is_in_the_table():
    parts = {part_of(path) for path in python_files("blocksparse")}
    assert parts <= set(OURS), f"add {sorted(parts - set(OURS))} to the tables of {__file__}"
    assert set(OURS) == set(THEIRS)


def test_only_allowed_imports():
    problems = [
        problem
        for path in python_files("blocksparse")
        for problem in forbidden_imports(parse(path), path)
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("part", PARTS_WITHOUT_TORCH)
def test_table_keeps_training_libraries_out_of_what_only_runs(part):
    banned = {"torch", "torchvision", "lightning", "hydra", "sklearn", "scipy", "safetensors"}
    reachable, todo = set(), [part]
    while todo:
        reachable.add(current := todo.pop())
        todo += OURS[current] - reachable
    assert not banned & set().union(*(THEIRS[name] for name in reachable))


def test_reference_engine_needs_numpy_only():
    path = PACKAGE / "runtime" / "reference.py"
    names = {name.split(".")[0] for _, name in imported_modules(parse(path), path)}
    assert names - set(sys.stdlib_module_names) <= {"blocksparse", "numpy"}


def test_kernels_are_cached_and_release_the_lock():
    problems = [
        problem
        for path in python_files("blocksparse")
        for problem in compile_problems(parse(path), label(path))
    ]
    assert not problems, "\n".join(problems)


def test_nothing_prints():
    problems = [
        f"{label(path)}:{node.lineno}"
        for path in python_files("blocksparse")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not problems, f"use logging, or rich in the command line: {problems}"


def test_no_file_over_400_lines():
    lengths = {
        label(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files("blocksparse", "tests", "benchmarks")
    }
    assert not {name: lines for name, lines in lengths.items() if lines > 400}


def test_everything_public_has_a_docstring():
    problems = [
        problem
        for path in python_files("blocksparse")
        for problem in undocumented(parse(path), label(path))
    ]
    assert not problems, "\n".join(problems)


def test_annotations_are_postponed_everywhere():
    missing = [
        label(path)
        for path in python_files("blocksparse", "tests", "benchmarks")
        if any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in ast.walk(parse(path)))
        and "from __future__ import annotations" not in path.read_text("utf-8")
    ]
    assert not missing


def test_every_product_has_a_slow_twin():
    """Operations and weight layouts that kernels compute have their definition in naive.py."""
    naive = {node.name for node in parse(ROOT / "tests" / "naive.py").body if hasattr(node, "name")}
    path = PACKAGE / "runtime" / "reference.py"
    fast = {node.name for node in parse(path).body if isinstance(node, ast.FunctionDef)}
    assert fast & set(OPS), "the reference engine has a function of the name of each operation"
    assert fast & set(OPS) <= naive
    twins = {
        "sparse_conv": {"bsr_to_dense", "conv2d"},
        "sparse_product": {"sparse_product"},
        "sparse_tail": {"sparse_product"},
        "nm_conv": {"nm_to_dense", "conv2d"},
        "sparse_linear": {"bsr_to_dense", "linear"},
        "nm_linear": {"nm_to_dense", "linear"},
        "winograd_input": {"winograd_input"},
        "winograd_output": {"winograd_output"},
        "line_input": {"winograd_input"},
        "line_output": {"winograd_output"},
        "tile_input": {"tile_input"},
        "tile_output": {"tile_output"},
        "copy_phases": {"phase_planes"},
        "pool_max": {"max_pool2d"},
        "pool_mean": {"adaptive_avg_pool2d"},
        "pool_avg": {"avg_pool2d"},
        "pointwise_same": {"pointwise"},
        "pointwise_add": {"pointwise"},
        "pointwise_mul": {"pointwise"},
        "pointwise_gate": {"pointwise"},
        "pointwise_affine": {"pointwise"},
    }
    assert twins.keys() == microkernels._WRITERS.keys(), "say which definition a new kernel has"
    assert set().union(*twins.values()) <= naive


def test_no_absolute_paths_of_somebodys_machine():
    folders = "|".join(["root", "home", "Users", "work", "tmp"])
    absolute = re.compile(rf"(?<![\w.}})/-])/(?:{folders})/\w")
    problems = [
        f"{label(path)}: {match.group()}"
        for path in text_files()
        for match in absolute.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("marker", ["main job", "tests"])
def test_readme_has_each_command_on_one_line(marker):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"<!-- {marker} -->\s*```\w*\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) == 1, f"README.md needs exactly one block marked <!-- {marker} -->"
    assert len(blocks[0].splitlines()) == 1, "the marked block holds one line"
    assert blocks[0].startswith("pip install ")


def test_links_between_documents_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = []
    for path in documents:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            file = target.split("#")[0]
            if file and "://" not in file and not (path.parent / file).exists():
                broken.append(f"{label(path)}: {target}")
    assert not broken, "\n".join(broken)


# The checks above must be able to fail: each is shown something that breaks its rule.


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ("format", "import torch"),
        ("format", "from blocksparse import runtime"),
        ("format", "from ..runtime import load"),
        ("runtime", "def f():\n    import scipy.sparse"),
        ("runtime", "from blocksparse.perf.timing import interleave"),
        ("training", "import blocksparse.export.capture"),
        ("cli", "from importlib import import_module\nimport_module('torch.nn')"),
        ("report", "from blocksparse.cli import main"),
    ],
)
def test_import_check_sees(part, code):
    assert len(forbidden_imports(ast.parse(code), PACKAGE / part / "example.py")) == 1


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("@njit\ndef f(): ...", 2),
        ("@numba.njit(cache=True)\ndef f(): ...", 1),
        ("@njit(cache=True, nogil=False)\ndef f(): ...", 1),
        ("g = njit(f)", 2),
        ("@njit(cache=True, nogil=True, fastmath=True)\ndef f(): ...", 1),
        ("@njit(cache=True, nogil=True, fastmath=FASTMATH)\ndef f(): ...", 0),
    ],
)
def test_compile_check_sees(code, count):
    assert len(compile_problems(ast.parse(code), "example")) == count


def test_docstring_check_sees():
    code = '"""Module."""\nclass A:\n    """Doc."""\n    def f(self): ...\n    def _g(self): ...\n'
    assert undocumented(ast.parse(code), "example") == ["example:4: f has no docstring"]
