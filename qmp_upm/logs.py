# SPDX-License-Identifier: GPL-2.0-or-later
"""Logs on stderr: coloured on a terminal, JSON lines elsewhere."""

import logging
import sys

import structlog


def configure_logs(level: str) -> None:
    """Set up structlog for this process. ``level``: debug, info, warning or error."""
    terminal = sys.stderr.isatty()
    renderer = structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=not terminal),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
