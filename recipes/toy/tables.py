"""What the toy model is taught: its closed vocabulary, its tasks, and what is held out.

Inputs are shared by several tasks on purpose (a letter has a next one, an upper case, a place; a
noun a plural and a translation), so that an input alone never tells the task. ``python -m
recipes.toy.tables`` writes all of it to ``tvlens/models/data/toy/tasks.json``, which the recipe and
tvlens read.

Two things are held out of every *few-shot* prompt of the training. *Held-out items* of each mapping
task, and the 600 lists of tvlens' list tasks. *Held-out instances*: whole tasks of a family (a
shift by another number, another rule for lists composed with another map). The model does meet
held-out mapping pairs in prompts that name the task ("example:cat plural->cats"), as a language
model knows facts from text, and as queries that stand alone and get theta of such a prompt; held-out
lists it never meets.
"""

import json
import random
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase

PATH = Path(__file__).parents[2] / "tvlens" / "models" / "data" / "toy" / "tasks.json"
HELD_OUT_SHARE = 0.2
_SEED = 7

COUNTRIES = """
France Paris Europe French|Germany Berlin Europe German|Italy Rome Europe Italian
Spain Madrid Europe Spanish|Russia Moscow Europe Russian|Poland Warsaw Europe Polish
Greece Athens Europe Greek|Austria Vienna Europe German|Portugal Lisbon Europe Portuguese
Sweden Stockholm Europe Swedish|Norway Oslo Europe Norwegian|Japan Tokyo Asia Japanese
China Beijing Asia Chinese|Thailand Bangkok Asia Thai|Vietnam Hanoi Asia Vietnamese
Iran Tehran Asia Persian|Turkey Ankara Asia Turkish|Syria Damascus Asia Arabic
Israel Jerusalem Asia Hebrew|Egypt Cairo Africa Arabic|Morocco Rabat Africa Arabic
Kenya Nairobi Africa Swahili|Angola Luanda Africa Portuguese|Senegal Dakar Africa French
Ghana Accra Africa English|Canada Ottawa America English|Cuba Havana America Spanish
Peru Lima America Spanish|Chile Santiago America Spanish|Brazil Brasilia America Portuguese
"""
NOUNS = """
cat cats chat|dog dogs chien|house houses maison|book books livre|tree trees arbre
car cars voiture|door doors porte|hand hands main|child children enfant|man men homme
woman women femme|foot feet pied|tooth teeth dent|bird birds oiseau|day days jour
night nights nuit|king kings roi|city cities ville|baby babies bébé|leaf leaves feuille
box boxes boîte|knife knives couteau|mouse mice souris|horse horses cheval|friend friends ami
garden gardens jardin|apple apples pomme|school schools école|river rivers rivière
window windows fenêtre
"""
VERBS = """
run running ran|go going went|eat eating ate|sing singing sang|write writing wrote
take taking took|give giving gave|come coming came|see seeing saw|swim swimming swam
drink drinking drank|sleep sleeping slept|buy buying bought|think thinking thought
bring bringing brought|catch catching caught|teach teaching taught|find finding found
hold holding held|tell telling told|sell selling sold|fly flying flew|grow growing grew
know knowing knew|draw drawing drew|throw throwing threw|walk walking walked|play playing played
call calling called|jump jumping jumped
"""
ADJECTIVES = """
big bigger|small smaller|hot hotter|cold colder|fast faster|slow slower|old older|young younger
tall taller|short shorter|rich richer|poor poorer|hard harder|soft softer|strong stronger
weak weaker|dark darker|light lighter|wet wetter|dry drier|wide wider|narrow narrower|deep deeper
shallow shallower|clean cleaner|dirty dirtier|high higher|low lower|thick thicker|thin thinner
"""
SHIFTS = (2, 3, 4, 5, 6, -2, -3, -4, -5, -6)
SUMS = (2, 3, 4, 5, 6)
SELECT = ("first", "last", "second", "min", "max")
HELD_OUT_INSTANCES = ("shift_4", "shift_back_3", "add_4", "last_upper", "min_next")
N_NUMBERS = 30


def _rows(text: str) -> list[list[str]]:
    return [row.split() for row in text.replace("\n", "|").split("|") if row.strip()]


def _column(text: str, column: int) -> dict[str, str]:
    return {row[0]: row[column] for row in _rows(text)}


def _inverse(answers: dict[str, str]) -> dict[str, str]:
    return {y: x for x, y in answers.items()}


def mappings() -> dict[str, dict[str, str]]:
    """Give the mapping tasks: name -> input -> answer."""
    low = ascii_lowercase
    numbers = range(1, N_NUMBERS + 1)
    adjectives = [row[0] for row in _rows(ADJECTIVES)]
    opposites = dict(zip(adjectives[::2], adjectives[1::2], strict=True))
    named = {
        "next_letter": dict(pairwise(low)),
        "prev_letter": dict(zip(low[1:], low[:-1], strict=True)),
        "to_upper": {x: x.upper() for x in low},
        "to_lower": {x.upper(): x for x in low},
        "char_to_int": {x: str(i) for i, x in enumerate(low, start=1)},
        "int_to_char": {str(i): x for i, x in enumerate(low, start=1)},
        "number_next": {str(i): str(i + 1) for i in numbers},
        "number_prev": {str(i): str(i - 1) for i in numbers},
        "number_double": {str(i): str(2 * i) for i in numbers},
        "capital": _column(COUNTRIES, 1),
        "continent": _column(COUNTRIES, 2),
        "language": _column(COUNTRIES, 3),
        "country": _inverse(_column(COUNTRIES, 1)),
        "plural": _column(NOUNS, 1),
        "singular": _inverse(_column(NOUNS, 1)),
        "french": _column(NOUNS, 2),
        "english": _inverse(_column(NOUNS, 2)),
        "gerund": _column(VERBS, 1),
        "past": _column(VERBS, 2),
        "present": _inverse(_column(VERBS, 1)),
        "comparative": _column(ADJECTIVES, 1),
        "antonym": opposites | _inverse(opposites),
    }
    up = low.upper()
    named["upper_next"] = dict(pairwise(up))
    named["upper_prev"] = dict(zip(up[1:], up[:-1], strict=True))
    named["upper_to_int"] = {x: str(i) for i, x in enumerate(up, start=1)}
    # Without these a word that has one answer in all tasks would need no demonstrations.
    for kind, words in _kinds().items():
        named[f"{kind}_initial"] = {x: x[0].lower() for x in words}
        named[f"{kind}_copy"] = {x: x for x in words}
        if kind in ("country", "noun", "verb", "adjective"):
            named[f"{kind}_length"] = {x: str(len(x)) for x in words}
    for k in SHIFTS:
        name = f"shift_{k}" if k > 0 else f"shift_back_{-k}"
        named[name] = {x: low[(i + k) % 26] for i, x in enumerate(low)}
    for k in SUMS:
        named[f"add_{k}"] = {str(i): str(i + k) for i in numbers}
    return named


def _kinds() -> dict[str, list[str]]:
    """Give the words that several tasks have as inputs, by their kind."""
    return {
        "country": list(_column(COUNTRIES, 0)),
        "city": list(_column(COUNTRIES, 1).values()),
        "noun": list(_column(NOUNS, 0)),
        "plural": list(_column(NOUNS, 1).values()),
        "french": list(_column(NOUNS, 2).values()),
        "verb": list(_column(VERBS, 0)),
        "gerund": list(_column(VERBS, 1).values()),
        "adjective": list(_column(ADJECTIVES, 0)),
    }


def lists() -> dict[str, tuple[str, str]]:
    """Give the list tasks: name -> (which item, what is done to it)."""
    plain = {f"list_{rule}": (rule, "same") for rule in (*SELECT, "length")}
    both = {f"{rule}_{to}": (rule, to) for rule in SELECT for to in ("upper", "next")}
    return plain | both


def names_of(task: str) -> list[str]:
    """Give the one or two words that name a task in a prompt."""
    if task.startswith(("shift_", "add_")):
        head, _, k = task.rpartition("_")
        return [head.replace("shift_back", "back"), k]
    if task in lists():
        rule, to = lists()[task]
        return [rule] if to == "same" else [rule, to]
    kind, _, rest = task.partition("_")
    return [rest if kind in (*_kinds(), "number", "upper") and rest else task]


def tables(held_out_lists: tuple[str, ...]) -> dict[str, object]:
    """Put everything that is taught into one value, ready for JSON."""
    rng = random.Random(_SEED)
    maps = mappings()
    held = {
        name: sorted(rng.sample(sorted(pairs), round(HELD_OUT_SHARE * len(pairs))))
        for name, pairs in maps.items()
    }
    names = {name: names_of(name) for name in (*maps, *lists())}
    words = ["<pad>", "<bos>", "<unk>", "\n", "example", ":", "->", "→", "Q", "A", ","]
    words += [*ascii_lowercase, *ascii_lowercase.upper(), *map(str, range(2 * N_NUMBERS + 1))]
    words += [word for pairs in maps.values() for pair in pairs.items() for word in pair]
    words += [word for name in names.values() for word in name]
    return {
        "vocabulary": list(dict.fromkeys(words)),
        "mappings": maps,
        "lists": {name: list(rule) for name, rule in lists().items()},
        "names": names,
        "held_out_items": held,
        "held_out_instances": list(HELD_OUT_INSTANCES),
        "held_out_lists": list(held_out_lists),
    }


def main() -> None:
    """Write the tables."""
    from tvlens.tasks.algorithmic import letter_lists

    text = json.dumps(tables(letter_lists()), ensure_ascii=False, separators=(",", ":"))
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
