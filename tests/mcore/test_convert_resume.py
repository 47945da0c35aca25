"""Conversions that are interrupted and started again."""

from __future__ import annotations

import json

import pytest

from megatron_occ.convert.checkpoints import export_checkpoint
from megatron_occ.convert.distributed import DistributedReader
from megatron_occ.convert.importing import import_folder
from megatron_occ.convert.plan import MTPChoice
from megatron_occ.convert.source import Source
from tests.mcore.convert_folders import make_folder

KEEP = MTPChoice("keep")
SMALL = 12_000


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stop_after(monkeypatch, owner, count):
    """The ``count``-th tensor that is read is the last; returns the list of those."""
    original, read = owner.tensor, []

    def tensor(self, what):
        if len(read) == count:
            raise KeyboardInterrupt
        read.append(what)
        return original(self, what)

    monkeypatch.setattr(owner, "tensor", tensor)
    return read


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "hf", "glm", 1, shards=2)


@pytest.mark.parametrize("count", [10, 60, 100])
def test_an_import_goes_on_and_ends_with_the_same_bytes(folder, tmp_path, monkeypatch, count):
    whole = import_folder(folder, tmp_path / "whole", mtp=KEEP, part=SMALL)
    with monkeypatch.context() as patched:
        stop_after(patched, Source, count)
        with pytest.raises(KeyboardInterrupt):
            import_folder(folder, tmp_path / "cut", mtp=KEEP, part=SMALL)
    assert not (tmp_path / "cut").exists()
    again = import_folder(folder, tmp_path / "cut", mtp=KEEP, part=SMALL)
    assert again.parts == whole.parts == whole.written
    assert count < 60 or again.written < whole.written
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert not (tmp_path / "cut.partial").exists()


def test_another_conversion_starts_over(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, Source, 100)
        with pytest.raises(KeyboardInterrupt):
            import_folder(folder, tmp_path / "cut", mtp=KEEP, part=SMALL)
    choice = MTPChoice("expand", 2)
    other = import_folder(folder, tmp_path / "cut", mtp=choice, part=SMALL)
    assert other.written == other.parts
    assert json.loads((tmp_path / "cut" / "meta.json").read_text())["mtp_layers"] == 2


def test_an_export_goes_on_with_the_next_shard(folder, tmp_path, monkeypatch):
    import_folder(folder, tmp_path / "mcore", mtp=KEEP)
    export_checkpoint(tmp_path / "mcore", tmp_path / "whole", shard=SMALL)
    with monkeypatch.context() as patched:
        first = stop_after(patched, DistributedReader, 30)
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(tmp_path / "mcore", tmp_path / "cut", shard=SMALL)
    with monkeypatch.context() as patched:
        second = stop_after(patched, DistributedReader, 10_000)
        export_checkpoint(tmp_path / "mcore", tmp_path / "cut", shard=SMALL)
    assert len(first) == 30
    assert len(second) < 70
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
