"""The AV1 encoder makes its threads real-time as root. Then every process that is started later would starve the others."""

import os
import threading

import numpy as np
import pytest

from tiphys.dataio.format import priority
from tiphys.dataio.format.encodings import Encoding, encode


def real_time(thread=0):
    os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))


@pytest.fixture
def may_be_real_time():
    try:
        real_time()
    except PermissionError:
        pytest.skip("this process may not have a real-time priority: needs root")
    yield
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_what_became_real_time_inside_is_ordinary_after_it(may_be_real_time):
    end = threading.Event()
    before = threading.Thread(target=end.wait)  # inherits the real-time priority of this thread
    before.start()
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    with priority.kept():
        real_time()
        within = threading.Thread(target=end.wait)
        within.start()
        assert os.sched_getscheduler(within.native_id) == os.SCHED_FIFO
    found = [os.sched_getscheduler(t) for t in (0, within.native_id, before.native_id)]
    end.set()
    assert found == [os.SCHED_OTHER, os.SCHED_OTHER, os.SCHED_FIFO]


def test_the_av1_encoder_leaves_this_process_as_it_was():
    encode(np.zeros((2, 64, 64, 3), np.uint8), Encoding("av1"))
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
