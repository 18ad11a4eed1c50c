"""Requests drawn from the OpenAPI description: none is answered with 500, each answer is as described."""

from __future__ import annotations

import logging
from pathlib import Path

import hypothesis
import schemathesis
from schemathesis import checks
from schemathesis.specs.openapi.checks import response_schema_conformance

from tests.services import running

ROUTES = ["/search", "/rerank", "/context", "/documents", "/feedback", "/v1/completions", "/ready"]


def test_no_request_that_the_description_allows_or_forbids_gives_500(tmp_path: Path) -> None:
    asked: set[str] = set()
    with running(tmp_path, patience=5.0) as service:
        schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()
            asked.add(operation.path)

            @hypothesis.settings(
                max_examples=25,
                deadline=None,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
                phases=[hypothesis.Phase.generate],
            )
            @hypothesis.given(
                case=operation.as_strategy()
                | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
            )
            def attempt(case: schemathesis.Case) -> None:
                answer = case.call(base_url=service.url)
                assert answer.status_code != 500, answer.text
                case.validate_response(
                    answer,
                    checks=[checks.not_a_server_error] if answer.status_code not in (503, 507) else [],
                    additional_checks=[response_schema_conformance],
                )

            attempt()
        logging.getLogger("resonance.service").info("%d operations", len(asked))
    assert asked >= set(ROUTES)
