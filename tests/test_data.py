"""Recipes and training samples."""

import json
import random

import pytest
import torch
from PIL import Image

from visualrwkv.data import Collator, Curriculum, JsonDataset, ScenesDataset, cut_out, read_llava
from visualrwkv.errors import InputError
from visualrwkv.prompt import Turn
from visualrwkv.recipe import ScenesData, Stretch, load_recipe, save_recipe

RECIPE = """
stage: projector
output: out
model: {from: folder}
data: {scenes: {objects: [1, 3], curriculum: [{until: 0.5, turns: [1, 1]}]}}
train: {projector: 1e-3}
steps: 10
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_recipe_reads_numbers_as_people_write_them(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.train == {"projector": 1e-3}  # YAML itself takes 1e-3 for text
    assert recipe.model.from_ == "folder" and recipe.data.scenes.objects == (1, 3)


def test_overrides_reach_nested_keys_and_list_items(recipe_file):
    overrides = ["steps=20", "train.projector=3e-4", "data.scenes.curriculum.0.until=0.2", "data.scenes.kinds.read=2"]
    recipe = load_recipe(recipe_file, overrides)
    assert (recipe.steps, recipe.train["projector"]) == (20, 3e-4)
    assert recipe.data.scenes.curriculum[0].until == 0.2 and recipe.data.scenes.kinds == {"read": 2.0}
    recipe = load_recipe(recipe_file, ["data.scenes=null", "data.json=a.json", "steps=null", "epochs=2"])
    assert (recipe.data.scenes, recipe.data.json, recipe.steps, recipe.epochs) == (None, "a.json", None, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=3", "unknown key 'stpes'; known keys there: stage, output"),
        ("data.scenes.sed=3", "unknown key 'data.scenes.sed'; known keys there: seed, objects"),
        ("steps=many", "steps is 'many', expected a whole number"),
        ("precision=true", "precision is True, expected a text"),
        ("train.vision=1", "train.vision: the projector stage trains projector"),
        ("train.projector=0", "nothing would learn"),
        ("epochs=2", "exactly one of 'steps' and 'epochs' (key=null takes one away)"),
        ("data.json=a.json", "exactly one of 'json' and 'scenes'"),
        ("data.scenes.objects=[3, 1]", "expected [fewest, most]"),
        ("data.scenes.options=[1, 4]", "expected numbers from 2 to 5"),
        ("data.scenes.again=2", "data.scenes.again is 2.0, expected a share"),
        ("data.foresight=-0.1", "data.foresight is -0.1, expected a share"),
        ("data.scenes.curriculum.4.until=1", "no position in a list of 1"),
        ("steps", "written key=value"),
        ("seed=-1", "seed is -1, expected 0 or more"),
        ("betas=[1.5, 2]", "expected numbers from 0 to below 1"),
        ("train.projector=.inf", "train.projector is inf"),
        ("eval.batch_size=0", "eval.batch_size is 0, expected a number above 0"),
        ("eval.objects=[3, 1]", "eval.objects is (3, 1), expected [fewest, most] from 1 to 6"),
        ("data.scenes.curriculum.0.zoom=[0, 2]", "curriculum.0.zoom is (0.0, 2.0), expected [least, most] above 0"),
    ],
)
def test_wrong_overrides_are_refused_by_name(recipe_file, override, message):
    with pytest.raises(InputError) as error:
        load_recipe(recipe_file, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_key_that_is_there_twice_is_refused(recipe_file):
    recipe_file.write_text(RECIPE + "train: {projector: 2e-3}\n")
    with pytest.raises(InputError, match="recipe.yaml: line 8: the key 'train' is there twice"):
        load_recipe(recipe_file)
    recipe_file.write_text(RECIPE.replace("turns: [1, 1]", "turns: [1, 1], until: 1"))
    with pytest.raises(InputError, match="line 5: the key 'until' is there twice"):
        load_recipe(recipe_file)
    recipe_file.write_text("steps: &steps [*steps]\n")
    with pytest.raises(InputError, match="recipe.yaml: not valid YAML"):
        load_recipe(recipe_file)
    recipe_file.write_text(RECIPE.replace("[1, 3]", "&few [1, 3]").replace("[1, 1]", "*few"))
    assert load_recipe(recipe_file).data.scenes.curriculum[0].turns == (1, 3)


def test_paths_may_start_in_the_home_folder(recipe_file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    overrides = ["output=~/out", "data={json: ~/my.json, images: ~/pictures}", "model={from: ~/folder, vision: ~/clip}"]
    recipe = load_recipe(recipe_file, overrides)
    assert (recipe.output, recipe.data.json, recipe.data.images) == (
        "/home/anna/out",
        "/home/anna/my.json",
        "/home/anna/pictures",
    )
    assert (recipe.model.from_, recipe.model.vision) == ("/home/anna/folder", "/home/anna/clip")


def test_recipe_survives_saving(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    save_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_all_recipes_of_the_project_are_valid():
    names = ["tiny/1_contrastive", "tiny/2_language", "tiny/3_projector", "tiny/4_instruction"]
    names += ["tiny/5_practice", "tiny/6_together", "tiny/7_lessons", "tiny/8_everything"]
    for name in [*names, "train/projector", "train/instruction"]:
        load_recipe(f"configs/{name}.yaml")


@pytest.fixture
def llava(tmp_path, pictures):
    """A folder with pictures, one of them broken, and a function that writes a LLaVA file."""
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:100])

    def write(*samples):
        (tmp_path / "data.json").write_text(json.dumps(list(samples)))
        return tmp_path / "data.json"

    return write


def talk(*values, image=None, name=None):
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": turns} | ({"image": image} if image else {}) | ({"id": name} if name else {})


def test_json_samples_with_none_one_and_two_pictures(llava, vlm):
    path = llava(
        talk("Hello", "red"),
        talk("<image>\nWhat is the colour", "red", image="0.png"),
        talk("<image>\nWhat", "red", "<image>\nWhat", " blue", image=["1.png", "2.png"]),
    )
    dataset = JsonDataset(path, None, vlm.processor, 500)
    per_image = vlm.processor.num_image_tokens
    for sample, images in zip(dataset.samples, (0, 1, 2), strict=True):
        item = dataset.encode(sample)
        assert item["input_ids"].count(vlm.processor.image_token_id) == images * per_image
        assert (item["pixel_values"] is None) if images == 0 else item["pixel_values"].shape == (images, 3, 32, 32)
        learnt = [i for i in item["labels"] if i != -100]
        assert learnt and vlm.processor.image_token_id not in learnt


def test_a_broken_picture_is_replaced_and_named(llava, vlm):
    good = talk("<image>\nWhat", "red", image="0.png", name="good")
    broken = talk("<image>\nWhat", "red", image="broken.png", name="bad")
    dataset = JsonDataset(llava(good, broken), None, vlm.processor, 500, length=2)
    items = [dataset[0], dataset[1]]
    skipped = [entry for item in items for entry in item["skipped"]]
    assert len(skipped) == 1 and skipped[0][0] == "sample 1 (id bad)" and "broken.png" in skipped[0][1]
    assert items[0]["input_ids"] == items[1]["input_ids"]
    with pytest.raises(InputError, match="no sample can be used"):
        JsonDataset(llava(broken), None, vlm.processor, 500)[0]


def test_every_pass_shows_every_sample_once_in_another_order(llava, vlm):
    path = llava(*(talk("What", str(number)) for number in range(10)))
    dataset = JsonDataset(path, None, vlm.processor, 500, seed=3, length=20)
    seen = [tuple(dataset[i]["input_ids"]) for i in range(20)]
    assert len(set(seen[:10])) == len(set(seen[10:])) == 10 and seen[:10] != seen[10:]
    assert [tuple(dataset[i]["input_ids"]) for i in (7, 13)] == [seen[7], seen[13]]


def test_too_long_samples_lose_whole_turns(llava, vlm):
    sample = talk("<image>\nWhat", "red", "the the the the", " blue", image="0.png")
    dataset = JsonDataset(llava(sample), None, vlm.processor, 500)
    whole = dataset.encode(sample)
    dataset.max_length = len(whole["input_ids"]) - 1
    short = dataset.encode(sample)
    # the question of the second turn also leaves the upper slice of the sandwich
    alone = dataset.encode(talk("<image>\nWhat", "red", image="0.png"))
    assert short["input_ids"] == alone["input_ids"] and short["labels"] == alone["labels"]
    dataset.max_length = 10
    with pytest.raises(InputError, match="more than data.max_length 10"):
        dataset.encode(sample)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "not valid JSON"),
        ("{}", "expected a list of samples, found dict; put them into a list"),
        ("[]", "holds no sample"),
        ('{"a": 1}\n{"a": 2}', r"Extra data: line 2 column 1; a file of one object a line is called .jsonl"),
        ('[{"id": "a", "conversations": [{"from": "gpt", "value": "x"}]}, {"id": "b"}]', "sample 1 (id b)"),
        (
            '[{"conversations": [{"from": "robot", "value": "x"}]}]',
            "sample 0: turn 1 comes from 'robot'; must be 'human'",
        ),
        ('[{"conversations": [{"from": "gpt", "value": "x"}, {"value": "y"}]}]', "sample 0: turn 2 is not an object"),
        ('[{"conversations": [{"from": "gpt", "value": null}]}]', "'value': {'from': 'gpt', 'value': None}"),
        ('[{"image": 3, "conversations": [{"from": "human", "value": "x"}]}]', "'image' is 3"),
    ],
)
def test_a_wrong_file_is_refused_with_the_sample(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        read_llava(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_json_lines_are_read(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(talk("What", "red")) for _ in range(3)))
    assert len(read_llava(path)) == 3
    path.write_text(json.dumps(talk("What", "red")) + "\n\n{]\n")
    with pytest.raises(InputError, match="data.jsonl: not valid JSON: .*: line 3 column 2$"):
        read_llava(path)
    path.write_text(json.dumps(talk("What", "red")), encoding="utf-8-sig")
    assert len(read_llava(path)) == 1
    odd = "one\u2028two\u2029three\x85four"  # line breaks for Python, characters for JSON
    path.write_text(json.dumps(talk("What", odd), ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    assert read_llava(path)[0]["conversations"][1]["value"] == odd


def test_scene_samples_depend_on_their_number_alone(vlm):
    scenes = ScenesData(seed=5, sides=(96, 120))
    first, second = (ScenesDataset(scenes, vlm.processor, 2000, 100) for _ in range(2))
    items = [first[i] for i in range(4)]
    for i in (3, 1):
        again = second[i]
        assert again["input_ids"] == items[i]["input_ids"] and torch.equal(
            again["pixel_values"], items[i]["pixel_values"]
        )
    assert first[0]["input_ids"] != ScenesDataset(ScenesData(seed=6), vlm.processor, 2000, 100)[0]["input_ids"]


def test_scene_samples_of_like_length_stand_together(vlm):
    """The samples are those of a dataset without batches, a window of them sorted into batches with little padding."""
    scenes = ScenesData(seed=7, turns=(1, 3), text_only=True)
    plain, batched = (ScenesDataset(scenes, vlm.processor, 2000, 40, batch_size) for batch_size in (1, 4))
    ids = [[dataset[i]["input_ids"] for i in range(40)] for dataset in (plain, batched)]
    assert sorted(ids[0]) == sorted(ids[1])
    assert sorted(ids[0][:32]) == sorted(ids[1][:32])  # eight batches are a window; the rest is another one

    def padding(samples):
        batches = [[len(x) for x in samples[i : i + 4]] for i in range(0, 40, 4)]
        return sum(max(lengths) * 4 - sum(lengths) for lengths in batches)

    assert padding(ids[1]) < padding(ids[0]) / 2
    lengths = [len(x) for x in ids[1]]
    assert lengths != sorted(lengths)  # batches come in a random order


def test_conversations_are_written_as_a_chat_reads_them(llava, vlm):
    """Without foresight the ids are those that `ChatSession` reads turn by turn."""
    sample = talk("<image>\nWhat", "red", "the the", " blue", image="0.png")
    path = llava(sample)
    encode = vlm.processor.encode_turns
    turns = [Turn("user", "What", 1), Turn("assistant", "red"), Turn("user", "the the"), Turn("assistant", " blue")]
    held = [*encode(turns[:2])[0], *encode(turns, start=2)[0]]
    known = encode(turns)[0]
    for share, wanted in ((0.0, {tuple(held)}), (1.0, {tuple(known)}), (0.5, {tuple(held), tuple(known)})):
        dataset = JsonDataset(path, None, vlm.processor, 500, length=40, foresight=share)
        assert {tuple(dataset[number]["input_ids"]) for number in range(40)} == wanted
    assert held != known


def test_scenes_show_their_picture_again_and_without_foresight(vlm):
    def dataset(again, foresight):
        scenes = ScenesData(seed=8, turns=(3, 3), again=again, kinds={"colour": 1, "count": 1, "shape": 1})
        return ScenesDataset(scenes, vlm.processor, 2000, 16, foresight=foresight)

    plain, again, held = dataset(0, 1), dataset(0.5, 1), dataset(0, 0)
    for number in range(16):
        (scene, turns), (same, more) = plain.conversation(number), again.conversation(number)
        assert scene == same and [turn.text for turn in turns] == [turn.text for turn in more]
        assert turns[0].images == more[0].images == 1 and not any(turn.images for turn in turns[1:])
    assert {item["images"] for item in map(again.__getitem__, range(16))} == {1, 2, 3}
    for item in map(again.__getitem__, range(16)):
        assert len(item["pixel_values"]) == item["images"]
        assert all(torch.equal(picture, item["pixel_values"][0]) for picture in item["pixel_values"])
    lengths = [sum(len(one[number]["input_ids"]) for number in range(16)) for one in (held, plain, again)]
    assert lengths[0] < lengths[1] < lengths[2]


def test_text_only_scenes_have_no_picture(vlm):
    dataset = ScenesDataset(ScenesData(text_only=True), vlm.processor, 2000, 10)
    for i in range(5):
        item = dataset[i]
        assert item["pixel_values"] is None and vlm.processor.image_token_id not in item["input_ids"]


def test_curriculum_takes_fractions_and_counts():
    stretches = [Stretch(until=0.1, objects=(1, 1)), Stretch(until=50, turns=(2, 2))]
    curriculum = Curriculum(ScenesData(objects=(2, 6), curriculum=stretches), 100)
    assert curriculum(9)["objects"] == (1, 1) and curriculum(10)["objects"] == (2, 6)
    assert curriculum(49)["turns"] == (2, 2) and curriculum(50)["turns"] == (1, 3)


def test_scenes_follow_the_curriculum(vlm):
    scenes = ScenesData(objects=(5, 6), curriculum=[Stretch(until=0.5, objects=(1, 1), kinds={"colour": 1})])
    dataset = ScenesDataset(scenes, vlm.processor, 2000, 20)
    early, late = dataset.conversation(3), dataset.conversation(15)
    assert len(early[0].objects) == 1 and len(early[1]) == 2
    assert len(late[0].objects) >= 5


def test_relations_can_be_narrowed_down(vlm):
    scenes = ScenesData(objects=(2, 3), kinds={"relation": 1}, relations=["left"], chinese=0, turns=(1, 1))
    dataset = ScenesDataset(scenes, vlm.processor, 2000, 40)
    answers = set()
    for i in range(30):
        question, answer = dataset.conversation(i)[1]
        assert "left" in question.text and not any(word in question.text for word in ("right", "above", "below"))
        answers.add(answer.text)
    assert answers == {"yes", "no"}


def test_choices_can_be_narrowed_down(vlm):
    scenes = ScenesData(kinds={"choice": 1}, bases=["colour", "shape"], options=[2], chinese=0, turns=(1, 1))
    dataset = ScenesDataset(scenes, vlm.processor, 2000, 40)
    for i in range(30):
        question, answer = dataset.conversation(i)[1]
        assert "color" in question.text or "colour" in question.text or "shape" in question.text
        assert "\nB. " in question.text and "\nC. " not in question.text and answer.text in ("A", "B")


def test_collator_pads_on_the_right_to_a_multiple_of_16():
    items = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "pixel_values": torch.zeros(2, 3, 4, 4)},
        {"input_ids": list(range(1, 18)), "labels": [-100] * 17, "pixel_values": None, "skipped": [("a", "b")]},
        {"input_ids": [4], "labels": [4], "pixel_values": torch.ones(1, 3, 4, 4)},
    ]
    batch = Collator()(items)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 32)
    assert batch["input_ids"][0, :4].tolist() == [1, 2, 3, 0] and batch["labels"][0, :4].tolist() == [-100, 2, 3, -100]
    assert batch["pixel_values"].shape == (3, 3, 4, 4) and batch["pixel_values"][2].min() == 1
    assert batch["skipped"] == [("a", "b")]
    assert "pixel_values" not in Collator()(items[1:2])


def test_a_cut_out_holds_the_whole_object():
    rng = random.Random(0)
    for _ in range(100):
        picture = Image.new("L", (rng.randint(96, 200), rng.randint(96, 200)))
        width, height = rng.randint(13, 40), rng.randint(13, 40)
        left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
        box = (left, top, left + width, top + height)
        picture.paste(255, box)
        cut = cut_out(picture, box, (1.2, 2), rng)
        assert cut.histogram()[255] == width * height
        assert max(cut.size) <= 2 * max(width, height) + 1


def test_as_many_markers_as_pictures(llava, vlm, tmp_path):
    twice = talk("<image>\nWhat?", "red", "<image>\nAnd now?", "blue", image="0.png")
    dataset = JsonDataset(llava(twice), tmp_path, vlm.processor, max_length=600)
    with pytest.raises(InputError, match="show 2 images, but 'image' names 1"):
        dataset.encode(dataset.samples[0])


def test_a_picture_in_a_reply_is_counted_as_shown(llava, vlm):
    dataset = JsonDataset(llava(talk("What", "It is <image> red", image="0.png")), None, vlm.processor, 500)
    assert dataset.encode(dataset.samples[0])["images"] == 1 and dataset.unshown == 0
    assert JsonDataset(llava(talk("What", "<image>")), None, vlm.processor, 500).unnamed == 1
