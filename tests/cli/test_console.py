"""What a command shows and hears while it works."""

import signal

import pytest

from qexport.cli.console import showing_progress
from qexport.progress import announce, no_progress, of_part


@pytest.mark.parametrize("native", [None, ValueError])
def test_an_interrupt_that_native_code_swallows_or_renames_is_not_lost(native, hears_signals):
    with pytest.raises(KeyboardInterrupt), showing_progress() as progress:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if native is not None:
                raise native("could not determine the shape") from None
        progress("quantize", "next block", 1, 2)
        pytest.fail("the next step began")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_stages_that_were_announced_have_numbers(capsys):
    with showing_progress() as progress:
        announce(of_part(progress, "encoder"), "capture", "quantize")
        announce(of_part(progress, "decoder"), "capture")
        announce(of_part(progress, "encoder"), "quantize")  # said again by who does it
        for stage in ("encoder: quantize", "decoder: capture", "estimate"):
            progress(stage, "", 0, 1)
    shown = ["[2/3] encoder: quantize 0/1", "[3/3] decoder: capture 0/1", "estimate 0/1"]
    assert capsys.readouterr().err.splitlines() == shown


def test_one_stage_alone_needs_no_number(capsys):
    with showing_progress() as progress:
        announce(progress, "ranges")
        progress("ranges", "", 0, 1)
    assert capsys.readouterr().err == "ranges 0/1\n"


def test_a_callback_that_expects_nothing_is_told_nothing():
    announce(no_progress, "capture")


def test_lines_say_what_is_left_of_a_long_stage(monkeypatch, capsys):
    now = iter([0.0, 0.5, 0.5, 40.0, 40.0, 80.0, 80.0])
    monkeypatch.setattr("qexport.cli.console.time.monotonic", lambda: next(now))
    with showing_progress() as progress:
        for done in (0, 2, 4):
            progress("quantize", f"block {done}", done, 8)
    assert capsys.readouterr().err.splitlines() == [
        "quantize 0/8 block 0", "quantize 2/8 block 2 (2 minutes left)", "quantize 4/8 block 4 (80 seconds left)",
    ]  # fmt: skip
