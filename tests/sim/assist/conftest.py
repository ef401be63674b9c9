"""CDS Hooks: a model that answers everybody with the same list, and a client of its services."""

import pytest
from cds_replies import Stub
from cds_requests import TODAY
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sim.assist.cds_hooks import cds_routes


@pytest.fixture
def model():
    return Stub()


@pytest.fixture
def client(model):
    app = FastAPI()
    app.include_router(cds_routes(model, today=lambda: TODAY))
    with TestClient(app) as asking:
        yield asking
