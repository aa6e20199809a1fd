"""The worked example of docs/architecture.md: an experiment in one file, found by all that shows experiments."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from attackroute.analysis import experiment
from command_line import done
from report_runs import make_network, make_pictures

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


@pytest.fixture
def agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the page, as if it lay in the folder of experiments."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    experiment.all_experiments()  # the others, which register themselves once, where they stay
    monkeypatch.setattr(experiment, "_registered", dict(experiment._registered))
    module = ModuleType("attackroute.analysis.experiments.agreement")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, str(PAGE), "exec"), module.__dict__)


@pytest.mark.usefixtures("agreement")
def test_the_example_of_the_page_is_run_written_and_reported(tmp_path: Path) -> None:
    make_network(tmp_path / "net")
    make_pictures(tmp_path / "pictures")
    common = ("--model", tmp_path / "net", "--data", f"folder:{tmp_path / 'pictures'}")
    assert "How many of the route's neurons criteria choose too" in done("analyze", "--help").output
    done("analyze", *common, "--only", "agreement", "--out", tmp_path / "run")
    document = json.loads((tmp_path / "run" / "agreement.json").read_text())
    assert (document["about"]["title"], document["about"]["order"]) == ("Agreement with simple criteria", 90)
    assert list(experiment.all_experiments())[-1] == "agreement"
    assert document["kind"] == "agreement" and document["reading"].startswith("Of the route's neurons, activation")
    with (tmp_path / "run" / "agreement.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(document["rows"]) > 0
    assert all(0 <= row["shared"] <= 1 for row in document["rows"])
    done("report", tmp_path / "run", *common[2:])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Agreement with simple criteria" in page and document["reading"].replace("'", "&#39;") in page
