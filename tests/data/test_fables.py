"""The fables are the same everywhere, never cross from one split to the other, and hold together when read closely."""

import collections
import hashlib
import itertools
import math
import re

import pytest

from data import fables, fables_grammar
from errors import KestrelError

COUNT = 4000  # stories read closely: each of the fifty plots about eighty times
WORD = re.compile(r"[A-Za-z]+(?:-[a-z]+)?")
NAMES = {name for names in fables_grammar.NAMES.values() for name in names}


@pytest.fixture(scope="module")
def told() -> list[fables.Story]:
    return [fables.tell(3, "train", index) for index in range(COUNT)]


def tell_me(story: fables.Story) -> str:
    """What a failing check shows: the plot and the text."""
    return f"[{story.plot.name}, {story.plot.obstacle}]\n{story.text}"


def paragraphs(story: fables.Story) -> list[str]:
    return story.text.split("\n\n")


# -- the same everywhere, and never in both splits ---------------------------------------------------------------------


def test_same_seed_same_bytes_on_every_platform():
    train = "\n".join(itertools.islice(fables.stories(1, "train"), 100))
    val = "\n".join(itertools.islice(fables.stories(1, "val"), 100))
    assert (
        hashlib.sha256(train.encode()).hexdigest() == "55a0df83866e3789c616c38c4e08af77f5372493c16f321d4e4511809afe24dc"
    )
    assert (
        hashlib.sha256(val.encode()).hexdigest() == "be90083ab0ce1c024f0ac59d7fcd15f6c33c6165043d1d503dcbec31cbce01f5"
    )


def test_dice_are_splitmix64():
    dice = fables.Dice("any key")
    dice.state = 1234567  # the published test vector of SplitMix64
    draws = [dice.below(2**64) for _ in range(5)]
    assert draws == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_a_story_does_not_depend_on_those_before_it():
    in_order = list(itertools.islice(fables.stories(5, "train"), 40))
    assert [fables.tell(5, "train", index).text for index in reversed(range(40))] == in_order[::-1]


def test_seeds_and_splits_tell_other_stories():
    streams = [
        set(itertools.islice(fables.stories(seed, split), 200)) for seed in (1, 2, 10) for split in fables.SPLITS
    ]
    assert len(set.union(*streams)) == sum(map(len, streams)) == 200 * len(streams)


def test_train_and_validation_share_no_story_and_repeat_none():
    train = [story for seed in (1, 2, 3) for story in itertools.islice(fables.stories(seed, "train"), 16_000)]
    val = [story for seed in (1, 4) for story in itertools.islice(fables.stories(seed, "val"), 1_000)]
    assert not set(train) & set(val)
    assert len(train) - len(set(train)) <= len(train) // 1000
    assert len(val) - len(set(val)) <= len(val) // 1000


def test_what_decides_the_split_stands_in_the_text():
    for split in fables.SPLITS:
        for index in range(500):
            story = fables.tell(11, split, index)
            hero, friend, wish = (story.cast[role] for role in ("hero", "friend", "wish"))
            assert fables.split_of(hero.text, hero.kind, friend.text, wish.noun) == split
            missing = [word for word in (hero.text, hero.kind, friend.text, wish.bare) if word not in story.text]
            assert not missing or (missing == [wish.bare] and wish.noun in story.text), tell_me(story)
            first_name = next(word for word in WORD.findall(story.text) if word in NAMES)
            assert first_name in (hero.text, friend.text), tell_me(story)


def test_corpus_is_the_beginning_of_the_stories_and_fits():
    told = list(fables.corpus(1, "train", 0.05))
    size = sum(len(story.encode()) for story in told)
    assert told == list(itertools.islice(fables.stories(1, "train"), len(told)))
    assert size <= 50_000 < size + len(fables.tell(1, "train", len(told)).text)
    assert list(fables.corpus(1, "train", 0)) == []


def test_opening_is_the_first_sentence_of_a_validation_story():
    for index in range(100):
        opening = fables.opening(1, index)
        assert fables.tell(1, "val", index).text.startswith(opening)
        assert opening[-1] in ".!?"
        assert opening.count('"') % 2 == 0


def test_unknown_split_is_one_clear_sentence():
    with pytest.raises(KestrelError, match="split must be one of train, val, got 'test'"):
        next(fables.stories(1, "test"))


# -- variety -----------------------------------------------------------------------------------------------------------


def test_every_plot_and_obstacle_is_told_about_equally_often(told: list[fables.Story]):
    counts = collections.Counter(story.plot.name for story in told)
    assert set(counts) == set(fables_grammar.plots())
    assert len(counts) >= 36
    entropy = -sum(n / COUNT * math.log2(n / COUNT) for n in counts.values())
    assert entropy > 0.99 * math.log2(len(counts))
    obstacles = {story.plot.obstacle for story in told} - {"none"}
    assert len(obstacles) >= 12


def test_validation_has_every_plot():
    told = {fables.tell(1, "val", index).plot.name for index in range(800)}
    assert told == set(fables_grammar.plots())


def test_vocabulary_is_small_and_its_words_come_back(told: list[fables.Story]):
    counts = collections.Counter(word.lower() for story in told for word in WORD.findall(story.text))
    assert 800 <= len([word for word in counts if word.capitalize() not in NAMES]) <= 1500
    assert sorted(counts.values())[len(counts) // 10] >= 20
    assert set(counts) >= {name.lower() for name in NAMES}


def test_every_kind_can_be_a_hero_and_have_any_name():
    heroes = {story.cast["hero"].kind for story in (fables.tell(2, "train", i) for i in range(COUNT))}
    assert heroes == {kind.name for kind in fables_grammar.KINDS.values() if kind.may_be_hero}


def test_length_suits_a_small_context(told: list[fables.Story]):
    lengths = sorted(len(story.text.split()) for story in told)
    assert lengths[0] >= 80
    assert lengths[COUNT * 95 // 100] <= 220
    assert lengths[-1] <= 256
    assert all(3 <= len(paragraphs(story)) <= 5 for story in told)


def test_every_line_of_every_plot_can_be_told():
    for plot in (plot for variants in fables_grammar.plots().values() for plot in variants):
        cast = fables._cast(plot, "val", fables.Dice("every line", plot.name, plot.obstacle))
        for line in (line for beat in plot.beats for line in beat.lines):
            text = "".join(piece if isinstance(piece, str) else " ".join(piece) for piece in line).format_map(cast)
            assert not re.search(r"[{}|\[\]]", text), text


# -- language ----------------------------------------------------------------------------------------------------------

WRONG = {
    "a before a vowel, an before a consonant": r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]",
    "two articles": r"\b(?:a|an|the) (?:a|an|the|his|her|its) ",
    "a word twice": r"\b(\w+) \1\b",
    "a template left unfilled": r"[{}|\[\]@]",
    "a gap": r"  | [.,!?]|\n\n\n| \n|\n ",
    "a small letter after a full stop": r"[.!?] [a-z]|\.\"? [a-z]|\n[a-z]|^[a-z]",
    "a small letter where speech begins": r"(?:^|[.!?]\"? )\"[a-z]",
    "an end without a full stop": r"[^.!?\"\n](?:\n|$)|[^.!?']\"(?:\n|$)",
    "a word without a word": r"[,;:]\.|\.\.|,,",
}


@pytest.mark.parametrize("fault", WRONG)
def test_language_is_clean(told: list[fables.Story], fault: str):
    for story in told:
        found = re.search(WRONG[fault], story.text)
        assert not found, f"{found.group()!r} in {tell_me(story)}"


def test_speech_opens_and_closes(told: list[fables.Story]):
    for story in told:
        for paragraph in paragraphs(story):
            marks = [match.start() for match in re.finditer('"', paragraph)]
            assert len(marks) % 2 == 0, tell_me(story)
            for opening, closing in zip(marks[::2], marks[1::2]):
                assert re.fullmatch(r'(?:^|.* )"\w', paragraph[: opening + 2], re.DOTALL), tell_me(story)
                assert re.fullmatch(r"[.,!?']\"(?: |$)", paragraph[closing - 1 : closing + 2]), tell_me(story)


def test_only_ascii_letters_and_plain_punctuation(told: list[fables.Story]):
    assert set("".join(story.text for story in told)) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ \n.,!?:;'\"-"
    )


# -- what is said once stays true --------------------------------------------------------------------------------------


def test_hero_is_in_the_first_and_in_the_last_paragraph(told: list[fables.Story]):
    for story in told:
        hero = str(story.cast["hero"])
        assert hero in paragraphs(story)[0], tell_me(story)
        assert hero in paragraphs(story)[-1], tell_me(story)


def test_the_wish_of_the_beginning_is_in_the_ending(told: list[fables.Story]):
    for story in told:
        wish = {story.cast["wish"].noun, story.cast["wish"].bare}
        first, last = paragraphs(story)[0].lower(), paragraphs(story)[-1].lower()
        assert any(word in last for word in wish), tell_me(story)
        # whoever hears a riddle does not know the answer yet
        assert story.plot.name == "riddle" or any(word in first for word in wish), tell_me(story)


def test_nobody_is_named_but_hero_and_friend(told: list[fables.Story]):
    for story in told:
        named = set(WORD.findall(story.text)) & NAMES
        assert named == {str(story.cast["hero"]), str(story.cast["friend"])}, tell_me(story)


def test_pronouns_are_those_of_hero_and_friend(told: list[fables.Story]):
    forms = {"she": {"she", "her", "hers", "herself"}, "he": {"he", "him", "his", "himself"}, "it": set()}
    for story in told:
        hero, friend = story.cast["hero"].he, story.cast["friend"].he
        assert hero != friend
        strangers = (forms["she"] | forms["he"]) - forms[hero] - forms[friend]
        assert not strangers & {word.lower() for word in WORD.findall(story.text)} - allowed(story), tell_me(story)


def allowed(story: fables.Story) -> set[str]:
    """The old queen of the contest is the only person who has a pronoun and no name."""
    return {"she", "her"} if story.plot.name == "contest" else set()


def test_somebody_is_called_what_they_are(told: list[fables.Story]):
    kinds = "|".join(fables_grammar.KINDS)
    for story in told:
        for name, kind in re.findall(rf"\b([A-Z][a-z]+),? (?:the|an? (?:\w+ )?(?:\w+ )?)({kinds})\b", story.text):
            known = {str(story.cast[role]): story.cast[role].kind for role in ("hero", "friend")}
            assert known.get(name, kind) == kind, tell_me(story)


def test_a_thing_keeps_its_looks(told: list[fables.Story]):
    looks = collections.defaultdict(set)
    for wishes in fables_grammar._read_things().values():
        for variants in wishes:
            looks[variants[0].noun] |= {variant.text.removesuffix(variants[0].noun).strip() for variant in variants}
    checked = 0
    for story in told:
        for thing in (word for word in (story.cast["wish"], story.cast["gift"]) if word.text in story.text):
            seen = set(re.findall(rf"(\w+) {thing.noun}\b", story.text)) & looks[thing.noun] - {"old"}
            assert {f"{look} {thing.noun}" for look in seen} <= {thing.text}, tell_me(story)
            checked += len(seen)
    assert checked > COUNT / 4


def test_helpers_can_do_what_they_are_asked_for(told: list[fables.Story]):
    skills = {
        "nest": "fly", "rocks": "climb", "pond": "swim", "log": "strong", "crack": "tiny", "earth": "dig",
        "cave": "night", "river": "carry", "thorns": "prickly", "guard": "sing", "net": "gnaw", "grass": "smell",
    }  # fmt: skip
    kinds = fables_grammar.KINDS
    with_obstacle = [story for story in told if story.plot.obstacle != "none"]
    assert {story.plot.obstacle for story in with_obstacle} == set(skills)
    for story in with_obstacle:
        skill, hero, friend = skills[story.plot.obstacle], story.cast["hero"], story.cast["friend"]
        assert skill in kinds[friend.kind].skills, tell_me(story)
        assert skill not in kinds[hero.kind].skills, tell_me(story)
        thanked = re.search(r"[Tt]hank|true friend|best friend", story.text)
        assert thanked or story.plot.name == "feast", tell_me(story)


def test_an_egg_goes_back_to_the_right_mother(told: list[fables.Story]):
    mothers = {"blue": "robin", "white": "goose", "brown": "hen", "green": "duck", "grey": "swan", "yellow": "lark"}
    eggs = [story for story in told if story.plot.name == "egg"]
    for story in eggs:
        colour = re.search(r"(\w+) egg", paragraphs(story)[0]).group(1)
        assert mothers.get(colour, "sparrow") in paragraphs(story)[-1], tell_me(story)
    assert len(eggs) > 40


def test_a_message_arrives_as_it_was_sent(told: list[fables.Story]):
    letters = [story for story in told if story.plot.name == "letter"]
    for story in letters:
        sent, received = re.findall(r"'(.*?)'", story.text)
        assert sent == received, tell_me(story)
    assert len(letters) > 40


def test_a_story_has_one_season(told: list[fables.Story]):
    seasons = fables_grammar.SEASONS
    for story in told:
        named = re.findall(r"\b[Oo]ne \w+ (\w+) (?:morning|day|afternoon)\b", story.text)
        assert set(named) & set(seasons) <= {story.cast["season"]}, tell_me(story)
        for name, season in seasons.items():
            if name != story.cast["season"]:
                assert not any(line in story.text for line in season.weather + season.later), tell_me(story)
