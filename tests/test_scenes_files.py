"""Drawn scenes in files: they depend on the seed alone and have the official layouts."""

import json
import re
from collections import Counter

import pytest
from PIL import Image
from scene_reader import matching

from visualrwkv import scenes
from visualrwkv.errors import InputError
from visualrwkv.scenes.writers import write_scenes


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", ["llava", "vqav2", "scienceqa", "pope"])
def test_files_depend_on_the_seed_alone(tmp_path, layout, capfd):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_scenes(tmp_path / name, layout, 10, seed)
    first = files(tmp_path / "a")
    assert first == files(tmp_path / "b") and first != files(tmp_path / "c")
    captured = capfd.readouterr()
    assert captured.out == "" and "10/10" in captured.err


def test_llava_layout(tmp_path):
    write_scenes(tmp_path / "out", "llava", 6, 0)
    records = json.loads((tmp_path / "out" / "train.json").read_text(encoding="utf-8"))
    assert len(records) == 6 and len({record["id"] for record in records}) == 6
    for record in records:
        with Image.open(tmp_path / "out" / "images" / record["image"]) as image:
            assert image.format == "PNG" and image.mode == "RGB"
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
    assert max(len(record["conversations"]) for record in records) > 2


def test_vqav2_layout(tmp_path):
    write_scenes(tmp_path, "vqav2", 15, 0)
    ids = {}
    for split, pictures in (("train", 12), ("val", 3)):
        questions = json.loads((tmp_path / f"v2_OpenEnded_mscoco_{split}2014_questions.json").read_text())
        annotations = json.loads((tmp_path / f"v2_mscoco_{split}2014_annotations.json").read_text())
        assert questions["task_type"] == "Open-Ended" and questions["data_subtype"] == f"{split}2014"
        asked = {q["question_id"]: q for q in questions["questions"]}
        assert len(asked) == len(annotations["annotations"]) == len(questions["questions"])
        for annotation in annotations["annotations"]:
            assert asked[annotation["question_id"]]["image_id"] == annotation["image_id"]
            assert [a["answer_id"] for a in annotation["answers"]] == list(range(1, 11))
            assert {a["answer"] for a in annotation["answers"]} == {annotation["multiple_choice_answer"]}
            assert annotation["answer_type"] in ("yes/no", "number", "other")
        ids[split] = {q["image_id"] for q in questions["questions"]}
        assert len(ids[split]) == pictures
        for image_id in ids[split]:
            assert (tmp_path / f"{split}2014" / f"COCO_{split}2014_{image_id:012d}.jpg").is_file()
    assert not ids["train"] & ids["val"]


def test_scienceqa_layout(tmp_path):
    write_scenes(tmp_path, "scienceqa", 36, 0)
    problems = json.loads((tmp_path / "problems.json").read_text())
    splits = json.loads((tmp_path / "pid_splits.json").read_text())
    assert sorted(splits["train"] + splits["val"] + splits["test"]) == sorted(problems)
    assert len(problems) == 40
    bare = [pid for pid, problem in problems.items() if problem["image"] is None]
    assert len(bare) == 4
    for pid, problem in problems.items():
        assert pid in splits[problem["split"]]
        assert 0 <= problem["answer"] < len(problem["choices"]) <= 5
        assert problem["subject"] in ("natural science", "social science", "language science")
        assert re.fullmatch(r"grade([1-9]|1[0-2])", problem["grade"])
        assert "\n" not in problem["question"]
        picture = tmp_path / "images" / problem["split"] / pid / "image.png"
        assert picture.is_file() == (problem["image"] == "image.png")
        assert problem["hint"] or problem["image"]


def test_pope_layout(tmp_path):
    write_scenes(tmp_path, "pope", 8, 0)
    for category in ("random", "popular", "adversarial"):
        records = [json.loads(line) for line in (tmp_path / f"coco_pope_{category}.json").read_text().splitlines()]
        assert [record["question_id"] for record in records] == list(range(1, len(records) + 1))
        assert Counter(record["label"] for record in records) == {"yes": len(records) // 2, "no": len(records) // 2}
        for record in records:
            assert (tmp_path / "val2014" / record["image"]).is_file()
            assert re.fullmatch(r"Is there an? \w+ \w+ in the image\?", record["text"])
            index = int(record["image"][-16:-4]) - 1
            scene = scenes.sample_scene(scenes.scene_rng(0, "val", index), split="val", min_objects=2)
            name = record["text"].split(" ", 3)[3].removesuffix(" in the image?")
            assert bool(matching(scene, name)) == (record["label"] == "yes")


def test_writer_refusals(tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ((tmp_path / "a", "coco", 1, 0), "coco"),
        ((tmp_path / "a", "llava", 0, 0), "0 pictures"),
        ((tmp_path / "a", "llava", 1, "x"), "seed"),
        ((tmp_path, "llava", 1, 0), "not empty"),
        ((tmp_path / "file", "llava", 1, 0), "cannot be written"),
        ((tmp_path / "file" / "under", "llava", 1, 0), "cannot be written"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            write_scenes(*arguments)
        assert "\n" not in str(caught.value)
