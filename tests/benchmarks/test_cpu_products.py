import pytest

from benchmarks.cpu_products import FORMATS, TORCH, Product, Shape, table
from tests.cpu_builds import BUILDS


@pytest.mark.skipif(not BUILDS, reason="no build of the C kernels for this processor")
def test_products_of_each_format_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.cpu_products.WEIGHT_BYTES", 1)
    shape = Shape("small", 64, 128, squared_relu=True)
    timings = [
        Product(build=BUILDS[-1], form=form, shape=shape, most_rows=2).measure(rows, 0.0)
        for form in FORMATS
        for rows in (1, 2)
    ]
    assert [timing.format for timing in timings[::2]] == list(FORMATS)
    assert [timing.rows for timing in timings[:2]] == [1, 2]
    assert all(timing.us > 0 for timing in timings)
    assert table(timings, (1, 2)).count(BUILDS[-1]) == len(FORMATS)


def test_products_of_torch_are_measured_in_the_types_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.cpu_products.WEIGHT_BYTES", 1)
    shape = Shape("small", 64, 128)
    timings = [
        Product(build=TORCH, form=form, shape=shape, most_rows=2).measure(2, 0.0) for form in ("float32", "bfloat16")
    ]
    assert all(timing.us > 0 for timing in timings)
    with pytest.raises(ValueError, match="torch multiplies no int8"):
        Product(build=TORCH, form="int8", shape=shape, most_rows=2)
