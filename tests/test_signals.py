from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from colqwen_lab import signals


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_waits_until_the_block_ends(number: int) -> None:
    before = [signal.getsignal(each) for each in signals.STOPPING]
    done = False

    def stop(*_: object) -> None:
        assert done
        raise KeyboardInterrupt

    signals.listen(stop)
    try:
        with pytest.raises(KeyboardInterrupt), signals.deferred():  # noqa: PT012
            signal.raise_signal(number)
            signal.raise_signal(number)
            done = True
        assert [signal.getsignal(each) for each in signals.STOPPING] == [stop, stop]
    finally:
        for each, handler in zip(signals.STOPPING, before, strict=True):
            signal.signal(each, handler)


@pytest.mark.parametrize(
    ("program", "code", "line"),
    [
        ("colqwen-lab", 143, "colqwen-lab: stopped\n"),
        ("notebook", -signal.SIGTERM, ""),
    ],
)
def test_while_the_program_imports_its_libraries(program: str, code: int, line: str) -> None:
    script = (
        f"import sys; sys.orig_argv[1:2] = ['/bin/{program}']\n"
        "import colqwen_lab, signal\n"
        "signal.raise_signal(signal.SIGTERM)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, line)
