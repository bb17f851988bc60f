"""Each test has its own folder for decoded indexes, so that the user's cache is never touched."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIPHYS_CACHE", str(tmp_path / "tiphys-cache"))
