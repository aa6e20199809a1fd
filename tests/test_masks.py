"""Top-k by hand-computed cases, and masks as packed bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from attackroute.core.errors import UserError
from attackroute.routes import masks
from attackroute.routes.masks import kept, top_k

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]


@pytest.mark.parametrize(
    ("width", "channels", "expected"),
    [(0.2, 64, 13), (0.3, 5, 2), (0.5, 5, 2), (0.5, 7, 4), (0.01, 10, 1), (0.2, 1, 1), (1, 7, 7), (1.0, 512, 512)],
)
def test_kept_rounds_to_even_and_never_to_zero(width: float, channels: int, expected: int) -> None:
    assert kept(width, channels) == expected


@pytest.mark.parametrize("width", [0, -0.1, 1.0001, math.inf, -math.inf, math.nan])
def test_width_outside_the_unit_interval_is_refused(width: float) -> None:
    with pytest.raises(UserError, match=r"width .* is outside \(0, 1\]"):
        kept(width, 10)
    with pytest.raises(UserError, match=r"outside \(0, 1\]"):
        top_k(torch.rand(2, 10), width)


def test_a_layer_without_channels_is_refused() -> None:
    with pytest.raises(UserError, match="0 channels"):
        top_k(torch.zeros(3, 0), 0.2)


def naive_top_k(row: list[float], width: float) -> list[bool]:
    order = sorted(range(len(row)), key=lambda channel: (-row[channel], channel))
    chosen = set(order[: max(1, round(width * len(row)))])
    return [channel in chosen for channel in range(len(row))]


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(1, 40).flatmap(
        lambda channels: st.lists(
            st.lists(st.sampled_from([-2, -1, 0, 1, 2, 3]), min_size=channels, max_size=channels),
            min_size=1,
            max_size=4,
        )
    ),
    width=st.floats(0.01, 1.0),
    dtype=st.sampled_from(DTYPES),
)
def test_top_k_is_a_stable_descending_sort(rows: list[list[int]], width: float, dtype: torch.dtype) -> None:
    for device in DEVICES:
        mask = top_k(torch.tensor(rows, dtype=dtype, device=device), width)
        assert mask.dtype == torch.bool
        assert mask.tolist() == [naive_top_k([float(value) for value in row], width) for row in rows]


@settings(deadline=None, max_examples=100)
@given(row=st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=30), width=st.floats(0.01, 1.0))
def test_top_k_of_any_floats(row: list[float], width: float) -> None:
    assert top_k(torch.tensor(row), width).tolist() == naive_top_k(row, width)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [0.0, -1.5, math.inf, -math.inf])
def test_all_tied_keeps_the_first(device: str, value: float) -> None:
    mask = top_k(torch.full((3, 5000), value, device=device), 0.25)
    assert mask[:, :1250].all()
    assert not mask[:, 1250:].any()


def test_leading_dimensions_are_a_batch() -> None:
    scores = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(1))
    mask = top_k(scores, 0.3)
    assert mask.shape == scores.shape
    for outer in range(2):
        for inner in range(3):
            assert torch.equal(mask[outer, inner], top_k(scores[outer, inner], 0.3))
    assert top_k(torch.zeros(0, 4), 0.5).shape == (0, 4)


@pytest.mark.parametrize("position", [0, 3])
def test_nan_is_refused(position: int) -> None:
    scores = torch.ones(2, 4)
    scores[1, position] = math.nan
    with pytest.raises(UserError, match="NaN"):
        top_k(scores, 0.5)


def test_scores_with_a_gradient_are_left_alone() -> None:
    scores = torch.rand(2, 6, requires_grad=True)
    before = scores.detach().clone()
    assert not top_k(scores, 0.5).requires_grad
    assert torch.equal(scores, before)


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
