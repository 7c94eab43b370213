"""environment.yml and constraints.txt say what pyproject.toml says."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]
ENVIRONMENTS = [
    {"python_version": version, "sys_platform": system, "platform_machine": machine}
    for version in ("3.11", "3.12", "3.13")
    for system, machine in PLATFORMS
]


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def conda() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def _extras_of(pyproject: dict, name: str) -> list[Requirement]:
    """The requirements of an extra, with those of the extras it names in their place."""
    found = []
    for requirement in map(Requirement, pyproject["project"]["optional-dependencies"][name]):
        if requirement.name == pyproject["project"]["name"]:
            found += chain.from_iterable(_extras_of(pyproject, extra) for extra in requirement.extras)
        else:
            found.append(requirement)
    return found


def _group(pyproject: dict, name: str) -> list[Requirement]:
    found = []
    for entry in pyproject["dependency-groups"][name]:
        found += _group(pyproject, entry["include-group"]) if isinstance(entry, dict) else [Requirement(entry)]
    return found


def _runtime(pyproject: dict) -> list[Requirement]:
    return [Requirement(text) for text in pyproject["project"]["dependencies"]] + _extras_of(pyproject, "all")


def _pip_lines(conda: dict) -> list[str]:
    return next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))


def test_environment_lists_exactly_what_pyproject_names(pyproject, conda):
    listed = [line for line in _pip_lines(conda) if not line.startswith("-")]
    wanted = [str(requirement) for requirement in _runtime(pyproject) + _group(pyproject, "demo")]
    assert sorted(str(Requirement(line)) for line in listed) == sorted(wanted)


def test_environment_installs_this_checkout_at_the_pinned_versions(conda):
    assert [line for line in _pip_lines(conda) if line.startswith("-")] == ["-c constraints.txt", "-e .[all]"]


def test_environment_has_the_python_that_pyproject_requires(pyproject, conda):
    python = next(entry for entry in conda["dependencies"] if str(entry).startswith("python"))
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(pyproject["project"]["requires-python"])


def test_extra_all_holds_every_extra_but_the_gpu_builds(pyproject):
    extras = set(pyproject["project"]["optional-dependencies"]) - {"all", "gpu"}
    (everything,) = map(Requirement, pyproject["project"]["optional-dependencies"]["all"])
    assert everything.extras == extras


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda environment: "-".join(environment.values()))
def test_every_requirement_has_one_pin_that_fits_it(pyproject, environment):
    pins = _pins(environment)
    for requirement in _runtime(pyproject) + _group(pyproject, "dev"):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (version,) = pins.get(canonicalize_name(requirement.name), ["no pin"])
            assert version in requirement.specifier, (
                f"constraints.txt pins {requirement.name} to {version}, pyproject.toml says {requirement}"
            )


def _pins(environment: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines = re.findall(r"^[^#\s].*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert pin.operator == "==", f"{requirement} is no exact pin"
            found.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return found
