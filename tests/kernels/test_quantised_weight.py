"""Codes and scales: how much they lose, how they are packed, and what no code can be made of."""

import pytest
import torch

from kernels_torch.quantised_weight import (
    FORMS,
    GROUPS,
    check_codes,
    dequantise,
    pack_int4,
    quantise,
    shapes_of,
    unpack_int4,
)

SHAPES = [(7, 128), (5, 130), (1, 1), (3, 64), (0, 12), (4, 0), (2, 1000)]


def matrix(F: int, C: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(F, C, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_those_foretold(form, shape):
    for group in GROUPS:
        codes, scales = quantise(matrix(*shape), form, group)
        assert ((tuple(codes.shape), codes.dtype), (tuple(scales.shape), scales.dtype)) == shapes_of(
            *shape, form, group
        )
        assert dequantise(codes, scales, shape[1], torch.float32).shape == shape


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape])
def test_errors_are_bounded_by_half_a_step(shape):
    """int8: half a step of its row. fp8: half a unit in the last of 3 places, or of the smallest numbers."""
    w = matrix(*shape)
    most = w.abs().amax(1, keepdim=True)
    error = (dequantise(*quantise(w, "int8"), shape[1], torch.float32) - w).abs()
    assert (error <= 0.5001 * most / 127).all()
    error = (dequantise(*quantise(w, "fp8"), shape[1], torch.float32) - w).abs()
    assert (error <= 1.001 * torch.maximum(w.abs() / 16, most / 448 * 2**-10)).all()


@pytest.mark.parametrize("group", GROUPS)
def test_int4_loses_less_than_scales_by_the_largest_value_would(group):
    w = matrix(40, 4 * group)
    error = (dequantise(*quantise(w, "int4", group), 4 * group, torch.float32) - w).square().sum()
    parts = w.view(40, 4, group)
    scales = parts.abs().amax(2, keepdim=True) / 7
    naive = ((parts / scales).round() * scales - parts).square().sum()
    assert error < 0.9 * naive
    assert (error / w.square().sum()).sqrt() < 0.1


def test_what_the_codes_can_say_comes_back_exactly():
    codes = torch.randint(-8, 8, (6, 256), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::64] = -8.0  # every group reaches its end
    for scale in (0.25, 1.0, -2.0):  # of both signs, since the end that is used has one
        again = dequantise(*quantise(codes * scale, "int4", 64), 256, torch.float32)
        assert torch.equal(again, codes * scale)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_stay_zero(form):
    w = matrix(3, 100)
    w[1] = 0
    again = dequantise(*quantise(w, form), 100, torch.float32)
    assert (again[1] == 0).all()
    assert again[[0, 2]].isfinite().all()


@pytest.mark.parametrize("group", GROUPS)
def test_words_hold_the_nibbles_they_are_said_to(group):
    nibbles = torch.randint(0, 16, (3, 2, group), generator=torch.Generator().manual_seed(0))
    words = pack_int4(nibbles)
    assert torch.equal(unpack_int4(words, group), nibbles.int())
    P = group // 8
    i, j, g = 3, 7, 1
    assert (int(words[2, g * P + i]) >> (4 * j)) & 15 == nibbles[2, g, j * P + i]


def test_a_row_does_not_depend_on_the_others():
    """So codes of weights side by side are those of each, side by side."""
    a, b = matrix(3, 200), 50 * matrix(4, 200, seed=1)
    for form in FORMS:
        for both, own in zip(quantise(torch.cat([a, b]), form), quantise(a, form), strict=True):
            assert torch.equal(both[:3].view(torch.uint8), own.view(torch.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), "int8"), r"\(3,\)"),
        ((torch.ones(3, 4, dtype=torch.int32), "int8"), "int32"),
        ((torch.ones(3, 4), "int3"), "int8, int4, fp8, got 'int3'"),
        ((torch.ones(3, 4), "int4", 96), "64 or 128 columns, got 96"),
        ((torch.tensor([[1.0, torch.nan]]), "int8"), "not finite"),
        ((torch.tensor([[1.0, torch.inf]]), "int4"), "not finite"),
    ],
)
def test_what_cannot_be_quantised_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantise(*arguments)


def test_codes_that_do_not_fit_are_refused():
    codes, scales = quantise(matrix(4, 200), "int4", 64)
    check_codes(codes, scales, 200)
    check_codes(codes, scales, 193)
    for bad in [
        (codes, scales, 257),
        (codes[:, :-1], scales, 200),
        (codes, scales[:, :-1], 200),
        (codes, scales[:3], 200),
    ]:
        with pytest.raises(ValueError, match="int4 needs codes"):
            check_codes(*bad)
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        check_codes(codes.long(), scales, 200)
    with pytest.raises(ValueError, match="scales must be floating point"):
        check_codes(codes, scales.int(), 200)
