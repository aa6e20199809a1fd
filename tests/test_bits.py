from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from attackroute.routes import masks

MASKS = npst.arrays(np.bool_, st.tuples(st.integers(1, 30), st.integers(1, 40)))


def test_bit_b_of_byte_k_is_channel_8k_plus_b() -> None:
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, [0, 2, 9]] = True
    mask[1, 10] = True
    assert masks.pack(mask).tolist() == [[0b101, 0b10], [0, 0b100]]


@settings(deadline=None)
@given(MASKS)
def test_pack_and_unpack_are_inverse(mask: np.ndarray) -> None:
    packed = masks.pack(torch.from_numpy(mask))
    assert packed.dtype == torch.uint8
    assert packed.shape == (mask.shape[0], -(-mask.shape[1] // 8))
    assert not masks.has_stray_bits(packed, mask.shape[1])
    unpacked = masks.unpack(packed, mask.shape[1])
    assert unpacked.dtype == torch.bool
    assert np.array_equal(unpacked.numpy(), mask)


@settings(deadline=None)
@given(mask=MASKS, chunk=st.sampled_from([1, 16, 1 << 22]))
def test_count_is_the_column_sum_in_chunks_of_any_size(mask: np.ndarray, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_CHUNK_BITS", chunk)
        counts = masks.usage_counts(masks.pack(torch.from_numpy(mask)), mask.shape[1])
    assert counts.dtype == torch.int64
    assert counts.tolist() == [sum(int(value) for value in column) for column in mask.T]


def test_count_never_unpacks_all_samples_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    unpack = masks._unpack
    monkeypatch.setattr(masks, "_CHUNK_BITS", 80)
    monkeypatch.setattr(masks, "_unpack", lambda packed, channels: seen.append(len(packed)) or unpack(packed, channels))
    masks.usage_counts(masks.pack(torch.ones(25, 8, dtype=torch.bool)), 8)
    assert seen == [10, 10, 5]


@pytest.mark.parametrize(("channels", "stray"), [(8, False), (7, True), (3, True)])
def test_stray_bits_are_those_beyond_the_last_channel(channels: int, stray: bool) -> None:
    assert masks.has_stray_bits(torch.tensor([[0], [0b11111111]], dtype=torch.uint8), channels) is stray
