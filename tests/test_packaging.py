"""The metadata: every dependency has a floor, a reason and a pin, and nothing ties it to one registry."""

import ast
import configparser
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def read_setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    return parser


def read_requirements() -> list[Requirement]:
    setup = read_setup()
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "%("))]


def read_pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, _, version in pins}


@pytest.mark.parametrize("requirement", read_requirements(), ids=str)
def test_every_dependency_has_a_floor_and_a_pin_above_it(requirement: Requirement) -> None:
    assert any(specifier.operator == ">=" for specifier in requirement.specifier)
    assert read_pins()[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("folder", ["data_gen", "stablerep", "tests", "benchmarks"])
def test_every_library_that_is_imported_is_a_dependency(folder: str) -> None:
    declared = {canonicalize_name(requirement.name) for requirement in read_requirements()}
    distributions = importlib.metadata.packages_distributions()
    undeclared = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            else:
                continue
            for module in modules:
                names = {canonicalize_name(name) for name in distributions.get(module.partition(".")[0], [])}
                if names and not names & (declared | {"stablerep"}):
                    undeclared.add(f"{path.relative_to(ROOT)}: {module}")
    assert undeclared == set()


def test_every_dependency_has_its_reason_on_the_line_above() -> None:
    lines = (ROOT / "setup.cfg").read_text().splitlines()
    dependencies = [index for index, line in enumerate(lines) if re.match(r"    [\w\[\]-]+>=", line)]
    assert len(dependencies) == len(read_requirements())
    unexplained = [lines[index] for index in dependencies if not lines[index - 1].strip().startswith("#")]
    assert unexplained == []


@pytest.mark.parametrize("name", ["constraints.txt", "setup.cfg", "pyproject.toml", "Makefile", ".ci/run"])
def test_no_build_file_names_a_registry_or_a_local_path(name: str) -> None:
    text = (ROOT / name).read_text()
    assert (
        re.findall(r"https?://|file://|--(?:extra-)?index|--find-links|(?<!\w)-e \S*/|/home/|/root/", text)
        == []
    )


def test_constraints_hold_exact_pins_alone() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []


def test_metadata_stands_in_setup_cfg_alone() -> None:
    assert "project" not in tomllib.loads((ROOT / "pyproject.toml").read_text())
    scripts = read_setup()["options.entry_points"]["console_scripts"].split("\n")
    assert [line for line in scripts if line] == ["stablerep = stablerep.cli:main"]


def test_the_citation_and_the_code_name_one_version() -> None:
    import stablerep

    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, flags=re.MULTILINE) == [stablerep.__version__]
