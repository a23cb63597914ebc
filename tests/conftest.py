import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # the models are so small that threads only get in each other's way


@pytest.fixture(autouse=True)
def quiet_and_seeded():
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)


# -- the table of families is what test_families.py shows: a run of all of it compares or writes the table


def pytest_addoption(parser):
    parser.addoption("--families", action="store_true", help="write the table of families from this run")


def pytest_configure(config):
    config.addinivalue_line("markers", "shows(*columns): what a test shows of a family in the table")
    config.families_deselected = False


def pytest_deselected(items):
    if items:
        items[0].config.families_deselected = True


def pytest_collection_finish(session):
    from support import Support

    session.support = Support()
    session.support_due = {item.nodeid for item in session.items if item.get_closest_marker("shows")}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" or report.failed:
        item.session.support.note(item, report.passed)
        item.session.support_due.discard(item.nodeid)


def pytest_sessionfinish(session, exitstatus):
    from support import stored, write

    partial = session.config.families_deselected or any("::" in argument for argument in session.config.args)
    if not getattr(session, "support", None) or not session.support.outcomes:
        return
    if partial or session.support_due or not session.support.complete or session.config.option.collectonly:
        return
    table = session.support.table()
    if session.config.option.families:
        write(table)
    elif table != stored():
        print("\nvtc/hosts/support.json is not what these tests showed: run `make families`")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
