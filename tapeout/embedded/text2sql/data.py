"""What ``text2sql`` is asked: tables, and questions about them with the SQL that answers each."""

from __future__ import annotations

import random
import zlib
from typing import NamedTuple

from tapeout.embedded.training import Sample

SAMPLES = 38_400
HELD_OUT = 100
ONE_IN = 10  # one query shape in so many is held out


class Column(NamedTuple):
    """A column. Its values are either words or the whole numbers from ``low`` to ``high``.

    Attributes:
        name: in SQL; in a question ``_`` is a space.
        words: the values of a column of text, none for numbers.
        low: the smallest number.
        high: the largest number.
    """

    name: str
    words: tuple[str, ...] = ()
    low: int = 0
    high: int = 0

    @property
    def said(self) -> str:
        """The name as a question says it."""
        return self.name.replace("_", " ")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CITIES = _words(
    "Athens Berlin Boston Cairo Chicago Delhi Dublin Geneva Hamburg Lagos Lima Lisbon London Madrid Milan Nairobi "
    "Osaka Oslo Paris Prague Quito Rome Seoul Sydney Tokyo Toronto Vienna Warsaw"
)
COUNTRIES = _words(
    "Argentina Austria Brazil Canada Chile China Denmark Egypt France Germany Greece India Italy Japan Kenya Mexico "
    "Norway Peru Poland Portugal Spain Sweden Turkey Vietnam"
)
PEOPLE = _words(
    "Adams Baker Clark Davis Evans Fischer Garcia Hughes Ivanov Jones Kumar Lopez Meyer Nguyen Okafor Patel Quinn Rossi "
    "Sato Tanaka Usman Varga Weber Young Zhang"
)
COLOURS = _words("black blue brown green grey orange pink purple red silver white yellow")

TABLES: dict[str, tuple[Column, ...]] = {
    "books": (
        Column("author", PEOPLE),
        Column("genre", _words("biography comedy crime fantasy history poetry romance travel")),
        Column("language", _words("Arabic Dutch English French German Hindi Korean Spanish")),
        Column("pages", (), 40, 1200),
        Column("year", (), 1900, 2025),
    ),
    "cars": (
        Column("maker", _words("Audi Fiat Ford Honda Kia Mazda Skoda Tesla Toyota Volvo")),
        Column("colour", COLOURS),
        Column("fuel", _words("diesel electric hybrid hydrogen petrol")),
        Column("price", (), 900, 90000),
        Column("seats", (), 2, 9),
    ),
    "employees": (
        Column("name", PEOPLE),
        Column("department", _words("design finance legal marketing research sales support")),
        Column("city", CITIES),
        Column("salary", (), 1500, 9900),
        Column("age", (), 18, 67),
    ),
    "flights": (
        Column("airline", _words("Aeroflot Delta Emirates Iberia Lufthansa Qantas Ryanair United")),
        Column("origin", CITIES),
        Column("destination", CITIES),
        Column("distance", (), 150, 9900),
        Column("delay", (), 0, 240),
    ),
    "hotels": (
        Column("city", CITIES),
        Column("country", COUNTRIES),
        Column("owner", PEOPLE),
        Column("rooms", (), 5, 800),
        Column("stars", (), 1, 5),
    ),
    "movies": (
        Column("director", PEOPLE),
        Column("genre", _words("action comedy crime drama fantasy horror romance western")),
        Column("country", COUNTRIES),
        Column("length", (), 60, 240),
        Column("budget", (), 100, 99000),
    ),
    "orders": (
        Column("customer", PEOPLE),
        Column("product", _words("bed chair clock desk lamp mirror shelf sofa table")),
        Column("status", _words("cancelled delivered open paid returned shipped")),
        Column("quantity", (), 1, 500),
        Column("total_price", (), 10, 99000),
    ),
    "players": (
        Column("name", PEOPLE),
        Column("team", _words("Bears Eagles Falcons Giants Hawks Lions Rockets Sharks Tigers")),
        Column("position", _words("centre defender forward goalkeeper striker winger")),
        Column("goals", (), 0, 90),
        Column("shirt_number", (), 1, 99),
    ),
    "products": (
        Column("brand", _words("Acme Apex Globex Hooli Initech Nimbus Orbit Umbra Vertex")),
        Column("colour", COLOURS),
        Column("material", _words("cotton glass leather paper plastic steel wood wool")),
        Column("weight", (), 1, 5000),
        Column("price", (), 1, 9900),
    ),
    "students": (
        Column("name", PEOPLE),
        Column("subject", _words("art biology chemistry economics geography law maths physics")),
        Column("country", COUNTRIES),
        Column("grade", (), 1, 100),
        Column("age", (), 16, 40),
    ),
}  # fmt: skip

FUNCTIONS = {
    "AVG": ("average", "mean"),
    "MAX": ("highest", "largest", "maximum"),
    "MIN": ("lowest", "smallest", "minimum"),
    "SUM": ("total", "combined"),
}
COMPARISONS = {
    "=": ("is {}", "equals {}", "is exactly {}"),
    "!=": ("is not {}", "differs from {}", "is other than {}"),
    ">": ("is above {}", "is more than {}", "is over {}", "exceeds {}"),
    "<": ("is below {}", "is less than {}", "is under {}"),
    ">=": ("is at least {}", "is {} or more"),
    "<=": ("is at most {}", "is {} or less"),
}
EQUALITIES = ("=", "!=")  # all that is asked of text
COLUMN_HEADS = ("show the {} of {}", "list the {} of all {}", "what is the {} of {}", "give me the {} of {}", "find the {} for {}")  # fmt: skip
ALL_HEADS = ("show all {}", "list the {}", "find all {}", "which are the {}", "give me all {}")
COUNT_HEADS = (
    "how many {} are there",
    "count the {}",
    "what is the number of {}",
    "give me the number of {}",
)
FUNCTION_HEADS = ("what is the {} {} of {}", "find the {} {} of all {}", "show the {} {} of {}", "compute the {} {} for {}")  # fmt: skip


class Condition(NamedTuple):
    """``column operator value``."""

    column: Column
    operator: str
    value: str

    @property
    def sql(self) -> str:
        """As SQL; text stands between quotes."""
        value = f"'{self.value}'" if self.column.words else self.value
        return f"{self.column.name} {self.operator} {value}"


class Query(NamedTuple):
    """One SELECT.

    Attributes:
        table: one of TABLES.
        function: of FUNCTIONS, COUNT, or none.
        columns: that are selected; none: all of them, or the rows that COUNT counts.
        conditions: one or two.
        connective: AND or OR.
    """

    table: str
    function: str
    columns: tuple[str, ...]
    conditions: tuple[Condition, ...]
    connective: str

    @property
    def _selected(self) -> str:
        columns = ", ".join(self.columns) or "*"
        return f"{self.function}({columns})" if self.function else columns

    @property
    def sql(self) -> str:
        """The whole statement."""
        conditions = f" {self.connective} ".join(condition.sql for condition in self.conditions)
        return f"SELECT {self._selected} FROM {self.table} WHERE {conditions}"

    @property
    def held_out(self) -> bool:
        """Whether queries of this shape are kept from training: all of the statement but the values."""
        conditions = f" {self.connective} ".join(f"{c.column.name} {c.operator}" for c in self.conditions)
        shape = f"SELECT {self._selected} FROM {self.table} WHERE {conditions}"
        return zlib.crc32(shape.encode()) % ONE_IN == 0


def _condition(rng: random.Random, column: Column) -> Condition:
    if column.words:
        return Condition(column, rng.choice(EQUALITIES), rng.choice(column.words))
    return Condition(column, rng.choice(tuple(COMPARISONS)), str(rng.randint(column.low, column.high)))


def draw(rng: random.Random) -> Query:
    """One query: the table, what is selected, one or two conditions on different columns."""
    table = rng.choice(tuple(TABLES))
    columns = TABLES[table]
    kind = rng.choice(("columns", "columns", "all", "count", "function"))
    function, selected = "", ()
    if kind == "columns":
        selected = tuple(column.name for column in rng.sample(columns, rng.choice((1, 2))))
    elif kind == "count":
        function = "COUNT"
    elif kind == "function":
        function = rng.choice(tuple(FUNCTIONS))
        selected = (rng.choice([column.name for column in columns if not column.words]),)
    asked = rng.sample(columns, rng.choice((1, 2)))
    return Query(
        table,
        function,
        selected,
        tuple(_condition(rng, column) for column in asked),
        rng.choice(("AND", "OR")) if len(asked) == 2 else "",
    )


def _head(rng: random.Random, query: Query) -> str:
    columns = " and ".join(column.replace("_", " ") for column in query.columns)
    if query.function == "COUNT":
        return rng.choice(COUNT_HEADS).format(query.table)
    if query.function:
        return rng.choice(FUNCTION_HEADS).format(rng.choice(FUNCTIONS[query.function]), columns, query.table)
    if columns:
        return rng.choice(COLUMN_HEADS).format(columns, query.table)
    return rng.choice(ALL_HEADS).format(query.table)


def ask(rng: random.Random, query: Query) -> Sample:
    """A question for the query in one of its phrasings, and the SQL."""
    told = [c.said + " " + rng.choice(COMPARISONS[o]).format(v) for c, o, v in query.conditions]
    first = rng.choice(("whose", "where", "where the"))
    rest = "".join(
        f" {query.connective.lower()} {rng.choice(('', 'the '))}{condition}" for condition in told[1:]
    )
    return Sample(f"{_head(rng, query)} {first} {told[0]}{rest} <sep>", f" {query.sql}")


def samples() -> tuple[list[Sample], list[Sample]]:
    """Return the samples to train on and those held out, whose query's shape never occurs in training."""
    rng = random.Random(0)
    trained: list[Sample] = []
    held_out: dict[Sample, None] = {}
    while len(trained) < SAMPLES or len(held_out) < HELD_OUT:
        query = draw(rng)
        sample = ask(rng, query)
        if query.held_out:
            if len(held_out) < HELD_OUT:
                held_out[sample] = None
        elif len(trained) < SAMPLES:
            trained.append(sample)
    return trained, list(held_out)
