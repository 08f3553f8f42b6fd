"""Conversations and questions out of captions, class names and questions: true, and giving nothing
away."""

from __future__ import annotations

import collections
import io
import json
import random

import datasets
import pytest
from PIL import Image

from tokenflow.cli import main
from tokenflow.data import question_facts as facts
from tokenflow.data.question_rows import Rows
from tokenflow.data.question_turns import apart_turn, choice_turn, open_turns, own_turns, tidy
from tokenflow.data.question_words import GROUPS, PLAIN_NAMES
from tokenflow.data.questions import chunks, conversations, descriptions, tasks, write_questions
from tokenflow.errors import UserError

DOG = [
    "A brown dog runs through the grass .",
    "A tan dog chases two red balls",
    "The brown fluffy dog is outside .",
    "A dog plays with his owner .",
    "A puppy runs .",
]
BEACH = [
    "Two children play on a beach .",
    "Two kids dig in the sand .",
    "Two small children sit by the ocean",
]


def test_captions_name_what_is_there_and_leave_open_what_they_hint_at():
    known = facts.things_in(DOG)
    assert known["thing", "a dog"]
    assert known["thing", "an animal"]
    assert known["thing", "a ball"]
    assert known["thing", "a person"]  # the owner
    assert ("thing", "a man") not in known  # whoever the owner is
    assert known["thing", "a guitar"] is False
    known = facts.things_in(BEACH)
    assert known["thing", "a child"]
    assert known["thing", "a beach"]
    assert known["thing", "water"]
    assert ("thing", "a boy") not in known
    assert known["thing", "a dog"] is False
    assert "mountain" not in facts.words_of("A mountain biker")
    assert "bike" in facts.words_of("A mountain bike")


def test_colors_and_counts():
    assert facts.colors_in(DOG) == {"dog": "brown"}  # and two balls are not asked about
    assert facts.colors_in(["a black and white dog", "a dog"]) == {}
    known = facts.color_facts(DOG)
    assert known["color", "dog", "brown"]
    assert known["color", "dog", "black"] is False
    assert facts.counts_in(BEACH) == {"children": 2}
    assert facts.counts_in(DOG) == {"dogs": 1}
    assert "dogs" not in facts.counts_in(["a dog", "two dogs", "two dogs"])
    assert facts.counts_in(["some dogs", "many dogs"]) == {}
    assert ("What color is the dog?", "brown") in [
        turn for seed in range(20) for turn in open_turns(DOG, random.Random(seed))
    ]


def test_every_fact_is_asked_as_often_true_as_false():
    rng = random.Random(0)
    known = [
        {("thing", "a dog"): i % 4 == 0, ("thing", "a bus"): i < 2, ("thing", "snow"): True}
        for i in range(40)
    ]
    asked = facts.balance(facts.sides_of(known), 40, rng)
    counts = collections.Counter((fact, true) for _, fact, true in asked)
    assert counts == {
        (("thing", "a dog"), True): 10,
        (("thing", "a dog"), False): 10,
        (("thing", "a bus"), True): 2,
        (("thing", "a bus"), False): 2,
    }
    assert all(known[i][fact] is true for i, fact, true in asked)
    assert len(facts.balance(facts.sides_of(known), 2, rng)) == 2  # fewer questions than facts


def test_classes_are_denied_within_their_set_and_groups_leave_the_debatable_out():
    names, sets = ["tabby", "lion", "rose", "plate"], ["animals", "animals", "flowers", "animals"]
    sides = {fact: (yes, no) for fact, yes, no in facts.class_sides(names, sets)}
    assert sides["class", "lion"] == ([1], [0, 3])
    assert sides["class", "rose"] == ([2], [])
    sides = {fact: (yes, no) for fact, yes, no in facts.group_sides(names)}
    assert sides["group", "a cat"] == ([0], [2, 3])  # a lion is a matter of taste
    assert sides["group", "food"] == ([], [0, 1, 2])
    assert all(not members & unclear for members, unclear in GROUPS.values())


def test_no_answer_follows_from_those_before():
    animal, dog, cat = (("group", f"{x}") for x in ("an animal", "a dog", "a cat"))
    lion = ("class", "lion")
    assert facts.split_settled([(dog, False), (animal, False)]) == [[(animal, False)], [(dog, False)]]
    assert facts.split_settled([(dog, False), (animal, True)]) == [[(animal, True), (dog, False)]]
    assert facts.split_settled([(dog, True), (cat, False)]) == [[(dog, True)], [(cat, False)]]
    assert facts.split_settled([(lion, False)], [(animal, True)]) == [[(lion, False)]]
    assert facts.split_settled([(lion, False)], [(dog, True)]) == [[], [(lion, False)]]
    child, boy, bus = (("thing", f"{x}") for x in ("a child", "a boy", "a bus"))
    assert facts.split_settled([(boy, False), (bus, False), (child, False)]) == [
        [(child, False), (bus, False)],
        [(boy, False)],
    ]
    brown, black, hat = ("color", "dog", "brown"), ("color", "dog", "black"), ("color", "hat", "black")
    assert facts.split_settled([(brown, True), (black, False), (hat, True)]) == [
        [(brown, True), (hat, True)],
        [(black, False)],
    ]


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        (("class", "ox"), "an ox"),
        (("class", "umbrella"), "an umbrella"),
        (("class", "military uniform"), "a military uniform"),
        (("class", "lesser panda"), "a red panda"),
        (("class", "ice cream"), " ice cream"),
        (("group", "food"), " food"),
        (("thing", "*flowers"), " flowers"),
        (("color", "dog", "orange"), "an orange dog"),
    ],
)
def test_questions_are_english(fact, expected):
    asked = {facts.ask_whether(fact, random.Random(seed)) for seed in range(40)}
    assert len(asked) > 2
    assert any(expected in question for question in asked)
    assert not any("*" in question or "a an " in question or "{" in question for question in asked)


def test_plurals_agree():
    asked = {facts.ask_whether(("class", "sunglasses"), random.Random(seed)) for seed in range(60)}
    assert {"Are these sunglasses?", "Are there sunglasses here?", "Do you see sunglasses?"} <= asked
    assert not any(question.startswith("Is ") for question in asked)


def test_choices_hold_the_answer_in_any_place():
    rng = random.Random(0)
    names = ["lion", "tabby", "goose", "pizza", "lesser panda"]
    places = collections.Counter()
    for _ in range(80):
        question, answer = choice_turn("lesser panda", names, rng)
        options = question.split(": ")[1].rstrip("?").replace(" or ", ", ").split(", ")
        assert answer == "red panda"
        assert len(set(options)) == 4
        places[options.index(answer)] += 1
    assert min(places.values()) > 8
    group, ((question, answer),) = apart_turn("lion", ["lion", "pizza"], rng)
    assert group == answer == "an animal"
    assert "food" in question
    assert apart_turn("candle", names, rng) == (None, []) == apart_turn("lion", ["lion", "tabby"], rng)


def test_small_things():
    assert tidy(" two dogs play , one runs . ") == "Two dogs play, one runs."
    assert tidy("the dog 's ball") == "The dog's ball."
    assert [len(part) for part in chunks([("", "")] * 8, 6)] == [4, 4]
    assert chunks([], 6) == []
    rows = Rows("qa", [{}], {"questions": [["what is  this ?"]], "answers": [["garbage_bin"]]}, {})
    assert own_turns(rows) == [[("What is this?", "garbage bin")]]


# ------------------------------------------------------------------------------------------- whole files
@pytest.fixture(scope="module")
def packs(tmp_path_factory) -> list[str]:
    """Sets of captions, of classes, and of questions, with a train and a val each."""
    root = tmp_path_factory.mktemp("packs")
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "png")
    names = ["lion", "tabby", "lesser panda", "goose", "pizza", "school bus", "desk", "candle"]
    columns = {
        "captioned": {"captions": [DOG, BEACH, ["A man rides a bike", "A cyclist"], ["Snow"]] * 3},
        "labelled": {"label_name": names * 3, "captions": [[f"a photo of a {name}"] for name in names] * 3},
        "asked": {"questions": [["what is it ?", "how many ?"]] * 3, "answers": [["a_b", "2"]] * 3},
    }
    for name, values in columns.items():
        (root / name).mkdir()
        count = len(next(iter(values.values())))
        values["image"] = [{"bytes": file.getvalue(), "path": None}] * count
        for split in ("train", "val"):
            kinds = datasets.Dataset.from_dict(values).features | {"image": datasets.Image(decode=False)}
            table = datasets.Dataset.from_dict(values, features=datasets.Features(kinds))
            table.to_parquet(root / name / f"{split}.parquet")
    classes = [{"names": "lesser panda, red panda, bear cat"}]
    (root / "labelled" / "classes.json").write_text(json.dumps({"classes": classes}))
    return [str(root / name) for name in columns]


def test_files_of_conversations_and_tasks(packs, tmp_path):
    written = write_questions(packs, tmp_path / "one", limit=40)
    names = [path.name for path, _, _ in written]
    assert names == [
        "captioned-train.parquet",
        "labelled-train.parquet",
        "asked-train.parquet",
        "labelled-align.parquet",
        "captioned-align.parquet",
        *(f"{task}-val.parquet" for task in ("yes-no", "what-is-it", "which-of-these", "captions", "qa")),
    ]
    for path, pictures, asked in written:
        rows = datasets.Dataset.from_parquet(str(path))
        assert len(rows) == pictures
        assert rows[0]["image"]["bytes"]
        if "conversations" in rows.column_names:
            talks = rows["conversations"]
            assert sum(len(talk) for talk in talks) == 2 * asked
            for talk in talks:
                assert [turn["from"] for turn in talk] == ["human", "gpt"] * (len(talk) // 2)
                assert talk[0]["value"].startswith("<image>\n")
                assert all("<image>" not in turn["value"] and turn["value"] for turn in talk[1:])
            assert len(set(rows["id"])) == len(rows)
        else:
            assert sum(map(len, rows["questions"])) == sum(map(len, rows["answers"])) == asked
    yes_no = datasets.Dataset.from_parquet(str(tmp_path / "one" / "yes-no-val.parquet"))
    given = collections.Counter(answer for answers in yes_no["answers"] for (answer,) in answers)
    assert given["yes"] == given["no"] > 5
    named = datasets.Dataset.from_parquet(str(tmp_path / "one" / "what-is-it-val.parquet"))
    assert ["red panda", "lesser panda", "bear cat"] in [answers[0] for answers in named["answers"]]
    captions = datasets.Dataset.from_parquet(str(tmp_path / "one" / "captions-val.parquet"))
    assert {len(answers[0]) for answers in captions["answers"]} == {5, 3, 2, 1}
    assert set(captions["task"]) == {"captions"}

    write_questions(packs, tmp_path / "again", limit=40)
    write_questions(packs, tmp_path / "other", limit=40, seed=1, split="train")
    files = [
        (tmp_path / folder / "labelled-train.parquet").read_bytes() for folder in ("one", "again", "other")
    ]
    assert files[0] == files[1] != files[2]
    assert not (tmp_path / "other" / "yes-no-val.parquet").exists()


def test_stage_align_sees_each_picture_once_with_a_caption_or_its_name(packs, tmp_path):
    write_questions(packs, tmp_path, split="train")
    told = {}
    for name in ("captioned", "labelled"):
        rows = datasets.Dataset.from_parquet(str(tmp_path / f"{name}-align.parquet"))
        assert all(len(talk) == 2 for talk in rows["conversations"])
        told[name] = dict(zip(rows["id"], (talk[1]["value"] for talk in rows["conversations"]), strict=True))
        numbers = [int(row.rpartition("-")[2]) for row in rows["id"]]
        assert sorted(numbers) == list(range(len(rows))) != numbers
    assert told["captioned"]["captioned-3"] == "Snow."
    assert {told["captioned"][f"captioned-{i}"] for i in (0, 4, 8)} <= {tidy(caption) for caption in DOG}
    assert told["labelled"]["labelled-2"] == "red panda"
    assert not (tmp_path / "asked-align.parquet").exists()
    rows = Rows("some", [{}] * 3, {"captions": [["A dog"], None, [" "]]}, {})
    assert len(descriptions([rows], seed=0)["some"]) == 1


def test_the_command_says_what_it_wrote(packs, tmp_path, capsys):
    assert main(["questions", *packs, "-o", str(tmp_path), "--split", "val", "--limit", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0] == f"{tmp_path}/yes-no-val.parquet: " + lines[0].partition(": ")[2]
    assert lines[-1].endswith("3 rows, 6 questions")
    assert main(["questions", "-o", str(tmp_path)]) == 2
    assert "give at least one set" in capsys.readouterr().err


def test_names_of_classes_are_never_given_away_by_a_question_before():
    rows = Rows("labelled", [{}] * 60, {"label_name": ["lion", "goose", "pizza"] * 20}, {})
    talks = conversations([rows], seed=0)["labelled"]
    asked = 0
    for talk in talks:
        said = [turn["value"] for turn in talk["conversations"]]
        names = [k for k in range(1, len(said), 2) if said[k] in ("lion", "goose", "pizza")]
        asked += len(names)
        for k in names:
            assert not any(said[k] in said[j] and said[j + 1] == "yes" for j in range(0, k - 1, 2))
    assert asked == 60


def test_mistakes_are_one_line(packs, tmp_path):
    for sets, message in (
        ([], "give at least one set"),
        ([f"{packs[0]}/train.parquet"], "give the folder"),
        ([packs[0], packs[0]], "two sets are called captioned"),
        ([str(tmp_path)], "cannot open"),
    ):
        with pytest.raises(UserError, match=message):
            write_questions(sets, tmp_path / "out")
    with pytest.raises(UserError, match="limit must be at least 4"):
        write_questions(packs, tmp_path / "out", limit=1)
    with pytest.raises(UserError, match="nothing to ask about"):
        conversations([Rows("bare", [{}], {}, {})], seed=0)
    assert tasks([Rows("bare", [{}], {}, {})], 10, seed=0) == {}


def test_plain_names_are_of_known_classes():
    known = frozenset().union(*(members | unclear for members, unclear in GROUPS.values()))
    assert {"tabby", "monarch", "bighorn", "beacon"} <= known & set(PLAIN_NAMES)
