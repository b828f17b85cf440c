"""What a fable is made of: words with their forms, kinds of heroes, seasons, and the plots read from their file.

The tables of fables_words.py and the lines of fables_plots.txt become objects here, once; fables.py draws from them.
There is no grammar in the linguist's sense. Two things keep the sentences right: a word carries all its forms (its
article, its pronouns, its capital), so that a line only ever asks for one of them; and every story is in the past
tense, third person singular, so that a verb never has to agree with who was drawn.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from data import fables_words as words

PLOTS_FILE = Path(__file__).with_name("fables_plots.txt")
PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her", "hers": "hers", "himself": "herself"},
    "he": {"he": "he", "him": "him", "his": "his", "hers": "his", "himself": "himself"},
    "it": {"he": "it", "him": "it", "his": "its", "hers": "its", "himself": "itself"},
}
FIXED_PRONOUNS = {"girl": ("she",), "boy": ("he",), "hen": ("she",), "ox": ("he",)}
CHILDREN = ("girl", "boy")
ROGUES = ("wolf", "weasel")  # only where a plot asks for them by name
ONE_LIMB = {"paws": "paw", "hooves": "hoof", "wings": "wing", "feet": "foot", "hands": "hand"}
ROLES = ("friend", "third", "fourth")
GIFTS = ("gift", "extra")


# -- words ------------------------------------------------------------------------------------------------------------


class Word:
    """A word that prints as itself and carries its forms as attributes: {wish}, {wish.a}, {land.in}, {friend.his}.

    Each form also exists with a capital, for the beginning of a sentence: {friend.he} and {friend.He}.
    """

    def __init__(self, text: str, **forms: str) -> None:
        self.text = text
        bare = re.sub(r"^(an?|the) ", "", text)
        self.forms = {"a": with_article(text), "the": f"the {bare}", "noun": text, "bare": bare, **forms}
        for name, form in self.forms.items():
            setattr(self, name, form)
            setattr(self, capital(name), capital(form))

    def __str__(self) -> str:
        return self.text


def capital(text: str) -> str:
    """`text` with a capital first letter and the rest as it is."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """`noun` behind its a or an, unless it brings an article along (no word here begins with a silent h)."""
    if noun.split()[0] in ("a", "an", "the"):
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _rows(table: str) -> list[list[str]]:
    """The cells of a table with a bar between columns."""
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


@dataclass(frozen=True)
class Kind:
    """What somebody is, where it lives and what it can do."""

    name: str
    house: str
    limbs: str
    skills: frozenset[str]
    may_be_hero: bool

    @property
    def pronouns(self) -> tuple[str, ...]:
        """The pronouns one of this kind may have."""
        return ("it",) if "thing" in self.skills else FIXED_PRONOUNS.get(self.name, ("she", "he"))


def _read_kinds() -> dict[str, Kind]:
    kinds = {}
    for line in words.KINDS.strip().splitlines():
        name, house, limbs, *skills = line.split()
        kinds[name.lower()] = Kind(name.lower(), house, limbs, frozenset(skills), may_be_hero=name.islower())
    return kinds


@functools.cache
def character(name: str, kind: Kind, pronoun: str) -> Word:
    """Somebody with a name: {hero} is the name, {hero.kind} what it is, {hero.he} how one speaks of it."""
    article = {"a": with_article(kind.name), "the": f"the {kind.name}"}
    limbs = {"limbs": kind.limbs, "limb": ONE_LIMB.get(kind.limbs, "")}
    return Word(name, kind=kind.name, house=with_article(kind.house), **article, **limbs, **PRONOUNS[pronoun])


@dataclass(frozen=True)
class Season:
    """The days of a season, what one sees at the beginning of a story, and what at its end."""

    name: str
    days: list[Word]
    weather: list[str]
    later: list[str]


def _read_seasons() -> dict[str, Season]:
    seasons = {}
    for name, adjectives, first, last in _rows(re.sub(r"\n\s+", " ", words.SEASONS)):
        days = [f"{adjective} {name} {hour}" for adjective in adjectives.split() for hour in words.HOURS]
        days = [Word(day, one=f"one {day}") for day in days]
        seasons[name] = Season(name, days, *([line.strip() for line in part.split(" / ")] for part in (first, last)))
    return seasons


# What can be wished for: its name, and the variants (a red scarf, a striped scarf) of which a story takes one.
Wish = list[Word]


def _read_things() -> dict[str, list[Wish]]:
    things = {}
    for group, table in words.THINGS.items():
        rows = [(noun, adjectives.split()) for noun, adjectives in _rows(table)]
        things[group] = [[Word(f"{adjective} {noun}", noun=noun) for adjective in some] for noun, some in rows]
    return things


def _read_theme(table: str) -> list[Wish]:
    """The wishes of a theme: the first row names the columns, which become forms of the wish."""
    (_, *columns), *rows = _rows(table)
    return [[Word(wish, **dict(zip(columns, cells)))] for wish, *cells in rows]


KINDS = _read_kinds()
BYSTANDERS = {name: Word(name) for name in KINDS}
NAMES = {pronoun: names.split() for pronoun, names in words.NAMES.items()}
SEASONS = _read_seasons()
LANDS = [Word(name, **{"in": where, "where": where, "walk": walk}) for name, where, walk in _rows(words.LANDS)]
PLACES = [Word(place) for place in words.PLACES]
TREES = [Word(tree) for tree in words.TREES]
KIN = [Word(kin) for kin in words.KIN]
TRAITS = [Word(trait) for trait in words.TRAITS.split()]


# -- plots ------------------------------------------------------------------------------------------------------------

# A line is what stands between its choices, and the choices: ("The ", ["red", "green"], " one.")
Line = tuple[str | list[str], ...]


@dataclass(frozen=True)
class Beat:
    """One step of a plot: the lines that can tell it, of which one is drawn. Without lines it begins a paragraph."""

    lines: list[Line]
    optional: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot with one of its obstacles (if it takes any), and who and what may appear in it."""

    name: str
    obstacle: str
    heroes: list[Kind]
    roles: dict[str, list[Kind]]
    wishes: list[Wish]
    gifts: dict[str, list[Wish]]
    seasons: list[Season]
    beats: list[Beat]


def _compile(line: str) -> Line:
    pieces = re.split(r"\[(.*?)\]", line)
    return tuple(piece.split("|") if i % 2 else piece for i, piece in enumerate(pieces) if piece)


def _read_section(body: str) -> tuple[dict[str, str], list[Beat | str]]:
    """Header and beats of a section of the plots file; a name stands where a shared beat belongs."""
    header, beats = {}, []
    for line in body.splitlines():
        mark, _, rest = line.partition(" ")
        if mark in ("-", "?"):
            beats.append(Beat([_compile(rest)], optional=mark == "?"))
        elif mark == "|":
            beats[-1].lines.append(_compile(rest))
        elif mark == "/":
            beats.append(Beat([]))
        elif mark.startswith("@"):
            beats.append(mark)
        elif mark:
            header[mark.removesuffix(":")] = rest
    return header, beats


def _who(terms: str) -> list[Kind]:
    """The kinds that the terms of a header describe: "any -fly", "dig smell", "child", "fox wolf"."""
    chosen, excluded = [], set()
    for term in terms.split():
        if term.startswith("-"):
            excluded.update(_who(term[1:]))
        else:
            chosen += [kind for kind in KINDS.values() if _is(kind, term)]
    return [kind for kind in dict.fromkeys(chosen) if kind not in excluded]


def _is(kind: Kind, term: str) -> bool:
    if term in ("any", "animal", "child"):
        known = "child" if kind.name in CHILDREN else "animal"
        return term in ("any", known) and kind.name not in ROGUES and "thing" not in kind.skills
    return term in (kind.name, kind.limbs, *kind.skills)


def _plot(name: str, obstacle: str, header: dict[str, str], beats: list[Beat], wishes: dict[str, list[Wish]]) -> Plot:
    heroes = [kind for kind in _who(header["hero"]) if kind.may_be_hero]
    return Plot(
        name=name,
        obstacle=obstacle,
        # girls and boys are two kinds among many, but a good part of what one expects of a story
        heroes=[kind for kind in heroes for _ in range(3 if kind.name in CHILDREN else 1)],
        roles={role: _who(header.get(role, "animal")) for role in ROLES},
        wishes=wishes[header["wish"]],
        gifts={gift: wishes[header.get(gift, "keepsake")] for gift in GIFTS},
        seasons=[SEASONS[season] for season in header.get("season", " ".join(SEASONS)).split()],
        beats=beats,
    )


@functools.cache
def plots() -> dict[str, list[Plot]]:
    """Every plot by its name, once with each obstacle it can be told with."""
    parts: dict[str, dict[str, str]] = {"plot": {}, "shared": {}, "obstacle": {}, "theme": {}}
    sections = re.findall(r"^== (\w+) (.+)\n((?:(?!== ).*\n)*)", PLOTS_FILE.read_text(encoding="utf-8"), re.MULTILINE)
    for part, name, body in sections:
        parts[part][name] = body.strip()
    wishes = {**_read_things(), **{name: _read_theme(table) for name, table in parts["theme"].items()}}
    shared = {f"@{name}": _read_section(body)[1][0] for name, body in parts["shared"].items()}
    obstacles = {name: _read_section(body) for name, body in parts["obstacle"].items()}
    found: dict[str, list[Plot]] = {}
    for name, body in parts["plot"].items():
        header, beats = _read_section(body)
        for obstacle in header.get("obstacle", "none").replace("all", " ".join(obstacles)).split():
            extra, named = obstacles.get(obstacle, ({}, []))
            known = {**shared, **dict(zip(named[::2], named[1::2]))}
            told = [known[beat] if isinstance(beat, str) else beat for beat in beats]
            hero = f"{header.get('hero', 'any')} {extra.get('hero', '')}"
            found.setdefault(name, []).append(_plot(name, obstacle, {**header, **extra, "hero": hero}, told, wishes))
    return found
