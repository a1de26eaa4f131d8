from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mergekit_lowrank.errors import CheckpointError, IncompatibleInputsError, RecipeError
from mergekit_lowrank.formats import PeftFormat
from mergekit_lowrank.formats.tokenizers import (
    TokenizerSource,
    agreed_tokenizer,
    copy_tokenizer,
    is_tokenizer_file,
    tokenizer_files,
)
from mergekit_lowrank.testing import write_tiny_adapter

CONFIG = {"tokenizer_class": "LlamaTokenizer", "padding_side": "left"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "content", "chat_template", "added_tokens", "name", "template"]), inner)
    ),
    max_leaves=8,
)
WHOLE = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<s>"}]}


def source(root: Path, label: str, **files: Any) -> TokenizerSource:
    """A directory with these files; ``__`` in a name stands for a dot, a mapping becomes JSON."""
    directory = root / label
    directory.mkdir()
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        text = json.dumps(content) if isinstance(content, dict) else content
        path.write_text(text, encoding="utf-8")
    return TokenizerSource(label, directory, f"models/{label}")


def names(files: dict[str, Path]) -> dict[str, str]:
    return {name: path.parent.name for name, path in files.items()}


def refusal(*sources: TokenizerSource) -> str:
    with pytest.raises(IncompatibleInputsError) as caught:
        agreed_tokenizer(sources)
    return str(caught.value)


def trained(vocabulary: dict[str, int], **options: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **options)


def test_without_a_tokenizer_there_is_none(tmp_path: Path) -> None:
    assert agreed_tokenizer([]) == {}
    none = TokenizerSource("memory", None)
    assert agreed_tokenizer([none, source(tmp_path, "math", config__json="{}"), source(tmp_path, "code")]) == {}


def test_the_first_that_has_one_gives_its_files(tmp_path: Path) -> None:
    plain = source(tmp_path, "plain")
    math = source(tmp_path, "math", tokenizer_config__json=CONFIG, vocab__txt="a\nb\n")
    assert names(agreed_tokenizer([plain, math])) == {"tokenizer_config.json": "math", "vocab.txt": "math"}


def test_json_is_compared_as_data_and_where_it_was_loaded_from_does_not_matter(tmp_path: Path) -> None:
    math = source(tmp_path, "math", tokenizer_config__json=json.dumps({**CONFIG, "is_local": True}, indent=4))
    code = source(
        tmp_path, "code", tokenizer_config__json={"name_or_path": "x", **dict(reversed(CONFIG.items())), "is_local": 0}
    )
    assert names(agreed_tokenizer([math, code])) == {"tokenizer_config.json": "math"}


def test_what_differs_is_shown_with_its_values(tmp_path: Path) -> None:
    base = source(tmp_path, "base", tokenizer_config__json=CONFIG)
    math = source(tmp_path, "math", tokenizer_config__json={**CONFIG, "padding_side": "right", "model_max_length": 8})
    assert refusal(base, math) == (
        "the tokenizers differ. 'base' and 'math': tokenizer_config.json padding_side: 'left' and 'right'; "
        "tokenizer_config.json model_max_length: absent and 8. Set tokenizer_source to the one to keep: base, 'math'."
    )


def test_tokens_that_differ_are_named_and_the_rest_is_counted(tmp_path: Path) -> None:
    more = {
        "model": {"vocab": {"a": 1, "b": 0, "c": 3}},
        "added_tokens": [{"id": 4, "content": "<pad>"}, {"id": 2, "content": "<s>"}],
    }
    message = refusal(source(tmp_path, "math", tokenizer__json=WHOLE), source(tmp_path, "code", tokenizer__json=more))
    assert "tokenizer.json model vocab a: 0 and 1; tokenizer.json model vocab b: 1 and 0;" in message
    assert "tokenizer.json model vocab c: absent and 3; and 1 more." in message


def test_an_added_token_is_called_by_its_text(tmp_path: Path) -> None:
    more = {**WHOLE, "added_tokens": [{"id": 9, "content": "<pad>"}, *WHOLE["added_tokens"]]}
    message = refusal(source(tmp_path, "math", tokenizer__json=WHOLE), source(tmp_path, "code", tokenizer__json=more))
    assert "tokenizer.json added_tokens '<pad>': absent and {'content': '<pad>', 'id': 9}." in message


def test_every_source_is_compared_with_the_first(tmp_path: Path) -> None:
    one, two, three = (
        source(tmp_path, label, vocab__txt=text) for label, text in (("a", "x"), ("b", "x"), ("c", "y "))
    )
    assert refusal(one, two, three).startswith(
        "the tokenizers differ. 'a' and 'c': vocab.txt: '1 bytes' and '2 bytes'. Set"
    )
    four = source(tmp_path, "d", vocab__txt="zzz")
    assert "'a' and 'c': vocab.txt: '1 bytes' and '2 bytes'. 'a' and 'd': " in refusal(one, two, three, four)


def test_files_that_tokenizer_json_repeats_may_be_lacking(tmp_path: Path) -> None:
    base = source(tmp_path, "base", tokenizer__json=WHOLE, tokenizer__model="binary", added_tokens__json="{}")
    math = source(tmp_path, "math", tokenizer__json=WHOLE)
    assert names(agreed_tokenizer([base, math])) == dict.fromkeys(
        ("added_tokens.json", "tokenizer.json", "tokenizer.model"), "base"
    )
    slow = source(tmp_path, "slow", tokenizer__model="binary")
    assert "'slow': added_tokens.json: 'a file' and absent; tokenizer.json: 'a file' and absent." in refusal(base, slow)


def test_files_that_are_no_json_or_nested_without_end_are_compared_as_bytes(tmp_path: Path) -> None:
    broken = source(tmp_path, "broken", tokenizer_config__json="{", tokenizer__json="[" * 100_000)
    other = source(tmp_path, "other", tokenizer_config__json=CONFIG, tokenizer__json='{"a":' * 100_000)
    assert "tokenizer.json: '100000 bytes' and '500000 bytes'; tokenizer_config.json: '1 bytes'" in refusal(
        broken, other
    )
    assert names(agreed_tokenizer([broken]))["tokenizer_config.json"] == "broken"


class TestChatTemplates:
    def test_one_is_the_same_wherever_it_stands(self, tmp_path: Path) -> None:
        old = source(tmp_path, "old", tokenizer_config__json={**CONFIG, "chat_template": "{{ x }}"})
        new = source(tmp_path, "new", tokenizer_config__json=CONFIG, chat_template__jinja="{{ x }}")
        processor = source(
            tmp_path, "processor", tokenizer_config__json=CONFIG, chat_template__json={"chat_template": "{{ x }}"}
        )
        assert set(agreed_tokenizer([old, new, processor])) == {"tokenizer_config.json"}

    def test_different_ones_are_shown(self, tmp_path: Path) -> None:
        old = source(tmp_path, "old", tokenizer_config__json={**CONFIG, "chat_template": "{{ x }}"})
        new = source(tmp_path, "new", tokenizer_config__json=CONFIG, chat_template__jinja="{{ y }}")
        assert "'old' and 'new': chat template default: '{{ x }}' and '{{ y }}'." in refusal(old, new)

    def test_one_that_only_one_source_has_is_a_difference(self, tmp_path: Path) -> None:
        base = source(tmp_path, "base", tokenizer_config__json=CONFIG)
        math = source(tmp_path, "math", tokenizer_config__json=CONFIG, chat_template__jinja="{{ y }}")
        assert "chat template default: absent and '{{ y }}'." in refusal(base, math)

    def test_named_ones_are_compared_by_name(self, tmp_path: Path) -> None:
        listed = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
        old = source(tmp_path, "old", tokenizer_config__json={**CONFIG, "chat_template": listed})
        new = source(tmp_path, "new", tokenizer_config__json=CONFIG, chat_template__jinja="x")
        assert "chat template tool_use: 'y' and absent." in refusal(old, new)
        (tmp_path / "new" / "additional_chat_templates").mkdir()
        (tmp_path / "new" / "additional_chat_templates" / "tool_use.jinja").write_text("y")
        agreed = agreed_tokenizer([new, old])
        assert list(agreed) == [
            "additional_chat_templates/tool_use.jinja",
            "chat_template.jinja",
            "tokenizer_config.json",
        ]


class TestChosen:
    @pytest.mark.parametrize("chosen", ["code", "models/code"])
    def test_the_named_one_is_taken_whatever_the_others_say(self, tmp_path: Path, chosen: str) -> None:
        base = source(tmp_path, "base", vocab__txt="x")
        code = source(tmp_path, "code", vocab__txt="y")
        assert names(agreed_tokenizer([base, code], chosen)) == {"vocab.txt": "code"}
        assert names(agreed_tokenizer([base, code], "base")) == {"vocab.txt": "base"}

    def test_an_unknown_name_is_refused(self, tmp_path: Path) -> None:
        sources = [source(tmp_path, "math", vocab__txt="x"), source(tmp_path, "code")]
        with pytest.raises(
            RecipeError, match=r"expected base or .* \(did you mean 'math'\?\), found 'maths'; there are"
        ):
            agreed_tokenizer(sources, "maths")
        with pytest.raises(RecipeError, match=r"the base model is no directory here.* or take one of math, code"):
            agreed_tokenizer(sources, "base")

    def test_one_without_a_tokenizer_is_refused(self, tmp_path: Path) -> None:
        sources = [source(tmp_path, "math", vocab__txt="x"), source(tmp_path, "code")]
        with pytest.raises(CheckpointError, match=rf"'code' has no tokenizer: none of .* lies in {tmp_path}/code\."):
            agreed_tokenizer(sources, "code")

    def test_union_is_refused_with_advice(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"'union' would give tokens new rows .* train the inputs with one"):
            agreed_tokenizer([source(tmp_path, "math", vocab__txt="x")], "union")


def test_files_are_copied_to_their_places(tmp_path: Path) -> None:
    math = source(tmp_path, "math", vocab__txt="x", README__md="no part of it")
    (tmp_path / "math" / "additional_chat_templates").mkdir()
    (tmp_path / "math" / "additional_chat_templates" / "tool_use.jinja").write_text("y")
    (tmp_path / "out").mkdir()
    copy_tokenizer(agreed_tokenizer([math]), tmp_path / "out")
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")} == {
        "vocab.txt",
        "additional_chat_templates",
        "additional_chat_templates/tool_use.jinja",
    }
    assert (tmp_path / "out" / "vocab.txt").read_text() == "x"


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    files = agreed_tokenizer([source(tmp_path, "math", vocab__txt="x")])
    (tmp_path / "math" / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"vocab\.txt: cannot be read: No such file"):
        copy_tokenizer(files, tmp_path)


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("tokenizer.json", True),
        ("sentencepiece.bpe.model", True),
        ("vocab.json", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("additional_chat_templates/x/y.jinja", False),
        ("1_Pooling/vocab.txt", False),
        ("config.json", False),
        ("tokenization_custom.py", False),
        ("adapter_model.safetensors", False),
    ],
)
def test_which_files_belong_to_a_tokenizer(name: str, belongs: bool) -> None:
    assert is_tokenizer_file(name) is belongs


def test_an_input_has_the_files_beside_its_own(tmp_path: Path) -> None:
    path = write_tiny_adapter(tmp_path / "math", {"layers.0.q": (2, 2)}, rank=1)
    (path / "vocab.txt").write_text("x")
    checkpoint = PeftFormat().open(path, label="first")
    found = TokenizerSource.of(checkpoint)
    assert (found.label, found.directory) == ("first", path)
    assert list(found.files) == ["vocab.txt"]


def test_what_transformers_saves_is_found_compared_and_loads_again(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "low": 1, "rank": 2}
    for label, options in {"one": {}, "same": {}, "padded": {"pad_token": "<pad>"}}.items():
        tokenizer = trained(vocabulary, **options)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        tokenizer.save_pretrained(tmp_path / label)
    one, same, padded = (TokenizerSource(label, tmp_path / label) for label in ("one", "same", "padded"))
    assert set(tokenizer_files(tmp_path / "one")) == {path.name for path in (tmp_path / "one").iterdir()}
    (tmp_path / "out").mkdir()
    copy_tokenizer(agreed_tokenizer([one, same]), tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("low rank")["input_ids"] == [1, 2]
    assert again.apply_chat_template([{"role": "user", "content": "low"}], tokenize=False) == "low"
    assert "'<pad>'" in refusal(one, padded)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(
    contents=st.lists(st.binary(max_size=30) | JSON.map(lambda data: json.dumps(data).encode()), min_size=2, max_size=2)
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.json"])
def test_any_files_agree_or_are_refused_with_what_differs(tmp_path: Path, name: str, contents: list[bytes]) -> None:
    sources = []
    for label, content in zip(("one", "two"), contents, strict=True):
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / name).write_bytes(content)
        sources.append(TokenizerSource(label, tmp_path / label))
    try:
        found = agreed_tokenizer(sources)
    except IncompatibleInputsError:
        assert contents[0] != contents[1]
        assert refusal(*sources).startswith("the tokenizers differ. 'one' and 'two': ")
    else:
        assert found == {name: tmp_path / "one" / name}
