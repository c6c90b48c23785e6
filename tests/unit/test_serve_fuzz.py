"""Every endpoint fuzzed from its own OpenAPI document (schemathesis): no 500, and answers as the document says."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS

from dermray.service.fleet.catalogue import Catalogue
from dermray.service.http.auth import Access
from dermray.service.http.origins import Origins
from dermray.service.http.routes import create_app
from dermray.service.settings import LimitsConfig
from tests.serving import DummyBackend

access = Access(origins=Origins(allowed_hosts=("testserver",)))
app = create_app(Catalogue.of(DummyBackend()), LimitsConfig(), access=access)
schema = schemathesis.openapi.from_asgi("/openapi.json", app)
CHOSEN = [
    check
    for check in CHECKS.get_all()
    if check.__name__
    in {"not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"}
]


@schema.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_the_service(case):
    assert len(CHOSEN) == 4
    case.call_and_validate(checks=CHOSEN)
