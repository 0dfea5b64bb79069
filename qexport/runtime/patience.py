"""A limit on the time that code of other people's files may take."""

import signal
import threading
from contextlib import contextmanager


@contextmanager
def at_most(seconds: float):
    """Raise TimeoutError within the `with` after so many seconds.

    Only Python code can be stopped so, and only in the main thread of a system with timers, where nobody else has set
    one: elsewhere nothing happens.
    """
    heard = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not heard or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"it takes longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
