"""Dependencies point one way, scripts and configs -> backends -> common; importing common is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
MLX = {"mlx", "mlx_lm"}
PEERS = {"torch", "tensorflow", "sentence_transformers"}
ABOVE = {"configs", "scripts"}
FORBIDDEN = {
    "common": JAX | MLX | PEERS | ABOVE | {"jax_impl", "mlx_impl"},
    "jax_impl": MLX | PEERS | ABOVE | {"mlx_impl"},
    "mlx_impl": JAX | PEERS | ABOVE | {"jax_impl"},
}
RESOLVER = "common/backends.py"
COMMANDS = {"mlx_impl/train.py"}  # what a Mac user types lies here, and is a command like those of scripts/
LIBRARIES = "transformers tensorflow_datasets grain matplotlib ir_measures faiss bm25s scipy pyarrow datasets"
HEAVY = JAX | MLX | PEERS | {"jax_impl", "mlx_impl", *LIBRARIES.split()}


def imports(node: ast.AST, in_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Every (module, line, whether inside a function) that the code imports, by statement or by name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno, in_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and child.level == 0:
            for alias in child.names:
                yield f"{child.module}.{alias.name}", child.lineno, in_function
        elif isinstance(child, ast.Call) and ast.unparse(child.func).split(".")[-1] in {
            "import_module",
            "__import__",
        }:
            for argument in child.args[:1]:
                # the first words of an f-string name the package
                constants = [n.value for n in ast.walk(argument) if isinstance(n, ast.Constant)]
                if constants and isinstance(constants[0], str):
                    yield constants[0], child.lineno, in_function
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, in_function or function)


def violations(path: str, source: str) -> list[str]:
    """The imports of one file, given by its path from the root, that point the wrong way."""
    forbidden = FORBIDDEN[path.split("/")[0]] - (ABOVE if path in COMMANDS else set())
    found = []
    for name, line, in_function in imports(ast.parse(source)):
        package = name.split(".")[0]
        resolved = path == RESOLVER and in_function and package in {"jax_impl", "mlx_impl"}
        if package in forbidden and not resolved:
            found.append(f"{path}:{line} imports {name}")
    return found


def python_files(folder: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_packages_import_only_what_lies_below_them(package: str) -> None:
    files = python_files(package)
    assert files
    assert [line for path in files for line in violations(path, (ROOT / path).read_text())] == []


SETTINGS = ("common.config", "common.language.config", "common.expansion.recipe")


def test_recipes_import_the_settings_and_nothing_else() -> None:
    for path in python_files("configs"):
        for name, line, _ in imports(ast.parse((ROOT / path).read_text())):
            allowed = name.startswith(SETTINGS) or name.split(".")[0] in sys.stdlib_module_names
            assert allowed, f"{path}:{line} imports {name}"


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("common/text.py", "def f():\n    import jax.numpy as jnp", True),
        ("common/text.py", "from jax_impl.models import bert", True),
        ("common/text.py", "importlib.import_module('mlx_impl.models')", True),
        ("common/text.py", "importlib.import_module(f'jax_impl.{name}')", True),
        ("common/text.py", "import numpy, transformers", False),
        ("common/backends.py", "from jax_impl import models", True),
        ("common/backends.py", "def f():\n    from jax_impl import models", False),
        ("common/backends.py", "def f():\n    import jax", True),
        ("jax_impl/models/bert.py", "import mlx.core as mx", True),
        ("jax_impl/models/bert.py", "import jax, common.keymap", False),
        ("mlx_impl/train.py", "from jax_impl.losses import ranking", True),
        ("mlx_impl/train.py", "from scripts import train", False),
        ("mlx_impl/scoring.py", "from scripts import train", True),
    ],
)
def test_a_wrong_import_is_seen_wherever_it_hides(path: str, source: str, wrong: bool) -> None:
    assert bool(violations(path, source)) is wrong


def test_importing_common_loads_no_heavy_library() -> None:
    modules = [path.removesuffix(".py").removesuffix("/__init__") for path in python_files("common")]
    names = [module.replace("/", ".") for module in modules]
    program = f"""
import importlib, sys
seen = set()
for name in {names!r}:
    importlib.import_module(name)
    new = ({HEAVY!r} & set(sys.modules)) - seen
    seen |= new
    if new: print(name, 'loads', ', '.join(sorted(new)))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
