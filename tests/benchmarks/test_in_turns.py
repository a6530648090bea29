from benchmarks.in_turns import compare, table

DEVICE = {"memory_gib": 23.5}


def result(total: float, *, rows: int = 8, **more: float) -> dict[str, object]:
    return {"device": DEVICE, "budgets": [{"load": {"running": rows}, "total": total, **more}]}


def test_each_measured_number_is_compared_with_its_own() -> None:
    (figure,) = compare([result(4.0), result(2.0), result(1.0)], [result(3.0), result(3.0), result(9.0)])
    assert figure.name == "budgets.0.total"
    assert (figure.before, figure.after) == ([4.0, 2.0, 1.0], [3.0, 3.0, 9.0])
    assert figure.ratio == 1.5
    assert "| budgets.0.total | 2 (min 1) | 3 (min 3) | 1.50 |" in table([figure])


def test_numbers_that_only_one_side_has_are_left_out() -> None:
    assert [own.name for own in compare([result(4.0, wait=1.0)], [result(3.0, plan=2.0)])] == ["budgets.0.total"]
