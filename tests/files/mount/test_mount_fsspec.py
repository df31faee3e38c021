"""fsspec's own suites of claims, by its local file system on the mount."""

from __future__ import annotations

import fsspec.tests.abstract as suites
import pytest
from fsspec.implementations.local import LocalFileSystem, make_path_posix
from tests.files.mount.conftest import Mounted


class MountFixtures(suites.AbstractFixtures):
    """`fs` on a tree of the mount."""

    tree = "n1"

    @pytest.fixture
    def fs(self) -> LocalFileSystem:
        return LocalFileSystem(auto_mkdir=True)

    @pytest.fixture
    def fs_path(self, mount: Mounted) -> str:
        path = mount.place / self.tree / "fsspec"
        path.mkdir(exist_ok=True)
        return make_path_posix(str(path))


class TestCopy(MountFixtures, suites.AbstractCopyTests):
    """Copies within."""


class TestGet(MountFixtures, suites.AbstractGetTests):
    """Copies out."""


class TestPut(MountFixtures, suites.AbstractPutTests):
    """Copies in."""


class TestOpen(MountFixtures, suites.AbstractOpenTests):
    """Opening."""


class TestPipe(MountFixtures, suites.AbstractPipeTests):
    """Whole files."""


class TestRemoteCopy(TestCopy):
    """The same afar."""

    tree = "n2"
