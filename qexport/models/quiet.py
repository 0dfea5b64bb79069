"""Silence of libraries while they load and trace."""

import logging
import warnings
from contextlib import contextmanager


@contextmanager
def quiet_transformers():
    """Without the warnings and log lines of libraries about things the user cannot change."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
