"""Each diff in patches/ applies cleanly to the installed verl and has a reason and a mirror."""

import re
import subprocess
from importlib import metadata, util
from pathlib import Path

import pytest
from conftest import REPO

PATCHES = sorted((REPO / "patches").glob("*.diff"))


def test_there_are_patches_and_each_is_listed():
    listed = set(re.findall(r"`(\w+\.diff)`", (REPO / "patches" / "README.md").read_text()))
    assert listed == {p.name for p in PATCHES} and PATCHES


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_applies_cleanly(patch):
    site_packages = Path(util.find_spec("verl").origin).parents[1]
    with patch.open() as text:
        result = subprocess.run(
            ["patch", "-p1", "--dry-run", "--fuzz=0", "--batch"],
            cwd=site_packages,
            stdin=text,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0 and "offset" not in result.stdout, result.stdout


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_names_version_reason_and_mirror(patch):
    head = patch.read_text().split("--- a/")[0]
    assert f"verl {metadata.version('verl')}" in head and "Why:" in head
    mirror = re.search(r"Mirrored by (rema_verl[\w.]+)\.(\w+)\.", head)
    source = (REPO / (mirror[1].replace(".", "/") + ".py")).read_text()
    assert f"def {mirror[2]}(" in source and f"patches/{patch.name}" in source
