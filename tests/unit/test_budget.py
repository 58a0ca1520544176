# SPDX-License-Identifier: GPL-2.0-or-later
"""How the host's budget is divided."""

from hypothesis import given
from hypothesis import strategies as st

from qmp_upm.budget import Claim, divide
from qmp_upm.pages import PAGE_BYTES

MIB = 1 << 20
CLAIMS = st.dictionaries(
    st.integers(), st.builds(Claim, st.integers(1, 10_000), st.integers(0, 1 << 40)), max_size=20
)


def test_by_weight_within_their_own() -> None:
    """What the one that needs little leaves over goes to the others, by their weights."""
    parts = divide(
        100 * MIB,
        {"small": Claim(100, 10 * MIB), "a": Claim(100, 999 * MIB), "b": Claim(200, 999 * MIB)},
    )
    assert parts == {"small": 10 * MIB, "a": 30 * MIB, "b": 60 * MIB}


@given(st.integers(-(1 << 40), 1 << 42), CLAIMS)
def test_never_more_than_the_whole(total: int, claims: dict[int, Claim]) -> None:
    """Together no more than there is, each no more than its own; and nothing is left needlessly."""
    parts = divide(total, claims)
    assert parts.keys() == claims.keys()
    assert sum(parts.values()) <= max(0, total)
    assert all(0 <= part <= claims[name].most_bytes for name, part in parts.items())
    hungry = [n for n in claims if parts[n] < claims[n].most_bytes // PAGE_BYTES * PAGE_BYTES]
    if hungry:
        assert max(0, total) - sum(parts.values()) <= len(claims) * PAGE_BYTES * 2


@given(st.integers(0, 1 << 42), CLAIMS)
def test_heavier_never_gets_less(total: int, claims: dict[int, Claim]) -> None:
    """Of two that could take as much, the one with more weight has no less."""
    parts = divide(total, claims)
    for one, mine in claims.items():
        for other, theirs in claims.items():
            if mine.weight >= theirs.weight and mine.most_bytes >= theirs.most_bytes:
                assert parts[one] + PAGE_BYTES * len(claims) >= parts[other]
