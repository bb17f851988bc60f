"""Rates, shares, smoothed values, spans, and peak memory."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from tiphys.pretrain.distributed.spans import Spans, peak_memory
from tiphys.pretrain.engine import StepResult
from tiphys.pretrain.metrics import Smoothed, StepMetrics, matrix_rate, peak_rate


def test_the_matrix_rate_is_measured_once_and_plausible() -> None:
    rate = matrix_rate(torch.device("cpu"), torch.float32, size=64, seconds=0.02)
    assert 1e7 < rate < 1e15
    assert matrix_rate(torch.device("cpu"), torch.float32, size=64, seconds=0.02) == rate


def test_the_peak_of_a_known_device_is_from_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_rate(torch.device("cuda"), torch.bfloat16) == peak


def test_mfu_is_flops_done_over_flops_possible() -> None:
    result = StepResult(3, 1.5, 0.0, 1.0, 1e-3, 4, 800, 100, 3e9, {0: (6.0, 3), 5: (1.0, 2)})
    metrics = StepMetrics(result, seconds=2.0, wait=0.5, peak=6e9, counters={"store_bytes": 7.0})
    assert metrics.mfu == pytest.approx(0.25)
    assert metrics.tokens_per_second == pytest.approx(400)
    line = metrics.to_json(["reach"])
    assert line["loss_by_task"] == {"reach": 2.0, "5": 0.5}
    assert (line["step"], line["loss"], line["data_wait"], line["loader"]) == (3, 1.5, 0.5, {"store_bytes": 7.0})


def test_smoothing_has_no_bias_at_the_start() -> None:
    smoothed = Smoothed(10)
    assert [smoothed.add(4.0) for _ in range(3)] == pytest.approx([4.0] * 3)
    for _ in range(200):
        smoothed.add(8.0)
    assert smoothed.value == pytest.approx(8.0, rel=1e-6)


def test_only_costs_that_the_layout_has_are_reported() -> None:
    plain = StepResult(3, 1.5, 0.0, 1.0, 1e-3, 4, 800, 100, 3e9, memory=7)
    line = StepMetrics(plain, seconds=2.0, wait=0.5, peak=6e9).to_json()
    assert line["peak_memory"] == 7
    assert not {"bubble", "bubble_bound", "all_to_all"} & line.keys()
    hybrid = StepResult(3, 1.5, 0.0, 1.0, 1e-3, 4, 800, 100, 3e9, all_to_all=0.5, bubble=0.25, bubble_bound=0.2)
    line = StepMetrics(hybrid, seconds=2.0, wait=0.5, peak=6e9).to_json()
    assert (line["all_to_all"], line["bubble"], line["bubble_bound"]) == (0.25, 0.25, 0.2)


def test_spans_measure_the_time_inside_them() -> None:
    spans = Spans(torch.device("cpu"))
    began = spans.mark()
    for _ in range(2):
        time.sleep(0.02)
        with spans.span():
            time.sleep(0.03)
    time.sleep(0.05)
    after = spans.mark() - began
    inside, until_last = spans.take(began)
    assert 0.06 <= inside <= until_last - 0.04
    assert until_last <= after - 0.05
    assert spans.take(began) == (0.0, 0.0)


def test_peak_memory_is_that_of_this_process() -> None:
    """In a child process, ru_maxrss would include the parent's memory, which is 256 MiB more here."""
    block = torch.ones(256 << 18)
    script = "import torch; from tiphys.pretrain.distributed.spans import peak_memory; print(peak_memory(torch.device('cpu')))"
    child = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert 2**26 < child < peak_memory(torch.device("cpu")) - 2**27
    assert block[-1] == 1


def test_a_rate_is_measured_at_least_once() -> None:
    assert matrix_rate(torch.device("cpu"), torch.float32, size=8, seconds=0.0) > 0
