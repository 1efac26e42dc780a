"""Limits of control groups, in made-up trees of /proc and /sys."""

import os

import pytest

from vimpac.processes.limits import cores_allowed, memory_left, share_of_cores

GIB = 1 << 30
V1 = "32 31 0:29 {root} /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{name}\n"
V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def tree(folder, own: str, mounts: str, **files: str):
    """A root with /proc/self/cgroup, mountinfo and files, __ for / in their names below /sys/fs/cgroup."""
    texts = {"proc/self/cgroup": own, "proc/self/mountinfo": "23 1 8:1 / / rw - ext4 /dev/sda rw\n" + mounts}
    for name, text in {**texts, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def memory(group: str, limit: object, usage: int, cached: int = 0) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\n"
    return {f"{group}memory.max": f"{limit}\n", f"{group}memory.current": f"{usage}\n", f"{group}memory.stat": stat}


@pytest.mark.parametrize(
    "files, left",
    [
        (memory("a/b/", 4 * GIB, GIB), 3 * GIB),
        (memory("a/b/", "max", GIB) | memory("a/", 2 * GIB, GIB), GIB),  # the group above is the strict one
        (memory("a/b/", 3 * GIB, GIB) | memory("a/", 9 * GIB, GIB), 2 * GIB),
        (memory("a/b/", 4 * GIB, 4 * GIB, cached=GIB), GIB),  # pages of files make room
        (memory("a/b/", GIB, 2 * GIB), 0),
        (memory("a/b/", "max", GIB), None),
        ({"a/b/memory.max": f"{3 * GIB}", "a/b/memory.current": f"{GIB}"}, 2 * GIB),  # without statistics
        ({"a/b/memory.max": "junk"}, None),
        ({}, None),
    ],
)
def test_memory_of_version_2(tmp_path, files, left):
    assert memory_left(tree(tmp_path, "0::/a/b\n", V2.format(root="/"), **files)) == left


def old_memory(group: str, limit: int, usage: int) -> dict[str, str]:
    stat = "inactive_file 7\ntotal_inactive_file 30\ntotal_active_file 12\n"
    return {
        f"memory/{group}memory.limit_in_bytes": f"{limit}\n",
        f"memory/{group}memory.usage_in_bytes": f"{usage}\n",
        f"memory/{group}memory.stat": stat,
    }


@pytest.mark.parametrize(
    "shown, own, group",
    [
        ("/", "/docker/abc", "docker/abc/"),  # the host's whole tree
        ("/docker/abc", "/docker/abc", ""),  # a container sees its own group at the top
        ("/", "/", ""),
        ("/elsewhere", "/docker/abc", ""),  # the name is of another name space
    ],
)
def test_memory_of_version_1(tmp_path, shown, own, group):
    mounts = V1.format(root="/", name="cpu") + V1.format(root=shown, name="memory")
    files = old_memory(group, 3 * GIB, GIB) | (old_memory("", 1 << 62, 2 * GIB) if group else {})
    assert memory_left(tree(tmp_path, f"4:memory:{own}\n1:cpu,cpuacct:/\n0::/\n", mounts, **files)) == 2 * GIB + 42


def test_a_limit_above_a_group_of_version_1(tmp_path):
    files = old_memory("docker/abc/", 1 << 62, GIB) | old_memory("docker/", 3 * GIB, GIB)
    root = tree(tmp_path, "4:memory:/docker/abc\n", V1.format(root="/", name="memory"), **files)
    assert memory_left(root) == 2 * GIB + 42


@pytest.mark.parametrize(
    "texts, allowed",
    [
        ({"a/b/cpu.max": "30000 100000\n"}, 0.3),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "250000 100000\n"}, 2.5),
        ({"a/b/cpu.max": "max 100000\n"}, None),
        ({}, None),
    ],
)
def test_cores_of_version_2(tmp_path, texts, allowed):
    assert cores_allowed(tree(tmp_path, "0::/a/b\n", V2.format(root="/"), **texts)) == allowed


@pytest.mark.parametrize("quota, allowed", [("30000", 0.3), ("-1", None)])
def test_cores_of_version_1(tmp_path, quota, allowed):
    files = {"cpu/x/cpu.cfs_quota_us": f"{quota}\n", "cpu/x/cpu.cfs_period_us": "100000\n"}
    assert cores_allowed(tree(tmp_path, "1:cpu,cpuacct:/x\n0::/\n", V1.format(root="/", name="cpu"), **files)) == allowed


def test_a_system_without_groups(tmp_path):
    assert memory_left(tmp_path) is None and cores_allowed(tmp_path) is None
    assert memory_left() is None or memory_left() >= 0


@pytest.mark.parametrize(
    "allowed, processes, cores", [(0.3, 1, 1), (0.3, 2, 1), (1.5, 1, 2), (4.0, 2, 2), (99.0, 1, 8), (None, 1, 8), (None, 3, 2)]
)
def test_a_share_of_cores(monkeypatch, allowed, processes, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr("vimpac.processes.limits.cores_allowed", lambda: allowed)
    assert share_of_cores(processes) == cores
