import pytest

from flows.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    opened = Workspace.open(tmp_path / "a workspace")
    yield opened
    opened.catalog.close()
