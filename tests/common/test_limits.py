"""What a cgroup leaves to a process, on files as containers and batch systems have them."""

import os
from types import SimpleNamespace

import psutil
import pytest
import torch

import common.limits
import common.model.memory
import sim.checks.doctor
import sim.checks.plan
import sim.flower.worker_count
from common.config import Config
from common.limits import (
    Limits,
    available_cpus,
    available_memory_bytes,
    cgroup_limits,
    default_threads,
    total_memory_bytes,
)

GIB = 2**30
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
NO_LIMIT_V1 = "9223372036854771712\n"


@pytest.fixture
def machine(tmp_path):
    """Build a root folder: ``machine(mountinfo, cgroup, {file: content})``."""

    def build(mountinfo, cgroup, files):
        contents = {"proc/self/mountinfo": mountinfo, "proc/self/cgroup": cgroup}
        contents |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
        for name, text in contents.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return build


def test_a_container_of_version_2_sees_its_limits_at_the_mount(machine):
    root = machine(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n" + V2_MOUNT,
        "0::/\n",
        {
            "cpu.max": "250000 100000\n",
            "memory.max": f"{4 * GIB}\n",
            "memory.current": f"{3 * GIB}\n",
            "memory.stat": f"anon {GIB}\ninactive_file {GIB}\nactive_file 7\n",
        },
    )
    expected = Limits(cpus=2.5, memory_bytes=4 * GIB, free_bytes=2 * GIB)
    assert cgroup_limits(root) == expected


def test_slurm_on_version_2_limits_a_group_above_the_process(machine):
    """SLURM: the job's folder has the memory, the step's the CPUs, the task's own says max."""
    job = "system.slice/slurmstepd.scope/job_7"
    root = machine(
        V2_MOUNT,
        f"0::/{job}/step_0/user/task_0\n",
        {
            f"{job}/memory.max": f"{8 * GIB}\n",
            f"{job}/memory.current": f"{GIB}\n",
            f"{job}/step_0/cpu.max": "400000 100000\n",
            f"{job}/step_0/user/task_0/cpu.max": "max 100000\n",
            f"{job}/step_0/user/task_0/memory.max": "max\n",
            "system.slice/memory.max": "max\n",
        },
    )
    assert cgroup_limits(root) == Limits(cpus=4.0, memory_bytes=8 * GIB, free_bytes=7 * GIB)


def test_the_tightest_of_nested_limits_counts_for_each_resource(machine):
    """What is free can be least in a group whose limit is not the lowest."""
    root = machine(
        V2_MOUNT,
        "0::/pod/container\n",
        {
            "pod/cpu.max": "100000 100000\n",
            "pod/container/cpu.max": "600000 100000\n",
            "pod/memory.max": f"{6 * GIB}\n",
            "pod/memory.current": f"{5 * GIB}\n",
            "pod/container/memory.max": f"{4 * GIB}\n",
            "pod/container/memory.current": f"{GIB}\n",
        },
    )
    assert cgroup_limits(root) == Limits(cpus=1.0, memory_bytes=4 * GIB, free_bytes=GIB)


def test_version_1_with_a_mount_per_controller(machine):
    root = machine(
        "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        "5:memory:/slurm/uid_1/job_2\n3:cpu,cpuacct:/slurm/uid_1/job_2\n0::/init\n",
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/slurm/uid_1/job_2/cpu.cfs_quota_us": "300000\n",
            "cpu,cpuacct/slurm/uid_1/job_2/cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": NO_LIMIT_V1,
            "memory/slurm/uid_1/memory.limit_in_bytes": f"{2 * GIB}\n",
            "memory/slurm/uid_1/memory.usage_in_bytes": f"{GIB}\n",
            "memory/slurm/uid_1/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB // 2}\n",
            "memory/slurm/uid_1/job_2/memory.limit_in_bytes": NO_LIMIT_V1,
        },
    )
    expected = Limits(cpus=3.0, memory_bytes=2 * GIB, free_bytes=GIB + GIB // 2)
    assert cgroup_limits(root) == expected


def test_a_container_of_version_1_whose_path_is_the_hosts(machine):
    """Docker mounts the container's own group; /proc names it as the host does."""
    own = "/docker/0a1b"
    root = machine(
        f"32 31 0:29 {own} /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n"
        f"35 31 0:32 {own} /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
        f"5:memory:{own}\n3:cpu:{own}\n",
        {
            "cpu/cpu.cfs_quota_us": "50000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": f"{GIB}\n",
            "memory/memory.usage_in_bytes": f"{2 * GIB}\n",
        },
    )
    assert cgroup_limits(root) == Limits(cpus=0.5, memory_bytes=GIB, free_bytes=0)
    assert available_cpus(root) == 1


@pytest.mark.parametrize(
    ("mountinfo", "cgroup", "files"),
    [
        ("", "", {}),
        ("torn\n31 23 - cgroup2\n", "0::/\nnonsense\n", {"cpu.max": "100000 100000"}),
        (V2_MOUNT, "0::/\n", {"cpu.max": "", "memory.max": "much\n"}),
        (V2_MOUNT, "0::/\n", {"cpu.max": "100000 0\n"}),
        (
            "35 31 0:32 / /sys/fs/cgroup rw - cgroup cgroup rw,memory\n",
            "4:memory:/\n",
            {"memory.limit_in_bytes": NO_LIMIT_V1, "memory.usage_in_bytes": "7\n"},
        ),
        (V2_MOUNT, "0::/../../elsewhere\n", {}),
    ],
)
def test_what_is_absent_or_unknown_limits_nothing(machine, mountinfo, cgroup, files):
    root = machine(mountinfo, cgroup, files)
    assert cgroup_limits(root) == Limits()
    assert available_cpus(root) == len(os.sched_getaffinity(0))
    assert total_memory_bytes(root) == psutil.virtual_memory().total


def test_cpus_follow_affinity_and_quota_whichever_is_less(machine, monkeypatch):
    root = machine(V2_MOUNT, "0::/\n", {"cpu.max": "350000 100000\n"})
    for cores, expected in ((64, 3), (2, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        assert available_cpus(root) == expected


@pytest.mark.parametrize(
    ("asked", "expected"), [(None, 4), ("1", 1), ("3,1", 3), ("64", 4), ("0", 4), ("many", 4)]
)
def test_threads_follow_openmp_s_variable_within_the_cpus(asked, expected, machine, monkeypatch):
    root = machine("", "", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert default_threads(root) == expected


def test_memory_follows_machine_and_limit_whichever_is_less(machine, monkeypatch):
    root = machine(V2_MOUNT, "0::/\n", {"memory.max": f"{4 * GIB}\n", "memory.current": f"{GIB}\n"})
    for machine_gib, available, total in ((64, 3, 4), (2, 2, 2)):
        facts = SimpleNamespace(available=machine_gib * GIB, total=machine_gib * GIB)
        monkeypatch.setattr(psutil, "virtual_memory", lambda facts=facts: facts)
        assert available_memory_bytes(root) == available * GIB
        assert total_memory_bytes(root) == total * GIB


def test_workers_threads_and_activations_follow_the_limit(monkeypatch):
    """Everything that sizes itself asks here: a limit of 3 CPUs and 5 GiB of a large machine."""
    from common.model.adapter.layout import adapter_spec
    from common.model.backbone.known_shapes import shape_of
    from common.model.session import open_session
    from sim.runs.federate import threads_per_worker
    from sim.runs.single import one_node

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    big = SimpleNamespace(available=512 * GIB, total=512 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: big)
    limits = Limits(cpus=3.0, memory_bytes=5 * GIB, free_bytes=4 * GIB)
    monkeypatch.setattr(common.limits, "cgroup_limits", lambda root=None: limits)
    config = Config()
    assert threads_per_worker(config) == 1
    assert one_node(config).train.threads == 3
    chosen = sim.flower.worker_count.choose_workers(config, shape_of("embedded"), steps=120)
    assert chosen.value < 3
    assert "3 CPUs" in chosen.reason
    assert "4.3 GB" in chosen.reason
    assert common.model.memory._free_bytes(torch.device("cpu")) == 4 * GIB
    assert sim.checks.plan._card(None, "cpu").value == 5 * GIB
    assert sim.checks.doctor._memory().found.startswith("4.0 GiB")
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    from common.model.backbone.load import resolve_backbone

    open_session(resolve_backbone("tiny"), adapter_spec(config.adapter), device="cpu", dtype="fp32")
    assert asked == [3]
