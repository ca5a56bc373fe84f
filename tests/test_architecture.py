"""The rules of the architecture, read from the source with `ast` (CONTRIBUTING.md explains them).

Each rule is a small function from one module to its breaches, shown to catch one below.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "rlcs"

# A package may import packages of lower layers, and of its own layer as long as no circle forms.
LAYERS = (
    ("errors", "records", "signals", "progress"),
    ("recipe", "storage", "grading"),
    ("data", "distributed"),
    ("model",),
    ("engines",),
    ("generation",),
    ("train",),
    ("distill", "evals", "serving"),
    ("plan", "report"),
    ("pipeline",),
    ("doctor", "publish"),
    ("cli", "__main__", "__init__"),
)
LAYER_OF = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}
MAX_ROOT_MODULES = 8
LIGHT = (
    "errors",
    "records",
    "signals",
    "progress",
    "recipe",
    "storage",
    "grading",
    "data",
    "cli",
    "__main__",
)
"""Packages that must be importable without torch."""

HEAVY = {"torch", "torchvision", "transformers", "datasets"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500
MAX_CODE_LINES = 16_750
MAX_PARAMETERS = 7
MAX_IMPORT_SECONDS = 0.2

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name under rlcs, its text, its tree."""

    name: str
    text: str

    @property
    def package(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def num_code_lines(self) -> int:
        """Lines of code: words that explain (docstrings, comments) and blank lines cost nothing."""
        texts = [
            range(node.lineno, (node.end_lineno or node.lineno) + 1)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ]
        explained = {line for text in texts for line in text}
        lines = enumerate(self.text.splitlines(), start=1)
        return sum(
            bool(x.strip()) and not x.lstrip().startswith("#") and n not in explained for n, x in lines
        )

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())


def _modules() -> list[Module]:
    files = sorted(SOURCE.rglob("*.py"))
    assert files, f"no source under {SOURCE}"
    names = [".".join(file.relative_to(SOURCE).with_suffix("").parts) for file in files]
    return [
        Module(name=name, text=file.read_text(encoding="utf-8"))
        for name, file in zip(names, files, strict=True)
    ]


MODULES = _modules()


# --- the rules --------------------------------------------------------------------------------


def not_in_the_table(module: Module) -> Iterator[str]:
    if module.package not in LAYER_OF:
        yield f"{module.name} is in no layer: put it into the table of tests/test_architecture.py"


def _imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names of all imports, in functions too; `from rlcs import x` counts as rlcs.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [f"rlcs.{alias.name}" for alias in node.names] if base == "rlcs" else [base]
            yield from ((name, node.lineno) for name in names)


def _packages_imported(module: Module) -> Iterator[tuple[str, int]]:
    for name, line in _imported(module.tree):
        if name.startswith("rlcs.") and name.split(".")[1] != module.package:
            yield name.split(".")[1], line


def imports_upwards(module: Module) -> Iterator[str]:
    for name, line in _imported(module.tree):
        if name.startswith("."):
            yield f"{module.name}:{line} imports by dots; write the whole name"
    own = LAYER_OF.get(module.package, len(LAYERS))
    for package, line in _packages_imported(module):
        if LAYER_OF.get(package, 0) > own:
            yield f"{module.name}:{line} (layer {own}) imports {package} (layer {LAYER_OF[package]})"


def heavy_at_import(module: Module) -> Iterator[str]:
    light = module.package in LIGHT
    stack: list[ast.AST] = list(module.tree.body) if light else []
    while stack:
        node = stack.pop()
        if isinstance(node, FUNCTIONS) or _is_type_checking(node):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name, line in _imported(node):
                if name.split(".")[0] in HEAVY:
                    yield f"{module.name}:{line} imports {name} at module level"
        stack.extend(ast.iter_child_nodes(node))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _functions(module: Module) -> Iterator[Function]:
    return (node for node in ast.walk(module.tree) if isinstance(node, FUNCTIONS))


def _arguments(function: Function) -> list[ast.arg]:
    """All parameters but self and cls."""
    spec = function.args
    variable = [argument for argument in (spec.vararg, spec.kwarg) if argument]
    everything = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *variable]
    return [argument for argument in everything if argument.arg not in ("self", "cls")]


def long_functions(module: Module) -> Iterator[str]:
    for function in _functions(module):
        lines = (function.end_lineno or 0) - function.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield f"{module.name}:{function.lineno} {function.name} has {lines} lines"


def long_files(module: Module) -> Iterator[str]:
    if module.num_lines > MAX_FILE_LINES:
        yield f"{module.name} has {module.num_lines} lines"


def many_parameters(module: Module) -> Iterator[str]:
    for function in _functions(module):
        number = len(_arguments(function))
        if number > MAX_PARAMETERS:
            yield f"{module.name}:{function.lineno} {function.name} has {number} parameters"


def untyped(module: Module) -> Iterator[str]:
    for function in _functions(module):
        missing = [argument.arg for argument in _arguments(function) if argument.annotation is None]
        missing += [] if function.returns is not None else ["the return value"]
        if missing:
            yield f"{module.name}:{function.lineno} {function.name}: no type for {', '.join(missing)}"


def undocumented(module: Module) -> Iterator[str]:
    if not ast.get_docstring(module.tree):
        yield f"{module.name} has no docstring"
    stack: list[ast.AST] = list(module.tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield f"{module.name}:{node.lineno} {node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                stack.extend(node.body)


def vague_names(module: Module) -> Iterator[str]:
    for part in module.name.split("."):
        if VAGUE_NAMES & set(part.split("_")):
            yield f"{module.name}: {part} says nothing about what it holds"


RULES: dict[Callable[[Module], Iterator[str]], Module] = {
    not_in_the_table: Module("cellar", ""),
    imports_upwards: Module("storage", "def f():\n    from rlcs.train import trainer"),
    heavy_at_import: Module("cli.main", "try:\n    import torch.nn\nexcept ImportError:\n    pass"),
    long_functions: Module("train.sft", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    long_files: Module("train.sft", "x = 1\n" * (MAX_FILE_LINES + 1)),
    many_parameters: Module("train.sft", "class A:\n    def f(self, a, b, c, d, e, *f, g, **h): ..."),
    untyped: Module("train.sft", "def f(a: int):\n    return a"),
    undocumented: Module("train.sft", '"""Doc."""\nclass A:\n    """Doc."""\n    def f(self): ...'),
    vague_names: Module("report.plot_utils", ""),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_and_can_be_broken(rule: Callable[[Module], Iterator[str]]) -> None:
    assert list(rule(RULES[rule])), "the rule does not see a breach made for it"
    breaches = [breach for module in MODULES for breach in rule(module)]
    assert not breaches, "\n" + "\n".join(breaches)


def test_what_the_rules_allow() -> None:
    lazy = Module("storage", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
                           "def f() -> None:\n    import torch")  # fmt: skip
    assert not list(heavy_at_import(lazy))
    assert not list(heavy_at_import(Module("model.policy", "import torch")))
    assert not list(
        imports_upwards(Module("models", "from rlcs.model.attention import attend\nimport rlcs.errors"))
    )
    assert not list(
        undocumented(Module("train.sft", '"""Doc."""\ndef _f(): ...\nclass _A:\n    def g(self): ...'))
    )
    assert not list(many_parameters(Module("train.sft", "def f(self, a, b, c, d, e, f, g): ...")))


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Packages that import each other in a circle; empty when there are none."""
    left = {package: set(needs) for package, needs in graph.items()}
    while free := [package for package, needs in left.items() if not needs & left.keys()]:
        for package in free:
            del left[package]
    return sorted(left)


def test_packages_form_no_circle() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        graph.setdefault(module.package, set()).update(package for package, _ in _packages_imported(module))
    assert not _circle(graph)


def test_the_root_holds_few_modules() -> None:
    found = sorted(path.name for path in SOURCE.glob("*.py"))
    assert len(found) <= MAX_ROOT_MODULES, found


def test_the_package_is_small() -> None:
    total = sum(module.num_code_lines for module in MODULES)
    assert total < MAX_CODE_LINES, f"{total:,} lines of code"


def test_command_line_starts_fast_and_without_torch() -> None:
    # Seconds of processor time, so that a busy machine does not count; the first try warms the disk.
    program = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "import rlcs.cli.main\n"
        "seconds = time.process_time() - start\n"
        f"print(seconds, *sorted({HEAVY!r} & set(sys.modules)))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(5)
    ]
    assert outputs[0][1:] == [], "import rlcs.cli.main loads heavy libraries"
    best = min(float(output[0]) for output in outputs)
    assert best < MAX_IMPORT_SECONDS, f"import rlcs.cli.main takes {best * 1000:.0f} ms"
