"""Classification counts what the model says, at exactly the tokens and operations that a row names."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import vtc
from vtc import cli
from vtc.encoder_cost import encoder_cost, twin
from vtc.evaluation.board import boards
from vtc.evaluation.classifiers import _outputs, open_classifier
from vtc.evaluation.classify import sweep_encoder
from vtc.evaluation.pictures import load_pictures
from vtc.evaluation.report import update_readme
from vtc.evaluation.scenes import CLASSES, scene, singles
from vtc.evaluation.tables import encoder_lines, left_blocks, legend
from vtc.schedule import counts

CLIP = "models/tiny-clip"
N, DEPTH, WIDTH, INNER = 144, 6, 128, 384  # tiny-clip's tower: patches, blocks, width, width of the MLP


@pytest.fixture(autouse=True)
def root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture(scope="module")
def clip():
    return open_classifier(CLIP, "cpu")


@pytest.fixture
def folder(tmp_path):
    """Six pictures in three classes."""
    for i, (index, _) in enumerate(singles("test", 6)):
        place = tmp_path / "pictures" / ("red_ring", "blue_star", "cat")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        scene("test", index).image.save(place / f"{i}.png")
    return tmp_path / "pictures"


def run(classifier, methods, keeps, tasks, output, **options):
    options = {"repeats": 1, "progress": False, "command": "test", "baselines": (), **options}
    return sweep_encoder(classifier, methods, keeps, tasks, output=output, **options)


# -- pictures


def test_a_folder_is_a_task(folder):
    (folder / "notes.txt").write_text("no class")
    (folder / "cat" / "notes.txt").write_text("no picture")
    (folder / "cat" / "more").mkdir()
    (folder / "cat" / "2.png").rename(folder / "cat" / "more" / "2.PNG")
    task = load_pictures(f"imagefolder:{folder}")
    assert task.classes == {"blue_star": "blue star", "cat": "cat", "red_ring": "red ring"}
    found = [(item.answer, item.where) for item in task.items]
    assert found == [
        ("blue_star", "blue_star/1.png"), ("cat", "cat/5.png"), ("red_ring", "red_ring/0.png"),
        ("blue_star", "blue_star/4.png"), ("cat", "cat/more/2.PNG"), ("red_ring", "red_ring/3.png"),
    ]  # fmt: skip
    assert task.items[0].open().size == (96, 96)
    few = load_pictures(f"imagefolder:{folder}", 3)
    assert {item.answer for item in few.items} == set(few.classes)
    (folder / "classes.txt").write_text("cat house cat\nblue_star\ta star, blue\nred_ring ring\nunused x\n")
    named = load_pictures(f"imagefolder:{folder}")
    assert named.classes == {"blue_star": "a star, blue", "cat": "house cat", "red_ring": "ring"}
    assert named.fingerprint != task.fingerprint and [i.where for i in named.items] == [w for _, w in found]
    (folder / "classes.txt").write_text("cat house cat")
    with pytest.raises(ValueError, match=r"names 2 of the folders not, such as 'blue_star'"):
        load_pictures(f"imagefolder:{folder}")


def test_folders_of_numbers_and_of_imagenet(tmp_path):
    for name in ("10", "9", "0"):
        (tmp_path / "numbers" / name).mkdir(parents=True)
    scene("test", 0).image.save(tmp_path / "numbers" / "0" / "a.png")
    assert list(load_pictures(f"imagefolder:{tmp_path}/numbers").classes) == ["0", "9", "10"]
    for name in ("n01440764", "n99999999"):
        (tmp_path / "wnids" / name).mkdir(parents=True)
    scene("test", 0).image.save(tmp_path / "wnids" / "n01440764" / "a.png")
    words = {"n01440764": "tench", "n99999999": "n99999999"}
    assert load_pictures(f"imagefolder:{tmp_path}/wnids").classes == words


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("scenes", ValueError, "no task 'scenes' of classes; known: singles, imagefolder:PATH"),
        ("imagefolder:", ValueError, "no task"),
        ("imagefolder:missing", OSError, "missing"),
        ("imagefolder:vtc", ValueError, "vtc has no sub-folders with pictures"),
    ],
)
def test_what_is_no_task_is_refused(name, error, message):
    with pytest.raises(error, match=message):
        load_pictures(name)


def test_singles_are_a_task():
    task = load_pictures("singles", 20, "validation")
    assert tuple(task.classes) == CLASSES and len(task.items) == 20
    assert [item.answer for item in task.items] == [name for _, name in singles("validation", 20)]
    assert task.fingerprint != load_pictures("singles", 20).fingerprint
    with pytest.raises(ValueError, match="split"):
        load_pictures("singles", 20, "holdout")


# -- classes and outputs


def outputs(labels, *names):
    task = SimpleNamespace(name="task", classes={name: name.replace("_", " ") for name in names})
    return _outputs(SimpleNamespace(name="model", labels=[set(given) for given in labels]), task)


def test_classes_are_matched_by_name_number_or_order():
    labels = [
        ("n1", "Tench"),
        ("n2", "crane, bird", "crane"),
        ("n3", "crane, machine", "crane"),
        ("n4", "great cat"),
    ]
    assert outputs(labels, "n4", "n1") == [3, 0]
    assert outputs(labels, "great_cat", "tench", "n3") == [3, 0, 2]
    assert outputs(labels, "0", "3", "1") == [0, 3, 1]
    assert outputs(labels, "a", "b", "c", "d") == [0, 1, 2, 3]
    for names in (("a", "b"), ("tench", "b", "c", "d"), ("4", "1"), ("tench", "crane")):
        with pytest.raises(ValueError, match=r"of the . classes of task are none of the 4 labels of model"):
            outputs(labels, *names)


# -- zero-shot


def test_zero_shot_is_what_the_model_says_by_itself(clip, tmp_path):
    from transformers import AutoProcessor

    n = 24
    full, _ = run(clip, [("random", {"seed": 3})], 12, "singles", tmp_path / "r.jsonl", n=n, batch_size=10)
    chosen, processor = singles("test", n), AutoProcessor.from_pretrained(CLIP)
    inputs = processor(
        images=[scene("test", index).image for index, _ in chosen], padding=True, return_tensors="pt",
        text=[f"a photo of a {name} ." for name in CLASSES],
    )  # fmt: skip
    with torch.no_grad():
        order = clip.model(**inputs).logits_per_image.argsort(1, descending=True)
    right = [order[i].tolist().index(CLASSES.index(name)) for i, (_, name) in enumerate(chosen)]
    assert (
        full["accuracy"] == pytest.approx(sum(place == 0 for place in right) / n) and full["accuracy"] > 0.8
    )
    assert full["top5"] == pytest.approx(sum(place < 5 for place in right) / n)
    assert (full["items"], full["classes"], full["tokens"]) == (n, 56, N)


def gflops(left, after_block=False):
    """Of tiny-clip's tower, from the tokens that leave each block."""
    total, entering = 2 * N * WIDTH * 3 * 8 * 8, N
    for leaving in left:
        tokens, mlp = entering + 1, (entering if after_block else leaving) + 1
        total += 2 * tokens * 4 * WIDTH * WIDTH + 4 * tokens * tokens * WIDTH + 2 * mlp * 2 * WIDTH * INNER
        entering = leaving
    return (total + 2 * WIDTH * 128) / 1e9  # and the projection of CLS


def test_a_row_says_what_was_measured(clip, tmp_path):
    output = tmp_path / "results.jsonl"
    how = {"n": 10, "baselines": ("random",), "seeds": (0, 1), "schedules": ["constant", "3,4"]}
    methods = ["tome", "representation-shift"]
    rows = run(clip, methods, 0.5, "singles", output, **how)
    full, *others = rows
    shown = [(row["method"], row["options"]["schedule"], row["seed"]) for row in others]
    seeds = [("random", schedule, seed) for schedule in ("constant", [3, 4]) for seed in (0, 1)]
    assert shown == [(name, schedule, None) for name in methods for schedule in ("constant", [3, 4])] + seeds
    assert full["cost"]["blocks"] == [N] * DEPTH and full["cost"]["gflops"] == pytest.approx(
        gflops([N] * DEPTH)
    )
    assert full["similarity"] == pytest.approx(1) and full["cost"]["speed"] == 1
    for row in others:
        schedule, cost = row["options"]["schedule"], row["cost"]
        left = counts(0.5, schedule if schedule == "constant" else (3, 4), N, DEPTH)
        assert cost["blocks"] == list(left) and row["tokens"] == left[-1] == 72
        after_block = vtc.get_method(row["method"]).after_block
        encoder = gflops(left, after_block)
        assert cost["gflops"] - cost["compressor_gflops"] == pytest.approx(encoder)
        assert (
            0.3 < row["similarity"] < 0.9999 and cost["bare_seconds"] > 0 and cost["compressor_seconds"] > 0
        )
        assert cost["plan"][0]["method"] == row["method"] and row["command"] == "test"
        if row["method"] != "tome":
            assert cost["compressor_gflops"] == 0
        else:  # every even token's key with every odd one's, heads averaged
            entering = [n for n, k in zip((N, *left), left) if k < n]
            pairs = sum(2 * -(-n // 2) * (n // 2) * WIDTH // 4 for n in entering)
            assert cost["compressor_gflops"] == pytest.approx(pairs / 1e9, rel=0.05)
    done = output.read_bytes()
    assert run(clip, methods, 0.5, "singles", output, **how) == rows and output.read_bytes() == done
    with pytest.raises(RuntimeError, match="not compressed"):
        vtc.restore(clip.model)  # no run left anything on the model


def test_methods_have_their_own_schedule_and_baselines_all_of_them(clip, tmp_path):
    rows = run(clip, ["evit", "tome"], 40, "singles", tmp_path / "r.jsonl", n=2, baselines=("random", "tome"))
    schedules = [(row["method"], row["options"].get("schedule")) for row in rows]
    methods = [(name, vtc.get_method(name).schedule) for name in ("evit", "tome")]
    assert len({schedule for _, schedule in methods}) == 2  # else this shows nothing
    assert schedules == [("full", None), *methods, *(("random", schedule) for _, schedule in methods)]


def test_broken_pictures_are_errors_of_the_row(clip, folder, tmp_path):
    (folder / "cat" / "broken.png").write_bytes(b"\x89PNG no picture")
    (full,) = run(clip, (), (), f"imagefolder:{folder}", tmp_path / "r.jsonl", batch_size=2)
    assert (full["items"], full["n"], full["classes"]) == (6, 7, 3)
    (error,) = full["errors"]
    assert error["item"] == "cat/broken.png" and "damaged" in error["error"]
    for picture in folder.rglob("*.png"):
        picture.write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="no picture of task"):
        (full,) = run(clip, (), (), f"imagefolder:{folder}", tmp_path / "r.jsonl", n=5)
    assert full["error"].startswith("ValueError: no picture of task")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"methods": "tom"}, "did you mean 'tome'"),
        ({"methods": "downsample"}, "does not run at stage 'encoder'"),
        ({"methods": [("tome", {"colour": 1})]}, "colour"),
        ({"keeps": 1.5}, "keep=1.5"),
        ({"schedules": "sometimes"}, "schedule must be"),
        ({"schedules": "3,6"}, "no block 6"),
        ({"tasks": "scenes"}, "no task 'scenes' of classes"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_run(clip, tmp_path, arguments, message):
    given = {"methods": "tome", "keeps": 0.5, "tasks": "singles", **arguments}
    with pytest.raises(ValueError, match=message):
        run(clip, output=tmp_path / "r.jsonl", n=2, **given)
    assert not (tmp_path / "r.jsonl").exists()


def test_an_encoder_is_measured_beside_its_bare_twin(clip):
    inputs = clip.prepare([scene("test", 0).image] * 2)
    bare = twin(clip.model)
    assert all(a is b for a, b in zip(bare.parameters(), clip.model.parameters(), strict=True))
    with vtc.compress(clip.model, "random", keep=9), torch.no_grad():
        with pytest.raises(ValueError, match="bare twin"):
            encoder_cost(clip.model, clip.forward, inputs)
        full, few = (clip.forward(model, inputs) for model in (bare, clip.model))
    assert not torch.equal(full, few) and torch.equal(full, clip.forward(clip.model, inputs))


# -- the other kinds of host


def test_a_timm_model_with_weights_of_ones_own(folder, tmp_path):
    import timm

    model = timm.create_model("test_vit", num_classes=3).eval()
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    host = open_classifier(f"timm:test_vit@{tmp_path}/own.safetensors", "cpu")
    task = load_pictures(f"imagefolder:{folder}")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.no_grad():
        said = [model(transform(item.open())[None])[0].argmax().item() for item in task.items]
    right = [list(task.classes)[i] == item.answer for i, item in zip(said, task.items, strict=True)]
    full, half = run(host, "tome", 0.5, task, tmp_path / "r.jsonl", schedules="constant")
    assert full["accuracy"] == pytest.approx(sum(right) / 6) and full["model"].startswith("timm:test_vit@")
    assert half["tokens"] == round(full["tokens"] / 2) and half["similarity"] < 0.99999
    logits, features = host.features(host.model, host.prepare([task.items[0].open()]))
    assert torch.allclose(host.model.head(features), logits, atol=1e-5)
    with pytest.raises(ValueError, match="classes of singles are none of the 3 labels of timm:test_vit"):
        run(host, "tome", 0.5, "singles", tmp_path / "r.jsonl", n=2)


def test_imagenet_classes_of_a_timm_model_are_known_by_their_numbers(tmp_path):
    import timm

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "own.safetensors")
    host = open_classifier(f"timm:test_vit@{tmp_path}/own.safetensors", "cpu")
    assert len(host.labels) == 1000 and {"n01440764", "tench"} <= host.labels[0]
    task = SimpleNamespace(name="task", classes={"n01443537": "goldfish", "n01440764": "tench"})
    assert _outputs(host, task) == [1, 0]


def test_an_open_clip_model(folder, tmp_path, monkeypatch):
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }  # fmt: skip
    (tmp_path / "tiny-test.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    model = open_clip.create_model("tiny-test").eval()
    torch.save(model.state_dict(), tmp_path / "own.pt")
    host = open_classifier(f"open_clip:tiny-test/{tmp_path}/own.pt", "cpu")
    task = load_pictures(f"imagefolder:{folder}")
    full, half = run(host, "random", 8, task, tmp_path / "r.jsonl", schedules="constant")
    assert half["tokens"] == 8 and full["model"].startswith("open_clip:tiny-test@")
    texts = open_clip.get_tokenizer("tiny-test")(
        [f"a photo of a {words}." for words in task.classes.values()]
    )
    images = torch.cat([host.prepare([item.open()])["image"] for item in task.items])
    with torch.no_grad():
        said = model(images, texts)
        best = (said[0] @ said[1].T).argmax(1).tolist()
    right = [list(task.classes)[i] == item.answer for i, item in zip(best, task.items, strict=True)]
    assert full["accuracy"] == pytest.approx(sum(right) / 6)


def test_a_transformers_model_with_a_head(folder, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    labels = {0: "cat", 1: "Red ring", 2: "blue star, star"}
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=32,
        patch_size=8, id2label=labels, label2id={name: i for i, name in labels.items()},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    host = open_classifier(tmp_path / "vit", "cpu")
    assert host.name == "vit" and host.head == "classifier"
    assert _outputs(host, load_pictures(f"imagefolder:{folder}")) == [2, 0, 1]
    full, half = run(host, "tome", 8, f"imagefolder:{folder}", tmp_path / "r.jsonl", schedules="once")
    assert (full["tokens"], half["tokens"]) == (16, 8) and half["similarity"] < 0.99999


@pytest.mark.parametrize(
    "name, message",
    [
        ("timm:vit_tiny_patch16_22", "did you mean vit_tiny_patch16_"),
        ("timm:test_vit@missing.safetensors", "no file 'missing.safetensors'"),
        ("timm:test_vit@README.md", "weights of timm:test_vit cannot be loaded"),
        ("open_clip:ViT-B-32", "open_clip:ViT-B-32/TAG; tags of this model: openai"),
        ("open_clip:ViT-B-31/openai", "did you mean ViT-B-32"),
        ("models/tiny-llava", "is a llava model, which does not classify"),
        ("./missing", "no complete model './missing'"),
    ],
)
def test_what_is_no_classifier_is_refused(name, message):
    with pytest.raises(ValueError, match=message) as raised:
        open_classifier(name)
    assert "\n" not in str(raised.value)


# -- tables and commands


def rows_of(schedule, speed, **accuracies):
    cost = {"gflops": 0.25, "speed": speed, "blocks": [12, 8], "images": 8}
    made = {
        "date": "2026-01-02",
        "command": "test",
        "versions": dict.fromkeys(("vtc", "torch", "transformers"), "1"),
    }
    made["versions"] |= {"commit": None, "gpu": None, "cpu": "x"}
    place = {"model": "m@1", "task": "singles", "split": "test", "n": 30, "classes": 56, "items": 30, **made}
    return [
        {
            **place, "method": name, "keep": 0.5, "accuracy": accuracy, "kinds": {"all": {}}, "errors": [],
            "options": {"schedule": schedule, **({"seed": seed} if name == "random" else {})}, "tokens": 8,
            "cost": cost,
        }
        for name, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]  # fmt: skip


def test_methods_are_compared_with_random_tokens_of_the_same_schedule(tmp_path):
    rows = rows_of("constant", 0.8, tome=[0.7], random=[0.75, 0.85])
    rows += rows_of([3, 6], 1.25, tome=[0.6], random=[0.55])
    (board,) = boards(rows)
    heading, *lines = encoder_lines(board)
    assert heading == ["method", "schedule", "50 %, 8 tokens"]
    assert lines == [
        ["tome", "constant", "70.0 ▾ / 0.250 / 0.80▿"], ["random", "constant", "80.0 ± 7.1 / 0.250 / 0.80▿"],
        ["tome", "3,6", "60.0 / 0.250 / 1.25"], ["random", "3,6", "55.0 / 0.250 / 1.25"],
    ]  # fmt: skip
    assert left_blocks(board) == [("constant, keep 0.5", "12, 8"), ("3,6, keep 0.5", "12, 8")]
    assert "30 pictures of 56 classes" in legend(board) and "▿ slower" in legend(board, costs=True)
    readme = tmp_path / "README.md"
    parts = ("results", "encoders")
    readme.write_text("".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in parts))
    assert update_readme(readme, [board]) == ["encoders"]  # questions were not asked: their part stays
    text = readme.read_text()
    assert "results:begin -->\nold\n" in text and "| tome | 3,6 | 60.0 / 0.250 / 1.25 |" in text


def test_sweep_of_a_host_and_its_report(tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    host = str(request.config.rootpath / CLIP)
    asked = ["sweep", "--host", host, "--task", "singles", "--questions", "4", "--methods", "evit"]
    assert (
        cli.main([*asked, "--keeps", "0.5", "36", "--schedule", "staged", "1,2", "--output", "r.jsonl"]) == 0
    )
    out = capsys.readouterr().out
    lines = [line.split()[:2] for line in out.splitlines()[1:8]]
    beside = [[name, schedule] for schedule in ("staged", "1,2") for name in ("evit", "random", "pool")]
    assert lines == [["method", "schedule"], *beside]
    assert "staged, keep 0.5  144, 114 x 2, 90, 72 x 2\n" in out and "chance 1.8 %" in out
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + 2 * 2 * 3 and all(row["model"].startswith("tiny-clip@") for row in rows)
    assert cli.main(["report", "r.jsonl"]) == 0  # without pictures of what was kept: nothing was asked
    assert "patch tokens that leave the encoder" in (tmp_path / "vtc-report" / "index.html").read_text()
    assert "| evit | 1,2 |" in (tmp_path / "vtc-report" / "report.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--host", "timm:nope", "--task", "singles"], "timm has no model 'nope'"),
        (["--host", CLIP, "--task", "scenes"], "no task 'scenes' of classes"),
        (["--host", CLIP, "--schedule", "9"], "no block 9"),
        (["--host", CLIP, "--task", "imagefolder:missing"], "missing: no such file"),
        (["--schedule", "staged"], "--schedule is for encoders"),
    ],
)
def test_errors_are_one_sentence(arguments, message, capsys, tmp_path):
    assert cli.main(["sweep", *arguments, "--output", str(tmp_path / "r.jsonl")]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and not (tmp_path / "r.jsonl").exists()


def test_a_host_and_a_model_are_too_much(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--host", CLIP, "--model", "models/tiny-llava"])
    assert "not allowed with" in capsys.readouterr().err
