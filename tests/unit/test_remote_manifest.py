"""The stream of weights and what servers are told of it."""

from __future__ import annotations

import json
import zlib
from itertools import pairwise

import pytest
import torch

from megatron_occ.rollout.engine import EngineError
from megatron_occ.rollout.remote import arrival
from megatron_occ.rollout.remote.manifest import ALIGNMENT, Piece, read_manifest
from megatron_occ.rollout.remote.store import Store

TENSORS = {
    "one": torch.randn(5, 7),
    "two": torch.randn(3, dtype=torch.float64),
    "nothing": torch.zeros(0, 4),
    "half": torch.randn(33).half(),
    "brain": torch.randn(2, 2, 3).bfloat16(),
    "byte": torch.randn(9).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(2.5),
}


def stored(bucket, tensors=TENSORS):
    pieces = [Piece(name, t.dtype, tuple(t.shape), name == "two") for name, t in tensors.items()]
    store = Store(pieces, bucket)
    for name, tensor in tensors.items():
        store.put(name, tensor)
    return store


@pytest.mark.parametrize("bucket", [1, 64, 100, 10**6])
def test_what_is_put_in_comes_out(bucket):
    store = stored(bucket)
    manifest = read_manifest(store.seal(3).to_json())
    assert manifest == store.seal(3) and manifest.identity != store.seal(4).identity
    stream = bytes(store.span(0, store.total))
    cut = [stream[i : i + bucket] for i in range(0, len(stream), bucket)]
    assert list(manifest.checksums) == [zlib.crc32(part) for part in cut]
    place = {"kind": "memory", "machine": arrival.this_machine(), "path": store.path}
    with arrival.opened(manifest, json.dumps(place)) as source:
        found = dict(arrival.tensors_of(manifest, source))
    store.close()
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())


def test_tensors_do_not_overlap_and_begin_where_any_dtype_may():
    manifest = stored(100).seal(1)
    for piece, after in pairwise(manifest.tensors):
        assert piece.end <= after.first < piece.end + ALIGNMENT
        assert after.first % ALIGNMENT == 0
    assert [manifest.buckets_of(p) for p in manifest.tensors[:2]] == [range(2), range(1, 3)]


def test_tensors_are_converted_to_what_was_announced():
    store = Store([Piece("a", torch.bfloat16, (2, 3))])
    store.put("a", torch.arange(6.0).view(3, 2).t())
    found = torch.frombuffer(bytearray(store.span(0, 12)), dtype=torch.bfloat16)
    assert found.tolist() == [0, 2, 4, 1, 3, 5]


def test_identity_depends_on_a_single_bit():
    bits = dict(TENSORS)
    bits["one"] = bits["one"].clone()
    bits["one"].view(torch.int32)[0, 0] ^= 1
    assert stored(64).seal(1).identity != stored(64, bits).seal(1).identity


def test_what_can_not_be_sent_is_told():
    with pytest.raises(EngineError, match="no weights"):
        Store([])
    with pytest.raises(EngineError, match=r"a: tensors of torch\.int32 are not sent"):
        Store([Piece("a", torch.int32, (2,))])
    with pytest.raises(EngineError, match="two tensors have one name"):
        Store([Piece("a", torch.float32, (2,)), Piece("a", torch.float32, (2,))])
    store = Store([Piece("a", torch.float32, (2,)), Piece("b", torch.float32, (2,))])
    store.put("b", torch.ones(2))
    with pytest.raises(EngineError, match="left out 1 tensors: a"):
        store.seal(1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "format 2 of weights"),
        ({"bucket": 0}, "checksums"),
        ({"checksums": [1]}, "1 checksums for"),
        ({"total": 64}, "checksums for 64"),
        ({"tensors": [["a", "float32", [2], 32, False]]}, "a lies at 32"),
        ({"tensors": [["a", "float32", [10**6], 0, False]]}, "a lies at 0 to 4000000"),
        ({"tensors": [["a", "float32", [-2, -3], 0, False]]}, "no tensor of"),
        ({"tensors": [["a", "object", [2], 0, False]]}, "no tensor of object"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(change, says):
    content = json.loads(stored(100).seal(1).to_json())
    with pytest.raises(ValueError, match=says):
        read_manifest(json.dumps(content | change))
