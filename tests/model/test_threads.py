"""The number of threads is the configured one, clipped to the affinity mask and every CPU quota above the process."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from mixtral_serve.model.threads import DEFAULT_NUM_THREADS, ThreadPlan, apply_threads, plan_threads


@pytest.fixture
def cgroups(tmp_path: Path):
    """Build a fake cgroup tree from {file: text} and plan on it."""

    def plan(own: str, files: dict[str, str], *, requested: int = 8, affinity: int = 64) -> ThreadPlan:
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "self").write_text(own)
        return plan_threads(
            requested,
            num_affinity_cpus=affinity,
            proc_cgroup=tmp_path / "self",
            cgroup_root=tmp_path / "cgroup",
        )

    return plan


def test_without_limits_the_configured_number_stands(cgroups) -> None:
    plan = cgroups("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"})
    assert (plan.num_threads, plan.quota_cpus) == (8, None)


def test_the_affinity_mask_clips(cgroups) -> None:
    assert cgroups("", {}, affinity=2).num_threads == 2


def test_row50_the_lowest_quota_of_all_ancestors_counts(cgroups) -> None:
    files = {"a/b/c/cpu.max": "max 100000", "a/b/cpu.max": "600000 100000", "a/cpu.max": "300000 100000"}
    plan = cgroups("0::/a/b/c\n", files)
    assert (plan.num_threads, plan.quota_cpus) == (3, 3.0)


def test_row50_a_quota_on_the_mount_point_counts_when_the_path_is_the_hosts(cgroups) -> None:
    assert cgroups("0::/system.slice/docker-1234.scope\n", {"cpu.max": "200000 100000"}).num_threads == 2


@pytest.mark.parametrize(("quota", "num_threads"), [("50000 100000", 1), ("150000 100000", 1), ("290000 100000", 2)])
def test_a_fraction_of_a_cpu_is_rounded_down_but_never_to_none(cgroups, quota, num_threads) -> None:
    assert cgroups("0::/\n", {"cpu.max": quota}).num_threads == num_threads


def test_version_1_quotas_are_read(cgroups) -> None:
    files = {
        "cpu,cpuacct/docker/x/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/docker/cpu.cfs_quota_us": "400000\n",
        "cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n",
    }
    own = "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/\n"
    assert cgroups(own, files).num_threads == 4


@pytest.mark.parametrize("text", ["", "max", "garbage 1", "100000 0", "-5 100000", "1 2 3"])
def test_a_quota_that_makes_no_sense_limits_nothing(cgroups, text) -> None:
    assert cgroups("0::/\n", {"cpu.max": text}).num_threads == 8


def test_a_path_with_dots_stays_below_the_mount_point(cgroups, tmp_path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000")
    assert cgroups("0::/../../x\n", {}).num_threads == 8


def test_a_machine_without_cgroups_is_limited_by_affinity_alone(tmp_path) -> None:
    plan = plan_threads(1000, proc_cgroup=tmp_path / "none", cgroup_root=tmp_path / "none")
    assert plan.num_threads == len(os.sched_getaffinity(0))


def test_eight_is_the_default(tmp_path) -> None:
    assert plan_threads(num_affinity_cpus=64, proc_cgroup=tmp_path / "x").requested == DEFAULT_NUM_THREADS == 8


def test_applying_a_plan_sets_torch_and_says_so(caplog) -> None:
    plan = ThreadPlan(num_threads=1, requested=8, num_affinity_cpus=4, quota_cpus=1.5)
    with caplog.at_level(logging.INFO):
        apply_threads(plan)
    assert torch.get_num_threads() == 1
    assert caplog.records[-1].message == (
        "computing with 1 thread (clipped): 8 configured, 4 CPUs in the affinity mask, a CPU quota of 1.5"
    )
    assert "no CPU quota" in str(ThreadPlan(8, 8, 8, None))
