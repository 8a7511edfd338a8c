"""The two packages, and the one door between them, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRONT_DOOR = "stablerep/cli.py"
# Importing any of these takes a noticeable time; the front door has none of them at its top.
LIGHT_FILES = [FRONT_DOOR, "stablerep/arguments.py", "stablerep/__init__.py"]


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Yield every module that a file imports, at the top or inside a function, by import or by its name.

    `from a import b` yields `a.b`, since b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package.split(".")[: len(package.split(".")) + 1 - level] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def forbidden_imports(path: Path, source: str) -> list[str]:
    """Name each import of a file that breaks a wall, with the file."""
    name = path.relative_to(ROOT).as_posix()
    modules = list(imported_modules(source, package=".".join(path.relative_to(ROOT).parent.parts)))
    if name.startswith("data_gen/"):
        barred = ("stablerep", "lightning", "pytorch_lightning", "timm")
        broken = [module for module in modules if any(is_within(module, other) for other in barred)]
    else:
        broken = [module for module in modules if is_within(module, "diffusers")]
        if name != FRONT_DOOR:
            door = "data_gen.shards"
            broken += [m for m in modules if is_within(m, "data_gen") and not is_within(m, door)]
    return [f"{name} imports {module}" for module in broken]


@pytest.mark.parametrize("package", ["data_gen", "stablerep"])
def test_no_package_imports_what_is_behind_its_wall(package: str) -> None:
    files = source_files(package)
    assert files
    assert [line for path in files for line in forbidden_imports(path, path.read_text())] == []


def test_the_door_itself_imports_nothing_heavy() -> None:
    heavy = ("torch", "torchvision", "diffusers", "transformers", "lightning", "timm")
    for name in ["data_gen/shards.py", "data_gen/__init__.py"]:
        modules = list(imported_modules((ROOT / name).read_text(), package="data_gen"))
        assert [module for module in modules if any(is_within(module, other) for other in heavy)] == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("data_gen/job/generate.py", "from stablerep.losses import x"),
        ("data_gen/job/generate.py", "def f():\n    import timm.models"),
        ("data_gen/job/generate.py", "import lightning.pytorch as pl"),
        ("data_gen/embedded/train.py", "from ...stablerep import losses"),
        ("data_gen/job/generate.py", "import importlib\nimportlib.import_module('stablerep.fit')"),
        ("stablerep/demo.py", "from data_gen import job"),
        ("stablerep/demo.py", "import data_gen"),
        ("stablerep/demo.py", "from diffusers import StableDiffusionPipeline"),
        ("stablerep/cli.py", "import diffusers"),
    ],
)
def test_each_way_through_a_wall_is_seen(name: str, source: str) -> None:
    assert forbidden_imports(ROOT / name, source) != []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("stablerep/datamodule.py", "from data_gen.shards import read_samples"),
        ("stablerep/datamodule.py", "from data_gen import shards"),
        ("stablerep/cli.py", "import data_gen.job.generate"),
        ("data_gen/job/generate.py", "from .shards import Sample"),
        ("data_gen/job/generate.py", "import stablerepository"),
    ],
)
def test_the_door_is_open(name: str, source: str) -> None:
    assert forbidden_imports(ROOT / name, source) == []


@pytest.mark.parametrize("name", LIGHT_FILES)
def test_the_front_door_imports_only_the_standard_library_at_its_top(name: str) -> None:
    import sys

    allowed = sys.stdlib_module_names | {"stablerep"}
    for node in ast.parse((ROOT / name).read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in imported_modules(ast.unparse(node), package="stablerep"):
                assert module.partition(".")[0] in allowed
                assert not is_within(module, "stablerep") or module.startswith(
                    ("stablerep.__version__", "stablerep.arguments.")
                )
