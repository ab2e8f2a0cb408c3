"""Buckets, manifests and checksums of weights in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoints_conversion.live.buckets import Manifest, check_stream, checksum, in_buckets
from oprd_megatron.errors import WeightSyncError


def random_tensors(sizes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"t{i}", torch.randn(size, generator=generator).to(dtype)) for i, size in enumerate(sizes)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(1, 600),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_buckets_hold_everything_in_order_within_the_bound(
    sizes: list[tuple[int, int]], max_bytes: int, dtype: torch.dtype
) -> None:
    """Names, values and order survive; a bucket is within the bound or is one tensor; its tensors lie in its buffer."""
    tensors = random_tensors(sizes, dtype)
    found = []
    for bucket in in_buckets(iter(tensors), max_bytes):
        assert len(bucket.buffer) <= max_bytes or len(bucket.tensors) == 1
        for name, tensor in bucket.tensors:
            offset = tensor.data_ptr() - bucket.buffer.data_ptr()
            assert offset >= 0 and offset + tensor.nbytes <= len(bucket.buffer)
            found.append((name, tensor.clone()))
    assert [name for name, _ in found] == [name for name, _ in tensors]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, tensors, strict=True))


def test_one_buffer_serves_all_buckets() -> None:
    """Memory is bounded: every bucket of small tensors lies in the same buffer."""
    tensors = random_tensors([(4, 4)] * 20)
    addresses = {bucket.buffer.data_ptr() for bucket in in_buckets(tensors, 128)}
    assert len(addresses) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_checksum_sees_every_change(dtype: torch.dtype) -> None:
    """One flipped bit, two swapped rows, a sign: the checksum is another; equal tensors in other memory: the same."""
    tensor = random_tensors([(6, 5)], dtype)[0][1]
    assert checksum(tensor) == checksum(tensor.clone()) == checksum(tensor.t().contiguous().t())
    swapped = tensor[[1, 0, 2, 3, 4, 5]]
    negative = tensor.clone()
    negative[3, 2] *= -1
    flipped = tensor.clone()
    bits = flipped.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    bits[5, 4] ^= 1
    vector = tensor[:, 0].contiguous()
    assert len({checksum(x) for x in (tensor, swapped, negative, flipped)}) == 4
    assert checksum(vector) != checksum(vector.flip(0))


def test_a_stream_is_held_against_its_manifest() -> None:
    """What was sent passes; anything missing, twice, foreign, out of order, reshaped, cast or changed is named."""
    tensors = random_tensors([(2, 3), (3, 2), (1, 4)])
    manifest = Manifest()
    for bucket in in_buckets(tensors, 32):
        manifest.add(bucket.tensors)
    assert [name for name, _ in check_stream(tensors, manifest.records)] == ["t0", "t1", "t2"]
    a, b, c = tensors
    changed = (b[0], b[1] + 1)
    for stream, said in (
        ([a, b], "t2 is missing"),
        ([a, c], "t1 is missing, t2 came"),
        ([a, a, b, c], "t0 came twice"),
        ([a, b, c, ("x", c[1])], "x is not in the manifest"),
        ([a, (b[0], b[1].reshape(2, 3)), c], "t1 is F32"),
        ([a, (b[0], b[1].double()), c], "t1 is F64"),
        ([a, changed, c], "t1 was changed on the way"),
    ):
        with pytest.raises(WeightSyncError, match=said):
            list(check_stream(stream, manifest.records))
