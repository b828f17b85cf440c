"""fables: an endless supply of little English stories, for when there is no network and no patience.

A model's first samples should be judged by reading them. That takes text which is fun to read, which a model of a
million parameters learns in minutes, and in which a reader sees at once whether the model has understood: is the bell
that was lost the bell that is found, is it the mole who digs, does the friend who helped get thanked? So each fable has
a hero with a name, a kind and a wish; something in the way; somebody who helps; and an ending that fits the beginning.
Who and what was drawn once stays the same to the last line. All plots, sentences and word lists were written for this
project: fables_plots.txt and fables_words.py hold the text, fables_grammar.py reads it, this file draws and tells.

A story is a function of (seed, split, index) and nothing else. The dice are our own few lines (Python's `random` may
change between versions, and the order of its sets between runs), so the same key gives the same bytes everywhere, and
story 1,000,000 costs no more than story 0.

The split is decided by the cast: hero, kind of hero, friend and wish are hashed, and one cast in fifty belongs to
validation, for every seed. All four words stand in the text, so no story can be in both splits. Validation therefore
measures how well a model tells stories about people it has never seen together; the plots and the sentences are those
of training. It says nothing about plots a model has not seen, and it can be fitted nearly to the entropy of the dice.

Left out on purpose: groups of heroes (verbs would have to agree), two people with the same pronoun (a reader could not
tell who "she" is), tenses other than the past, and anything that would need a parser to get right.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from data import fables_grammar as grammar
from data.fables_grammar import GIFTS, PRONOUNS, ROLES, Kind, Plot, Word, capital
from errors import KestrelError

SPLITS = ("train", "val")
HELD_OUT = 50  # one cast in so many belongs to validation


@dataclass(frozen=True)
class Story:
    """A story, and what went into it (for whoever wants to check or to count)."""

    text: str
    plot: Plot
    cast: dict[str, Any]


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
    """The first sentence of a validation story: a prompt about somebody no model was trained on."""
    return re.match(r".*?[.!?]", tell(seed, "val", index).text).group()


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
    return list(grammar.plots().values())


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


# -- telling ----------------------------------------------------------------------------------------------------------


def split_of(hero: str, kind: str, friend: str, wish: str) -> str:
    """The split of all stories in which a hero of this name and kind has this friend and this wish, for every seed."""
    return "val" if hash64("fables", hero, kind, friend, wish) % HELD_OUT == 0 else "train"


def _leads(plot: Plot, split: str, dice: Dice) -> tuple[Word, Word, Word]:
    """Draw what decides the split until it is the right one: the hero, the friend and the wish."""
    while True:
        wishes = dice.pick(plot.wishes)
        hero = _somebody(plot.heroes, (), dice)
        friend = _somebody(plot.roles["friend"], (hero.kind, hero.he), dice)
        able = wishes[0].forms.get("not") in grammar.KINDS[hero.kind].skills
        if not able and split_of(hero.text, hero.kind, friend.text, wishes[0].noun) == split:
            return hero, friend, dice.pick(wishes)


def _somebody(kinds: list[Kind], unlike: tuple[str, ...], dice: Dice) -> Word:
    """Somebody of one of these kinds whose kind and pronoun are not among `unlike`.

    Hero and friend never share a pronoun, so "he" and "she" always say who is meant.
    """
    while True:
        kind = dice.pick(kinds)
        pronoun = dice.pick(kind.pronouns)
        if kind.name not in unlike and pronoun not in unlike:
            return grammar.character(dice.pick(grammar.NAMES[pronoun]), kind, pronoun)


def _cast(plot: Plot, split: str, dice: Dice) -> dict[str, Any]:
    """Everything the lines of a plot can ask for, by the name they ask with."""
    hero, friend, wish = _leads(plot, split, dice)
    cast = {"hero": hero, "friend": friend, "wish": wish}
    for form in PRONOUNS["it"]:  # {he} alone is the hero
        cast[form], cast[capital(form)] = getattr(hero, form), getattr(hero, capital(form))
    for gift, things in plot.gifts.items():
        nouns = [word.noun for name, word in cast.items() if name in ("wish", *GIFTS)]
        cast[gift] = dice.pick(dice.pick([some for some in things if some[0].noun not in nouns]))
    taken = {hero.kind, friend.kind}
    for role in ROLES[1:]:
        others = [kind.name for kind in plot.roles[role] if kind.name not in taken]
        cast[role] = grammar.BYSTANDERS[dice.pick(others)]
        taken.add(cast[role].text)
    season = dice.pick(plot.seasons)
    cast["season"], cast["day"] = season.name, dice.pick(season.days)
    cast["weather"], cast["later"] = dice.pick(season.weather), dice.pick(season.later)
    # a boat that lives by the sea does not wish to see the sea
    cast["land"] = dice.pick([land for land in grammar.LANDS if wish.bare not in land.where])
    cast["place"], cast["tree"] = dice.pick(grammar.PLACES), dice.pick(grammar.TREES)
    cast["kin"], cast["trait"] = dice.pick(grammar.KIN), dice.pick(grammar.TRAITS)
    if any("{" in form for form in wish.forms.values()):  # a theme's own lines ask for the cast too
        cast["wish"] = Word(wish.text, **{name: form.format_map(cast) for name, form in wish.forms.items()})
    return cast


def _text(plot: Plot, cast: dict[str, Any], dice: Dice) -> str:
    paragraphs: list[list[str]] = [[]]
    for beat in plot.beats:
        if not beat.lines:
            paragraphs.append([])
        elif not beat.optional or dice.below(2):
            line = dice.pick(beat.lines)
            paragraphs[-1].append("".join(piece if isinstance(piece, str) else dice.pick(piece) for piece in line))
    return "\n\n".join(map(" ".join, paragraphs)).format_map(cast)
