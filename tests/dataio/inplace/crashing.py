"""Stands for a decoder that crashes.

Where this module is imported with `CRASH` in the environment, decoding the video sample with that CRC-32C ends the process by a
segmentation fault.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
from crc32c import crc32c

from tests.dataio.loading_fixtures import digest_batch
from tiphys.dataio.episode import Window
from tiphys.dataio.format import packets

CRASH = "TIPHYS_TEST_CRASH"


def make_batch(step: int, rows: np.ndarray, windows: list[list[Window]]) -> dict[str, np.ndarray]:
    return digest_batch(step, rows, windows)


if CRASH in os.environ:
    real = packets.decode

    def decode(stream: Any, payloads: Any, *arguments: Any) -> Any:
        if str(crc32c(payloads[0])) == os.environ[CRASH]:
            ctypes.string_at(0)
        return real(stream, payloads, *arguments)

    packets.decode = decode
