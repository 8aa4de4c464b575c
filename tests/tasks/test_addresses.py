"""Passwords in addresses are never said, and what a server or store refuses is one clear message."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from heal.errors import HealError
from tasks import registry, state
from tasks.addresses import public
from tasks.mlflow_client import AnswerError
from tasks.mlflow_store import UnreachableError
from tasks.store import Store, StoreError

SECRET = "s3cret"


class Refusing(BaseHTTPRequestHandler):
    """Says that it is well; any other request is answered by `status`, or by closing the connection."""

    status: int | None = None

    def do_GET(self) -> None:
        status = 200 if self.path == "/health" else self.status
        if status is None:
            self.connection.close()
            return
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"no")

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""


@pytest.fixture(params=[401, 503, None])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int | None]:
    """What a server at MLFLOW_TRACKING_URI answers; it takes a password."""
    handler = type("Handler", (Refusing,), {"status": request.param})
    with HTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@127.0.0.1:{listening.server_port}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield request.param
        listening.shutdown()


def test_what_a_server_refuses_is_said_without_the_password(server: int | None) -> None:
    refused = AnswerError if server == 401 else UnreachableError
    with pytest.raises(refused, match=r"MLflow at http://127\.0\.0\.1:\d+: ") as caught:
        registry.resolve("models:/toy@dense")
    assert SECRET not in str(caught.value) and caught.value.__suppress_context__


def test_the_command_line_says_it_in_one_message(server: int | None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "doctor"], capture_output=True, text=True, env=os.environ, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said and SECRET not in said
    assert "MLflow at http://127.0.0.1" in said


def test_an_address_that_mlflow_does_not_take_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path))
    with pytest.raises(HealError, match="MLflow at"):
        registry.aliases("toy")


def test_a_stores_address_is_said_without_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_STORE", f"memory://user:{SECRET}@host/x")
    assert Store().url == "memory://host/x"
    monkeypatch.setenv("REGROW_STORE", f"nosuch://user:{SECRET}@host/x")
    with pytest.raises(StoreError, match="nosuch://host/x") as caught:
        Store()
    assert SECRET not in str(caught.value)


def test_an_address_is_all_that_is_taken_out() -> None:
    assert public("ask http://a:b@host:1/c and s3://bucket/x@y, not me@home") == (
        "ask http://host:1/c and s3://bucket/x@y, not me@home"
    )
    assert public(str(state.home())) == str(state.home())
