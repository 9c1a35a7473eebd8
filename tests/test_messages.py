import signal
import sys

import pytest

from diffusers_safe.messages import exit_with_error
from scripts import run


KILL = "import atexit, os, signal, sys; kill = lambda: os.kill(os.getpid(), signal.SIG{name})\n"
BODIES = {
    "at work": "with exit_with_error(): kill()",
    "nested": "with exit_with_error(), exit_with_error(): kill()",
    "imports": "with exit_with_error(), importing(): kill()",
    "of a library that hides it": """
with exit_with_error():
    try:
        kill()
    except KeyboardInterrupt:
        raise RecursionError
""",
}


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143)])
@pytest.mark.parametrize("place", BODIES)
def test_a_signal_ends_in_one_line(tmp_path, place, name, code):
    imports = "from diffusers_safe.messages import exit_with_error, importing\n"
    done = run([sys.executable, "-c", KILL.format(name=name) + imports + BODIES[place]], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "stopped\n")


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_a_signal_after_the_work_changes_nothing(tmp_path, name):
    code = "atexit.register(kill)\nfrom diffusers_safe.messages import exit_with_error\nwith exit_with_error(): pass"
    done = run([sys.executable, "-c", KILL.format(name=name) + code], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_handlers_are_given_back_and_those_of_others_stay():
    def own(*_):
        pass

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with exit_with_error():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGTERM, own)
    try:
        with exit_with_error():
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before[1])
