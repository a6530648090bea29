from persimmon.server.restarts import MAX_DEATHS, WINDOW_SECONDS, Restarts


def test_the_next_process_starts_at_once_then_later_and_later_and_at_last_never():
    restarts = Restarts()
    assert [restarts.delay_after_death(now) for now in range(MAX_DEATHS)] == [0, 0.5, 1, 2, None]


def test_deaths_long_ago_do_not_count():
    restarts = Restarts()
    for _ in range(MAX_DEATHS - 1):
        restarts.delay_after_death(0)
    assert restarts.delay_after_death(WINDOW_SECONDS + 1) == 0
    assert restarts.deaths == 1


def test_starts_that_the_system_does_not_allow_are_tried_again_for_ever():
    restarts = Restarts()
    assert [restarts.delay_after_failed_start() for _ in range(6)] == [0.5, 1, 2, 4, 4, 4]
    assert restarts.delay_after_death(0) == 0
    assert restarts.delay_after_failed_start() == 0.5
