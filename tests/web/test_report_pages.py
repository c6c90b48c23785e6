"""Every HTML page that a job writes, of runs, models and corpora with hostile names, in a real headless Chromium."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from dermray import reporting
from dermray.corpus.ontology import Ontology
from dermray.evaluate.comparison import run
from dermray.evaluate.report import build
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import CompareConfig, EvaluateConfig
from dermray.evaluate.tasks.contract import Context, scorer
from dermray.evaluate.tasks.kinds import ours
from dermray.reporting import lineage_page, sweep_page
from dermray.tuning.plan import plan_trials
from dermray.tuning.publishing import publish
from dermray.tuning.records import Status, TrialRecord
from tests import raw_corpus
from tests.corpora import write_prepared_corpus
from tests.evaluation import INFO, features_of
from tests.sweeps import CORPORA
from tests.unit.test_prepare_shard import make, reported, settings
from tests.unit.test_tuning_proposals import record, tuned
from tests.web.test_serve_page import CHROMEDRIVER, CHROMIUM

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (CHROMIUM and CHROMEDRIVER), reason="needs a browser: Debian's chromium and chromium-driver"
    ),
]
# Out of an element, an attribute of either quote, a title, a style, a script, a drawing and a comment.
HOSTILE = (
    """'"></title></style></script></svg>--><script>window.owned=1</script><img src=x onerror="window.owned=2">"""
    """<a href="javascript:window.owned=3" id=bait>x</a><svg onload=window.owned=4>"""
    """' onmouseover=window.owned=5 x='{{7*7}}"""
)


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


def lineage(folder: Path) -> str:
    facts = {"status": HOSTILE, "commit": HOSTILE, "kind": "evaluate"}
    nodes = [
        {"id": f"{kind}:{HOSTILE}", "kind": kind, "title": HOSTILE, "uri": HOSTILE, "digest": HOSTILE, "facts": facts}
        for kind in ("corpus", "run", "model")
    ]
    found = [{"node": nodes[0]["id"], "title": HOSTILE, "uri": HOSTILE, "state": "changed", "detail": HOSTILE}]
    edges = [(nodes[0]["id"], nodes[1]["id"]), (nodes[1]["id"], nodes[2]["id"]), (nodes[0]["id"], nodes[2]["id"])]
    return lineage_page.render([[node] for node in nodes], edges, nodes[2]["id"], found)


def sweep(folder: Path) -> str:
    config = tuned(folder, "num_trials=8")
    trials = {trial.name: trial for trial in plan_trials(config, CORPORA)}
    records = [record(number, trial.params) for number, trial in enumerate(trials.values())]
    records[-1] = TrialRecord(records[-1].name, records[-1].params, Status.FAILED, [], HOSTILE, 2)
    publish(config, trials, records, seconds=1.0)
    document = json.loads((folder / "sweep" / "trials.json").read_text())
    for trial in document["trials"]:
        if trial["name"] == document["best"]:
            document["best"] += HOSTILE
        trial["name"] += HOSTILE
        trial["params"][HOSTILE] = HOSTILE + trial["name"]
    return sweep_page.render(document, {"optim.lr": True, HOSTILE: False}, HOSTILE)


def prepared(folder: Path) -> str:
    raw = folder / "raw"
    raw_corpus.write(raw, num_good=12, bad=True)
    with (raw / "metadata.csv").open(newline="") as source:
        rows = list(csv.reader(source))
    header = rows[0]
    for row in (row for row in rows[1:] if len(row) == len(header)):
        for column in ("source_id", "caption", "label"):
            row[header.index(column)] += HOSTILE
    rows += [[f"gone{HOSTILE}", "caption", f"images/{HOSTILE}.jpg", "psoriasis", "II", HOSTILE]]
    with (raw / "metadata.csv").open("w", newline="") as sink:
        csv.writer(sink).writerows(rows)
    config = settings(raw, folder / "out", image_size=64)
    reported(config, make(config)[0])
    return (folder / "out" / "report" / "report.html").read_text()


def evaluated(folder: Path, name: str = "a") -> str:
    if not (folder / "corpus").exists():
        write_prepared_corpus(folder / "corpus", {"train": 48, "val": 40})
    config = EvaluateConfig(model="m", corpus=str(folder / "corpus"), output="o", bootstrap=10, num_draws=2, shots=(1,))
    val, train = (hostile(Samples.load(str(folder / "corpus"), split)) for split in ("val", "train"))
    features = features_of(val, [text for task in ours() for text in scorer(task).texts(val, config)])
    features = replace(features, info=replace(INFO, name=name + HOSTILE, model_digest=name * 64))
    context = Context(config, val, features, (train, features_of(train, [])))
    results = {task: scorer(task).run(context) for task in ours()}
    report = build(context, results, model_uri=f"models/{name}{HOSTILE}", duration_s=1.0)
    report.save(str(folder / f"report-{name}"))
    return report.html


def hostile(samples: Samples) -> Samples:
    labels = [[one.partition(",")[0] + HOSTILE for one in labels] for labels in samples.labels]
    return replace(
        samples,
        ids=[one + HOSTILE for one in samples.ids],
        labels=labels,
        ontology=Ontology.flat({one for each in labels for one in each}),
        captions=[caption and caption + HOSTILE for caption in samples.captions],
        groups={name: [one and one + HOSTILE for one in values] for name, values in samples.groups.items()},
    )


def compared(folder: Path) -> str:
    for name in "ab":
        evaluated(folder, name)
    reports = tuple(str(folder / f"report-{name}") for name in "ab")
    config = CompareConfig(reports=reports, names=(HOSTILE, f"b{HOSTILE}"), output="o", bootstrap=10)
    return run(config).html


def leakage(folder: Path) -> str:
    counted = {"uri": HOSTILE, "split": HOSTILE, "digest": HOSTILE, "num_samples": 9, "num_samples_found": 2}
    counted |= {"num_training_samples": 2, "num_pairs": 2, "num_unreadable": 1}
    side = {"thumbnail": None, "labels": [HOSTILE], "split": HOSTILE, "source": HOSTILE, "source_id": HOSTILE}
    side["sample_id"] = HOSTILE
    shot = {"distance": 2, "same_bytes": False, "same_labels": False, "sides": [side, side]}
    document = {
        "training": counted | {"corpora": [counted, counted]},
        "evaluations": [counted | {"by_training_corpus": [counted, counted]}],
        **{"num_evaluation_samples": 9, "num_evaluation_samples_found": 2, "num_pairs": 2, "max_distance": 6},
        **{"num_pairs_left_out": 1, "max_pairs_of_a_sample": 1},
    }
    sections = [{"name": HOSTILE, "counted": counted, "plot": "", "shots": [shot]}]
    config = {"corpus": HOSTILE, "splits": [HOSTILE]}
    return reporting.render("leakage.html", name=HOSTILE, config=config, document=document, sections=sections)


PAGES: dict[str, Callable[[Path], str]] = {
    **{"lineage": lineage, "sweep": sweep, "prepare": prepared},
    **{"evaluate": evaluated, "compare": compared, "leakage": leakage},
}


def opened(driver: webdriver.Chrome, file: Path, page: str) -> list[str]:
    """The page in the browser; returns what the console says in red."""
    file.write_text(page, encoding="utf-8")
    driver.get_log("browser")
    driver.get(file.as_uri())
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_hostile_names_stay_text(driver, tmp_path, name):
    page = PAGES[name](tmp_path)
    assert "window.owned=2" in page, "the names are not on the page"
    # Nothing of the page is held back by its own policy either.
    assert opened(driver, tmp_path / f"{name}.html", page) == []
    assert driver.execute_script("return window.owned") is None
    assert driver.execute_script("return document.scripts.length") == 1
    for bait in ("#bait", "[onerror]", "[onload]", "[onmouseover]", "img:not([src^='data:'])", "a[href^='javascript']"):
        assert driver.find_elements(By.CSS_SELECTOR, bait) == [], bait
    assert "{{7*7}}" in driver.page_source
    sortable = driver.find_elements(By.CSS_SELECTOR, "table.sortable th")
    if sortable:
        driver.execute_script("arguments[0].click()", sortable[0])
        assert sortable[0].get_attribute("aria-sort") == "ascending", "our own script does not run"


def test_a_script_that_got_onto_a_page_does_not_run(driver, tmp_path):
    """As if a name had not been escaped: the policy is the second lock."""
    page = lineage(tmp_path)
    for place in ("</h1>", "</main>"):
        assert place in page
        page = page.replace(place, f"{HOSTILE}{place}")
    complaints = opened(driver, tmp_path / "page.html", page)
    assert any("Content Security Policy" in one for one in complaints)
    driver.execute_script("document.getElementById('bait').click()")
    assert driver.execute_script("return window.owned") is None
    assert driver.execute_script("return getComputedStyle(document.body).fontFamily") != ""
