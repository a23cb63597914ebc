"""A Ray cluster writes the shards that one process writes."""

import logging

import pytest
import ray
from tiny_tokenizers import TINY

from vtc.evaluation.scenes import scene
from vtc.tokenizers import build, tokenize_folder


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
    how = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init("local", num_cpus=1, **how)
    yield
    ray.shutdown()


def test_a_cluster_writes_the_same_shards(tmp_path, cluster, capfd, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(5):
        scene("test", n).image.save(folder / f"{n}.png")
    (folder / "bad.png").touch()
    build("ordered", **TINY["ordered"]).save_pretrained(tmp_path / "weights")
    monkeypatch.chdir(tmp_path)  # where actors are not
    how = {"policy": "mean:3:complexity:jpeg:1,3,6", "shard_size": 2, "device": "cpu", "workers": 1}
    made = tokenize_folder(folder, "weights", out="alone", **how)
    assert tokenize_folder(folder, "weights", out="out", ray=True, **how) == made
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert len(made["lengths"]) > 1
    assert len(files) == 5 and made["unreadable"] == {"bad.png": "the file is empty"}
    (tmp_path / "out" / "shard-000001.safetensors").unlink()
    with pytest.raises(RuntimeError, match="a Ray actor failed: ValueError: there is no device 'abacus'"):
        tokenize_folder(folder, "weights", out="out", ray=True, **how | {"device": "abacus"})
    assert ray.is_initialized()  # a cluster that was not started here stays
    assert "Ray" not in (said := "".join(capfd.readouterr())) and "Traceback" not in said, said
