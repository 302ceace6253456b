from __future__ import annotations

import logging

import pytest

from homefire.foundation import logs


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    yield root
    root.handlers[:], root.level = before


@pytest.mark.parametrize(
    "secret",
    [
        "tml-abcdef123456",
        "Bearer abcdef123456",
        "fw_abcdef123456",
        "/api/v1/downloads/abcdef1234.56",
    ],
)
def test_keys_never_reach_a_log(root_logger, secret):
    logs.configure("test")
    (handler,) = root_logger.handlers
    record = logging.makeLogRecord({"msg": "header %s end", "args": (secret,)})
    line = handler.format(record)
    assert "abcdef" not in line
    assert "[redacted]" in line
    assert line.endswith("end")
