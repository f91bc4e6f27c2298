"""The frame: what imports what, what a bare import pulls in, and what a wheel holds."""

import ast
import graphlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusers_mcm"
FILES = sorted(PACKAGE.rglob("*.py"))

# The units from the bottom to the top, each with those it may import; "" is the package itself.
MAY_IMPORT: dict[str, set[str]] = {
    **{unit: set() for unit in ("card_text", "conditioning", "consistency", "devices", "files", "flags", "hub")},
    **{unit: set() for unit in ("moved", "scheduler_common", "text_files", "wording")},
    "location": {"files", "hub", "wording"},
    "settings": {"files", "hub", "location"},
    "tables": {"files"},
    "features": {"location"},
    "scheduler": {"consistency", "scheduler_common"},
    "distillation": {"conditioning", "consistency", "features", "flags"},
    "video_io": {"files"},
    "cards": {"card_text", "hub", "location", "settings"},
    "lora": {"files", "hub", "location", "settings"},
    "data": {"text_files", "wording"},
    "evaluation": {"data", "features", "files", "hub", "location", "tables", "text_files", "video_io"},
    "base_models": {"conditioning", "consistency", "hub", "location", "lora", "moved", "scheduler", "settings"},
    "publish": {
        *("base_models", "card_text", "cards", "files", "hub", "location", "lora", "settings", "text_files"),
        "video_io",
    },
    "pipelines": {
        *("base_models", "cards", "conditioning", "files", "hub", "location", "lora", "publish", "scheduler"),
        *("settings", "wording"),
    },
    "": {"base_models", "pipelines", "scheduler"},
    "training": {
        *("base_models", "cards", "conditioning", "data", "distillation", "features", "files", "flags", "hub"),
        *("location", "lora", "pipelines", "publish", "settings", "video_io", "wording"),
    },
    "formats": {"base_models", "files", "hub", "location", "lora", "pipelines", "settings"},
    "commands": {
        *(
            "",
            "devices",
            "evaluation",
            "files",
            "formats",
            "hub",
            "location",
            "lora",
            "pipelines",
            "publish",
            "settings",
        ),
        "text_files",
        "training",
        "video_io",
    },
    "shapes": {"files", "tables", "video_io"},
    "cli": {"commands", "shapes"},
    "__main__": {"cli"},
}
# the two commands of the shapes world that sample do so inside their functions
SAMPLES_LAZILY = {"shapes/demo.py", "shapes/figures.py", "shapes/methods.py"}


def unit(module: str) -> str:
    """`diffusers_mcm.distillation.student` -> `distillation`; the package itself -> ``."""
    return (module.split(".") + [""])[1]


def imported_modules(path: Path, node: ast.AST) -> list[str]:
    """Full names of the package's modules that one import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = ["diffusers_mcm", *path.relative_to(PACKAGE).parts[:-1]]
        base = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join(base + ([node.module] if node.module else []))
        # `from .. import hub` names a module, `from .. import MCMPipeline` does not
        names = [f"{module}.{a.name}" if is_module(f"{module}.{a.name}") else module for a in node.names]
    else:
        return []
    return [name for name in names if name.split(".")[0] == "diffusers_mcm"]


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_the_way_of_the_imports_is_one():
    order = list(MAY_IMPORT)
    backwards = {unit: back for unit in order if (back := MAY_IMPORT[unit] - set(order[: order.index(unit)]))}
    assert backwards == {}


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions count, those for type checkers as well."""
    graph = {}
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {module for node in ast.walk(tree) for module in imported_modules(path, node)} - {name}
    assert len(graph) == len(FILES) and sum(map(len, graph.values())) > len(FILES)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_the_way_that_is_told(path):
    relative = path.relative_to(PACKAGE)
    own = "" if relative.as_posix() == "__init__.py" else relative.parts[0].removesuffix(".py")
    assert own in MAY_IMPORT, f"a new unit {own!r}: say here what it may import"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed = MAY_IMPORT[own] | {own}
    if relative.as_posix() in SAMPLES_LAZILY:
        inside_functions = {
            node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
        }
    for node in ast.walk(tree):
        for module in imported_modules(path, node):
            lazily = relative.as_posix() in SAMPLES_LAZILY and node in inside_functions
            assert unit(module) in allowed | ({"", "devices"} if lazily else set()), f"line {node.lineno}: {module}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {name.split(".")[0] for name in names} & {"tests", "examples"}, f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_assert_in_the_package(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []


# Modules without a test file of their own name, and why.
NO_TEST_FILE = {
    "__main__.py": "it calls the command line, which tests/test_cli.py runs",
    "base_models/base.py": "it declares what the base models do, each in its own test file",
}


def test_tests_mirror_the_package():
    """Every module `a/b.py` is tested in `tests/a/test_b.py`; an `__init__` is tested through what it offers."""
    modules = [path.relative_to(PACKAGE) for path in FILES if path.name != "__init__.py"]
    missing = [
        each.as_posix() for each in modules if not (ROOT / "tests" / each.parent / f"test_{each.name}").is_file()
    ]
    assert missing == sorted(NO_TEST_FILE)


def modules_after(statement: str) -> set[str]:
    """What is in `sys.modules` after a statement in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


HEAVY = ("diffusers_mcm.training", "diffusers_mcm.data", "diffusers_mcm.evaluation", "datasets", "av", "tensorboard")


def test_inference_pulls_in_neither_training_nor_data_nor_evaluation():
    loaded = modules_after("import diffusers_mcm\ndiffusers_mcm.MCMPipeline, diffusers_mcm.MCMScheduler")
    assert "diffusers_mcm.pipelines" in loaded
    assert not loaded & set(HEAVY)


def test_the_command_line_parses_without_torch():
    loaded = modules_after("from diffusers_mcm.cli import build_parser\nbuild_parser()")
    assert not loaded & {"torch", "diffusers", "transformers", *HEAVY}


def test_a_wheel_holds_weights_types_and_every_module_but_no_logs(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(PACKAGE, copy / "diffusers_mcm", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    weights = [
        "mcm-shapes/pytorch_lora_weights.safetensors",
        "mcm-shapes/README.md",
        "mcm-shapes-teacher/model_index.json",
        "mcm-shapes-teacher/unet/diffusion_pytorch_model.safetensors",
    ]
    for name in weights:
        path = copy / "diffusers_mcm" / "shapes" / "weights" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    logs = {"mcm-shapes/train_log.jsonl", "mcm-shapes-clip/logs/clip.jsonl"}
    for name in logs:
        path = copy / "diffusers_mcm" / "shapes" / "weights" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "wheel")]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    built = {path.relative_to(tmp_path / "wheel").as_posix() for path in (tmp_path / "wheel").rglob("*.*")}
    assert {f"diffusers_mcm/shapes/weights/{name}" for name in weights} <= built
    assert not [name for name in built if name.endswith(".jsonl")], "logs of the training belong to the repository"
    assert {"diffusers_mcm/py.typed", "diffusers_mcm/card_template.md"} <= built
    assert {path.relative_to(ROOT).as_posix() for path in FILES} <= built


# --- pyproject.toml --------------------------------------------------------------------------------------------------
# Scripts import what lies beside them, and tests import scripts.
SCRIPTS = {path.stem for top in ("examples", "benchmarks", "model_cards") for path in (ROOT / top).rglob("*.py")}
# Not declared: it needs a torchvision, of which there is no build for every torch; the error says what to install.
UNDECLARED = {"torch_fidelity"}
DISTRIBUTIONS = {"PIL": "Pillow", "yaml": "PyYAML"}  # import -> what to install for it, where the names differ
# where -> the extras whose packages may be imported there, beside those that are always installed
EXTRAS = {
    **{f"diffusers_mcm/{unit}": set() for unit in MAY_IMPORT if unit},
    "diffusers_mcm/data": {"train"},
    "diffusers_mcm/evaluation": {"eval"},
    "examples": {"train"},
    "model_cards": set(),
    "benchmarks": set(),
    "tests": {"test"},
}


@pytest.fixture(scope="module")
def packaging() -> dict:
    """The name, the requirements and the extras of the package, requirements as distribution names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def names(requirements):
        own = [re.fullmatch(rf"{project['name']}\[(\w+)\]", requirement) for requirement in requirements]
        others = {re.match(r"[\w-]+", requirement)[0] for requirement, match in zip(requirements, own) if not match}
        return others.union(*(names(extras[match[1]]) for match in own if match))

    return {
        "install_requires": names(project["dependencies"]),
        "extras_require": {extra: names(listed) for extra, listed in extras.items()},
    }


def third_party(path: Path) -> set[str]:
    """The distributions that a file imports from, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    ours = {"diffusers_mcm", "tests", *SCRIPTS, *UNDECLARED}
    return {DISTRIBUTIONS.get(name, name) for name in names - set(sys.stdlib_module_names) - ours}


@pytest.mark.parametrize("where", sorted(EXTRAS))
def test_what_is_imported_is_declared(packaging, where):
    always, extras = packaging["install_requires"], packaging["extras_require"]
    declared = always.union(*(extras[extra] for extra in EXTRAS[where]))
    top = ROOT / where
    files = [path for path in (top.with_suffix(".py"), *top.rglob("*.py")) if path.is_file()]
    undeclared = {path.name: missing for path in files if (missing := third_party(path) - declared)}
    assert undeclared == {}


def test_the_versions_that_are_tested_are_pinned(packaging):
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    declared = packaging["install_requires"].union(*packaging["extras_require"].values())
    assert {name.lower() for name in declared} <= {name.lower() for name in pinned}


def test_the_extras_that_are_named_exist(packaging):
    documents = [
        ROOT / "README.md",
        ROOT / "Makefile",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]
    text = "".join(path.read_text(encoding="utf-8") for path in [*documents, *FILES])
    named = set(re.findall(r"(?:-e '?\.|diffusers-mcm)\[(\w+)\]", text))
    assert {"train", "test"} <= named <= packaging["extras_require"].keys()


def test_the_code_is_clean():
    run = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
