from __future__ import annotations

import json

import pytest

from .builders import run, succeeds, tree

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def merged(recipe, tmp_path):
    succeeds("merge", recipe, "out")
    return tmp_path / "out"


def test_it_says_what_was_proven(merged) -> None:
    before = tree(merged)
    lines = succeeds("verify", "out").splitlines()
    assert lines[0] == "out: verified"
    assert lines[1] == "  hashes      5 of the output, 4 of the inputs compared with the manifest"
    assert lines[2] == "  modules     4 read: as the report has them, every value finite"
    assert lines[3] == "  recomputed  4 modules, 4 of them to the same bits; largest error 0"
    assert lines[4].startswith(
        "  note        as method and rank have it, updates differ from the exact weighted sum by"
    )
    assert tree(merged) == before


def test_without_recomputation_inputs_may_be_gone(merged, tmp_path) -> None:
    (tmp_path / "code").rename(tmp_path / "moved")
    result = run("verify", "out")
    assert result.exit_code == 2
    assert "  source      code: cannot be opened: " in result.stdout
    out = succeeds("verify", "out", "--no-recompute")
    assert "  hashes      5 of the output, 2 of the inputs compared with the manifest" in out
    assert "  recomputed  no" in out
    assert "  note        input 'code' was not checked: " in out


def test_a_fault_is_named_and_ends_with_status_2(merged) -> None:
    data = bytearray((merged / WEIGHTS).read_bytes())
    data[-1] ^= 0x40
    (merged / WEIGHTS).write_bytes(data)
    result = run("verify", "out")
    assert result.exit_code == 2
    lines = result.stdout.splitlines()
    assert lines[0] == "out: 3 faults"
    assert [line.split()[0] for line in lines[1:4]] == ["output", "scaling", "recomputation"]
    assert "  modules        4 read" in lines


def test_json_has_all_of_it(merged) -> None:
    (merged / "README.md").unlink()
    result = run("verify", "out", "--json", "--quiet")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert (found["schema_version"], found["location"], found["is_ok"]) == (1, "out", False)
    assert [(own["kind"], own["where"]) for own in found["faults"]] == [("output", "README.md")]
    assert [own["is_identical"] for own in found["recomputed"]] == [True] * 4


def test_many_faults_of_a_kind_are_shortened(merged) -> None:
    manifest = json.loads((merged / "manifest.json").read_text())
    manifest["outputs"] += [{"name": f"file{n}", "bytes": 1, "sha256": "0"} for n in range(25)]
    (merged / "manifest.json").write_text(json.dumps(manifest))
    lines = run("verify", "out").stdout.splitlines()
    assert lines[0] == "out: 25 faults"
    assert sum("is missing; the manifest has 1 bytes" in line for line in lines) == 20
    assert any(line.endswith("… and 5 more; --json has all") for line in lines)


def test_what_no_merge_made_is_an_error(math) -> None:
    result = run("verify", "math")
    assert result.exit_code == 2
    assert "error: math: has no manifest.json; expected what a merge has made." in result.stderr


@pytest.mark.parametrize("option", [("--executor", "nobody"), ("--workers", "0"), ("--memory", "much")])
def test_options_that_mean_nothing_are_refused(merged, option) -> None:
    assert run("verify", "out", *option).exit_code == 2


def test_a_merge_verifies_what_it_has_made_when_asked(recipe, tmp_path) -> None:
    result = run("merge", recipe, "out", "--verify")
    assert result.exit_code == 0, result.output
    assert "verified: hashes 5 of the output, 4 of the inputs compared with the manifest" in result.stderr
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_parts_are_verified_by_finalize(recipe) -> None:
    for part in ("0/2", "1/2"):
        succeeds("merge", recipe, "out", "--shard", part)
    result = run("finalize", "out", "--verify")
    assert result.exit_code == 0, result.output
    assert "verified: " in result.stderr
    assert run("merge", recipe, "again", "--shard", "0/2", "--verify").exit_code == 2
