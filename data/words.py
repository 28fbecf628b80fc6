"""The English of the synthetic world: word lists that every task family draws from.

Used by `sentences`, `families` and `knowledge`. Order matters: seeds index into these tuples.
"""

from __future__ import annotations

NOUNS = tuple(
    "fox crow bear horse goat eagle spider turtle rabbit lion tiger snake frog crab duck hen cow pig lamb bee "
    "farmer baker sailor teacher doctor painter singer hunter miner tailor king queen knight girl boy mother "
    "father sister brother friend guest stranger soldier judge clerk lawyer actor dancer pilot driver nurse "
    "river mountain forest garden road bridge tower castle village market harbor island valley desert lake hill "
    "house room door window roof wall floor stair table chair bed lamp candle mirror carpet bottle cup plate "
    "spoon bowl basket barrel rope ladder hammer nail needle thread coat hat glove boot ring crown coin book "
    "letter map picture song story drum flute bell clock wheel cart boat ship train engine stone brick shell "
    "feather flower tree petal seed root apple pear plum lemon onion carrot turnip bean egg cake pie cloud star "
    "storm shadow secret".split()
)
VERBS = tuple(
    (pair.partition("/")[0], pair.partition("/")[2])
    for pair in (
        "carry/carried find/found see/saw take/took bring/brought sell/sold buy/bought lose/lost hide/hid "
        "break/broke build/built paint/painted wash/washed clean/cleaned push/pushed pull/pulled lift/lifted "
        "drop/dropped throw/threw catch/caught hold/held keep/kept leave/left follow/followed chase/chased "
        "watch/watched hear/heard love/loved hate/hated fear/feared help/helped save/saved teach/taught "
        "praise/praised blame/blamed greet/greeted visit/visited invite/invited meet/met call/called "
        "thank/thanked trust/trusted cheat/cheated steal/stole draw/drew write/wrote read/read cook/cooked "
        "burn/burned cut/cut fold/folded open/opened close/closed lock/locked fix/fixed mend/mended "
        "move/moved count/counted choose/chose forget/forgot remember/remembered want/wanted need/needed "
        "guard/guarded feed/fed ride/rode"
    ).split()
)
ADJECTIVES = tuple(
    "old young big small red blue green black white yellow happy sad angry quiet loud fast slow strong weak "
    "brave clever foolish kind cruel rich poor clean dirty wet dry hot cold soft hard heavy light long short "
    "wide narrow deep tall round flat sharp dull sweet bitter bright dark empty full new broken golden silver "
    "wooden holy wild calm proud shy lazy busy tired hungry".split()
)
ADVERBS = tuple(
    "quickly slowly often never always today gladly again soon badly twice secretly softly early late well".split()
)
PREPOSITIONS = tuple("in on under near behind beside above beyond with without".split())
DETERMINERS = ("the", "a", "my", "this")

PEOPLE = tuple(
    "Anna Tom Eva Max Lena Paul Mia Jan Nora Felix Ida Oscar Clara Hugo Rosa Emil Vera Leo Jana Karl".split()
)
PLACES = tuple("Oslo Rome Paris Lima Cairo Delhi Kyoto Quito Prague Dublin Tunis Riga".split())
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())


def plural(noun: str) -> str:
    """Return the regular plural: story -> stories, fox -> foxes (the lists hold no irregular nouns)."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")
