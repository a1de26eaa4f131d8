from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from mergekit_lowrank import RecipeError
from mergekit_lowrank.errors import EvaluationError
from mergekit_lowrank.evaluation import Outcome, load_tasks
from mergekit_lowrank.evaluation.evaluators import evaluators_of

ADAPTER = Path("/adapters/math")
PYTHON = [sys.executable, "-I", "-S", "-c"]
PRINTS = "import sys; print(sys.argv[1])"
WRITES = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.mkdir(); [(p / n).write_text(t) for n, t in %r]"


def outcome(task, adapter=ADAPTER, *, name="arc", timeout=None):
    with evaluators_of(load_tasks({"tasks": {name: task}}), "org/base", timeout) as evaluators:
        return evaluators.outcome(name, adapter)


def printing(text, **settings):
    return {"command": [*PYTHON, PRINTS, text, "{adapter}"], **settings}


def writing(*files, **settings):
    return {"command": [*PYTHON, WRITES % (files,), "{output}", "{adapter}"], **settings}


def refusal(task, **settings):
    with pytest.raises(EvaluationError) as caught:
        outcome(task, **settings)
    return str(caught.value)


RESULTS = json.dumps({"results": {"arc": {"acc,none": 0.25, "n": 4}}})


def test_a_score_is_read_from_what_is_printed(workplace):
    task = printing(RESULTS, score="results.arc.acc,none", count={"path": ["results", "arc", "n"]})
    assert outcome(task) == Outcome(score=0.25, count=4)


def test_a_pattern_takes_its_last_match(workplace):
    task = printing("epoch 1 acc=0.1\nepoch 2 acc=0.25", score={"pattern": r"acc=([\d.]+)"}, count=4)
    assert outcome(task) == Outcome(score=0.25, count=4)


def test_a_score_is_read_from_the_one_file_that_holds_it(workplace):
    files = ("results_2026.json", RESULTS), ("config.json", '{"model": 1}')
    assert outcome(writing(*files, score="results.arc.acc,none")).score == 0.25


def test_examples_are_read_from_the_lines_of_a_file(workplace):
    lines = "\n".join(json.dumps({"doc": k, "acc": k % 2}) for k in range(4))
    files = ("results.json", '{"acc": 0.5}'), ("samples_arc.jsonl", lines)
    task = writing(*files, score="acc", examples={"path": "acc", "file": "samples_*.jsonl"})
    assert outcome(task) == Outcome(score=0.5, examples=(0, 1, 0, 1))


def test_the_output_may_be_a_file(workplace):
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    task = {"command": [*PYTHON, code, "{output}", RESULTS, "{adapter}"], "score": "results.arc.acc,none"}
    assert outcome(task).score == 0.25


def test_files_of_one_name_are_told_apart_by_their_directories(workplace):
    code = (
        "import sys, pathlib\n"
        "for name in 'ab':\n"
        "    path = pathlib.Path(sys.argv[1], name); path.mkdir(parents=True)\n"
        "    (path / 'results.json').write_text('{\"acc\": 0.%d}' % ord(name))\n"
    )
    task = {"command": [*PYTHON, code, "{output}", "{adapter}"]}
    several = "'acc' stands in several files: a/results.json, b/results.json; name one under 'file'"
    assert several in refusal({**task, "score": "acc"})
    assert several in refusal({**task, "score": {"path": "acc", "file": "results.json"}})
    assert outcome({**task, "score": {"path": "acc", "file": "a/results.json"}}).score == 0.97


def test_what_is_printed_stands_in_a_file(workplace):
    code = "import sys; [print('x' * 1000) for _ in range(1000)]; print('acc=0.5'); sys.exit(len(sys.argv) > 2)"
    task = {"command": [*PYTHON, code, "{adapter}"], "score": {"pattern": r"acc=([\d.]+)"}}
    with evaluators_of(load_tasks({"tasks": {"arc": task}}), "org/base", None) as evaluators:
        assert evaluators.outcome("arc", ADAPTER).score == 0.5
        (printed,) = evaluators.scratch.rglob("stdout")
        assert printed.stat().st_size > 1_000_000
    assert refusal({**task, "command": [*task["command"], "fail"]}).endswith("\n  | acc=0.5")


def test_placeholders_are_filled(workplace):
    text = '{{"acc": [1, 0], "said": "{adapter} {base} {task}"}}'.replace("{{", "{").replace("}}", "}")
    code = "import sys, json; d = json.loads(sys.argv[1]); print(json.dumps({d['said']: d['acc']}))"
    task = {"command": [*PYTHON, code, text], "examples": {"path": ["/adapters/math org/base arc"]}}
    assert outcome(task).examples == (1, 0)


def test_a_command_runs_beside_the_tasks_file_and_in_no_shell(write_tasks, workplace):
    (workplace / "elsewhere").mkdir()
    path = write_tasks("tasks: {arc: {command: 'cat acc.json {adapter}', score: acc}}", "elsewhere/tasks.yaml")
    (path.parent / "acc.json").write_text('{"acc": 0.5}')
    with evaluators_of(load_tasks(path), "org/base", None) as evaluators:
        assert evaluators.outcome("arc", Path("/dev/null")).score == 0.5
        with pytest.raises(EvaluationError, match=r"(?s)exit status 1 .*\| cat: '/nowhere; rm x': No such file"):
            evaluators.outcome("arc", Path("/nowhere; rm x"))


def test_one_command_of_several_tasks_runs_once(workplace):
    code = "import sys; open('runs', 'a').write('x'); print('{\"a\": 0.1, \"b\": 0.2}')"
    command = [*PYTHON, code, "{adapter}"]
    tasks = load_tasks({"tasks": {name: {"command": command, "score": name} for name in "ab"}})
    with evaluators_of(tasks, "org/base", None) as evaluators:
        assert [evaluators.outcome(name, ADAPTER).score for name in "ab"] == [0.1, 0.2]
        evaluators.outcome("a", Path("/adapters/code"))
    assert (workplace / "runs").read_text() == "xx"


def test_what_commands_write_is_gone_at_the_end(workplace):
    with evaluators_of(load_tasks({"tasks": {"arc": writing(score="acc")}}), "org/base", None) as evaluators:
        scratch = evaluators.scratch
        assert scratch.is_dir()
    assert not scratch.exists()


def test_a_command_that_fails_is_quoted_with_its_last_lines(workplace):
    code = "import sys; print('\\n'.join(map(str, range(20))), file=sys.stderr); sys.exit(3)"
    said = refusal({"command": [*PYTHON, code, "{adapter}"], "score": "acc"})
    assert said.startswith("task 'arc', adapter /adapters/math: the evaluator ended with exit status 3 (command: ")
    assert said.endswith("\n  | 12\n  | 13\n  | 14\n  | 15\n  | 16\n  | 17\n  | 18\n  | 19")


def test_a_command_that_takes_too_long_ends_with_all_it_started(workplace):
    inner = "import time, pathlib; time.sleep(1); pathlib.Path('late').touch()"
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
    task = {"command": [*PYTHON, code, inner, "{adapter}"], "score": "acc"}
    assert "took longer than 0.3 s" in refusal(task, timeout=0.3)
    time.sleep(1.2)
    assert not (workplace / "late").exists()


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            printing("no JSON", score="acc"),
            "'acc' is not in what the evaluator wrote: its standard output; look at what it writes (command: ",
        ),
        (
            printing('{"acc_norm": 0.5, "n": 4}', score="acc_nrm"),
            "its standard output; the top level has the keys acc_norm, n; did you mean 'acc_norm'? (command: ",
        ),
        (
            writing(("a.json", RESULTS), score="results.arc.acc"),
            "is not in what the evaluator wrote: a.json; 'results.arc' has the keys acc,none, n (command: ",
        ),
        (
            writing(("s.jsonl", '{"acc": 1}\n{"acc": 0}'), examples={"path": "exact", "file": "s.jsonl"}),
            "s.jsonl; the top level has the keys acc (command: ",
        ),
        (printing('{"acc": 1' + "0" * 400 + "}", score="acc"), "expected a finite number or a list of them, found 1"),
        (
            writing(("a.json", '{"acc": 1}'), ("b.json", '{"acc": 0}'), score="acc"),
            "'acc' stands in several files: a.json, b.json; name one under 'file'",
        ),
        (
            writing(score={"path": "acc", "file": "r*.json"}),
            "'acc' is not in what the evaluator wrote: nothing, for no such file was written",
        ),
        (printing("no numbers", score={"pattern": "acc=(.*)"}), "the pattern 'acc=(.*)' is not in what"),
        (printing('{"acc": "high"}', score="acc"), "expected a finite number or a list of them, found 'high'"),
        (printing('{"acc": 0.5}', examples="acc"), "examples: expected a list of outcomes, found 0.5"),
        (printing('{"acc": 53.2}', score="acc", count=500), "the score is 53.2; with a count it is a share of right"),
        (
            printing('{"acc": 50, "right": [1, 0]}', score="acc", examples="right"),
            "the score is 50.0, and the mean of its examples 0.5",
        ),
    ],
)
def test_output_without_a_usable_score_is_refused(workplace, task, said):
    message = refusal(task)
    assert message.startswith("task 'arc', adapter /adapters/math: ")
    assert said in message


def test_a_function_that_fails_is_named_with_its_place(workplace):
    task = {"python": "judging:judge", "arguments": {"task": "arc", "fails": True}}
    assert refusal(task, adapter=None) == (
        "task 'arc', the base: judging:judge raised ValueError: no such benchmark (judging.py:14)"
    )


@pytest.mark.parametrize("status", ["0", "3", "'over'"])
def test_a_function_that_exits_has_failed(workplace, monkeypatch, status):
    (workplace / "leaving.py").write_text(f"import sys\n\ndef judge(adapter, base): sys.exit({status})\n")
    said = refusal({"python": "leaving:judge"})
    sys.modules.pop("leaving")
    assert f"leaving:judge raised SystemExit: {status.strip(chr(39))} (leaving.py:3)" in said


def test_a_module_that_exits_cannot_be_imported(workplace):
    (workplace / "gone.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(RecipeError, match="gone:judge cannot be imported: SystemExit: 0"):
        outcome({"python": "gone:judge"})


def test_a_function_that_returns_no_score_is_refused(workplace):
    (workplace / "mute.py").write_text("def judge(adapter, base): pass\n")
    assert "expected a finite number or a list of them, found None" in refusal({"python": "mute:judge"})


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"python": "judgement:judge"}, "tasks.arc.python: judgement:judge cannot be imported: ModuleNotFoundError"),
        ({"python": "judging:jugde"}, "judging:jugde cannot be imported: AttributeError"),
        ({"python": "judging:RIGHT"}, "judging:RIGHT is not a function, but {"),
        (
            {"command": "lm_evil {adapter}", "score": "acc"},
            "tasks.arc.command: there is no program 'lm_evil'; install it, or write its path",
        ),
        ({"command": "./run.sh {adapter}", "score": "acc"}, "there is no program './run.sh'"),
    ],
)
def test_a_missing_evaluator_is_named_before_any_is_run(workplace, task, said):
    with pytest.raises(RecipeError) as caught:
        outcome(task)
    assert said in str(caught.value)
    assert str(workplace) not in sys.path
