"""What a configuration of `vtc train` says, and what it must not say."""

import pytest

from vtc.training import read_config

YAML = """
model: models/tiny-llava
module: {name: ordered, tokens: 64, width: 192}
output: runs/ordered
precision: no
data: {train: scenes, n: 20000}
stages:
  - {kind: features, steps: 500, batch_size: 64, learning_rate: 1e-3}
  - {kind: distill, steps: 2000, counts: [1, 4, 64], warmup: 0.1, optim: sgd}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    return path


def test_a_file_is_read(file):
    config = read_config(file)
    features, distill = config.stages
    assert config.precision == "no" and config.data.n == 20000 and config.data.questions == 4
    assert features.learning_rate == 1e-3 and features.batch_size == 64 and features.arguments == {}
    assert distill.counts == (1, 4, 64) and distill.full and distill.arguments == {
        "warmup_steps": 0.1, "optim": "sgd",
    }  # fmt: skip
    assert config.names() == ["1-features", "2-distill"]


def test_what_a_configuration_shows_is_one(file):
    config = read_config(file)
    assert read_config(config.shown()) == config and read_config(config) == config


def test_settings_replace_what_the_file_says(file):
    how = ["stages.1.steps=3", "module.tokens=16", "precision=bf16", "data.skip_broken=true", "output=here"]
    config = read_config(file, how)
    assert config.stages[1].steps == 3 and config.stages[0].steps == 500
    assert config.module == {"name": "ordered", "tokens": 16, "width": 192}
    assert config.precision == "bf16" and config.data.skip_broken and config.output == "here"


@pytest.mark.parametrize(
    "setting, told",
    [
        ("modul=3", "the configuration has no 'modul'; did you mean module"),
        ("data.trian=scenes", "data has no 'trian'; did you mean train"),
        ("data.train=", "data has no 'train'"),
        ("data.n=many", "data.n is a whole number, not 'many'"),
        ("data.questions=0", "data.questions is at least 1"),
        ("model=", "the configuration has no 'model'"),
        ("precision=fp8", "precision is one of no, bf16, fp16"),
        ("module={name: mqt, from: here}", "either a 'name', with options, or 'from'"),
        ("module={from: here, tokens: 3}", "has the options it was saved with"),
        ("stages={}", "the configuration has no 'stages'"),
        ("stages=features", "stages is a list"),
        ("stages.0.kind=feature", "stages.0.kind is one of features, distill, length, not 'feature'"),
        ("stages.0={kind: features}", "stages.0 has no 'steps'"),
        ("stages.0.counts=[1]", "stages.0, of kind features, has no 'counts'"),
        ("stages.0.learning_rat=1", "did you mean learning_rate"),
        ("stages.0.output_dir=x", "stages.0: output_dir cannot be set here"),
        ("stages.0.steps=0", "stages.0.steps is at least 1, not 0"),
        ("stages.0.learning_rate=fast", "stages.0.learning_rate is a number, not 'fast'"),
        ("stages.1.counts=[a]", "stages.1.counts is a list of whole numbers"),
        ("stages.1.counts=[0]", "stages.1.counts is a list of whole numbers from 1 on, not [0]"),
        ("stages.0.gradient_checkpointing=true", "gradient_checkpointing cannot be set here"),
        ("stages.1.logging_first_step=false", "logging_first_step cannot be set here"),
        ("stages.0={kind: length, steps: 1}", "put that one last"),
        ("stages.1.temperature=0", "temperature is positive"),
        ("stages.1.muon=0.01", "muon is a positive rate, and has AdamW beside it: leave optim out"),
        ("stages.0.muon=-1", "muon is a positive rate"),
        ("adapter={ranks: 3}", "adapter has no 'ranks'; did you mean rank"),
        ("stages.1={kind: length, steps: 1, errors: x}", "errors is one of features, answers, not 'x'"),
        ("stages.1.full=1", "stages.1.full is true or false, not 1"),
        ("stages.7.steps=1", "there is no '7'; stages are counted from 0"),
        ("steps", "--set takes key=value"),
        ("module.tokens=[1", "--set module.tokens: '[1' is no value of YAML"),
        ("data.n=-1", "data.n is at least 1, not -1"),
        ("data.n_validation=0", "data.n_validation is at least 1, not 0"),
        ("seed=-1", "seed is a number from 0 to 4294967295, not -1"),
        ("stages.0.learning_rate=.nan", "stages.0.learning_rate is a number from 0 on, not nan"),
        ("stages.0.learning_rate=-1", "stages.0.learning_rate is a number from 0 on, not -1.0"),
        ("stages.1.evaluate=2", "a stage with 'evaluate' needs questions: give data.validation"),
        ("adapter={rank: x}", "adapter.rank is a whole number, not 'x'"),
        ("adapter={rank: 2, alpha: x}", "adapter.alpha is a number, not 'x'"),
    ],
)
def test_wrong_settings_are_told(file, setting, told):
    with pytest.raises(ValueError) as error:
        read_config(file, [setting])
    assert told in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "just words"])
def test_a_file_that_is_no_configuration(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"holds no settings|is no YAML"):
        read_config(path)
    with pytest.raises(OSError):
        read_config(tmp_path / "other.yaml")
