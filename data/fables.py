"""fables: little English stories from a seeded grammar, the data set that needs no network."""

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from data import fables_words as words
from errors import KestrelError

SPLITS = ("train", "val")
HELD_OUT = 50  # one cast in so many belongs to validation
PLOTS_FILE = Path(__file__).with_name("fables_plots.txt")
PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her", "hers": "hers", "himself": "herself"},
    "he": {"he": "he", "him": "him", "his": "his", "hers": "his", "himself": "himself"},
    "it": {"he": "it", "him": "it", "his": "its", "hers": "its", "himself": "itself"},
}
CHILDREN = {"girl": ("she",), "boy": ("he",)}
ROGUES = ("wolf", "weasel")  # never friends
ONE_LIMB = {"paws": "paw", "hooves": "hoof", "wings": "wing", "feet": "foot", "hands": "hand"}


# -- chance -----------------------------------------------------------------------------------------------------------


class Dice:
    """SplitMix64, started from a hash of the key: the same draws on every platform and in every Python."""

    def __init__(self, *key: object) -> None:
        self.state = hash64(*key)

    def below(self, n: int) -> int:
        """A number from 0 to n − 1."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return ((z ^ (z >> 31)) * n) >> 64

    def pick(self, options: list) -> Any:
        """One of the options, each as likely as the others."""
        return options[self.below(len(options))]


def hash64(*key: object) -> int:
    """A number below 2⁶⁴ that depends on the key alone, not on the process (unlike Python's hash)."""
    return int.from_bytes(blake2b("/".join(map(str, key)).encode(), digest_size=8).digest(), "little")


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
    """`noun` behind its a or an, unless it brings an article along. (No word here begins with a silent h.)"""
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
        return ("it",) if "thing" in self.skills else CHILDREN.get(self.name, ("she", "he"))


def _read_kinds() -> dict[str, Kind]:
    kinds = {}
    for line in words.KINDS.strip().splitlines():
        name, house, limbs, *skills = line.split()
        hero = name.islower()
        kinds[name.lower()] = Kind(name.lower(), house, limbs, frozenset(skills), hero)
    return kinds


def _read_things() -> dict[str, list[list[Word]]]:
    """Group → what can be wished for, each with the variants of which a story takes one."""
    things = {}
    for group, text in words.THINGS.items():
        rows = [(noun, adjectives.split()) for noun, adjectives in _rows(text)]
        things[group] = [[Word(f"{adjective} {noun}", noun=noun) for adjective in some] for noun, some in rows]
    return things


def _read_theme(table: str) -> list[list[Word]]:
    """A table of wishes from the plots file: its first row names the columns, which become forms of the wish."""
    (_, *columns), *rows = _rows(table)
    return [[Word(wish, **dict(zip(columns, cells)))] for wish, *cells in rows]


KINDS = _read_kinds()
NAMES = {pronoun: names.split() for pronoun, names in words.NAMES.items()}
THINGS = _read_things()
LANDS = [Word(name, **{"in": where, "where": where, "walk": walk}) for name, where, walk in _rows(words.LANDS)]
PLACES, TREES, TRAITS, KIN = (
    [Word(text) for text in texts] for texts in (words.PLACES, words.TREES, words.TRAITS.split(), words.KIN)
)


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


SEASONS = _read_seasons()


@functools.cache
def character(name: str, kind: Kind, pronoun: str) -> Word:
    """Somebody with a name: {hero} is the name, {hero.kind} what it is, {hero.he} how one speaks of it."""
    article = {"a": with_article(kind.name), "the": f"the {kind.name}"}
    limbs = {"limbs": kind.limbs, "limb": ONE_LIMB.get(kind.limbs, "")}
    return Word(name, kind=kind.name, house=with_article(kind.house), **article, **limbs, **PRONOUNS[pronoun])


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
    wishes: list[list[Word]]
    gifts: dict[str, list[list[Word]]]
    seasons: list[Season]
    beats: list[Beat]


ROLES = ("friend", "third", "fourth")
GIFTS = ("gift", "extra")
PARAGRAPH = Beat([])


def _compile(line: str) -> Line:
    pieces = re.split(r"\[(.*?)\]", line)
    return tuple(piece.split("|") if i % 2 else piece for i, piece in enumerate(pieces) if piece or i % 2)


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
            beats.append(PARAGRAPH)
        elif mark.startswith("@"):
            beats.append(mark)
        elif mark:
            header[mark.removesuffix(":")] = rest
    return header, beats


def _who(terms: str) -> list[Kind]:
    """The kinds that some terms of a header describe: "any -fly", "dig smell", "child", "fox wolf"."""
    chosen, excluded = [], set()
    for term in terms.split():
        if term.startswith("-"):
            excluded.update(_who(term[1:]))
        elif term in KINDS:
            chosen.append(KINDS[term])
        else:
            chosen += [kind for kind in KINDS.values() if _is(kind, term)]
    return [kind for kind in dict.fromkeys(chosen) if kind not in excluded]


def _is(kind: Kind, term: str) -> bool:
    child, rogue = kind.name in CHILDREN, kind.name in ROGUES
    if term in ("any", "animal", "child"):
        return "thing" not in kind.skills and not rogue and term in ("any", "child" if child else "animal")
    return term in kind.skills or term == kind.limbs


@functools.cache
def plots() -> dict[str, list[Plot]]:
    """Every plot by its name, once with each obstacle it can be told with."""
    parts: dict[str, dict[str, str]] = {"plot": {}, "shared": {}, "obstacle": {}, "theme": {}}
    text = PLOTS_FILE.read_text(encoding="utf-8")
    for part, name, body in re.findall(r"^== (\w+) (.+)\n((?:(?!== ).*\n)*)", text, re.MULTILINE):
        parts[part][name] = body.strip()
    wishes = {**THINGS, **{name: _read_theme(body) for name, body in parts["theme"].items()}}
    shared = {f"@{name}": _read_section(body)[1][0] for name, body in parts["shared"].items()}
    obstacles = {name: _read_section(body) for name, body in parts["obstacle"].items()}
    found = {}
    for name, body in parts["plot"].items():
        header, beats = _read_section(body)
        wanted = header.pop("obstacle", "").replace("all", " ".join(obstacles)).split()
        found[name] = [_plot(name, obstacle, header, beats, obstacles[obstacle], shared, wishes) for obstacle in wanted]
        if not wanted:
            found[name] = [_plot(name, "", header, beats, ({}, []), shared, wishes)]
    return found


def _plot(
    name: str,
    obstacle: str,
    header: dict[str, str],
    beats: list[Beat | str],
    hindrance: tuple[dict[str, str], list[Beat | str]],
    shared: dict[str, Beat],
    wishes: dict[str, list[list[Word]]],
) -> Plot:
    extra, parts = hindrance
    known = {**shared, **dict(zip(parts[::2], parts[1::2]))}
    heroes = _who(f"{header.get('hero', 'any')} {extra.get('hero', '')}")
    # girls and boys are two kinds among many, but a good part of what one expects of a story
    heroes = [kind for kind in heroes if kind.may_be_hero for _ in range(3 if kind.name in CHILDREN else 1)]
    return Plot(
        name=name,
        obstacle=obstacle,
        heroes=heroes,
        roles={role: _who(header.get(role) or extra.get(role) or "animal") for role in ROLES},
        wishes=wishes[header["wish"]],
        gifts={gift: wishes[header.get(gift, "keepsake")] for gift in GIFTS},
        seasons=[
            season
            for name, season in SEASONS.items()
            if all(name in some.get("season", name) for some in (header, extra))
        ],
        beats=[known[beat] if isinstance(beat, str) else beat for beat in beats],
    )


# -- telling ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """A story, and what went into it (for whoever wants to check or to count)."""

    text: str
    plot: Plot
    cast: dict[str, Any]


def tell(seed: int, split: str, index: int) -> Story:
    """The story with this number, made without making those before it."""
    if split not in SPLITS:
        raise KestrelError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    dice = Dice("fables", seed, split, index)
    plot = dice.pick(dice.pick(_shapes()))
    cast = _cast(plot, split, dice)
    return Story(_text(plot, cast, dice), plot, cast)


@functools.cache
def _shapes() -> list[list[Plot]]:
    return list(plots().values())


def split_of(hero: str, kind: str, friend: str, wish: str) -> str:
    """The split of all stories in which a hero of this name and kind has this friend and this wish, for every seed."""
    return "val" if hash64("fables", hero, kind, friend, wish) % HELD_OUT == 0 else "train"


def _cast(plot: Plot, split: str, dice: Dice) -> dict[str, Any]:
    """Draw who and what is in a story: first what decides the split, until it is the right one, then all the rest."""
    while True:
        wishes = dice.pick(plot.wishes)
        kind, hero = _somebody(plot.heroes, (), dice)
        friend_kind, friend = _somebody(plot.roles["friend"], (kind.name, hero.he), dice)
        able = wishes[0].forms.get("not") in kind.skills
        if not able and split_of(hero.text, kind.name, friend.text, wishes[0].noun) == split:
            break
    cast = {"hero": hero, "friend": friend, "wish": dice.pick(wishes)}
    for form in PRONOUNS["it"]:
        cast[form], cast[capital(form)] = getattr(hero, form), getattr(hero, capital(form))
    for gift, things in plot.gifts.items():
        nouns = [word.noun for name, word in cast.items() if name in ("wish", *GIFTS)]
        cast[gift] = dice.pick(dice.pick([some for some in things if some[0].noun not in nouns]))
    taken = {kind.name, friend_kind.name}
    for role in ROLES[1:]:
        others = [other.name for other in plot.roles[role] if other.name not in taken]
        cast[role] = BYSTANDERS[dice.pick(others)]
        taken.add(cast[role].text)
    season = dice.pick(plot.seasons)
    cast["season"], cast["day"] = season.name, dice.pick(season.days)
    cast["weather"], cast["later"] = dice.pick(season.weather), dice.pick(season.later)
    # a boat that lives by the sea does not wish to see the sea
    cast["land"] = dice.pick([land for land in LANDS if cast["wish"].bare not in land.where])
    cast["place"], cast["tree"] = dice.pick(PLACES), dice.pick(TREES)
    cast["kin"], cast["trait"] = dice.pick(KIN), dice.pick(TRAITS)
    if any("{" in form for form in cast["wish"].forms.values()):
        forms = {name: form.format_map(cast) for name, form in cast["wish"].forms.items()}
        cast["wish"] = Word(cast["wish"].text, **forms)
    return cast


BYSTANDERS = {name: Word(name) for name in KINDS}


def _somebody(kinds: list[Kind], unlike: tuple[str, ...], dice: Dice) -> tuple[Kind, Word]:
    """Somebody of one of these kinds whose kind and pronoun are not those of `unlike`.

    Hero and friend never share a pronoun, so "he" and "she" always say who is meant.
    """
    while True:
        kind = dice.pick(kinds)
        pronoun = dice.pick(kind.pronouns)
        if kind.name not in unlike and pronoun not in unlike:
            return kind, character(dice.pick(NAMES[pronoun]), kind, pronoun)


def _text(plot: Plot, cast: dict[str, Any], dice: Dice) -> str:
    paragraphs: list[list[str]] = [[]]
    for beat in plot.beats:
        if not beat.lines:
            paragraphs.append([])
        elif not beat.optional or dice.below(2):
            line = dice.pick(beat.lines)
            paragraphs[-1].append("".join(piece if isinstance(piece, str) else dice.pick(piece) for piece in line))
    return "\n\n".join(map(" ".join, paragraphs)).format_map(cast)


def stories(seed: int, split: str) -> Iterator[str]:
    """The stories of a seed and a split ("train" or "val"), without end."""
    return (tell(seed, split, index).text for index in itertools.count())


def corpus(seed: int, split: str, megabytes: float) -> Iterator[str]:
    """The first stories of a seed and a split, as many as fit into so many megabytes (of 10⁶ bytes)."""
    left = megabytes * 1e6
    for text in stories(seed, split):
        left -= len(text.encode())
        if left < 0:
            return
        yield text


def opening(seed: int, index: int) -> str:
    """The first sentence of a validation story: a prompt for a model that has never met this hero."""
    return re.match(r".*?[.!?]", tell(seed, "val", index).text).group()
