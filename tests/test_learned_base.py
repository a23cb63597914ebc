"""The interface of modules with weights: counts, checks, the registry, saving and loading."""

import inspect
import shutil
from dataclasses import dataclass

import huggingface_hub
import pytest
import torch
from torch import nn

from vtc.learned import (
    LearnedModule,
    Resampler,
    build,
    from_pretrained,
    get_module,
    list_modules,
    register_module,
)
from vtc.learned.base import square, told
from vtc.learned.registry import _modules


class First(Resampler):
    """The first k tokens, projected."""

    name = "first"
    ordered = True

    @dataclass(frozen=True)
    class Config:
        in_width: int = 6
        out_width: int = 4
        sizes: tuple[int, ...] = (1, 2)

    def __init__(self, config):
        super().__init__(config)
        self.proj = nn.Linear(config.in_width, config.out_width)

    def forward(self, x, grid, k=None, levels=()):
        k = self.checked(x, grid, k, levels)
        return self.proj(x[:, :k])


class Leveled(First):
    """The same with two further layers."""

    name = "leveled"
    prefixes = ("model.part.", "part.")
    layers = (3, 5)


@pytest.fixture
def known():
    """Registers the two for one test."""
    for cls in (First, Leveled):
        register_module(cls)
    yield
    for cls in (First, Leveled):
        _modules.all().pop(cls.name)


def weights(module):
    return {key: torch.randn_like(value) for key, value in module.state_dict().items()}


def test_any_number_of_tokens_by_default():
    module = First(First.Config())
    assert (module.in_width, module.out_width, module.layers) == (6, 4, ())
    assert list(module.counts(3)) == [1, 2, 3] and list(module.counts_for((2, 3))) == [1, 2, 3, 4, 5, 6]
    x = torch.randn(2, 6, 6)
    assert module(x, (2, 3)).shape == (2, 6, 4)
    assert torch.equal(module(x, (2, 3), 4), module(x, (2, 3))[:, :4])


@pytest.mark.parametrize(
    "shape, grid, k, levels, message",
    [
        ((2, 6, 5), (2, 3), None, 0, "features (B, N, 6)"),
        ((6, 6), (2, 3), None, 0, "features (B, N, 6)"),
        ((2, 6, 6), (2, 4), None, 0, "6 tokens are no grid of 2 rows and 4 columns"),
        ((2, 6, 6), (-2, -3), None, 0, "no grid"),
        ((2, 0, 6), (0, 4), None, 0, "no grid"),
        ((2, 6, 6), (2, 3), 7, 0, "of 2 x 3 tokens, first makes 1 to 6 tokens, not 7"),
        ((2, 6, 6), (2, 3), 0, 0, "not 0"),
        ((2, 6, 6), (2, 3), None, 1, "reads 0 further layers (), not 1"),
    ],
)
def test_what_does_not_fit_is_told(shape, grid, k, levels, message):
    module = First(First.Config())
    with pytest.raises(ValueError) as error:
        module(torch.randn(shape), grid, k, [torch.randn(shape)] * levels)
    assert message in str(error.value)


def test_a_count_is_a_whole_number():
    module, x = First(First.Config()), torch.randn(2, 6, 6)
    assert module(x, (2, 3), torch.tensor(2)).shape == (2, 2, 4)
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        module(x, (2, 3), 2.0)


def test_further_layers_are_as_many_and_as_large_as_named():
    module, x = Leveled(Leveled.Config()), torch.randn(2, 6, 6)
    assert module(x, (2, 3), levels=[x, x]).shape == (2, 6, 4)
    with pytest.raises(ValueError, match=r"reads 2 further layers \(3, 5\), not 0"):
        module(x, (2, 3))
    with pytest.raises(ValueError, match=r"further layers have the shape \(2, 6, 6\)"):
        module(x, (2, 3), levels=[x, x[:, :4]])


def test_a_draw_is_a_possible_count_and_the_same_from_the_same_seed():
    module = First(First.Config())
    draws = [
        [module.draw((2, 3), generator) for _ in range(300)]
        for generator in (torch.Generator().manual_seed(s) for s in (0, 0, 1))
    ]
    assert draws[0] == draws[1] != draws[2]
    assert set(draws[0]) == {1, 2, 3, 4, 5, 6}


def test_numbers_in_words():
    assert told(range(1, 9)) == "1 to 8"
    assert told((4,)) == "4" and told((1, 4, 9)) == "1, 4 or 9"
    assert told(tuple(range(0, 40, 2))) == "0, 2, 4, 6, 8, ..., 30, 32, 34, 36 or 38"
    assert square(36) == (6, 6)
    for n in (0, 35):
        with pytest.raises(ValueError, match="no square grid"):
            square(n)


def test_a_module_takes_its_own_configuration():
    with pytest.raises(TypeError, match=r"First takes a First\.Config"):
        First({"in_width": 3})


def test_registry(known):
    assert {"first", "leveled", "mqt", "m3"} <= set(list_modules())
    assert list_modules() == sorted(list_modules())
    assert get_module("first") is First and register_module(First) is First
    assert build("first", in_width=3).in_width == 3
    with pytest.raises(ValueError, match="no option 'in_size'; it has in_width, out_width, sizes"):
        build("first", in_size=3)
    with pytest.raises(ValueError, match=r"did you mean .*'leveled'"):
        get_module("levelled")
    with pytest.raises(ValueError, match=r"known: .*first"):
        get_module("xyzw")
    with pytest.raises(
        ValueError, match=r"a module named 'mqt' exists already \(vtc.learned.projectors.mqt\)"
    ):
        register_module(type("Other", (First,), {"name": "mqt"}))


def test_every_module_says_what_it_is():
    for name in list_modules():
        cls = get_module(name)
        assert issubclass(cls, LearnedModule) and cls.name == name
        assert cls.Config.__dataclass_params__.frozen
        first, *rest = inspect.getdoc(cls).splitlines()  # which tables show: one sentence
        assert first.endswith(".") and ". " not in first and rest[:1] in ([], [""]), first
        assert len(first) <= 106, first


def test_saved_and_loaded(known, tmp_path):
    module = First(First.Config(in_width=3, sizes=(5, 6))).train()
    module.load_state_dict(weights(module))
    module.save_pretrained(tmp_path / "a" / "b")
    for load in (from_pretrained, First.from_pretrained, Resampler.from_pretrained):
        loaded = load(tmp_path / "a" / "b")
        assert type(loaded) is First and loaded.config == module.config and not loaded.training
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in module.state_dict().items())


def test_pushed_to_the_hub(known, tmp_path, monkeypatch):
    """What is uploaded is what `from_pretrained` reads."""
    made = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, name, **how: made.append((name, how))
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path, **how: shutil.copytree(folder_path, tmp_path / repo_id),
    )
    module = First(First.Config())
    assert module.push_to_hub("who/first", private=True) == "https://huggingface.co/who/first"
    assert made == [("who/first", {"private": True, "exist_ok": True})]
    loaded = from_pretrained(tmp_path / "who" / "first")
    assert torch.equal(loaded.proj.weight, module.proj.weight)


def test_half_precision_comes_back_as_values(known, tmp_path):
    module = First(First.Config()).to(torch.bfloat16)
    module.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert module.dtype == torch.bfloat16 and loaded.dtype == torch.float32
    assert torch.equal(loaded.proj.weight, module.proj.weight.float())


def test_a_wrong_module_is_named(known, tmp_path):
    First(First.Config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a module 'first', not 'leveled'"):
        Leveled.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a module 'first', not 'mqt'"):
        get_module("mqt").from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"module": "frist", "options": {}}')
    with pytest.raises(ValueError, match="no module 'frist'; did you mean 'first'"):
        from_pretrained(tmp_path)


def test_weights_are_loaded_strictly(known, tmp_path):
    First(First.Config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of another shape proj.weight \(1\)"):
        First.from_pretrained(tmp_path, in_width=7)
    file, state = tmp_path / "w.bin", weights(First(First.Config()))
    torch.save({"proj.weight": state["proj.weight"], "other": state["proj.bias"]}, file)
    with pytest.raises(ValueError, match=r"without proj.bias \(1\); with unknown other \(1\)"):
        First.from_pretrained(file)


def test_published_weights_out_of_a_model(known, tmp_path):
    state = weights(First(First.Config()))
    whole = {f"model.part.{key}": value for key, value in state.items()} | {"lm.weight": torch.ones(3)}
    torch.save(whole, tmp_path / "one.bin")
    loaded = Leveled.from_pretrained(tmp_path / "one.bin")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in state.items())
    shards = tmp_path / "shards"
    shards.mkdir()
    for i, key in enumerate(whole):
        torch.save({key: whole[key]}, shards / f"pytorch_model-{i}.bin")
    (shards / "config.json").write_text('{"model_type": "llava"}')
    loaded = Leveled.from_pretrained(shards)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in state.items())
    with pytest.raises(ValueError, match="does not say which module it is"):
        from_pretrained(shards)


def test_what_cannot_be_read_is_told(known, tmp_path):
    with pytest.raises(OSError, match="no folder or file"):
        from_pretrained(tmp_path / "none")
    with pytest.raises(OSError, match="could not be fetched from the Hub"):
        from_pretrained("nobody/nothing")  # the tests are offline
    with pytest.raises(OSError, match="holds no weights"):
        First.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        First(First.Config()).save_pretrained(tmp_path / "file")
    torch.save({"a": First}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="would run code"):
        First.from_pretrained(tmp_path / "bad.pt")
    (tmp_path / "config.json").write_text('{"module": "first", "options": {}}')
    with pytest.raises(OSError, match="no file"):
        from_pretrained(tmp_path)
