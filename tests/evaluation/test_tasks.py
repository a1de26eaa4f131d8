from __future__ import annotations

import pytest

from mergekit_lowrank import RecipeError
from mergekit_lowrank.evaluation import Find, load_tasks
from mergekit_lowrank.evaluation.tasks import filled

PYTHON = "python: judging:judge"


def problem(path):
    with pytest.raises(RecipeError) as caught:
        load_tasks(path)
    return str(caught.value)


def test_a_command_is_split_into_words_and_a_path_into_keys(write_tasks):
    path = write_tasks(
        """
        base: org/base
        timeout: 60
        tasks:
          arc:
            command: lm_eval --model_args 'pretrained={base},peft={adapter}' --output_path {output}
            score: results.arc.acc
            stderr: {path: [results, arc, "acc_stderr,none"]}
            count: 1000
        """
    )
    task = load_tasks(path).tasks["arc"]
    assert task.command == (
        "lm_eval",
        "--model_args",
        "pretrained={base},peft={adapter}",
        "--output_path",
        "{output}",
    )
    assert task.score == Find(path=("results", "arc", "acc"))
    assert task.stderr == Find(path=("results", "arc", "acc_stderr,none"))
    assert task.count == 1000


def test_tasks_are_read_from_a_mapping(workplace):
    tasks = load_tasks({"tasks": {"arc": {"python": "judging:judge"}}})
    assert load_tasks(tasks) is tasks
    assert tasks.directory == workplace


def test_doubled_braces_and_those_of_json_are_text():
    assert filled('{{task}} {"a": 1} {task}', {"task": "arc"}) == '{task} {"a": 1} arc'


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            "command: run {adaptor}\n    score: acc",
            "tasks.yaml:3:14: tasks.arc.command: unknown placeholder {adaptor}; did you mean {adapter}? ({{adaptor}}",
        ),
        (
            "command: run {adapter} {model}\n    score: acc",
            "unknown placeholder {model}; the placeholders are {adapter}, {base}, {output}, {task}",
        ),
        (
            "command: run {base}\n    score: acc",
            "tasks.arc.command: does not hold {adapter}, so every adapter would get the same score",
        ),
        (
            "command: run {adapter}\n    base_command: run {adapter}\n    score: acc",
            "tasks.arc.base_command: holds {adapter}, and there is none of the base alone",
        ),
        ("command: run {adapter}", "where does the score stand in what it writes? Add score or examples"),
        (
            "command: run {adapter}\n    score: {path: acc, file: '*.json'}",
            "does not hold {output}, below which a file is looked for",
        ),
        ("command: run 'oops {adapter}\n    score: acc", "cannot be split into words: No closing quotation"),
        ("command: [run, 3]\n    score: acc", "expected a command line, or a list of its words, found ['run', 3]"),
        ("command: ''\n    score: acc", "expected a command line, or a list of its words"),
        ("expert: spam", "tasks.arc: expected one evaluator: a command, or a Python function under 'python'"),
        (f"{PYTHON}\n    command: run {{adapter}}", "expected one evaluator"),
        (f"{PYTHON}\n    score: acc", "tasks.arc.score: goes with a command"),
        ("command: run {adapter}\n    score: acc\n    arguments: {a: 1}", "goes with a Python function"),
        ("python: judging.judge", "expected a function as 'module:function', found 'judging.judge'"),
        (f"{PYTHON}\n    exprt: spam", "tasks.yaml:4:5: tasks.arc.exprt: unknown key 'exprt'; did you mean 'expert'?"),
        ("command: run {adapter}\n    score: {pattern: 'acc=.*'}", "has 0 groups; the one group of the expression"),
        ("command: run {adapter}\n    score: {pattern: '('}", "not a regular expression"),
        ("command: run {adapter}\n    score: {file: a.json}", "expected either a path or a pattern"),
        ("command: run {adapter}\n    score: {path: acc, file: /tmp/a}", "expected a glob below {output}, such as"),
        ("command: run {adapter}\n    score: {paht: acc}", "unknown key 'paht'; did you mean 'path'?"),
        (f"{PYTHON}\n    expert: 7", "tasks.arc.expert: expected text that is not empty, found 7"),
    ],
)
def test_a_slip_in_a_task_is_named_with_its_place(write_tasks, task, said):
    assert said in problem(write_tasks(f"tasks:\n  arc:\n    {task}\n"))


def test_all_problems_are_told_together(write_tasks):
    said = problem(write_tasks("timeout: 0\nbsae: x\ntasks:\n  arc: {python: judge}\n"))
    assert said.startswith("3 problems:")
    assert "unknown key 'bsae'; did you mean 'base'?" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a mapping with the key 'tasks', found null"),
        ("tasks: {}", "tasks.yaml:1:8: tasks"),
        ("tasks: [", "not valid YAML"),
        ("base: x", "missing key 'tasks'"),
    ],
)
def test_a_file_without_tasks_is_refused(write_tasks, text, said):
    assert said in problem(write_tasks(text))


def test_a_missing_file_is_named(workplace):
    assert problem(workplace / "none.yaml") == (
        f"{workplace / 'none.yaml'}: cannot be read: No such file or directory; name a file of tasks"
    )


def test_a_file_that_is_not_text_or_far_too_large_is_refused(workplace):
    (workplace / "latin.yaml").write_bytes(b"tasks: \xff")
    assert "not UTF-8 text (byte 7 is 0xff)" in problem(workplace / "latin.yaml")
    (workplace / "large.yaml").write_bytes(b"#" * (1 << 21))
    assert "larger than 1,048,576 bytes" in problem(workplace / "large.yaml")
