"""The load of this machine, against what the kernel says elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from virgo.kernel import load


def test_measured_figures_are_those_of_the_machine(tmp_path: Path) -> None:
    """Processors, memory, disk and run queue agree with independent readings."""
    measured = load.measure(tmp_path)
    assert measured.cpus == len(os.sched_getaffinity(0))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert measured.memory_total_bytes == pytest.approx(pages, rel=0.05)
    assert 0 < measured.memory_free_bytes <= measured.memory_total_bytes
    assert measured.disk_free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1, abs=2**30)
    assert measured.run_queue == pytest.approx(os.getloadavg()[0], abs=2)
    assert measured.outstanding == measured.pool_free_bytes == 0


def test_a_directory_that_is_not_made_yet_counts_as_its_disk(tmp_path: Path) -> None:
    """The free disk can be asked for before the node's directory exists."""
    here = load.measure(tmp_path).disk_free_bytes
    assert load.measure(tmp_path / "not" / "made" / "yet").disk_free_bytes == pytest.approx(here, abs=2**30)


@pytest.mark.parametrize(
    ("text", "percent"),
    [
        (
            "some avg10=12.34 avg60=1.00 avg300=0.50 total=99\nfull avg10=3.00 avg60=0 avg300=0 total=1\n",
            12.34,
        ),
        ("some avg10=100.00 avg60=1.00 avg300=0.50 total=99\n", 100.0),
        ("", 0.0),
        ("nonsense\n", 0.0),
        ("some avg10=x\n", 0.0),
    ],
)
def test_pressure_is_read_and_absence_is_zero(tmp_path: Path, text: str, percent: float) -> None:
    """`some avg10` is what counts; a kernel that offers nothing, or another form, gives 0."""
    (tmp_path / "io").write_text(text)
    assert load.pressure_percent("io", directory=tmp_path) == percent
    assert load.pressure_percent("cpu", directory=tmp_path) == 0.0


@pytest.mark.parametrize(
    ("now", "minute", "run_queue", "percent"),
    [
        (93.1, 90.0, 0.15, 5.2),  # three tasks in a group with a tenth of a processor, as measured
        (93.1, 42.8, 0.72, 52.2),  # half a minute after it began
        (80.0, 20.0, 2.0, 80.0),  # tasks wait for processors since a moment ago
        (80.0, 80.0, 4.0, 80.0),
        (0.0, 0.0, 0.0, 0.0),
        (50.0, 50.0, 0.0, 0.0),
    ],
)
def test_a_throttled_group_is_not_taken_for_a_busy_machine(
    now: float, minute: float, run_queue: float, percent: float
) -> None:
    """On two processors: tasks that wait for these are runnable, those that are throttled are not."""
    assert load.unthrottled_percent(now, minute, run_queue, 2) == pytest.approx(percent, abs=0.1)


def test_the_machine_is_told_by_boot_and_network(tmp_path: Path) -> None:
    """Two processes here share the machine's id; one in a network of its own does not."""
    code = [sys.executable, "-c", "from virgo.kernel import load; print(load.machine_id())"]
    ours = load.machine_id()
    assert subprocess.run(code, text=True, capture_output=True, check=True).stdout.strip() == ours
    apart = ["unshare", "--net", "--map-root-user", *code]
    done = subprocess.run(apart, text=True, capture_output=True)
    if done.returncode != 0:
        pytest.skip("no network namespaces here")
    assert done.stdout.strip() != ours
