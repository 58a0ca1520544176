# SPDX-License-Identifier: GPL-2.0-or-later
"""Cutting a stream of JSON into messages."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_upm.framing import Framer, TooLongError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(
    messages=st.lists(st.dictionaries(st.text(), VALUES), max_size=6),
    ends=st.sampled_from([b"", b"\n", b"\r\n", b" \t\n"]),
    piece=st.integers(1, 50),
    ascii_only=st.booleans(),
)
def test_messages_come_out_as_they_went_in(
    messages: list[dict[str, object]], ends: bytes, piece: int, ascii_only: bool
) -> None:
    """However the stream is cut, and with or without line breaks."""
    stream = b"".join(
        json.dumps(m, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass") + ends
        for m in messages
    )
    framer = Framer(1 << 20)
    texts = [
        text
        for start in range(0, len(stream), piece)
        for text in framer.feed(stream[start : start + piece])
    ]
    assert [json.loads(text.decode("utf-8", "surrogatepass")) for text in texts] == messages


@given(garbage=st.binary(max_size=200), piece=st.integers(1, 20))
def test_garbage_is_cut_whatever_the_pieces(garbage: bytes, piece: int) -> None:
    """What comes out does not depend on how the bytes arrive, and none but spaces get lost."""
    whole, pieces = Framer(1 << 20), Framer(1 << 20)
    at_once = list(whole.feed(garbage))
    in_pieces = [
        text
        for start in range(0, len(garbage), piece)
        for text in pieces.feed(garbage[start : start + piece])
    ]
    assert at_once == in_pieces
    assert b"".join((*at_once, whole._buffer)).split() == garbage.split()


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"}\n", b'"text"\n', b'{"a": "no end\n', b"\xff\n", b"\x00\n"]
)
def test_a_broken_line_does_not_cost_the_next(line: bytes) -> None:
    """What can be no message ends with its line."""
    assert list(Framer(100).feed(line + b'{"b":1}')) == [line, b'{"b":1}']


@pytest.mark.parametrize("byte", [b"{", b"a", b'{"', b'["\\'])
def test_an_endless_message_is_an_error(byte: bytes) -> None:
    """It is held up to the limit, whatever it consists of."""
    framer = Framer(100)
    assert list(framer.feed(byte + b"a" * (100 - len(byte)))) == []
    assert framer.pending
    with pytest.raises(TooLongError):
        list(framer.feed(b"a"))


def test_what_came_before_a_long_message_is_not_lost() -> None:
    """The error comes after the last whole message, for a complete one that is too long as well."""
    messages = Framer(100).feed(b'{"a":1}' + b'{"b":"' + b"x" * 200 + b'"}')
    assert next(messages) == b'{"a":1}'
    with pytest.raises(TooLongError):
        next(messages)
