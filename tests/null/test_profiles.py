"""Device profiles: numbers with sources, files with every problem listed, and this machine as Linux describes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lensc.backends.errors import InputError, UsageError
from lensc.profiles import probe, profile

VALID = """
name = "toy"
title = "Toy"
[[processors]]
kind = "npu"
arch = "toy-v1"
dtypes = ["int8"]
bandwidth_gb_s = { value = 46, source = "measured", reference = "by hand" }
peak_tops.int8 = { value = 2.5, source = "datasheet", reference = "page 1" }
"""


def write(folder: Path, text: str, name: str = "toy.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_profile_is_read(tmp_path: Path) -> None:
    toy = profile.load_profile(write(tmp_path, VALID))
    assert toy == profile.DeviceProfile(
        "toy",
        "Toy",
        (
            profile.Processor(
                kind="npu",
                arch="toy-v1",
                dtypes=("int8",),
                bandwidth_gb_s=profile.Figure(46.0, "measured", "by hand"),
                peak_tops={"int8": profile.Figure(2.5, "datasheet", "page 1")},
            ),
        ),
    )


@pytest.mark.parametrize("name", profile.names())
def test_shipped_profile_is_valid(name: str) -> None:
    assert profile.get(name).name == name


def test_unknown_profile_is_refused() -> None:
    with pytest.raises(UsageError, match=r"device profile '\.\./x' is not known; expected one of .*zen5-2core"):
        profile.get("../x")
    with pytest.raises(UsageError, match="'SM8651' is not known; expected one of sm8650, "):
        profile.get("SM8651")


@pytest.mark.parametrize(
    ("name", "soc_model", "htp_arch"),
    [
        *(("sm8650", 57, 75), ("sm8750", 69, 79), ("sm8850", 87, 81), ("sm8550", 43, 73)),
        *(("sc8380xp", 60, 73), ("qcs6490", 35, 68), ("sa8295", 39, 68)),
    ],
)
def test_hexagon_has_the_numbers_its_compiler_is_told(name: str, soc_model: int, htp_arch: int) -> None:
    (npu,) = (processor for processor in profile.get(name).processors if processor.kind == "npu")
    assert (npu.soc_model, npu.htp_arch, npu.arch) == (soc_model, htp_arch, f"hexagon-v{htp_arch}")
    assert npu.vtcm_mb is not None


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("npu", ("core-ultra-1", "core-ultra-2", "core-ultra-3")),
        ("gpu", ("jetson-orin", "jetson-thor", "h100", "h200", "rtx4090", "rtx5090")),
        ("cpu", ("x86-avx2", "x86-avx512", "arm-neon", "apple-m1", "apple-m2", "apple-m3", "apple-m4")),
    ],
)
def test_device_families_are_there(kind: str, names: tuple[str, ...]) -> None:
    for name in names:
        assert kind in {processor.kind for processor in profile.get(name).processors}


@pytest.mark.parametrize("name", ["x86-avx2", "x86-avx512", "arm-neon"])
def test_a_kind_of_processor_claims_no_number(name: str) -> None:
    (cpu,) = profile.get(name).processors
    assert (cpu.memory_bytes, cpu.bandwidth_gb_s, cpu.peak_tops) == (None, None, {})


def test_chips_are_told_apart() -> None:
    models = [p.soc_model for name in profile.names() for p in profile.get(name).processors if p.soc_model]
    assert len(models) == len(set(models)) >= 7


def test_phones_say_how_much_memory_they_may_have() -> None:
    phones = [profile.get(name) for name in profile.names() if profile.get(name).form == "phone"]
    assert {phone.name for phone in phones} == {"sm8550", "sm8650", "sm8750", "sm8850"}
    assert all((phone.memory_bytes or 0) >= 16 << 30 for phone in phones)
    assert profile.get("qcs6490").memory_bytes is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "npu"', 'kind = "tpu"', 'processors[0].kind: "tpu" is not one of cpu, gpu, npu'),
        ('source = "measured"', 'source = "heard"', '"heard" is not one of datasheet, measured, estimated'),
        ('reference = "by hand"', 'reference = " "', "processors[0].bandwidth_gb_s: the reference is empty"),
        (', reference = "by hand"', "", "processors[0].bandwidth_gb_s.reference: missing"),
        ("value = 46", "value = 0", "processors[0].bandwidth_gb_s: 0.0, expected a positive number"),
        ("value = 46", "value = nan", "processors[0].bandwidth_gb_s.value: the number does not fit"),
        ("value = 46", "value = inf", "processors[0].bandwidth_gb_s.value: the number does not fit"),
        ("value = 46", "value = 2026-01-01", 'bandwidth_gb_s.value: expected a number, got "2026-01-01"'),
        ("peak_tops.int8", "peak_tops.int4", "processors[0].peak_tops.int4: not one of its dtypes"),
        ("peak_tops.int8", "achieved_tops.int4", "processors[0].achieved_tops.int4: not one of its dtypes"),
        (
            '"int8"]',
            '"int8"]\nachieved_tops.int8 = { value = 3, source = "measured", reference = "x" }',
            "more than its peak",
        ),
        (
            '"int8"]',
            '"int8"]\nachieved_gb_s = { value = 47, source = "measured", reference = "x" }',
            "47.0, more than its",
        ),
        (
            '"toy-v1"',
            '"hexagon-v75"\nhtp_arch = 73\nsoc_model = 57',
            "htp_arch: 73, which is not what arch 'hexagon-v75'",
        ),
        ('"toy-v1"', '"hexagon-v75"\nhtp_arch = 75', "processors[0].htp_arch: given without soc_model"),
        ('"toy-v1"', '"hexagon-v75"\nsoc_model = 57', "processors[0].soc_model: given without htp_arch"),
        ('"toy-v1"', '"hexagon-v75"\nhtp_arch = 75\nsoc_model = 0', "soc_model: 0, expected at least 1"),
        ('"toy-v1"', '"hexagon-v75"\nhtp_arch = 75.0\nsoc_model = 57', "htp_arch: expected an integer"),
        ('title = "Toy"', 'title = "Toy"\nform = "boat"', 'form: "boat" is not one of phone, laptop'),
        ('title = "Toy"', 'colour = "red"', "colour: unknown key; title: missing"),
        ('name = "toy"', 'name = "other"', "name: 'other' differs from the file's"),
        ("[[processors]]", "[[processors", "not TOML: "),
    ],
)
def test_wrong_profile_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in VALID
    with pytest.raises(InputError) as caught:
        profile.load_profile(write(tmp_path, VALID.replace(old, new)))
    assert message in str(caught.value)
    assert "toy.toml: " in str(caught.value)


def test_profile_without_processors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="processors: empty, expected at least one"):
        profile.load_profile(write(tmp_path, 'name = "toy"\ntitle = "Toy"\nprocessors = []'))


def test_missing_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"toy\.toml: cannot be read: No such file"):
        profile.load_profile(tmp_path / "toy.toml")


# The machine at hand

X86 = """processor\t: 0
model name\t: Toy CPU @ 3.00GHz
flags\t\t: fpu avx2 fma avx512_bf16 made_up
processor\t: 1
model name\t: Toy CPU @ 3.00GHz
flags\t\t: fpu avx2 fma avx512_bf16 made_up
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp i8mm bf16\nCPU part\t: 0xd4f\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def siblings(*cores: str) -> dict[str, str]:
    """Hardware thread i belongs to the core whose threads are `cores[i]`."""
    return {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": core for i, core in enumerate(cores)}


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_allowed_cpus", lambda: [0, 1, 2, 3])


@pytest.mark.usefixtures("four_threads")
def test_machine_of_two_cores_with_two_threads_each(tmp_path: Path) -> None:
    files = {"proc/cpuinfo": X86, "proc/meminfo": "MemTotal:  1048576 kB\nMemFree: 1 kB\n"}
    found = probe.machine(tree(tmp_path, files | siblings("0-1", "0-1", "2-3", "2-3")))
    assert found.cpu == "Toy CPU @ 3.00GHz"
    assert found.isa == ("fma", "avx2", "avx512_bf16")
    assert (found.cores, found.threads) == (2, 4)
    assert found.memory_bytes == 1 << 30
    assert "2 cores, 4 threads, 1.0 GiB" in str(found)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("rating", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
def test_cores_are_listed_by_their_speed_one_thread_of_each(rating: str, tmp_path: Path) -> None:
    rated = {f"sys/devices/system/cpu/cpu{cpu}/{rating}": speed for cpu, speed in ((0, "400"), (1, "400"), (2, "1024"))}
    root = tree(tmp_path, rated | siblings("0", "1", "2-3", "2-3"))
    assert list(probe.core_speeds(root).items()) == [(2, 1024), (0, 400), (1, 400)]
    assert probe.core_speeds(tmp_path / "nowhere") == {0: 0, 1: 0, 2: 0, 3: 0}


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(
    ("files", "threads", "memory"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2, 1 << 30),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"}, 4, 1 << 30),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000"}, 1, 1 << 30),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3, 1 << 30),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "1000000"}, 4, 1000000),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max"}, 4, 1 << 30),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n1:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "2000000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            2,
            2000000,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
            1 << 30,
        ),
        ({"proc/self/cgroup": "damaged"}, 4, 1 << 30),
    ],
)
def test_limits_of_a_container(files: dict[str, str], threads: int, memory: int, tmp_path: Path) -> None:
    found = probe.machine(tree(tmp_path, files | {"proc/meminfo": "MemTotal: 1048576 kB\n"}))
    assert (found.threads, found.memory_bytes) == (threads, memory)
    assert found.cores == threads


def test_arm(tmp_path: Path) -> None:
    files = {"proc/cpuinfo": ARM, "proc/device-tree/model": "Toy Board 5\0"}
    found = probe.machine(tree(tmp_path, files))
    assert found.cpu == "Toy Board 5"
    assert found.isa == ("asimd", "asimdhp", "asimddp", "i8mm", "bf16")
    (cpu,) = probe.device_profile(found).processors
    assert cpu.dtypes == ("bfloat16", "float16", "float32", "int8")


def test_machine_without_proc(tmp_path: Path) -> None:
    found = probe.machine(tmp_path)
    assert found.cpu
    assert found.isa == ()
    assert 1 <= found.cores <= found.threads
    assert probe.device_profile(found).processors[0].kind == "cpu"


def test_this_machine() -> None:
    found = probe.machine()
    (cpu,) = probe.device_profile(found).processors
    assert cpu.cores is not None
    assert cpu.cores.value == found.cores >= 1
    assert cpu.features == found.isa
