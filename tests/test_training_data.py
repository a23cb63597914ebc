"""Pictures with questions out of files, data sets and drawn scenes."""

import json

import numpy as np
import pytest
from small import small_processor
from training import write_questions

from vtc.evaluation.questions import questions
from vtc.evaluation.scenes import scene
from vtc.training import scenes
from vtc.training.batches import Looked, Visit, visits
from vtc.training.pictures import load_pictures


def load(name, n=None, split="train", cache=None, skip_broken=False):
    return load_pictures(name, n, split, cache, skip_broken)


def write_lines(folder, *rows):
    path = folder / "task.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return f"jsonl:{path}"


def test_lines_of_one_picture_belong_together(tmp_path):
    path = write_questions(tmp_path, pictures=4)
    found = load(f"jsonl:{path}")
    assert len(found) == 4 and [len(picture.questions) for picture in found] == [3] * 4
    assert found[1].questions[1] == ("how many objects are there ?", "two")
    assert np.array_equal(np.asarray(found[2].open()), scene("train", 2).pixels)
    assert [picture.questions for picture in load(f"jsonl:{path}", n=2)] == [p.questions for p in found[:2]]


def test_conversations_of_llava(tmp_path):
    scene("train", 0).image.save(tmp_path / "0.png")
    turns = [
        {"from": "human", "value": "<image>\nwhat is it ?"}, {"from": "gpt", "value": "red"},
        {"from": "human", "value": "how many ?"}, {"from": "gpt", "value": "two"},
    ]  # fmt: skip
    (found,) = load(write_lines(tmp_path, {"image": "0.png", "conversations": turns}))
    assert found.questions == [("what is it ?", "red"), ("how many ?", "two")]
    with pytest.raises(ValueError, match=r"task.jsonl:1 .*turns of human and gpt in turn"):
        load(write_lines(tmp_path, {"image": "0.png", "conversations": turns[:3]}))


def test_conversations_that_are_null_are_none(tmp_path):
    scene("train", 0).image.save(tmp_path / "0.png")
    row = {"image": "0.png", "question": "a", "answer": "b", "conversations": None}
    assert load(write_lines(tmp_path, row))[0].questions == [("a", "b")]


def test_a_file_that_is_one_list(tmp_path):
    scene("train", 0).image.save(tmp_path / "0.png")
    rows = [{"image": "0.png", "question": f"{mark}how many ?", "answer": 2} for mark in ("<image>\n", "")]
    (found,) = load(write_lines(tmp_path, json.dumps(rows, indent=1)))
    assert found.questions == [("how many ?", "2")] * 2
    with pytest.raises(ValueError, match=r"task.jsonl:2 cannot be learned from .*its image is None"):
        load(write_lines(tmp_path, json.dumps([rows[0], {"question": "a", "answer": "b"}])))


@pytest.mark.parametrize("kept", ["folder", "splits"])
def test_a_data_set(tmp_path, kept):
    import datasets

    rows = {
        "image": [scene("train", i).image for i in range(3)],
        "question": ["a", "b", "c"],
        "answer": "def",
    }
    rows["answer"] = list(rows["answer"])
    made = datasets.Dataset.from_dict(rows)
    made = made if kept == "folder" else datasets.DatasetDict({"train": made, "test": made.select([2])})
    made.save_to_disk(tmp_path / "set")
    found = load(f"datasets:{tmp_path / 'set'}", n=2)
    assert [picture.questions for picture in found] == [[("a", "d")], [("b", "e")]]
    assert np.array_equal(np.asarray(found[1].open()), scene("train", 1).pixels)
    if kept == "splits":
        assert load(f"datasets:{tmp_path / 'set'}:test")[0].questions == [("c", "f")]
        with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
            load(f"datasets:{tmp_path / 'set'}:dev")


def test_rows_of_a_data_set_are_read_as_lines_are(tmp_path):
    import datasets

    pictures = [scene("train", i).image for i in range(2)]
    rows = {"image": pictures, "question": ["<image>\nhow many ?", "a"], "answer": ["2", " "]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path)
    assert load(f"datasets:{tmp_path}", n=1)[0].questions == [("how many ?", "2")]
    with pytest.raises(ValueError, match=r"row 1 of .* cannot be learned from \(its answer is empty"):
        load(f"datasets:{tmp_path}")
    with pytest.warns(UserWarning, match="1 of the data cannot be read"):
        assert len(load(f"datasets:{tmp_path}", skip_broken=True)) == 1


def test_a_data_set_with_other_columns(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"picture": [1], "question": ["a"]}).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="no column image, answer; it has picture, question: rename"):
        load(f"datasets:{tmp_path}")


def test_scenes_are_drawn_once(tmp_path, monkeypatch):
    first = load("scenes", n=3, cache=tmp_path)
    monkeypatch.setattr(scenes, "_part", None)
    again = load("scenes", n=3, cache=tmp_path)
    for i, (a, b) in enumerate(zip(first, again, strict=True)):
        assert np.array_equal(np.asarray(a.open()), scene("train", i).pixels)
        assert np.array_equal(np.asarray(b.open()), scene("train", i).pixels) and a.questions == b.questions
    with pytest.raises(TypeError):  # what was not drawn before is drawn now
        load("scenes", n=3, split="validation", cache=tmp_path)


def test_scenes_ask_each_kind_once(tmp_path):
    for i, picture in enumerate(load("scenes", n=8, cache=tmp_path)):
        kinds = {q.text: q.kind for q in questions(scene("train", i))}
        asked = [kinds[question] for question, _ in picture.questions]
        assert set(asked) == set(kinds.values()) and len(asked) == len(set(asked)) + 1
        assert asked.count("existence") == 2


@pytest.mark.parametrize(
    "rows, told",
    [
        (["{"], r"task.jsonl:1 cannot be learned from .*set data.skip_broken"),
        (['"0.png"'], "it is no object with image, question and answer"),
        ([{"image": "0.png", "question": "a"}], "it has no answer"),
        ([{"image": None, "question": "a", "answer": "b"}], "its image is None"),
        ([{"image": "0.png", "question": "a", "answer": "in <image>"}], "its answer holds <image>"),
        ([{"image": "0.png", "question": "\ud800", "answer": "b"}], "its question has half a character"),
        ([{"image": "0.png", "conversations": [{"role": "user"}]}], "no list of turns with 'from' and"),
        ([{"image": "0.png", "conversations": [{"from": "human"}]}], "it has no value"),
        (["{", '"image": "0.png"}'], r"task.jsonl:1 .*it is no JSON"),
        ([{"image": "0.png", "question": "a", "answer": " "}], "its answer is empty"),
        ([{"image": "0.png", "question": "a", "answer": None}], "its answer is None, which is no text"),
        ([{"image": "0.png", "question": ["a", "b"], "answer": "b"}], "which is no text"),
        ([{"image": "1.png", "question": "a", "answer": "b"}], "there is no image file"),
        (["[{"], "begins like a list of JSON and is none"),
        ([""], "holds no picture with a question"),
    ],
)
def test_lines_that_cannot_be_learned_from(tmp_path, rows, told):
    scene("train", 0).image.save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=told):
        load(write_lines(tmp_path, *rows))


def test_broken_lines_are_left_out_where_that_is_asked_for(tmp_path):
    scene("train", 0).image.save(tmp_path / "0.png")
    good = {"image": "0.png", "question": "a", "answer": "b"}
    name = write_lines(tmp_path, "{", good, {**good, "image": "1.png"})
    with pytest.warns(UserWarning, match=r"2 of the data .*task.jsonl:1, .*task.jsonl:3"):
        (found,) = load(name, skip_broken=True)
    assert found.questions == [("a", "b")]


def test_a_damaged_picture_is_named(tmp_path):
    scene("train", 0).image.save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    rows = [{"image": f"{i}.png", "question": "a", "answer": "b"} for i in range(2)]
    pictures = load(write_lines(tmp_path, *rows))
    with pytest.raises(ValueError, match=r"task.jsonl:2: cannot read .*1.png"):
        Looked(small_processor(), pictures)([Visit(0), Visit(1)])
    with pytest.warns(UserWarning, match=r"left out .*task.jsonl:2"):
        found = Looked(small_processor(), pictures, skip_broken=True)([Visit(0), Visit(1)])
    assert len(found["vision"]["pixel_values"]) == 1


def test_unknown_data(tmp_path):
    with pytest.raises(ValueError, match="there is no data 'pictures'; known: scenes, jsonl"):
        load("pictures")
    with pytest.raises(ValueError, match="no split 'dev'"):
        load("scenes", split="dev", cache=tmp_path)
    with pytest.raises(OSError, match=r"there is no file .*none.jsonl: give one of lines"):
        load(f"jsonl:{tmp_path / 'none.jsonl'}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "rows.json").write_text("[{")
    with pytest.raises(ValueError, match=r"broken cannot be read as a data set .*, or jsonl:PATH"):
        load(f"datasets:{tmp_path / 'broken'}")


def test_a_folder_with_lines(tmp_path):
    path = write_questions(tmp_path / "one", pictures=2)
    assert [p.questions for p in load(f"jsonl:{path.parent}")] == [p.questions for p in load(f"jsonl:{path}")]
    path.with_name("more.jsonl").write_text("")
    with pytest.raises(ValueError, match="is a folder with 2 files of lines: give one"):
        load(f"jsonl:{path.parent}")


def test_every_question_is_visited_once(tmp_path):
    pictures = load(f"jsonl:{write_questions(tmp_path, pictures=3)}")
    found = visits(pictures, together=2)
    assert found == [Visit(i, part) for i in range(3) for part in ((0, 1), (2,))]
