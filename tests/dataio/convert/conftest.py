"""A source of every format. Each is made when a test first asks for it, once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dataio.convert.convert_sources import MAKERS, Expected


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str, Expected]]:
    """name of a maker -> (source, format, expected episodes). Tests share the sources and must not change them."""
    root, sources = tmp_path_factory.mktemp("sources"), {}

    def make(name: str) -> tuple[Path, str, Expected]:
        if name not in sources:
            format, maker = MAKERS[name]
            folder = root / name
            expected = maker(folder)
            source = folder / "buffer.zarr.zip" if name == "zarr-zip" else folder
            sources[name] = (source, format, expected)
        return sources[name]

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real files beside the repository. Without it the test is skipped."""
    folder = Path(__file__).resolve().parents[4] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real files in {folder}")
    return folder
