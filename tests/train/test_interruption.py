"""Signals that are held back; whole runs that they end are in tests/cli/test_train.py."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from gencore.train.interruption import Interrupted, deferred_signals, exit_code, raised_signals


def test_a_signal_that_is_ignored_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred_signals() as ending:
            os.kill(os.getpid(), signal.SIGHUP)
            assert ending() is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_handlers_are_as_before_after_an_error(interruptible):
    before = signal.getsignal(signal.SIGINT)

    def fail() -> None:
        with deferred_signals():
            assert signal.getsignal(signal.SIGINT) is not before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_hold_nothing_back():
    found = []

    def work():
        with deferred_signals() as ending:
            found.append((ending(), signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_would_kill_are_raised(number):
    caught = []

    def work() -> None:
        with raised_signals() as raised:
            try:
                assert raised() is None
                os.kill(os.getpid(), number)
            finally:
                caught.append(raised())

    former = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Interrupted) as interrupted:
            work()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, former)
    assert caught == [interrupted.value.signal] == [number]
    assert exit_code(interrupted.value) == 128 + number
    assert exit_code(KeyboardInterrupt()) == 130
