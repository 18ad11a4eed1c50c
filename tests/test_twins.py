"""The backends are twins: the same public names, in the same order, in every file that both have.

Read from the source, so it needs neither framework. What differs on purpose stands below, with its reason; an
exception that no longer applies fails as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Files of one tree alone.
JAX_ONLY_FILES = {
    "training/parallel.py",  # devices of a host and of others; MLX: training/distributed.py
    "export/onnx.py",
    "export/onnx_language.py",
}
MLX_ONLY_FILES = {
    "models/layers.py",  # what flax.nnx brings: seeded layers with a computation dtype
    "train.py",  # the commands of the Mac user
    "eval.py",
    "convert.py",
    # SFT and GRPO of Qwen3 on mlx-lm's model and LoRA layers, and their GGUF: of the Mac alone
    "expansion.py",
    "export/gguf.py",
    "export/runtime.py",
    "models/qwen.py",
    "training/adapters.py",
    "training/generation.py",
    "training/grpo.py",
    "training/sft.py",
    "training/distributed.py",  # processes, where JAX has meshes
}
# JAX's name -> MLX's, where the frameworks have words of their own.
RENAMED = {
    "JaxEncoder": "MlxEncoder",
    "JaxOriginal": "MlxOriginal",
    "JaxScorer": "MlxScorer",
    "LoRALinear.kernel": "LoRALinear.weight",  # MLX stores weights as checkpoints do, and calls them so
}
# Names of one tree alone, as "file: name".
JAX_ONLY = {
    "models/bert.py: product",  # a gradient written for XLA's CPU; in MLX `@`
    "models/modernbert.py: layer_norm(rngs)",  # NNX asks for keys where nothing is drawn
    "models/decoder.py: rms_norm(rngs)",  # the same
    "training/loop.py: Trainer.devices",  # in MLX Trainer.world: a process for each Mac, one device in each
    "training/step.py: loss_terms(axis)",
    "training/step.py: make_step(devices)",
    "training/step.py: split_batch(devices)",
    "training/step.py: denominators(axis)",
    # JAX's step is a pure function of a state; MLX's changes the model and the optimizer it was made for
    "training/step.py: TrainState.learned",
    "training/step.py: TrainState.fixed",
    "training/step.py: make_step(graphdef)",
    "training/step.py: make_step(optimizer)",
    "training/language.py: LanguageTrainer.devices",
    "training/language_step.py: LanguageState.learned",
    "training/language_step.py: make_language_step(graphdef)",
    "training/language_step.py: make_language_step(optimizer)",
    "training/language_step.py: make_language_step(devices)",
    "training/language_step.py: Resting",  # MLX freezes what rests
}
MLX_ONLY = {
    "models/bert.py: MASKED",  # JAX adds the least float32, which a fused kernel may turn into NaN
    "models/lora.py: freeze",  # JAX splits a state by a filter
    "models/dropout.py: fold_in",  # jax.random has it
    "training/optimizer.py: global_norm",  # optax has it
    "training/state.py: StateFolder.__init__(kept)",  # model.save_total_limit of the query expansion
    "training/state.py: StateFolder.kept",
    "training/step.py: TrainState.model",  # as above
    "training/step.py: TrainState.arrays",
    "training/step.py: make_step(state)",
    "training/language_step.py: LanguageState.model",
    "training/language_step.py: LanguageState.arrays",
    "training/language_step.py: LanguageState.remembered",
    "training/language_step.py: make_language_step(state)",
    "training/state.py: Stepped.arrays",
    "training/step.py: make_step(world)",  # in JAX `devices`
    "training/loop.py: Trainer.world",  # in JAX Trainer.devices
}


def public_names(source: str) -> list[str]:
    """Public classes, functions and constants of a module, with their members, in order.

    Members are methods, fields and what `__init__` assigns to self, as `Class.member`; parameters stand as
    `function(name)`, for `__init__` and `__call__` too.
    """
    names: list[str] = []
    for node in _statements(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names += _function(node, node.name)
        elif isinstance(node, ast.ClassDef):
            names.append(node.name)
            for member in _statements(node.body):
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    names += _function(member, f"{node.name}.{member.name}")
                elif isinstance(member, ast.AnnAssign | ast.Assign):
                    names += [f"{node.name}.{name}" for name in _targets(member)]
                elif isinstance(member, ast.ClassDef):
                    names.append(f"{node.name}.{member.name}")
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            names += _targets(node)
    return list(dict.fromkeys(name for name in names if _public(name)))


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, those under a condition or a `try` too."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            handled = [handler.body for handler in getattr(node, "handlers", [])]
            for part in (node.body, *handled, node.orelse, getattr(node, "finalbody", [])):
                yield from _statements(part)
        else:
            yield node


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> list[str]:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments += [argument for argument in (node.args.vararg, node.args.kwarg) if argument is not None]
    names = [name, *(f"{name}({argument.arg})" for argument in arguments if argument.arg != "self")]
    if node.name == "__init__":
        owner = name.rpartition(".")[0]
        for statement in ast.walk(node):
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                parts = [target.split(".") for target in _targets(statement)]
                names += [f"{owner}.{part[1]}" for part in parts if len(part) == 2 and part[0] == "self"]
    return names


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    flat = [item for target in targets for item in getattr(target, "elts", [target])]
    return [ast.unparse(target) for target in flat if isinstance(target, ast.Name | ast.Attribute)]


def _public(name: str) -> bool:
    parts = name.partition("(")[0].split(".")
    return not any(part.startswith("_") and part not in ("__init__", "__call__") for part in parts)


def differences(file: str, jax: str, mlx: str) -> list[str]:
    """What one of two sources has and the other has not, as "file: name", and the first name out of order."""
    ours, theirs = public_names(jax), public_names(mlx)
    renamed = [_renamed(name) for name in ours]
    missing = [
        f"{file}: {name} is in jax_impl alone"
        for name, other in zip(ours, renamed, strict=True)
        if other not in theirs and not _excepted(f"{file}: {name}", JAX_ONLY)
    ]
    missing += [
        f"{file}: {name} is in mlx_impl alone"
        for name in theirs
        if name not in renamed and not _excepted(f"{file}: {name}", MLX_ONLY)
    ]
    shared = [name for name in renamed if name in theirs]
    for name, other in zip(shared, [name for name in theirs if name in renamed], strict=True):
        if name != other:
            return [*missing, f"{file}: {other} stands where jax_impl has {name}"]
    return missing


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        if name == old or name.startswith((f"{old}.", f"{old}(")):
            return new + name[len(old) :]
    return name


def _excepted(name: str, exceptions: set[str]) -> bool:
    return any(name == other or name.startswith((f"{other}.", f"{other}(")) for other in exceptions)


def files(tree: str) -> set[str]:
    return {str(path.relative_to(ROOT / tree)) for path in (ROOT / tree).rglob("*.py")}


def sources(file: str) -> tuple[str, str]:
    return (ROOT / "jax_impl" / file).read_text(), (ROOT / "mlx_impl" / file).read_text()


def test_every_file_has_its_twin() -> None:
    assert files("jax_impl") - files("mlx_impl") == JAX_ONLY_FILES
    assert files("mlx_impl") - files("jax_impl") == MLX_ONLY_FILES


@pytest.mark.parametrize("file", sorted(files("jax_impl") & files("mlx_impl")))
def test_twins_have_the_same_public_names_in_the_same_order(file: str) -> None:
    assert differences(file, *sources(file)) == []


@pytest.mark.parametrize("file", sorted(files("jax_impl") & files("mlx_impl")))
def test_twins_name_each_other(file: str) -> None:
    if file.endswith("__init__.py") and "/" in file:
        return
    for source, other in zip(sources(file), ("mlx_impl", "jax_impl"), strict=True):
        docstring = ast.get_docstring(ast.parse(source)) or ""
        assert (other if file == "__init__.py" else f"{other}/{file}") in docstring, file


def test_every_exception_still_applies() -> None:
    for exceptions, one, two in ((JAX_ONLY, 0, 1), (MLX_ONLY, 1, 0)):
        for exception in exceptions:
            file, _, name = exception.partition(": ")
            assert name in public_names(sources(file)[one]), exception
            assert name not in public_names(sources(file)[two]), exception
    everywhere = [[], []]
    for file in files("jax_impl") & files("mlx_impl"):
        for names, source in zip(everywhere, sources(file), strict=True):
            names += public_names(source)
    for old, new in RENAMED.items():
        assert old in everywhere[0] and new in everywhere[1], old


TWIN = """
LIMIT = 3
class Model:
    size: int
    def __init__(self, width, *, rngs):
        self.query, self.key = width, width
        self._hidden = 0
    def merged(self):
        self.later = 1
def loss(scores, mask):
    inner = 1
"""


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("LIMIT = 3\n", "", "LIMIT is in jax_impl alone"),
        ("class Model:", "class Encoder:", "Model is in jax_impl alone"),
        ("def loss(", "def the_loss(", "the_loss is in mlx_impl alone"),
        ("self.query, self.key", "self.query, self.keys", "Model.keys is in mlx_impl alone"),
        ("size: int", "length: int", "Model.length is in mlx_impl alone"),
        ("def merged", "def added", "Model.added is in mlx_impl alone"),
        ("(scores, mask)", "(scores, masks)", "loss(mask) is in jax_impl alone"),
        ("self, width, *, rngs", "self, width, *", "Model.__init__(rngs) is in jax_impl alone"),
        ("self.query, self.key", "self.key, self.query", "Model.key stands where jax_impl has Model.query"),
        ("self._hidden", "self._other", None),
        ("inner = 1", "other = 2", None),
        ("def loss(", "async def loss(", None),
        ("def loss(scores, mask)", "def loss(scores, mask, **more)", "loss(more) is in mlx_impl alone"),
        ("LIMIT = 3", "try:\n    LIMIT = 3\nexcept OSError:\n    MORE = 4", "MORE is in mlx_impl alone"),
        ("size: int", "size: int\n    class Inner:\n        pass", "Model.Inner is in mlx_impl alone"),
    ],
)
def test_a_difference_is_told(before: str, after: str, told: str | None) -> None:
    assert before in TWIN
    changed = TWIN.replace(before, after).replace("*):", "**_):")
    found = differences("models/x.py", TWIN, changed)
    assert (found == []) if told is None else (f"models/x.py: {told}" in found)
