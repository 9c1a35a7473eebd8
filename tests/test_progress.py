import pytest

import diffusers_safe
from diffusers_safe.progress import Progress, ProgressBar


def test_a_callback_sees_every_step_and_the_time_left(monkeypatch):
    clock = iter([0.0, 2.0, 6.0])
    monkeypatch.setattr("diffusers_safe.progress.time.monotonic", lambda: next(clock))
    seen = []
    with ProgressBar("images", total=5, done=1, callback=seen.append) as bar:
        bar.update()
        bar.update(2)
    assert seen == [Progress("images", 1, 5), Progress("images", 2, 5, 6.0), Progress("images", 4, 5, 2.0)]


def test_a_hidden_bar_calls_nothing():
    with ProgressBar("images", total=1, callback=pytest.fail, hidden=True) as bar:
        bar.update()


def test_the_runs_that_report_progress_are_public():
    for name in ("attack", "evaluate", "generate"):
        run = getattr(diffusers_safe, name)
        assert run.__name__ == name and "callback" in run.__annotations__
    assert diffusers_safe.Progress is Progress
