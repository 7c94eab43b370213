"""What every tracked file, and the tree as a whole, must keep to."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_NBYTES = 1 << 20
REGISTRIES = re.compile(
    r"https?://[\w.-]*(pypi\.(org|python)|pythonhosted\.|pytorch\.org|npmjs\.|yarnpkg\.|anaconda\.(org|com)|debian\.(org|net)|crates\.io|golang\.org)"
)


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Tracked files, and those that would be tracked by `git add .`."""
    listing = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    return [path for path in (ROOT / name for name in names if name) if path.is_file()]


@pytest.fixture(scope="module")
def texts(tracked) -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text(errors="replace") for path in tracked}


def test_no_file_names_a_package_registry(texts):
    assert [name for name, text in texts.items() if REGISTRIES.search(text)] == []


def test_no_file_holds_a_path_of_this_machine(texts):
    home = {str(ROOT), str(Path.home())} - {"/", "/root"}
    assert [name for name, text in texts.items() if any(f"{path}/" in text for path in home)] == []


def test_no_file_is_over_a_mebibyte(tracked):
    assert [path.name for path in tracked if path.stat().st_size > MAX_NBYTES] == []


def test_nothing_generated_is_tracked(texts):
    assert [name for name in texts if re.search(r"digits\.zarr|\.(pt2|onnx|npz|npy|pyc|whl)$|\.egg-info", name)] == []


def test_readme_gives_the_test_command_that_ci_runs(texts):
    commands = [line for line in texts[".ci/run"].splitlines() if line and not line.startswith("#")]
    assert commands[-1] == "exec make test"
    assert re.search(r"^make test\b", texts["README.md"], re.MULTILINE)


def test_ci_can_be_run():
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_every_make_target_that_readme_names_exists(texts):
    targets = set(re.findall(r"^([a-z]+):", texts["Makefile"], re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", texts["README.md"], re.MULTILINE))
    assert named
    assert named <= targets


def test_every_folder_of_the_package_says_what_it_decides():
    folders = [path.parent for path in (ROOT / "tether").rglob("__init__.py") if path.parent != ROOT / "tether"]
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "README.md").is_file()] == []


def test_links_between_files_lead_somewhere(texts):
    broken = [
        f"{name}: {target}"
        for name, text in texts.items()
        if name.endswith(".md")
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
        if not (ROOT / name).parent.joinpath(target).exists()
    ]
    assert broken == []


def test_no_two_test_files_share_a_name(texts):
    # Without __init__.py files pytest takes the base name for the module's.
    names = [Path(name).name for name in texts if re.fullmatch(r"tests/.*/test_\w+\.py", name)]
    assert sorted(names) == sorted(set(names))
