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
