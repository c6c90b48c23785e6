"""Names that forge lines of a log or move the cursor of a terminal."""

from __future__ import annotations

import logging

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from dermray.config import parse
from dermray.corpus.accounts import told_in_words
from dermray.entry import run_job
from dermray.errors import CorpusError
from dermray.prepare.pipeline import look
from dermray.prepare.settings import PrepareConfig
from dermray.printable import printable
from dermray.service.fleet.catalogue import Catalogue
from dermray.service.http.auth import Access, _digest
from dermray.service.http.routes import create_app
from dermray.service.settings import LimitsConfig, ServeArgumentError
from dermray.tracking.lineage import Graph, Node
from tests import raw_corpus
from tests.serving import LOCAL, DummyBackend

FORGED = "a\nerror: forged\r\x1b[2J\x1b]0;owned\x07\x9b31m\u202egpj.\u2028\x00\ud800"


@given(st.text())
def test_any_text_is_one_line_and_letters_stay(text):
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert shown.encode().decode() == shown
    assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in shown)
    assert printable(shown) == shown


def test_letters_of_all_languages_stay():
    text = "naevus, na\u00efve, \u57fa\u5e95\u7d30\u80de\u764c, \u0633\u0631\u0637\u0627\u0646, \U0001f600 \\n"
    assert printable(text) == text


def test_an_error_is_one_line_whatever_it_names(capsys):
    def main() -> int:
        raise CorpusError(f"the file {FORGED} is damaged")

    assert run_job(main) == CorpusError("").exit_code
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "\x1b" not in shown
    assert len(ServeArgumentError(f"model {FORGED}").message.splitlines()) == 1


def test_a_chain_of_lineage_has_a_line_for_each_thing():
    node = Node(
        id="run:1", kind="run", title=FORGED.replace("\ud800", ""), uri=FORGED, facts={"status": FORGED, "kind": FORGED}
    )
    shown = Graph("run:1", {"run:1": node}).text()
    assert "\x1b" not in shown
    assert len(shown.splitlines()) == 5


def test_labels_forge_no_line_of_a_preparation(tmp_path, capsys):
    raw_corpus.write(tmp_path / "raw", num_good=12)
    table = tmp_path / "raw" / "metadata.csv"
    table.write_text(table.read_text().replace("melanoma", "melanoma\x1b[2J\x9b31m\u202e"))
    arguments = ["source=csv", f"input={tmp_path / 'raw'}", f"output={tmp_path / 'out'}"]
    look(parse(PrepareConfig, arguments))
    shown = capsys.readouterr().out
    assert "make classes of their own: melanoma\\x1b[2j" in shown.lower()
    assert not {"\x1b", "\x9b", "\u202e"} & {*shown}


def test_an_account_of_samples_is_one_line():
    shown = told_in_words({"in": 5, "used": 2, "told": {FORGED: 3}})
    assert len(shown.splitlines()) == 1
    assert "\x1b" not in shown


@pytest.mark.parametrize("path", ["%0aERROR%20forged", "%1b%5b2J", "%e2%80%a8x", "%0d%0aX-Forged:%201"])
def test_what_a_request_calls_itself_forges_no_record(caplog, path):
    class Broken(dict):
        def get(self, name, default=None):
            raise RuntimeError("no memory")

    token = "a-token-of-an-administrator"
    access = Access(admin_tokens=(_digest(token),))
    app = create_app(Catalogue.of(DummyBackend()), LimitsConfig(), access=access)
    object.__setattr__(app.state.service, "rollouts", Broken())
    with TestClient(app, base_url=LOCAL) as client:
        headers = {"Authorization": f"Bearer {token}", "User-Agent": "\x1b[2J", "X-Request-ID": "\x1b[2J"}
        answer = client.post(f"/v1/admin/models/{path}/rollback", headers=headers)
    assert answer.status_code == 500
    assert "X-Forged" not in answer.headers
    (message,) = [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR]
    assert message.startswith("POST /v1/admin/models/")
    assert message.isprintable()
    assert token not in caplog.text
