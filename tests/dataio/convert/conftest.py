"""Every kind of source, made once a session and only where a test asks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dataio.convert.convert_sources import MAKERS, Expected


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str, Expected]]:
    """name of a maker -> (source, format, expected episodes). The sources are shared: tests must not write to them."""
    root, known = tmp_path_factory.mktemp("sources"), {}

    def make(name: str) -> tuple[Path, str, Expected]:
        if name not in known:
            format, maker = MAKERS[name]
            folder = root / name
            expected = maker(folder)
            source = folder / "buffer.zarr.zip" if name == "zarr-zip" else folder
            known[name] = (source, format, expected)
        return known[name]

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real files beside the repository, where they are."""
    folder = Path(__file__).resolve().parents[4] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real files are not here")
    return folder
