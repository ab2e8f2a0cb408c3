"""The wire's number formats: exact where they are casts, bounded where they round."""

from __future__ import annotations

import itertools

import pytest
import torch

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.representation.wire import Wire, WireName, wire_name

WIDTH = 48


def drawn(count: int = 200, seed: int = 0) -> torch.Tensor:
    """States [count, WIDTH] whose numbers and whose lengths span many powers of ten, of both signs, as residual streams do."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, WIDTH, generator=generator) * torch.randn(count, WIDTH, generator=generator).exp()
    return states * 10.0 ** torch.linspace(-6, 6, count).unsqueeze(1)


@pytest.mark.parametrize(("name", "size"), [("fp32", WIDTH * 4), ("bf16", WIDTH * 2), ("fp8", WIDTH + 4)])
def test_bytes_of_a_state(name: WireName, size: int) -> None:
    """`state_bytes` is what an encoded row takes up; shapes go round, also without rows, and what comes back is fp32."""
    wire = Wire(name, WIDTH)
    for count in (0, 1, 7):
        encoded = wire.encode(drawn()[:count])
        assert wire.relative_error(drawn()[:count]).shape == (count,)
        assert encoded.shape == (count, wire.columns) and encoded.dtype == wire.dtype
        assert encoded.nbytes == count * size == count * wire.state_bytes
        decoded = wire.decode(encoded)
        assert decoded.shape == (count, WIDTH) and decoded.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_are_exact(dtype: torch.dtype) -> None:
    """fp32 keeps every bit of either dtype, bf16 those of a bf16 state; an fp32 state on a bf16 wire is rounded once."""
    states = drawn().to(dtype)
    assert torch.equal(Wire("fp32", WIDTH).decode(Wire("fp32", WIDTH).encode(states)), states.float())
    assert torch.equal(Wire("bf16", WIDTH).decode(Wire("bf16", WIDTH).encode(states)), states.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_rounds_no_more_than_it_says(dtype: torch.dtype) -> None:
    """Half a unit of e4m3's three mantissa bits, 2^-4 of the number, or where that is finer than its smallest step (2^-9),
    half of that step times the state's scale, its largest number / 448. (1e-6: divided by the scale and multiplied again.)"""
    wire, states = Wire("fp8", WIDTH), drawn().to(dtype)
    exact = states.float()
    scale = exact.abs().amax(-1, keepdim=True) / 448
    error = (wire.decode(wire.encode(states)) - exact).abs()
    assert (error <= torch.maximum(exact.abs() * 2**-4, scale * 2**-10) * (1 + 1e-6)).all()
    assert (error <= exact.abs() * 2**-4 + scale * 2**-10).all()
    assert error.max() > 0


def test_fp8_keeps_the_largest_number_and_the_signs() -> None:
    """The largest number of a state is e4m3's largest, so it comes back but for fp32 rounding; no number changes its sign."""
    states = drawn()
    decoded = Wire("fp8", WIDTH).decode(Wire("fp8", WIDTH).encode(states))
    largest = states.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(decoded.gather(1, largest), states.gather(1, largest), rtol=1e-6, atol=0)
    assert (decoded * states >= 0).all()


def test_fp8_of_zeros_and_of_tiny_states() -> None:
    """A state of zeros comes back as zeros, beside others that do not; numbers at fp32's edge give no NaN and no infinity."""
    wire = Wire("fp8", WIDTH)
    states = drawn(4)
    states[1] = 0
    decoded = wire.decode(wire.encode(states))
    assert (decoded[1] == 0).all() and (decoded[[0, 2, 3]] != 0).any(-1).all()
    for value in (1e-45, 1e-40, torch.finfo(torch.float32).tiny, 1e38, torch.finfo(torch.float32).max):
        decoded = wire.decode(wire.encode(torch.full((1, WIDTH), value)))
        assert decoded.isfinite().all() and (decoded >= 0).all()
        if 1e-35 < value < 1e38 * 2:
            torch.testing.assert_close(decoded, torch.full((1, WIDTH), value), rtol=1e-6, atol=0)


def test_fp8_with_one_outlier() -> None:
    """One number a million times the others takes the whole range: it comes back, they are lost, and `relative_error` hardly
    sees it, because the outlier is nearly all of the state's length. In a state of its own nothing else is harmed."""
    wire = Wire("fp8", WIDTH)
    states = torch.ones(2, WIDTH)
    states[0, 5] = 1e6
    decoded = wire.decode(wire.encode(states))
    assert decoded[0, 5].item() == pytest.approx(1e6, rel=1e-6)
    assert decoded[0].count_nonzero() == 1
    torch.testing.assert_close(decoded[1], torch.ones(WIDTH), rtol=1e-6, atol=0)
    error = wire.relative_error(states)
    assert error[0].item() == pytest.approx((WIDTH - 1) ** 0.5 / 1e6, rel=1e-3) and error[1] < 1e-6


def test_relative_error_is_measured_on_each_state() -> None:
    """|decoded - state| / |state|, row by row; 0 for fp32 and for zeros; below 2^-4 for fp8 states without outliers."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(50, WIDTH, generator=generator)
    states[3] = 0
    assert (Wire("fp32", WIDTH).relative_error(states) == 0).all()
    for name, bound in (("bf16", 2**-8), ("fp8", 2**-4)):
        wire: Wire = Wire(name, WIDTH)  # type: ignore[arg-type]
        error = wire.relative_error(states)
        decoded = wire.decode(wire.encode(states))
        expected = torch.stack(
            [(d - s).norm() / s.norm().clamp_min(1e-9) for d, s in zip(decoded, states, strict=True)]
        )
        torch.testing.assert_close(error, expected)
        assert error.shape == (50,) and error[3] == 0 and 0 < error.max() <= bound


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8"])
def test_rows_are_encoded_independently(name: WireName) -> None:
    """A row's bytes do not depend on the rows beside it, and targets, which are slices [:, i] of blocks [N, L, columns], decode
    like copies: also a single one, and one whose width is no multiple of a number's four bytes."""
    for width, count in itertools.product((WIDTH, 5, 6, 7), (0, 1, 6)):
        wire, states = Wire(name, width), drawn(6)[:count, :width]
        encoded = wire.encode(states)
        assert torch.equal(torch.cat([encoded[:0], *(wire.encode(row.unsqueeze(0)) for row in states)]), encoded)
        block = torch.zeros(count, 3, wire.columns, dtype=wire.dtype)
        block[:, 1] = encoded
        assert torch.equal(wire.decode(block[:, 1]), wire.decode(encoded.clone()))


def test_the_configured_wire() -> None:
    """`auto` is the teacher's dtype; anything else is itself."""
    assert wire_name(DistillConfig(), "bf16") == "bf16" and wire_name(DistillConfig(), "fp32") == "fp32"
    assert (
        wire_name(DistillConfig(wire="fp8"), "bf16") == "fp8"
        and wire_name(DistillConfig(wire="fp32"), "bf16") == "fp32"
    )
