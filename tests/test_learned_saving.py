"""Modules that go to a folder and come back as methods: hosts, plans, names on the Hub, the command line."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from small import small_model
from test_learned_in_host import KINDS, made, prompt

import vtc
from vtc.api import open_model
from vtc.cli import main
from vtc.evaluation.scenes import scene
from vtc.learned import build, from_pretrained, get_module
from vtc.learned.fingerprint import check_host


@pytest.fixture
def folder(tmp_path):
    made("ordered").save_pretrained(tmp_path / "module")
    return str(tmp_path / "module")


def test_a_folder_is_a_method(folder):
    model, inputs = small_model(), prompt()
    with torch.no_grad():
        with vtc.compress(model, made("ordered"), keep=9):
            wanted = model(**inputs).logits
        with vtc.compress(model, folder, keep=9) as handle:
            assert torch.equal(model(**inputs).logits, wanted)
            assert not handle.plan[0][0].module.training and folder in handle.describe()
        with vtc.compress(model, vtc.get_method(folder), keep=9):
            assert torch.equal(model(**inputs).logits, wanted)
        with vtc.compress(model, [(folder, {"keep": 9})]):
            assert torch.equal(model(**inputs).logits, wanted)
    assert vtc.get_method(folder, epsilon=0.2).epsilon == 0.2
    fresh = build("ordered", in_width=32, width=32, heads=2, decoder_width=32, decoder_heads=2)
    assert fresh.as_method().name == "ordered"
    for options in ({"epsilon": 0.2}, {"confidence": 0.9}):
        with pytest.raises(ValueError, match="halting head of this module was not trained"):
            vtc.compress(model, fresh, **options)
    with pytest.raises(ValueError, match="no option 'eps'; its options: epsilon, confidence"):
        vtc.get_method(folder, eps=0.2)


def test_a_name_on_the_hub_is_a_method(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: folder)
    model, inputs = small_model(), prompt()
    with vtc.compress(model, "somebody/module", keep=3) as handle, torch.no_grad():
        model(**inputs)
        assert [len(record.index) for record in handle.last] == [3] * 3


def test_a_file_of_a_module_is_no_folder(folder):
    with pytest.raises(ValueError, match=r"config.json is a file: give the folder of the module, .*module$"):
        vtc.compress(small_model(), f"{folder}/config.json", keep=4)


def test_another_layer_of_the_encoder_is_another_host(folder):
    module = from_pretrained(folder).trained_on(small_model())
    other = small_model()
    other.config.vision_feature_layer = -1
    with pytest.raises(ValueError, match=r"layer -2\), not on this llava \(vision 32, text 32, layer -1\)"):
        vtc.compress(other, module, keep=4)
    del module.host["widths"]["layer"]  # as of an earlier version
    vtc.compress(other, module, keep=4)


def test_what_is_no_module_is_told(tmp_path):
    model = small_model()
    with pytest.raises(ValueError, match=r"holds no module that save_pretrained\(\) wrote"):
        vtc.compress(model, str(tmp_path), keep=3)
    with pytest.raises(OSError, match="could not be fetched from the Hub"):  # the tests are offline
        vtc.compress(model, "nobody/nothing", keep=3)
    with pytest.raises(ValueError, match="there is no method 'tomme'; did you mean 'tome'"):
        vtc.compress(model, "tomme", keep=3)
    with pytest.raises(ValueError, match="'ordered' is a module with weights: give a folder"):
        vtc.compress(model, "ordered", keep=3)


def test_a_plan_names_the_folder(folder, tmp_path):
    model, inputs, path = small_model(), prompt(), tmp_path / "plan.json"
    with torch.no_grad():
        with vtc.compress(model, folder, keep=9, confidence=0.3) as handle:
            wanted = model(**inputs).logits
            vtc.save(handle.plan, path)
        with vtc.compress(model, vtc.load(path)) as handle:
            assert torch.equal(model(**inputs).logits, wanted)
            assert handle.plan[0][0].confidence == 0.3 and handle.keep == 9
    assert json.loads(path.read_text())["steps"][0]["method"] == folder


def test_a_plan_of_weights_that_no_folder_holds_is_refused(folder, tmp_path):
    model, path = small_model(), tmp_path / "plan.json"
    with vtc.compress(model, made("m3")) as handle, pytest.raises(ValueError, match="'m3' is in none: call"):
        vtc.save(handle.plan, path)
    module = from_pretrained(folder)
    with vtc.compress(model, module) as handle:
        vtc.save(handle.plan, path)
        with torch.no_grad():
            module.out_proj.weight.add_(1)
        with pytest.raises(ValueError, match="no longer those in"):
            vtc.save(handle.plan, path)
        module.adapt(model, rank=2)  # which is in no folder either
        module.load_state_dict(from_pretrained(folder).state_dict(), strict=False)
        with pytest.raises(ValueError, match="no longer those in"):
            vtc.save(handle.plan, path)
        module.adapter = None
        vtc.save(handle.plan, path)
        module.save_pretrained(tmp_path / "again")
        vtc.save(handle.plan, path)
    assert json.loads(path.read_text())["steps"][0]["method"] == str(tmp_path / "again")


def test_it_knows_the_host_it_was_trained_on(tmp_path):
    model, other, inputs = small_model(), small_model(seed=1), prompt(1)
    made("ordered").trained_on(model).save_pretrained(tmp_path)
    with vtc.compress(model, str(tmp_path), keep=4), torch.no_grad():
        model(**inputs)
    bare = other(**inputs).logits
    for how in (str(tmp_path), from_pretrained(tmp_path), vtc.get_method(str(tmp_path))):
        with pytest.raises(
            ValueError, match=r"trained on a llava .* other weights than this llava; call mod"
        ):
            vtc.compress(other, how, keep=4)
    assert vtc.api.current(other) is None and torch.equal(other(**inputs).logits, bare)
    with vtc.compress(other, from_pretrained(tmp_path).trained_on(None), keep=4), torch.no_grad():
        assert not torch.equal(other(**inputs).logits, bare)
    from tiny import build as tiny

    gemma = tiny("gemma3")[0]
    with pytest.raises(ValueError, match=r"a llava \(vision 32, text 32, layer -2\), not on this gemma3 \("):
        vtc.compress(gemma, str(tmp_path), keep=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_the_same_host(tmp_path, dtype):
    made("ordered").trained_on(small_model()).save_pretrained(tmp_path)
    vtc.compress(small_model().to(dtype), str(tmp_path), keep=4)
    backwards = made("ordered").trained_on(small_model().to(dtype))
    vtc.compress(small_model(), backwards, keep=4)


def test_training_of_the_language_model_leaves_the_host_what_it_is():
    model, module = small_model(), made("ordered")
    module.trained_on(model)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.mul_(1.5)
    vtc.compress(model, module, keep=4).remove()
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ValueError, match="other weights"):
        vtc.compress(model, module, keep=4)


def test_an_adapter_is_for_one_language_model(tmp_path):
    model, other = small_model(), small_model()
    with torch.no_grad():
        for parameter in other.model.language_model.layers.parameters():
            parameter.mul_(1.5)
    module = made("ordered")
    module.trained_on(model).adapt(model).save_pretrained(tmp_path)
    vtc.compress(model, str(tmp_path), keep=4).remove()
    model.resize_token_embeddings(model.config.text_config.vocab_size + 3)
    vtc.compress(model.to(torch.bfloat16), str(tmp_path), keep=4).remove()
    for how in (module, str(tmp_path)):
        with pytest.raises(ValueError, match=r"whose language model, which its adapter is for, has other"):
            vtc.compress(other, how, keep=4)
    vtc.compress(other, module.trained_on(None), keep=4)


def test_an_encoder_by_itself_is_a_host_too():
    from tiny.encoders import make

    module = made("ordered").trained_on(make("timm-deit"))
    assert module.host["kind"] == "VisionTransformer" and len(module.host["weights"]) > 3
    check_host(module, open_model(make("timm-deit")))
    for other in (make("timm-siglip"), make("timm-deit", seed=1)):
        with pytest.raises(ValueError, match="trained on a VisionTransformer"):
            check_host(module, open_model(other))


def test_the_hosts_numbers_are_few_and_readable(tmp_path):
    made("m3").trained_on(small_model()).save_pretrained(tmp_path)
    host = json.loads((tmp_path / "config.json").read_text())["host"]
    assert host["kind"] == "llava" and host["widths"] == {"vision": 32, "text": 32, "layer": -2}
    assert 4 <= len(host["weights"]) <= 20 and all(len(own) <= 6 for own in host["weights"].values())
    assert from_pretrained(tmp_path).host == host
    assert from_pretrained(tmp_path).trained_on(None).host is None


def test_pushed_to_the_hub_with_its_host(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **how: None)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path, **how: shutil.copytree(folder_path, tmp_path / repo_id),
    )
    module = made("ordered").trained_on(small_model())
    assert module.push_to_hub("who/ordered") == "https://huggingface.co/who/ordered"
    loaded = from_pretrained(tmp_path / "who" / "ordered")
    assert loaded.host == module.host
    with pytest.raises(ValueError, match="trained on"):
        vtc.compress(small_model(seed=1), loaded, keep=4)


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_checkpoints_of_trainings_are_unwrapped(tmp_path, key):
    module = made("tokenflex")
    file = tmp_path / "checkpoint.pth"
    torch.save({key: module.state_dict(), "epoch": 3, "step": torch.tensor(7)}, file)
    loaded = get_module("tokenflex").from_pretrained(file, **KINDS["tokenflex"])
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="holds list, where weights by name were due"):
        get_module("tokenflex").from_pretrained(file, **KINDS["tokenflex"])


def test_the_command_line_takes_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = build(
        "ordered",
        in_width=128,
        tokens=64,
        width=32,
        heads=2,
        decoder_width=32,
        decoder_heads=2,
        error="answers",
    )
    module.save_pretrained("module")
    scene("test", 0).image.save("picture.png")
    asked = ["picture.png", "what colour is the star ?", "--method", "module"]
    assert main(["ask", *asked, "--keep", "9"]) == 0
    assert "9" in capsys.readouterr().out.split()
    assert main(["ask", *asked, "--set", "confidence=0.999"]) == 0
    told = capsys.readouterr().out
    assert "module confidence=0.999" in told and "64" in told.split()
    drawn = ["draw", "picture.png", "--method", "module", "--keep", "16", "-o", "drawn.png"]
    assert main(drawn) == 0 and (tmp_path / "drawn.png").is_file()
    assert main(["draw", "picture.png", "--method", "module/"]) == 0
    assert (tmp_path / "picture-module.png").is_file()
    capsys.readouterr()
    assert main(["profile", "picture.png", "--method", "module", "--keep", "16"]) == 0
    assert "llm_tokens" in capsys.readouterr().out
    sweep = ["sweep", "--methods", "module", "--keeps", "16", "--questions", "2", "--baselines"]
    assert main([*sweep, "--output", "results.jsonl"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert any("module" in json.dumps(row) for row in rows)
    capsys.readouterr()
    assert main(["ask", *asked, "--keep", "100"]) == 2
    assert "of 12 x 12 tokens, ordered makes 1 to 64 tokens, not 100" in capsys.readouterr().err


def test_another_models_folder_is_not_written_over(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds another model, which would be lost"):
        made("m3").save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "file, text, told",
    [
        ("model.safetensors", "", "model.safetensors is damaged"),
        ("config.json", "{", "is no JSON"),
        ("config.json", {"host": {}}, "its 'host' is not what"),
        ("config.json", {"host": "llava"}, "its 'host' is not what"),
        ("config.json", {"options": None}, "its 'options' is not what"),
        ("config.json", {"adapter": {"rank": 2}}, "its 'adapter' is not what"),
        ("config.json", {"options": {"tokens": "x"}}, "tokens of ordered is a whole number, not 'x'"),
        ("config.json", {"options": {"epsilon": "x"}}, "epsilon of ordered is a number, not 'x'"),
    ],
)
def test_a_damaged_folder_is_told(folder, file, text, told):
    path, model = Path(folder) / file, small_model()
    if isinstance(text, dict):
        text = json.dumps(json.loads(path.read_text()) | text)
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        vtc.compress(model, folder, keep=4)
    assert vtc.api.current(model) is None


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_a_damaged_file_of_published_weights_is_told(tmp_path, content):
    (tmp_path / "weights.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged, or no file|is no file of weights"):
        get_module("mqt").from_pretrained(tmp_path / "weights.bin")
