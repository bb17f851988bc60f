"""Settings for all tests: one thread in each process, because tests run several processes on few cores."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def ordinary_priority():
    """A test that leaves this process real-time is wrong: ranks that later tests start would starve each other."""
    yield
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
