"""Made-up instructions that each name the aspect of a text they are about, to teach the prompter to find it.

Real instructions differ in wording; what makes texts alike under them is mostly one noun: an intent, a topic, a
sentiment. A prompter that learnt to write that noun on many made-up instructions writes it for unseen ones too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

MEANING = "meaning"
# Common nouns of one token with a leading blank in the vocabularies of SmolLM2, Gemma 3 and Qwen2.5.
_ASPECTS = """
action animal answer artist attitude audience author brand category cause certainty character color
company content country department device difficulty disease domain drug emotion entity event fact
feature feeling field film food form format function genre goal industry ingredient instrument intent job
kind language law layout level location material matter method mood opinion organization period person
place plot price problem product purpose quality question reason relation risk role scenario season
sentiment service setting skill source speaker species sport style subject symptom task team technology
tense theme time tone tool topic type
"""


ASPECTS = tuple(_ASPECTS.split())
_THINGS = "sentence text message question request review headline title passage command document post comment"
THINGS = tuple(_THINGS.split())
_ABOUT_ASPECT = (
    "Identify the {aspect} of the {thing}.",
    "Identify the {aspect} behind the {thing}.",
    "Identify the {aspect} that the {thing} is about.",
    "Identify the {aspect} of the {thing} from its words.",
    "Tell the {aspect} of the {thing}.",
    "Tell whether the {thing}s have the same {aspect}.",
    "Decide which {aspect} the {thing} has.",
    "Classify the {thing} by its {aspect}.",
    "Group the {thing}s by {aspect}.",
    "Represent the {aspect} of the {thing}.",
    "Given a {thing}, retrieve {thing}s with the same {aspect}.",
    "Given a {thing}, retrieve {thing}s of the same {aspect}.",
    "Given a {thing}, retrieve {thing}s that are alike in {aspect}.",
    "Retrieve {thing}s that share the {aspect} of the given {thing}.",
    "Retrieve {thing}s of the same {aspect}, regardless of their {other}.",
    "Retrieve {thing}s that agree in {aspect}, ignoring the {other}.",
    "Compare the {thing}s by {aspect}, not by {other}.",
    "Retrieve {thing}s of the same {aspect}, no matter which {other} they have.",
    "Find {thing}s with the same {aspect}; their {other} does not matter.",
    "Whichever {other} they have, group the {thing}s by {aspect}.",
    "Given a {thing}, retrieve {thing}s of the same {aspect} and of any {other}.",
    "Identify the {manner} {aspect} of the {thing}.",
    "Tell which {manner} {aspect} the {field} {thing} belongs to.",
    "Identify the {aspect} of the {field} {thing}.",
)


_MANNERS = ("general", "main", "likely", "usual", "exact", "broad", "particular", "overall", "apparent", "underlying")
# Words of one token and of several, so that none of them is taken for what an instruction is about.
_FIELDS = """
legal medical financial historical chemical political agricultural musical culinary astronomical archaeological
meteorological theological psychological gardening linguistics geology economics accounting photography veterinary
dentistry oceanography aviation cryptography thermodynamics shipbuilding football sports travel cooking railway film
"""


FIELDS = tuple(_FIELDS.split())
# Of two values an instruction names, the aspect that they are values of.
VALUES = {
    "positive or negative": "sentiment",
    "good, bad or neither": "sentiment",
    "happy or sad": "emotion",
    "angry, calm or afraid": "emotion",
    "polite or rude": "tone",
    "insulting": "tone",
    "formal or casual": "style",
    "easy or hard": "difficulty",
    "dangerous or safe": "risk",
    "cheap or expensive": "price",
    "a fact or a view": "opinion",
    "about a person, a place or a thing": "entity",
    "from Europe, Asia or Africa": "location",
    "about winter or summer": "season",
}


_ABOUT_VALUES = ("Tell whether the {thing} is {values}.", "Decide whether the {field} {thing} is {values}.")
_ABOUT_MEANING = (
    "Retrieve {thing}s that mean the same as the given {thing}.",
    "Retrieve paraphrases of the given {thing}.",
    "Given a {thing}, retrieve {thing}s that say the same thing.",
    "Given a {thing}, retrieve a {other} that says the same in other words.",
    "Given a question, retrieve the {thing} that answers it.",
    "Retrieve {thing}s that answer the question.",
    "Represent the {thing} so that a search finds it.",
    "Represent the meaning of the {thing}.",
    "Retrieve {field} {thing}s that answer the question.",
    "Retrieve {field} and {field_too} {thing}s that are relevant to the query.",
    "Given a {field} question, retrieve {thing}s that answer it.",
    "Retrieve {field} {thing}s that mean the same as the given {thing}.",
    "Retrieve {thing}s that support or refute the {field} claim.",
    "Retrieve {thing}s of the same {field} {other} as the given {thing}.",
)


def instruction_about(aspect: str, other: str, thing: str, drawn: random.Random) -> str:
    """A made-up instruction about an aspect; some of the phrases name another aspect, to be ignored."""
    phrase, manner, field = drawn.choice(_ABOUT_ASPECT), drawn.choice(_MANNERS), drawn.choice(FIELDS)
    return phrase.format(aspect=aspect, other=other, thing=thing, manner=manner, field=field)


def made_up_instructions(aspects: Sequence[str], seed: int) -> Iterator[tuple[str, str]]:
    """Endless (instruction, aspect) pairs; a quarter are about the meaning as a whole.

    Args:
        aspects: at least two, from `ASPECTS` or others.
        seed: of what is drawn.
    """
    drawn = random.Random(seed)
    values_of = [(values, aspect) for values, aspect in VALUES.items() if aspect in aspects]
    while True:
        thing, kind = drawn.choice(THINGS), drawn.random()
        field, field_too = drawn.sample(FIELDS, 2)
        if kind < 0.25:
            other = drawn.choice([name for name in THINGS if name != thing])
            words = {"thing": thing, "other": other, "field": field, "field_too": field_too}
            yield drawn.choice(_ABOUT_MEANING).format(**words), MEANING
        elif kind < 0.35 and values_of:
            values, aspect = drawn.choice(values_of)
            yield drawn.choice(_ABOUT_VALUES).format(thing=thing, values=values, field=field), aspect
        else:
            aspect, other = drawn.sample(aspects, 2)
            yield instruction_about(aspect, other, thing, drawn), aspect
