"""Each contract fails where a promise is broken, and only there: one run of pytest over what is broken on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from mergekit_lowrank.testing import FormatContract, SpaceContract, StrategyContract
from tests.testing import broken_formats, broken_spaces, broken_strategies

ROOT = Path(__file__).parents[2]
MODULES = (broken_strategies, broken_spaces, broken_formats)
CONTRACTS = [(module, name) for module in MODULES for name in vars(module) if name.startswith("Test")]


@pytest.fixture(scope="session")
def failures(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str, str]]:
    """(module, class, test) of what failed: of the checks that should, and of all checks of what is sound."""
    report = tmp_path_factory.mktemp("contracts") / "report.xml"
    tests = [node(module, name) for module, name in CONTRACTS]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *tests,
        "-q",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True)
    found = set()
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            module, _, contract = case.attrib["classname"].rpartition(".")
            found.add((module, contract, case.attrib["name"].partition("[")[0]))
    return found


def node(module: ModuleType, name: str) -> str:
    check = getattr(module, name).caught_by
    file = Path(str(module.__file__)).relative_to(ROOT)
    return f"{file}::{name}::{check}" if check else f"{file}::{name}"


@pytest.mark.parametrize(
    ("module", "name"), CONTRACTS, ids=[f"{module.__name__.rpartition('_')[2]}-{name}" for module, name in CONTRACTS]
)
def test_what_is_broken_is_caught_by_the_check_meant_for_it(
    module: ModuleType, name: str, failures: set[tuple[str, str, str]]
) -> None:
    failed = {test for where, contract, test in failures if (where, contract) == (module.__name__, name)}
    check = getattr(module, name).caught_by
    assert failed == ({check} if check else set())


@pytest.mark.parametrize(
    ("module", "contract"),
    [(broken_strategies, StrategyContract), (broken_spaces, SpaceContract), (broken_formats, FormatContract)],
)
def test_every_check_of_a_contract_catches_something(module: ModuleType, contract: type) -> None:
    checks = {name for name in vars(contract) if name.startswith("test_")}
    assert checks == {getattr(where, name).caught_by for where, name in CONTRACTS if where is module} - {None}
