"""The rules of the architecture, read from the source with `ast` (CONTRIBUTING.md explains them).

Each rule is a small function from one module to its breaches, shown to catch one below.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "rlcs"

# A package may import packages of lower layers, and of its own layer as long as no circle forms.
LAYERS = (
    ("errors", "records", "redaction", "signals", "progress", "patience", "cores"),
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
    "redaction",
    "records",
    "signals",
    "progress",
    "patience",
    "cores",
    "recipe",
    "storage",
    "grading",
    "data",
    "cli",
    "__main__",
)
"""Packages that must be importable without torch."""

HEAVY = {"torch", "torchvision", "transformers", "datasets"}
HEAVY_FOR_PEOPLE_WHO_WAIT = HEAVY | {
    *("accelerate", "fastapi", "gradio", "httpx", "matplotlib", "math_verify", "openai", "pandas"),
    *("peft", "pint", "prometheus_client", "pyarrow", "safetensors", "scipy", "sympy", "uvicorn"),
}
"""What a command that only reads and counts must not load: seconds before its first word."""
LIGHT_COMMANDS = (
    "--help",
    "run --help",
    "recipes ls",
    "recipes show quickstart",
    "recipes explain",
    "plan quickstart",
    "plan recommended-7b lora.rank=16 --explain",
    "data check builtin:puzzles?count=3&seed=1",
    "grade answers.jsonl --explain",
    "doctor no-such-run",
)
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500
MAX_CODE_LINES = 39_200
MAX_PARAMETERS = 7
MAX_IMPORT_SECONDS = 0.5  # slow machines take half of it; that nothing heavy is loaded is counted

TESTS_OF_SOMETHING_ELSE = {
    "architecture": "the rules of this file",
    "constraints": "constraints files, hooks and CI",
    "docs": "README and docs/",
    "docs_run": "the commands in README and docs/",
    "examples": "examples/",
    "dead_models": "damaged and spoilt weights, through loading, engines and training",
    "recipe_bounds": "the bounds of all numbers in recipes",
    "hostile_servers": "model servers that misbehave, through engines, distill and evals",
    "bench": "bench/",
    "counts": "passes, tokens, images and bytes, through engines and train",
    "container": "Dockerfile",
    "release": "make release, tools/smoke_test.py",
    "notebook": "the notebook in examples/",
    "tiny_model": "tools/tiny_model/",
    "grading_reference": "the table in docs/reference/grading.md",
    "grading_properties": "grading as a whole, over made answers",
    "faults_table": "the plug-in that writes docs/reliability.md",
    "shipped_recipes": "the YAML files in recipes/",
    "hostile_rewards": "reward functions that do what they should not",
    "generate": "the command `rlcs generate`, through generation, engines and serving",
    "vllm_families": "every family with a real vLLM",
    "vllm_lora": "adapters with vLLM, through all packages",
    "vllm_serving": "a real vLLM, through serving, evals and distill",
    "walks": "whole walks from files to a model, through all packages",
}
"""Tests that are not named after a module or a package of src/rlcs, and what they are about."""

OLD_WORDS = {
    r"house|houses": "project, package",
    r"rooms?": "module, package; for memory: space",
    r"(?<!\")floors?(?!, ceil)": "layer; for numbers: lowest value",
    r"roofs?": "limit",
    r"meshes": "ranks, World",
    r"sittings?|exams?|Exam|Examiner|examinee": "evaluation, EvalRun",
    r"intake": "run data",
    r"StageFolder|stage folder": "RunDir, run directory",
    r"Voice|Respondent|Talker|Actors|Shell": "Sampler, GrpoContext, FsdpRoot",
    r"rl_only|two_stage": "grpo, sft_grpo",
    r"ails|ailments?": "is wrong, health",
    r"besieges?|siege": "load test, hostile clients",
}
"""Words that are not used any more, as patterns of whole words, and what is written instead."""
WORDS_OF_MATHEMATICS = {"grading": ("floor",)}
"""Words of OLD_WORDS that a package may use in their mathematical meaning: the floor of a number."""
OLD_NAMES = {"told": "message, reported", "said": "text, answer", "asked": "requested, question"}
"""Names in code that say nothing about what they hold, and better ones."""

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

    @property
    def path(self) -> str:
        """Its dotted name as others import it."""
        return f"rlcs.{self.name}".removesuffix(".__init__")

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


def private_names(module: Module) -> Iterator[str]:
    """Names with an underscore that belong to another module of ours."""
    imported: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlcs":
            imported |= {alias.asname or alias.name for alias in node.names}
            for alias in node.names:
                if _is_private(alias.name):
                    yield f"{module.name}:{node.lineno} imports {alias.name} from {node.module}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner in imported or owner.startswith("rlcs."):
                yield f"{module.name}:{node.lineno} uses {owner}.{node.attr}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def old_names(module: Module) -> Iterator[str]:
    """Functions, parameters, variables and fields that are called by a word of OLD_NAMES."""
    for node in ast.walk(module.tree):
        match node:
            case ast.FunctionDef(name=name) | ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                pass
            case _:
                continue
        if better := OLD_NAMES.get(name.strip("_")):
            yield f"{module.name}:{node.lineno} is called {name}; say {better}"


def old_words(module: Module) -> Iterator[str]:
    """Words of OLD_WORDS, in a module's code, comments and docstrings, or in a page of the documentation."""
    for number, line in enumerate(module.text.splitlines(), start=1):
        for word, instead in OLD_WORDS.items():
            found = re.search(rf"(?<![\w.?\\])(?:{word})(?![\w(])", line)
            if found and found[0] not in WORDS_OF_MATHEMATICS.get(module.package, ()):
                yield f"{module.name}:{number} says {found[0]!r}; say {instead}"


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
    private_names: Module("train.sft", "from rlcs.train.trainer import _norm"),
    old_names: Module("train.sft", "def f(told): ..."),
    old_words: Module("train.sft", "# the only room that may write"),
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
    assert not list(old_words(Module("grading.tree", 'Call("floor", x)')))
    assert list(old_words(Module("train.sft", "the floor"))) and list(
        old_words(Module("grading.tree", "floors"))
    )
    assert not list(many_parameters(Module("train.sft", "def f(self, a, b, c, d, e, f, g): ...")))


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """What imports each other in a circle, and what needs that; empty when there is none."""
    left = {name: set(needs) for name, needs in graph.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def _modules_imported(module: Module, known: set[str]) -> set[str]:
    """Paths of our modules that one imports, in functions too."""
    found: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & known) or {node.module}
            found |= {node.module} if inside - known else set()
    return (found & known) - {module.path}


def test_packages_and_modules_form_no_circle() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]
    packages: dict[str, set[str]] = {}
    for module in MODULES:
        imported = {package for package, _ in _packages_imported(module)}
        packages.setdefault(module.package, set()).update(imported)
    assert not _circle(packages)
    known = {module.path for module in MODULES}
    assert not _circle({module.path: _modules_imported(module, known) for module in MODULES})
    known |= {"rlcs.a.b", "rlcs.a"}
    imports = "from rlcs.a import b\nfrom rlcs.a import C\ndef f():\n    import rlcs.errors"
    assert _modules_imported(Module("train.sft", imports), known) == {"rlcs.a.b", "rlcs.a", "rlcs.errors"}


def test_pages_use_no_old_words() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    pages += [file for kind in ("*.j2", "*.yaml", "*.js") for file in SOURCE.rglob(kind)]
    texts = [Module(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")) for page in pages]
    breaches = [breach for text in texts for breach in old_words(text)]
    assert len(pages) > 30 and not breaches, "\n" + "\n".join(breaches)


def _tested_names() -> set[str]:
    """What a test may be called after: a module or package, by its name or with packages before it."""
    names = set()
    for module in MODULES:
        parts = module.path.split(".")[1:]
        names |= {"_".join(parts[start:end]) for end in range(1, len(parts) + 1) for start in range(end)}
    return names


def test_tests_are_named_after_what_they_test() -> None:
    names = _tested_names()
    assert {"plan", "plan_memory", "memory", "vllm_engine"} <= names and "lora_plan" not in names
    found = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert not found - names - TESTS_OF_SOMETHING_ELSE.keys()
    assert TESTS_OF_SOMETHING_ELSE.keys() <= found - names, "named here without need"


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


@pytest.mark.parametrize("command", LIGHT_COMMANDS)
def test_commands_that_only_read_and_count_load_nothing_heavy(command: str, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"question": "1 + 1?", "answer": "2", "response": "3"}\n')
    program = (
        "import sys\n"
        "from rlcs.cli.main import main\n"
        f"sys.argv = ['rlcs', *{command.split()!r}]\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    print('loaded:', *sorted({HEAVY_FOR_PEOPLE_WHO_WAIT!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == (2 if "no-such" in command else 0), done.stderr
    assert "loaded:" in done.stderr.splitlines(), done.stderr
