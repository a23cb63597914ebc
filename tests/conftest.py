import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # for what tests start, too; ahead of libraries that read it once

import pytest
import torch
from support import Outcomes

torch.set_num_threads(1)  # the models are so small that threads only get in each other's way


@pytest.fixture(autouse=True)
def quiet_and_seeded():
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is collected stays to the end: a million objects that need not be searched for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # what counts its objects at the end finds none too many


def pytest_addoption(parser):
    parser.addoption("--families", action="store_true", help="write the table of families from this run")


def pytest_configure(config):
    config.addinivalue_line("markers", "shows(*columns): what a test shows of a family in the table")
    config.pluginmanager.register(Outcomes(config))
