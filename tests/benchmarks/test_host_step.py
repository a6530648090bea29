"""What the benchmark of a GPU's step on the host prints."""

from benchmarks.host_step import HostTime, table


def test_the_table_has_the_bound_where_there_is_one() -> None:
    held, late, free = (HostTime("a", own, 2, 1, ms, 3.0) for own, ms in ((2.0, 0.8), (2.0, 2.1), (None, 9.0)))
    assert [own.holds for own in (held, late, free)] == [True, False, True]
    assert table([held, late, free]).splitlines()[2:] == [
        "| a | 2 | 1 | 0.80 | 3.00 | 2.0 |",
        "| a | 2 | 1 | 2.10 | 3.00 | 2.0 |",
        "| a | 2 | 1 | 9.00 | 3.00 |  |",
    ]
