# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The handoff's codec: what is encoded comes back; anything else is a ProtocolError and nothing worse."""

from __future__ import annotations

import json
import struct
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.connector.protocol import (
    MAX_BLOCKS,
    MAX_LAYOUT_NBYTES,
    MAX_MESSAGE_NBYTES,
    MAX_RENEWED,
    Abort,
    Accept,
    Commit,
    Decline,
    Grant,
    Message,
    Offer,
    ProtocolError,
    Renew,
    decode,
    encode,
    expected_arrivals,
)

COUNTS = st.integers(1, 1 << 30)
IDS = st.text(min_size=1, max_size=64)
INT32S = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50).map(
    lambda items: np.array(items, np.int32)
)
OBJECTS = st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8), max_size=4)
COMMON = {"handoff": IDS, "source": IDS, "target": IDS}
FAILURES = st.sampled_from(["client_gone", "peer_lost", "expired", "write_failed", "refused"])
MESSAGES = st.one_of(
    st.builds(
        Offer,
        **COMMON,
        num_tokens=COUNTS,
        max_chunks=COUNTS,
        layout=OBJECTS,
        model=st.text(max_size=256),
    ),
    st.builds(
        Grant,
        **COMMON,
        token_begin=COUNTS,
        token_end=COUNTS,
        max_chunks=COUNTS,
        ttl_s=st.floats(1e-3, 1e6),
        region=st.text(max_size=20),
        lease=st.binary(max_size=128),
        layout=OBJECTS,
        block_ids=INT32S,
    ),
    st.builds(Decline, **COMMON, reason=st.text(max_size=100), refused=st.booleans()),
    st.builds(
        Commit,
        **COMMON,
        num_tokens=COUNTS,
        cached_tokens=COUNTS,
        transport=st.text(max_size=64),
        chunk_ends=INT32S,
        first_tokens=INT32S,
    ),
    st.builds(Accept, **COMMON),
    st.builds(
        Abort,
        **COMMON,
        to=st.sampled_from(["sender", "receiver"]),
        end=FAILURES,
        cause=st.text(max_size=100),
        retryable=st.booleans(),
    ),
    st.builds(
        Renew,
        **COMMON,
        sending=st.lists(IDS, max_size=5).map(tuple),
        receiving=st.lists(IDS, max_size=5).map(tuple),
    ),
)


def assert_same(a: Message, b: Message) -> None:
    assert type(a) is type(b)
    for item in fields(a):
        ours, theirs = getattr(a, item.name), getattr(b, item.name)
        if isinstance(ours, np.ndarray):
            assert theirs.dtype == np.int32
            assert not theirs.flags.writeable
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs
            assert type(ours) is type(theirs)


@given(MESSAGES)
def test_a_message_round_trips(message: Message) -> None:
    assert_same(message, decode(encode(message)))


def decodes_or_refuses(payload: bytes) -> None:
    try:
        message = decode(payload)
    except ProtocolError:
        return
    assert_same(message, decode(encode(message)))


@given(st.binary(max_size=200))
def test_garbage_raises_only_protocol_errors(payload: bytes) -> None:
    decodes_or_refuses(payload)
    decodes_or_refuses(struct.pack("<4sI", b"kvh1", len(payload)) + payload)


@given(MESSAGES, st.data())
def test_a_damaged_message_raises_only_protocol_errors(
    message: Message, data: st.DataObject
) -> None:
    payload = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] = data.draw(st.integers(0, 255))
    decodes_or_refuses(bytes(payload))
    decodes_or_refuses(bytes(payload[: data.draw(st.integers(0, len(payload)))]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(MESSAGES, JSON, st.data())
def test_a_field_of_another_type_raises_only_protocol_errors(
    message: Message, value: object, data: st.DataObject
) -> None:
    payload = encode(message)
    nbytes = struct.unpack_from("<4sI", payload)[1]
    header = json.loads(payload[8 : 8 + nbytes])
    header[data.draw(st.sampled_from(sorted(header)))] = value
    text = json.dumps(header).encode()
    decodes_or_refuses(struct.pack("<4sI", b"kvh1", len(text)) + text + payload[8 + nbytes :])


def framed(text: bytes) -> bytes:
    return struct.pack("<4sI", b"kvh1", len(text)) + text


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "0 bytes are no message"),
        (b"kvh0\0\0\0\0", "magic"),
        (struct.pack("<4sI", b"kvh1", 1 << 31), "a header of 2147483648 bytes"),
        (framed(b"[]"), "no object"),
        (framed(b"[" * 30000), "not JSON"),
        (framed(b'{"v":NaN}'), "NaN is no JSON number"),
        (framed(b'{"v":' + b"9" * 5000 + b"}"), "not JSON"),
        (framed(b'{"v":2,"kind":"accept"}'), "version '2', this side speaks 1"),
        (framed(b'{"v":1,"kind":"accepted"}'), "unknown kind 'accepted'"),
        (framed(b'{"v":1,"kind":["accept"]}'), "unknown kind"),
        (framed(b'{"v":1,"kind":"accept","handoff":"h","source":"s"}'), "without 'target'"),
        (
            framed(b'{"v":1,"kind":"accept","handoff":"h","source":"s","target":"t"}') + b"x",
            "1 bytes follow",
        ),
        (b"x" * (MAX_MESSAGE_NBYTES + 1), "bytes are no message"),
    ],
)
def test_the_error_says_what_is_wrong(payload: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode(payload)


def test_unknown_fields_are_ignored() -> None:
    text = b'{"v":1,"kind":"accept","handoff":"h","source":"s","target":"t","more":[1]}'
    assert isinstance(decode(framed(text)), Accept)


def test_the_biggest_messages_fit_a_notification() -> None:
    wide = {"handoff": "h" * 64, "source": "s" * 64, "target": "t" * 64}
    ids = tuple(f"{i:064d}" for i in range(MAX_RENEWED))
    decode(encode(Renew(**wide, sending=ids, receiving=ids)))
    layout = {"x": "y" * (MAX_LAYOUT_NBYTES - 10)}
    grant = Grant(
        **wide,
        token_begin=1 << 30,
        token_end=1 << 30,
        max_chunks=1 << 30,
        ttl_s=1 / 3,
        region="\u1234" * 256,
        lease=bytes(128),
        layout=layout,
        block_ids=np.zeros(MAX_BLOCKS, np.int32),
    )
    decode(encode(grant))
    offer = Offer(**wide, num_tokens=1, max_chunks=1, layout=layout, model="\u1234" * 256)
    decode(encode(offer))


def test_a_message_over_the_limit_is_refused_where_it_is_made() -> None:
    commit = Commit(
        handoff="h",
        source="s",
        target="t",
        num_tokens=1,
        cached_tokens=0,
        transport="",
        chunk_ends=np.zeros(20000, np.int32),
        first_tokens=np.zeros(1, np.int32),
    )
    with pytest.raises(ProtocolError, match="exceeds"):
        encode(commit)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=12),
    st.data(),
    st.integers(1, 5),
)
def test_expected_arrivals_are_the_chunks_that_touch_the_granted_tokens(
    sizes: list[int], data: st.DataObject, num_layers: int
) -> None:
    ends = np.cumsum(sizes)
    begin = data.draw(st.integers(0, int(ends[-1]) - 1))
    end = data.draw(st.integers(begin + 1, int(ends[-1])))
    wanted = [
        chunk * num_layers + layer
        for chunk, size in enumerate(sizes)
        for layer in range(num_layers)
        if set(range(int(ends[chunk]) - size, int(ends[chunk]))) & set(range(begin, end))
    ]
    got = expected_arrivals(ends.astype(np.int32), begin, end, num_layers)
    assert got.tolist() == wanted
