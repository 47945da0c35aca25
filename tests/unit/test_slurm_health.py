"""What ``slurm/health.py`` finds wrong with a node."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "health.py"
specification = importlib.util.spec_from_file_location("health", SCRIPT)
health = importlib.util.module_from_spec(specification)
specification.loader.exec_module(health)


@pytest.fixture
def checked(monkeypatch, capsys):
    """Exit status and output of the script on a machine without GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def run(folder: Path, gpus: int = 0, memory: float = 0) -> tuple[object, str]:
        words = ["--folder", str(folder), "--gpus", str(gpus), "--free-gpu-memory", "90"]
        monkeypatch.setattr("sys.argv", ["health.py", *words, "--free-memory", str(memory)])
        with pytest.raises(SystemExit) as ended:
            health.main()
        return ended.value.code, capsys.readouterr().out

    return run


def test_a_healthy_node_says_so_and_leaves_nothing_behind(checked, tmp_path):
    assert checked(tmp_path) == (0, "healthy\n")
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_wrong_is_said_in_one_line(checked, tmp_path):
    status, text = checked(tmp_path / "gone", gpus=2, memory=101)
    assert status == 1
    (line,) = text.splitlines()
    disk, memory, devices = line.removeprefix("unhealthy: ").split("; ")
    assert disk == f"{tmp_path}/gone can't be written: No such file or directory"
    assert memory.startswith("only ") and memory.endswith(" GiB of memory are free, not 101 %")
    assert devices == "0 of 2 GPUs are visible"


@pytest.mark.parametrize(("percent", "bad"), [(25, False), (26, True)])
def test_free_memory_by_hand(tmp_path, percent, bad):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 8388608 kB\nMemFree: 5 kB\nMemAvailable: 2097152 kB\nNone\n")
    found = list(health.memory_problems(file, percent))
    assert found == ([f"only 2 of 8 GiB of memory are free, not {percent} %"] if bad else [])
    assert list(health.memory_problems(tmp_path / "none", percent)) == []


def test_a_disk_that_forgets_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"")
    (found,) = health.disk_problems(tmp_path)
    assert found == f"{tmp_path} gives back something else than was written"


def test_a_full_disk_is_found(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert list(health.disk_problems(tmp_path)) == [
        f"{tmp_path} can't be written: No space left on device"
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_product_is_found():
    def one_off(a, b):
        product = a @ b
        product[3, 5] += 1
        return product

    assert list(health.product_problems("cpu")) == []
    (found,) = health.product_problems("cpu", multiply=one_off)
    assert found == "CPU multiplies matrices wrongly"


def test_the_product_is_exact_in_the_narrow_formats_of_matrix_units():
    """bf16 has 8 bits of mantissa, TF32 11; sums are kept in fp32, which has 24."""
    matrix = torch.arange(256 * 256).reshape(256, 256) % 7
    assert torch.equal(matrix.to(torch.bfloat16).long(), matrix)
    assert int((matrix @ matrix.T).max()) < 2**24


def test_gpus_are_each_measured_and_tried(monkeypatch):
    """GPU 1 is lost, GPU 2 is nearly full; all compute on the CPU here."""

    def memory(index):
        if index == 1:
            raise RuntimeError("CUDA error: device lost\nand much more")
        return (2**30 if index == 2 else 80 * 2**30, 80 * 2**30)

    cuda = SimpleNamespace(device_count=lambda: 3, mem_get_info=memory)
    monkeypatch.setattr(torch, "cuda", cuda)
    tried = []
    monkeypatch.setattr(health, "product_problems", lambda device, name: tried.append(device) or [])
    assert list(health.device_problems(4, 90)) == [
        "3 of 4 GPUs are visible",
        "GPU 1: CUDA error: device lost",
        "only 1 of 80 GiB of GPU 2's memory are free, not 90 %",
    ]
    assert tried == ["cuda:0", "cuda:2"]
