"""`visualrwkv inspect`: numbers of a training set that can be counted by hand."""

import json

import pytest

from visualrwkv import cli, inspection
from visualrwkv.data import encode_sample
from visualrwkv.errors import InputError
from visualrwkv.prompt import Turn


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


@pytest.fixture
def data(tmp_path, pictures):
    for name, picture in zip(("one", "two"), pictures, strict=False):
        picture.save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    samples = [
        {
            "id": "a",
            "image": "one.png",
            "conversations": [human("<image>\nWhat?"), gpt("red"), human("Why?"), gpt("so")],
        },
        {"id": "b", "image": ["one.png", "two.png"], "conversations": [human("<image><image>\nWhat?"), gpt("blue")]},
        {"id": "c", "image": "bad.png", "conversations": [human("<image>\nWhat?"), gpt("red")]},
        {"id": "d", "image": "one.png", "conversations": [human("What?"), gpt("red")]},
        {"id": "e", "conversations": [human("<image>\nWhat?"), gpt("red")]},
        {"id": "f", "conversations": [human("What?")]},
        {"id": "g", "conversations": [human("What?"), gpt("red " * 200), human("And?"), gpt("blue " * 200)]},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(samples))
    return path


def test_a_training_set_is_counted(data, vlm, random_folder, capsys):
    result = inspection.inspect(data, None, vlm.processor, max_length=300)
    assert (result["samples"], result["usable"], result["pictures shown"]) == (7, 5, 3)
    assert result["with a picture that no <image> shows"] == result["with an <image> that names no picture"] == 1
    assert result["cut to 300 tokens"] == 1
    assert [entry["sample"] for entry in result["unusable"]] == ["sample 2 (id c)", "sample 5 (id f)"]
    assert "bad.png" in result["unusable"][0]["reason"] and "no reply" in result["unusable"][1]["reason"]
    ids, labels = vlm.processor.encode_turns([Turn("user", "What?"), Turn("assistant", "red")], open_reply=False)
    assert result["tokens"]["smallest"] == len(ids)
    assert result["tokens learned"]["smallest"] == sum(label != -100 for label in labels)
    assert result["turns"] == {"smallest": 2, "median": 2, "95 %": 2, "largest": 4, "sum": 12}
    learned = [piece["text"] for piece in result["first"] if piece["learned"]]
    assert [text.strip() for text in learned] == ["red", "so"]
    assert sum(piece["text"].count("<image>") for piece in result["first"]) == 1
    capsys.readouterr()
    call = ["inspect", str(data), "--images", str(data.parent), "--model", str(random_folder), "--max-length", "300"]
    assert cli.main([*call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(result))
    assert cli.main(call) == 0
    out = capsys.readouterr().out
    assert "2 samples cannot be used:" in out and "[[ red" in out and "sample 2 (id c): " in out


def test_what_is_no_training_set_is_one_line(tmp_path, random_folder, capsys):
    (tmp_path / "x.json").write_text("{}")
    for call, word in ((["x.json"], "x.json: expected a list"), (["no.json"], "no.json: cannot be read")):
        assert cli.main(["inspect", str(tmp_path / call[0]), "--model", str(random_folder)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and word in err and err.count("\n") == 1
    assert cli.main(["inspect", "x", "--max-length", "0"]) == 2


def test_pictures_in_another_folder(tmp_path, capsys):
    cli.main(["scenes", str(tmp_path / "out"), "--format", "llava", "--pictures", "3"])
    call = ["inspect", str(tmp_path / "out" / "train.json")]
    capsys.readouterr()
    assert cli.main(call) == 2
    out, err = capsys.readouterr()
    assert "no such file" in out and f"pass --images {tmp_path / 'out' / 'images'}" in err
    assert cli.main([*call, "--images", str(tmp_path / "out" / "images")]) == 0


def test_a_long_conversation_keeps_the_most_turns_that_fit(vlm):
    """Found by halves, and the same as leaving out one turn after the other."""
    turns = [Turn(("user", "assistant")[n % 2], f"word {n} " * (1 + n % 3)) for n in range(41)]
    for longest in (60, 150, 400, 700, 10**6):
        count = len(turns)
        while len(vlm.processor.encode_turns(turns[:count], open_reply=False)[0]) > longest:
            count -= 1
            while turns[count - 1].role != "assistant":
                count -= 1
        item = encode_sample(vlm.processor, turns, longest)
        assert item["turns"] == count
        assert item["input_ids"] == vlm.processor.encode_turns(turns[:count], open_reply=False)[0]
    with pytest.raises(InputError, match="first turns have"):
        encode_sample(vlm.processor, turns, 5)
