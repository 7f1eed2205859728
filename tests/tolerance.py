"""How far a result may lie from the float64 reference: the one table, and the check that reads it.

The error is relative to the whole reference, norm-wise (|a - r| / |r|) and max-wise (max |a - r| / max |r|), since elements near zero carry
the rounding of the large terms that cancelled in them. In units of u, the rounding error of the dtype: half types accumulate in float32 and
round a few times on the way (inputs of a product, the result), so a small multiple of u holds at any size; in float32 and float64 the sums
themselves are in that precision, and their error grows with the number of terms.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """The relative error allowed."""

    norm: float
    largest: float


TOLERANCE = {
    torch.float64: Tolerance(norm=64 * 2**-53, largest=256 * 2**-53),  # sums of up to some thousand terms
    torch.float32: Tolerance(norm=64 * 2**-24, largest=256 * 2**-24),  # the same
    torch.float16: Tolerance(norm=2 * 2**-11, largest=6 * 2**-11),  # three roundings in a row: of a factor, of a weight, of the result
    torch.bfloat16: Tolerance(norm=2 * 2**-8, largest=6 * 2**-8),  # the same
}
FP8_SUMS = Tolerance(norm=2**-11, largest=2**-10)
"""Of products of E4M3 by Hopper's tensor cores, which keep 14 bits of the sum of an instruction's terms, against float32 or better."""
FP8_WEIGHTS = Tolerance(norm=2**-4, largest=2 * 2**-4)
"""Of attention whose weights are rounded to E4M3, against the definition on the same E4M3 numbers; the result is bfloat16."""


def relative_error(actual: torch.Tensor, reference64: torch.Tensor) -> Tolerance:
    """Norm-wise and max-wise; infinite where the reference is zero and `actual` is not, NaN where either is."""
    wrong, right = (actual.detach().double() - reference64.detach()).flatten(), reference64.detach().flatten()
    if not wrong.count_nonzero():
        return Tolerance(0.0, 0.0)
    return Tolerance(float(wrong.norm() / right.norm()), float(wrong.abs().max() / right.abs().max()))


def assert_close(actual: torch.Tensor, reference64: torch.Tensor, dtype: torch.dtype, allowed: Tolerance | None = None) -> None:
    """`actual`, computed in `dtype`, lies within the table's bounds, or `allowed`, of the float64 reference. NaN and infinity fail."""
    assert reference64.dtype == torch.float64, f"the reference is {reference64.dtype}"
    assert actual.dtype == dtype, f"expected {dtype}, got {actual.dtype}"
    assert actual.shape == reference64.shape, f"expected shape {tuple(reference64.shape)}, got {tuple(actual.shape)}"
    assert reference64.isfinite().all(), "the reference is not finite"
    assert actual.isfinite().all(), f"{int((~actual.isfinite()).sum())} of {actual.numel()} elements are not finite"
    error, allowed = relative_error(actual, reference64), allowed or TOLERANCE[dtype]
    # `not <=` rather than `>`: a NaN must fail.
    assert error.norm <= allowed.norm, f"norm-wise error {error.norm:.2e}, allowed in {dtype}: {allowed.norm:.2e}"
    assert error.largest <= allowed.largest, f"max-wise error {error.largest:.2e}, allowed in {dtype}: {allowed.largest:.2e}"
