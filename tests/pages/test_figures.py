"""Keys of figures: what they show, in letters, digits and hyphens."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from mergekit_lowrank.pages import keys_of


def test_a_key_says_what_its_figure_shows() -> None:
    assert keys_of("spectra", ["attention.self.key", "mlp.experts.*.up_proj"]) == [
        "spectra-attention-self-key",
        "spectra-mlp-experts-up-proj",
    ]


@given(st.lists(st.text() | st.sampled_from(["q", "Q", "q.2", "q.1", "µ"])))
def test_no_two_keys_are_one_file(names: list[str]) -> None:
    keys = keys_of("spectra", names)
    assert len({*keys}) == len(names)
    assert all(re.fullmatch(r"[0-9a-z-]+", key) and len(key) < 120 for key in keys)
