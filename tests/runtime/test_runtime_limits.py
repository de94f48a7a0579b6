"""Cores and memory as containers limit them: files as Linux has them, and a real control group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blocksparse.runtime import limits
from blocksparse.runtime.limits import memory_limit, usable_cores

VERSION_1 = Path("/sys/fs/cgroup/cpu")


def lay_out(root: Path, groups: str, **files: str) -> None:
    """Write /proc/self/cgroup and files of control groups; __ in a name stands for a slash."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_max", ".max")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_version_2_and_the_groups_around(tmp_path):
    lay_out(
        tmp_path,
        "0::/user/job\n",
        user__job__cpu_max="max 100000\n",
        user__cpu_max="250000 100000\n",
        user__job__memory_max="1073741824\n",
        user__memory_max="max\n",
    )
    assert list(limits._quotas(tmp_path)) == [2.5]
    assert list(limits._memory_limits(tmp_path)) == [2**30]


def test_version_1_where_the_group_is_named_as_from_outside(tmp_path):
    lay_out(tmp_path, "5:cpu,cpuacct:/docker/ab12\n4:memory:/docker/ab12\n3:cpuset:/\n0::/\n")
    cpu, memory = (tmp_path / "sys/fs/cgroup" / name for name in ("cpu,cpuacct", "memory"))
    cpu.mkdir(parents=True)
    memory.mkdir()
    (cpu / "cpu.cfs_quota_us").write_text("150000\n")
    (cpu / "cpu.cfs_period_us").write_text("100000\n")
    (memory / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert list(limits._quotas(tmp_path)) == [1.5]
    assert list(limits._memory_limits(tmp_path)) == [9223372036854771712]
    (cpu / "cpu.cfs_quota_us").write_text("-1\n")
    assert list(limits._quotas(tmp_path)) == []


def test_version_1_where_the_folder_names_its_controllers_in_another_order(tmp_path):
    lay_out(tmp_path, "5:cpuacct,cpu:/job\n")
    job = tmp_path / "sys/fs/cgroup/cpu,cpuacct/job"
    job.mkdir(parents=True)
    (job / "cpu.cfs_quota_us").write_text("150000\n")
    (job / "cpu.cfs_period_us").write_text("100000\n")
    for name in ("cpu", "cpuacct"):
        (tmp_path / "sys/fs/cgroup" / name).symlink_to("cpu,cpuacct")
    assert set(limits._quotas(tmp_path)) == {1.5}


def test_no_control_groups(tmp_path):
    assert list(limits._quotas(tmp_path)) == list(limits._memory_limits(tmp_path)) == []


@pytest.mark.parametrize(("quotas", "cores"), [([], 8), ([2.5, 4.0], 2), ([0.3], 1), ([99.0], 8)])
def test_cores_are_what_affinity_and_quota_leave(monkeypatch, quotas, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(limits, "_quotas", lambda root: iter(quotas))
    assert usable_cores() == cores


def test_memory_is_a_machine_sized_figure(monkeypatch):
    assert 2**27 < memory_limit() < 2**50
    monkeypatch.setattr(limits, "_memory_limits", lambda root: iter([2**62, 2**28]))
    assert memory_limit() == 2**28


@pytest.mark.skipif(usable_cores() < 2, reason="one core has nothing to lose")
def test_a_real_quota():
    group = VERSION_1 / f"blocksparse-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("may not make control groups of version 1 here")
    try:
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text("150000")
        code = (
            f"import os; open({str(group / 'tasks')!r}, 'w').write(str(os.getpid()))\n"
            "from blocksparse.runtime.limits import usable_cores; print(usable_cores())"
        )
        shown = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
        )
    finally:
        group.rmdir()
    assert shown.stdout.split() == ["1"]
