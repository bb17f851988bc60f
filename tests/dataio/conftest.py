"""Decoded indexes go to a folder of the test's own, never to the user's cache."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIPHYS_CACHE", str(tmp_path / "tiphys-cache"))
