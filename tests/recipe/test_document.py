from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lowrank.errors import MergeError, RecipeError
from mergekit_lowrank.recipe.document import Document, read_yaml, write_yaml
from mergekit_lowrank.recipe.origin import Place


def read(text: str) -> Document:
    return read_yaml(text, locate=lambda line, column: f"{line + 1}:{column + 1}")


def test_every_key_and_value_has_a_place() -> None:
    places = read("a: 1\nb:\n  - x: 2\n").places
    assert places["a",] == Place("1:1", "1:4")
    assert places["b", 0, "x"] == Place("3:5", "3:8")


def test_scalars_follow_yaml_1_2() -> None:
    text = "[1, -.5, 1e-3, .inf, 0o17, 010, true, yes, ~, 2020-01-01, '1', 1_000]"
    assert read(text).data == [1, -0.5, 1e-3, float("inf"), 15, 10, True, "yes", None, "2020-01-01", "1", 1000]


def test_an_empty_document_is_none() -> None:
    assert read("# nothing\n").data is None


def test_anchors_stand_for_copies_with_the_place_where_they_are_written() -> None:
    document = read("a: &w {x: 1}\nb: *w\n")
    assert document.data == {"a": {"x": 1}, "b": {"x": 1}}
    assert document.places["b", "x"].value == "1:11"


def test_an_anchor_may_be_set_again() -> None:
    assert read("a: &w 1\nb: &w 2\nc: *w\n").data == {"a": 1, "b": 2, "c": 2}


def test_a_merge_key_fills_in_what_the_mapping_does_not_say() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc:\n  <<: [*a, *b]\n  x: 3\n"
    document = read(text)
    assert document.data["c"] == {"x": 3, "y": 1, "z": 2}  # type: ignore[index]
    assert document.places["c", "y"].value == "1:17"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", r"1:9: not valid YAML: while parsing a flow sequence, expected ',' or ']'"),
        ("a: 1\n b: 2", "2:3: not valid YAML: mapping values are not allowed here"),
        ("a: \x07", r"1:4: not valid YAML: the character '\\x07' is not allowed"),
        ("a: *nothing", "1:4: not valid YAML: found undefined alias 'nothing'"),
        (
            "a: 1\n---\nb: 2",
            "2:1: not valid YAML: expected a single document in the stream, but found another document",
        ),
        ("a: 1\nb: 2\na: 3", r"3:1: the key 'a' stands twice \(first at 1:1\)"),
        ("a: &a [*a]", "1:4: an alias stands inside the very value it refers to"),
        ("[" * 100_000, "1:1: nested too deeply; at most 32 levels are read"),
        ("[" * 40 + "]" * 40, "nested too deeply; at most 32 levels are read"),
        ("x: !!python/object/apply:os.system [ls]", "1:4: the tag '!!python/object/apply:os.system' means nothing"),
        ("x: !!set {a}", "the tag '!!set' means nothing"),
        ("x: !mine 3", "the tag '!mine' means nothing"),
        ("x: !!int abc", "1:4: 'abc' cannot be read as int"),
        (f"x: {'9' * 5000}", "1:4: '9999.*' cannot be read as int"),
        ("[a]: 1", "1:1: a key is a name, not a mapping or a list"),
        ("<<: 3", "1:5: '<<' takes a mapping or a list of mappings"),
        ('x: "\\UFFFFFFFF"', "1:1: not valid YAML"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read(text)


def test_multiplying_aliases_are_refused_before_anything_is_built() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 25))
    with pytest.raises(
        RecipeError, match="5:5: expands to more than 100,000 keys and values, aliases counted as copies"
    ):
        read(bomb)


def test_aliases_that_nest_ever_deeper_are_refused() -> None:
    chain = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 1000))
    with pytest.raises(RecipeError, match="nested too deeply"):
        read(chain)


@given(st.text() | st.text(alphabet="ab:-[]{}&*!|>'\"#%@,? \n\t<=~0.1\\U", max_size=40))
def test_any_text_is_read_or_refused_with_a_merge_error(text: str) -> None:
    with contextlib.suppress(MergeError):
        read(text)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(plain)
def test_what_is_written_reads_back_the_same(data: object) -> None:
    assert read(write_yaml(data)).data == data
