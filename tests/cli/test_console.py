"""What a command shows and hears while it works."""

import signal

import pytest

from qexport.cli.console import showing_progress


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
