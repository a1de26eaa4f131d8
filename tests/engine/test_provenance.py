"""What the cards of sources say, and what the header of an output does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_lowrank import plan
from mergekit_lowrank._version import __version__
from mergekit_lowrank.engine.provenance import (
    Licence,
    SourceCard,
    agreed_licence,
    header_metadata,
    licence_warnings,
    named_base,
    source_cards,
)
from mergekit_lowrank.testing import write_tiny_adapter

SHAPES = {"layers.0.q": (4, 4), "layers.1.q": (4, 4)}


def card(directory: Path, text: str) -> SourceCard:
    (directory / "README.md").write_text(text, encoding="utf-8")
    return SourceCard.read("'math'", directory)


class TestReading:
    def test_licence_and_task_are_read(self, tmp_path: Path) -> None:
        text = "---\nlicense: Apache-2.0\npipeline_tag: text-generation\ntags: [a, b]\n---\n# Title\n"
        assert card(tmp_path, text) == SourceCard("'math'", Licence("apache-2.0"), "text-generation")

    def test_another_licence_has_a_name_and_a_link(self, tmp_path: Path) -> None:
        text = "\ufeff---\r\nlicense: other\r\nlicense_name: llama3\r\nlicense_link: https://x.org/l\r\n---\r\n"
        found = card(tmp_path, text).licence
        assert found == Licence("other", "llama3", "https://x.org/l")
        assert [str(found), str(Licence("mit")), str(Licence("other", None, "L"))] == [
            "other (llama3)",
            "mit",
            "other (L)",
        ]

    @pytest.mark.parametrize(
        "text", ["", "# Title\n", "---\n---\n", "---\nlicense:\n---\n", "---\ntags: []\n---\n", "---\na"]
    )
    def test_a_card_may_say_nothing(self, tmp_path: Path, text: str) -> None:
        assert card(tmp_path, text) == SourceCard("'math'")

    def test_there_may_be_no_card_and_no_directory(self, tmp_path: Path) -> None:
        assert SourceCard.read("x", tmp_path) == SourceCard.read("x", None) == SourceCard("x")

    @pytest.mark.parametrize(
        ("front", "problem"),
        [
            ("license: [mit", "README.md:3:1: not valid YAML: while parsing a flow sequence"),
            ("license: mit\nlicense: gpl", "README.md:3:1: the key 'license' stands twice (first at README.md:2:1)"),
            ("license: [mit, gpl]", "README.md: expected one name under 'license', found ['mit', 'gpl']"),
            ("license: 'a | b'", "README.md: expected one name under 'license', found 'a | b'"),
            ("pipeline_tag: 3", "README.md: expected one name under 'pipeline_tag', found 3"),
            (
                'license: other\nlicense_name: "a\\nb"',
                "README.md: expected one name under 'license_name', found 'a\\nb'",
            ),
            ("- license", "README.md:2: expected keys such as 'license'"),
            ("a: !!python/object:os.system {}", "README.md:2:4: the tag"),
        ],
    )
    def test_a_broken_card_says_nothing_and_why(self, tmp_path: Path, front: str, problem: str) -> None:
        found = card(tmp_path, f"---\n{front}\n---\n")
        assert found.licence is None
        assert (found.problem or "").startswith(problem)

    def test_a_card_that_is_a_directory_says_nothing_and_why(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").mkdir()
        assert SourceCard.read("x", tmp_path).problem == "README.md: Is a directory"

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
    @given(content=st.binary(max_size=60).map(lambda front: b"---\n" + front + b"\n---\n") | st.binary(max_size=40))
    def test_any_bytes_are_a_card(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "README.md").write_bytes(content)
        found = SourceCard.read("x", tmp_path)
        assert found.licence is None or found.problem is None


class TestLicences:
    MIT, GPL = SourceCard("'math'", Licence("mit")), SourceCard("'code'", Licence("gpl-3.0"))

    def test_one_that_all_give_is_the_merges(self) -> None:
        none = SourceCard("'x'")
        assert agreed_licence([none, self.MIT, self.MIT]) == Licence("mit")
        assert agreed_licence([none]) is None
        assert list(licence_warnings([none, self.MIT, self.MIT])) == []

    def test_different_ones_are_another_licence_and_are_named(self) -> None:
        assert agreed_licence([self.MIT, self.GPL]) == Licence("other")
        (warning,) = licence_warnings([self.MIT, self.GPL])
        assert "different licences ('math': mit; 'code': gpl-3.0); the model card says 'license: other'" in warning

    def test_other_licences_are_told_apart_by_their_names(self) -> None:
        llama, gemma = (SourceCard("x", Licence("other", name, "L")) for name in ("llama3", "gemma"))
        assert agreed_licence([llama, llama]) == Licence("other", "llama3", "L")
        assert agreed_licence([llama, gemma]) == Licence("other")

    def test_a_card_that_cannot_be_read_is_a_warning(self) -> None:
        (warning,) = licence_warnings([SourceCard("'math'", problem="README.md:3:1: odd"), self.GPL])
        assert warning == "the model card of 'math' cannot be read (README.md:3:1: odd); it counts as giving no licence"


class TestOfAPlan:
    def planned(self, root: Path, *, base: str | None = None, **keys: object):
        paths = [write_tiny_adapter(root / label, SHAPES, base_model="org/base") for label in ("math", "code")]
        first = {"model": str(paths[0]), "parameters": {"weight": [0.5, 1.0]}}
        keys |= {} if base is None else {"base_model": base}
        return plan({"merge_method": "linear", "models": [first, {"model": str(paths[1])}], **keys})

    def test_the_header_says_what_was_merged_and_how(self, tmp_path: Path) -> None:
        assert header_metadata(self.planned(tmp_path)) == {
            "format": "pt",
            "mergekit_lowrank": __version__,
            "merge_method": "linear",
            "base_model": "org/base",
            "sources": json.dumps([{"label": "math", "weight": [0.5, 1.0]}, {"label": "code", "weight": 1.0}]),
        }

    def test_a_directory_that_the_base_is_here_is_not_its_name(self, tmp_path: Path) -> None:
        (tmp_path / "llama").mkdir()
        (tmp_path / "llama" / "README.md").write_text("---\nlicense: llama3\n---\n")
        made = self.planned(tmp_path, base=str(tmp_path / "llama"))
        assert named_base(made.recipe, made.inputs) == "org/base"
        assert source_cards(made.recipe, made.inputs)[2:] == (SourceCard("the base model", Licence("llama3")),)

    @pytest.mark.parametrize("base", ["org/other@v2", "hf:org/other"])
    def test_the_recipe_names_the_base_first(self, tmp_path: Path, base: str) -> None:
        made = self.planned(tmp_path, base=base)
        assert named_base(made.recipe, made.inputs) == "org/other"
        assert len(source_cards(made.recipe, made.inputs)) == 2
