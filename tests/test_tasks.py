import copy
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import MappingProxyType

import pytest

import tvlens.tasks
from tvlens.tasks import (
    PAPER_TASKS,
    Task,
    list_tasks,
    load_task,
    register_task,
    task_names,
)
from tvlens.tasks.algorithmic import LIST_LENGTHS, N_LISTS, letter_lists

DATA = Path(tvlens.tasks.__file__).parent / "data"
MORE_TASKS = {
    "list_min",
    "list_max",
    "list_length",
    "char_to_int",
    "int_to_char",
    "it_en",
    "en_it",
    "past_perfect",
    "singular_plural",
}
ALL_TASKS = (*PAPER_TASKS, *sorted(MORE_TASKS))
SIZES = {
    "next_letter": 25,
    "prev_letter": 25,
    "to_upper": 26,
    "to_lower": 26,
    "char_to_int": 26,
    "int_to_char": 26,
    **dict.fromkeys(("list_first", "list_last", "list_min", "list_max", "list_length"), N_LISTS),
}
LEAST = {
    **dict.fromkeys(("fr_en", "es_en", "it_en", "en_fr", "en_es", "en_it"), 300),
    **dict.fromkeys(("gerund", "past_simple", "plural_singular", "singular_plural"), 250),
    **dict.fromkeys(("antonyms", "past_perfect", "country_capital", "location_religion"), 150),
    "person_language": 200,
    "location_continent": 300,
}
FACTS = [
    ("next_letter", "y", "z"),
    ("prev_letter", "z", "y"),
    ("to_upper", "q", "Q"),
    ("to_lower", "Q", "q"),
    ("char_to_int", "z", "26"),
    ("int_to_char", "10", "j"),
    ("fr_en", "eau", "water"),
    ("fr_en", "été", "summer"),
    ("en_fr", "water", "eau"),
    ("es_en", "corazón", "heart"),
    ("en_es", "bird", "pájaro"),
    ("it_en", "perché", "why"),
    ("en_it", "city", "città"),
    ("gerund", "lie", "lying"),
    ("gerund", "run", "running"),
    ("gerund", "open", "opening"),
    ("gerund", "make", "making"),
    ("gerund", "agree", "agreeing"),
    ("past_simple", "go", "went"),
    ("past_simple", "study", "studied"),
    ("past_simple", "stop", "stopped"),
    ("past_simple", "visit", "visited"),
    ("past_simple", "play", "played"),
    ("past_perfect", "write", "written"),
    ("past_perfect", "swim", "swum"),
    ("plural_singular", "mice", "mouse"),
    ("plural_singular", "boxes", "box"),
    ("plural_singular", "hypotheses", "hypothesis"),
    ("singular_plural", "child", "children"),
    ("singular_plural", "city", "cities"),
    ("antonyms", "hot", "cold"),
    ("country_capital", "Australia", "Canberra"),
    ("country_capital", "Canada", "Ottawa"),
    ("country_capital", "Turkey", "Ankara"),
    ("country_capital", "Kazakhstan", "Astana"),
    ("person_language", "Leo Tolstoy", "Russian"),
    ("person_language", "Henrik Ibsen", "Norwegian"),
    ("person_language", "Virgil", "Latin"),
    ("location_continent", "Vostok Station", "Antarctica"),
    ("location_continent", "Greenland", "North America"),
    ("location_continent", "Andes", "South America"),
    ("location_religion", "Borobudur", "Buddhism"),
    ("location_religion", "Varanasi", "Hinduism"),
    ("location_religion", "Mecca", "Islam"),
]


def make(name="opposite", family="custom", answers=None, **fields):
    answers = {"hot": ("cold", "cool"), "up": ("down",)} if answers is None else answers
    return Task(name, family, answers, **fields)


def run_python(code, **env):
    """Run code with shape checks off, as a user does by default."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TVLENS_CHECK_SHAPES": "0", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(tvlens.tasks, "_registered", {})


# --- the built-in tasks ---------------------------------------------------------------------------


def test_names():
    assert len(PAPER_TASKS) == 18
    assert task_names()[:18] == PAPER_TASKS
    assert set(task_names()[18:]) == MORE_TASKS
    assert len(task_names()) == 27


def test_every_data_file_is_listed():
    named = set()
    for path in DATA.glob("*.json"):
        header = json.loads(path.read_text(encoding="utf-8"))
        assert header["name"] == path.stem
        named |= {header["name"], header.get("reverse", header)["name"]}
    assert named < set(task_names())
    assert {load_task(name).family for name in set(task_names()) - named} == {"algorithmic"}


@pytest.mark.parametrize("name", ALL_TASKS)
def test_size(name):
    task = load_task(name)
    assert task.name == name
    if name in SIZES:
        assert len(task) == SIZES[name]
    else:
        assert len(task) >= LEAST[name]


@pytest.mark.parametrize("name", ALL_TASKS)
def test_items_are_clean(name):
    task = load_task(name)
    for x, ys in task.answers.items():
        assert len(set(ys)) == len(ys)
        assert x not in ys
        for text in (x, *ys):
            assert text == " ".join(text.split())
            assert unicodedata.is_normalized("NFC", text)
            # The typographic apostrophe is another token than the one people type.
            assert not set(text) & set("’‘“”–—\u00a0")
    folded = [x.casefold() for x in task.inputs]
    assert len(set(folded)) == len(folded)


@pytest.mark.parametrize("name", ALL_TASKS)
def test_origin_and_spacing_are_stated(name):
    task = load_task(name)
    assert task.licence == "MIT (tvlens)"
    assert task.source
    assert task.description.endswith(".")
    assert task.spaced is (task.family != "algorithmic")


@pytest.mark.parametrize("name", ALL_TASKS)
def test_case_is_of_one_kind(name):
    task = load_task(name)
    words = [w for x, ys in task.answers.items() for w in (x, *ys)]
    if task.family in ("translation", "linguistic"):
        assert all(w == w.lower() and w.replace("'", "").isalpha() for w in words)
    elif task.family == "knowledge":
        assert all(y[0].isupper() for ys in task.answers.values() for y in ys)
        assert all(x[0].isupper() for x in task.inputs)


@pytest.mark.parametrize(("name", "x", "y"), FACTS)
def test_facts(name, x, y):
    assert load_task(name).answers[x][0] == y


def test_several_answers_are_accepted():
    assert load_task("country_capital").answers["South Africa"][1:] == ("Cape Town", "Bloemfontein")
    assert "tall" in load_task("fr_en").answers["grand"]
    assert load_task("past_simple").answers["learn"] == ("learned", "learnt")


def test_lists_are_what_the_paper_says():
    lists = [x.split(",") for x in load_task("list_first").inputs]
    for xs in lists:
        assert len(xs) in LIST_LENGTHS
        assert len(set(xs)) == len(xs)
        assert all(re.fullmatch("[a-z]", x) for x in xs)
    by_length = load_task("list_length").class_counts()
    assert by_length == dict.fromkeys(by_length, N_LISTS // 3)
    rules = {
        "list_first": lambda xs: xs[0],
        "list_last": lambda xs: xs[-1],
        "list_min": lambda xs: sorted(xs)[0],
        "list_max": lambda xs: sorted(xs)[-1],
        "list_length": lambda xs: str(len(xs)),
    }
    for name, rule in rules.items():
        task = load_task(name)
        assert task.inputs == letter_lists()
        assert [y for _, y in task.pairs] == [rule(xs) for xs in lists]


def test_letter_tasks_follow_the_alphabet():
    following, previous = load_task("next_letter"), load_task("prev_letter")
    assert previous.pairs == tuple((y, x) for x, y in following.pairs)
    assert load_task("to_lower").pairs == tuple((y, x) for x, y in load_task("to_upper").pairs)
    assert load_task("int_to_char").pairs == tuple(
        (y, x) for x, y in load_task("char_to_int").pairs
    )


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        ("fr_en", "en_fr"),
        ("es_en", "en_es"),
        ("it_en", "en_it"),
        ("plural_singular", "singular_plural"),
    ],
)
def test_derived_direction_agrees(forward, backward):
    there, back = load_task(forward), load_task(backward)
    assert set(back.inputs) == {y for _, y in there.pairs}
    for y, xs in back.answers.items():
        assert all(y in there.answers[x] for x in xs)
        assert there.answers[xs[0]][0] == y
        assert set(xs) == {x for x, ys in there.answers.items() if y in ys}


def test_collisions_are_merged():
    assert load_task("en_fr").answers["fly"] == ("mouche", "voler")
    assert load_task("en_es").answers["answer"] == ("respuesta", "responder")
    assert load_task("singular_plural").answers["cactus"] == ("cacti", "cactuses")


def test_antonyms_name_no_pair_twice():
    """A pair in both directions would put the answer of a query among the demonstrations."""
    task = load_task("antonyms")
    assert not set(task.inputs) & {y for _, y in task.pairs}


def test_past_forms_differ_from_their_verb():
    past, perfect, gerund = map(load_task, ("past_simple", "past_perfect", "gerund"))
    assert set(past.inputs) | set(perfect.inputs) <= set(gerund.inputs)
    assert all(ys[0].endswith("ing") for ys in gerund.answers.values())
    regular = [y for x, y in perfect.pairs if y.endswith("ed") and y not in past.answers.get(x, ())]
    assert regular == []


def test_capitals_that_repeat_the_country_are_left_out():
    for country, capitals in load_task("country_capital").answers.items():
        assert not capitals[0].startswith(country)


def test_balance():
    languages = load_task("person_language")
    assert len(languages.class_counts()) >= 15
    assert languages.class_counts()["English"] / len(languages) < 0.3
    assert languages.majority()[1] < 0.1
    continents = load_task("location_continent")
    assert set(continents.class_counts()) == {
        "Africa",
        "Antarctica",
        "Asia",
        "Europe",
        "North America",
        "Oceania",
        "South America",
    }
    assert continents.effective_classes() > 6.5
    religions = load_task("location_religion")
    assert set(religions.class_counts()) == {
        "Islam",
        "Christianity",
        "Judaism",
        "Buddhism",
        "Hinduism",
    }
    assert religions.effective_classes() > 4.8


@pytest.mark.parametrize("name", ["location_continent", "location_religion", "person_language"])
def test_balanced_forms_load_by_name(name):
    task = load_task(f"{name}_balanced")
    assert task.name == f"{name}_balanced"
    assert task.name not in task_names()
    assert len(set(task.class_counts().values())) == 1
    assert task.effective_classes() == pytest.approx(len(load_task(name).class_counts()))
    assert task.licence == load_task(name).licence
    assert task.answers.items() <= load_task(name).answers.items()


def test_same_tasks_in_every_process():
    """No item may depend on the order of a set, which the hash seed decides."""
    code = (
        "from tvlens.tasks import load_task, task_names\n"
        "for n in [*task_names(), 'location_continent_balanced', 'person_language_balanced']:\n"
        "    print(n, load_task(n).fingerprint)"
    )
    first, second = (run_python(code, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert first == second
    names = [*task_names(), "location_continent_balanced", "person_language_balanced"]
    assert first.splitlines() == [f"{n} {load_task(n).fingerprint}" for n in names]


def test_tasks_need_no_torch():
    code = (
        "import sys, tvlens.tasks\n"
        "tvlens.tasks.load_task('fr_en').balanced()\n"
        "print([m for m in ('torch', 'transformer_lens', 'pandas') if m in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


# --- the list -------------------------------------------------------------------------------------


def test_list_tasks():
    table = list_tasks()
    assert table.columns.tolist() == [
        "task",
        "family",
        "size",
        "classes",
        "majority",
        "majority_share",
        "effective_classes",
        "example",
        "licence",
    ]
    assert tuple(table.task) == task_names()
    row = table.set_index("task").loc["country_capital"]
    assert row.example == "France -> Paris"
    assert row["size"] == len(load_task("country_capital"))
    assert (row.majority, row.classes) == ("London", row["size"] - 1)
    assert ((table.effective_classes <= table.classes + 1e-9) & (table.classes > 1)).all()


def test_list_tasks_of_one_family(registry):
    assert set(list_tasks("knowledge").task) == {
        "country_capital",
        "person_language",
        "location_continent",
        "location_religion",
    }
    register_task(make())
    assert list_tasks("custom").task.tolist() == ["opposite"]
    with pytest.raises(ValueError, match=r"unknown task family 'knowlege'\. Nearest: knowledge"):
        list_tasks("knowlege")


@pytest.mark.parametrize(
    ("asked", "offered"),
    [
        ("to_uper", "to_upper"),
        ("capital_country", "country_capital"),
        ("location_continent_balance", "location_continent_balanced"),
        ("nonsense_balanced", "Nearest"),
    ],
)
def test_unknown_task_offers_the_nearest(asked, offered):
    with pytest.raises(ValueError, match=f"unknown task '{asked}'.*{offered}") as caught:
        load_task(asked)
    assert "Task.from_file" in str(caught.value)


# --- registering ----------------------------------------------------------------------------------


def test_register(registry):
    task = register_task(make())
    assert load_task("opposite") is task
    assert task_names()[-1] == "opposite"
    assert load_task("opposite_balanced").name == "opposite_balanced"
    assert list_tasks().task.tolist()[-1] == "opposite"


def test_register_refuses_a_taken_name(registry):
    register_task(make())
    register_task(make("constant", answers={"a": ("x",), "b": ("x",)}))
    for name in ("opposite", "fr_en", "location_religion_balanced", "constant_balanced"):
        with pytest.raises(ValueError, match=f"a task '{name}' already.*replace=True"):
            register_task(make(name))


def test_register_replaces_when_asked(registry):
    built_in = load_task("antonyms")
    other = register_task(make("antonyms"), replace=True)
    assert load_task("antonyms") is other != built_in
    assert len(task_names()) == 27


def test_wrong_types_are_named():
    """In a process of its own: with shape checks on, beartype speaks before tvlens does."""
    code = """
from tvlens.tasks import Task, load_task, register_task
for call in (
    lambda: register_task("fr_en"),
    lambda: load_task(load_task("fr_en")),
    lambda: Task("t", "custom", [("a", "b")]),
    lambda: Task("t", "custom", {"a": "b", "c": "d"}),
    lambda: Task("t", "custom", {"a": ["b"], "c": ("d",)}),
    lambda: Task("t", "custom", {1: ("b",), "c": ("d",)}),
    lambda: Task("t", "custom", {"a": (2,), "c": ("d",)}),
):
    try:
        call()
    except TypeError as error:
        print(error)
"""
    said = run_python(code).splitlines()
    expected = [
        "register_task takes a Task; got str. Task.from_file(path) makes one.",
        "load_task takes the name of a task; got Task.",
        "task 't' needs a mapping from input to a tuple of accepted answers, "
        "e.g. {'France': ('Paris',)}; got list.",
        "task 't': the answers of 'a' must be a tuple, e.g. ('Paris',); got str 'b'.",
        "task 't': the answers of 'a' must be a tuple, e.g. ('Paris',); got list ['b'].",
        "task 't': an input must be a string; got int 1.",
        "task 't': an answer of 'a' must be a string; got int 2.",
    ]
    assert said == expected


# --- Task -----------------------------------------------------------------------------------------


def test_task_is_immutable():
    mine = {"hot": ("cold",), "up": ("down",)}
    task = make(answers=mine)
    before = task.fingerprint
    mine["in"] = ("out",)
    assert len(task) == 2
    assert isinstance(task.answers, MappingProxyType)
    with pytest.raises(TypeError, match="does not support item assignment"):
        task.answers["hot"] = ("warm",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "other"
    assert task.fingerprint == before


def test_equality_and_hash():
    task = make()
    assert task == make() and hash(task) == hash(make())
    swapped = make(answers=dict(reversed(task.answers.items())))
    for other in (
        make("other"),
        make(family="other"),
        make(spaced=False),
        make(licence="CC0"),
        swapped,
    ):
        assert task != other
    assert task != "opposite"
    assert len({task, make(), make("other")}) == 2


def test_fingerprint_is_of_what_decides_a_prompt():
    task = make()
    assert re.fullmatch("[0-9a-f]{16}", task.fingerprint)
    assert make("other", description="x", licence="y").fingerprint == task.fingerprint
    swapped = make(answers=dict(reversed(task.answers.items())))
    fewer = make(answers={"hot": ("cold",), "up": ("down",)})
    prints = [t.fingerprint for t in (task, swapped, fewer, make(spaced=False))]
    assert len(set(prints)) == 4
    # A change of the canonical form would orphan every saved vector: it must be noticed.
    assert task.fingerprint == "1d1a53cea617b56f"


def test_copies_are_equal():
    task = load_task("en_fr")
    assert copy.deepcopy(task) == task
    assert copy.copy(task).answers == task.answers
    renamed = dataclasses.replace(task, name="other")
    assert renamed.fingerprint == task.fingerprint and renamed.name == "other"


def test_views():
    task = make()
    assert task.inputs == ("hot", "up")
    assert task.pairs == (("hot", "cold"), ("up", "down"))
    assert len(task) == 2
    assert repr(task) == "Task('opposite', 'custom', 2 items, hot -> cold)"


def test_class_statistics():
    task = make(answers={"a": ("x",), "b": ("y", "x"), "c": ("y",), "d": ("y",)})
    assert task.class_counts() == {"y": 3, "x": 1}
    assert list(task.class_counts()) == ["y", "x"]
    assert task.majority() == ("y", 0.75)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert task.effective_classes() == pytest.approx(math.exp(entropy))
    assert load_task("to_upper").effective_classes() == pytest.approx(26)


def test_balanced_keeps_order_and_depends_on_the_seed():
    task = load_task("location_continent")
    smallest = min(task.class_counts().values())
    default = task.balanced()
    assert set(default.class_counts().values()) == {smallest}
    assert default == task.balanced(smallest) == task.balanced(seed=0)
    assert default.inputs == tuple(x for x in task.inputs if x in default.answers)
    other = task.balanced(seed=1)
    assert other.fingerprint != default.fingerprint
    assert other.class_counts() == default.class_counts()
    assert f"{smallest} items of each answer" in default.description


def test_balanced_drops_answers_that_are_too_rare():
    task = load_task("person_language").balanced(20)
    assert set(task.class_counts()) == {
        "English",
        "French",
        "German",
        "Spanish",
        "Italian",
        "Russian",
    }
    assert set(task.class_counts().values()) == {20}


@pytest.mark.parametrize("per_class", [0, -1, 30, 1000])
def test_balanced_refuses(per_class):
    with pytest.raises(ValueError, match=rf"with {per_class} items per answer; valid: 1 to 26"):
        load_task("person_language").balanced(per_class)


def test_balanced_refuses_a_task_of_one_answer():
    with pytest.raises(ValueError, match="only one answer"):
        make(answers={"a": ("x",), "b": ("x",)}).balanced()


def test_inverse_puts_canonical_inputs_first():
    task = make(answers={"gros": ("fat", "big"), "grand": ("big", "tall")}, spaced=False)
    back = task.inverse("back", description="Back.")
    assert dict(back.answers) == {"fat": ("gros",), "big": ("grand", "gros")}
    assert (back.name, back.description, back.spaced) == ("back", "Back.", False)


@pytest.mark.parametrize(
    ("name", "valid"),
    [("My Task", "my_task"), ("to-upper", "to_upper"), ("", "task"), ("2nd", "task_2nd")],
)
def test_a_name_is_a_slug(name, valid):
    with pytest.raises(ValueError, match=f"name of a task.*got '{name}'.*'{valid}'"):
        make(name)
    assert make(valid).name == valid
    with pytest.raises(ValueError, match="family of task 'opposite'"):
        make(family=name)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"a": (), "c": ("d",)}, "'a' has no answer"),
        ({"": ("b",), "c": ("d",)}, "an input is empty: ''"),
        ({"a": (" ",), "c": ("d",)}, "an answer of 'a' is empty"),
        ({"a": ("b ",), "c": ("d",)}, "starts or ends with white space"),
        ({"a\nb": ("b",), "c": ("d",)}, "contains a line break"),
        ({"a": ("\ud800",), "c": ("d",)}, "not valid Unicode"),
        ({"a": ("b", "b"), "c": ("d",)}, "'a' accepts an answer twice: b, b"),
        ({}, "has 0 items; at least 2"),
        ({"a": ("b",)}, "has 1 item; at least 2 are needed.* takes 8"),
    ],
)
def test_a_task_refuses_bad_answers(answers, message):
    with pytest.raises(ValueError, match=message):
        make(answers=answers)


# --- files ----------------------------------------------------------------------------------------


def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def test_json_of_pairs(tmp_path):
    path = write(tmp_path, "My Colours-2.json", '{"ciel": "bleu", "été": ["vert", "jaune"]}')
    task = Task.from_file(path)
    assert dict(task.answers) == {"ciel": ("bleu",), "été": ("vert", "jaune")}
    assert (task.name, task.family, task.spaced) == ("my_colours_2", "custom", True)
    named = Task.from_file(str(path), name="colours", family="seen", spaced=False)
    assert (named.name, named.family, named.spaced) == ("colours", "seen", False)


def test_an_input_called_items(tmp_path):
    path = write(tmp_path, "t.json", '{"items": "things", "name": "word"}')
    assert dict(Task.from_file(path).answers) == {"items": ("things",), "name": ("word",)}


@pytest.mark.parametrize("stem", sorted(p.stem for p in DATA.glob("*.json")))
def test_own_data_files_read_back(stem):
    task = Task.from_file(DATA / f"{stem}.json")
    assert task == load_task(stem)
    assert Task.from_file(DATA / f"{stem}.json", family="other").family == "other"


def test_round_trip_through_own_form(tmp_path):
    task = load_task("list_last")
    text = json.dumps(
        {
            "name": task.name,
            "family": task.family,
            "description": task.description,
            "source": task.source,
            "licence": task.licence,
            "spaced": task.spaced,
            "items": dict(task.answers),
        }
    )
    assert Task.from_file(write(tmp_path, "x.json", text)) == task


@pytest.mark.parametrize("header", ["", "input,output\n", "Input, Output\r\n"])
def test_csv(tmp_path, header):
    text = f'{header}France, Paris\n"a,b",c\n\nĐồng Hới,Việt Nam\n'
    task = Task.from_file(write(tmp_path, "t.csv", text))
    assert task.pairs == (("France", "Paris"), ("a,b", "c"), ("Đồng Hới", "Việt Nam"))
    assert (task.name, task.family) == ("t", "custom")


def test_csv_header_is_an_item_further_down(tmp_path):
    task = Task.from_file(write(tmp_path, "t.csv", "read,write\ninput,output\n"))
    assert task.pairs == (("read", "write"), ("input", "output"))


def test_csv_and_json_agree_on_a_spreadsheet_export(tmp_path):
    """A spreadsheet puts a byte-order mark in front; it is no part of the first input."""
    as_csv = Task.from_file(write(tmp_path, "t.csv", "a,b\r\nc,d\r\n", "utf-8-sig"))
    as_json = Task.from_file(write(tmp_path, "t.json", '{"a": "b", "c": "d"}', "utf-8-sig"))
    assert as_csv == as_json
    assert as_csv.inputs == ("a", "c")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "a,b", r"ends in .json or .csv; this one ends in '.txt'"),
        ("t", "a,b", r"ends in .json or .csv; this one ends in ''"),
        ("t.json", '{"a": "b",\n "c" "d"}', "not JSON: .* at line 2, column 6"),
        ("t.json", "", "not JSON: .* at line 1, column 1"),
        ("t.json", '["a", "b"]', "a task is a JSON object.*this is a list"),
        ("t.json", b'{"a": "b",\n "caf\xe9": "d"}', "not UTF-8 text: byte 0xe9 on line 2"),
        ("t.csv", "a,b\n".encode("utf-16"), "not UTF-8 text: byte 0xff on line 1"),
        ("t.json", '{"a": "b", "a": "c"}', r"duplicate key 'a'.*\"a\": \[\"first\", \"second\"\]"),
        ("t.json", '{"a": "b"}', "task 't' has 1 item; at least 2 are needed.* takes 8"),
        ("t.json", "{}", "has 0 items"),
        ("t.json", '{"a": "", "c": "d"}', "an answer of 'a' is empty"),
        ("t.json", '{" ": "b", "c": "d"}', "an input is empty"),
        ("t.json", '{"a": [], "c": "d"}', "'a' has no answer"),
        ("t.json", '{"a": 1, "c": "d"}', "answer of 'a' must be a string.*got int 1.*\"1\""),
        ("t.json", '{"a": ["b", null], "c": "d"}', "answer of 'a' must be.*got NoneType None"),
        ("t.json", '{"a": {"b": "c"}, "c": "d"}', "answer of 'a' must be.*got dict"),
        ("t.json", '{"items": {"a": "b"}, "licens": "x"}', "'licens'. Nearest: licence"),
        (
            "t.json",
            '{"items": {"a": "b"}, "spaced": "no"}',
            "'spaced' must be a bool; got str 'no'",
        ),
        ("t.json", '{"items": {"a": "b", "c": "d"}, "name": "A B"}', "got 'A B'.*'a_b'"),
        ("t.csv", "", "has 0 items"),
        ("t.csv", "input,output\na,b\n", "has 1 item;"),
        ("t.csv", "a,b\nc,d\na,e\n", r"duplicate key 'a' on line 3 \(first on line 1: 'b'\)"),
        ("t.csv", "a,b\nc\n", "line 2 has 1 column, not the 2"),
        ("t.csv", "a,b\nc,d,e\n", "line 2 has 3 columns, not the 2.*in quotes"),
        ("t.csv", "a,b\nc,\n", "line 2 has an empty output"),
        ("t.csv", "a,b\n ,d\n", "line 2 has an empty input"),
        ("t.csv", 'a,b\nc,"d', "not CSV: .* on line 2"),
    ],
)
def test_files_that_are_no_task(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=message) as caught:
        Task.from_file(path)
    assert str(caught.value).startswith(str(path))


def test_missing_file_offers_a_neighbour(tmp_path):
    write(tmp_path, "capitals.csv", "a,b")
    with pytest.raises(
        FileNotFoundError, match=r"no task file .*capitls.csv. Nearest there: capit"
    ):
        Task.from_file(tmp_path / "capitls.csv")
    with pytest.raises(FileNotFoundError, match=r"load_task\(name\)"):
        Task.from_file(tmp_path / "nowhere" / "t.json")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        Task.from_file(tmp_path)


def test_a_file_becomes_a_task_by_name(tmp_path, registry):
    path = write(tmp_path, "mine.csv", "a,b\nc,d\n")
    register_task(Task.from_file(path))
    assert load_task("mine").pairs == (("a", "b"), ("c", "d"))
