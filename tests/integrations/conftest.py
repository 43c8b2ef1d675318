import logging

import pytest


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "mst_train")
    return lambda: [record.getMessage() for record in caplog.records]
