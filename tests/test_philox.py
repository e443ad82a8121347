"""If these fail, no seed means what it meant: published logs and fingerprints are worthless."""

import pytest
import torch

from zo.method.philox import MASK, Purpose, philox4x32, word_stream, words

# Known-answer vectors of Random123's philox4x32 with 10 rounds (Salmon et al. 2011).
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    found = philox4x32(tuple(torch.tensor(c) for c in counter), key)
    assert found.tolist() == list(expected)


def test_a_part_of_the_stream_is_the_same_wherever_it_is_made():
    whole = word_stream(7, 0, 1000, 3, Purpose.SHUFFLE)
    assert torch.equal(word_stream(7, 13, 100, 3, Purpose.SHUFFLE), whole[13:113])


def test_streams_of_other_seeds_directions_and_purposes_share_nothing():
    calls = torch.arange(100)
    streams = [
        words(seed, calls, direction, purpose)
        for seed in (1, 2, 1 + 2**32)
        for direction in (0, 1)
        for purpose in (Purpose.RADEMACHER, Purpose.ROUNDING)
    ]
    assert len({tuple(s.view(-1).tolist()) for s in streams}) == len(streams)


def test_calls_beyond_32_bits_do_not_repeat_the_first_ones():
    calls = torch.arange(10)
    assert not torch.equal(
        words(1, calls, 0, Purpose.GAUSSIAN), words(1, calls + 2**32, 0, Purpose.GAUSSIAN)
    )
