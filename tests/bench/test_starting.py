"""The benchmark of starting: what it reads off a process."""

import pytest

from bench.starting import COMMANDS, RUN, seconds_of


def test_seconds_are_those_of_the_process_and_those_that_it_says() -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint('starting: 1.5 2.5')"
    whole, *said = seconds_of(["-c", busy])
    assert 0.25 < whole < 5
    assert said == [1.5, 2.5]
    assert len(seconds_of(COMMANDS["gpd --version"])) == 1


@pytest.mark.slow
def test_a_run_says_when_its_first_step_begins_and_ends() -> None:
    tiny = ["--model.student_args", "{in_chans: 1, layers: [1, 1, 1, 1], channels: [4, 4, 8, 8]}"]
    whole, *stages = seconds_of([*RUN, *tiny])
    assert stages == sorted(stages)
    assert len(stages) == 3
    assert stages[0] > 0
    assert stages[-1] <= whole + 1
