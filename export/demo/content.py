# ruff: noqa: SIM905 (lists of words read better as text)
"""What stands in the demo pictures: strings, receipts, forms, notes and scenes of shapes; and which are held out.

A string is held out when the first byte of its SHA-256 is below `HELD_OUT`: 5 % of all strings, by a rule that needs
no list. Training never draws a held-out string, evaluation draws nothing else (labels of receipts and forms aside).

Some characters look alike in many faces at this size (I l 1, O 0 o, c C, ...). Random strings leave out what only
context could tell; words contain every letter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from random import Random

HELD_OUT = 13
"""Of 256."""

UPPER = "ABCDEFGHJKLMNPQRSTUVWXYZ"
LOWER = "abcdefghijkmnpqrstuvwxyz"
DIGITS = "0123456789"
MIXED = "ABDEFGHJLMNQRTY" + LOWER
MARKS = "-./:#+%&$,()"
CHARSET = "".join(sorted(set(UPPER + LOWER + DIGITS + MARKS + "IOlo")))
"""Every character a picture can hold, the space excepted."""

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (35, 80, 200),
    "yellow": (245, 210, 40),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "orange": (245, 130, 30),
    "purple": (130, 50, 160),
}
SHAPES = ("circle", "square", "triangle", "star")

_WORDS = """
able acid also apple april arm art baby back bag ball bank base bath bear beef bell belt best bike bird black blue boat
body bone book boot bowl box bread brick brown bus cake call camp card care cash cat chair cheese chef city clean clock
club coat coffee cold color cook corn cost cow cream cup dark data date day deep desk diet dish dog door down draw dress
drink dry duck dust early east easy egg end exit eye face fall farm fast feet film fine fire fish five flag floor flour
flower food foot form four fox free fresh fruit full game gate gift girl glass gold good grape grass gray green ground
guest hair half hall hand happy hat heat high hill home honey horse hotel hour house ice idea inch iron island jacket
jam job juice july june keep key kind king kitchen lake lamp large last late law leaf left lemon letter light lime line
lion list little long lost loud low luck lunch mail main map march mark meal meat menu metal mile milk mint model money
moon more morning motor mouse music name near neck new nice night nine noon north nose note oak ocean oil old olive one
onion open orange order oven over page paint pair pale palm paper park part party pasta path peach pear pen pepper
phone piano pink pizza place plan plant plate play plum plus pool poor port post potato price queen quick quiet rain
red rent rice rich right ring river road rock roof room rose round salad sale salt sand sauce school sea seat second
seven shirt shoe shop short silver sink six size skin sky slow small smart snow soap soda soft song soup south spice
spoon spring square stamp star start steak stone store street sugar summer sun swim table tail tall taste taxi tea team
ten test text thank three ticket time toast today tomato top total towel town toy train tree truck two under upper use
van view village wall warm wash water wave week well west wheat white wide wild wind window wine winter wolf wood wool
word work world yard year yellow young zebra zero zone
""".split()
_NAMES = """
Ada Alan Alma Anna Arne Beata Bo Carl Clara Dana David Edith Elin Emil Erik Eva Finn Frida Greta Hugo Ida Ines Ivan Jan
Jonas Karin Lars Lea Leo Lisa Ludvig Maja Maria Mark Max Mia Nils Nora Olga Olle Otto Paula Per Petra Rita Rosa Ruth
Sara Sofia Sven Tara Tom Ulla Vera Viktor Wanda Xenia Yusuf Zoe
""".split()
_CITIES = """
Athens Berlin Bern Bonn Boston Cairo Cork Dakar Delhi Dublin Geneva Ghent Graz Kyiv Leeds Lima Lisbon London Lyon Madrid
Malmo Milan Munich Nice Oslo Paris Porto Prague Quito Riga Rome Seoul Sofia Tokyo Turin Vienna Warsaw York Zagreb Zurich
""".split()
_ITEMS = """
APPLE BAGEL BANANA BEEF BEER BREAD BUTTER CAKE CHEESE CIDER COCOA COFFEE COLA CORN CREAM EGGS FISH FLOUR GRAPES HAM HONEY
JAM JUICE LEMON LIME MELON MILK NUTS OATS OIL OLIVES ONION PASTA PEACH PEAR PEPPER PIZZA PLUM RICE SALAD SALT SOAP SODA
SOUP SUGAR TEA TOAST TOMATO WATER WINE
""".split()
_ONSETS = "b bl br c ch d dr f fl g gr h j k l m n p pl pr qu r s sh sl st t tr v w y z".split()
_VOWELS = "a e i o u ai ea oo ou".split()
_CODAS = ["", *"b d ck ft g l ll m mp n nd ng nt p r rd rk s st t x".split()]


def held_out(text: str) -> bool:
    """Whether `text` is reserved for evaluation."""
    return sha256(text.encode()).digest()[0] < HELD_OUT


def wanted(rng: Random, evaluation: bool, make: Callable[[Random], str]) -> str:
    """Draw from `make` until the string is on the right side of the held-out rule."""
    while True:
        text = make(rng)
        if held_out(text) == evaluation:
            return text


def word(rng: Random) -> str:
    """An English word or a pronounceable invention, in lower case."""
    if rng.random() < 0.5:
        return rng.choice(_WORDS)
    syllables = rng.choices((1, 2, 3), (2, 5, 2))[0]
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)


def _cased(rng: Random, text: str) -> str:
    case = rng.randrange(4)
    return text.upper() if case == 0 else text.title() if case == 1 else text.capitalize() if case == 2 else text


def _words(rng: Random) -> str:
    return _cased(rng, " ".join(word(rng) for _ in range(rng.choices((1, 2, 3), (3, 4, 2))[0])))


def _random_string(rng: Random, low: int, high: int) -> str:
    alphabet = rng.choice((UPPER + DIGITS, LOWER + DIGITS, MIXED + DIGITS, DIGITS))
    text = [rng.choice(alphabet) for _ in range(rng.randint(low, high))]
    for _ in range(rng.choices((0, 1, 2), (5, 3, 1))[0]):
        if len(text) > 4:
            text[rng.randrange(1, len(text) - 1)] = rng.choice(MARKS[:7] + "  ")
    return " ".join("".join(text).split())


def price(rng: Random) -> str:
    return f"{rng.choice((rng.randrange(1, 20), rng.randrange(1, 100)))}.{rng.randrange(100):02d}"


def date(rng: Random) -> str:
    year, month, day = rng.randrange(1990, 2040), rng.randrange(1, 13), rng.randrange(1, 29)
    return rng.choice((f"{year}-{month:02d}-{day:02d}", f"{day}/{month}/{year}", f"{day:02d}.{month:02d}.{year}"))


def _figures(rng: Random) -> str:
    n = rng.randrange
    forms = (
        lambda: "$" + price(rng),
        lambda: "$ " + price(rng),
        lambda: date(rng),
        lambda: f"{n(24):02d}:{n(60):02d}",
        lambda: f"{n(24):02d}:{n(60):02d}:{n(60):02d}",
        lambda: f"+{n(10, 99)} {n(10, 999)} {n(100, 9999)}",
        lambda: f"No. {n(1, 99999)}",
        lambda: f"#{n(1, 999999)}",
        lambda: f"{n(1, 100)} % off",
        lambda: f"{rng.choice(UPPER)}{rng.choice(UPPER)}-{n(100, 99999)}",
        lambda: f"{n(1, 9999)} ({n(1, 99)})",
        lambda: f"{n(1, 99)} + {n(1, 99)}",
        lambda: f"{word(rng).title()} {n(1, 999)}",
        lambda: f"{word(rng).title()} & {word(rng).title()}",
        lambda: f"{word(rng).title()}, {word(rng)}",
        lambda: f"{n(1, 10)}/{n(1, 10)} {word(rng)}",
    )
    return rng.choice(forms)()


def line_text(rng: Random, evaluation: bool, low: int = 4, high: int = 16) -> str:
    """One line of `low` to `high` characters: random strings, words, figures."""

    def make(rng: Random) -> str:
        while True:
            kind = rng.random()
            if kind < 0.5 or high < 5:
                text = _random_string(rng, low, high)
            else:
                text = _words(rng) if kind < 0.8 else _figures(rng)
            if low <= len(text) <= high:
                return text

    return wanted(rng, evaluation, make)


@dataclass(frozen=True)
class Page:
    """Lines of a page; a line of two parts stands at the left and the right edge. `facts` answers questions."""

    lines: tuple[tuple[str, ...], ...]
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What reading the page aloud gives: parts joined by a space, lines by a newline."""
        return "\n".join(" ".join(parts) for parts in self.lines)


def receipt(rng: Random, evaluation: bool, count: int) -> Page:
    """A shop's name, `count - 2` items with prices, and their true total."""
    lines: list[tuple[str, ...]] = [(wanted(rng, evaluation, lambda r: f"{word(r)} {word(r)}".upper()[:13].strip()),)]
    cents = 0
    for _ in range(count - 2):
        item = wanted(rng, evaluation, lambda r: f"{r.choice(_ITEMS)} {price(r)}")
        name, amount = item.split(" ")
        cents += int(amount.replace(".", ""))
        lines.append((name, amount))
    total = f"{cents // 100}.{cents % 100:02d}"
    lines.append((rng.choice(("TOTAL", "Total", "SUM")), total))
    return Page(tuple(lines), {"total": total})


def form(rng: Random, evaluation: bool, count: int) -> Page:
    """Labelled fields: name, date, code, city, number, in any order."""
    makers: dict[str, Callable[[Random], str]] = {
        "name": lambda r: f"{r.choice(_NAMES)} {r.choice(_NAMES)[0]}.",
        "date": date,
        "code": lambda r: "".join(r.choice(UPPER + DIGITS) for _ in range(r.randint(4, 7))),
        "city": lambda r: f"{r.choice(_CITIES)}",
        "number": lambda r: str(r.randrange(100, 99999)),
    }
    labels = rng.sample(list(makers), min(count, len(makers)))
    facts = {}
    for label in labels:
        # A list of 40 towns has two or three that the rule reserves: every field but this one is held out as drawn.
        facts[label] = makers[label](rng) if label == "city" else wanted(rng, evaluation, makers[label])
    shown: Callable[[str], str] = rng.choice((str.title, str.upper))
    return Page(tuple((f"{shown(label)}: {facts[label]}",) for label in labels), facts)


def note(rng: Random, evaluation: bool, count: int, longest: int) -> Page:
    """Unrelated lines of 4 to `longest` characters."""
    return Page(tuple((line_text(rng, evaluation, 4, longest),) for _ in range(count)))
